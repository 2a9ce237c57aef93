//! What may be deleted: a plan made from a catalog, checked in a second way, then carried out.
//!
//! In: a [`Catalog`], the rules, the time. Out: a [`DeletionPlan`], pure and printable;
//! [`apply`](apply()) carries it out.
//!
//! # Rules
//! A backup is kept for as long as any of these holds: it is the newest complete one, or the newest
//! that can be restored; a hold names it; it is younger than `keep_days`; it is one of the newest
//! `keep_count` that can be restored; it ended inside the recovery window; the window begins with it;
//! a kept backup refers to its packs; the history of some timeline cannot be read, so that it may be
//! the backup that leads there. Without `keep_days` and `keep_count` no backup is deleted, and while a
//! hold names a backup that is not listed nothing is: part of the repository is out of sight.
//!
//! WAL is kept when any of these holds: it lies after the start of a kept backup that is there to
//! recover from (all of them without `pitr_days`, else those of the window), towards any timeline
//! that descends from it; it lies between start and end of any kept backup; it lies after the start
//! of a backup that is being taken, or whose manifest cannot be read; it was written, or holds a
//! commit, inside the window; the store does not say when it was written; or the ancestors of its
//! timeline are not known.
//!
//! # Invariants
//! - A plan leaves alone what it does not understand: damaged manifests, foreign names, backups
//!   without a manifest. What cannot be read now may be read tomorrow, so all that it may need stays.
//! - Two checks that share no code must agree: the rules above decide by descent and position, and
//!   [`check()`] makes the catalog that would be left and asks it what can still be restored.
//!
//! # Durability
//! Dying on any line of `apply` loses nothing that is kept. A backup's manifest goes first, so a
//! backup is never listed with packs missing: what is left of it counts as an aborted backup and is
//! swept. WAL goes last and oldest first, after every backup that needed it is gone; what is left of
//! an interrupted run is planned again by the next one. Before the first deletion everything is read
//! again and the plan must still be right.

mod apply;
mod check;
mod outlook;

pub use apply::{DeletionReport, Refusal, apply};
pub(super) use apply::{delete_unless_refused, ensure_clock};
pub use check::check;
pub use outlook::{Outlook, Reading};

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytesize::ByteSize;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, TimelineId};

use super::catalog::{BackupSummary, Catalog};
use super::coverage::{StoredExtent, intersection, range};
use super::interval::{Interval, Stretch};
use super::names::{BackupId, ExtentName};

/// How far the clocks of the database server, of the host that backs it up and of the store may be
/// apart without a deletion coming too early.
const CLOCK_SLACK: SignedDuration = SignedDuration::from_hours(1);
/// Where the size of a segment is not known, the longest there is.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// How long to keep what. Days are of 24 hours.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetentionOptions {
    /// Keep backups that ended less than so many days ago; `None`: age keeps nothing.
    pub keep_days: Option<u32>,
    /// Keep so many of the newest backups that can be restored; `None`: count keeps nothing.
    pub keep_count: Option<u32>,
    /// Keep every moment of so many days recoverable; `None`: all
    /// that can be reached from a kept backup. Alone it deletes WAL only.
    pub pitr_days: Option<u32>,
}

/// Why a backup is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The newest backup, the newest that can be restored, or the newest that leads to the newest
    /// timeline: each is always kept.
    Newest,
    /// The recovery window begins with it.
    WindowBase,
    /// It ended inside the recovery window.
    InsideWindow,
    /// Younger than `keep_days`.
    Age,
    /// One of the newest `keep_count`.
    Count,
    /// A hold names it.
    Held,
    /// A kept backup refers to its packs.
    Parent,
    /// Neither `keep_days` nor `keep_count` is set.
    NoRule,
    /// The history of some timeline cannot be read: this backup may be the one that leads there.
    UnknownDescent,
    /// A hold names a backup that is not listed: others may be missing as well.
    HeldMissing,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::Newest => "newest",
            Reason::WindowBase => "the recovery window begins with it",
            Reason::InsideWindow => "inside the recovery window",
            Reason::Age => "younger than keep_days",
            Reason::Count => "among the newest keep_count",
            Reason::Held => "held",
            Reason::Parent => "a kept backup refers to it",
            Reason::NoRule => "neither keep_days nor keep_count is set",
            Reason::UnknownDescent => "it may lead to a timeline whose history is missing",
            Reason::HeldMissing => "a held backup is missing",
        })
    }
}

/// A backup that stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeptBackup {
    /// The backup.
    pub id: BackupId,
    /// Why; never empty.
    pub reasons: BTreeSet<Reason>,
}

/// A backup that goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeletedBackup {
    /// The backup.
    pub id: BackupId,
    /// When it ended.
    pub end_time: Timestamp,
    /// Its packs as listed.
    pub pack_count: u32,
    /// Bytes of its objects.
    pub stored_bytes: u64,
}

/// WAL of one timeline that goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeletedWal {
    /// The timeline.
    pub timeline: TimelineId,
    /// The WAL of it that will be gone, in maximal stretches.
    pub stretches: Vec<Stretch>,
    /// First position after the last byte that goes.
    pub horizon_lsn: Lsn,
    /// How many objects.
    pub extent_count: u64,
    /// Their bytes.
    pub stored_bytes: u64,
    /// The objects, by start.
    #[serde(skip)]
    pub extents: Vec<ExtentName>,
}

/// What is deleted and what stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeletionPlan {
    /// The time the rules were applied at.
    pub planned_time: Timestamp,
    /// The rules.
    pub options: RetentionOptions,
    /// Every moment since then that can be recovered now can be recovered afterwards; without
    /// `pitr_days` every moment that can be recovered from a backup that stays.
    pub window_start: Option<Timestamp>,
    /// Backups that stay, oldest first.
    pub keep: Vec<KeptBackup>,
    /// Backups that go, oldest first.
    pub backups: Vec<DeletedBackup>,
    /// WAL that goes, by timeline.
    pub wal: Vec<DeletedWal>,
    /// What an operator should know.
    pub remarks: Vec<String>,
}

impl DeletionPlan {
    /// Whether there is nothing to delete.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.backups.is_empty() && self.wal.is_empty()
    }

    /// Bytes of the objects that go.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let backups: u64 = self.backups.iter().map(|backup| backup.stored_bytes).sum();
        backups + self.wal.iter().map(|wal| wal.stored_bytes).sum::<u64>()
    }

    /// The ids of the backups that go.
    #[must_use]
    pub fn deleted_ids(&self) -> BTreeSet<BackupId> {
        self.backups.iter().map(|backup| backup.id).collect()
    }
}

impl fmt::Display for DeletionPlan {
    /// One line for each thing, as `expire` prints it before it acts.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for KeptBackup { id, reasons } in &self.keep {
            let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
            writeln!(f, "keep backup {id}: {}", reasons.join(", "))?;
        }
        for DeletedBackup { id, end_time, pack_count, stored_bytes } in &self.backups {
            let size = ByteSize::b(*stored_bytes);
            writeln!(f, "delete backup {id}: ended {end_time}, {pack_count} packs, {size}")?;
        }
        for wal in &self.wal {
            let (timeline, count, size) =
                (wal.timeline, wal.extent_count, ByteSize::b(wal.stored_bytes));
            let before = wal.horizon_lsn;
            writeln!(
                f,
                "delete WAL of timeline {timeline} before {before}: {count} extents, {size}"
            )?;
        }
        for remark in &self.remarks {
            writeln!(f, "note: {remark}")?;
        }
        Ok(())
    }
}

/// Decides what may go at the time `now`.
///
/// # Errors
/// `bug` when the second check does not agree: then nothing may be deleted.
pub fn plan(catalog: &Catalog, options: &RetentionOptions, now: Timestamp) -> Result<DeletionPlan> {
    let rules = Rules::new(catalog, options, now);
    let keep = rules.kept();
    let mut plan = DeletionPlan {
        planned_time: now,
        options: options.clone(),
        window_start: rules.window_start(),
        backups: rules.deleted(&keep),
        keep: Vec::new(),
        wal: Vec::new(),
        remarks: rules.remarks(),
    };
    if let Some(recent_since) = rules.recent_since(&keep) {
        plan.wal = rules.deleted_wal(&keep, recent_since);
    }
    plan.keep = keep.into_iter().map(|(id, reasons)| KeptBackup { id, reasons }).collect();
    check(catalog, &plan)?;
    Ok(plan)
}

/// Backups that a hold names and that are not listed, not even as ones that cannot be read. Retention
/// lets none that is held go, and nobody can hold one that is not there, so somebody took it away, or a
/// part of the repository cannot be seen.
pub(super) fn missing_held(catalog: &Catalog) -> Vec<BackupId> {
    let listed: BTreeSet<BackupId> = catalog
        .backups
        .iter()
        .map(BackupSummary::id)
        .chain(catalog.damaged.iter().filter_map(|object| object.backup))
        .collect();
    catalog.marks.holds.difference(&listed).copied().collect()
}

/// Fails while a held backup is not listed, for then nothing may be deleted.
///
/// # Errors
/// `not found`.
pub fn ensure_held_listed(catalog: &Catalog) -> Result<()> {
    let Some(id) = missing_held(catalog).first().copied() else { return Ok(()) };
    let message = format!("backup {id} is held and not listed, so nothing is deleted");
    let hint = format!("Bring it back, or release it with 'tidemark release {id}'.");
    Err(Error::new(Kind::NotFound, message).hint(hint))
}

/// What an operator should know of such a backup.
pub(super) fn missing_held_remark(id: BackupId) -> String {
    format!(
        "backup {id} is held and not listed, so nothing goes: bring it back, or release it with \
         'tidemark release {id}'"
    )
}

type Kept = BTreeMap<BackupId, BTreeSet<Reason>>;

/// The rules at work on one catalog.
struct Rules<'a> {
    catalog: &'a Catalog,
    options: &'a RetentionOptions,
    now: Timestamp,
    intervals: Vec<Interval>,
    missing_held: Vec<BackupId>,
}

fn days(count: u32) -> SignedDuration {
    SignedDuration::from_hours(24 * i64::from(count))
}

fn before(time: Timestamp, duration: SignedDuration) -> Timestamp {
    time.checked_sub(duration).unwrap_or(Timestamp::MIN)
}

impl<'a> Rules<'a> {
    fn new(catalog: &'a Catalog, options: &'a RetentionOptions, now: Timestamp) -> Self {
        let (intervals, missing_held) = (catalog.intervals_towards_all(), missing_held(catalog));
        Self { catalog, options, now, intervals, missing_held }
    }

    /// The moment the recovery window begins, slack included.
    fn window_start(&self) -> Option<Timestamp> {
        let length = days(self.options.pitr_days?);
        Some(before(before(self.now, length), CLOCK_SLACK))
    }

    fn kept(&self) -> Kept {
        let mut kept = Kept::new();
        let mut keep = |id, reason| {
            kept.entry(id).or_default().insert(reason);
        };
        let restorable = self.catalog.backups.iter().filter(|b| self.catalog.is_restorable(b));
        let restorable: BTreeSet<BackupId> = restorable.map(BackupSummary::id).collect();
        let newest = self.catalog.backups.last().map(BackupSummary::id);
        for id in newest.into_iter().chain(restorable.last().copied()) {
            keep(id, Reason::Newest);
        }
        let count = self.options.keep_count.map_or(0, |count| count as usize);
        restorable.iter().rev().take(count).for_each(|id| keep(*id, Reason::Count));
        // A backup that ended on a branch which a promotion left behind may be newer than all that lead
        // to where the server is now.
        let leading = self.leading(&restorable);
        leading.iter().rev().take(1).for_each(|id| keep(*id, Reason::Newest));
        leading.iter().rev().take(count).for_each(|id| keep(*id, Reason::Count));
        let window = self.window_start();
        let is_descent_known = self.catalog.unknown_ancestries().is_empty();
        for backup in &self.catalog.backups {
            let (id, end) = (backup.id(), backup.manifest.end_time);
            if !is_descent_known {
                keep(id, Reason::UnknownDescent);
            }
            if self.catalog.marks.holds.contains(&id) {
                keep(id, Reason::Held);
            }
            if !self.missing_held.is_empty() {
                keep(id, Reason::HeldMissing);
            }
            if self.options.keep_days.is_none() && self.options.keep_count.is_none() {
                keep(id, Reason::NoRule);
            }
            if self.options.keep_days.is_some_and(|age| end > before(self.now, days(age))) {
                keep(id, Reason::Age);
            }
            if window.is_some_and(|start| end > start) {
                keep(id, Reason::InsideWindow);
            }
        }
        if let Some(start) = window {
            self.window_bases(start).into_iter().for_each(|id| keep(id, Reason::WindowBase));
        }
        self.keep_parents(&mut kept);
        kept
    }

    /// Those of `restorable` that lead to the newest timeline.
    fn leading(&self, restorable: &BTreeSet<BackupId>) -> BTreeSet<BackupId> {
        let newest = self.catalog.lineage().timelines().last().copied();
        let towards = self.intervals.iter().filter(|interval| Some(interval.timeline) == newest);
        towards.map(|interval| interval.backup).filter(|id| restorable.contains(id)).collect()
    }

    /// For each timeline the newest backup that ended before the window and reaches into it.
    fn window_bases(&self, start: Timestamp) -> BTreeSet<BackupId> {
        let reaches = |interval: &&Interval| {
            let grows = interval.open && self.is_live(interval.timeline, start);
            interval.from_time <= start && (interval.until_time >= start || grows)
        };
        let mut newest: BTreeMap<TimelineId, &Interval> = BTreeMap::new();
        for interval in self.intervals.iter().filter(reaches) {
            let best = newest.entry(interval.timeline).or_insert(interval);
            if interval.from_time > best.from_time {
                *best = interval;
            }
        }
        newest.values().map(|interval| interval.backup).collect()
    }

    /// Whether WAL may still arrive on a timeline, or arrived since `start`. A silent server writes
    /// none for long, so the newest timeline always counts.
    fn is_live(&self, timeline: TimelineId, start: Timestamp) -> bool {
        self.catalog.wal.timelines().last() == Some(timeline)
            || self.catalog.wal.extents(timeline).any(|extent| is_recent(&extent, start))
    }

    fn keep_parents(&self, kept: &mut Kept) {
        loop {
            let parents: Vec<BackupId> = self
                .catalog
                .backups
                .iter()
                .filter(|backup| kept.contains_key(&backup.id()))
                .flat_map(|backup| backup.manifest.parents.iter().copied())
                .filter(|parent| !kept.contains_key(parent))
                .collect();
            if parents.is_empty() {
                return;
            }
            for parent in parents {
                kept.entry(parent).or_default().insert(Reason::Parent);
            }
        }
    }

    fn deleted(&self, keep: &Kept) -> Vec<DeletedBackup> {
        let gone = self.catalog.backups.iter().filter(|backup| !keep.contains_key(&backup.id()));
        gone.map(|backup| DeletedBackup {
            id: backup.id(),
            end_time: backup.manifest.end_time,
            pack_count: backup.objects.pack_count,
            stored_bytes: backup.objects.stored_bytes,
        })
        .collect()
    }

    /// Kept backups from which later moments are recovered, not only their own end.
    fn chain_bases(&self, keep: &Kept) -> Vec<&'a BackupSummary> {
        let chain =
            [Reason::Newest, Reason::WindowBase, Reason::InsideWindow, Reason::UnknownDescent];
        let is_base = |reasons: &BTreeSet<Reason>| {
            self.options.pitr_days.is_none() || chain.iter().any(|reason| reasons.contains(reason))
        };
        let kept = self.catalog.backups.iter();
        kept.filter(|backup| keep.get(&backup.id()).is_some_and(is_base)).collect()
    }

    /// WAL that was made since then is kept whether or not anything seems to need it; `None` when
    /// all is kept, because there is nothing to recover from or a held backup is missing.
    fn recent_since(&self, keep: &Kept) -> Option<Timestamp> {
        if !self.missing_held.is_empty() {
            return None;
        }
        let bases = self.chain_bases(keep);
        let oldest = bases.iter().map(|backup| backup.id().start_time()).min()?;
        Some(self.window_start().unwrap_or_else(|| before(oldest, CLOCK_SLACK)))
    }

    /// Of each timeline, the positions of which no byte may go.
    fn needed(&self, keep: &Kept) -> BTreeMap<TimelineId, Vec<LsnRange>> {
        let mut needs = Vec::new();
        for backup in self.chain_bases(keep) {
            needs.push((backup.id(), self.segment_start(backup.id().start_lsn()), None));
        }
        for id in self.catalog.unknown_backups() {
            needs.push((id, self.segment_start(id.start_lsn()), None));
        }
        for backup in self.catalog.backups.iter().filter(|b| keep.contains_key(&b.id())) {
            let end = backup.manifest.end_lsn;
            needs.push((backup.id(), self.segment_start(backup.id().start_lsn()), Some(end)));
        }
        let lineage = self.catalog.lineage();
        let mut needed: BTreeMap<TimelineId, Vec<LsnRange>> = BTreeMap::new();
        for (id, start, end) in &needs {
            // Whatever the histories say: its own timeline.
            let own = range(*start, end.unwrap_or(Lsn(u64::MAX)));
            needed.entry(id.timeline()).or_default().push(own);
        }
        for target in lineage.timelines() {
            let path = lineage.path(target);
            for (id, start, end) in &needs {
                if !lineage.is_on_path(target, id.timeline(), id.start_lsn()) {
                    continue;
                }
                let end = end.unwrap_or(Lsn(u64::MAX));
                // A later timeline of the path may hold the bytes before its own beginning.
                for part in &path {
                    let part_end = part.end.map_or(end, |part_end| part_end.min(end));
                    needed.entry(part.timeline).or_default().push(range(*start, part_end));
                }
            }
        }
        needed
    }

    /// PostgreSQL reads the first page of a segment before any other of it.
    fn segment_start(&self, position: Lsn) -> Lsn {
        let size = self.catalog.segment_size();
        position.align_down(size.map_or(SEGMENT_BYTES_MAX, |size| size.bytes()))
    }

    fn deleted_wal(&self, keep: &Kept, recent_since: Timestamp) -> Vec<DeletedWal> {
        let needed = self.needed(keep);
        let lineage = self.catalog.lineage();
        let known = self.catalog.wal.timelines().filter(|timeline| lineage.knows(*timeline));
        let deleted = known.filter_map(|timeline| {
            let needed = merged(needed.get(&timeline).cloned().unwrap_or_default());
            let mut deleted = DeletedWal {
                timeline,
                stretches: Vec::new(),
                horizon_lsn: Lsn::INVALID,
                extent_count: 0,
                stored_bytes: 0,
                extents: Vec::new(),
            };
            for extent in self.catalog.wal.extents(timeline) {
                let is_needed =
                    needed.iter().any(|need| !intersection(*need, extent.name.range).is_empty());
                if !is_needed && !is_recent(&extent, recent_since) {
                    deleted.add(&extent);
                }
            }
            (deleted.extent_count > 0).then_some(deleted)
        });
        deleted.collect()
    }

    fn remarks(&self) -> Vec<String> {
        let mut remarks: Vec<String> =
            self.missing_held.iter().copied().map(missing_held_remark).collect();
        for timeline in self.catalog.unknown_ancestries() {
            remarks.push(format!(
                "the history file of timeline {timeline} is missing or damaged: no backup goes, and \
                 none of its WAL"
            ));
        }
        for damaged in &self.catalog.damaged {
            let also = damaged.backup.map_or("", |_| ", as is all WAL since it began");
            remarks.push(format!("'{}' cannot be read and is left alone{also}", damaged.object));
        }
        let timelines = self.catalog.wal.timelines();
        let extents = timelines.flat_map(|timeline| self.catalog.wal.extents(timeline));
        let ageless_count = extents.filter(|extent| extent.modified.is_none()).count();
        if ageless_count > 0 {
            remarks.push(format!(
                "the store does not say when {ageless_count} WAL extents were written: they are kept"
            ));
        }
        let RetentionOptions { keep_days, keep_count, pitr_days } = self.options;
        if keep_days.is_none() && keep_count.is_none() && pitr_days.is_some() {
            remarks.push(
                "pitr_days alone deletes no backup: set keep_days or keep_count as well".to_owned(),
            );
        }
        if self.catalog.backups.is_empty() && self.catalog.wal.extent_count() > 0 {
            remarks.push("there is no backup yet: all WAL is kept".to_owned());
        }
        remarks
    }
}

impl DeletedWal {
    /// Extents come by start.
    fn add(&mut self, extent: &StoredExtent) {
        let name = extent.name;
        self.horizon_lsn = self.horizon_lsn.max(name.range.end());
        self.extent_count += 1;
        self.stored_bytes += extent.stored_bytes;
        self.extents.push(name);
        match self.stretches.last_mut() {
            Some(last) if name.range.start() <= last.range.end() => {
                let end = last.range.end().max(name.range.end());
                last.range = range(last.range.start(), end);
            }
            _ => self.stretches.push(Stretch { timeline: self.timeline, range: name.range }),
        }
    }
}

/// Whether an extent was made, or holds a commit of a time, at or after `start`; of one whose age
/// nobody knows that must be feared.
fn is_recent(extent: &StoredExtent, start: Timestamp) -> bool {
    let commit = extent.name.time.and_then(|time| time.to_timestamp());
    extent.modified.is_none_or(|made| made >= start) || commit.is_some_and(|time| time >= start)
}

/// The same positions in as few ranges as possible.
fn merged(mut ranges: Vec<LsnRange>) -> Vec<LsnRange> {
    ranges.sort_unstable();
    let mut merged: Vec<LsnRange> = Vec::new();
    for next in ranges {
        match merged.last_mut() {
            Some(last) if next.start() <= last.end() => {
                *last = range(last.start(), last.end().max(next.end()));
            }
            _ => merged.push(next),
        }
    }
    merged
}

#[cfg(test)]
mod tests;
