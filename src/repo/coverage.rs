//! Which WAL a repository holds, from the names of its extents.
//!
//! In: names, sizes and times of extents in any order, overlapping or not. Out: the covered ranges of
//! each timeline, the extents to read for a range, and the first hole where one is missing.
//!
//! # Shape
//! 32 bytes an extent, sorted; a million extents are 32 MB and are indexed in a second.
//!
//! # Invariants
//! - Extents of one timeline may overlap: compaction puts a joint extent before it deletes the small
//!   ones, and a writer that restarts may cut the same WAL in other places. WAL at one position of
//!   one timeline has one content, so any of them will do; of those that hold a position the one that
//!   reaches furthest is chosen.
//! - A range is covered only if every byte of it is inside some extent.

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::error::{Error, Kind};
use crate::pg::{Lsn, LsnRange, PgTime, TimelineId};

use super::names::ExtentName;

/// Longest extent that is believed: the longest WAL segment, which no extent crosses.
const EXTENT_BYTES_MAX: u64 = 1 << 30;
/// In place of the time of an extent that holds no commit.
const NO_TIME: i64 = i64::MIN;
/// In place of the time when an object was made, where the store does not say; also for times after
/// 2106, which are as little to be believed.
const NOT_TOLD_S: u32 = u32::MAX;

/// An extent and what the listing says about its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredExtent {
    /// Its name: timeline, range and greatest commit time.
    pub name: ExtentName,
    /// Size of the object.
    pub stored_bytes: u64,
    /// When the object was made, by the store's clock, to the second; `None` when that does not say.
    pub modified: Option<Timestamp>,
}

/// An extent as kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    start: Lsn,
    /// Greatest commit time inside, microseconds since 2000, or [`NO_TIME`].
    time: i64,
    /// Plain bytes of WAL, at most [`EXTENT_BYTES_MAX`].
    len_bytes: u32,
    /// Size of the object; one that is larger than can be kept is kept as the greatest size.
    stored_bytes: u32,
    /// Seconds since 1970, or [`NOT_TOLD_S`].
    modified_s: u32,
}

impl Row {
    fn end(&self) -> Lsn {
        Lsn(self.start.0.saturating_add(u64::from(self.len_bytes)))
    }

    fn range(&self) -> LsnRange {
        range(self.start, self.end())
    }

    fn time(&self) -> Option<PgTime> {
        (self.time != NO_TIME).then_some(PgTime(self.time))
    }

    fn modified(&self) -> Option<Timestamp> {
        let told = (self.modified_s != NOT_TOLD_S).then_some(i64::from(self.modified_s));
        told.and_then(|seconds| Timestamp::from_second(seconds).ok())
    }

    fn stored(&self, timeline: TimelineId) -> StoredExtent {
        StoredExtent {
            name: ExtentName { timeline, range: self.range(), time: self.time() },
            stored_bytes: u64::from(self.stored_bytes),
            modified: self.modified(),
        }
    }

    /// Order of starts; of extents with one start the one that reaches furthest comes first.
    fn key(&self) -> (Lsn, std::cmp::Reverse<u32>, std::cmp::Reverse<i64>) {
        (self.start, std::cmp::Reverse(self.len_bytes), std::cmp::Reverse(self.time))
    }
}

/// `[start, end)`, empty when they are the wrong way round.
pub(super) fn range(start: Lsn, end: Lsn) -> LsnRange {
    LsnRange::new(start, end.max(start)).unwrap_or_else(|| unreachable!("end is not before start"))
}

/// The part that two ranges share; empty when none.
pub(super) fn intersection(a: LsnRange, b: LsnRange) -> LsnRange {
    let start = a.start().max(b.start());
    range(start, a.end().min(b.end()))
}

/// WAL that is missing where some is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Gap {
    /// The timeline it is missing on.
    pub timeline: TimelineId,
    /// The first missing position and the next one that is there, or the end of what was wanted.
    #[serde(serialize_with = "serialize_range")]
    pub missing: LsnRange,
}

/// A range as `{"start": "0/1", "end": "0/2"}`.
pub(super) fn serialize_range<S: serde::Serializer>(
    range: &LsnRange,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    use serde::ser::SerializeStruct as _;
    let mut pair = serializer.serialize_struct("LsnRange", 2)?;
    pair.serialize_field("start", &range.start())?;
    pair.serialize_field("end", &range.end())?;
    pair.end()
}

impl From<Gap> for Error {
    fn from(gap: Gap) -> Self {
        Error::new(
            Kind::NotFound,
            format!("WAL {} of timeline {} is not in the repository", gap.missing, gap.timeline),
        )
    }
}

/// The WAL of one timeline.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TimelineWal {
    /// In the order of [`Row::key`].
    rows: Vec<Row>,
    /// Maximal covered ranges, ascending, never touching.
    runs: Vec<LsnRange>,
    /// Length of the longest extent: how far before a position one that holds it may begin.
    longest_bytes: u64,
}

impl TimelineWal {
    fn index(&mut self) {
        self.rows.sort_unstable_by_key(Row::key);
        self.rows.dedup_by_key(|row| row.key());
        self.rows.shrink_to_fit();
        self.longest_bytes =
            self.rows.iter().map(|row| u64::from(row.len_bytes)).max().unwrap_or(0);
        self.runs.clear();
        for row in &self.rows {
            match self.runs.last_mut() {
                Some(last) if row.start <= last.end() => {
                    *last = range(last.start(), last.end().max(row.end()));
                }
                _ => self.runs.push(row.range()),
            }
        }
    }

    /// The run that holds `position`, or ends there.
    fn run_at(&self, position: Lsn) -> Option<LsnRange> {
        let after = self.runs.partition_point(|run| run.start() <= position);
        let run = *self.runs.get(after.checked_sub(1)?)?;
        (position <= run.end()).then_some(run)
    }

    /// Rows that may hold a byte of `wanted`: from the first that may reach it to the last that begins
    /// before its end.
    fn near(&self, wanted: LsnRange) -> &[Row] {
        let from = Lsn(wanted.start().0.saturating_sub(self.longest_bytes));
        let first = self.rows.partition_point(|row| row.start < from);
        let last = self.rows.partition_point(|row| row.start < wanted.end());
        self.rows.get(first..last).unwrap_or_default()
    }
}

/// The WAL that a repository holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalCatalog {
    timelines: BTreeMap<TimelineId, TimelineWal>,
}

impl WalCatalog {
    /// From extents in any order. Extents that no writer of ours makes (longer than a segment can be)
    /// are left out.
    #[must_use]
    pub fn new(extents: impl IntoIterator<Item = StoredExtent>) -> Self {
        let mut catalog = Self::default();
        for extent in extents {
            catalog.push(extent);
        }
        catalog.index();
        catalog
    }

    /// Adds an extent; [`WalCatalog::index`] must follow before anything is asked.
    pub(super) fn push(&mut self, extent: StoredExtent) {
        let ExtentName { timeline, range, time } = extent.name;
        let length = u32::try_from(range.len_bytes()).ok();
        let Some(len_bytes) = length.filter(|len| u64::from(*len) <= EXTENT_BYTES_MAX) else {
            return;
        };
        if len_bytes == 0 {
            return;
        }
        let modified_s = extent.modified.map(|time| time.as_second().max(0));
        self.timelines.entry(timeline).or_default().rows.push(Row {
            start: range.start(),
            time: time.map_or(NO_TIME, |time| time.0),
            len_bytes,
            stored_bytes: u32::try_from(extent.stored_bytes).unwrap_or(u32::MAX),
            modified_s: modified_s.and_then(|s| u32::try_from(s).ok()).unwrap_or(NOT_TOLD_S),
        });
    }

    /// Sorts what was pushed and finds the covered ranges.
    pub(super) fn index(&mut self) {
        self.timelines.values_mut().for_each(TimelineWal::index);
    }

    /// The timelines of which there is any WAL.
    pub fn timelines(&self) -> impl Iterator<Item = TimelineId> {
        self.timelines.keys().copied()
    }

    /// Every extent of a timeline, by start.
    pub fn extents(&self, timeline: TimelineId) -> impl Iterator<Item = StoredExtent> {
        let rows = self.timelines.get(&timeline).map(|wal| wal.rows.as_slice());
        rows.unwrap_or_default().iter().map(move |row| row.stored(timeline))
    }

    /// Extents of a timeline that share a byte with `wanted`, by start.
    pub fn extents_in(
        &self,
        timeline: TimelineId,
        wanted: LsnRange,
    ) -> impl Iterator<Item = StoredExtent> {
        let rows = self.timelines.get(&timeline).map(|wal| wal.near(wanted)).unwrap_or_default();
        let shares = move |row: &&Row| !intersection(row.range(), wanted).is_empty();
        rows.iter().filter(shares).map(move |row| row.stored(timeline))
    }

    /// How many extents there are.
    #[must_use]
    pub fn extent_count(&self) -> usize {
        self.timelines.values().map(|wal| wal.rows.len()).sum()
    }

    /// Bytes of their objects.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        let rows = self.timelines.values().flat_map(|wal| &wal.rows);
        rows.map(|row| u64::from(row.stored_bytes)).sum()
    }

    /// Maximal covered ranges of a timeline, ascending; holes lie between them.
    #[must_use]
    pub fn coverage(&self, timeline: TimelineId) -> &[LsnRange] {
        self.timelines.get(&timeline).map(|wal| wal.runs.as_slice()).unwrap_or_default()
    }

    /// End of the contiguous WAL that begins at `from` (or reaches it); `from` itself when there is
    /// none.
    #[must_use]
    pub fn contiguous_end(&self, timeline: TimelineId, from: Lsn) -> Lsn {
        let run = self.timelines.get(&timeline).and_then(|wal| wal.run_at(from));
        run.map_or(from, LsnRange::end)
    }

    /// End of the last WAL of a timeline, whatever holes are before it.
    #[must_use]
    pub fn last_end(&self, timeline: TimelineId) -> Option<Lsn> {
        self.coverage(timeline).last().map(|run| run.end())
    }

    /// The extent with the last byte of a timeline's WAL.
    #[must_use]
    pub fn last_extent(&self, timeline: TimelineId) -> Option<StoredExtent> {
        let wal = self.timelines.get(&timeline)?;
        // Of several that end there the one made first: a joint one is made later than what it joins.
        let made = |row: &Row| std::cmp::Reverse(row.modified_s);
        wal.rows.iter().max_by_key(|row| (row.end(), made(row))).map(|row| row.stored(timeline))
    }

    /// The fewest extents that hold all of `wanted`, in the order of their positions. Each begins at or
    /// before the end of the one before it, so what they share is to be read once.
    ///
    /// # Errors
    /// The first hole.
    pub fn cover(&self, timeline: TimelineId, wanted: LsnRange) -> Result<Vec<ExtentName>, Gap> {
        let mut chosen = Vec::new();
        if wanted.is_empty() {
            return Ok(chosen);
        }
        let empty = TimelineWal::default();
        let wal = self.timelines.get(&timeline).unwrap_or(&empty);
        let mut position = wanted.start();
        let mut furthest: Option<Row> = None;
        let mut rows = wal.near(wanted).iter().peekable();
        while position < wanted.end() {
            while let Some(row) = rows.next_if(|row| row.start <= position) {
                if furthest.is_none_or(|best| row.end() > best.end()) {
                    furthest = Some(*row);
                }
            }
            match furthest.filter(|best| best.end() > position) {
                Some(best) => {
                    chosen.push(ExtentName { timeline, range: best.range(), time: best.time() });
                    position = best.end();
                }
                None => {
                    let next = rows.peek().map_or(wanted.end(), |row| row.start);
                    let missing = range(position, next.min(wanted.end()));
                    return Err(Gap { timeline, missing });
                }
            }
        }
        Ok(chosen)
    }

    /// Greatest commit time of the extents that share a byte with `wanted` and end inside it. The
    /// commit of one that reaches beyond may lie outside. That of one that begins before may too, but
    /// then it is an earlier one.
    #[must_use]
    pub fn newest_commit_in(&self, timeline: TimelineId, wanted: LsnRange) -> Option<PgTime> {
        let rows = self.timelines.get(&timeline)?.near(wanted).iter();
        let inside = rows.filter(|row| wanted.start() < row.end() && row.end() <= wanted.end());
        inside.filter_map(Row::time).max()
    }

    /// The extent with the greatest commit time of all.
    #[must_use]
    pub fn newest_commit(&self) -> Option<StoredExtent> {
        let all = self.timelines.iter();
        let newest = all.filter_map(|(timeline, wal)| {
            let row = wal.rows.iter().filter(|row| row.time().is_some()).max_by_key(|r| r.time)?;
            Some((*timeline, *row))
        });
        newest.max_by_key(|(_, row)| row.time).map(|(timeline, row)| row.stored(timeline))
    }

    /// The same without the extents that `drop` names: what would be left.
    #[must_use]
    pub fn without(&self, drop: impl Fn(&ExtentName) -> bool) -> Self {
        let mut rest = Self::default();
        for (timeline, wal) in &self.timelines {
            let rows = wal.rows.iter().filter(|row| !drop(&row.stored(*timeline).name));
            let rows: Vec<Row> = rows.copied().collect();
            if !rows.is_empty() {
                rest.timelines.insert(*timeline, TimelineWal { rows, ..TimelineWal::default() });
            }
        }
        rest.index();
        rest
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::repo) fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    pub(in crate::repo) fn extent(number: u32, start: u64, end: u64, time: i64) -> StoredExtent {
        StoredExtent {
            name: ExtentName {
                timeline: timeline(number),
                range: LsnRange::new(Lsn(start), Lsn(end)).unwrap(),
                time: (time != 0).then_some(PgTime(time)),
            },
            stored_bytes: end - start,
            modified: Some(Timestamp::from_second(1_700_000_000).unwrap()),
        }
    }

    fn one(extents: &[(u64, u64)]) -> WalCatalog {
        WalCatalog::new(extents.iter().map(|(start, end)| extent(1, *start, *end, 0)))
    }

    fn ranges(names: &[ExtentName]) -> Vec<(u64, u64)> {
        names.iter().map(|name| (name.range.start().0, name.range.end().0)).collect()
    }

    #[test]
    fn a_row_is_as_small_as_the_memory_budget_says() {
        assert_eq!(size_of::<Row>(), 32);
    }

    #[test]
    fn the_last_extent_is_the_one_that_reaches_furthest_and_of_several_the_first_made() {
        let at = |start, end, second| StoredExtent {
            modified: Some(Timestamp::from_second(second).unwrap()),
            ..extent(1, start, end, 0)
        };
        let wal = WalCatalog::new([at(0, 50, 7), at(0, 90, 9), at(50, 90, 8), at(60, 70, 1)]);
        let last = wal.last_extent(timeline(1)).unwrap();
        assert_eq!((last.name.range.start(), last.modified), (Lsn(50), at(0, 1, 8).modified));
        assert_eq!(wal.last_extent(timeline(2)), None);
    }

    #[test]
    fn the_time_of_an_object_is_kept_to_the_second_and_none_is_made_up() {
        let kept = |modified: Option<&str>| {
            let modified = modified.map(|time| time.parse().unwrap());
            let wal = WalCatalog::new([StoredExtent { modified, ..extent(1, 0, 10, 0) }]);
            wal.extents(timeline(1)).next().unwrap().modified.map(|time| time.to_string())
        };
        let time = kept(Some("2026-11-22T10:00:00.9Z"));
        assert_eq!(time.as_deref(), Some("2026-11-22T10:00:00Z"));
        assert_eq!(kept(None), None);
        assert_eq!(kept(Some("2200-01-01T00:00:00Z")), None);
    }

    #[test]
    fn the_joint_extent_is_preferred_to_the_small_ones_it_replaces() {
        let wal = one(&[(0x10, 0x20), (0x20, 0x30), (0x10, 0x40), (0x30, 0x40), (0x40, 0x50)]);
        let cover = wal.cover(timeline(1), range(Lsn(0x18), Lsn(0x48))).unwrap();
        assert_eq!(ranges(&cover), [(0x10, 0x40), (0x40, 0x50)]);
        assert_eq!(wal.coverage(timeline(1)), [range(Lsn(0x10), Lsn(0x50))]);
    }

    #[test]
    fn extents_that_were_cut_twice_in_different_places_are_read_together() {
        let wal = one(&[(0, 30), (50, 80), (30, 60), (60, 90)]);
        let cover = wal.cover(timeline(1), range(Lsn(0), Lsn(85))).unwrap();
        assert_eq!(ranges(&cover), [(0, 30), (30, 60), (60, 90)]);
        assert_eq!(wal.contiguous_end(timeline(1), Lsn(0)), Lsn(90));
    }

    #[test]
    fn a_hole_is_named_by_what_is_missing() {
        let wal = one(&[(0, 30), (50, 80)]);
        let gap = |from, to| wal.cover(timeline(1), range(Lsn(from), Lsn(to))).unwrap_err().missing;
        assert_eq!(gap(0, 80), range(Lsn(30), Lsn(50)));
        assert_eq!(gap(0, 40), range(Lsn(30), Lsn(40)));
        assert_eq!(gap(60, 90), range(Lsn(80), Lsn(90)));
        assert_eq!(wal.contiguous_end(timeline(1), Lsn(30)), Lsn(30));
        assert_eq!(wal.contiguous_end(timeline(1), Lsn(40)), Lsn(40));
        assert_eq!(wal.contiguous_end(timeline(2), Lsn(40)), Lsn(40));
        assert_eq!(wal.last_end(timeline(1)), Some(Lsn(80)));
        let missing = wal.cover(timeline(2), range(Lsn(1), Lsn(2))).unwrap_err();
        assert_eq!(
            Error::from(missing).to_string(),
            "WAL [0/1, 0/2) of timeline 2 is not in the repository"
        );
    }

    #[test]
    fn a_commit_time_counts_only_when_the_commit_is_certainly_inside() {
        let wal =
            WalCatalog::new([extent(1, 0, 10, 5), extent(1, 10, 20, 9), extent(1, 20, 30, 0)]);
        let newest = |end| wal.newest_commit_in(timeline(1), range(Lsn(0), Lsn(end)));
        assert_eq!(newest(30), Some(PgTime(9)));
        assert_eq!(newest(15), Some(PgTime(5)));
        assert_eq!(newest(5), None);
        let straddling = wal.newest_commit_in(timeline(1), range(Lsn(15), Lsn(30)));
        assert_eq!(straddling, Some(PgTime(9)));
        assert_eq!(wal.newest_commit().unwrap().name.range.start(), Lsn(10));
    }

    proptest! {
        /// The byte-by-byte model: whatever extents there are, a cover exists exactly when every
        /// byte is in some extent, holds all of them, and names the first byte that is missing.
        #[test]
        fn coverage_agrees_with_a_map_of_single_bytes(
            extents in prop::collection::vec((0_u64..60, 1_u64..12), 0..20),
            start in 0_u64..60,
            len in 0_u64..40,
        ) {
            let extents: Vec<(u64, u64)> = extents.iter().map(|(s, l)| (*s, s + l)).collect();
            let wal = one(&extents);
            let held = |byte: u64| extents.iter().any(|(s, e)| (*s..*e).contains(&byte));
            let in_runs = |byte| wal.coverage(timeline(1)).iter().any(|run| run.contains(Lsn(byte)));
            for byte in 0..80 {
                prop_assert_eq!(held(byte), in_runs(byte));
            }
            let wanted = range(Lsn(start), Lsn(start + len));
            match wal.cover(timeline(1), wanted) {
                Ok(cover) => {
                    for byte in start..start + len {
                        prop_assert!(cover.iter().any(|name| name.range.contains(Lsn(byte))));
                    }
                    for pair in cover.windows(2) {
                        prop_assert!(pair[1].range.start() <= pair[0].range.end());
                        prop_assert!(pair[1].range.end() > pair[0].range.end());
                    }
                    for (index, _) in cover.iter().enumerate() {
                        let rest = cover.iter().enumerate().filter(|(i, _)| *i != index);
                        let rest: Vec<_> = rest.map(|(_, name)| name.range).collect();
                        let enough = (start..start + len)
                            .all(|byte| rest.iter().any(|range| range.contains(Lsn(byte))));
                        prop_assert!(!enough, "an extent too many: {:?}", cover);
                    }
                }
                Err(gap) => {
                    let first = (start..start + len).find(|byte| !held(*byte)).unwrap();
                    prop_assert_eq!(gap.missing.start(), Lsn(first));
                    for byte in first..gap.missing.end().0 {
                        prop_assert!(!held(byte));
                    }
                }
            }
            let end = (start..).find(|byte| !held(*byte)).unwrap();
            prop_assert_eq!(wal.contiguous_end(timeline(1), Lsn(start)), Lsn(end));
        }
    }
}
