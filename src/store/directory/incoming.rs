//! Files in the making, in the root's `.incoming`.
//!
//! # Invariants
//! The owner holds a lock on the file for as long as it lives, so a sweep knows the abandoned ones;
//! a file that was swept before its owner could lock it is noticed by having no name.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::{FOLDER_MODE, modified};
use crate::clock::Clock;
use crate::error::{Context, Error, Kind, Result};
use crate::store::is_stale;

/// Name of the folder below the root.
const FOLDER: &str = ".incoming";

/// What to do where nothing can be locked.
pub(super) const LOCK_HINT: &str =
    "The file system must support flock; on NFS use version 4 or later.";

/// A file without an object's name; dropping it removes it.
#[derive(Debug)]
pub(super) struct Incoming {
    file: File,
    path: PathBuf,
    named: bool,
}

impl Incoming {
    /// A new empty file, open for reading and writing.
    pub(super) fn new(root: &Path, clock: &Clock) -> Result<Self> {
        let folder = root.join(FOLDER);
        let attempted = || format!("unable to make a file in '{}'", folder.display());
        for _ in 0..10 {
            let path = folder.join(format!("{:032x}", u128::from_le_bytes(clock.random()?)));
            let file = match create_new(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    // Never the root: where that is gone, something else may be in its place later.
                    match fs::DirBuilder::new().mode(FOLDER_MODE).create(&folder) {
                        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                            return Err(Error::io(attempted(), &error));
                        }
                        _ => continue,
                    }
                }
                created => created.context(attempted)?,
            };
            let made = Self { file, path, named: false };
            match made.file.try_lock() {
                Ok(()) if made.file.metadata().context(attempted)?.nlink() > 0 => return Ok(made),
                Ok(()) | Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => {
                    return Err(Error::io(attempted(), &error).hint(LOCK_HINT));
                }
            }
        }
        Err(Error::new(Kind::Unavailable, "a sweep keeps removing it").context(attempted()))
    }

    /// Stands in for a file that cannot be fsynced.
    #[cfg(test)]
    pub(super) fn of(file: File) -> Self {
        Self { file, path: PathBuf::new(), named: true }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn file_mut(&mut self) -> &mut File {
        &mut self.file
    }

    /// Gives the file the name `target`, or fails with `AlreadyExists` when that is taken. One atomic
    /// step either way; where the file system lacks `RENAME_NOREPLACE` (NFS) a hard link does it.
    pub(super) fn rename_no_replace(&self, target: &Path) -> io::Result<()> {
        match renameat_with(CWD, &self.path, CWD, target, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                fs::hard_link(&self.path, target)?;
                // Ours under both names: what is left of this one on an error is swept.
                let _ = fs::remove_file(&self.path);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether `target` is a name of this very file.
    pub(super) fn is(&self, target: &Path) -> bool {
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let (ours, there) = (self.file.metadata(), fs::symlink_metadata(target));
        ours.is_ok_and(|ours| there.is_ok_and(|there| id(ours) == id(there)))
    }

    /// Undoes [`Incoming::rename_no_replace`], as far as that is possible. What has the name now must
    /// be this file: the path may lead elsewhere meanwhile, and what is there is not ours.
    pub(super) fn take_back(&self, target: &Path) {
        if self.is(target) {
            let _ = fs::rename(target, &self.path);
        }
    }

    /// Puts the file in the place of `target`.
    pub(super) fn rename(mut self, target: &Path) -> io::Result<()> {
        fs::rename(&self.path, target)?;
        self.named = true;
        Ok(())
    }

    /// Says that the file has its name now.
    pub(super) fn published(&mut self) {
        self.named = true;
    }

    /// Removes the files that nobody holds and that have not been written to for `older_than`. Nothing
    /// is lost by that: no object has such a name, and an owner that is not yet there to lock its file
    /// finds it gone and makes another.
    pub(super) fn sweep(root: &Path, clock: &Clock, older_than: Duration) -> Result<u64> {
        let folder = root.join(FOLDER);
        let attempted = || format!("unable to sweep '{}'", folder.display());
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            entries => entries.context(attempted)?,
        };
        let mut swept = 0;
        for entry in entries {
            let path = entry.context(attempted)?.path();
            let Ok(file) = open_to_lock(&path) else { continue };
            let metadata = file.metadata().context(attempted)?;
            let stale = is_stale(modified(&metadata)?, clock.now(), older_than);
            if !metadata.is_file() || !stale {
                continue;
            }
            match file.try_lock() {
                Ok(()) => {
                    fs::remove_file(&path).context(attempted)?;
                    swept += 1;
                }
                // Its owner is at work.
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => {
                    tracing::warn!("unable to sweep '{}': {error}; {LOCK_HINT}", path.display());
                }
            }
        }
        Ok(swept)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.named {
            // What cannot be removed is left for the sweep.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Opens a file that may be another's, to lock it. For writing too: NFS locks a range of bytes for this,
/// which must be exclusive and is refused (`EBADF`) where nothing could be written.
fn open_to_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o640).open(path)
}

/// Opens the file, making it if it is missing, without touching what it holds.
pub(super) fn create_or_open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o640).open(path)
}

#[cfg(test)]
mod tests {
    use rustix::fs::{OFlags, fcntl_getfl};

    use super::*;

    #[test]
    fn what_is_to_be_locked_is_open_for_writing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("left-behind");
        fs::write(&path, b"half").unwrap();
        let file = open_to_lock(&path).unwrap();
        let mode = fcntl_getfl(&file).unwrap() & OFlags::RWMODE;
        assert_eq!(mode, OFlags::RDWR);
        assert_eq!(fs::read(&path).unwrap(), b"half", "and left as it was");
        assert!(open_to_lock(&folder.path().join("none")).is_err(), "nothing is made");
    }
}
