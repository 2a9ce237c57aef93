//! Reading a chain of WAL for its landmarks and record boundaries.
//!
//! In: a [`Chain`] and something that gives the plain bytes of extents. Out: landmarks in the order of
//! the WAL, from a given position on.
//!
//! # Shape
//! At most [`EXTENTS_AHEAD`] extents of at most 16 MiB are in memory, besides what a [`Remembering`] keeps.
//!
//! # Invariants
//! No record that ends after the given position is missed: decoding begins at the start of a page
//! before the position, far enough back that the record which spans the position begins after it.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::StreamExt as _;

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, SegmentSize};
use crate::repo::names::ExtentName;
use crate::wal::{Landmark, RecordReader, Scanner};

use super::chain::{Chain, Piece};

/// Extents being fetched while one is decoded.
const EXTENTS_AHEAD: usize = 2;
/// Plain WAL that is kept for another look: the greatest extents on both sides of a position.
const KEPT_BYTES_MAX: usize = 32 << 20;
/// How far before a position decoding begins at first: longer than any but absurd commit records.
const BACK_BYTES: u64 = 256 << 10;
/// `XLOG_BLCKSZ`: the only size of WAL page that is supported.
pub(crate) const WAL_PAGE_BYTES: u64 = 8192;
/// `SizeOfXLogShortPHD`
const SHORT_HEADER_BYTES: u64 = 24;
/// Offset of `xlp_pageaddr` in a page header.
const ADDRESS_OFFSET: usize = 8;
/// Offset of `xlp_rem_len` in a page header.
const REMAINING_OFFSET: usize = 16;

/// Gives the plain WAL of extents.
pub(crate) trait WalSource: Sync {
    /// All plain bytes of an extent.
    fn extent(&self, name: &ExtentName) -> impl Future<Output = Result<Bytes>> + Send;
}

/// Reads from another source, and keeps what was read last: who looks around a position for records, then
/// for landmarks, then for the commits on both sides reads the same extents several times.
#[derive(Debug)]
pub(crate) struct Remembering<'a, S> {
    source: &'a S,
    /// The last one used comes last.
    kept: Mutex<VecDeque<(ExtentName, Bytes)>>,
}

impl<'a, S> Remembering<'a, S> {
    /// With nothing kept.
    pub(crate) fn new(source: &'a S) -> Self {
        Self { source, kept: Mutex::default() }
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<(ExtentName, Bytes)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recall(&self, name: &ExtentName) -> Option<Bytes> {
        let mut kept = self.kept();
        let place = kept.iter().position(|(known, _)| known == name)?;
        let found = kept.remove(place)?;
        let bytes = found.1.clone();
        kept.push_back(found);
        Some(bytes)
    }

    fn keep(&self, name: ExtentName, bytes: Bytes) {
        let mut kept = self.kept();
        kept.push_back((name, bytes));
        while kept.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() > KEPT_BYTES_MAX {
            kept.pop_front();
        }
    }
}

impl<S: WalSource> WalSource for Remembering<'_, S> {
    async fn extent(&self, name: &ExtentName) -> Result<Bytes> {
        if let Some(bytes) = self.recall(name) {
            return Ok(bytes);
        }
        let bytes = self.source.extent(name).await?;
        self.keep(*name, bytes.clone());
        Ok(bytes)
    }
}

/// Fetches the pieces of `pieces` in order, ahead of their use.
pub(crate) fn pieces<'a, S: WalSource>(
    source: &'a S,
    pieces: Vec<Piece>,
    ahead: usize,
) -> impl futures::Stream<Item = Result<(Piece, Bytes)>> + 'a {
    futures::stream::iter(pieces)
        .map(move |piece| async move { Ok((piece, piece_bytes(source, &piece).await?)) })
        .buffered(ahead)
}

/// The bytes of one piece.
pub(crate) async fn piece_bytes<S: WalSource>(source: &S, piece: &Piece) -> Result<Bytes> {
    let bytes = source.extent(&piece.extent).await?;
    let whole = piece.extent.range;
    let index = |position: Lsn| usize::try_from(position.saturating_since(whole.start())).ok();
    let range = index(piece.range.start()).zip(index(piece.range.end()));
    let wrong = || {
        let found = bytes.len();
        let message =
            format!("extent '{}' holds {found} bytes of WAL, not its range", piece.extent);
        Error::new(Kind::Corrupt, message)
    };
    if bytes.len() as u64 != whole.len_bytes() {
        return Err(wrong());
    }
    range
        .filter(|(start, end)| start <= end && *end <= bytes.len())
        .map_or_else(|| Err(wrong()), |(start, end)| Ok(bytes.slice(start..end)))
}

/// Gives `each` the landmarks whose record ends after `from`, in order, until it breaks or the chain
/// ends at `until`.
pub(crate) async fn landmarks<S: WalSource>(
    source: &S,
    chain: &Chain,
    segment_size: SegmentSize,
    span: LsnRange,
    each: &mut (dyn FnMut(Landmark) -> ControlFlow<()> + Send),
) -> Result<()> {
    let begin = begin_before(source, chain, segment_size, span.start()).await?;
    let mut scanner = Some(Scanner::new(segment_size, begin).of_sent_wal());
    let mut fetched =
        std::pin::pin!(pieces(source, chain.within(begin, span.end()), EXTENTS_AHEAD));
    while let Some(next) = fetched.next().await {
        let (piece, bytes) = next?;
        let Some(mut taken) = scanner.take() else { break };
        let (taken, found, outcome) = blocking(move || {
            let mut found = VecDeque::new();
            let outcome = taken.feed(&bytes, &mut |landmark| found.push_back(landmark));
            (taken, found, outcome)
        })
        .await?;
        scanner = Some(taken);
        for landmark in found {
            if landmark.range().end() > span.start() && each(landmark).is_break() {
                return Ok(());
            }
        }
        outcome.map_err(|error| {
            error.context(format!("unable to decode extent '{}'", piece.extent))
        })?;
    }
    Ok(())
}

/// The records around a position: the last that starts before it, and the first that starts at it or
/// after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Neighbours {
    /// Last record that starts before the position.
    pub(crate) before: Option<LsnRange>,
    /// First record that starts at the position or after it, if it is complete in the chain.
    pub(crate) after: Option<LsnRange>,
}

/// The whole records on both sides of `position`.
pub(crate) async fn neighbours<S: WalSource>(
    source: &S,
    chain: &Chain,
    segment_size: SegmentSize,
    position: Lsn,
) -> Result<Neighbours> {
    let mut back = BACK_BYTES;
    loop {
        let from = Lsn(position.0.saturating_sub(back)).max(chain.start());
        let found = neighbours_from(source, chain, segment_size, (from, position)).await?;
        if found.before.is_some() || from == chain.start() {
            return Ok(found);
        }
        back = back.saturating_mul(8);
    }
}

async fn neighbours_from<S: WalSource>(
    source: &S,
    chain: &Chain,
    segment_size: SegmentSize,
    (from, position): (Lsn, Lsn),
) -> Result<Neighbours> {
    let begin = begin_before(source, chain, segment_size, from).await?;
    let mut found = Neighbours::default();
    let mut reader = Some(RecordReader::new(segment_size, begin));
    let mut fetched =
        std::pin::pin!(pieces(source, chain.within(begin, chain.end()), EXTENTS_AHEAD));
    while let Some(next) = fetched.next().await {
        let (piece, bytes) = next?;
        let Some(mut taken) = reader.take() else { break };
        let (taken, updated, outcome) = blocking(move || {
            let outcome = taken.feed(&bytes, &mut |record| {
                if record.range.start() < position {
                    found.before = Some(record.range);
                } else if found.after.is_none() {
                    found.after = Some(record.range);
                }
                Ok(())
            });
            (taken, found, outcome)
        })
        .await?;
        reader = Some(taken);
        found = updated;
        if found.after.is_some() {
            break;
        }
        outcome.map_err(|error| {
            error.context(format!("unable to decode extent '{}'", piece.extent))
        })?;
    }
    Ok(found)
}

/// The start of a page at or before `from`, such that the record which spans `from`, if any, begins at
/// or after it; the first page of the chain when that is not in the chain. Behind an `XLOG_SWITCH` lie
/// zeros, or pages of a recycled segment, which PostgreSQL never reads: only a page that says where it is
/// will do, and the first of a segment always does.
async fn begin_before<S: WalSource>(
    source: &S,
    chain: &Chain,
    segment_size: SegmentSize,
    from: Lsn,
) -> Result<Lsn> {
    let first_page = Lsn(chain.start().0.next_multiple_of(WAL_PAGE_BYTES));
    let mut back = BACK_BYTES;
    loop {
        let begin = Lsn(from.0.saturating_sub(back)).align_down(WAL_PAGE_BYTES);
        if begin <= first_page {
            return Ok(first_page);
        }
        let Some(piece) = chain.within(begin, Lsn(begin.0 + SHORT_HEADER_BYTES)).first().copied()
        else {
            return Ok(first_page);
        };
        let header = piece_bytes(source, &piece).await?;
        let address = header.get(ADDRESS_OFFSET..).and_then(<[u8]>::first_chunk);
        let remaining = header.get(REMAINING_OFFSET..).and_then(<[u8]>::first_chunk);
        let segment_start = segment_size.start_of(begin);
        back = match (address, remaining) {
            (Some(address), Some(remaining)) if u64::from_le_bytes(*address) == begin.0 => {
                let payload = WAL_PAGE_BYTES - SHORT_HEADER_BYTES;
                let remaining = u64::from(u32::from_le_bytes(*remaining));
                // Generous: every page's worth of the rest takes a page, and one more for what is cut.
                let pages = remaining.div_ceil(payload) + 1;
                let ends_by = begin.0.saturating_add(pages.saturating_mul(WAL_PAGE_BYTES));
                if remaining == 0 || ends_by <= from.0 {
                    return Ok(begin);
                }
                back.saturating_mul(8)
            }
            (Some(_), Some(_)) if segment_start < begin => from.saturating_since(segment_start),
            (Some(_), Some(_)) => back.saturating_mul(8),
            // A header cut in two by the end of an extent is not worth the trouble: go back a page.
            _ => back + WAL_PAGE_BYTES,
        };
    }
}

/// Runs decoding on a thread that may be busy.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        Error::new(Kind::Bug, format!("unable to decode WAL: the decoder ended early: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::timeline::PathPart;
    use crate::restore::craft::{Craft, Extents};

    #[tokio::test]
    async fn nothing_is_read_from_the_middle_of_what_a_switch_left_behind() {
        let start = Lsn(0x300_0000);
        for stale in [true, false] {
            let mut craft = Craft::new(1, start);
            let first = craft.commit(1, "10:00:01");
            let switch = craft.switch();
            // A segment that is used again keeps the pages of its earlier life.
            let mut page = craft.bytes()[..8192].to_vec();
            page[8..16].copy_from_slice(&0x100_0000_u64.to_le_bytes());
            let mut at = Lsn(start.0 + (64 << 10));
            while stale && at < switch.end() {
                craft.overwrite(at, &page);
                at = Lsn(at.0 + 8192);
            }
            let second = craft.commit(2, "10:00:02");
            craft.filler(100);
            let cut = Lsn(start.0 + (700 << 10));
            let mut extents = Extents::default();
            extents.put(&craft, &[cut]);
            let path = [PathPart { timeline: craft.timeline, start: Lsn(0), end: None }];
            let chain = Chain::follow(&extents.catalog(), &path, start);
            assert_eq!(chain.end(), craft.end());
            let mut found = Vec::new();
            let span = LsnRange::new(cut, chain.end()).unwrap();
            landmarks(&extents, &chain, craft.segment_size, span, &mut |landmark| {
                found.extend(landmark.transaction_time().map(|_| landmark.range()));
                ControlFlow::Continue(())
            })
            .await
            .unwrap();
            assert_eq!(found, [second], "stale: {stale}");
            let near = neighbours(&extents, &chain, craft.segment_size, second.start()).await;
            let near = near.unwrap();
            assert_eq!(near.before, Some(switch), "stale: {stale}");
            assert!(near.after.unwrap().end() == second.end() && first.end() <= switch.start());
        }
    }
}
