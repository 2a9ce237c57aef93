//! Peak memory does not follow the size of the database, nor memory and descriptors the troubles that a process
//! has been through.

use std::process::Command;
use std::time::{Duration, Instant};

use super::run::wait_for_backups;
use crate::harness::sidecar::Process;
use crate::harness::{Binaries, Postgres, S3, Settings, Tidemark};

/// Rows of bytes that no compressor makes smaller, at first and then added: 45 MiB and three times as much.
const ROWS: u32 = 15_000;
const ROWS_ADDED: u32 = 45_000;
/// How much more a command may hold when the database is four times as large: far less than was added.
const GROWTH_KIB_MAX: u64 = 32 << 10;

/// Runs a command to its end and returns the greatest resident size of the process in KiB.
fn peak_kib(mut command: Command) -> u64 {
    let mut child = command.spawn().unwrap();
    let mut peak = 0;
    loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        peak = peak.max(
            line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0),
        );
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{command:?}: {status}");
            return peak;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn peak_memory_stays_within_the_stated_limits_on_a_directory() {
    peaks_are_within_limits(&Tidemark::with_directory(), "directory");
}

#[test]
fn peak_memory_stays_within_the_stated_limits_on_s3() {
    let s3 = S3::start();
    peaks_are_within_limits(&s3.tidemark("memory"), "S3");
}

/// The greatest resident sizes, KiB.
#[derive(Clone, Copy, Debug)]
struct Peaks {
    backup: u64,
    stream: u64,
    restore: u64,
}

/// A backup and a restore of a database while its WAL is streamed, and again when there is more of it.
fn peaks_are_within_limits(tidemark: &Tidemark, repository: &str) {
    let scale = std::env::var("TIDEMARK_TEST_MEMORY_SCALE").unwrap_or_else(|_| "10".into());
    let binaries = Binaries::of_this_run();
    let server = Postgres::start(&binaries, &Settings::default());
    let stream = tidemark.spawn(&["stream", "--postgres", &server.conninfo()]);
    server.wait_for_stream();
    let made = server
        .binaries()
        .client("pgbench")
        .args(["-i", "-q", "-s", &scale, "-h", "127.0.0.1", "-U", "postgres", "-p"])
        .args([&server.port().to_string(), "postgres"])
        .output()
        .unwrap();
    assert!(made.status.success(), "pgbench: {}", String::from_utf8_lossy(&made.stderr));
    server.psql("create table random_bytes (id int, body bytea)");
    add_rows(&server, ROWS);
    let first = peaks(tidemark, &server, &stream);
    let size = "select pg_size_pretty(sum(pg_database_size(oid))) from pg_database";
    println!("{} to {repository}: {first:?}", server.psql(size));
    add_rows(&server, ROWS_ADDED);
    let second = peaks(tidemark, &server, &stream);
    println!("{} to {repository}: {second:?}", server.psql(size));
    assert_eq!(stream.terminate(), Some(0));
    let limits = Peaks { backup: 128 << 10, stream: 48 << 10, restore: 96 << 10 };
    for (what, peak) in [
        ("backup", |peaks: &Peaks| peaks.backup),
        ("stream", |peaks: &Peaks| peaks.stream),
        ("restore", |peaks: &Peaks| peaks.restore),
    ] as [(&str, fn(&Peaks) -> u64); 3]
    {
        assert!(peak(&second).max(peak(&first)) < peak(&limits), "{what}: {first:?} {second:?}");
        let more = peak(&second).saturating_sub(peak(&first));
        assert!(more < GROWTH_KIB_MAX, "{what} follows the size: {first:?} {second:?}");
    }
}

fn add_rows(server: &Postgres, count: u32) {
    server.psql(&format!(
        "insert into random_bytes select g, (select string_agg(decode(md5(random()::text || g || i), 'hex'), '') \
         from generate_series(1, 200) i) from generate_series(1, {count}) g"
    ));
}

/// What a backup and a restore hold now, and the stream until all was stored.
fn peaks(tidemark: &Tidemark, server: &Postgres, stream: &Process) -> Peaks {
    let behind = "select pg_current_wal_lsn() - restart_lsn > 1000000 from pg_replication_slots";
    let deadline = Instant::now() + Duration::from_secs(600);
    while server.psql(behind) == "t" {
        assert!(Instant::now() < deadline, "{}", stream.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    let conninfo = server.conninfo();
    let backup = ["backup", "--postgres", &conninfo, "--checkpoint", "fast"];
    let backup = peak_kib(tidemark.command(&backup));
    let target = tidemark.new_target("restored");
    let restore = peak_kib(tidemark.command(&["restore", "--into", target.to_str().unwrap()]));
    std::fs::remove_dir_all(&target).unwrap();
    Peaks { backup, stream: stream.peak_memory_kib(), restore }
}

/// How much more a sidecar may hold after all of its reconnections than after the first quarter: less than
/// a few KiB for each that is left behind.
const LEFT_KIB_MAX: u64 = 8 << 10;
const LEFT_FILES_MAX: usize = 2;

/// `TIDEMARK_TEST_RECONNECTIONS=N` makes it longer.
#[test]
fn a_sidecar_keeps_nothing_of_connections_that_broke() {
    let count = std::env::var("TIDEMARK_TEST_RECONNECTIONS").map_or(80, |n| n.parse().unwrap());
    let s3 = S3::start();
    let tidemark = s3.tidemark("soak");
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let sidecar = tidemark.spawn(&["run", "--postgres", &server.conninfo()]);
    server.wait_for_stream();
    // What it takes stays with the heap: it must be there before as well as after.
    wait_for_backups(&tidemark, 1);
    server.psql("create table soak (body text)");
    let walsender = "select pid from pg_stat_replication where state = 'streaming'";
    let mut after_quarter = (0, 0);
    for number in 1..=count {
        server.psql(
            "insert into soak select repeat(md5(i::text), 20) from generate_series(1, 200) i",
        );
        let pid = server.psql(walsender);
        server.psql(&format!("select pg_terminate_backend({pid})"));
        let deadline = Instant::now() + Duration::from_secs(60);
        let is_anew = || ![String::new(), pid.clone()].contains(&server.psql(walsender));
        while !is_anew() {
            assert!(Instant::now() < deadline, "no stream after {number}: {}", sidecar.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        if number == count / 4 {
            after_quarter = (sidecar.memory_kib(), sidecar.open_file_count());
        }
    }
    let (memory, files) = (sidecar.memory_kib(), sidecar.open_file_count());
    println!("{count} reconnections: (KiB, files) {after_quarter:?}, then {:?}", (memory, files));
    assert!(files <= after_quarter.1 + LEFT_FILES_MAX, "{files} files, before {after_quarter:?}");
    assert!(memory <= after_quarter.0 + LEFT_KIB_MAX, "{memory} KiB, before {after_quarter:?}");
    assert_eq!(sidecar.terminate(), Some(0));
}
