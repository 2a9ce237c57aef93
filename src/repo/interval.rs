//! From where to where a cluster can be restored: WAL followed along timeline histories.
//!
//! In: the WAL that is there ([`WalCatalog`]), the histories, a backup. Out: the stretch that can be
//! replayed from it towards a timeline, the extents to read for it, and the holes. Pure.
//!
//! # Invariants
//! - A backup reaches a target timeline only if it began and ended on that timeline's path, and its
//!   own WAL from start to end is there without a hole. This is what PostgreSQL demands at start-up
//!   ("requested timeline is not a child of this server's history", "WAL ends before end of online
//!   backup").
//! - Where the server went on with `wal_level = minimal`, or its own WAL is damaged, what can be restored
//!   from a backup that began before ends (see [`super::marks`]).
//! - WAL past a fork belongs to the branch: what an ancestor wrote after the switch point is never
//!   part of a descendant's path.
//! - Just before a switch point the new timeline may hold the bytes as well: a promoted server copies
//!   the last segment of the old timeline (`XLogFileCopy`), and a capture that begins there stores
//!   them under the new one. They are equal, so either will do.
//!
//! # Source
//! `StartupXLOG`, `readRecoverySignalFile`, `tliOfPointInHistory` in
//! `src/backend/access/transam/{xlog,xlogrecovery,timeline}.c`.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use crate::pg::{Lsn, LsnRange, PgTime, TimelineHistory, TimelineId, timeline::PathPart};

use super::coverage::{Gap, WalCatalog, intersection, range, serialize_range};
use super::marks::{Barrier, BarrierKind};
use super::names::{BackupId, ExtentName};

/// What a complete backup needs and when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackupSpan {
    /// The backup; its id says where it began.
    pub id: BackupId,
    /// The timeline it ended on.
    pub end_timeline: TimelineId,
    /// First position a restore may stop at: everything before must be replayed.
    pub end_lsn: Lsn,
    /// When it ended, by the clock of the host that took it.
    pub end_time: Timestamp,
}

/// A stretch of the WAL's past that can be reached from one backup towards one timeline.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Interval {
    /// The target timeline.
    pub timeline: TimelineId,
    /// The backup to begin from.
    pub backup: BackupId,
    /// Earliest position that can be restored: the backup's end.
    pub from_lsn: Lsn,
    /// End of the contiguous WAL.
    pub until_lsn: Lsn,
    /// Earliest time that can be restored: the backup's end, or the greatest commit time known in its own
    /// WAL where that is later because the server's clock is ahead of this host's.
    pub from_time: Timestamp,
    /// Greatest time up to which all commits are known to be there. Before `from_time` where nothing
    /// is known of the time after the backup yet: then only its end and the end of the WAL can be aimed
    /// at, and no moment.
    pub until_time: Timestamp,
    /// Whether the WAL reaches the target timeline itself. Where it does not, the interval tells
    /// nothing that one of an ancestor does not tell, but for WAL that only descendants hold.
    pub arrived: bool,
    /// Whether it ends where the target timeline's WAL ends and grows as WAL arrives.
    pub open: bool,
    /// Which WAL is read from which timeline, from the backup's start to `until_lsn`.
    pub path: Vec<Stretch>,
}

/// WAL of one timeline on a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Stretch {
    /// The timeline of the path at this place.
    pub timeline: TimelineId,
    /// The positions.
    #[serde(serialize_with = "serialize_range")]
    pub range: LsnRange,
}

/// An extent to read and which of its bytes to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The extent.
    pub extent: ExtentName,
    /// The bytes of it that the path takes; pieces follow on one another without holes or overlaps.
    pub part: LsnRange,
}

/// WAL that is missing between WAL that is there, and what its neighbours say about its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct WalGap {
    /// What is missing.
    #[serde(flatten)]
    pub gap: Gap,
    /// Newest commit known before it.
    pub last_commit_before: Option<Timestamp>,
    /// Greatest commit time of the first extent with a commit after it.
    pub commit_after: Option<Timestamp>,
    /// Whether retention removed it on purpose; otherwise it was lost.
    pub expired: bool,
    /// Nothing is missing, but only a backup taken later leads on; with [`BarrierKind::Minimal`] the range
    /// is empty, with [`BarrierKind::Damaged`] it is what cannot be read of the server's WAL.
    pub barrier: Option<BarrierKind>,
    /// Whether it may still be filled: a writer at work has not come so far yet.
    pub in_flight: bool,
}

impl WalGap {
    /// Whether what is missing is gone though nobody meant it to be.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        !self.expired && !self.in_flight
    }
}

/// The WAL and how timelines descend from one another.
#[derive(Clone, Copy, Debug)]
pub struct Lineage<'a> {
    /// What is there.
    pub wal: &'a WalCatalog,
    /// The history files that are there.
    pub histories: &'a BTreeMap<TimelineId, TimelineHistory>,
    /// Places that only a backup taken later leads past ([`super::marks::Marks::barriers`]).
    pub barriers: &'a BTreeSet<(TimelineId, Barrier)>,
}

impl Lineage<'_> {
    /// Whether the ancestors of `timeline` are known: every timeline but the first needs its history
    /// file.
    #[must_use]
    pub fn knows(&self, timeline: TimelineId) -> bool {
        timeline == TimelineId::FIRST || self.histories.contains_key(&timeline)
    }

    /// The stretches of WAL that lead to `timeline`, oldest first; only its own when its ancestors
    /// are not known.
    #[must_use]
    pub fn path(&self, timeline: TimelineId) -> Vec<PathPart> {
        self.histories
            .get(&timeline)
            .map_or_else(|| TimelineHistory::first_timeline_only(timeline).path(), |h| h.path())
    }

    /// All timelines that are known by WAL or by a history file.
    #[must_use]
    pub fn timelines(&self) -> BTreeSet<TimelineId> {
        self.wal.timelines().chain(self.histories.keys().copied()).collect()
    }

    /// Whether the byte at `position` of `timeline` is on the way to `target`.
    #[must_use]
    pub fn is_on_path(&self, target: TimelineId, timeline: TimelineId, position: Lsn) -> bool {
        part_at(&self.path(target), position).is_some_and(|part| part.timeline == timeline)
    }

    /// The contiguous WAL from `from` towards `target` that a backup which begins there can replay, at
    /// most to `limit`.
    #[must_use]
    pub fn walk(&self, target: TimelineId, from: Lsn, limit: Lsn) -> Vec<Stretch> {
        let path = self.path(target);
        let barrier = barrier_after(&path, self.barriers, from);
        let limit = barrier.map_or(limit, |(lsn, _)| lsn.min(limit));
        let mut stretches = Vec::new();
        let mut position = from;
        for (index, part) in path.iter().enumerate() {
            let end = part.end.map_or(limit, |end| end.min(limit));
            if end <= position {
                continue;
            }
            let reached = self.reached(path.get(index..).unwrap_or_default(), position, end);
            if reached > position {
                stretches
                    .push(Stretch { timeline: part.timeline, range: range(position, reached) });
                position = reached;
            }
            if position < end {
                break;
            }
        }
        stretches
    }

    /// End of the contiguous WAL from `position` within the first of `parts`, at most `limit`; bytes
    /// may be held under any of the timelines that follow.
    fn reached(&self, parts: &[PathPart], mut position: Lsn, limit: Lsn) -> Lsn {
        loop {
            let ends = parts.iter().map(|part| self.wal.contiguous_end(part.timeline, position));
            let end = ends.max().unwrap_or(position).min(limit);
            if end <= position {
                return position;
            }
            position = end;
        }
    }

    /// The extents that hold `wanted` on the way to `target`.
    ///
    /// # Errors
    /// The first hole.
    pub fn cover(&self, target: TimelineId, wanted: LsnRange) -> Result<Vec<Piece>, Gap> {
        let path = self.path(target);
        let mut pieces = Vec::new();
        let mut position = wanted.start();
        for (index, part) in path.iter().enumerate() {
            let end = part.end.map_or(wanted.end(), |end| end.min(wanted.end()));
            let holders = path.get(index..).unwrap_or_default();
            while position < end {
                // The path's own timeline first, for as far as it reaches.
                let reach = |holder: &PathPart| {
                    let reached = self.wal.contiguous_end(holder.timeline, position).min(end);
                    (reached > position).then_some((holder.timeline, reached))
                };
                let Some((holder, reached)) = holders.iter().find_map(reach) else {
                    let own = range(position, end);
                    let missing =
                        self.wal.cover(part.timeline, own).map_or_else(|gap| gap.missing, |_| own);
                    return Err(Gap { timeline: part.timeline, missing });
                };
                for extent in self.wal.cover(holder, range(position, reached))? {
                    let part = range(position, extent.range.end().min(reached));
                    pieces.push(Piece { extent, part });
                    position = part.end();
                }
            }
        }
        Ok(pieces)
    }

    /// Whether the backup began and ended on the way to `target`.
    #[must_use]
    pub fn descends_from(&self, target: TimelineId, backup: &BackupSpan) -> bool {
        let start = backup.id.start_lsn();
        let last = Lsn(backup.end_lsn.0.saturating_sub(1)).max(start);
        self.is_on_path(target, backup.id.timeline(), start)
            && self.is_on_path(target, backup.end_timeline, last)
    }

    /// Whether the WAL from the backup's start to its end is there, so that it can be restored to
    /// its own end at least.
    #[must_use]
    pub fn is_complete(&self, backup: &BackupSpan) -> bool {
        self.timelines().into_iter().any(|target| {
            let stretches = || self.walk(target, backup.id.start_lsn(), backup.end_lsn);
            let reached = || stretches().last().map(|stretch| stretch.range.end());
            self.descends_from(target, backup) && reached() == Some(backup.end_lsn)
        })
    }

    /// What can be restored from `backup` towards `target`.
    #[must_use]
    pub fn interval(&self, backup: &BackupSpan, target: TimelineId) -> Option<Interval> {
        if !self.descends_from(target, backup) {
            return None;
        }
        let stretches = self.walk(target, backup.id.start_lsn(), Lsn(u64::MAX));
        let until_lsn = stretches.last().map(|stretch| stretch.range.end())?;
        let arrived = stretches.last().is_some_and(|stretch| stretch.timeline == target);
        if until_lsn < backup.end_lsn {
            return None;
        }
        let barrier = barrier_after(&self.path(target), self.barriers, backup.id.start_lsn());
        let ends_for_good = barrier.is_some_and(|(lsn, _)| lsn <= until_lsn);
        let at_tip = self.wal.last_end(target).is_none_or(|end| end <= until_lsn);
        let newest = stretches.iter().filter_map(|stretch| self.newest_commit(target, stretch));
        let own = stretches.iter().filter_map(|stretch| {
            let range = intersection(stretch.range, range(backup.id.start_lsn(), backup.end_lsn));
            self.newest_commit(target, &Stretch { range, ..*stretch })
        });
        // Its own end is known by our clock alone: a commit of that moment may lie behind the WAL.
        let began = backup.id.start_time();
        let until_time = newest.max().map_or(began, |time| time.max(began));
        Some(Interval {
            timeline: target,
            backup: backup.id,
            from_lsn: backup.end_lsn,
            until_lsn,
            from_time: own.max().map_or(backup.end_time, |time| time.max(backup.end_time)),
            until_time,
            arrived,
            open: arrived && at_tip && !ends_for_good,
            path: stretches,
        })
    }

    /// Greatest commit time of the extents inside a stretch of the path to `target`, whichever of
    /// the path's timelines holds them.
    fn newest_commit(&self, target: TimelineId, stretch: &Stretch) -> Option<Timestamp> {
        let path = self.path(target);
        let holders = path.iter().skip_while(|part| part.timeline != stretch.timeline);
        let times =
            holders.filter_map(|holder| self.wal.newest_commit_in(holder.timeline, stretch.range));
        times.max()?.to_timestamp()
    }

    /// The holes between WAL that is there, on the way to every known timeline, each once.
    #[must_use]
    pub fn gaps(&self) -> BTreeSet<Gap> {
        self.timelines().into_iter().flat_map(|target| self.gaps_towards(target)).collect()
    }

    /// Where the WAL goes on but only a backup taken later does, each once.
    pub(super) fn barriers_within(&self) -> impl Iterator<Item = (Gap, BarrierKind)> {
        let timelines = self.timelines();
        let is_within_wal = move |timeline: TimelineId, lsn: Lsn| {
            timelines.iter().map(|target| self.path(*target)).any(|path| {
                let all = path.iter().flat_map(|part| {
                    let whole = range(part.start, part.end.unwrap_or(Lsn(u64::MAX)));
                    self.runs_within(std::slice::from_ref(part), whole)
                });
                let (mut before, mut behind) = (false, false);
                for run in all {
                    before |= run.start() < lsn;
                    behind |= run.end() > lsn;
                }
                before && behind && is_held_on(&path, timeline, lsn)
            })
        };
        let all = self.barriers.iter();
        // A server that is asked again for a segment it has damaged may tell of a part of it.
        let is_told_before = |(timeline, barrier): &(TimelineId, Barrier)| {
            let (start, end) = (barrier.range.start(), barrier.range.end());
            self.barriers.iter().any(|(other, wider)| {
                (other, wider.kind) == (timeline, barrier.kind)
                    && wider != barrier
                    && wider.range.start() <= start
                    && end <= wider.range.end()
            })
        };
        let within = all.filter(move |known @ (timeline, barrier)| {
            is_within_wal(*timeline, barrier.range.start()) && !is_told_before(known)
        });
        within.map(|(timeline, barrier)| {
            (Gap { timeline: *timeline, missing: barrier.range }, barrier.kind)
        })
    }

    fn gaps_towards(&self, target: TimelineId) -> Vec<Gap> {
        let path = self.path(target);
        let mut gaps = Vec::new();
        // Holes that count only once something lies behind them.
        let mut pending = Vec::new();
        let mut begun = false;
        for (index, part) in path.iter().enumerate() {
            let whole = range(part.start, part.end.unwrap_or(Lsn(u64::MAX)));
            let holders = path.get(index..).unwrap_or_default();
            let mut position = whole.start();
            for run in self.runs_within(holders, whole) {
                if run.start() > position && begun {
                    pending.push(Gap {
                        timeline: part.timeline,
                        missing: range(position, run.start()),
                    });
                }
                gaps.append(&mut pending);
                begun = true;
                position = position.max(run.end());
            }
            if begun && position < whole.end() {
                pending
                    .push(Gap { timeline: part.timeline, missing: range(position, whole.end()) });
            }
        }
        gaps
    }

    /// Covered ranges inside `within`, held under any of the timelines, by start.
    fn runs_within(&self, holders: &[PathPart], within: LsnRange) -> Vec<LsnRange> {
        let runs = holders.iter().flat_map(|holder| self.wal.coverage(holder.timeline));
        let mut runs: Vec<LsnRange> =
            runs.map(|run| intersection(*run, within)).filter(|run| !run.is_empty()).collect();
        runs.sort_unstable();
        runs
    }

    /// Newest commit known before a hole and the first time known after it.
    pub(super) fn times_around(&self, gap: &Gap) -> (Option<Timestamp>, Option<Timestamp>) {
        let timeline = gap.timeline;
        let runs = self.wal.coverage(timeline);
        let before = range(Lsn(0), gap.missing.start());
        let before = runs.iter().rev().map(|run| intersection(*run, before));
        let before = before.clone().find_map(|run| self.wal.newest_commit_in(timeline, run));
        let behind = range(gap.missing.end(), Lsn(u64::MAX));
        let after = self.wal.extents_in(timeline, behind).find_map(|extent| extent.name.time);
        let shown = |time: Option<PgTime>| time.and_then(PgTime::to_timestamp);
        (shown(before), shown(after))
    }
}

/// Maximal stretches of time that some of `intervals` can recover towards `timeline`, ascending.
pub(super) fn recoverable_times(
    intervals: &[Interval],
    timeline: TimelineId,
) -> Vec<(Timestamp, Timestamp)> {
    let towards = intervals.iter().filter(|interval| interval.timeline == timeline);
    let mut stretches: Vec<(Timestamp, Timestamp)> =
        towards.map(|interval| (interval.from_time, interval.until_time)).collect();
    stretches.retain(|(from, until)| from <= until);
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

/// The first position from `from` on along `path` that a backup which begins at `from` does not lead
/// past, and why.
pub(crate) fn barrier_after(
    path: &[PathPart],
    barriers: &BTreeSet<(TimelineId, Barrier)>,
    from: Lsn,
) -> Option<(Lsn, BarrierKind)> {
    let ahead = |(timeline, barrier): &(TimelineId, Barrier)| {
        let start = barrier.range.start();
        let end = end_on(path, *timeline, barrier)?;
        let is_ahead = from <= start || from < end;
        (is_ahead && is_held_on(path, *timeline, start)).then(|| (start.max(from), barrier.kind))
    };
    barriers.iter().filter_map(ahead).min()
}

/// End of what `path` reads before `position` and nothing is known of, because it is damaged.
pub(crate) fn damage_before(
    path: &[PathPart],
    barriers: &BTreeSet<(TimelineId, Barrier)>,
    position: Lsn,
) -> Option<Lsn> {
    let behind = |(timeline, barrier): &(TimelineId, Barrier)| {
        let start = barrier.range.start();
        let is_behind = barrier.kind == BarrierKind::Damaged && start < position;
        (is_behind && is_held_on(path, *timeline, start))
            .then(|| end_on(path, *timeline, barrier))
            .flatten()
    };
    barriers.iter().filter_map(behind).max()
}

/// Where a barrier that `timeline` holds ends on `path`: a timeline that goes on elsewhere leaves the rest of
/// a damaged segment behind.
fn end_on(path: &[PathPart], timeline: TimelineId, barrier: &Barrier) -> Option<Lsn> {
    let (start, end) = (barrier.range.start(), barrier.range.end());
    let part = part_at(path, start)?;
    let switch = part.end.filter(|_| part.timeline == timeline);
    Some(switch.map_or(end, |switch| switch.min(end)))
}

/// Whether what `timeline` holds at `position` belongs to `path`: it is the timeline of that place, or a
/// later one, whose first segment begins with a copy of its parent's.
fn is_held_on(path: &[PathPart], timeline: TimelineId, position: Lsn) -> bool {
    let part = path
        .iter()
        .position(|part| part.start <= position && part.end.is_none_or(|end| position < end));
    let holders = part.and_then(|part| path.get(part..)).unwrap_or_default();
    holders.iter().any(|holder| holder.timeline == timeline)
}

/// The part of a path that holds the byte at `position`.
fn part_at(path: &[PathPart], position: Lsn) -> Option<&PathPart> {
    path.iter().find(|part| part.start <= position && part.end.is_none_or(|end| position < end))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::coverage::tests::{extent, timeline};
    use super::*;

    fn history(number: u32, switches: &[(u32, u64)]) -> (TimelineId, TimelineHistory) {
        let lines = switches.iter().map(|(parent, lsn)| format!("{parent}\t{}\ttest\n", Lsn(*lsn)));
        let text: String = lines.collect();
        let id = timeline(number);
        (id, TimelineHistory::decode(id, text.as_bytes()).unwrap())
    }

    fn span(number: u32, start: u64, end: u64) -> BackupSpan {
        BackupSpan {
            id: BackupId::new(Timestamp::UNIX_EPOCH, timeline(number), Lsn(start)),
            end_timeline: timeline(number),
            end_lsn: Lsn(end),
            end_time: Timestamp::UNIX_EPOCH,
        }
    }

    fn lineage<'a>(
        wal: &'a WalCatalog,
        histories: &'a BTreeMap<TimelineId, TimelineHistory>,
    ) -> Lineage<'a> {
        static NONE: BTreeSet<(TimelineId, Barrier)> = BTreeSet::new();
        Lineage { wal, histories, barriers: &NONE }
    }

    /// Timeline 2 left 1 at 150 and 3 left 2 at 300; 1 went on after the fork.
    fn forked() -> (WalCatalog, BTreeMap<TimelineId, TimelineHistory>) {
        let wal = WalCatalog::new([
            extent(1, 0, 100, 10),
            extent(1, 100, 180, 99),
            extent(2, 150, 300, 30),
            extent(3, 300, 320, 40),
            extent(3, 330, 400, 50),
        ]);
        (wal, [history(2, &[(1, 150)]), history(3, &[(1, 150), (2, 300)])].into())
    }

    fn stretches(interval: &Interval) -> Vec<(u32, u64, u64)> {
        let parts = interval.path.iter();
        parts.map(|s| (s.timeline.get(), s.range.start().0, s.range.end().0)).collect()
    }

    #[test]
    fn a_backup_reaches_every_timeline_that_descends_from_it() {
        let (wal, histories) = forked();
        let lineage = lineage(&wal, &histories);
        let backup = span(1, 20, 60);
        let to = |number| lineage.interval(&backup, timeline(number)).unwrap();
        assert_eq!(stretches(&to(1)), [(1, 20, 180)]);
        assert!(to(1).open);
        assert_eq!(stretches(&to(2)), [(1, 20, 150), (2, 150, 300)]);
        assert_eq!(stretches(&to(3)), [(1, 20, 150), (2, 150, 300), (3, 300, 320)]);
        assert!(!to(3).open, "it ends at the hole");
        assert_eq!((to(3).from_lsn, to(3).until_lsn), (Lsn(60), Lsn(320)));
    }

    #[test]
    fn no_time_is_promised_that_is_before_a_commit_in_the_backups_own_wal() {
        let minute = |minute: i64| PgTime(minute * 60_000_000);
        let at = |time: PgTime| time.to_timestamp().unwrap();
        let wal = WalCatalog::new([
            extent(1, 0, 10, minute(4).0),
            extent(1, 10, 30, minute(10).0),
            extent(1, 30, 40, minute(12).0),
        ]);
        let none = BTreeMap::new();
        let from = |end, minutes| {
            let backup = BackupSpan { end_time: at(minute(minutes)), ..span(1, 2, end) };
            lineage(&wal, &none).interval(&backup, timeline(1)).unwrap().from_time
        };
        assert_eq!(from(10, 0), at(minute(4)), "the server's clock is ahead");
        assert_eq!(from(10, 5), at(minute(5)));
        // The commit of an extent that reaches beyond the backup may lie behind its end.
        assert_eq!(from(29, 0), at(minute(4)));
        assert_eq!(from(30, 0), at(minute(10)));
    }

    #[test]
    fn a_commit_past_the_fork_does_not_count_for_the_branch() {
        let (wal, histories) = forked();
        let lineage = lineage(&wal, &histories);
        let until =
            |number| lineage.interval(&span(1, 0, 60), timeline(number)).unwrap().until_time;
        assert_eq!(until(1), PgTime(99).to_timestamp().unwrap());
        assert_eq!(until(2), PgTime(30).to_timestamp().unwrap());
    }

    #[test]
    fn a_backup_that_ran_across_the_fork_or_past_it_does_not_reach_the_branch() {
        let (wal, histories) = forked();
        let lineage = lineage(&wal, &histories);
        assert_eq!(lineage.interval(&span(1, 120, 151), timeline(2)), None);
        assert!(lineage.interval(&span(1, 120, 150), timeline(2)).is_some());
        assert!(lineage.interval(&span(1, 120, 151), timeline(1)).is_some());
        assert_eq!(lineage.interval(&span(1, 160, 170), timeline(2)), None);
        // A standby's backup may follow its server across the fork.
        let followed = BackupSpan { end_timeline: timeline(2), ..span(1, 120, 200) };
        assert!(lineage.interval(&followed, timeline(2)).is_some());
        assert_eq!(lineage.interval(&followed, timeline(1)), None);
    }

    #[test]
    fn a_backup_whose_own_wal_has_a_hole_reaches_nothing() {
        let (wal, histories) = forked();
        let lineage = lineage(&wal, &histories);
        assert_eq!(lineage.interval(&span(3, 310, 350), timeline(3)), None);
        assert_eq!(lineage.interval(&span(3, 340, 401), timeline(3)), None);
        assert!(lineage.interval(&span(3, 340, 400), timeline(3)).is_some());
    }

    #[test]
    fn holes_are_reported_once_and_only_between_wal_that_is_there() {
        let (wal, histories) = forked();
        let gaps = lineage(&wal, &histories).gaps();
        let hole = Gap { timeline: timeline(3), missing: range(Lsn(320), Lsn(330)) };
        assert_eq!(gaps.into_iter().collect::<Vec<_>>(), [hole]);
        // The end of the old timeline is lost only when the new one has WAL.
        let histories = [history(2, &[(1, 150)])].into();
        let wal = WalCatalog::new([extent(1, 0, 140, 0)]);
        assert!(lineage(&wal, &histories).gaps().is_empty());
        let wal = WalCatalog::new([extent(1, 0, 140, 0), extent(2, 150, 160, 0)]);
        let hole = Gap { timeline: timeline(1), missing: range(Lsn(140), Lsn(150)) };
        let gaps = lineage(&wal, &histories).gaps();
        assert_eq!(gaps.into_iter().collect::<Vec<_>>(), [hole]);
    }

    #[test]
    fn bytes_before_the_switch_point_may_be_held_by_the_new_timeline() {
        let histories = [history(2, &[(1, 150)])].into();
        let wal = WalCatalog::new([extent(1, 0, 130, 0), extent(2, 128, 200, 0)]);
        let lineage = lineage(&wal, &histories);
        assert!(lineage.gaps().is_empty());
        let pieces = lineage.cover(timeline(2), range(Lsn(10), Lsn(190))).unwrap();
        let pieces: Vec<_> = pieces
            .iter()
            .map(|p| (p.extent.timeline.get(), p.part.start().0, p.part.end().0))
            .collect();
        assert_eq!(pieces, [(1, 10, 130), (2, 130, 150), (2, 150, 190)]);
        let interval = lineage.interval(&span(1, 10, 20), timeline(2)).unwrap();
        assert_eq!(stretches(&interval), [(1, 10, 150), (2, 150, 200)]);
    }

    #[test]
    fn an_unknown_ancestry_is_not_guessed() {
        let wal = WalCatalog::new([extent(1, 0, 150, 0), extent(2, 150, 200, 0)]);
        let none = BTreeMap::new();
        let lineage = lineage(&wal, &none);
        assert!(!lineage.knows(timeline(2)) && lineage.knows(timeline(1)));
        assert_eq!(lineage.interval(&span(1, 10, 20), timeline(2)), None);
        assert!(lineage.interval(&span(2, 150, 160), timeline(2)).is_some());
    }

    #[test]
    fn no_backup_leads_past_a_place_where_the_server_left_changes_out_of_its_wal() {
        let (wal, histories) = forked();
        let barriers = [120, 170].map(|lsn| (timeline(1), Barrier::minimal(Lsn(lsn)))).into();
        let lineage = Lineage { barriers: &barriers, ..lineage(&wal, &histories) };
        let to = |backup: BackupSpan, number| {
            let interval = lineage.interval(&backup, timeline(number));
            interval.map(|found| (found.until_lsn.0, found.arrived, found.open))
        };
        let before = span(1, 20, 60);
        assert_eq!(to(before, 1), Some((120, true, false)));
        assert_eq!(to(before, 2), Some((120, false, false)), "it never comes to the fork");
        // Taken after the first, it leads to the branch that left before the second.
        let after = span(1, 121, 130);
        assert_eq!(to(after, 1), Some((170, true, false)));
        assert_eq!(to(after, 2), Some((300, true, true)));
        let across = span(1, 100, 130);
        assert!(to(across, 1).is_none() && !lineage.is_complete(&across));
        let shown: Vec<_> = lineage.barriers_within().map(|(gap, _)| gap.missing).collect();
        assert_eq!(shown, [range(Lsn(120), Lsn(120)), range(Lsn(170), Lsn(170))]);
        let (before, after) =
            lineage.times_around(&Gap { timeline: timeline(1), missing: shown[0] });
        assert_eq!((before, after), (PgTime(10).to_timestamp(), PgTime(99).to_timestamp()));
    }

    #[test]
    fn a_mark_where_no_wal_lies_yet_or_any_more_is_no_gap_and_what_ends_there_does_not_grow() {
        let wal = WalCatalog::new([extent(1, 50, 100, 0)]);
        let none = BTreeMap::new();
        let barriers = [50, 100].map(|lsn| (timeline(1), Barrier::minimal(Lsn(lsn)))).into();
        let lineage = Lineage { barriers: &barriers, ..lineage(&wal, &none) };
        assert_eq!(lineage.barriers_within().count(), 0);
        let interval = lineage.interval(&span(1, 60, 70), timeline(1)).unwrap();
        assert_eq!((interval.until_lsn, interval.open), (Lsn(100), false));
    }

    #[test]
    fn a_copy_of_the_parents_wal_tells_where_changes_were_left_out_too() {
        let histories = [history(2, &[(1, 150)])].into();
        let wal = WalCatalog::new([extent(1, 0, 130, 0), extent(2, 128, 200, 0)]);
        let barriers = [(timeline(2), Barrier::minimal(Lsn(140)))].into();
        let lineage = Lineage { barriers: &barriers, ..lineage(&wal, &histories) };
        let until =
            |target| lineage.interval(&span(1, 10, 20), timeline(target)).unwrap().until_lsn;
        assert_eq!((until(2), until(1)), (Lsn(140), Lsn(130)));
    }

    #[test]
    fn no_backup_from_before_the_end_of_damaged_wal_leads_past_its_start() {
        let (wal, histories) = forked();
        let damaged = Barrier::damaged(range(Lsn(120), Lsn(160)));
        let barriers = [(timeline(1), damaged)].into();
        let lineage = Lineage { barriers: &barriers, ..lineage(&wal, &histories) };
        let to = |start: u64, target| {
            let interval = lineage.interval(&span(1, start, start + 2), timeline(target));
            interval.map(|found| (found.until_lsn.0, found.arrived, found.open))
        };
        for (start, until) in
            [(20, Some(120)), (119, None), (120, None), (140, None), (159, None), (160, Some(180))]
        {
            assert_eq!(to(start, 1).map(|found| found.0), until, "from {start}");
        }
        assert_eq!(to(20, 2), Some((120, false, false)));
        // What the rest of the segment holds on a timeline that left before is its own.
        let on_branch = lineage.interval(&span(2, 150, 155), timeline(2)).unwrap();
        assert_eq!((on_branch.until_lsn, on_branch.open), (Lsn(300), true));
        let shown: Vec<_> = lineage.barriers_within().collect();
        let gap = Gap { timeline: timeline(1), missing: damaged.range };
        assert_eq!(shown, [(gap, BarrierKind::Damaged)]);
        // A part of it that was told again is the same gap.
        let part = Barrier::damaged(range(Lsn(130), Lsn(160)));
        let barriers = [(timeline(1), damaged), (timeline(1), part)].into();
        let lineage = Lineage { barriers: &barriers, ..lineage };
        assert_eq!(lineage.barriers_within().collect::<Vec<_>>(), shown);
    }

    #[test]
    fn a_damaged_copy_of_the_parents_wal_bars_what_follows_in_its_segment() {
        let histories = [history(2, &[(1, 150)])].into();
        let wal = WalCatalog::new([extent(1, 0, 130, 0), extent(2, 128, 300, 0)]);
        let barriers = [(timeline(2), Barrier::damaged(range(Lsn(140), Lsn(200))))].into();
        let lineage = Lineage { barriers: &barriers, ..lineage(&wal, &histories) };
        assert!(lineage.interval(&span(2, 160, 170), timeline(2)).is_none());
        assert!(lineage.interval(&span(2, 200, 210), timeline(2)).is_some());
        let path = lineage.path(timeline(2));
        assert_eq!(damage_before(&path, &barriers, Lsn(140)), None);
        assert_eq!(damage_before(&path, &barriers, Lsn(141)), Some(Lsn(200)));
    }

    proptest! {
        /// Cover and walk against a map of single bytes over a random tree of timelines.
        #[test]
        fn walking_agrees_with_a_map_of_single_bytes(
            switches in prop::collection::vec(0_u64..50, 0..3),
            extents in prop::collection::vec((1_u32..5, 0_u64..60, 1_u64..20), 0..25),
            from in 0_u64..60,
            len in 1_u64..40,
        ) {
            let mut switches = switches;
            switches.sort_unstable();
            let parents: Vec<(u32, u64)> = (1..).zip(switches.iter().copied()).collect();
            let target = u32::try_from(parents.len()).unwrap() + 1;
            let histories = [history(target, &parents)].into();
            let wal = WalCatalog::new(extents.iter().map(|(t, s, l)| extent(*t, *s, s + l, 0)));
            let lineage = lineage(&wal, &histories);
            let position_of = |byte: u64| parents.iter().position(|(_, lsn)| byte < *lsn);
            let held = |byte: u64| {
                let first = position_of(byte).map_or(target, |index| parents[index].0);
                extents.iter().any(|(t, s, l)| {
                    (first..=target).contains(t) && (*s..s + l).contains(&byte)
                })
            };
            let model_end = (from..).find(|byte| !held(*byte)).unwrap();
            let stretches = lineage.walk(timeline(target), Lsn(from), Lsn(u64::MAX));
            let end = stretches.last().map_or(from, |stretch| stretch.range.end().0);
            prop_assert_eq!(end, model_end);
            match lineage.cover(timeline(target), range(Lsn(from), Lsn(from + len))) {
                Ok(pieces) => {
                    prop_assert!(model_end >= from + len);
                    let mut position = from;
                    for piece in pieces {
                        prop_assert_eq!(piece.part.start(), Lsn(position));
                        prop_assert!(piece.extent.range.covers(piece.part));
                        position = piece.part.end().0;
                    }
                    prop_assert_eq!(position, from + len);
                }
                Err(gap) => prop_assert_eq!(gap.missing.start(), Lsn(model_end)),
            }
        }
    }
}
