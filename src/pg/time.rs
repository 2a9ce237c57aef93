//! PostgreSQL's timestamps.
//!
//! # Source
//! `TimestampTz` in `src/include/datatype/timestamp.h`: microseconds since 2000-01-01 00:00:00 UTC.

use std::fmt;

use jiff::Timestamp;

/// Microseconds from the Unix epoch to PostgreSQL's (`POSTGRES_EPOCH_JDATE`).
const PG_EPOCH_UNIX_MICROS: i64 = 946_684_800_000_000;

/// A `TimestampTz`: microseconds since 2000-01-01 00:00:00 UTC, may be negative.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PgTime(pub i64);

impl PgTime {
    /// The same instant, or `None` outside the years that can be shown.
    #[must_use]
    pub fn to_timestamp(self) -> Option<Timestamp> {
        Timestamp::from_microsecond(self.0.checked_add(PG_EPOCH_UNIX_MICROS)?).ok()
    }

    /// Microseconds since 1970, saturating.
    #[must_use]
    pub fn to_unix_micros(self) -> i64 {
        self.0.saturating_add(PG_EPOCH_UNIX_MICROS)
    }

    /// The instant so many microseconds after 1970, saturating.
    #[must_use]
    pub fn from_unix_micros(micros: i64) -> Self {
        Self(micros.saturating_sub(PG_EPOCH_UNIX_MICROS))
    }

    /// The instant, rounded down to a microsecond.
    #[must_use]
    pub fn from_timestamp(time: Timestamp) -> Self {
        Self(time.as_microsecond().saturating_sub(PG_EPOCH_UNIX_MICROS))
    }
}

impl fmt::Display for PgTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to_timestamp() {
            Some(time) => fmt::Display::fmt(&time, f),
            None => write!(f, "{} µs since 2000-01-01", self.0),
        }
    }
}

impl fmt::Debug for PgTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgres_epoch_is_the_year_2000() {
        assert_eq!(PgTime(0).to_string(), "2000-01-01T00:00:00Z");
        let time: Timestamp = "2026-11-22T10:00:00.123456Z".parse().unwrap();
        assert_eq!(PgTime::from_timestamp(time).to_timestamp(), Some(time));
        assert_eq!(PgTime(i64::MAX).to_timestamp(), None);
    }
}
