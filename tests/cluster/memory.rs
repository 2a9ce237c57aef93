//! Peak memory does not follow the size of the database.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{Binaries, Postgres, S3, Settings, Tidemark};

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

/// A backup and a restore of a database while its WAL is streamed.
fn peaks_are_within_limits(tidemark: &Tidemark, repository: &str) {
    let scale = std::env::var("TIDEMARK_TEST_MEMORY_SCALE").unwrap_or_else(|_| "10".into());
    let binaries = Binaries::of_this_run();
    let server = Postgres::start(&binaries, &Settings::default());
    let conninfo = server.conninfo();
    let stream = tidemark.spawn(&["stream", "--postgres", &conninfo]);
    server.wait_for_stream();
    let made = server
        .binaries()
        .client("pgbench")
        .args(["-i", "-q", "-s", &scale, "-h", "127.0.0.1", "-U", "postgres", "-p"])
        .args([&server.port().to_string(), "postgres"])
        .output()
        .unwrap();
    assert!(made.status.success(), "pgbench: {}", String::from_utf8_lossy(&made.stderr));
    // Bytes that no compressor makes smaller, so that buffers of compressed data are as large as they get.
    server.psql(
        "create table random_bytes as select g as id, \
         (select string_agg(decode(md5(random()::text || g || i), 'hex'), '') from generate_series(1, 200) i) as body \
         from generate_series(1, 15000) g",
    );
    let behind = "select pg_current_wal_lsn() - restart_lsn > 1000000 from pg_replication_slots";
    let deadline = Instant::now() + Duration::from_secs(600);
    while server.psql(behind) == "t" {
        assert!(Instant::now() < deadline, "{}", stream.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    let size = server.psql("select pg_size_pretty(sum(pg_database_size(oid))) from pg_database");
    let backup =
        peak_kib(tidemark.command(&["backup", "--postgres", &conninfo, "--checkpoint", "fast"]));
    let stream_peak = stream.peak_memory_kib();
    assert_eq!(stream.terminate(), Some(0));
    let target = tidemark.new_target("restored");
    let restore = peak_kib(tidemark.command(&["restore", "--into", target.to_str().unwrap()]));
    println!(
        "{size} to {repository}: peak backup {backup} KiB, stream {stream_peak} KiB, restore {restore} KiB"
    );
    assert!(backup < 128 << 10, "backup: {backup} KiB");
    assert!(stream_peak < 48 << 10, "stream: {stream_peak} KiB");
    assert!(restore < 96 << 10, "restore: {restore} KiB");
}
