//! `tidemark run`: what it does without being asked.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Binaries, Postgres, Settings, Tidemark};

const DEADLINE: Duration = Duration::from_secs(90);

fn list(tidemark: &Tidemark) -> Value {
    tidemark.run(&["list", "--json"]).ok().json()
}

fn backup_count(list: &Value) -> usize {
    list["backups"].as_array().unwrap().len()
}

#[track_caller]
fn wait_for_backups(tidemark: &Tidemark, count: usize) -> Value {
    let began = Instant::now();
    loop {
        // Before the first start there is no repository.
        let done = tidemark.run(&["list", "--json"]);
        if done.code == Some(0) && backup_count(&done.json()) >= count {
            return done.json();
        }
        assert!(began.elapsed() < DEADLINE, "no backup: {done:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn the_first_backup_is_taken_at_once_and_the_next_when_it_is_due() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let conninfo = server.conninfo();
    let tidemark = Tidemark::with_directory();
    let run = ["run", "--postgres", &conninfo, "--backup-interval"];
    let sidecar = tidemark.spawn(&[&run[..], &["1d"]].concat());
    let first = wait_for_backups(&tidemark, 1);
    assert_eq!(sidecar.terminate(), Some(0));
    let sidecar = tidemark.spawn(&[&run[..], &["4s"]].concat());
    let second = wait_for_backups(&tidemark, 2);
    assert_eq!(sidecar.terminate(), Some(0));
    let start = |list: &Value, index: usize| -> jiff::Timestamp {
        list["backups"][index]["backup"]["start_time"].as_str().unwrap().parse().unwrap()
    };
    assert_eq!(start(&first, 0), start(&second, 0));
    let between = start(&second, 1).duration_since(start(&second, 0));
    assert!(between >= jiff::SignedDuration::from_secs(4), "{between}");
}

#[test]
fn after_a_gap_that_another_process_found_a_backup_is_taken_at_once() {
    let conf = Settings::default().segment_mib(1).conf("max_wal_size = 4MB");
    let server = Postgres::start(&Binaries::of_this_run(), &conf.conf("min_wal_size = 2MB"));
    let conninfo = server.conninfo();
    let tidemark = Tidemark::with_directory();
    let run = ["run", "--postgres", &conninfo, "--backup-interval", "1d"];
    let sidecar = tidemark.spawn(&run);
    wait_for_backups(&tidemark, 1);
    sidecar.kill();
    let free = "select count(*) from pg_replication_slots where not active";
    while server.psql(free) != "1" {
        std::thread::sleep(Duration::from_millis(50));
    }
    server.psql("select pg_drop_replication_slot('tidemark')");
    for _ in 0..4 {
        server.psql("create table if not exists t (id int); insert into t values (1)");
        server.psql("select pg_switch_wal(); checkpoint");
    }
    // This one finds the gap, stores what follows it, and takes no backups.
    let stream = tidemark.spawn(&["stream", "--postgres", &conninfo]);
    let began = Instant::now();
    while list(&tidemark)["gaps"].as_array().unwrap().is_empty() {
        assert!(began.elapsed() < DEADLINE, "{}", stream.log());
        // WAL with a commit is stored at once.
        server.psql("insert into t values (2)");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(stream.terminate(), Some(0));
    let sidecar = tidemark.spawn(&run);
    let listed = wait_for_backups(&tidemark, 2);
    assert_eq!(sidecar.terminate(), Some(0));
    let windows = listed["windows"].as_array().unwrap();
    assert_eq!(windows.len(), 2, "{listed:#}");
}
