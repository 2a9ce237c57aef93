//! The truth: what the server wrote, as a list of timelines with their bytes and what is in them.
//!
//! WAL is made of real pages and records, byte for byte as PostgreSQL lays them out; nothing of the
//! code under test is used to make it, and a separate list says where each transaction ended.
//!
//! # Source
//! `XLogPageHeaderData`, `XLogRecord`, `xl_xact_commit`, `xl_restore_point`, `xl_end_of_recovery`, and
//! `CheckPoint` of PostgreSQL 13 to 16.

use crc_fast::{CrcAlgorithm, checksum};

/// Bytes of a segment: the smallest there is, so that many fit into a run.
pub const SEGMENT: u64 = 1 << 20;
/// Bytes of a page.
pub const PAGE: u64 = 8192;
/// Where the WAL begins.
pub const ORIGIN: u64 = 3 * SEGMENT;
/// The cluster.
pub const SYSTEM_ID: u64 = 7_300_000_000_000_000_017;
/// Microseconds from 1970 to PostgreSQL's epoch.
const EPOCH_MICROS: i64 = 946_684_800_000_000;

/// A record that ends a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    pub xid: u32,
    /// Microseconds since 1970.
    pub time: i64,
    pub start: u64,
    /// The first position after its last byte.
    pub last: u64,
    /// The same with its padding.
    pub end: u64,
    pub commit: bool,
}

/// A restore point.
#[derive(Clone, Debug)]
pub struct Point {
    pub name: String,
    pub start: u64,
    pub end: u64,
}

/// What a disk does to WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// One bit of a record is another.
    Byte,
    /// From the end of a record on the segment is zero.
    Rest,
    /// A segment is zero.
    Segment,
    /// One bit of a record is another, in the segment after the one it begins in.
    Across,
}

/// A place that no backup which began before its end leads past.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Barrier {
    /// The mark that says so, for the timeline that holds the place.
    kind: &'static str,
    /// How far a backup from before leads.
    pub at: u64,
    /// Where the first backup that leads on may begin.
    pub until: u64,
    /// Whoever stores the byte before this has marked it.
    pub told: u64,
}

impl Barrier {
    /// The name of the mark of timeline `number`.
    pub fn mark(&self, number: u32) -> String {
        self.mark_from(number, self.at)
    }

    fn mark_from(&self, number: u32, at: u64) -> String {
        let Self { kind, until, .. } = self;
        match *kind {
            "damaged" => format!("main/marks/damaged-{number:08X}-{at:016X}-{until:016X}"),
            kind => format!("main/marks/{kind}-{number:08X}-{at:016X}"),
        }
    }
}

/// A timeline with the whole way to it: bytes before a switch point are its ancestors'.
#[derive(Clone, Debug)]
pub struct Line {
    pub number: u32,
    /// Each ancestor and where its part ends.
    pub ancestors: Vec<(u32, u64)>,
    magic: u16,
    bytes: Vec<u8>,
    /// Start and end of each record; behind a switch lies the padding up to the segment's end, and any
    /// place in that is as good as its end.
    pub records: Vec<(u64, u64)>,
    paddings: Vec<(u64, u64)>,
    pub endings: Vec<Ending>,
    pub points: Vec<Point>,
    pub barriers: Vec<Barrier>,
}

impl Line {
    pub fn first(magic: u16) -> Self {
        Self {
            number: 1,
            ancestors: Vec::new(),
            magic,
            bytes: Vec::new(),
            records: Vec::new(),
            paddings: Vec::new(),
            endings: Vec::new(),
            points: Vec::new(),
            barriers: Vec::new(),
        }
    }

    /// A timeline that leaves this one at `at`, the end of a record.
    pub fn fork(&self, number: u32, at: u64) -> Self {
        let mut line = self.clone();
        line.ancestors.push((self.number, at));
        line.number = number;
        line.bytes.truncate((at - ORIGIN) as usize);
        line.records.retain(|(_, end)| *end <= at);
        line.paddings.retain(|(_, end)| *end <= at);
        line.endings.retain(|ending| ending.end <= at);
        line.points.retain(|point| point.end <= at);
        line.barriers.retain(|barrier| barrier.told <= at);
        line
    }

    /// First position that is not written.
    pub fn end(&self) -> u64 {
        ORIGIN + self.bytes.len() as u64
    }

    pub fn slice(&self, from: u64, to: u64) -> &[u8] {
        &self.bytes[(from - ORIGIN) as usize..(to - ORIGIN) as usize]
    }

    /// The way to this timeline: number, first position, first position after.
    pub fn parts(&self) -> Vec<(u32, u64, u64)> {
        let mut start = 0;
        let mut parts = Vec::new();
        for (number, end) in &self.ancestors {
            parts.push((*number, start, *end));
            start = *end;
        }
        parts.push((self.number, start, u64::MAX));
        parts
    }

    /// The timeline that the byte at `position` belongs to.
    pub fn number_at(&self, position: u64) -> u32 {
        let mut parts = self.parts().into_iter();
        parts.find(|(_, _, end)| position < *end).map_or(self.number, |(number, _, _)| number)
    }

    /// The history file, as PostgreSQL writes it.
    pub fn history(&self) -> Option<String> {
        let line = |(number, at): &(u32, u64)| {
            format!(
                "{number}\t{:X}/{:X}\tno recovery target specified\n",
                at >> 32,
                at & 0xffff_ffff
            )
        };
        let text: String = self.ancestors.iter().map(line).collect();
        (!text.is_empty()).then_some(text)
    }

    /// The last record end that is not after `position`.
    pub fn boundary_before(&self, position: u64) -> u64 {
        let after = self.records.partition_point(|(_, end)| *end <= position);
        after.checked_sub(1).map_or(ORIGIN, |last| self.records[last].1)
    }

    /// Whether a record ends at `position`, or has ended and is only padded.
    pub fn is_boundary(&self, position: u64) -> bool {
        let padded = |(start, end): &(u64, u64)| *start <= position && position <= *end;
        // Records end on multiples of eight.
        self.boundary_before(position.next_multiple_of(8)) >= position
            || self.paddings.iter().any(padded)
    }

    /// Greatest time of the transactions whose record has its last byte in `[start, end)`.
    pub fn greatest_time(&self, start: u64, end: u64) -> Option<i64> {
        let inside = self.endings.iter().filter(|e| start < e.last && e.last <= end);
        inside.map(|ending| ending.time).max()
    }

    fn page_header(&mut self, rest_bytes: u32) {
        let position = self.end();
        let long = position.is_multiple_of(SEGMENT);
        let info = u16::from(rest_bytes > 0) | if long { 2 } else { 0 };
        self.bytes.extend(self.magic.to_le_bytes());
        self.bytes.extend(info.to_le_bytes());
        self.bytes.extend(self.number.to_le_bytes());
        self.bytes.extend(position.to_le_bytes());
        self.bytes.extend(rest_bytes.to_le_bytes());
        self.bytes.extend([0; 4]);
        if long {
            self.bytes.extend(SYSTEM_ID.to_le_bytes());
            self.bytes.extend((SEGMENT as u32).to_le_bytes());
            self.bytes.extend((PAGE as u32).to_le_bytes());
        }
    }

    /// Appends a record; gives its start and its end.
    fn record(&mut self, (rmgr, info): (u8, u8), xid: u32, data: &[u8]) -> (u64, u64) {
        let mut body = Vec::with_capacity(data.len() + 5);
        match u8::try_from(data.len()) {
            Ok(0) => {}
            Ok(len) => body.extend([255, len]),
            Err(_) => {
                body.push(254);
                body.extend((data.len() as u32).to_le_bytes());
            }
        }
        body.extend(data);
        let mut record = (body.len() as u32 + 24).to_le_bytes().to_vec();
        record.extend(xid.to_le_bytes());
        record.extend(self.records.last().map_or(0, |(start, _)| *start).to_le_bytes());
        record.extend([info, rmgr, 0, 0]);
        let crc = checksum(CrcAlgorithm::Crc32Iscsi, &[&body[..], &record].concat()) as u32;
        record.extend(crc.to_le_bytes());
        record.extend(body);
        if self.end().is_multiple_of(PAGE) {
            self.page_header(0);
        }
        let start = self.end();
        let mut rest = &record[..];
        while !rest.is_empty() {
            if self.end().is_multiple_of(PAGE) {
                self.page_header(rest.len() as u32);
            }
            let room = (PAGE - self.end() % PAGE) as usize;
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.bytes.extend(now);
            rest = later;
        }
        while !self.bytes.len().is_multiple_of(8) {
            self.bytes.push(0);
        }
        self.records.push((start, self.end()));
        (start, self.end())
    }

    /// Work without a commit.
    pub fn filler(&mut self, bytes: usize, salt: u64) -> (u64, u64) {
        let data: Vec<u8> =
            (0..bytes as u64).map(|i| ((i / 7).wrapping_mul(salt | 1) >> 3) as u8).collect();
        self.record((10, 0), 5, &data)
    }

    /// The end of a transaction at `time`, microseconds since 1970.
    pub fn ending(&mut self, xid: u32, time: i64, commit: bool) {
        let info = if commit { 0x00 } else { 0x20 };
        let (start, end) = self.record((1, info), xid, &(time - EPOCH_MICROS).to_le_bytes());
        // 24 bytes of header, 2 of the data's, 8 of time.
        let last = end - (34_u64.next_multiple_of(8) - 34);
        self.endings.push(Ending { xid, time, start, last, end, commit });
    }

    pub fn restore_point(&mut self, name: String, time: i64) {
        let mut data = (time - EPOCH_MICROS).to_le_bytes().to_vec();
        data.extend(name.as_bytes());
        data.resize(8 + 64, 0);
        let (start, end) = self.record((0, 0x70), 0, &data);
        self.points.push(Point { name, start, end });
    }

    /// A checkpoint; online ones point back to `redo`. Gives the record's start.
    pub fn checkpoint(&mut self, redo: Option<u64>, time: i64) -> u64 {
        let mut data = vec![0; 88];
        data[8..12].copy_from_slice(&self.number.to_le_bytes());
        data[12..16].copy_from_slice(&self.number.to_le_bytes());
        let seconds = (time - EPOCH_MICROS) / 1_000_000 + EPOCH_MICROS / 1_000_000;
        data[56..64].copy_from_slice(&seconds.to_le_bytes());
        let info = if redo.is_some() { 0x10 } else { 0x00 };
        data[0..8].copy_from_slice(&redo.unwrap_or_else(|| self.next_record()).to_le_bytes());
        self.record((0, info), 0, &data).0
    }

    /// Where the next record will begin.
    fn next_record(&self) -> u64 {
        let position = self.end();
        match position {
            _ if position.is_multiple_of(SEGMENT) => position + 40,
            _ if position.is_multiple_of(PAGE) => position + 24,
            _ => position,
        }
    }

    /// The first record of a timeline made by a promotion.
    pub fn end_of_recovery(&mut self, previous: u32, time: i64) {
        let mut data = (time - EPOCH_MICROS).to_le_bytes().to_vec();
        data.extend(self.number.to_le_bytes());
        data.extend(previous.to_le_bytes());
        self.record((0, 0x90), 0, &data);
    }

    /// A change of the settings that matter to recovery: `wal_level` 0 is minimal.
    pub fn parameter_change(&mut self, wal_level: u32) {
        let numbers = [100, 8, 10, 0, 64, wal_level].map(u32::to_le_bytes).concat();
        let record = self.record((0, 0x60), 0, &[&numbers[..], &[0; 4]].concat());
        if wal_level == 0 {
            let (at, told) = record;
            self.barriers.push(Barrier { kind: "minimal", at, until: at + 1, told });
        }
    }

    /// A record and a switch to the next segment, and the disk damages them.
    pub fn damaged(&mut self, how: Damage) {
        if how == Damage::Segment && !self.end().is_multiple_of(SEGMENT) {
            self.switch();
        }
        let across = how == Damage::Across;
        while across && self.end() % SEGMENT < SEGMENT - 2 * PAGE {
            self.filler(3000, 1);
        }
        let at = self.records.last().map_or(ORIGIN, |(_, end)| *end);
        // 24 bytes of header, 5 of the data's: the record needs no padding.
        let bytes = if across { 3 * PAGE as usize } else { 3000 };
        let (start, end) = self.filler(bytes + 3, 1);
        self.switch();
        let until = self.end();
        let place = |position: u64| (position - ORIGIN) as usize;
        let told = match how {
            // In the last page of the record, behind its header.
            Damage::Byte => {
                self.bytes[place(end - 16)] ^= 0x20;
                end
            }
            Damage::Across => {
                self.bytes[place(start.next_multiple_of(SEGMENT) + 100)] ^= 0x20;
                end
            }
            Damage::Rest | Damage::Segment => {
                self.bytes[place(at)..place(until)].fill(0);
                // A header of a page, and one of a record.
                at + 64
            }
        };
        self.paddings.push((at, until));
        self.barriers.push(Barrier { kind: "damaged", at, until, told });
    }

    /// What the disk made last of one bit is as it was.
    pub fn heal(&mut self) {
        let barrier = self.barriers.pop().unwrap();
        self.paddings.pop();
        self.bytes[(barrier.told - 16 - ORIGIN) as usize] ^= 0x20;
    }

    /// Whether there is nothing but padding between two positions. Who begins to read in there cannot tell
    /// it from zeros that a disk has made.
    pub fn is_padding(&self, from: u64, until: u64) -> bool {
        from == until || self.paddings.iter().any(|(start, end)| *start <= from && until <= *end)
    }

    /// Whether a mark of this name says what `barrier`, which timeline `number` holds, is.
    pub fn is_said(&self, barrier: &Barrier, number: u32, name: &str) -> bool {
        let at = name.split('-').nth(2).and_then(|at| u64::from_str_radix(at, 16).ok());
        at.is_some_and(|at| {
            let same = at == barrier.at || at < barrier.at && self.is_padding(at, barrier.at);
            same && barrier.mark_from(number, at) == name
        })
    }

    /// How far a backup that begins at `start` leads, when there is something that bars its way.
    pub fn barrier_after(&self, start: u64) -> Option<u64> {
        let ahead = self.barriers.iter().filter(|barrier| start < barrier.until);
        ahead.map(|barrier| barrier.at.max(start)).min()
    }

    /// The last record of a base backup that began at `start`; gives its end.
    pub fn backup_end(&mut self, start: u64) -> u64 {
        self.record((0, 0x50), 0, &start.to_le_bytes()).1
    }

    /// A switch to the next segment.
    pub fn switch(&mut self) {
        let (_, padding) = self.record((0, 0x40), 0, &[]);
        while !self.end().is_multiple_of(SEGMENT) {
            self.bytes.push(0);
        }
        let end = self.end();
        if let Some(last) = self.records.last_mut() {
            last.1 = end;
        }
        self.paddings.push((padding, end));
    }
}

/// A base backup that was begun.
#[derive(Clone, Debug)]
pub struct Backup {
    pub id: String,
    /// The timeline it was taken on, by its index among the server's.
    pub line: usize,
    pub start: u64,
    /// Known when the server has sent everything.
    pub end: u64,
    /// Microseconds since 1970.
    pub end_time: i64,
    pub files: Vec<(String, Vec<u8>)>,
}
