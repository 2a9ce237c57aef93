//! Positions in the WAL and half-open ranges of it.
//!
//! # Source
//! `XLogRecPtr` in PostgreSQL's `src/include/access/xlogdefs.h`; the `X/X` form is `LSN_FORMAT_ARGS`.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Kind, Result};

/// A byte position in the WAL of a cluster; 0 is PostgreSQL's `InvalidXLogRecPtr`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// `InvalidXLogRecPtr`: no position.
    pub const INVALID: Lsn = Lsn(0);

    /// Whether this is a position at all.
    #[must_use]
    pub fn is_valid(self) -> bool {
        self.0 != 0
    }

    /// The position `bytes` later, or `None` past the end of the WAL's address space.
    #[must_use]
    pub fn checked_add(self, bytes: u64) -> Option<Lsn> {
        self.0.checked_add(bytes).map(Lsn)
    }

    /// Bytes from `earlier` to here, or `None` when `earlier` is later.
    #[must_use]
    pub fn checked_since(self, earlier: Lsn) -> Option<u64> {
        self.0.checked_sub(earlier.0)
    }

    /// Bytes from `earlier` to here, 0 when `earlier` is later: for lags and progress.
    #[must_use]
    pub fn saturating_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The greatest multiple of `unit` (a power of two, bytes) that is not after this position.
    #[must_use]
    pub fn align_down(self, unit: u64) -> Lsn {
        assert!(unit.is_power_of_two(), "alignment {unit} is not a power of two");
        Lsn(self.0 & !(unit - 1))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Lsn {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let half = |part: &str| {
            let digits = !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
            digits.then(|| u32::from_str_radix(part, 16).ok()).flatten()
        };
        text.split_once('/')
            .and_then(|(high, low)| Some((half(high)?, half(low)?)))
            .map(|(high, low)| Lsn(u64::from(high) << 32 | u64::from(low)))
            .ok_or_else(|| {
                Error::new(Kind::Usage, format!("unable to read '{text}' as an LSN"))
                    .hint("Write an LSN as PostgreSQL does: two hexadecimal numbers with a slash, like 0/3000148.")
            })
    }
}

impl serde::Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The bytes `[start, end)` of a WAL; never runs backwards.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LsnRange {
    start: Lsn,
    end: Lsn,
}

impl LsnRange {
    /// The range `[start, end)`, or `None` when `end` is before `start`.
    #[must_use]
    pub fn new(start: Lsn, end: Lsn) -> Option<Self> {
        (start <= end).then_some(Self { start, end })
    }

    /// First position inside.
    #[must_use]
    pub fn start(self) -> Lsn {
        self.start
    }

    /// First position after.
    #[must_use]
    pub fn end(self) -> Lsn {
        self.end
    }

    /// Bytes inside.
    #[must_use]
    pub fn len_bytes(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// Whether nothing is inside.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether `position` is inside.
    #[must_use]
    pub fn contains(self, position: Lsn) -> bool {
        self.start <= position && position < self.end
    }

    /// Whether all of `other` is inside.
    #[must_use]
    pub fn covers(self, other: LsnRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

impl fmt::Display for LsnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start, self.end)
    }
}

impl fmt::Debug for LsnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_is_written_and_read_as_postgres_does() {
        let lsn: Lsn = "16/B374D848".parse().unwrap();
        assert_eq!(lsn, Lsn(0x16_B374_D848));
        assert_eq!(lsn.to_string(), "16/B374D848");
        for bad in ["", "/", "1/", "/1", "1/2/3", "+1/2", "1/100000000", "g/1", "12"] {
            assert_eq!(bad.parse::<Lsn>().unwrap_err().kind(), Kind::Usage, "{bad}");
        }
    }

    #[test]
    fn ranges_never_run_backwards() {
        assert!(LsnRange::new(Lsn(2), Lsn(1)).is_none());
        let range = LsnRange::new(Lsn(16), Lsn(32)).unwrap();
        assert!(range.contains(Lsn(16)) && !range.contains(Lsn(32)));
        assert_eq!(range.len_bytes(), 16);
    }
}
