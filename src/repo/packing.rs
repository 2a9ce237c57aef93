//! A backup in the making: files in, packs out.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use super::manifest::{ChecksumFailure, Manifest, ManifestFacts};
use super::names::BackupId;
use super::pack::{FilePath, PackFooter};
use super::writer::Writer;
use crate::error::Result;
use crate::pipeline::{Budget, Level};

/// Default size at which a pack is closed.
pub const PACK_BYTES_DEFAULT: u64 = 512 << 20;

/// How a backup is packed.
#[derive(Clone, Debug)]
pub struct PackOptions {
    /// Threads, part size and memory.
    pub budget: Budget,
    /// Level of compression.
    pub level: Level,
    /// A pack is closed when it holds so many stored bytes.
    pub pack_bytes: u64,
}

/// A file about to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileMeta {
    /// Where it is below the data directory.
    pub path: FilePath,
    /// Permission bits.
    pub mode: u32,
    /// Time of last change, seconds since 1970.
    pub mtime: i64,
    /// Its size: exactly so many bytes follow.
    pub size_bytes: u64,
}

/// Looks at every block of every file, on the worker threads.
pub trait Inspect: Send + Sync {
    /// A piece of a file: at most a mebibyte, beginning at a multiple of one. What it returns comes
    /// back in the manifest.
    fn block(&self, file: &FileMeta, file_offset: u64, data: &[Bytes]) -> Vec<ChecksumFailure>;
}

/// What packing has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackProgress {
    /// Bytes of files compressed.
    pub plain_bytes: u64,
    /// Bytes uploaded.
    pub stored_bytes: u64,
    /// Regular files taken in.
    pub file_count: u64,
    /// Bad pages found so far.
    pub checksum_failure_count: u64,
}

/// A backup in the making.
pub struct BackupWriter {
    _writer: Writer,
}

impl BackupWriter {
    pub(super) fn begin(
        _writer: Writer,
        _id: BackupId,
        _options: PackOptions,
        _inspect: Arc<dyn Inspect>,
    ) -> Result<Self> {
        todo!()
    }

    /// Begins a regular file; [`BackupWriter::write`] follows with its bytes.
    ///
    /// # Errors
    /// `bug` when another file has not ended; what the store reported meanwhile.
    pub async fn begin_file(&mut self, _file: FileMeta) -> Result<()> {
        todo!()
    }

    /// The next bytes of the file. Waits while the memory budget is used.
    ///
    /// # Errors
    /// `bug` when there are more than announced; what the store reported meanwhile.
    pub async fn write(&mut self, _bytes: Bytes) -> Result<()> {
        todo!()
    }

    /// Ends the file.
    ///
    /// # Errors
    /// `corrupt` when there were fewer bytes than announced.
    pub async fn end_file(&mut self) -> Result<()> {
        todo!()
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// What the store reported meanwhile.
    pub async fn add_directory(&mut self, _path: FilePath, _mode: u32, _mtime: i64) -> Result<()> {
        todo!()
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// What the store reported meanwhile.
    pub async fn add_symlink(
        &mut self,
        _path: FilePath,
        _mtime: i64,
        _target: Vec<u8>,
    ) -> Result<()> {
        todo!()
    }

    /// What was done so far.
    #[must_use]
    pub fn progress(&self) -> PackProgress {
        todo!()
    }

    /// Uploads the rest. On return all packs are durable and nothing of the backup is visible yet.
    ///
    /// # Errors
    /// What the store reports.
    pub async fn finish_packs(self) -> Result<PackedBackup> {
        todo!()
    }

    /// Stops and discards all unfinished uploads; finished packs stay for the sweep.
    pub async fn abort(self) {
        todo!()
    }
}

/// A backup whose packs are durable and that has no manifest yet.
#[derive(Debug)]
pub struct PackedBackup {
    _private: (),
}

impl PackedBackup {
    /// Puts the manifest: the backup is visible on return. To be called only once the WAL from its
    /// start to `facts.end_lsn` is durable (invariant 3 of the design).
    ///
    /// # Errors
    /// `conflict` when a pack is missing or has another size than was put, or when the last was put
    /// more than 24 hours ago (the sweep takes packs without a manifest); what the store reports.
    pub async fn commit(self, _facts: ManifestFacts) -> Result<Manifest> {
        let _: Option<PackFooter> = None;
        todo!()
    }
}

impl fmt::Debug for BackupWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BackupWriter")
    }
}
