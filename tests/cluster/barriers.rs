//! WAL without a hole that leads nowhere: of a server that ran with `wal_level = minimal` for a while, and of one
//! whose own WAL is damaged.

use std::time::{Duration, Instant};

use serde_json::Value;
use tidemark::pg::Lsn;

use crate::harness::postgres::Stop;
use crate::harness::{Binaries, Postgres, Settings, Tidemark};

const DEADLINE: Duration = Duration::from_secs(90);

fn list(tidemark: &Tidemark) -> Value {
    tidemark.run(&["list", "--json"]).ok().json()
}

fn until(tidemark: &Tidemark, what: &str, done: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let listed = list(tidemark);
        if done(&listed) {
            return listed;
        }
        assert!(began.elapsed() < DEADLINE, "{what}: {listed:#}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn count(listed: &Value, what: &str) -> usize {
    listed[what].as_array().unwrap().len()
}

/// Rows of the table that no backup from before leads to, in a restore of the newest state.
fn restored_rows(tidemark: &Tidemark, name: &str) -> Result<String, String> {
    let target = tidemark.new_target(name);
    tidemark.run(&["restore", "--into", target.to_str().unwrap()]).ok();
    let restored = Postgres::adopt(&Binaries::of_this_run(), &target);
    restored.run();
    let began = Instant::now();
    while restored.psql("select pg_is_in_recovery()") != "f" {
        assert!(began.elapsed() < DEADLINE, "{}", restored.log_tail());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(restored.psql("select count(*) from kept"), "1");
    let rows = restored.try_psql("select count(*) from behind");
    restored.stop(Stop::Fast);
    rows
}

/// The server runs with `wal_level = minimal`.
fn run_minimal(server: &Postgres) {
    server.psql("select pg_drop_replication_slot('tidemark')");
    server.psql("alter system set wal_level = minimal");
    server.psql("alter system set max_wal_senders = 0");
    server.stop(Stop::Fast);
    server.run();
    server.psql("create table behind as select generate_series(1, 5000) as id");
    server.psql("alter system reset all");
    server.stop(Stop::Fast);
    server.run();
}

/// A byte of the server's WAL changes on its disk.
fn damage(server: &Postgres) {
    let from: Lsn = server.psql("select pg_current_wal_insert_lsn()").parse().unwrap();
    server.psql("create table behind as select generate_series(1, 5000) as id");
    let inside = format!("'{}'", Lsn(from.0 + 100_000));
    let name = server.psql(&format!("select pg_walfile_name({inside})"));
    let offset = server.psql(&format!("select file_offset from pg_walfile_name_offset({inside})"));
    server.psql("select pg_switch_wal()");
    // Out of every buffer, so that it is read from the file.
    server.stop(Stop::Fast);
    let file = server.data().join("pg_wal").join(name);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[offset.parse::<usize>().unwrap()] ^= 0x40;
    std::fs::write(&file, bytes).unwrap();
    server.run();
}

#[test]
fn a_past_with_minimal_wal_is_never_forgotten() {
    is_never_forgotten("minimal", "the server ran with wal_level = minimal", run_minimal);
}

#[test]
fn a_past_with_damaged_wal_is_never_forgotten() {
    is_never_forgotten("damaged", "the server's own WAL is damaged", damage);
}

/// While nobody is there, `spoil` makes WAL that no backup from before leads past, and a table of 5000 rows
/// that is `behind` it.
fn is_never_forgotten(barrier: &str, said: &str, spoil: fn(&Postgres)) {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let conninfo = server.conninfo();
    server.psql("create table kept as select 1 as id");
    let tidemark = Tidemark::with_directory();
    let run = ["run", "--postgres", &conninfo, "--backup-interval", "1d"];
    let stream = tidemark.spawn(&["stream", "--postgres", &conninfo]);
    server.wait_for_stream();
    tidemark.run(&["backup", "--postgres", &conninfo]).ok();
    assert_eq!(stream.terminate(), Some(0));
    spoil(&server);

    // This one finds it, stores what follows, takes no backups, and ends.
    let stream = tidemark.spawn(&["stream", "--postgres", &conninfo]);
    server.wait_for_stream();
    server.psql("create table later (id int)");
    let after = server.psql("select now()");
    let found = until(&tidemark, "no gap", |listed| count(listed, "gaps") > 0);
    assert_eq!(stream.terminate(), Some(0));
    assert_eq!(found["gaps"][0]["barrier"], barrier, "{found:#}");
    let listed = list(&tidemark);
    let (gap, windows) = (&listed["gaps"][0], listed["windows"].as_array().unwrap());
    assert_eq!(windows.len(), 1, "{listed:#}");
    assert_eq!(windows[0]["until_lsn"], gap["missing"]["start"], "{listed:#}");
    assert_eq!(windows[0]["open"], false);
    let text = tidemark.run(&["list"]).ok().stdout;
    assert!(text.contains(&format!("GAP, {said}: timeline 1 from ")), "{text}");
    let verified = tidemark.run(&["verify"]).failed(8);
    assert!(verified.stdout.contains(said), "{verified:?}");
    let refused = tidemark.run(&["restore", "--dry-run", "--to-time", &after]).failed(6);
    assert!(refused.stderr.contains(said), "{refused:?}");
    let rows = restored_rows(&tidemark, "before");
    assert!(rows.unwrap_err().contains("does not exist"), "the restore ends before it");

    // Nothing in memory tells this one.
    let sidecar = tidemark.spawn(&run);
    let listed = until(&tidemark, "no backup", |listed| count(listed, "backups") > 1);
    assert_eq!(sidecar.terminate(), Some(0));
    assert_eq!(count(&listed, "windows"), 2, "{listed:#}");
    tidemark.run(&["verify"]).ok();
    assert_eq!(restored_rows(&tidemark, "after"), Ok("5000".to_owned()));
}
