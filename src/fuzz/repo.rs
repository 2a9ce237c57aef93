//! Objects of a repository: what a reader believes fits together, and nothing is believed that is
//! not sealed. Objects without encryption are sealed again after they were damaged, so that what
//! lies behind the tags is reached; with encryption only who has the key could do that.

use std::cell::RefCell;
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Runtime;

use super::input::Input;
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, SystemId, TimelineHistory, TimelineId, crc32c};
use crate::pipeline::cipher::{Cipher, DataKey, ObjectKey};
use crate::pipeline::codec::{Compressor, Decompressor, Level};
use crate::pipeline::frame::{
    self, Expected, FRAME_HEADER_BYTES, FRAME_PLAIN_BYTES_MAX, FrameHeader, Last,
};
use crate::repo::header::{EXTENT_HEADER_BYTES, HEADER_BYTES, ObjectKind};
use crate::repo::names::CLUSTER_NAME_BYTES_MAX;
use crate::repo::pack::TRAILER_BYTES;
use crate::repo::{self};
use crate::repo::{
    BackupId, Check, ClusterIdentity, ClusterName, DecryptionIdentity, ExtentMember, ExtentName,
    FooterPlace, FrameBatch, KeyId, Object, ObjectHeader, PackFooter, PackName, Recipient,
    Repository, Worker, lease,
};
use crate::store::memory::Memory;
use crate::store::{ObjectName, Store};

/// The cluster of `tests/golden/v1`, where seeds come from.
const SYSTEM: SystemId = SystemId(7_300_000_000_000_000_001);
const CLUSTER: &str = "main";
const BACKUP: &str = "20261122T100000Z-00000001-0000000002000028";
const KEY: &str = "f2441830924e3bd932b8649b2215944a";
const IDENTITY: &str = "AGE-SECRET-KEY-1ZLM0ADCYPV0LXH5Z93Q0NLPVTFKM6HHNY3HZ06JGVKQQRF9XP2TSS4GZQ8";
/// What the key object of `tests/golden/v1/encrypted` holds: its CRC-32C.
const KEY_CRC32C: u32 = 2_818_108_600;
/// A passphrase's cost that is not worth the time.
const LOG_N_SLOW: std::ops::RangeInclusive<u32> = 8..=18;

fn backup() -> BackupId {
    BACKUP.parse().expect("the id of a backup")
}

fn cluster() -> ClusterName {
    ClusterName::new(CLUSTER).expect("the name of a cluster")
}

fn clock() -> Clock {
    Clock::simulated("2026-11-22T10:00:00Z".parse().expect("a time"), 1)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: RefCell<Runtime> = RefCell::new(
            tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime"),
        );
    }
    RUNTIME.with(|runtime| runtime.borrow().block_on(future))
}

/// A repository that holds one object besides its identity.
async fn repository_with(thing: &Object, object: Vec<u8>) -> Repository {
    let clock = clock();
    let store: Arc<dyn Store> = Arc::new(Memory::new(&clock));
    let made = Repository::create(Arc::clone(&store), cluster(), SYSTEM, &clock).await;
    let made = made.expect("a memory store takes everything");
    let name = made.name(thing).expect("a name");
    store.put_if_absent(&name, Bytes::from(object)).await.expect("a memory store takes everything");
    made
}

/// Seals the frames in `frames` again, as far as they are frames.
fn seal_again(key: &ObjectKey, frames: &mut [u8]) {
    let mut rest = frames;
    while let Ok(header) = FrameHeader::decode(rest) {
        let Some((whole, later)) = rest.split_at_mut_checked(header.frame_bytes) else { return };
        frame::seal(key, whole, header.index, header.last).expect("a frame can be sealed");
        rest = later;
    }
}

/// What is wrong with an object is said as such, never as a bug of ours.
fn no_bug<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(found) => Some(found),
        Err(error) => {
            assert!(error.kind() != Kind::Bug, "{error}");
            None
        }
    }
}

/// A frame opens to the block it was made of and to nothing else; its payload, sealed by somebody
/// who has the key, still cannot make it hold more than it says.
pub(super) fn frame(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let cipher = input.choose(&[Cipher::None, Cipher::Aes256Gcm]);
    let (mode, index) = (input.byte() % 3, input.u32());
    let key = ObjectKey::derive(cipher, &DataKey::new([3; 32]), &[5; 16], &[b"fuzz"]);
    let key = key.expect("a key");
    let last = if input.byte() & 1 == 0 { Last::No } else { Last::Yes };
    match mode {
        0 => open_stranger(&key, input.rest()),
        1 => open_payload(&key, &mut input, Expected { index, last }),
        _ => open_ours(&key, &mut input, Expected { index, last }),
    }
}

fn open_stranger(key: &ObjectKey, bytes: &[u8]) {
    let Ok(header) = FrameHeader::decode(bytes) else { return };
    assert!((1..=FRAME_PLAIN_BYTES_MAX).contains(&header.plain_len));
    let expected = Expected { index: header.index, last: header.last };
    let (mut frame, mut scratch) = (bytes.to_vec(), Vec::new());
    let mut decompressor = Decompressor::new().expect("a context");
    if frame::open(key, &mut decompressor, &mut frame, expected, &mut scratch).is_ok() {
        // The fuzzer sees what a tag is compared with, and writes it into its input.
        let mut sealed = bytes.to_vec();
        frame::seal(key, &mut sealed, header.index, header.last).expect("a frame can be sealed");
        assert!(sealed == bytes, "a frame without a right tag was opened");
    }
}

/// The input is a payload, sealed with the right key.
fn open_payload(key: &ObjectKey, input: &mut Input<'_>, expected: Expected) {
    let plain_len = input.u32() % (FRAME_PLAIN_BYTES_MAX as u32 + 2);
    let codec = input.byte() & 1;
    let payload = input.rest();
    let sealed_len = u32::try_from(payload.len() + 16).expect("an input is small");
    let mut frame = sealed_len.to_le_bytes().to_vec();
    frame.extend(plain_len.to_le_bytes());
    frame.extend([0, 0, 0, 0, codec, 0, 0, 0]);
    frame.extend_from_slice(payload);
    frame.extend([0; 16]);
    if FrameHeader::decode(&frame).is_err() {
        assert!(frame::seal(key, &mut frame, expected.index, expected.last).is_err());
        return;
    }
    frame::seal(key, &mut frame, expected.index, expected.last).expect("a frame can be sealed");
    let mut scratch = Vec::new();
    let mut decompressor = Decompressor::new().expect("a context");
    match frame::open(key, &mut decompressor, &mut frame, expected, &mut scratch) {
        Ok(block) => assert_eq!(block.len(), plain_len as usize),
        Err(error) => assert_eq!(error.kind(), Kind::Corrupt, "{error}"),
    }
}

/// The input is a block, in pieces; damaged afterwards, it does not open.
fn open_ours(key: &ObjectKey, input: &mut Input<'_>, expected: Expected) {
    let level = Level::new(i32::from(input.byte() % 5) - 1).expect("a level");
    let damage = usize::from(input.u16());
    let piece = usize::from(input.byte()) * 64 + 1;
    let block = input.rest();
    let pieces: Vec<Bytes> = block.chunks(piece).map(Bytes::copy_from_slice).collect();
    let mut compressor = Compressor::new(level).expect("a context");
    let mut out = b"before".to_vec();
    let made = frame::append_compressed(&mut compressor, &pieces, &mut out);
    if block.is_empty() {
        assert!(made.is_err());
        return;
    }
    let mut frame = out[made.expect("a block")].to_vec();
    assert!(frame.len() <= block.len() + frame::FRAME_OVERHEAD_BYTES);
    frame::seal(key, &mut frame, expected.index, expected.last).expect("a frame can be sealed");
    let mut damaged = frame.clone();
    let mut scratch = Vec::new();
    let mut decompressor = Decompressor::new().expect("a context");
    let opened = frame::open(key, &mut decompressor, &mut frame, expected, &mut scratch);
    assert_eq!(opened.expect("what we sealed"), block);
    let place = damage % damaged.len();
    damaged[place] ^= 1 << (damage / damaged.len() % 8);
    let opened = frame::open(key, &mut decompressor, &mut damaged, expected, &mut scratch);
    assert!(opened.is_err(), "a flipped bit went unnoticed");
}

/// A header that is understood is written the same way again.
pub(super) fn object_header(bytes: &[u8]) {
    for kind in [ObjectKind::Pack, ObjectKind::Manifest, ObjectKind::Extent, ObjectKind::History] {
        if let Ok(header) = ObjectHeader::decode(bytes, kind) {
            assert_eq!(header.encode(), bytes[..kind.header_bytes()]);
            assert_eq!(header.extent.is_some(), kind == ObjectKind::Extent);
        }
    }
}

/// A name that is understood is written the same way again.
pub(super) fn object_name(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(name) = ClusterName::new(text) {
        assert!(name.as_str() == text && text.len() <= CLUSTER_NAME_BYTES_MAX);
        assert!(ObjectName::new(format!("{name}/identity")).is_ok());
    }
    if let Ok(id) = text.parse::<KeyId>() {
        assert_eq!(id.to_string(), text);
    }
    if let Ok(id) = text.parse::<BackupId>() {
        assert_eq!(id.to_string(), text);
    }
    if let Ok(extent) = text.parse::<ExtentName>() {
        assert_eq!(extent.to_string(), text);
        assert!(!extent.range.is_empty());
    }
    let marks = repo::fuzz::marks(text.lines());
    let count = marks.holds.len() + marks.expired.len() + marks.barriers.len();
    assert!(count <= text.lines().count());
    let Ok(name) = ObjectName::new(text) else { return };
    if let Some(object) = Object::parse(&cluster(), &name) {
        assert_eq!(object.name(&cluster()).ok(), Some(name));
    }
}

/// The members of an object follow one another and cover what it is called; what opens is as long as
/// its name says.
pub(super) fn extent(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let sealed = input.byte() & 1 != 0;
    let mut object = input.rest().to_vec();
    let name = called(&object);
    if sealed {
        seal_members_again(&mut object);
    }
    if let Ok(members) = ExtentMember::walk(&name, &object) {
        assert_eq!(members.first().map(|member| member.range.start), Some(0));
        assert_eq!(members.last().map(|member| member.range.end), Some(object.len()));
        let mut next = name.range.start();
        for member in &members {
            assert_eq!(member.name.range.start(), next);
            next = member.name.range.end();
        }
        assert_eq!(next, name.range.end());
    }
    let opened = block_on(async {
        let repository = repository_with(&Object::Extent(name), object).await;
        repository.reader(Vec::new()).extent(&name).await
    });
    if let Some(plain) = no_bug(opened) {
        assert_eq!(plain.len() as u64, name.range.len_bytes());
    }
}

/// Headers of the extents in an object, with where each begins and ends.
fn extent_headers(object: &[u8]) -> Vec<(ObjectHeader, std::ops::Range<usize>)> {
    let (mut headers, mut offset) = (Vec::new(), 0);
    while let Ok(header) =
        ObjectHeader::decode(object.get(offset..).unwrap_or_default(), ObjectKind::Extent)
    {
        let frames = header.extent.map_or(0, |fields| fields.frames_bytes as usize);
        let end = (offset + EXTENT_HEADER_BYTES + frames).min(object.len());
        headers.push((header, offset..end));
        offset = end;
    }
    headers
}

/// The name that the headers in an object ask for, else any.
fn called(object: &[u8]) -> ExtentName {
    let headers = extent_headers(object);
    let names = headers.iter().filter_map(|(header, _)| header.extent).map(|fields| fields.name);
    let names: Vec<ExtentName> = names.collect();
    let joined = names.first().zip(names.last()).and_then(|(first, last)| {
        let range = LsnRange::new(first.range.start(), last.range.end());
        let time = names.iter().filter_map(|name| name.time).max();
        let range = range.filter(|range| !range.is_empty())?;
        Some(ExtentName { timeline: first.timeline, range, time })
    });
    joined.unwrap_or_else(|| {
        let range = LsnRange::new(Lsn(0x200_0000), Lsn(0x200_1000)).expect("a range");
        ExtentName { timeline: TimelineId::FIRST, range, time: None }
    })
}

fn seal_members_again(object: &mut [u8]) {
    for (header, place) in extent_headers(object) {
        let Some(fields) = header.extent.filter(|_| header.cipher == Cipher::None) else {
            continue;
        };
        let thing = Object::Extent(fields.name);
        let key = repo::fuzz::public_key(&header, SYSTEM, &thing).expect("a key");
        if let Some(frames) = object.get_mut(place.start + EXTENT_HEADER_BYTES..place.end) {
            seal_again(&key, frames);
        }
    }
}

/// A footer and a trailer that are understood are written the same way again; each frame is fetched
/// once.
pub(super) fn pack_footer(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (bytes_max, pack_bytes) = (input.u16() as usize, input.u64());
    let rest = input.rest();
    let trailer = rest.get(rest.len().saturating_sub(TRAILER_BYTES)..).unwrap_or_default();
    if let Ok(place) = FooterPlace::decode(trailer, pack_bytes) {
        assert_eq!(place.encode(), trailer);
        assert!(place.offset + u64::from(place.bytes) < pack_bytes);
    }
    let Ok(footer) = PackFooter::decode(rest) else { return };
    assert_eq!(footer.encode().expect("what was read can be written"), rest);
    let batches = FrameBatch::plan(&footer, bytes_max, |_| true);
    let mut fetched = vec![0; footer.frames.len()];
    for batch in &batches {
        let bytes: u64 = batch
            .frames
            .iter()
            .map(|index| {
                fetched[*index] += 1;
                u64::from(footer.frames[*index].frame_bytes)
            })
            .sum();
        assert_eq!(bytes, batch.range.end - batch.range.start);
        assert!(batch.frames.len() == 1 || bytes <= bytes_max as u64);
    }
    assert!(fetched.iter().all(|count| *count == 1));
}

/// A pack opens to blocks as long as its footer says.
pub(super) fn pack(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let sealed = input.byte() & 1 != 0;
    let mut object = input.rest().to_vec();
    let name = PackName { backup: backup(), number: 1 };
    if sealed {
        seal_pack_again(&mut object, name);
    }
    block_on(async {
        let pack_bytes = object.len() as u64;
        let repository = repository_with(&Object::Pack(name), object).await;
        let reader = repository.reader(Vec::new());
        let handle = no_bug(reader.pack(name).await)?;
        let place = no_bug(reader.footer_place(&handle, pack_bytes).await)?;
        let footer = no_bug(reader.pack_footer(&handle, pack_bytes, place).await)?;
        let mut worker = Worker::new(Level::default()).expect("contexts");
        for batch in FrameBatch::plan(&footer, 1 << 20, |frame| frame.source == 0) {
            let Some(fetched) = no_bug(reader.fetch(&handle, batch).await) else { continue };
            let visited = fetched.open_each(&footer, Check::Tags, &mut worker, |record, block| {
                if let Ok(block) = block {
                    assert_eq!(block.len(), record.plain_bytes as usize);
                }
                Ok::<(), Error>(())
            });
            visited.expect("every frame is visited");
        }
        Some(())
    });
}

fn seal_pack_again(object: &mut [u8], name: PackName) {
    let Ok(header) = ObjectHeader::decode(object, ObjectKind::Pack) else { return };
    if header.cipher != Cipher::None {
        return;
    }
    let key = repo::fuzz::public_key(&header, SYSTEM, &Object::Pack(name)).expect("a key");
    let pack_bytes = object.len() as u64;
    let trailer = object.get(object.len().saturating_sub(TRAILER_BYTES)..).unwrap_or_default();
    let Ok(place) = FooterPlace::decode(trailer, pack_bytes) else { return };
    let footer = place.offset as usize..place.offset as usize + place.bytes as usize;
    let mut seal = |place| object.get_mut(place).map(|frames| seal_again(&key, frames));
    seal(HEADER_BYTES..footer.start);
    seal(footer);
}

/// A manifest that is understood says the same when it is written again.
pub(super) fn manifest(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let composed = input.byte() & 1 == 0;
    let object = if composed { compose(input.rest()) } else { mend_manifest(input.rest()) };
    block_on(async {
        let repository = repository_with(&Object::Manifest(backup()), object).await;
        let public = no_bug(repository.public_manifest(backup()).await);
        let whole = no_bug(repository.reader(Vec::new()).manifest(backup()).await);
        let Some(public) = public else { return };
        assert_eq!((public.id, public.system_id), (backup(), SYSTEM));
        let text = serde_json::to_vec(&public).expect("JSON");
        assert_eq!(serde_json::from_slice(&text).ok(), Some(public.clone()));
        if let Some(whole) = whole {
            assert_eq!(whole.public, public);
            let sizes: Vec<u64> = whole.packs.iter().map(|pack| pack.stored_bytes).collect();
            assert_eq!(sizes, public.pack_bytes);
        }
    });
}

/// A manifest of these texts: the public section, a zero byte, and the private one, in which `@`
/// stands for the hash of the public one.
fn compose(texts: &[u8]) -> Vec<u8> {
    let mut parts = texts.splitn(2, |byte| *byte == 0);
    let mut public = parts.next().unwrap_or_default().to_vec();
    // As `Manifest::seal` pads it.
    let end = (HEADER_BYTES + 8 + public.len()).next_multiple_of(4096);
    public.resize(end - HEADER_BYTES - 8, b' ');
    let hash = blake3::hash(&public).to_hex();
    let private: Vec<&[u8]> =
        parts.next().unwrap_or_default().split(|byte| *byte == b'@').collect();
    let private = private.join(hash.as_bytes());
    let header = plain_header(ObjectKind::Manifest);
    let mut object = header.encode();
    object.extend(u32::try_from(public.len()).unwrap_or(0).to_le_bytes());
    object.extend(crc32c(&public).to_le_bytes());
    object.extend_from_slice(&public);
    append_block(&header, &Object::Manifest(backup()), &private, &mut object);
    object
}

fn plain_header(kind: ObjectKind) -> ObjectHeader {
    let salt = [9; 16];
    ObjectHeader { kind, cipher: Cipher::None, key_id: KeyId::NONE, salt, extent: None }
}

/// Appends `plain`, if there is any, as the one frame of `thing`.
fn append_block(header: &ObjectHeader, thing: &Object, plain: &[u8], object: &mut Vec<u8>) {
    let key = repo::fuzz::public_key(header, SYSTEM, thing).expect("a key");
    let mut compressor = Compressor::new(Level::default()).expect("a context");
    let plain = [Bytes::copy_from_slice(plain)];
    if let Ok(place) = frame::append_compressed(&mut compressor, &plain, object) {
        frame::seal(&key, &mut object[place], 0, Last::Yes).expect("a frame can be sealed");
    }
}

/// A manifest object with its CRC and its seals made right.
fn mend_manifest(object: &[u8]) -> Vec<u8> {
    let mut object = object.to_vec();
    let public_start = HEADER_BYTES + 8;
    let length = object.get(HEADER_BYTES..HEADER_BYTES + 4).and_then(|word| word.first_chunk());
    let length = length.map_or(0, |word| u32::from_le_bytes(*word) as usize);
    let Some(public) = object.get(public_start..public_start.saturating_add(length)) else {
        return object;
    };
    let crc = crc32c(public).to_le_bytes();
    object[HEADER_BYTES + 4..public_start].copy_from_slice(&crc);
    seal_object_again(
        &mut object,
        ObjectKind::Manifest,
        &Object::Manifest(backup()),
        public_start + length,
    );
    object
}

fn seal_object_again(object: &mut [u8], kind: ObjectKind, thing: &Object, frames_start: usize) {
    let Ok(header) = ObjectHeader::decode(object, kind) else { return };
    if header.cipher == Cipher::None {
        let key = repo::fuzz::public_key(&header, SYSTEM, thing).expect("a key");
        seal_again(&key, &mut object[frames_start..]);
    }
}

/// A history object holds a history, or is refused.
pub(super) fn history(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let composed = input.byte() & 1 == 0;
    let timeline = TimelineId::new(u32::from(input.byte()) + 1).expect("not 0");
    let thing = Object::History(timeline);
    let mut object;
    if composed {
        let header = plain_header(ObjectKind::History);
        object = header.encode();
        append_block(&header, &thing, input.rest(), &mut object);
    } else {
        object = input.rest().to_vec();
        if object.len() >= HEADER_BYTES {
            seal_object_again(&mut object, ObjectKind::History, &thing, HEADER_BYTES);
        }
    }
    block_on(async {
        let repository = repository_with(&thing, object).await;
        let file = no_bug(repository.history_file(timeline).await);
        let history = no_bug(repository.history(timeline).await);
        let expected = file.and_then(|file| TimelineHistory::decode(timeline, &file).ok());
        assert_eq!(history, expected);
    });
}

/// A key object opens to the key it was made for or not at all, and what it costs is bounded.
pub(super) fn key_object(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let with_passphrase = input.byte() & 1 != 0;
    let wrapped = input.rest();
    let identity = if with_passphrase {
        if work_factor(wrapped).is_some_and(|log_n| LOG_N_SLOW.contains(&log_n)) {
            return;
        }
        vec![DecryptionIdentity::passphrase("a passphrase".to_owned().into())]
    } else {
        DecryptionIdentity::parse_file(IDENTITY).expect("an identity")
    };
    let id: KeyId = KEY.parse().expect("the id of a key");
    if let Some(key) = no_bug(repo::fuzz::unwrap(wrapped, id, SYSTEM, &identity)) {
        assert_eq!(crc32c(key.expose()), KEY_CRC32C, "another key under this name");
    }
    let other = KeyId([1; 16]);
    assert!(repo::fuzz::unwrap(wrapped, other, SYSTEM, &identity).is_err());
}

/// The cost in an age file's `-> scrypt SALT LOG_N` line, if it has one.
fn work_factor(wrapped: &[u8]) -> Option<u32> {
    let text = String::from_utf8_lossy(wrapped);
    let (_, line) = text.split_once("-> scrypt ")?;
    line.lines().next()?.split(' ').nth(1)?.parse().ok()
}

/// Identity files and recipients: what is understood is written the same way again, and a secret is
/// in no message.
pub(super) fn key_texts(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let secret = &IDENTITY[20..70];
    match DecryptionIdentity::parse_file(&text) {
        Ok(identities) => {
            for identity in identities {
                let line = identity.secret_line().expect("a file holds no passphrase");
                let again = DecryptionIdentity::parse_file(repo::keys::expose(&line));
                assert_eq!(again.map(|again| again.len()).ok(), Some(1));
                let recipient = identity.recipient().to_string();
                assert!(format!("{identity:?}").contains(&recipient));
                assert_eq!(
                    recipient.parse::<Recipient>().ok().map(|r| r.to_string()),
                    Some(recipient)
                );
            }
        }
        Err(error) => assert!(!format!("{error} {error:?}").contains(secret)),
    }
    match text.parse::<Recipient>() {
        Ok(recipient) => assert!(recipient.to_string().starts_with("age1")),
        Err(error) => {
            assert!(!format!("{error} {error:?}").to_uppercase().contains("AGE-SECRET-KEY-1"))
        }
    }
}

/// An identity that is understood says the same when it is written again.
pub(super) fn identity(bytes: &[u8]) {
    let Ok(identity) = ClusterIdentity::decode(bytes) else { return };
    let again = serde_json::to_vec(&identity).expect("JSON");
    assert_eq!(ClusterIdentity::decode(&again).ok(), Some(identity));
}

/// Who holds a lease can be said, whatever is in it.
pub(super) fn lease(bytes: &[u8]) {
    let found = block_on(async {
        let repository = repository_with(&Object::Lease, bytes.to_vec()).await;
        let name = repository.name(&Object::Lease).expect("a name");
        lease::read(&**repository.store(), &name).await
    });
    if let Some(info) = no_bug(found).flatten() {
        let shown = serde_json::to_value(&info).expect("JSON");
        // A member that nobody knows may hold what is no text.
        let Ok(written) = serde_json::from_slice::<serde_json::Value>(bytes) else { return };
        for name in ["epoch", "description", "ttl_ms"] {
            assert_eq!(shown[name], written[name]);
        }
    }
}

const _: () = assert!(FRAME_HEADER_BYTES == 16, "open_payload writes a header");
