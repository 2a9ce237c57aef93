//! A store in a directory: a mounted disk, NFS, or a test's temporary folder.
//!
//! # Shape
//! An object is a file of its name below the root. The root's own `.incoming` holds files in the
//! making and `.lock` serialises replacements; both begin with a dot, as no object's name can.
//!
//! # Durability
//! An object is written to `.incoming`, fsynced, then given its name by a rename that refuses to
//! replace (`renameat2` with `RENAME_NOREPLACE`, else `link`), then the folder is fsynced, and every
//! folder above it that we have not seen durable. So at every instant a name is absent or whole, and
//! when a put returns both the bytes and the name survive a crash. Whoever finds an object in its way
//! fsyncs the folder too before it says so: the winner may not have got that far. So does
//! [`Store::make_durable`] for whoever finds objects by listing them. A crash leaves files
//! in `.incoming` only; each is locked by its owner while that lives, and swept by
//! [`Store::abort_stale_multiparts`] when nobody holds the lock.
//!
//! # Cancel safety
//! The work happens on blocking threads and goes on when its future is dropped.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use rustix::fs::{FileType, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, futimens};

use super::{
    Capabilities, Latencies, ListPage, Multipart, ObjectInfo, ObjectName, PutOutcome, Replace,
    RequestCounts, Requests, Store, VersionTag, checked_range, folder_prefix, probe,
};
use crate::clock::{Clock, Instant};
use crate::error::{Context, Error, Kind, Result};

mod incoming;
mod multipart;
mod root;
mod walk;

use incoming::Incoming;
use root::{FolderId, Opened, Root};

/// Objects on one page of a listing: large, because every page reads the folder anew.
const PAGE_OBJECTS: usize = 50_000;

/// Longest wait for another process that replaces the lease.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(10);

/// File below the root whose lock serialises replacements.
const LOCK_FILE: &str = ".lock";

/// Who may enter the folders that we make.
const FOLDER_MODE: u32 = 0o750;

/// Folders remembered as durable before the memory is emptied.
const DURABLE_FOLDERS_MAX: usize = 4096;

/// Objects as files below a root.
#[derive(Debug)]
pub struct Directory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: Root,
    clock: Clock,
    requests: Requests,
    latencies: Latencies,
    /// Folders whose own entry is known to be durable.
    durable: Mutex<HashMap<PathBuf, FolderId>>,
}

impl Directory {
    /// The store below `root`, which the first put makes if it is missing.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>, clock: &Clock) -> Self {
        Self(Arc::new(Inner {
            root: Root::new(root.into()),
            clock: clock.clone(),
            requests: Requests::default(),
            latencies: Latencies::default(),
            durable: Mutex::new(HashMap::new()),
        }))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Inner>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.0);
        blocking(move || work(&inner).map_err(|error| inner.root.explain(error))).await
    }
}

/// Runs file system calls where they cannot hold up the runtime.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Error::new(Kind::Cancelled, "the runtime is shutting down")),
    }
}

#[async_trait]
impl Store for Directory {
    fn describe(&self) -> String {
        self.0.root.path().display().to_string()
    }

    async fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome> {
        self.0.requests.puts.one();
        self.0.requests.sent_bytes.add(body.len() as u64);
        let name = name.clone();
        self.blocking(move |inner| {
            inner.put(&name, &body).context(|| format!("unable to write object '{name}'"))
        })
        .await
    }

    async fn begin_multipart(&self, name: &ObjectName) -> Result<Box<dyn Multipart>> {
        self.0.requests.multipart_begins.one();
        let name = name.clone();
        self.blocking(move |inner| {
            let begun = multipart::DirectoryMultipart::begin(Arc::clone(inner), name)?;
            Ok(Box::new(begun) as Box<dyn Multipart>)
        })
        .await
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        self.0.requests.gets.one();
        let name = name.clone();
        let bytes = self.blocking(move |inner| inner.get(&name, range)).await?;
        self.0.requests.received_bytes.add(bytes.len() as u64);
        Ok(bytes)
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<ObjectInfo>> {
        self.0.requests.heads.one();
        let name = name.clone();
        self.blocking(move |inner| inner.head(name)).await
    }

    async fn list(&self, prefix: &str, after: Option<&ObjectName>) -> Result<ListPage> {
        self.0.requests.lists.one();
        let (prefix, after) = (prefix.to_owned(), after.cloned());
        self.blocking(move |inner| match inner.root.open()? {
            Some(root) => walk::page(&root, &prefix, after.as_ref(), PAGE_OBJECTS),
            None => Ok(ListPage { objects: Vec::new(), more: false }),
        })
        .await
    }

    async fn make_durable(&self, folder: &str) -> Result<()> {
        let folder = folder_prefix(folder);
        self.blocking(move |inner| inner.make_all_durable(folder)).await
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<()> {
        self.0.requests.deletes.one();
        let names = names.to_vec();
        self.blocking(move |inner| inner.delete(&names)).await
    }

    async fn read_versioned(&self, name: &ObjectName) -> Result<Option<(Bytes, VersionTag)>> {
        self.0.requests.gets.one();
        let name = name.clone();
        self.blocking(move |inner| {
            Ok(inner.get_if_there(&name)?.map(|body| {
                let tag = tag_of(&body);
                (body, tag)
            }))
        })
        .await
    }

    async fn replace_if(
        &self,
        name: &ObjectName,
        body: Bytes,
        expected: Option<VersionTag>,
    ) -> Result<Replace> {
        self.0.requests.puts.one();
        self.0.requests.sent_bytes.add(body.len() as u64);
        let name = name.clone();
        self.blocking(move |inner| {
            inner
                .replace(&name, &body, expected.as_ref())
                .context(|| format!("unable to replace object '{name}'"))
        })
        .await
    }

    async fn probe(&self) -> Result<Capabilities> {
        let found = probe::probe(self, &self.0.clock).await?;
        let time = self.blocking(|inner| inner.time()).await?;
        Ok(Capabilities { clock_skew: Some(time.duration_since(self.0.clock.now())), ..found })
    }

    async fn probe_replace(&self) -> Result<bool> {
        probe::probe_replace(self, &self.0.clock).await
    }

    async fn time(&self) -> Result<Option<Timestamp>> {
        self.blocking(|inner| inner.time()).await.map(Some)
    }

    /// Also sweeps outside of `folder`, though not of the root: what no living process holds is garbage
    /// wherever it was meant to go.
    async fn abort_stale_multiparts(&self, _folder: &str, older_than: Duration) -> Result<u64> {
        let aborted = self
            .blocking(move |inner| Incoming::sweep(inner.root.path(), &inner.clock, older_than));
        let aborted = aborted.await?;
        self.0.requests.multipart_aborts.add(aborted);
        Ok(aborted)
    }

    fn requests(&self) -> RequestCounts {
        self.0.requests.counts()
    }

    fn latencies(&self) -> &Latencies {
        &self.0.latencies
    }
}

impl Inner {
    fn path(&self, name: &ObjectName) -> PathBuf {
        self.root.path().join(name.as_str())
    }

    fn put(&self, name: &ObjectName, body: &[u8]) -> Result<PutOutcome> {
        let begun = self.clock.instant();
        let mut incoming = self.incoming()?;
        incoming.file_mut().write_all(body).context(|| "unable to write a new file")?;
        self.sync(incoming.file()).context(|| "unable to fsync a new file")?;
        let outcome = self.publish(&mut incoming, name)?;
        self.note_upload(begun);
        Ok(outcome)
    }

    fn note_upload(&self, begun: Instant) {
        self.latencies.upload.record(self.clock.instant().saturating_duration_since(begun));
    }

    /// fsync, with a note of how long it took.
    fn sync(&self, file: &File) -> std::io::Result<()> {
        let begun = self.clock.instant();
        file.sync_all()?;
        self.latencies.fsync.record(self.clock.instant().saturating_duration_since(begun));
        Ok(())
    }

    fn sync_folder(&self, folder: &Path) -> Result<()> {
        File::open(folder)
            .and_then(|folder| self.sync(&folder))
            .context(|| format!("unable to fsync folder '{}'", folder.display()))
    }

    /// A new file in the making, in the root that we know.
    fn incoming(&self) -> Result<Incoming> {
        self.root.make()?;
        Incoming::new(self.root.path(), &self.clock)
    }

    /// Gives the file its name unless that is taken. What was written must have been fsynced, so that
    /// the name is never one of half an object; the way to it is fsynced here, whether or not it was
    /// ours: see the module's head.
    ///
    /// After an error it can be called again with the same file, which then has its own name as before,
    /// or `name` if it could not be taken back. Only we hold the file, so whoever has that name is us.
    fn publish(&self, incoming: &mut Incoming, name: &ObjectName) -> Result<PutOutcome> {
        let target = self.path(name);
        let folder = parent(&target);
        // A delete may remove the folder as empty between making it and filling it.
        for _ in 0..3 {
            make_folders(&self.root.make()?, name)?;
            match incoming.rename_no_replace(&target) {
                Ok(()) => return self.settle(incoming, &target),
                // Named by an earlier call, or by this one and the answer was lost (NFS).
                Err(_) if incoming.is(&target) => return self.settle(incoming, &target),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    if !target.is_file() {
                        let message = format!("'{}' is a folder", target.display());
                        return Err(Error::new(Kind::Conflict, message));
                    }
                    self.make_durable(folder)?;
                    return Ok(PutOutcome::AlreadyThere);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("unable to name a new file", &error)),
            }
        }
        Err(Error::new(Kind::Unavailable, format!("folder '{}' keeps vanishing", folder.display())))
    }

    /// Makes the name that the file has now durable. Until that is done nobody is told of it; if we die
    /// before, the object is there or not, and whole.
    fn settle(&self, incoming: &mut Incoming, target: &Path) -> Result<PutOutcome> {
        if let Err(error) = self.make_durable(parent(target)) {
            // Not durable, so not there: a later put must not take it for granted.
            incoming.take_back(target);
            return Err(error);
        }
        incoming.published();
        Ok(PutOutcome::Created)
    }

    fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        let attempted = || format!("unable to read object '{name}'");
        let missing = || Error::new(Kind::NotFound, "it does not exist").context(attempted());
        let root = self.root.open().context(attempted)?.ok_or_else(missing)?;
        let file = match root.file(name.as_str()) {
            Ok(file) => file,
            Err(error) if is_missing(&error) => return Err(missing()),
            Err(error) => return Err(Error::io(attempted(), &error)),
        };
        let metadata = file.metadata().context(attempted)?;
        if !metadata.is_file() {
            return Err(missing());
        }
        let range = checked_range(name, range, metadata.len())?;
        let mut bytes = vec![0; range.len()];
        file.read_exact_at(&mut bytes, range.start as u64).context(attempted)?;
        Ok(Bytes::from(bytes))
    }

    fn head(&self, name: ObjectName) -> Result<Option<ObjectInfo>> {
        let Some(root) = self.root.open()? else { return Ok(None) };
        match root.stat(name.as_str()) {
            Ok(found) if is_file(&found) => object_info(name, &found).map(Some),
            Ok(_) => Ok(None),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(Error::io(format!("unable to look at object '{name}'"), &error)),
        }
    }

    fn get_if_there(&self, name: &ObjectName) -> Result<Option<Bytes>> {
        match self.get(name, None) {
            Ok(body) => Ok(Some(body)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Compares and replaces under a lock that holds against every process on this file system. The
    /// new content is fsynced before it takes the old one's place, so a crash leaves one or the other.
    fn replace(
        &self,
        name: &ObjectName,
        body: &[u8],
        expected: Option<&VersionTag>,
    ) -> Result<Replace> {
        self.root.make()?;
        let _lock = self.lock()?;
        let found = self.get_if_there(name)?.map(|found| tag_of(&found));
        if found.as_ref() != expected {
            return Ok(Replace::Lost);
        }
        let begun = self.clock.instant();
        let mut incoming = self.incoming()?;
        incoming.file_mut().write_all(body).context(|| "unable to write a new file")?;
        self.sync(incoming.file()).context(|| "unable to fsync a new file")?;
        let target = self.path(name);
        let folder = parent(&target);
        make_folders(&self.root.make()?, name)?;
        incoming.rename(&target).context(|| "unable to name a new file")?;
        self.make_durable(folder)?;
        self.note_upload(begun);
        Ok(Replace::Done(tag_of(body)))
    }

    fn lock(&self) -> Result<File> {
        let path = self.root.path().join(LOCK_FILE);
        let attempted = || format!("unable to lock '{}'", path.display());
        let file = incoming::create_or_open(&path).context(attempted)?;
        let deadline = self.clock.instant() + LOCK_WAIT_MAX;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(fs::TryLockError::WouldBlock) if self.clock.instant() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(fs::TryLockError::WouldBlock) => {
                    let message = "another process has held it for too long";
                    return Err(Error::new(Kind::Unavailable, message).context(attempted()));
                }
                Err(fs::TryLockError::Error(error)) => {
                    return Err(Error::io(attempted(), &error).hint(incoming::LOCK_HINT));
                }
            }
        }
    }

    fn delete(&self, names: &[ObjectName]) -> Result<()> {
        let Some(root) = self.root.open()? else { return Ok(()) };
        let mut folders: Vec<PathBuf> = Vec::new();
        for name in names {
            match root.remove(name.as_str()) {
                Ok(()) => folders.push(parent(&self.path(name)).to_owned()),
                Err(error) if is_missing(&error) => {}
                Err(error) => {
                    return Err(Error::io(format!("unable to delete object '{name}'"), &error));
                }
            }
        }
        folders.sort();
        folders.dedup();
        for folder in &folders {
            self.sync_folder(folder)?;
            self.remove_empty(folder);
        }
        Ok(())
    }

    /// Removes the folder if it is empty, and those above it: for tidiness only, so whatever prevents
    /// it is fine, and nothing waits for it to be durable.
    fn remove_empty(&self, folder: &Path) {
        let mut folder = folder;
        while folder != self.root.path() && fs::remove_dir(folder).is_ok() {
            self.durable_folders().remove(folder);
            folder = parent(folder);
        }
    }

    /// Returns when the entries of `folder`, and the folder itself as seen from the root, survive a
    /// crash. A folder seen durable once stays so; it is known by its inode too, in case another
    /// process removed it and made a new one of its name. The root is looked at again: what was written
    /// may have gone into the mount point of one that went away meanwhile.
    fn make_durable(&self, folder: &Path) -> Result<()> {
        self.sync_folder(folder)?;
        self.make_durable_in_root(folder)?;
        self.root.open().map(|_same| ())
    }

    /// The same for every folder in `folder` ("" or with a slash at its end), which is what makes the
    /// names in them durable: the files were fsynced before they had these.
    fn make_all_durable(&self, folder: String) -> Result<()> {
        let Some(root) = self.root.open()? else { return Ok(()) };
        let mut folders = vec![folder];
        while let Some(folder) = folders.pop() {
            match root.folders(&folder) {
                Ok(inner) => folders.extend(inner),
                Err(error) if error.kind() == Kind::NotFound => continue,
                Err(error) => return Err(error),
            }
            match self.make_durable(&self.root.path().join(&folder)) {
                // Removed as empty meanwhile.
                Err(error) if error.kind() == Kind::NotFound => {}
                made => made?,
            }
        }
        Ok(())
    }

    /// A folder is remembered only when those above it are durable too: whoever meets it remembered goes no
    /// further up.
    fn make_durable_in_root(&self, folder: &Path) -> Result<()> {
        let mut made = Vec::new();
        let mut folder = folder;
        while folder != self.root.path() {
            let metadata = fs::metadata(folder)
                .context(|| format!("unable to look at folder '{}'", folder.display()))?;
            let id = FolderId::of(&metadata);
            if self.durable_folders().get(folder) == Some(&id) {
                break;
            }
            self.sync_folder(parent(folder))?;
            made.push((folder.to_owned(), id));
            folder = parent(folder);
        }
        let mut durable = self.durable_folders();
        if durable.len() + made.len() > DURABLE_FOLDERS_MAX {
            durable.clear();
        }
        durable.extend(made);
        Ok(())
    }

    fn durable_folders(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, FolderId>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the file system says a file is made that is made now. One that is full makes none, and still
    /// must tell what is old enough to go: there the lock's file, which every writer made, is touched.
    fn time(&self) -> Result<Timestamp> {
        let found = match self.incoming() {
            Ok(incoming) => incoming.file().metadata(),
            Err(error) if error.kind() == Kind::Unavailable => {
                return self.time_of_lock()?.ok_or(error);
            }
            Err(error) => return Err(error),
        };
        modified(&found.context(|| "unable to look at a new file")?)
    }

    /// `None` where there is no lock's file, or it cannot be touched.
    fn time_of_lock(&self) -> Result<Option<Timestamp>> {
        let Some(root) = self.root.open()? else { return Ok(None) };
        let leave = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let times = Timestamps {
            last_access: leave,
            last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        };
        let Ok(file) = root.file(LOCK_FILE) else { return Ok(None) };
        match futimens(&file, &times).map_err(std::io::Error::from).and_then(|()| file.metadata()) {
            Ok(found) => modified(&found).map(Some),
            Err(_) => Ok(None),
        }
    }
}

/// Makes the folder that will hold the object.
fn make_folders(root: &Opened, name: &ObjectName) -> Result<()> {
    let Some(folder) = Path::new(name.as_str()).parent() else { return Ok(()) };
    root.make_folders(folder).context(|| format!("unable to make the folder of object '{name}'"))
}

/// The folder that holds `path`.
fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Whether the error means that there is no such object.
fn is_missing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// The tag of a mutable object's content.
fn tag_of(body: &[u8]) -> VersionTag {
    VersionTag::new(blake3::hash(body).to_hex().as_str())
}

fn is_file(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
}

fn object_info(name: ObjectName, found: &Stat) -> Result<ObjectInfo> {
    let modified = timestamp(found.st_mtime, i64::try_from(found.st_mtime_nsec).unwrap_or(0))
        .context(|| format!("unable to look at object '{name}'"))?;
    let size_bytes = u64::try_from(found.st_size).unwrap_or(0);
    Ok(ObjectInfo { name, size_bytes, modified: Some(modified) })
}

fn modified(metadata: &fs::Metadata) -> Result<Timestamp> {
    timestamp(metadata.mtime(), metadata.mtime_nsec())
}

fn timestamp(seconds: i64, nanoseconds: i64) -> Result<Timestamp> {
    Timestamp::new(seconds, i32::try_from(nanoseconds).unwrap_or(0))
        .map_err(|error| Error::new(Kind::Corrupt, format!("its time of change: {error}")))
}

#[cfg(test)]
mod tests;
