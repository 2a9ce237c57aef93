//! `BASE_BACKUP`: a copy of the data directory as a stream of tar archives.

use bytes::Bytes;

use crate::error::Result;
use crate::pg::{Lsn, TimelineId};

use super::Connection;

/// How the server reaches the checkpoint that a backup begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CheckpointMode {
    /// As fast as possible.
    Fast,
    /// Spread over `checkpoint_completion_target`.
    #[default]
    Spread,
}

/// What to ask of `BASE_BACKUP`. WAL and PostgreSQL's manifest are never asked for, the tablespace
/// map and progress always, and page checksums are left to us.
#[derive(Clone, Debug, Default)]
pub struct BaseBackupOptions {
    /// Label, up to 1024 bytes, shown in `backup_label`.
    pub label: String,
    /// How the checkpoint is reached.
    pub checkpoint: CheckpointMode,
    /// Most KiB a second the server may send, 32 to 1048576; `None` = unlimited.
    pub rate_max_kib: Option<u32>,
}

/// One archive of the backup to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tablespace {
    /// OID of the tablespace; `None` for the main data directory.
    pub oid: Option<u32>,
    /// Absolute path on the server; `None` for the main data directory.
    pub location: Option<String>,
    /// Estimated size.
    pub size_kib: Option<u64>,
}

/// What comes next in a base backup, in this order: one `Start`; for each archive `Archive` and its
/// `Data`; `Progress` anywhere between; one `End`.
#[derive(Clone, Debug)]
pub enum BaseBackupEvent {
    /// The checkpoint was made and the copy begins.
    Start {
        /// Redo position of that checkpoint: WAL is needed from here.
        start_lsn: Lsn,
        /// Timeline of `start_lsn`.
        timeline: TimelineId,
        /// What will be sent, in this order.
        tablespaces: Vec<Tablespace>,
    },
    /// A new tar archive begins (and the one before is complete).
    Archive {
        /// Index into the list of tablespaces.
        index: usize,
    },
    /// Bytes of the current archive: a slice of the read buffer.
    Data(Bytes),
    /// The server's own count of the bytes it has read so far (PostgreSQL 15 and later).
    Progress {
        /// Bytes of files read so far, over all archives.
        done_bytes: u64,
    },
    /// All archives are complete and the server left backup mode.
    End {
        /// WAL is needed up to here before the backup is consistent.
        end_lsn: Lsn,
        /// Timeline of `end_lsn`.
        timeline: TimelineId,
    },
}

/// A running base backup.
#[derive(Debug)]
pub struct BaseBackup {
    _private: (),
}

impl Connection {
    /// Starts a base backup; the connection serves it until the end and is then closed.
    ///
    /// # Errors
    /// What the server says, as our error with a hint.
    pub async fn base_backup(self, options: &BaseBackupOptions) -> Result<BaseBackup> {
        let _ = options;
        todo!()
    }
}

impl BaseBackup {
    /// The next event, or `None` after `End`.
    ///
    /// # Errors
    /// `unavailable` when the connection broke or the server gave up; what the server says else.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped: the next call goes on where this one was.
    pub async fn next(&mut self) -> Result<Option<BaseBackupEvent>> {
        todo!()
    }
}
