//! Whether the WAL arrives, judged from what the server keeps and what the repository holds: no I/O.
//!
//! # Invariants
//! A repository into which only `tidemark backup` writes is in order. That somebody is meant to stream
//! is known from a slot that keeps WAL, or from a writer that was to stay and did not give its lease
//! back.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::{Server, State};
use crate::cli::words;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, TimelineId};
use crate::repo::Catalog;
use crate::repo::lease::{LeaseInfo, Tenure};

/// The most that may be lost with the server, by time, before it is a failure. Commits are durable
/// after `wal.flush_interval`, a second; what a writer tells of itself is as old as a renewal.
const LOSS_MAX: Duration = Duration::from_secs(300);

/// A writer that renewed its lease this much of its time to live ago is taken to be at work.
const RENEWED_SHARE: f64 = 0.9;

/// What the server says of the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// Nothing: it could not be asked.
    Unknown,
    /// There is none.
    Absent,
    /// It keeps no WAL: it was never used, or the server has given up on it.
    Idle,
    /// It keeps WAL from here on.
    Keeps(Lsn),
}

impl From<Option<Lsn>> for Slot {
    fn from(restart_lsn: Option<Lsn>) -> Self {
        restart_lsn.map_or(Self::Idle, Self::Keeps)
    }
}

/// How a thing stands and what to say of it, or what is wrong with it.
pub(super) type Verdict = Result<(State, String)>;

/// All that is known of the WAL's way.
pub(super) struct Streaming<'a> {
    slot: Slot,
    /// The server's timeline and where its WAL ends.
    server_end: Option<(TimelineId, Lsn)>,
    catalog: Option<&'a Catalog>,
    now: Timestamp,
}

impl<'a> Streaming<'a> {
    pub(super) fn of(
        server: Option<&Server>,
        catalog: Option<&'a Catalog>,
        now: Timestamp,
    ) -> Self {
        let slot = server.map_or(Slot::Unknown, |server| server.slot);
        let server_end = server.map(|server| (server.timeline, server.flushed_end_lsn));
        Self { slot, server_end, catalog, now }
    }

    fn has_wal(&self) -> bool {
        self.catalog.is_some_and(|catalog| catalog.durable_end().is_some())
    }

    /// The writer that has not given its lease back.
    fn holder(&self) -> Option<&'a LeaseInfo> {
        self.catalog?.lease.as_ref().filter(|lease| !lease.released)
    }

    fn is_streamed(&self) -> bool {
        let stays = |lease: &LeaseInfo| lease.tenure == Tenure::Standing;
        matches!(self.slot, Slot::Keeps(_)) || self.holder().is_some_and(stays)
    }

    /// The slot of that name; `None` when the server was not asked.
    pub(super) fn slot(&self, name: &str) -> Option<Verdict> {
        let warning = |found| Some(Ok((State::Warning, found)));
        match self.slot {
            Slot::Unknown => None,
            Slot::Absent => warning(format!("'{name}' is not there yet: 'stream' makes it")),
            Slot::Idle if self.has_wal() => Some(Err(Error::new(
                Kind::NotFound,
                format!("'{name}' keeps no WAL, and the repository is in use"),
            )
            .hint(
                "The server gave up on the slot (max_slot_wal_keep_size), or somebody made it anew. \
                 Start 'tidemark run', which shows what was lost and takes a base backup.",
            ))),
            Slot::Idle => warning(format!("'{name}' keeps no WAL")),
            Slot::Keeps(restart) => {
                let end = self.server_end.map_or(restart, |(_, end)| end);
                let kept = words::bytes(end.saturating_since(restart));
                Some(Ok((State::Ok, format!("'{name}' keeps {kept} of WAL from {restart}"))))
            }
        }
    }

    /// What is wrong when WAL arrives to which no backup leads.
    pub(super) fn dead_end(&self) -> Option<Error> {
        let catalog = self.catalog?;
        let (timeline, durable_end_lsn) = catalog.settled_end(self.now)?;
        let in_order = catalog.backups.is_empty() || catalog.reaches(timeline, durable_end_lsn);
        if in_order || !self.is_streamed() {
            return None;
        }
        let message = format!(
            "no backup leads to the WAL that arrives now, at {durable_end_lsn} of timeline {timeline}"
        );
        Some(Error::new(Kind::NotFound, message).hint(
            "Take a base backup now with 'tidemark backup'; 'tidemark list' shows what can be \
             restored.",
        ))
    }

    /// Who streams, and how far behind; `None` without a repository.
    pub(super) fn writer(&self) -> Option<Verdict> {
        let catalog = self.catalog?;
        let Some(holder) = self.holder() else {
            return Some(self.nobody("nobody streams".to_owned()));
        };
        let silent = self.now.duration_since(holder.renewed_time);
        let who = format!(
            "{} by process {} on '{}', renewed {} ago",
            holder.description,
            holder.process.pid,
            holder.process.host,
            words::age(holder.renewed_time, self.now)
        );
        let ttl = Duration::from_millis(holder.ttl_ms);
        if silent.as_secs_f64() > ttl.as_secs_f64() {
            return Some(self.nobody(format!("nobody streams any more: {who}")));
        }
        if silent.as_secs_f64() < -ttl.as_secs_f64() {
            let ahead = words::length(-silent);
            return Some(self.nobody(format!(
                "nobody can tell whether anybody streams, by a clock {ahead} ahead of this one: {who}"
            )));
        }
        if let Some(error) = self.elsewhere(holder, &who) {
            return Some(Err(error));
        }
        let Some(behind) = self.behind(catalog) else { return Some(Ok((State::Ok, who))) };
        let found = format!("{who}, {} behind the server", words::bytes(behind.bytes));
        if let Some(loss) = behind.loss.filter(|loss| *loss > limit(ttl)) {
            let message =
                format!("{found}; commits of the last {} may be lost with it", words::length(loss));
            return Some(Err(Error::new(Kind::Unavailable, message)
                .hint("See in the log of that process what it waits for.")));
        }
        let late = silent.as_secs_f64() > ttl.as_secs_f64() * RENEWED_SHARE;
        Some(Ok((if late { State::Warning } else { State::Ok }, found)))
    }

    /// What is wrong when the writer streams from another server than the one that was asked: an old primary that
    /// was left behind by a promotion, for instance, where all it has is stored and nothing of the new one's.
    fn elsewhere(&self, holder: &LeaseInfo, who: &str) -> Option<Error> {
        let (timeline, _) = self.server_end?;
        let streamed = holder.progress?.timeline;
        if holder.tenure == Tenure::Passing || streamed == timeline {
            return None;
        }
        let message =
            format!("{who} streams timeline {streamed}, the server is on timeline {timeline}");
        Some(Error::new(Kind::Unavailable, message).hint(
            "After a promotion the two agree within seconds. Else one of them reaches another server: name \
             all servers of the cluster in both connection strings, with target_session_attrs=primary.",
        ))
    }

    /// Nobody is at work: a failure where somebody should be.
    fn nobody(&self, found: String) -> Verdict {
        if self.has_wal() && self.is_streamed() {
            return Err(Error::new(Kind::Unavailable, found).hint(
                "Start 'tidemark run' or 'tidemark stream': until then WAL piles up on the server, \
                 and what is committed is lost with it.",
            ));
        }
        Ok((State::Warning, format!("{found}: run 'tidemark stream'")))
    }

    fn behind(&self, catalog: &Catalog) -> Option<Behind> {
        let (_, durable_end_lsn) = catalog.durable_end()?;
        let bytes = self.server_end?.1.saturating_since(durable_end_lsn);
        let newest = catalog.newest_commit().and_then(|extent| extent.name.time?.to_timestamp());
        let progress = catalog.lease.as_ref().and_then(|lease| lease.progress);
        let all_stored = progress.and_then(|progress| progress.all_stored_time);
        // One that a clock far ahead has stamped would speak for all that comes before it.
        let ahead_max = SignedDuration::try_from(LOSS_MAX).unwrap_or(SignedDuration::MAX);
        let known = [newest, all_stored].into_iter().flatten();
        let since = known.filter(|time| time.duration_since(self.now) <= ahead_max).max();
        let loss = since.filter(|_| bytes > 0 && self.is_streamed());
        Some(Behind { bytes, loss: loss.map(|since| self.now.duration_since(since)) })
    }
}

/// How much the server has that the repository has not.
struct Behind {
    bytes: u64,
    /// How long ago everything was durable; `None` when nothing is missing, nobody is meant to stream,
    /// or it is not known.
    loss: Option<SignedDuration>,
}

/// The most that may be lost where the lease lasts for `ttl`.
fn limit(ttl: Duration) -> SignedDuration {
    SignedDuration::try_from(LOSS_MAX + ttl / 3).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests;
