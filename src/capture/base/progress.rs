//! What a base backup tells about itself while it runs.

use tokio::sync::watch;

use crate::repo::BackupId;

/// What a base backup is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BaseBackupPhase {
    /// Connecting, and making sure that WAL is streamed.
    #[default]
    Preparing,
    /// The server makes the checkpoint that the backup begins with.
    Checkpoint,
    /// Files arrive.
    Copying,
    /// The last uploads are on their way.
    Storing,
    /// Pages that looked damaged are read again.
    Rechecking,
    /// The WAL of the backup is not all durable yet.
    WaitingForWal,
    /// The manifest is there.
    Complete,
}

/// How far a base backup is.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct BaseBackupProgress {
    /// What it is doing.
    pub phase: BaseBackupPhase,
    /// The backup, once it has begun.
    pub id: Option<BackupId>,
    /// Bytes the server expects to send; it does not look again while files grow.
    pub total_bytes: Option<u64>,
    /// Bytes of files received.
    pub received_bytes: u64,
    /// Regular files received.
    pub file_count: u64,
    /// Bytes stored.
    pub stored_bytes: u64,
    /// Pages whose checksum was wrong, before they were read again.
    pub suspect_page_count: u64,
}

/// Observable progress of a base backup; share it by `Arc`.
#[derive(Debug)]
pub struct Progress(watch::Sender<BaseBackupProgress>);

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    /// Of a backup that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(BaseBackupProgress::default()))
    }

    /// The progress now.
    #[must_use]
    pub fn snapshot(&self) -> BaseBackupProgress {
        self.0.borrow().clone()
    }

    /// A receiver that wakes with every change.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<BaseBackupProgress> {
        self.0.subscribe()
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut BaseBackupProgress)) {
        self.0.send_modify(change);
    }

    pub(super) fn enter(&self, phase: BaseBackupPhase) {
        self.update(|now| now.phase = phase);
    }
}
