//! Commits at a steady rate, and when each became durable in the repository.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio_postgres::Client;

use crate::stage::Stage;

/// A commit that PostgreSQL acknowledged: when it was due, when it was acknowledged, and the WAL
/// position after it.
#[derive(Clone, Copy, Debug)]
struct Commit {
    due: Instant,
    acknowledged: Instant,
    lsn: u64,
}

/// How a peer says what is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    /// The flush position that a streaming receiver reports.
    Flushed,
    /// The end of the last segment that the archiver was rid of.
    Archived,
}

/// Asks PostgreSQL what is durable.
pub async fn durable_lsn(client: &Client, how: Durable) -> u64 {
    // 16 MiB segments: the last 16 hexadecimal digits of a name are the number, in two halves.
    let sql = match how {
        Durable::Flushed => {
            "select coalesce(max(flush_lsn) - '0/0', 0)::bigint from pg_stat_replication"
        }
        Durable::Archived => {
            "select coalesce(max((('x' || substr(last_archived_wal, 9, 8))::bit(32)::bigint * 256 \
             + ('x' || substr(last_archived_wal, 17, 8))::bit(32)::bigint + 1) * 16777216), 0)::bigint \
             from pg_stat_archiver where length(last_archived_wal) = 24"
        }
    };
    client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0).cast_unsigned()
}

/// The insert position now.
pub async fn wal_lsn(client: &Client) -> u64 {
    let sql = "select (pg_current_wal_insert_lsn() - '0/0')::bigint";
    client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0).cast_unsigned()
}

/// Connections that commit in turns.
const WRITERS: u32 = 4;

/// What a load saw, in milliseconds.
#[derive(Debug)]
pub struct Seen {
    /// Age of the oldest acknowledged commit that was not durable, looked at every 20 ms: what a
    /// disaster at that moment would have lost.
    pub at_risk_ms: Histogram<u64>,
    /// From the moment a commit was due until it was durable. By the moment it was due, not by that it
    /// was made: a load that falls behind does not hide what it waited for (coordinated omission).
    pub until_durable_ms: Histogram<u64>,
    /// Commits made in a second of the load.
    pub commits_per_s: f64,
}

/// Commits `per_second` times a second for `seconds`, then waits (at most two minutes) until all is
/// durable; `Err` when it does not become so.
pub async fn observe(
    stage: &Stage,
    how: Durable,
    per_second: u32,
    seconds: u64,
) -> Result<Seen, String> {
    let watcher = stage.postgres.client().await;
    let queue = Arc::new(Mutex::new(VecDeque::<Commit>::new()));
    let begin = Instant::now();
    let length = Duration::from_secs(seconds);
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| {
            let queue = Arc::clone(&queue);
            let connect = stage.postgres.client();
            async move {
                let client = connect.await;
                let insert =
                    client.prepare("insert into trickle (body) values ($1)").await.unwrap();
                let position = client
                    .prepare("select (pg_current_wal_flush_lsn() - '0/0')::bigint")
                    .await
                    .unwrap();
                let body = "x".repeat(100);
                let pause = Duration::from_secs(1) / per_second;
                for turn in (number..).step_by(WRITERS as usize) {
                    let due = begin + pause * turn;
                    if due >= begin + length {
                        break;
                    }
                    tokio::time::sleep_until(due.into()).await;
                    client.execute(&insert, &[&body]).await.unwrap();
                    let acknowledged = Instant::now();
                    // PostgreSQL has flushed the commit record before it acknowledged.
                    let row = client.query_one(&position, &[]).await.unwrap();
                    let lsn = row.get::<_, i64>(0).cast_unsigned();
                    queue.lock().unwrap().push_back(Commit { due, acknowledged, lsn });
                }
            }
        })
        .collect();
    let mut seen =
        Seen { at_risk_ms: histogram(), until_durable_ms: histogram(), commits_per_s: 0.0 };
    let mut writing = Box::pin(futures::future::join_all(writers));
    let mut written = false;
    let mut last_switch = Instant::now();
    loop {
        let pause = tokio::time::sleep(Duration::from_millis(20));
        if written {
            pause.await;
        } else {
            tokio::select! {
                _ = &mut writing => written = true,
                () = pause => {}
            }
        }
        let durable = durable_lsn(&watcher, how).await;
        let now = Instant::now();
        let mut oldest = None::<Instant>;
        queue.lock().unwrap().retain(|commit| {
            let is_durable = commit.lsn <= durable;
            if is_durable {
                seen.until_durable_ms.saturating_record((now - commit.due).as_millis() as u64);
            } else {
                oldest =
                    Some(oldest.map_or(commit.acknowledged, |had| had.min(commit.acknowledged)));
            }
            !is_durable
        });
        let age = oldest.map_or(Duration::ZERO, |oldest| now - oldest);
        if !written {
            seen.at_risk_ms.saturating_record(age.as_millis() as u64);
        } else if queue.lock().unwrap().is_empty() {
            break;
        } else if last_switch.elapsed() > Duration::from_secs(5) {
            // What an archiver would get only when its segment is full.
            watcher.batch_execute("select pg_switch_wal()").await.unwrap();
            last_switch = Instant::now();
        }
        if begin.elapsed() > length + Duration::from_secs(120) {
            return Err("commits stay not durable for two minutes".to_owned());
        }
    }
    seen.commits_per_s = seen.until_durable_ms.len() as f64 / seconds as f64;
    Ok(seen)
}

/// Milliseconds up to an hour, three digits. With bounds: one that grows by itself would still cut a
/// value that is recorded saturating.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000, 3).unwrap()
}
