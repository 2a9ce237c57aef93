//! Restored standbys: what they follow, and what they live through.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::harness::postgres::{Settings, Stop};
use crate::harness::sidecar::Process;
use crate::harness::{Account, Binaries, Postgres, Tidemark};

/// Waits until all WAL that `server` has is in the repository.
fn wait_durable(server: &Postgres) {
    let end = server.psql("select pg_current_wal_flush_lsn()");
    let durable = format!(
        "select flush_lsn >= '{end}' from pg_stat_replication where application_name = 'tidemark'"
    );
    server.wait_for(&durable, "t");
}

/// Makes the server forget all WAL before the current segment, which the repository has; gives the name
/// of a segment that is gone.
fn move_wal_into_the_repository(server: &Postgres) -> PathBuf {
    let name = server.psql("select pg_walfile_name(pg_current_wal_lsn())");
    let segment = server.data().join("pg_wal").join(name);
    for row in 100..103 {
        server.psql(&format!("insert into t values ({row})"));
        server.psql("select pg_switch_wal()");
    }
    wait_durable(server);
    let deadline = Instant::now() + Duration::from_secs(60);
    while segment.exists() {
        assert!(Instant::now() < deadline, "'{}' stays", segment.display());
        server.psql("checkpoint");
        std::thread::sleep(Duration::from_millis(200));
    }
    segment
}

fn write_passfile(folder: &Path, line: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = folder.join("passes");
    std::fs::write(&path, line).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    Account::current().give(&path);
    path
}

/// A server with an empty table `t`, a backup of it, and the sidecar that goes on streaming.
fn streamed_and_backed_up() -> (Postgres, Tidemark, Process) {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    server.psql("create table t (id int)");
    let conninfo = server.conninfo();
    let tidemark = Tidemark::with_directory();
    let sidecar = tidemark.spawn(&["stream", "--postgres", &conninfo]);
    server.wait_for_stream();
    tidemark.run(&["backup", "--postgres", &conninfo, "--checkpoint", "fast"]).ok();
    (server, tidemark, sidecar)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_streams_from_its_primary_and_takes_from_the_repository_what_that_has_removed() {
    let binaries = Binaries::of_this_run();
    let settings = Settings::default()
        .conf("password_encryption = 'scram-sha-256'")
        .hba("local all all trust")
        .hba("host all postgres 127.0.0.1/32 trust")
        .hba("host replication postgres 127.0.0.1/32 trust")
        .hba("host replication rep 127.0.0.1/32 scram-sha-256");
    let server = Postgres::start(&binaries, &settings);
    server.psql("create table t (id int)");
    server.psql("create role rep replication login password 'gehe im'");
    server.psql("select pg_create_physical_replication_slot('standby1')");
    let conninfo = server.conninfo();
    let tidemark = Tidemark::with_directory();
    let mut sidecar = tidemark.spawn(&["stream", "--postgres", &conninfo]);
    server.wait_for_stream();
    tidemark.run(&["backup", "--postgres", &conninfo, "--checkpoint", "fast"]).ok();

    let passes = write_passfile(tidemark.home(), "127.0.0.1:*:*:rep:gehe im\n");
    let primary = format!(
        "postgresql://rep:gehe%20im@127.0.0.1:{}/?passfile={}&application_name=it's%20a%20%5C",
        server.port(),
        passes.display()
    );
    let target = tidemark.new_target("standby");
    let into = target.to_str().unwrap();
    let words =
        ["restore", "--into", into, "--as-standby", "--primary-slot", "standby1", "--primary"];
    let said = tidemark.run(&[&words[..], &[&primary, "--json"]].concat()).ok();
    let report = said.json();
    assert_eq!(report["standby"]["primary_slot"], "standby1", "{report:#}");
    assert_eq!(report["standby"]["secrets_left_out"], serde_json::json!([]), "{report:#}");
    let conf = std::fs::read_to_string(target.join("postgresql.auto.conf")).unwrap();
    for text in [&said.stdout, &said.stderr, &conf] {
        assert!(!text.contains("gehe"), "{text}");
    }

    // The backup's end is all that the standby has; what follows only the repository can give.
    let removed = move_wal_into_the_repository(&server);
    let standby = Postgres::adopt(&binaries, &target);
    standby.run();
    standby.wait_for("select count(*) from t", "3");
    let name = removed.file_name().unwrap().to_str().unwrap();
    assert!(standby.log().contains(&format!("restored log file \"{name}\"")), "{}", standby.log());
    standby.wait_for("select status, slot_name from pg_stat_wal_receiver", "streaming|standby1");
    let names = "select application_name, usename from pg_stat_replication where usename = 'rep'";
    assert_eq!(server.psql(names), "it's a \\|rep");

    // Nothing reaches the repository any more: what arrives has been streamed.
    assert_eq!(sidecar.terminate(), Some(0));
    server.psql("insert into t values (200)");
    standby.wait_for("select count(*) from t", "4");

    // A standby that has fallen behind again goes through the repository and back to the stream.
    standby.stop(Stop::Fast);
    server.psql("select pg_drop_replication_slot('standby1')");
    sidecar = tidemark.spawn(&["stream", "--postgres", &conninfo]);
    server.wait_for_stream();
    move_wal_into_the_repository(&server);
    server.psql("select pg_create_physical_replication_slot('standby1')");
    standby.run();
    standby.wait_for("select count(*) from t", "7");
    standby.wait_for("select status from pg_stat_wal_receiver", "streaming");

    // An unreachable repository does not end it, even when it looks there.
    assert_eq!(sidecar.terminate(), Some(0));
    let (repository, away) = (Path::new(tidemark.url()), tidemark.home().join("away"));
    std::fs::rename(repository, &away).unwrap();
    server.psql("select pg_terminate_backend(pid) from pg_stat_replication where usename = 'rep'");
    server.psql("insert into t values (300)");
    standby.wait_for("select count(*) from t", "8");
    assert!(standby.log().contains("error: unable to get WAL file"), "{}", standby.log_tail());
    assert!(!standby.log().contains("FATAL:  could not restore file"), "{}", standby.log_tail());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_follows_the_configured_server_unless_told_otherwise() {
    let (server, tidemark, sidecar) = streamed_and_backed_up();
    let (binaries, conninfo) = (Binaries::of_this_run(), server.conninfo());
    assert_eq!(sidecar.terminate(), Some(0));

    let configured = format!("{conninfo} password=secret application_name=tidemark");
    let restore = |words: &[&str]| {
        let mut command = tidemark.command(&[&["restore", "--as-standby"], words].concat());
        let done = command.env("TIDEMARK_POSTGRES", &configured).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!said.contains("secret "), "{said}");
        (done.status.code().unwrap(), said + &String::from_utf8_lossy(&done.stdout))
    };
    let target = tidemark.new_target("standby");
    let (code, said) = restore(&["--into", target.to_str().unwrap()]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("without password: "), "{said}");
    let standby = Postgres::adopt(&binaries, &target);
    standby.run();
    server.psql("insert into t values (1)");
    standby.wait_for("select count(*) from t", "1");
    let names = "select application_name from pg_stat_replication";
    assert_ne!(server.psql(names), "tidemark", "it would count in synchronous_standby_names");

    let (code, said) = restore(&["--dry-run", "--primary", "none"]);
    assert!(code == 0 && said.contains("follows        the repository alone\n"), "{said}");
    let (code, said) = restore(&["--dry-run", "--primary-slot", "tidemark"]);
    assert!(code == 2 && said.contains("WAL is streamed through it"), "{said}");
    let (code, said) = restore(&["--dry-run", "--timeline", "1"]);
    assert!(code == 2 && said.contains("follows the newest timeline"), "{said}");
    let (code, said) = restore(&["--dry-run", "--primary-slot", "a-b"]);
    assert!(code == 2 && said.contains("lower-case letters"), "{said}");
    let (code, said) = restore(&["--dry-run", "--primary", "password='secret x'"]);
    assert!(code == 2 && said.contains("is empty"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_that_a_server_has_and_the_repository_has_not_yet_is_kept() {
    let (server, tidemark, sidecar) = streamed_and_backed_up();
    let (binaries, conninfo) = (Binaries::of_this_run(), server.conninfo());
    let restore = |name: &str, primary: &str| {
        let target = tidemark.new_target(name);
        let into = target.to_str().unwrap();
        tidemark.run(&["restore", "--into", into, "--as-standby", "--primary", primary]).ok();
        target
    };
    let standby = Postgres::adopt(&binaries, &restore("standby", &conninfo));
    standby.run();
    server.psql("insert into t values (1)");
    wait_durable(&server);
    // The repository ends in the middle of a segment, the stream goes on.
    assert_eq!(sidecar.terminate(), Some(0));
    server.psql("insert into t values (2)");
    standby.wait_for("select count(*) from t", "2");
    server.psql("select pg_switch_wal()");
    server.psql("insert into t values (3)");
    standby.wait_for("select count(*) from t", "3");
    let by_hand = restore("by_hand", "none");
    server.stop(Stop::Immediate);
    standby.promote();
    assert_eq!(standby.psql("select string_agg(id::text, ',' order by id) from t"), "1,2,3");

    // As the manual tells who restores: the dead server's WAL files are copied to where recovery finds them.
    std::fs::rename(by_hand.join("standby.signal"), by_hand.join("recovery.signal")).unwrap();
    copy_wal(&server, &by_hand);
    let recovered = Postgres::adopt(&binaries, &by_hand);
    recovered.run();
    recovered.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(recovered.psql("select count(*) from t"), "3");
}

/// Copies the WAL of the dead `server` into the data directory `data`.
fn copy_wal(server: &Postgres, data: &Path) {
    for entry in std::fs::read_dir(server.data().join("pg_wal")).unwrap() {
        let entry = entry.unwrap();
        let copy = data.join("pg_wal").join(entry.file_name());
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), &copy).unwrap();
            Account::current().give(&copy);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_saved_from_the_lost_host_is_replayed_by_a_standby_and_not_by_a_planned_restore() {
    let (server, tidemark, sidecar) = streamed_and_backed_up();
    let binaries = Binaries::of_this_run();
    server.psql("insert into t values (1)");
    wait_durable(&server);
    // The repository ends in the middle of a segment; two more commits are on the host alone.
    assert_eq!(sidecar.terminate(), Some(0));
    server.psql("insert into t values (2)");
    server.psql("select pg_switch_wal()");
    server.psql("insert into t values (3)");
    server.stop(Stop::Immediate);

    let restored = |name: &str, words: &[&str]| {
        let target = tidemark.new_target(name);
        tidemark.run(&[&["restore", "--into", target.to_str().unwrap()], words].concat()).ok();
        copy_wal(&server, &target);
        let restored = Postgres::adopt(&binaries, &target);
        restored.run();
        restored
    };
    let rows = "select string_agg(id::text, ',' order by id) from t";
    let standby = restored("standby", &["--as-standby", "--primary", "none"]);
    standby.wait_for(rows, "1,2,3");
    standby.promote();
    assert_eq!(standby.psql(rows), "1,2,3");
    standby.psql("insert into t values (4)");
    // The newest state of the repository is what was planned, and what it ends with.
    let planned = restored("planned", &[]);
    planned.wait_for("select pg_is_in_recovery()", "f");
    assert_eq!(planned.psql(rows), "1");
}
