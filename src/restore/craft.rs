//! WAL made for tests: real pages and records with right CRCs, cut into extents as a repository has them.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;

use super::scan::WalSource;
use crate::error::{Error, Kind, Result};
use crate::pg::crc::crc32c;
use crate::pg::{Lsn, LsnRange, PgTime, SegmentSize, TimelineId};
use crate::repo::coverage::{StoredExtent, WalCatalog};
use crate::repo::names::ExtentName;

const PAGE: u64 = 8192;
/// `XLOG_PAGE_MAGIC` of 15.
const MAGIC: u16 = 0xD110;
const SYSTEM_ID: u64 = 42;

/// A stretch of one timeline's WAL in the making.
pub(crate) struct Craft {
    pub(crate) timeline: TimelineId,
    pub(crate) segment_size: SegmentSize,
    pub(crate) start: Lsn,
    bytes: Vec<u8>,
    previous: Lsn,
    /// Where the transaction-ending records end, and their times.
    ends: Vec<(Lsn, PgTime)>,
}

impl Craft {
    /// Begins at `start`, a segment's first byte.
    pub(crate) fn new(timeline: u32, start: Lsn) -> Self {
        let segment_size = SegmentSize::new(1 << 20).unwrap();
        assert_eq!(segment_size.start_of(start), start);
        let timeline = TimelineId::new(timeline).unwrap();
        Self {
            timeline,
            segment_size,
            start,
            bytes: Vec::new(),
            previous: Lsn(0),
            ends: Vec::new(),
        }
    }

    /// Goes on with a copy of what is here as another timeline: a promotion at the current end.
    pub(crate) fn fork(&self, timeline: u32) -> Self {
        Self {
            timeline: TimelineId::new(timeline).unwrap(),
            bytes: self.bytes.clone(),
            ends: Vec::new(),
            ..*self
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn end(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }

    fn page_header(&mut self, remaining: u32) {
        let address = self.end();
        let long = self.segment_size.start_of(address) == address;
        let info: u16 = u16::from(remaining > 0) | if long { 2 } else { 0 };
        self.bytes.extend_from_slice(&MAGIC.to_le_bytes());
        self.bytes.extend_from_slice(&info.to_le_bytes());
        self.bytes.extend_from_slice(&self.timeline.get().to_le_bytes());
        self.bytes.extend_from_slice(&address.0.to_le_bytes());
        self.bytes.extend_from_slice(&remaining.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        if long {
            self.bytes.extend_from_slice(&SYSTEM_ID.to_le_bytes());
            let size = u32::from(self.segment_size);
            self.bytes.extend_from_slice(&size.to_le_bytes());
            self.bytes.extend_from_slice(&8192_u32.to_le_bytes());
        }
    }

    /// Adds a record.
    pub(crate) fn record(&mut self, rmgr: u8, info: u8, xid: u32, data: &[u8]) -> LsnRange {
        let mut body = match u8::try_from(data.len()) {
            Ok(length) => vec![255, length],
            Err(_) => [&[254][..], &u32::try_from(data.len()).unwrap().to_le_bytes()].concat(),
        };
        body.extend_from_slice(data);
        if self.end().0.is_multiple_of(PAGE) {
            self.page_header(0);
        }
        let at = self.end();
        let length = u32::try_from(24 + body.len()).unwrap();
        let mut header = length.to_le_bytes().to_vec();
        header.extend_from_slice(&xid.to_le_bytes());
        header.extend_from_slice(&self.previous.0.to_le_bytes());
        header.extend_from_slice(&[info, rmgr, 0, 0]);
        let crc = crc32c(&[&body[..], &header].concat());
        header.extend_from_slice(&crc.to_le_bytes());
        let mut rest = &[&header[..], &body].concat()[..];
        while !rest.is_empty() {
            let room = usize::try_from(PAGE - self.end().0 % PAGE).unwrap();
            if u64::try_from(room).unwrap() == PAGE {
                self.page_header(u32::try_from(rest.len()).unwrap());
                continue;
            }
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.bytes.extend_from_slice(now);
            rest = later;
        }
        while !self.bytes.len().is_multiple_of(8) {
            self.bytes.push(0);
        }
        self.previous = at;
        LsnRange::new(at, self.end()).unwrap()
    }

    pub(crate) fn commit(&mut self, xid: u32, time: &str) -> LsnRange {
        self.ending(0x00, xid, time)
    }

    pub(crate) fn abort(&mut self, xid: u32, time: &str) -> LsnRange {
        self.ending(0x20, xid, time)
    }

    fn ending(&mut self, info: u8, xid: u32, time: &str) -> LsnRange {
        let time = at(time);
        let range = self.record(1, info, xid, &time.0.to_le_bytes());
        self.ends.push((range.end(), time));
        range
    }

    pub(crate) fn restore_point(&mut self, name: &str) -> LsnRange {
        let mut data = 0_i64.to_le_bytes().to_vec();
        let mut field = name.as_bytes().to_vec();
        field.resize(64, 0);
        data.extend(field);
        self.record(0, 0x70, 0, &data)
    }

    /// A switch, and zeros to the end of the segment.
    pub(crate) fn switch(&mut self) -> LsnRange {
        let record = self.record(0, 0x40, 0, &[]);
        while self.segment_size.start_of(self.end()) != self.end() {
            self.bytes.push(0);
        }
        LsnRange::new(record.start(), self.end()).unwrap()
    }

    /// Puts something else where `at` is.
    pub(crate) fn overwrite(&mut self, at: Lsn, bytes: &[u8]) {
        let offset = usize::try_from(at.0 - self.start.0).unwrap();
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// A record of `bytes` bytes that means nothing.
    pub(crate) fn filler(&mut self, bytes: usize) -> LsnRange {
        self.record(0, 0x20, 0, &vec![7; bytes])
    }
}

/// The instant `10:00:01.5` of the day of these tests, or a full time.
pub(crate) fn at(time: &str) -> PgTime {
    PgTime::from_timestamp(ts(time))
}

pub(crate) fn ts(time: &str) -> Timestamp {
    format!("2026-11-22T{time}Z").parse().unwrap()
}

/// Extents in memory.
#[derive(Default)]
pub(crate) struct Extents {
    bytes: BTreeMap<ExtentName, Bytes>,
    pub(crate) read: std::sync::Mutex<Vec<ExtentName>>,
}

impl Extents {
    /// Cuts `craft` at its start, `cuts` and its end and keeps the pieces.
    pub(crate) fn put(&mut self, craft: &Craft, cuts: &[Lsn]) {
        let mut edges = vec![craft.start];
        edges.extend_from_slice(cuts);
        edges.push(craft.end());
        for pair in edges.windows(2) {
            let range = LsnRange::new(pair[0], pair[1]).unwrap();
            if range.is_empty() {
                continue;
            }
            let inside = |(end, _): &&(Lsn, PgTime)| range.start() < *end && *end <= range.end();
            let time = craft.ends.iter().filter(inside).map(|(_, time)| *time).max();
            let name = ExtentName { timeline: craft.timeline, range, time };
            let index = |lsn: Lsn| usize::try_from(lsn.0 - craft.start.0).unwrap();
            let bytes = craft.bytes[index(range.start())..index(range.end())].to_vec();
            self.bytes.insert(name, bytes.into());
        }
    }

    /// Takes over those of `other` that begin at `from` or later.
    pub(crate) fn take(&mut self, other: Extents, from: Lsn) {
        self.bytes.extend(other.bytes.into_iter().filter(|(name, _)| name.range.start() >= from));
    }

    pub(crate) fn remove(&mut self, position: Lsn) {
        self.bytes.retain(|name, _| !name.range.contains(position));
    }

    /// Of extents that begin inside `unread` no time is known: nobody has read them.
    pub(crate) fn forget_times(&mut self, unread: LsnRange) {
        let unread = std::mem::take(&mut self.bytes).into_iter().map(|(mut name, bytes)| {
            name.time = name.time.filter(|_| !unread.contains(name.range.start()));
            (name, bytes)
        });
        self.bytes = unread.collect();
    }

    pub(crate) fn catalog(&self) -> WalCatalog {
        WalCatalog::new(self.bytes.iter().map(|(name, bytes)| StoredExtent {
            name: *name,
            stored_bytes: bytes.len() as u64,
            modified: None,
        }))
    }
}

impl WalSource for Extents {
    async fn extent(&self, name: &ExtentName) -> Result<Bytes> {
        self.read.lock().unwrap().push(*name);
        let missing = || Error::new(Kind::NotFound, format!("no extent {name}"));
        self.bytes.get(name).cloned().ok_or_else(missing)
    }
}
