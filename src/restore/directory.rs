//! The directory a restore writes into: claimed before anything is written, finished by one rename.
//!
//! # Invariants
//! - A directory with anything in it is refused, unless all of it was left by an interrupted restore.
//! - While a restore runs, and after it was interrupted, the directory holds [`MARKER`] and has no
//!   `global/pg_control`, without which no PostgreSQL starts. The marker *becomes* `global/pg_control`
//!   by one rename as the last step: at every instant exactly one of the two exists, so a directory
//!   that looks finished is finished, and one that does not can be cleared without asking.
//! - The marker names the tablespace directories of its restore, which were empty when it was written,
//!   and carries a `token` that is put into each of them. Of those the next restore clears, together with
//!   the data directory, what its own plan names too and what holds that token; `remains` says what else
//!   makes it believe a marker.
//! - The marker is locked while its restore runs: two never write into one directory.
//! - What root fills for another account is root's, and closed to all others, until it is whole
//!   (`Directory::give`): nobody can put a link there that root would follow. From then on nothing in it
//!   is touched but by the descriptors that are held.
//!
//! # Durability
//! [`Directory::finish`] returns when the file systems of the data directory and of every tablespace
//! have written everything out (see `syncing`) and only then renamed the marker and synced both folders.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, openat, renameat, statat, unlinkat};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Kind, Result};

mod remains;
mod syncing;
mod token;

pub(crate) use remains::interrupted_for;
pub use token::Token;

/// Name of the file that marks an unfinished restore.
pub const MARKER: &str = "tidemark.restoring";

/// The file without which PostgreSQL does not start.
pub const CONTROL_FILE: &str = "global/pg_control";

/// What the marker says, while that is about to become [`CONTROL_FILE`]. Not in the data directory itself:
/// what is left in `pg_wal` gets into no backup, and `pg_verifybackup` passes it over.
const LAST_WORDS: [&str; 2] = ["pg_wal", MARKER];

/// Mode of a directory that root fills.
const TAKEN_MODE: u32 = 0o700;

/// Mode of the directories that are made above those of a restore for another account.
const ANCESTOR_MODE: u32 = 0o755;

/// How often, and how long apart, a lock is tried that somebody holds.
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// User and group that own what is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Owner {
    /// `user`, `user:group`, or numbers in place of either.
    ///
    /// # Errors
    /// `usage` when this machine knows no such user or group.
    pub fn parse(text: &str) -> Result<Self> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let unknown = |what: &str, name: &str| {
            Error::new(Kind::Usage, format!("unable to find {what} '{name}' on this machine"))
                .hint("Name the user that runs PostgreSQL, or write its numbers as uid:gid.")
        };
        let uid = account_number("-u", user).ok_or_else(|| unknown("user", user))?;
        let gid = match group {
            Some(group) => group_number(group).ok_or_else(|| unknown("group", group))?,
            None => account_number("-g", user).ok_or_else(|| unknown("the group of user", user))?,
        };
        Ok(Self { uid, gid })
    }

    /// Whether this process runs as root.
    #[must_use]
    pub fn process_is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    /// All groups of the user: without those that it has besides its own, a server cannot read what is
    /// readable by them, the key of its certificate for instance.
    #[must_use]
    pub(crate) fn groups(self) -> Vec<u32> {
        let account = account_name(self.uid);
        let groups = account.and_then(|name| account_says("-G", &name)).unwrap_or_default();
        let listed = groups.split_whitespace().filter_map(|group| group.parse().ok());
        std::iter::once(self.gid).chain(listed.filter(|group| *group != self.gid)).collect()
    }

    /// Gives `path` (not what a link points to) to this owner.
    pub(crate) fn give(self, path: &Path) -> Result<()> {
        std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid))
            .context(|| format!("unable to change the owner of '{}'", path.display()))
    }
}

/// What `id` says of a user; it asks every source of accounts the machine has.
fn account_number(what: &str, user: &str) -> Option<u32> {
    if let Ok(number) = user.parse() {
        return Some(number);
    }
    account_says(what, user)?.trim().parse().ok()
}

fn account_says(what: &str, user: &str) -> Option<String> {
    if user.is_empty() || user.starts_with('-') {
        return None;
    }
    let answer = Command::new("id").args([what, "--", user]).output().ok()?;
    let text = String::from_utf8(answer.stdout).ok()?;
    answer.status.success().then_some(text)
}

fn group_number(group: &str) -> Option<u32> {
    if let Ok(number) = group.parse() {
        return Some(number);
    }
    entry("group", group)?.split(':').nth(2)?.trim().parse().ok()
}

fn account_name(uid: u32) -> Option<String> {
    let entry = entry("passwd", &uid.to_string())?;
    entry.split(':').next().map(str::to_owned)
}

/// The line of `key` in one of the machine's tables of accounts.
fn entry(table: &str, key: &str) -> Option<String> {
    let answer = Command::new("getent").args([table, "--", key]).output().ok()?;
    String::from_utf8(answer.stdout).ok()
}

/// A tablespace directory of the backup and the one that takes its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablespaceMapping {
    /// Where it was when the backup was taken.
    pub old: PathBuf,
    /// Where it is restored to.
    pub new: PathBuf,
}

impl FromStr for TablespaceMapping {
    type Err = Error;

    /// `OLD=NEW`, both absolute; `\=` is an equals sign inside a path, as `pg_basebackup` has it.
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = vec![String::new()];
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            match (c, parts.last_mut()) {
                ('\\', Some(part)) if chars.peek() == Some(&'=') => {
                    part.push('=');
                    chars.next();
                }
                ('=', _) => parts.push(String::new()),
                (c, Some(part)) => part.push(c),
                (_, None) => {}
            }
        }
        match parts.as_slice() {
            [old, new] if old.starts_with('/') && new.starts_with('/') => {
                Ok(Self { old: tidy(Path::new(old)), new: tidy(Path::new(new)) })
            }
            _ => Err(Error::new(
                Kind::Usage,
                format!("unable to read '{text}' as a tablespace mapping"),
            )
            .hint("Write --tablespace /old/place=/new/place with two absolute paths.")),
        }
    }
}

/// The path without `.` parts and a slash at its end.
fn tidy(path: &Path) -> PathBuf {
    path.components().filter(|part| !matches!(part, Component::CurDir)).collect()
}

/// A tablespace as it will be in the restored cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespacePlace {
    /// Its OID: the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Where it was when the backup was taken.
    pub old: PathBuf,
    /// Where it goes; relative for one inside the data directory (`allow_in_place_tablespaces`).
    pub new: PathBuf,
}

/// Applies `mappings` to the tablespaces of a backup, given as OID and location.
///
/// # Errors
/// `usage` when a mapping names no tablespace, or two tablespaces would share a directory.
pub fn map_tablespaces(
    tablespaces: &[(u32, PathBuf)],
    mappings: &[TablespaceMapping],
) -> Result<Vec<TablespacePlace>> {
    for mapping in mappings {
        if !tablespaces.iter().any(|(_, location)| tidy(location) == mapping.old) {
            let known: Vec<String> =
                tablespaces.iter().map(|(_, location)| location.display().to_string()).collect();
            return Err(Error::new(
                Kind::Usage,
                format!(
                    "unable to move tablespace '{}': the backup has none there",
                    mapping.old.display()
                ),
            )
            .hint(if known.is_empty() {
                "This backup has no tablespaces; leave --tablespace out.".to_owned()
            } else {
                format!("Its tablespaces are at {}.", known.join(", "))
            }));
        }
    }
    let mut places: Vec<TablespacePlace> = Vec::new();
    for (oid, location) in tablespaces {
        let old = tidy(location);
        let mapped = mappings.iter().rev().find(|mapping| mapping.old == old);
        let new = mapped.map_or_else(|| old.clone(), |mapping| mapping.new.clone());
        if new.is_absolute() && places.iter().any(|other| other.new == new) {
            return Err(Error::new(
                Kind::Usage,
                format!("unable to restore two tablespaces into '{}'", new.display()),
            )
            .hint("Give each its own directory with --tablespace OLD=NEW."));
        }
        places.push(TablespacePlace { oid: *oid, old, new });
    }
    Ok(places)
}

/// What the marker says, for the next restore and for whoever finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// For people.
    pub note: String,
    /// The cluster being restored.
    pub cluster: String,
    /// The backup being restored.
    pub backup: String,
    /// Tablespace directories outside the data directory, empty when this was written.
    pub tablespace_directories: Vec<PathBuf>,
    /// What is put into each of those; versions before it was had none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
    /// Who it is restored for, if not for who wrote this: the directories do not tell until the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
}

impl Marker {
    /// A marker for the restore of `backup` of `cluster`; no other one has the same `token`.
    #[must_use]
    pub fn new(cluster: &str, backup: &str, places: &[TablespacePlace], token: Token) -> Self {
        let outside = places.iter().map(|place| &place.new).filter(|path| path.is_absolute());
        let mut outside: Vec<PathBuf> = outside.cloned().collect();
        // One may be inside of another, whose directory is taken first then, while it is empty.
        outside.sort();
        Self {
            note: "An interrupted restore left this directory incomplete. It cannot be started. \
                   Run the same restore again: it clears the directory and starts over."
                .to_owned(),
            cluster: cluster.to_owned(),
            backup: backup.to_owned(),
            tablespace_directories: outside,
            token: Some(token),
            owner: None,
        }
    }
}

/// A claimed directory.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    folder: File,
    marker: File,
    words: Marker,
    owner: Option<Owner>,
    /// The data directory and, behind it, those of tablespaces.
    written: Vec<syncing::Written>,
}

impl Directory {
    /// Claims `path` and the tablespace directories of `marker`: makes them if missing, clears what an
    /// interrupted restore left, and refuses anything else.
    ///
    /// # Errors
    /// `conflict` when a directory is not empty or another restore is writing into it.
    pub fn claim(path: &Path, marker: &Marker, owner: Option<Owner>) -> Result<Self> {
        let path = std::path::absolute(path)
            .context(|| format!("unable to find the directory '{}'", path.display()))?;
        refuse_overlap(&path, &marker.tablespace_directories)?;
        if !path.exists() {
            // Refused here, nothing was made.
            check_empty_places(&marker.tablespace_directories)?;
        }
        make_directory(&path, owner)?;
        let folder = open_directory(&path)?;
        let file = match remains::clear(&path, &marker.tablespace_directories, owner)? {
            Some(file) => {
                check_empty_places(&marker.tablespace_directories)?;
                file
            }
            None => {
                check_empty(&path, "restore into")?;
                check_empty_places(&marker.tablespace_directories)?;
                create_marker(&path.join(MARKER))?
            }
        };
        lock(&file, &path)?;
        let words = Marker { owner, ..marker.clone() };
        let mut this =
            Self { path: path.clone(), folder, marker: file, words, owner, written: Vec::new() };
        this.write_marker()?;
        this.begin(&path)?;
        for place in &marker.tablespace_directories {
            make_directory(place, owner)?;
            this.begin(place)?;
            if let (Some(token), Some(written)) = (&marker.token, this.written.last()) {
                token.put(written.folder(), place)?;
            }
        }
        Ok(this)
    }

    /// Begins to write into the directory that is at `path`, or that a link there points to. Root, at work
    /// for another account, keeps that one out: in what is checked to be empty now nobody puts anything.
    fn begin(&mut self, path: &Path) -> Result<()> {
        let written = syncing::Written::begin(path)?;
        if self.owner.is_some() && Owner::process_is_root() {
            let attempted = || format!("unable to restore into '{}'", path.display());
            let folder = written.folder();
            self.check_untouched(path, folder)?;
            fchown(folder, Some(0), None).context(attempted)?;
            folder.set_permissions(Permissions::from_mode(TAKEN_MODE)).context(attempted)?;
            self.check_untouched(path, folder)?;
        }
        self.written.push(written);
        Ok(())
    }

    /// Fails unless nothing but the marker is in `folder`, and `path` leads there by no link of another
    /// account's to what is not its own.
    fn check_untouched(&self, path: &Path, folder: &File) -> Result<()> {
        let attempted = || format!("unable to restore into '{}'", path.display());
        let conflict = |flaw: &str| {
            Error::new(Kind::Conflict, format!("{}: {flaw}", attempted()))
                .hint("Somebody else is at work there. Name a new or empty directory.")
        };
        let at_path = fs::symlink_metadata(path).context(attempted)?;
        let found = folder.metadata().context(attempted)?;
        if at_path.is_symlink() && ![0, found.uid()].contains(&at_path.uid()) {
            let whose = format!("it is a link of user {}", at_path.uid());
            return Err(conflict(&format!("{whose} to a directory of user {}", found.uid())));
        }
        let marker = self.marker.metadata().context(attempted)?;
        for entry in Dir::read_from(folder).map_err(std::io::Error::from).context(attempted)? {
            let name = entry.map_err(std::io::Error::from).context(attempted)?;
            let name = name.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            let is_ours = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|entry| (entry.st_dev, entry.st_ino) == (marker.dev(), marker.ino()));
            if !is_ours {
                return Err(conflict(&format!("'{}' has come into it", name.to_string_lossy())));
            }
        }
        Ok(())
    }

    /// Gives what is written to its owner, and the data directory `mode`. From here on the owner can change
    /// what any name in it means.
    ///
    /// # Errors
    /// As the file system says.
    pub(crate) fn give(&self, mode: u32) -> Result<()> {
        let attempted = || self.describe("give away");
        let mode = Permissions::from_mode(mode);
        self.folder.set_permissions(mode.clone()).context(attempted)?;
        let Some(Owner { uid, gid }) = self.owner else { return Ok(()) };
        for folder in self.written.iter().map(syncing::Written::folder) {
            // PostgreSQL gives the directory of a tablespace this mode as well.
            folder.set_permissions(mode.clone()).context(attempted)?;
            fchown(folder, Some(uid), Some(gid)).context(attempted)?;
        }
        Ok(())
    }

    /// The data directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who owns what is written.
    #[must_use]
    pub fn owner(&self) -> Option<Owner> {
        self.owner
    }

    /// A hold on the lock for work that may outlive this claim when that is dropped: no other restore
    /// gets the directory while it exists.
    ///
    /// # Errors
    /// As the operating system says.
    pub fn hold(&self) -> Result<File> {
        self.marker.try_clone().context(|| self.describe("hold the lock of"))
    }

    fn write_marker(&mut self) -> Result<()> {
        let text = self.text()?;
        self.fill_marker(&text)?;
        self.folder.sync_all().context(|| self.describe("sync"))
    }

    /// What the marker says.
    fn text(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(&self.words)
            .map_err(|error| Error::new(Kind::Bug, format!("unable to write the marker: {error}")))
    }

    fn fill_marker(&mut self, bytes: &[u8]) -> Result<()> {
        let mut fill = || {
            self.marker.set_len(0)?;
            self.marker.seek(SeekFrom::Start(0))?;
            self.marker.write_all(bytes)?;
            self.marker.sync_all()
        };
        fill().context(|| format!("unable to write '{}'", self.path.join(MARKER).display()))
    }

    fn describe(&self, verb: &str) -> String {
        format!("unable to {verb} '{}'", self.path.display())
    }

    /// Makes everything durable, and then the directory complete, by turning the marker into
    /// `global/pg_control` with the content `control`; see the module for why in this order.
    ///
    /// # Errors
    /// As the file system says; the directory is then still marked as incomplete.
    pub fn finish(mut self, control: &[u8], control_mode: u32) -> Result<()> {
        self.written.iter().try_for_each(syncing::Written::sync)?;
        self.keep_last_words()?;
        self.fill_marker(control)?;
        let attempted = || format!("unable to make '{}'", self.path.join(CONTROL_FILE).display());
        if let Some(Owner { uid, gid }) = self.owner {
            fchown(&self.marker, Some(uid), Some(gid)).context(attempted)?;
        }
        let mode = Permissions::from_mode(control_mode & 0o777);
        self.marker.set_permissions(mode).context(attempted)?;
        self.marker.sync_all().context(|| self.describe("sync"))?;
        let control = Path::new(CONTROL_FILE);
        let (Some(folder), Some(name)) = (control.parent(), control.file_name()) else {
            return Err(Error::new(Kind::Bug, attempted()));
        };
        let finish = || -> std::io::Result<()> {
            let global = open_in(&self.folder, folder)?;
            renameat(&self.folder, MARKER, &global, name)?;
            global.sync_all()?;
            self.folder.sync_all()
        };
        finish().context(attempted)?;
        self.forget();
        Ok(())
    }

    /// Keeps what the marker says of tablespaces where it is found while the marker says nothing.
    fn keep_last_words(&self) -> Result<()> {
        if self.words.tablespace_directories.is_empty() {
            return Ok(());
        }
        let text = self.text()?;
        let [folder, name] = LAST_WORDS;
        let keep = || -> std::io::Result<()> {
            let folder = open_in(&self.folder, Path::new(folder))?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            let mode = Mode::RUSR | Mode::WUSR;
            let mut words = File::from(openat(&folder, name, flags | OFlags::CLOEXEC, mode)?);
            words.write_all(&text)?;
            if let Some(Owner { uid, gid }) = self.owner {
                // Whose the marker is, which may run the restore again.
                fchown(&words, Some(uid), Some(gid))?;
            }
            words.sync_all()?;
            folder.sync_all()
        };
        keep().context(|| format!("unable to write '{folder}/{name}' in '{}'", self.path.display()))
    }

    /// Removes what the restore alone needed, now that it is finished. What stays is in nobody's way: no
    /// marker names it any more.
    fn forget(&self) {
        let (Some(token), false) = (self.words.token, self.words.tablespace_directories.is_empty())
        else {
            return;
        };
        let [folder, name] = LAST_WORDS;
        let words = || -> std::io::Result<()> {
            let folder = open_in(&self.folder, Path::new(folder))?;
            Ok(unlinkat(&folder, name, AtFlags::empty())?)
        };
        let spaces = self.written.iter().skip(1).map(syncing::Written::folder);
        for removed in spaces.map(|folder| token.remove(folder)).chain([words()]) {
            if let Err(error) = removed {
                let path = self.path.display();
                tracing::warn!("unable to tidy up after the restore into '{path}': {error}");
            }
        }
    }
}

/// The folder `name` in `folder`. By its descriptor: a link of the owner's there would lead root elsewhere.
fn open_in(folder: &File, name: &Path) -> std::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?.into())
}

fn open_directory(path: &Path) -> Result<File> {
    File::open(path).context(|| format!("unable to open directory '{}'", path.display()))
}

/// A tablespace inside the data directory, or the other way round, would be cleared or refused later.
fn refuse_overlap(path: &Path, places: &[PathBuf]) -> Result<()> {
    match places.iter().find(|place| place.starts_with(path) || path.starts_with(place)) {
        None => Ok(()),
        Some(place) => Err(Error::new(
            Kind::Usage,
            format!(
                "unable to restore a tablespace into '{}' and the data directory into '{}': one is inside the other",
                place.display(),
                path.display()
            ),
        )
        .hint("Choose another place with --tablespace OLD=NEW.")),
    }
}

/// Makes the directory, and those above it, if missing; PostgreSQL wants it closed to others.
fn make_directory(path: &Path, owner: Option<Owner>) -> Result<()> {
    let attempted = || format!("unable to make directory '{}'", path.display());
    if path.is_dir() {
        return Ok(());
    }
    if path.symlink_metadata().is_ok() {
        let message = format!("unable to restore into '{}': it is not a directory", path.display());
        return Err(
            Error::new(Kind::Conflict, message).hint("Name a new or empty directory with --into.")
        );
    }
    let refused = |error: std::io::Error| {
        Error::io(attempted(), &error).hint(
            "Make it as root and give it to the user that will run PostgreSQL, or name another \
             place with --into.",
        )
    };
    if let Some(parent) = path.parent() {
        make_ancestors(parent, owner).map_err(refused)?;
    }
    DirBuilder::new().mode(0o700).create(path).map_err(refused)?;
    let parent = path.parent().map(open_directory).transpose()?;
    parent.map_or(Ok(()), |parent| parent.sync_all()).context(attempted)
}

/// Makes `path` and those above it where they are missing. Restored for another account they must let that
/// one pass, whatever the umask of root says.
fn make_ancestors(path: &Path, owner: Option<Owner>) -> std::io::Result<()> {
    if owner.is_none() || path.is_dir() {
        return fs::create_dir_all(path);
    }
    if let Some(parent) = path.parent() {
        make_ancestors(parent, owner)?;
    }
    match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(ANCESTOR_MODE)),
        // Somebody else has made it meanwhile, and says who may pass.
        Err(_) if path.is_dir() => Ok(()),
        refused => refused,
    }
}

fn check_empty_places(places: &[PathBuf]) -> Result<()> {
    places
        .iter()
        .filter(|place| place.exists())
        .try_for_each(|place| check_empty(place, "restore a tablespace into"))
}

fn check_empty(path: &Path, verb: &str) -> Result<()> {
    let attempted = || format!("unable to {verb} '{}'", path.display());
    let first = fs::read_dir(path).context(attempted)?.next().transpose().context(attempted)?;
    let Some(first) = first else { return Ok(()) };
    let found = first.file_name();
    Err(Error::new(
        Kind::Conflict,
        format!("{}: it is not empty (it has '{}')", attempted(), found.to_string_lossy()),
    )
    .hint("Name a new or empty directory. Tidemark never overwrites one with anything in it."))
}

fn create_marker(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path).context(|| format!("unable to create '{}'", path.display()))
}

fn lock(marker: &File, path: &Path) -> Result<()> {
    let mut locked = marker.try_lock();
    // A process that this one starts holds all its files for the instant between fork and exec.
    for _ in 0..LOCK_TRIES {
        if !matches!(locked, Err(fs::TryLockError::WouldBlock)) {
            break;
        }
        std::thread::sleep(LOCK_PAUSE);
        locked = marker.try_lock();
    }
    locked.map_err(|error| match error {
        fs::TryLockError::WouldBlock => Error::new(
            Kind::Conflict,
            format!(
                "unable to restore into '{}': another restore is writing into it",
                path.display()
            ),
        )
        .hint("Wait for it, or stop it, and run this again."),
        fs::TryLockError::Error(error) => {
            Error::io(format!("unable to lock '{}'", path.display()), &error)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    fn marker(places: &[&Path]) -> Marker {
        let places: Vec<TablespacePlace> = places
            .iter()
            .map(|path| TablespacePlace { oid: 1, old: "/x".into(), new: path.to_path_buf() })
            .collect();
        Marker::new("main", "b", &places, Token::draw(&Clock::system()).unwrap())
    }

    #[test]
    fn a_directory_with_anything_in_it_is_refused_and_untouched() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("precious"), "x").unwrap();
        let error = Directory::claim(dir.path(), &marker(&[]), None).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
        assert!(error.message().contains("'precious'"), "{error}");
        let names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["precious"]);

        let space = tempfile::tempdir().unwrap();
        fs::write(space.path().join("PG_15"), "x").unwrap();
        let fresh = dir.path().join("a/b");
        let error = Directory::claim(&fresh, &marker(&[space.path()]), None).unwrap_err();
        assert!(error.message().contains("tablespace"), "{error}");
        assert!(!fresh.join(MARKER).exists());
    }

    #[test]
    fn an_empty_directory_for_a_tablespace_is_given_to_the_owner() {
        // Nobody else can give it away.
        if !Owner::process_is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (space, link) = (dir.path().join("space"), dir.path().join("link"));
        fs::create_dir(&space).unwrap();
        std::os::unix::fs::symlink(&space, &link).unwrap();
        let owner = Owner { uid: 12_345, gid: 12_346 };
        let data = dir.path().join("a/b/data");
        let directory = Directory::claim(&data, &marker(&[&link]), Some(owner)).unwrap();
        let found = |path| {
            let found = fs::metadata(path).unwrap();
            (found.mode() & 0o7777, found.uid(), found.gid())
        };
        assert_eq!((found(&space).0, found(&space).1), (0o700, 0));
        directory.give(0o750).unwrap();
        assert_eq!(found(&space), (0o750, 12_345, 12_346));
        assert_eq!(found(&data), found(&space));
        let above = fs::metadata(dir.path().join("a")).unwrap();
        assert_eq!((above.mode() & 0o7777, above.uid()), (0o755, 0));
    }

    #[test]
    fn what_root_fills_is_closed_to_the_account_until_it_is_whole() {
        if !Owner::process_is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let owner = Owner { uid: 12_345, gid: 12_346 };
        let whose = |name| {
            let found = fs::metadata(path(name)).unwrap();
            (found.uid(), found.mode() & 0o777)
        };
        for name in ["data", "space", "precious"] {
            fs::create_dir(path(name)).unwrap();
        }
        owner.give(&path("data")).unwrap();
        // A link of the account's leads to what is root's.
        std::os::unix::fs::symlink(path("precious"), path("link")).unwrap();
        owner.give(&path("link")).unwrap();
        fs::set_permissions(path("precious"), Permissions::from_mode(0o755)).unwrap();
        let claim = |space| Directory::claim(&path("data"), &marker(&[&path(space)]), Some(owner));
        let error = claim("link").unwrap_err();
        assert!(error.message().contains("a link of user 12345"), "{error}");
        assert_eq!(whose("precious"), (0, 0o755));

        let directory = claim("space").unwrap();
        for name in ["data", "space"] {
            assert_eq!(whose(name), (0, 0o700), "{name}");
        }
        // Interrupted here, it is known whom it was for.
        assert_eq!(interrupted_for(&path("data")), Some(owner));
        fs::create_dir(path("data/global")).unwrap();
        directory.give(0o700).unwrap();
        // Now the account may do this.
        fs::rename(path("data/global"), path("data/moved")).unwrap();
        std::os::unix::fs::symlink(path("precious"), path("data/global")).unwrap();
        directory.finish(b"control", 0o600).unwrap_err();
        assert_eq!(fs::read_dir(path("precious")).unwrap().count(), 0);
        assert_eq!(whose("data"), (12_345, 0o700));
    }

    #[test]
    fn an_interrupted_restore_cannot_start_and_can_be_run_again() {
        let dir = tempfile::tempdir().unwrap();
        let (data, space) = (dir.path().join("data"), dir.path().join("space"));
        let first = Directory::claim(&data, &marker(&[&space]), None).unwrap();
        fs::create_dir(data.join("global")).unwrap();
        fs::write(data.join("PG_VERSION"), "15").unwrap();
        fs::write(space.join("left"), "x").unwrap();

        let error = Directory::claim(&data, &marker(&[&space]), None).unwrap_err();
        assert!(error.message().contains("another restore"), "{error}");
        drop(first);

        let again = Directory::claim(&data, &marker(&[&space]), None).unwrap();
        assert!(!data.join("PG_VERSION").exists() && !space.join("left").exists());
        drop(again);

        // Interrupted between filling the marker with pg_control and renaming it.
        let mut again = Directory::claim(&data, &marker(&[&space]), None).unwrap();
        fs::create_dir(data.join("pg_wal")).unwrap();
        fs::write(space.join("left"), "x").unwrap();
        again.keep_last_words().unwrap();
        again.fill_marker(&[0xff; 8192]).unwrap();
        drop(again);
        let again = Directory::claim(&data, &marker(&[&space]), None).unwrap();
        assert!(!space.join("left").exists() && !data.join("pg_wal").exists());
        for folder in ["global", "pg_wal"] {
            fs::create_dir(data.join(folder)).unwrap();
        }
        assert!(!data.join(CONTROL_FILE).exists());
        again.finish(b"control", 0o600).unwrap();
        assert_eq!(fs::read(data.join(CONTROL_FILE)).unwrap(), b"control");
        assert!(!data.join(MARKER).exists());
        // Nothing of ours stays.
        for folder in [&space, &data.join("pg_wal")] {
            assert_eq!(fs::read_dir(folder).unwrap().count(), 0, "{}", folder.display());
        }

        // Complete now: never cleared again.
        let error = Directory::claim(&data, &marker(&[]), None).unwrap_err();
        assert!(error.message().contains("not empty"), "{error}");
    }

    #[test]
    fn a_marker_beside_a_control_file_is_not_taken_for_an_interrupted_restore() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("global")).unwrap();
        fs::write(dir.path().join(CONTROL_FILE), "x").unwrap();
        fs::write(dir.path().join(MARKER), "{}").unwrap();
        let error = Directory::claim(dir.path(), &marker(&[]), None).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
        assert!(dir.path().join(CONTROL_FILE).exists());
    }

    #[test]
    fn tablespaces_are_mapped_by_their_old_place() {
        let mapping: TablespaceMapping = r"/old\=x/=/new".parse().unwrap();
        assert_eq!(mapping, TablespaceMapping { old: "/old=x".into(), new: "/new".into() });
        for bad in ["/a", "a=/b", "/a=b", "/a=/b=/c", ""] {
            assert!(bad.parse::<TablespaceMapping>().is_err(), "{bad}");
        }
        let spaces = [(16400, PathBuf::from("/old=x")), (16401, PathBuf::from("/other"))];
        let places = map_tablespaces(&spaces, std::slice::from_ref(&mapping)).unwrap();
        assert_eq!(places[0].new, Path::new("/new"));
        assert_eq!(places[1].new, Path::new("/other"));
        let error = map_tablespaces(&[], &[mapping]).unwrap_err();
        assert!(error.hint_text().unwrap().contains("no tablespaces"));
        let both: Vec<TablespaceMapping> =
            ["/old\\=x=/n", "/other=/n"].iter().map(|text| text.parse().unwrap()).collect();
        assert!(map_tablespaces(&spaces, &both).is_err());
    }

    #[test]
    fn the_owner_may_be_numbers_or_names() {
        assert_eq!(Owner::parse("12:34").unwrap(), Owner { uid: 12, gid: 34 });
        assert_eq!(Owner::parse("root").unwrap(), Owner { uid: 0, gid: 0 });
        assert_eq!(Owner::parse("no-such-user").unwrap_err().kind(), Kind::Usage);
    }
}
