//! The books of a stream: what the repository holds, which chain is being extended, and what the
//! server was told.
//!
//! # Invariants
//! 1. [`Ledger::flush_position`] is the only position the server may be told. It comes from
//!    [`Prefix::acknowledgeable`], never falls while a connection lasts, and is never before the
//!    slot's own position (PostgreSQL would move the slot back).
//! 2. A deliberate gap begins a new chain. Extents of an older chain that are stored later are
//!    entered in the books and do not move the flush position.

use std::collections::BTreeMap;

use super::intake::CutExtent;
use super::overlap::{Expected, Overlap};
use super::prefix::Prefix;
use super::resume::{Attempt, join};
use super::uploads::Stored;
use crate::error::Result;
use crate::pg::{Lsn, LsnRange, PgTime, TimelineHistory, TimelineId};
use crate::repo::{Object, Repository, list_wal};

/// Most extents of which the greatest time is kept: more than are stored in an hour at one a second.
const TIMES_MAX: usize = 4096;

/// Most extents that are entered before those that touch are joined: several pages of a listing, which
/// come in no order.
const NOT_JOINED_MAX: usize = 10_000;

/// What is stored, by timeline, joined where it touches: as large as the number of gaps.
#[derive(Clone, Debug, Default)]
pub struct Held {
    ranges: BTreeMap<TimelineId, Vec<LsnRange>>,
    /// The last extents with a commit or abort inside, and the greatest time of one.
    times: BTreeMap<(TimelineId, LsnRange), PgTime>,
}

impl Held {
    /// What `repository` holds, read from its listing: nothing is streamed before that is known, and of
    /// years of WAL it has a thousand pages.
    ///
    /// All of it is read anew by whoever has taken the lease again. What was stored before stays so, but
    /// what was on its way when the lease was lost may have arrived, in front of what is known and behind
    /// it, on more than one timeline; the listing says so, and no part of it that is known to be enough.
    ///
    /// # Durability
    /// What is listed may have been put by a process that was killed before it was durable. All of it
    /// is when this returns: the flush position may pass it.
    ///
    /// # Errors
    /// What the store reports.
    pub async fn load(repository: &Repository) -> Result<Self> {
        let prefix = repository.cluster().wal_prefix();
        let mut held = Self::default();
        let mut not_joined_count = 0;
        list_wal(repository, &mut |object| {
            let Some(Object::Extent(extent)) = Object::parse(repository.cluster(), &object.name)
            else {
                return;
            };
            held.push(extent.timeline, extent.range, extent.time);
            not_joined_count += 1;
            if not_joined_count == NOT_JOINED_MAX {
                held.join();
                not_joined_count = 0;
            }
        })
        .await?;
        held.join();
        repository.store().make_durable(&prefix).await?;
        Ok(held)
    }

    /// Enters an extent: its range, and the greatest time of a commit or abort inside.
    pub fn add(&mut self, timeline: TimelineId, range: LsnRange, time: Option<PgTime>) {
        self.push(timeline, range, time);
        self.join();
    }

    fn push(&mut self, timeline: TimelineId, range: LsnRange, time: Option<PgTime>) {
        self.ranges.entry(timeline).or_default().push(range);
        let Some(time) = time else { return };
        self.times.insert((timeline, range), time);
        if self.times.len() > TIMES_MAX {
            self.times.pop_first();
        }
    }

    fn join(&mut self) {
        for ranges in self.ranges.values_mut().filter(|ranges| ranges.len() > 1) {
            *ranges = join(std::mem::take(ranges));
        }
    }

    /// The greatest timeline of which anything is held.
    #[must_use]
    pub fn newest_timeline(&self) -> Option<TimelineId> {
        self.ranges.keys().next_back().copied()
    }

    /// Everything held, ascending.
    #[must_use]
    pub fn ranges(&self) -> Vec<(TimelineId, LsnRange)> {
        let of = |(timeline, ranges): (&TimelineId, &Vec<LsnRange>)| {
            let timeline = *timeline;
            ranges.clone().into_iter().map(move |range| (timeline, range))
        };
        self.ranges.iter().flat_map(of).collect()
    }

    /// The extents on the way of `history` that a server sends again from `position` on. One that goes
    /// on past a switch, on the branch that was left, is none: its greatest time may be there.
    #[must_use]
    pub fn expected(&self, history: &TimelineHistory, position: Lsn) -> Overlap {
        let path = history.path();
        let on_path = |timeline: TimelineId, range: LsnRange| {
            path.iter().any(|part| {
                part.timeline == timeline
                    && range.start() >= part.start.max(position)
                    && part.end.is_none_or(|end| range.end() <= end)
            })
        };
        let times = self.times.iter().filter(|((timeline, range), _)| on_path(*timeline, *range));
        let expected = times.map(|((timeline, range), time)| Expected {
            timeline: *timeline,
            range: *range,
            greatest_time: *time,
        });
        Overlap::new(expected.collect())
    }
}

/// The books; see the module.
#[derive(Clone, Debug)]
pub struct Ledger {
    held: Held,
    prefix: Prefix,
    chain: u64,
    floor: Lsn,
    told: Lsn,
    cut_end: Lsn,
}

impl Ledger {
    /// With what the repository holds entered.
    #[must_use]
    pub fn new(held: Held) -> Self {
        let prefix = Prefix::new(Lsn::INVALID);
        Self {
            held,
            prefix,
            chain: 0,
            floor: Lsn::INVALID,
            told: Lsn::INVALID,
            cut_end: Lsn::INVALID,
        }
    }

    /// What the repository holds.
    #[must_use]
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Begins a chain as `attempt` says, through a slot that is at `slot_lsn`. Everything handed to
    /// the store for an earlier chain is either stored or given up.
    pub fn begin(&mut self, attempt: &Attempt, slot_lsn: Lsn) {
        self.chain += 1;
        self.prefix = Prefix::new(attempt.store_from);
        for known in &attempt.known {
            self.prefix.complete(*known);
        }
        if slot_lsn == attempt.stream_from {
            // A record ends there, which a decoder that begins there does not see; commits may wait.
            self.prefix.note_boundary(slot_lsn);
        }
        self.floor = slot_lsn;
        self.told = Lsn::INVALID;
        self.cut_end = attempt.store_from;
    }

    /// Gives up everything before `position`, which the slot is to be moved to: the only way the
    /// flush position ever passes WAL that is not stored. The gap was recorded before.
    pub fn give_up_before(&mut self, position: Lsn) {
        self.chain += 1;
        self.prefix = Prefix::new(position);
        self.prefix.note_boundary(position);
        self.floor = position;
        self.told = Lsn::INVALID;
        self.cut_end = position;
    }

    /// The chain that extents cut from now on continue.
    #[must_use]
    pub fn chain(&self) -> u64 {
        self.chain
    }

    /// A record ends at `boundary`.
    pub fn note_boundary(&mut self, boundary: Lsn) {
        self.prefix.note_boundary(boundary);
    }

    /// An extent of this chain was cut and is on its way.
    pub fn cut(&mut self, extent: &CutExtent) {
        self.cut_end = self.cut_end.max(extent.cut.range.end());
        self.prefix.note_boundary(extent.boundary);
    }

    /// End of what was cut: it will be durable if this process lives on.
    #[must_use]
    pub fn cut_end(&self) -> Lsn {
        self.cut_end
    }

    /// The store confirmed an extent.
    pub fn stored(&mut self, stored: &Stored) {
        let cut = stored.extent.cut;
        self.held.add(stored.timeline, cut.range, cut.greatest_time);
        if stored.chain == self.chain {
            self.prefix.complete(stored.extent.cut.range);
        }
    }

    /// End of the chain's contiguous durable WAL.
    #[must_use]
    pub fn durable_end(&self) -> Lsn {
        self.prefix.durable_end()
    }

    /// The flush position to tell the server; `Lsn::INVALID` (PostgreSQL ignores it) while there is
    /// none.
    #[must_use]
    pub fn flush_position(&mut self) -> Lsn {
        let position = self.prefix.acknowledgeable().unwrap_or(Lsn::INVALID);
        if position >= self.floor {
            self.told = self.told.max(position);
        }
        self.told
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::super::cutter::{Cut, CutReason};
    use super::*;
    use crate::clock::Clock;
    use crate::pg::SystemId;
    use crate::repo::{ClusterName, ExtentName};
    use crate::store::Store;
    use crate::store::directory::Directory;

    fn range(start: u64, end: u64) -> LsnRange {
        LsnRange::new(Lsn(start), Lsn(end)).unwrap()
    }

    fn stored(start: u64, end: u64, chain: u64) -> Stored {
        let cut = Cut { range: range(start, end), greatest_time: None, reason: CutReason::Idle };
        let extent =
            CutExtent { cut, boundary: Lsn(end), commit_times: Vec::new(), barriers: Vec::new() };
        Stored { extent, timeline: TimelineId::FIRST, chain, stored_bytes: 1 }
    }

    fn attempt(store_from: u64) -> Attempt {
        Attempt {
            timeline: TimelineId::FIRST,
            stream_from: Lsn(store_from),
            store_from: Lsn(store_from),
            known: Vec::new(),
            gap: None,
        }
    }

    #[tokio::test]
    async fn what_an_earlier_life_stored_is_durable_before_it_counts() {
        let folder = tempfile::tempdir().unwrap();
        let clock = Clock::system();
        let store = || Arc::new(Directory::new(folder.path(), &clock));
        let cluster = ClusterName::new("main").unwrap();
        let (earlier, ours) = (store(), store());
        let before =
            Repository::create(earlier, cluster.clone(), SystemId(7), &clock).await.unwrap();
        let name = ExtentName { timeline: TimelineId::FIRST, range: range(0, 100), time: None };
        let name = before.name(&Object::Extent(name)).unwrap();
        before.store().put_if_absent(&name, Bytes::new()).await.unwrap();
        let repository = Repository::open(ours.clone(), cluster, &clock).await.unwrap();
        let synced = || ours.latencies().fsync.summary().count;
        assert_eq!(synced(), 0);
        let held = Held::load(&repository).await.unwrap();
        assert_eq!(held.ranges(), [(TimelineId::FIRST, range(0, 100))]);
        assert!(synced() >= 3, "the folder of the timeline, and those above it");
    }

    /// The first page of a timeline is not asked for alone: what is behind the timeline is asked for at the
    /// same time.
    #[tokio::test(start_paused = true)]
    async fn a_long_listing_is_read_by_several_requests_at_a_time() {
        let clock = Clock::simulated(jiff::Timestamp::UNIX_EPOCH, 5);
        let (memory, repository) = Repository::in_memory(&clock).await;
        for number in 0..2500_u64 {
            // Every second one has a hole behind it, and the last have their times kept.
            let range = range(number * 100, number * 100 + 100 - number % 2);
            let time = Some(PgTime(number.cast_signed()));
            let name = ExtentName { timeline: TimelineId::FIRST, range, time };
            let name = repository.name(&Object::Extent(name)).unwrap();
            memory.put_if_absent(&name, Bytes::new()).await.unwrap();
        }
        let both = Arc::new(tokio::sync::Barrier::new(2));
        let meet = || {
            let both = Arc::clone(&both);
            async move {
                both.wait().await;
            }
        };
        let cluster = repository.cluster();
        memory.before_list(&cluster.wal_prefix(), async {});
        memory.before_list(&cluster.wal_prefix(), meet());
        memory.before_list(&cluster.timeline_prefix(TimelineId::FIRST), meet());
        let patience = std::time::Duration::from_secs(60);
        let held = tokio::time::timeout(patience, Held::load(&repository)).await.unwrap().unwrap();
        let ranges = held.ranges();
        assert_eq!((ranges.len(), held.times.len()), (1250, 2500));
        assert_eq!(ranges[1249], (TimelineId::FIRST, range(249_800, 249_999)));
    }

    #[test]
    fn the_server_is_told_nothing_before_the_position_of_its_slot() {
        let mut ledger = Ledger::new(Held::default());
        ledger.begin(&attempt(1000), Lsn(1500));
        ledger.note_boundary(Lsn(1200));
        ledger.stored(&stored(1000, 1400, 1));
        assert_eq!(ledger.flush_position(), Lsn::INVALID);
        ledger.note_boundary(Lsn(1600));
        ledger.stored(&stored(1400, 1700, 1));
        assert_eq!(ledger.flush_position(), Lsn(1600));
    }

    #[test]
    fn a_stream_that_begins_at_its_slot_tells_that_position_at_once() {
        let mut ledger = Ledger::new(Held::default());
        ledger.begin(&attempt(1000), Lsn(1000));
        assert_eq!(ledger.flush_position(), Lsn(1000));
    }

    #[test]
    fn an_older_chain_does_not_move_the_flush_position() {
        let mut ledger = Ledger::new(Held::default());
        ledger.begin(&attempt(1000), Lsn(1000));
        ledger.give_up_before(Lsn(9000));
        assert_eq!(ledger.flush_position(), Lsn(9000));
        ledger.stored(&stored(1000, 1400, 1));
        assert_eq!(ledger.flush_position(), Lsn(9000));
        assert_eq!(ledger.durable_end(), Lsn(9000));
        assert_eq!(ledger.held().ranges(), vec![(TimelineId::FIRST, range(1000, 1400))]);
        ledger.note_boundary(Lsn(9100));
        ledger.stored(&stored(9000, 9100, 2));
        assert_eq!(ledger.flush_position(), Lsn(9100));
    }

    #[test]
    fn what_an_earlier_life_stored_past_a_hole_counts_once_the_hole_is_filled() {
        let mut ledger = Ledger::new(Held::default());
        let known = vec![range(1100, 1300)];
        ledger.begin(&Attempt { known, ..attempt(1000) }, Lsn(1000));
        assert_eq!(ledger.durable_end(), Lsn(1000));
        ledger.stored(&stored(1000, 1100, 1));
        assert_eq!(ledger.durable_end(), Lsn(1300));
    }
}
