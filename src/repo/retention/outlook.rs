//! What the rules will take while something reads from the repository: nothing holds that for it.
//!
//! Pure as a plan of deletion is: the catalog of now, seen at a later time. What will be stored meanwhile
//! is not in it; of the next backup only is known that it counts.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};

use super::{Catalog, DeletionPlan, Reason, RetentionOptions, plan};
use crate::repo::names::{BackupId, ExtentName};

/// How far ahead is looked: longer than most restores take.
const HOURS: i64 = 24;

/// What is read, and may go.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// A backup.
    pub backup: BackupId,
    /// Extents of WAL.
    pub extents: &'a BTreeSet<ExtentName>,
}

/// What takes it, within a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// Nothing does.
    Stays,
    /// The backup goes when a newer one is complete.
    BackupAfterNext,
    /// The backup goes from about this time on.
    BackupAt(Timestamp),
    /// WAL does from about this time on, and the backup later or not at all.
    WalAt(Timestamp),
}

impl Outlook {
    /// What the rules `options` take first of what is read, from `now` on.
    #[must_use]
    pub fn of(
        reading: Reading<'_>,
        catalog: &Catalog,
        options: &RetentionOptions,
        now: Timestamp,
    ) -> Self {
        let planned = |options: &RetentionOptions, hour: i64| {
            let time = now.checked_add(SignedDuration::from_hours(hour)).unwrap_or(now);
            plan(catalog, options, time).ok()
        };
        let takes_backup = |plan: &DeletionPlan| plan.deleted_ids().contains(&reading.backup);
        let takes_wal = |plan: &DeletionPlan| {
            let mut taken = plan.wal.iter().flat_map(|wal| &wal.extents);
            taken.any(|extent| reading.extents.contains(extent))
        };
        // What the rules take they take at any later time too.
        let first = |takes: &dyn Fn(&DeletionPlan) -> bool| {
            let hours: Vec<i64> = (0..=HOURS).collect();
            let stays = |hour: &i64| !planned(options, *hour).is_some_and(|plan| takes(&plan));
            let hour = hours.get(hours.partition_point(stays))?;
            now.checked_add(SignedDuration::from_hours(*hour)).ok()
        };
        let last = planned(options, HOURS);
        if last.as_ref().is_some_and(takes_backup)
            && let Some(time) = first(&takes_backup)
        {
            return Self::BackupAt(time);
        }
        if last.as_ref().is_some_and(takes_wal)
            && let Some(time) = first(&takes_wal)
        {
            return Self::WalAt(time);
        }
        // One more backup is one less of those that are there by count, and none is the newest for ever.
        let fewer = options.keep_count.map(|count| count.saturating_sub(1));
        let next = planned(&RetentionOptions { keep_count: fewer, ..options.clone() }, HOURS);
        let stays = next.is_none_or(|plan| {
            let kept = plan.keep.iter().find(|kept| kept.id == reading.backup);
            kept.is_some_and(|kept| kept.reasons != [Reason::Newest].into())
        });
        if stays { Self::Stays } else { Self::BackupAfterNext }
    }
}
