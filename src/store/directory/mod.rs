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
//! fsyncs the folder too before it says so: the winner may not have got that far. A crash leaves files
//! in `.incoming` only; each is locked by its owner while that lives, and swept by
//! [`Store::abort_stale_multiparts`] when nobody holds the lock.
//!
//! # Cancel safety
//! The work happens on blocking threads and goes on when its future is dropped.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use super::{
    Capabilities, Latencies, ListPage, Multipart, ObjectInfo, ObjectName, PutOutcome, Replace,
    RequestCounts, Requests, Store, VersionTag, checked_range, probe,
};
use crate::clock::{Clock, Instant};
use crate::error::{Context, Error, Kind, Result};

mod incoming;
mod multipart;
mod walk;

use incoming::Incoming;

/// Objects on one page of a listing: large, because every page reads the folder anew.
const PAGE_OBJECTS: usize = 50_000;

/// Longest wait for another process that replaces the lease.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(10);

/// Folders remembered as durable before the memory is emptied.
const DURABLE_FOLDERS_MAX: usize = 4096;

/// Objects as files below a root.
#[derive(Debug)]
pub struct Directory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    clock: Clock,
    requests: Requests,
    latencies: Latencies,
    /// The root as first seen: a different one means that it was unmounted or replaced under us.
    root_id: Mutex<Option<FolderId>>,
    /// Folders whose own entry is known to be durable.
    durable: Mutex<HashMap<PathBuf, FolderId>>,
}

/// Which folder a path led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FolderId {
    device: u64,
    inode: u64,
}

impl Directory {
    /// The store below `root`, which the first put makes if it is missing.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>, clock: &Clock) -> Self {
        Self(Arc::new(Inner {
            root: root.into(),
            clock: clock.clone(),
            requests: Requests::default(),
            latencies: Latencies::default(),
            root_id: Mutex::new(None),
            durable: Mutex::new(HashMap::new()),
        }))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Inner>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.0);
        blocking(move || work(&inner)).await
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
        self.0.root.display().to_string()
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
        self.blocking(move |inner| match fs::metadata(inner.path(&name)) {
            Ok(metadata) if metadata.is_file() => object_info(name, &metadata).map(Some),
            Ok(_) => Ok(None),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(Error::io(format!("unable to look at object '{name}'"), &error)),
        })
        .await
    }

    async fn list(&self, prefix: &str, after: Option<&ObjectName>) -> Result<ListPage> {
        self.0.requests.lists.one();
        let (prefix, after) = (prefix.to_owned(), after.cloned());
        self.blocking(move |inner| walk::page(&inner.root, &prefix, after.as_ref(), PAGE_OBJECTS))
            .await
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
        let skew = self.blocking(|inner| inner.clock_skew()).await?;
        Ok(Capabilities { clock_skew: Some(skew), ..found })
    }

    /// Also sweeps outside of `folder`, though not of the root: what no living process holds is garbage
    /// wherever it was meant to go.
    async fn abort_stale_multiparts(&self, _folder: &str, older_than: Duration) -> Result<u64> {
        let aborted =
            self.blocking(move |inner| Incoming::sweep(&inner.root, &inner.clock, older_than));
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
        self.root.join(name.as_str())
    }

    fn put(&self, name: &ObjectName, body: &[u8]) -> Result<PutOutcome> {
        let begun = self.clock.instant();
        let mut incoming = self.incoming()?;
        incoming.file_mut().write_all(body).context(|| "unable to write a new file")?;
        let outcome = self.publish(incoming, name)?;
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
        self.make_root()?;
        Incoming::new(&self.root, &self.clock)
    }

    /// Gives the file its name unless that is taken. What was written is fsynced first, the way to it
    /// afterwards, whether or not it was ours: see the module's head.
    fn publish(&self, incoming: Incoming, name: &ObjectName) -> Result<PutOutcome> {
        self.sync(incoming.file()).context(|| "unable to fsync a new file")?;
        let target = self.path(name);
        let folder = parent(&target);
        // A delete may remove the folder as empty between making it and filling it.
        for _ in 0..3 {
            self.make_folders(folder)?;
            match incoming.rename_no_replace(&target) {
                Ok(()) => {
                    if let Err(error) = self.make_durable(folder) {
                        // Not durable, so not there: a later put must not take it for granted.
                        let _ = fs::remove_file(&target);
                        return Err(error);
                    }
                    incoming.published();
                    return Ok(PutOutcome::Created);
                }
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

    fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        let attempted = || format!("unable to read object '{name}'");
        let file = match File::open(self.path(name)) {
            Ok(file) => file,
            Err(error) if is_missing(&error) => {
                if self.root.is_file() {
                    let found = format!("'{}' is a file, expected a folder", self.root.display());
                    return Err(Error::new(Kind::Config, found)
                        .context(attempted())
                        .hint("Name the folder of the repository with --repository."));
                }
                return Err(Error::new(Kind::NotFound, "it does not exist").context(attempted()));
            }
            Err(error) => return Err(Error::io(attempted(), &error)),
        };
        let metadata = file.metadata().context(attempted)?;
        if !metadata.is_file() {
            return Err(Error::new(Kind::NotFound, "it does not exist").context(attempted()));
        }
        let range = checked_range(name, range, metadata.len())?;
        let mut bytes = vec![0; range.len()];
        file.read_exact_at(&mut bytes, range.start as u64).context(attempted)?;
        Ok(Bytes::from(bytes))
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
        self.make_root()?;
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
        self.make_folders(folder)?;
        incoming.rename(&target).context(|| "unable to name a new file")?;
        self.make_durable(folder)?;
        self.note_upload(begun);
        Ok(Replace::Done(tag_of(body)))
    }

    fn lock(&self) -> Result<File> {
        let path = self.root.join(".lock");
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
                    return Err(Error::io(attempted(), &error).hint(
                        "The file system must support flock; on NFS use version 4 or later.",
                    ));
                }
            }
        }
    }

    fn delete(&self, names: &[ObjectName]) -> Result<()> {
        let mut folders: Vec<PathBuf> = Vec::new();
        for name in names {
            let path = self.path(name);
            match fs::remove_file(&path) {
                Ok(()) => folders.push(parent(&path).to_owned()),
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
        while folder != self.root && fs::remove_dir(folder).is_ok() {
            self.durable_folders().remove(folder);
            folder = parent(folder);
        }
    }

    /// Makes the root if it is missing and refuses another one than we have seen before: writing into
    /// the bare mount point of a disk that went away would look like success.
    fn make_root(&self) -> Result<()> {
        let attempted = || format!("unable to use '{}'", self.root.display());
        let gone = || {
            let message = "it is not the folder it was: unmounted or replaced";
            Err(Error::new(Kind::Unavailable, message)
                .context(attempted())
                .hint("Mount the repository's file system again."))
        };
        let mut seen = self.root_id.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match fs::metadata(&self.root) {
            Ok(metadata) => FolderId::of(&metadata),
            Err(error) if error.kind() == ErrorKind::NotFound && seen.is_some() => return gone(),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make_with_parents(&self.root).context(attempted)?;
                FolderId::of(&fs::metadata(&self.root).context(attempted)?)
            }
            Err(error) => return Err(Error::io(attempted(), &error)),
        };
        if *seen.get_or_insert(found) != found {
            return gone();
        }
        Ok(())
    }

    fn make_folders(&self, folder: &Path) -> Result<()> {
        if folder.is_dir() {
            return Ok(());
        }
        make_with_parents(folder)
            .context(|| format!("unable to make folder '{}'", folder.display()))
    }

    /// Returns when the entries of `folder`, and the folder itself as seen from the root, survive a
    /// crash. A folder seen durable once stays so; it is known by its inode too, in case another
    /// process removed it and made a new one of its name.
    fn make_durable(&self, folder: &Path) -> Result<()> {
        self.sync_folder(folder)?;
        let mut folder = folder;
        while folder != self.root {
            let metadata = fs::metadata(folder)
                .context(|| format!("unable to look at folder '{}'", folder.display()))?;
            let id = FolderId::of(&metadata);
            if self.durable_folders().get(folder) == Some(&id) {
                return Ok(());
            }
            self.sync_folder(parent(folder))?;
            let mut durable = self.durable_folders();
            if durable.len() >= DURABLE_FOLDERS_MAX {
                durable.clear();
            }
            durable.insert(folder.to_owned(), id);
            drop(durable);
            folder = parent(folder);
        }
        Ok(())
    }

    fn durable_folders(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, FolderId>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file system's clock minus ours.
    fn clock_skew(&self) -> Result<jiff::SignedDuration> {
        let incoming = self.incoming()?;
        let metadata = incoming.file().metadata().context(|| "unable to look at a new file")?;
        Ok(modified(&metadata)?.duration_since(self.clock.now()))
    }
}

impl FolderId {
    fn of(metadata: &fs::Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// The folder that holds `path`.
fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Whether the error means that there is no such object.
fn is_missing(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn make_with_parents(folder: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o750).create(folder)
}

/// The tag of a mutable object's content.
fn tag_of(body: &[u8]) -> VersionTag {
    VersionTag::new(blake3::hash(body).to_hex().as_str())
}

fn object_info(name: ObjectName, metadata: &fs::Metadata) -> Result<ObjectInfo> {
    let modified = modified(metadata).context(|| format!("unable to look at object '{name}'"))?;
    Ok(ObjectInfo { name, size_bytes: metadata.len(), modified: Some(modified) })
}

fn modified(metadata: &fs::Metadata) -> Result<Timestamp> {
    let nanoseconds = i32::try_from(metadata.mtime_nsec()).unwrap_or(0);
    Timestamp::new(metadata.mtime(), nanoseconds)
        .map_err(|error| Error::new(Kind::Corrupt, format!("its time of change: {error}")))
}

#[cfg(test)]
mod tests;
