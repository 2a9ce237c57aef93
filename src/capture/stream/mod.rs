//! The WAL stream: every byte of WAL from the server into the repository, for as long as it runs.
//!
//! # Shape
//! ```text
//!  WalStream ──▶ intake (decode, cut) ──▶ sealer thread ──▶ uploads, overlapping ──▶ store
//!      ▲                                                        │ completed ranges
//!      └── flush position ◀── prefix (contiguous, at a record boundary) ◀┘
//! ```
//! `cutter`, `prefix`, `resume`, `overlap` and `intake` decide and do no I/O.

mod engine;
mod merging;
mod pump;
mod tail;

pub mod cutter;
pub mod intake;
pub mod ledger;
pub mod overlap;
pub mod prefix;
pub mod relief;
pub mod resume;
pub mod sealer;
pub mod server;
pub mod status;
pub mod uploads;
pub mod upstream;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, TimelineId};
use crate::repo::budget::STREAM_BYTES;
use crate::repo::{Budget, Lease, Level, Writer};

use relief::LeftSlot;

pub use resume::OlderWal;
pub use status::{Phase, SlotHealth, Snapshot, Status, WalGap};
pub use upstream::Upstream;

/// Name of the slot and of the application unless configured otherwise.
pub const DEFAULT_NAME: &str = "tidemark";

/// How long the slot lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotLife {
    /// For ever: the server keeps WAL while we are away.
    Permanent,
    /// As long as the connection: for a single base backup, which must not leave a slot behind that
    /// fills the server's disk. A permanent slot of the name is left where it is: it may keep the WAL of
    /// another repository (see [`server::ensure_slot`]).
    Connection,
}

/// Whether small extents are merged in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compaction {
    /// After each complete segment.
    On,
    /// Left to somebody else.
    Off,
}

/// How a stream runs; the defaults are the documented ones.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// Name of the physical replication slot.
    pub slot_name: String,
    /// How long the slot lives when we create it.
    pub slot_life: SlotLife,
    /// Longest that a received commit waits before it is uploaded. While the server lists us as a
    /// synchronous standby each commit is uploaded at once, at most two uploads at a time.
    pub flush_interval: Duration,
    /// Longest that received WAL without a commit waits.
    pub idle_flush_interval: Duration,
    /// Most WAL the server may keep for us when the repository takes it too slowly or not at all:
    /// above this, and while the lag does not shrink, the slot is moved on, the gap recorded and
    /// reported, and a new base backup is needed. An outage that outlasts the lease is no exception (see
    /// [`relief`]). `None`: the server's own limit (`max_slot_wal_keep_size`) is the only one.
    pub lag_ceiling_bytes: Option<u64>,
    /// What to do about WAL that is older than the slot and missing in the repository.
    pub older: OlderWal,
    /// Compression level.
    pub level: Level,
    /// Most uploads at a time.
    pub uploads_max: usize,
    /// When an extent is large enough, and how much may wait for the store; without a thread, extents
    /// are sealed in place (see [`sealer`]).
    pub budget: Budget,
    /// How long a stop may take to store what was received.
    pub stop_grace: Duration,
    /// Whether complete segments of small extents are merged.
    pub compaction: Compaction,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            slot_name: DEFAULT_NAME.to_owned(),
            slot_life: SlotLife::Permanent,
            flush_interval: Duration::from_secs(1),
            idle_flush_interval: Duration::from_secs(60),
            lag_ceiling_bytes: None,
            older: OlderWal::Ask,
            level: Level::default(),
            uploads_max: 4,
            budget: Budget::stream(STREAM_BYTES, Level::default()),
            stop_grace: Duration::from_secs(20),
            compaction: Compaction::On,
        }
    }
}

/// A stream from one server into one repository.
#[derive(Clone, Debug)]
pub struct Stream {
    /// How it runs.
    pub options: StreamOptions,
    /// Where the server is; the application name decides about synchronous replication.
    pub upstream: Arc<dyn Upstream>,
    /// Where the WAL goes.
    pub writer: Writer,
    /// Where progress is shown.
    pub status: Arc<Status>,
}

/// Streams WAL until `cancel` (then what was received is stored and acknowledged, and the result is
/// `Ok`), until somebody else has the lease, or until going on makes no sense. Restarts of the server,
/// broken connections and an unavailable repository are waited out.
///
/// A lease that could not be renewed, for the repository was away or this machine stood still, ends what
/// streams at once: nothing more is acknowledged. It is then taken again as soon as that is possible and
/// nobody else had it in between, and the stream begins anew from the books.
///
/// # Errors
/// `conflict` when somebody else took the lease, the server is another cluster or was rolled back;
/// `unavailable` when a stop ran out of time; `config` and `denied` when the first connection is refused
/// so.
///
/// # Durability
/// The server is told a flush position only for WAL that the repository holds; killed at any moment,
/// a later call goes on where the books in the repository end.
pub async fn run(stream: &Stream, lease: &Lease, cancel: &CancellationToken) -> Result<()> {
    let mut left = Left::default();
    let outcome = loop {
        let outcome = run_while_held(stream, lease, &mut left, cancel).await;
        let lapsed = lease.guard().ensure_held().is_err() && !cancel.is_cancelled();
        match outcome {
            Err(lost) if lapsed && lost.kind() == Kind::Conflict => {
                let taken = take_lease_again(stream, lease, &lost, &mut left.slot, cancel).await;
                if let Err(error) = taken {
                    break Err(error);
                }
            }
            ended => break ended,
        }
    };
    stream.status.update(|now| {
        now.phase = Phase::Stopped;
        now.server_error = outcome.as_ref().err().map(ToString::to_string);
    });
    outcome
}

/// What a tenure of the lease leaves to the next one of the same process.
#[derive(Debug, Default)]
struct Left {
    /// The slot as it was left, if it was used.
    slot: Option<LeftSlot>,
    /// The newest timeline of a server that was streamed.
    newest_timeline: Option<TimelineId>,
    /// Where the stream began, which for one backup must not leave a hole.
    began_at: Option<Lsn>,
}

/// As [`run`], until the lease is lost.
async fn run_while_held(
    stream: &Stream,
    lease: &Lease,
    left: &mut Left,
    cancel: &CancellationToken,
) -> Result<()> {
    if !is_slot_name(&stream.options.slot_name) {
        return Err(bad_slot_name(&stream.options));
    }
    let mut engine = engine::Engine::start(stream, lease)?;
    (engine.newest_timeline, engine.began_at) = (left.newest_timeline, left.began_at);
    let outcome = engine.run(cancel).await;
    *left = Left {
        slot: engine.left_slot.or(left.slot),
        newest_timeline: engine.newest_timeline,
        began_at: engine.began_at,
    };
    outcome
}

async fn take_lease_again(
    stream: &Stream,
    lease: &Lease,
    lost: &Error,
    left_slot: &mut Option<LeftSlot>,
    cancel: &CancellationToken,
) -> Result<()> {
    tracing::warn!("{lost}; nothing is acknowledged until it can be taken again");
    let show = |cause: &Error| {
        stream.status.update(|now| {
            now.phase = Phase::WaitingForRepository;
            now.repository_error = Some(cause.to_string());
            // What was on its way is streamed again.
            (now.uploads_in_flight, now.unstored_bytes) = (0, 0);
        });
    };
    show(lost);
    let told = |error: &Error| {
        tracing::debug!("unable to take the lease again for now: {error}");
        show(error);
    };
    tokio::select! {
        biased;
        () = cancel.cancelled() => {
            let cause = stream.status.snapshot().repository_error.unwrap_or_default();
            let message = format!("stopped before the lease could be taken again: {cause}");
            return Err(Error::new(Kind::Unavailable, message)
                .hint("Nothing is lost: the server keeps the WAL in the replication slot."));
        }
        retaken = lease.retake(&told) => retaken?,
        never = relief::relieve(stream, left_slot) => match never {},
    }
    tracing::info!("the lease was taken again, epoch {}: nobody else had it", lease.epoch());
    stream.status.update(|now| {
        now.phase = Phase::Connecting;
        now.repository_error = None;
    });
    Ok(())
}

fn bad_slot_name(options: &StreamOptions) -> Error {
    let message =
        format!("unable to use '{}' as the name of a replication slot", options.slot_name);
    Error::new(Kind::Config, message)
        .hint("Slot names have up to 63 lower-case letters, digits and underscores.")
}

/// Whether `name` can name a replication slot (`ReplicationSlotValidateName`).
#[must_use]
pub fn is_slot_name(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    (1..64).contains(&name.len()) && name.bytes().all(letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_names_are_those_that_postgres_takes() {
        assert!(is_slot_name("tidemark") && is_slot_name("a_1"));
        for bad in ["", "A", "a-b", "a'b", &"x".repeat(64)] {
            assert!(!is_slot_name(bad), "{bad}");
        }
    }
}
