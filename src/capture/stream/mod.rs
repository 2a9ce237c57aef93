//! The WAL stream: every byte of WAL from the server into the repository, for as long as it runs.
//!
//! # Shape
//! ```text
//!  WalStream ──▶ intake (decode, cut) ──▶ sealer thread ──▶ uploads, overlapping ──▶ store
//!      ▲                                                        │ completed ranges
//!      └── flush position ◀── prefix (contiguous, at a record boundary) ◀┘
//! ```
//! `cutter`, `prefix`, `resume` and `intake` decide and do no I/O.

pub mod cutter;
pub mod prefix;
pub mod resume;
pub mod status;

use std::time::Duration;

use crate::pg::Lsn;

pub use resume::OlderWal;
pub use status::{Phase, SlotHealth, Snapshot, Status, WalGap};

/// Name of the slot and of the application unless configured otherwise.
pub const DEFAULT_NAME: &str = "tidemark";

/// How long the slot lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotLife {
    /// For ever: the server keeps WAL while we are away.
    Permanent,
    /// As long as the connection: for a single base backup, which must not leave a slot behind that
    /// fills the server's disk.
    Connection,
}

/// How a stream runs; the defaults are the documented ones.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// Name of the physical replication slot.
    pub slot_name: String,
    /// How long the slot lives when we create it.
    pub slot_life: SlotLife,
    /// Longest that a received commit waits before it is uploaded.
    pub flush_interval: Duration,
    /// Longest that received WAL without a commit waits.
    pub idle_flush_interval: Duration,
    /// Most WAL the server may keep for us while the repository does not take it; past it the slot
    /// is advanced, the gap recorded, and a new base backup needed. `None` = no limit of ours.
    pub lag_ceiling_bytes: Option<u64>,
    /// What to do about WAL that is older than the slot and missing in the repository.
    pub older: OlderWal,
    /// zstd level.
    pub level: i32,
    /// Most uploads at a time.
    pub uploads_max: usize,
    /// Most compressed bytes held in memory for uploads, besides the extent being filled.
    pub unstored_bytes_max: u64,
    /// How long a stop may take to store what was received.
    pub stop_grace: Duration,
    /// Whether complete segments of small extents are merged in the background.
    pub compaction: Compaction,
}

/// Whether small extents are merged in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compaction {
    /// After each complete segment.
    On,
    /// Left to somebody else.
    Off,
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
            level: 1,
            uploads_max: 4,
            unstored_bytes_max: 12 << 20,
            stop_grace: Duration::from_secs(20),
            compaction: Compaction::On,
        }
    }
}

/// Whether `name` can name a replication slot (`ReplicationSlotValidateName`).
#[must_use]
pub fn is_slot_name(name: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    (1..64).contains(&name.len()) && name.bytes().all(letter)
}

/// A position with the timeline it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The timeline.
    pub timeline: crate::pg::TimelineId,
    /// The position.
    pub lsn: Lsn,
}
