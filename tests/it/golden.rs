//! Golden vectors of repository format version 1: what was written once is read for ever, and the
//! same input makes the same bytes again.
//!
//! Only wrapped keys are not compared when written: age draws its own randomness. Compressed frames
//! are zstd's output; when it compresses the same input to other bytes (a newer zstd, or one that is
//! called otherwise), that is no change of the format: vectors are added beside those that are there
//! ([`ROOTS`]), which stay readable, and what is written is compared with the newest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tidemark::clock::Clock;
use tidemark::pg::{Lsn, LsnRange, PgTime, SegmentSize, SystemId, TimelineId};
use tidemark::pipeline::{Budget, Level, Worker};
use tidemark::repo::{
    BackupId, Catalog, Check, ChecksumFailure, ClusterName, DecryptionIdentity, Encryption,
    EntryKind, ExtentBuilder, ExtentName, FileMeta, FilePath, FrameBatch, Inspect, Manifest,
    ManifestFacts, Object, PackName, PackOptions, Reader, Repository, Tablespace, Writer,
};
use tidemark::repo::{keys, marks};
use tidemark::store::memory::Memory;
use tidemark::store::{ObjectName, Store};

const SYSTEM: SystemId = SystemId(7_300_000_000_000_000_001);
const WAL_START: Lsn = Lsn(0x200_0000);

/// The repositories without encryption and with, the newest last: what is written now is compared with
/// these. The first were compressed slice by slice, the second a block at a time.
pub(crate) const ROOTS: [(&str, &str); 2] = [("plain", "encrypted"), ("plain-2", "encrypted-2")];

pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

/// What the backup in the vectors holds: path to content.
pub(crate) fn files() -> Vec<(&'static str, Vec<u8>)> {
    let noise = |bytes: usize| {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..bytes).map(|_| next()).collect::<Vec<u8>>()
    };
    let mut sparse = vec![0; 1 << 20];
    sparse.extend(noise(8192));
    vec![
        ("PG_VERSION", b"15\n".to_vec()),
        ("base/1/1259", (0..24_576_u32).map(|n| (n / 100) as u8).collect()),
        ("base/1/1249", sparse),
        ("base/1/empty", Vec::new()),
        ("pg_tblspc/16384/PG_15_202209061/5/6", noise(100)),
    ]
}

pub(crate) fn wal() -> Vec<u8> {
    (0..1_200_000_u32).map(|n| (n / 100 * 7) as u8).collect()
}

pub(crate) fn backup_id() -> BackupId {
    let start = "2026-11-22T10:00:00Z".parse().unwrap();
    BackupId::new(start, TimelineId::FIRST, Lsn(0x200_0028))
}

/// The three extents, and the one that is the first two joined.
fn extents() -> [(ExtentName, Option<[usize; 2]>); 4] {
    let time = PgTime::from_timestamp("2026-11-22T10:00:01.234567Z".parse().unwrap());
    let name = |from: usize, to: usize, time| {
        let at = |offset: usize| Lsn(WAL_START.0 + offset as u64);
        let range = LsnRange::new(at(from), at(to)).unwrap();
        (ExtentName { timeline: TimelineId::FIRST, range, time }, None)
    };
    let joined = name(0, 1_100_005, Some(time)).0;
    [
        name(0, 1_100_000, Some(time)),
        name(1_100_000, 1_100_005, None),
        name(1_100_005, 1_200_000, None),
        (joined, Some([0, 1])),
    ]
}

fn history() -> (TimelineId, Bytes) {
    let content = Bytes::from_static(b"1\t0/2100000\tno recovery target specified\n");
    (TimelineId::new(2).unwrap(), content)
}

/// Finds page 2 of `1259` bad.
struct OneBadPage;

impl Inspect for OneBadPage {
    fn block(&self, file: &FileMeta, offset: u64, _: &[Bytes]) -> Vec<ChecksumFailure> {
        let path = file.path.to_string();
        let bad = path == "base/1/1259" && offset == 0;
        bad.then_some(ChecksumFailure { path, block: 2, expected: 0x1234, found: 0xABCD })
            .into_iter()
            .collect()
    }
}

fn identities() -> Vec<DecryptionIdentity> {
    let text = std::fs::read_to_string(folder().join("identity.txt")).unwrap();
    DecryptionIdentity::parse_file(&text).unwrap()
}

/// Writes all objects of a repository from a fixed seed.
async fn write(encryption: &Encryption) -> Memory {
    let clock = Clock::simulated("2026-11-22T09:59:00Z".parse().unwrap(), 20_261_122);
    let store = Memory::new(&clock);
    let cluster = ClusterName::new("main").unwrap();
    let place: Arc<dyn Store> = Arc::new(store.clone());
    let repository = Repository::create(place, cluster, SYSTEM, &clock).await.unwrap();
    let writer = repository.writer(encryption).await.unwrap();
    write_wal(&writer).await;
    let (timeline, content) = history();
    writer.put_history(timeline, content).await.unwrap();
    write_backup(&writer).await;
    store
}

async fn write_wal(writer: &Writer) {
    let wal = Bytes::from(wal());
    let mut bodies: Vec<Bytes> = Vec::new();
    for (name, members) in extents() {
        let repository = writer.repository();
        let object = repository.name(&Object::Extent(name)).unwrap();
        let body = match members {
            Some(members) => {
                let parts: Vec<Bytes> = members.map(|index: usize| bodies[index].clone()).to_vec();
                Bytes::from(parts.concat())
            }
            None => {
                let (timeline, start) = (name.timeline, name.range.start());
                let mut builder =
                    ExtentBuilder::new(writer, timeline, start, Level::default()).unwrap();
                let from = (start.0 - WAL_START.0) as usize;
                builder.push(wal.slice(from..from + name.range.len_bytes() as usize)).unwrap();
                let sealed = builder.finish(name.time).unwrap();
                assert_eq!(sealed.name, name);
                sealed.body
            }
        };
        repository.store().put_if_absent(&object, body.clone()).await.unwrap();
        bodies.push(body);
    }
}

async fn write_backup(writer: &Writer) {
    let budget =
        Budget { thread_count: 1, parts_max: 2, ..Budget::backup(128 << 20, 1, Level::default()) };
    let options = PackOptions { budget, level: Level::default(), pack_bytes: 512 << 20 };
    let mut backup = writer.backup(backup_id(), options, Arc::new(OneBadPage)).unwrap();
    let path = |text: &str| FilePath::new(text).unwrap();
    backup.add_directory(path("pg_wal"), 0o700, 1_795_341_600).await.unwrap();
    for (name, content) in files() {
        let size_bytes = content.len() as u64;
        let meta = FileMeta { path: path(name), mode: 0o600, mtime: 1_795_341_601, size_bytes };
        backup.begin_file(meta).await.unwrap();
        backup.write(Bytes::from(content)).await.unwrap();
        backup.end_file().await.unwrap();
    }
    backup.add_symlink(path("pg_tblspc/16384"), -1, b"/mnt/fast".to_vec()).await.unwrap();
    let facts = ManifestFacts {
        postgres_version_num: 150_004,
        segment_size: SegmentSize::DEFAULT,
        end_timeline: TimelineId::FIRST,
        end_lsn: Lsn(0x200_0138),
        start_time: "2026-11-22T10:00:00.25Z".parse().unwrap(),
        end_time: "2026-11-22T10:05:00Z".parse().unwrap(),
        tablespaces: vec![Tablespace { oid: 16_384, location: "/mnt/fast".to_owned() }],
        settings: BTreeMap::from([("max_connections".to_owned(), "100".to_owned())]),
    };
    backup.finish_packs().await.unwrap().commit(facts).await.unwrap();
}

/// Compares what is written now with the vectors; adds those that are missing when asked to.
async fn compare(store: &Memory, name: &str) {
    let root = folder().join(name);
    let add = std::env::var_os("TIDEMARK_GOLDEN_WRITE").is_some();
    let objects = store.list_all("").await.unwrap();
    for object in &objects {
        let body = store.get(&object.name, None).await.unwrap();
        let path = root.join(object.name.as_str());
        if !path.exists() && add {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &body).unwrap();
        }
        let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        if !object.name.as_str().contains("/keys/") {
            assert!(golden == body, "{} is not what version 1 wrote", object.name);
        }
    }
    assert_eq!(load(name).await.list_all("").await.unwrap().len(), objects.len());
}

/// The vectors as a store.
async fn load(name: &str) -> Memory {
    let store = Memory::new(&Clock::system());
    let root = folder().join(name);
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap();
            let name = ObjectName::new(name).unwrap();
            let body = Bytes::from(std::fs::read(&path).unwrap());
            store.put_if_absent(&name, body).await.unwrap();
        }
    }
    store
}

async fn read(name: &str, identities: Vec<DecryptionIdentity>) {
    let store: Arc<dyn Store> = Arc::new(load(name).await);
    let cluster = ClusterName::new("main").unwrap();
    let repository = Repository::open(store, cluster, &Clock::system()).await.unwrap();
    assert_eq!(repository.system_id(), SYSTEM);
    assert_eq!(repository.identity().created.to_string(), "2026-11-22T09:59:00Z");
    let (timeline, content) = history();
    assert_eq!(repository.history_file(timeline).await.unwrap(), content);
    assert_eq!(repository.history(timeline).await.unwrap().timeline, timeline);
    let reader = repository.reader(identities);
    for (name, _) in extents() {
        let from = (name.range.start().0 - WAL_START.0) as usize;
        let expected = &wal()[from..from + name.range.len_bytes() as usize];
        assert!(reader.extent(&name).await.unwrap() == expected, "{name}");
    }
    let manifest = reader.manifest(backup_id()).await.unwrap();
    assert_eq!(repository.public_manifest(backup_id()).await.unwrap(), manifest.public);
    check_manifest(&manifest);
    read_files(&reader, &manifest).await;
}

fn check_manifest(manifest: &Manifest) {
    let public = &manifest.public;
    assert_eq!((public.id, public.system_id), (backup_id(), SYSTEM));
    assert_eq!((public.start_lsn, public.end_lsn), (Lsn(0x200_0028), Lsn(0x200_0138)));
    assert_eq!(public.start_time.to_string(), "2026-11-22T10:00:00.25Z");
    let total: usize = files().iter().map(|(_, content)| content.len()).sum();
    assert_eq!((public.plain_bytes, public.file_count), (total as u64, 5));
    assert_eq!(public.checksum_failure_count, 1);
    assert_eq!(manifest.checksum_failures[0].found, 0xABCD);
    assert_eq!(manifest.tablespaces[0].location, "/mnt/fast");
    assert_eq!(manifest.settings["max_connections"], "100");
}

async fn read_files(reader: &Reader, manifest: &Manifest) {
    let [summary] = manifest.packs.as_slice() else { panic!("one pack") };
    let pack = reader.pack(PackName { backup: backup_id(), number: 1 }).await.unwrap();
    let footer = reader.pack_footer(&pack, summary.stored_bytes, summary.footer).await.unwrap();
    let mut found: Vec<Vec<u8>> = Vec::new();
    for entry in &footer.entries {
        let size = match &entry.kind {
            EntryKind::File { size_bytes, crc32c } => {
                assert!(crc32c.is_some() && entry.mode == 0o600);
                *size_bytes as usize
            }
            EntryKind::Directory => {
                assert_eq!((entry.path.to_string(), entry.mode), ("pg_wal".to_owned(), 0o700));
                0
            }
            EntryKind::Symlink { target } => {
                assert_eq!((target.as_slice(), entry.mtime), (b"/mnt/fast".as_slice(), -1));
                0
            }
        };
        found.push(vec![0; size]);
    }
    let mut worker = Worker::new(Level::default()).unwrap();
    for batch in FrameBatch::plan(&footer, 8 << 20, |_| true) {
        let fetched = reader.fetch(&pack, batch).await.unwrap();
        fetched
            .open(&footer, Check::Hashes, &mut worker, |frame, mut block| {
                for span in &frame.spans {
                    let (piece, rest) = block.split_at(span.bytes as usize);
                    block = rest;
                    let start = span.file_offset as usize;
                    found[span.entry as usize][start..start + piece.len()].copy_from_slice(piece);
                }
                Ok(())
            })
            .unwrap();
    }
    let zero: Vec<u64> = footer.zero_runs.iter().map(|run| run.bytes).collect();
    assert_eq!(zero, [1 << 20], "zero blocks are stored nowhere");
    let names = footer.entries.iter().map(|entry| entry.path.to_string());
    let found: BTreeMap<String, Vec<u8>> = names.zip(found).collect();
    for (name, content) in files() {
        assert!(found[name] == content, "{name}");
    }
    assert_eq!(found.len(), files().len() + 2);
}

#[tokio::test]
async fn version_1_without_encryption_is_read() {
    for (plain, _) in ROOTS {
        read(plain, Vec::new()).await;
    }
}

#[tokio::test]
async fn marks_of_version_1_are_read_and_written_again() {
    let memory = load("marks").await;
    let cluster = ClusterName::new("main").unwrap();
    let store: Arc<dyn Store> = Arc::new(memory.clone());
    let repository = Repository::open(store, cluster, &Clock::system()).await.unwrap();
    let catalog = Catalog::load(&repository).await.unwrap();
    assert_eq!(catalog.foreign_count, 0);
    let second = TimelineId::new(2).unwrap();
    assert_eq!(catalog.marks.holds, [backup_id()].into());
    assert_eq!(catalog.marks.expired, [(TimelineId::FIRST, Lsn(0x200_0000))].into());
    let at = Lsn(0x1_2345_6789_ABC8);
    let damaged = LsnRange::new(at, Lsn(0x1_2345_6790_0000)).unwrap();
    let barriers = [marks::Barrier::minimal(at), marks::Barrier::damaged(damaged)];
    assert_eq!(catalog.marks.barriers, barriers.map(|barrier| (second, barrier)).into());
    let listed = memory.list_all("main/marks/").await.unwrap();
    for barrier in &barriers {
        marks::put_barrier(&repository, second, barrier).await.unwrap();
    }
    assert_eq!(memory.list_all("main/marks/").await.unwrap(), listed, "they are the same objects");
}

#[tokio::test]
async fn version_1_with_encryption_is_read() {
    for (_, encrypted) in ROOTS {
        read(encrypted, identities()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_version_1_wrote_is_written_again_byte_for_byte() {
    let key = folder().join("identity.txt");
    if !key.exists() && std::env::var_os("TIDEMARK_GOLDEN_WRITE").is_some() {
        let line = DecryptionIdentity::generate().secret_line().unwrap();
        let text = format!("# for the vectors in this folder only\n{}\n", keys::expose(&line));
        std::fs::write(key, text).unwrap();
    }
    let [.., (plain, encrypted)] = ROOTS;
    compare(&write(&Encryption::None).await, plain).await;
    let recipients = identities().iter().map(DecryptionIdentity::recipient).collect();
    compare(&write(&Encryption::Recipients(recipients)).await, encrypted).await;
}

#[tokio::test]
async fn no_byte_of_a_sealed_object_can_change_unnoticed() {
    for (name, identities) in [("plain", Vec::new()), ("encrypted", identities())] {
        let store = load(name).await;
        let place: Arc<dyn Store> = Arc::new(store.clone());
        let cluster = ClusterName::new("main").unwrap();
        let repository = Repository::open(place, cluster, &Clock::system()).await.unwrap();
        let reader = repository.reader(identities);
        let joined = extents()[3].0;
        let object = repository.name(&Object::Extent(joined)).unwrap();
        let size = store.head(&object).await.unwrap().unwrap().size_bytes as usize;
        for index in (0..200).chain((200..size).step_by(4099)).chain(size - 200..size) {
            store.damage(&object, |body| body[index] ^= 4).unwrap();
            let error = reader.extent(&joined).await.unwrap_err();
            assert!(error.to_string().contains(object.as_str()), "byte {index}: {error}");
            store.damage(&object, |body| body[index] ^= 4).unwrap();
        }
        for cut in [0, 95, 96, 111, size / 2, size - 1] {
            let mut whole = Vec::new();
            store.damage(&object, |body| whole = std::mem::take(body)).unwrap();
            store.damage(&object, |body| *body = whole[..cut].to_vec()).unwrap();
            let error = reader.extent(&joined).await.unwrap_err();
            assert_eq!(error.kind(), tidemark::error::Kind::Corrupt, "cut at {cut}: {error}");
            store.damage(&object, |body| *body = whole).unwrap();
        }
        assert!(reader.extent(&joined).await.is_ok());
    }
}

#[tokio::test]
async fn an_extent_in_the_place_of_another_is_refused() {
    let store = load("encrypted").await;
    let place: Arc<dyn Store> = Arc::new(store.clone());
    let cluster = ClusterName::new("main").unwrap();
    let repository = Repository::open(place, cluster, &Clock::system()).await.unwrap();
    let reader = repository.reader(identities());
    let [(first, _), (second, _), ..] = extents();
    let name = |extent| repository.name(&Object::Extent(extent)).unwrap();
    let other = store.get(&name(second), None).await.unwrap();
    store.damage(&name(first), |body| *body = other.to_vec()).unwrap();
    let error = reader.extent(&first).await.unwrap_err();
    assert!(error.to_string().contains("holds WAL"), "{error}");
    // Dressed up with the header of the one it replaces, it does not open.
    let mut body = load("encrypted").await.get(&name(first), None).await.unwrap().to_vec();
    let frames = &other[96..];
    body.truncate(96);
    body[68..72].copy_from_slice(&(frames.len() as u32).to_le_bytes());
    body.extend_from_slice(frames);
    store.damage(&name(first), |found| *found = body).unwrap();
    assert!(reader.extent(&first).await.is_err());
}
