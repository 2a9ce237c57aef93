//! How old the newest durable commit is under a trickle of commits, and what silence costs.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::harness::{Binaries, Postgres, S3, Settings};

/// Greatest commit time in the names of WAL objects, in microseconds since the Unix epoch.
fn newest_commit_unix_micros(names: &[String]) -> Option<i64> {
    let times = names.iter().filter(|name| name.contains("/wal/") && !name.ends_with(".history"));
    let times = times.filter_map(|name| i64::from_str_radix(name.rsplit('-').next()?, 16).ok());
    // It is 0 where none is known yet.
    times.max().filter(|time| *time > 0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trickle_of_commits_is_durable_within_seconds_and_silence_costs_nothing() {
    let seconds: u64 =
        std::env::var("TIDEMARK_TEST_TRICKLE_SECONDS").map_or(10, |text| text.parse().unwrap());
    let silence_seconds: u64 =
        std::env::var("TIDEMARK_TEST_SILENCE_SECONDS").map_or(15, |text| text.parse().unwrap());
    let binaries = Binaries::of_this_run();
    let server = Postgres::start(&binaries, &Settings::default());
    server.psql(
        "create table trickle (id bigserial primary key, at timestamptz default clock_timestamp())",
    );
    let s3 = S3::start();
    let tidemark = s3.tidemark("trickle");
    let conninfo = server.conninfo();
    let stream = tidemark.spawn(&["stream", "--postgres", &conninfo]);
    let client = server.client().await;
    let deadline = Instant::now() + Duration::from_secs(30);
    while newest_commit_unix_micros(&s3.names()).is_none() {
        assert!(Instant::now() < deadline, "nothing arrives:\n{}", stream.log());
        client.execute("insert into trickle default values", &[]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    // The age is sampled every 50 ms, whatever the writer does: what a disaster at that instant would lose.
    let mut newest_seen = BTreeSet::new();
    let mut ages = Histogram::<u64>::new(3).unwrap();
    let writer = tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_millis(200));
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end {
            tick.tick().await;
            client.execute("insert into trickle default values", &[]).await.unwrap();
        }
    });
    while !writer.is_finished() {
        let now = i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_micros()).unwrap();
        let newest = newest_commit_unix_micros(&s3.names()).unwrap();
        newest_seen.insert(newest);
        ages.record(u64::try_from((now - newest).max(0)).unwrap() / 1000).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    writer.await.unwrap();
    // After the first that was seen, one a second or so; a machine that stalls gets fewer done, and the ages
    // are its own.
    let became_durable = newest_seen.len() as u64 - 1;
    assert!(became_durable >= seconds / 4, "{became_durable} times in {seconds} s");
    println!(
        "age of the newest durable commit over {seconds} s: p50 {} ms, p99 {} ms, max {} ms",
        ages.value_at_quantile(0.50),
        ages.value_at_quantile(0.99),
        ages.max()
    );

    // Silence: what was under way is flushed, then nothing but the idle rule and the lease.
    let flushed = server.psql("select pg_current_wal_lsn()");
    let deadline = Instant::now() + Duration::from_secs(90);
    let behind = format!(
        "select restart_lsn < '{flushed}' from pg_replication_slots where slot_name = 'tidemark'"
    );
    while server.psql(&behind) == "t" {
        assert!(Instant::now() < deadline, "{}", stream.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let before = s3.wal_names();
    tokio::time::sleep(Duration::from_secs(silence_seconds)).await;
    let puts = s3.wal_names().difference(&before).count() as u64;
    println!("WAL objects put in {silence_seconds} s of silence: {puts}");
    let idle_rule = silence_seconds / 60 + 1;
    assert!(puts <= idle_rule, "{puts} WAL objects in {silence_seconds} s of silence");
    assert_eq!(stream.terminate(), Some(0));
}
