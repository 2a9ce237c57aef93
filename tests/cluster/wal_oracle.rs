//! The decoders against PostgreSQL's own tools: `pg_waldump` judges records and landmarks,
//! `pg_controldata` the control file, `pg_checksums` the pages, `pg_verifybackup` the manifest.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use jiff::Timestamp;
use tidemark::pg::backup_manifest::{BackupManifest, ManifestFile};
use tidemark::pg::control::ControlFile;
use tidemark::pg::data_dir::RelationFile;
use tidemark::pg::page::{BLCKSZ, PageVerdict, page_checksum, verify_page};
use tidemark::pg::{
    Lsn, LsnRange, PgTime, SegmentSize, TimelineHistory, TimelineId, Version, crc32c,
};
use tidemark::wal::{Landmark, Record, RecordReader, Scanner};

use crate::harness::postgres::Stop;
use crate::harness::wal_lines::{cut_down, in_pieces, landmark_line, our_line, waldump_records};
use crate::harness::{Account, Binaries, Postgres, Settings, not_run};

/// Where the client programs are when the server's folder has none.
const CLIENT_BIN: &str = "TIDEMARK_TEST_PG_CLIENT_BIN";

/// Every record the clusters write stays until it is compared.
pub(super) fn keep_all_wal() -> Settings {
    Settings::default()
        .conf("wal_keep_size = '4GB'")
        .conf("max_wal_size = '4GB'")
        .conf("autovacuum_naptime = '1s'")
        .conf("track_commit_timestamp = on")
}

/// SQL that makes PostgreSQL write as many kinds of records as it can be brought to.
const WORKLOAD: &str = "
create table t (id int primary key, v text, p point, a int[], h int) with (fillfactor = 60);
insert into t select g, repeat(md5(g::text), 5), point(g, g), array[g, g+1], g % 97
  from generate_series(1, 4000) g;
create index on t using hash (h);
create index on t using gin (a);
create index on t using gist (p);
create index on t using spgist (p);
create index on t using brin (id);
create index on t (v);
insert into t select g, md5(g::text), point(g, -g), array[g % 7], g
  from generate_series(4001, 9000) g;
update t set v = v || 'x', a = array[h] where id % 3 = 0;
delete from t where id % 5 = 0;
vacuum t;
vacuum (freeze, analyze) t;
select id from t where h = 5 for update;
begin; savepoint a; insert into t values (100001); savepoint b; insert into t values (100002);
rollback to b; savepoint c; insert into t values (100003); release c; commit;
do $$ begin for i in 1..300 loop
  begin insert into t values (200000 + i); exception when others then null; end;
end loop; end $$;
begin; insert into t values (300001); create table made_in_prepared (i int);
savepoint s; insert into t values (300002); prepare transaction 'two phase \u{e4}';
commit prepared 'two phase \u{e4}';
begin; insert into t values (300003); drop table made_in_prepared; prepare transaction 'gone';
rollback prepared 'gone';
begin; insert into t values (300004); rollback;
create table big (i int);
begin; insert into big select generate_series(1, 1000); truncate big;
copy big from program 'seq 1 20000'; commit;
truncate big;
create sequence s;
select nextval('s') from generate_series(1, 100);
create materialized view m as select * from t;
refresh materialized view m;
create unlogged table u as select * from t;
cluster t using t_pkey;
reindex table t;
select pg_create_restore_point('point one');
select pg_switch_wal();
select pg_create_restore_point(repeat('n', 63));
select pg_logical_emit_message(true, 'tidemark', repeat('a long message ', 100000));
checkpoint;
create database other;
drop database other;
vacuum full pg_class;
select lo_create(4711);
select lo_put(4711, 0, repeat('bytes', 50000)::bytea);
drop table big; drop materialized view m; drop table u;
alter table t alter column v type varchar(400);
analyze;
select pg_switch_wal();
select txid_current();
select pg_switch_wal();
";

/// Prepared transactions whose commit and abort records are too long to be kept whole by the
/// scanner: many subtransactions, relations and invalidations before the transaction's number.
const LONG_PREPARED: &str = "
begin; do $$ begin for i in 1..900 loop
  begin execute 'create table long_' || i || ' (i int)'; exception when others then null; end;
end loop; end $$; prepare transaction 'long';
commit prepared 'long';
begin; do $$ begin for i in 1..900 loop
  begin execute 'drop table long_' || i; execute 'create table long_' || i || ' (i int)';
  exception when others then null; end;
end loop; end $$; prepare transaction 'long';
rollback prepared 'long';
begin; do $$ begin for i in 1..900 loop
  begin execute 'drop table long_' || i; exception when others then null; end;
end loop; end $$; prepare transaction 'long';
commit prepared 'long';
";

/// Records of replication origins, and of a change that came from one. A script is a session: in one that
/// has committed before, PostgreSQL notes that earlier time for a commit that names an origin
/// (`RecordTransactionCommit`), and the commit times would not compare.
const ORIGIN: [&str; 3] = [
    "create table carried (i int); select pg_replication_origin_create('elsewhere');
     select pg_replication_origin_advance('elsewhere', '0/1234');",
    "select pg_replication_origin_session_setup('elsewhere'); insert into carried values (1);",
    "select pg_replication_origin_drop('elsewhere');",
];

/// Pages changed by an extension.
const GENERIC: &str = "
create extension bloom;
create table described (i int);
create index on described using bloom (i);
insert into described values (1);
";

/// Runs SQL through psql, each statement for itself.
#[track_caller]
pub(super) fn script(server: &Postgres, sql: &str) {
    let mut psql = server
        .binaries()
        .client("psql")
        .args(["-X", "-q", "-o", "/dev/null", "-v", "ON_ERROR_STOP=1", "-d"])
        .arg(format!("{} dbname=postgres", server.conninfo()))
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    psql.stdin.take().unwrap().write_all(sql.as_bytes()).unwrap();
    let answer = psql.wait_with_output().unwrap();
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
}

pub(super) fn run_workload(server: &Postgres) {
    let space = Account::current().make_dir(server.home(), "space");
    script(server, &format!("create tablespace s location '{}';", space.display()));
    script(server, WORKLOAD);
    script(server, LONG_PREPARED);
    multixacts(server);
    let pgbench = server.binaries().client("pgbench");
    if server.binaries().has("pgbench") {
        pgbench_run(pgbench, server, &["-i", "-s", "2", "-q"]);
        let arguments = ["-c", "4", "-j", "2", "-t", "500", "-n"];
        pgbench_run(server.binaries().client("pgbench"), server, &arguments);
    }
    server.psql("checkpoint");
    server.psql("insert into t values (999999)");
}

/// What few servers do in a day, and what only some builds can; gives what this one cannot.
pub(super) fn run_rare(server: &Postgres) -> Vec<&'static str> {
    let mut lacking = Vec::new();
    let space = Account::current().make_dir(server.home(), "rare");
    let tablespace = format!(
        "create tablespace rare location '{}'; create table in_space (i int) tablespace rare;
         drop table in_space; drop tablespace rare;",
        space.display()
    );
    script(server, &tablespace);
    ORIGIN.iter().for_each(|session| script(server, session));
    let bloom = "select count(*) from pg_available_extensions where name = 'bloom'";
    if server.psql(bloom) == "1" {
        script(server, GENERIC);
    } else {
        lacking.push("Generic");
        not_run("generic records: PostgreSQL has no extension bloom here");
    }
    let major = server.binaries().major();
    let offered = server.psql("select enumvals from pg_settings where name = 'wal_compression'");
    for (compression, setting, since_major) in
        [("None", "off", 13), ("Pglz", "on", 13), ("Lz4", "lz4", 15), ("Zstd", "zstd", 15)]
    {
        if since_major < 15 || offered.contains(setting) {
            let set = format!("set wal_compression = {setting};");
            script(server, &format!("{set} create index on carried (i);"));
        } else if major >= since_major {
            lacking.push(compression);
            not_run(&format!("page images by {setting}: this PostgreSQL was built without"));
        }
    }
    let (begin, end) = match major {
        13 | 14 => ("pg_start_backup('rare', true, false)", "pg_stop_backup(false, false)"),
        _ => ("pg_backup_start('rare', true)", "pg_backup_stop(false)"),
    };
    script(server, &format!("select {begin}; insert into carried values (2); select {end};"));
    lacking
}

/// Starts the server anew with settings that its standbys must know of.
pub(super) fn restart_with(server: &Postgres, settings: &[&str]) {
    for setting in settings {
        server.psql(&format!("alter system set {setting}"));
    }
    server.stop(Stop::Fast);
    server.run();
}

/// Several transactions lock one row, then update it.
fn multixacts(server: &Postgres) {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..3 {
                    script(
                        server,
                        "begin; select * from t where id = 2 for key share; select pg_sleep(0.1);
                         update t set h = h + 1 where id = 4; commit;",
                    );
                }
            });
        }
    });
}

fn pgbench_run(mut command: Command, server: &Postgres, arguments: &[&str]) {
    let port = server.port().to_string();
    let answer = command
        .args(["-h", "127.0.0.1", "-p", &port, "-U", "postgres"])
        .args(arguments)
        .arg("postgres")
        .output()
        .unwrap();
    assert!(answer.status.success(), "pgbench: {}", String::from_utf8_lossy(&answer.stderr));
}

/// The WAL files in order, of each number that of the newest timeline.
pub(super) fn wal_files(data: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(data.join("pg_wal"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| segment_name(path).len() == 24)
        .collect();
    let place = |path: &PathBuf| {
        let (timeline, number) = segment_name(path).split_at(8);
        (number.to_owned(), std::cmp::Reverse(timeline.to_owned()))
    };
    files.sort_by_key(place);
    files.dedup_by_key(|path| place(path).0);
    files
}

/// The name of a file below `pg_wal`.
fn segment_name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

/// The WAL up to `end`: its first position and its bytes.
pub(super) fn wal_bytes(data: &Path, size: SegmentSize, end: Lsn) -> (Lsn, Vec<u8>) {
    let files = wal_files(data);
    let first = files[0].file_name().unwrap().to_str().unwrap();
    let start = size.range_of(size.parse_file_name(first).unwrap().1).unwrap().start();
    let mut bytes = Vec::new();
    for file in files {
        bytes.extend_from_slice(&std::fs::read(file).unwrap());
    }
    let length = end.checked_since(start).unwrap() as usize;
    bytes.truncate(length);
    (start, bytes)
}

/// What pg_waldump says of every record before `end`; a record is its line and its blocks' lines.
fn waldump(server: &Postgres, end: Lsn) -> Option<Vec<String>> {
    if !server.binaries().brings("pg_waldump", "on each record") {
        return None;
    }
    let wal = server.data().join("pg_wal");
    // The file that `end` is in may be followed by one made in advance.
    let mut files = wal_files(server.data());
    let size = std::fs::metadata(&files[0]).unwrap().len();
    let first = files[0].file_name().unwrap().to_owned();
    let ended = SegmentSize::new(size as u32).unwrap();
    let ended = ended.file_name(TimelineId::FIRST, ended.number_of(Lsn(end.0 - 1)));
    files.retain(|file| file.file_name().unwrap().to_str().unwrap() <= ended.as_str());
    let last = files.last().unwrap().file_name().unwrap();
    let answer = server
        .binaries()
        .command("pg_waldump")
        .env("TZ", "UTC")
        .args(["-b", "-e", &end.to_string(), "-p"])
        .arg(&wal)
        .args([first.as_os_str(), last])
        .output()
        .unwrap();
    let records = waldump_records(&String::from_utf8_lossy(&answer.stdout));
    assert!(!records.is_empty(), "pg_waldump: {}", String::from_utf8_lossy(&answer.stderr));
    Some(records)
}

/// Stops the server and gives its last position: that behind the shutdown checkpoint.
pub(super) fn stop(server: &Postgres) -> (ControlFile, Lsn) {
    server.stop(Stop::Fast);
    let bytes = std::fs::read(server.data().join("global/pg_control")).unwrap();
    let control = ControlFile::decode(&bytes).unwrap();
    let checkpoint_lsn = control.checkpoint_lsn;
    let (start, wal) = wal_bytes(server.data(), control.wal_segment_size, Lsn(u64::MAX));
    let from = checkpoint_lsn.align_down(8192);
    let mut reader = RecordReader::new(control.wal_segment_size, from);
    let mut end = None;
    let tail = &wal[(from.0 - start.0) as usize..];
    let whole = tail.len().min(1 << 20);
    reader
        .feed(&tail[..whole], &mut |record| {
            if record.range.start() == checkpoint_lsn {
                end = Some(record.range.end());
            }
            Ok(())
        })
        .ok();
    (control, end.expect("no record at the checkpoint's place"))
}

fn check_records(settings: &Settings) {
    let server = Postgres::start(&Binaries::of_this_run(), settings);
    run_workload(&server);
    run_rare(&server);
    restart_with(&server, &["max_connections = 50"]);
    let commits = server.psql(
        "select x || ' ' || (extract(epoch from at) * 1000000)::bigint
         from generate_series(3, txid_current()) x, pg_xact_commit_timestamp(x::text::xid) at
         where at is not null",
    );
    let (control, end) = stop(&server);
    let size = control.wal_segment_size;
    let (start, wal) = wal_bytes(server.data(), size, end);

    let mut records = Vec::new();
    let mut reader = RecordReader::new(size, start).with_system_id(control.system_id);
    in_pieces(&wal, |piece| {
        let each = &mut |record: &Record<'_>| {
            assert_eq!(record.major, server.binaries().major());
            records.push(our_line(record));
            Ok(())
        };
        reader.feed(piece, each).unwrap();
    });
    assert_eq!(reader.last_record_end(), end);

    let mut landmarks = Vec::new();
    let mut scanner = Scanner::new(size, start);
    in_pieces(&wal, |piece| scanner.feed(piece, &mut |mark| landmarks.push(mark)).unwrap());
    assert_eq!(scanner.last_record_end(), end);
    assert!(scanner.at_record_boundary());
    check_commit_times(&landmarks, &commits);

    let Some(expected) = waldump(&server, end) else { return };
    for (ours, theirs) in records.iter().zip(&expected) {
        assert_eq!(*ours, cut_down(theirs));
    }
    assert_eq!(records.len(), expected.len());
    assert!(records.len() > 10_000, "{} records are too few to mean anything", records.len());
    let ours: Vec<String> = landmarks.iter().map(landmark_line).collect();
    let theirs: Vec<String> = expected.iter().filter_map(|line| waldump_landmark(line)).collect();
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(ours.len(), theirs.len());
}

/// The server's own record of commit times is the second oracle, and the only one where
/// pg_waldump is missing.
fn check_commit_times(landmarks: &[Landmark], commits: &str) {
    let recorded: BTreeMap<u32, PgTime> = commits
        .lines()
        .map(|line| {
            let (xid, micros) = line.split_once(' ').unwrap();
            let time = Timestamp::from_microsecond(micros.parse().unwrap()).unwrap();
            (xid.parse().unwrap(), PgTime::from_timestamp(time))
        })
        .collect();
    assert!(recorded.len() > 1000, "{} commits", recorded.len());
    let (first, last) = (recorded.keys().next().unwrap(), recorded.keys().last().unwrap());
    let mut seen: BTreeMap<PgTime, u32> = BTreeMap::new();
    for landmark in landmarks {
        let Landmark::Commit { xid, time, .. } = landmark else { continue };
        // Some commits are older than the record or newer than the question.
        if (*first..=*last).contains(xid) {
            assert_eq!(recorded.get(xid), Some(time), "commit of {xid}");
        }
        seen.insert(*time, *xid);
    }
    for (xid, time) in &recorded {
        // A subtransaction has no record of its own; it carries the time of its parent.
        assert!(seen.contains_key(time), "the commit of {xid} at {time} was not seen");
    }
}

/// The same from a line of pg_waldump, `None` for records that are no landmarks.
pub(super) fn waldump_landmark(record: &str) -> Option<String> {
    let line = record.lines().next()?;
    let field = |name: &str| Some(line.split_once(name)?.1.split([',', ';']).next()?.trim());
    let (_, desc) = line.split_once(", desc: ")?;
    let desc = desc.trim();
    let start: Lsn = field(", lsn: ")?.parse().unwrap();
    let xid = field(", tx: ")?;
    // `NAME` or `NAME rest`; prepared ones have `NAME xid: rest` or, since 17, `NAME xid: ...`.
    let (name, rest) = desc.split_once(' ').unwrap_or((desc, ""));
    let time = |rest: &str| {
        let end = rest.find(" UTC").map_or(rest.len(), |at| at + 4);
        rest[..end].to_owned()
    };
    let what = match name {
        "COMMIT" => format!("commit {xid} {}", time(rest)),
        "ABORT" => format!("abort {xid} {}", time(rest)),
        "COMMIT_PREPARED" | "ABORT_PREPARED" => {
            let (prepared, rest) = rest.split_once(": ")?;
            let what = if name == "COMMIT_PREPARED" { "commit" } else { "abort" };
            format!("{what} {prepared} {}", time(rest))
        }
        "PREPARE" => {
            let (gid, rest) = rest.strip_prefix("gid ")?.split_once(": ")?;
            format!("prepare {xid} {gid} {}", time(rest))
        }
        "RESTORE_POINT" => format!("point {rest}"),
        "CHECKPOINT_SHUTDOWN" | "CHECKPOINT_ONLINE" => {
            let kind = if name.ends_with("SHUTDOWN") { "Shutdown" } else { "Online" };
            let redo: Lsn = rest.strip_prefix("redo ")?.split(';').next()?.parse().unwrap();
            let timeline = rest.split_once("; tli ")?.1.split(';').next()?;
            format!("checkpoint {kind} {redo} {timeline}")
        }
        "SWITCH" => "switch".into(),
        "PARAMETER_CHANGE" => {
            let value = |name: &str| rest.split_once(name)?.1.split(' ').next();
            let level = match value("wal_level=")? {
                "minimal" => 0,
                "replica" => 1,
                _ => 2,
            };
            let limits = [
                value("max_connections=")?,
                value("max_worker_processes=")?,
                value("max_wal_senders=")?,
                value("max_prepared_xacts=")?,
                value("max_locks_per_xact=")?,
            ];
            format!("parameters {level} {}", limits.join(" "))
        }
        "BACKUP_END" => format!("backup end {}", rest.parse::<Lsn>().unwrap()),
        "END_OF_RECOVERY" => {
            let value = |name: &str| rest.split_once(name)?.1.split(';').next();
            let (timeline, previous) =
                (rest.strip_prefix("tli ")?.split(';').next()?, value("; prev tli ")?);
            format!("end of recovery {timeline} {previous} {}", time(value("; time ")?))
        }
        "CREATE" if line.starts_with("rmgr: Tablespace") => format!("tablespace {rest}"),
        _ => return None,
    };
    Some(format!("{start} {what}"))
}

#[test]
fn every_record_of_small_segments_is_read_as_pg_waldump_reads_it() {
    check_records(
        &keep_all_wal()
            .segment_mib(1)
            .conf("max_locks_per_transaction = 1024")
            .conf("wal_consistency_checking = 'spgist,sequence'"),
    );
}

#[test]
fn every_record_with_compression_and_logical_decoding_is_read_as_pg_waldump_reads_it() {
    check_records(
        &keep_all_wal()
            .conf("max_locks_per_transaction = 1024")
            .conf("wal_level = logical")
            .conf("wal_compression = on")
            .conf("full_page_writes = on"),
    );
}

#[test]
fn a_record_that_a_crash_cut_off_is_passed_over() {
    let settings = keep_all_wal().segment_mib(1).conf("autovacuum = off");
    let server = Postgres::start(&Binaries::of_this_run(), &settings);
    script(&server, "create table t (i int); select pg_switch_wal(); checkpoint;");
    server.psql("insert into t values (1)");
    // One record over two segment boundaries; its end is lost with the last files.
    server.psql("select pg_logical_emit_message(false, 'cut', repeat('x', 1500000))");
    let inserted: Lsn = server.psql("select pg_current_wal_insert_lsn()").parse().unwrap();
    server.psql("insert into t values (2)");
    server.crash();
    let size = SegmentSize::new(1 << 20).unwrap();
    let last = size.file_name(TimelineId::FIRST, size.number_of(inserted));
    for file in wal_files(server.data()) {
        if file.file_name().unwrap().to_str().unwrap() >= last.as_str() {
            std::fs::remove_file(file).unwrap();
        }
    }
    server.run();
    server.psql("insert into t values (3)");
    assert_eq!(server.psql("select string_agg(i::text, ' ') from t"), "1 3");
    let (control, end) = stop(&server);
    let (start, wal) = wal_bytes(server.data(), size, end);
    let mut records = Vec::new();
    let mut reader = RecordReader::new(size, start).with_system_id(control.system_id);
    in_pieces(&wal, |piece| {
        let each = &mut |record: &Record<'_>| {
            records.push((our_line(record), record.rmgr.0, record.info));
            Ok(())
        };
        reader.feed(piece, each).unwrap();
    });
    assert_eq!(reader.last_record_end(), end);
    let overwrites = records.iter().filter(|record| (record.1, record.2 & 0xF0) == (0, 0xD0));
    assert_eq!(overwrites.count(), 1, "the server wrote no XLOG_OVERWRITE_CONTRECORD");
    if let Some(expected) = waldump(&server, end) {
        let expected: Vec<String> = expected.iter().map(|line| cut_down(line)).collect();
        let records: Vec<String> = records.into_iter().map(|record| record.0).collect();
        assert_eq!(records, expected);
    }
}

#[test]
fn a_promotion_shows_in_the_wal_and_in_the_history_file() {
    let primary = Postgres::start(&Binaries::of_this_run(), &keep_all_wal());
    if !primary.binaries().has("pg_basebackup") && std::env::var_os(CLIENT_BIN).is_none() {
        not_run("a promotion: PostgreSQL has no pg_basebackup here");
        return;
    }
    let standby = primary.standby();
    primary.psql("create table t as select generate_series(1, 1000)");
    let target = primary.psql("select pg_current_wal_lsn()");
    let replayed = format!("select pg_last_wal_replay_lsn() >= '{target}'");
    standby.wait_for(&replayed, "t");
    primary.stop(Stop::Immediate);
    standby.promote();
    // Enough for a page of its own: the page of the switch keeps the old timeline in its header.
    standby.psql("insert into t select generate_series(1, 1000)");
    let xid: u32 = standby
        .psql("select xmin::text from t order by xmin::text::int desc limit 1")
        .parse()
        .unwrap();
    standby.stop(Stop::Fast);

    let second = TimelineId::new(2).unwrap();
    let wal = standby.data().join("pg_wal");
    let text = std::fs::read(wal.join(second.history_file_name())).unwrap();
    let history = TimelineHistory::decode(second, &text).unwrap();
    let switch_lsn = history.entries()[0].switch_lsn;
    assert_eq!(history.timeline_at(switch_lsn), second);
    assert_eq!(history.timeline_at(Lsn(switch_lsn.0 - 1)), TimelineId::FIRST);

    let size = SegmentSize::DEFAULT;
    let name = size.file_name(second, size.number_of(switch_lsn));
    let bytes = std::fs::read(wal.join(name)).unwrap();
    let mut scanner = Scanner::new(size, size.start_of(switch_lsn));
    let mut found = Vec::new();
    // The file was recycled: behind the end of the WAL it may hold pages of an older segment.
    let outcome = scanner.feed(&bytes, &mut |landmark| found.push(landmark));
    assert!(scanner.is_behind_end() || outcome.is_err());
    assert_eq!(scanner.last_record_end(), found.last().unwrap().range().end());
    assert_eq!(scanner.timeline(), Some(second));
    let at = found.iter().position(|landmark| landmark.range().start() >= switch_lsn).unwrap();
    match &found[at] {
        Landmark::EndOfRecovery { timeline, previous_timeline, .. } => {
            assert_eq!((*timeline, *previous_timeline), (second, TimelineId::FIRST));
        }
        Landmark::Checkpoint { timeline, .. } => assert_eq!(*timeline, second),
        other => panic!("the new timeline begins with {other:?}"),
    }
    let committed = |landmark: &Landmark| matches!(landmark, Landmark::Commit { xid: found, .. } if *found == xid);
    assert!(found[at..].iter().any(committed), "{found:?}");
}

#[test]
fn the_control_file_is_read_as_pg_controldata_reads_it() {
    let settings = Settings::default()
        .segment_mib(4)
        .conf("max_connections = 77")
        .conf("max_worker_processes = 9")
        .conf("wal_log_hints = on")
        .conf("track_commit_timestamp = on");
    let server = Postgres::start(&Binaries::of_this_run(), &settings);
    server.psql("create table t as select generate_series(1, 1000)");
    server.stop(Stop::Fast);
    let bytes = std::fs::read(server.data().join("global/pg_control")).unwrap();
    let control = ControlFile::decode(&bytes).unwrap();
    assert_eq!(control.major, Some(server.binaries().major()));
    assert_eq!(control.wal_segment_size.bytes(), 4 << 20);
    let mut damaged = bytes.clone();
    damaged[40] ^= 1;
    assert_eq!(ControlFile::decode(&damaged).unwrap_err().kind(), tidemark::error::Kind::Corrupt);
    if !server.binaries().brings("pg_controldata", "on pg_control") {
        return;
    }
    let answer = server
        .binaries()
        .command("pg_controldata")
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .arg(server.data())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    let theirs = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("no '{name}' in\n{text}"))[name.len()..].trim().to_owned()
    };
    let seconds = |unix_s: i64| {
        let zoned = Timestamp::from_second(unix_s).unwrap().to_zoned(jiff::tz::TimeZone::UTC);
        zoned.strftime("%a %b %e %H:%M:%S %Y").to_string()
    };
    let setting = |on: bool| if on { "on" } else { "off" }.to_owned();
    let (checkpoint, limits) = (&control.checkpoint, &control.limits);
    for (name, ours) in [
        ("pg_control version number:", control.pg_control_version.to_string()),
        ("Catalog version number:", control.catalog_version.to_string()),
        ("Database system identifier:", control.system_id.to_string()),
        ("Database cluster state:", control.state.description().to_owned()),
        ("pg_control last modified:", seconds(control.time_unix_s)),
        ("Latest checkpoint location:", control.checkpoint_lsn.to_string()),
        ("Latest checkpoint's REDO location:", checkpoint.redo_lsn.to_string()),
        ("Latest checkpoint's TimeLineID:", checkpoint.timeline.to_string()),
        ("Latest checkpoint's PrevTimeLineID:", checkpoint.previous_timeline.to_string()),
        ("Latest checkpoint's full_page_writes:", setting(checkpoint.full_page_writes)),
        (
            "Latest checkpoint's NextXID:",
            format!("{}:{}", checkpoint.next_xid >> 32, checkpoint.next_xid & 0xffff_ffff),
        ),
        ("Latest checkpoint's NextOID:", checkpoint.next_oid.to_string()),
        ("Latest checkpoint's NextMultiXactId:", checkpoint.next_multi.to_string()),
        ("Latest checkpoint's NextMultiOffset:", checkpoint.next_multi_offset.to_string()),
        ("Latest checkpoint's oldestXID:", checkpoint.oldest_xid.to_string()),
        ("Latest checkpoint's oldestXID's DB:", checkpoint.oldest_xid_database.to_string()),
        ("Latest checkpoint's oldestActiveXID:", checkpoint.oldest_active_xid.to_string()),
        ("Latest checkpoint's oldestMultiXid:", checkpoint.oldest_multi.to_string()),
        ("Latest checkpoint's oldestMulti's DB:", checkpoint.oldest_multi_database.to_string()),
        (
            "Latest checkpoint's oldestCommitTsXid:",
            checkpoint.oldest_commit_timestamp_xid.to_string(),
        ),
        (
            "Latest checkpoint's newestCommitTsXid:",
            checkpoint.newest_commit_timestamp_xid.to_string(),
        ),
        ("Time of latest checkpoint:", seconds(checkpoint.time_unix_s)),
        ("Minimum recovery ending location:", control.min_recovery_lsn.to_string()),
        ("Backup start location:", control.backup_start_lsn.to_string()),
        ("Backup end location:", control.backup_end_lsn.to_string()),
        (
            "End-of-backup record required:",
            if control.backup_end_required { "yes" } else { "no" }.to_owned(),
        ),
        (
            "wal_level setting:",
            ["minimal", "replica", "logical"][control.wal_level as usize].into(),
        ),
        ("wal_log_hints setting:", setting(control.wal_log_hints)),
        ("max_connections setting:", limits.max_connections.to_string()),
        ("max_worker_processes setting:", limits.max_worker_processes.to_string()),
        ("max_wal_senders setting:", limits.max_wal_senders.to_string()),
        ("max_prepared_xacts setting:", limits.max_prepared_transactions.to_string()),
        ("max_locks_per_xact setting:", limits.max_locks_per_transaction.to_string()),
        ("track_commit_timestamp setting:", setting(control.track_commit_timestamp)),
        ("Database block size:", control.block_bytes.to_string()),
        ("Blocks per segment of large relation:", control.relation_segment_blocks.to_string()),
        ("WAL block size:", control.wal_block_bytes.to_string()),
        ("Bytes per WAL segment:", control.wal_segment_size.bytes().to_string()),
        ("Data page checksum version:", control.data_checksum_version.to_string()),
    ] {
        assert_eq!(ours, theirs(name), "{name}");
    }
}

/// Every regular file below `folder`, as paths relative to it.
fn files_below(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                let path = entry.path();
                found.push(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn pages_are_judged_as_pg_checksums_judges_them() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    server.psql("create table t as select g, repeat('x', 500) v from generate_series(1, 9000) g");
    script(&server, "create index on t (v, g); vacuum t;");
    let path = server.psql("select pg_relation_filepath('t')");
    server.stop(Stop::Fast);
    let (mut pages, mut new) = (0, 0);
    for name in files_below(server.data()) {
        let Some(file) = RelationFile::from_path(&name) else { continue };
        let bytes = std::fs::read(server.data().join(&name)).unwrap();
        for (index, page) in bytes.as_chunks::<BLCKSZ>().0.iter().enumerate() {
            let block = file.block_number_at((index * BLCKSZ) as u64).unwrap();
            match verify_page(page, block, Lsn(u64::MAX)) {
                PageVerdict::Ok => pages += 1,
                PageVerdict::New => new += 1,
                verdict => panic!("{name} block {block}: {verdict:?}"),
            }
        }
    }
    assert!(pages > 1500, "{pages} pages");
    println!("{pages} pages with checksums, {new} new ones");

    let file = server.data().join(&path);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[5 * BLCKSZ + 4000] ^= 0x10;
    std::fs::write(&file, &bytes).unwrap();
    let page: &[u8; BLCKSZ] = bytes[5 * BLCKSZ..6 * BLCKSZ].try_into().unwrap();
    let PageVerdict::Mismatch { expected, found } = verify_page(page, 5, Lsn(u64::MAX)) else {
        panic!("the damage was not seen");
    };
    assert_eq!(expected, page_checksum(page, 5));
    if server.binaries().brings("pg_checksums", "on a damaged page") {
        let answer =
            server.binaries().command("pg_checksums").arg("-c").arg(server.data()).output();
        let text = String::from_utf8_lossy(&answer.unwrap().stderr).into_owned();
        let theirs = format!("calculated checksum {expected:X} but block contains {found:X}");
        assert!(text.contains(&theirs), "{theirs}\n{text}");
    }
}

#[test]
fn pg_verifybackup_accepts_the_manifest_and_finds_damage_by_it() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    server.psql("create table t as select generate_series(1, 10000)");
    let from: Lsn = server.psql("select pg_current_wal_lsn()").parse().unwrap();
    let (control, end) = stop(&server);
    if !server.binaries().brings("pg_verifybackup", "on a manifest of ours") {
        return;
    }
    let odd = server.data().join("odd \"name\"\\ ü");
    std::fs::write(&odd, b"x").unwrap();
    std::fs::remove_file(server.data().join("postmaster.opts")).unwrap();
    let version_file = std::fs::read(server.data().join("PG_VERSION")).unwrap();
    let version = Version::from_version_file(&version_file).unwrap();
    let mut manifest = BackupManifest::new(version, control.system_id);
    let mut text = Vec::new();
    for name in files_below(server.data()) {
        if name.starts_with("pg_wal/") {
            continue;
        }
        let content = std::fs::read(server.data().join(&name)).unwrap();
        manifest.file(&ManifestFile {
            path: name.as_bytes(),
            size_bytes: content.len() as u64,
            modified: Timestamp::from_second(1_700_000_000).unwrap(),
            crc32c: Some(crc32c(&content)),
        });
        text.extend(manifest.take());
    }
    let first = control.wal_segment_size.start_of(control.checkpoint.redo_lsn);
    assert!(from >= first);
    let range = LsnRange::new(control.checkpoint.redo_lsn, end).unwrap();
    text.extend(manifest.finish(&[(control.checkpoint.timeline, range)]));
    std::fs::write(server.data().join("backup_manifest"), &text).unwrap();
    let verify = || {
        let mut command = server.binaries().command("pg_verifybackup");
        let answer = command.arg(server.data()).output().unwrap();
        let text = String::from_utf8_lossy(&answer.stderr).into_owned();
        (answer.status.success(), text)
    };
    assert_eq!(verify(), (true, String::new()));
    std::fs::write(&odd, b"y").unwrap();
    let (accepted, said) = verify();
    assert!(!accepted && said.contains("checksum mismatch"), "{said}");
}
