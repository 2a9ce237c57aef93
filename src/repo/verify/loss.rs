//! What a bad object costs: what could be recovered with it, and cannot without.

use std::collections::BTreeSet;
use std::fmt;

use jiff::Timestamp;
use serde::Serialize;

use crate::pg::{LsnRange, TimelineId};
use crate::repo::ClusterName;
use crate::repo::catalog::Catalog;
use crate::repo::coverage::serialize_range;
use crate::repo::interval::{Interval, recoverable_times};
use crate::repo::names::{BackupId, ExtentName, Object};
use crate::store::ObjectName;

use super::Defect;

/// Something that is lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// This backup cannot be restored.
    Backup(BackupId),
    /// Times that nothing else can recover.
    Times {
        /// Towards this timeline.
        timeline: TimelineId,
        /// First time that is lost.
        from: Timestamp,
        /// Last time that is lost.
        until: Timestamp,
    },
    /// WAL that no other extent holds.
    Wal {
        /// Its timeline.
        timeline: TimelineId,
        /// Its positions.
        #[serde(serialize_with = "serialize_range")]
        range: LsnRange,
    },
    /// Recovery from backups of other timelines towards this one.
    Descent(TimelineId),
    /// Nothing can be recovered any less.
    Nothing,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::Backup(id) => write!(f, "backup {id} cannot be restored"),
            Loss::Times { timeline, from, until } => {
                write!(f, "times from {from} to {until} on timeline {timeline}")
            }
            Loss::Wal { timeline, range } => write!(f, "WAL {range} of timeline {timeline}"),
            Loss::Descent(timeline) => {
                write!(f, "recovery to timeline {timeline} from backups of its ancestors")
            }
            Loss::Nothing => f.write_str("nothing: all that could be recovered still can"),
        }
    }
}

/// The catalog without these backups and extents.
pub(super) fn left_without(
    catalog: &Catalog,
    backups: &BTreeSet<BackupId>,
    extents: &BTreeSet<ExtentName>,
) -> Catalog {
    let mut left = catalog.clone();
    left.backups.retain(|backup| {
        let parents = &backup.manifest.parents;
        !backups.contains(&backup.id()) && !parents.iter().any(|id| backups.contains(id))
    });
    left.wal = catalog.wal.without(|name| extents.contains(name));
    left
}

/// The catalog as it would be if every pack were there: what a missing one costs is then seen.
pub(super) fn as_if_sound(catalog: &Catalog) -> Catalog {
    let mut sound = catalog.clone();
    for backup in &mut sound.backups {
        backup.objects.bad_packs.clear();
    }
    sound
}

/// What is lost by one defect alone.
pub(super) fn of(catalog: &Catalog, defect: &Defect, cluster: &ClusterName) -> Vec<Loss> {
    let object = ObjectName::new(defect.object.clone()).ok();
    let object = object.and_then(|name| Object::parse(cluster, &name));
    let mut backups = BTreeSet::new();
    let mut extents = BTreeSet::new();
    let mut lost = Vec::new();
    backups.extend(defect.backup);
    match object {
        Some(Object::Extent(name)) => {
            extents.insert(name);
        }
        Some(Object::History(timeline)) => lost.push(Loss::Descent(timeline)),
        _ => {}
    }
    let left = left_without(catalog, &backups, &extents);
    let listed = catalog.backups.iter().map(|backup| backup.id());
    let still: BTreeSet<BackupId> = left.backups.iter().map(|backup| backup.id()).collect();
    lost.extend(listed.filter(|id| !still.contains(id)).map(Loss::Backup));
    if let Some(id) = defect.backup.filter(|_| lost.is_empty()) {
        lost.push(Loss::Backup(id));
    }
    for name in &extents {
        if let Err(gap) = left.wal.cover(name.timeline, name.range) {
            lost.push(Loss::Wal { timeline: name.timeline, range: gap.missing });
        }
    }
    lost.extend(times(&catalog.intervals(), &left.intervals()));
    if lost.is_empty() {
        lost.push(Loss::Nothing);
    }
    lost
}

/// Times that `before` recovers and `after` does not.
fn times(before: &[Interval], after: &[Interval]) -> Vec<Loss> {
    let timelines: BTreeSet<TimelineId> = before.iter().map(|interval| interval.timeline).collect();
    let mut lost = Vec::new();
    for timeline in timelines {
        let after = recoverable_times(after, timeline);
        for (mut from, until) in recoverable_times(before, timeline) {
            for (kept_from, kept_until) in &after {
                if *kept_until <= from || *kept_from >= until {
                    continue;
                }
                if from < *kept_from {
                    lost.push(Loss::Times { timeline, from, until: *kept_from });
                }
                from = from.max(*kept_until);
            }
            if from < until {
                lost.push(Loss::Times { timeline, from, until });
            }
        }
    }
    lost
}
