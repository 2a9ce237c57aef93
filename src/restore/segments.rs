//! WAL segment files as PostgreSQL reads them, rebuilt from extents.
//!
//! # Shape
//! A file of exactly the segment size; what the repository does not hold of it is zero, which recovery
//! takes for the end of the WAL.
//!
//! # Invariants
//! - A file is named for the timeline of its last byte: a segment in which a timeline began holds its
//!   parent's bytes first, as PostgreSQL's own does (`XLogInitNewTimeline`), and recovery asks for the
//!   newer name first (`XLogFileReadAnyTLI`).
//! - Every file begins with a valid long page header, which recovery checks before it reads any other
//!   page of the file (`ReadPageInternal` in `xlogreader.c`, 13 to 18). Where the WAL before a backup's
//!   start is not in the repository, the header is made anew; no record begins before the backup's start,
//!   so nothing else of what is missing is ever read.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use futures::StreamExt as _;

use crate::error::{Context, Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, SegmentSize, SystemId, TimelineId};

use super::chain::Piece;
use super::directory::Owner;
use super::rights::as_account;
use super::scan::{self, WAL_PAGE_BYTES, WalSource};

/// Extents on their way while one is written.
const EXTENTS_AHEAD: usize = 2;
/// Bytes of two files that are compared at a time: a segment may have a gibibyte.
const LOOK_BYTES: u64 = 1 << 20;
/// `XLP_LONG_HEADER`
const XLP_LONG_HEADER: u16 = 2;

/// One segment file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Its name.
    pub(crate) name: String,
    /// The timeline in its name.
    pub(crate) timeline: TimelineId,
    /// Its positions.
    pub(crate) range: LsnRange,
    /// What is known of it, in order; at least one.
    pub(crate) pieces: Vec<Piece>,
}

impl Segment {
    /// From the first to the last position that is known.
    pub(crate) fn known(&self) -> LsnRange {
        let (first, last) = (self.pieces.first(), self.pieces.last());
        let known = first
            .zip(last)
            .and_then(|(first, last)| LsnRange::new(first.range.start(), last.range.end()));
        known.unwrap_or(self.range)
    }
}

/// The segment files that hold `pieces`, in order.
pub(crate) fn of_pieces(pieces: &[Piece], size: SegmentSize) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    for piece in pieces {
        let number = size.number_of(piece.range.start());
        let Some(range) = size.range_of(number) else { continue };
        // Extents never cross the end of a segment; were one to, the rest belongs to the next file.
        match segments.last_mut() {
            Some(last) if last.range == range => last.pieces.push(*piece),
            _ => segments.push(Segment {
                name: String::new(),
                timeline: piece.timeline,
                range,
                pieces: vec![*piece],
            }),
        }
        if let Some(last) = segments.last_mut() {
            last.timeline = piece.timeline;
            last.name = size.file_name(piece.timeline, number);
        }
    }
    segments
}

/// Whose WAL it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    /// The cluster.
    pub(crate) system_id: SystemId,
    /// Size of its segments.
    pub(crate) size: SegmentSize,
    /// The account that may write where the files are put, when it is not this process's user.
    pub(crate) owner: Option<Owner>,
}

/// Writes `segment` to a new file at `path`. Nothing is synced.
///
/// # Errors
/// What the repository and the file system report.
pub(crate) async fn write<S: WalSource>(
    source: &S,
    segment: &Segment,
    path: &Path,
    identity: Identity,
) -> Result<()> {
    let attempted = || format!("unable to write WAL segment '{}'", path.display());
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let file = as_account(identity.owner, || options.open(path).context(attempted))?;
    file.set_len(identity.size.bytes()).context(attempted)?;
    let start = segment.range.start();
    let begins_whole = segment.pieces.first().is_some_and(|piece| piece.range.start() == start);
    let mut header = None;
    let mut file = Some(file);
    let mut pieces = std::pin::pin!(scan::pieces(source, segment.pieces.clone(), EXTENTS_AHEAD));
    while let Some(next) = pieces.next().await {
        let (piece, bytes) = next?;
        if !begins_whole && header.is_none() {
            header = long_header(&piece, &bytes, segment, identity);
        }
        let Some(taken) = file.take() else { break };
        let offset = piece.range.start().saturating_since(start);
        let (taken, written) = scan::blocking(move || {
            let written = write_piece(&taken, offset, &bytes);
            (taken, written)
        })
        .await?;
        written.context(attempted)?;
        file = Some(taken);
    }
    if begins_whole {
        return Ok(());
    }
    let header = header.ok_or_else(|| {
        let message = format!("{}: no page of it is in the repository", attempted());
        Error::new(Kind::Corrupt, message)
    })?;
    file.map_or(Ok(()), |file| file.write_all_at(&header, 0)).context(attempted)
}

/// Whether the whole segment file at `path`, of PostgreSQL's own, holds all that the repository has of
/// `segment`: then it holds at least as much. All of it is compared, for the file may be one that was recycled,
/// or have lost pages in a crash of the machine, and what is lost in it must come from the repository.
///
/// # Errors
/// What the repository and the file system report.
pub(crate) async fn is_held<S: WalSource>(
    source: &S,
    segment: &Segment,
    path: &Path,
    size: SegmentSize,
) -> Result<bool> {
    let Some(mut file) = open_whole(path, size)? else { return Ok(false) };
    // The last first: when more was stored since, one extent tells.
    let (before, last) = segment.pieces.split_at(segment.pieces.len().saturating_sub(1));
    let last = scan::pieces(source, last.to_vec(), 1);
    let mut pieces =
        std::pin::pin!(last.chain(scan::pieces(source, before.to_vec(), EXTENTS_AHEAD)));
    while let Some(next) = pieces.next().await {
        let (piece, bytes) = next?;
        let offset = piece.range.start().saturating_since(segment.range.start());
        let compared = scan::blocking(move || (holds(&file, offset, &bytes), file));
        let (held, same) = compared.await?;
        if !held.context(|| format!("unable to read WAL segment '{}'", path.display()))? {
            return Ok(false);
        }
        file = same;
    }
    Ok(true)
}

/// As [`is_held`], for the bytes of `wanted` in a segment file of ours at `ours`.
pub(crate) fn is_held_of(
    ours: &Path,
    wanted: LsnRange,
    path: &Path,
    size: SegmentSize,
) -> Result<bool> {
    let Some(file) = open_whole(path, size)? else { return Ok(false) };
    let attempted = || format!("unable to compare '{}' with '{}'", ours.display(), path.display());
    let ours = File::open(ours).context(attempted)?;
    let mut from = wanted.start();
    while from < wanted.end() {
        let until = wanted.end().min(Lsn(from.0 + LOOK_BYTES));
        let offset = from.saturating_since(size.start_of(from));
        let mut bytes = vec![0; usize::try_from(until.saturating_since(from)).unwrap_or(0)];
        ours.read_exact_at(&mut bytes, offset).context(attempted)?;
        if !holds(&file, offset, &bytes).context(attempted)? {
            return Ok(false);
        }
        from = until;
    }
    Ok(true)
}

/// The segment file at `path`, `None` when there is none of full size.
fn open_whole(path: &Path, size: SegmentSize) -> Result<Option<File>> {
    let attempted = || format!("unable to open WAL segment '{}'", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.context(attempted)?,
    };
    let is_whole = file.metadata().context(attempted)?.len() == size.bytes();
    Ok(is_whole.then_some(file))
}

/// Whether `file` has `bytes` at `offset`.
fn holds(file: &File, offset: u64, bytes: &[u8]) -> std::io::Result<bool> {
    let mut found = vec![0; bytes.len()];
    file.read_exact_at(&mut found, offset)?;
    Ok(found == bytes)
}

fn write_piece(file: &File, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    file.write_all_at(bytes, offset)
}

/// The header of the first page of `segment`, from the header of any page in `bytes`.
fn long_header(
    piece: &Piece,
    bytes: &[u8],
    segment: &Segment,
    identity: Identity,
) -> Option<Vec<u8>> {
    let from = piece.range.start();
    let page = from.0.next_multiple_of(WAL_PAGE_BYTES);
    let at = usize::try_from(page - from.0).ok()?;
    // Magic, flags, timeline.
    let magic = bytes.get(at..at + 2)?;
    let timeline = bytes.get(at + 4..at + 8)?;
    let mut header = magic.to_vec();
    header.extend_from_slice(&XLP_LONG_HEADER.to_le_bytes());
    header.extend_from_slice(timeline);
    header.extend_from_slice(&segment.range.start().0.to_le_bytes());
    // No record is continued here; then padding.
    header.extend_from_slice(&[0; 8]);
    header.extend_from_slice(&identity.system_id.0.to_le_bytes());
    header.extend_from_slice(&u32::from(identity.size).to_le_bytes());
    header.extend_from_slice(&u32::try_from(WAL_PAGE_BYTES).ok()?.to_le_bytes());
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::timeline::PathPart;
    use crate::restore::chain::Chain;
    use crate::restore::craft::{Craft, Extents};
    use crate::wal::Scanner;

    const START: Lsn = Lsn(0x300_0000);

    fn part(timeline: TimelineId, start: Lsn, end: Option<Lsn>) -> PathPart {
        PathPart { timeline, start, end }
    }

    fn identity(craft: &Craft) -> Identity {
        Identity { system_id: SystemId(42), size: craft.segment_size, owner: None }
    }

    #[tokio::test]
    async fn segments_are_rebuilt_byte_for_byte_and_padded_with_zeros() {
        let mut craft = Craft::new(1, START);
        for _ in 0..30 {
            craft.filler(50_000);
        }
        let cuts = [Lsn(START.0 + 700), Lsn(START.0 + (1 << 20)), Lsn(START.0 + (1 << 20) + 9)];
        let mut extents = Extents::default();
        extents.put(&craft, &cuts);
        let path = [part(craft.timeline, Lsn(0), None)];
        let chain = Chain::follow(&extents.catalog(), &path, START);
        let segments = of_pieces(chain.pieces(), craft.segment_size);
        let names: Vec<&str> = segments.iter().map(|segment| segment.name.as_str()).collect();
        assert_eq!(names, ["000000010000000000000030", "000000010000000000000031"]);
        let dir = tempfile::tempdir().unwrap();
        let mut whole = Vec::new();
        for segment in &segments {
            let file = dir.path().join(&segment.name);
            write(&extents, segment, &file, identity(&craft)).await.unwrap();
            let bytes = std::fs::read(file).unwrap();
            assert_eq!(bytes.len() as u64, craft.segment_size.bytes());
            whole.extend(bytes);
        }
        let (written, padding) = whole.split_at(craft.bytes().len());
        assert!(written == craft.bytes() && padding.iter().all(|byte| *byte == 0));
    }

    #[tokio::test]
    async fn the_segment_of_a_promotion_carries_the_new_name_and_both_histories() {
        let mut old = Craft::new(1, START);
        old.filler(20_000);
        let switch = old.end();
        let mut new = old.fork(2);
        old.filler(10_000);
        new.filler(30_000);
        let mut extents = Extents::default();
        extents.put(&old, &[]);
        let mut only_new = Extents::default();
        only_new.put(&new, &[switch]);
        extents.take(only_new, switch);
        let path = [part(old.timeline, Lsn(0), Some(switch)), part(new.timeline, switch, None)];
        let chain = Chain::follow(&extents.catalog(), &path, START);
        let segments = of_pieces(chain.pieces(), new.segment_size);
        assert_eq!(segments[0].name, "000000020000000000000030");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("segment");
        write(&extents, &segments[0], &file, identity(&new)).await.unwrap();
        let bytes = std::fs::read(file).unwrap();
        assert!(bytes.starts_with(new.bytes()));
        // Cut before the switch it is the parent's.
        let parent = of_pieces(&chain.within(START, switch), new.segment_size);
        assert_eq!(parent[0].name, "000000010000000000000030");
    }

    #[tokio::test]
    async fn a_segment_whose_beginning_was_never_stored_gets_a_header() {
        let mut craft = Craft::new(1, START);
        craft.filler(30_000);
        craft.commit(7, "10:00:00");
        let cut = Lsn(START.0 + 8192);
        let mut extents = Extents::default();
        extents.put(&craft, &[cut]);
        extents.remove(START);
        let path = [part(craft.timeline, Lsn(0), None)];
        let chain = Chain::follow(&extents.catalog(), &path, cut);
        let segments = of_pieces(chain.pieces(), craft.segment_size);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("segment");
        write(&extents, &segments[0], &file, identity(&craft)).await.unwrap();
        let bytes = std::fs::read(file).unwrap();
        let mut scanner = Scanner::new(craft.segment_size, START).with_system_id(SystemId(42));
        scanner.feed(&bytes[..40], &mut |_| {}).unwrap();
        assert!(bytes[40..8192].iter().all(|byte| *byte == 0));
        assert!(bytes[8192..].starts_with(&craft.bytes()[8192..]));
    }
}
