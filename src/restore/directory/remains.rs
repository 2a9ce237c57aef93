//! What an interrupted restore left, and how it is cleared for the next one.
//!
//! # Invariants
//! 1. Nothing is cleared on the word of a marker alone, for whoever may write to the directory can put
//!    one there: cleared are the data directory, which the command line names, and the tablespace
//!    directories that the marker *and* this restore's own plan name. While the marker names another
//!    one that is not empty, everything is left alone.
//! 2. A marker counts when this account, root, or the account that is restored for wrote it. One of the
//!    last, read by another, has a say only about directories of that account: with it nobody has
//!    anything emptied that he could not empty himself.
//! 3. Every directory is opened once, judged and emptied by that descriptor. Neither a link inside of it
//!    nor one that takes its place meanwhile leads out of it.
//!
//! # Durability
//! The marker stays until the end, so that being interrupted here is the same state again. Nothing of
//! value can be lost: with the marker there and no `pg_control`, no server ever ran on these files.

use std::ffi::CStr;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, fchmod, fstat, openat, statat, unlinkat};
use rustix::io::Errno;

use super::{CONTROL_FILE, MARKER, Marker, Owner, lock, open_directory};
use crate::error::{Context, Error, Kind, Result};

/// Longest marker read: paths of tablespaces and a few facts.
const MARKER_BYTES_MAX: u64 = 1 << 20;

/// Deepest folder that is cleared: PostgreSQL's own are a handful deep.
const DEPTH_MAX: u32 = 100;

/// Removes what an interrupted restore left in `path` and in those of `planned` that its marker names,
/// all but the marker, which is returned locked. Returns `None` when there is no marker.
pub(super) fn clear(
    path: &Path,
    planned: &[PathBuf],
    owner: Option<Owner>,
) -> Result<Option<File>> {
    let attempted = || format!("unable to clear the interrupted restore in '{}'", path.display());
    let data = open_directory(path)?;
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut marker = match openat(&data, MARKER, flags, Mode::empty()) {
        Ok(marker) => File::from(marker),
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(Error::io(attempted(), &error.into())),
    };
    lock(&marker, path)?;
    let word = Word::of(&marker.metadata().context(attempted)?, owner).map_err(|flaw| {
        Error::new(Kind::Conflict, format!("{}: {flaw}", attempted())).hint(
            "Nothing was removed. If it is of no use, empty the directory yourself, or name another.",
        )
    })?;
    if [CONTROL_FILE, "postmaster.pid"].iter().any(|name| is_there(&data, name)) {
        let message = format!(
            "{}: it has both '{MARKER}' and '{CONTROL_FILE}' or a running server",
            attempted()
        );
        return Err(Error::new(Kind::Conflict, message)
            .hint("This is not what an interrupted restore leaves. Name another directory."));
    }
    let named = named_places(&mut marker, path).context(attempted)?;
    let strange = named.iter().find(|place| !planned.contains(place) && !is_empty(place));
    if let Some(place) = strange {
        return Err(strange_place(&attempted(), place));
    }
    // All are opened and judged before the first is emptied.
    let mut emptied = vec![(path, data)];
    for place in named.iter().filter(|place| planned.contains(place) && place.is_dir()) {
        emptied.push((place, open_directory(place)?));
    }
    for (place, folder) in &emptied {
        let found = folder.metadata().context(attempted)?;
        word.counts_for(&found).map_err(|flaw| strange_owner(&attempted(), place, &flaw))?;
    }
    // The data directory last: until then its links say where the tablespaces are.
    for (place, folder) in emptied.iter().rev() {
        let emptying = || format!("unable to clear '{}'", place.display());
        let folder = folder.try_clone().context(emptying)?;
        empty(folder.into(), Some(MARKER), 0).context(emptying)?;
    }
    Ok(Some(marker))
}

/// Whom the interrupted restore in `path` was for, as its marker says; only that of this account or of root
/// is asked.
pub(crate) fn interrupted_for(path: &Path) -> Option<Owner> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let marker = openat(open_directory(path).ok()?, MARKER, flags, Mode::empty()).ok()?;
    let marker = File::from(marker);
    if Word::of(&marker.metadata().ok()?, None) != Ok(Word::Trusted) {
        return None;
    }
    let mut text = Vec::new();
    marker.take(MARKER_BYTES_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice::<Marker>(&text).ok()?.owner
}

/// The tablespace directories that the restore wrote to, as far as its marker tells.
fn named_places(marker: &mut File, path: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut text = Vec::new();
    marker.take(MARKER_BYTES_MAX).read_to_end(&mut text)?;
    // A marker that is not readable was interrupted in the last step, when it holds pg_control and
    // every link to a tablespace is there, or before anything was written.
    Ok(match serde_json::from_slice::<Marker>(&text) {
        Ok(marker) => marker.tablespace_directories,
        Err(_) => linked_tablespaces(path),
    })
}

fn linked_tablespaces(path: &Path) -> Vec<PathBuf> {
    let links = fs::read_dir(path.join("pg_tblspc")).into_iter().flatten();
    let targets = links.filter_map(|link| fs::read_link(link.ok()?.path()).ok());
    targets.filter(|target| target.is_absolute()).collect()
}

fn strange_place(attempted: &str, place: &Path) -> Error {
    let message = format!(
        "{attempted}: its '{MARKER}' names '{}', which is not empty and where this restore puts \
         no tablespace",
        place.display()
    );
    Error::new(Kind::Conflict, message).hint(format!(
        "Nothing was removed. Name it again with --tablespace OLD={0}; or see what is in '{0}', \
         and empty it yourself if it is of no use.",
        place.display()
    ))
}

fn strange_owner(attempted: &str, place: &Path, flaw: &str) -> Error {
    let message = format!("{attempted}: '{}' {flaw}", place.display());
    Error::new(Kind::Conflict, message).hint(format!(
        "Nothing was removed. See what is in '{}', and empty it yourself if it is of no use.",
        place.display()
    ))
}

/// What may be believed of a marker, by who wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// Everything.
    Trusted,
    /// What concerns directories of this account.
    Of(u32),
}

impl Word {
    /// That of the marker `found`; in the error what speaks against it.
    fn of(found: &Metadata, owner: Option<Owner>) -> Result<Self, String> {
        if !found.is_file() || found.nlink() != 1 {
            return Err(format!("its '{MARKER}' is not a file of its own"));
        }
        if found.mode() & 0o022 != 0 {
            return Err(format!("everybody could have written its '{MARKER}'"));
        }
        let us = rustix::process::geteuid().as_raw();
        Self::of_writer(found.uid(), us, owner).ok_or_else(|| {
            format!("its '{MARKER}' belongs to user {}, who has no say in it", found.uid())
        })
    }

    fn of_writer(writer: u32, us: u32, owner: Option<Owner>) -> Option<Self> {
        match writer {
            trusted if trusted == 0 || trusted == us => Some(Self::Trusted),
            writer => owner.filter(|owner| owner.uid == writer).map(|_owner| Self::Of(writer)),
        }
    }

    /// Whether it may say that a directory is to be emptied; in the error why not.
    fn counts_for(self, directory: &Metadata) -> Result<(), String> {
        match self {
            Self::Of(writer) if directory.uid() != writer => {
                Err(format!("belongs to user {}, and '{MARKER}' to user {writer}", directory.uid()))
            }
            _ => Ok(()),
        }
    }
}

fn is_there(folder: &File, name: &str) -> bool {
    statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

/// Whether there is certainly nothing in it.
fn is_empty(place: &Path) -> bool {
    match fs::read_dir(place) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// Removes everything in `folder` but the file `keep`.
fn empty(folder: OwnedFd, keep: Option<&str>, depth: u32) -> std::io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(std::io::Error::other(format!("it is more than {DEPTH_MAX} folders deep")));
    }
    let mode = Mode::from_raw_mode(fstat(&folder)?.st_mode);
    if !mode.contains(Mode::RWXU) {
        // A restore that was interrupted late had given it its mode of the backup, which may be 0500.
        fchmod(&folder, mode | Mode::RWXU)?;
    }
    for entry in Dir::read_from(&folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let kept = keep.is_some_and(|keep| name.to_bytes() == keep.as_bytes());
        if kept || [c".", c".."].contains(&name) {
            continue;
        }
        if is_folder(&folder, name, entry.file_type())? {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            empty(openat(&folder, name, flags, Mode::empty())?, None, depth + 1)?;
            unlinkat(&folder, name, AtFlags::REMOVEDIR)?;
        } else {
            unlinkat(&folder, name, AtFlags::empty())?;
        }
    }
    Ok(())
}

/// Not every file system says in its listing what a name is.
fn is_folder(folder: impl AsFd, name: &CStr, listed: FileType) -> std::io::Result<bool> {
    let file_type = match listed {
        FileType::Unknown => {
            FileType::from_raw_mode(statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)
        }
        listed => listed,
    };
    Ok(file_type == FileType::Directory)
}

#[cfg(test)]
mod tests;
