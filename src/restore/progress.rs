//! How far a restore has come, for whoever watches it.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use serde::Serialize;

/// What a restore is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Checking and claiming the directory.
    #[default]
    Preparing,
    /// Fetching and writing the files of the backup.
    Files,
    /// Placing WAL.
    Wal,
    /// Waiting until the disks have everything.
    Syncing,
    /// PostgreSQL replays WAL.
    Replaying,
    /// Done.
    Done,
}

const PHASES: [Phase; 6] =
    [Phase::Preparing, Phase::Files, Phase::Wal, Phase::Syncing, Phase::Replaying, Phase::Done];

/// Counters that the restore moves and anybody may read.
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    written_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProgressNow {
    /// What is being done.
    pub phase: Phase,
    /// Bytes of that done: of files, or of WAL.
    pub done_bytes: u64,
    /// Bytes of that in all; 0 when not known.
    pub total_bytes: u64,
}

impl Progress {
    /// The counters now.
    #[must_use]
    pub fn now(&self) -> ProgressNow {
        let phase = usize::from(self.phase.load(Ordering::Relaxed));
        ProgressNow {
            phase: PHASES.get(phase).copied().unwrap_or_default(),
            done_bytes: self.written_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
        }
    }

    /// Begins a phase of so many bytes.
    pub(crate) fn begin(&self, phase: Phase, total_bytes: u64) {
        self.written_bytes.store(0, Ordering::Relaxed);
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
        let index = PHASES.iter().position(|known| *known == phase).unwrap_or(0);
        self.phase.store(u8::try_from(index).unwrap_or(0), Ordering::Relaxed);
    }

    pub(crate) fn add_written(&self, bytes: u64) {
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn set_done(&self, bytes: u64) {
        self.written_bytes.store(bytes, Ordering::Relaxed);
    }
}
