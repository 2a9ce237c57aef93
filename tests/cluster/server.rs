//! The harness itself: what the other tests stand on.

use crate::harness::postgres::Stop;
use crate::harness::{Binaries, Postgres, Settings};

#[test]
fn a_server_survives_a_crash_and_a_standby_can_be_promoted() {
    let binaries = Binaries::of_this_run();
    let primary = Postgres::start(&binaries, &Settings::default());
    primary.psql("create table t (id int); insert into t values (1)");
    primary.crash();
    primary.run();
    assert_eq!(primary.psql("select * from t"), "1");
    let standby = primary.standby();
    standby.promote();
    assert_eq!(standby.psql("select * from t"), "1");
    // The checkpoint comes a while after the promotion.
    standby.wait_for("select timeline_id from pg_control_checkpoint()", "2");
    primary.stop(Stop::Fast);
}

#[test]
fn a_server_that_crashed_and_was_never_started_again_leaves_no_shared_memory() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", server.pid().unwrap())).unwrap();
    let files = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    let shared: Vec<&str> = files.filter(|file| file.starts_with("/dev/shm/")).collect();
    assert!(!shared.is_empty(), "{maps}");
    server.crash();
    assert!(shared.iter().all(|file| std::fs::exists(file).unwrap()), "{shared:?}");
    drop(server);
    assert!(!shared.iter().any(|file| std::fs::exists(file).unwrap()), "{shared:?}");
}
