//! Connections that commit numbered rows, and the record of what Postgres acknowledged.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tidemark::pg::Lsn;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, NoTls};

use super::plan::Setup;
use super::random::Random;

/// The table the rows go to; a row's filler follows from its writer, number and length.
pub const TABLE: &str = "create table journal (writer int, number bigint, filler text, \
     primary key (writer, number)); alter table journal alter filler set storage external";
const INSERT: &str = "insert into journal values ($1, $2, repeat(md5($1::int || '.' || $2::bigint), \
     $3)) returning pg_current_wal_insert_lsn()::text";
/// Every so many rows one is long, so that its WAL spans pages, messages and extents.
const LONG_EVERY: i64 = 60;
const LONG_UNITS: i32 = 6000;

/// A commit that was acknowledged.
#[derive(Clone, Copy, Debug)]
pub struct Commit {
    /// Who wrote it.
    pub writer: i32,
    /// Its number.
    pub number: i64,
    /// Index of the server that acknowledged it.
    pub server: usize,
    /// Its commit record begins here or later.
    pub from_lsn: Lsn,
    /// Its commit record ends here or earlier; `None` when the connection died before we knew.
    pub until_lsn: Option<Lsn>,
    /// When it was sent.
    pub sent: SystemTime,
    /// When COMMIT returned.
    pub acknowledged: SystemTime,
    /// The same on the monotonic clock.
    pub acknowledged_at: Instant,
}

/// What was written, as the writers know it.
#[derive(Debug, Default)]
pub struct Record {
    commits: Mutex<Vec<Commit>>,
    attempts: Mutex<BTreeMap<i32, i64>>,
    count: AtomicUsize,
}

impl Record {
    fn attempt(&self, writer: i32, number: i64) {
        self.attempts.lock().unwrap().insert(writer, number);
    }

    fn add(&self, commit: Commit) {
        self.commits.lock().unwrap().push(commit);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// All acknowledged commits.
    pub fn commits(&self) -> Vec<Commit> {
        self.commits.lock().unwrap().clone()
    }

    /// The last number that each writer tried; it begins with 1 and leaves none out.
    pub fn attempts(&self) -> BTreeMap<i32, i64> {
        self.attempts.lock().unwrap().clone()
    }

    /// How many commits were tried.
    pub fn attempt_count(&self) -> usize {
        self.attempts.lock().unwrap().values().map(|last| *last as usize).sum()
    }

    /// How many commits were acknowledged.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

/// Where writers connect: the index of the primary and its connection string.
#[derive(Clone, Debug)]
pub struct Goal {
    /// Index of the server.
    pub server: usize,
    /// How to connect to it.
    pub conninfo: String,
}

/// One connection that writes until it is told to stop.
pub struct Writer {
    /// Its number.
    pub id: i32,
    /// Where to write.
    pub goal: tokio::sync::watch::Receiver<Goal>,
    /// What it did.
    pub record: Arc<Record>,
    /// Says when to stop.
    pub stop: Arc<AtomicBool>,
    /// Lengths and pauses.
    pub random: Random,
    /// Bytes of a row, in units of 32.
    pub row_units: u32,
    /// Longest pause between two commits.
    pub pause_ms_max: u64,
    /// The last number used.
    pub number: i64,
}

impl Writer {
    /// The writer of this number in a round with this setup.
    pub fn new(id: i32, setup: &Setup, seed: u64, context: &WriterContext) -> Self {
        Self {
            id,
            goal: context.goal.clone(),
            record: Arc::clone(&context.record),
            stop: Arc::clone(&context.stop),
            random: Random::new(seed ^ (id as u64) << 32),
            row_units: setup.row_units,
            pause_ms_max: setup.pause_ms_max,
            number: 0,
        }
    }

    /// Writes; connects anew whenever the connection is lost.
    pub async fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            let goal = self.goal.borrow_and_update().clone();
            let _ = self.session(&goal).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Writes until the connection breaks, the goal moves, or it is time to stop.
    async fn session(&mut self, goal: &Goal) -> Result<(), Error> {
        let client = connect(&goal.conninfo).await?;
        let insert = client.prepare(INSERT).await?;
        let position = client.prepare("select pg_current_wal_insert_lsn()::text").await?;
        while !self.stop.load(Ordering::Relaxed) {
            self.number += 1;
            let units = match self.number % LONG_EVERY {
                0 => LONG_UNITS,
                _ => self.random.within(1..=u64::from(self.row_units)) as i32,
            };
            self.record.attempt(self.id, self.number);
            let sent = SystemTime::now();
            let row = {
                let (id, number) = (self.id, self.number);
                let parameters: [&(dyn ToSql + Sync); 3] = [&id, &number, &units];
                let commit = client.query_one(&insert, &parameters);
                tokio::select! {
                    row = commit => row?,
                    // A COMMIT that waits for the sidecar for ever must not hold up a change of goal.
                    _ = self.goal.changed() => return Ok(()),
                    () = stopped(&self.stop) => return Ok(()),
                }
            };
            let (acknowledged, acknowledged_at) = (SystemTime::now(), Instant::now());
            let until = client.query_one(&position, &[]).await;
            self.record.add(Commit {
                writer: self.id,
                number: self.number,
                server: goal.server,
                from_lsn: row.get::<_, &str>(0).parse().unwrap(),
                until_lsn: until.ok().map(|row| row.get::<_, &str>(0).parse().unwrap()),
                sent,
                acknowledged,
                acknowledged_at,
            });
            if self.goal.has_changed().unwrap_or(true) {
                return Ok(());
            }
            let pause = self.random.within(0..=self.pause_ms_max);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        Ok(())
    }
}

/// What all writers of a round share.
pub struct WriterContext {
    /// Where to write.
    pub goal: tokio::sync::watch::Receiver<Goal>,
    /// What they did.
    pub record: Arc<Record>,
    /// Says when to stop.
    pub stop: Arc<AtomicBool>,
}

async fn stopped(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn connect(conninfo: &str) -> Result<Client, Error> {
    let conninfo = format!("{conninfo} dbname=postgres connect_timeout=3");
    let (client, connection) = tokio_postgres::connect(&conninfo, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// The flush position that a server saw at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When the answer came.
    pub at: Instant,
    /// Index of the server.
    pub server: usize,
    /// `pg_stat_replication.flush_lsn` of the sidecar.
    pub flush_lsn: Lsn,
}

/// Asks a server again and again how far the sidecar says that its WAL is durable.
pub async fn observe(server: usize, conninfo: String, samples: Arc<Mutex<Vec<Sample>>>) {
    const SQL: &str = "select max(flush_lsn)::text from pg_stat_replication \
         where application_name = 'tidemark'";
    let mut client: Option<Client> = None;
    loop {
        tokio::time::sleep(Duration::from_millis(120)).await;
        let open = match client.take() {
            Some(open) => open,
            None => match connect(&conninfo).await {
                Ok(open) => open,
                Err(_) => continue,
            },
        };
        let Ok(row) = open.query_one(SQL, &[]).await else { continue };
        client = Some(open);
        if let Some(text) = row.get::<_, Option<&str>>(0) {
            let sample = Sample { at: Instant::now(), server, flush_lsn: text.parse().unwrap() };
            samples.lock().unwrap().push(sample);
        }
    }
}
