//! The root of the store, and whether it still is the folder that it was.
//!
//! A file system that is unmounted under us leaves its mount point: an empty folder, in which nothing
//! is to be found and anything could be written. Neither must look like a repository.
//!
//! # Invariants
//! - The first folder that is met at the path is the root for as long as this process lives. When the
//!   path leads to another one, or nowhere, that is an outage (`unavailable`) and never an answer.
//! - What is looked up through an [`Opened`] root is looked up in that very folder, wherever the path
//!   leads meanwhile. So what is missing there is missing in the repository.
//! - No folder below it is a link to one elsewhere: see [`Opened::is_folder`].

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::fs::{
    AtFlags, Dir, DirEntry, FileType, Mode, OFlags, Stat, mkdirat, openat, statat, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};

use super::{FOLDER_MODE, is_missing};
use crate::error::{Context, Error, Kind, Result};
use crate::file;

/// Said of a folder that somebody moved elsewhere.
const LINK_HINT: &str =
    "Mount the folder that it leads to in its place ('mount --bind'), or move that back.";

/// Which folder a path led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FolderId {
    device: u64,
    inode: u64,
    /// When it was made; `None` where the file system does not say, or says 1970.
    birth: Option<SystemTime>,
}

impl FolderId {
    pub(super) fn of(metadata: &fs::Metadata) -> Self {
        let birth = metadata.created().ok().filter(|birth| *birth > SystemTime::UNIX_EPOCH);
        Self { device: metadata.dev(), inode: metadata.ino(), birth }
    }

    /// Whether it is the folder that was `met`, perhaps mounted anew.
    ///
    /// A file system that is mounted again may have another device's number, and another file system the number
    /// that it had, with the same inodes at its beginning. When a folder was made is the file system's own and
    /// stays; where that is not told, the device's number must do.
    fn is_still(self, met: Self) -> bool {
        let alike = match (self.birth, met.birth) {
            (Some(birth), Some(then)) => birth == then,
            _ => self.device == met.device,
        };
        alike && self.inode == met.inode
    }
}

#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The folder that was met first.
    folder: Option<FolderId>,
    /// Whether the folder itself survives a crash.
    durable: bool,
}

impl Root {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, known: Mutex::default() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The root, `None` when there is none and never was.
    pub(super) fn open(&self) -> Result<Option<Opened>> {
        let attempted = || format!("unable to use '{}'", self.path.display());
        // Asked first: another thread may make the root, and meet it, right after it was missing here.
        let was_there = self.known().folder.is_some();
        let mut options = File::options();
        options.read(true).custom_flags(OFlags::DIRECTORY.bits().cast_signed());
        let folder = match options.open(&self.path) {
            Ok(folder) => folder,
            Err(error) if is_missing(&error) && was_there => return Err(self.gone()),
            Err(error) if error.kind() == ErrorKind::NotADirectory && self.path.is_file() => {
                let found = format!("'{}' is a file, expected a folder", self.path.display());
                return Err(Error::new(Kind::Config, found)
                    .hint("Name the folder of the repository with --repository."));
            }
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(Error::io(attempted(), &error)),
        };
        let found = FolderId::of(&folder.metadata().context(attempted)?);
        let met = *self.known().folder.get_or_insert(found);
        if !found.is_still(met) {
            return Err(self.gone());
        }
        Ok(Some(Opened(folder)))
    }

    /// The root, made if it is missing and never was there.
    ///
    /// # Durability
    /// It survives a crash, and so does every folder above it that was made.
    pub(super) fn make(&self) -> Result<Opened> {
        let attempted = || format!("unable to use '{}'", self.path.display());
        if let Some(opened) = self.open()?
            && self.known().durable
        {
            return Ok(opened);
        }
        file::make_folders(&self.path, FOLDER_MODE).context(attempted)?;
        let opened = self.open()?.ok_or_else(|| self.gone())?;
        self.known().durable = true;
        Ok(opened)
    }

    /// Why something failed: the root that went away, else `error` as it is.
    pub(super) fn explain(&self, error: Error) -> Error {
        match self.open() {
            Err(gone) if gone.is_transient() => gone,
            _ => error,
        }
    }

    fn gone(&self) -> Error {
        Error::new(Kind::Unavailable, "it is not the folder it was: unmounted or replaced")
            .context(format!("unable to use '{}'", self.path.display()))
            .hint("Mount the repository's file system again.")
    }
}

/// The root's folder, held open. Names are relative to it.
pub(super) struct Opened(File);

impl Opened {
    /// Opens a file to read it.
    pub(super) fn file(&self, name: &str) -> std::io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(retry_on_intr(|| openat(&self.0, name, flags, Mode::empty()))?.into())
    }

    /// What a name, followed to its end, leads to.
    pub(super) fn stat(&self, name: &str) -> std::io::Result<Stat> {
        Ok(retry_on_intr(|| statat(&self.0, name, AtFlags::empty()))?)
    }

    /// What a folder holds, in no order; "" is the root.
    pub(super) fn entries(&self, folder: &str) -> std::io::Result<Dir> {
        let folder = if folder.is_empty() { "." } else { folder };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = retry_on_intr(|| openat(&self.0, folder, flags, Mode::empty()))?;
        Ok(Dir::new(opened)?)
    }

    /// Whether an entry of a folder, "" or with a slash at its end, is a folder itself.
    ///
    /// # Errors
    /// `config` when it is a link to one: what is in there would be missing from listings, and be taken
    /// for gone.
    pub(super) fn is_folder(&self, folder: &str, entry: &DirEntry) -> Result<bool> {
        let name = [folder.as_bytes(), entry.file_name().to_bytes()].concat();
        let shown = || String::from_utf8_lossy(&name).into_owned();
        let look = |flags| match retry_on_intr(|| statat(&self.0, name.as_slice(), flags)) {
            Ok(found) => Ok(FileType::from_raw_mode(found.st_mode)),
            // Gone meanwhile, or a link to nothing.
            Err(Errno::NOENT) => Ok(FileType::Unknown),
            Err(error) => Err(Error::io(format!("unable to look at '{}'", shown()), &error.into())),
        };
        let mut file_type = entry.file_type();
        // Not every file system says in its listing what a name is.
        if file_type == FileType::Unknown {
            file_type = look(AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if file_type == FileType::Symlink && look(AtFlags::empty())? == FileType::Directory {
            let found = format!("unable to list '{}': it is a link to a folder", shown());
            return Err(Error::new(Kind::Config, found).hint(LINK_HINT));
        }
        Ok(file_type == FileType::Directory)
    }

    /// The folders in a folder, named as that is.
    pub(super) fn folders(&self, folder: &str) -> Result<Vec<String>> {
        let attempted = || format!("unable to list folder '{folder}'");
        let mut folders = Vec::new();
        for entry in self.entries(folder).context(attempted)? {
            let entry = entry.map_err(std::io::Error::from).context(attempted)?;
            let name = entry.file_name().to_str().unwrap_or(".");
            if !name.starts_with('.') && self.is_folder(folder, &entry)? {
                folders.push(format!("{folder}{name}/"));
            }
        }
        Ok(folders)
    }

    /// Makes a folder and those above it, but never the root.
    pub(super) fn make_folders(&self, folder: &Path) -> std::io::Result<()> {
        let mut path = PathBuf::new();
        for part in folder.components() {
            path.push(part);
            match mkdirat(&self.0, &path, Mode::from_raw_mode(FOLDER_MODE)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Removes a file.
    pub(super) fn remove(&self, name: &str) -> std::io::Result<()> {
        Ok(unlinkat(&self.0, name, AtFlags::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_folder_is_known_again_by_when_it_was_made_and_else_by_its_device() {
        let at = |device, inode, seconds: Option<u64>| FolderId {
            device,
            inode,
            birth: seconds.map(|seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)),
        };
        let met = at(1, 2, Some(7));
        assert!(at(1, 2, Some(7)).is_still(met));
        assert!(at(9, 2, Some(7)).is_still(met), "mounted again");
        assert!(!at(1, 2, Some(8)).is_still(met), "made anew on the same device");
        assert!(!at(1, 3, Some(7)).is_still(met));
        for (met, found) in [(None, None), (Some(7), None), (None, Some(7))] {
            assert!(at(1, 2, found).is_still(at(1, 2, met)));
            assert!(!at(9, 2, found).is_still(at(1, 2, met)));
        }
    }
}
