//! What an interrupted restore left, and how it is cleared for the next one.
//!
//! # Invariants
//! 1. Nothing is cleared on the word of a marker alone, for whoever may write to the directory can put
//!    one there, and an old one names directories that are another cluster's by now: cleared are the data
//!    directory, which the command line names, and the tablespace directories that the marker *and* this
//!    restore's own plan name *and* that hold the marker's [token](super::token). While one that holds it
//!    is not planned, everything is left alone; one that does not hold it is not this restore's, and stays
//!    as it is. A marker without a token, of an older version, has no say about tablespaces.
//! 2. A marker counts when this account, root, or the account that is restored for wrote it. One of the
//!    last, read by another, has a say only about directories of that account: with it nobody has
//!    anything emptied that he could not empty himself.
//! 3. Every directory is opened once, judged and emptied by that descriptor. Neither a link inside of it
//!    nor one that takes its place meanwhile leads out of it.
//!
//! # Durability
//! The marker stays until the end, and a token until its directory is empty, so that being interrupted here
//! is the same state again. Nothing of value can be lost: with the marker there and no `pg_control`, no
//! server ever ran on these files.

use std::ffi::CStr;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, fchmod, fstat, open, openat, statat, unlinkat,
};
use rustix::io::Errno;

use super::{
    CONTROL_FILE, LAST_WORDS, MARKER, Marker, Owner, Token, lock, open_directory, open_in, token,
};
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
    let words = Words::of(&mut marker, word, (&data, path), owner).context(attempted)?;
    // All are opened and judged before the first is emptied.
    let spaces = words.to_empty(planned, &attempted())?;
    for (place, folder) in
        spaces.iter().map(|(place, folder)| (*place, folder)).chain([(path, &data)])
    {
        let found = folder.metadata().context(attempted)?;
        words.word.counts_for(&found).map_err(|flaw| strange_owner(&attempted(), place, &flaw))?;
    }
    for (place, folder) in spaces {
        words.empty_space(folder).context(|| format!("unable to clear '{}'", place.display()))?;
    }
    // The data directory last: until then it says where the tablespaces are.
    empty(data.into(), Some(MARKER), 0).context(attempted)?;
    Ok(Some(marker))
}

/// Whom the interrupted restore in `path` was for, as its marker says; only that of this account or of root
/// is asked.
pub(crate) fn interrupted_for(path: &Path) -> Option<Owner> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let marker = openat(open_directory(path).ok()?, MARKER, flags, Mode::empty()).ok()?;
    let mut marker = File::from(marker);
    if Word::of(&marker.metadata().ok()?, None) != Ok(Word::Trusted) {
        return None;
    }
    read(&mut marker).ok()??.owner
}

/// What an interrupted restore says of tablespaces.
struct Words {
    word: Word,
    /// The directories that it took.
    places: Vec<PathBuf>,
    token: Option<Token>,
}

/// What is in a directory that a marker names.
enum Found {
    Nothing,
    /// What its restore has left, and the token.
    Remains(File),
    /// What does not hold the token.
    Other,
}

impl Words {
    /// Those of `marker`, which counts for `word`, in the data directory `data` at `path`.
    fn of(
        marker: &mut File,
        word: Word,
        (data, path): (&File, &Path),
        owner: Option<Owner>,
    ) -> std::io::Result<Self> {
        if let Some(Marker { tablespace_directories: places, token, .. }) = read(marker)? {
            return Ok(Self { word, places, token });
        }
        // A marker that is not readable was interrupted in the last step, when it holds pg_control and
        // every link to a tablespace is there, or before anything was written.
        let [folder, name] = LAST_WORDS;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let last = open_in(data, Path::new(folder))
            .and_then(|folder| Ok(openat(&folder, name, flags, Mode::empty())?));
        let last = last.map(File::from).ok().and_then(|mut file| {
            let believed = Word::of(&file.metadata().ok()?, owner).ok()?;
            Some((believed, read(&mut file).ok()??))
        });
        Ok(match last {
            Some((believed, Marker { tablespace_directories: places, token, .. })) => {
                Self { word: word.weaker(believed), places, token }
            }
            None => Self { word, places: linked_tablespaces(path), token: None },
        })
    }

    /// The directories among `planned` that are to be emptied.
    fn to_empty(&self, planned: &[PathBuf], attempted: &str) -> Result<Vec<(&Path, File)>> {
        let mut found = Vec::new();
        for place in &self.places {
            let looked = self.found_in(place);
            let looked =
                looked.context(|| format!("{attempted}: unable to see '{}'", place.display()))?;
            match (looked, planned.contains(place)) {
                (Found::Nothing, _) => {}
                (Found::Remains(folder), true) => found.push((place.as_path(), folder)),
                (Found::Remains(_), false) => return Err(strange_place(attempted, place)),
                (Found::Other, false) if self.token.is_some() => {}
                (Found::Other, _) => return Err(self.unproven_place(attempted, place)),
            }
        }
        Ok(found)
    }

    fn found_in(&self, place: &Path) -> std::io::Result<Found> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = match open(place, flags, Mode::empty()) {
            Ok(folder) => File::from(folder),
            Err(Errno::NOENT) => return Ok(Found::Nothing),
            Err(Errno::NOTDIR) => return Ok(Found::Other),
            Err(error) => return Err(error.into()),
        };
        if token::first_but(&folder, "")?.is_none() {
            return Ok(Found::Nothing);
        }
        let is_held = self.token.map_or(Ok(false), |token| token.is_in(&folder))?;
        Ok(if is_held { Found::Remains(folder) } else { Found::Other })
    }

    /// Empties the directory of a tablespace, the token last.
    fn empty_space(&self, folder: File) -> std::io::Result<()> {
        let Some(token) = self.token else { return Ok(()) };
        empty(folder.try_clone()?.into(), Some(&token.to_string()), 0)?;
        folder.sync_all()?;
        token.remove(&folder)?;
        folder.sync_all()
    }

    fn unproven_place(&self, attempted: &str, place: &Path) -> Error {
        let place = place.display();
        let message = format!(
            "{attempted}: its '{MARKER}' names '{place}', which is not empty, and nothing there shows that \
             it is of that restore"
        );
        Error::new(Kind::Conflict, message).hint(match self.token {
            Some(_) => format!(
                "Nothing was removed. Another cluster may have its tablespace there by now: choose another \
                 place with --tablespace OLD=NEW; or see what is in '{place}', and empty it yourself if it \
                 is of no use."
            ),
            None => format!(
                "Nothing was removed. A marker of an older version does not tell whether another cluster \
                 has its tablespace there by now: see what is in '{place}', and empty it yourself if it is \
                 of no use; or name another directory with --into."
            ),
        })
    }
}

/// What `marker` says, if it says anything.
fn read(marker: &mut File) -> std::io::Result<Option<Marker>> {
    let mut text = Vec::new();
    marker.take(MARKER_BYTES_MAX).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text).ok())
}

fn linked_tablespaces(path: &Path) -> Vec<PathBuf> {
    let links = fs::read_dir(path.join("pg_tblspc")).into_iter().flatten();
    let targets = links.filter_map(|link| fs::read_link(link.ok()?.path()).ok());
    targets.filter(|target| target.is_absolute()).collect()
}

fn strange_place(attempted: &str, place: &Path) -> Error {
    let message = format!(
        "{attempted}: it has left something in '{}', where this restore puts no tablespace",
        place.display()
    );
    Error::new(Kind::Conflict, message).hint(format!(
        "Nothing was removed. To have it cleared name it again with --tablespace OLD={0}; or empty '{0}' \
         yourself.",
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

    /// What may be believed of what both say.
    fn weaker(self, other: Self) -> Self {
        if self == Self::Trusted { other } else { self }
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
