//! What a worker thread does with a block: inspect, checksum, compress, seal.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::{Event, OpenPack, Piece, PieceDone, Shared};
use crate::error::{Error, Kind, Result};
use crate::pg::Crc32c;
use crate::pipeline::frame::{self, BLOCK_BYTES, Last, frame_room_bytes};
use crate::pipeline::{Permit, Worker};
use crate::repo::header::HEADER_BYTES;

/// A part in the making: room for the pack's header in front, then whole frames.
pub(super) struct PartBuffer {
    /// The header's room and the frames.
    pub(super) bytes: Vec<u8>,
    /// The frames in it.
    pub(super) frames: Vec<PartFrame>,
    /// Pays for the buffer until its upload has ended.
    pub(super) permit: Permit,
}

/// A frame in a part buffer.
pub(super) struct PartFrame {
    /// Its first byte in the buffer.
    pub(super) start: usize,
    /// Bytes of the whole frame.
    pub(super) frame_bytes: u32,
    /// Bytes of its plain block.
    pub(super) plain_bytes: u32,
    /// Its index in the pack.
    pub(super) index: u32,
    /// Hash of the plain block.
    pub(super) hash: [u8; 16],
    /// Item number, offset in the file, bytes.
    pub(super) spans: Vec<(u64, u64, u32)>,
}

/// What a frame is made of: the bytes of a block that are not all zero.
#[derive(Default)]
struct PlainBlock {
    slices: Vec<Bytes>,
    /// Item number, offset in the file, bytes.
    spans: Vec<(u64, u64, u32)>,
}

/// Works on one block and tells the collector.
pub(super) fn pack_block(
    shared: &Shared,
    pack: &OpenPack,
    block: Vec<Piece>,
    worker: &mut Worker,
    events: &mpsc::Sender<Event>,
) {
    let unfinished = Unfinished(events);
    let event = match work(shared, pack, block, worker, events) {
        Ok(event) => event,
        Err(error) => Event::Failed(error),
    };
    std::mem::forget(unfinished);
    // A collector that has gone knows why.
    let _told = tell(events, event);
}

/// A block that is being worked on: when a panic ends that, nobody but this tells the collector, which
/// would wait for the block for ever.
struct Unfinished<'a>(&'a mpsc::Sender<Event>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let found = "a worker ended without finishing its block; see the log";
        let _told = tell(self.0, Event::Failed(Error::new(Kind::Bug, found)));
    }
}

/// Tells the collector; false when it has gone. Blocks only when it is behind, which it hardly ever
/// is: so a pool without threads can run this inside a runtime.
fn tell(events: &mpsc::Sender<Event>, event: Event) -> bool {
    match events.try_send(event) {
        Ok(()) => true,
        Err(TrySendError::Full(event)) => events.blocking_send(event).is_ok(),
        Err(TrySendError::Closed(_)) => false,
    }
}

fn work(
    shared: &Shared,
    pack: &OpenPack,
    block: Vec<Piece>,
    worker: &mut Worker,
    events: &mpsc::Sender<Event>,
) -> Result<Event> {
    if shared.stop.is_cancelled() {
        return Err(Error::new(Kind::Cancelled, "the backup was stopped"));
    }
    let mut done = Vec::with_capacity(block.len());
    let mut failures = Vec::new();
    let mut plain = PlainBlock::default();
    for piece in block {
        let Piece { item, file_offset, slices, bytes, ends } = piece;
        if bytes > 0 {
            failures.extend(shared.inspect.block(&item.meta, file_offset, &slices));
        }
        let mut crc = Crc32c::new();
        slices.iter().for_each(|slice| crc.update(slice));
        let zero = bytes > 0 && slices.iter().all(|slice| is_zero(slice));
        if bytes > 0 && !zero {
            plain.spans.push((item.number, file_offset, to_u32(bytes)?));
            plain.slices.extend(slices);
        }
        let bytes = bytes as u64;
        shared.counters.plain_bytes.fetch_add(bytes, Ordering::Relaxed);
        done.push(PieceDone { item, file_offset, bytes, crc: crc.value(), ends, zero });
    }
    let found = failures.len() as u64;
    shared.counters.checksum_failure_count.fetch_add(found, Ordering::Relaxed);
    if !plain.slices.is_empty() {
        seal_block(shared, pack, plain, worker, events)?;
    }
    Ok(Event::Block { pack: pack.name.number, done, failures })
}

/// Compresses and seals a frame into a part buffer of the pack, and hands the buffer on when it is
/// full.
fn seal_block(
    shared: &Shared,
    pack: &OpenPack,
    PlainBlock { slices, spans }: PlainBlock,
    worker: &mut Worker,
    events: &mpsc::Sender<Event>,
) -> Result<()> {
    let mut hasher = blake3::Hasher::new();
    for slice in &slices {
        hasher.update(slice);
    }
    let mut hash = [0; 16];
    hasher.finalize_xof().fill(&mut hash);

    let mut part = take_part(shared, pack)?;
    let place = frame::append_compressed(&mut worker.compressor, &slices, &mut part.bytes)?;
    let frame_bytes = to_u32(place.len())?;
    let index = pack.next_index.fetch_add(1, Ordering::Relaxed);
    let start = place.start;
    let sealed = part.bytes.get_mut(place).unwrap_or_default();
    frame::seal(&pack.key, sealed, index, Last::No)?;
    pack.sealed_bytes.fetch_add(u64::from(frame_bytes), Ordering::Relaxed);
    let plain_bytes = to_u32(slices.iter().map(Bytes::len).sum())?;
    part.frames.push(PartFrame { start, frame_bytes, plain_bytes, index, hash, spans });

    // Only the first part of a pack keeps the room for the header: with less than this in frames, any
    // other would be too small for a store.
    if part.bytes.len() - HEADER_BYTES < shared.options.budget.part_bytes {
        pack.idle_parts.lock().unwrap_or_else(PoisonError::into_inner).push(part);
        return Ok(());
    }
    if tell(events, Event::Part { pack: pack.name.number, part }) {
        return Ok(());
    }
    Err(Error::new(Kind::Cancelled, "the backup was stopped"))
}

/// An idle buffer of the pack, or a new one when memory allows. The fullest first: so few are left
/// over when the pack is closed.
fn take_part(shared: &Shared, pack: &OpenPack) -> Result<PartBuffer> {
    {
        let mut idle = pack.idle_parts.lock().unwrap_or_else(PoisonError::into_inner);
        let fullest = idle.iter().enumerate().max_by_key(|(_, part)| part.bytes.len());
        if let Some((index, _)) = fullest {
            return Ok(idle.swap_remove(index));
        }
    }
    let permit = shared.parts.acquire_blocking(1)?;
    let spare = shared.spare_parts.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let mut bytes = spare.unwrap_or_else(|| Vec::with_capacity(part_room_bytes(shared)));
    bytes.resize(HEADER_BYTES, 0);
    Ok(PartBuffer { bytes, frames: Vec::new(), permit })
}

/// Keeps the memory of a part that is stored for the next one: in fresh memory each 4 KiB costs a page
/// fault, together a third of what compressing into it does. Called before the part's permit is given
/// back, so that there are never more of them than permits; one that has grown to much more than a permit
/// pays for (by the footer of its pack, or by what was left over of it) is not kept.
pub(super) fn keep_memory(shared: &Shared, body: Bytes) {
    // While the client still holds it, it is the client that frees it.
    let Ok(mut memory) = body.try_into_mut() else { return };
    memory.clear();
    let memory = Vec::from(memory);
    let room = part_room_bytes(shared);
    if (room..=room + room / 8).contains(&memory.capacity()) {
        shared.spare_parts.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    }
}

/// Room for a part and the frame that fills it, so that it never moves.
fn part_room_bytes(shared: &Shared) -> usize {
    shared.options.budget.part_bytes + frame_room_bytes(BLOCK_BYTES) + HEADER_BYTES
}

/// Whether all bytes are zero; written so that it is vectorised.
fn is_zero(bytes: &[u8]) -> bool {
    let mut chunks = bytes.chunks_exact(256);
    chunks.all(|chunk| chunk.iter().fold(0, |bits, byte| bits | byte) == 0)
        && bytes.chunks_exact(256).remainder().iter().all(|byte| *byte == 0)
}

fn to_u32(number: usize) -> Result<u32> {
    u32::try_from(number)
        .map_err(|_too_long| Error::new(Kind::Bug, format!("a block of {number} bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_only_what_is_all_zero() {
        for length in [0, 1, 255, 256, 257, 8192] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes), "{length}");
            for index in 0..length {
                bytes[index] = 1;
                assert!(!is_zero(&bytes), "{length} {index}");
                bytes[index] = 0;
            }
        }
    }
}
