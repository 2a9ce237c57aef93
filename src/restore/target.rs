//! What a restore is asked to reach, and its exact meaning.
//!
//! # Invariants
//! A target means what PostgreSQL's `recovery_target_*` of that name means:
//! - *time*: everything before the first commit or abort record whose time is greater (exclusive:
//!   greater or equal) than the target, in WAL order.
//! - *lsn*: up to and with (exclusive: without) the first record that starts at the target or after.
//! - *xid*: up to and with (exclusive: without) the commit or abort of that transaction; it is found by
//!   equality, since transactions do not end in the order they began.
//! - *name*: up to and with the first restore point of that name.
//! - *immediate*: as soon as the backup is consistent.
//! - *latest*: all durable WAL.
//!
//! # Source
//! `recoveryStopsBefore`, `recoveryStopsAfter` in `src/backend/access/transam/xlogrecovery.c`
//! (15 to 18) and `xlog.c` (13 and 14); the conditions are the same in all of them.

use std::fmt;

use jiff::Timestamp;
use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, PgTime, TimelineId};

/// Longest name of a restore point in bytes, `MAXFNAMELEN - 1`.
const NAME_BYTES_MAX: usize = 63;

/// Whether what stands exactly at the target is restored (`recovery_target_inclusive`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Edge {
    /// With it: PostgreSQL's default.
    #[default]
    Inclusive,
    /// Without it.
    Exclusive,
}

/// Where a restore ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Target {
    /// The end of the durable WAL.
    #[default]
    Latest,
    /// The first consistent point of the backup.
    Immediate,
    /// The commits up to a moment.
    Time {
        /// The moment.
        at: Timestamp,
        /// Whether commits of exactly that moment are kept.
        edge: Edge,
    },
    /// The records up to a position.
    Lsn {
        /// The position.
        at: Lsn,
        /// Whether the record that starts there is kept.
        edge: Edge,
    },
    /// The records up to a transaction's end.
    Xid {
        /// The transaction, without its epoch, as the WAL has it.
        xid: u32,
        /// Whether that transaction's end is kept.
        edge: Edge,
    },
    /// The records up to a restore point (`pg_create_restore_point`).
    Name {
        /// Its name.
        name: String,
    },
}

/// Which line of history a restore follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TimelineChoice {
    /// The newest timeline in the repository, PostgreSQL's default.
    #[default]
    Latest,
    /// The timeline of the chosen backup, PostgreSQL's `current`.
    Current,
    /// One by number.
    Exactly(TimelineId),
}

impl Target {
    /// The end of a transaction, its number as `pg_current_xact_id()` or `txid_current()` shows it: an
    /// epoch in the upper 32 bits is dropped, as the WAL does not have it.
    ///
    /// # Errors
    /// `usage` when the text is no number of a normal transaction.
    pub fn xid(text: &str, edge: Edge) -> Result<Self> {
        let digits = text.trim();
        let well_formed = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        let number: Option<u64> = well_formed.then(|| digits.parse().ok()).flatten();
        let xid = number.and_then(|number| u32::try_from(number & 0xffff_ffff).ok());
        // FirstNormalTransactionId: 0 to 2 are never assigned.
        xid.filter(|xid| *xid >= 3).map(|xid| Self::Xid { xid, edge }).ok_or_else(|| {
            Error::new(Kind::Usage, format!("unable to read '{text}' as a transaction id"))
                .hint("Write the number that pg_current_xact_id() showed, 3 or greater.")
        })
    }

    /// A restore point.
    ///
    /// # Errors
    /// `usage` when PostgreSQL could not have made a restore point of that name.
    pub fn name(name: &str) -> Result<Self> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(Error::new(
                Kind::Usage,
                format!("unable to take '{name}' as a restore point: it has {} bytes", name.len()),
            )
            .hint("A restore point's name has 1 to 63 bytes."));
        }
        Ok(Self::Name { name: name.to_owned() })
    }

    /// Whether recovery to this target stops before a commit or abort of that time.
    #[must_use]
    pub fn stops_before_time(&self, time: PgTime) -> bool {
        match (self, time.to_timestamp()) {
            (Self::Time { at, edge: Edge::Inclusive }, Some(time)) => time > *at,
            (Self::Time { at, edge: Edge::Exclusive }, Some(time)) => time >= *at,
            // A time past the years that can be shown is after every target, one before them is not.
            (Self::Time { .. }, None) => time.0 > 0,
            _ => false,
        }
    }
}

impl fmt::Display for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inclusive => "inclusive",
            Self::Exclusive => "exclusive",
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Immediate => f.write_str("the end of the backup"),
            Self::Time { at, edge } => write!(f, "time {at} ({edge})"),
            Self::Lsn { at, edge } => write!(f, "LSN {at} ({edge})"),
            Self::Xid { xid, edge } => write!(f, "transaction {xid} ({edge})"),
            Self::Name { name } => write!(f, "restore point '{name}'"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_target_keeps_what_postgres_keeps() {
        let at: Timestamp = "2026-11-22T10:00:00Z".parse().unwrap();
        let same = PgTime::from_timestamp(at);
        let inclusive = Target::Time { at, edge: Edge::Inclusive };
        let exclusive = Target::Time { at, edge: Edge::Exclusive };
        assert!(!inclusive.stops_before_time(same) && exclusive.stops_before_time(same));
        assert!(inclusive.stops_before_time(PgTime(same.0 + 1)));
        assert!(!exclusive.stops_before_time(PgTime(same.0 - 1)));
        assert!(inclusive.stops_before_time(PgTime(i64::MAX)));
        assert!(!inclusive.stops_before_time(PgTime(i64::MIN)));
        assert!(!Target::Latest.stops_before_time(same));
    }

    #[test]
    fn transaction_ids_are_read_with_or_without_their_epoch() {
        let edge = Edge::Inclusive;
        assert_eq!(Target::xid("742", edge).unwrap(), Target::Xid { xid: 742, edge });
        assert_eq!(Target::xid("4294968038", edge).unwrap(), Target::Xid { xid: 742, edge });
        for bad in ["", "2", "-5", "x", "4294967296", "99999999999999999999"] {
            assert_eq!(Target::xid(bad, edge).unwrap_err().kind(), Kind::Usage, "{bad}");
        }
    }
}
