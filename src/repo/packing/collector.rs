//! Gives parts their place, uploads them, and closes packs in order.
//!
//! One task owns all bookkeeping: it learns from events what the workers have done and spawns the
//! uploads. It never waits for a worker, so workers may wait for it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinSet;

use super::worker::{PartBuffer, PartFrame, keep_memory};
use super::{Event, Item, ItemKind, OpenPack, PieceDone, Shared};
use crate::clock::{Clock, Instant};
use crate::error::{Error, Kind, Result};
use crate::pg::crc32c_combine;
use crate::pipeline::budget::PART_BYTES_MIN;
use crate::pipeline::codec::Compressor;
use crate::pipeline::pool::Closer;
use crate::pipeline::{Level, Permit};
use crate::repo::header::HEADER_BYTES;
use crate::repo::manifest::{CHECKSUM_FAILURES_MAX, ChecksumFailure, PackSummary};
use crate::repo::pack::{FOOTER_BYTES_MAX, FooterPlace, FrameRecord, PackFooter, Span, ZeroRun};
use crate::repo::patience::{self, outlast};
use crate::repo::writer::seal_blocks_from;
use crate::store::{Multipart, ObjectName, PutOutcome, Store};

/// How long a stopped backup tries to take back what it has uploaded: whoever gives up may have been asked
/// to stop.
pub(super) const TAKE_BACK_TIME: Duration = Duration::from_secs(10);

/// What all packs of a backup come to.
#[derive(Debug, Default)]
pub(super) struct Collected {
    /// One line a pack, pack 1 first.
    pub(super) packs: Vec<PackSummary>,
    /// The first bad pages, by path and block.
    pub(super) failures: Vec<ChecksumFailure>,
    /// Number of all bad pages.
    pub(super) failure_count: u64,
    /// When the last pack was durable.
    pub(super) last_put: Option<LastPut>,
}

/// A moment by both clocks: the monotonic one may stand still while the machine is suspended.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastPut {
    pub(super) instant: Instant,
    pub(super) time: Timestamp,
}

pub(super) struct Collector {
    shared: Arc<Shared>,
    pool: Closer,
    events: mpsc::Receiver<Event>,
    /// Packs whose blocks are not all done, oldest first.
    filling: VecDeque<Filling>,
    /// Packs whose parts are being uploaded, by number; those in `filling` too.
    uploads: HashMap<u32, Upload>,
    /// Checksums of files whose last piece was not yet seen done.
    files: HashMap<u64, FileCrc>,
    tasks: JoinSet<Result<Outcome>>,
    packs: BTreeMap<u32, PackSummary>,
    /// Objects this backup has made, to be taken back when it is aborted.
    made: Vec<ObjectName>,
    failures: Vec<ChecksumFailure>,
    last_put: Option<LastPut>,
}

/// A pack that takes in blocks or waits for its last.
struct Filling {
    pack: Arc<OpenPack>,
    /// Lets the feeder open another pack once all blocks of this one are done.
    unfinished: Permit,
    blocks_done: u64,
    /// How many there are in all, once that is known.
    block_count: Option<u64>,
    items: BTreeMap<u64, Arc<Item>>,
    ended: Vec<u64>,
    frames: Vec<PlacedFrame>,
    zero_runs: Vec<(u64, u64, u64)>,
    plain_bytes: u64,
    next_offset: u64,
    part_count: u32,
}

/// A frame whose place in the pack is known.
struct PlacedFrame {
    offset: u64,
    frame: PartFrame,
}

/// The upload of one pack.
struct Upload {
    target: Arc<Target>,
    parts_in_flight: usize,
    /// Known once the footer is made; then no more parts follow.
    summary: Option<PackSummary>,
}

/// Where the parts of a pack go; the multipart upload is begun by the first of them.
struct Target {
    store: Arc<dyn Store>,
    clock: Clock,
    object: ObjectName,
    multipart: OnceCell<Box<dyn Multipart>>,
}

impl Target {
    async fn multipart(&self) -> Result<&dyn Multipart> {
        let begin = || self.store.begin_multipart(&self.object);
        self.multipart.get_or_try_init(begin).await.map(|multipart| &**multipart)
    }
}

/// What a task of the collector has done.
enum Outcome {
    /// A part is stored.
    Part { pack: u32, bytes: u64 },
    /// The footer is made, and these are the last parts.
    Closed { pack: u32, last: LastParts },
    /// The object is complete.
    Put { pack: u32, bytes: u64, outcome: PutOutcome },
}

/// The end of a pack, ready to be uploaded.
struct LastParts {
    first_part: u32,
    bodies: Vec<(Bytes, Vec<Permit>)>,
    summary: PackSummary,
}

/// The CRC of the pieces of a file that are done, joined as far as they follow one another.
#[derive(Default)]
struct FileCrc {
    joined_bytes: u64,
    crc: u32,
    ahead: BTreeMap<u64, (u64, u32)>,
}

impl FileCrc {
    fn add(&mut self, piece: &PieceDone) {
        self.ahead.insert(piece.file_offset, (piece.bytes, piece.crc));
        while let Some((bytes, crc)) = self.ahead.remove(&self.joined_bytes) {
            self.crc = crc32c_combine(self.crc, crc, bytes);
            self.joined_bytes += bytes;
            if bytes == 0 {
                return;
            }
        }
    }
}

impl Collector {
    pub(super) fn new(shared: Arc<Shared>, pool: Closer, events: mpsc::Receiver<Event>) -> Self {
        Self {
            shared,
            pool,
            events,
            filling: VecDeque::new(),
            uploads: HashMap::new(),
            files: HashMap::new(),
            tasks: JoinSet::new(),
            packs: BTreeMap::new(),
            made: Vec::new(),
            failures: Vec::new(),
            last_put: None,
        }
    }

    /// Runs until all packs are durable, or the first failure; then everything is taken back.
    pub(super) async fn run(mut self) -> Result<Collected> {
        match self.collect().await {
            Ok(()) => {
                let mut failures = self.failures;
                failures.sort_by(|a, b| (&a.path, a.block).cmp(&(&b.path, b.block)));
                let packs = self.packs.into_values().collect();
                let failure_count = self.shared.counters.progress().checksum_failure_count;
                Ok(Collected { packs, failures, failure_count, last_put: self.last_put })
            }
            Err(error) => {
                self.take_back().await;
                Err(error)
            }
        }
    }

    async fn collect(&mut self) -> Result<()> {
        let stop = self.shared.stop.clone();
        let mut open = true;
        while open || !self.tasks.is_empty() {
            tokio::select! {
                () = stop.cancelled() => {
                    return Err(Error::new(Kind::Cancelled, "the backup was stopped"));
                }
                Some(outcome) = self.tasks.join_next() => {
                    let outcome = outcome.unwrap_or_else(|error| {
                        Err(Error::new(Kind::Bug, format!("an upload task failed: {error}")))
                    })?;
                    self.done(outcome)?;
                }
                event = self.events.recv(), if open => match event {
                    Some(event) => self.take_event(event)?,
                    None => open = false,
                },
            }
        }
        if self.filling.is_empty() && self.uploads.is_empty() {
            return Ok(());
        }
        Err(Error::new(Kind::Bug, "a worker ended without finishing its block; see the log"))
    }

    fn take_event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Failed(error) => return Err(error),
            Event::Open { pack, unfinished } => self.open(pack, unfinished),
            Event::Part { pack, part } => self.place(pack, part)?,
            Event::Block { pack, done, failures } => {
                let room = CHECKSUM_FAILURES_MAX.saturating_sub(self.failures.len());
                self.failures.extend(failures.into_iter().take(room));
                self.block_done(pack, done)?;
            }
            Event::Close { pack, block_count } => {
                self.filling_mut(pack)?.block_count = Some(block_count);
            }
        }
        self.close_finished()
    }

    fn open(&mut self, pack: Arc<OpenPack>, unfinished: Permit) {
        let target = Target {
            store: Arc::clone(self.shared.writer.repository().store()),
            clock: self.shared.writer.repository().clock().clone(),
            object: pack.object.clone(),
            multipart: OnceCell::new(),
        };
        let upload = Upload { target: Arc::new(target), parts_in_flight: 0, summary: None };
        self.uploads.insert(pack.name.number, upload);
        self.filling.push_back(Filling {
            pack,
            unfinished,
            blocks_done: 0,
            block_count: None,
            items: BTreeMap::new(),
            ended: Vec::new(),
            frames: Vec::new(),
            zero_runs: Vec::new(),
            plain_bytes: 0,
            next_offset: 0,
            part_count: 0,
        });
    }

    fn filling_mut(&mut self, number: u32) -> Result<&mut Filling> {
        self.filling
            .iter_mut()
            .find(|filling| filling.pack.name.number == number)
            .ok_or_else(|| Error::new(Kind::Bug, format!("a block of pack {number} after its end")))
    }

    /// Gives a full part its place and begins its upload.
    fn place(&mut self, number: u32, part: PartBuffer) -> Result<()> {
        let filling = self.filling_mut(number)?;
        let permit = part.permit;
        let body = filling.place(part.bytes, part.frames);
        let part_number = filling.part_count;
        self.upload_part(number, part_number, body, vec![permit])
    }

    fn upload_part(
        &mut self,
        pack: u32,
        part_number: u32,
        body: Bytes,
        permits: Vec<Permit>,
    ) -> Result<()> {
        let upload = self.upload_mut(pack)?;
        upload.parts_in_flight += 1;
        let target = Arc::clone(&upload.target);
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let bytes = body.len() as u64;
            let attempted = || format!("unable to put part {part_number} of '{}'", target.object);
            let (place, part) = (&target, &body);
            outlast(&target.clock, attempted, || async move {
                place.multipart().await?.put_part(part_number, part.clone()).await
            })
            .await?;
            keep_memory(&shared, body);
            drop(permits);
            Ok(Outcome::Part { pack, bytes })
        });
        Ok(())
    }

    fn upload_mut(&mut self, pack: u32) -> Result<&mut Upload> {
        self.uploads
            .get_mut(&pack)
            .ok_or_else(|| Error::new(Kind::Bug, format!("a part of pack {pack} after its end")))
    }

    fn block_done(&mut self, number: u32, done: Vec<PieceDone>) -> Result<()> {
        for piece in &done {
            if matches!(piece.item.kind, ItemKind::File) {
                self.files.entry(piece.item.number).or_default().add(piece);
            }
        }
        let filling = self.filling_mut(number)?;
        filling.blocks_done += 1;
        for piece in done {
            let item = piece.item.number;
            filling.plain_bytes += piece.bytes;
            if piece.zero {
                filling.zero_runs.push((item, piece.file_offset, piece.bytes));
            }
            if piece.ends {
                filling.ended.push(item);
            }
            filling.items.insert(item, piece.item);
        }
        Ok(())
    }

    /// Makes the footers of packs whose blocks, and those of all before, are done.
    fn close_finished(&mut self) -> Result<()> {
        while let Some(mut filling) =
            self.filling.pop_front_if(|filling| filling.block_count == Some(filling.blocks_done))
        {
            filling.unfinished.shrink_to(0);
            let mut crcs = HashMap::new();
            for number in std::mem::take(&mut filling.ended) {
                let Some(file) = self.files.remove(&number) else { continue };
                let size = filling.items.get(&number).map(|item| item.meta.size_bytes);
                if size != Some(file.joined_bytes) {
                    let message = format!("{} of {size:?} bytes of a file", file.joined_bytes);
                    return Err(Error::new(Kind::Bug, message));
                }
                crcs.insert(number, file.crc);
            }
            self.tasks.spawn(async move {
                let pack = filling.pack.name.number;
                let last = tokio::task::spawn_blocking(move || filling.close(&crcs))
                    .await
                    .map_err(|error| Error::new(Kind::Bug, format!("a footer: {error}")))??;
                Ok(Outcome::Closed { pack, last })
            });
        }
        Ok(())
    }

    fn done(&mut self, outcome: Outcome) -> Result<()> {
        match outcome {
            Outcome::Part { pack, bytes } => {
                self.shared.counters.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
                self.upload_mut(pack)?.parts_in_flight -= 1;
                self.complete_if_last(pack)
            }
            Outcome::Closed { pack, last } => self.upload_last(pack, last),
            Outcome::Put { pack, bytes, outcome } => {
                self.shared.counters.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
                self.put_done(pack, outcome)
            }
        }
    }

    /// Begins the upload of a pack's last parts, or of a small pack as a whole.
    fn upload_last(&mut self, pack: u32, last: LastParts) -> Result<()> {
        let LastParts { first_part, mut bodies, summary } = last;
        let upload = self.upload_mut(pack)?;
        upload.summary = Some(summary);
        if first_part == 1
            && bodies.len() == 1
            && let Some((body, permits)) = bodies.pop()
        {
            let target = Arc::clone(&upload.target);
            self.tasks.spawn(async move {
                let bytes = body.len() as u64;
                let Target { store, clock, object, .. } = &*target;
                let outcome = patience::put(&**store, clock, object, body).await?;
                drop(permits);
                Ok(Outcome::Put { pack, bytes, outcome })
            });
            return Ok(());
        }
        for (part_number, (body, permits)) in (first_part..).zip(bodies) {
            self.upload_part(pack, part_number, body, permits)?;
        }
        Ok(())
    }

    /// Completes the upload of a pack whose footer and all other parts are stored.
    fn complete_if_last(&mut self, pack: u32) -> Result<()> {
        let upload = self.upload_mut(pack)?;
        if upload.parts_in_flight > 0 || upload.summary.is_none() {
            return Ok(());
        }
        let target = Arc::clone(&upload.target);
        self.tasks.spawn(async move {
            let attempted = || format!("unable to complete '{}'", target.object);
            let place = &target;
            let complete = || async move { place.multipart().await?.complete().await };
            let outcome = outlast(&target.clock, attempted, complete).await?;
            Ok(Outcome::Put { pack, bytes: 0, outcome })
        });
        Ok(())
    }

    fn put_done(&mut self, pack: u32, outcome: PutOutcome) -> Result<()> {
        let missing = || Error::new(Kind::Bug, format!("pack {pack} was put twice"));
        let upload = self.uploads.remove(&pack).ok_or_else(missing)?;
        let object = upload.target.object.clone();
        if outcome == PutOutcome::AlreadyThere {
            return Err(Error::new(
                Kind::Conflict,
                format!("unable to put '{object}': another backup has made it"),
            )
            .hint("Two backups of this cluster began in the same second; run one at a time."));
        }
        self.made.push(object);
        self.packs.insert(pack, upload.summary.ok_or_else(missing)?);
        let clock = self.shared.writer.repository().clock();
        self.last_put = Some(LastPut { instant: clock.instant(), time: clock.now() });
        Ok(())
    }

    /// Stops the workers and takes back what was made, as far as that is possible in little time:
    /// who waits for the error must get it. The sweep does the rest.
    async fn take_back(&mut self) {
        self.pool.close();
        self.shared.parts.close();
        self.shared.packs.close();
        self.shared.stop.cancel();
        self.events.close();
        let store = Arc::clone(self.shared.writer.repository().store());
        let work = async {
            self.tasks.shutdown().await;
            for upload in self.uploads.values() {
                if let Some(multipart) = upload.target.multipart.get()
                    && let Err(error) = multipart.abort().await
                {
                    tracing::debug!(object = %upload.target.object, %error, "upload not aborted");
                }
            }
            if !self.made.is_empty()
                && let Err(error) = store.delete(&self.made).await
            {
                tracing::debug!(%error, "packs of the stopped backup are left for the sweep");
            }
        };
        if tokio::time::timeout(TAKE_BACK_TIME, work).await.is_err() {
            tracing::debug!("what the stopped backup has uploaded is left for the sweep");
        }
    }
}

impl Filling {
    /// Gives a buffer the next place in the pack: the body to upload. The first gets the header.
    fn place(&mut self, mut bytes: Vec<u8>, frames: Vec<PartFrame>) -> Bytes {
        self.place_frames(frames);
        let first = self.part_count == 0;
        self.part_count += 1;
        if first {
            if let Some(room) = bytes.get_mut(..self.pack.header.len()) {
                room.copy_from_slice(&self.pack.header);
            }
            self.next_offset = bytes.len() as u64;
            return Bytes::from(bytes);
        }
        let body = Bytes::from(bytes).slice(HEADER_BYTES..);
        self.next_offset += body.len() as u64;
        body
    }

    /// Where in the pack the first byte of the next buffer will be, its room for the header counted.
    fn buffer_offset(&self) -> u64 {
        self.next_offset.saturating_sub(if self.part_count == 0 { 0 } else { HEADER_BYTES as u64 })
    }

    fn place_frames(&mut self, frames: Vec<PartFrame>) {
        let base = self.buffer_offset();
        self.frames.extend(
            frames
                .into_iter()
                .map(|frame| PlacedFrame { offset: base + frame.start as u64, frame }),
        );
    }

    /// Joins what is left over with the footer: the last parts of the pack. Parts but the very last
    /// have at least the size every store takes.
    ///
    /// The footer is compressed at the default level, as manifests are: no budget has room for the larger
    /// context of another one, and a footer is small.
    fn close(mut self, crcs: &HashMap<u64, u32>) -> Result<LastParts> {
        let left_over = std::mem::take(
            &mut *self.pack.idle_parts.lock().unwrap_or_else(PoisonError::into_inner),
        );
        let first_part = self.part_count + 1;
        let mut bodies = Vec::new();
        let mut last = Joined { bytes: vec![0; HEADER_BYTES], frames: vec![], permits: vec![] };
        for part in left_over {
            if (last.bytes.len() - HEADER_BYTES) as u64 >= PART_BYTES_MIN {
                let full = std::mem::replace(&mut last, Joined::of(part));
                bodies.push((self.place(full.bytes, full.frames), full.permits));
            } else {
                last.join(part);
            }
        }
        self.place_frames(std::mem::take(&mut last.frames));
        let offset = self.buffer_offset() + last.bytes.len() as u64;
        let footer = self.footer(crcs)?;
        let (entry_count, frame_count) = (footer.entries.len(), footer.frames.len());
        let encoded = footer.encode()?;
        if encoded.len() > FOOTER_BYTES_MAX {
            let message = format!("a footer of {} bytes", encoded.len());
            return Err(Error::new(Kind::Bug, message));
        }
        let index = self.pack.next_index.load(Ordering::Relaxed);
        let start = last.bytes.len();
        let mut compressor = Compressor::new(Level::default())?;
        let key = &self.pack.key;
        seal_blocks_from(&mut compressor, key, Bytes::from(encoded), index, &mut last.bytes)?;
        let bytes = to_u32(last.bytes.len() - start)?;
        let place = FooterPlace { offset, bytes, index };
        last.bytes.extend_from_slice(&place.encode());
        bodies.push((self.place(last.bytes, Vec::new()), last.permits));
        let summary = PackSummary {
            number: self.pack.name.number,
            stored_bytes: self.next_offset,
            plain_bytes: self.plain_bytes,
            entry_count: to_u32(entry_count)?,
            frame_count: to_u32(frame_count)?,
            footer: place,
        };
        Ok(LastParts { first_part, bodies, summary })
    }

    /// The footer, its lists in an order that does not depend on which worker was faster.
    fn footer(&mut self, crcs: &HashMap<u64, u32>) -> Result<PackFooter> {
        let entries: HashMap<u64, u32> = self.items.keys().copied().zip(0_u32..).collect();
        let entry = |item: u64| {
            entries.get(&item).copied().ok_or_else(|| Error::new(Kind::Bug, "a piece of no file"))
        };
        self.frames.sort_by_key(|frame| frame.offset);
        self.zero_runs.sort_unstable();
        let mut footer = PackFooter::default();
        for (number, item) in &self.items {
            footer.entries.push(item.entry(crcs.get(number).copied()));
        }
        for PlacedFrame { offset, frame } in std::mem::take(&mut self.frames) {
            let spans = frame.spans.into_iter().map(|(item, file_offset, bytes)| {
                Ok(Span { entry: entry(item)?, file_offset, bytes })
            });
            footer.frames.push(FrameRecord {
                source: 0,
                offset,
                frame_bytes: frame.frame_bytes,
                plain_bytes: frame.plain_bytes,
                index: frame.index,
                hash: frame.hash,
                spans: spans.collect::<Result<_>>()?,
            });
        }
        for (item, file_offset, bytes) in std::mem::take(&mut self.zero_runs) {
            let entry = entry(item)?;
            match footer.zero_runs.last_mut() {
                Some(run) if run.entry == entry && run.file_offset + run.bytes == file_offset => {
                    run.bytes += bytes;
                }
                _ => footer.zero_runs.push(ZeroRun { entry, file_offset, bytes }),
            }
        }
        Ok(footer)
    }
}

/// Left-over buffers joined into one.
struct Joined {
    bytes: Vec<u8>,
    frames: Vec<PartFrame>,
    permits: Vec<Permit>,
}

impl Joined {
    fn of(part: PartBuffer) -> Self {
        Self { bytes: part.bytes, frames: part.frames, permits: vec![part.permit] }
    }

    fn join(&mut self, part: PartBuffer) {
        if self.frames.is_empty() {
            *self = Self::of(part);
            return;
        }
        let shift = self.bytes.len() - HEADER_BYTES;
        self.bytes.extend_from_slice(part.bytes.get(HEADER_BYTES..).unwrap_or_default());
        let frames = part.frames.into_iter();
        self.frames.extend(frames.map(|frame| PartFrame { start: frame.start + shift, ..frame }));
        // The buffer itself is gone after this; its permit pays for what was appended.
        self.permits.push(part.permit);
    }
}

fn to_u32(number: usize) -> Result<u32> {
    u32::try_from(number)
        .map_err(|_too_long| Error::new(Kind::Bug, format!("a footer of {number}")))
}
