//! Tells whether a server sends the WAL that is stored already, where it sends some again.
//!
//! A server that was set back on its timeline (a snapshot of the machine, a copy of the data directory)
//! writes other WAL at the positions that the repository holds. Once it has written as much as was lost,
//! its end says nothing any more, and what follows would be stored behind WAL that it does not follow: a
//! recovery stops there.
//!
//! A stream begins at the slot or with the last stored segment (see [`super::resume`]), before the stored
//! end. What is sent again is decoded and not stored; the objects that hold it say in their names the
//! greatest time of a commit or abort inside. That is enough to tell two histories apart, and needs no
//! key: a host that can only write compares as well.
//!
//! # Limits
//! WAL without a commit or abort cannot be compared; neither can an extent that began before the stream.
//! Nothing is compared after damage, behind which extents are stored whose times were not read.

use std::collections::VecDeque;

use super::resume::set_back;
use crate::error::Result;
use crate::pg::{Lsn, LsnRange, PgTime, TimelineId};
use crate::wal::Landmark;

/// A stored extent that the server is expected to send again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Its timeline.
    pub timeline: TimelineId,
    /// The WAL inside.
    pub range: LsnRange,
    /// Greatest time of a commit or abort record that ends inside.
    pub greatest_time: PgTime,
}

/// The comparison of what is sent with what is stored.
#[derive(Debug, Default)]
pub struct Overlap {
    /// Ascending; none begins before the position reached.
    coming: VecDeque<Expected>,
    /// Those that are being sent.
    open: Vec<Open>,
}

#[derive(Debug)]
struct Open {
    expected: Expected,
    /// A record may go on where it begins that the decoder does not know.
    begins_unknown: bool,
    /// The greatest time was there.
    found: bool,
    /// A commit or abort with a greater time was there.
    newer: bool,
}

impl Open {
    /// Whether this is other WAL than the stored one. Where the first record is unknown, the time may be
    /// in that: a newer one beside it tells, for an extent's is the greatest.
    fn is_other(&self) -> bool {
        !self.found && (!self.begins_unknown || self.newer)
    }
}

impl Overlap {
    /// Expects these extents, in any order.
    #[must_use]
    pub fn new(mut expected: Vec<Expected>) -> Self {
        expected.sort_unstable_by_key(|extent| extent.range);
        Self { coming: expected.into(), open: Vec::new() }
    }

    /// Comes to `position`; `in_step` says that the decoder knows the record which goes on there, if any.
    pub fn begin(&mut self, position: Lsn, in_step: bool) {
        while let Some(expected) = self.coming.pop_front_if(|next| next.range.start() <= position) {
            if expected.range.start() == position {
                let begins_unknown = !in_step;
                self.open.push(Open { expected, begins_unknown, found: false, newer: false });
            }
        }
    }

    /// The first position after `position` where an extent begins or ends: what is decoded at a time
    /// must not go past it.
    #[must_use]
    pub fn edge_after(&self, position: Lsn) -> Option<Lsn> {
        let ends = self.open.iter().map(|open| open.expected.range.end());
        let begins = self.coming.front().map(|next| next.range.start());
        ends.chain(begins).filter(|edge| *edge > position).min()
    }

    /// A record ended in all extents that are open.
    pub fn note(&mut self, landmark: &Landmark) {
        let Some(time) = landmark.transaction_time() else { return };
        for open in &mut self.open {
            open.found |= time == open.expected.greatest_time;
            open.newer |= time > open.expected.greatest_time;
        }
    }

    /// Everything before `position` was decoded.
    ///
    /// # Errors
    /// `conflict` when an extent that ends here was other WAL.
    pub fn end(&mut self, position: Lsn) -> Result<()> {
        let ended = self.open.extract_if(.., |open| open.expected.range.end() <= position);
        // All are taken out, whatever the first one tells.
        let ended: Vec<Open> = ended.collect();
        match ended.iter().find(|open| open.is_other()) {
            None => Ok(()),
            Some(other) => {
                let Expected { timeline, range, greatest_time } = other.expected;
                Err(set_back(format!(
                    "the server sends other WAL of timeline {timeline} at {range} than the \
                     repository holds: the transaction that ended there at {greatest_time} is missing"
                )))
            }
        }
    }

    /// The decoder cannot read on: nothing is compared any more.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    const TIME: PgTime = PgTime(1000);

    fn expected(start: u64, end: u64) -> Expected {
        let range = LsnRange::new(Lsn(start), Lsn(end)).unwrap();
        Expected { timeline: TimelineId::FIRST, range, greatest_time: TIME }
    }

    fn commit(time: i64) -> Landmark {
        let range = LsnRange::new(Lsn(120), Lsn(160)).unwrap();
        Landmark::Commit { xid: 3, time: PgTime(time), range }
    }

    /// What is said of an extent in which commits of these times end.
    fn compare(in_step: bool, times: &[i64]) -> Result<()> {
        let mut overlap = Overlap::new(vec![expected(100, 200)]);
        overlap.begin(Lsn(100), in_step);
        times.iter().for_each(|time| overlap.note(&commit(*time)));
        overlap.end(Lsn(199)).unwrap();
        overlap.end(Lsn(200))
    }

    #[test]
    fn the_greatest_time_is_found_or_it_is_other_wal() {
        for times in [&[1000][..], &[990, 1000, 995]] {
            compare(true, times).unwrap();
        }
        for times in [&[][..], &[999], &[1001], &[999, 2000]] {
            assert_eq!(compare(true, times).unwrap_err().kind(), Kind::Conflict, "{times:?}");
        }
    }

    #[test]
    fn where_the_first_record_is_unknown_only_a_newer_time_tells() {
        for times in [&[][..], &[999], &[999, 1000]] {
            compare(false, times).unwrap();
        }
        for times in [&[1001][..], &[999, 2000]] {
            assert_eq!(compare(false, times).unwrap_err().kind(), Kind::Conflict, "{times:?}");
        }
    }

    #[test]
    fn an_extent_that_began_before_the_stream_is_not_compared() {
        let mut overlap = Overlap::new(vec![expected(200, 300), expected(100, 200)]);
        assert_eq!(overlap.edge_after(Lsn(50)), Some(Lsn(100)));
        overlap.begin(Lsn(120), true);
        assert_eq!(overlap.edge_after(Lsn(120)), Some(Lsn(200)));
        overlap.end(Lsn(200)).unwrap();
        overlap.begin(Lsn(200), true);
        assert_eq!(overlap.edge_after(Lsn(200)), Some(Lsn(300)));
        overlap.end(Lsn(300)).unwrap_err();
        assert_eq!(overlap.edge_after(Lsn(300)), None);
    }

    #[test]
    fn each_of_several_objects_with_the_same_wal_is_compared() {
        let mut overlap = Overlap::new(vec![expected(100, 300), expected(100, 200)]);
        overlap.begin(Lsn(100), true);
        assert_eq!(overlap.edge_after(Lsn(100)), Some(Lsn(200)));
        overlap.note(&commit(1000));
        overlap.end(Lsn(200)).unwrap();
        assert_eq!(overlap.edge_after(Lsn(200)), Some(Lsn(300)));
        overlap.end(Lsn(300)).unwrap();
    }
}
