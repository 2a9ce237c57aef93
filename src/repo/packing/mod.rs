//! A backup in the making: files in, packs out.
//!
//! ```text
//! feeder (async, the caller)   cuts files into blocks of slices, awaits a place in the queue
//!   └▶ workers (threads)       inspect, checksum, compress and seal into a part buffer
//!        └▶ collector (task)   gives parts their place, uploads them, closes packs in order
//! ```
//! Files of a mebibyte and more are cut at multiples of one; what is smaller (whole files and the ends
//! of larger ones) shares frames. All-zero pieces cost no bytes.
//!
//! # Invariants
//! - Memory: blocks are bounded by the places in the pool's queue, part buffers by permits that travel
//!   with them from the worker that fills one to the upload that ends it.
//! - Workers cannot wait for each other for ever. A worker without a part buffer waits for a permit,
//!   which comes back from an upload, and uploads need no worker. Were all permits held by buffers that
//!   lie half full, none would come: so there are at least twice as many as threads, and blocks of at
//!   most two packs with the workers. A pack never has more buffers than there are threads (a new one is
//!   made only when all of them are in use), so one worker waiting means that a permit is free or an
//!   upload is going on.
//! - A pack's footer is written when all blocks of it *and of the packs before it* are done, so the
//!   checksum of a file that ends in it is known.
//!
//! # Durability
//! [`BackupWriter::finish_packs`] returns when every pack is durable; [`PackedBackup::commit`] makes
//! the backup visible by its manifest. Whatever dies before leaves packs without a manifest, which no
//! listing shows and the sweep removes.
//!
//! # Cancel safety
//! A dropped future of the feeder may have lost what it was given: only abort is sensible then. A
//! dropped [`BackupWriter`] aborts in the background.

mod collector;
mod commit;
#[cfg(test)]
mod tests;
mod worker;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::collector::{Collected, Collector};
use self::worker::{PartBuffer, pack_block};
use super::header::ObjectKind;
use super::manifest::ChecksumFailure;
use super::names::{BackupId, Object, PackName};
use super::pack::{Entry, EntryKind, FilePath, PACK_RECORDS_MAX};
use super::writer::Writer;
use crate::error::{Context, Error, Kind, Result};
use crate::pipeline::cipher::ObjectKey;
use crate::pipeline::frame::BLOCK_BYTES;
use crate::pipeline::{Budget, Level, Permit, Permits, Pool, PoolOptions};
use crate::store::ObjectName;

pub use self::commit::{COMMIT_TIME_MAX, PackedBackup};

/// Default size at which a pack is closed: few enough objects for any database, small enough that a
/// lost upload costs little.
pub const PACK_BYTES_DEFAULT: u64 = 512 << 20;
/// Most pieces of files that share a frame.
const PIECES_MAX: usize = 1024;
/// Packs whose blocks may be with the workers at once: the one that is closing and the next.
const UNFINISHED_PACKS_MAX: usize = 2;
/// Events that may wait for the collector; it only does bookkeeping, so they never wait long.
const EVENTS_MAX: usize = 64;

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

/// Looks at every piece of every file, on the worker threads.
pub trait Inspect: Send + Sync {
    /// A piece of a file: at most a mebibyte, beginning at a multiple of one; its slices are cut
    /// anywhere. What is returned comes back in the manifest.
    fn block(&self, file: &FileMeta, file_offset: u64, data: &[Bytes]) -> Vec<ChecksumFailure>;
}

/// An [`Inspect`] that looks at nothing.
#[derive(Clone, Copy, Debug)]
pub struct NoInspection;

impl Inspect for NoInspection {
    fn block(&self, _: &FileMeta, _: u64, _: &[Bytes]) -> Vec<ChecksumFailure> {
        Vec::new()
    }
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

/// Counters of a backup in the making, for those who watch it.
#[derive(Debug, Default)]
pub struct PackCounters {
    plain_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    file_count: AtomicU64,
    checksum_failure_count: AtomicU64,
}

impl PackCounters {
    /// What was done so far.
    #[must_use]
    pub fn progress(&self) -> PackProgress {
        PackProgress {
            plain_bytes: self.plain_bytes.load(Ordering::Relaxed),
            stored_bytes: self.stored_bytes.load(Ordering::Relaxed),
            file_count: self.file_count.load(Ordering::Relaxed),
            checksum_failure_count: self.checksum_failure_count.load(Ordering::Relaxed),
        }
    }
}

/// What feeder, workers and collector share.
struct Shared {
    writer: Writer,
    backup: BackupId,
    options: PackOptions,
    inspect: Arc<dyn Inspect>,
    /// One for each part buffer that may exist.
    parts: Permits,
    /// Memory of parts that are stored, for those to come; never more than permits are free.
    spare_parts: std::sync::Mutex<Vec<Vec<u8>>>,
    /// One for each pack whose blocks may be with the workers.
    packs: Permits,
    counters: Arc<PackCounters>,
    stop: CancellationToken,
}

/// A file, directory or link of the backup.
struct Item {
    /// Its place in the order of arrival.
    number: u64,
    meta: FileMeta,
    kind: ItemKind,
}

enum ItemKind {
    File,
    Directory,
    Symlink { target: Vec<u8> },
}

impl Item {
    /// Its entry in a footer; the CRC of a file where it ends.
    fn entry(&self, crc32c: Option<u32>) -> Entry {
        let FileMeta { path, mode, mtime, size_bytes } = self.meta.clone();
        let kind = match &self.kind {
            ItemKind::File => EntryKind::File { size_bytes, crc32c },
            ItemKind::Directory => EntryKind::Directory,
            ItemKind::Symlink { target } => EntryKind::Symlink { target: target.clone() },
        };
        Entry { path, mode, mtime, kind }
    }
}

/// A piece of a file on its way to a frame, or (without bytes) an entry alone.
struct Piece {
    item: Arc<Item>,
    file_offset: u64,
    slices: Vec<Bytes>,
    bytes: usize,
    ends: bool,
}

/// A pack that takes in blocks.
struct OpenPack {
    name: PackName,
    object: ObjectName,
    header: Vec<u8>,
    key: ObjectKey,
    next_index: AtomicU32,
    sealed_bytes: AtomicU64,
    /// Part buffers that have room and that no worker is using.
    idle_parts: std::sync::Mutex<Vec<PartBuffer>>,
}

/// What the collector is told, in this order for any one worker: a part before the block that filled
/// it, the last block of a pack after all parts it filled.
enum Event {
    /// A part is full.
    Part { pack: u32, part: PartBuffer },
    /// A block is done.
    Block { pack: u32, done: Vec<PieceDone>, failures: Vec<ChecksumFailure> },
    /// A new pack begins.
    Open { pack: Arc<OpenPack>, unfinished: Permit },
    /// A pack gets no more blocks; it got so many.
    Close { pack: u32, block_count: u64 },
    /// A worker could not do its work.
    Failed(Error),
}

/// What became of a piece.
struct PieceDone {
    item: Arc<Item>,
    file_offset: u64,
    bytes: u64,
    crc: u32,
    ends: bool,
    zero: bool,
}

/// A backup in the making; see the module.
pub struct BackupWriter {
    shared: Arc<Shared>,
    pool: Pool,
    events: mpsc::Sender<Event>,
    collector: Option<JoinHandle<Result<Collected>>>,
    pack: Option<Feeding>,
    pack_count: u32,
    item_count: u64,
    file: Option<OpenFile>,
    shared_block: Vec<Piece>,
    shared_bytes: usize,
}

/// The pack that blocks go to now.
struct Feeding {
    pack: Arc<OpenPack>,
    block_count: u64,
    record_count: usize,
}

/// The file that is being written.
struct OpenFile {
    item: Arc<Item>,
    piece_offset: u64,
    slices: Vec<Bytes>,
    bytes: usize,
    left_bytes: u64,
}

impl BackupWriter {
    pub(super) fn begin(
        writer: Writer,
        backup: BackupId,
        options: PackOptions,
        inspect: Arc<dyn Inspect>,
    ) -> Result<Self> {
        // See the module: with fewer part buffers than this, workers could wait for each other.
        let parts_max = options.budget.parts_max.max(UNFINISHED_PACKS_MAX);
        let pool = Pool::start(&PoolOptions {
            name: "pack",
            thread_count: options.budget.thread_count.min(parts_max / UNFINISHED_PACKS_MAX),
            jobs_max: options.budget.blocks_max,
            level: options.level,
        })?;
        let shared = Arc::new(Shared {
            writer,
            backup,
            inspect,
            parts: Permits::new(parts_max as u64),
            spare_parts: std::sync::Mutex::default(),
            packs: Permits::new(UNFINISHED_PACKS_MAX as u64),
            counters: Arc::default(),
            stop: CancellationToken::new(),
            options,
        });
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let collector = Collector::new(Arc::clone(&shared), pool.closer(), receiver);
        Ok(Self {
            shared,
            pool,
            events,
            collector: Some(tokio::spawn(collector.run())),
            pack: None,
            pack_count: 0,
            item_count: 0,
            file: None,
            shared_block: Vec::new(),
            shared_bytes: 0,
        })
    }

    /// The backup's id.
    #[must_use]
    pub fn id(&self) -> BackupId {
        self.shared.backup
    }

    /// What was done so far.
    #[must_use]
    pub fn progress(&self) -> PackProgress {
        self.shared.counters.progress()
    }

    /// The counters themselves, for a task that reports progress.
    #[must_use]
    pub fn counters(&self) -> Arc<PackCounters> {
        Arc::clone(&self.shared.counters)
    }

    /// Begins a regular file; [`BackupWriter::write`] follows with its bytes.
    ///
    /// # Errors
    /// `bug` when another file has not ended; what the store reported meanwhile.
    pub async fn begin_file(&mut self, meta: FileMeta) -> Result<()> {
        self.between_files(&meta.path)?;
        self.shared.counters.file_count.fetch_add(1, Ordering::Relaxed);
        let left_bytes = meta.size_bytes;
        let item = self.item(meta, ItemKind::File);
        self.file =
            Some(OpenFile { item, piece_offset: 0, slices: Vec::new(), bytes: 0, left_bytes });
        self.check().await
    }

    /// The next bytes of the file, kept as they are until compressed. Waits while the memory budget
    /// is used.
    ///
    /// # Errors
    /// `corrupt` when there are more than announced; what the store reported meanwhile.
    pub async fn write(&mut self, mut bytes: Bytes) -> Result<()> {
        while !bytes.is_empty() {
            let file = self
                .file
                .as_mut()
                .ok_or_else(|| Error::new(Kind::Bug, "bytes of a file that was not begun"))?;
            let take = bytes.len().min(BLOCK_BYTES - file.bytes);
            file.left_bytes = file.left_bytes.checked_sub(take as u64).ok_or_else(|| {
                let (path, size) = (&file.item.meta.path, file.item.meta.size_bytes);
                Error::new(
                    Kind::Corrupt,
                    format!("more than the announced {size} bytes of {path:?}"),
                )
            })?;
            file.slices.push(bytes.split_to(take));
            file.bytes += take;
            if file.bytes == BLOCK_BYTES {
                let piece = file.take_piece();
                self.dispatch(vec![piece]).await?;
            }
        }
        Ok(())
    }

    /// Ends the file.
    ///
    /// # Errors
    /// `corrupt` when there were fewer bytes than announced; what the store reported meanwhile.
    pub async fn end_file(&mut self) -> Result<()> {
        let mut file = self
            .file
            .take()
            .ok_or_else(|| Error::new(Kind::Bug, "the end of a file that was not begun"))?;
        if file.left_bytes > 0 {
            let (path, size) = (&file.item.meta.path, file.item.meta.size_bytes);
            let found = size - file.left_bytes;
            let message = format!("{found} bytes of {path:?} where {size} were announced");
            return Err(Error::new(Kind::Corrupt, message));
        }
        if file.bytes > 0 || file.item.meta.size_bytes == 0 {
            let mut piece = file.take_piece();
            piece.slices = own(&piece.slices, piece.bytes);
            self.share(piece).await?;
        }
        Ok(())
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// `bug` when a file has not ended; what the store reported meanwhile.
    pub async fn add_directory(&mut self, path: FilePath, mode: u32, mtime: i64) -> Result<()> {
        self.between_files(&path)?;
        let meta = FileMeta { path, mode, mtime, size_bytes: 0 };
        self.add(meta, ItemKind::Directory).await
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// `bug` when a file has not ended; what the store reported meanwhile.
    pub async fn add_symlink(&mut self, path: FilePath, mtime: i64, target: Vec<u8>) -> Result<()> {
        self.between_files(&path)?;
        let meta = FileMeta { path, mode: 0o777, mtime, size_bytes: 0 };
        self.add(meta, ItemKind::Symlink { target }).await
    }

    async fn add(&mut self, meta: FileMeta, kind: ItemKind) -> Result<()> {
        let item = self.item(meta, kind);
        self.share(Piece { item, file_offset: 0, slices: Vec::new(), bytes: 0, ends: true }).await
    }

    fn item(&mut self, meta: FileMeta, kind: ItemKind) -> Arc<Item> {
        self.item_count += 1;
        Arc::new(Item { number: self.item_count, meta, kind })
    }

    fn between_files(&self, next: &FilePath) -> Result<()> {
        match &self.file {
            None => Ok(()),
            Some(open) => {
                let path = &open.item.meta.path;
                Err(Error::new(Kind::Bug, format!("{next:?} begins before {path:?} has ended")))
            }
        }
    }

    /// Puts a piece into the block that small pieces share.
    async fn share(&mut self, piece: Piece) -> Result<()> {
        if self.shared_bytes + piece.bytes > BLOCK_BYTES || self.shared_block.len() >= PIECES_MAX {
            self.dispatch_shared().await?;
        }
        self.shared_bytes += piece.bytes;
        self.shared_block.push(piece);
        Ok(())
    }

    async fn dispatch_shared(&mut self) -> Result<()> {
        self.shared_bytes = 0;
        let block = std::mem::take(&mut self.shared_block);
        if block.is_empty() { Ok(()) } else { self.dispatch(block).await }
    }

    /// Hands a block to the workers, in a new pack when the last has enough.
    async fn dispatch(&mut self, block: Vec<Piece>) -> Result<()> {
        self.check().await?;
        let full = |feeding: &Feeding| {
            feeding.pack.sealed_bytes.load(Ordering::Relaxed) >= self.shared.options.pack_bytes
                || feeding.record_count + block.len() >= PACK_RECORDS_MAX
        };
        if self.pack.as_ref().is_some_and(full) {
            self.close_pack().await?;
        }
        let mut feeding = match self.pack.take() {
            Some(feeding) => feeding,
            None => self.open_pack().await?,
        };
        feeding.block_count += 1;
        feeding.record_count += block.len() + 1;
        let (shared, pack) = (Arc::clone(&self.shared), Arc::clone(&feeding.pack));
        let events = self.events.clone();
        self.pack = Some(feeding);
        let job = move |worker: &mut _| pack_block(&shared, &pack, block, worker, &events);
        match self.pool.submit(job).await {
            Ok(_completion_is_an_event) => Ok(()),
            Err(stopped) => Err(self.failure(stopped).await),
        }
    }

    async fn open_pack(&mut self) -> Result<Feeding> {
        let unfinished = match self.shared.packs.acquire(1).await {
            Ok(permit) => permit,
            Err(stopped) => return Err(self.failure(stopped).await),
        };
        self.pack_count += 1;
        let name = PackName { backup: self.shared.backup, number: self.pack_count };
        let thing = Object::Pack(name);
        let writer = &self.shared.writer;
        let header = writer.header(ObjectKind::Pack)?;
        let pack = Arc::new(OpenPack {
            name,
            object: writer.repository().name(&thing)?,
            key: writer.object_key(&header, &thing)?,
            header: header.encode(),
            next_index: AtomicU32::new(0),
            sealed_bytes: AtomicU64::new(0),
            idle_parts: std::sync::Mutex::default(),
        });
        self.tell(Event::Open { pack: Arc::clone(&pack), unfinished }).await?;
        Ok(Feeding { pack, block_count: 0, record_count: 0 })
    }

    async fn close_pack(&mut self) -> Result<()> {
        match self.pack.take() {
            None => Ok(()),
            Some(Feeding { pack, block_count, .. }) => {
                self.tell(Event::Close { pack: pack.name.number, block_count }).await
            }
        }
    }

    async fn tell(&mut self, event: Event) -> Result<()> {
        if self.events.send(event).await.is_ok() {
            return Ok(());
        }
        let stopped = Error::new(Kind::Cancelled, "the backup was stopped");
        Err(self.failure(stopped).await)
    }

    /// Fails as soon as the collector has.
    async fn check(&mut self) -> Result<()> {
        if self.collector.as_ref().is_some_and(|collector| !collector.is_finished()) {
            return Ok(());
        }
        let stopped = Error::new(Kind::Cancelled, "the backup was stopped");
        Err(self.failure(stopped).await)
    }

    /// Why the collector ended; `otherwise` when that was told before, or when it is the collector that
    /// would wait for ever: for blocks that no worker is left to do.
    async fn failure(&mut self, otherwise: Error) -> Error {
        let Some(collector) = &mut self.collector else { return otherwise };
        self.shared.stop.cancel();
        let outcome = joined(collector.await);
        self.collector = None;
        match outcome {
            Err(error) if error.kind() != Kind::Cancelled => error,
            _ => otherwise,
        }
    }

    /// Uploads the rest.
    ///
    /// # Durability
    /// On return all packs are durable, and nothing of the backup is visible yet.
    ///
    /// # Errors
    /// `bug` when a file has not ended; what the store reports.
    pub async fn finish_packs(self) -> Result<PackedBackup> {
        self.finish_packs_unless(&CancellationToken::new()).await
    }

    /// As [`BackupWriter::finish_packs`], unless `cancel` is: then as [`BackupWriter::abort`].
    ///
    /// # Errors
    /// As [`BackupWriter::finish_packs`]; `cancelled` when it was.
    pub async fn finish_packs_unless(mut self, cancel: &CancellationToken) -> Result<PackedBackup> {
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            packed = self.finish() => return packed,
        }
        self.abort().await;
        Err(Error::new(Kind::Cancelled, "the backup was stopped"))
    }

    async fn finish(&mut self) -> Result<PackedBackup> {
        if let Some(open) = &self.file {
            let path = &open.item.meta.path;
            return Err(Error::new(Kind::Bug, format!("the backup ends inside {path:?}")));
        }
        self.dispatch_shared().await?;
        self.close_pack().await?;
        // The collector ends when the last sender of events has gone; the workers' go with their jobs.
        let (closed, _) = mpsc::channel(1);
        self.events = closed;
        // It stays ours until it has ended, so that who drops or aborts this stops the uploads.
        let Some(collector) = &mut self.collector else {
            return Err(Error::new(Kind::Cancelled, "the backup was stopped"));
        };
        let collected = joined(collector.await);
        self.collector = None;
        Ok(PackedBackup::new(Arc::clone(&self.shared), collected?))
    }

    /// Stops, discards the uploads that have not ended, and deletes the packs that have (as far as
    /// the store lets us; the sweep does the rest).
    pub async fn abort(mut self) {
        self.stop();
        let Some(collector) = self.collector.take() else { return };
        // Its error is that it was stopped; it may also have ended just before.
        if let Ok(collected) = joined(collector.await) {
            PackedBackup::new(Arc::clone(&self.shared), collected).abort().await;
        }
    }

    fn stop(&self) {
        self.shared.stop.cancel();
        self.pool.close();
        self.shared.parts.close();
        self.shared.packs.close();
    }
}

impl Drop for BackupWriter {
    fn drop(&mut self) {
        // Also after success: then everything has ended and this does nothing.
        if self.collector.is_some() {
            self.stop();
        }
    }
}

impl OpenFile {
    fn take_piece(&mut self) -> Piece {
        let piece = Piece {
            item: Arc::clone(&self.item),
            file_offset: self.piece_offset,
            slices: std::mem::take(&mut self.slices),
            bytes: self.bytes,
            ends: self.left_bytes == 0,
        };
        self.piece_offset += self.bytes as u64;
        self.bytes = 0;
        piece
    }
}

/// Copies a small piece out of the read buffers: a few bytes that wait for others to fill a frame must
/// not keep a whole read buffer alive.
fn own(slices: &[Bytes], bytes: usize) -> Vec<Bytes> {
    let mut copy = BytesMut::with_capacity(bytes);
    slices.iter().for_each(|slice| copy.extend_from_slice(slice));
    if bytes == 0 { Vec::new() } else { vec![copy.freeze()] }
}

/// The collector's own result.
fn joined<T>(outcome: std::result::Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    outcome
        .unwrap_or_else(|error| Err(Error::new(Kind::Bug, format!("a task failed: {error}"))))
        .context(|| "unable to write the backup")
}

impl fmt::Debug for BackupWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BackupWriter({:?}, {:?})", self.shared.backup, self.progress())
    }
}
