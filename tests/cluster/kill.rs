//! kill -9 of the sidecar at random moments under load. Postgres waits for it as a synchronous standby,
//! so every COMMIT that returned was reported durable: all of them must come back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use crate::harness::commit::commit_seed;
use crate::harness::postgres::Stop;
use crate::harness::{Binaries, Postgres, Settings, Tidemark};

const WRITERS: usize = 4;

/// Commits numbered rows one after another; `acknowledged` is the last number whose COMMIT returned.
async fn write(
    server: Arc<Postgres>,
    writer: i32,
    acknowledged: Arc<AtomicI64>,
    stop: Arc<AtomicBool>,
) {
    let client = server.client().await;
    let statement = client
        .prepare("insert into journal (writer, number, filler) values ($1, $2, $3)")
        .await
        .unwrap();
    let filler = "x".repeat(300);
    let mut number = 0_i64;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        if client.execute(&statement, &[&writer, &number, &filler]).await.is_err() {
            return;
        }
        acknowledged.store(number, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_commit_is_lost_when_the_sidecar_is_killed_again_and_again() {
    let kills: u32 = std::env::var("TIDEMARK_TEST_KILLS").map_or(50, |text| text.parse().unwrap());
    let seed: u64 = std::env::var("TIDEMARK_TEST_SEED")
        .map_or_else(|_| commit_seed(), |text| text.parse().unwrap());
    println!("TIDEMARK_TEST_SEED={seed}");
    let mut random = seed | 1;
    let binaries = Binaries::of_this_run();
    let server = Arc::new(Postgres::start(&binaries, &Settings::default()));
    server.psql("create table journal (writer int, number bigint, filler text, primary key (writer, number))");
    let conninfo = server.conninfo();
    let tidemark = Tidemark::with_directory();
    let arguments = ["stream", "--postgres", &conninfo];

    let first = tidemark.spawn(&arguments);
    server.wait_for_stream();
    tidemark.run(&["backup", "--postgres", &conninfo, "--checkpoint", "fast"]).ok();
    server.psql("alter system set synchronous_standby_names = 'tidemark'");
    server.psql("select pg_reload_conf()");

    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged: Vec<Arc<AtomicI64>> = (0..WRITERS).map(|_| Arc::default()).collect();
    let writers: Vec<_> = acknowledged
        .iter()
        .zip(0..)
        .map(|(last, writer)| {
            tokio::spawn(write(server.clone(), writer, last.clone(), stop.clone()))
        })
        .collect();
    let total = || acknowledged.iter().map(|last| last.load(Ordering::SeqCst)).sum::<i64>();

    let mut sidecar = first;
    let mut at_spawn = total();
    let mut hits_at_work = 0;
    for kill in 0..kills {
        // xorshift64: enough to spread the moments, and the seed replays them.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        tokio::time::sleep(Duration::from_millis(50 + random % 900)).await;
        // More than what the one before may have got acknowledged when it was killed.
        let has_worked = || total() > at_spawn + WRITERS as i64;
        let deadline = Instant::now() + Duration::from_secs(60);
        while kill % 2 == 1 && !has_worked() {
            assert!(Instant::now() < deadline, "nothing is acknowledged:\n{}", sidecar.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(sidecar.is_running(), "ended by itself before kill {kill}:\n{}", sidecar.log());
        hits_at_work += u32::from(has_worked());
        sidecar.kill();
        at_spawn = total();
        sidecar = tidemark.spawn(&arguments);
    }
    assert!(hits_at_work >= kills / 2, "{hits_at_work} of {kills} kills hit one at work");
    // The last one must get through: commits are acknowledged again without anybody's help.
    let before = total();
    let deadline = Instant::now() + Duration::from_secs(60);
    while total() < before + 20 {
        assert!(
            Instant::now() < deadline,
            "no commit was acknowledged after the last kill:\n{}",
            sidecar.log()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    // The sidecar dies too, and the server's disk is lost: only the repository is left.
    sidecar.kill();
    server.stop(Stop::Immediate);

    let listed = tidemark.run(&["list", "--json"]).ok().json();
    assert_eq!(listed["gaps"].as_array().map(Vec::len), Some(0), "{listed:#}");
    let target = tidemark.new_target("restored");
    tidemark.run(&["restore", "--into", target.to_str().unwrap()]).ok();
    let restored = Postgres::adopt(&binaries, &target);
    restored.run();
    let deadline = Instant::now() + Duration::from_secs(120);
    while restored.psql("select pg_is_in_recovery()") != "f" {
        assert!(Instant::now() < deadline, "{}", restored.log_tail());
        std::thread::sleep(Duration::from_millis(50));
    }
    for (writer, last) in acknowledged.iter().enumerate() {
        let last = last.load(Ordering::SeqCst);
        let found = restored.psql(&format!(
            "select count(*) from journal where writer = {writer} and number between 1 and {last}"
        ));
        assert_eq!(found, last.to_string(), "writer {writer}: seed {seed}");
    }
    println!(
        "kills {kills}, of one at work {hits_at_work}, commits acknowledged {}, lost 0",
        total()
    );
}
