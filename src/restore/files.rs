//! The files of a base backup, from packs to their places.
//!
//! Packs are taken one after the other; of each the footer first, then its frames by a few long ranged
//! GETs at once, each read a batch at a time. Worker threads open and decompress the batches and write
//! each block to its place.
//!
//! # Shape
//! Memory is the [`Budget`] of a restore: a batch of each request, a block for each thread, the
//! footers of the pack being written and of the next, and the [`Cover`]s of files that are not whole yet.
//! It does not grow with the number or size of files.
//!
//! Every request outlasts an outage of the store of minutes: a restore that gave up would begin anew.
//!
//! # Invariants
//! - Every byte of every file is written once: blocks by their place, zeros by leaving a hole. When a
//!   file is whole its CRC is compared with the one of the backup; a file that never becomes whole fails
//!   the restore.
//! - `global/pg_control` is not written here but handed back, for it is the last file of a restore.
//! - No link is made but those of tablespaces, and no name leads out of the data directory.
//! - What is being filled can be written to by its owner, whatever its mode will be: a file gets that
//!   when it is whole, a directory when all of the restore is there ([`DirectoryModes`]).
//!
//! # Durability
//! Nothing here is synced; [`Directory::finish`] writes out whole file systems, or every file, before the
//! directory becomes startable.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{StreamExt as _, TryStreamExt as _};

use crate::error::{Context, Error, Kind, Result};
use crate::pg::backup_manifest::{BACKUP_MANIFEST, BackupManifest, ManifestFile};
use crate::pg::control::{PG_CONTROL_FILE_SIZE, XLOG_CONTROL_FILE};
use crate::pg::crc::crc32c;
use crate::pg::{LsnRange, TimelineId, Version};
use crate::repo::patience::{Outage, insist};
use crate::repo::reader::{Check, Run};
use crate::repo::{
    Budget, Entry, EntryKind, FetchedBatch, FilePath, FrameBatch, FrameRecord, Level, Manifest,
    PackFooter, PackHandle, PackName, PackSummary, Pool, PoolOptions, Reader,
};

use super::cover::Cover;
use super::directory::{Directory, Owner, TablespacePlace};
use super::progress::Progress;

/// Written by the server for `pg_basebackup`'s tar format; recovery would make links as they were on the
/// server from it. We make the links ourselves.
const TABLESPACE_MAP: &str = "tablespace_map";
/// Files of a standby that must not decide how the restored cluster starts, made anew when wanted.
const SIGNAL_FILES: [&str; 2] = ["standby.signal", "recovery.signal"];
/// Where links to tablespaces are.
const TABLESPACE_LINKS: &str = "pg_tblspc";
/// Entries whose files are made in one job.
const ENTRIES_PER_JOB: usize = 512;
/// A request for less of a pack than this costs more than its bytes.
const RUN_BYTES_MIN: u64 = 16 << 20;
/// Files that may be written at the same time, if their hashes differ: more than there are threads.
const TURNS: usize = 32;
/// Text of the `backup_manifest` collected before it is written.
const MANIFEST_TEXT_BYTES: usize = 256 << 10;

/// Files are written to, never what a link in the place of one leads to.
const NO_LINK: i32 = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
/// Mode bits that a file has until it is whole: its blocks come one by one.
const FILLED_FILE_MODE: u32 = 0o600;
/// Mode bits that a directory has until everything is there.
const FILLED_DIRECTORY_MODE: u32 = 0o700;

/// What the files of a backup came to.
#[derive(Debug)]
pub(crate) struct RestoredFiles {
    /// Content of `global/pg_control`.
    pub(crate) control: Vec<u8>,
    /// Its mode.
    pub(crate) control_mode: u32,
    /// What is left to be done with directories.
    pub(crate) directory_modes: DirectoryModes,
    /// Regular files.
    pub(crate) file_count: u64,
    /// Bytes of them.
    pub(crate) plain_bytes: u64,
}

/// The directories whose mode could not be set yet: those that it keeps us out of, or that have a special
/// bit. They are few, as a database's own are open to their owner and have none.
#[derive(Debug, Default)]
pub(crate) struct DirectoryModes(Vec<(PathBuf, u32)>);

impl DirectoryModes {
    /// Sets them; after that nothing more can be written to some of these directories.
    ///
    /// # Errors
    /// As the file system says.
    pub(crate) fn set(&self) -> Result<()> {
        // A directory comes after the one it is in, which may let nobody pass any more.
        self.0.iter().rev().try_for_each(|(path, mode)| set_mode(path, *mode))
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .context(|| format!("unable to set the mode of '{}'", path.display()))
}

/// The files of one backup and where they go.
#[derive(Clone, Copy)]
pub(crate) struct Files<'a> {
    pub(crate) reader: &'a Reader,
    pub(crate) manifest: &'a Manifest,
    pub(crate) directory: &'a Directory,
    pub(crate) places: &'a [TablespacePlace],
    pub(crate) budget: &'a Budget,
    pub(crate) progress: &'a Arc<Progress>,
}

/// Writes all files into the directory, links its tablespaces, and writes the `backup_manifest`.
///
/// # Errors
/// `corrupt` for damage in the backup, naming object or file; what store and file system report.
pub(crate) async fn restore(files: Files<'_>) -> Result<RestoredFiles> {
    let Files { reader, manifest, directory, places, budget, progress } = files;
    let tree = Arc::new(Tree::new(directory, progress)?);
    tree.link_tablespaces(places)?;
    let pool = Pool::start(&PoolOptions {
        name: "tm-restore",
        thread_count: budget.thread_count,
        jobs_max: budget.thread_count + budget.batches_max,
        level: Level::default(),
    })?;
    let mut list = FileList::begin(manifest, directory)?;
    let backup = manifest.public.id;
    let footers = futures::stream::iter(manifest.packs.clone())
        .map(|summary| open_pack(reader, PackName { backup, number: summary.number }, summary))
        .buffered(2);
    let mut footers = std::pin::pin!(footers);
    while let Some(pack) = footers.next().await {
        let pack = Arc::new(pack?);
        restore_pack(reader, &pool, &tree, &pack, budget).await?;
        for entry in &pack.footer.entries {
            list.add(entry)?;
        }
    }
    tree.finish()?;
    let wal = backup_wal(manifest);
    let (file_count, plain_bytes) = list.finish(&wal)?;
    let control = tree.control.lock().unwrap_or_else(PoisonError::into_inner).take();
    let (control, control_mode) = control.ok_or_else(|| {
        Error::new(
            Kind::Corrupt,
            format!("unable to restore backup '{backup}': it has no '{XLOG_CONTROL_FILE}'"),
        )
    })?;
    let directory_modes =
        std::mem::take(&mut *tree.directory_modes.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(RestoredFiles { control, control_mode, directory_modes, file_count, plain_bytes })
}

/// The WAL that a restore of the backup needs to be consistent, as its `backup_manifest` lists it.
fn backup_wal(manifest: &Manifest) -> Vec<(TimelineId, LsnRange)> {
    let public = &manifest.public;
    // Where a backup that outlived a promotion changed timeline is not known here; then no range is
    // named, and pg_verifybackup parses no WAL.
    let range = LsnRange::new(public.start_lsn, public.end_lsn);
    let range = range.filter(|_| public.timeline == public.end_timeline);
    range.map(|range| (public.timeline, range)).into_iter().collect()
}

/// A pack whose footer was read.
struct OpenPack {
    footer: PackFooter,
    /// Source 0 is the pack itself.
    sources: Vec<PackHandle>,
}

async fn open_pack(reader: &Reader, name: PackName, summary: PackSummary) -> Result<OpenPack> {
    let clock = reader.repository().clock();
    let handle = insist(clock, || reader.pack(name)).await?;
    let (place, bytes) = (summary.footer, summary.stored_bytes);
    let footer = insist(clock, || reader.pack_footer(&handle, bytes, place)).await?;
    let mut sources = vec![handle];
    for source in &footer.sources {
        sources.push(insist(clock, || reader.pack(*source)).await?);
    }
    Ok(OpenPack { footer, sources })
}

async fn restore_pack(
    reader: &Reader,
    pool: &Pool,
    tree: &Arc<Tree>,
    pack: &Arc<OpenPack>,
    budget: &Budget,
) -> Result<()> {
    // Directories first, so that they have their modes and not those of one made for a file.
    tree.make_directories(&pack.footer)?;
    let count = pack.footer.entries.len();
    let jobs = (0..count).step_by(ENTRIES_PER_JOB).map(|from| {
        let (tree, pack) = (Arc::clone(tree), Arc::clone(pack));
        pool.run(move |_| {
            let upto = (from + ENTRIES_PER_JOB).min(count);
            let entries = pack.footer.entries.get(from..upto).unwrap_or_default();
            entries.iter().try_for_each(|entry| tree.make_file(entry))
        })
    });
    let mut jobs = futures::stream::iter(jobs).buffer_unordered(pool.thread_count());
    while let Some(made) = jobs.next().await {
        made??;
    }
    for run in &pack.footer.zero_runs {
        if let Some(entry) = pack.footer.entries.get(run.entry as usize) {
            tree.note_zeros(entry, run.file_offset, run.bytes)?;
        }
    }
    let batches = FrameBatch::plan(&pack.footer, budget.batch_bytes, |_| true);
    // As many requests as are read at a time, so that all end with the pack.
    let bytes: u64 = batches.iter().map(|batch| batch.range.end - batch.range.start).sum();
    let even_bytes = bytes.div_ceil(budget.batches_max as u64) + budget.batch_bytes as u64;
    let runs = FrameBatch::runs(batches, even_bytes.max(RUN_BYTES_MIN));
    futures::stream::iter(runs.into_iter().map(Ok))
        .try_for_each_concurrent(budget.batches_max, |run| {
            restore_run(reader, pool, tree, pack, run)
        })
        .await
}

/// Writes batches that lie side by side: while one is opened, the connection gathers the next.
async fn restore_run(
    reader: &Reader,
    pool: &Pool,
    tree: &Arc<Tree>,
    pack: &Arc<OpenPack>,
    run: Vec<FrameBatch>,
) -> Result<()> {
    let number = run.first().map_or(0, |batch| batch.source);
    let source = pack.sources.get(number as usize).ok_or_else(|| {
        Error::new(Kind::Bug, format!("a batch of source {number} that no footer names"))
    })?;
    let mut run = RunOutlasting { reader, source, unread: run.into(), open: None };
    while let Some(fetched) = run.next().await? {
        let (tree, pack) = (Arc::clone(tree), Arc::clone(pack));
        pool.run(move |worker| {
            fetched.open(&pack.footer, Check::Tags, worker, |frame, block| {
                tree.write_block(&pack.footer, frame, block)
            })
        })
        .await??;
    }
    Ok(())
}

/// Batches that lie side by side, read by one request; where that breaks off, by another one from the first
/// batch on that was not read.
struct RunOutlasting<'a> {
    reader: &'a Reader,
    source: &'a PackHandle,
    unread: VecDeque<FrameBatch>,
    open: Option<Run<'a>>,
}

impl RunOutlasting<'_> {
    /// The next batch, `None` after the last.
    async fn next(&mut self) -> Result<Option<FetchedBatch>> {
        let mut outage = Outage::new(self.reader.repository().clock());
        loop {
            match self.try_next().await {
                Err(error) => {
                    self.open = None;
                    outage.outlast(error).await?;
                }
                read => return read,
            }
        }
    }

    async fn try_next(&mut self) -> Result<Option<FetchedBatch>> {
        if self.unread.is_empty() {
            return Ok(None);
        }
        let run = match &mut self.open {
            Some(run) => run,
            None => {
                let batches = self.unread.iter().cloned().collect();
                self.open.insert(self.reader.read_run(self.source, batches).await?)
            }
        };
        let fetched = run.next().await?;
        self.unread.pop_front();
        Ok(fetched)
    }
}

/// What is known of a file that is not whole yet.
#[derive(Debug, Default)]
struct Pending {
    cover: Cover,
    size_bytes: u64,
    crc32c: Option<u32>,
    /// Permission bits that it gets when it is whole.
    mode: u32,
}

/// The files being written.
#[derive(Debug)]
struct Tree {
    root: PathBuf,
    owner: Option<Owner>,
    progress: Arc<Progress>,
    /// Files that are not whole yet.
    pending: Mutex<HashMap<FilePath, Pending>>,
    /// Content and mode of `global/pg_control`.
    control: Mutex<Option<(Vec<u8>, u32)>>,
    directory_modes: Mutex<DirectoryModes>,
    /// One for all files whose path has the same hash.
    turns: [Mutex<()>; TURNS],
    /// Worker threads finish the block they are at even when the restore was dropped.
    _lock: fs::File,
}

impl Tree {
    fn new(directory: &Directory, progress: &Arc<Progress>) -> Result<Self> {
        Ok(Self {
            root: directory.path().to_path_buf(),
            owner: directory.owner(),
            progress: Arc::clone(progress),
            pending: Mutex::default(),
            control: Mutex::default(),
            directory_modes: Mutex::default(),
            turns: Default::default(),
            _lock: directory.hold()?,
        })
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<FilePath, Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place_of(&self, path: &FilePath) -> PathBuf {
        self.root.join(std::ffi::OsStr::from_bytes(path.as_bytes()))
    }

    fn give(&self, path: &Path) -> Result<()> {
        self.owner.map_or(Ok(()), |owner| owner.give(path))
    }

    /// Makes `pg_tblspc/<oid>` for every tablespace: a link to its place, or a directory for one inside
    /// the data directory.
    fn link_tablespaces(&self, places: &[TablespacePlace]) -> Result<()> {
        let links = self.root.join(TABLESPACE_LINKS);
        self.make_directory(&links)?;
        for place in places {
            let link = links.join(place.oid.to_string());
            if place.new.is_absolute() {
                std::os::unix::fs::symlink(&place.new, &link)
                    .context(|| format!("unable to make the link '{}'", link.display()))?;
                self.give(&link)?;
            } else {
                self.make_directory(&link)?;
            }
        }
        Ok(())
    }

    /// Makes a directory, and those above it, unless it is there.
    fn make_directory(&self, path: &Path) -> Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent().filter(|parent| parent.starts_with(&self.root)) {
            self.make_directory(parent)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            // Two threads may make the directory of two files.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
            other => other,
        }
        .context(|| format!("unable to make directory '{}'", path.display()))?;
        self.give(path)
    }

    fn make_directories(&self, footer: &PackFooter) -> Result<()> {
        let directories =
            footer.entries.iter().filter(|entry| matches!(entry.kind, EntryKind::Directory));
        for entry in directories {
            let path = self.place_of(&entry.path);
            self.make_directory(&path)?;
            let mode = entry.mode & 0o7777;
            let while_filled = mode & 0o777 | FILLED_DIRECTORY_MODE;
            set_mode(&path, while_filled)?;
            if mode != while_filled {
                let mut later = self.directory_modes.lock().unwrap_or_else(PoisonError::into_inner);
                later.0.push((path, mode));
            }
        }
        Ok(())
    }

    /// Makes the file with its size, so that what nothing is written to is zero; a file that an earlier
    /// pack began is left as it is. One that is not empty stays open to its owner until it is whole.
    fn make_file(&self, entry: &Entry) -> Result<()> {
        let EntryKind::File { size_bytes, crc32c } = &entry.kind else {
            return self.check_link(entry);
        };
        if is_left_out(&entry.path) {
            return Ok(());
        }
        if self.note_file(entry, *size_bytes, *crc32c)? || is_control(&entry.path) {
            return Ok(());
        }
        let path = self.place_of(&entry.path);
        let attempted = || format!("unable to write '{}'", path.display());
        if let Some(parent) = path.parent() {
            self.make_directory(parent)?;
        }
        let mut options = OpenOptions::new();
        let file =
            options.write(true).create_new(true).mode(0o600).open(&path).context(attempted)?;
        file.set_len(*size_bytes).context(attempted)?;
        let filled = if *size_bytes > 0 { FILLED_FILE_MODE } else { 0 };
        let mode = entry.mode & 0o777 | filled;
        file.set_permissions(Permissions::from_mode(mode)).context(attempted)?;
        if let Some(Owner { uid, gid }) = self.owner {
            std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).context(attempted)?;
        }
        Ok(())
    }

    /// PostgreSQL sends no links but those of tablespaces, which are made from the manifest.
    fn check_link(&self, entry: &Entry) -> Result<()> {
        let of_tablespace = entry.path.as_bytes().starts_with(b"pg_tblspc/");
        if matches!(entry.kind, EntryKind::Symlink { .. }) && !of_tablespace {
            let message = format!("unable to restore '{}': it is a symbolic link", entry.path);
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(())
    }

    /// Notes size and CRC of a file; whether an earlier pack has begun it.
    fn note_file(&self, entry: &Entry, size_bytes: u64, crc32c: Option<u32>) -> Result<bool> {
        if is_control(&entry.path) {
            if size_bytes != PG_CONTROL_FILE_SIZE as u64 {
                let message = format!("'{XLOG_CONTROL_FILE}' in the backup has {size_bytes} bytes");
                return Err(Error::new(Kind::Corrupt, message));
            }
            let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
            control.get_or_insert_with(|| (vec![0; PG_CONTROL_FILE_SIZE], entry.mode));
        }
        let mut pending = self.pending();
        let begun = pending.contains_key(&entry.path);
        let file = pending.entry(entry.path.clone()).or_default();
        if begun && file.size_bytes != size_bytes {
            let message = format!("two packs give '{}' different sizes", entry.path);
            return Err(Error::new(Kind::Corrupt, message));
        }
        file.size_bytes = size_bytes;
        file.mode = entry.mode & 0o777;
        file.crc32c = file.crc32c.or(crc32c);
        // Of a file that is not empty some byte is still to come, from this pack or a later one.
        if size_bytes == 0 {
            settle(&mut pending, &entry.path)?;
        }
        Ok(begun)
    }

    fn note_zeros(&self, entry: &Entry, offset: u64, bytes: u64) -> Result<()> {
        if is_left_out(&entry.path) {
            return Ok(());
        }
        self.progress.add_written(bytes);
        self.note(&entry.path, |cover| cover.add_zeros(offset, bytes))
    }

    fn note(&self, path: &FilePath, add: impl FnOnce(&mut Cover) -> Result<()>) -> Result<()> {
        let mut pending = self.pending();
        let file = pending.get_mut(path).ok_or_else(|| {
            let message = format!("unable to restore '{path}': more of it comes than its size");
            Error::new(Kind::Corrupt, message)
        })?;
        add(&mut file.cover).context(|| format!("unable to restore '{path}'"))?;
        let settled = settle(&mut pending, path)?;
        drop(pending);
        match settled.map(|file| file.mode) {
            Some(mode) if mode | FILLED_FILE_MODE != mode && !is_control(path) => {
                set_mode(&self.place_of(path), mode)
            }
            _ => Ok(()),
        }
    }

    /// Writes a plain block: each span to its place.
    fn write_block(&self, footer: &PackFooter, frame: &FrameRecord, block: &[u8]) -> Result<()> {
        let mut rest = block;
        for span in &frame.spans {
            let entry = footer.entries.get(span.entry as usize);
            let split = rest.split_at_checked(span.bytes as usize);
            let (Some(entry), Some((bytes, after))) = (entry, split) else {
                return Err(Error::new(
                    Kind::Bug,
                    "a frame whose spans do not fill it was decoded",
                ));
            };
            rest = after;
            if is_left_out(&entry.path) {
                continue;
            }
            self.write(&entry.path, span.file_offset, bytes)?;
            self.progress.add_written(u64::from(span.bytes));
            let (offset, length) = (span.file_offset, u64::from(span.bytes));
            self.note(&entry.path, |cover| cover.add(offset, length, crc32c(bytes)))?;
        }
        Ok(())
    }

    fn write(&self, path: &FilePath, offset: u64, bytes: &[u8]) -> Result<()> {
        if is_control(path) {
            let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let place = control
                .as_mut()
                .and_then(|(content, _)| content.get_mut(start..start.checked_add(bytes.len())?));
            return place.map(|place| place.copy_from_slice(bytes)).ok_or_else(|| {
                Error::new(Kind::Corrupt, format!("'{path}' has bytes past its end"))
            });
        }
        let place = self.place_of(path);
        let attempted = || format!("unable to write '{}' at byte {offset}", place.display());
        let mut options = OpenOptions::new();
        let file = options.write(true).custom_flags(NO_LINK).open(&place).context(attempted)?;
        let _turn = self.turn_at(path);
        file.write_all_at(bytes, offset).context(attempted)
    }

    /// Waits until no other thread writes to the file. The kernel lets only one in as well, but those
    /// that wait for it there burn their processor meanwhile (`rwsem_spin_on_owner`).
    fn turn_at(&self, path: &FilePath) -> Option<MutexGuard<'_, ()>> {
        let mut hasher = DefaultHasher::new();
        path.as_bytes().hash(&mut hasher);
        let [number, ..] = hasher.finish().to_le_bytes();
        let turn = self.turns.get(usize::from(number) % self.turns.len())?;
        Some(turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Checks that no file is left unfinished.
    fn finish(&self) -> Result<()> {
        let pending = self.pending();
        let Some((path, file)) = pending.iter().next() else { return Ok(()) };
        let missing = file.cover.check(file.size_bytes, file.crc32c.unwrap_or(0)).err();
        let why = missing.map_or_else(|| "its CRC is in no pack".to_owned(), |e| e.to_string());
        Err(Error::new(Kind::Corrupt, format!("unable to restore '{path}': {why}")))
    }
}

/// Checks a file that has become whole, and gives it to be forgotten.
fn settle(pending: &mut HashMap<FilePath, Pending>, path: &FilePath) -> Result<Option<Pending>> {
    let Some(file) = pending.get(path) else { return Ok(None) };
    let Some(crc32c) = file.crc32c.filter(|_| file.cover.is_whole(file.size_bytes)) else {
        return Ok(None);
    };
    file.cover.check(file.size_bytes, crc32c).context(|| format!("unable to restore '{path}'"))?;
    Ok(pending.remove(path))
}

fn is_control(path: &FilePath) -> bool {
    path.as_bytes() == XLOG_CONTROL_FILE.as_bytes()
}

/// Files of a backup that a restore does not write.
fn is_left_out(path: &FilePath) -> bool {
    let name = path.as_bytes();
    name == TABLESPACE_MAP.as_bytes()
        || name == BACKUP_MANIFEST.as_bytes()
        || SIGNAL_FILES.iter().any(|signal| name == signal.as_bytes())
}

/// The `backup_manifest` in the making.
struct FileList {
    manifest: BackupManifest,
    file: fs::File,
    path: PathBuf,
    unwritten_count: usize,
    file_count: u64,
    plain_bytes: u64,
}

impl FileList {
    fn begin(manifest: &Manifest, directory: &Directory) -> Result<Self> {
        let path = directory.path().join(BACKUP_MANIFEST);
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .context(|| format!("unable to create '{}'", path.display()))?;
        directory.owner().map_or(Ok(()), |owner| owner.give(&path))?;
        let version = Version::from_server_version_num(manifest.public.postgres_version_num)?;
        let manifest = BackupManifest::new(version, manifest.public.system_id);
        Ok(Self { manifest, file, path, unwritten_count: 0, file_count: 0, plain_bytes: 0 })
    }

    /// Lists a file that ends in the pack of `entry`.
    fn add(&mut self, entry: &Entry) -> Result<()> {
        let EntryKind::File { size_bytes, crc32c: Some(crc32c) } = entry.kind else {
            return Ok(());
        };
        if is_left_out(&entry.path) {
            return Ok(());
        }
        self.file_count += 1;
        self.plain_bytes += size_bytes;
        self.manifest.file(&ManifestFile {
            path: entry.path.as_bytes(),
            size_bytes,
            modified: jiff::Timestamp::from_second(entry.mtime).unwrap_or_default(),
            crc32c: Some(crc32c),
        });
        self.unwritten_count += 1;
        // Around 200 bytes a file.
        if self.unwritten_count * 200 >= MANIFEST_TEXT_BYTES {
            self.unwritten_count = 0;
            let text = self.manifest.take();
            self.write(&text)?;
        }
        Ok(())
    }

    fn write(&mut self, text: &[u8]) -> Result<()> {
        use std::io::Write as _;
        self.file.write_all(text).context(|| format!("unable to write '{}'", self.path.display()))
    }

    /// Ends the manifest; how many files it lists, and their bytes.
    fn finish(mut self, wal: &[(TimelineId, LsnRange)]) -> Result<(u64, u64)> {
        use std::io::Write as _;
        let text = self.manifest.finish(wal);
        self.file
            .write_all(&text)
            .context(|| format!("unable to write '{}'", self.path.display()))?;
        Ok((self.file_count, self.plain_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::pg::{Lsn, SegmentSize};
    use crate::repo::packing::NoInspection;
    use crate::repo::{
        BackupId, BackupWriter, Encryption, FileMeta, ManifestFacts, PackOptions, Repository, Span,
    };
    use crate::restore::directory::{Marker, Token};
    use crate::store::memory::{Faults, Memory};

    const SMALL: Budget = Budget {
        thread_count: 2,
        part_bytes: 5 << 20,
        parts_max: 4,
        blocks_max: 4,
        extent_bytes_cut: 0,
        extent_bytes_in_flight: 0,
        extent_bytes_held: 0,
        batch_bytes: 1 << 20,
        batches_max: 2,
    };

    async fn put(backup: &mut BackupWriter, path: &str, content: Vec<u8>) {
        let (path, size_bytes) = (FilePath::new(path).unwrap(), content.len() as u64);
        backup.begin_file(FileMeta { path, mode: 0o600, mtime: 0, size_bytes }).await.unwrap();
        backup.write(content.into()).await.unwrap();
        backup.end_file().await.unwrap();
    }

    /// A backup with a file of these bytes.
    async fn backed_up(content: &[u8]) -> (Memory, Reader, Manifest) {
        let clock = Clock::simulated("2026-11-22T10:00:00Z".parse().unwrap(), 3);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let writer = repository.writer(&Encryption::None).await.unwrap();
        let time = "2026-11-22T10:00:00Z".parse().unwrap();
        let id = BackupId::new(time, TimelineId::FIRST, Lsn(0x200_0028));
        let pack_bytes = 512 << 20;
        let options = PackOptions { budget: SMALL, level: Level::default(), pack_bytes };
        let mut backup = writer.backup(id, options, Arc::new(NoInspection)).unwrap();
        put(&mut backup, "base/1/2", content.to_vec()).await;
        put(&mut backup, XLOG_CONTROL_FILE, vec![1; PG_CONTROL_FILE_SIZE]).await;
        let facts = ManifestFacts {
            postgres_version_num: 150_004,
            segment_size: SegmentSize::DEFAULT,
            end_timeline: TimelineId::FIRST,
            end_lsn: Lsn(0x200_0100),
            start_time: time,
            end_time: time,
            tablespaces: Vec::new(),
            settings: std::collections::BTreeMap::new(),
        };
        let manifest = backup.finish_packs().await.unwrap().commit(facts).await.unwrap();
        (memory, repository.reader(Vec::new()), manifest)
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_fail_for_a_while_cost_nothing_but_time() {
        // Bytes that do not compress.
        let mut content = vec![0; 12 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut content);
        let (memory, reader, manifest) = backed_up(&content).await;
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("data");
        let directory = Directory::claim(&root, &marker(), None).unwrap();
        let progress = Arc::default();
        memory.set_faults(Faults { seed: 5, before_ppm: 500_000, ..Faults::default() });
        let (places, budget) = (&[], &SMALL);
        let (manifest, directory, progress) = (&manifest, &directory, &progress);
        let files = Files { reader: &reader, manifest, directory, places, budget, progress };
        let restored = restore(files).await.unwrap();
        assert_eq!((restored.file_count, restored.control[0]), (2, 1));
        assert!(fs::read(root.join("base/1/2")).unwrap() == content);
    }

    fn marker() -> Marker {
        Marker::new("main", "b", &[], Token::draw(&Clock::system()).unwrap())
    }

    fn mode_of(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn entry(path: &str, mode: u32, kind: EntryKind) -> Entry {
        Entry { path: FilePath::new(path).unwrap(), mode, mtime: 0, kind }
    }

    fn file(path: &str, mode: u32, content: &[u8]) -> Entry {
        let (size_bytes, crc32c) = (content.len() as u64, Some(crc32c(content)));
        entry(path, mode, EntryKind::File { size_bytes, crc32c })
    }

    #[test]
    fn modes_that_forbid_writing_are_set_when_all_is_written() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("data");
        let claimed = Directory::claim(&root, &marker(), None).unwrap();
        let tree = Tree::new(&claimed, &Arc::default()).unwrap();
        let directory = |path, mode| entry(path, mode, EntryKind::Directory);
        let footer = PackFooter {
            entries: vec![
                directory("closed", 0o500),
                directory("closed/special", 0o3750),
                file("closed/server.key", 0o400, b"k"),
                file("closed/special/empty", 0o440, b""),
                file("zeros", 0o444, &[0; 8]),
                file("ordinary", 0o640, b"o"),
            ],
            ..PackFooter::default()
        };
        tree.make_directories(&footer).unwrap();
        footer.entries.iter().for_each(|entry| match entry.kind {
            EntryKind::Directory => {}
            _ => tree.make_file(entry).unwrap(),
        });
        let mode = |path: &str| mode_of(&root.join(path));
        assert_eq!(mode("closed/server.key"), 0o600);
        assert_eq!((mode("closed/special/empty"), mode("zeros")), (0o440, 0o644));
        assert_eq!((mode("closed"), mode("closed/special")), (0o700, 0o750));

        let span = |entry| Span { entry, file_offset: 0, bytes: 1 };
        let frame = FrameRecord {
            source: 0,
            offset: 0,
            frame_bytes: 0,
            plain_bytes: 2,
            index: 0,
            hash: [0; 16],
            spans: vec![span(2), span(5)],
        };
        tree.write_block(&footer, &frame, b"ko").unwrap();
        tree.note_zeros(&footer.entries[4], 0, 8).unwrap();
        tree.finish().unwrap();
        assert_eq!(fs::read(root.join("closed/server.key")).unwrap(), b"k");
        assert_eq!((mode("closed/server.key"), mode("zeros")), (0o400, 0o444));
        assert_eq!((mode("ordinary"), mode("closed")), (0o640, 0o700));
        tree.directory_modes.lock().unwrap().set().unwrap();
        assert_eq!((mode("closed"), mode("closed/special")), (0o500, 0o3750));
    }
}
