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

use std::collections::VecDeque;

use bytes::Bytes;

use super::cutter::{Cut, CutPolicy, CutReason, Cutter};
use super::resume::Attempt;
use crate::clock::Instant;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, PgTime};
use crate::wal::{CheckpointKind, Landmark, Scanner};

/// Most commit times kept of one extent for the latency histogram. The first ones are kept: they
/// wait longest, so sampling never flatters.
const COMMIT_TIMES_MAX: usize = 1024;

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
    /// The server ran with `wal_level = minimal` before this position: its WAL does not hold all
    /// changes, and only a base backup taken later can be restored past it.
    MinimalWal(Lsn),
}

/// A complete extent and what is known about the records in it.
#[derive(Debug)]
pub struct CutExtent {
    /// Range, greatest time and reason.
    pub cut: Cut,
    /// The last position in or at the end of the range where a record ends, if one does.
    pub boundary: Lsn,
    /// Times of the first commits inside.
    pub commit_times: Vec<PgTime>,
}

/// What to do when the decoder cannot read the WAL at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Report it: the bytes may have been damaged on the way, so ask for them again.
    Report,
    /// The server sends the same again: store the rest of that segment unread.
    StoreUnread,
}

/// The WAL received on one connection.
#[derive(Debug)]
pub struct Intake {
    policy: CutPolicy,
    /// `None` while a damaged segment is stored unread.
    scanner: Option<Scanner>,
    damage: Damage,
    cutter: Cutter,
    received_end: Lsn,
    /// Ranges at or after `received_end` that are stored already, ascending.
    known: VecDeque<LsnRange>,
    commit_times: Vec<PgTime>,
}

impl Intake {
    /// Begins as `attempt` says.
    #[must_use]
    pub fn new(policy: CutPolicy, attempt: &Attempt, damage: Damage) -> Self {
        let before = LsnRange::new(attempt.stream_from, attempt.store_from);
        let before = before.filter(|range| !range.is_empty());
        Self {
            policy,
            scanner: Some(Scanner::new(policy.segment_size, attempt.stream_from)),
            damage,
            cutter: Cutter::new(policy, attempt.store_from),
            received_end: attempt.stream_from,
            known: before.into_iter().chain(attempt.known.iter().copied()).collect(),
            commit_times: Vec::new(),
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
    pub fn set_flush_interval(&mut self, interval: std::time::Duration) {
        self.policy.flush_interval = interval;
        self.cutter.set_policy(self.policy);
    }

    /// Takes the bytes at `start` and appends what is to be done with them to `steps`.
    ///
    /// # Errors
    /// `unavailable` when the bytes do not follow on; `corrupt` when the decoder cannot read them
    /// and [`Damage::Report`] was asked for. The bytes before are in `steps` or pending.
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
        while !data.is_empty() {
            let known = self.known_end();
            let room = match known {
                Some(end) => end.saturating_since(self.received_end),
                None => self.room_bytes(),
            };
            let len = usize::try_from(room).unwrap_or(usize::MAX).min(data.len());
            assert!(len > 0, "an extent without room was not cut");
            let piece = data.split_to(len);
            self.decode(&piece, known.is_none(), now, steps)?;
            if known.is_some() {
                self.skip(len as u64, steps);
            } else {
                self.store(piece, now, steps);
            }
        }
        Ok(())
    }

    /// Cuts the extent being filled, if anything is in it.
    pub fn cut(&mut self, reason: CutReason, steps: &mut Vec<Step>) {
        if let Some(cut) = self.cutter.cut(reason) {
            let commit_times = std::mem::take(&mut self.commit_times);
            steps.push(Step::Cut(CutExtent { cut, boundary: self.boundary(), commit_times }));
        }
    }

    /// End of the known range that the next byte lies in.
    fn known_end(&self) -> Option<Lsn> {
        let first = self.known.front()?;
        (first.start() <= self.received_end).then(|| first.end())
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
            self.cutter.restart_at(self.received_end);
            self.commit_times.clear();
        }
    }

    fn store(&mut self, piece: Bytes, now: Instant, steps: &mut Vec<Step>) {
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

    /// The last record end that is not after what was received. Damaged WAL has none; there, any
    /// position must do, or a synchronous commit behind it would wait for ever.
    #[must_use]
    pub fn boundary(&self) -> Lsn {
        let known = self.scanner.as_ref().map(Scanner::last_record_end);
        known.unwrap_or(self.received_end).min(self.received_end)
    }

    /// Lets the decoder see `piece`, which lies at `received_end` and in one extent.
    fn decode(
        &mut self,
        piece: &Bytes,
        stored: bool,
        now: Instant,
        steps: &mut Vec<Step>,
    ) -> Result<()> {
        let segment_size = self.policy.segment_size;
        if self.scanner.is_none() && segment_size.start_of(self.received_end) == self.received_end {
            self.scanner = Some(Scanner::new(segment_size, self.received_end));
        }
        let Some(scanner) = &mut self.scanner else { return Ok(()) };
        // Noted only when the whole piece was read: a piece that is refused is not stored, and its
        // commits must not count for the extent before it.
        let mut landmarks = Vec::new();
        match scanner.feed(piece, &mut |landmark| landmarks.push(landmark)) {
            Ok(()) => {}
            Err(error) if self.damage == Damage::StoreUnread => {
                tracing::error!(
                    "the server's WAL is damaged near {}; it is stored as it is, and a recovery \
                     will stop there: {error}",
                    self.received_end
                );
                self.scanner = None;
            }
            Err(error) => return Err(error),
        }
        for landmark in &landmarks {
            if let Landmark::ParameterChange { wal_level: 0, range, .. } = landmark {
                steps.push(Step::MinimalWal(range.end()));
            }
            if stored {
                self.note(landmark, now);
            }
        }
        Ok(())
    }

    /// Tells the cutter about a record that somebody waits for.
    fn note(&mut self, landmark: &Landmark, now: Instant) {
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
            // Nobody waits for an abort, but a recovery to a time may stop at it.
            Landmark::Abort { time, .. } => self.cutter.timed(*time),
            Landmark::Checkpoint { .. }
            | Landmark::Switch { .. }
            | Landmark::ParameterChange { .. } => {}
        }
    }
}
