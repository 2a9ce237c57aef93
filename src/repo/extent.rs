//! WAL extents: a piece of one timeline's WAL, compressed as it comes, sealed when its end is known.
//!
//! # Shape
//! A header of 96 bytes, then frames with indexes from 0, the last flagged. Frame boundaries lie where
//! a megabyte was full; the extent's range says how many plain bytes there are. An object may be
//! several whole extents of one timeline one after the other (see `compaction`): each opens by its own
//! header, whatever the object is called.

use std::ops::Range;

use bytes::Bytes;

use super::header::{EXTENT_HEADER_BYTES, ExtentFields, ObjectHeader, ObjectKind};
use super::names::{EXTENT_PLAIN_BYTES_MAX, ExtentName, KeyId, Object};
use super::writer::Writer;
use crate::error::{Context, Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, PgTime, TimelineId};
use crate::pipeline::codec::{Compressor, Level};
use crate::pipeline::frame::{self, BLOCK_BYTES, FrameHeader, Last};

/// Room made for the object at once. What is not written to costs no memory, and a buffer that grew from
/// nothing would leave its smaller selves as holes in the heap.
const BODY_ROOM_BYTES: usize = 6 << 20;

/// An extent ready to be put.
#[derive(Clone, Debug)]
pub struct SealedExtent {
    /// Its name: timeline, range and greatest commit time.
    pub name: ExtentName,
    /// The object.
    pub body: Bytes,
}

/// An extent in the making. Sync and CPU-bound: run it on a [`Pool`](crate::pipeline::Pool).
///
/// # Shape
/// Plain bytes come in any pieces; each megabyte is compressed when it is full, into the one buffer
/// that becomes the upload's body. Sealing waits for [`ExtentBuilder::finish`], because the key
/// depends on the header and the header on the end.
#[derive(Debug)]
pub struct ExtentBuilder {
    writer: Writer,
    header: ObjectHeader,
    timeline: TimelineId,
    start: Lsn,
    plain_bytes: u64,
    compressor: Compressor,
    waiting: Vec<Bytes>,
    waiting_bytes: usize,
    frames: Vec<Range<usize>>,
    body: Vec<u8>,
}

impl ExtentBuilder {
    /// An extent of `timeline` that begins at `start`.
    ///
    /// # Errors
    /// `unavailable` when there is no memory for a compression context.
    pub fn new(writer: &Writer, timeline: TimelineId, start: Lsn, level: Level) -> Result<Self> {
        let mut body = Vec::with_capacity(BODY_ROOM_BYTES);
        body.resize(EXTENT_HEADER_BYTES, 0);
        Ok(Self {
            header: writer.header(ObjectKind::Extent)?,
            writer: writer.clone(),
            timeline,
            start,
            plain_bytes: 0,
            compressor: Compressor::new(level)?,
            waiting: Vec::new(),
            waiting_bytes: 0,
            frames: Vec::new(),
            body,
        })
    }

    /// Takes in the next bytes, compressing each megabyte that is full.
    ///
    /// # Errors
    /// `bug` when the extent would hold more than [`EXTENT_PLAIN_BYTES_MAX`].
    pub fn push(&mut self, mut bytes: Bytes) -> Result<()> {
        let plain_bytes = self.plain_bytes + bytes.len() as u64;
        if plain_bytes > EXTENT_PLAIN_BYTES_MAX {
            return Err(Error::new(Kind::Bug, format!("an extent of {plain_bytes} bytes")));
        }
        self.plain_bytes = plain_bytes;
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(BLOCK_BYTES - self.waiting_bytes));
            self.waiting_bytes += piece.len();
            self.waiting.push(piece);
            if self.waiting_bytes == BLOCK_BYTES {
                self.compress()?;
            }
        }
        Ok(())
    }

    fn compress(&mut self) -> Result<()> {
        let frame = frame::append_compressed(&mut self.compressor, &self.waiting, &mut self.body)?;
        self.frames.push(frame);
        self.waiting.clear();
        self.waiting_bytes = 0;
        Ok(())
    }

    /// First position of the extent.
    #[must_use]
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// First position after what was pushed.
    #[must_use]
    pub fn end(&self) -> Lsn {
        Lsn(self.start.0.saturating_add(self.plain_bytes))
    }

    /// Plain bytes pushed so far.
    #[must_use]
    pub fn plain_bytes(&self) -> u64 {
        self.plain_bytes
    }

    /// Bytes held: what is compressed, and what waits for its megabyte.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.body.len() + self.waiting_bytes
    }

    /// Seals the extent; `time` is the greatest commit time inside.
    ///
    /// # Errors
    /// `bug` when nothing was pushed.
    pub fn finish(mut self, time: Option<PgTime>) -> Result<SealedExtent> {
        if self.waiting_bytes > 0 {
            self.compress()?;
        }
        let empty = || Error::new(Kind::Bug, "an extent without bytes");
        let range = LsnRange::new(self.start, self.end())
            .filter(|range| !range.is_empty())
            .ok_or_else(empty)?;
        let name = ExtentName { timeline: self.timeline, range, time };
        let frames_bytes = u32::try_from(self.body.len() - EXTENT_HEADER_BYTES)
            .map_err(|_too_long| Error::new(Kind::Bug, "an extent too long for its header"))?;
        self.header.extent = Some(ExtentFields { name, frames_bytes });
        let key = self.writer.object_key(&self.header, &Object::Extent(name))?;
        let header = self.header.encode();
        self.body.get_mut(..header.len()).ok_or_else(empty)?.copy_from_slice(&header);
        let count = self.frames.len();
        for (index, range) in (0_u32..).zip(self.frames) {
            let last = if index as usize + 1 == count { Last::Yes } else { Last::No };
            let sealed = self.body.get_mut(range).ok_or_else(empty)?;
            frame::seal(&key, sealed, index, last)?;
        }
        // Keeps the allocation: giving the unused rest back would copy.
        Ok(SealedExtent { name, body: Bytes::from(self.body) })
    }
}

/// One whole extent inside an object, as far as it can be known without a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentMember {
    /// Its own name.
    pub name: ExtentName,
    /// The data key it is sealed with.
    pub key_id: KeyId,
    /// Its bytes in the object, header included.
    pub range: Range<usize>,
    header: ObjectHeader,
}

impl ExtentMember {
    /// Its header.
    #[must_use]
    pub fn header(&self) -> &ObjectHeader {
        &self.header
    }

    /// Walks the object called `name` and returns its members, checked without a key: whole headers
    /// and frames, lengths that add up, ranges that follow one another and cover the name's exactly,
    /// one timeline, and a greatest commit time that is the name's.
    ///
    /// # Errors
    /// `corrupt` with the offset in the object where that is not so.
    pub fn walk(name: &ExtentName, object: &[u8]) -> Result<Vec<Self>> {
        let mut members: Vec<Self> = Vec::new();
        let mut next = name.range.start();
        let mut offset = 0;
        while offset < object.len() {
            let member = Self::decode(object, offset)
                .context(|| format!("the extent at byte {offset} is damaged"))?;
            let found = member.name;
            if found.timeline != name.timeline || found.range.start() != next {
                return Err(Error::new(
                    Kind::Corrupt,
                    format!(
                        "the extent at byte {offset} holds WAL {} of timeline {}, expected what \
                         follows {next} on timeline {}",
                        found.range, found.timeline, name.timeline
                    ),
                ));
            }
            next = found.range.end();
            offset = member.range.end;
            members.push(member);
        }
        let time = members.iter().filter_map(|member| member.name.time).max();
        if next != name.range.end() || time != name.time {
            let start = name.range.start();
            let message =
                format!("it holds WAL from {start} to {next}, which is not what it is called");
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(members)
    }

    fn decode(object: &[u8], offset: usize) -> Result<Self> {
        let bytes = object.get(offset..).unwrap_or_default();
        let header = ObjectHeader::decode(bytes, ObjectKind::Extent)?;
        let fields = header
            .extent
            .ok_or_else(|| Error::new(Kind::Bug, "an extent header without its fields"))?;
        let plain = fields.name.range.len_bytes();
        if plain > EXTENT_PLAIN_BYTES_MAX {
            return Err(Error::new(Kind::Corrupt, format!("its header says {plain} bytes of WAL")));
        }
        let end = EXTENT_HEADER_BYTES + fields.frames_bytes as usize;
        let frames = bytes.get(EXTENT_HEADER_BYTES..end).ok_or_else(|| {
            let found = bytes.len();
            Error::new(Kind::Corrupt, format!("{found} bytes are left where it needs {end}"))
        })?;
        check_frames(frames, plain)?;
        let range = offset..offset + end;
        Ok(Self { name: fields.name, key_id: header.key_id, range, header })
    }

    /// The places of the member's frames in the object.
    pub(super) fn frames(&self, object: &[u8]) -> Result<Vec<Range<usize>>> {
        let mut places = Vec::new();
        let mut offset = self.range.start + EXTENT_HEADER_BYTES;
        while offset < self.range.end {
            let header = FrameHeader::decode(object.get(offset..).unwrap_or_default())?;
            let end = offset + header.frame_bytes;
            places.push(offset..end);
            offset = end;
        }
        Ok(places)
    }
}

/// Checks, without a key, that `frames` are whole frames in order, of `plain_bytes` in all.
fn check_frames(frames: &[u8], plain_bytes: u64) -> Result<()> {
    let corrupt = |found: String| Error::new(Kind::Corrupt, found);
    let (mut offset, mut index, mut plain) = (0, 0_u32, 0_u64);
    while offset < frames.len() {
        let header = FrameHeader::decode(frames.get(offset..).unwrap_or_default())
            .context(|| format!("frame {index}"))?;
        offset += header.frame_bytes;
        plain += header.plain_len as u64;
        if header.index != index {
            let found = header.index;
            return Err(corrupt(format!("frame {found} is where frame {index} should be")));
        }
        if offset > frames.len() {
            return Err(corrupt(format!("frame {index} is cut off")));
        }
        if (header.last == Last::Yes) != (offset == frames.len()) {
            return Err(corrupt(format!(
                "frame {index} is not the last but marked so, or the reverse"
            )));
        }
        index += 1;
    }
    if plain == plain_bytes {
        return Ok(());
    }
    Err(corrupt(format!("its frames hold {plain} bytes of WAL, its header says {plain_bytes}")))
}

#[cfg(test)]
mod tests {

    use proptest::prelude::*;

    use super::*;
    use crate::clock::Clock;

    use crate::repo::{Encryption, Repository};
    use crate::store::PutOutcome;
    use crate::store::memory::Memory;

    async fn place() -> (Memory, Repository, Writer) {
        let clock = Clock::simulated("2026-11-22T10:00:00Z".parse().unwrap(), 3);
        let (store, repository) = Repository::in_memory(&clock).await;
        let writer = repository.writer(&Encryption::None).await.unwrap();
        (store, repository, writer)
    }

    fn sealed(writer: &Writer, start: u64, wal: &[u8], chunk: usize) -> SealedExtent {
        let level = Level::default();
        let mut builder = ExtentBuilder::new(writer, TimelineId::FIRST, Lsn(start), level).unwrap();
        for bytes in wal.chunks(chunk) {
            builder.push(Bytes::copy_from_slice(bytes)).unwrap();
        }
        assert_eq!(builder.end(), Lsn(start + wal.len() as u64));
        let time = start.is_multiple_of(2).then_some(PgTime(start.cast_signed()));
        builder.finish(time).unwrap()
    }

    fn joined(parts: &[&SealedExtent]) -> (ExtentName, Bytes) {
        let (first, last) = (parts.first().unwrap(), parts.last().unwrap());
        let name = ExtentName {
            timeline: first.name.timeline,
            range: LsnRange::new(first.name.range.start(), last.name.range.end()).unwrap(),
            time: parts.iter().filter_map(|part| part.name.time).max(),
        };
        let body = parts.iter().map(|part| part.body.clone()).collect::<Vec<_>>().concat();
        (name, Bytes::from(body))
    }

    #[tokio::test]
    async fn extents_joined_in_order_are_read_as_one_and_otherwise_refused() {
        let (_, repository, writer) = place().await;
        let wal: Vec<u8> = (0..=255).cycle().take(3_000).collect();
        let [a, b, c] = [0, 1, 2].map(|n| {
            let start = n * 1_000;
            let piece = &wal[start..start + 1_000];
            sealed(&writer, 0x1000 + start as u64, piece, 100)
        });
        let (name, body) = joined(&[&a, &b, &c]);
        writer.put_extent(&SealedExtent { name, body: body.clone() }).await.unwrap();
        assert!(repository.reader(Vec::new()).extent(&name).await.unwrap() == wal);
        for parts in [vec![&a, &c], vec![&a, &c, &b, &c], vec![&a, &a, &b, &c], vec![&b, &c]] {
            let (_, bad) = joined(&parts);
            let error = ExtentMember::walk(&name, &bad).unwrap_err();
            assert!(error.to_string().contains("expected what follows"), "{error}");
        }
        let error = ExtentMember::walk(&name, &joined(&[&a, &b]).1).unwrap_err();
        assert!(error.to_string().contains("not what it is called"), "{error}");
        for other in [
            ExtentName { time: None, ..name },
            ExtentName { timeline: TimelineId::new(2).unwrap(), ..name },
        ] {
            assert_eq!(ExtentMember::walk(&other, &body).unwrap_err().kind(), Kind::Corrupt);
        }
    }

    #[tokio::test]
    async fn an_extent_is_put_once_and_found_by_its_name() {
        let (_, repository, writer) = place().await;
        let extent = sealed(&writer, 0x2000, b"some WAL", 3);
        assert_eq!(writer.put_extent(&extent).await.unwrap(), PutOutcome::Created);
        let again = sealed(&writer, 0x2000, b"some WAL", 8);
        assert_eq!(writer.put_extent(&again).await.unwrap(), PutOutcome::AlreadyThere);
        let reader = repository.reader(Vec::new());
        assert_eq!(reader.extent(&extent.name).await.unwrap(), "some WAL");
        let other = ExtentName { time: None, ..extent.name };
        assert_eq!(reader.extent(&other).await.unwrap_err().kind(), Kind::NotFound);
    }

    #[tokio::test]
    async fn a_history_is_put_once_and_another_one_is_a_conflict() {
        let (_, repository, writer) = place().await;
        let timeline = TimelineId::new(2).unwrap();
        let content = Bytes::from_static(b"1\t0/3000000\treason\n");
        writer.put_history(timeline, content.clone()).await.unwrap();
        let outcome = writer.put_history(timeline, content.clone()).await.unwrap();
        assert_eq!(outcome, PutOutcome::AlreadyThere);
        assert_eq!(repository.history_file(timeline).await.unwrap(), content);
        let other = Bytes::from_static(b"1\t0/4000000\treason\n");
        let error = writer.put_history(timeline, other).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
    }

    #[tokio::test]
    async fn nothing_too_long_and_nothing_empty_is_sealed() {
        let (_, _, writer) = place().await;
        let level = Level::default();
        let builder = || ExtentBuilder::new(&writer, TimelineId::FIRST, Lsn(8), level).unwrap();
        assert!(builder().finish(None).is_err());
        let whole = Bytes::from(vec![0; 16 << 20]);
        let mut full = builder();
        full.push(whole).unwrap();
        assert!(full.held_bytes() < 10_000, "zeros compress as they come");
        assert!(full.push(Bytes::from_static(b"x")).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn any_wal_in_any_chunks_comes_back(
            seed in proptest::collection::vec(any::<u8>(), 1..2_000),
            repeat in 1_usize..1_500,
            chunk in 1_000_usize..3_000_000,
            start in 0_u64..1 << 40,
        ) {
            let wal = seed.repeat(repeat);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let (_, repository, writer) = place().await;
                let extent = sealed(&writer, start, &wal, chunk);
                writer.put_extent(&extent).await.unwrap();
                let members = ExtentMember::walk(&extent.name, &extent.body).unwrap();
                assert_eq!(members.len(), 1);
                let reader = repository.reader(Vec::new());
                assert!(reader.extent(&extent.name).await.unwrap() == wal);
            });
        }

        #[test]
        fn changed_objects_never_panic(at in 0_usize..400, byte: u8, cut in 0_usize..400) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let (_, _, writer) = place().await;
                let extent = sealed(&writer, 0x3000, &[7; 100], 100);
                let mut object = extent.body.to_vec();
                let at = at % object.len();
                object[at] = byte;
                object.truncate(cut.max(1));
                drop(ExtentMember::walk(&extent.name, &object));
            });
        }
    }
}
