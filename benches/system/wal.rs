//! WAL: how fast it is carried away, and how long a commit waits.

use std::time::{Duration, Instant};

use crate::Options;
use crate::commits::{self, Durable, Seen};
use crate::live;
use crate::peer::{Keep, Peer, Round, Stream};
use crate::processes::Stretch;
use crate::report::Report;
use crate::stage::Stage;

/// Bytes of a WAL segment.
const SEGMENT_BYTES: u64 = 16 << 20;
/// The shortest pause between forced segments that operators dare: a segment a minute.
const ARCHIVE_TIMEOUT_S: u32 = 60;

/// A peer that carries WAL away, by whatever way it has.
struct Carrying<'a> {
    round: Round<'a>,
    stream: Option<Stream>,
    durable: Durable,
}

impl<'a> Carrying<'a> {
    /// By the replication protocol if the tool can, else as the `archive_command`; `None` if it does
    /// neither, or failed.
    fn start(stage: &'a Stage, peer: &'a Peer, keep: Keep, report: &mut Report) -> Option<Self> {
        match Self::try_start(stage, peer, keep) {
            Ok(carrying) => carrying,
            Err(words) => {
                report.failed("wal", peer.name(), &words);
                stage.drop_slots();
                None
            }
        }
    }

    fn try_start(stage: &'a Stage, peer: &'a Peer, keep: Keep) -> Result<Option<Self>, String> {
        let round = peer.enter(stage, keep)?;
        if let Some(stream) = round.stream()? {
            return Ok(Some(Self { round, stream: Some(stream), durable: Durable::Flushed }));
        }
        let command = round.archive_command();
        if command.is_empty() {
            return Ok(None);
        }
        stage.archive_with(&command, ARCHIVE_TIMEOUT_S);
        Ok(Some(Self { round, stream: None, durable: Durable::Archived }))
    }

    fn stop(mut self, stage: &Stage) {
        if let Some(stream) = self.stream.take() {
            stream.stop();
        }
        stage.archive_with("", 0);
        drop(self.round);
        stage.drop_slots();
    }
}

/// As fast as this PostgreSQL writes it: rows of JSON copied from table to table, on two connections.
pub async fn throughput(stage: &Stage, peers: &[Peer], options: &Options, report: &mut Report) {
    for number in 0..options.rounds {
        stage.postgres.psql("checkpoint");
        let (bytes, load_s) = write(stage, options).await;
        report.figure("wal", "nobody", "load MB/s", mb_per_s(bytes, load_s));
        for turn in 0..peers.len() {
            let peer = &peers[(turn + number) % peers.len()];
            if report.has_failed("wal", peer.name()) {
                continue;
            }
            stage.postgres.psql("checkpoint");
            let Some(carrying) = Carrying::start(stage, peer, Keep::S3, report) else { continue };
            if let Err(words) = carry(stage, &carrying, peer, options, report).await {
                report.failed("wal", peer.name(), &words);
            }
            carrying.stop(stage);
        }
    }
}

async fn carry(
    stage: &Stage,
    carrying: &Carrying<'_>,
    peer: &Peer,
    options: &Options,
    report: &mut Report,
) -> Result<(), String> {
    let client = stage.postgres.client().await;
    settle(&client, carrying.durable).await?;
    let before = carrying.round.s3.counters();
    let stretch = Stretch::begin(Some(carrying.round.s3.pid()));
    let (bytes, load_s) = write(stage, options).await;
    let until = commits::wal_lsn(&client).await;
    let behind = until.saturating_sub(commits::durable_lsn(&client, carrying.durable).await);
    wait(&client, carrying.durable, until).await?;
    let done_s = stretch.elapsed_s();
    let cost = stretch.end();
    let after = carrying.round.s3.counters();
    report.cost("wal", peer.name(), &cost);
    let segments = bytes as f64 / SEGMENT_BYTES as f64;
    let stored = after.stored_bytes - before.stored_bytes;
    for (name, value) in [
        ("MB/s", mb_per_s(bytes, done_s)),
        ("load MB/s", mb_per_s(bytes, load_s)),
        ("behind MiB", behind as f64 / f64::from(1 << 20)),
        ("tool ms/segment", cost.cpu.tool_s * 1000.0 / segments),
        ("requests/GiB", (after.requests - before.requests) as f64 * 64.0 / segments),
        ("stored MiB", stored as f64 / f64::from(1 << 20)),
    ] {
        report.figure("wal", peer.name(), name, value);
    }
    Ok(())
}

/// Writes about as much WAL as is asked for: bytes and seconds.
async fn write(stage: &Stage, options: &Options) -> (u64, f64) {
    let clients = [stage.postgres.client().await, stage.postgres.client().await];
    let fresh = "drop table if exists sink; create table sink (id int, body jsonb)";
    clients[0].batch_execute(fresh).await.unwrap();
    let (before, began) = (commits::wal_lsn(&clients[0]).await, Instant::now());
    let wanted = before + (u64::from(options.wal_mib) << 20);
    let write = async |client: &tokio_postgres::Client| {
        while commits::wal_lsn(client).await < wanted {
            let insert = "insert into sink select id, body from events limit 50000";
            client.batch_execute(insert).await.unwrap();
        }
    };
    futures::future::join(write(&clients[0]), write(&clients[1])).await;
    let load_s = began.elapsed().as_secs_f64();
    // The rest of the last segment is for the archivers.
    clients[0].batch_execute("select pg_switch_wal()").await.unwrap();
    (commits::wal_lsn(&clients[0]).await - before, load_s)
}

/// Waits until the peer has all that was written before its turn.
async fn settle(client: &tokio_postgres::Client, how: Durable) -> Result<(), String> {
    let write = "create table if not exists settle (); drop table settle; select pg_switch_wal()";
    client.batch_execute(write).await.unwrap();
    let until = commits::wal_lsn(client).await;
    wait(client, how, until).await
}

/// Waits until the WAL up to `until` is durable; a switched segment's unused end is not waited for.
async fn wait(client: &tokio_postgres::Client, how: Durable, until: u64) -> Result<(), String> {
    let until = until - until % SEGMENT_BYTES;
    let deadline = Instant::now() + Duration::from_secs(600);
    while commits::durable_lsn(client, how).await < until {
        if Instant::now() > deadline {
            return Err("WAL stays not durable for ten minutes".to_owned());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Five commits a second.
pub async fn trickle(stage: &Stage, peers: &[Peer], options: &Options, report: &mut Report) {
    for number in 0..options.rounds {
        for turn in 0..peers.len() {
            let peer = &peers[(turn + number) % peers.len()];
            let name = peer.name().to_owned();
            if !report.has_failed("trickle", &name) {
                let load = (Keep::S3, 5, options.seconds);
                observe(stage, peer, ("trickle", &name), load, report).await;
            }
        }
    }
}

/// Ours alone: how long a commit waits, by load, and what of that are uploads, and fsyncs of a directory.
pub async fn latency(stage: &Stage, peers: &[Peer], options: &Options, report: &mut Report) {
    let Some(peer) = peers.iter().find(|peer| peer.name() == "tidemark") else { return };
    for _ in 0..options.rounds {
        let loads = [5, 50, 500, 2000].map(|per_second| (Keep::S3, per_second));
        for (keep, per_second) in loads.into_iter().chain([(Keep::Directory, 500)]) {
            let place = if keep == Keep::Directory { ", directory" } else { "" };
            let name = format!("{per_second} commits/s{place}");
            let load = (keep, per_second, options.seconds / 3);
            observe(stage, peer, ("latency", &name), load, report).await;
        }
    }
}

/// Watches a peer with its repository there, at a load of so many commits a second for so many seconds;
/// `row` is phase and name.
async fn observe(
    stage: &Stage,
    peer: &Peer,
    row: (&str, &str),
    (keep, per_second, seconds): (Keep, u32, u64),
    report: &mut Report,
) {
    make_table(stage);
    let Some(carrying) = Carrying::start(stage, peer, keep, report) else { return };
    // For a stream too: one that flushes whole segments would be measured by the length of the run.
    stage.segment_at_least_every(ARCHIVE_TIMEOUT_S);
    let client = stage.postgres.client().await;
    let seen = match settle(&client, carrying.durable).await {
        Ok(()) => {
            let stretch = Stretch::begin(Some(carrying.round.s3.pid()));
            let seen = commits::observe(stage, carrying.durable, per_second, seconds).await;
            report.cost(row.0, row.1, &stretch.end());
            seen
        }
        Err(words) => Err(words),
    };
    match seen {
        Ok(seen) => {
            let live = live::latencies(carrying.round.metrics_port);
            for (name, value) in figures(&seen).into_iter().chain(live) {
                report.figure(row.0, row.1, &name, value);
            }
        }
        Err(words) => report.failed(row.0, row.1, &words),
    }
    drop(client);
    carrying.stop(stage);
}

fn make_table(stage: &Stage) {
    stage.postgres.psql(
        "drop table if exists trickle; create table trickle (id bigserial primary key, body text)",
    );
}

fn figures(seen: &Seen) -> Vec<(String, f64)> {
    let mut figures = vec![("commits/s".to_owned(), seen.commits_per_s)];
    for (what, histogram) in
        [("at risk", &seen.at_risk_ms), ("until durable", &seen.until_durable_ms)]
    {
        for (name, quantile) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
            let value = histogram.value_at_quantile(quantile) as f64 / 1000.0;
            figures.push((format!("{what} {name} s"), value));
        }
    }
    figures
}

fn mb_per_s(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e6 / seconds
}
