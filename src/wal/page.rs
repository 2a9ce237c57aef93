//! Headers of WAL pages and records.
//!
//! # Source
//! `XLogPageHeaderData`, `XLogLongPageHeaderData`, `XLOG_PAGE_MAGIC` in
//! `src/include/access/xlog_internal.h`, `XLogRecord` in `src/include/access/xlogrecord.h`, and
//! `XLogReaderValidatePageHeader` in `src/backend/access/transam/xlogreader.c`; read on 13 to 18.

use super::rmgr::RmgrId;
use crate::error::{Error, Kind, Result};
use crate::pg::bytes::{u16_at, u32_at, u64_at};
use crate::pg::{Lsn, SegmentSize, SystemId, TimelineId};

/// Size of a WAL page in bytes (`XLOG_BLCKSZ` of every packaged server).
pub const XLOG_BLCKSZ: u64 = 8192;
/// `SizeOfXLogShortPHD`
pub(crate) const SHORT_HEADER_BYTES: usize = 24;
/// `SizeOfXLogLongPHD`, the header of a segment's first page.
pub(crate) const LONG_HEADER_BYTES: usize = 40;
/// `SizeOfXLogRecord`
pub(crate) const RECORD_HEADER_BYTES: usize = 24;
/// Least length of a record: its header, as for an `XLOG_SWITCH`.
pub(crate) const RECORD_BYTES_MIN: u32 = 24;
/// Bytes of the record header in front of its CRC.
pub(crate) const RECORD_CRC_OFFSET: usize = 20;
/// Records begin on multiples of this (`MAXALIGN`).
pub(crate) const MAXALIGN: u64 = 8;
/// Greatest length of a record: `MaxAllocSize`, what the reader of 13 to 15 can hold; since 16
/// `XLogRecordMaxSize`, a little less.
pub(crate) const RECORD_BYTES_MAX: u32 = 0x3fff_ffff;

const XLP_FIRST_IS_CONTRECORD: u16 = 0x0001;
const XLP_LONG_HEADER: u16 = 0x0002;
const XLP_FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
const XLP_ALL_FLAGS: u16 = 0x000F;

/// `XLOG_PAGE_MAGIC` and the major version that writes it.
const MAGICS: [(u16, u32); 6] =
    [(0xD106, 13), (0xD10D, 14), (0xD110, 15), (0xD113, 16), (0xD116, 17), (0xD118, 18)];

/// How a page begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageStart {
    /// With a record, or with nothing yet.
    Record,
    /// With the rest of a record from the page before, of this many bytes.
    Continued { rest_bytes: u32 },
    /// With a record that takes the place of the rest of one that was never finished: the server
    /// crashed while it wrote it.
    Overwritten,
}

/// The header of a WAL page, checked for what one page can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageHeader {
    pub(crate) major: u32,
    pub(crate) timeline: TimelineId,
    pub(crate) start: PageStart,
    /// In a long header only.
    pub(crate) system_id: Option<SystemId>,
}

impl PageHeader {
    /// Bytes of a header that begins with these, which are at least two times two.
    pub(crate) fn len_bytes(first: &[u8]) -> usize {
        let long = u16_at(first, 2).is_some_and(|info| info & XLP_LONG_HEADER != 0);
        if long { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES }
    }

    /// The header of the page at `position`.
    pub(crate) fn decode(bytes: &[u8], position: Lsn, segment_size: SegmentSize) -> Result<Self> {
        let damaged = |found: String| damaged_page(position, &found);
        let fields = || {
            let (magic, info) = (u16_at(bytes, 0)?, u16_at(bytes, 2)?);
            Some((magic, info, u32_at(bytes, 4)?, u64_at(bytes, 8)?, u32_at(bytes, 16)?))
        };
        let (magic, info, timeline, address, rest_bytes) =
            fields().ok_or_else(|| damaged("its header is cut off".into()))?;
        let major = major_of(magic).ok_or_else(|| unknown_magic(position, magic))?;
        if info & !XLP_ALL_FLAGS != 0 {
            return Err(damaged(format!("unknown flags {info:04X}")));
        }
        if address != position.0 {
            return Err(damaged(format!("its header says it is page {}", Lsn(address))));
        }
        let system_id = if info & XLP_LONG_HEADER != 0 {
            Some(decode_long(bytes, position, segment_size)?)
        } else if segment_size.start_of(position) == position {
            return Err(damaged("the first page of a segment has no long header".into()));
        } else {
            None
        };
        let start = if info & XLP_FIRST_IS_OVERWRITE_CONTRECORD != 0 {
            if info & XLP_FIRST_IS_CONTRECORD != 0 {
                return Err(damaged("it both continues and replaces the record before".into()));
            }
            PageStart::Overwritten
        } else if info & XLP_FIRST_IS_CONTRECORD != 0 {
            PageStart::Continued { rest_bytes }
        } else {
            PageStart::Record
        };
        let timeline =
            TimelineId::new(timeline).ok_or_else(|| damaged("its timeline is 0".into()))?;
        Ok(Self { major, timeline, start, system_id })
    }
}

/// Whether any page of `bytes`, which begin at `start`, has the header of a server that is known.
pub(crate) fn holds_known_page(start: Lsn, bytes: &[u8], segment_size: SegmentSize) -> bool {
    let first = usize::try_from(start.0.wrapping_neg() % XLOG_BLCKSZ).unwrap_or(usize::MAX);
    let page_bytes = usize::try_from(XLOG_BLCKSZ).unwrap_or(usize::MAX);
    (first..bytes.len()).step_by(page_bytes).any(|offset| {
        let position = Lsn(start.0.saturating_add(offset as u64));
        let page = bytes.get(offset..).unwrap_or_default();
        PageHeader::decode(page, position, segment_size).is_ok()
    })
}

/// The system identifier of a long header whose sizes are as expected.
fn decode_long(bytes: &[u8], position: Lsn, segment_size: SegmentSize) -> Result<SystemId> {
    let fields = || Some((u64_at(bytes, 24)?, u32_at(bytes, 32)?, u32_at(bytes, 36)?));
    let (system_id, segment_bytes, block_bytes) =
        fields().ok_or_else(|| damaged_page(position, "its header is cut off"))?;
    if u64::from(segment_bytes) != segment_size.bytes() {
        let expected = segment_size.bytes();
        let found = format!("its segment size is {segment_bytes} bytes, expected {expected}");
        return Err(damaged_page(position, &found));
    }
    if u64::from(block_bytes) != XLOG_BLCKSZ {
        let message =
            format!("unable to read WAL with pages of {block_bytes} bytes, only of {XLOG_BLCKSZ}");
        return Err(Error::new(Kind::Unsupported, message));
    }
    Ok(SystemId(system_id))
}

/// The major version that writes pages with this magic number.
fn major_of(magic: u16) -> Option<u32> {
    MAGICS.iter().find(|row| row.0 == magic).map(|row| row.1)
}

#[cold]
fn unknown_magic(position: Lsn, magic: u16) -> Error {
    // Every version since 9.0 has written 0xD0xx or 0xD1xx.
    if matches!(magic >> 8, 0xD0 | 0xD1) {
        let message = format!(
            "unable to read WAL page {position}: its magic number {magic:04X} is of a PostgreSQL \
             that this build does not know"
        );
        return Error::new(Kind::Unsupported, message)
            .hint("PostgreSQL 13 to 18 are supported, pre-releases are not.");
    }
    damaged_page(position, &format!("its magic number is {magic:04X}"))
}

/// The header of a WAL record, `XLogRecord`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) length_bytes: u32,
    pub(crate) xid: u32,
    pub(crate) previous_lsn: Lsn,
    pub(crate) info: u8,
    pub(crate) rmgr: RmgrId,
    pub(crate) crc: u32,
}

impl RecordHeader {
    #[inline]
    pub(crate) fn decode(bytes: &[u8; RECORD_HEADER_BYTES]) -> Self {
        let [l0, l1, l2, l3, x0, x1, x2, x3, previous @ .., info, rmgr, _, _, c0, c1, c2, c3] =
            *bytes;
        Self {
            length_bytes: u32::from_le_bytes([l0, l1, l2, l3]),
            xid: u32::from_le_bytes([x0, x1, x2, x3]),
            previous_lsn: Lsn(u64::from_le_bytes(previous)),
            info,
            rmgr: RmgrId(rmgr),
            crc: u32::from_le_bytes([c0, c1, c2, c3]),
        }
    }

    /// The resource manager's own part of `info` (`~XLR_INFO_MASK`).
    #[inline]
    pub(crate) fn operation(&self) -> u8 {
        self.info & 0xF0
    }
}

/// An error about the WAL page at `position`.
#[cold]
pub(crate) fn damaged_page(position: Lsn, found: &str) -> Error {
    Error::new(Kind::Corrupt, format!("unable to read WAL page {position}: {found}"))
}

/// An error about the WAL record that begins at `position`.
#[cold]
pub(crate) fn damaged_record(position: Lsn, found: &str) -> Error {
    Error::new(Kind::Corrupt, format!("unable to read WAL record {position}: {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(magic: u16, info: u16, address: u64) -> Vec<u8> {
        let mut bytes = magic.to_le_bytes().to_vec();
        bytes.extend_from_slice(&info.to_le_bytes());
        bytes.extend_from_slice(&1_u32.to_le_bytes());
        bytes.extend_from_slice(&address.to_le_bytes());
        bytes.extend_from_slice(&77_u32.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&42_u64.to_le_bytes());
        bytes.extend_from_slice(&(16_u32 << 20).to_le_bytes());
        bytes.extend_from_slice(&8192_u32.to_le_bytes());
        bytes
    }

    #[test]
    fn the_magic_number_tells_the_major_version() {
        for (magic, major) in MAGICS {
            let bytes = header(magic, 1, 0x2000);
            let decoded = PageHeader::decode(&bytes, Lsn(0x2000), SegmentSize::DEFAULT).unwrap();
            assert_eq!(decoded.major, major);
            assert_eq!(decoded.start, PageStart::Continued { rest_bytes: 77 });
        }
        let kind = |magic| {
            let bytes = header(magic, 0, 0x2000);
            PageHeader::decode(&bytes, Lsn(0x2000), SegmentSize::DEFAULT).unwrap_err().kind()
        };
        assert_eq!(kind(0xD119), Kind::Unsupported);
        assert_eq!(kind(0x1234), Kind::Corrupt);
    }

    #[test]
    fn a_segment_begins_with_a_long_header() {
        let size = SegmentSize::DEFAULT;
        let start = Lsn(size.bytes());
        let bytes = header(0xD110, XLP_LONG_HEADER, start.0);
        assert_eq!(PageHeader::len_bytes(&bytes), LONG_HEADER_BYTES);
        let decoded = PageHeader::decode(&bytes, start, size).unwrap();
        assert_eq!(decoded.system_id, Some(SystemId(42)));
        let other = SegmentSize::new(1 << 20).unwrap();
        assert_eq!(PageHeader::decode(&bytes, start, other).unwrap_err().kind(), Kind::Corrupt);
        let short = header(0xD110, 0, start.0);
        assert_eq!(PageHeader::decode(&short, start, size).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn a_page_of_another_place_or_with_impossible_flags_is_corrupt() {
        let both = XLP_FIRST_IS_CONTRECORD | XLP_FIRST_IS_OVERWRITE_CONTRECORD;
        for bytes in
            [header(0xD110, 0, 0x4000), header(0xD110, 0x10, 0x2000), header(0xD110, both, 0x2000)]
        {
            let error = PageHeader::decode(&bytes, Lsn(0x2000), SegmentSize::DEFAULT).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt);
        }
    }
}
