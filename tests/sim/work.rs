//! What the processes do: the product's own engine, chores and commands, put together as its daemon
//! puts them together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use tidemark::capture::base::wal::{Feed, NeededWal, for_one_backup};
use tidemark::capture::stream::{self, Stream, StreamOptions};
use tidemark::clock::Clock;
use tidemark::daemon::upkeep;
use tidemark::error::{Error, Kind, Result};
use tidemark::pg::{Lsn, SegmentSize, SystemId, TimelineHistory, TimelineId};
use tidemark::repo::compaction::{self, CompactionOptions};
use tidemark::repo::lease::{Tenure, Wait};
use tidemark::repo::packing::NoInspection;
use tidemark::repo::retention::RetentionOptions;
use tidemark::repo::sweep::{self, SweepOptions};
use tidemark::repo::verify::{VerifyOptions, VerifyProgress, verify};
use tidemark::repo::{
    BackupId, Budget, Catalog, ClusterName, DecryptionIdentity, Encryption, FileMeta, FilePath,
    Lease, LeaseOptions, Level, ManifestFacts, PackOptions, PackedBackup, Repository, Writer,
};

use crate::model::{Backup, SEGMENT, SYSTEM_ID};
use crate::process::{Order, Surroundings};
use crate::server::{Dial, Server};

/// Longest that the WAL of a backup may not get on.
const WAL_STALL_MAX: Duration = Duration::from_secs(300);

/// What all processes of a run are configured with.
#[derive(Clone)]
pub struct Settings {
    pub identity: Option<DecryptionIdentity>,
    pub lease_ttl: Duration,
    pub wait: bool,
    pub uploads_max: usize,
    pub flush_interval: Duration,
    pub lag_ceiling_bytes: Option<u64>,
    pub retention: RetentionOptions,
}

impl Settings {
    fn encryption(&self) -> Encryption {
        match &self.identity {
            Some(identity) => Encryption::Recipients(vec![identity.recipient()]),
            None => Encryption::None,
        }
    }

    fn lease(&self, number: usize, what: &str) -> LeaseOptions {
        let mut options = LeaseOptions::new(what);
        options.ttl = self.lease_ttl;
        options.process.host = format!("host-{number}");
        // Nobody can look whether a process of another host lives.
        options.process.start_ticks = 0;
        options
    }

    fn stream(&self) -> StreamOptions {
        // No thread: extents are sealed in place.
        let budget = Budget { thread_count: 0, ..Budget::stream(48 << 20, Level::default()) };
        StreamOptions {
            flush_interval: self.flush_interval,
            lag_ceiling_bytes: self.lag_ceiling_bytes,
            level: level(),
            uploads_max: self.uploads_max,
            budget,
            ..StreamOptions::default()
        }
    }
}

fn level() -> Level {
    Level::default()
}

pub fn segment_size() -> SegmentSize {
    SegmentSize::new(SEGMENT as u32).unwrap()
}

pub fn cluster() -> ClusterName {
    ClusterName::new("main").unwrap()
}

async fn open(inside: &Surroundings) -> Result<Repository> {
    let store = Arc::new(inside.wire.clone());
    Repository::create(store, cluster(), SystemId(SYSTEM_ID), &inside.clock).await
}

fn upstream(inside: &Surroundings) -> Arc<Dial> {
    Arc::new(Dial { server: inside.server.clone(), process: inside.number })
}

/// The sidecar: takes the lease, streams, and takes base backups when told to.
pub async fn sidecar(mut inside: Surroundings, settings: Settings) -> Result<()> {
    let begin = async {
        let repository = open(&inside).await?;
        let mut options = settings.lease(inside.number, "stream");
        options.wait = if settings.wait { Wait::Forever } else { Wait::Refuse };
        let lease = Lease::acquire(&repository, options).await?;
        let writer = repository.writer(&settings.encryption()).await?;
        lease.seals_with(writer.key_id().to_string());
        Ok::<_, Error>((lease, writer))
    };
    let (lease, writer) = tokio::select! {
        biased;
        () = inside.stop.cancelled() => return Ok(()),
        begun = begin => begun?,
    };
    let stream = Stream {
        options: settings.stream(),
        upstream: upstream(&inside),
        writer: writer.clone(),
        status: Arc::clone(&inside.status),
    };
    let (stop, chores_stop) = (inside.stop.clone(), inside.stop.child_token());
    let streaming = async {
        let outcome = stream::run(&stream, &lease, &stop).await;
        chores_stop.cancel();
        outcome
    };
    let chores = async {
        loop {
            tokio::select! {
                biased;
                () = chores_stop.cancelled() => return,
                order = inside.orders.recv() => match order {
                    Some(Order::Backup) => {
                        let feed = Feed::Caller(Arc::clone(&inside.status));
                        let mut place = Place::of(&mut inside, &writer);
                        tokio::select! {
                            biased;
                            () = chores_stop.cancelled() => return,
                            // One that fails is tried again when it is told to.
                            _ = backup(&mut place, feed) => {}
                        }
                    }
                    None => return,
                },
            }
        }
    };
    let (outcome, ()) = tokio::join!(streaming, chores);
    lease.release().await;
    outcome
}

/// `tidemark backup` by itself: streams the WAL if nobody does.
pub async fn backup_alone(mut inside: Surroundings, settings: Settings) -> Result<()> {
    let repository = open(&inside).await?;
    let writer = repository.writer(&settings.encryption()).await?;
    let stream = Stream {
        options: settings.stream(),
        upstream: upstream(&inside),
        writer: writer.clone(),
        status: Arc::clone(&inside.status),
    };
    let mut lease = settings.lease(inside.number, "backup");
    lease.tenure = Tenure::Passing;
    lease.key_id = Some(writer.key_id().to_string());
    let clock = inside.clock.clone();
    let feed = Feed::open(for_one_backup(stream), lease, &clock).await?;
    backup(&mut Place::of(&mut inside, &writer), feed).await
}

/// What a base backup needs.
struct Place {
    writer: Writer,
    server: Server,
    clock: Clock,
    dice: crate::dice::Dice,
}

impl Place {
    fn of(inside: &mut Surroundings, writer: &Writer) -> Self {
        Self {
            writer: writer.clone(),
            server: inside.server.clone(),
            clock: inside.clock.clone(),
            dice: inside.dice.fork(),
        }
    }
}

/// A base backup, in the steps of `capture::base`.
async fn backup(place: &mut Place, mut feed: Feed) -> Result<()> {
    let taken = take(place, &mut feed).await;
    let closed = feed.close().await;
    taken.and(closed)
}

async fn take(place: &mut Place, feed: &mut Feed) -> Result<()> {
    let start_time = place.clock.now();
    let (start, line, generation) = place.server.begin_backup(start_time)?;
    let number = place.server.state().lines[line].number;
    let timeline = TimelineId::new(number).unwrap();
    let id = BackupId::new(start_time, timeline, Lsn(start));
    let files = draw_files(&mut place.dice);
    let history = place.server.state().lines[line].history();
    let history = match history {
        Some(text) => TimelineHistory::decode(timeline, text.as_bytes())?,
        None => TimelineHistory::first_timeline_only(timeline),
    };
    let known =
        Backup { id: id.to_string(), line, start, end: 0, end_time: 0, files: files.clone() };
    let index = {
        let mut state = place.server.state();
        state.backups.push(known);
        state.backups.len() - 1
    };
    let packed = pack(place, id, &files).await?;
    let ended = async {
        let end = place.server.end_backup(start, generation)?;
        let pause = place.dice.below(3000);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let end_time = place.clock.now();
        {
            let mut state = place.server.state();
            let known = &mut state.backups[index];
            (known.end, known.end_time) = (end, end_time.as_microsecond());
        }
        let needed = NeededWal::of(history, Lsn(start), Lsn(end), segment_size())?;
        feed.wait(&needed, place.writer.repository(), WAL_STALL_MAX).await?;
        Ok::<_, Error>((end, end_time))
    };
    let (end, end_time) = match ended.await {
        Ok(ended) => ended,
        Err(error) => {
            packed.abort().await;
            return Err(error);
        }
    };
    let facts = ManifestFacts {
        postgres_version_num: 150_004,
        segment_size: segment_size(),
        end_timeline: timeline,
        end_lsn: Lsn(end),
        start_time,
        end_time,
        tablespaces: Vec::new(),
        settings: BTreeMap::new(),
    };
    packed.commit(facts).await?;
    feed.backup_taken(timeline, Lsn(start));
    Ok(())
}

/// Packs the files.
async fn pack(
    place: &mut Place,
    id: BackupId,
    files: &[(String, Vec<u8>)],
) -> Result<PackedBackup> {
    // No thread: blocks are sealed in place. As many part buffers as there can be parts.
    let pack_bytes = if place.dice.chance(500) { 64 << 10 } else { 512 << 20 };
    let budget = Budget {
        thread_count: 0,
        part_bytes: 5 << 20,
        parts_max: 16,
        blocks_max: 4,
        ..Budget::backup(128 << 20, 1, level())
    };
    let options = PackOptions { budget, level: level(), pack_bytes };
    let mut packing = place.writer.backup(id, options, Arc::new(NoInspection))?;
    for (name, data) in files {
        let meta = FileMeta {
            path: FilePath::new(name.as_str())?,
            mode: 0o600,
            mtime: 7,
            size_bytes: data.len() as u64,
        };
        packing.begin_file(meta).await?;
        for piece in data.chunks(100_000) {
            packing.write(Bytes::copy_from_slice(piece)).await?;
        }
        packing.end_file().await?;
        let pause = place.dice.below(2000);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    packing.finish_packs().await
}

fn draw_files(dice: &mut crate::dice::Dice) -> Vec<(String, Vec<u8>)> {
    let count = dice.between(1, 6);
    let mut files = Vec::new();
    for number in 0..count {
        let bytes = match dice.below(8) {
            0 => 0,
            1 => dice.between(1 << 20, (1 << 20) + 100_000),
            _ => dice.below(60_000),
        };
        let salt = dice.next() | 1;
        let data = (0..bytes).map(|i| ((i / 3).wrapping_mul(salt) >> 17) as u8).collect();
        files.push((format!("base/{number}"), data));
    }
    files
}

/// A short-lived command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Expire,
    Sweep,
    SweepKeys,
    Compact,
    Verify,
}

pub async fn command(inside: Surroundings, settings: Settings, command: Command) -> Result<()> {
    let repository = open(&inside).await?;
    let clock = &inside.clock;
    match command {
        Command::Expire => upkeep::expire(&repository, &settings.retention, clock).await.map(drop),
        Command::Sweep => {
            let catalog = Catalog::load(&repository).await?;
            upkeep::sweep(&repository, &catalog, clock).await.map(drop)
        }
        Command::SweepKeys => {
            let evidence = sweep::scan_headers(&repository).await?;
            let catalog = Catalog::load(&repository).await?;
            let options = SweepOptions::default();
            let plan = sweep::plan(&catalog, Some(&evidence), options, clock.now());
            sweep::apply(&repository, &plan).await.map(drop)
        }
        Command::Compact => {
            let catalog = Catalog::load(&repository).await?;
            let options = CompactionOptions::new(segment_size());
            let barriers = &catalog.marks.barriers;
            let plan = compaction::plan(&catalog.wal, barriers, &options, clock.now());
            let report = compaction::apply(&repository, &plan, &options).await?;
            match report.damaged.first() {
                Some(damage) => Err(Error::new(Kind::Corrupt, damage.clone())),
                None => Ok(()),
            }
        }
        Command::Verify => {
            let reader = repository.reader(settings.identity.clone().into_iter().collect());
            let options = VerifyOptions { thread_count: 0, ..VerifyOptions::new(1) };
            let progress = Arc::new(VerifyProgress::default());
            let report = verify(&repository, &reader, &options, &progress).await?;
            match report.defects.first() {
                Some(defect) => Err(Error::new(Kind::Corrupt, format!("{defect:?}"))),
                None => Ok(()),
            }
        }
    }
}

/// The instant so many days before.
pub fn days_before(time: Timestamp, days: u32) -> Timestamp {
    time - SignedDuration::from_hours(24 * i64::from(days))
}
