//! The WAL stream against real servers: what is stored is the server's WAL, byte for byte, whatever
//! happens to server, repository and us.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use tidemark::capture::base::wal::for_one_backup;
use tidemark::capture::stream::{self, Phase, Snapshot, Status, Stream, StreamOptions};
use tidemark::clock::Clock;
use tidemark::error::{Kind, Result};
use tidemark::pg::{Lsn, LsnRange, SegmentSize, SystemId, TimelineId};
use tidemark::repo::{
    Catalog, ClusterName, Encryption, ExtentName, Lease, LeaseOptions, Object, Repository, Writer,
};
use tidemark::store::Store;
use tidemark::store::memory::{Faults, Memory};
use tidemark::wire::{ConnectOptions, Connection, Session};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::harness::postgres::Stop;
use crate::harness::{Binaries, Postgres, Settings};

/// A server's WAL may be compared as long as it is kept; small segments make many edges.
pub fn settings() -> Settings {
    Settings::default()
        .segment_mib(1)
        .conf("wal_keep_size = 4GB")
        .conf("max_wal_size = 64MB")
        .conf("wal_sender_timeout = 20s")
}

/// How to connect to `server` as the stream does.
pub fn connect_options(server: &Postgres) -> ConnectOptions {
    let conninfo = format!("{} dbname=postgres application_name=tidemark", server.conninfo());
    ConnectOptions::parse(&conninfo, &|_| None).unwrap()
}

/// A repository in memory whose faults the test sets, for one PostgreSQL cluster.
pub struct Place {
    pub memory: Memory,
    pub repository: Repository,
    pub writer: Writer,
}

impl Place {
    pub async fn of(server: &Postgres) -> Self {
        let clock = Clock::system();
        let system_id = identify(server, &clock).await;
        Self::for_system(system_id, &clock).await
    }

    pub async fn for_system(system_id: SystemId, clock: &Clock) -> Self {
        let memory = Memory::new(clock);
        let cluster = ClusterName::new("main").unwrap();
        let store = Arc::new(memory.clone());
        let repository = Repository::create(store, cluster, system_id, clock).await.unwrap();
        let writer = repository.writer(&Encryption::None).await.unwrap();
        Self { memory, repository, writer }
    }

    pub fn set_down(&self, down: bool) {
        self.memory.set_faults(Faults { down, ..Faults::default() });
    }

    pub fn stream(&self, server: &Postgres) -> Stream {
        Stream {
            options: StreamOptions::default(),
            upstream: Arc::new(connect_options(server)),
            writer: self.writer.clone(),
            status: Arc::new(Status::new()),
        }
    }

    /// Names of all extents.
    pub async fn extents(&self) -> Vec<ExtentName> {
        let cluster = self.repository.cluster();
        let objects = self.memory.list_all(&cluster.wal_prefix()).await.unwrap();
        let extent = |name| match Object::parse(cluster, name) {
            Some(Object::Extent(extent)) => Some(extent),
            _ => None,
        };
        objects.iter().filter_map(|object| extent(&object.name)).collect()
    }

    pub async fn catalog(&self) -> Catalog {
        Catalog::load(&self.repository).await.unwrap()
    }

    /// Compares every stored byte with the WAL files of `servers` and returns what is covered.
    pub async fn check_wal(&self, servers: &[&Postgres]) -> BTreeMap<TimelineId, Vec<LsnRange>> {
        let reader = self.repository.reader(Vec::new());
        let running = servers.iter().find(|server| server.pid().is_some()).unwrap();
        let segment_size = segment_size(running);
        let mut files = BTreeMap::new();
        let mut covered: BTreeMap<TimelineId, Vec<LsnRange>> = BTreeMap::new();
        for extent in self.extents().await {
            let stored = reader.extent(&extent).await.unwrap();
            let number = segment_size.number_of(extent.range.start());
            let name = segment_size.file_name(extent.timeline, number);
            let file = files.entry(name.clone()).or_insert_with(|| {
                let found = servers.iter().find_map(|server| read_segment(server, &name));
                found.unwrap_or_else(|| panic!("no server has segment {name}"))
            });
            let from = (extent.range.start().0 % segment_size.bytes()) as usize;
            let truth = &file[from..from + stored.len()];
            assert!(truth == &stored[..], "{extent} differs from the server's file");
            covered.entry(extent.timeline).or_default().push(extent.range);
        }
        let join = stream::resume::join;
        covered.into_iter().map(|(timeline, ranges)| (timeline, join(ranges))).collect()
    }
}

fn read_segment(server: &Postgres, name: &str) -> Option<Vec<u8>> {
    let wal: PathBuf = server.data().join("pg_wal");
    std::fs::read(wal.join(name))
        .or_else(|_| std::fs::read(wal.join(format!("{name}.partial"))))
        .ok()
}

fn segment_size(server: &Postgres) -> SegmentSize {
    let bytes = server.psql("select setting from pg_settings where name = 'wal_segment_size'");
    SegmentSize::new(bytes.parse().unwrap()).unwrap()
}

async fn identify(server: &Postgres, clock: &Clock) -> SystemId {
    let options = connect_options(server);
    let mut connection = Connection::connect(&options, Session::Physical, clock).await.unwrap();
    connection.identify_system().await.unwrap().system_id
}

/// The lease of the cluster.
pub async fn lease(stream: &Stream, ttl: Duration) -> Arc<Lease> {
    let mut options = LeaseOptions::new("test");
    options.ttl = ttl;
    options.wait = tidemark::repo::lease::Wait::AtMost(Duration::from_secs(30));
    Arc::new(Lease::acquire(stream.writer.repository(), options).await.unwrap())
}

/// A stream that runs in the background, with its lease.
pub struct Running {
    pub status: Arc<Status>,
    cancel: CancellationToken,
    task: JoinHandle<Result<()>>,
}

impl Running {
    pub async fn start(stream: Stream) -> Self {
        let lease = lease(&stream, Duration::from_secs(5)).await;
        Self::start_under(stream, lease)
    }

    /// With a lease that the caller took, and keeps when this stream is killed.
    pub fn start_under(stream: Stream, lease: Arc<Lease>) -> Self {
        let _ = tracing_subscriber::fmt().with_test_writer().try_init();
        let (cancel, status) = (CancellationToken::new(), Arc::clone(&stream.status));
        let token = cancel.clone();
        let task = tokio::spawn(async move {
            let outcome = stream::run(&stream, &lease, &token).await;
            if let Some(lease) = Arc::into_inner(lease) {
                lease.release().await;
            }
            outcome
        });
        Self { status, cancel, task }
    }

    /// SIGTERM.
    pub async fn stop(self) -> Result<()> {
        self.cancel.cancel();
        self.task.await.unwrap()
    }

    /// The end it came to by itself.
    pub async fn end(self) -> Result<()> {
        tokio::time::timeout(Duration::from_secs(60), self.task).await.unwrap().unwrap()
    }

    /// kill -9, as far as that is possible inside a process: every task stops where it is.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// Waits until the status is as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&Snapshot) -> bool) -> Snapshot {
        let mut changes = self.status.subscribe();
        let seen = tokio::time::timeout(Duration::from_secs(60), changes.wait_for(wanted)).await;
        match seen {
            Ok(snapshot) => snapshot.unwrap().clone(),
            Err(_) => panic!("not seen in a minute: {what}: {:#?}", self.status.snapshot()),
        }
    }

    /// Waits until the WAL up to `end` is durable.
    pub async fn durable(&self, end: Lsn) -> Snapshot {
        self.until(&format!("durable {end}"), |now| now.durable_end_lsn >= end).await
    }

    pub async fn streaming(&self) -> Snapshot {
        self.until("streaming", |now| now.phase == Phase::Streaming).await
    }
}

/// With a lease that lives longer than the repository is away.
async fn start_long(stream: Stream) -> Running {
    let lease = lease(&stream, Duration::from_secs(300)).await;
    Running::start_under(stream, lease)
}

/// Of which nothing is stored only because nothing happened for a while.
pub fn never_idle(mut stream: Stream) -> Stream {
    stream.options.idle_flush_interval = Duration::from_secs(3600);
    stream
}

/// End of the WAL written by the server.
pub fn wal_end(server: &Postgres) -> Lsn {
    server.psql("select pg_current_wal_insert_lsn()").parse().unwrap()
}

fn flush_position(server: &Postgres) -> Option<Lsn> {
    let text = server.psql(
        "select coalesce(flush_lsn::text, '') from pg_stat_replication \
         where application_name = 'tidemark'",
    );
    text.parse().ok()
}

fn load(server: &Postgres, rows: u32) {
    server.psql(&format!(
        "create table if not exists load (id bigserial, body text);
         insert into load (body) select repeat(md5(i::text), 20) from generate_series(1, {rows}) i"
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_is_the_servers_wal_and_a_stop_leaves_nothing_behind() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    running.streaming().await;
    for _ in 0..5 {
        load(&server, 2000);
    }
    let end = wal_end(&server);
    let now = running.durable(end).await;
    assert!(now.newest_durable_commit.is_some() && now.extent_count > 3);
    load(&server, 10);
    let end = wal_end(&server);
    let status = Arc::clone(&running.status);
    running.until("received", |now| now.received_end_lsn >= end).await;
    running.stop().await.unwrap();
    let last = status.snapshot();
    assert_eq!(last.phase, Phase::Stopped);
    assert!(last.durable_end_lsn >= end && last.acknowledged_end_lsn >= end);
    let covered = place.check_wal(&[&server]).await;
    assert_eq!(covered[&TimelineId::FIRST].len(), 1, "{covered:?}");
    let restart: Lsn = server.psql("select restart_lsn from pg_replication_slots").parse().unwrap();
    assert!(restart <= last.durable_end_lsn && restart >= end);
    let latency = status.latency().summary();
    assert!(latency.count >= 5, "{latency:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_is_stored_within_the_flush_interval_and_silence_costs_nothing() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings().conf("autovacuum = off"));
    load(&server, 10);
    server.psql("checkpoint");
    let place = Place::of(&server).await;
    let running = Running::start(never_idle(place.stream(&server))).await;
    running.streaming().await;
    server.psql("insert into load (body) values ('x')");
    running.durable(wal_end(&server)).await;
    // What the checkpointer and the background writer log is idle and may wait.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before = running.status.snapshot().extent_count;
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(running.status.snapshot().extent_count, before);
    running.stop().await.unwrap();
    place.check_wal(&[&server]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_crashes_restarts_and_shuts_down_is_followed_without_a_gap() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    let place = Place::of(&server).await;
    let running = Running::start(never_idle(place.stream(&server))).await;
    running.streaming().await;
    load(&server, 3000);
    server.crash();
    server.run();
    load(&server, 3000);
    running.durable(wal_end(&server)).await;
    // It waits until we have flushed, whatever that is.
    server.stop(Stop::Fast);
    server.run();
    load(&server, 100);
    let now = running.durable(wal_end(&server)).await;
    assert!(now.connection_count >= 3 && now.gaps.is_empty());
    running.stop().await.unwrap();
    let covered = place.check_wal(&[&server]).await;
    assert_eq!(covered[&TimelineId::FIRST].len(), 1, "{covered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_it_goes_on_without_gap_or_loss() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    let place = Place::of(&server).await;
    load(&server, 10);
    let stop = CancellationToken::new();
    let client = server.client().await;
    let writing = tokio::spawn({
        let stop = stop.clone();
        async move {
            while !stop.is_cancelled() {
                let sql =
                    "insert into load (body) select repeat('y', 3000) from generate_series(1, 9)";
                client.batch_execute(sql).await.unwrap();
            }
        }
    });
    let lease = lease(&place.stream(&server), Duration::from_secs(120)).await;
    let mut durable = Lsn::INVALID;
    for round in 0..25_u64 {
        place.memory.set_faults(Faults {
            seed: round,
            before_ppm: 30_000,
            after_ppm: 30_000,
            delay_max: Duration::from_millis(60),
            down: false,
        });
        let running = Running::start_under(place.stream(&server), Arc::clone(&lease));
        tokio::time::sleep(Duration::from_millis(100 + round * 37 % 500)).await;
        let now = running.status.snapshot();
        running.kill().await;
        place.set_down(false);
        // What was told to the server is never more than what is stored.
        if now.acknowledged_end_lsn.is_valid() {
            let start = first_position(&place).await;
            let end = place.catalog().await.wal.contiguous_end(TimelineId::FIRST, start);
            assert!(now.acknowledged_end_lsn <= end, "{} > {end}", now.acknowledged_end_lsn);
            durable = durable.max(now.durable_end_lsn);
        }
    }
    stop.cancel();
    writing.await.unwrap();
    place.set_down(false);
    let running = Running::start_under(place.stream(&server), lease);
    let now = running.durable(wal_end(&server)).await;
    assert!(now.durable_end_lsn >= durable && now.gaps.is_empty());
    running.stop().await.unwrap();
    let covered = place.check_wal(&[&server]).await;
    assert_eq!(covered[&TimelineId::FIRST].len(), 1, "{covered:?}");
}

async fn first_position(place: &Place) -> Lsn {
    place.extents().await.iter().map(|extent| extent.range.start()).min().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_is_away_stops_acknowledging_and_nothing_else() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    let place = Place::of(&server).await;
    // A lease that lives longer than the repository is away.
    let mut stream = place.stream(&server);
    stream.options.budget.extent_bytes_in_flight = 1 << 20;
    stream.options.budget.extent_bytes_cut = 256 << 10;
    let budget = stream.options.budget;
    let running = start_long(stream).await;
    load(&server, 100);
    running.durable(wal_end(&server)).await;
    place.set_down(true);
    for _ in 0..20 {
        load(&server, 3000);
    }
    let waiting = running.until("waiting", |now| now.phase == Phase::WaitingForRepository).await;
    assert!(waiting.repository_error.is_some());
    let bound = budget.extent_bytes_in_flight + budget.extent_bytes_cut as u64;
    assert!(waiting.unstored_bytes <= bound, "{}", waiting.unstored_bytes);
    let flushed = flush_position(&server).unwrap();
    assert!(flushed <= waiting.durable_end_lsn, "{flushed} {}", waiting.durable_end_lsn);
    place.set_down(false);
    let now = running.durable(wal_end(&server)).await;
    assert!(now.repository_error.is_none() && now.gaps.is_empty() && now.connection_count == 1);
    running.stop().await.unwrap();
    let covered = place.check_wal(&[&server]).await;
    assert_eq!(covered[&TimelineId::FIRST].len(), 1, "{covered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_synchronous_commit_returns_when_it_is_stored_and_not_before() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&server, 10);
    let place = Place::of(&server).await;
    server.psql("alter system set synchronous_standby_names = 'tidemark'");
    server.psql("select pg_reload_conf()");
    let mut stream = place.stream(&server);
    // Who waits for each commit does not wait for this.
    stream.options.flush_interval = Duration::from_secs(3600);
    let running = start_long(stream).await;
    running.until("synchronous", |now| now.synchronous).await;
    let client = server.client().await;
    client.batch_execute("insert into load (body) values ('first')").await.unwrap();
    for _ in 0..20 {
        let commit = client.batch_execute("insert into load (body) values ('next')");
        tokio::time::timeout(Duration::from_secs(60), commit).await.unwrap().unwrap();
    }
    for level in ["remote_write", "on", "remote_apply"] {
        place.set_down(true);
        let sql =
            format!("set synchronous_commit = {level}; insert into load (body) values ('waits')");
        let mut commit = std::pin::pin!(client.batch_execute(&sql));
        let early = tokio::time::timeout(Duration::from_millis(1500), &mut commit).await;
        assert!(early.is_err(), "{level}: committed while the repository was away");
        place.set_down(false);
        tokio::time::timeout(Duration::from_secs(20), commit).await.unwrap().unwrap();
    }
    let sql = "begin; insert into load (body) values ('gone'); prepare transaction 'p'";
    client.batch_execute(sql).await.unwrap();
    // Long before the idle interval is over.
    let rollback = client.batch_execute("rollback prepared 'p'");
    tokio::time::timeout(Duration::from_secs(20), rollback).await.unwrap().unwrap();
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_is_followed_on_the_same_connection_and_over_to_another_server() {
    let primary = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&primary, 500);
    let standby = primary.standby();
    let place = Place::of(&primary).await;
    let second = TimelineId::new(2).unwrap();

    // Streaming from the standby while it is promoted.
    let running = Running::start(place.stream(&standby)).await;
    running.streaming().await;
    load(&primary, 2000);
    let end = wal_end(&primary);
    running.until("received", |now| now.received_end_lsn >= end).await;
    primary.stop(Stop::Immediate);
    standby.promote();
    load(&standby, 2000);
    let now = running.durable(wal_end(&standby)).await;
    assert_eq!(now.timeline, Some(second));
    // Made while we still stream, so that it has all WAL that we have not.
    let third = standby.standby();
    load(&standby, 1000);
    running.durable(wal_end(&standby)).await;
    running.stop().await.unwrap();
    let covered = place.check_wal(&[&standby, &primary]).await;
    let (first, next) = (&covered[&TimelineId::FIRST], &covered[&second]);
    assert_eq!((first.len(), next.len()), (1, 1), "{covered:?}");
    assert_eq!(first[0].end(), next[0].start(), "the old timeline ends where the new one begins");
    let history = place.repository.history(second).await.unwrap();
    assert_eq!(history.entries()[0].switch_lsn, next[0].start());

    // Started again on a server that was promoted meanwhile.
    load(&standby, 1000);
    let end = wal_end(&standby);
    let deadline = Instant::now() + Duration::from_secs(30);
    while third.psql("select pg_last_wal_replay_lsn()").parse::<Lsn>().unwrap() < end {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(50));
    }
    standby.stop(Stop::Immediate);
    third.promote();
    load(&third, 1000);
    let running = Running::start(place.stream(&third)).await;
    let now = running.durable(wal_end(&third)).await;
    assert!(now.gaps.is_empty());
    running.stop().await.unwrap();
    let covered = place.check_wal(&[&third, &standby, &primary]).await;
    let last = &covered[&TimelineId::new(3).unwrap()];
    assert_eq!(covered[&second].last().unwrap().end(), last[0].start());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_promises_nothing_about_the_commits_of_its_primary_until_it_is_promoted() {
    let primary = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&primary, 100);
    let standby = primary.standby();
    let place = Place::of(&primary).await;
    // Asks a silent server for a sign of life every second.
    let options = connect_options(&standby).with_read_timeout(Duration::from_secs(2));
    let stream = Stream { upstream: Arc::new(options), ..place.stream(&standby) };
    let running = Running::start(stream).await;
    let received = wal_end(&primary);
    running.until("received", |now| now.received_end_lsn >= received).await;
    running.until("stored", |now| now.all_stored_at.is_some()).await;
    // From here on the standby hears of nothing that the primary commits.
    standby.psql("alter system set primary_conninfo = ''");
    standby.psql("select pg_reload_conf()");
    standby.wait_for("select count(*) from pg_stat_wal_receiver", "0");
    load(&primary, 10);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(running.status.snapshot().caught_up_at, None);
    primary.stop(Stop::Immediate);
    standby.promote();
    let promoted = standby.psql("select to_char(now(), 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    load(&standby, 10);
    let now = running.until("caught up", |now| now.caught_up_at.is_some()).await;
    assert_eq!(now.timeline, TimelineId::new(2));
    assert!(now.caught_up_at >= Some(promoted.parse().unwrap()), "{promoted}: {now:#?}");
    running.stop().await.unwrap();
}

/// The segment before the one that is streamed is gone by then, so the first way to begin again fails, and with
/// its connection the slot that was made on it goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_for_one_backup_goes_on_with_what_the_server_still_has() {
    let settings = Settings::default().segment_mib(1).conf("wal_keep_size = 0");
    let server = Postgres::start(&Binaries::of_this_run(), &settings);
    let place = Place::of(&server).await;
    let running = Running::start(for_one_backup(place.stream(&server))).await;
    running.streaming().await;
    load(&server, 3000);
    server.psql("select pg_switch_wal()");
    load(&server, 10);
    let end = wal_end(&server);
    running.durable(end).await;
    let current = server.psql(&format!("select pg_walfile_name('{end}')"));
    server.wait_for(
        &format!(
            "select bool_and(pg_walfile_name(restart_lsn) = '{current}') from pg_replication_slots"
        ),
        "t",
    );
    server.psql("checkpoint");
    server.wait_for(&format!("select count(*) from pg_ls_waldir() where name < '{current}'"), "0");
    let before = running.status.snapshot().connection_count;
    server.psql("select pg_terminate_backend(active_pid) from pg_replication_slots");
    load(&server, 10);
    let now = running.durable(wal_end(&server)).await;
    assert!(now.connection_count > before && now.gaps.is_empty(), "{now:#?}");
    running.stop().await.unwrap();
}

/// Commits every few milliseconds, then one transaction that writes for seconds: neither lets a sign of life
/// come without WAL.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_never_quiet_shows_since_when_all_is_stored() {
    let server = Arc::new(Postgres::start(&Binaries::of_this_run(), &settings()));
    server.psql("create table busy (n int)");
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    let insert = "insert into busy select generate_series(1, 10)";
    let commits = format!("loop {insert}; commit; perform pg_sleep(0.005); end loop");
    let no_commit = format!("loop {insert}; perform pg_sleep(0.005); end loop");
    for busy in [commits, no_commit] {
        let writing = Arc::clone(&server);
        let writer = std::thread::spawn(move || {
            let _ended_by_us = writing.try_psql(&format!("do $$ begin {busy}; end $$"));
        });
        server.wait_for("select count(*) from pg_stat_activity where query like 'do %'", "1");
        let now = server.psql("select to_char(now(), 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
        let later = now.parse::<Timestamp>().unwrap() + SignedDuration::from_secs(2);
        running.until("all stored", |now| now.all_stored_at >= Some(later)).await;
        server
            .psql("select pg_terminate_backend(pid) from pg_stat_activity where query like 'do %'");
        writer.join().unwrap();
    }
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cluster_is_refused() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    let place = Place::for_system(SystemId(1), &Clock::system()).await;
    let error = Running::start(place.stream(&server)).await.end().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.message().contains("system identifier"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_lost_with_its_wal_leaves_a_gap_that_is_seen() {
    let conf =
        Settings::default().segment_mib(1).conf("max_wal_size = 4MB").conf("min_wal_size = 2MB");
    let server = Postgres::start(&Binaries::of_this_run(), &conf);
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    load(&server, 100);
    running.durable(wal_end(&server)).await;
    running.stop().await.unwrap();
    server.psql("select pg_drop_replication_slot('tidemark')");
    for _ in 0..4 {
        load(&server, 5000);
        server.psql("checkpoint");
    }
    let running = Running::start(place.stream(&server)).await;
    load(&server, 100);
    let now = running.durable(wal_end(&server)).await;
    assert_eq!(now.gaps.len(), 1, "{now:#?}");
    assert!(now.base_backup_needed);
    running.stop().await.unwrap();
    let catalog = place.catalog().await;
    let coverage = catalog.wal.coverage(TimelineId::FIRST);
    assert_eq!(coverage.len(), 2, "{coverage:?}");
    assert_eq!(coverage[0].end(), now.gaps[0].start_lsn);
    assert_eq!(coverage[1].start(), now.gaps[0].end_lsn);
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_lag_ceiling_the_server_is_relieved_and_the_gap_is_seen() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    relieved_past_the_lag_ceiling(&server, TimelineId::FIRST).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_lag_ceiling_a_server_that_was_promoted_is_relieved_as_well() {
    let primary = Postgres::start(&Binaries::of_this_run(), &settings());
    let server = primary.standby();
    primary.stop(Stop::Immediate);
    server.promote();
    // The slot begins on the new timeline.
    load(&server, 1);
    server.psql("select pg_switch_wal()");
    server.psql("checkpoint");
    relieved_past_the_lag_ceiling(&server, TimelineId::new(2).unwrap()).await;
}

async fn relieved_past_the_lag_ceiling(server: &Postgres, timeline: TimelineId) {
    let place = Place::of(server).await;
    let mut stream = place.stream(server);
    stream.options.lag_ceiling_bytes = Some(8 << 20);
    stream.options.budget.extent_bytes_in_flight = 1 << 20;
    stream.options.budget.extent_bytes_cut = 256 << 10;
    let running = start_long(stream).await;
    load(server, 100);
    running.durable(wal_end(server)).await;
    place.set_down(true);
    for _ in 0..10 {
        server.psql("insert into load (body) select gen_random_uuid()::text || gen_random_uuid()::text from generate_series(1, 30000)");
    }
    let kept = wal_end(server);
    let now = running.until("gap", |now| !now.gaps.is_empty()).await;
    assert!(now.base_backup_needed);
    let relieved = Instant::now();
    loop {
        let restart: Lsn =
            server.psql("select restart_lsn from pg_replication_slots").parse().unwrap();
        // What is written after the server was relieved is kept for it again, up to the ceiling.
        if kept.saturating_since(restart) <= 8 << 20 {
            break;
        }
        assert!(relieved.elapsed() < Duration::from_secs(30), "{restart} of {kept}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    place.set_down(false);
    load(server, 100);
    let end = wal_end(server);
    running.durable(end).await;
    // On a slow machine the server is relieved again while it is still being written to.
    let now = running.until("stored", |now| now.unstored_bytes == 0).await;
    assert!(now.gaps.windows(2).all(|two| two[0].end_lsn == two[1].start_lsn), "{now:#?}");
    running.stop().await.unwrap();
    let covered = place.check_wal(&[server]).await;
    let parts = &covered[&timeline];
    assert_eq!(parts.len(), 2, "{parts:?}");
    let (first, last) = (&now.gaps[0], &now.gaps[now.gaps.len() - 1]);
    assert_eq!((parts[0].end(), parts[1].start()), (first.start_lsn, last.end_lsn));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lag_ceiling_holds_when_the_outage_outlasts_the_lease() {
    let conf =
        Settings::default().segment_mib(1).conf("max_wal_size = 4MB").conf("min_wal_size = 2MB");
    let server = Postgres::start(&Binaries::of_this_run(), &conf);
    let place = Place::of(&server).await;
    let mut stream = place.stream(&server);
    stream.options.lag_ceiling_bytes = Some(8 << 20);
    let running = Running::start(stream).await;
    load(&server, 100);
    running.durable(wal_end(&server)).await;
    place.set_down(true);
    load(&server, 10);
    let waits = |now: &Snapshot| now.phase == Phase::WaitingForRepository;
    running.until("lease lost", |now| waits(now) && now.uploads_in_flight == 0).await;
    for _ in 0..6 {
        server.psql("insert into load (body) select gen_random_uuid()::text || gen_random_uuid()::text from generate_series(1, 30000)");
    }
    let (kept, began) = (wal_end(&server), Instant::now());
    loop {
        let restart: Lsn =
            server.psql("select restart_lsn from pg_replication_slots").parse().unwrap();
        if kept.saturating_since(restart) <= 8 << 20 {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{restart} of {kept}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let now = running.status.snapshot();
    assert!(now.gaps.is_empty() && waits(&now), "{now:#?}");
    server.psql("checkpoint");
    place.set_down(false);
    load(&server, 100);
    let now = running.durable(wal_end(&server)).await;
    assert_eq!(now.gaps.len(), 1, "{now:#?}");
    assert!(now.base_backup_needed);
    running.stop().await.unwrap();
    let catalog = place.catalog().await;
    let coverage = catalog.wal.coverage(TimelineId::FIRST);
    assert_eq!(coverage.len(), 2, "{coverage:?}");
    let gap = (now.gaps[0].start_lsn, now.gaps[0].end_lsn);
    assert_eq!((coverage[0].end(), coverage[1].start()), gap);
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_that_trickle_in_share_extents_and_all_become_durable() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&server, 10);
    let place = Place::of(&server).await;
    // A store about as slow as a far one.
    let delay_max = Duration::from_millis(200);
    place.memory.set_faults(Faults { delay_max, ..Faults::default() });
    let running = start_long(place.stream(&server)).await;
    running.streaming().await;
    let client = server.client().await;
    for _ in 0..50 {
        client.batch_execute("insert into load (body) values ('x')").await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    running.durable(wal_end(&server)).await;
    let latency = running.status.latency().summary();
    println!("{latency:?}");
    assert!(latency.count >= 50, "{latency:?}");
    // One a second, where the machine keeps up.
    let extents = running.status.snapshot().extent_count;
    assert!((5..25).contains(&extents), "{extents}");
    running.stop().await.unwrap();
}
