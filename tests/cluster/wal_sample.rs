//! The WAL that is kept: a sample of every major with what pg_waldump says of it (`tests/golden/wal`),
//! and the seeds of the fuzz targets that read WAL (`fuzz/corpus`).
//!
//! Both were made by the test here, so that a run without a major has an oracle for it too:
//! `TIDEMARK_TEST_MAKE_WAL_SAMPLES=. cargo test --test cluster wal_sample`, once a major; the variable
//! names the clone to write them to. Without it they are made, read back and thrown away.
//!
//! # Shape
//! A sample is one stretch of WAL as its server wrote it, of few records of each kind. A seed is a set of
//! records, each the shortest that shows something, laid out anew: what it takes a long load to provoke
//! is then a few KiB.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tidemark::fuzz::{TARGETS, wal_of_records};
use tidemark::pg::{Lsn, SegmentSize};
use tidemark::wal::{Record, RecordReader};

use crate::harness::postgres::Stop;
use crate::harness::wal_lines::{RMGR_COUNT, Sample, cut_down, kinds_of_records};
use crate::harness::{Account, Binaries, Postgres, not_run};

use super::wal_differential::theirs;
use super::wal_oracle::{
    keep_all_wal, restart_with, run_rare, run_workload, script, stop, wal_bytes, waldump_landmark,
};

/// Transactions of a page of the commit log: the first of each zeroes that page.
const CLOG_XACTS_PER_PAGE: u32 = 32_768;
/// How far before that the sample begins. A page of commit timestamps begins 8 before it.
const XIDS_BEFORE: u32 = 16;

/// Statements whose records are all different.
const SAMPLE: &str = "
create table t (i int primary key, v text);
checkpoint;
select pg_create_restore_point('sample');
insert into t select g, md5(g::text) from generate_series(1, 20) g;
begin; insert into t values (100); savepoint s; insert into t values (101); rollback to s;
insert into t values (102); commit;
begin; insert into t values (103); rollback;
begin; insert into t values (104); create table u (i int); prepare transaction 'sample';
commit prepared 'sample';
begin; drop table u; prepare transaction 'sample';
rollback prepared 'sample';
drop table u;
begin; select * from t where i = 1 for key share; savepoint s; update t set v = 'y' where i = 1; commit;
update t set v = 'x'; vacuum t;
select pg_logical_emit_message(true, 'p', repeat('long', 3000));
select pg_logical_emit_message(false, 'p', 'short');
create table k (i int, p point, a int[]);
create index on k using hash (i);
create index on k using gin (a);
create index on k using gist (p);
create index on k using spgist (p);
create index on k using brin (i);
insert into k select g, point(g, g), array[g] from generate_series(1, 3) g;
delete from k where i = 2;
vacuum k;
create sequence s;
select nextval('s');
vacuum full pg_tablespace;
checkpoint;
insert into t values (105);
";

/// What a server with `wal_level = logical` adds to its records.
const LOGICAL: &str = "
begin; insert into t values (201); savepoint s; insert into t values (202);
create table decoded (i int); insert into decoded values (1); commit;
truncate decoded;
";

/// A server whose WAL becomes the sample, and where that begins. Loaded before when seeds are kept.
fn server_before_sample(loaded: bool) -> (Postgres, Lsn) {
    let settings = keep_all_wal()
        .segment_mib(1)
        .conf("max_locks_per_transaction = 1024")
        .conf("wal_compression = on")
        .conf("full_page_writes = off");
    let server = Postgres::start(&Binaries::of_this_run(), &settings.conf("autovacuum = off"));
    if loaded {
        run_workload(&server);
    }
    // Away from what the load left.
    script(&server, "create schema sample; alter database postgres set search_path = sample;");
    let xid: u32 = server.psql("select txid_current()").parse().unwrap();
    let subtransactions = CLOG_XACTS_PER_PAGE - XIDS_BEFORE - xid % CLOG_XACTS_PER_PAGE;
    script(
        &server,
        &format!(
            "create table burnt (i int);
             do $$ begin for i in 1..{subtransactions} loop
               begin insert into burnt values (i); exception when others then null; end;
             end loop; end $$;
             drop table burnt; checkpoint; select pg_switch_wal();"
        ),
    );
    let from = server.psql("select pg_current_wal_insert_lsn()").parse().unwrap();
    (server, from)
}

/// Runs all that a sample shows, up to a promotion; gives what this server cannot do.
fn run_sample(server: &Postgres) -> Vec<&'static str> {
    script(server, SAMPLE);
    let strategy = if server.binaries().major() >= 15 { "strategy file_copy" } else { "" };
    script(server, &format!("create database other {strategy}; drop database other;"));
    let lacking = run_rare(server);
    restart_with(server, &["max_connections = 50", "wal_level = logical"]);
    script(server, LOGICAL);
    server.stop(Stop::Fast);
    // A standby of nobody reads what is there, and is promoted.
    let signal = server.data().join("standby.signal");
    std::fs::write(&signal, "").unwrap();
    Account::current().give(&signal);
    server.run();
    server.promote();
    server.psql("insert into t values (301)");
    lacking
}

/// The pg_waldump that judges this server's WAL, and the WAL as that one must see it. The server-only
/// build of 13 brings none; that of 14 reads the same records, under another magic number.
fn judge(server: &Postgres, wal: &[u8]) -> Option<(Binaries, Vec<u8>)> {
    let own = server.binaries();
    if own.major() != 13 || own.has("pg_waldump") {
        return own.brings("pg_waldump", "on a sample").then(|| (own.clone(), wal.to_vec()));
    }
    let other = std::env::var_os("TIDEMARK_TEST_PG_CLIENT_BIN").map(PathBuf::from);
    let other = other.map(|folder| Binaries::at(&folder)).filter(|other| other.major() == 14);
    let Some(other) = other else {
        not_run(
            "pg_waldump, on a sample: PostgreSQL 13 has none here, nor are the client programs of 14",
        );
        return None;
    };
    let mut wal = wal.to_vec();
    for page in wal.chunks_mut(8192).filter(|page| page[..2] == 0xD106_u16.to_le_bytes()) {
        page[..2].copy_from_slice(&0xD10D_u16.to_le_bytes());
    }
    Some((other, wal))
}

#[test]
fn a_wal_sample_can_be_made_and_says_what_pg_waldump_says() {
    let kept = std::env::var_os("TIDEMARK_TEST_MAKE_WAL_SAMPLES").map(PathBuf::from);
    let passing = tempfile::tempdir().unwrap();
    std::fs::set_permissions(passing.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let root = kept.as_deref().unwrap_or(passing.path());
    let (server, from) = server_before_sample(kept.is_some());
    let lacking = run_sample(&server);
    let (control, end) = stop(&server);
    let size = control.wal_segment_size;
    let (start, wal) = wal_bytes(server.data(), size, end);
    let major = server.binaries().major();
    make_seeds(root, major, &lacking, &Stretch { size, start, wal: &wal });

    let from = from.align_down(size.bytes());
    let wal = &wal[(from.0 - start.0) as usize..];
    let Some((judge, as_seen)) = judge(&server, wal) else { return };
    let scratch = passing.path().join("judged");
    std::fs::create_dir(&scratch).unwrap();
    std::fs::set_permissions(&scratch, PermissionsExt::from_mode(0o755)).unwrap();
    let theirs = theirs(&judge, &scratch, from, &as_seen);
    assert!(!theirs.crashed, "{}", theirs.said);
    let records: Vec<String> = theirs.records.iter().map(|record| cut_down(record)).collect();
    let landmarks: Vec<String> =
        theirs.records.iter().filter_map(|record| waldump_landmark(record)).collect();
    let sample = Sample {
        major,
        start: from,
        wal: wal.to_vec(),
        records: records.join("\n"),
        landmarks: landmarks.join("\n"),
        control: std::fs::read(server.data().join("global/pg_control")).unwrap(),
    };
    let folder = root.join("tests/golden/wal");
    std::fs::create_dir_all(&folder).unwrap();
    let text = format!("{}\n{}\n\n{}\n", sample.start, sample.records, sample.landmarks);
    let files = [("wal", &sample.wal[..]), ("txt", text.as_bytes()), ("control", &sample.control)];
    for (kind, bytes) in files {
        let packed = zstd::bulk::compress(bytes, 19).unwrap();
        std::fs::write(Sample::path(&folder, major, kind), packed).unwrap();
    }
    Sample::read(&folder, major).check(&lacking);
}

/// WAL, where it begins, and the size of its segments.
struct Stretch<'a> {
    size: SegmentSize,
    start: Lsn,
    wal: &'a [u8],
}

/// What a record shows that others may not.
fn shown_by(record: &Record<'_>) -> BTreeSet<String> {
    let mut shown = BTreeSet::from([format!("{} {:02X}", record.rmgr, record.info)]);
    shown.extend(record.origin.map(|_| "origin".into()));
    shown.extend(record.toplevel_xid.map(|_| "top-level transaction".into()));
    for (index, block) in record.blocks.iter().enumerate() {
        shown.insert(format!("block {index}, init {}", block.will_init));
        shown.insert(format!("fork {:?}", block.fork));
        if let Some(image) = block.image {
            let (hole, apply) = (image.hole_length > 0, image.apply);
            shown.insert(format!("{:?}, hole {hole}, apply {apply}", image.compression));
        }
    }
    shown
}

/// A record as an input of the target `wal_records` has it.
fn as_input(record: &Record<'_>, bytes: &[u8]) -> Vec<u8> {
    // 12: any resource manager.
    let mut input = vec![12, record.rmgr.0, record.info];
    input.extend((record.xid as u16).to_le_bytes());
    input.extend((bytes.len() as u16).to_le_bytes());
    input.extend(bytes);
    input
}

/// The body of a record, without the headers of the pages it crosses.
fn body_of(record: &Record<'_>, stretch: &Stretch<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut position = record.range.start();
    while bytes.len() < record.length_bytes as usize {
        if position.0.is_multiple_of(8192) {
            let long = stretch.size.start_of(position) == position;
            position = Lsn(position.0 + if long { 40 } else { 24 });
        }
        let page_end = Lsn((position.0 / 8192 + 1) * 8192);
        let (from, to) = (position.0 - stretch.start.0, page_end.0 - stretch.start.0);
        let to = (to as usize).min(stretch.wal.len());
        bytes.extend_from_slice(&stretch.wal[from as usize..to]);
        position = page_end;
    }
    bytes.truncate(record.length_bytes as usize);
    bytes.drain(..24);
    bytes
}

/// The shortest records of `stretch` that show everything that any short one shows.
fn telling_records(stretch: &Stretch<'_>) -> Vec<Vec<u8>> {
    // What a record shows, and the shortest of those that show all of it.
    let mut shortest: BTreeMap<BTreeSet<String>, Vec<u8>> = BTreeMap::new();
    let mut reader = RecordReader::new(stretch.size, stretch.start);
    let each = &mut |record: &Record<'_>| {
        // Those of a switch are laid out with their padding, by the target itself.
        let is_switch = (record.rmgr.0, record.info & 0xF0) == (0, 0x40);
        if !is_switch && record.length_bytes as usize - 24 <= SEED_RECORD_BYTES_MAX {
            let input = as_input(record, &body_of(record, stretch));
            let kept = shortest.entry(shown_by(record)).or_insert_with(|| input.clone());
            if input.len() < kept.len() {
                *kept = input;
            }
        }
        Ok(())
    };
    reader.feed(stretch.wal, each).unwrap();
    let mut candidates: Vec<_> = shortest.into_iter().collect();
    candidates.sort_by_key(|(_, input)| input.len());
    let mut seen = BTreeSet::new();
    candidates.retain(|(shown, _)| {
        let news = !shown.is_subset(&seen);
        seen.extend(shown.iter().cloned());
        news
    });
    candidates.into_iter().map(|(_, input)| input).collect()
}

/// Most of a record's body in a seed: a target takes less than 3000 bytes of one.
const SEED_RECORD_BYTES_MAX: usize = 2999;
/// Sizes of the pieces that a seed is cut into.
const PIECES: [u8; 4] = [5, 200, 9, 130];

/// Writes the seeds of a major: as records, as the pages those make, and as pages received.
fn make_seeds(root: &Path, major: u32, lacking: &[&str], stretch: &Stretch<'_>) {
    let longest =
        |target: &str| TARGETS.iter().find(|known| known.name == target).unwrap().input_bytes_max;
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    let head = [&[(major - 13) as u8, 0], &PIECES[..], &[0, 0]].concat();
    for record in telling_records(stretch) {
        match seeds.last_mut() {
            Some(seed) if seed.len() + record.len() <= longest("wal_records") => {
                seed.extend(record);
            }
            _ => seeds.push([&head[..], &record].concat()),
        }
    }
    for (index, seed) in seeds.iter().enumerate() {
        let pages = wal_of_records(seed, major).1;
        // Mended, as whatever mutation makes of it must be.
        let of_pages = [&[0, 2], &PIECES[..], &pages].concat();
        // Stored from 100 bytes on, nothing of it known before.
        let of_intake = [&[0, 100, 0, 200, 30, 10, 20], &PIECES[..], &[1], &pages].concat();
        for (target, input) in
            [("wal_records", seed), ("wal_pages", &of_pages), ("wal_intake", &of_intake)]
        {
            assert!(input.len() <= longest(target), "{} bytes for {target}", input.len());
            (TARGETS.iter().find(|known| known.name == target).unwrap().run)(input);
            let folder = root.join("fuzz/corpus").join(target);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(format!("seed-{major}-each-{index}")), input).unwrap();
        }
    }
    let kinds: BTreeSet<(u8, u8)> =
        seeds.iter().flat_map(|seed| kinds_of_records(seed, major)).collect();
    let rmgrs: BTreeSet<u8> = kinds.iter().map(|kind| kind.0).collect();
    println!("PostgreSQL {major}: seeds of {} kinds of records", kinds.len());
    let least = usize::from(RMGR_COUNT) - lacking.len();
    assert!(rmgrs.len() >= least, "{rmgrs:?}");
}
