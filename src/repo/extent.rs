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
            body: vec![0; EXTENT_HEADER_BYTES],
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
            .map_err(|_| Error::new(Kind::Bug, "an extent too long for its header"))?;
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
