//! The records that say where and when something happened that a restore may aim at.

use std::path::PathBuf;

use crate::pg::control::StandbyLimits;
use crate::pg::{Lsn, LsnRange, PgTime, TimelineId};

/// Which of the two kinds of checkpoint record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointKind {
    /// `XLOG_CHECKPOINT_SHUTDOWN`: nothing was running; its redo position is its own start.
    Shutdown,
    /// `XLOG_CHECKPOINT_ONLINE`
    Online,
}

/// A record that matters to whoever stores WAL or aims at a point in it. `range` is the record:
/// from its first byte to PostgreSQL's `EndRecPtr`, the aligned end behind its last byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Landmark {
    /// A transaction became durable, prepared before or not.
    Commit {
        /// The transaction; for `COMMIT PREPARED` that of the prepared one.
        xid: u32,
        /// Commit time, what `recovery_target_time` compares with.
        time: PgTime,
        /// The record.
        range: LsnRange,
    },
    /// A transaction was rolled back; `recovery_target_time` and `_xid` stop at these too.
    Abort {
        /// The transaction; for `ROLLBACK PREPARED` that of the prepared one.
        xid: u32,
        /// Abort time.
        time: PgTime,
        /// It was prepared before.
        prepared: bool,
        /// The record.
        range: LsnRange,
    },
    /// A transaction was prepared for two-phase commit. Not a place where recovery stops.
    Prepare {
        /// The transaction.
        xid: u32,
        /// When it was prepared.
        time: PgTime,
        /// Its global identifier.
        gid: String,
        /// The record.
        range: LsnRange,
    },
    /// `pg_create_restore_point`
    RestorePoint {
        /// The name, what `recovery_target_name` compares with.
        name: String,
        /// When.
        time: PgTime,
        /// The record.
        range: LsnRange,
    },
    /// A checkpoint was completed.
    Checkpoint {
        /// Which kind.
        kind: CheckpointKind,
        /// Where recovery from it begins.
        redo_lsn: Lsn,
        /// When it was begun, whole seconds.
        time: PgTime,
        /// Timeline of the checkpoint.
        timeline: TimelineId,
        /// The record.
        range: LsnRange,
    },
    /// Recovery ended without a checkpoint (a promotion).
    EndOfRecovery {
        /// When.
        time: PgTime,
        /// The new timeline.
        timeline: TimelineId,
        /// The timeline before.
        previous_timeline: TimelineId,
        /// The record.
        range: LsnRange,
    },
    /// A base backup taken from a primary ended.
    BackupEnd {
        /// Redo position of the backup's checkpoint.
        start_lsn: Lsn,
        /// The record.
        range: LsnRange,
    },
    /// The server went on to the next segment; the rest of this one is padding, and the range ends
    /// with it.
    Switch {
        /// The record and the padding.
        range: LsnRange,
    },
    /// `CREATE TABLESPACE`: replay links to the very path that was named then, wherever it runs.
    Tablespace {
        /// Its OID: the name of its link in `pg_tblspc`.
        oid: u32,
        /// Its folder; empty for one inside the data directory (`allow_in_place_tablespaces`).
        path: PathBuf,
        /// The record.
        range: LsnRange,
    },
    /// Settings that matter to recovery changed; `wal_level` 0 (minimal) breaks the WAL for PITR.
    ParameterChange {
        /// `wal_level`: 0 minimal, 1 replica, 2 logical.
        wal_level: u32,
        /// The settings that a standby must not have lower.
        limits: StandbyLimits,
        /// The record.
        range: LsnRange,
    },
}

impl Landmark {
    /// The record.
    #[must_use]
    pub fn range(&self) -> LsnRange {
        match self {
            Self::Commit { range, .. }
            | Self::Abort { range, .. }
            | Self::Prepare { range, .. }
            | Self::RestorePoint { range, .. }
            | Self::Checkpoint { range, .. }
            | Self::EndOfRecovery { range, .. }
            | Self::BackupEnd { range, .. }
            | Self::Switch { range }
            | Self::Tablespace { range, .. }
            | Self::ParameterChange { range, .. } => *range,
        }
    }

    /// The commit or abort time that `recovery_target_time` compares with; `None` for other records.
    #[must_use]
    pub fn transaction_time(&self) -> Option<PgTime> {
        match self {
            Self::Commit { time, .. } | Self::Abort { time, .. } => Some(*time),
            _ => None,
        }
    }
}
