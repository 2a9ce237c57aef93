//! Reads everything again, or a sample, and says what is whole and what a defect costs.
//!
//! In: a repository and a reader with an identity. Out: a [`VerifyReport`]: each backup and each
//! timeline's WAL with its verdict, each bad object by name with what is lost by it, and the windows
//! that can be recovered for certain when all bad objects are left out.
//!
//! # Shape
//! Always checked: that every manifest opens and says in private what it says in public; that all packs
//! are there in their size; that every footer opens; that the pieces in a backup's footers make up every
//! file, each byte once; that the WAL of each backup has no hole, and that some backup leads to the
//! newest WAL. Of frames and extents, all or a sample is fetched, authenticated, decompressed and compared
//! with its hash.
//!
//! # Verdict
//! Sound means: nothing is damaged, every backup can be restored, and so can the newest state. A hole that
//! lies behind all that a backup leads to and before the start of the next one is told and is no defect: it
//! was one when it was made, was shown then and is in every listing, and nothing can mend it.
//!
//! # Invariants
//! - What was deleted while it ran is told from what is lost: what holds the WAL of joined extents now is
//!   read instead of them, and only what retention says it removed may be gone.
//! - Memory is bounded by [`VerifyOptions::memory_bytes`] for what is in flight, besides one footer, the
//!   catalog, and as much again where extents were joined meanwhile; files of a backup are forgotten when they are complete.
//! - A defect never ends the run; [`DEFECTS_MAX`] of them do, and the report says so. A store that
//!   cannot be reached does, too: nothing is called damaged that was not read.
//!
//! # Cancel safety
//! Safe: it only reads.

mod backup;
mod files;
mod loss;
mod wal;

pub use loss::Loss;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytesize::ByteSize;
use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, TimelineId};
use crate::pipeline::{Pool, PoolOptions, budget};

use super::catalog::Catalog;
use super::coverage::{StoredExtent, WalCatalog, intersection};
use super::interval::{Interval, WalGap};
use super::names::{BackupId, ExtentName, Object};
use super::{Level, Reader, Repository, printable};

/// After so many bad objects the run ends.
pub const DEFECTS_MAX: usize = 1000;
/// Of how many defects it is worked out what they cost; each costs a look at the whole catalog.
const LOSSES_MAX: usize = 100;
/// Files named with a bad pack.
const FILES_NAMED_MAX: usize = 10;

/// How much is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Depth {
    /// Every frame and every extent.
    Everything,
    /// About so many of a hundred, drawn anew each time.
    SamplePercent(u8),
}

/// What to verify and with what means.
#[derive(Clone, Debug)]
pub struct VerifyOptions {
    /// How much is read.
    pub depth: Depth,
    /// Only these backups, and no WAL; all, and the WAL, when `None`.
    pub backups: Option<BTreeSet<BackupId>>,
    /// Threads that decrypt and decompress; 0: in place, see [`PoolOptions`].
    pub thread_count: usize,
    /// Requests in flight.
    pub jobs: usize,
    /// Bytes in flight, sealed and plain.
    pub memory_bytes: u64,
}

impl VerifyOptions {
    /// Everything, with so many threads and 64 MiB in flight.
    #[must_use]
    pub fn new(thread_count: usize) -> Self {
        let thread_count = thread_count.max(1);
        Self {
            depth: Depth::Everything,
            backups: None,
            thread_count,
            jobs: thread_count * 2 + 2,
            memory_bytes: 64 << 20,
        }
    }
}

/// How far a run is, for those who watch.
#[derive(Debug, Default)]
pub struct VerifyProgress {
    /// Bytes of objects to be read, as far as known.
    pub total_bytes: AtomicU64,
    /// Bytes of objects read, or passed over by the sample.
    pub done_bytes: AtomicU64,
    /// Bad objects found.
    pub defect_count: AtomicU64,
}

/// A bad object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Defect {
    /// Its name.
    pub object: String,
    /// The backup it belongs to.
    pub backup: Option<BackupId>,
    /// What is wrong, of several the first.
    pub problem: String,
    /// Frames of a pack that cannot be read.
    pub bad_frame_count: u64,
    /// Files that cannot be restored because of it, by path; at most ten.
    pub files: Vec<String>,
    /// How many such files there are, each pack counted by itself.
    pub file_count: u64,
    /// What is lost by it.
    pub lost: Vec<Loss>,
}

/// A backup's verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackupReport {
    /// The backup.
    pub id: BackupId,
    /// Whether all that was read of it is whole, and complete.
    pub whole: bool,
    /// Whether the WAL it needs is there and whole.
    pub restorable: bool,
    /// Packs whose footers were read.
    pub pack_count: u64,
    /// Regular files.
    pub file_count: u64,
    /// Frames read.
    pub frame_count: u64,
    /// Plain bytes of them.
    pub plain_bytes: u64,
    /// Whether it was deleted while it was read; then nothing is said about it.
    pub vanished: bool,
}

/// The verdict on a timeline's WAL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WalReport {
    /// The timeline.
    pub timeline: TimelineId,
    /// Extents there are, without those that were deleted while it ran.
    pub extent_count: u64,
    /// Extents read and found whole.
    pub whole_count: u64,
    /// Extents that are bad.
    pub bad_count: u64,
    /// Plain bytes read.
    pub plain_bytes: u64,
}

/// Where the WAL of a timeline ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WalEnd {
    /// The timeline.
    pub timeline: TimelineId,
    /// First position after.
    pub lsn: Lsn,
}

/// What a verification found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// When it began.
    pub start_time: Timestamp,
    /// When it ended.
    pub end_time: Timestamp,
    /// How much was read.
    pub depth: Depth,
    /// Each backup, oldest first.
    pub backups: Vec<BackupReport>,
    /// Backups without a manifest: being taken, or aborted. No defect.
    pub incomplete: Vec<BackupId>,
    /// The WAL, by timeline.
    pub wal: Vec<WalReport>,
    /// What can be recovered without any bad object.
    pub intervals: Vec<Interval>,
    /// Holes in the WAL, bad extents left out.
    pub gaps: Vec<WalGap>,
    /// The newest WAL, when no backup leads to it: what is written now cannot be restored.
    pub unreached_end: Option<WalEnd>,
    /// The bad objects.
    pub defects: Vec<Defect>,
    /// Whether it ended at [`DEFECTS_MAX`] with objects unread.
    pub ended_early: bool,
    /// Objects that were deleted while it ran.
    pub vanished_count: u64,
}

impl VerifyReport {
    /// Whether there is no defect, every backup can be restored, and some backup leads to the newest WAL.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let unreached = self.unreached_end.is_some();
        self.defects.is_empty() && !unreached && self.backups.iter().all(BackupReport::is_good)
    }

    /// Holes that are a loss: times in them cannot be restored.
    #[must_use]
    pub fn lost_count(&self) -> usize {
        self.gaps.iter().filter(|gap| gap.is_lost()).count()
    }

    /// The error that a command ends with when the report is not sound.
    ///
    /// # Errors
    /// `corrupt` naming the first bad object, and how many there are.
    pub fn ensure_sound(&self) -> Result<()> {
        if self.is_sound() {
            return Ok(());
        }
        let bad = self.backups.iter().find(|backup| !backup.is_good());
        let found = match (self.defects.as_slice(), bad) {
            ([], Some(backup)) => format!("the WAL of backup {} is not complete", backup.id),
            ([], None) => match self.unreached_end {
                Some(WalEnd { timeline, lsn }) => {
                    format!("no backup leads to {lsn} on timeline {timeline}, where the WAL ends")
                }
                None => "there is a defect".to_owned(),
            },
            ([first], _) => format!("'{}' is damaged: {}", first.object, first.problem),
            ([first, ..], _) => {
                let count = self.defects.len();
                format!("{count} objects are damaged, the first is '{}'", first.object)
            }
        };
        Err(Error::new(Kind::Corrupt, format!("the repository is not sound: {found}")).hint(
            "Take a new backup now; the report names what can still be recovered, and from which backups.",
        ))
    }
}

impl fmt::Display for VerifyReport {
    /// One line a backup, a timeline, a defect, a hole.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for backup in &self.backups {
            let verdict = match backup {
                BackupReport { vanished: true, .. } => "deleted meanwhile",
                BackupReport { whole: false, .. } => "DAMAGED",
                BackupReport { restorable: false, .. } => "NOT RESTORABLE: its WAL is not complete",
                _ => "whole",
            };
            let BackupReport { id, pack_count, file_count, frame_count, plain_bytes, .. } = backup;
            let size = ByteSize::b(*plain_bytes);
            let packs = if *pack_count == 1 { "pack" } else { "packs" };
            writeln!(
                f,
                "backup {id}: {verdict} ({pack_count} {packs}, {file_count} files, {frame_count} \
                 frames read, {size})"
            )?;
        }
        for id in &self.incomplete {
            writeln!(f, "backup {id}: no manifest; it is being taken, or was aborted")?;
        }
        for wal in &self.wal {
            let WalReport { timeline, extent_count, whole_count, bad_count, plain_bytes } = wal;
            let size = ByteSize::b(*plain_bytes);
            writeln!(
                f,
                "WAL of timeline {timeline}: {whole_count} of {extent_count} extents read and \
                 whole, {bad_count} bad, {size}"
            )?;
        }
        for gap in &self.gaps {
            write_gap(f, gap)?;
        }
        if let Some(WalEnd { timeline, lsn }) = self.unreached_end {
            writeln!(f, "NOT REACHED by any backup: the WAL up to {lsn} of timeline {timeline}")?;
        }
        for defect in &self.defects {
            writeln!(f, "DEFECT {}: {}", defect.object, defect.problem)?;
            if defect.file_count > 0 {
                let (count, names) = (defect.file_count, defect.files.join(", "));
                writeln!(f, "  files: {count}: {names}")?;
            }
            for lost in &defect.lost {
                writeln!(f, "  lost: {lost}")?;
            }
        }
        if self.vanished_count > 0 {
            let count = self.vanished_count;
            let objects = if count == 1 { "object was" } else { "objects were" };
            writeln!(f, "{count} {objects} deleted while this was read, in due course")?;
        }
        if self.ended_early {
            writeln!(f, "ended early: {DEFECTS_MAX} bad objects were enough")?;
        }
        Ok(())
    }
}

/// The line of a hole.
fn write_gap(f: &mut fmt::Formatter<'_>, found: &WalGap) -> fmt::Result {
    let WalGap { gap, last_commit_before, commit_after, expired, barrier, in_flight } = found;
    let (missing, timeline) = (gap.missing, gap.timeline);
    if let Some(kind) = barrier {
        let start = missing.start();
        return writeln!(
            f,
            "WAL of timeline {timeline} from {start} on: {kind}, only a backup taken later leads past \
             it"
        );
    }
    write!(f, "WAL {missing} of timeline {timeline}: ")?;
    match (last_commit_before, commit_after) {
        _ if *expired => writeln!(f, "removed by retention"),
        _ if *in_flight => writeln!(f, "not stored yet, a writer is at work"),
        (Some(before), Some(after)) => {
            writeln!(f, "LOST, with the commits between {before} and {after}")
        }
        _ => writeln!(f, "LOST"),
    }
}

/// Verifies a cluster's objects.
///
/// # Errors
/// `not found` when a backup that was asked for is not listed; `denied` when no identity opens the
/// first object; what the store reports. Damage is reported, not returned.
pub async fn verify(
    repository: &Repository,
    reader: &Reader,
    options: &VerifyOptions,
    progress: &Arc<VerifyProgress>,
) -> Result<VerifyReport> {
    let start_time = repository.clock().now();
    let mut catalog = Catalog::load(repository).await?;
    let run = Run::new(repository, reader, options, progress)?;
    let wanted = |id: BackupId| options.backups.as_ref().is_none_or(|ids| ids.contains(&id));
    for id in options.backups.iter().flatten() {
        catalog.backup(*id)?;
    }
    let chosen: Vec<_> = catalog.backups.iter().filter(|backup| wanted(backup.id())).collect();
    let mut total: u64 = chosen.iter().map(|backup| backup.objects.stored_bytes).sum();
    if options.backups.is_none() {
        total += catalog.wal.stored_bytes();
    }
    progress.total_bytes.store(total, Ordering::Relaxed);
    let mut found = Found::default();
    for damaged in &catalog.damaged {
        let defect = Defect::new(&damaged.object, damaged.backup, damaged.problem.clone());
        found.add(&run, defect);
        if let Some(id) = damaged.backup.filter(|id| wanted(*id)) {
            found.backups.push(BackupReport { whole: false, ..BackupReport::new(id) });
        }
    }
    for timeline in catalog.unknown_ancestries() {
        let object = repository.name(&Object::History(timeline))?;
        if !found.defects.iter().any(|defect| defect.object == object.as_str()) {
            let problem = "it is missing: where this timeline left which other is not known";
            found.add(&run, Defect::new(object, None, problem.to_owned()));
        }
    }
    for backup in chosen {
        if found.is_full() {
            break;
        }
        backup::check(&run, backup, &mut found).await?;
    }
    if options.backups.is_none() {
        wal::check(&run, &catalog.wal, &mut found).await?;
        found.bring_up_to_date(&mut catalog.wal);
    }
    Ok(found.report(&catalog, start_time, &run))
}

/// What all parts of one run share.
struct Run {
    repository: Repository,
    reader: Reader,
    options: VerifyOptions,
    progress: Arc<VerifyProgress>,
    pool: Pool,
    /// One permit a KiB of what may be in flight.
    memory: Semaphore,
    memory_kib: u32,
    /// Whether any object was opened: until then a key that does not fit ends the run.
    opened: AtomicBool,
}

impl Run {
    fn new(
        repository: &Repository,
        reader: &Reader,
        options: &VerifyOptions,
        progress: &Arc<VerifyProgress>,
    ) -> Result<Self> {
        let pool = Pool::start(&PoolOptions {
            name: "verify",
            thread_count: options.thread_count,
            jobs_max: options.jobs.max(options.thread_count),
            level: Level::default(),
        })?;
        let memory_kib = u32::try_from(options.memory_bytes / 1024).unwrap_or(u32::MAX).max(1);
        Ok(Self {
            repository: repository.clone(),
            reader: reader.clone(),
            options: options.clone(),
            progress: Arc::clone(progress),
            pool,
            memory: Semaphore::new(memory_kib as usize),
            memory_kib,
            opened: AtomicBool::new(false),
        })
    }

    /// Waits until so many bytes may be in flight; what is larger than all of it goes alone.
    async fn room(&self, bytes: u64) -> Result<SemaphorePermit<'_>> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).min(self.memory_kib);
        let permit = self.memory.acquire_many(kib).await;
        permit.map_err(|error| Error::new(Kind::Bug, format!("verification: {error}")))
    }

    /// Whether this frame or extent is read.
    fn draws(&self) -> Result<bool> {
        match self.options.depth {
            Depth::Everything => Ok(true),
            Depth::SamplePercent(percent) => {
                let [a, b] = self.repository.clock().random::<2>()?;
                let drawn = u32::from(u16::from_le_bytes([a, b])) * 100;
                Ok(drawn < u32::from(percent.min(100)) * 65_536)
            }
        }
    }

    fn done(&self, bytes: u64) {
        self.progress.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn opened(&self) {
        self.opened.store(true, Ordering::Relaxed);
    }

    /// Whether an error says that the object is bad; anything else ends the run.
    fn damage(&self, error: Error) -> Result<String> {
        let is_damage = match error.kind() {
            Kind::Corrupt | Kind::Unsupported | Kind::NotFound | Kind::Usage => true,
            Kind::Denied => self.opened.load(Ordering::Relaxed),
            _ => false,
        };
        if is_damage { Ok(printable(&error.to_string())) } else { Err(error) }
    }

    /// Whether an object that was listed is gone by now, deleted in due course.
    async fn is_gone(&self, object: &crate::store::ObjectName) -> Result<bool> {
        Ok(self.repository.store().head(object).await?.is_none())
    }

    /// Bytes of frames fetched by one request: several fit into the memory.
    fn batch_bytes(&self) -> usize {
        let quarter = usize::try_from(self.options.memory_bytes / 8).unwrap_or(usize::MAX);
        quarter.min(usize::try_from(budget::BATCH_BYTES).unwrap_or(usize::MAX)).max(1)
    }
}

impl BackupReport {
    fn new(id: BackupId) -> Self {
        Self {
            id,
            whole: true,
            restorable: false,
            pack_count: 0,
            file_count: 0,
            frame_count: 0,
            plain_bytes: 0,
            vanished: false,
        }
    }

    /// Whether it can be restored, as far as that was looked at.
    fn is_good(&self) -> bool {
        self.vanished || self.whole && self.restorable
    }
}

impl Defect {
    fn new(object: impl fmt::Display, backup: Option<BackupId>, problem: String) -> Self {
        Self {
            object: object.to_string(),
            backup,
            problem,
            bad_frame_count: 0,
            files: Vec::new(),
            file_count: 0,
            lost: Vec::new(),
        }
    }
}

/// What was found so far.
#[derive(Default)]
struct Found {
    backups: Vec<BackupReport>,
    wal: Vec<WalReport>,
    defects: Vec<Defect>,
    bad_extents: BTreeSet<ExtentName>,
    /// Extents that vanished and whose WAL others hold now.
    replaced: BTreeSet<ExtentName>,
    /// Those others, as far as they were not listed first.
    fresh: Vec<StoredExtent>,
    ended_early: bool,
    vanished_count: u64,
}

impl Found {
    fn add(&mut self, run: &Run, defect: Defect) {
        run.progress.defect_count.fetch_add(1, Ordering::Relaxed);
        self.defects.push(defect);
        self.ended_early |= self.is_full();
    }

    /// Makes of the WAL that was listed the one of which this is the verdict.
    fn bring_up_to_date(&self, wal: &mut WalCatalog) {
        self.fresh.iter().for_each(|extent| wal.push(*extent));
        wal.index();
        if !self.replaced.is_empty() {
            *wal = wal.without(|name| self.replaced.contains(name));
        }
    }

    fn is_full(&self) -> bool {
        self.defects.len() >= DEFECTS_MAX
    }

    /// The holes there are without what is bad, which no writer brings any more.
    fn gaps_of(&self, left: &Catalog, start_time: Timestamp) -> Vec<WalGap> {
        let mut gaps = left.gaps_at(start_time);
        for WalGap { gap, in_flight, .. } in &mut gaps {
            let is_in = |bad: &ExtentName| {
                bad.timeline == gap.timeline && !intersection(bad.range, gap.missing).is_empty()
            };
            *in_flight &= !self.bad_extents.iter().any(is_in);
        }
        gaps
    }

    fn report(mut self, catalog: &Catalog, start_time: Timestamp, run: &Run) -> VerifyReport {
        let bad_backups: BTreeSet<BackupId> =
            self.defects.iter().filter_map(|defect| defect.backup).collect();
        let left = loss::left_without(catalog, &bad_backups, &self.bad_extents);
        let sound = loss::as_if_sound(catalog);
        for defect in self.defects.iter_mut().take(LOSSES_MAX) {
            defect.lost = loss::of(&sound, defect, run.repository.cluster());
        }
        for report in &mut self.backups {
            let summary = catalog.backups.iter().find(|backup| backup.id() == report.id);
            report.restorable =
                summary.is_some_and(|summary| left.lineage().is_complete(&summary.span()));
        }
        // Who asked for some backups asked for nothing else.
        let end = catalog.settled_end(start_time).filter(|_| run.options.backups.is_none());
        let unreached_end = end
            .filter(|(timeline, lsn)| !left.reaches(*timeline, *lsn))
            .map(|(timeline, lsn)| WalEnd { timeline, lsn });
        self.defects.sort_by(|a, b| a.object.cmp(&b.object));
        self.backups.sort_by_key(|backup| backup.id);
        let gaps = self.gaps_of(&left, start_time);
        VerifyReport {
            start_time,
            end_time: run.repository.clock().now(),
            depth: run.options.depth,
            backups: self.backups,
            incomplete: catalog.incomplete.iter().map(|backup| backup.id).collect(),
            wal: self.wal,
            intervals: left.intervals(),
            gaps,
            unreached_end,
            defects: self.defects,
            ended_early: self.ended_early,
            vanished_count: self.vanished_count,
        }
    }
}
