//! Fetches and opens: what a host with a decryption identity can do.
//!
//! Fetching is async and bounded by its callers (a batch of frames is at most as large as they say);
//! opening is sync and CPU-bound and belongs on a [`Pool`](crate::pipeline::Pool).
//!
//! # Invariants
//! Whatever is wrong with an object is an error of kind `corrupt` that names it and the byte; a data
//! key that no identity opens is `denied` and names the key.
//!
//! An object that says of itself that it is not encrypted proves nothing: anybody who can write to the
//! store can put one in an encrypted one's place. So it is read only by who has no identity, in a
//! cluster that has no data key, or by who asked for it in so many words
//! ([`Reader::accept_unencrypted`]).

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::lock::Mutex;
use tokio::sync::OnceCell;

use super::Repository;
use super::extent::ExtentMember;
use super::header::{HEADER_BYTES, ObjectHeader, ObjectKind};
use super::keys::{self, DecryptionIdentity, WRAPPED_BYTES_MAX};
use super::manifest::{Front, Manifest, PRIVATE_BYTES_MAX};
use super::names::{BackupId, EXTENT_PLAIN_BYTES_MAX, ExtentName, KeyId, Object, PackName};
use super::pack::{FOOTER_BYTES_MAX, FooterPlace, FrameRecord, PackFooter, TRAILER_BYTES};
use crate::error::{Context, Error, Kind, Result};
use crate::pg::TimelineId;
use crate::pg::timeline::HISTORY_BYTES_MAX;
use crate::pipeline::Worker;
use crate::pipeline::cipher::{Cipher, DataKey, ObjectKey};
use crate::pipeline::codec::Decompressor;
use crate::pipeline::frame::{self, Expected, FrameHeader, Last};
use crate::store::{ObjectName, Reading};

/// Opens what a [`Writer`](super::Writer) sealed. Cheap to clone.
#[derive(Clone)]
pub struct Reader(Arc<Inner>);

struct Inner {
    repository: Repository,
    identities: Vec<DecryptionIdentity>,
    /// Whether objects that are not encrypted are read; found out at the first of them.
    accepts_unencrypted: OnceCell<bool>,
    /// Unwrapped data keys, so that a key object is fetched, and a passphrase tried, once.
    keys: Mutex<HashMap<KeyId, DataKey>>,
}

/// A pack whose header was read: what is needed to open frames of it.
#[derive(Clone, Debug)]
pub struct PackHandle {
    /// Which pack.
    pub name: PackName,
    object: ObjectName,
    key: Arc<ObjectKey>,
}

impl PackHandle {
    /// Its name in the store.
    #[must_use]
    pub fn object(&self) -> &ObjectName {
        &self.object
    }

    fn unable(&self, batch: &FrameBatch) -> String {
        format!("unable to read pack '{}' at byte {}", self.object, batch.range.start)
    }
}

/// Frames of one pack that lie side by side and are fetched by one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameBatch {
    /// Which pack: 0 that of the footer, `n` the `n`-th of its sources.
    pub source: u32,
    /// Their bytes in that pack.
    pub range: Range<u64>,
    /// Their indexes in [`PackFooter::frames`], in the order of their offsets.
    pub frames: Vec<usize>,
}

impl FrameBatch {
    /// Batches of at most `bytes_max` (a frame that is larger makes one alone) with all frames of
    /// `footer` that `wanted` picks.
    #[must_use]
    pub fn plan(
        footer: &PackFooter,
        bytes_max: usize,
        wanted: impl Fn(&FrameRecord) -> bool,
    ) -> Vec<Self> {
        let mut picked: Vec<(usize, &FrameRecord)> =
            footer.frames.iter().enumerate().filter(|(_, frame)| wanted(frame)).collect();
        picked.sort_by_key(|(_, frame)| (frame.source, frame.offset));
        let mut batches: Vec<Self> = Vec::new();
        for (index, frame) in picked {
            match batches.last_mut() {
                Some(batch)
                    if batch.source == frame.source
                        && batch.range.end == frame.offset
                        && frame.end() - batch.range.start <= bytes_max as u64 =>
                {
                    batch.range.end = frame.end();
                    batch.frames.push(index);
                }
                _ => batches.push(Self {
                    source: frame.source,
                    range: frame.offset..frame.end(),
                    frames: vec![index],
                }),
            }
        }
        batches
    }

    /// Groups batches that follow one another in one pack into runs of about `bytes_max`, each to be
    /// read by one request ([`Reader::read_run`]); one batch at least is in each.
    #[must_use]
    pub fn runs(batches: Vec<Self>, bytes_max: u64) -> Vec<Vec<Self>> {
        let mut runs: Vec<Vec<Self>> = Vec::new();
        for batch in batches {
            let follows = |run: &&mut Vec<Self>| match (run.first(), run.last()) {
                (Some(first), Some(last)) => {
                    last.source == batch.source
                        && last.range.end == batch.range.start
                        && batch.range.end - first.range.start <= bytes_max
                }
                _ => false,
            };
            match runs.last_mut().filter(follows) {
                Some(run) => run.push(batch),
                None => runs.push(vec![batch]),
            }
        }
        runs
    }
}

/// How much is checked when frames are opened, besides their tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Tags only: whoever checks the CRC of whole files needs no more.
    Tags,
    /// The hash of each plain block as well.
    Hashes,
}

/// Batches of one pack, being read one after the other by one request.
pub struct Run<'a> {
    pack: &'a PackHandle,
    batches: std::vec::IntoIter<FrameBatch>,
    reading: Box<dyn Reading + 'a>,
}

impl Run<'_> {
    /// The next batch, `None` after the last.
    ///
    /// # Errors
    /// As [`Reader::fetch`].
    pub async fn next(&mut self) -> Result<Option<FetchedBatch>> {
        let Some(batch) = self.batches.next() else { return Ok(None) };
        let length = batch.range.end.saturating_sub(batch.range.start);
        let length = usize::try_from(length)
            .map_err(|_too_long| Error::new(Kind::Bug, format!("a batch of {length} bytes")))?;
        let bytes = self.reading.next(length).await.context(|| self.pack.unable(&batch))?;
        Ok(Some(FetchedBatch { pack: self.pack.clone(), batch, bytes }))
    }
}

/// A batch of frames as fetched, still sealed.
#[derive(Debug)]
pub struct FetchedBatch {
    pack: PackHandle,
    batch: FrameBatch,
    bytes: Bytes,
}

impl FetchedBatch {
    /// Opens the frames one after the other and hands each plain block to `visit`.
    ///
    /// # Errors
    /// `corrupt` naming the first bad frame, or what `visit` returns.
    pub fn open(
        self,
        footer: &PackFooter,
        check: Check,
        worker: &mut Worker,
        mut visit: impl FnMut(&FrameRecord, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.open_each(footer, check, worker, |frame, block| visit(frame, block?))
    }

    /// As [`FetchedBatch::open`], but `visit` gets the bad frames too, each with its error, and
    /// decides whether to go on: how `verify` finds all of them.
    ///
    /// # Errors
    /// What `visit` returns.
    pub fn open_each(
        self,
        footer: &PackFooter,
        check: Check,
        worker: &mut Worker,
        mut visit: impl FnMut(&FrameRecord, Result<&[u8]>) -> Result<()>,
    ) -> Result<()> {
        let Self { pack, batch, bytes } = self;
        let mut bytes = owned(bytes);
        for index in batch.frames {
            let frame = footer.frames.get(index).ok_or_else(|| {
                Error::new(Kind::Bug, format!("a batch of frame {index} of another footer"))
            })?;
            let start = usize::try_from(frame.offset.saturating_sub(batch.range.start));
            let place = start.ok().map(|start| start..start + frame.frame_bytes as usize);
            let sealed = place.and_then(|place| bytes.get_mut(place)).unwrap_or_default();
            let opened = open_record(&pack.key, frame, check, sealed, worker).context(|| {
                let (object, offset) = (&pack.object, frame.offset);
                format!("unable to read pack '{object}' at byte {offset}")
            });
            visit(frame, opened)?;
        }
        Ok(())
    }
}

fn open_record<'a>(
    key: &ObjectKey,
    record: &FrameRecord,
    check: Check,
    sealed: &'a mut [u8],
    worker: &'a mut Worker,
) -> Result<&'a [u8]> {
    let expected = Expected { index: record.index, last: Last::No };
    let plain = frame::open(key, &mut worker.decompressor, sealed, expected, &mut worker.scratch)?;
    if plain.len() != record.plain_bytes as usize {
        let (found, said) = (plain.len(), record.plain_bytes);
        let message = format!("the frame holds {found} bytes, the footer says {said}");
        return Err(Error::new(Kind::Corrupt, message));
    }
    if check == Check::Hashes && block_hash(plain) != record.hash {
        return Err(Error::new(Kind::Corrupt, "the plain block does not have the footer's hash"));
    }
    Ok(plain)
}

/// First 16 bytes of the BLAKE3 hash of a plain block.
pub(super) fn block_hash(plain: &[u8]) -> [u8; 16] {
    let mut hash = [0; 16];
    blake3::Hasher::new().update(plain).finalize_xof().fill(&mut hash);
    hash
}

/// The bytes to be changed in place: no copy when nobody else holds them.
fn owned(bytes: Bytes) -> BytesMut {
    bytes.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&*shared))
}

/// A WAL extent object as fetched, still sealed.
#[derive(Debug)]
pub struct FetchedExtent {
    name: ExtentName,
    object: ObjectName,
    bytes: Bytes,
    members: Vec<(ExtentMember, ObjectKey)>,
}

impl FetchedExtent {
    /// Opens it: the plain WAL of its range.
    ///
    /// # Errors
    /// `corrupt` naming object and byte.
    pub fn open(self, decompressor: &mut Decompressor) -> Result<Bytes> {
        let Self { name, object, bytes, members } = self;
        let plain_bytes = usize::try_from(name.range.len_bytes()).unwrap_or(0);
        let mut plain = Vec::with_capacity(plain_bytes);
        let mut bytes = owned(bytes);
        let mut scratch = Vec::new();
        for (member, key) in members {
            let places = member.frames(&bytes)?;
            let count = places.len();
            for (index, place) in (0_u32..).zip(places) {
                let last = if index as usize + 1 == count { Last::Yes } else { Last::No };
                let start = place.start;
                let sealed = bytes.get_mut(place).unwrap_or_default();
                let expected = Expected { index, last };
                let block = frame::open(&key, decompressor, sealed, expected, &mut scratch)
                    .context(|| format!("unable to read WAL extent '{object}' at byte {start}"))?;
                plain.extend_from_slice(block);
            }
        }
        // `ExtentMember::walk` added the lengths up, and opening checked each.
        if plain.len() != plain_bytes {
            let message = format!("{} bytes of WAL from '{object}' for {plain_bytes}", plain.len());
            return Err(Error::new(Kind::Bug, message));
        }
        Ok(Bytes::from(plain))
    }
}

impl Reader {
    pub(super) fn new(repository: Repository, identities: Vec<DecryptionIdentity>) -> Self {
        let accepts_unencrypted = OnceCell::new();
        let keys = Mutex::new(HashMap::new());
        Self(Arc::new(Inner { repository, identities, accepts_unencrypted, keys }))
    }

    /// Reads objects that are not encrypted too, as the operator asked for.
    ///
    /// # Errors
    /// `bug` when something was read already.
    pub fn accept_unencrypted(self) -> Result<Self> {
        match self.0.accepts_unencrypted.set(true) {
            Ok(()) => Ok(self),
            Err(_) => Err(Error::new(Kind::Bug, "a reader changed its mind about encryption")),
        }
    }

    /// Refuses an object without encryption where encryption is expected.
    async fn expect_unencrypted(&self) -> Result<()> {
        let Inner { repository, identities, accepts_unencrypted, .. } = &*self.0;
        let find_out =
            async || -> Result<bool> { Ok(identities.is_empty() && !repository.has_keys().await?) };
        if *accepts_unencrypted.get_or_try_init(find_out).await? {
            return Ok(());
        }
        let expected = if identities.is_empty() {
            "though the cluster has encrypted data"
        } else {
            "though there is an identity to open it with"
        };
        let message = format!("it is not encrypted, {expected}");
        Err(Error::new(Kind::Corrupt, message).hint(
            "If you have written this cluster without encryption, say so with --encryption none; \
             if not, somebody has put this object in the place of yours.",
        ))
    }

    /// The repository read from.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.0.repository
    }

    /// The data key an object's header asks for.
    async fn data_key(&self, cipher: Cipher, id: KeyId) -> Result<DataKey> {
        if cipher == Cipher::None {
            self.expect_unencrypted().await?;
            return Ok(DataKey::public());
        }
        let mut keys = self.0.keys.lock().await;
        if let Some(key) = keys.get(&id) {
            return Ok(key.clone());
        }
        let key = self.open_key(id, self.wrapped_key(id).await?).await?;
        keys.insert(id, key.clone());
        Ok(key)
    }

    /// The body of a key object.
    async fn wrapped_key(&self, id: KeyId) -> Result<Bytes> {
        let repository = self.repository();
        let name = repository.name(&Object::Key(id))?;
        let attempted = || format!("unable to open key '{name}'");
        let wrapped =
            repository.store().get(&name, None).await.context(attempted).map_err(|error| {
                match error.kind() {
                Kind::NotFound => error.hint(
                    "The key was deleted: nothing sealed with it can be read unless it is brought \
                     back from an older version or another copy of the repository.",
                ),
                _ => error,
            }
            })?;
        if wrapped.len() as u64 > WRAPPED_BYTES_MAX {
            let found = wrapped.len();
            let message = format!("{}: {found} bytes, at most {WRAPPED_BYTES_MAX}", attempted());
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(wrapped)
    }

    /// Unwraps the body of key object `id`.
    async fn open_key(&self, id: KeyId, wrapped: Bytes) -> Result<DataKey> {
        let name = self.repository().name(&Object::Key(id))?;
        let inner = Arc::clone(&self.0);
        let system_id = self.repository().system_id();
        // A passphrase costs a third of a second of one core.
        tokio::task::spawn_blocking(move || {
            keys::unwrap(&wrapped, id, system_id, &inner.identities)
        })
        .await
        .map_err(|error| Error::new(Kind::Bug, format!("unwrapping a key: {error}")))?
        .context(|| format!("unable to open key '{name}'"))
    }

    /// Refuses to go on sealing for a passphrase when the newest data key is sealed for one that is not
    /// among ours: nothing would tell one that is mistyped until somebody restores, and no restore that
    /// begins before the change could end after it.
    ///
    /// Only the newest is looked at, for each costs a third of a second, and who changes the passphrase
    /// has the one before among ours then. A key that cannot be read tells nothing.
    ///
    /// # Errors
    /// `config` for another passphrase; what the store reports.
    pub async fn ensure_passphrase_goes_on(&self) -> Result<()> {
        let repository = self.repository();
        let keys = repository.store().list_all(&repository.cluster().keys_prefix()).await?;
        let keys =
            keys.iter().filter_map(|key| match Object::parse(repository.cluster(), &key.name) {
                Some(Object::Key(id)) => Some((key.modified?, id)),
                _ => None,
            });
        let Some((_, id)) = keys.max_by_key(|(modified, _)| *modified) else { return Ok(()) };
        let wrapped = match self.wrapped_key(id).await {
            Ok(wrapped) if keys::is_for_passphrase(&wrapped) => wrapped,
            Err(error) if error.is_transient() => return Err(error),
            Ok(_) | Err(_) => return Ok(()),
        };
        match self.open_key(id, wrapped).await {
            Err(error) if error.kind() == Kind::Denied => Err(Error::new(
                Kind::Config,
                format!(
                    "the newest data key of cluster '{}' is sealed for another passphrase",
                    repository.cluster()
                ),
            )
            .hint(
                "Is the passphrase mistyped? To change it, put the new one into the first line of the \
                 passphrase file (--passphrase-file) and the old one into the second line: the first \
                 seals, and all open. If the old one is lost, so is what it sealed: seal for a key pair \
                 (--recipient) from now on, or begin anew with another --cluster.",
            )),
            Err(error) if error.is_transient() => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// The key of the object with `header`, which is `thing`.
    async fn object_key(&self, header: &ObjectHeader, thing: &Object) -> Result<ObjectKey> {
        let data_key = self.data_key(header.cipher, header.key_id).await?;
        header.object_key(&data_key, self.repository().system_id(), thing)
    }

    /// The manifest of a backup.
    ///
    /// # Errors
    /// `not found`, `corrupt`, `denied`, or what the store reports.
    pub async fn manifest(&self, id: BackupId) -> Result<Manifest> {
        let repository = self.repository();
        let thing = Object::Manifest(id);
        let name = repository.name(&thing)?;
        let attempted = || format!("unable to read manifest '{name}'");
        let object = repository.store().get(&name, None).await.context(attempted)?;
        let front = Front::decode(&object).context(attempted)?;
        let system_id = repository.system_id();
        // Said before the key is asked for: who may open it is in the public section.
        let (_, public) = front.public(&object, id, system_id).context(attempted)?;
        let key = self.object_key(&front.header, &thing).await.context(|| {
            format!("{} (written for {})", attempted(), public.recipients.join(", "))
        })?;
        on_blocking_thread(move || {
            Front::decode_whole(&object, id, system_id, |private_start| {
                open_blocks(&key, &object, private_start..object.len(), 0, PRIVATE_BYTES_MAX)
            })
        })
        .await
        .context(attempted)
    }

    /// Reads the header of a pack.
    ///
    /// # Errors
    /// `not found`, `corrupt`, `denied`, or what the store reports.
    pub async fn pack(&self, name: PackName) -> Result<PackHandle> {
        let repository = self.repository();
        let thing = Object::Pack(name);
        let object = repository.name(&thing)?;
        let attempted = || format!("unable to read pack '{object}'");
        let range = Some(0..HEADER_BYTES as u64);
        let bytes = repository.store().get(&object, range).await.context(attempted)?;
        let header = ObjectHeader::decode(&bytes, ObjectKind::Pack).context(attempted)?;
        let key = self.object_key(&header, &thing).await.context(attempted)?;
        Ok(PackHandle { name, object, key: Arc::new(key) })
    }

    /// The place of the footer as the pack's own trailer says, for those who have no manifest.
    ///
    /// # Errors
    /// `corrupt` when the trailer makes no sense, or what the store reports.
    pub async fn footer_place(&self, pack: &PackHandle, pack_bytes: u64) -> Result<FooterPlace> {
        let attempted = || format!("unable to read pack '{}'", pack.object);
        let start = pack_bytes.saturating_sub(TRAILER_BYTES as u64);
        let range = Some(start..pack_bytes);
        let store = self.repository().store();
        let trailer = store.get(&pack.object, range).await.context(attempted)?;
        FooterPlace::decode(&trailer, pack_bytes).context(attempted)
    }

    /// The footer of a pack of `pack_bytes`, by one request; its place is in the manifest.
    ///
    /// # Errors
    /// `corrupt` when it is damaged or the pack's trailer says another place, or what the store
    /// reports.
    pub async fn pack_footer(
        &self,
        pack: &PackHandle,
        pack_bytes: u64,
        place: FooterPlace,
    ) -> Result<PackFooter> {
        let object = pack.object.clone();
        let attempted = || format!("unable to read the footer of pack '{object}'");
        place.check(pack_bytes).context(attempted)?;
        let range = Some(place.offset..pack_bytes);
        let bytes = self.repository().store().get(&object, range).await.context(attempted)?;
        let frames = place.bytes as usize;
        let trailer = bytes.get(frames..).unwrap_or_default();
        if FooterPlace::decode(trailer, pack_bytes).context(attempted)? != place {
            let message = format!("{}: its trailer names another place", attempted());
            return Err(Error::new(Kind::Corrupt, message));
        }
        let key = Arc::clone(&pack.key);
        on_blocking_thread(move || {
            let footer = open_blocks(&key, &bytes, 0..frames, place.index, FOOTER_BYTES_MAX)?;
            PackFooter::decode(&footer)
        })
        .await
        .context(attempted)
    }

    /// Fetches a batch of frames of `pack`, which must be the one that [`FrameBatch::source`] means.
    ///
    /// # Errors
    /// `corrupt` when the pack ends before, or what the store reports.
    pub async fn fetch(&self, pack: &PackHandle, batch: FrameBatch) -> Result<FetchedBatch> {
        let range = Some(batch.range.clone());
        let store = self.repository().store();
        let bytes = store.get(&pack.object, range).await.context(|| pack.unable(&batch))?;
        Ok(FetchedBatch { pack: pack.clone(), batch, bytes })
    }

    /// Begins to read a run of batches (see [`FrameBatch::runs`]) of `pack`, which must be the one that
    /// their [`FrameBatch::source`] means.
    ///
    /// # Errors
    /// As [`Reader::fetch`].
    pub async fn read_run<'a>(
        &'a self,
        pack: &'a PackHandle,
        batches: Vec<FrameBatch>,
    ) -> Result<Run<'a>> {
        let empty = || Error::new(Kind::Bug, "a run without batches");
        let first = batches.first().ok_or_else(empty)?;
        let end = batches.last().ok_or_else(empty)?.range.end;
        let store = self.repository().store();
        let range = first.range.start..end;
        let reading = store.read(&pack.object, range).await.context(|| pack.unable(first))?;
        Ok(Run { pack, batches: batches.into_iter(), reading })
    }

    /// Fetches the object of a WAL extent and the keys of all extents in it.
    ///
    /// # Errors
    /// `not found`, `corrupt`, `denied`, or what the store reports.
    pub async fn fetch_extent(&self, name: &ExtentName) -> Result<FetchedExtent> {
        let repository = self.repository();
        let object = repository.name(&Object::Extent(*name))?;
        let attempted = || format!("unable to read WAL extent '{object}'");
        let plain_bytes = name.range.len_bytes();
        if plain_bytes > EXTENT_PLAIN_BYTES_MAX {
            let message =
                format!("{}: {plain_bytes} bytes, at most {EXTENT_PLAIN_BYTES_MAX}", attempted());
            return Err(Error::new(Kind::Unsupported, message));
        }
        let bytes = repository.store().get(&object, None).await.context(attempted)?;
        let mut members = Vec::new();
        for member in ExtentMember::walk(name, &bytes).context(attempted)? {
            let thing = Object::Extent(member.name);
            let key = self.object_key(member.header(), &thing).await.context(attempted)?;
            members.push((member, key));
        }
        Ok(FetchedExtent { name: *name, object, bytes, members })
    }

    /// The plain WAL of an extent.
    ///
    /// # Errors
    /// As [`Reader::fetch_extent`] and [`FetchedExtent::open`].
    pub async fn extent(&self, name: &ExtentName) -> Result<Bytes> {
        let fetched = self.fetch_extent(name).await?;
        on_blocking_thread(move || fetched.open(&mut Decompressor::new()?)).await
    }
}

/// Short CPU work off the async threads.
async fn on_blocking_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::new(Kind::Bug, format!("a blocking task failed: {error}")))?
}

/// Opens all frames in `place` of `object`, with indexes from `first_index`, the last flagged; at
/// most `plain_bytes_max` in all.
fn open_blocks(
    key: &ObjectKey,
    object: &[u8],
    place: Range<usize>,
    first_index: u32,
    plain_bytes_max: usize,
) -> Result<Vec<u8>> {
    let mut sealed = object.get(place.clone()).unwrap_or_default().to_vec();
    let (mut decompressor, mut scratch) = (Decompressor::new()?, Vec::new());
    let (mut plain, mut offset, mut index) = (Vec::new(), 0, first_index);
    loop {
        let at = place.start + offset;
        let rest = sealed.get_mut(offset..).unwrap_or_default();
        let header = FrameHeader::decode(rest).context(|| format!("at byte {at}"))?;
        offset += header.frame_bytes;
        let last = if offset == place.len() { Last::Yes } else { Last::No };
        let frame = rest.get_mut(..header.frame_bytes).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("at byte {at}: the frame is cut off"))
        })?;
        let expected = Expected { index, last };
        let block = frame::open(key, &mut decompressor, frame, expected, &mut scratch)
            .context(|| format!("at byte {at}"))?;
        if plain.len() + block.len() > plain_bytes_max {
            let message = format!("at byte {at}: more than {plain_bytes_max} bytes");
            return Err(Error::new(Kind::Corrupt, message));
        }
        plain.extend_from_slice(block);
        if last == Last::Yes {
            return Ok(plain);
        }
        index = index.wrapping_add(1);
    }
}

/// Reads a timeline history object.
pub(super) async fn read_history(repository: &Repository, timeline: TimelineId) -> Result<Bytes> {
    let thing = Object::History(timeline);
    let name = repository.name(&thing)?;
    let attempted = || format!("unable to read timeline history '{name}'");
    let object = repository.store().get(&name, None).await.context(attempted)?;
    let open = || {
        let header = ObjectHeader::decode(&object, ObjectKind::History)?;
        if header.cipher != Cipher::None {
            return Err(Error::new(Kind::Corrupt, "it is encrypted, which no history is"));
        }
        let key = header.object_key(&DataKey::public(), repository.system_id(), &thing)?;
        open_blocks(&key, &object, HEADER_BYTES..object.len(), 0, HISTORY_BYTES_MAX)
    };
    open().map(Bytes::from).context(attempted)
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reader({:?}, {:?})", self.0.repository.cluster(), self.0.identities)
    }
}
