//! The lease object: who holds it, and how far the holder has come.

use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{CLOCK_DOUBT, TTL_MAX, TTL_MIN, Tenure};
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, TimelineId};
use crate::repo::printable;
use crate::repo::process::ProcessIdentity;
use crate::store::ObjectName;

/// Version of the lease's JSON.
pub(super) const LEASE_FORMAT: u16 = 1;
/// A lease is under 2 KiB; anything longer is not one.
const LEASE_BYTES_MAX: usize = 16 * 1024;

/// How far the holder has come: published with each renewal and taken over by the next holder, so that the
/// time up to which a silent cluster can be restored is known although no extent was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Timeline that is being streamed.
    pub timeline: TimelineId,
    /// End of the contiguous WAL that the repository holds.
    pub durable_end_lsn: Lsn,
    /// The server's clock when it last said that it had no WAL, or no commit, beyond
    /// `durable_end_lsn`; absent until it did, and from a standby, whose primary may have.
    #[serde(default)]
    pub caught_up_time: Option<Timestamp>,
    /// The same, also from a standby: what the server has had is stored.
    #[serde(default)]
    pub all_stored_time: Option<Timestamp>,
}

impl Progress {
    /// With the times that were known `before` of the same timeline where none is known now: what was stored then
    /// still is, if no less is counted as stored. A process that has just begun on a silent server knows none for a
    /// while.
    pub(super) fn with_times_of(self, before: Option<Self>) -> Self {
        let goes_on = |before: &Self| {
            before.timeline == self.timeline && before.durable_end_lsn <= self.durable_end_lsn
        };
        let Some(before) = before.filter(goes_on) else { return self };
        Self {
            caught_up_time: self.caught_up_time.or(before.caught_up_time),
            all_stored_time: self.all_stored_time.or(before.all_stored_time),
            ..self
        }
    }
}

/// Who holds, or last held, the lease: for listings and for the refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeaseInfo {
    /// Number of this acquisition, greater than that of every earlier one.
    pub epoch: u64,
    /// Whether it was given back.
    pub released: bool,
    /// What the holder does.
    pub description: String,
    /// How long the holder wanted it.
    pub tenure: Tenure,
    /// The holder.
    pub process: ProcessIdentity,
    /// When it was taken, by the holder's clock.
    pub acquired_time: Timestamp,
    /// When it was last renewed, by the holder's clock.
    pub renewed_time: Timestamp,
    /// Time to live without a renewal.
    pub ttl_ms: u64,
    /// How far the holder had come at that time.
    pub progress: Option<Progress>,
    /// The data key that the holder seals with.
    pub key_id: Option<String>,
}

impl LeaseInfo {
    /// Time to live without a renewal.
    pub(in crate::repo) fn ttl(&self) -> SignedDuration {
        SignedDuration::from_millis(i64::try_from(self.ttl_ms).unwrap_or(i64::MAX))
    }

    /// Whether the holder is taken to be at work at the time `now`. One whose clock is far ahead of ours
    /// is not: nobody could tell when it died.
    pub(in crate::repo) fn is_at_work(&self, now: Timestamp) -> bool {
        !self.released && now.duration_since(self.renewed_time).abs() <= self.ttl()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Standing {
    Held,
    Released,
}

/// The lease object.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Contents {
    pub(super) format: u16,
    pub(super) epoch: u64,
    pub(super) standing: Standing,
    pub(super) token: String,
    pub(super) renewals: u64,
    pub(super) ttl_ms: u64,
    pub(super) description: String,
    pub(super) process: ProcessIdentity,
    pub(super) acquired_time: Timestamp,
    pub(super) renewed_time: Timestamp,
    #[serde(default)]
    pub(super) tenure: Tenure,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) progress: Option<Progress>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) key_id: Option<String>,
    /// Since when the clock is doubted by which this was written, as nobody had been at work for long by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) clock_doubted_since: Option<Timestamp>,
}

impl Contents {
    pub(super) fn encode(&self) -> Result<Bytes> {
        serde_json::to_vec(self)
            .map(Bytes::from)
            .map_err(|error| Error::new(Kind::Bug, format!("unable to encode the lease: {error}")))
    }

    pub(super) fn decode(name: &ObjectName, body: &[u8]) -> Result<Self> {
        let damaged = |found: String| {
            Error::new(Kind::Corrupt, format!("unable to read the lease '{name}': {found}"))
                .hint("Make sure that no writer runs on this cluster, delete that object, and start again.")
        };
        if body.len() > LEASE_BYTES_MAX {
            return Err(damaged(format!("{} bytes, at most {LEASE_BYTES_MAX}", body.len())));
        }
        let mut contents: Self =
            serde_json::from_slice(body).map_err(|error| damaged(printable(&error.to_string())))?;
        if contents.format != LEASE_FORMAT {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "unable to read the lease '{name}': format {}, this build knows {LEASE_FORMAT}",
                    contents.format
                ),
            )
            .hint("Use the newer tidemark that wrote it."));
        }
        // Anybody who can write to the store may have put it: it is shown, and said in refusals.
        contents.description = printable(&contents.description);
        contents.process.host = printable(&contents.process.host);
        Ok(contents)
    }

    /// Since when a successor at the time `now` has to doubt its clock: nobody was at work for more than
    /// [`CLOCK_DOUBT`] by it, or that was so when a predecessor began, less than that ago.
    pub(super) fn clock_doubted_since(&self, now: Timestamp) -> Option<Timestamp> {
        let is_long = |since: Timestamp| now.duration_since(since).unsigned_abs() > CLOCK_DOUBT;
        if is_long(self.renewed_time) {
            return Some(now);
        }
        self.clock_doubted_since.filter(|since| !is_long(*since))
    }

    pub(super) fn is_free(&self) -> bool {
        self.standing == Standing::Released
    }

    pub(super) fn ttl(&self) -> Duration {
        Duration::from_millis(self.ttl_ms).clamp(TTL_MIN, TTL_MAX)
    }

    pub(super) fn info(&self) -> LeaseInfo {
        LeaseInfo {
            epoch: self.epoch,
            released: self.standing == Standing::Released,
            description: self.description.clone(),
            tenure: self.tenure,
            process: self.process.clone(),
            acquired_time: self.acquired_time,
            renewed_time: self.renewed_time,
            ttl_ms: self.ttl_ms,
            progress: self.progress,
            key_id: self.key_id.clone(),
        }
    }

    pub(super) fn who(&self) -> String {
        format!(
            "'{}' ({}) holds it since {}, epoch {}, last renewed {}",
            self.description, self.process, self.acquired_time, self.epoch, self.renewed_time
        )
    }
}
