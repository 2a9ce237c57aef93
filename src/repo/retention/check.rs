//! The second opinion: what could still be restored if a plan were carried out.
//!
//! Nothing here knows the rules by which the plan was made. It makes the catalog that would be left,
//! asks that for its recoverable intervals, and compares.

use std::collections::BTreeSet;

use jiff::Timestamp;

use crate::error::{Error, Kind, Result};
use crate::pg::TimelineId;

use crate::repo::catalog::{BackupSummary, Catalog};
use crate::repo::interval::Interval;
use crate::repo::names::{BackupId, ExtentName};

use super::{DeletionPlan, days};

/// Proves that `plan`, carried out on `catalog`, breaks nothing that must stay.
///
/// 1. *Window.* Every moment since the window's start that can be recovered now, towards any
///    timeline, can be recovered afterwards; without a window, every moment that can be recovered
///    from a backup that stays.
/// 2. *Chains.* Every backup that stays and can be restored now can be restored afterwards, and so
///    can whatever refers to its packs.
/// 3. *Count and age.* The newest backup stays, and the newest that can be restored; at least
///    `keep_count` that can be restored stay, or all; no backup goes that is held, or younger than
///    `keep_days`.
/// 4. *Newest timeline.* As much of it can be recovered as before.
/// 5. *Scope.* Nothing goes that is not a listed backup or known WAL; nothing of a backup without a
///    manifest, or with one that cannot be read; while the history of a timeline cannot be read, no
///    backup, and no WAL that follows on one; while a held backup is not there, nothing at all.
///
/// # Errors
/// `bug` naming the first promise that would be broken.
pub fn check(catalog: &Catalog, plan: &DeletionPlan) -> Result<()> {
    let gone = plan.deleted_ids();
    let after = left_after(catalog, plan, &gone);
    let comparison = Comparison {
        catalog,
        plan,
        gone: &gone,
        intervals_before: catalog.intervals_towards_all(),
        intervals_after: after.intervals_towards_all(),
        restorable_after: restorable(&after),
    };
    comparison.scope()?;
    comparison.count_and_age()?;
    comparison.chains()?;
    comparison.newest_timeline()?;
    comparison.window()
}

fn left_after(catalog: &Catalog, plan: &DeletionPlan, gone: &BTreeSet<BackupId>) -> Catalog {
    let extents: std::collections::HashSet<ExtentName> =
        plan.wal.iter().flat_map(|wal| wal.extents.iter().copied()).collect();
    Catalog {
        backups: catalog.backups.iter().filter(|b| !gone.contains(&b.id())).cloned().collect(),
        wal: catalog.wal.without(|name| extents.contains(name)),
        histories: catalog.histories.clone(),
        lease: catalog.lease.clone(),
        marks: catalog.marks.clone(),
        ..Catalog::default()
    }
}

fn restorable(catalog: &Catalog) -> BTreeSet<BackupId> {
    let restorable = catalog.backups.iter().filter(|backup| catalog.is_restorable(backup));
    restorable.map(BackupSummary::id).collect()
}

fn broken(promise: impl std::fmt::Display) -> Error {
    Error::new(Kind::Bug, format!("the plan of deletions must not be carried out: {promise}"))
        .hint("Nothing was deleted. Run 'tidemark verify', and report this as a defect.")
}

struct Comparison<'a> {
    catalog: &'a Catalog,
    plan: &'a DeletionPlan,
    gone: &'a BTreeSet<BackupId>,
    intervals_before: Vec<Interval>,
    intervals_after: Vec<Interval>,
    restorable_after: BTreeSet<BackupId>,
}

impl Comparison<'_> {
    fn scope(&self) -> Result<()> {
        let listed: BTreeSet<BackupId> =
            self.catalog.backups.iter().map(BackupSummary::id).collect();
        if let Some(id) = self.gone.difference(&listed).next() {
            return Err(broken(format!("backup '{id}' is not listed")));
        }
        let unlisted = self.catalog.marks.holds.iter().find(|id| {
            let is_damaged = self.catalog.damaged.iter().any(|object| object.backup == Some(**id));
            !listed.contains(id) && !is_damaged
        });
        if let Some(id) = unlisted.filter(|_| !self.plan.is_empty()) {
            return Err(broken(format!("backup '{id}' is held and not there")));
        }
        for id in self.catalog.unknown_backups() {
            if self.takes_wal_since(id) {
                return Err(broken(format!(
                    "backup '{id}', without a manifest that can be read, may need its WAL"
                )));
            }
        }
        let unknown = self.catalog.unknown_ancestries();
        let Some(timeline) = unknown.first() else { return Ok(()) };
        match listed.iter().find(|id| self.gone.contains(id) || self.takes_wal_since(**id)) {
            Some(id) => Err(broken(format!(
                "backup '{id}' and its WAL may lead to timeline {timeline}, of which it is not known \
                 where it began"
            ))),
            None => Ok(()),
        }
    }

    /// Whether WAL goes that was written after the backup began, where it began.
    fn takes_wal_since(&self, id: BackupId) -> bool {
        let of_timeline = self.plan.wal.iter().filter(|wal| wal.timeline == id.timeline());
        let mut extents = of_timeline.flat_map(|wal| &wal.extents);
        extents.any(|name| name.range.end() > id.start_lsn())
    }

    fn count_and_age(&self) -> Result<()> {
        let newest = self.catalog.backups.last().map(BackupSummary::id);
        let restorable = restorable(self.catalog);
        for id in newest.iter().chain(restorable.last()) {
            if self.gone.contains(id) {
                return Err(broken(format!("'{id}' is the newest backup")));
            }
        }
        if !self.gone.is_empty()
            && self.plan.options.keep_days.is_none()
            && self.plan.options.keep_count.is_none()
        {
            return Err(broken("no rule says that a backup may go"));
        }
        let count = self.plan.options.keep_count.map_or(0, |count| count as usize);
        let left = restorable.difference(self.gone).count();
        if left < count.min(restorable.len()) {
            return Err(broken(format!("{left} backups would be left, {count} are to be kept")));
        }
        if let Some(id) = self.catalog.marks.holds.intersection(self.gone).next() {
            return Err(broken(format!("backup '{id}' is held")));
        }
        let age = self.plan.options.keep_days.map(days);
        for backup in self.catalog.backups.iter().filter(|b| self.gone.contains(&b.id())) {
            let old = self.plan.planned_time.duration_since(backup.manifest.end_time);
            if age.is_some_and(|age| old < age) {
                let id = backup.id();
                return Err(broken(format!("backup '{id}' is younger than is to be kept")));
            }
        }
        Ok(())
    }

    fn chains(&self) -> Result<()> {
        let lost = restorable(self.catalog)
            .into_iter()
            .find(|id| !self.gone.contains(id) && !self.restorable_after.contains(id));
        if let Some(id) = lost {
            return Err(broken(format!("backup '{id}' stays but could not be restored")));
        }
        for backup in self.catalog.backups.iter().filter(|b| !self.gone.contains(&b.id())) {
            let id = backup.id();
            if let Some(parent) = backup.manifest.parents.iter().find(|p| self.gone.contains(p)) {
                return Err(broken(format!("backup '{id}' refers to packs of '{parent}'")));
            }
        }
        Ok(())
    }

    fn newest_timeline(&self) -> Result<()> {
        let newest = self.catalog.lineage().timelines().last().copied();
        let end = |intervals: &[Interval]| {
            let towards = intervals.iter().filter(|interval| Some(interval.timeline) == newest);
            towards.map(|interval| interval.until_lsn).max()
        };
        if end(&self.intervals_after) < end(&self.intervals_before) {
            return Err(broken("less of the newest timeline could be recovered"));
        }
        Ok(())
    }

    fn window(&self) -> Result<()> {
        let Some(start) = self.plan.window_start else { return self.reach() };
        for timeline in self.catalog.lineage().timelines() {
            let before = self.moments(&self.intervals_before, timeline, start);
            let after = self.moments(&self.intervals_after, timeline, start);
            for (from, until) in before {
                if !after.iter().any(|(f, u)| *f <= from && until <= *u) {
                    return Err(broken(format!(
                        "times from {from} to {until} on timeline {timeline} could not be \
                         recovered any more"
                    )));
                }
            }
        }
        Ok(())
    }

    /// Without a window: what stays reaches as far as before.
    fn reach(&self) -> Result<()> {
        let stays = |interval: &&Interval| !self.gone.contains(&interval.backup);
        for interval in self.intervals_before.iter().filter(stays) {
            let is_same = |other: &Interval| {
                (other.backup, other.timeline, other.until_lsn)
                    == (interval.backup, interval.timeline, interval.until_lsn)
            };
            if !self.intervals_after.iter().any(is_same) {
                let (id, timeline) = (interval.backup, interval.timeline);
                return Err(broken(format!(
                    "less could be recovered from '{id}' on timeline {timeline}"
                )));
            }
        }
        Ok(())
    }

    /// Maximal stretches of recoverable time since `start` towards `timeline`. The newest timeline
    /// has no end where its WAL ends.
    fn moments(
        &self,
        intervals: &[Interval],
        timeline: TimelineId,
        start: Timestamp,
    ) -> Vec<(Timestamp, Timestamp)> {
        let newest = self.catalog.wal.timelines().last();
        let mut stretches: Vec<(Timestamp, Timestamp)> = intervals
            .iter()
            .filter(|interval| interval.timeline == timeline)
            .map(|interval| {
                let grows = interval.open && newest == Some(timeline);
                let until = if grows { Timestamp::MAX } else { interval.until_time };
                (interval.from_time.max(start), until)
            })
            .filter(|(from, until)| from <= until)
            .collect();
        stretches.sort_unstable();
        let mut joined: Vec<(Timestamp, Timestamp)> = Vec::new();
        for (from, until) in stretches {
            match joined.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(until),
                _ => joined.push((from, until)),
            }
        }
        joined
    }
}
