//! Takes the received WAL apart into what is to be stored, cut into extents.
//!
//! Bytes come in as the server sends them; [`Step`]s come out in the order they must happen. The
//! decoder sees every byte; what the repository holds already is decoded and not stored again, so
//! that each extent's greatest time is right wherever a stream begins.
//!
//! # Invariants
//! 1. The bytes of the `Store` steps between two `Cut`s are exactly the range of the second.
//! 2. A commit belongs to the extent that holds the last byte of its record.
//! 3. Bytes follow each other without a hole; a server that leaves one out is not believed.
//! 4. What is stored already is compared as far as it can be (see [`super::overlap`]).

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;

use super::cutter::{Cut, CutPolicy, CutReason, Cutter};
use super::overlap::Overlap;
use super::resume::Attempt;
use super::tail::{Comparison, Suspects, Tail};
use crate::clock::Instant;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, PgTime, SegmentSize, TimelineId};
use crate::repo::marks::Barrier;
use crate::wal::{CheckpointKind, Landmark, Scanner, holds_known_page};

/// Most commit times kept of one extent for the latency histogram. The first ones are kept: they
/// wait longest, so sampling never flatters.
const COMMIT_TIMES_MAX: usize = 1024;
/// Most barriers kept of one extent: damage ends with a segment, and for each record by which it goes on with
/// `wal_level = minimal` a server is stopped and started; a backup in between ends with a segment, where
/// extents end too.
const BARRIERS_MAX: usize = 1024;

/// What is to be done with received WAL, in order.
#[derive(Debug)]
pub enum Step {
    /// Append these bytes to the extent being filled.
    Store {
        /// Position of the first byte.
        start: Lsn,
        /// The bytes: a slice of what was received.
        piece: Bytes,
    },
    /// The extent being filled is complete.
    Cut(CutExtent),
    /// The repository holds everything up to here already, and a record ends here.
    Boundary(Lsn),
    /// What is to be stored now only a base backup taken later leads past.
    Barrier(Barrier),
}

/// A complete extent and what is known about the records in it.
#[derive(Debug)]
pub struct CutExtent {
    /// Range, greatest time and reason.
    pub cut: Cut,
    /// The last position in or at the end of the range where a record ends; `Lsn::INVALID` when none is
    /// known yet.
    pub boundary: Lsn,
    /// Times of the first commits inside.
    pub commit_times: Vec<PgTime>,
    /// What no backup from before leads past: each is marked in the repository before the extent is put.
    /// A record by which the server went on with `wal_level = minimal` ends inside, and of damaged WAL the
    /// first bytes that could not be decoded are.
    pub barriers: Vec<Barrier>,
}

/// Most places remembered where the server sends damaged WAL again: a stream that begins anew comes across
/// those of the last two segments, which is at most one each.
const UNREADABLE_MAX: usize = 16;
/// For so long a server that sends damaged WAL is asked again before that is stored as it is, with a mark that
/// stays. A standby sends WAL that it has not replayed; when it cannot read that, it fetches the segment anew
/// after `wal_retrieve_retry_interval` (5 s, `WaitForWALToBecomeAvailable`), and a page that only its memory
/// holds wrongly is read from the disk again. The slot keeps the WAL meanwhile.
const HEALS_WITHIN: Duration = Duration::from_secs(30);

/// What earlier connections tell of WAL that cannot be read: ends of the last records before.
#[derive(Clone, Debug, Default)]
pub struct Unreadable {
    /// Where the decoder failed last, and when it first failed there, until it is past that.
    last: Option<(Lsn, Instant)>,
    /// Where it failed for so long that the server has no other WAL.
    again: BTreeSet<Lsn>,
    /// The server's pages are of a version that is known: others are damaged.
    pages_are_known: bool,
    /// What was stored of records that could not be read then.
    suspects: Suspects,
}

impl Unreadable {
    /// The decoder failed after `last_record_end`.
    pub fn note(&mut self, last_record_end: Lsn, now: Instant) {
        let first = self.last.filter(|(at, _)| *at == last_record_end).map(|(_, first)| first);
        self.last = Some((last_record_end, first.unwrap_or(now)));
        if first.is_none_or(|first| now.saturating_duration_since(first) < HEALS_WITHIN) {
            return;
        }
        self.again.insert(last_record_end);
        if self.again.len() > UNREADABLE_MAX {
            // Not the one that is met now, or it would be for ever.
            let others = self.again.iter().copied();
            if let Some(at) = others.filter(|at| *at != last_record_end).min() {
                self.again.remove(&at);
            }
        }
    }

    /// The connection on which `intake` received has ended.
    pub fn learn(&mut self, intake: &Intake) {
        self.pages_are_known |= intake.unreadable.pages_are_known;
        let reached = intake.last_record_end().unwrap_or(intake.received_end());
        self.last = self.last.filter(|(at, _)| reached <= *at);
        self.suspects.forget(&intake.comparison, reached);
        let has_failed = self.last.is_some_and(|(at, _)| intake.last_record_end() == Some(at));
        if let Some(suspect) = intake.tail.suspect(intake.timeline).filter(|_| has_failed) {
            self.suspects.note(suspect);
        }
    }

    /// In the WAL of a server whose pages are known, a page of another one is damaged.
    fn as_damage(&self, error: Error) -> Error {
        match error.kind() {
            Kind::Unsupported if self.pages_are_known => {
                Error::new(Kind::Corrupt, error.message().to_owned())
            }
            _ => error,
        }
    }

    /// Where the decoder failed and has to come past still.
    #[must_use]
    pub fn after(&self) -> Option<Lsn> {
        self.last.map(|(at, _)| at)
    }
}

/// The WAL received on one connection.
#[derive(Debug)]
pub struct Intake {
    policy: CutPolicy,
    timeline: TimelineId,
    /// `None` while a damaged segment is stored unread.
    scanner: Option<Scanner>,
    /// Where the decoder began: perhaps in the middle of a record.
    decoded_from: Lsn,
    /// Where WAL is stored unread, up to the end of its segment; damage elsewhere is reported.
    unreadable: Unreadable,
    cutter: Cutter,
    received_end: Lsn,
    /// Ranges at or after `received_end` that are stored already, ascending.
    known: VecDeque<LsnRange>,
    /// End of the last of those that was read, if no record goes on there.
    known_sound_end: Lsn,
    /// What the known ranges should turn out to be.
    overlap: Overlap,
    commit_times: Vec<PgTime>,
    barriers: Vec<Barrier>,
    /// Of a segment that is stored unread, what nothing is known of, until more of it is stored.
    unread: Option<LsnRange>,
    /// What was stored of the record that is not whole yet.
    tail: Tail,
    /// What earlier connections stored of damaged records, and what the server has there now.
    comparison: Comparison,
}

impl Intake {
    /// Begins as `attempt` says; what is stored already is compared with `overlap`.
    #[must_use]
    pub fn new(
        policy: CutPolicy,
        attempt: &Attempt,
        overlap: Overlap,
        unreadable: Unreadable,
    ) -> Self {
        let before = LsnRange::new(attempt.stream_from, attempt.store_from);
        let before = before.filter(|range| !range.is_empty());
        let comparison = Comparison::new(&unreadable.suspects, attempt.timeline);
        Self {
            policy,
            timeline: attempt.timeline,
            scanner: Some(Scanner::new(policy.segment_size, attempt.stream_from).of_sent_wal()),
            decoded_from: attempt.stream_from,
            unreadable,
            cutter: Cutter::new(policy, attempt.store_from),
            received_end: attempt.stream_from,
            known: before.into_iter().chain(attempt.known.iter().copied()).collect(),
            known_sound_end: Lsn::INVALID,
            overlap,
            commit_times: Vec::new(),
            barriers: Vec::new(),
            unread: None,
            tail: Tail::default(),
            comparison,
        }
    }

    /// First position not yet received.
    #[must_use]
    pub fn received_end(&self) -> Lsn {
        self.received_end
    }

    /// The extent being filled: when it is due, and to request a cut.
    pub fn cutter(&mut self) -> &mut Cutter {
        &mut self.cutter
    }

    /// Sets after how long a commit is due; zero while somebody waits for each.
    pub fn set_flush_interval(&mut self, interval: Duration) {
        self.policy.flush_interval = interval;
        self.cutter.set_policy(self.policy);
    }

    /// Takes the bytes at `start` and appends what is to be done with them to `steps`.
    ///
    /// # Errors
    /// `unavailable` when the bytes do not follow on; `corrupt` when the decoder cannot read them and has not
    /// failed there for long enough; `unsupported` when no page was seen yet that any supported server
    /// writes; `conflict` when they are other WAL than is stored. The bytes before are in `steps` or pending.
    pub fn take(
        &mut self,
        start: Lsn,
        mut data: Bytes,
        now: Instant,
        steps: &mut Vec<Step>,
    ) -> Result<()> {
        if start != self.received_end {
            let expected = self.received_end;
            return Err(Error::new(
                Kind::Unavailable,
                format!("the server sent WAL at {start} where {expected} was expected"),
            ));
        }
        if !self.unreadable.pages_are_known {
            let known = holds_known_page(start, &data, self.policy.segment_size);
            self.unreadable.pages_are_known = known;
        }
        while !data.is_empty() {
            let known = self.known_end();
            let room = match known {
                Some(end) => self.next_edge(end).saturating_since(self.received_end),
                None => self.room_bytes(),
            };
            let len = usize::try_from(room).unwrap_or(usize::MAX).min(data.len());
            assert!(len > 0, "an extent without room was not cut");
            let piece = data.split_to(len);
            self.decode(&piece, known, now, steps)?;
            if known.is_some() {
                self.comparison.see(self.received_end, &piece);
                self.skip(len as u64, steps);
                self.overlap.end(self.received_end)?;
            } else {
                self.store(piece, now, steps);
            }
        }
        Ok(())
    }

    /// Cuts the extent being filled, if anything is in it.
    pub fn cut(&mut self, reason: CutReason, steps: &mut Vec<Step>) {
        if let Some(cut) = self.cutter.cut(reason) {
            let boundary = self.boundary();
            let commit_times = std::mem::take(&mut self.commit_times);
            let barriers = std::mem::take(&mut self.barriers);
            steps.push(Step::Cut(CutExtent { cut, boundary, commit_times, barriers }));
        }
    }

    /// Whether what is still to come is stored already, in part.
    #[must_use]
    pub fn expects_known(&self) -> bool {
        !self.known.is_empty()
    }

    /// End of the known range that the next byte lies in.
    fn known_end(&self) -> Option<Lsn> {
        let first = self.known.front()?;
        (first.start() <= self.received_end).then(|| first.end())
    }

    /// How far to decode at once in the known range that ends at `known_end`: where a segment begins the
    /// decoder may begin anew.
    fn next_edge(&mut self, known_end: Lsn) -> Lsn {
        let in_step = self.boundary() != Lsn::INVALID;
        self.overlap.begin(self.received_end, in_step);
        let known_end = known_end.min(self.policy.segment_size.end_of(self.received_end));
        self.overlap.edge_after(self.received_end).map_or(known_end, |edge| edge.min(known_end))
    }

    /// Room in the extent being filled, up to the next known range.
    fn room_bytes(&self) -> u64 {
        let next = self.known.front().map_or(Lsn(u64::MAX), |known| known.start());
        self.cutter.room_bytes().min(next.saturating_since(self.received_end))
    }

    fn skip(&mut self, len_bytes: u64, steps: &mut Vec<Step>) {
        self.received_end = Lsn(self.received_end.0 + len_bytes);
        steps.push(Step::Boundary(self.boundary()));
        while self.known.front().is_some_and(|known| known.end() <= self.received_end) {
            self.known.pop_front();
            if self.scanner.as_ref().is_some_and(Scanner::at_record_boundary) {
                self.known_sound_end = self.received_end;
            }
            self.cutter.restart_at(self.received_end);
            self.commit_times.clear();
        }
    }

    fn store(&mut self, piece: Bytes, now: Instant, steps: &mut Vec<Step>) {
        let segment_size = self.policy.segment_size;
        let differing = self.comparison.take_differing().into_iter().filter_map(|range| {
            rest_of_segment(segment_size, Lsn(range.end().0 - 1), range.start())
        });
        for range in differing.chain(self.unread.take()) {
            self.note_barrier(Barrier::damaged(range), steps);
        }
        if let Some(scanner) = &self.scanner {
            self.tail.stored(self.received_end, &piece, scanner.last_record_end());
        }
        let (start, len_bytes) = (self.received_end, piece.len() as u64);
        self.received_end = Lsn(start.0 + len_bytes);
        self.cutter.received(len_bytes, now);
        steps.push(Step::Store { start, piece });
        if self.scanner.is_none() {
            self.cutter.committed(now);
        }
        if let Some(reason) = self.cutter.must_cut() {
            self.cut(reason, steps);
        } else if self.known_end().is_some() {
            self.cut(CutReason::AlreadyStored, steps);
        }
    }

    /// The last record end that is not after what was received; `Lsn::INVALID` before the first one:
    /// where the decoder begins is the start of a page, and a record may go on there. Damaged WAL has
    /// none; there, any position must do, or a synchronous commit behind it would wait for ever.
    #[must_use]
    pub fn boundary(&self) -> Lsn {
        match self.last_record_end() {
            Some(end) if end <= self.decoded_from => Lsn::INVALID,
            known => known.unwrap_or(self.received_end).min(self.received_end),
        }
    }

    /// End of the last record that the decoder read; `None` while a segment is stored unread.
    #[must_use]
    pub fn last_record_end(&self) -> Option<Lsn> {
        self.scanner.as_ref().map(Scanner::last_record_end)
    }

    /// `timeline` begins at `received_end`. What its server sends of a segment that is stored unread is not
    /// read either, and no backup that begins in there is one to rely on. What is stored of it already was
    /// marked by whoever stored it, or was sound then.
    pub fn timeline_begins(&mut self, timeline: TimelineId) {
        if self.scanner.is_none() {
            let at = self.received_end;
            let from = self.known_end().unwrap_or(at);
            self.unread = rest_of_segment(self.policy.segment_size, at, from);
        }
        self.timeline = timeline;
        self.comparison = Comparison::new(&self.unreadable.suspects, timeline);
    }

    /// Lets the decoder see `piece`, which lies at `received_end` and in one extent, or is stored already
    /// as all up to the end that is `known`.
    fn decode(
        &mut self,
        piece: &Bytes,
        known: Option<Lsn>,
        now: Instant,
        steps: &mut Vec<Step>,
    ) -> Result<()> {
        let segment_size = self.policy.segment_size;
        if self.scanner.is_none() && segment_size.start_of(self.received_end) == self.received_end {
            self.scanner = Some(Scanner::new(segment_size, self.received_end).of_sent_wal());
            self.decoded_from = self.received_end;
            self.unread = None;
        }
        let Some(scanner) = &mut self.scanner else { return Ok(()) };
        // Noted only when the whole piece was read: a piece that is refused is not stored, and its
        // commits must not count for the extent before it.
        let mut landmarks = Vec::new();
        let outcome = scanner.feed(piece, &mut |landmark| landmarks.push(landmark));
        match outcome.map_err(|error| self.unreadable.as_damage(error)) {
            Ok(()) => {}
            Err(error) if self.unreadable.again.contains(&scanner.last_record_end()) => {
                tracing::error!(
                    "the server's WAL is damaged near {}; it is stored as it is, and a recovery \
                     will stop there: {error}",
                    self.received_end
                );
                // What is stored already was marked by whoever stored it, or was sound then.
                let read_end = scanner.last_record_end().max(self.known_sound_end);
                let sound_until = known.unwrap_or(read_end);
                self.unread = rest_of_segment(segment_size, self.received_end, sound_until);
                self.scanner = None;
                self.overlap.forget();
            }
            Err(error) => return Err(error),
        }
        for landmark in &landmarks {
            if known.is_none() {
                self.note(landmark, now, steps);
            } else {
                self.overlap.note(landmark);
            }
        }
        Ok(())
    }

    /// Tells the cutter about a record that somebody waits for.
    fn note(&mut self, landmark: &Landmark, now: Instant, steps: &mut Vec<Step>) {
        match landmark {
            Landmark::Commit { time, .. } => {
                self.cutter.committed(now);
                self.cutter.timed(*time);
                if self.commit_times.len() < COMMIT_TIMES_MAX {
                    self.commit_times.push(*time);
                }
            }
            Landmark::Prepare { .. }
            | Landmark::RestorePoint { .. }
            | Landmark::EndOfRecovery { .. }
            | Landmark::BackupEnd { .. } => self.cutter.committed(now),
            // A server that shuts down waits until its last record, this one, is flushed here
            // (`WalSndDone`): it must not wait for the idle interval.
            Landmark::Checkpoint { kind: CheckpointKind::Shutdown, range, .. } => {
                self.cutter.request(range.end());
            }
            // A recovery to a time may stop at any abort. Only `ROLLBACK PREPARED` waits until it is
            // flushed here (`RecordTransactionAbortPrepared`).
            Landmark::Abort { time, prepared, .. } => {
                self.cutter.timed(*time);
                if *prepared {
                    self.cutter.committed(now);
                }
            }
            Landmark::ParameterChange { wal_level: 0, range, .. } => {
                self.note_barrier(Barrier::minimal(range.start()), steps);
            }
            Landmark::Checkpoint { .. }
            | Landmark::Switch { .. }
            | Landmark::Tablespace { .. }
            | Landmark::ParameterChange { .. } => {}
        }
    }

    /// Belongs to the extent being filled.
    fn note_barrier(&mut self, barrier: Barrier, steps: &mut Vec<Step>) {
        steps.push(Step::Barrier(barrier));
        if self.barriers.len() < BARRIERS_MAX {
            self.barriers.push(barrier);
        }
    }
}

/// What `from` leaves of the segment that holds `position`.
fn rest_of_segment(segment_size: SegmentSize, position: Lsn, from: Lsn) -> Option<LsnRange> {
    LsnRange::new(from, segment_size.end_of(position)).filter(|range| !range.is_empty())
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
mod tests {

    use super::super::cutter::tests::{SEGMENT, policy};
    use super::super::overlap::Expected;
    use super::super::resume::{OlderWal, Situation, attempts};
    use super::*;
    use crate::clock::Clock;
    use crate::pg::TimelineHistory;
    use crate::wal::craft::Craft;
    use proptest::prelude::*;

    fn attempt(stream_from: u64, store_from: u64, known: &[(u64, u64)]) -> Attempt {
        let known = known.iter().map(|(start, end)| range(*start, *end)).collect();
        let (stream_from, store_from) = (Lsn(stream_from), Lsn(store_from));
        Attempt { timeline: TimelineId::FIRST, stream_from, store_from, known, gap: None }
    }

    fn range(start: u64, end: u64) -> LsnRange {
        LsnRange::new(Lsn(start), Lsn(end)).unwrap()
    }

    /// An intake of a chain that begins with a segment, of which nothing is stored.
    fn from_segment(unreadable: Unreadable) -> Intake {
        Intake::new(policy(), &attempt(SEGMENT, SEGMENT, &[]), Overlap::default(), unreadable)
    }

    /// Of a server that sent WAL for long that cannot be read after each of these.
    fn unreadable(ends: &[Lsn]) -> Unreadable {
        let mut unreadable = Unreadable::default();
        ends.iter().for_each(|end| unreadable.note_for_long(*end));
        unreadable
    }

    impl Unreadable {
        fn note_for_long(&mut self, at: Lsn) {
            let now = Clock::system().instant();
            self.note(at, now);
            self.note(at, now + HEALS_WITHIN);
        }
    }

    #[test]
    fn damage_is_known_when_it_lasts_and_what_was_known_stays_so() {
        let mut known = Unreadable::default();
        let began = Clock::system().instant();
        for (at, second, again) in [
            (5, 0, 0),
            (5, 1, 0),
            (5, 29, 0),
            (5, 31, 1),
            (9, 31, 1),
            (7, 50, 1),
            (9, 62, 1),
            (9, 91, 1),
            (9, 92, 2),
            (5, 93, 2),
            (7, 94, 2),
            (7, 200, 3),
        ] {
            known.note(Lsn(at), began + Duration::from_secs(second));
            assert_eq!(known.again.len(), again, "{at} at {second} s");
        }
        (100..200).for_each(|at| known.note_for_long(Lsn(at)));
        assert_eq!(known.again.first(), Some(&Lsn(200 - UNREADABLE_MAX as u64)));
        // One that lies before all that are known is known as well.
        known.note_for_long(Lsn(5));
        assert_eq!(known.again.len(), UNREADABLE_MAX);
        assert!(known.again.contains(&Lsn(5)));
    }

    #[test]
    fn a_server_that_heals_its_wal_and_damages_it_again_is_asked_again() {
        let (wal, commits) = crafted(&[5000, 5000]);
        let (mut known, now) = (Unreadable::default(), Clock::system().instant());
        let at = commits[0].1.end();
        known.note(at, now);
        let mut intake = from_segment(known.clone());
        let take = |intake: &mut Intake, bytes: &[u8]| {
            let piece = Bytes::copy_from_slice(bytes);
            intake.take(intake.received_end(), piece, now, &mut Vec::new()).unwrap();
        };
        let place = (at.0 - SEGMENT) as usize;
        take(&mut intake, &wal[..place]);
        known.learn(&intake);
        assert_eq!(known.after(), Some(at), "it came as far as that");
        take(&mut intake, &wal[place..]);
        known.learn(&intake);
        assert_eq!(known.after(), None);
        known.note(at, now + HEALS_WITHIN);
        assert!(known.again.is_empty());
    }

    #[test]
    fn pages_of_an_unknown_server_are_refused_and_never_stored_as_damaged() {
        let unknown = 0xD199_u16.to_le_bytes();
        let (mut wal, _) = crafted(&[60_000]);
        wal.truncate(4 * 8192);
        let now = Clock::system().instant();
        let mut known = Unreadable::default();
        let mut received = |wal: &[u8]| {
            let mut intake = from_segment(known.clone());
            let piece = Bytes::copy_from_slice(wal);
            let outcome = intake.take(Lsn(SEGMENT), piece, now, &mut Vec::new());
            known.learn(&intake);
            outcome.unwrap_err()
        };
        wal[..2].copy_from_slice(&unknown);
        let one_bad = wal.clone();
        wal.chunks_mut(8192).for_each(|page| page[..2].copy_from_slice(&unknown));
        for _ in 0..3 {
            let refused = received(&wal);
            assert_eq!(refused.kind(), Kind::Unsupported);
            assert!(refused.hint_text().is_some());
        }
        assert_eq!(received(&one_bad).kind(), Kind::Corrupt);
        assert_eq!(received(&wal).kind(), Kind::Corrupt, "it is the same server");
    }

    #[test]
    fn a_damaged_record_that_is_longer_than_a_segment_is_marked_from_its_start() {
        let mut craft = Craft::new(15, policy().segment_size, Lsn(SEGMENT));
        let before = craft.commit(3, PgTime(1000));
        let record = craft.filler(5 << 19);
        craft.commit(4, PgTime(2000));
        let mut wal = craft.bytes;
        wal[(record.start().0 - SEGMENT) as usize + 100_000] ^= 1;
        let history = TimelineHistory::first_timeline_only(TimelineId::FIRST);
        let (mut known, mut stored_end) = (Unreadable::default(), Lsn(SEGMENT));
        let mut marks = Vec::new();
        let began = Clock::system().instant();
        for minute in 0..3 {
            let now = began + Duration::from_mins(minute);
            let stored = LsnRange::new(Lsn(SEGMENT), stored_end).filter(|held| !held.is_empty());
            let attempts = attempts(&Situation {
                history: &history,
                stored: &stored
                    .map(|held| (TimelineId::FIRST, held))
                    .into_iter()
                    .collect::<Vec<_>>(),
                slot_restart_lsn: if minute == 0 { Lsn(SEGMENT) } else { before.end() },
                segment_size: policy().segment_size,
                older: OlderWal::Ask,
                unreadable_after: known.after(),
            });
            let attempt = &attempts[0];
            let mut intake = Intake::new(policy(), attempt, Overlap::default(), known.clone());
            let mut steps = Vec::new();
            for piece in wal[(attempt.stream_from.0 - SEGMENT) as usize..].chunks(100_000) {
                let piece = Bytes::copy_from_slice(piece);
                if intake.take(intake.received_end(), piece, now, &mut steps).is_err() {
                    known.note(intake.last_record_end().unwrap(), now);
                    break;
                }
            }
            known.learn(&intake);
            intake.cut(CutReason::StreamEnd, &mut steps);
            marks.extend(told(&steps));
            stored_end = extents(steps).last().map_or(stored_end, |(last, _)| last.cut.range.end());
        }
        let damaged = LsnRange::new(before.end(), Lsn(4 * SEGMENT)).map(Barrier::damaged);
        assert_eq!(marks, Vec::from_iter(damaged));
        assert_eq!(stored_end, Lsn(SEGMENT + wal.len() as u64));
    }

    /// The first half of a record is stored, the second one shows that it is damaged; then the server heals it,
    /// and only the second half is stored.
    #[test]
    fn a_record_that_heals_is_marked_if_what_is_stored_of_it_was_the_damaged_part() {
        let (sound, commits) = crafted(&[1000, 50_000, 1000]);
        let at = commits[0].1.end();
        let half = (at.0 - SEGMENT) as usize + 20_000;
        // In the last piece, which is refused and not stored.
        let behind = (commits[1].1.start().0 - SEGMENT) as usize - 100;
        let now = Clock::system().instant();
        for (flipped, expected) in
            [(half - 5000, vec![Barrier::damaged(range(at.0, 2 * SEGMENT))]), (behind, vec![])]
        {
            let mut known = Unreadable::default();
            let mut damaged = sound.clone();
            damaged[flipped] ^= 1;
            let mut intake = from_segment(known.clone());
            let mut take = |bytes: &[u8]| {
                let piece = Bytes::copy_from_slice(bytes);
                intake.take(intake.received_end(), piece, now, &mut Vec::new())
            };
            take(&damaged[..half]).unwrap();
            assert_eq!(take(&damaged[half..]).unwrap_err().kind(), Kind::Corrupt);
            known.note(at, now);
            known.learn(&intake);
            let mut stored_end = intake.received_end();
            // A connection on which the server still sends the same; one that breaks before the comparison
            // ends; one of another timeline; and one on which it has healed.
            let second = TimelineId::new(2).unwrap();
            for (timeline, wal, sent, expected) in [
                (TimelineId::FIRST, &damaged, damaged.len(), &[][..]),
                (TimelineId::FIRST, &sound, half - 1000, &[]),
                (second, &sound, half + 500, &[]),
                (TimelineId::FIRST, &sound, sound.len(), &expected),
            ] {
                let attempt = Attempt { timeline, ..attempt(SEGMENT, stored_end.0, &[]) };
                let mut intake = Intake::new(policy(), &attempt, Overlap::default(), known.clone());
                let mut steps = Vec::new();
                let mut outcome = Ok(());
                for bytes in wal[..sent].chunks(7000) {
                    let piece = Bytes::copy_from_slice(bytes);
                    let end = intake.received_end();
                    outcome = outcome.and_then(|()| intake.take(end, piece, now, &mut steps));
                }
                assert_eq!(outcome.is_err(), *wal == damaged);
                known.learn(&intake);
                stored_end = stored_end.max(intake.received_end());
                assert_eq!(told(&steps), expected, "{flipped} {sent}");
            }
            assert_eq!(known.suspects, Suspects::default(), "it is compared once");
        }
    }

    #[test]
    fn what_is_stored_of_a_new_timeline_is_not_marked_for_damage_on_the_one_before() {
        let (mut wal, commits) = crafted(&[100_000; 12]);
        wal[250_000] ^= 1;
        let last_whole = commits.iter().rfind(|(_, range)| range.end() < Lsn(SEGMENT + 250_000));
        let unreadable = unreadable(&[last_whole.unwrap().1.end()]);
        let (switch, known_end) = (SEGMENT + 400_000, SEGMENT + 500_000);
        for (known, from) in [(&[][..], switch), (&[(switch, known_end)], known_end)] {
            let attempt = attempt(SEGMENT, SEGMENT, known);
            let mut intake =
                Intake::new(policy(), &attempt, Overlap::default(), unreadable.clone());
            let (now, mut steps) = (Clock::system().instant(), Vec::new());
            let (before, after) = wal.split_at(400_000);
            for bytes in [before, after] {
                let piece = Bytes::copy_from_slice(bytes);
                intake.take(intake.received_end(), piece, now, &mut steps).unwrap();
                intake.timeline_begins(TimelineId::new(2).unwrap());
            }
            let marked = Barrier::damaged(range(from, 2 * SEGMENT));
            assert_eq!(told(&steps).last(), Some(&marked));
        }
    }

    #[test]
    fn where_a_stream_begins_is_no_record_boundary_before_a_record_has_ended() {
        let (wal, commits) = crafted(&[20_000]);
        let from = SEGMENT + 8192;
        let (clock, known) = (Clock::system(), SEGMENT + wal.len() as u64);
        let mut intake = Intake::new(
            policy(),
            &attempt(from, known, &[]),
            Overlap::default(),
            Unreadable::default(),
        );
        let mut steps = Vec::new();
        let wal = Bytes::from(wal).slice(8192..);
        intake.take(Lsn(from), wal.slice(..5000), clock.instant(), &mut steps).unwrap();
        assert_eq!(intake.boundary(), Lsn::INVALID);
        intake.take(Lsn(from + 5000), wal.slice(5000..), clock.instant(), &mut steps).unwrap();
        assert_eq!(intake.boundary(), commits[0].1.end());
    }

    /// WAL from the start of a segment with a commit after each filler, and the commits.
    fn crafted(fillers: &[usize]) -> (Vec<u8>, Vec<(PgTime, LsnRange)>) {
        let mut craft = Craft::new(15, policy().segment_size, Lsn(SEGMENT));
        let mut commits = Vec::new();
        for (index, filler) in fillers.iter().enumerate() {
            craft.filler(*filler);
            let time = PgTime(1000 + index as i64);
            commits.push((time, craft.commit(index as u32 + 3, time)));
        }
        (craft.bytes, commits)
    }

    /// The first position after the last byte of a crafted commit (34 bytes), without its padding.
    fn commit_end(commit: LsnRange) -> Lsn {
        Lsn(commit.end().0 - 6)
    }

    /// What came out: each cut with its bytes.
    fn extents(steps: Vec<Step>) -> Vec<(CutExtent, Vec<u8>)> {
        let (mut out, mut bytes, mut next) = (Vec::new(), Vec::new(), None);
        for step in steps {
            match step {
                Step::Store { start, piece } => {
                    assert!(next.is_none_or(|next| next == start));
                    next = Some(Lsn(start.0 + piece.len() as u64));
                    bytes.extend_from_slice(&piece);
                }
                Step::Cut(extent) => {
                    assert_eq!(next, Some(extent.cut.range.end()));
                    out.push((extent, std::mem::take(&mut bytes)));
                    next = None;
                }
                Step::Boundary(_) | Step::Barrier(_) => {}
            }
        }
        assert!(bytes.is_empty(), "stored and not cut");
        out
    }

    fn run(attempt: &Attempt, wal: &[u8], piece: usize) -> Vec<(CutExtent, Vec<u8>)> {
        let now = Clock::system().instant();
        let mut intake = Intake::new(policy(), attempt, Overlap::default(), Unreadable::default());
        let mut steps = Vec::new();
        let from = (attempt.stream_from.0 - SEGMENT) as usize;
        for piece in wal[from..].chunks(piece) {
            let start = intake.received_end();
            intake.take(start, Bytes::copy_from_slice(piece), now, &mut steps).unwrap();
        }
        intake.cut(CutReason::Shutdown, &mut steps);
        extents(steps)
    }

    proptest! {
        #[test]
        fn what_is_stored_is_what_was_missing_and_each_commit_counts_where_it_ends(
            fillers in prop::collection::vec(0..120_000_usize, 1..25),
            piece in 1..200_000_usize,
            store_from in 0..500_000_u64,
            known in (500_000..900_000_u64, 1..400_000_u64),
        ) {
            let (wal, commits) = crafted(&fillers);
            let end = SEGMENT + wal.len() as u64;
            let store_from = (SEGMENT + store_from).min(end);
            let known = (SEGMENT + known.0, SEGMENT + known.0 + known.1);
            let attempt = attempt(SEGMENT, store_from, &[known]);
            let stored = run(&attempt, &wal, piece);
            let mut expected = Vec::new();
            let mut position = store_from;
            for (extent, bytes) in &stored {
                let cut = extent.cut.range;
                if position == known.0 {
                    position = known.1;
                }
                prop_assert_eq!(cut.start(), Lsn(position));
                position = cut.end().0;
                prop_assert!(cut.end().0 <= known.0 || cut.start().0 >= known.1);
                let from = (cut.start().0 - SEGMENT) as usize;
                prop_assert!(&wal[from..from + bytes.len()] == bytes.as_slice());
                prop_assert_eq!(bytes.len() as u64, cut.len_bytes());
                let inside = |end: Lsn| cut.start() < end && end <= cut.end();
                let times: Vec<PgTime> =
                    commits.iter().filter(|(_, r)| inside(commit_end(*r))).map(|(t, _)| *t).collect();
                prop_assert_eq!(extent.cut.greatest_time, times.iter().max().copied());
                prop_assert!(extent.boundary <= cut.end());
                expected.extend(times);
            }
            if end > store_from && end <= known.0 {
                prop_assert_eq!(position, end);
            }
            let seen: Vec<PgTime> =
                stored.iter().flat_map(|(extent, _)| extent.commit_times.clone()).collect();
            prop_assert_eq!(seen, expected);
        }
    }

    /// What a stream that begins at `stream_from` says of `wal` where `stored` is held.
    fn compare(stream_from: u64, stored: &[CutExtent], wal: &[u8], piece: usize) -> Result<()> {
        let times = stored.iter().filter_map(|extent| {
            let greatest_time = extent.cut.greatest_time?;
            Some(Expected { timeline: TimelineId::FIRST, range: extent.cut.range, greatest_time })
        });
        let end = stored.last().map_or(Lsn(stream_from), |last| last.cut.range.end());
        let attempt = attempt(stream_from, end.0, &[]);
        let overlap = Overlap::new(times.collect());
        let mut intake = Intake::new(policy(), &attempt, overlap, Unreadable::default());
        let from = (stream_from - SEGMENT) as usize;
        for piece in wal[from..].chunks(piece) {
            let (start, now) = (intake.received_end(), Clock::system().instant());
            let mut steps = Vec::new();
            intake.take(start, Bytes::copy_from_slice(piece), now, &mut steps)?;
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn a_server_that_sends_the_same_again_is_believed_and_one_set_back_is_not(
            fillers in prop::collection::vec(0..60_000_usize, 1..25),
            pieces in (1..100_000_usize, 1..100_000_usize),
            page in 0..60_u64,
            set_back_to in any::<prop::sample::Index>(),
        ) {
            let (wal, commits) = crafted(&fillers);
            let now = Clock::system().instant();
            let mut intake = from_segment(Unreadable::default());
            let mut steps = Vec::new();
            for piece in wal.chunks(pieces.0) {
                let start = intake.received_end();
                intake.take(start, Bytes::copy_from_slice(piece), now, &mut steps).unwrap();
                intake.cut(CutReason::Commit, &mut steps);
            }
            let stored: Vec<CutExtent> =
                extents(steps).into_iter().map(|(extent, _)| extent).collect();
            let stream_from = SEGMENT + (page * 8192).min(wal.len() as u64 / 8192 * 8192);
            compare(stream_from, &stored, &wal, pieces.1).unwrap();

            let lost = set_back_to.index(commits.len());
            let mut craft = Craft::new(15, policy().segment_size, Lsn(SEGMENT));
            for (index, filler) in fillers.iter().enumerate() {
                craft.filler(*filler);
                let later = if index < lost { 0 } else { 1_000_000 };
                craft.commit(index as u32 + 3, PgTime(1000 + index as i64 + later));
            }
            // All that is needed is one extent that is decoded from its start, in step, and whose
            // greatest time is lost.
            let decoded_from = commits.iter().find(|(_, range)| range.start().0 > stream_from);
            let is_told = decoded_from.is_some_and(|(_, first)| stored.iter().any(|extent| {
                extent.cut.range.start() >= first.end()
                    && extent.cut.greatest_time.is_some_and(|time| time >= PgTime(1000 + lost as i64))
            }));
            let outcome = compare(stream_from, &stored, &craft.bytes, pieces.1);
            if is_told {
                prop_assert_eq!(outcome.unwrap_err().kind(), Kind::Conflict);
            }
        }
    }

    #[test]
    fn a_commit_is_not_where_only_its_padding_is() {
        let (wal, commits) = crafted(&[5000, 5000]);
        let first = commit_end(commits[0].1);
        // The byte that is stored already is the commit's last one, or the first of its padding.
        for (known, before) in [(first.0 - 1, None), (first.0, Some(commits[0].0))] {
            let stored = run(&attempt(SEGMENT, SEGMENT, &[(known, known + 1)]), &wal, 1);
            let times: Vec<_> = stored.iter().map(|(extent, _)| extent.cut.greatest_time).collect();
            assert_eq!(times, [before, Some(commits[1].0)]);
            let behind = run(&attempt(SEGMENT, known + 1, &[]), &wal, 1);
            assert_eq!(behind[0].0.commit_times, [commits[1].0]);
        }
    }

    #[test]
    fn a_commit_that_began_before_the_durable_end_is_seen_whole() {
        let (wal, commits) = crafted(&[5000, 5000]);
        let middle = (commits[0].1.start().0 + commits[0].1.end().0) / 2;
        let stored = run(&attempt(SEGMENT, middle, &[]), &wal, 100);
        assert_eq!(stored[0].0.commit_times, [commits[0].0, commits[1].0]);
    }

    #[test]
    fn a_hole_in_what_the_server_sends_is_refused() {
        let now = Clock::system().instant();
        let mut intake = from_segment(Unreadable::default());
        let (wal, _) = crafted(&[500]);
        let later = Lsn(SEGMENT + 8);
        let error = intake.take(later, Bytes::from(wal), now, &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
    }

    #[test]
    fn damaged_wal_is_reported_first_and_then_stored_unread_up_to_the_next_segment() {
        let (mut wal, commits) = crafted(&[100_000; 22]);
        wal[250_000] ^= 1;
        let now = Clock::system().instant();
        let mut intake = from_segment(Unreadable::default());
        let pieces: Vec<Bytes> = wal.chunks(8192).map(Bytes::copy_from_slice).collect();
        let mut steps = Vec::new();
        let mut failed = None;
        for piece in &pieces {
            if let Err(error) = intake.take(intake.received_end(), piece.clone(), now, &mut steps) {
                failed = Some(error);
                break;
            }
        }
        assert_eq!(failed.unwrap().kind(), Kind::Corrupt);
        intake.cut(CutReason::StreamEnd, &mut steps);
        let before = extents(steps);
        let (last, _) = before.last().unwrap();
        assert!(last.cut.range.end() <= Lsn(SEGMENT + 400_000));
        assert!(last.cut.greatest_time <= Some(commits[2].0));

        let last_whole = commits.iter().rfind(|(_, range)| range.end() < Lsn(SEGMENT + 250_000));
        let last_whole = last_whole.unwrap().1.end();
        assert_eq!(intake.last_record_end(), Some(last_whole));
        let mut intake = from_segment(unreadable(&[last_whole]));
        let mut steps = Vec::new();
        for piece in &pieces {
            intake.take(intake.received_end(), piece.clone(), now, &mut steps).unwrap();
        }
        intake.cut(CutReason::Shutdown, &mut steps);
        let told = told(&steps);
        let damaged = Barrier::damaged(LsnRange::new(last_whole, Lsn(2 * SEGMENT)).unwrap());
        assert_eq!(told, [damaged]);
        let all = extents(steps);
        // Marked with the extent that holds what could not be decoded.
        let marked = all.iter().filter(|(extent, _)| !extent.barriers.is_empty());
        let marked: Vec<_> =
            marked.map(|(extent, _)| (extent.cut.range, &extent.barriers)).collect();
        let [(range, barriers)] = marked[..] else { panic!("{marked:?}") };
        assert_eq!(*barriers, [damaged]);
        assert!(range.end() > Lsn(SEGMENT + 250_000), "{range}");
        let stored: Vec<u8> = all.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        assert!(stored == wal);
        assert_eq!(all.last().unwrap().0.cut.greatest_time, Some(commits.last().unwrap().0));
    }

    fn told(steps: &[Step]) -> Vec<Barrier> {
        let told = steps.iter().filter_map(|step| match step {
            Step::Barrier(barrier) => Some(*barrier),
            _ => None,
        });
        told.collect()
    }

    #[test]
    fn damage_in_what_is_stored_is_told_when_more_of_its_segment_is_stored() {
        let (mut wal, commits) = crafted(&[100_000; 22]);
        wal[250_000] ^= 1;
        let last_whole = commits.iter().rfind(|(_, range)| range.end() < Lsn(SEGMENT + 250_000));
        let last_whole = last_whole.unwrap().1.end();
        let unreadable = unreadable(&[last_whole]);
        let end = SEGMENT + wal.len() as u64;
        let damaged_end = 2 * SEGMENT;
        // How far it is stored, and whether something new may not be replayed.
        for (known, counts) in
            [(SEGMENT, 1), (SEGMENT + 900_000, 1), (damaged_end, 0), (damaged_end + 8, 0)]
        {
            let attempt = attempt(SEGMENT, known, &[]);
            let mut intake =
                Intake::new(policy(), &attempt, Overlap::default(), unreadable.clone());
            let (now, mut steps) = (Clock::system().instant(), Vec::new());
            for piece in wal.chunks(8192) {
                let piece = Bytes::copy_from_slice(piece);
                intake.take(intake.received_end(), piece, now, &mut steps).unwrap();
            }
            intake.cut(CutReason::Shutdown, &mut steps);
            assert_eq!(intake.received_end(), Lsn(end));
            // What was stored before was sound then, or is marked.
            let from = last_whole.max(Lsn(known));
            let expected = LsnRange::new(from, Lsn(damaged_end)).map(Barrier::damaged);
            let expected: Vec<_> = expected.into_iter().take(counts).collect();
            assert_eq!(told(&steps), expected, "stored up to {known:X}");
            let marked =
                extents(steps).iter().map(|(extent, _)| extent.barriers.len()).sum::<usize>();
            assert_eq!(marked, counts, "stored up to {known:X}");
        }
    }

    #[test]
    fn behind_a_damaged_segment_that_is_stored_the_next_is_decoded_however_its_bytes_come() {
        let (mut wal, commits) = crafted(&[100_000; 22]);
        wal[250_000] ^= 1;
        let last_whole = commits.iter().rfind(|(_, range)| range.end() < Lsn(SEGMENT + 250_000));
        let unreadable = unreadable(&[last_whole.unwrap().1.end()]);
        let known = 2 * SEGMENT + 1000;
        for piece_bytes in [8192, 300_000, wal.len()] {
            let attempt = attempt(SEGMENT, known, &[]);
            let mut intake =
                Intake::new(policy(), &attempt, Overlap::default(), unreadable.clone());
            let (now, mut steps) = (Clock::system().instant(), Vec::new());
            for piece in wal.chunks(piece_bytes) {
                let piece = Bytes::copy_from_slice(piece);
                intake.take(intake.received_end(), piece, now, &mut steps).unwrap();
            }
            intake.cut(CutReason::Shutdown, &mut steps);
            let times = extents(steps).into_iter().map(|(extent, _)| extent.cut.greatest_time);
            assert_eq!(times.max().unwrap(), Some(commits.last().unwrap().0), "{piece_bytes}");
        }
    }

    #[test]
    fn minimal_wal_is_told_at_once_and_belongs_to_the_extent_that_holds_its_last_byte() {
        let mut craft = Craft::new(15, policy().segment_size, Lsn(SEGMENT));
        let before = craft.filler(8084);
        let record = craft.parameter_change(0);
        craft.parameter_change(1);
        craft.filler(100);
        assert!(before.end().0 < SEGMENT + 8192 && record.end().0 > SEGMENT + 8192, "{record:?}");
        // The first extent ends in the middle of the record, at the end of a page.
        let now = Clock::system().instant();
        let mut intake = from_segment(Unreadable::default());
        let mut steps = Vec::new();
        let (head, tail) = craft.bytes.split_at(8192);
        for piece in [head, tail] {
            let start = intake.received_end();
            intake.take(start, Bytes::copy_from_slice(piece), now, &mut steps).unwrap();
            intake.cut(CutReason::Idle, &mut steps);
        }
        let place = |wanted: fn(&Step) -> bool| steps.iter().position(wanted).unwrap();
        let told = place(|step| matches!(step, Step::Barrier(_)));
        let cut = place(|step| matches!(step, Step::Cut(cut) if !cut.barriers.is_empty()));
        assert!(told < cut);
        let marks: Vec<_> = extents(steps).into_iter().map(|(extent, _)| extent.barriers).collect();
        assert_eq!(marks, [vec![], vec![Barrier::minimal(record.start())]]);
        // What is stored already was marked by whoever stored it.
        let end = SEGMENT + craft.bytes.len() as u64;
        let stored = run(&attempt(SEGMENT, end - 8, &[]), &craft.bytes, 1000);
        assert!(stored.iter().all(|(extent, _)| extent.barriers.is_empty()));
    }

    #[test]
    fn of_aborts_only_those_of_prepared_transactions_are_waited_for() {
        let mut craft = Craft::new(15, policy().segment_size, Lsn(SEGMENT));
        // The time, and in the second the flag that the transaction follows, and the transaction.
        let abort = [7; 8];
        let prepared = [&abort[..], &0x10_u32.to_le_bytes(), &9_u32.to_le_bytes()].concat();
        let now = Clock::system().instant();
        let mut intake = from_segment(Unreadable::default());
        for (info, data, waits) in [(0x20, &abort[..], false), (0xC0, &prepared, true)] {
            let before = craft.bytes.len();
            craft.main_data((1, info), 0, data);
            let piece = Bytes::copy_from_slice(&craft.bytes[before..]);
            intake.take(intake.received_end(), piece, now, &mut Vec::new()).unwrap();
            assert_eq!(intake.cutter().holds_commit(), waits);
        }
        let mut steps = Vec::new();
        intake.cut(CutReason::Shutdown, &mut steps);
        let time = Some(PgTime(i64::from_le_bytes([7; 8])));
        assert!(matches!(&steps[..], [Step::Cut(extent)] if extent.cut.greatest_time == time));
    }

    #[test]
    fn a_server_that_shuts_down_does_not_wait_for_the_idle_interval() {
        let mut craft = Craft::new(15, policy().segment_size, Lsn(SEGMENT));
        craft.filler(100);
        let now = Clock::system().instant();
        let mut intake = from_segment(Unreadable::default());
        intake.take(Lsn(SEGMENT), Bytes::from(craft.bytes.clone()), now, &mut Vec::new()).unwrap();
        assert_eq!(intake.cutter().due(now), None);
        let mut checkpoint = vec![0; 88];
        (checkpoint[8], checkpoint[12]) = (1, 1);
        let before = craft.bytes.len();
        craft.main_data((0, 0), 0, &checkpoint);
        let piece = Bytes::copy_from_slice(&craft.bytes[before..]);
        intake.take(intake.received_end(), piece, now, &mut Vec::new()).unwrap();
        assert_eq!(intake.cutter().due(now), Some(CutReason::Requested));
    }
}
