//! What was stored of a record that turned out to be damaged.
//!
//! A record that comes in several messages is stored as it comes, and its checksum shows with the last of them.
//! When that fails, what came before is stored already, and the damage may be in there. A server that heals its
//! WAL sends the record once more; those bytes are known then and not stored again, so they are compared.
//!
//! # Invariants
//! - What is compared is of one timeline: another one has other WAL at the same positions.
//! - A server that sends the same again has not healed yet. That it is sound is believed when the record could be
//!   read.
//! - What is remembered is of this process only: one that is started in between compares nothing.

use bytes::Bytes;

use crate::pg::crc::Crc32c;
use crate::pg::{Lsn, LsnRange, TimelineId};

/// Most damaged records whose beginnings are remembered at a time.
const SUSPECTS_MAX: usize = 16;

/// The bytes stored since the end of the last record.
#[derive(Debug, Default)]
pub(super) struct Tail {
    start: Lsn,
    end: Lsn,
    crc: Crc32c,
}

impl Tail {
    /// `piece`, which lies at `at`, was stored; the last record that could be read ends at `record_end`.
    pub(super) fn stored(&mut self, at: Lsn, piece: &Bytes, record_end: Lsn) {
        if record_end > self.start || self.end != at {
            self.begin(record_end.max(at));
        }
        let skipped = usize::try_from(self.start.saturating_since(at)).unwrap_or(usize::MAX);
        self.crc.update(piece.get(skipped..).unwrap_or_default());
        self.end = Lsn(at.0 + piece.len() as u64);
    }

    /// What comes next lies at `at`, and nothing before it was stored now.
    pub(super) fn begin(&mut self, at: Lsn) {
        (self.start, self.end) = (at, at);
        self.crc.restart();
    }

    /// The beginning of a record of `timeline` of which the rest cannot be read; `None` where nothing of it was
    /// stored.
    pub(super) fn suspect(&self, timeline: TimelineId) -> Option<Suspect> {
        let range = LsnRange::new(self.start, self.end).filter(|range| !range.is_empty())?;
        Some(Suspect { timeline, range, stored: self.crc.value() })
    }
}

/// A range that was stored, and may be damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Suspect {
    timeline: TimelineId,
    range: LsnRange,
    /// CRC-32C of what was stored.
    stored: u32,
}

/// All of them that were not compared yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Suspects(Vec<Suspect>);

impl Suspects {
    /// Notes one more, instead of the oldest if there are too many; what is known of a range already was noted
    /// when it was stored.
    pub(super) fn note(&mut self, suspect: Suspect) {
        let place = |suspect: &Suspect| (suspect.timeline, suspect.range.start());
        if self.0.iter().any(|known| place(known) == place(&suspect)) {
            return;
        }
        if self.0.len() == SUSPECTS_MAX {
            self.0.remove(0);
        }
        self.0.push(suspect);
    }

    /// Drops those that `comparison` found to be different, which is marked by now, and those that it found to be
    /// the same, of records that could be read: the last one of those ends at `record_end`.
    pub(super) fn forget(&mut self, comparison: &Comparison, record_end: Lsn) {
        self.0.retain(|suspect| {
            let is_sound = comparison.same.contains(suspect) && suspect.range.start() < record_end;
            !is_sound && !comparison.marked.contains(suspect)
        });
    }
}

/// Compares suspects with what the server sends now.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    open: Vec<(Suspect, Lsn, Crc32c)>,
    same: Vec<Suspect>,
    differing: Vec<Suspect>,
    marked: Vec<Suspect>,
}

impl Comparison {
    /// Of those of `timeline`.
    pub(super) fn new(suspects: &Suspects, timeline: TimelineId) -> Self {
        let own = suspects.0.iter().filter(|suspect| suspect.timeline == timeline);
        let begin = |suspect: &Suspect| (*suspect, suspect.range.start(), Crc32c::new());
        Self { open: own.map(begin).collect(), ..Self::default() }
    }

    /// The server has sent `piece` at `at`, which is stored already.
    pub(super) fn see(&mut self, at: Lsn, piece: &Bytes) {
        let end = Lsn(at.0 + piece.len() as u64);
        let offset =
            |position: Lsn| usize::try_from(position.saturating_since(at)).unwrap_or(usize::MAX);
        for (suspect, seen, sum) in &mut self.open {
            let until = end.min(suspect.range.end());
            if at <= *seen && *seen < until {
                sum.update(piece.get(offset(*seen)..offset(until)).unwrap_or_default());
                *seen = until;
            }
        }
        let (same, differing) = (&mut self.same, &mut self.differing);
        self.open.retain(|(suspect, seen, sum)| {
            let is_open = *seen < suspect.range.end();
            if !is_open && sum.value() == suspect.stored {
                same.push(*suspect);
            } else if !is_open {
                differing.push(*suspect);
            }
            is_open
        });
    }

    /// Gives away the ranges that were stored and are damaged; who takes them sees to it that they are marked.
    pub(super) fn take_differing(&mut self) -> Vec<LsnRange> {
        self.marked.extend(&self.differing);
        self.differing.drain(..).map(|suspect| suspect.range).collect()
    }
}
