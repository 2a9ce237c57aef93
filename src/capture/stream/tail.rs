//! What was stored of a record that turned out to be damaged.
//!
//! A record that comes in several messages is stored as it comes, and its checksum shows with the last of them.
//! When that fails, what came before is stored already, and the damage may be in there. A server that heals its
//! WAL sends the record once more; those bytes are known then and not stored again, so they are compared.
//!
//! # Invariants
//! What is remembered is of this process only: one that is started in between compares nothing.

use bytes::Bytes;

use crate::pg::crc::Crc32c;
use crate::pg::{Lsn, LsnRange};

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

    /// The beginning of a record of which the rest cannot be read; `None` where nothing of it was stored.
    pub(super) fn suspect(&self) -> Option<Suspect> {
        let range = LsnRange::new(self.start, self.end).filter(|range| !range.is_empty())?;
        Some(Suspect { range, stored: self.crc.value() })
    }
}

/// A range that was stored, and may be damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Suspect {
    pub(super) range: LsnRange,
    /// CRC-32C of what was stored.
    stored: u32,
}

/// All of them that were not compared yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Suspects(Vec<Suspect>);

impl Suspects {
    /// Notes one more; what is known of a range already was noted when it was stored.
    pub(super) fn note(&mut self, suspect: Suspect) {
        let is_known = self.0.iter().any(|known| known.range.start() == suspect.range.start());
        if !is_known && self.0.len() < SUSPECTS_MAX {
            self.0.push(suspect);
        }
    }

    /// Drops those that were compared.
    pub(super) fn forget(&mut self, compared: &[LsnRange]) {
        self.0.retain(|suspect| !compared.contains(&suspect.range));
    }
}

/// Compares suspects with what the server sends now.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    open: Vec<(Suspect, Lsn, Crc32c)>,
    compared: Vec<LsnRange>,
    differing: Vec<LsnRange>,
}

impl Comparison {
    pub(super) fn new(suspects: &Suspects) -> Self {
        let begin = |suspect: &Suspect| (*suspect, suspect.range.start(), Crc32c::new());
        Self { open: suspects.0.iter().map(begin).collect(), ..Self::default() }
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
        let (compared, differing) = (&mut self.compared, &mut self.differing);
        self.open.retain(|(suspect, seen, sum)| {
            let is_open = *seen < suspect.range.end();
            if !is_open && sum.value() == suspect.stored {
                compared.push(suspect.range);
            } else if !is_open {
                differing.push(suspect.range);
            }
            is_open
        });
    }

    /// Gives away the ranges that were stored and are damaged; who takes them sees to it that this is known.
    pub(super) fn take_differing(&mut self) -> Vec<LsnRange> {
        self.compared.extend(&self.differing);
        std::mem::take(&mut self.differing)
    }

    /// Those about which nothing is left to be done.
    pub(super) fn compared(&self) -> &[LsnRange] {
        &self.compared
    }
}
