//! Full backup to S3, and restore from it until PostgreSQL answers.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::Options;
use crate::harness::postgres::{free_port, send_signal};
use crate::peer::{Keep, Peer, Round};
use crate::processes::{self, Stretch};
use crate::report::Report;
use crate::stage::Stage;

/// Plays all rounds. A peer that fails is out for the rest of them.
pub fn play(stage: &Stage, peers: &[Peer], options: &Options, report: &mut Report) {
    for number in 0..options.rounds {
        // Nobody always comes first, or always after the same one.
        for turn in 0..peers.len() {
            let peer = &peers[(turn + number) % peers.len()];
            if report.has_failed("base", peer.name()) {
                continue;
            }
            if let Err(words) = round(stage, peer, report) {
                report.failed("base", peer.name(), &words);
            }
            stage.archive_with("", 0);
            stage.drop_slots();
        }
    }
}

fn round(stage: &Stage, peer: &Peer, report: &mut Report) -> Result<(), String> {
    let round = peer.enter(stage, Keep::S3)?;
    stage.archive_with(&round.archive_command(), 0);
    stage.postgres.psql("checkpoint");
    backup(peer, &round, report)?;
    let target = stage.new_target();
    let restored = restore(stage, peer, &round, &target, report);
    stage.delete(target.parent().unwrap());
    restored
}

fn backup(peer: &Peer, round: &Round, report: &mut Report) -> Result<(), String> {
    let before = round.s3.counters();
    let stretch = Stretch::begin(Some(round.s3.pid()));
    let done = round.run(&["backup"])?;
    let cost = stretch.end();
    if done.is_some() {
        let after = round.s3.counters();
        report.cost("backup", peer.name(), &cost);
        report.figure("backup", peer.name(), "requests", (after.requests - before.requests) as f64);
        report.figure("backup", peer.name(), "stored MiB", mib(after.stored_bytes));
    }
    Ok(())
}

fn restore(
    stage: &Stage,
    peer: &Peer,
    round: &Round,
    target: &Path,
    report: &mut Report,
) -> Result<(), String> {
    let before = round.s3.counters();
    let stretch = Stretch::begin(Some(round.s3.pid()));
    if round.run(&["restore", target.to_str().unwrap()])?.is_none() {
        return Ok(());
    }
    let fetched_s = stretch.elapsed_s();
    let mut server = start(stage, target)?;
    let recovery_s = processes::cpu_below(server.id());
    let cost = stretch.end();
    report.cost("restore", peer.name(), &cost);
    report.figure("restore", peer.name(), "fetched s", fetched_s);
    report.figure("restore", peer.name(), "recovery CPU s", recovery_s);
    let requests = round.s3.counters().requests - before.requests;
    report.figure("restore", peer.name(), "requests", requests as f64);
    send_signal(server.id(), "QUIT");
    server.wait().unwrap();
    Ok(())
}

/// Starts PostgreSQL on a restored data directory and waits until it takes a query and writes.
fn start(stage: &Stage, data: &Path) -> Result<Child, String> {
    let port = free_port();
    let log = std::fs::File::create(stage.home().join("restored.log")).unwrap();
    let mode = std::fs::metadata(data).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "{}: mode {mode:o}", data.display());
    let mut server = stage
        .postgres
        .binaries()
        .command("postgres")
        .arg("-D")
        .arg(data)
        .args(["-c", "archive_mode=off", "-c", "listen_addresses=127.0.0.1", "-p"])
        .arg(port.to_string())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(600);
    while !answers(port) {
        if server.try_wait().unwrap().is_some() || Instant::now() > deadline {
            send_signal(server.id(), "QUIT");
            let _ = server.wait();
            let log = std::fs::read_to_string(stage.home().join("restored.log")).unwrap();
            return Err(format!("the restored server does not answer:\n{log}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(server)
}

/// Whether the server at `port` has left recovery and has the data.
fn answers(port: u16) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let conninfo = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
        let Ok((client, connection)) =
            tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await
        else {
            return false;
        };
        let connection = tokio::spawn(connection);
        let rows = client
            .query_one("select count(*) from pgbench_branches where not pg_is_in_recovery()", &[]);
        let answer = rows.await.is_ok_and(|row| row.get::<_, i64>(0) > 0);
        drop(client);
        let _ = connection.await;
        answer
    })
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
