//! Turns a stream of WAL bytes into records: takes pages apart, puts records together that cross
//! pages and segments, and checks all that PostgreSQL's own reader checks.
//!
//! # Shape
//! Bytes come in any chunks and are contiguous. Nothing is kept of a record but its header and the
//! running CRC; the [`Sink`] keeps what it wants of the body.
//!
//! # Invariants
//! What the sink sees does not depend on how the bytes were cut. `end` is called only for a record
//! whose header, chain and CRC are right.
//!
//! # Source
//! `XLogDecodeNextRecord`, `ValidXLogRecordHeader`, `ValidXLogRecord` in
//! `src/backend/access/transam/xlogreader.c`; `CopyXLogRecordToWAL` in `xlog.c` (the padding behind
//! an `XLOG_SWITCH` is all zeros, page headers included); read on 13, 15, 17, 18.

use super::page::{
    LONG_HEADER_BYTES, MAXALIGN, PageHeader, PageStart, RECORD_BYTES_MAX, RECORD_BYTES_MIN,
    RECORD_CRC_OFFSET, RECORD_HEADER_BYTES, RecordHeader, SHORT_HEADER_BYTES, XLOG_BLCKSZ,
    damaged_page, damaged_record,
};
use super::rmgr::RmgrId;
use crate::error::{Error, Kind, Result};
use crate::pg::{Crc32c, Lsn, LsnRange, SegmentSize, SystemId, TimelineId};

/// `XLOG_SWITCH`, an operation of the XLOG resource manager.
pub(super) const XLOG_SWITCH: u8 = 0x40;

/// Whether to compute the CRC of every record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrcCheck {
    /// Every record is checked.
    Every,
    /// None: for bytes whose integrity is known from elsewhere.
    None,
}

/// Takes in records.
pub(super) trait Sink {
    /// A record begins; its chain is right, its CRC not yet known to be.
    fn begin(&mut self, header: &RecordHeader, major: u32);
    /// The next bytes of the body of the record that was begun.
    fn body(&mut self, header: &RecordHeader, piece: &[u8]);
    /// The record is complete and its CRC is right.
    fn end(&mut self, header: &RecordHeader, range: LsnRange) -> Result<()>;
    /// A record in one piece: instead of the three calls above.
    fn whole(&mut self, record: &WholeRecord<'_>) -> Result<()>;
}

/// A record whose body lies in one piece.
pub(super) struct WholeRecord<'a> {
    pub(super) header: &'a RecordHeader,
    pub(super) body: &'a [u8],
    pub(super) range: LsnRange,
    pub(super) major: u32,
}

/// Where in the stream we are, apart from page headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between records, in alignment padding or right before a record.
    Between,
    /// In the header of a record; this many of its bytes are in `header_bytes`.
    InHeader { filled: usize },
    /// In the body of a record.
    InBody { rest_bytes: u32 },
    /// In a record that began before the first byte we were given.
    InUnknown { rest_bytes: u32 },
    /// Behind an `XLOG_SWITCH`, up to the end of the segment. It may be the record that began before the
    /// first byte.
    InSwitchPadding,
    /// Behind the last record; nothing but zeros may follow in this segment.
    BehindEnd,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Assembler {
    segment_size: SegmentSize,
    check: CrcCheck,
    expected_system_id: Option<SystemId>,
    /// The bytes come from a server that sends nothing behind the end of its WAL.
    sent: bool,
    /// The first byte.
    begin: Lsn,
    /// Next byte to come.
    position: Lsn,
    state: State,
    /// `EndRecPtr` of the last complete record; the start before there is one.
    last_end_lsn: Lsn,
    /// Start of the last complete record, what the next one's `xl_prev` must be.
    last_start_lsn: Option<Lsn>,
    /// How much was left of the record that began before the first byte.
    unknown_bytes: u32,
    /// The page header being collected, while `in_page_header`.
    page_bytes: [u8; LONG_HEADER_BYTES],
    page_bytes_filled: usize,
    in_page_header: bool,
    /// Of the last page seen.
    page: Option<PageHeader>,
    /// The record being collected.
    header_bytes: [u8; RECORD_HEADER_BYTES],
    header: Option<RecordHeader>,
    record_start_lsn: Lsn,
    crc: Crc32c,
    /// Set by the first error: where we are is not known any more.
    failed: bool,
}

impl Assembler {
    pub(super) fn new(segment_size: SegmentSize, start: Lsn) -> Self {
        assert!(start.0.is_multiple_of(XLOG_BLCKSZ), "{start} is not the start of a WAL page");
        Self {
            segment_size,
            check: CrcCheck::Every,
            expected_system_id: None,
            sent: false,
            begin: start,
            position: start,
            state: State::Between,
            last_end_lsn: start,
            last_start_lsn: None,
            unknown_bytes: 0,
            page_bytes: [0; LONG_HEADER_BYTES],
            page_bytes_filled: 0,
            in_page_header: true,
            page: None,
            header_bytes: [0; RECORD_HEADER_BYTES],
            header: None,
            record_start_lsn: start,
            crc: Crc32c::new(),
            failed: false,
        }
    }

    pub(super) fn set_crc_check(&mut self, check: CrcCheck) {
        self.check = check;
    }

    pub(super) fn set_system_id(&mut self, expected: SystemId) {
        self.expected_system_id = Some(expected);
    }

    pub(super) fn set_sent(&mut self) {
        self.sent = true;
    }

    pub(super) fn position(&self) -> Lsn {
        self.position
    }

    pub(super) fn last_record_end(&self) -> Lsn {
        self.last_end_lsn.min(self.position)
    }

    pub(super) fn at_record_boundary(&self) -> bool {
        matches!(self.state, State::Between | State::InSwitchPadding | State::BehindEnd)
    }

    pub(super) fn is_behind_end(&self) -> bool {
        self.state == State::BehindEnd
    }

    pub(super) fn timeline(&self) -> Option<TimelineId> {
        self.page.map(|page| page.timeline)
    }

    pub(super) fn major(&self) -> Option<u32> {
        self.page.map(|page| page.major)
    }

    pub(super) fn feed(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<()> {
        if self.failed {
            let what = "bytes before it could not be read";
            return Err(damaged_page(self.position.align_down(XLOG_BLCKSZ), what));
        }
        let outcome = self.feed_pages(bytes, sink);
        self.failed = outcome.is_err();
        outcome
    }

    fn feed_pages(&mut self, bytes: &[u8], sink: &mut impl Sink) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.state == State::InSwitchPadding {
                let end = self.segment_size.end_of(self.position);
                let (now, later) = split(rest, end.saturating_since(self.position));
                if self.last_start_lsn.is_none() {
                    self.check_zeros(self.position, now)?;
                }
                self.advance(rest.len() - later.len());
                if self.position == end {
                    self.state = State::Between;
                    self.begin_page();
                }
                rest = later;
            } else if self.in_page_header {
                rest = self.collect_page_header(rest)?;
            } else {
                let room = XLOG_BLCKSZ - self.position.0 % XLOG_BLCKSZ;
                let (page, later) = split(rest, room);
                let left = self.feed_page(page, sink)?;
                // An XLOG_SWITCH leaves the rest of its page to the padding.
                rest = rest.get(page.len() - left.len()..).unwrap_or(later);
                if self.position.0.is_multiple_of(XLOG_BLCKSZ)
                    && self.state != State::InSwitchPadding
                {
                    self.begin_page();
                }
            }
        }
        Ok(())
    }

    fn begin_page(&mut self) {
        self.in_page_header = true;
        self.page_bytes_filled = 0;
    }

    fn advance(&mut self, bytes: usize) {
        self.position = Lsn(self.position.0.saturating_add(bytes as u64));
    }

    /// Takes in bytes of a page header and gives the bytes behind it.
    fn collect_page_header<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8]> {
        // A long header shows itself in its first bytes; ask for those of a short one first.
        let known = self.page_bytes.get(..self.page_bytes_filled).unwrap_or_default();
        let wanted = match self.page_bytes_filled {
            filled if filled < SHORT_HEADER_BYTES => SHORT_HEADER_BYTES,
            _ => PageHeader::len_bytes(known),
        };
        let mut rest = bytes;
        if self.page_bytes_filled < wanted {
            let (now, later) = split(rest, (wanted - self.page_bytes_filled) as u64);
            copy_to(&mut self.page_bytes, self.page_bytes_filled, now);
            self.page_bytes_filled += now.len();
            self.advance(now.len());
            rest = later;
        }
        let known = self.page_bytes.get(..self.page_bytes_filled).unwrap_or_default();
        if self.page_bytes_filled < SHORT_HEADER_BYTES
            || self.page_bytes_filled < PageHeader::len_bytes(known)
        {
            return Ok(rest);
        }
        self.in_page_header = false;
        self.enter_page()?;
        Ok(rest)
    }

    /// Checks the page header that was collected against what the pages before said.
    fn enter_page(&mut self) -> Result<()> {
        let bytes = self.page_bytes.get(..self.page_bytes_filled).unwrap_or_default();
        let start = self.position.align_down(XLOG_BLCKSZ);
        let at_segment_start = self.segment_size.start_of(start) == start;
        if bytes.iter().all(|byte| *byte == 0) {
            return match self.state {
                // The padding behind a switch ends with the segment, so none begins one.
                _ if self.sent && (at_segment_start || self.page.is_some()) => {
                    Err(damaged_page(start, "there are zeros where its header should be"))
                }
                State::Between | State::BehindEnd => {
                    self.state = State::BehindEnd;
                    Ok(())
                }
                _ => Err(self.cut_off(start)),
            };
        }
        if self.state == State::BehindEnd && !at_segment_start {
            return Err(data_behind_end(start, self.last_end_lsn));
        }
        let page = PageHeader::decode(bytes, start, self.segment_size)
            .map_err(|error| self.not_another_server(error))?;
        self.check_page(&page, start)?;
        let first = self.page.is_none();
        self.page = Some(page);
        match (page.start, self.state) {
            (PageStart::Continued { rest_bytes }, State::Between) if first => {
                self.unknown_bytes = rest_bytes;
                self.state = State::InUnknown { rest_bytes };
                Ok(())
            }
            (PageStart::Overwritten, _) => {
                // The record that was being written when the server crashed is void.
                self.last_end_lsn = start.max(self.last_end_lsn);
                self.header = None;
                self.state = State::Between;
                Ok(())
            }
            (PageStart::Record, State::Between | State::BehindEnd) => {
                self.state = State::Between;
                Ok(())
            }
            (PageStart::Continued { rest_bytes }, _) => self.check_continued(rest_bytes, start),
            (PageStart::Record, _) => Err(self.cut_off(start)),
        }
    }

    /// Behind a page of a server that is known, a page of one that is not is damaged.
    #[cold]
    fn not_another_server(&self, error: Error) -> Error {
        match error.kind() {
            Kind::Unsupported if self.page.is_some() => {
                Error::new(Kind::Corrupt, error.message().to_owned())
            }
            _ => error,
        }
    }

    fn check_page(&self, page: &PageHeader, start: Lsn) -> Result<()> {
        if let (Some(expected), Some(found)) = (self.expected_system_id, page.system_id)
            && expected != found
        {
            let what = format!("it is of cluster {found}, expected {expected}");
            return Err(damaged_page(start, &what));
        }
        let Some(before) = self.page else { return Ok(()) };
        if page.timeline < before.timeline {
            let (after, now) = (before.timeline, page.timeline);
            return Err(damaged_page(start, &format!("timeline {now} follows timeline {after}")));
        }
        if page.major != before.major {
            let (after, now) = (before.major, page.major);
            let what = format!("it is of PostgreSQL {now}, the page before of {after}");
            return Err(damaged_page(start, &what));
        }
        Ok(())
    }

    /// The page says that `rest_bytes` of the record before belong to it.
    fn check_continued(&self, rest_bytes: u32, start: Lsn) -> Result<()> {
        let expected = match self.state {
            State::InHeader { filled } => {
                let length = u32_prefix(&self.header_bytes);
                length.saturating_sub(u32::try_from(filled).unwrap_or(u32::MAX))
            }
            State::InBody { rest_bytes } | State::InUnknown { rest_bytes } => rest_bytes,
            State::Between | State::InSwitchPadding | State::BehindEnd => 0,
        };
        if rest_bytes == expected && expected > 0 {
            return Ok(());
        }
        let what = format!("it continues a record by {rest_bytes} bytes, expected {expected}");
        Err(damaged_page(start, &what))
    }

    #[cold]
    fn cut_off(&self, page: Lsn) -> Error {
        let start = match self.state {
            State::InUnknown { .. } => self.last_end_lsn,
            _ => self.record_start_lsn,
        };
        damaged_record(start, &format!("it is not continued on page {page}"))
    }

    /// Takes in bytes of one page behind its header. Gives the bytes that are left: none, but for
    /// what follows an `XLOG_SWITCH`.
    fn feed_page<'a>(&mut self, bytes: &'a [u8], sink: &mut impl Sink) -> Result<&'a [u8]> {
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = match self.state {
                State::Between => self.begin_record(rest, sink)?,
                State::InHeader { filled } => self.collect_header(rest, filled, sink)?,
                State::InBody { rest_bytes } => self.collect_body(rest, rest_bytes, sink)?,
                State::InUnknown { rest_bytes } => self.skip_unknown(rest, rest_bytes),
                State::BehindEnd => {
                    self.check_zeros(self.position, rest)?;
                    self.advance(rest.len());
                    &[]
                }
                State::InSwitchPadding => return Ok(rest),
            };
        }
        Ok(rest)
    }

    /// At or before the start of a record. The usual case, a record that lies whole in `bytes`, is
    /// done here in one go.
    #[inline]
    fn begin_record<'a>(&mut self, bytes: &'a [u8], sink: &mut impl Sink) -> Result<&'a [u8]> {
        let padding = self.position.0.wrapping_neg() % MAXALIGN;
        if padding > 0 {
            let (now, later) = split(bytes, padding);
            self.advance(now.len());
            if later.is_empty() || now.len() as u64 != padding {
                return Ok(later);
            }
            return self.begin_record(later, sink);
        }
        self.record_start_lsn = self.position;
        let Some((head, after)) = bytes.split_first_chunk::<RECORD_HEADER_BYTES>() else {
            self.state = State::InHeader { filled: 0 };
            return Ok(bytes);
        };
        let header = RecordHeader::decode(head);
        let body_bytes = (header.length_bytes as usize).wrapping_sub(RECORD_HEADER_BYTES);
        let Some((body, rest)) = after.split_at_checked(body_bytes) else {
            self.state = State::InHeader { filled: 0 };
            return Ok(bytes);
        };
        let major = self.check_header(&header)?;
        if self.check == CrcCheck::Every {
            self.crc.restart();
            self.crc.update(body);
            self.crc.update(head.first_chunk::<RECORD_CRC_OFFSET>().map_or(&[], |head| head));
            self.check_crc(&header)?;
        }
        self.advance(RECORD_HEADER_BYTES + body_bytes);
        let range = self.record_range(&header)?;
        sink.whole(&WholeRecord { header: &header, body, range, major })?;
        self.end_record(range);
        Ok(rest)
    }

    /// Takes in bytes of a record header that comes in pieces.
    fn collect_header<'a>(
        &mut self,
        bytes: &'a [u8],
        filled: usize,
        sink: &mut impl Sink,
    ) -> Result<&'a [u8]> {
        let (now, later) = split(bytes, (RECORD_HEADER_BYTES - filled) as u64);
        copy_to(&mut self.header_bytes, filled, now);
        let filled = filled + now.len();
        self.advance(now.len());
        self.state = State::InHeader { filled };
        if filled < 4 {
            return Ok(later);
        }
        let length_bytes = u32_prefix(&self.header_bytes);
        if length_bytes == 0 {
            let collected = self.header_bytes.get(..filled).unwrap_or_default();
            self.check_zeros(self.record_start_lsn, collected)?;
            if self.sent && self.follows_unseen_switch() {
                self.state = State::InSwitchPadding;
                return Ok(later);
            }
            if self.sent {
                let what = "there are zeros where it should begin";
                return Err(damaged_record(self.record_start_lsn, what));
            }
            self.state = State::BehindEnd;
            return Ok(later);
        }
        check_length(length_bytes, self.record_start_lsn)?;
        if filled < RECORD_HEADER_BYTES {
            return Ok(later);
        }
        let header = RecordHeader::decode(&self.header_bytes);
        let major = self.check_header(&header)?;
        self.crc.restart();
        self.header = Some(header);
        sink.begin(&header, major);
        let rest_bytes = length_bytes.saturating_sub(RECORD_BYTES_MIN);
        self.state = State::InBody { rest_bytes };
        if rest_bytes == 0 {
            self.finish_record(sink)?;
        }
        Ok(later)
    }

    /// Whether zeros here may be the padding behind a switch that began before the first byte: a page or a
    /// segment may end in the middle of its header, which is all there is of it, and what is padded is the
    /// segment with its last byte (`ReserveXLogSwitch`). Zeros that a disk has made are told by the next
    /// record, which follows one that nobody has seen.
    fn follows_unseen_switch(&self) -> bool {
        let left_max = u64::from(RECORD_BYTES_MIN) - MAXALIGN;
        let left = u64::from(self.unknown_bytes);
        self.last_start_lsn.is_none() && (1..=left_max).contains(&left)
    }

    /// Nothing may follow the end of the WAL. Names the first byte that does, however it came.
    fn check_zeros(&self, start: Lsn, bytes: &[u8]) -> Result<()> {
        match bytes.iter().position(|byte| *byte != 0) {
            None => Ok(()),
            Some(offset) => {
                let found = Lsn(start.0.saturating_add(offset as u64));
                Err(data_behind_end(found, self.last_end_lsn))
            }
        }
    }

    /// Takes in bytes of a record's body that comes in pieces.
    fn collect_body<'a>(
        &mut self,
        bytes: &'a [u8],
        rest_bytes: u32,
        sink: &mut impl Sink,
    ) -> Result<&'a [u8]> {
        let (now, later) = split(bytes, u64::from(rest_bytes));
        if self.check == CrcCheck::Every {
            self.crc.update(now);
        }
        if let Some(header) = &self.header {
            sink.body(header, now);
        }
        self.advance(now.len());
        let rest_bytes = rest_bytes.saturating_sub(u32::try_from(now.len()).unwrap_or(u32::MAX));
        self.state = State::InBody { rest_bytes };
        if rest_bytes == 0 {
            self.finish_record(sink)?;
        }
        Ok(later)
    }

    fn skip_unknown<'a>(&mut self, bytes: &'a [u8], rest_bytes: u32) -> &'a [u8] {
        let (now, later) = split(bytes, u64::from(rest_bytes));
        self.advance(now.len());
        let rest_bytes = rest_bytes.saturating_sub(u32::try_from(now.len()).unwrap_or(u32::MAX));
        self.state = State::InUnknown { rest_bytes };
        if rest_bytes == 0 {
            self.last_end_lsn = align_up(self.position);
            self.state = State::Between;
        }
        later
    }

    /// The last byte of a record that came in pieces is in.
    fn finish_record(&mut self, sink: &mut impl Sink) -> Result<()> {
        let Some(header) = self.header.take() else { return Ok(()) };
        if self.check == CrcCheck::Every {
            let head = self.header_bytes;
            self.crc.update(head.first_chunk::<RECORD_CRC_OFFSET>().map_or(&[], |head| head));
            self.check_crc(&header)?;
        }
        let range = self.record_range(&header)?;
        sink.end(&header, range)?;
        self.end_record(range);
        Ok(())
    }

    /// Range of the record whose last byte is before `position`.
    #[inline]
    fn record_range(&self, header: &RecordHeader) -> Result<LsnRange> {
        let switch = header.rmgr == RmgrId::XLOG && header.operation() == XLOG_SWITCH;
        let mut end = align_up(self.position);
        if switch && self.segment_size.start_of(end) != end {
            end = self.segment_size.end_of(end);
        }
        LsnRange::new(self.record_start_lsn, end)
            .ok_or_else(|| damaged_record(self.record_start_lsn, "it ends before it begins"))
    }

    /// Notes that the record of this range is complete: whoever is to take it in could.
    #[inline]
    fn end_record(&mut self, range: LsnRange) {
        let padded = range.end() > align_up(self.position);
        self.state = if padded { State::InSwitchPadding } else { State::Between };
        self.last_end_lsn = range.end();
        self.last_start_lsn = Some(range.start());
    }

    /// `ValidXLogRecordHeader`; gives the major version of the page.
    #[inline]
    fn check_header(&self, header: &RecordHeader) -> Result<u32> {
        let start = self.record_start_lsn;
        check_length(header.length_bytes, start)?;
        let chained = match self.last_start_lsn {
            Some(last) => header.previous_lsn == last,
            // All between where we began and here was the rest of a record, or padding.
            None => header.previous_lsn < self.begin,
        };
        let major = self.major().ok_or_else(|| damaged_record(start, "it is on no page"))?;
        if !header.rmgr.is_valid(major) {
            return Err(unknown_rmgr(header, start));
        }
        if !chained {
            return Err(bad_chain(header, start, self.last_start_lsn));
        }
        Ok(major)
    }

    #[inline]
    fn check_crc(&self, header: &RecordHeader) -> Result<()> {
        let found = self.crc.value();
        if found == header.crc {
            Ok(())
        } else {
            Err(bad_crc(header, self.record_start_lsn, found))
        }
    }
}

/// `bytes` cut after at most `count` bytes.
#[inline]
fn split(bytes: &[u8], count: u64) -> (&[u8], &[u8]) {
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(bytes.len());
    bytes.split_at_checked(count).unwrap_or((bytes, &[]))
}

/// Copies `piece` to `target` at `offset`, as far as there is room.
fn copy_to(target: &mut [u8], offset: usize, piece: &[u8]) {
    let room = target.get_mut(offset..).unwrap_or_default();
    for (to, from) in room.iter_mut().zip(piece) {
        *to = *from;
    }
}

fn u32_prefix(bytes: &[u8; RECORD_HEADER_BYTES]) -> u32 {
    bytes.first_chunk().map_or(0, |first| u32::from_le_bytes(*first))
}

#[inline]
fn align_up(position: Lsn) -> Lsn {
    Lsn(position.0.saturating_add(MAXALIGN - 1) & !(MAXALIGN - 1))
}

#[inline]
fn check_length(length_bytes: u32, start: Lsn) -> Result<()> {
    if (RECORD_BYTES_MIN..=RECORD_BYTES_MAX).contains(&length_bytes) {
        return Ok(());
    }
    Err(damaged_record(start, &format!("its length is {length_bytes} bytes")))
}

#[cold]
fn unknown_rmgr(header: &RecordHeader, start: Lsn) -> Error {
    let number = header.rmgr.0;
    damaged_record(start, &format!("there is no resource manager {number}"))
}

#[cold]
fn bad_chain(header: &RecordHeader, start: Lsn, expected: Option<Lsn>) -> Error {
    let found = header.previous_lsn;
    let expected = expected.map_or("an earlier one".to_owned(), |expected| expected.to_string());
    damaged_record(start, &format!("it follows record {found}, expected {expected}"))
}

#[cold]
fn bad_crc(header: &RecordHeader, start: Lsn, found: u32) -> Error {
    let expected = header.crc;
    damaged_record(start, &format!("its CRC is {found:08x}, expected {expected:08x}"))
}

#[cold]
fn data_behind_end(found: Lsn, end: Lsn) -> Error {
    damaged_page(
        found.align_down(XLOG_BLCKSZ),
        &format!("there are bytes at {found} behind the end of the WAL at {end}"),
    )
}
