//! Makes WAL for tests, byte for byte as a server lays it out: pages, continued records, switches,
//! and what a crash leaves behind.
#![allow(clippy::cast_possible_truncation, reason = "small numbers made here")]

use crate::pg::{Lsn, LsnRange, PgTime, SegmentSize, SystemId, crc32c};

use super::page::XLOG_BLCKSZ;

/// The cluster that crafted WAL belongs to.
pub(crate) const CRAFTED_SYSTEM_ID: SystemId = SystemId(7_000_000_000_000_000_042);

/// A WAL in the making.
#[derive(Debug)]
pub(crate) struct Craft {
    pub(crate) bytes: Vec<u8>,
    start: Lsn,
    segment_size: SegmentSize,
    magic: u16,
    pub(crate) timeline: u32,
    previous: u64,
    overwritten: bool,
}

impl Craft {
    /// WAL of PostgreSQL `major` that begins at `start`, the start of a page.
    pub(crate) fn new(major: u32, segment_size: SegmentSize, start: Lsn) -> Self {
        let magic = match major {
            13 => 0xD106,
            14 => 0xD10D,
            15 => 0xD110,
            16 => 0xD113,
            17 => 0xD116,
            _ => 0xD118,
        };
        let (bytes, timeline) = (Vec::new(), 1);
        Self { bytes, start, segment_size, magic, timeline, previous: 0, overwritten: false }
    }

    /// Position of the next byte.
    pub(crate) fn position(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }

    fn page_header(&mut self, rest_bytes: u32) {
        let position = self.position();
        let long = self.segment_size.start_of(position) == position;
        let mut info = if rest_bytes > 0 { 1_u16 } else { 0 };
        info |= if long { 2 } else { 0 };
        info |= if std::mem::take(&mut self.overwritten) { 8 } else { 0 };
        self.bytes.extend(self.magic.to_le_bytes());
        self.bytes.extend(info.to_le_bytes());
        self.bytes.extend(self.timeline.to_le_bytes());
        self.bytes.extend(position.0.to_le_bytes());
        self.bytes.extend(rest_bytes.to_le_bytes());
        self.bytes.extend([0; 4]);
        if long {
            self.bytes.extend(CRAFTED_SYSTEM_ID.0.to_le_bytes());
            self.bytes.extend((self.segment_size.bytes() as u32).to_le_bytes());
            self.bytes.extend((XLOG_BLCKSZ as u32).to_le_bytes());
        }
    }

    /// Lays out the bytes of one record; `keep` of them, then stops as a crash does.
    fn lay_out(&mut self, record: &[u8], keep: usize) {
        let mut rest = record;
        let mut left = keep;
        while !rest.is_empty() && left > 0 {
            if self.position().0.is_multiple_of(XLOG_BLCKSZ) {
                let continued = if rest.len() == record.len() { 0 } else { rest.len() as u32 };
                self.page_header(continued);
            }
            let room = (XLOG_BLCKSZ - self.position().0 % XLOG_BLCKSZ) as usize;
            let (now, later) = rest.split_at(room.min(rest.len()).min(left));
            self.bytes.extend(now);
            rest = later;
            left -= now.len();
        }
    }

    fn encode(&self, (rmgr, info): (u8, u8), xid: u32, body: &[u8]) -> Vec<u8> {
        let mut head = (body.len() as u32 + 24).to_le_bytes().to_vec();
        head.extend(xid.to_le_bytes());
        head.extend(self.previous.to_le_bytes());
        head.extend([info, rmgr, 0, 0]);
        let crc = crc32c(&[body, &head].concat());
        head.extend(crc.to_le_bytes());
        head.extend(body);
        head
    }

    /// Where the next record's first byte will be.
    fn next_record(&self) -> Lsn {
        let position = self.position();
        if !position.0.is_multiple_of(XLOG_BLCKSZ) {
            return position;
        }
        let long = self.segment_size.start_of(position) == position;
        Lsn(position.0 + if long { 40 } else { 24 })
    }

    /// Appends a record with this body; gives the record's range.
    pub(crate) fn body(&mut self, kind: (u8, u8), xid: u32, body: &[u8]) -> LsnRange {
        let start = self.next_record();
        let record = self.encode(kind, xid, body);
        self.lay_out(&record, usize::MAX);
        self.previous = start.0;
        while !self.position().0.is_multiple_of(8) {
            self.bytes.push(0);
        }
        LsnRange::new(start, self.position()).expect("WAL grows")
    }

    /// Appends a record with this main data.
    pub(crate) fn main_data(&mut self, kind: (u8, u8), xid: u32, data: &[u8]) -> LsnRange {
        let mut body = if data.len() < 256 {
            vec![255, data.len() as u8]
        } else {
            [&[254], (data.len() as u32).to_le_bytes().as_slice()].concat()
        };
        body.extend(data);
        self.body(kind, xid, &body)
    }

    /// Appends a commit without any extras.
    pub(crate) fn commit(&mut self, xid: u32, time: PgTime) -> LsnRange {
        self.main_data((1, 0), xid, &time.0.to_le_bytes())
    }

    /// Appends a change of the settings that matter to recovery (`xl_parameter_change`).
    #[cfg(test)]
    pub(crate) fn parameter_change(&mut self, wal_level: u32) -> LsnRange {
        let numbers = [100, 8, 10, 0, 64, wal_level].map(u32::to_le_bytes).concat();
        self.main_data((0, 0x60), 0, &[&numbers[..], &[0; 4]].concat())
    }

    /// Appends a heap record of this length that means nothing.
    pub(crate) fn filler(&mut self, body_bytes: usize) -> LsnRange {
        let data: Vec<u8> = (0..body_bytes).map(|index| (index * 31) as u8).collect();
        self.main_data((10, 0), 5, &data)
    }

    /// Appends a switch and its padding.
    pub(crate) fn switch(&mut self) -> LsnRange {
        let record = self.body((0, 0x40), 0, &[]);
        self.zeros_to_segment_end();
        LsnRange::new(record.start(), self.position()).expect("WAL grows")
    }

    /// Appends zeros up to the end of the segment.
    pub(crate) fn zeros_to_segment_end(&mut self) {
        while self.segment_size.start_of(self.position()) != self.position() {
            self.bytes.push(0);
        }
    }

    /// Appends the start of a record that a crash cut off at the end of its first page, and what the
    /// server writes there after the crash: a page that says so.
    pub(crate) fn cut_off_record(&mut self, body_bytes: usize) -> Lsn {
        let start = self.next_record();
        let record = self.encode((10, 0), 5, &vec![1; body_bytes]);
        let room = (XLOG_BLCKSZ - start.0 % XLOG_BLCKSZ) as usize;
        assert!(record.len() > room, "the record must cross a page");
        self.lay_out(&record, room);
        self.overwritten = true;
        let data = [start.0.to_le_bytes(), [0; 8]].concat();
        self.main_data((0, 0xD0), 0, &data);
        start
    }
}
