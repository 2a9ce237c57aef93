//! Decides where the received WAL is cut into extents.
//!
//! Bytes, landmarks and the time go in; out comes "cut here, because", never an I/O. An extent ends
//! when it is full, where its segment or timeline ends, on shutdown or request, when the oldest
//! commit in it has waited for the flush interval, or, without a commit, when its oldest byte has
//! waited for the much longer idle interval: so a quiet database costs almost no requests.
//!
//! # Invariants
//! An extent never crosses a segment boundary, is never empty, and never holds more than
//! [`EXTENT_BYTES_MAX`].

use std::time::Duration;

use crate::clock::Instant;
use crate::pg::{Lsn, LsnRange, PgTime, SegmentSize};

/// Most plain bytes of one extent: the default segment size, so that a busy default cluster needs
/// one object a segment, and a bound on what a reader must hold.
pub const EXTENT_BYTES_MAX: u64 = 16 << 20;

/// When extents are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutPolicy {
    /// Size of the server's WAL segments.
    pub segment_size: SegmentSize,
    /// Longest that a received commit waits before its extent is cut.
    pub flush_interval: Duration,
    /// Longest that received WAL without a commit waits.
    pub idle_flush_interval: Duration,
}

/// Why an extent is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutReason {
    /// It holds as much as an extent may.
    Full,
    /// Its last byte is the last of a segment.
    SegmentEnd,
    /// Its sealed form has reached what the memory budget grants to one extent.
    Budget,
    /// The next byte is in the repository already.
    AlreadyStored,
    /// A commit in it has waited for the flush interval.
    Commit,
    /// Its oldest byte has waited for the idle flush interval.
    Idle,
    /// Somebody waits for a position inside it.
    Requested,
    /// The timeline or the connection ended here.
    StreamEnd,
    /// The process is asked to stop.
    Shutdown,
}

/// An extent that is complete as far as its bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The WAL inside.
    pub range: LsnRange,
    /// Greatest time of the commit and abort records that end inside: what a target in time is
    /// compared with.
    pub greatest_time: Option<PgTime>,
    /// Why here.
    pub reason: CutReason,
}

/// The extent that is being filled.
#[derive(Clone, Debug)]
pub struct Cutter {
    policy: CutPolicy,
    start: Lsn,
    end: Lsn,
    oldest_byte: Option<Instant>,
    oldest_commit: Option<Instant>,
    greatest_time: Option<PgTime>,
    requested_end: Lsn,
}

impl Cutter {
    /// Begins an extent at `start`.
    #[must_use]
    pub fn new(policy: CutPolicy, start: Lsn) -> Self {
        Self {
            policy,
            start,
            end: start,
            oldest_byte: None,
            oldest_commit: None,
            greatest_time: None,
            requested_end: Lsn::INVALID,
        }
    }

    /// Changes the intervals, for the extent being filled too.
    pub fn set_policy(&mut self, policy: CutPolicy) {
        self.policy = policy;
    }

    /// The bytes received since the last cut.
    #[must_use]
    pub fn pending(&self) -> LsnRange {
        LsnRange::new(self.start, self.end).expect("an extent runs forward")
    }

    /// How many bytes this extent can still take; 0 means that it must be cut now.
    #[must_use]
    pub fn room_bytes(&self) -> u64 {
        let full = EXTENT_BYTES_MAX - self.pending().len_bytes();
        if self.must_cut() == Some(CutReason::SegmentEnd) {
            return 0;
        }
        full.min(self.policy.segment_size.end_of(self.end).saturating_since(self.end))
    }

    /// Takes note of bytes that follow on.
    ///
    /// # Panics
    /// When they exceed [`Cutter::room_bytes`]: the caller splits.
    pub fn received(&mut self, len_bytes: u64, now: Instant) {
        assert!(len_bytes <= self.room_bytes(), "{len_bytes} bytes past the end of the extent");
        if len_bytes > 0 {
            self.end = Lsn(self.end.0 + len_bytes);
            self.oldest_byte.get_or_insert(now);
        }
    }

    /// Takes note of a record, its last byte inside the extent, that somebody waits for: a commit,
    /// or one whose loss would be noticed as much (prepare, restore point).
    pub fn committed(&mut self, now: Instant) {
        self.oldest_commit.get_or_insert(now);
    }

    /// Takes note of the time in a commit or abort record, its last byte inside the extent.
    pub fn timed(&mut self, time: PgTime) {
        self.greatest_time = self.greatest_time.max(Some(time));
    }

    /// Somebody waits for everything before `end`: what was received of it is due at once.
    pub fn request(&mut self, end: Lsn) {
        self.requested_end = self.requested_end.max(end);
    }

    /// Whether a commit is waiting in this extent.
    #[must_use]
    pub fn holds_commit(&self) -> bool {
        self.oldest_commit.is_some()
    }

    /// Why the extent cannot take another byte, if so.
    #[must_use]
    pub fn must_cut(&self) -> Option<CutReason> {
        if self.start == self.end {
            None
        } else if self.policy.segment_size.start_of(self.end) == self.end {
            Some(CutReason::SegmentEnd)
        } else if self.pending().len_bytes() >= EXTENT_BYTES_MAX {
            Some(CutReason::Full)
        } else {
            None
        }
    }

    /// Why the extent should be cut now, if it should.
    #[must_use]
    pub fn due(&self, now: Instant) -> Option<CutReason> {
        let aged = |since: Option<Instant>, interval: Duration| {
            since.is_some_and(|since| now.saturating_duration_since(since) >= interval)
        };
        if let Some(reason) = self.must_cut() {
            Some(reason)
        } else if self.start == self.end {
            None
        } else if self.start < self.requested_end {
            Some(CutReason::Requested)
        } else if aged(self.oldest_commit, self.policy.flush_interval) {
            Some(CutReason::Commit)
        } else if aged(self.oldest_byte, self.policy.idle_flush_interval) {
            Some(CutReason::Idle)
        } else {
            None
        }
    }

    /// When the extent becomes due if nothing more arrives; `None` while it is empty.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let idle = self.oldest_byte?.checked_add(self.policy.idle_flush_interval);
        let commit = self.oldest_commit.and_then(|at| at.checked_add(self.policy.flush_interval));
        if self.start < self.requested_end {
            return self.oldest_byte;
        }
        [idle, commit].into_iter().flatten().min()
    }

    /// Ends the extent at what was received and begins the next; `None` when it is empty.
    pub fn cut(&mut self, reason: CutReason) -> Option<Cut> {
        let range = self.pending();
        if range.is_empty() {
            return None;
        }
        let cut = Cut { range, greatest_time: self.greatest_time, reason };
        let requested_end = self.requested_end;
        *self = Self { requested_end, ..Self::new(self.policy, self.end) };
        Some(cut)
    }

    /// Moves an empty extent to `start`, where storing goes on.
    ///
    /// # Panics
    /// When bytes are pending: they would be lost.
    pub fn restart_at(&mut self, start: Lsn) {
        assert!(self.start == self.end, "bytes are pending");
        let requested_end = self.requested_end;
        *self = Self { requested_end, ..Self::new(self.policy, start) };
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub(super) mod tests {
    use super::*;
    use crate::clock::Clock;
    use proptest::prelude::*;

    pub(in crate::capture::stream) const SEGMENT: u64 = 1 << 20;

    pub(in crate::capture::stream) fn policy() -> CutPolicy {
        CutPolicy {
            segment_size: SegmentSize::new(SEGMENT as u32).unwrap(),
            flush_interval: Duration::from_secs(1),
            idle_flush_interval: Duration::from_secs(60),
        }
    }

    fn start() -> Instant {
        Clock::system().instant()
    }

    #[test]
    fn an_empty_extent_is_never_due_and_never_cut() {
        let mut cutter = Cutter::new(policy(), Lsn(SEGMENT));
        let now = start();
        assert_eq!(cutter.due(now + Duration::from_secs(1000)), None);
        assert_eq!(cutter.deadline(), None);
        assert_eq!(cutter.cut(CutReason::Shutdown), None);
    }

    #[test]
    fn idle_records_wait_for_the_idle_interval_and_a_commit_for_the_flush_interval() {
        let mut cutter = Cutter::new(policy(), Lsn(SEGMENT));
        let now = start();
        cutter.received(100, now);
        let second = Duration::from_secs(1);
        assert_eq!(cutter.due(now + 59 * second), None);
        assert_eq!(cutter.due(now + 60 * second), Some(CutReason::Idle));
        assert_eq!(cutter.deadline(), Some(now + 60 * second));
        cutter.committed(now + 5 * second);
        cutter.timed(PgTime(7));
        cutter.received(10, now + 6 * second);
        cutter.committed(now + 6 * second);
        cutter.timed(PgTime(5));
        assert_eq!(cutter.deadline(), Some(now + 6 * second));
        assert_eq!(cutter.due(now + 6 * second), Some(CutReason::Commit));
        let cut = cutter.cut(CutReason::Commit).unwrap();
        assert_eq!(cut.range, LsnRange::new(Lsn(SEGMENT), Lsn(SEGMENT + 110)).unwrap());
        assert_eq!(cut.greatest_time, Some(PgTime(7)));
        assert_eq!(cutter.deadline(), None);
        assert!(!cutter.holds_commit());
    }

    #[test]
    fn a_segment_end_must_be_cut_before_another_byte() {
        let mut cutter = Cutter::new(policy(), Lsn(SEGMENT + 8));
        let now = start();
        assert_eq!(cutter.room_bytes(), SEGMENT - 8);
        cutter.received(SEGMENT - 8, now);
        assert_eq!(cutter.must_cut(), Some(CutReason::SegmentEnd));
        assert_eq!(cutter.room_bytes(), 0);
        cutter.cut(CutReason::SegmentEnd).unwrap();
        assert_eq!(cutter.room_bytes(), SEGMENT);
    }

    #[test]
    fn a_large_segment_is_cut_when_the_extent_is_full() {
        let policy = CutPolicy { segment_size: SegmentSize::new(64 << 20).unwrap(), ..policy() };
        let mut cutter = Cutter::new(policy, Lsn(64 << 20));
        cutter.received(EXTENT_BYTES_MAX, start());
        assert_eq!(cutter.must_cut(), Some(CutReason::Full));
    }

    #[test]
    fn a_request_makes_due_what_lies_before_it_and_nothing_after() {
        let mut cutter = Cutter::new(policy(), Lsn(SEGMENT));
        let now = start();
        cutter.request(Lsn(SEGMENT + 50));
        assert_eq!(cutter.due(now), None);
        cutter.received(20, now);
        assert_eq!(cutter.due(now), Some(CutReason::Requested));
        assert_eq!(cutter.deadline(), Some(now));
        cutter.cut(CutReason::Requested).unwrap();
        cutter.received(40, now);
        assert_eq!(cutter.due(now), Some(CutReason::Requested));
        cutter.cut(CutReason::Requested).unwrap();
        cutter.received(40, now);
        assert_eq!(cutter.due(now), None);
    }

    proptest! {
        #[test]
        fn cuts_tile_the_wal_without_crossing_segments(
            offset in 0..SEGMENT,
            steps in prop::collection::vec((1..300_000_u64, any::<bool>(), 0..3000_u64), 1..60),
        ) {
            let mut now = start();
            let first = Lsn(SEGMENT + offset);
            let mut cutter = Cutter::new(policy(), first);
            let mut cuts = Vec::new();
            let mut received = 0;
            for (len, commit, wait_ms) in steps {
                let mut left = len;
                while left > 0 {
                    let take = left.min(cutter.room_bytes());
                    prop_assert!(take > 0);
                    cutter.received(take, now);
                    left -= take;
                    received += take;
                    if let Some(reason) = cutter.must_cut() {
                        cuts.push(cutter.cut(reason).unwrap());
                    }
                }
                if commit && cutter.deadline().is_some() {
                    cutter.committed(now);
                }
                now += Duration::from_millis(wait_ms);
                prop_assert_eq!(
                    cutter.due(now).is_some(),
                    cutter.deadline().is_some_and(|at| at <= now)
                );
                if let Some(reason) = cutter.due(now) {
                    cuts.push(cutter.cut(reason).unwrap());
                }
            }
            cuts.extend(cutter.cut(CutReason::Shutdown));
            let mut at = first;
            for cut in &cuts {
                prop_assert_eq!(cut.range.start(), at);
                prop_assert!(!cut.range.is_empty());
                let last = Lsn(cut.range.end().0 - 1);
                let size = policy().segment_size;
                prop_assert_eq!(size.number_of(cut.range.start()), size.number_of(last));
                at = cut.range.end();
            }
            prop_assert_eq!(at, Lsn(first.0 + received));
        }
    }
}
