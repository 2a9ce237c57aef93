//! The WAL on the way to a timeline: which extents hold it, as far as there is no hole.
//!
//! In: the WAL catalog (names only) and the path of a timeline. Out: pieces in the order they are
//! replayed, each a part of one extent, and why the chain ends where it ends.
//!
//! # Invariants
//! Pieces follow on without a hole and without sharing a byte. Each byte comes from the timeline that
//! the path reads it from, except that bytes before a timeline's switch point may come from the
//! timeline itself: its first segment begins with a copy of its parent's, as PostgreSQL makes it
//! (`XLogInitNewTimeline`).

use crate::pg::timeline::PathPart;
use crate::pg::{Lsn, LsnRange, TimelineId};
use crate::repo::coverage::{Gap, WalCatalog};
use crate::repo::marks::BarrierKind;
use crate::repo::names::ExtentName;

/// A part of one extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The extent.
    pub(crate) extent: ExtentName,
    /// The bytes of it that are used.
    pub(crate) range: LsnRange,
    /// The timeline that these bytes belong to on the path; the extent's own or, before a switch point,
    /// an ancestor of it.
    pub(crate) timeline: TimelineId,
}

/// Why a chain goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChainEnd {
    /// Nothing that belongs to the path is stored after it.
    Tip,
    /// More is stored, behind WAL that is missing.
    Gap(Gap),
    /// From here on only a backup taken later leads.
    Barrier(Lsn, BarrierKind),
}

/// Contiguous WAL along a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    pieces: Vec<Piece>,
    start: Lsn,
    end: Lsn,
    stopped_by: ChainEnd,
}

impl Chain {
    /// The longest chain along `path` that begins at `start`.
    pub(crate) fn follow(wal: &WalCatalog, path: &[PathPart], start: Lsn) -> Self {
        let mut chain = Self { pieces: Vec::new(), start, end: start, stopped_by: ChainEnd::Tip };
        for (index, part) in path.iter().enumerate() {
            if part.end.is_some_and(|end| end <= chain.end) {
                continue;
            }
            chain.extend(wal, part.timeline, part, part.end);
            if let Some(part_end) = part.end.filter(|part_end| chain.end < *part_end) {
                let later = path.get(index + 1..).unwrap_or_default();
                for descendant in later {
                    chain.extend(wal, descendant.timeline, part, Some(part_end));
                }
                if chain.end < part_end {
                    chain.stopped_by = chain.hole(wal, part, later);
                    return chain;
                }
            }
        }
        if let Some(last) = path.last() {
            chain.stopped_by = chain.hole(wal, last, &[]);
        }
        chain
    }

    /// Goes on with what `timeline` holds from the end, as bytes of `part`, not past `limit`.
    fn extend(
        &mut self,
        wal: &WalCatalog,
        timeline: TimelineId,
        part: &PathPart,
        limit: Option<Lsn>,
    ) {
        let reach = wal.contiguous_end(timeline, self.end);
        let reach = limit.map_or(reach, |limit| reach.min(limit));
        let Some(wanted) = LsnRange::new(self.end, reach).filter(|range| !range.is_empty()) else {
            return;
        };
        // Contiguous, so that there is a cover; were there none, the chain would just end here.
        for extent in wal.cover(timeline, wanted).unwrap_or_default() {
            let until = extent.range.end().min(reach);
            if let Some(range) = LsnRange::new(self.end, until).filter(|range| !range.is_empty()) {
                self.pieces.push(Piece { extent, range, timeline: part.timeline });
                self.end = until;
            }
        }
    }

    /// Whether anything of `part`, or of the parts after it, is stored beyond the end.
    fn hole(&self, wal: &WalCatalog, part: &PathPart, later: &[PathPart]) -> ChainEnd {
        let next_of = |part: &PathPart| {
            let runs = wal.coverage(part.timeline).iter();
            let starts = runs.map(|run| run.start().max(part.start));
            let inside = |start: &Lsn| *start > self.end && part.end.is_none_or(|end| *start < end);
            starts.filter(inside).min()
        };
        let next = std::iter::once(part).chain(later).filter_map(next_of).min();
        match next.and_then(|next| LsnRange::new(self.end, next)) {
            Some(missing) => ChainEnd::Gap(Gap { timeline: part.timeline, missing }),
            None => ChainEnd::Tip,
        }
    }

    /// The chain up to `end`.
    pub(crate) fn cut(mut self, end: Lsn) -> Self {
        if end < self.end {
            self.pieces = self.within(self.start, end);
            self.end = end.max(self.start);
        }
        self
    }

    /// The chain up to `lsn` if it comes so far, where a barrier is.
    pub(crate) fn barred_at(self, lsn: Lsn, kind: BarrierKind) -> Self {
        if self.end < lsn {
            return self;
        }
        Self { stopped_by: ChainEnd::Barrier(lsn, kind), ..self.cut(lsn) }
    }

    /// The pieces, in order.
    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// First position.
    pub(crate) fn start(&self) -> Lsn {
        self.start
    }

    /// First position after.
    pub(crate) fn end(&self) -> Lsn {
        self.end
    }

    /// Why it ends there.
    pub(crate) fn stopped_by(&self) -> ChainEnd {
        self.stopped_by
    }

    /// The pieces that hold bytes of `[from, until)`, cut to it.
    pub(crate) fn within(&self, from: Lsn, until: Lsn) -> Vec<Piece> {
        let cut = |piece: &Piece| {
            let start = piece.range.start().max(from);
            let end = piece.range.end().min(until);
            let range = LsnRange::new(start, end).filter(|range| !range.is_empty())?;
            Some(Piece { range, ..*piece })
        };
        self.pieces.iter().filter_map(cut).collect()
    }

    /// The timeline that the last byte before `position` is read from, along the chain.
    pub(crate) fn timeline_before(&self, position: Lsn) -> Option<TimelineId> {
        let before = self.pieces.iter().rev().find(|piece| piece.range.start() < position);
        before.map(|piece| piece.timeline)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::pg::PgTime;
    use crate::repo::coverage::StoredExtent;

    pub(crate) fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    /// A catalog of extents given as timeline, start, end, commit time (0 for none).
    pub(crate) fn wal(extents: &[(u32, u64, u64, i64)]) -> WalCatalog {
        WalCatalog::new(extents.iter().map(|(number, start, end, time)| StoredExtent {
            name: ExtentName {
                timeline: timeline(*number),
                range: LsnRange::new(Lsn(*start), Lsn(*end)).unwrap(),
                time: (*time != 0).then_some(PgTime(*time)),
            },
            stored_bytes: (end - start) / 2,
            modified: None,
        }))
    }

    fn path(parts: &[(u32, u64, u64)]) -> Vec<PathPart> {
        let part = |(number, start, end): &(u32, u64, u64)| PathPart {
            timeline: timeline(*number),
            start: Lsn(*start),
            end: (*end != u64::MAX).then_some(Lsn(*end)),
        };
        parts.iter().map(part).collect()
    }

    fn shape(chain: &Chain) -> Vec<(u32, u64, u64)> {
        let shape = |piece: &Piece| {
            (piece.extent.timeline.get(), piece.range.start().0, piece.range.end().0)
        };
        chain.pieces().iter().map(shape).collect()
    }

    #[test]
    fn a_chain_changes_timeline_exactly_at_the_switch_point() {
        let wal = wal(&[(1, 0, 50, 1), (1, 50, 120, 2), (2, 100, 200, 3), (2, 200, 210, 0)]);
        let chain = Chain::follow(&wal, &path(&[(1, 0, 100), (2, 100, u64::MAX)]), Lsn(10));
        assert_eq!(shape(&chain), [(1, 10, 50), (1, 50, 100), (2, 100, 200), (2, 200, 210)]);
        assert_eq!((chain.end(), chain.stopped_by()), (Lsn(210), ChainEnd::Tip));
        assert_eq!(chain.timeline_before(Lsn(100)), Some(timeline(1)));
        assert_eq!(chain.timeline_before(Lsn(101)), Some(timeline(2)));
        let within: Vec<_> =
            chain.within(Lsn(60), Lsn(101)).iter().map(|p| p.range.len_bytes()).collect();
        assert_eq!(within, [40, 1]);
    }

    #[test]
    fn bytes_before_the_switch_point_may_come_from_the_new_timeline() {
        let wal = wal(&[(1, 0, 90, 1), (2, 80, 200, 3)]);
        let chain = Chain::follow(&wal, &path(&[(1, 0, 100), (2, 100, u64::MAX)]), Lsn(0));
        assert_eq!(shape(&chain), [(1, 0, 90), (2, 90, 100), (2, 100, 200)]);
    }

    #[test]
    fn a_hole_ends_the_chain_and_is_named() {
        let wal = wal(&[(1, 0, 30, 1), (1, 50, 120, 2), (2, 100, 200, 3)]);
        let parts = path(&[(1, 0, 100), (2, 100, u64::MAX)]);
        let gap = |from, to| {
            let missing = LsnRange::new(Lsn(from), Lsn(to)).unwrap();
            ChainEnd::Gap(Gap { timeline: timeline(1), missing })
        };
        let chain = Chain::follow(&wal, &parts, Lsn(0));
        assert_eq!((chain.end(), chain.stopped_by()), (Lsn(30), gap(30, 50)));
        // What lies on the parent after the switch point is not on the path.
        let only_parent = self::wal(&[(1, 0, 30, 1), (1, 110, 120, 2)]);
        let chain = Chain::follow(&only_parent, &parts, Lsn(0));
        assert_eq!(chain.stopped_by(), ChainEnd::Tip);
        let child_only = self::wal(&[(1, 0, 30, 1), (2, 100, 120, 2)]);
        assert_eq!(Chain::follow(&child_only, &parts, Lsn(0)).stopped_by(), gap(30, 100));
        let nothing = Chain::follow(&wal, &parts, Lsn(40));
        assert_eq!((nothing.end(), nothing.pieces().len()), (Lsn(40), 0));
    }
}
