//! `tidemark check` as a monitor asks it: the exit status.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::{Account, Binaries, Postgres, Settings, Tidemark};

const DEADLINE: Duration = Duration::from_secs(60);

struct Scene {
    server: Postgres,
    conninfo: String,
    tidemark: Tidemark,
}

impl Scene {
    fn new() -> Self {
        let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
        let conninfo = server.conninfo();
        let tidemark = Tidemark::with_directory().with_env("TIDEMARK_LEASE_TTL", "5s");
        Self { server, conninfo, tidemark }
    }

    /// `check` ends with this status and says `words`.
    #[track_caller]
    fn check(&self, code: i32, words: &str) {
        let done = self.tidemark.run(&["check", "--postgres", &self.conninfo]);
        assert!(
            done.code == Some(code) && done.stdout.contains(words),
            "{}{}",
            done.stdout,
            done.stderr
        );
    }

    /// The same, as soon as it does.
    #[track_caller]
    fn wait_for_check(&self, code: i32, words: &str) {
        let began = Instant::now();
        loop {
            let done = self.tidemark.run(&["check", "--postgres", &self.conninfo]);
            if done.code == Some(code) && done.stdout.contains(words) {
                return;
            }
            assert!(began.elapsed() < DEADLINE, "{}{}", done.stdout, done.stderr);
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn entries(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

#[test]
fn a_repository_that_is_not_mounted_is_a_failure_and_one_not_begun_is_none() {
    let scene = Scene::new();
    let repository = Path::new(scene.tidemark.url());
    scene.check(0, "nothing is there for cluster 'main' yet");
    assert_eq!(entries(repository), 0);
    std::fs::remove_dir(repository).unwrap();
    scene.check(0, "nothing is there for cluster 'main' yet");
    scene.server.psql("select pg_create_physical_replication_slot('tidemark', true)");
    scene.check(6, "but the server has replication slot 'tidemark'");
    assert!(!repository.exists(), "nothing is made by looking");
    Account::current().make_dir(scene.tidemark.home(), "repository");
    scene.check(6, "but the server has replication slot 'tidemark'");
    assert_eq!(entries(repository), 0);
}

#[test]
fn base_backups_alone_are_in_order() {
    let scene = Scene::new();
    scene.tidemark.run(&["backup", "--quiet", "--postgres", &scene.conninfo]).ok();
    scene.check(0, "1 backup, no gap in the WAL");
    // What follows the backup is nowhere, as is meant.
    scene.server.psql("create table t (id int); select pg_switch_wal()");
    scene.tidemark.run(&["backup", "--quiet", "--postgres", &scene.conninfo]).ok();
    scene.check(0, "2 backups");
    // A monitor hears of backups that cannot be restored.
    let base = Path::new(scene.tidemark.url()).join("main/base");
    let mut backups: Vec<_> =
        std::fs::read_dir(base).unwrap().map(|entry| entry.unwrap().path()).collect();
    backups.sort();
    std::fs::remove_file(backups[0].join("pack-000001")).unwrap();
    scene.check(0, "warning catalog: 2 backups, 1 of which cannot be restored");
    std::fs::remove_file(backups[1].join("pack-000001")).unwrap();
    scene.check(8, "FAILED  catalog: 2 backups, and none can be restored");
    std::fs::write(backups[0].join("manifest"), "nonsense").unwrap();
    scene.check(8, "is damaged: ");
}

#[test]
fn a_stream_that_ended_and_a_slot_that_was_lost_are_failures() {
    let scene = Scene::new();
    let run = ["run", "--postgres", &scene.conninfo];
    let sidecar = scene.tidemark.spawn(&run);
    scene.wait_for_check(0, "1 backup, no gap in the WAL");
    // A lease of five seconds may be renewed late where others have the processor.
    scene.wait_for_check(0, "ok      WAL stream: run by process");
    sidecar.kill();
    scene.wait_for_check(4, "FAILED  WAL stream: nobody streams any more");
    let sidecar = scene.tidemark.spawn(&run);
    scene.wait_for_check(0, "ok      WAL stream: run by process");
    assert_eq!(sidecar.terminate(), Some(0));
    scene.check(4, "FAILED  WAL stream: nobody streams");
    scene.server.psql("select pg_drop_replication_slot('tidemark')");
    scene.server.psql("select pg_create_physical_replication_slot('tidemark')");
    scene.check(6, "FAILED  replication slot: 'tidemark' keeps no WAL");
}
