//! The WAL stream in trouble that no orderly test makes: connections cut mid-message, servers that
//! forked or were rolled back, damaged WAL, a lease that somebody took.

use std::sync::Arc;
use std::time::Duration;

use tidemark::capture::stream::relief::SlotMove;
use tidemark::capture::stream::upstream::Upstream as _;
use tidemark::capture::stream::{Phase, Stream};
use tidemark::clock::Clock;
use tidemark::error::Kind;
use tidemark::pg::{Lsn, SystemId, TimelineId};
use tidemark::store::{ObjectName, Replace, Store};
use tidemark::wire::{ConnectOptions, Session};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::stream::{Place, Running, connect_options, lease, settings, wal_end};
use crate::harness::postgres::Stop;
use crate::harness::{Account, Binaries, Postgres};

fn load(server: &Postgres, rows: u32) {
    server.psql(&format!(
        "create table if not exists load (id bigserial, body text);
         insert into load (body) select repeat(md5(i::text), 20) from generate_series(1, {rows}) i"
    ));
}

/// Passes connections on to `target` and cuts each after so many bytes, wherever that is.
async fn cutting_proxy(target: u16, bytes: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut limit = bytes;
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(pass_on(client, target, limit));
            limit = limit * 3 / 2 + 4321;
        }
    });
    port
}

async fn pass_on(client: TcpStream, target: u16, mut left: usize) {
    let server = TcpStream::connect(("127.0.0.1", target)).await.unwrap();
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = tokio::spawn(async move {
        let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
    });
    let mut buffer = vec![0; 7001];
    while left > 0 {
        let Ok(read @ 1..) = from_server.read(&mut buffer).await else { break };
        let pass = read.min(left);
        if to_client.write_all(&buffer[..pass]).await.is_err() {
            break;
        }
        left -= pass;
    }
    up.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_cut_in_the_middle_of_a_message_loses_and_repeats_nothing() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&server, 100);
    let place = Place::of(&server).await;
    let port = cutting_proxy(server.port(), 60_000).await;
    let conninfo = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
    let postgres = ConnectOptions::parse(&conninfo, &|_| None).unwrap();
    let running =
        Running::start(Stream { upstream: Arc::new(postgres), ..place.stream(&server) }).await;
    running.streaming().await;
    for _ in 0..6 {
        load(&server, 2000);
    }
    let now = running.durable(wal_end(&server)).await;
    assert!(now.connection_count > 4 && now.gaps.is_empty(), "{now:#?}");
    running.stop().await.unwrap();
    let covered = place.check_wal(&[&server]).await;
    assert_eq!(covered[&TimelineId::FIRST].len(), 1, "{covered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_walsender_is_replaced() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    for _ in 0..5 {
        running.streaming().await;
        load(&server, 500);
        server.psql("select pg_terminate_backend(pid) from pg_stat_replication");
    }
    load(&server, 500);
    let now = running.durable(wal_end(&server)).await;
    assert!(now.gaps.is_empty());
    running.stop().await.unwrap();
    let covered = place.check_wal(&[&server]).await;
    assert_eq!(covered[&TimelineId::FIRST].len(), 1, "{covered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_past_the_point_where_a_standby_took_over_is_a_dead_branch() {
    let primary = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&primary, 500);
    let standby = primary.standby();
    let place = Place::of(&primary).await;
    let running = Running::start(place.stream(&primary)).await;
    load(&primary, 10);
    running.durable(wal_end(&primary)).await;
    // The standby hears of nothing from here on, the stream of everything.
    standby.stop(Stop::Fast);
    load(&primary, 3000);
    let past = running.durable(wal_end(&primary)).await.durable_end_lsn;
    running.stop().await.unwrap();
    primary.stop(Stop::Immediate);
    standby.run();
    standby.promote();
    let running = Running::start(place.stream(&standby)).await;
    load(&standby, 300);
    let now = running.durable(wal_end(&standby)).await;
    assert!(now.gaps.is_empty(), "{:?}", now.gaps);
    running.stop().await.unwrap();
    let second = TimelineId::new(2).unwrap();
    let covered = place.check_wal(&[&primary, &standby]).await;
    assert!(covered[&TimelineId::FIRST][0].end() >= past);
    let switch = place.repository.history(second).await.unwrap().entries()[0].switch_lsn;
    assert_eq!(covered[&second][0].start(), switch);
    assert!(switch < past);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_primary_that_comes_back_is_not_streamed_while_the_stream_lives() {
    let old = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&old, 100);
    let new = old.standby();
    let place = Place::of(&old).await;
    old.stop(Stop::Fast);
    new.promote();
    let both = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres dbname=postgres \
         application_name=tidemark",
        old.port(),
        new.port()
    );
    let postgres = ConnectOptions::parse(&both, &|_| None).unwrap();
    let running =
        Running::start(Stream { upstream: Arc::new(postgres), ..place.stream(&new) }).await;
    load(&new, 100);
    running.durable(wal_end(&new)).await;
    old.run();
    new.psql("select pg_terminate_backend(pid) from pg_stat_replication");
    let refused = |error: &String| error.contains("is this an old primary");
    let now = running.until("refused", |now| now.server_error.as_ref().is_some_and(refused)).await;
    assert_eq!(now.timeline, TimelineId::new(2), "{now:#?}");
    assert_eq!(old.psql("select count(*) from pg_replication_slots"), "0");
    old.stop(Stop::Fast);
    load(&new, 100);
    let now = running.durable(wal_end(&new)).await;
    assert!(now.gaps.is_empty(), "{now:#?}");
    running.stop().await.unwrap();
    place.check_wal(&[&new, &old]).await;

    // A life that knows only the old one streams it.
    new.stop(Stop::Fast);
    old.run();
    let running = Running::start(place.stream(&old)).await;
    assert_eq!(running.streaming().await.timeline, Some(TimelineId::FIRST));
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_can_be_shut_down_wherever_its_wal_ends() {
    let primary = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&primary, 100);
    let standby = primary.standby();
    let place = Place::of(&primary).await;
    let running = Running::start(place.stream(&standby)).await;
    load(&primary, 10);
    running.durable(wal_end(&primary)).await;

    // After a record that nobody waits for.
    primary.psql("checkpoint");
    let end = wal_end(&primary);
    let now = running.until("received", |now| now.received_end_lsn >= end).await;
    assert!(now.durable_end_lsn < end, "{now:#?}");
    standby.stop(Stop::Fast);
    running.until("stored", |now| now.durable_end_lsn >= end).await;
    standby.run();
    running
        .until("streaming", |now| now.phase == Phase::Streaming && now.connection_count > 1)
        .await;

    // In the middle of a record: the WAL writer flushes whole pages of what is not committed.
    let client = primary.client().await;
    client.batch_execute("create table cut (body text); begin").await.unwrap();
    let received = || standby.psql("select pg_last_wal_receive_lsn()").parse::<Lsn>().unwrap();
    let insert = "insert into cut select repeat(md5(i::text), 60) from generate_series(1, 1000) i";
    let settled = loop {
        client.batch_execute(insert).await.unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
        let end = received();
        if end.0 % 8192 == 0 {
            break end;
        }
    };
    primary.stop(Stop::Immediate);
    let end = received();
    assert!(end >= settled && end.0 % 8192 == 0, "{settled} {end}");
    running.until("received", |now| now.received_end_lsn >= end).await;
    standby.stop(Stop::Fast);
    let now = running.until("stored", |now| now.durable_end_lsn >= end).await;
    assert!(now.acknowledged_end_lsn < end, "{now:#?}");

    standby.run();
    standby.promote();
    load(&standby, 10);
    let now = running.durable(wal_end(&standby)).await;
    assert!(now.gaps.is_empty(), "{now:#?}");
    running.stop().await.unwrap();
    place.check_wal(&[&standby, &primary]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_rolled_back_on_its_timeline_is_refused_however_much_it_has_written_since() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&server, 100);
    server.stop(Stop::Fast);
    let copy = server.home().join("copy");
    let copied =
        Account::current().command("/bin/cp").arg("-a").arg(server.data()).arg(&copy).status();
    assert!(copied.unwrap().success());
    server.run();
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    load(&server, 3000);
    running.durable(wal_end(&server)).await;
    running.stop().await.unwrap();
    server.stop(Stop::Fast);
    std::fs::rename(server.data(), server.home().join("newer")).unwrap();
    std::fs::rename(&copy, server.data()).unwrap();
    server.run();
    let error = Running::start(place.stream(&server)).await.end().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.message().contains("the repository holds it up to"), "{error}");
    let stored = place.extents().await;
    load(&server, 4000);
    let error = Running::start(place.stream(&server)).await.end().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.message().contains("sends other WAL of timeline 1"), "{error}");
    assert_eq!(place.extents().await, stored);
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_wal_on_the_server_is_stored_as_it_is_and_does_not_stop_the_stream() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&server, 100);
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    running.durable(wal_end(&server)).await;
    running.stop().await.unwrap();
    let from = wal_end(&server);
    load(&server, 2000);
    server.psql("select pg_switch_wal()");
    // Out of every buffer, so that it is read from the file.
    server.stop(Stop::Fast);
    server.run();
    let at = Lsn(from.0 + 200_000);
    let name = server.psql(&format!("select pg_walfile_name('{at}')"));
    let file = server.data().join("pg_wal").join(name);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[(at.0 % (1 << 20)) as usize] ^= 0x40;
    std::fs::write(&file, bytes).unwrap();
    let running = Running::start(place.stream(&server)).await;
    load(&server, 100);
    let now = running.durable(wal_end(&server)).await;
    assert!(now.connection_count >= 3, "it was asked for again: {now:#?}");
    // No recovery leads past it: only a new base backup does.
    assert!(now.base_backup_needed && now.gaps[0].start_lsn <= at, "{now:#?}");
    running.stop().await.unwrap();
    let covered = place.check_wal(&[&server]).await;
    assert_eq!(covered[&TimelineId::FIRST].len(), 1, "{covered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_writer_stops_and_acknowledges_nothing_more() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&server, 100);
    let place = Place::of(&server).await;
    let stream = place.stream(&server);
    let ours = lease(&stream, Duration::from_secs(6)).await;
    let running = Running::start_under(stream, ours);
    running.durable(wal_end(&server)).await;
    // Somebody else's lease is where ours was.
    let name = ObjectName::new("main/lease").unwrap();
    let (body, tag) = place.memory.read_versioned(&name).await.unwrap().unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&body).unwrap();
    json["token"] = "00000000000000000000000000000000".into();
    json["epoch"] = 99.into();
    let taken = place.memory.replace_if(&name, json.to_string().into(), Some(tag)).await.unwrap();
    assert!(matches!(taken, Replace::Done(_)));
    let status = Arc::clone(&running.status);
    let stop = CancellationToken::new();
    let writing = tokio::spawn({
        let (stop, client) = (stop.clone(), server.client().await);
        async move {
            while !stop.is_cancelled() {
                client.batch_execute("insert into load (body) values ('x')").await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    let error = running.end().await.unwrap_err();
    stop.cancel();
    writing.await.unwrap();
    assert_eq!(error.kind(), Kind::Conflict);
    assert_eq!(status.snapshot().phase, Phase::Stopped);
    let restart = || server.psql("select restart_lsn from pg_replication_slots");
    let before = restart();
    load(&server, 10);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(restart(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_can_shut_down_while_the_repository_is_away() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    load(&server, 100);
    let place = Place::of(&server).await;
    let stream = place.stream(&server);
    let lease = lease(&stream, Duration::from_secs(300)).await;
    let running = Running::start_under(stream, lease);
    running.durable(wal_end(&server)).await;
    place.set_down(true);
    load(&server, 100);
    running.until("trouble", |now| now.repository_error.is_some()).await;
    let stopping = tokio::task::spawn_blocking(move || {
        server.stop(Stop::Fast);
        server
    });
    let server = stopping.await.unwrap();
    place.set_down(false);
    server.run();
    load(&server, 100);
    let now = running.durable(wal_end(&server)).await;
    assert!(now.gaps.is_empty());
    running.stop().await.unwrap();
    let covered = place.check_wal(&[&server]).await;
    assert_eq!(covered[&TimelineId::FIRST].len(), 1, "{covered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_is_moved_on_only_where_it_was_seen_and_while_nobody_uses_it() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    load(&server, 100);
    running.durable(wal_end(&server)).await;
    load(&server, 100);
    let slot =
        || -> Lsn { server.psql("select restart_lsn from pg_replication_slots").parse().unwrap() };
    let ours = place.repository.system_id();
    let options = connect_options(&server);
    let mut asking = options.connect(Session::Database, &Clock::system()).await.unwrap();

    // Somebody streams by it.
    let flushed = || server.psql("select pg_current_wal_flush_lsn()").parse().unwrap();
    let way = SlotMove { from: slot(), to: flushed() };
    assert!(!asking.move_slot("tidemark", way, ours).await.unwrap());
    let observed = asking.observe("tidemark").await.unwrap();
    assert!(observed.slot_in_use == Some(true) && observed.slot_restart_lsn.is_some());
    running.stop().await.unwrap();

    load(&server, 100);
    let (from, to) = (slot(), flushed());
    let observed = asking.observe("tidemark").await.unwrap();
    assert_eq!((observed.slot_in_use, observed.slot_restart_lsn), (Some(false), Some(from)));
    let elsewhere = SlotMove { from: Lsn(from.0 - 8), to };
    let way = SlotMove { from, to };
    assert!(!asking.move_slot("tidemark", elsewhere, ours).await.unwrap());
    assert!(!asking.move_slot("tidemark", way, SystemId(ours.0 ^ 1)).await.unwrap());
    assert!(!asking.move_slot("another", way, ours).await.unwrap());
    assert_eq!(slot(), from);
    assert!(asking.move_slot("tidemark", way, ours).await.unwrap());
    assert_eq!(slot(), to);
}
