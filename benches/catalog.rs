//! The books at scale: 10 TB, a million files, seven days of WAL.
//!
//! Unit: seconds, bytes and requests of one listing, one manifest, one backup. Limit: pages of a
//! thousand names, of which a million make a thousand; a store answers each in some milliseconds, so
//! requests count more than what is measured here, with a store in memory.

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use tidemark::clock::Clock;
use tidemark::pg::{Lsn, LsnRange, PgTime, SegmentSize, TimelineId};
use tidemark::repo::budget::BACKUP_BYTES;
use tidemark::repo::manifest::BackupKind;
use tidemark::repo::packing::NoInspection;
use tidemark::repo::{
    BackupId, Budget, Catalog, Entry, EntryKind, ExtentName, FileMeta, FilePath, FooterPlace,
    FrameRecord, Level, Manifest, ManifestFacts, Object, PackFooter, PackName, PackOptions,
    PackSummary, PublicManifest, Repository, Span, WalCatalog, Writer,
};
use tidemark::store::Store;
use tidemark::store::memory::Memory;
use tokio::runtime::Runtime;

use crate::measure::{self, Bench, Rounds, memory, report, seconds};
use crate::sink::{Sink, repository, writer};

const EXTENT_COUNT: u64 = 1_000_000;
const FILE_COUNT: u64 = 1_000_000;
/// 10 TB of plain data, at the ratio of the sample `app`, in packs of 512 MiB.
const PACK_COUNT: u32 = 7_300;
const FRAMES_PER_PACK: u32 = 1_370;
/// Rounds of what takes seconds.
const ROUNDS: usize = 3;

pub fn bench(bench: &mut Bench) {
    let runtime = Runtime::new().unwrap();
    if bench.reports.wants("catalog, seven days of WAL") {
        runtime.block_on(seven_days_of_wal());
    }
    if bench.reports.wants("catalog, manifest of 10 TB") {
        runtime.block_on(manifest_of_ten_terabytes());
    }
    if bench.reports.wants("catalog, footers of 10 TB") {
        footers_of_ten_terabytes();
    }
    if bench.reports.wants("catalog, commit of 10 TB") {
        runtime.block_on(commit_of_ten_terabytes());
    }
    if bench.reports.wants("catalog, a million files") {
        runtime.block_on(a_million_files());
    }
}

fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// As [`memory`], of a future.
fn memory_of<T>(work: impl Future<Output = T>) -> (measure::Memory, f64, T) {
    // The runtime's thread waits here; the store in memory answers at once.
    let (memory, (took, done)) = memory(|| {
        seconds(|| tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work)))
    });
    (memory, took, done)
}

fn extent(number: u64, start: u64, bytes: u64) -> ExtentName {
    let range = LsnRange::new(Lsn(start), Lsn(start + bytes)).unwrap();
    let time = PgTime::from_unix_micros(1_763_200_000_000_000 + number as i64 * 604_800);
    ExtentName { timeline: TimelineId::FIRST, range, time: Some(time) }
}

/// A million extents, one every 0.6 s for seven days.
async fn seven_days_of_wal() {
    let name = "catalog, seven days of WAL";
    let store = Memory::new(&Clock::system());
    let repository = repository(Arc::new(store.clone())).await;
    let mut start = 1 << 24;
    for number in 0..EXTENT_COUNT {
        // Segments of 16 MiB, cut by the second into pieces of 1 MiB.
        let extent = extent(number, start, 1 << 20);
        start += 1 << 20;
        let object = repository.name(&Object::Extent(extent)).unwrap();
        store.put_if_absent(&object, Bytes::from_static(b"x")).await.unwrap();
    }
    let mut took = Rounds::default();
    let mut found = None;
    for _ in 0..ROUNDS {
        let before = store.requests();
        let (memory, passed, catalog) = memory_of(Catalog::load(&repository));
        took.push(passed);
        let requests = store.requests().since(&before);
        found = Some((memory, requests, catalog.unwrap()));
    }
    let (memory, requests, catalog) = found.unwrap();
    assert_eq!(catalog.wal.extent_count() as u64, EXTENT_COUNT);
    report(
        name,
        format!(
            "{EXTENT_COUNT} extents listed in {} s, {} list requests and {} others, {} at most, {} \
             kept",
            took.show(2),
            requests.lists,
            requests.gets + requests.heads,
            mib(memory.peak_bytes),
            mib(memory.kept_bytes)
        ),
    );
    let (gaps_took, gaps) = seconds(|| catalog.gaps());
    assert!(gaps.is_empty());
    let before = store.requests();
    let size = SegmentSize::new(16 << 20).unwrap();
    let from = Lsn(start - (64 << 20));
    let tail = WalCatalog::load_tail(&repository, TimelineId::FIRST, from, size);
    let (memory, tail_took, tail) = memory_of(tail);
    let requests = store.requests().since(&before);
    report(
        name,
        format!(
            "gaps found in {:.3} s; a writer that resumes lists {} extents in {:.4} s with {} \
             requests, {}",
            gaps_took,
            tail.unwrap().extent_count(),
            tail_took,
            requests.lists,
            mib(memory.peak_bytes)
        ),
    );
}

fn backup_id() -> BackupId {
    BackupId::new("2026-11-22T10:00:00Z".parse().unwrap(), TimelineId::FIRST, Lsn(1 << 24))
}

fn manifest(writer: &Writer) -> Manifest {
    let pack_bytes = 512 << 20;
    let packs: Vec<PackSummary> = (1..=PACK_COUNT)
        .map(|number| PackSummary {
            number,
            stored_bytes: pack_bytes + u64::from(number),
            plain_bytes: u64::from(FRAMES_PER_PACK) << 20,
            entry_count: (FILE_COUNT / u64::from(PACK_COUNT)) as u32,
            frame_count: FRAMES_PER_PACK,
            footer: FooterPlace {
                offset: pack_bytes - 90_000,
                bytes: 90_000,
                index: FRAMES_PER_PACK,
            },
        })
        .collect();
    let time: Timestamp = "2026-11-22T10:00:00Z".parse().unwrap();
    let public = PublicManifest {
        id: backup_id(),
        system_id: writer.repository().system_id(),
        postgres_version_num: 150_010,
        wal_segment_size_bytes: SegmentSize::new(16 << 20).unwrap(),
        kind: BackupKind::Full,
        parents: Vec::new(),
        timeline: TimelineId::FIRST,
        end_timeline: TimelineId::FIRST,
        start_lsn: Lsn(1 << 24),
        end_lsn: Lsn(1 << 40),
        start_time: time,
        end_time: time,
        plain_bytes: packs.iter().map(|pack| pack.plain_bytes).sum(),
        stored_bytes: packs.iter().map(|pack| pack.stored_bytes).sum(),
        file_count: FILE_COUNT,
        pack_bytes: packs.iter().map(|pack| pack.stored_bytes).collect(),
        checksum_failure_count: 0,
        key_id: writer.key_id(),
        recipients: writer.recipients().to_vec(),
    };
    Manifest {
        public,
        tablespaces: Vec::new(),
        settings: [("max_connections".to_owned(), "100".to_owned())].into(),
        packs,
        checksum_failures: Vec::new(),
    }
}

/// The manifest: made, and read with and without a key.
async fn manifest_of_ten_terabytes() {
    let store = Memory::new(&Clock::system());
    let repository = repository(Arc::new(store.clone())).await;
    let (writer, identity) = writer(&repository).await;
    let (manifest, reader) = (manifest(&writer), repository.reader(vec![identity]));
    let name = repository.name(&Object::Manifest(backup_id())).unwrap();
    let (made_memory, (made_seconds, object)) =
        memory(|| seconds(|| manifest.seal(&writer).unwrap()));
    let object_bytes = object.len();
    store.put_if_absent(&name, object).await.unwrap();
    let (read_memory, read_seconds, read) = memory_of(reader.manifest(backup_id()));
    assert!(read.unwrap() == manifest);
    let public = repository.public_manifest(backup_id());
    let (public_memory, public_seconds, public) = memory_of(public);
    assert!(public.unwrap() == manifest.public);
    report(
        "catalog, manifest of 10 TB",
        format!(
            "{PACK_COUNT} packs: {object_bytes} bytes; made in {made_seconds:.4} s with {}, read in \
             {read_seconds:.4} s with {}, its public part in {public_seconds:.4} s with {}",
            mib(made_memory.peak_bytes),
            mib(read_memory.peak_bytes),
            mib(public_memory.peak_bytes)
        ),
    );
}

/// The footers, which are read one after the other: one, times as many as there are.
fn footers_of_ten_terabytes() {
    let files_per_pack = (FILE_COUNT / u64::from(PACK_COUNT)) as u32;
    let entries = (0..files_per_pack).map(|number| Entry {
        path: FilePath::new(format!("base/16384/{}", 24_576 + number)).unwrap(),
        mode: 0o600,
        mtime: 1_763_200_000,
        kind: EntryKind::File { size_bytes: 1 << 30, crc32c: Some(number) },
    });
    let frames = (0..FRAMES_PER_PACK).map(|index| FrameRecord {
        source: 0,
        offset: 64 + u64::from(index) * 390_000,
        frame_bytes: 390_000,
        plain_bytes: 1 << 20,
        index,
        hash: [index as u8; 16],
        spans: vec![Span {
            entry: index % files_per_pack,
            file_offset: u64::from(index / files_per_pack) << 20,
            bytes: 1 << 20,
        }],
    });
    let footer = PackFooter {
        sources: Vec::new(),
        entries: entries.collect(),
        frames: frames.collect(),
        zero_runs: Vec::new(),
    };
    let encoded = footer.encode().unwrap();
    let (memory, decoded) = memory(|| PackFooter::decode(&encoded).unwrap());
    assert!(decoded == footer);
    drop(decoded);
    let count = 300;
    let (encoding, ()) = measure::cpu_seconds(|| {
        (0..count).for_each(|_| drop(footer.encode().unwrap()));
    });
    let (decoding, ()) = measure::cpu_seconds(|| {
        (0..count).for_each(|_| drop(PackFooter::decode(&encoded).unwrap()));
    });
    let all = |seconds: f64| seconds / f64::from(count) * f64::from(PACK_COUNT);
    report(
        "catalog, footers of 10 TB",
        format!(
            "{PACK_COUNT} of {} bytes plain: all made in {:.2} CPU s, all decoded in {:.2}; one is {} \
             in memory",
            encoded.len(),
            all(encoding),
            all(decoding),
            mib(memory.kept_bytes)
        ),
    );
}

/// A backup of a million files of a few bytes: the books of the packing, and of who reads them back.
async fn a_million_files() {
    let clock = Clock::system();
    let sink = Sink(Memory::new(&clock));
    let repository: Repository = repository(Arc::new(sink)).await;
    let (writer, identity) = writer(&repository).await;
    let budget = Budget::backup(BACKUP_BYTES, 2, Level::default());
    let options = PackOptions { budget, level: Level::default(), pack_bytes: 512 << 20 };
    let begun = measure::process_cpu();
    let work = async {
        let inspect = Arc::new(NoInspection);
        let mut backup = writer.backup(backup_id(), options, inspect).unwrap();
        for number in 0..FILE_COUNT {
            let path = format!("base/{}/{}", 16_384 + number / 1000, 16_384 + number % 1000);
            let path = FilePath::new(path).unwrap();
            let meta = FileMeta { path, mode: 0o600, mtime: 1_763_200_000, size_bytes: 24 };
            backup.begin_file(meta).await.unwrap();
            backup.write(Bytes::from_static(b"twenty-four bytes a file")).await.unwrap();
            backup.end_file().await.unwrap();
        }
        backup.finish_packs().await.unwrap()
    };
    let (memory, took, packed) = memory_of(work);
    let cpu = (measure::process_cpu() - begun).as_secs_f64();
    let stored_bytes = packed.stored_bytes();
    let manifest = packed.commit(facts()).await.unwrap();
    let reader = repository.reader(vec![identity]);
    let read = async {
        let mut entry_count = 0;
        for pack in &manifest.packs {
            let name = PackName { backup: backup_id(), number: pack.number };
            let handle = reader.pack(name).await.unwrap();
            let footer = reader.pack_footer(&handle, pack.stored_bytes, pack.footer).await.unwrap();
            entry_count += footer.entries.len() as u64;
        }
        entry_count
    };
    let (read_memory, read_seconds, entry_count) = memory_of(read);
    assert!(entry_count == FILE_COUNT);
    report(
        "catalog, a million files",
        format!(
            "packed in {took:.2} s, {cpu:.2} CPU s, {} at most; {stored_bytes} bytes in {} packs, whose \
             footers are read one by one in {read_seconds:.2} s with {}",
            mib(memory.peak_bytes),
            manifest.packs.len(),
            mib(read_memory.peak_bytes)
        ),
    );
}

fn facts() -> ManifestFacts {
    let time: Timestamp = "2026-11-22T10:00:00Z".parse().unwrap();
    ManifestFacts {
        postgres_version_num: 150_010,
        segment_size: SegmentSize::new(16 << 20).unwrap(),
        end_timeline: TimelineId::FIRST,
        end_lsn: Lsn(1 << 40),
        start_time: time,
        end_time: time,
        tablespaces: Vec::new(),
        settings: [].into(),
    }
}

/// The end of a backup of as many packs as 10 TB have: each is looked for once more.
async fn commit_of_ten_terabytes() {
    let store = Memory::new(&Clock::system());
    let repository = repository(Arc::new(store.clone())).await;
    let (writer, _) = writer(&repository).await;
    let budget = Budget::backup(BACKUP_BYTES, 2, Level::default());
    // A pack ends with the first block that is known to be sealed, those then on their way go into it too:
    // so some blocks a pack, of what compresses to almost nothing.
    let options = PackOptions { budget, level: Level::default(), pack_bytes: 1 };
    let block = Bytes::from(vec![7; 1 << 20]);
    let mut backup = writer.backup(backup_id(), options, Arc::new(NoInspection)).unwrap();
    let other_count = store.requests().puts;
    let mut number = 0;
    while store.requests().puts < other_count + u64::from(PACK_COUNT) {
        let path = FilePath::new(format!("base/5/{number}")).unwrap();
        let meta = FileMeta { path, mode: 0o600, mtime: 1_763_200_000, size_bytes: 1 << 20 };
        backup.begin_file(meta).await.unwrap();
        backup.write(block.clone()).await.unwrap();
        backup.end_file().await.unwrap();
        number += 1;
    }
    let packed = backup.finish_packs().await.unwrap();
    let before = store.requests();
    let (memory, took, manifest) = memory_of(packed.commit(facts()));
    let requests = store.requests().since(&before);
    report(
        "catalog, commit of 10 TB",
        format!(
            "{} packs looked for and the manifest put in {took:.3} s, {} list requests, {} at most",
            manifest.unwrap().packs.len(),
            requests.lists,
            mib(memory.peak_bytes)
        ),
    );
}
