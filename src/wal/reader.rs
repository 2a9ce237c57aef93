//! Every record of a stream of WAL.
//!
//! # Shape
//! Bytes of one timeline's WAL, contiguous, in any chunks. A record that lies whole in a chunk and
//! on one page is given without being copied; of others the pieces are put together. Memory is the
//! longest record, which PostgreSQL bounds by 1 GiB and which is rarely more than a few pages; it
//! grows only as the bytes come, never on the word of a length field.

use super::assembler::{Assembler, CrcCheck, Sink, WholeRecord};
use super::page::RecordHeader;
use super::record::{Record, RecordFrame, body_bytes};
use crate::error::Result;
use crate::pg::{Lsn, LsnRange, SegmentSize, SystemId, TimelineId};

/// Room made for a record at once; a longer one grows as it comes.
const RESERVE_BYTES_MAX: usize = 1 << 20;

/// Gives every whole record of a contiguous stream of WAL that comes in any chunks, checked as the
/// scanner checks it.
#[derive(Debug)]
pub struct RecordReader {
    assembler: Assembler,
    body: Vec<u8>,
    major: u32,
}

impl RecordReader {
    /// Begins at `start`, the start of a WAL page (a multiple of 8192). A record that began before
    /// is skipped.
    #[must_use]
    pub fn new(segment_size: SegmentSize, start: Lsn) -> Self {
        Self { assembler: Assembler::new(segment_size, start), body: Vec::new(), major: 0 }
    }

    /// Turns the CRC check on (the default) or off.
    #[must_use]
    pub fn with_crc_check(mut self, check: CrcCheck) -> Self {
        self.assembler.set_crc_check(check);
        self
    }

    /// Refuses WAL whose segments say that they belong to another cluster.
    #[must_use]
    pub fn with_system_id(mut self, expected: SystemId) -> Self {
        self.assembler.set_system_id(expected);
        self
    }

    /// Takes in the bytes at [`RecordReader::position`] and gives the records whose last byte is
    /// among them, in order.
    ///
    /// # Errors
    /// `corrupt` or `unsupported`, naming the position, and whatever `each` returns. The reader takes no more bytes then; what
    /// it gave before is right, and its positions stay. A segment file of a running server may hold
    /// pages of an older segment behind its end: reading them ends with such an error, at
    /// `last_record_end`.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        each: &mut dyn FnMut(&Record<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut collector = Collector { body: &mut self.body, major: &mut self.major, each };
        self.assembler.feed(bytes, &mut collector)
    }

    /// Position of the next byte to feed.
    #[must_use]
    pub fn position(&self) -> Lsn {
        self.assembler.position()
    }

    /// As [`super::Scanner::last_record_end`].
    #[must_use]
    pub fn last_record_end(&self) -> Lsn {
        self.assembler.last_record_end()
    }

    /// Whether no record has been begun and not ended at [`RecordReader::position`].
    #[must_use]
    pub fn at_record_boundary(&self) -> bool {
        self.assembler.at_record_boundary()
    }

    /// Whether zeros were found where a record could begin: the end of the WAL in a segment file
    /// that is not full.
    #[must_use]
    pub fn is_behind_end(&self) -> bool {
        self.assembler.is_behind_end()
    }

    /// Timeline of the last page, `None` before the first. The page in which a new timeline begins
    /// may still name the old one.
    #[must_use]
    pub fn timeline(&self) -> Option<TimelineId> {
        self.assembler.timeline()
    }
}

struct Collector<'a> {
    body: &'a mut Vec<u8>,
    major: &'a mut u32,
    each: &'a mut dyn FnMut(&Record<'_>) -> Result<()>,
}

impl Sink for Collector<'_> {
    fn begin(&mut self, header: &RecordHeader, major: u32) {
        *self.major = major;
        self.body.clear();
        self.body.shrink_to(RESERVE_BYTES_MAX);
        self.body.reserve(body_bytes(header).min(RESERVE_BYTES_MAX));
    }

    fn body(&mut self, _header: &RecordHeader, piece: &[u8]) {
        self.body.extend_from_slice(piece);
    }

    fn end(&mut self, header: &RecordHeader, range: LsnRange) -> Result<()> {
        let frame = RecordFrame { header: *header, range, major: *self.major };
        (self.each)(&Record::decode(&frame, self.body)?)
    }

    fn whole(&mut self, record: &WholeRecord<'_>) -> Result<()> {
        let frame =
            RecordFrame { header: *record.header, range: record.range, major: record.major };
        (self.each)(&Record::decode(&frame, record.body)?)
    }
}
