//! The server at the other end: who it is, how it is set up, and our slot on it.

use std::time::Duration;

use bytes::Bytes;

use super::upstream::{Upstream, Walsender};
use super::{SlotLife, StreamOptions, resume, watch};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, SegmentSize, SystemId, TimelineHistory, TimelineId};
use crate::repo::Writer;
use crate::wal::XLOG_BLCKSZ;
use crate::wire::{Session, Slot, SlotLife as WireSlotLife, SystemIdentification};

/// Longest time between two messages of ours, whatever the server allows.
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// Shortest, should the server's time-out be set to next to nothing.
const STATUS_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// What was learnt about the server when the connection was made.
#[derive(Debug)]
pub struct Server {
    /// The open walsender session.
    pub connection: Box<dyn Walsender>,
    /// Its timeline.
    pub timeline: TimelineId,
    /// The way to its timeline.
    pub history: TimelineHistory,
    /// The history file behind it; `None` on timeline 1.
    pub history_file: Option<Bytes>,
    /// End of the WAL it has on disk.
    pub flushed_end_lsn: Lsn,
    /// Size of its WAL segments.
    pub segment_size: SegmentSize,
    /// How often it must hear from us.
    pub status_interval: Duration,
    /// `synchronous_standby_names` names us.
    pub synchronous: bool,
    /// Whether it was a standby when it said how far it is.
    pub in_recovery: bool,
}

impl Server {
    /// Connects and asks.
    ///
    /// # Errors
    /// What connecting and asking report. The inner error is one that asking again will
    /// not change: `conflict`, the server is another cluster than `expected`, or `unsupported`, its WAL has
    /// pages of another size.
    pub async fn meet(
        upstream: &dyn Upstream,
        expected: SystemId,
        clock: &Clock,
    ) -> Result<Result<Self>> {
        let mut connection = upstream.connect(Session::Physical, clock).await?;
        let (identity, in_recovery) = identify(&mut *connection).await?;
        if let Err(other) = check_system(expected, identity.system_id) {
            return Ok(Err(other));
        }
        let segment_size = connection.segment_size().await?;
        let name = "wal_block_size";
        if let Err(other) = check_block_size(name, &connection.show(name).await?) {
            return Ok(Err(other));
        }
        let timeout = connection.show("wal_sender_timeout").await?;
        let names = connection.show("synchronous_standby_names").await?;
        let name = connection.parameter("application_name").unwrap_or_default();
        let synchronous = watch::is_named(&names, name);
        let timeline = identity.timeline;
        let (history, history_file) = read_history(&mut *connection, timeline).await?;
        Ok(Ok(Self {
            connection,
            timeline,
            history,
            history_file,
            flushed_end_lsn: identity.flushed_end_lsn,
            segment_size,
            status_interval: status_interval(&timeout),
            synchronous,
            in_recovery,
        }))
    }

    /// What tells whether another connection leads to the same server.
    #[must_use]
    pub fn met(&self, system_id: SystemId) -> Met {
        Met { system_id, timeline: self.timeline, flushed_end_lsn: self.flushed_end_lsn }
    }
}

/// A server that was met, for another connection to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Met {
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline it was on.
    pub timeline: TimelineId,
    /// How far it was.
    pub flushed_end_lsn: Lsn,
}

impl Met {
    /// Connects again for another try at streaming.
    ///
    /// Of several hosts in the connection string another one may answer now, say an old primary that came
    /// up in between: on another timeline, or behind. What the try was planned with is not true of it, nor
    /// was it looked at as a server that is met. A promotion in between ends here as well.
    ///
    /// # Errors
    /// As [`Server::meet`]; `unavailable` for a server that is not as it was met: the next session meets
    /// whoever answers.
    pub async fn reconnect(
        &self,
        upstream: &dyn Upstream,
        clock: &Clock,
    ) -> Result<Box<dyn Walsender>> {
        let mut connection = upstream.connect(Session::Physical, clock).await?;
        let (identity, _) = identify(&mut *connection).await?;
        check_system(self.system_id, identity.system_id)?;
        if identity.timeline == self.timeline && identity.flushed_end_lsn >= self.flushed_end_lsn {
            return Ok(connection);
        }
        let (timeline, end) = (identity.timeline, identity.flushed_end_lsn);
        let message = format!(
            "another server answers than the one before: it is on timeline {timeline} at {end}, that one \
             was on timeline {} at {}",
            self.timeline, self.flushed_end_lsn
        );
        Err(Error::new(Kind::Unavailable, message))
    }
}

/// Refuses a server that says by the setting `name` that it has pages of another size than those we know, on
/// disk (`block_size`) or in its WAL (`wal_block_size`): both have 8 KiB.
///
/// # Errors
/// `unsupported`.
pub fn check_block_size(name: &str, found: &str) -> Result<()> {
    if found == XLOG_BLCKSZ.to_string() {
        return Ok(());
    }
    let message = format!(
        "unable to back up a server with pages of {found} bytes ({name}), expected {XLOG_BLCKSZ}"
    );
    Err(Error::new(Kind::Unsupported, message))
}

/// Refuses a server that is not the one this repository belongs to.
///
/// # Errors
/// `conflict`.
pub fn check_system(expected: SystemId, found: SystemId) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let message = format!(
        "the server is another PostgreSQL cluster than the one in the repository: system \
         identifier {found}, expected {expected}"
    );
    Err(Error::new(Kind::Conflict, message).hint(
        "Check the connection string, or give this server a cluster name of its own (--cluster).",
    ))
}

/// The history of `timeline` as the server has it. A server that has lost the file (it matters to
/// nobody but standbys) is taken to have been on this timeline for ever.
///
/// # Errors
/// What the server says; `corrupt` for what is no history.
pub async fn read_history(
    connection: &mut dyn Walsender,
    timeline: TimelineId,
) -> Result<(TimelineHistory, Option<Bytes>)> {
    if timeline == TimelineId::FIRST {
        return Ok((TimelineHistory::first_timeline_only(timeline), None));
    }
    let attempted = || format!("unable to read the history of timeline {timeline}");
    match connection.timeline_history(timeline).await {
        Ok((_, content)) => Ok((TimelineHistory::decode(timeline, &content)?, Some(content))),
        Err(error) if error.kind() == Kind::NotFound => {
            tracing::warn!("{}: {error}", attempted());
            Ok((TimelineHistory::first_timeline_only(timeline), None))
        }
        Err(error) => Err(error.context(attempted())),
    }
}

/// Stores the history of `timeline` as the server has it, so that it is durable before any WAL of that
/// timeline is; gives what was stored.
///
/// # Errors
/// As [`read_history`], and what the store reports: `conflict` when the repository has another.
///
/// # Cancel safety
/// The object is there whole or not at all.
pub async fn store_history(
    connection: &mut dyn Walsender,
    timeline: TimelineId,
    writer: &Writer,
) -> Result<Option<Bytes>> {
    let (_, content) = read_history(connection, timeline).await?;
    if let Some(content) = &content {
        writer.put_history(timeline, content.clone()).await?;
    }
    Ok(content)
}

/// Which cluster, timeline and position, and whether a standby says so.
///
/// A promotion may come between the two answers: the position would be that of a standby, which may lag,
/// and be taken for a primary's, which may not. A server leaves recovery only once while a connection
/// lasts, so one that was in recovery before and is not any more is asked again.
///
/// # Errors
/// What the server says.
async fn identify(connection: &mut dyn Walsender) -> Result<(SystemIdentification, bool)> {
    let was_in_recovery = is_in_recovery(connection).await?;
    let identity = connection.identify_system().await?;
    if was_in_recovery && !is_in_recovery(connection).await? {
        return Ok((connection.identify_system().await?, false));
    }
    Ok((identity, was_in_recovery))
}

/// Whether the server is a standby, as of the last command on `connection`.
///
/// # Errors
/// What the server says.
pub async fn is_in_recovery(connection: &mut dyn Walsender) -> Result<bool> {
    // Reported since PostgreSQL 14; before, a transaction in recovery is at least read-only.
    match connection.parameter("in_hot_standby") {
        Some(value) => Ok(value == "on"),
        None => Ok(connection.show("transaction_read_only").await? == "on"),
    }
}

/// Our slot as it is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OurSlot {
    /// Its name.
    pub name: String,
    /// Oldest WAL it keeps.
    pub restart_lsn: Lsn,
    /// Oldest WAL that is kept for this repository: by this slot, or by the permanent one that a stream
    /// for one backup leaves alone.
    pub kept_lsn: Lsn,
}

impl OurSlot {
    fn new(name: String, restart_lsn: Lsn) -> Self {
        Self { name, restart_lsn, kept_lsn: restart_lsn }
    }
}

/// Finds the slot or makes it; `stored` is what the repository holds.
///
/// # Durability
/// A stream for one backup moves no slot but the temporary one it made itself. A permanent slot of our
/// name may be that of a sidecar which streams into another repository and is away for a moment: moved
/// by what *this* repository holds, it would let go of WAL that the other one lacks. No position tells
/// whose the slot is: two repositories that stream from one server hold the same ranges. What the slot
/// keeps is asked for where it follows what this repository holds, so that a backup between two lives of
/// our own sidecar leaves no gap.
///
/// # Errors
/// What the server says: `config` when no slot is free, `conflict` when a logical slot has the name.
pub async fn ensure_slot(
    server: &mut Server,
    stored: &[(TimelineId, LsnRange)],
    options: &StreamOptions,
    clock: &Clock,
) -> Result<OurSlot> {
    let name = options.slot_name.clone();
    let found = server.connection.read_slot(&name).await?;
    match (options.slot_life, found) {
        (SlotLife::Connection, standing) => {
            let name = temporary_name(&name, clock)?;
            let slot = make_slot(server, name, WireSlotLife::Temporary).await?;
            let follows = |at: &Lsn| resume::touches(&server.history, stored, *at);
            let kept = standing.and_then(|slot| slot.restart_lsn).filter(follows);
            let kept_lsn = kept.unwrap_or(slot.restart_lsn).min(slot.restart_lsn);
            Ok(OurSlot { kept_lsn, ..slot })
        }
        (SlotLife::Permanent, Some(Slot { restart_lsn: Some(restart_lsn), .. })) => {
            Ok(OurSlot::new(name, restart_lsn))
        }
        (SlotLife::Permanent, None) => {
            tracing::info!("creating replication slot '{name}'");
            make_slot(server, name, WireSlotLife::Permanent).await
        }
        (SlotLife::Permanent, Some(_)) => {
            tracing::warn!(
                "replication slot '{name}' keeps no WAL (it was invalidated, or made without \
                 reserving any); it is made anew"
            );
            server.connection.drop_slot(&name).await?;
            make_slot(server, name, WireSlotLife::Permanent).await
        }
    }
}

/// Drops the slot of which the server has said that its WAL is gone, when it stands where it stood then,
/// at `void_lsn`. One that does not may be another host's that keeps what it says, and is used: should its
/// WAL be gone as well, that is found out soon enough.
///
/// # Errors
/// What the server says, except that there is no such slot.
pub async fn drop_void_slot(
    server: &mut Server,
    void_lsn: Lsn,
    options: &StreamOptions,
) -> Result<()> {
    let name = &options.slot_name;
    let found = server.connection.read_slot(name).await?;
    if found.and_then(|slot| slot.restart_lsn) != Some(void_lsn) {
        return Ok(());
    }
    match server.connection.drop_slot(name).await {
        Ok(()) => {
            tracing::warn!("replication slot '{name}' had lost its WAL and is made anew");
            Ok(())
        }
        Err(error) if error.kind() == Kind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

async fn make_slot(server: &mut Server, name: String, life: WireSlotLife) -> Result<OurSlot> {
    server.connection.create_slot(&name, life).await?;
    let made = server.connection.read_slot(&name).await?;
    // A server that cannot tell keeps at least what follows its newest checkpoint.
    let restart_lsn = made.and_then(|slot| slot.restart_lsn).unwrap_or(server.flushed_end_lsn);
    Ok(OurSlot::new(name, restart_lsn))
}

/// Makes the slot of a stream for one backup anew on another connection, as it went with the one that it was made
/// on; its name.
///
/// # Errors
/// What the server says: `config` when no slot is free.
pub async fn renew_temporary_slot(
    connection: &mut dyn Walsender,
    name: &str,
    clock: &Clock,
) -> Result<String> {
    let name = temporary_name(name, clock)?;
    connection.create_slot(&name, WireSlotLife::Temporary).await?;
    Ok(name)
}

/// A name that nobody else has, and no longer than names may be.
fn temporary_name(name: &str, clock: &Clock) -> Result<String> {
    let unique = u32::from_le_bytes(clock.random()?);
    Ok(format!("{}_{unique:08x}", name.get(..54).unwrap_or(name)))
}

/// A third of the server's `wal_sender_timeout`, at most ten seconds.
fn status_interval(wal_sender_timeout: &str) -> Duration {
    match duration(wal_sender_timeout) {
        Some(timeout) if !timeout.is_zero() => {
            (timeout / 3).clamp(STATUS_INTERVAL_MIN, STATUS_INTERVAL_MAX)
        }
        _ => STATUS_INTERVAL_MAX,
    }
}

/// A time setting as `SHOW` writes it: a whole number and a unit.
fn duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let millis = match unit.trim() {
        "" | "ms" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    Some(Duration::from_millis(number.checked_mul(millis)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_hears_from_us_three_times_in_its_time_out() {
        assert_eq!(status_interval("1min"), Duration::from_secs(10));
        assert_eq!(status_interval("6s"), Duration::from_secs(2));
        assert_eq!(status_interval("1500ms"), Duration::from_millis(500));
        assert_eq!(status_interval("0"), Duration::from_secs(10));
        assert_eq!(status_interval("what"), Duration::from_secs(10));
    }

    #[test]
    fn another_cluster_is_refused() {
        assert!(check_system(SystemId(1), SystemId(1)).is_ok());
        assert_eq!(check_system(SystemId(1), SystemId(2)).unwrap_err().kind(), Kind::Conflict);
    }
}
