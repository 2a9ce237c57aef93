//! Timelines, the size of a WAL segment, and the names of WAL segment files.
//!
//! # Source
//! `src/include/access/xlog_internal.h` (`XLogFileName`, `XLogFromFileName`, `IsValidWalSegSize`),
//! the same in PostgreSQL 13 to 18.

use std::fmt;

use super::lsn::{Lsn, LsnRange};
use crate::error::{Error, Kind, Result};

/// PostgreSQL's `TimeLineID`; never 0.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "u32", into = "u32")]
pub struct TimelineId(u32);

impl TimelineId {
    /// The timeline every cluster begins on.
    pub const FIRST: TimelineId = TimelineId(1);

    /// The timeline with this number, or `None` for 0.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        (number != 0).then_some(Self(number))
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }

    /// Name of the timeline's history file, `%08X.history` (`TLHistoryFileName`).
    #[must_use]
    pub fn history_file_name(self) -> String {
        format!("{:08X}.history", self.0)
    }
}

impl TryFrom<u32> for TimelineId {
    type Error = Error;
    fn try_from(number: u32) -> Result<Self> {
        Self::new(number).ok_or_else(|| Error::new(Kind::Corrupt, "timeline 0 does not exist"))
    }
}

impl From<TimelineId> for u32 {
    fn from(timeline: TimelineId) -> u32 {
        timeline.0
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "timeline {}", self.0)
    }
}

/// Size of a WAL segment file in bytes: a power of two from 1 MiB to 1 GiB, 16 MiB by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct SegmentSize(u32);

/// Number of a WAL segment, `XLogSegNo`: position divided by the segment size.
pub type SegmentNumber = u64;

impl SegmentSize {
    /// `WalSegMinSize`.
    pub const MIN_BYTES: u32 = 1 << 20;
    /// `WalSegMaxSize`.
    pub const MAX_BYTES: u32 = 1 << 30;
    /// `DEFAULT_XLOG_SEG_SIZE`.
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);

    /// This size, or `None` when PostgreSQL knows no such size (`IsValidWalSegSize`).
    #[must_use]
    pub fn new(bytes: u32) -> Option<Self> {
        let valid = bytes.is_power_of_two() && (Self::MIN_BYTES..=Self::MAX_BYTES).contains(&bytes);
        valid.then_some(Self(bytes))
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// Number of the segment that holds the byte at `position`.
    #[must_use]
    pub fn number_of(self, position: Lsn) -> SegmentNumber {
        position.0 / self.bytes()
    }

    /// First position of the segment that holds the byte at `position`.
    #[must_use]
    pub fn start_of(self, position: Lsn) -> Lsn {
        position.align_down(self.bytes())
    }

    /// First position after the segment that holds the byte at `position`.
    #[must_use]
    pub fn end_of(self, position: Lsn) -> Lsn {
        Lsn(self.start_of(position).0.saturating_add(self.bytes()))
    }

    /// The positions of segment `number`, or `None` past the WAL's address space.
    #[must_use]
    pub fn range_of(self, number: SegmentNumber) -> Option<LsnRange> {
        let start = number.checked_mul(self.bytes())?;
        LsnRange::new(Lsn(start), Lsn(start.checked_add(self.bytes())?))
    }

    /// File name of segment `number` on `timeline` (`XLogFileName`).
    #[must_use]
    pub fn file_name(self, timeline: TimelineId, number: SegmentNumber) -> String {
        let per_id = 0x1_0000_0000 / self.bytes();
        format!("{:08X}{:08X}{:08X}", timeline.get(), number / per_id, number % per_id)
    }

    /// Timeline and number in a segment file name (`XLogFromFileName`), or `None` for another name.
    #[must_use]
    pub fn parse_file_name(self, name: &str) -> Option<(TimelineId, SegmentNumber)> {
        let hex = name.len() == 24 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
        if !hex {
            return None;
        }
        let part = |from: usize| u32::from_str_radix(name.get(from..from + 8)?, 16).ok();
        let per_id = 0x1_0000_0000 / self.bytes();
        let low = u64::from(part(16)?);
        let number = u64::from(part(8)?).checked_mul(per_id)?.checked_add(low)?;
        (low < per_id).then_some((TimelineId::new(part(0)?)?, number))
    }
}

impl TryFrom<u32> for SegmentSize {
    type Error = Error;
    fn try_from(bytes: u32) -> Result<Self> {
        Self::new(bytes).ok_or_else(|| {
            Error::new(
                Kind::Corrupt,
                format!("WAL segment size {bytes} is not a power of two from 1 MiB to 1 GiB"),
            )
        })
    }
}

impl From<SegmentSize> for u32 {
    fn from(size: SegmentSize) -> u32 {
        size.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_names_go_both_ways_for_every_size() {
        let timeline = TimelineId::new(0x1A).unwrap();
        let mut bytes = SegmentSize::MIN_BYTES;
        while bytes <= SegmentSize::MAX_BYTES {
            let size = SegmentSize::new(bytes).unwrap();
            for position in [Lsn(0x1_0000_0000), Lsn(0xFFFF_FFFF), Lsn(0x12_3456_789A)] {
                let number = size.number_of(position);
                let name = size.file_name(timeline, number);
                assert_eq!(size.parse_file_name(&name), Some((timeline, number)));
                assert!(size.range_of(number).unwrap().contains(position));
            }
            bytes *= 2;
        }
        let name = SegmentSize::DEFAULT.file_name(TimelineId::FIRST, 0x1_02);
        assert_eq!(name, "000000010000000100000002");
        assert_eq!(SegmentSize::DEFAULT.parse_file_name("000000010000000100000100"), None);
    }
}
