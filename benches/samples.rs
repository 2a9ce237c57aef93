//! What is measured with: WAL and files of a real PostgreSQL, made once and kept.
//!
//! # Shape
//! A throwaway server (the one the tests use: the distribution's newest, or `TIDEMARK_TEST_PG_BIN`)
//! writes the WAL of three loads, the last whole segments of 16 MiB of each: `pgbench` (the standard
//! transaction; long enough after a checkpoint that page images are the smaller part), `copy` (bulk load of
//! a table), `index` (btree and GIN builds). And it leaves relation files: `pgbench` (mostly padding,
//! which flatters every compressor) and `app` (JSON documents, UUIDs, mail addresses and amounts in
//! tables with their indexes, drawn from a fixed seed).
//!
//! All of it is kept below `target/tmp` for the next run. Without a server there is one small sample of
//! WAL, from `tests/golden`, and pages of the same rows as `app`; the reports say which it was.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bytes::Bytes;
use tidemark::pg::page::BLCKSZ;
use tidemark::pg::{Lsn, SegmentSize};
use tidemark::wal::RecordReader;

use crate::harness::postgres::Stop;
use crate::harness::wal_lines::Sample;
use crate::harness::{Account, Binaries, Postgres, Settings};

/// Changes when what is made changes.
const VERSION: u32 = 1;
/// Segments kept of each load.
const SEGMENTS_MAX: usize = 4;
/// Bytes kept of each relation, and of each set of them.
const RELATION_BYTES_MAX: usize = 24 << 20;
const FILES_BYTES_MAX: usize = 64 << 20;
/// Rows of the table that is loaded.
const EVENT_COUNT: u32 = 320_000;

/// Everything there is to measure with.
pub struct Samples {
    /// Where it came from.
    pub origin: String,
    /// WAL by load.
    pub wal: Vec<Wal>,
    /// Relation files by kind of content.
    pub files: Vec<Files>,
    /// The server that wrote it.
    pub binaries: Option<Binaries>,
}

/// Contiguous WAL of one load.
pub struct Wal {
    pub load: String,
    pub start: Lsn,
    pub segment_size: SegmentSize,
    pub bytes: Bytes,
    /// Whole records in it.
    pub record_count: u64,
    /// The segment files; none where there was no server.
    pub segments: Vec<PathBuf>,
}

/// Relation files, each from its beginning.
pub struct Files {
    pub content: String,
    /// Path in a data directory and content.
    pub files: Vec<(String, Bytes)>,
}

impl Files {
    pub fn size_bytes(&self) -> usize {
        self.files.iter().map(|(_, content)| content.len()).sum()
    }

    /// The content in blocks of 1 MiB, the short ends left out.
    pub fn blocks(&self) -> Vec<Bytes> {
        let whole = |content: &Bytes| {
            let content = content.clone();
            (0..content.len() >> 20).map(move |n| content.slice(n << 20..(n + 1) << 20))
        };
        self.files.iter().flat_map(|(_, content)| whole(content).collect::<Vec<_>>()).collect()
    }
}

impl Samples {
    /// The samples of this machine, made by whoever asks first.
    pub fn get() -> &'static Self {
        static SAMPLES: OnceLock<Samples> = OnceLock::new();
        SAMPLES.get_or_init(|| match installed() {
            Some(binaries) => Self::of_server(binaries),
            None => Self::without_server(),
        })
    }

    pub fn files_of(&self, content: &str) -> &Files {
        let found = self.files.iter().find(|files| files.content == content);
        found.unwrap_or(&self.files[0])
    }

    fn of_server(binaries: Binaries) -> Self {
        let name = format!("bench-samples-v{VERSION}-pg{}", binaries.major());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        if !folder.exists() {
            let making = folder.with_extension(format!("making-{}", std::process::id()));
            make(&binaries, &making);
            fs::rename(&making, &folder).unwrap();
        }
        let names = |below: &str| {
            let entries = fs::read_dir(folder.join(below)).unwrap();
            let mut names: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
            names.sort();
            names
        };
        let wal = names("wal").iter().map(|folder| Wal::read(folder)).collect();
        let files = names("files").iter().map(|folder| Files::read(folder)).collect();
        let origin = format!("PostgreSQL {}, {}", binaries.major(), folder.display());
        Self { origin, wal, files, binaries: Some(binaries) }
    }

    fn without_server() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/wal");
        let sample = Sample::read(&folder, 17);
        let segment_size = SegmentSize::new(1 << 20).unwrap();
        // Up to the padding behind its first switch, which would be read for nothing.
        let written = sample.wal.chunks(8192).take_while(|page| page[0] != 0).count() * 8192;
        let bytes = Bytes::from(sample.wal).slice(..written);
        let wal = Wal {
            load: "golden".to_owned(),
            start: sample.start,
            segment_size,
            record_count: count_records(&bytes, sample.start, segment_size),
            bytes,
            segments: Vec::new(),
        };
        let content = Bytes::from(pages_of_rows(RELATION_BYTES_MAX));
        let files =
            Files { content: "app".to_owned(), files: vec![("base/5/16384".to_owned(), content)] };
        let origin = "no PostgreSQL here: a golden sample of WAL, made pages".to_owned();
        Self { origin, wal: vec![wal], files: vec![files], binaries: None }
    }
}

impl Wal {
    fn read(folder: &Path) -> Self {
        let segment_size = SegmentSize::new(16 << 20).unwrap();
        let mut segments: Vec<PathBuf> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        segments.sort();
        let name = segments[0].file_name().unwrap().to_str().unwrap();
        let (_, number) = segment_size.parse_file_name(name).unwrap();
        let start = segment_size.range_of(number).unwrap().start();
        let bytes: Vec<u8> =
            segments.iter().flat_map(|segment| fs::read(segment).unwrap()).collect();
        let bytes = Bytes::from(bytes);
        Self {
            load: folder.file_name().unwrap().to_str().unwrap().to_owned(),
            start,
            segment_size,
            record_count: count_records(&bytes, start, segment_size),
            bytes,
            segments,
        }
    }
}

impl Files {
    fn read(folder: &Path) -> Self {
        let mut files: Vec<(String, Bytes)> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap();
                (format!("base/5/{name}"), Bytes::from(fs::read(&path).unwrap()))
            })
            .collect();
        files.sort_by(|one, other| one.0.cmp(&other.0));
        Self { content: folder.file_name().unwrap().to_str().unwrap().to_owned(), files }
    }
}

fn count_records(bytes: &[u8], start: Lsn, segment_size: SegmentSize) -> u64 {
    let mut count = 0;
    let mut reader = RecordReader::new(segment_size, start);
    let mut each = |_: &tidemark::wal::Record<'_>| {
        count += 1;
        Ok(())
    };
    reader.feed(bytes, &mut each).unwrap();
    count
}

/// The server to make samples with, if there is one with pgbench.
fn installed() -> Option<Binaries> {
    let named = std::env::var_os("TIDEMARK_TEST_PG_BIN").is_some();
    let below = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = below.into_iter().any(|entry| entry.path().join("bin/postgres").exists());
    let binaries = (named || found).then(Binaries::of_this_run)?;
    ["pgbench", "pg_waldump", "psql"].iter().all(|name| binaries.has(name)).then_some(binaries)
}

fn make(binaries: &Binaries, folder: &Path) {
    eprintln!("making samples in {}", folder.display());
    let settings = Settings::default()
        .conf("fsync = off")
        .conf("autovacuum = off")
        .conf("checkpoint_timeout = '1h'")
        .conf("max_wal_size = '8GB'")
        .conf("wal_keep_size = '4GB'")
        .conf("maintenance_work_mem = '256MB'");
    let server = Postgres::start(binaries, &settings);
    let pgbench = |arguments: &[&str]| {
        let mut command = binaries.client("pgbench");
        command.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &server.port().to_string()]);
        let made = command.args(arguments).arg("postgres").output().unwrap();
        assert!(made.status.success(), "pgbench: {}", String::from_utf8_lossy(&made.stderr));
    };
    pgbench(&["-i", "-q", "-s", "20"]);
    server.psql("checkpoint");
    keep_wal(&server, &folder.join("wal/pgbench"), || {
        pgbench(&["-c", "4", "-j", "2", "-t", "12000", "--random-seed=42"]);
    });

    let rows = server.home().join("events");
    fs::write(&rows, events(EVENT_COUNT)).unwrap();
    Account::current().give(&rows);
    server.psql(
        "create table events (id bigint, at timestamptz, account uuid, mail text, \
         amount numeric, document jsonb)",
    );
    keep_wal(&server, &folder.join("wal/copy"), || {
        server.psql(&format!("copy events from '{}'", rows.display()));
    });
    keep_wal(&server, &folder.join("wal/index"), || {
        server.psql(
            "create index on events (id); create index on events (account); \
             create index on events (mail, at); create index on events using gin (document)",
        );
    });
    server.psql("checkpoint");
    let relations = |pattern: &str| {
        let sql = format!(
            "select pg_relation_filepath(oid) from pg_class where relname like '{pattern}' \
             and relkind in ('r', 'i') and pg_relation_size(oid) > 1048576 order by relname"
        );
        let paths = server.psql(&sql);
        paths.lines().map(|path| server.data().join(path)).collect::<Vec<_>>()
    };
    let (padded, app) = (relations("pgbench%"), relations("events%"));
    server.stop(Stop::Fast);
    keep_files(&padded, &folder.join("files/pgbench"));
    keep_files(&app, &folder.join("files/app"));
}

/// Keeps the whole segments that `load` fills.
fn keep_wal(server: &Postgres, folder: &Path, load: impl FnOnce()) {
    let size = SegmentSize::new(16 << 20).unwrap();
    let position = || -> Lsn { server.psql("select pg_current_wal_insert_lsn()").parse().unwrap() };
    server.psql("select pg_switch_wal()");
    let start = size.end_of(position());
    load();
    let end = size.start_of(position());
    server.psql("select pg_switch_wal()");
    fs::create_dir_all(folder).unwrap();
    let timeline = tidemark::pg::TimelineId::FIRST;
    let count = (end.saturating_since(start) / size.bytes()) as usize;
    assert!(count > 0, "a load that fills no segment");
    // Of a long load the last ones: the first are full of page images.
    for index in count.saturating_sub(SEGMENTS_MAX)..count {
        let name =
            size.file_name(timeline, size.number_of(Lsn(start.0 + index as u64 * size.bytes())));
        fs::copy(server.data().join("pg_wal").join(&name), folder.join(&name)).unwrap();
    }
}

fn keep_files(paths: &[PathBuf], folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let mut left = FILES_BYTES_MAX;
    for path in paths {
        let mut content = fs::read(path).unwrap();
        content.truncate(RELATION_BYTES_MAX.min(left));
        content.truncate(content.len() / BLCKSZ * BLCKSZ);
        left -= content.len();
        if !content.is_empty() {
            fs::write(folder.join(path.file_name().unwrap()), content).unwrap();
        }
    }
}

/// Random numbers of a fixed seed (SplitMix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, count: u64) -> u64 {
        self.next() % count
    }

    fn one_of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len() as u64) as usize]
    }
}

/// Rows of the table as COPY reads them.
fn events(count: u32) -> String {
    let mut dice = Dice(42);
    let mut text = String::new();
    for id in 0..count {
        let (high, low) = (dice.next(), dice.next());
        let account = dice.below(200_000);
        let name = dice.one_of(&["anna", "ben", "carla", "dmitri", "eva", "fatima", "george"]);
        let host = dice.one_of(&["example.com", "mail.example.org", "company.example"]);
        let kind = dice.one_of(&["login", "purchase", "refund", "password_changed", "page_view"]);
        let agent =
            dice.one_of(&["Firefox/144.0", "Chrome/142.0.0.0", "Safari/605.1.15", "curl/8.5"]);
        let (amount, cents, milliseconds) =
            (dice.below(5000), dice.below(100), dice.below(86_400_000));
        let (seconds, page) = (milliseconds / 1000, dice.below(900));
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let request = dice.next();
        writeln!(
            text,
            "{id}\t2026-11-{:02} {hour:02}:{minute:02}:{second:02}.{:03}+00\t{:08x}-{:04x}-4{:03x}-a{:03x}-{:012x}\t\
             {name}.{account}@{host}\t{amount}.{cents:02}\t{{\"type\": \"{kind}\", \"request\": \
             \"{request:016x}\", \"agent\": \"{agent}\", \"path\": \"/account/{account}/page/{page}\", \
             \"status\": {}, \"duration_ms\": {}}}",
            1 + id * 22 / count,
            milliseconds % 1000,
            high >> 32,
            high >> 16 & 0xffff,
            high & 0xfff,
            low >> 52,
            low & 0xffff_ffff_ffff,
            dice.one_of(&["200", "200", "200", "302", "404", "500"]),
            dice.below(3000),
        )
        .unwrap();
    }
    text
}

/// The rows in pages: a header, rows as text, their checksum.
fn pages_of_rows(size_bytes: usize) -> Vec<u8> {
    let text = events(160_000).into_bytes();
    let mut bytes = Vec::with_capacity(size_bytes);
    for (block, rows) in (0..).zip(text.chunks_exact(BLCKSZ - 24).cycle()) {
        if bytes.len() >= size_bytes {
            break;
        }
        let mut page = [0; BLCKSZ];
        page[7] = 1;
        page[12..20].copy_from_slice(&[24, 0, 24, 0, 0, 32, 4, 32]);
        page[24..].copy_from_slice(rows);
        let sum = tidemark::pg::page::page_checksum(&page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        bytes.extend_from_slice(&page);
    }
    bytes
}
