//! How far the WAL is durable without a hole, and which position PostgreSQL may be told.
//!
//! Uploads overlap and complete in any order; PostgreSQL forgets WAL by a single position. Completed
//! ranges go in, and the end of the contiguous prefix comes out.
//!
//! # Durability
//! [`Prefix::acknowledgeable`] is the only source of flush positions. It never exceeds
//! [`Prefix::durable_end`], which moves only over ranges that [`Prefix::complete`] was called for,
//! which the engine does when the store has confirmed the object: invariant 1 of the design. It is
//! the last *record* boundary not after the durable end, so that a stream which begins again there
//! sees every commit record whole.

use std::collections::{BTreeMap, VecDeque};

use crate::pg::{Lsn, LsnRange};

/// The contiguous durable prefix of one line of history.
#[derive(Clone, Debug)]
pub struct Prefix {
    end: Lsn,
    /// Completed ranges that begin after `end`: start to end.
    islands: BTreeMap<Lsn, Lsn>,
    /// Record boundaries not yet passed by `end`, ascending.
    boundaries: VecDeque<Lsn>,
    /// The greatest boundary that `end` has passed.
    passed: Option<Lsn>,
}

impl Prefix {
    /// Everything before `end` is durable, or not asked for.
    #[must_use]
    pub fn new(end: Lsn) -> Self {
        Self { end, islands: BTreeMap::new(), boundaries: VecDeque::new(), passed: None }
    }

    /// The store holds `range`. Ranges may come in any order, overlap, and come again.
    pub fn complete(&mut self, range: LsnRange) {
        if range.end() > self.end && !range.is_empty() {
            let end = self.islands.entry(range.start()).or_insert(range.end());
            *end = (*end).max(range.end());
        }
        while let Some(entry) = self.islands.first_entry() {
            if *entry.key() > self.end {
                break;
            }
            self.end = self.end.max(entry.remove());
        }
        self.pass_boundaries();
    }

    /// A record ends at `boundary` (and the next one, if any, begins there); `Lsn::INVALID` says nothing.
    pub fn note_boundary(&mut self, boundary: Lsn) {
        if boundary.is_valid()
            && self.boundaries.back().is_none_or(|last| *last < boundary)
            && self.passed < Some(boundary)
        {
            self.boundaries.push_back(boundary);
        }
        self.pass_boundaries();
    }

    fn pass_boundaries(&mut self) {
        while let Some(next) = self.boundaries.front().copied().filter(|next| *next <= self.end) {
            self.passed = Some(next);
            self.boundaries.pop_front();
        }
    }

    /// First position that is not durable.
    #[must_use]
    pub fn durable_end(&self) -> Lsn {
        self.end
    }

    /// The flush position PostgreSQL may be told: the last known record boundary not after the
    /// durable end; `None` before the first.
    #[must_use]
    pub fn acknowledgeable(&self) -> Option<Lsn> {
        self.passed
    }

    /// Completed ranges past the first hole.
    #[must_use]
    pub fn island_count(&self) -> usize {
        self.islands.len()
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, end: u64) -> LsnRange {
        LsnRange::new(Lsn(start), Lsn(end)).unwrap()
    }

    #[test]
    fn a_hole_holds_the_prefix_until_it_is_filled() {
        let mut prefix = Prefix::new(Lsn(100));
        prefix.note_boundary(Lsn(150));
        prefix.note_boundary(Lsn(290));
        prefix.complete(range(200, 300));
        assert_eq!(prefix.durable_end(), Lsn(100));
        assert_eq!(prefix.acknowledgeable(), None);
        prefix.complete(range(100, 200));
        assert_eq!(prefix.durable_end(), Lsn(300));
        assert_eq!(prefix.acknowledgeable(), Some(Lsn(290)));
        assert_eq!(prefix.island_count(), 0);
    }

    #[test]
    fn a_record_that_is_cut_in_two_is_acknowledged_only_up_to_its_start() {
        let mut prefix = Prefix::new(Lsn(0x100));
        prefix.note_boundary(Lsn(0x180));
        prefix.complete(range(0x100, 0x200));
        assert_eq!(prefix.acknowledgeable(), Some(Lsn(0x180)));
        prefix.note_boundary(Lsn(0x220));
        assert_eq!(prefix.acknowledgeable(), Some(Lsn(0x180)));
    }

    #[test]
    fn overlapping_ranges_of_an_earlier_life_are_welcome() {
        let mut prefix = Prefix::new(Lsn(100));
        prefix.complete(range(150, 170));
        prefix.complete(range(150, 160));
        prefix.complete(range(120, 200));
        prefix.complete(range(50, 130));
        assert_eq!(prefix.durable_end(), Lsn(200));
        prefix.complete(range(10, 20));
        assert_eq!(prefix.durable_end(), Lsn(200));
    }

    proptest! {
        #[test]
        fn no_order_of_completion_moves_the_end_past_a_hole_or_the_ack_past_the_end(
            lengths in prop::collection::vec(1..5000_u64, 1..40),
            seed in any::<u64>(),
        ) {
            let mut extents = Vec::new();
            let mut at = 1000;
            for len in &lengths {
                extents.push((at, at + len));
                at += len;
            }
            let mut order: Vec<usize> = (0..extents.len()).collect();
            let mut state = seed;
            for i in (1..order.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                order.swap(i, (state >> 33) as usize % (i + 1));
            }
            let mut prefix = Prefix::new(Lsn(1000));
            for (start, end) in &extents {
                prefix.note_boundary(Lsn(start + (end - start) / 2));
            }
            let mut done = vec![false; extents.len()];
            for index in order {
                prefix.complete(range(extents[index].0, extents[index].1));
                done[index] = true;
                let whole = done.iter().take_while(|done| **done).count();
                let expected = if whole == 0 { 1000 } else { extents[whole - 1].1 };
                prop_assert_eq!(prefix.durable_end(), Lsn(expected));
                prop_assert!(prefix.acknowledgeable() <= Some(prefix.durable_end()));
                let boundaries = extents.iter().map(|(start, end)| Lsn(start + (end - start) / 2));
                let boundary = boundaries.filter(|boundary| boundary.0 <= expected).max();
                prop_assert_eq!(prefix.acknowledgeable(), boundary);
            }
        }
    }
}
