//! Backups written to a store in memory and read back, with all that can go wrong in between.
#![allow(clippy::cast_possible_truncation, reason = "sizes here are small and made up")]

use std::collections::BTreeMap;
use std::sync::Mutex;

use jiff::SignedDuration;
use proptest::prelude::*;

use super::*;
use crate::clock::Clock;
use crate::pg::{Lsn, SegmentSize, TimelineId, crc32c};
use crate::pipeline::Worker;
use crate::pipeline::frame::{BLOCK_BYTES, FRAME_OVERHEAD_BYTES};
use crate::repo::header::HEADER_BYTES;
use crate::repo::manifest::{Manifest, ManifestFacts};
use crate::repo::reader::Check;
use crate::repo::{DecryptionIdentity, Encryption, FrameBatch, Reader, Repository};
use crate::store::Store;
use crate::store::memory::{Call, Memory, Outcome};

const SMALL: Budget = Budget {
    thread_count: 3,
    part_bytes: 5 << 20,
    parts_max: 6,
    blocks_max: 6,
    extent_bytes_cut: 0,
    extent_bytes_in_flight: 0,
    extent_bytes_held: 0,
    batch_bytes: 3 << 20,
    batches_max: 1,
};

struct Place {
    store: Memory,
    repository: Repository,
    identity: DecryptionIdentity,
}

impl Place {
    async fn new() -> Self {
        let clock = Clock::simulated("2026-11-22T10:00:00Z".parse().unwrap(), 7);
        let (store, repository) = Repository::in_memory(&clock).await;
        Self { store, repository, identity: DecryptionIdentity::generate() }
    }

    fn id(&self) -> BackupId {
        let start = "2026-11-22T10:00:00Z".parse().unwrap();
        BackupId::new(start, TimelineId::FIRST, Lsn(0x200_0028))
    }

    async fn begin(&self, pack_bytes: u64, inspect: Arc<dyn Inspect>) -> BackupWriter {
        let encryption = Encryption::Recipients(vec![self.identity.recipient()]);
        self.begin_with(encryption, pack_bytes, inspect).await
    }

    async fn begin_with(
        &self,
        encryption: Encryption,
        pack_bytes: u64,
        inspect: Arc<dyn Inspect>,
    ) -> BackupWriter {
        self.begin_within(SMALL, encryption, pack_bytes, inspect).await
    }

    async fn begin_within(
        &self,
        budget: Budget,
        encryption: Encryption,
        pack_bytes: u64,
        inspect: Arc<dyn Inspect>,
    ) -> BackupWriter {
        let writer = self.repository.writer(&encryption).await.unwrap();
        let options = PackOptions { budget, level: Level::default(), pack_bytes };
        writer.backup(self.id(), options, inspect).unwrap()
    }

    fn reader(&self) -> Reader {
        self.repository.reader(vec![self.identity.clone()])
    }

    async fn names(&self) -> Vec<String> {
        let all = self.store.list_all("main/base/").await.unwrap();
        all.into_iter().map(|object| object.name.to_string()).collect()
    }
}

fn facts() -> ManifestFacts {
    ManifestFacts {
        postgres_version_num: 150_004,
        segment_size: SegmentSize::DEFAULT,
        end_timeline: TimelineId::FIRST,
        end_lsn: Lsn(0x200_0100),
        start_time: "2026-11-22T10:00:00.25Z".parse().unwrap(),
        end_time: "2026-11-22T10:05:00Z".parse().unwrap(),
        tablespaces: Vec::new(),
        settings: BTreeMap::from([("max_connections".to_owned(), "100".to_owned())]),
    }
}

fn path(text: &str) -> FilePath {
    FilePath::new(text).unwrap()
}

/// Bytes that compress a little, or not at all.
fn content(seed: u64, bytes: usize, compressible: bool) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if compressible { (state >> 61) as u8 } else { (state >> 56) as u8 }
    };
    (0..bytes).map(|_| next()).collect()
}

async fn put_file(backup: &mut BackupWriter, name: &str, data: &[u8], chunk: usize) -> Result<()> {
    let meta = FileMeta { path: path(name), mode: 0o600, mtime: 5, size_bytes: data.len() as u64 };
    backup.begin_file(meta).await?;
    for bytes in data.chunks(chunk) {
        backup.write(Bytes::copy_from_slice(bytes)).await?;
    }
    backup.end_file().await
}

/// Reads a whole backup back: every file, and every other entry with an empty content.
async fn read_back(reader: &Reader, manifest: &Manifest) -> BTreeMap<String, Vec<u8>> {
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut crcs = BTreeMap::new();
    let mut worker = Worker::new(Level::default()).unwrap();
    for summary in &manifest.packs {
        let name = PackName { backup: manifest.public.id, number: summary.number };
        let pack = reader.pack(name).await.unwrap();
        let place = reader.footer_place(&pack, summary.stored_bytes).await.unwrap();
        assert_eq!(place, summary.footer);
        let footer = reader.pack_footer(&pack, summary.stored_bytes, place).await.unwrap();
        assert_eq!(footer.frames.len(), summary.frame_count as usize);
        for entry in &footer.entries {
            let size = match entry.kind {
                EntryKind::File { size_bytes, crc32c } => {
                    if let Some(crc) = crc32c {
                        assert!(crcs.insert(entry.path.to_string(), crc).is_none());
                    }
                    size_bytes
                }
                _ => 0,
            };
            let file = files.entry(entry.path.to_string()).or_default();
            file.resize(size as usize, 0);
        }
        let mut offset = 64;
        for frame in &footer.frames {
            assert_eq!(frame.offset, offset, "frames lie side by side");
            offset = frame.end();
        }
        assert_eq!(offset, summary.footer.offset);
        for batch in FrameBatch::plan(&footer, SMALL.batch_bytes, |_| true) {
            let fetched = reader.fetch(&pack, batch).await.unwrap();
            fetched
                .open(&footer, Check::Hashes, &mut worker, |frame, mut block| {
                    for span in &frame.spans {
                        let (piece, rest) = block.split_at(span.bytes as usize);
                        block = rest;
                        let entry = &footer.entries[span.entry as usize];
                        let file = files.get_mut(&entry.path.to_string()).unwrap();
                        let start = span.file_offset as usize;
                        file[start..start + piece.len()].copy_from_slice(piece);
                    }
                    Ok(())
                })
                .unwrap();
        }
    }
    for (name, crc) in crcs {
        assert_eq!(crc32c(&files[&name]), crc, "{name}");
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_all_sizes_come_back_from_packs_of_all_sizes() {
    let sizes = [0, 1, 8192, 1 << 20, (1 << 20) + 1, 3 << 20, 300_000, 800_000, 14 << 20, 8192, 0];
    for (pack_bytes, chunk) in [(u64::MAX, 65_536), (6 << 20, 100_001), (1, 1 << 21)] {
        let place = Place::new().await;
        let mut backup = place.begin(pack_bytes, Arc::new(NoInspection)).await;
        let mut expected = BTreeMap::new();
        backup.add_directory(path("base"), 0o700, 1).await.unwrap();
        expected.insert("base".to_owned(), Vec::new());
        for (index, size) in sizes.into_iter().enumerate() {
            let mut data = content(index as u64, size, index % 2 == 0);
            if size == 3 << 20 {
                data[1 << 20..].fill(0);
            }
            let name = format!("base/{index}");
            put_file(&mut backup, &name, &data, chunk).await.unwrap();
            expected.insert(name, data);
        }
        backup.add_symlink(path("pg_tblspc/5"), 2, b"/mnt/fast".to_vec()).await.unwrap();
        expected.insert("pg_tblspc/5".to_owned(), Vec::new());
        let counters = backup.counters();
        let packed = backup.finish_packs().await.unwrap();
        let total: usize = sizes.iter().sum();
        let progress = counters.progress();
        assert_eq!(progress.plain_bytes, total as u64);
        assert_eq!(progress.stored_bytes, packed.stored_bytes());
        assert_eq!(progress.file_count, sizes.len() as u64);
        assert!(place.repository.public_manifest(place.id()).await.is_err(), "not yet visible");
        let written = packed.commit(facts()).await.unwrap();
        let manifest = place.reader().manifest(place.id()).await.unwrap();
        assert_eq!(written, manifest);
        assert_eq!(place.repository.public_manifest(place.id()).await.unwrap(), manifest.public);
        assert!((manifest.packs.len() == 1) || pack_bytes < u64::MAX);
        assert!(manifest.packs.len() > 1 || pack_bytes > 1);
        assert!(read_back(&place.reader(), &manifest).await == expected, "pack {pack_bytes}");
    }
}

/// The room for the header in front of a part is in the first one only.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_without_the_header_is_as_large_as_stores_want_it() {
    let place = Place::new().await;
    let one_thread = Budget { thread_count: 1, ..SMALL };
    let inspect = Arc::new(NoInspection);
    let mut backup = place.begin_within(one_thread, Encryption::None, u64::MAX, inspect).await;
    let frame = BLOCK_BYTES + FRAME_OVERHEAD_BYTES;
    // With four whole frames it is more than the least part if the room counts, and less if not. It
    // waits for others to share its block until one comes that does not fit.
    let short = SMALL.part_bytes - 4 * frame - FRAME_OVERHEAD_BYTES - HEADER_BYTES / 2;
    let mut expected = BTreeMap::new();
    for (index, size) in [5 * BLOCK_BYTES, 4 * BLOCK_BYTES, short, 8192].into_iter().enumerate() {
        let data = content(index as u64, size, false);
        put_file(&mut backup, &format!("{index}"), &data, 65_536).await.unwrap();
        expected.insert(format!("{index}"), data);
    }
    let manifest = backup.finish_packs().await.unwrap().commit(facts()).await.unwrap();
    let reader = place.repository.reader(Vec::new());
    assert!(read_back(&reader, &manifest).await == expected);
}

#[tokio::test]
async fn zero_blocks_cost_nothing_and_an_empty_backup_is_one() {
    let place = Place::new().await;
    let mut backup = place.begin(u64::MAX, Arc::new(NoInspection)).await;
    put_file(&mut backup, "base/1", &vec![0; 40 << 20], 1 << 20).await.unwrap();
    let packed = backup.finish_packs().await.unwrap();
    assert!(packed.stored_bytes() < 400, "{}", packed.stored_bytes());
    let manifest = packed.commit(facts()).await.unwrap();
    let files = read_back(&place.reader(), &manifest).await;
    assert!(files["base/1"].iter().all(|byte| *byte == 0) && files["base/1"].len() == 40 << 20);

    let place = Place::new().await;
    let backup = place.begin(u64::MAX, Arc::new(NoInspection)).await;
    let manifest = backup.finish_packs().await.unwrap().commit(facts()).await.unwrap();
    assert!(manifest.packs.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn forty_thousand_tiny_files_fit_in_bounded_footers() {
    let place = Place::new().await;
    let mut backup = place.begin(u64::MAX, Arc::new(NoInspection)).await;
    for index in 0..40_000 {
        let data = content(index, 50, true);
        put_file(&mut backup, &format!("base/{index}"), &data, 50).await.unwrap();
    }
    let manifest = backup.finish_packs().await.unwrap().commit(facts()).await.unwrap();
    assert_eq!(manifest.packs.len(), 3);
    assert!(manifest.packs.iter().all(|pack| (pack.entry_count as usize) < PACK_RECORDS_MAX));
    assert_eq!(read_back(&place.reader(), &manifest).await.len(), 40_000);
}

#[tokio::test]
async fn what_the_inspection_finds_comes_back_in_the_manifest() {
    #[derive(Default)]
    struct Look(Mutex<Vec<(String, u64, usize)>>);
    impl Inspect for Look {
        fn block(&self, file: &FileMeta, offset: u64, data: &[Bytes]) -> Vec<ChecksumFailure> {
            let bytes = data.iter().map(Bytes::len).sum();
            self.0.lock().unwrap().push((file.path.to_string(), offset, bytes));
            let failure = ChecksumFailure {
                path: file.path.to_string(),
                block: (offset / 8192) as u32,
                expected: 1,
                found: 2,
            };
            vec![failure]
        }
    }
    let place = Place::new().await;
    let look = Arc::new(Look::default());
    let mut backup = place.begin(u64::MAX, look.clone()).await;
    put_file(&mut backup, "base/1", &content(1, (1 << 20) + 8192, true), 5000).await.unwrap();
    put_file(&mut backup, "empty", b"", 1).await.unwrap();
    let mut packed = backup.finish_packs().await.unwrap();
    assert_eq!(packed.checksum_failure_count(), 2);
    let blocks: Vec<u32> = packed.checksum_failures().iter().map(|f| f.block).collect();
    assert_eq!(blocks, [0, 128]);
    packed.forgive(|failure| failure.block == 0);
    let manifest = packed.commit(facts()).await.unwrap();
    assert_eq!(manifest.public.checksum_failure_count, 1);
    assert_eq!(manifest.checksum_failures.len(), 1);
    let mut seen = look.0.lock().unwrap().clone();
    seen.sort();
    let name = "base/1".to_owned();
    assert_eq!(seen, [(name.clone(), 0, 1 << 20), (name, 1 << 20, 8192)]);
}

#[tokio::test]
async fn a_wrong_amount_of_bytes_is_refused() {
    let place = Place::new().await;
    let mut backup = place.begin(u64::MAX, Arc::new(NoInspection)).await;
    let meta = |size_bytes| FileMeta { path: path("a"), mode: 0o600, mtime: 0, size_bytes };
    backup.begin_file(meta(2)).await.unwrap();
    assert_eq!(backup.begin_file(meta(2)).await.unwrap_err().kind(), Kind::Bug);
    let error = backup.write(Bytes::from_static(b"abc")).await.unwrap_err();
    assert!(error.to_string().contains("more than the announced 2"), "{error}");
    let mut backup = place.begin(u64::MAX, Arc::new(NoInspection)).await;
    backup.begin_file(meta(2)).await.unwrap();
    backup.write(Bytes::from_static(b"a")).await.unwrap();
    let error = backup.end_file().await.unwrap_err();
    assert!(error.to_string().contains("1 bytes of 'a' where 2"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_refuses_is_told_promptly_and_leaves_nothing_that_is_listed() {
    // Whether a pack is put in one request or in parts, its size and the moment decide.
    for failing in [&[Call::Any][..], &[Call::Put, Call::Part]] {
        let place = Place::new().await;
        let mut backup = place.begin(6 << 20, Arc::new(NoInspection)).await;
        for call in failing.iter().cycle().take(128) {
            place.store.fail_next(*call, Outcome::Denied);
        }
        let mut outcome = Ok(());
        for index in 0..200 {
            let data = content(index, 1 << 20, false);
            outcome = put_file(&mut backup, &format!("base/{index}"), &data, 1 << 18).await;
            if outcome.is_err() {
                break;
            }
        }
        let outcome = match outcome {
            Ok(()) => backup.finish_packs().await.map(drop),
            Err(error) => Err(error),
        };
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), Kind::Denied, "{error}");
        assert!(place.repository.public_manifest(place.id()).await.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_minutes_costs_a_backup_nothing_but_time() {
    let place = Place::new().await;
    let mut backup = place.begin(6 << 20, Arc::new(NoInspection)).await;
    // Requests fail, and some are carried out all the same: beginnings, parts, completions, objects.
    for outcome in [Outcome::FailsBefore, Outcome::FailsAfter] {
        for call in [Call::Part, Call::Complete, Call::Put, Call::Any] {
            (0..8).for_each(|_| place.store.fail_next(call, outcome));
        }
    }
    for index in 0..20 {
        let data = content(index, 1 << 20, false);
        put_file(&mut backup, &format!("base/{index}"), &data, 1 << 18).await.unwrap();
    }
    let packed = backup.finish_packs().await.unwrap();
    for _ in 0..5 {
        place.store.fail_next(Call::Put, Outcome::FailsAfter);
    }
    packed.commit(facts()).await.unwrap();
    place.repository.public_manifest(place.id()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_panics_fails_the_backup_and_does_not_hold_it_up() {
    struct Panics;
    impl Inspect for Panics {
        fn block(&self, file: &FileMeta, _: u64, _: &[Bytes]) -> Vec<ChecksumFailure> {
            assert!(file.path != path("base/3"), "on purpose");
            Vec::new()
        }
    }
    let place = Place::new().await;
    let mut backup = place.begin(1, Arc::new(Panics)).await;
    let packing = async {
        for index in 0..40 {
            let data = content(index, 1 << 20, false);
            put_file(&mut backup, &format!("base/{index}"), &data, 1 << 20).await?;
        }
        backup.finish_packs().await.map(drop)
    };
    let outcome = tokio::time::timeout(std::time::Duration::from_secs(20), packing).await;
    let error = outcome.expect("it does not wait for a block that never comes").unwrap_err();
    assert_eq!(error.kind(), Kind::Bug, "{error}");
    assert!(error.message().contains("without finishing its block"), "{error}");
    assert_eq!(place.names().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_workers_are_gone_says_so() {
    let place = Place::new().await;
    let mut backup = place.begin(u64::MAX, Arc::new(NoInspection)).await;
    put_file(&mut backup, "a", &content(1, 1 << 20, false), 1 << 20).await.unwrap();
    backup.pool.close();
    let data = content(2, 1 << 20, false);
    let put = put_file(&mut backup, "b", &data, 1 << 20);
    let outcome = tokio::time::timeout(std::time::Duration::from_secs(20), put).await;
    outcome.expect("nor does it wait for the collector").unwrap_err();
}

#[tokio::test]
async fn memory_is_kept_only_if_a_permit_pays_for_it() {
    let place = Place::new().await;
    let backup = place.begin(u64::MAX, Arc::new(NoInspection)).await;
    let room = SMALL.part_bytes + BLOCK_BYTES + (1 << 16);
    let kept = |capacity| {
        let mut memory = Vec::with_capacity(capacity);
        memory.push(1);
        super::worker::keep_memory(&backup.shared, Bytes::from(memory));
        std::mem::take(&mut *backup.shared.spare_parts.lock().unwrap()).len()
    };
    assert_eq!([kept(1 << 20), kept(room), kept(2 * room)], [0, 1, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_takes_its_packs_back_and_the_next_backup_works() {
    let place = Place::new().await;
    let mut backup = place.begin(3 << 20, Arc::new(NoInspection)).await;
    for index in 0..20 {
        let data = content(index, 1 << 20, false);
        put_file(&mut backup, &format!("base/{index}"), &data, 1 << 18).await.unwrap();
    }
    backup.abort().await;
    assert_eq!(place.names().await, Vec::<String>::new());
    let mut backup = place.begin(3 << 20, Arc::new(NoInspection)).await;
    put_file(&mut backup, "a", b"b", 1).await.unwrap();
    backup.finish_packs().await.unwrap().abort().await;
    assert_eq!(place.names().await, Vec::<String>::new());
    let mut backup = place.begin(3 << 20, Arc::new(NoInspection)).await;
    put_file(&mut backup, "a", b"b", 1).await.unwrap();
    backup.finish_packs().await.unwrap().commit(facts()).await.unwrap();
    assert_eq!(place.names().await.len(), 2);
    // The same id again meets the pack that is there, and leaves it alone.
    let mut backup = place.begin(3 << 20, Arc::new(NoInspection)).await;
    put_file(&mut backup, "a", b"b", 1).await.unwrap();
    let error = backup.finish_packs().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
    assert_eq!(place.names().await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_stopped_while_its_last_packs_are_put_takes_all_of_them_back() {
    let place = Place::new().await;
    let mut backup = place.begin(1, Arc::new(NoInspection)).await;
    // Blocks that wait for one worker go into one pack: how many files make three is not known.
    let mut index = 0;
    while place.names().await.len() < 3 {
        let data = content(index, 1 << 20, false);
        put_file(&mut backup, &format!("base/{index}"), &data, 1 << 18).await.unwrap();
        index += 1;
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    (0..100).for_each(|_| place.store.fail_next(Call::Put, Outcome::FailsBefore));
    put_file(&mut backup, "last", &content(index, 1 << 20, false), 1 << 18).await.unwrap();
    let cancel = CancellationToken::new();
    let stopping = async {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        cancel.cancel();
    };
    let (outcome, ()) = tokio::join!(backup.finish_packs_unless(&cancel), stopping);
    assert_eq!(outcome.unwrap_err().kind(), Kind::Cancelled);
    assert_eq!(place.names().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_pack_that_went_missing_or_a_day_that_passed_forbids_the_manifest() {
    let place = Place::new().await;
    let packed = || async {
        let mut backup = place.begin(u64::MAX, Arc::new(NoInspection)).await;
        put_file(&mut backup, "a", b"b", 1).await.unwrap();
        backup.finish_packs().await.unwrap()
    };
    let first = packed().await;
    let pack = Object::Pack(PackName { backup: place.id(), number: 1 });
    let name = place.repository.name(&pack).unwrap();
    place.store.damage(&name, |body| body.push(0)).unwrap();
    let error = first.commit(facts()).await.unwrap_err();
    assert!(error.to_string().contains("pack 1 has"), "{error}");
    place.store.delete(std::slice::from_ref(&name)).await.unwrap();
    let second = packed().await;
    place.store.delete(std::slice::from_ref(&name)).await.unwrap();
    let error = second.commit(facts()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.to_string().contains("pack 1 is gone"), "{error}");
    let third = packed().await;
    tokio::time::pause();
    tokio::time::advance(std::time::Duration::from_secs(25 * 3600)).await;
    let error = third.commit(facts()).await.unwrap_err();
    assert!(error.to_string().contains("25 hours ago"), "{error}");
}

#[tokio::test]
async fn a_day_that_passed_while_the_machine_was_suspended_forbids_the_manifest() {
    let place = Place::new().await;
    let mut backup = place.begin(u64::MAX, Arc::new(NoInspection)).await;
    put_file(&mut backup, "a", b"b", 1).await.unwrap();
    let packed = backup.finish_packs().await.unwrap();
    place.repository.clock().suspend(SignedDuration::from_hours(48));
    let error = packed.commit(facts()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.to_string().contains("48 hours ago"), "{error}");
}

#[tokio::test]
async fn an_object_without_encryption_is_refused_where_encryption_is_expected() {
    let place = Place::new().await;
    let inspect = Arc::new(NoInspection);
    let mut backup = place.begin_with(Encryption::None, u64::MAX, inspect).await;
    put_file(&mut backup, "base/1", &content(1, 300, true), 50).await.unwrap();
    let manifest = backup.finish_packs().await.unwrap().commit(facts()).await.unwrap();
    // A cluster without a key, and nobody who could open one: what there is is read.
    let nobody = || place.repository.reader(Vec::new());
    assert_eq!(nobody().manifest(place.id()).await.unwrap(), manifest);
    assert!(read_pack(&nobody(), &manifest).await.is_ok());

    let refused = async |reader: Reader, why: &str| {
        for error in [
            reader.manifest(place.id()).await.unwrap_err(),
            read_pack(&reader, &manifest).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), Kind::Corrupt, "{error}");
            let said = error.to_string();
            assert!(said.contains("not encrypted") && said.contains(why), "{said}");
        }
    };
    refused(place.reader(), "there is an identity").await;
    let encryption = Encryption::Recipients(vec![place.identity.recipient()]);
    place.repository.writer(&encryption).await.unwrap();
    refused(nobody(), "the cluster has encrypted data").await;

    let asked_for = place.reader().accept_unencrypted().unwrap();
    assert_eq!(asked_for.manifest(place.id()).await.unwrap(), manifest);
    assert!(read_pack(&asked_for, &manifest).await.is_ok());
}

#[tokio::test]
async fn every_damaged_byte_of_a_pack_and_its_manifest_is_noticed() {
    let place = Place::new().await;
    let mut backup = place.begin(u64::MAX, Arc::new(NoInspection)).await;
    put_file(&mut backup, "base/1", &content(1, 300, true), 50).await.unwrap();
    let manifest = backup.finish_packs().await.unwrap().commit(facts()).await.unwrap();
    let pack = Object::Pack(PackName { backup: place.id(), number: 1 });
    let pack = place.repository.name(&pack).unwrap();
    let size = manifest.packs[0].stored_bytes as usize;
    for index in 0..size {
        place.store.damage(&pack, |body| body[index] ^= 0x10).unwrap();
        let error = read_pack(&place.reader(), &manifest).await.unwrap_err();
        let said = error.to_string();
        let about_key = (16..32).contains(&index) && error.kind() == Kind::NotFound;
        let version = (8..12).contains(&index) && error.kind() == Kind::Unsupported;
        assert!(error.kind() == Kind::Corrupt || about_key || version, "byte {index}: {said}");
        assert!(said.contains("pack-000001"), "byte {index}: {said}");
        place.store.damage(&pack, |body| body[index] ^= 0x10).unwrap();
    }
    let name = place.repository.name(&Object::Manifest(place.id())).unwrap();
    let size = place.store.head(&name).await.unwrap().unwrap().size_bytes as usize;
    for index in (0..200).chain(4000..size) {
        place.store.damage(&name, |body| body[index] ^= 1).unwrap();
        let error = place.reader().manifest(place.id()).await.unwrap_err();
        assert!(error.to_string().contains("manifest"), "byte {index}: {error}");
        place.store.damage(&name, |body| body[index] ^= 1).unwrap();
    }
    for cut in [0, 63, 70, 4095, 4096, size - 1] {
        let mut whole = Vec::new();
        place
            .store
            .damage(&name, |body| {
                whole = body.clone();
                body.truncate(cut);
            })
            .unwrap();
        let error = place.reader().manifest(place.id()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "cut {cut}: {error}");
        place.store.damage(&name, |body| *body = whole).unwrap();
    }
    assert!(place.reader().manifest(place.id()).await.is_ok());
}

async fn read_pack(reader: &Reader, manifest: &Manifest) -> Result<()> {
    let summary = &manifest.packs[0];
    let pack = reader.pack(PackName { backup: manifest.public.id, number: 1 }).await?;
    let footer = reader.pack_footer(&pack, summary.stored_bytes, summary.footer).await?;
    let mut worker = Worker::new(Level::default())?;
    for batch in FrameBatch::plan(&footer, 1 << 20, |_| true) {
        reader.fetch(&pack, batch).await?.open(&footer, Check::Tags, &mut worker, |_, _| Ok(()))?;
    }
    Ok(())
}

#[tokio::test]
async fn an_object_in_the_place_of_another_is_refused() {
    let place = Place::new().await;
    let mut backup = place.begin(1, Arc::new(NoInspection)).await;
    for index in 0..12 {
        let data = content(9, 1 << 20, true);
        put_file(&mut backup, &format!("{index}"), &data, 1 << 20).await.unwrap();
    }
    let manifest = backup.finish_packs().await.unwrap().commit(facts()).await.unwrap();
    let name = |number| {
        let pack = Object::Pack(PackName { backup: place.id(), number });
        place.repository.name(&pack).unwrap()
    };
    let second = place.store.get(&name(2), None).await.unwrap();
    place.store.damage(&name(1), |body| *body = second.to_vec()).unwrap();
    let error = read_pack(&place.reader(), &manifest).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
}

#[tokio::test]
async fn without_the_right_identity_nothing_is_read() {
    let place = Place::new().await;
    let mut backup = place.begin(1, Arc::new(NoInspection)).await;
    put_file(&mut backup, "a", b"secret", 10).await.unwrap();
    backup.finish_packs().await.unwrap().commit(facts()).await.unwrap();
    let other = DecryptionIdentity::generate();
    for identities in [vec![], vec![other]] {
        let error = place.repository.reader(identities).manifest(place.id()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Denied);
        let recipient = place.identity.recipient().to_string();
        assert!(error.to_string().contains(&recipient), "{error}");
        assert!(error.hint_text().is_some());
    }
    let all = place.store.list_all("").await.unwrap();
    for object in all {
        let body = place.store.get(&object.name, None).await.unwrap();
        assert!(!body.windows(6).any(|window| window == b"secret"), "{}", object.name);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_files_in_any_chunks_come_back(
        sizes in proptest::collection::vec(0_usize..2_500_000, 1..12),
        chunk in 1_000_usize..2_000_000,
        pack_bytes in 1_u64..4_000_000,
        seed: u64,
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.unwrap().block_on(async {
            let place = Place::new().await;
            let mut backup = place.begin(pack_bytes, Arc::new(NoInspection)).await;
            let mut expected = BTreeMap::new();
            for (index, size) in sizes.into_iter().enumerate() {
                let data = content(seed ^ index as u64, size, index % 3 > 0);
                put_file(&mut backup, &format!("{index}"), &data, chunk).await.unwrap();
                expected.insert(format!("{index}"), data);
            }
            let manifest = backup.finish_packs().await.unwrap().commit(facts()).await.unwrap();
            assert!(read_back(&place.reader(), &manifest).await == expected);
        });
    }
}
