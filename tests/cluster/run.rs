//! `tidemark run`: what it does without being asked.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::postgres::{Stop, free_port};
use crate::harness::sidecar::metrics;
use crate::harness::{Account, Binaries, Postgres, Settings, Tidemark};

const DEADLINE: Duration = Duration::from_secs(90);

fn list(tidemark: &Tidemark) -> Value {
    tidemark.run(&["list", "--json"]).ok().json()
}

fn backup_count(list: &Value) -> usize {
    list["backups"].as_array().unwrap().len()
}

#[track_caller]
pub fn wait_for_backups(tidemark: &Tidemark, count: usize) -> Value {
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
    server.wait_for(free, "1");
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

fn metric(page: &str, name: &str) -> f64 {
    let line = page.lines().find(|line| line.starts_with(&format!("{name}{{")));
    line.and_then(|line| line.rsplit(' ').next()).map_or(0.0, |value| value.parse().unwrap())
}

#[test]
fn how_long_commits_puts_and_fsyncs_take_can_be_asked_while_it_runs() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let conninfo = server.conninfo();
    let port = free_port();
    let tidemark = Tidemark::with_directory()
        .with_env("TIDEMARK_METRICS_LISTEN", &format!("127.0.0.1:{port}"));
    let stream = tidemark.spawn(&["stream", "--postgres", &conninfo]);
    server.wait_for_stream();
    // What some send for a reload ends nothing.
    stream.signal("HUP");
    server.psql("create table t (id int)");
    let began = Instant::now();
    let page = loop {
        server.psql("insert into t values (1)");
        let page = metrics(port);
        if metric(&page, "tidemark_commit_durable_seconds_count") >= 3.0 {
            break page;
        }
        assert!(began.elapsed() < DEADLINE, "{page}{}", stream.log());
        std::thread::sleep(Duration::from_millis(200));
    };
    for name in ["tidemark_store_upload_seconds", "tidemark_store_fsync_seconds"] {
        let (count, sum) =
            (metric(&page, &format!("{name}_count")), metric(&page, &format!("{name}_sum")));
        assert!(count >= 1.0 && sum > 0.0 && sum < 60.0, "{name}: {count}, {sum}\n{page}");
    }
    // initdb's commits are among them.
    let commits = "tidemark_commit_durable_seconds";
    let count = metric(&page, &format!("{commits}_count"));
    let mean = metric(&page, &format!("{commits}_sum")) / count;
    assert!(mean > 0.0 && mean < 30.0, "{mean}\n{page}");
    assert!(metric(&page, "tidemark_wal_plain_bytes_total") > 0.0, "{page}");
    assert!(stream.log().contains("SIGHUP changes nothing"), "{}", stream.log());
    // An address that is taken is told at once, and costs the other nothing.
    let refused = tidemark.run(&["stream", "--postgres", &conninfo]).failed(4);
    assert!(refused.stderr.contains("unable to listen at"), "{refused:?}");
    assert_eq!(stream.terminate(), Some(0));
    assert!(metrics(port).is_empty());
}

#[test]
fn a_backup_that_would_fail_again_is_not_tried_again_at_once() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    server.psql("create table t as select generate_series(1, 1000) as id; checkpoint");
    let file = server.data().join(server.psql("select pg_relation_filepath('t')"));
    server.stop(Stop::Fast);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[8192 + 4000] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    server.run();
    let tidemark = Tidemark::with_directory().with_env("TIDEMARK_BACKUP_PAGE_CHECKSUMS", "fail");
    let conninfo = server.conninfo();
    let mut sidecar = tidemark.spawn(&["run", "--postgres", &conninfo]);
    let failures = |log: String| log.matches("warning: base backup failed").count();
    let began = Instant::now();
    while failures(sidecar.log()) == 0 {
        assert!(began.elapsed() < DEADLINE, "{}", sidecar.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    // An outage would be tried again after ten seconds.
    std::thread::sleep(Duration::from_secs(14));
    assert_eq!(failures(sidecar.log()), 1, "{}", sidecar.log());
    assert!(sidecar.is_running());
    assert_eq!(sidecar.terminate(), Some(0));
}

/// Longer than the lease lasts, with the bare mount point in its place.
#[test]
fn a_repository_that_is_unmounted_for_a_while_is_waited_for_and_nothing_is_lost() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let conninfo = server.conninfo();
    let tidemark = Tidemark::with_directory().with_env("TIDEMARK_LEASE_TTL", "5s");
    let mut sidecar =
        tidemark.spawn(&["run", "--postgres", &conninfo, "--flush-interval", "100ms"]);
    wait_for_backups(&tidemark, 1);
    server.psql("create table t (id int)");
    let repository = std::path::Path::new(tidemark.url());
    let away = repository.with_extension("away");
    std::fs::rename(repository, &away).unwrap();
    let bare = Account::current().make_dir(tidemark.home(), "repository");
    for _ in 0..12 {
        server.psql("insert into t values (1)");
        std::thread::sleep(Duration::from_secs(1));
        assert!(sidecar.is_running(), "{}", sidecar.log());
    }
    assert_eq!(std::fs::read_dir(&bare).unwrap().count(), 0, "nothing is written there");
    std::fs::remove_dir(&bare).unwrap();
    std::fs::rename(&away, repository).unwrap();
    let end: u64 = server.psql("select pg_current_wal_lsn() - '0/0'").parse().unwrap();
    let began = Instant::now();
    loop {
        server.psql("insert into t values (2)");
        let page = server.psql("select flush_lsn - '0/0' from pg_stat_replication");
        if page.trim().parse::<u64>().is_ok_and(|told| told >= end) {
            break;
        }
        assert!(sidecar.is_running(), "{}", sidecar.log());
        assert!(began.elapsed() < DEADLINE, "{page} of {end}: {}", sidecar.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(sidecar.terminate(), Some(0));
    let listed = list(&tidemark);
    assert_eq!(listed["gaps"].as_array().unwrap().len(), 0, "{listed:#}");
    assert_eq!(listed["windows"].as_array().unwrap().len(), 1, "{listed:#}");
    tidemark.run(&["verify", "--quiet"]).ok();
}
