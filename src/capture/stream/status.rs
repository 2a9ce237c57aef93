//! What a stream tells about itself while it runs, and the one thing it can be asked for.
//!
//! The engine writes, anybody reads: a progress line, metrics, the command that waits for a backup's
//! WAL. Nothing here influences the engine except [`Status::request_flush`].

use jiff::Timestamp;
use tokio::sync::watch;

use crate::error::{Error, Kind, Result};
use crate::metrics::Latency;
use crate::pg::{Lsn, LsnRange, PgTime, TimelineId};

/// Most gaps kept for display; the repository's listing has all of them.
const GAPS_MAX: usize = 32;

/// What the engine is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No connection to the server yet, or not again.
    #[default]
    Connecting,
    /// WAL arrives and leaves.
    Streaming,
    /// The memory budget is used up: nothing is read until the repository takes something.
    WaitingForRepository,
    /// Asked to stop; what was received is being stored.
    Stopping,
    /// Not running.
    Stopped,
}

/// WAL that the repository will never have.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct WalGap {
    /// Timeline of the missing WAL.
    pub timeline: TimelineId,
    /// First missing position.
    pub start_lsn: Lsn,
    /// First position that is there again.
    pub end_lsn: Lsn,
    /// Why it is missing.
    pub reason: String,
    /// When this was found out.
    pub noticed_at: Timestamp,
}

/// The slot as the server shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct SlotHealth {
    /// `pg_replication_slots.wal_status`: reserved, extended, unreserved or lost.
    pub wal_status: Option<String>,
    /// `pg_replication_slots.safe_wal_size`: bytes that may still be written before the slot is at
    /// risk; `None` when nothing limits it.
    pub safe_wal_bytes: Option<i64>,
    /// `pg_stat_replication.sync_state`: async, potential, sync or quorum.
    pub sync_state: Option<String>,
}

/// The state of a stream at one moment. Every position is an end: the first byte not yet there.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Snapshot {
    /// What the engine is doing.
    pub phase: Phase,
    /// The timeline that is streamed.
    pub timeline: Option<TimelineId>,
    /// End of the WAL the server has, as it last said.
    pub server_end_lsn: Lsn,
    /// End of the WAL received.
    pub received_end_lsn: Lsn,
    /// End of the contiguous WAL the repository holds.
    pub durable_end_lsn: Lsn,
    /// Flush position last told to the server.
    pub acknowledged_end_lsn: Lsn,
    /// Time of the newest commit that is durable.
    #[serde(serialize_with = "serialize_time")]
    pub newest_durable_commit: Option<PgTime>,
    /// When no commit was made that is not durable; a standby never says so, for it does not know what
    /// its primary has.
    pub caught_up_at: Option<Timestamp>,
    /// When everything the server had was last seen durable.
    pub all_stored_at: Option<Timestamp>,
    /// Sealed extents that the store does not hold yet, being put or waiting for their turn.
    pub uploads_in_flight: usize,
    /// Compressed bytes held in memory until the store has them.
    pub unstored_bytes: u64,
    /// Extents stored by this process.
    pub extent_count: u64,
    /// Plain bytes of those extents.
    pub plain_bytes: u64,
    /// Stored bytes of those extents.
    pub stored_bytes: u64,
    /// There is a stream: set by whoever streams, for as long as that lasts.
    pub connected: bool,
    /// Times the connection to the server was made.
    pub connection_count: u64,
    /// Why there is no connection to the server now; `None` when all is well.
    pub server_error: Option<String>,
    /// Why the repository does not take WAL now; `None` when all is well.
    pub repository_error: Option<String>,
    /// Commits wait for this stream (`synchronous_standby_names`), so they are flushed at once.
    pub synchronous: bool,
    /// The slot as the server shows it.
    pub slot: SlotHealth,
    /// Gaps this process has found or made; the listing shows all.
    pub gaps: Vec<WalGap>,
    /// No base backup leads to what is streamed now, after a gap for instance: a new one is needed to
    /// restore to later times.
    pub base_backup_needed: bool,
    /// When the newest base backup that can be restored was begun; `None` while nobody has looked.
    pub newest_base_backup_start: Option<Timestamp>,
    /// Base backups by schedule that failed since this process began.
    pub base_backup_failure_count: u64,
    /// Runs of expiring or sweeping that failed, or were refused a deletion, since this process began.
    pub upkeep_failure_count: u64,
}

impl Snapshot {
    /// Whether there is a connection: else what is known of the server is old.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        match self.phase {
            // Said by whoever streams, and by nobody else.
            Phase::Streaming => true,
            // Said with a stream and without.
            Phase::WaitingForRepository | Phase::Stopping => self.connected,
            Phase::Connecting | Phase::Stopped => false,
        }
    }

    /// The stream has ended: nobody waits for it any more.
    pub(super) fn disconnect(&mut self) {
        (self.connected, self.synchronous) = (false, false);
        self.phase = Phase::Connecting;
    }

    /// Bytes the server has and the repository has not.
    #[must_use]
    pub fn lag_bytes(&self) -> u64 {
        self.server_end_lsn.saturating_since(self.durable_end_lsn)
    }
}

fn serialize_time<S: serde::Serializer>(time: &Option<PgTime>, to: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => to.collect_str(time),
        None => to.serialize_none(),
    }
}

/// Observable state of a stream; share it by `Arc`.
#[derive(Debug)]
pub struct Status {
    snapshot: watch::Sender<Snapshot>,
    flush_request: watch::Sender<Lsn>,
    latency: Latency,
}

impl Default for Status {
    fn default() -> Self {
        Self::new()
    }
}

impl Status {
    /// The status of a stream that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self {
            snapshot: watch::Sender::new(Snapshot::default()),
            flush_request: watch::Sender::new(Lsn::INVALID),
            latency: Latency::new(),
        }
    }

    /// The state now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.borrow().clone()
    }

    /// What the engine is doing now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.snapshot.borrow().phase
    }

    /// End of the WAL received.
    pub(super) fn received_end(&self) -> Lsn {
        self.snapshot.borrow().received_end_lsn
    }

    /// When no commit was made that is not durable, and when all the server had was.
    pub(super) fn quiet_at(&self) -> (Option<Timestamp>, Option<Timestamp>) {
        let now = self.snapshot.borrow();
        (now.caught_up_at, now.all_stored_at)
    }

    /// A receiver that wakes with every change.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.subscribe()
    }

    /// How long commits waited until they were durable, of those sampled so far: from the time in the
    /// commit record, which is the server's clock just before the commit is written, to the moment the
    /// store confirmed the extent, by ours. The two are the same clock where this runs beside the
    /// server; elsewhere the difference of the clocks is in every value, and what would be less than
    /// nothing counts as nothing.
    #[must_use]
    pub fn latency(&self) -> &Latency {
        &self.latency
    }

    /// Asks the engine to store what it receives before `end` at once, without waiting for the
    /// flush intervals.
    pub fn request_flush(&self, end: Lsn) {
        self.flush_request.send_if_modified(|requested| {
            let later = *requested < end;
            *requested = end.max(*requested);
            later
        });
    }

    /// Waits until everything before `end` that follows on the chain is durable; gives the state.
    ///
    /// # Errors
    /// `unavailable` when the stream stopped first.
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn wait_durable(&self, end: Lsn) -> Result<Snapshot> {
        let mut changes = self.subscribe();
        let reached = |now: &Snapshot| now.durable_end_lsn >= end || now.phase == Phase::Stopped;
        let stopped = |_| Error::new(Kind::Bug, "the status of the stream went away");
        let now = changes.wait_for(reached).await.map_err(stopped)?.clone();
        if now.durable_end_lsn >= end {
            return Ok(now);
        }
        let found = now.durable_end_lsn;
        let cause = now.server_error.map(|cause| format!(": {cause}")).unwrap_or_default();
        Err(Error::new(
            Kind::Unavailable,
            format!("the WAL stream stopped at {found}, before {end}{cause}"),
        ))
    }

    /// What the engine was asked to flush.
    pub(super) fn flush_requests(&self) -> watch::Receiver<Lsn> {
        self.flush_request.subscribe()
    }

    /// Changes the state.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        self.snapshot.send_modify(change);
    }

    /// Takes note of a gap; `base_backup_needed` until a new base backup is complete.
    pub(super) fn add_gap(&self, gap: WalGap) {
        self.update(|now| {
            now.base_backup_needed = true;
            if let Some(last) = now.gaps.last_mut()
                && last.timeline == gap.timeline
                && (last.start_lsn == gap.start_lsn || last.end_lsn == gap.start_lsn)
            {
                last.end_lsn = last.end_lsn.max(gap.end_lsn);
                return;
            }
            if now.gaps.len() >= GAPS_MAX {
                now.gaps.remove(0);
            }
            now.gaps.push(gap);
        });
    }

    /// A base backup that starts at `start_lsn` of `timeline` is complete: it is the needed one when no
    /// known gap comes after it.
    ///
    /// A gap that began on an older timeline does not, wherever it lies: either a promotion left that
    /// part behind, or the way to the backup leads over it, and then it ends before the start, for the
    /// WAL of a complete backup has no gap.
    pub fn base_backup_taken(&self, timeline: TimelineId, start_lsn: Lsn) {
        self.update(|now| {
            now.base_backup_needed &= now.gaps.iter().any(|gap| {
                gap.timeline > timeline || (gap.timeline == timeline && gap.end_lsn > start_lsn)
            });
        });
    }

    /// The gap of a range that will not be stored.
    pub(super) fn gap(
        timeline: TimelineId,
        range: LsnRange,
        reason: &str,
        at: Timestamp,
    ) -> WalGap {
        WalGap {
            timeline,
            start_lsn: range.start(),
            end_lsn: range.end(),
            reason: reason.to_owned(),
            noticed_at: at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiting_for_a_position_ends_when_it_is_durable_or_the_stream_stops() {
        let status = Status::new();
        status.update(|now| now.durable_end_lsn = Lsn(50));
        assert_eq!(status.wait_durable(Lsn(50)).await.unwrap().durable_end_lsn, Lsn(50));
        status.update(|now| now.phase = Phase::Stopped);
        let error = status.wait_durable(Lsn(51)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
    }

    #[test]
    fn a_base_backup_is_needed_until_one_starts_after_every_gap_of_its_timeline() {
        let timeline = |number| TimelineId::new(number).unwrap();
        let status = Status::new();
        let add_gap = |number, start, end| {
            let range = LsnRange::new(Lsn(start), Lsn(end)).unwrap();
            status.add_gap(Status::gap(timeline(number), range, "lost", Timestamp::UNIX_EPOCH));
        };
        let needed_after = |number, start| {
            status.base_backup_taken(timeline(number), Lsn(start));
            status.snapshot().base_backup_needed
        };
        add_gap(1, 100, 110);
        assert!(needed_after(1, 105));
        assert!(!needed_after(1, 110));
        // A standby that was far behind has been promoted.
        add_gap(2, 20, 30);
        assert!(needed_after(1, 500));
        assert!(needed_after(2, 25));
        assert!(!needed_after(2, 40));
    }

    #[test]
    fn only_a_stream_is_a_connection() {
        let mut now = Snapshot::default();
        for phase in [Phase::Connecting, Phase::WaitingForRepository, Phase::Stopping] {
            now.phase = phase;
            assert!(!now.is_connected(), "{phase:?}");
        }
        (now.phase, now.connected, now.synchronous) = (Phase::Streaming, true, true);
        for phase in [Phase::Streaming, Phase::WaitingForRepository, Phase::Stopping] {
            now.phase = phase;
            assert!(now.is_connected(), "{phase:?}");
        }
        now.disconnect();
        assert!(!now.is_connected() && !now.synchronous);
    }

    #[test]
    fn flush_requests_only_grow() {
        let status = Status::new();
        let requests = status.flush_requests();
        status.request_flush(Lsn(9));
        status.request_flush(Lsn(5));
        assert_eq!(*requests.borrow(), Lsn(9));
    }

    #[test]
    fn a_snapshot_is_json_a_person_can_read() {
        let mut snapshot = Snapshot { durable_end_lsn: Lsn(0x1_0000_0010), ..Snapshot::default() };
        snapshot.newest_durable_commit = Some(PgTime(0));
        let json = serde_json::to_value(&snapshot).unwrap();
        assert_eq!(json["durable_end_lsn"], "1/10");
        assert_eq!(json["newest_durable_commit"], "2000-01-01T00:00:00Z");
    }
}
