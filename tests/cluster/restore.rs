//! Restores of real clusters: to every kind of target, and what must be true of the directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tidemark::capture::base::{self, Base, BaseOptions, PageChecksums, WalStreaming};
use tidemark::error::Kind;
use tidemark::pipeline::budget::RESTORE_BYTES;
use tidemark::pipeline::{Budget, Level};
use tidemark::repo::{BackupId, ClusterName, Encryption, PackOptions, Repository};
use tidemark::restore::{
    self, Action, Edge, Engine, Isolation, Options, Outcome, Owner, Plan, Progress, Request,
    RestoreReport, Role, StartOptions, StartReport, Stop, Target, TimelineChoice, Upstream,
    WalDelivery,
};
use tidemark::store::StoreOptions;
use tidemark::wire::CheckpointMode;
use tokio_util::sync::CancellationToken;

use super::stream::{Place, Running, connect_options, settings, wal_end};
use crate::harness::postgres::Stop as StopServer;
use crate::harness::{Account, Binaries, Postgres, Tidemark};

async fn back_up(place: &Place, server: &Postgres, running: &Running) -> BackupId {
    let base = Base {
        options: BaseOptions {
            label: "restore".into(),
            checkpoint: CheckpointMode::Fast,
            rate_max_kib: None,
            page_checksums: PageChecksums::Fail,
            pack: PackOptions {
                budget: Budget::backup(128 << 20, 2, Level::default()),
                level: Level::default(),
                pack_bytes: 8 << 20,
            },
            wal_stall_max: Duration::from_secs(60),
        },
        postgres: connect_options(server),
        writer: place.writer.clone(),
        wal: WalStreaming::InThisProcess(Arc::clone(&running.status)),
        progress: Arc::new(base::Progress::new()),
    };
    base::backup(&base, &CancellationToken::new()).await.unwrap().manifest.public.id
}

/// A stream of the server's WAL into the place, with a backup behind it.
async fn protect(place: &Place, server: &Postgres) -> Running {
    let running = Running::start(place.stream(server)).await;
    running.streaming().await;
    back_up(place, server, &running).await;
    running
}

/// A server whose WAL is streamed into a repository that holds a backup of it.
struct Protected {
    binaries: Binaries,
    server: Postgres,
    place: Place,
    running: Running,
}

impl Protected {
    /// The backup holds an empty table `t` and what `sql` does.
    async fn with(sql: &[&str]) -> Self {
        let binaries = Binaries::of_this_run();
        let server = Postgres::start(&binaries, &settings());
        server.psql("create table t (id int)");
        for sql in sql {
            server.psql(sql);
        }
        let place = Place::of(&server).await;
        let running = protect(&place, &server).await;
        Self { binaries, server, place, running }
    }
}

/// A commit as the server knew it.
struct Commit {
    row: u32,
    xid: String,
    time: jiff::Timestamp,
    /// Position after it.
    end: tidemark::pg::Lsn,
}

fn insert(server: &Postgres, row: u32) -> Commit {
    let xid = server.psql(&format!("insert into t values ({row}) returning xmin"));
    let end = wal_end(server);
    let time =
        server.psql(&format!("select pg_xact_commit_timestamp(xmin) from t where id = {row}"));
    Commit { row, xid, time: time.replace(' ', "T").parse().unwrap(), end }
}

pub fn options(into: &Path) -> Options {
    Options {
        into: into.to_path_buf(),
        tablespaces: Vec::new(),
        action: Action::Promote,
        role: Role::Primary,
        owner: Account::current().ids().map(|(uid, gid)| Owner { uid, gid }),
        engine: Engine::Postgres,
        wal_get_command: vec!["/bin/false".into()],
        budget: Budget::restore(RESTORE_BYTES, 2),
        preplaced_bytes_max: restore::run::PREPLACED_BYTES_MAX,
    }
}

pub async fn plan(place: &Place, request: &Request) -> tidemark::error::Result<Plan> {
    let reader = place.repository.reader(Vec::new());
    restore::plan(&reader, &place.catalog().await, request).await
}

pub async fn run(
    place: &Place,
    plan: &Plan,
    options: &Options,
) -> tidemark::error::Result<RestoreReport> {
    let reader = place.repository.reader(Vec::new());
    let progress = Arc::new(Progress::default());
    restore::run(plan, options, &reader, &progress).await
}

pub fn request(target: Target) -> Request {
    Request { target, ..Request::default() }
}

/// A folder for a restore, with room beside it.
pub struct Folder {
    home: tempfile::TempDir,
}

impl Folder {
    pub fn new() -> Self {
        Self { home: Account::current().temp_dir("restore") }
    }

    pub fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }
}

fn verify_backup(binaries: &Binaries, data: &Path) {
    let mut verify = binaries.client("pg_verifybackup");
    if !binaries.has("pg_verifybackup") {
        // Another major's, which reads no WAL but its own.
        verify.arg("--no-parse-wal");
    }
    let verified = verify.arg(data).output().unwrap();
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    assert!(verified.status.success(), "pg_verifybackup: {said}");
}

/// The ids in the table of a restored cluster, which is started and stopped for it.
pub fn rows(binaries: &Binaries, data: &Path) -> Vec<u32> {
    let restored = Postgres::adopt(binaries, data);
    restored.run();
    restored.wait_for("select pg_is_in_recovery()", "f");
    let rows = restored.psql("select id from t order by id");
    restored.stop(StopServer::Fast);
    rows.lines().map(|line| line.parse().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_target_ends_at_exactly_that_commit() {
    let binaries = Binaries::of_this_run();
    let server = Postgres::start(&binaries, &settings().conf("track_commit_timestamp = on"));
    let space = Account::current().make_dir(server.home(), "space");
    server.psql(&format!("create tablespace side location '{}'", space.display()));
    server.psql("create table t (id int)");
    server.psql("create table far tablespace side as select repeat(md5(g::text), 50) from generate_series(1, 5000) g");
    insert(&server, 1);
    let place = Place::of(&server).await;
    let running = protect(&place, &server).await;

    let mut commits = Vec::new();
    for row in 2..7 {
        commits.push(insert(&server, row));
        server.psql(&format!("select pg_create_restore_point('after {row}')"));
        server.psql("begin; insert into t values (1000); rollback");
        server.psql("insert into far select repeat('x', 1000) from generate_series(1, 500)");
        std::thread::sleep(Duration::from_millis(20));
    }
    running.status.wait_durable(wal_end(&server)).await.unwrap();
    running.stop().await.unwrap();

    let third = &commits[2];
    assert_eq!(third.row, 4);
    let between = third.time.checked_add(jiff::SignedDuration::from_millis(3)).unwrap();
    let cases = [
        (Target::Time { at: between, edge: Edge::Inclusive }, 4),
        (Target::Time { at: third.time, edge: Edge::Inclusive }, 4),
        (Target::Time { at: third.time, edge: Edge::Exclusive }, 3),
        (Target::Lsn { at: third.end, edge: Edge::Exclusive }, 4),
        (Target::xid(&third.xid, Edge::Inclusive).unwrap(), 4),
        (Target::xid(&third.xid, Edge::Exclusive).unwrap(), 3),
        (Target::name("after 5").unwrap(), 5),
        (Target::Immediate, 1),
        (Target::Latest, 6),
    ];
    for (target, last) in cases {
        let planned = plan(&place, &request(target.clone())).await.unwrap();
        println!("{}", planned.render(&jiff::tz::TimeZone::UTC));
        let folder = Folder::new();
        let side = folder.home.path().join("side");
        let mut options = options(&folder.data());
        let moved = format!("{}={}", space.display(), side.display());
        options.tablespaces = vec![moved.parse().unwrap()];
        let report = run(&place, &planned, &options).await.unwrap();
        assert_eq!(report.wal, WalDelivery::InPlace);
        verify_backup(&binaries, &folder.data());
        assert_eq!(rows(&binaries, &folder.data()), (1..=last).collect::<Vec<_>>(), "{target}");
        assert_eq!(side.read_dir().unwrap().count(), 1, "PostgreSQL's folder and nothing of ours");
        if binaries.brings("pg_checksums", "on a restore") {
            let checked = binaries
                .command("pg_checksums")
                .arg("-c")
                .arg("-D")
                .arg(folder.data())
                .output()
                .unwrap();
            assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn actions_are_obeyed_at_the_end_of_the_wal_too() {
    let Protected { binaries, server, place, running } = Protected::with(&[]).await;
    server.psql("insert into t values (1)");
    running.status.wait_durable(wal_end(&server)).await.unwrap();
    running.stop().await.unwrap();
    let planned = plan(&place, &request(Target::Latest)).await.unwrap();
    assert_eq!(planned.stop, Stop::EndOfWal);

    let folder = Folder::new();
    let paused = Options { action: Action::Pause, ..options(&folder.data()) };
    run(&place, &planned, &paused).await.unwrap();
    let restored = Postgres::adopt(&binaries, &folder.data());
    restored.run();
    assert_eq!(restored.psql("select count(*) from t"), "1");
    assert_eq!(restored.psql("select pg_is_in_recovery(), pg_is_wal_replay_paused()"), "t|t");
    drop(restored);

    let folder = Folder::new();
    let stopped = Options { action: Action::Shutdown, ..options(&folder.data()) };
    run(&place, &planned, &stopped).await.unwrap();
    let restored = Postgres::adopt(&binaries, &folder.data());
    assert!(!restored.try_run());
    assert!(restored.log().contains("shutdown at recovery target"), "{}", restored.log_tail());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_cluster_never_reuses_a_timeline_of_the_repository() {
    let Protected { binaries, server, place, running } = Protected::with(&[]).await;
    server.psql("insert into t values (1)");
    server.psql("select pg_create_restore_point('one')");
    let standby = server.standby();
    server.psql("insert into t values (2)");
    let end = wal_end(&server);
    while standby.psql("select pg_last_wal_replay_lsn()").parse::<tidemark::pg::Lsn>().unwrap()
        < end
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    running.status.wait_durable(end).await.unwrap();
    server.stop(StopServer::Fast);
    running.stop().await.unwrap();
    standby.promote();
    standby.psql("insert into t values (3)");
    let running = Running::start(place.stream(&standby)).await;
    running.streaming().await;
    running.status.wait_durable(wal_end(&standby)).await.unwrap();
    running.stop().await.unwrap();

    let latest = plan(&place, &request(Target::Latest)).await.unwrap();
    assert_eq!(latest.timeline.get(), 2);
    let folder = Folder::new();
    run(&place, &latest, &options(&folder.data())).await.unwrap();
    assert_eq!(rows(&binaries, &folder.data()), [1, 2, 3]);
    assert!(folder.data().join("pg_wal/00000003.history").exists());

    // Before the promotion: the stop lies on timeline 1, yet the new one is 3.
    let point = plan(&place, &request(Target::name("one").unwrap())).await.unwrap();
    assert_eq!(point.timeline.get(), 1);
    let folder = Folder::new();
    run(&place, &point, &options(&folder.data())).await.unwrap();
    assert_eq!(rows(&binaries, &folder.data()), [1]);
    assert!(folder.data().join("pg_wal/00000003.history").exists());
    // Another server was promoted after the plan was made.
    let three = tidemark::pg::TimelineId::new(3).unwrap();
    let history = format!("1\t{}\tno recovery target specified\n", point.applied_end_lsn);
    place.writer.put_history(three, history.into()).await.unwrap();
    let folder = Folder::new();
    run(&place, &point, &options(&folder.data())).await.unwrap();
    assert_eq!(rows(&binaries, &folder.data()), [1]);
    assert!(folder.data().join("pg_wal/00000004.history").exists());
    let timeline = TimelineChoice::Exactly(tidemark::pg::TimelineId::FIRST);
    let old = plan(&place, &Request { timeline, ..Request::default() }).await.unwrap();
    assert_eq!((old.timeline.get(), old.stop), (1, Stop::EndOfWal));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_finished_does_not_start_and_can_be_run_again() {
    let Protected { binaries, place, running, server: _server } =
        Protected::with(&["insert into t values (1)"]).await;
    running.stop().await.unwrap();
    let planned = plan(&place, &request(Target::Latest)).await.unwrap();
    let folder = Folder::new();
    let options = options(&folder.data());

    place.set_down(true);
    let error = run(&place, &planned, &options).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
    place.set_down(false);
    // Interrupted in the middle: the future is dropped when some files are there.
    let mut restore = Box::pin(run(&place, &planned, &options));
    let marker = folder.data().join("tidemark.restoring");
    loop {
        tokio::select! {
            _ = &mut restore => break,
            () = tokio::time::sleep(Duration::from_millis(1)) => {
                if folder.data().join("base").exists() { break; }
            }
        }
    }
    drop(restore);
    if marker.exists() {
        assert!(!folder.data().join("global/pg_control").exists());
        let mut postgres: Command = binaries.command("postgres");
        let said = postgres.arg("-D").arg(folder.data()).output().unwrap();
        assert!(!said.status.success());
        // What was being written is finished first; until then the directory is taken.
        while let Err(error) = run(&place, &planned, &options).await {
            assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
            assert!(error.message().contains("another restore"), "{error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert!(!marker.exists());
    assert_eq!(rows(&binaries, &folder.data()), [1]);
    let error = run(&place, &planned, &options).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_files_and_directories_are_restored_by_an_account_that_modes_bind() {
    use std::os::unix::fs::PermissionsExt as _;
    let binaries = Binaries::of_this_run();
    let server = Postgres::start(&binaries, &settings());
    server.psql("create table t as select 1 as id");
    let extra = Account::current().make_dir(server.data(), "extra");
    std::fs::create_dir(extra.join("shared")).unwrap();
    Account::current().give(&extra.join("shared"));
    let modes = [
        ("extra/server.key", 0o400),
        ("extra/shared", 0o2750),
        ("extra", 0o500),
        ("postgresql.auto.conf", 0o440),
    ];
    std::fs::write(extra.join("server.key"), "secret").unwrap();
    Account::current().give(&extra.join("server.key"));
    for (path, mode) in modes {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(server.data().join(path), mode).unwrap();
    }
    let tidemark = Tidemark::with_directory();
    let words = ["backup", "--postgres", &server.conninfo(), "--checkpoint", "fast"];
    tidemark.run(&words).ok();
    // Nothing keeps the backup while it is restored.
    let mut plan = tidemark.command(&["restore", "--dry-run"]);
    let plan = plan.env("TIDEMARK_RETENTION_KEEP_COUNT", "1").output().unwrap();
    let said = String::from_utf8_lossy(&plan.stdout);
    assert!(said.contains("this backup goes when the next one is there"), "{said}");
    let target = tidemark.new_target("read-only");
    tidemark.run(&["restore", "--into", target.to_str().unwrap()]).ok();
    for (path, mode) in modes {
        let found = std::fs::metadata(target.join(path)).unwrap().permissions().mode();
        assert_eq!(found & 0o7777, mode, "{path}");
    }
    assert_eq!(std::fs::read(target.join("extra/server.key")).unwrap(), b"secret");
    assert_eq!(rows(&binaries, &target), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_root_makes_for_a_restore_lets_the_account_of_the_server_pass() {
    // Nobody else can give away what he makes.
    let Some((uid, gid)) = Account::current().ids() else { return };
    let binaries = Binaries::of_this_run();
    let server = Postgres::start(&binaries, &settings());
    let old = Account::current().make_dir(server.home(), "space");
    server.psql(&format!("create tablespace space location '{}'", old.display()));
    server.psql("create table t tablespace space as select 1 as id");
    let tidemark = Tidemark::with_directory();
    tidemark.run(&["backup", "--postgres", &server.conninfo(), "--checkpoint", "fast"]).ok();
    // Empty, and root's; the target is two directories below one that is there.
    let space = tidemark.home().join("empty");
    std::fs::create_dir(&space).unwrap();
    let target = tidemark.home().join("new/deep/data");
    let mapping = format!("{}={}", old.display(), space.display());
    let mut restore = Command::new("sh");
    restore
        .args(["-c", "umask 077; exec \"$0\" \"$@\""])
        .arg(Account::current().tidemark_binary())
        .args(["restore", "--into", target.to_str().unwrap(), "--tablespace", &mapping])
        .args(["--owner", &format!("{uid}:{gid}"), "--repository", tidemark.url()])
        .env("HOME", tidemark.home());
    let done = restore.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // The socket of the server that looks at it goes beside the directory.
    Account::current().give(target.parent().unwrap());
    assert_eq!(rows(&binaries, &target), [1]);
}

fn groups_of_process(pid: u32) -> BTreeSet<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap();
    groups.split_whitespace().map(str::to_owned).collect()
}

/// The groups that the account gets when it logs in.
fn groups_of_account() -> BTreeSet<String> {
    let uid = Account::current().ids().map(|(uid, _)| uid.to_string());
    let mut id = Command::new("id");
    let said = id.arg("-G").args(uid).output().unwrap();
    assert!(said.status.success());
    String::from_utf8(said.stdout).unwrap().split_whitespace().map(str::to_owned).collect()
}

/// The restored server that `--start` left running; stopped when dropped.
struct Left {
    binaries: Binaries,
    data: PathBuf,
    socket: PathBuf,
}

impl Left {
    fn psql(&self, sql: &str) -> String {
        let host = format!("host={} user=postgres dbname=postgres", self.socket.display());
        let mut psql = self.binaries.client("psql");
        let answer = psql.args(["-XqAt", "-d", &host, "-c", sql]).output().unwrap();
        let said = String::from_utf8_lossy(&answer.stderr).into_owned();
        assert!(answer.status.success(), "{sql}: {said}");
        String::from_utf8_lossy(&answer.stdout).trim().to_owned()
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        let mut stop = self.binaries.command("pg_ctl");
        stop.args(["stop", "-m", "immediate", "-D"]).arg(&self.data);
        let _ = stop.output();
    }
}

async fn start(
    place: &Place,
    plan: &Plan,
    folder: &Folder,
    action: Action,
) -> tidemark::error::Result<(StartReport, Left)> {
    let binaries = Binaries::of_this_run();
    let socket = Account::current().make_dir(folder.home.path(), "socket");
    let left = Left { binaries: binaries.clone(), data: folder.data(), socket: socket.clone() };
    let options = StartOptions {
        postgres_bin: Some(binaries.dir().to_path_buf()),
        isolation: Isolation::SocketOnly { folder: socket },
        port: Some(5432),
        action,
        role: Role::Primary,
    };
    let reader = place.repository.reader(Vec::new());
    let progress = Progress::default();
    let report = restore::start(plan, &folder.data(), &options, &reader, &progress).await?;
    Ok((report, left))
}

/// A plan that ends between row 1 and row 2; the stream has ended.
async fn plan_between_two_rows(server: &Postgres, place: &Place, running: Running) -> Plan {
    server.psql("insert into t values (1)");
    server.psql("select pg_create_restore_point('one')");
    server.psql("insert into t values (2)");
    running.status.wait_durable(wal_end(server)).await.unwrap();
    running.stop().await.unwrap();
    plan(place, &request(Target::name("one").unwrap())).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_started_server_reaches_the_target_and_is_left_as_the_action_says() {
    let Protected { server, place, running, .. } = Protected::with(&[]).await;
    let planned = plan_between_two_rows(&server, &place, running).await;

    let folder = Folder::new();
    run(&place, &planned, &options(&folder.data())).await.unwrap();
    let (report, left) = start(&place, &planned, &folder, Action::Promote).await.unwrap();
    assert_eq!((report.outcome, report.new_timeline), (Outcome::Promoted, Some(2)));
    assert_eq!(groups_of_process(report.pid.unwrap()), groups_of_account());
    assert_eq!(left.psql("select id from t"), "1");
    assert_eq!(left.psql("select pg_is_in_recovery()"), "f");
    drop(left);

    let folder = Folder::new();
    let paused = Options { action: Action::Pause, ..options(&folder.data()) };
    run(&place, &planned, &paused).await.unwrap();
    let (report, left) = start(&place, &planned, &folder, Action::Pause).await.unwrap();
    assert_eq!(report.outcome, Outcome::Paused);
    assert_eq!(left.psql("select pg_is_in_recovery(), pg_is_wal_replay_paused()"), "t|t");
    drop(left);

    let folder = Folder::new();
    let stopped = Options { action: Action::Shutdown, ..options(&folder.data()) };
    run(&place, &planned, &stopped).await.unwrap();
    let (report, _left) = start(&place, &planned, &folder, Action::Shutdown).await.unwrap();
    assert_eq!((report.outcome, report.pid), (Outcome::Stopped, None));

    // Recovery that cannot go on is a failure with PostgreSQL's own words.
    let folder = Folder::new();
    run(&place, &planned, &options(&folder.data())).await.unwrap();
    for segment in std::fs::read_dir(folder.data().join("pg_wal")).unwrap() {
        let path = segment.unwrap().path();
        if path.is_file() {
            std::fs::remove_file(path).unwrap();
        }
    }
    let error = start(&place, &planned, &folder, Action::Promote).await.err().unwrap();
    assert!(error.message().contains("could not locate required checkpoint record"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_server_runs_where_it_was_restored_and_with_what_its_wal_needs() {
    let binaries = Binaries::of_this_run();
    let server = Postgres::start(&binaries, &settings().conf("max_prepared_transactions = 5"));
    server.psql("create table t (id int)");
    // As where the configuration is kept elsewhere and says where the data is.
    let conf = server.data().join("postgresql.conf");
    let text = std::fs::read_to_string(&conf).unwrap();
    let kept = text.lines().filter(|line| !line.starts_with("max_prepared_transactions"));
    let data = server.data().display();
    let said = format!("data_directory = '{data}'\nlog_error_verbosity = verbose\n");
    let kept: String = kept.map(|line| format!("{line}\n")).chain([said]).collect();
    std::fs::write(&conf, kept).unwrap();
    let place = Place::of(&server).await;
    let running = protect(&place, &server).await;
    server.psql("begin; insert into t values (1); prepare transaction 'one'");
    server.psql("select pg_create_restore_point('prepared')");
    server.psql("rollback prepared 'one'");
    running.status.wait_durable(wal_end(&server)).await.unwrap();
    running.stop().await.unwrap();

    let planned = plan(&place, &request(Target::name("prepared").unwrap())).await.unwrap();
    let folder = Folder::new();
    let report = run(&place, &planned, &options(&folder.data())).await.unwrap();
    assert!(report.notes.concat().contains(&format!("'{data}'")), "{:?}", report.notes);
    let (report, left) = start(&place, &planned, &folder, Action::Promote).await.unwrap();
    assert_eq!(report.outcome, Outcome::Promoted);
    assert_eq!(left.psql("show data_directory"), folder.data().display().to_string());
    assert_eq!(left.psql("select gid from pg_prepared_xacts"), "one");
    drop(left);
    // As it is started by hand later.
    let restored = Postgres::adopt(&binaries, &folder.data());
    restored.run();
    restored.psql("commit prepared 'one'");
    assert_eq!(restored.psql("select id from t"), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_of_a_restored_server_follows_it() {
    let set = "alter system set work_mem = '5MB'";
    let Protected { binaries, server, place, running } = Protected::with(&[set]).await;
    let planned = plan_between_two_rows(&server, &place, running).await;
    let folder = Folder::new();
    run(&place, &planned, &options(&folder.data())).await.unwrap();
    let settings = || std::fs::read_to_string(folder.data().join("postgresql.auto.conf")).unwrap();
    assert!(settings().contains("recovery_target_lsn"));
    let restored = Postgres::adopt(&binaries, &folder.data());
    restored.run();
    restored.wait_for("select pg_is_in_recovery()", "f");
    let left = settings();
    assert!(left.ends_with("work_mem = '5MB'\n") && !left.contains("tidemark"), "{left}");
    let replica = restored.standby();
    restored.psql("insert into t values (3)");
    replica.wait_for("select count(*) from t where id in (1, 3)", "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setting_that_was_raised_after_the_backup_is_named_and_not_waited_for() {
    let Protected { server, place, running, .. } = Protected::with(&[]).await;
    server.psql("alter system set max_connections = 150");
    server.stop(StopServer::Fast);
    server.run();
    server.psql("insert into t values (1)");
    running.status.wait_durable(wal_end(&server)).await.unwrap();
    running.stop().await.unwrap();
    let planned = plan(&place, &request(Target::Latest)).await.unwrap();
    let folder = Folder::new();
    let paused = Options { action: Action::Pause, ..options(&folder.data()) };
    run(&place, &planned, &paused).await.unwrap();
    let error = start(&place, &planned, &folder, Action::Pause).await.err().unwrap();
    assert!(error.message().contains("max_connections = 100 is a lower setting"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_never_writes_into_a_tablespace_that_the_original_server_made_after_the_backup() {
    let Protected { binaries, server, place, running } = Protected::with(&[]).await;
    server.psql("select pg_create_restore_point('before')");
    let space = Account::current().make_dir(server.home(), "later");
    server.psql(&format!("create tablespace later location '{}'", space.display()));
    server.psql("create table far tablespace later as select 1 as id");
    server.psql("insert into t values (1)");
    running.status.wait_durable(wal_end(&server)).await.unwrap();
    running.stop().await.unwrap();

    let planned = plan(&place, &request(Target::Latest)).await.unwrap();
    let folder = Folder::new();
    let error = run(&place, &planned, &options(&folder.data())).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.message().contains(&*space.display().to_string()), "{error}");
    assert_eq!(server.psql("select id from far"), "1");
    // A target before it wants nothing of it.
    let before = plan(&place, &request(Target::name("before").unwrap())).await.unwrap();
    run(&place, &before, &options(&folder.data())).await.unwrap();
    assert!(rows(&binaries, &folder.data()).is_empty());

    // With the directory moved away, and none in its place, the note says what replay wants.
    server.stop(StopServer::Fast);
    std::fs::rename(&space, server.home().join("moved")).unwrap();
    let folder = Folder::new();
    let report = run(&place, &planned, &options(&folder.data())).await.unwrap();
    assert!(report.notes.concat().contains(&*space.display().to_string()), "{:?}", report.notes);
    Account::current().make_dir(server.home(), "later");
    assert_eq!(rows(&binaries, &folder.data()), [1]);
}

/// A repository in a folder, which other processes can read.
struct Shared {
    place: Place,
    folder: tempfile::TempDir,
}

impl Shared {
    async fn of(server: &Postgres) -> Self {
        let mut place = Place::of(server).await;
        let folder = Account::current().temp_dir("shared");
        let clock = tidemark::clock::Clock::system();
        let url = folder.path().display().to_string();
        let store = tidemark::store::open(&url, &StoreOptions::default(), &clock).unwrap();
        let system_id = place.repository.system_id();
        let cluster = ClusterName::new("main").unwrap();
        place.repository = Repository::create(store, cluster, system_id, &clock).await.unwrap();
        place.writer = place.repository.writer(&Encryption::None).await.unwrap();
        Self { place, folder }
    }

    /// Lets the tests' account read what this process has written.
    fn open_up(&self) {
        if let Some((uid, gid)) = Account::current().ids() {
            let owner = format!("{uid}:{gid}");
            let mut chown = Command::new("chown");
            assert!(chown.args(["-R", &owner]).arg(self.folder.path()).status().unwrap().success());
        }
    }

    /// The words that run `wal-get` of the binary under test on the repository `url`.
    fn wal_get(url: &Path) -> Vec<String> {
        let binary = Account::current().tidemark_binary();
        let words = [binary.as_path(), Path::new("wal-get"), Path::new("--repository"), url];
        words.iter().map(|word| word.display().to_string()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn much_wal_comes_through_wal_get_and_nothing_else_than_its_end_ends_recovery() {
    let binaries = Binaries::of_this_run();
    let server = Postgres::start(&binaries, &settings());
    server.psql("create table t (id int)");
    server.psql("create table bulk (body text)");
    let shared = Shared::of(&server).await;
    let place = &shared.place;
    let running = protect(place, &server).await;
    for row in 1..=20 {
        server.psql(&format!(
            "insert into bulk select repeat(md5(i::text), 30) from generate_series(1, 2000) i;
             insert into t values ({row})"
        ));
    }
    server.psql("select pg_create_restore_point('twenty')");
    server.psql("insert into t values (21)");
    let space = Account::current().make_dir(server.home(), "later");
    server.psql(&format!("create tablespace later location '{}'", space.display()));
    running.status.wait_durable(wal_end(&server)).await.unwrap();
    running.stop().await.unwrap();
    shared.open_up();
    let planned = plan(place, &request(Target::name("twenty").unwrap())).await.unwrap();
    assert!(planned.wal_bytes() > 20 << 20, "{}", planned.wal_bytes());
    let on_demand = |folder: &Folder, url: &Path| Options {
        wal_get_command: Shared::wal_get(url),
        preplaced_bytes_max: 2 << 20,
        ..options(&folder.data())
    };

    // Started by hand: wal-get fetches by itself, and ahead.
    let folder = Folder::new();
    let report = run(place, &planned, &on_demand(&folder, shared.folder.path())).await.unwrap();
    assert_eq!(report.wal, WalDelivery::OnDemand);
    verify_backup(&binaries, &folder.data());
    assert_eq!(rows(&binaries, &folder.data()), (1..=20).collect::<Vec<_>>());
    assert!(!folder.data().join("pg_wal/tidemark").exists());

    // Started by us: wal-get needs no repository at all.
    let folder = Folder::new();
    run(place, &planned, &on_demand(&folder, Path::new("/nonexistent"))).await.unwrap();
    let (report, left) = start(place, &planned, &folder, Action::Promote).await.unwrap();
    assert_eq!(report.outcome, Outcome::Promoted);
    assert_eq!(left.psql("select max(id), count(*) from t"), "20|20");
    drop(left);

    links_of_the_account_lead_root_nowhere(place, &planned, &on_demand).await;

    // What is created behind the target is in the same segment and not replayed; to the end, it is.
    let latest = plan(place, &request(Target::Latest)).await.unwrap();
    let folder = Folder::new();
    run(place, &latest, &on_demand(&folder, Path::new("/nonexistent"))).await.unwrap();
    let error = start(place, &latest, &folder, Action::Promote).await.err().unwrap();
    assert!(error.to_string().contains(&*space.display().to_string()), "{error:?}");

    // A repository that cannot be reached is never the end of the WAL.
    let folder = Folder::new();
    run(place, &planned, &on_demand(&folder, Path::new("/nonexistent"))).await.unwrap();
    let restored = Postgres::adopt(&binaries, &folder.data());
    stops_without_an_end(&restored, "could not restore file").await;
    // The same directory goes on once the repository is back.
    let conf = folder.data().join("postgresql.auto.conf");
    let text = std::fs::read_to_string(&conf).unwrap();
    let url = shared.folder.path().display().to_string();
    std::fs::write(&conf, text.replace("/nonexistent", &url)).unwrap();
    drop(restored);
    assert_eq!(rows(&binaries, &folder.data()), (1..=20).collect::<Vec<_>>());
}

/// Root feeds and watches the server in a directory in which others say what a name means.
async fn links_of_the_account_lead_root_nowhere(
    place: &Place,
    planned: &Plan,
    on_demand: &dyn Fn(&Folder, &Path) -> Options,
) {
    if Account::current().ids().is_none() {
        return;
    }
    let precious = tempfile::tempdir().unwrap();
    let file = precious.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let targets = [("tidemark-recovery.log", &*file), ("pg_wal/tidemark/spool", precious.path())];
    for (name, target) in targets {
        let folder = Folder::new();
        run(place, planned, &on_demand(&folder, Path::new("/nonexistent"))).await.unwrap();
        let link = folder.data().join(name);
        if link.exists() {
            std::fs::remove_dir(&link).unwrap();
        }
        std::os::unix::fs::symlink(target, &link).unwrap();
        let error = start(place, planned, &folder, Action::Promote).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Denied, "{error:?}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(precious.path()).unwrap().count(), 1);
}

/// Starts a server that gives up before its recovery has ended, and says why.
async fn stops_without_an_end(restored: &Postgres, why: &str) {
    // It may answer read-only before it comes to the first segment that is not there.
    if restored.try_run() {
        while restored.pid().is_some() {
            assert_ne!(restored.try_psql("select pg_is_in_recovery()").as_deref(), Ok("f"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let log = restored.log();
    assert!(log.contains(why), "{}", restored.log_tail());
    assert!(!log.contains("archive recovery complete"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_follows_what_the_repository_gets() {
    let binaries = Binaries::of_this_run();
    let server = Postgres::start(&binaries, &settings());
    server.psql("create table t (id int)");
    let shared = Shared::of(&server).await;
    let place = &shared.place;
    let running = protect(place, &server).await;
    server.psql("insert into t values (1)");
    running.status.wait_durable(wal_end(&server)).await.unwrap();
    shared.open_up();
    let planned = plan(place, &request(Target::Latest)).await.unwrap();
    let folder = Folder::new();
    let options = Options {
        role: Role::Standby(Upstream::default()),
        wal_get_command: Shared::wal_get(shared.folder.path()),
        ..options(&folder.data())
    };
    run(place, &planned, &options).await.unwrap();
    let standby = Postgres::adopt(&binaries, &folder.data());
    standby.run();
    let wait_for = |rows: &str| standby.wait_for("select count(*) from t", rows);
    wait_for("1");
    server.psql("insert into t values (2)");
    running.status.wait_durable(wal_end(&server)).await.unwrap();
    shared.open_up();
    wait_for("2");
    assert_eq!(standby.psql("select pg_is_in_recovery()"), "t");
    running.stop().await.unwrap();
}

/// A data directory whose recovery was set up by hand: it takes WAL of timeline 1 from `shared`, unplanned.
async fn set_up_by_hand(shared: &Shared) -> Folder {
    let planned = plan(&shared.place, &request(Target::Latest)).await.unwrap();
    let folder = Folder::new();
    let options = Options {
        role: Role::Standby(Upstream::default()),
        wal_get_command: Shared::wal_get(shared.folder.path()),
        preplaced_bytes_max: 0,
        ..options(&folder.data())
    };
    run(&shared.place, &planned, &options).await.unwrap();
    std::fs::rename(folder.data().join("standby.signal"), folder.data().join("recovery.signal"))
        .unwrap();
    let conf = folder.data().join("postgresql.auto.conf");
    let text = std::fs::read_to_string(&conf).unwrap();
    std::fs::write(&conf, text + "\nrecovery_target_timeline = '1'\n").unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_set_up_by_hand_ends_where_its_own_timeline_does_and_nowhere_else() {
    let binaries = Binaries::of_this_run();
    let server = Postgres::start(&binaries, &settings());
    server.psql("create table t (id int)");
    let shared = Shared::of(&server).await;
    let place = &shared.place;
    let running = protect(place, &server).await;
    server.psql("insert into t values (1)");
    let standby = server.standby();
    standby.wait_for("select count(*) from t", "1");
    standby.promote();
    standby.psql("insert into t values (20)");
    for row in [2, 3] {
        server.psql(&format!("insert into t values ({row})"));
        server.psql("select pg_switch_wal()");
    }
    // What a commit ends is stored at once.
    server.psql("insert into t values (4)");
    running.status.wait_durable(wal_end(&server)).await.unwrap();
    running.stop().await.unwrap();
    let running = Running::start(place.stream(&standby)).await;
    running.streaming().await;
    standby.psql("insert into t values (21)");
    running.status.wait_durable(wal_end(&standby)).await.unwrap();
    running.stop().await.unwrap();
    assert!(place.catalog().await.wal.timelines().any(|timeline| timeline.get() == 2));
    shared.open_up();
    let folder = set_up_by_hand(&shared).await;
    assert_eq!(rows(&binaries, &folder.data()), [1, 2, 3, 4]);

    // With a hole before the end it is not ended there.
    let wal = shared.folder.path().join("main/wal/00000001");
    let listed = std::fs::read_dir(&wal).unwrap();
    let mut extents: Vec<PathBuf> = listed.map(|entry| entry.unwrap().path()).collect();
    extents.sort();
    let folder = set_up_by_hand(&shared).await;
    std::fs::remove_file(&extents[extents.len() - 2]).unwrap();
    let restored = Postgres::adopt(&binaries, &folder.data());
    stops_without_an_end(&restored, "and more behind it").await;
}
