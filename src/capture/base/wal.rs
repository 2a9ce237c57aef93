//! The WAL of a base backup: who stores it, and proof that all of it is stored.
//!
//! Three cases. The caller streams in this process and gives its status. Nobody streams: we take the
//! lease and run the stream for as long as the backup lasts, through a slot that vanishes with its
//! connection unless the permanent one exists already. Somebody else holds the lease: we watch the
//! repository.
//!
//! # A silent database
//! A backup from a primary ends with a record that the stream treats like a commit, and with a switch
//! to the next segment, so its WAL is cut and stored at once whoever streams. A backup from a standby
//! writes nothing; its end position may lie among records nobody waits for. A stream in this process
//! is asked to store them at once; a stream of another process stores them within its idle flush
//! interval (a minute by default), and the backup waits that long.
//!
//! # Durability
//! Whoever streams, the manifest is put only after a listing of the repository has shown the whole
//! range (`is_stored`): a second look that trusts neither status nor engine.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::capture::stream::{self, OlderWal, Phase, SlotLife, Status, Stream, resume};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, SegmentSize, TimelineHistory, TimelineId};
use crate::repo::{Lease, LeaseOptions, Repository, WalCatalog};

/// Between two looks at the repository while another process streams.
const LOOK_PAUSE: Duration = Duration::from_secs(2);
/// Longest that a stream of ours may take to begin.
const BEGIN_MAX: Duration = Duration::from_secs(120);

/// Who stores the WAL of a backup.
#[derive(Debug)]
pub enum Feed {
    /// A stream that the caller runs in this process.
    Caller(Arc<Status>),
    /// A stream that runs for this backup only.
    Own(OwnStream),
    /// Another process, which holds the lease.
    Other,
}

/// A stream that runs for one backup.
#[derive(Debug)]
pub struct OwnStream {
    status: Arc<Status>,
    cancel: CancellationToken,
    task: JoinHandle<Result<()>>,
}

/// The WAL that a backup needs.
#[derive(Clone, Debug)]
pub struct NeededWal {
    /// Timeline of its end.
    pub timeline: TimelineId,
    /// From the first byte of the segment it starts in, which recovery reads first, to its end.
    pub range: LsnRange,
    /// The way to its timeline.
    pub history: TimelineHistory,
    /// Size of a WAL segment.
    pub segment_size: SegmentSize,
}

impl NeededWal {
    /// For a backup from `start_lsn` to `end_lsn`.
    ///
    /// # Errors
    /// `corrupt` when it ends before it starts.
    pub fn of(
        history: TimelineHistory,
        start_lsn: Lsn,
        end_lsn: Lsn,
        segment_size: SegmentSize,
    ) -> Result<Self> {
        let range = LsnRange::new(segment_size.start_of(start_lsn), end_lsn);
        let backwards = || {
            let message = format!("the server's base backup ends at {end_lsn}, before {start_lsn}");
            Error::new(Kind::Corrupt, message)
        };
        let (timeline, range) = (history.timeline, range.ok_or_else(backwards)?);
        Ok(Self { timeline, range, history, segment_size })
    }
}

impl Feed {
    /// Finds out who streams, and streams if nobody does. `stream` is how.
    ///
    /// # Errors
    /// What taking the lease reports, except that somebody else holds it; what the stream reports
    /// when it cannot begin.
    pub async fn open(stream: Stream, lease: LeaseOptions, clock: &Clock) -> Result<Self> {
        let lease = match Lease::acquire(stream.writer.repository(), lease).await {
            Ok(lease) => lease,
            Err(error) if error.kind() == Kind::Conflict => {
                tracing::info!("the WAL is left to the process that streams it: {error}");
                return Ok(Self::Other);
            }
            Err(error) => return Err(error),
        };
        tracing::info!("nobody streams WAL: it is streamed until this backup is complete");
        let (cancel, status) = (CancellationToken::new(), Arc::clone(&stream.status));
        let token = cancel.clone();
        let task = tokio::spawn(async move {
            let outcome = stream::run(&stream, &lease, &token).await;
            lease.release().await;
            outcome
        });
        let mut own = OwnStream { status, cancel, task };
        own.wait_until_streaming(clock).await?;
        Ok(Self::Own(own))
    }

    /// Waits until `needed` is stored, for as long as it gets on within `stall_max`.
    ///
    /// # Errors
    /// `unavailable` when it does not, or the stream ended.
    pub async fn wait(
        &mut self,
        needed: &NeededWal,
        repository: &Repository,
        stall_max: Duration,
    ) -> Result<()> {
        let end = needed.range.end();
        let status = match self {
            Self::Caller(status) => Some(Arc::clone(status)),
            Self::Own(own) => Some(Arc::clone(&own.status)),
            Self::Other => None,
        };
        if let Some(status) = status {
            status.request_flush(end);
            wait_durable(&status, end, stall_max).await?;
        }
        let clock = repository.clock();
        let mut best = Lsn::INVALID;
        let mut since = clock.instant();
        loop {
            let stored_end = match stored_end(repository, needed).await {
                // An outage now must not cost the whole backup.
                Err(error)
                    if error.is_transient()
                        && clock.instant().saturating_duration_since(since) < stall_max =>
                {
                    tracing::debug!("unable to list the WAL of the backup for now: {error}");
                    tokio::time::sleep(LOOK_PAUSE).await;
                    continue;
                }
                asked => asked?,
            };
            if stored_end >= end {
                return Ok(());
            }
            if stored_end > best {
                (best, since) = (stored_end, clock.instant());
            }
            // A stream of this process said that all is stored: then it must be, at once.
            let limit = if matches!(self, Self::Other) { stall_max } else { LOOK_PAUSE };
            if clock.instant().saturating_duration_since(since) > limit {
                return Err(not_stored(needed, best));
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    /// Ends a stream of ours.
    ///
    /// # Errors
    /// What it reported.
    pub async fn close(self) -> Result<()> {
        match self {
            Self::Own(own) => {
                own.cancel.cancel();
                joined(own.task.await)
            }
            Self::Caller(_) | Self::Other => Ok(()),
        }
    }

    /// Tells a stream of this process that a backup which starts at `start_lsn` is complete.
    pub fn backup_taken(&self, start_lsn: Lsn) {
        match self {
            Self::Caller(status) => status.base_backup_taken(start_lsn),
            Self::Own(own) => own.status.base_backup_taken(start_lsn),
            Self::Other => {}
        }
    }
}

impl OwnStream {
    async fn wait_until_streaming(&mut self, clock: &Clock) -> Result<()> {
        let deadline = clock.instant() + BEGIN_MAX;
        let mut changes = self.status.subscribe();
        let begun = changes.wait_for(|now| now.phase == Phase::Streaming);
        tokio::select! {
            ended = &mut self.task => {
                joined(ended)?;
                Err(Error::new(Kind::Unavailable, "the WAL stream ended before it began"))
            }
            _ = begun => Ok(()),
            () = tokio::time::sleep_until(deadline) => {
                self.cancel.cancel();
                let found = self.status.snapshot();
                let cause = found.server_error.or(found.repository_error).unwrap_or_default();
                let message = format!("unable to begin the WAL stream of the backup: {cause}");
                Err(Error::new(Kind::Unavailable, message))
            }
        }
    }
}

/// Makes `stream` one that lasts as long as a backup.
#[must_use]
pub fn for_one_backup(mut stream: Stream) -> Stream {
    stream.options.slot_life = SlotLife::Connection;
    stream.options.older = OlderWal::Leave;
    stream
}

fn joined(ended: std::result::Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    ended.unwrap_or_else(|error| {
        Err(Error::new(Kind::Bug, format!("the WAL stream ended in an unforeseen way: {error}")))
    })
}

/// Waits until the stream's durable end is at `end`, as long as it moves.
async fn wait_durable(status: &Status, end: Lsn, stall_max: Duration) -> Result<()> {
    let mut reached = status.snapshot().durable_end_lsn;
    loop {
        match tokio::time::timeout(stall_max, status.wait_durable(end)).await {
            Ok(done) => return done.map(drop),
            Err(_elapsed) => {
                let now = status.snapshot();
                if now.durable_end_lsn <= reached {
                    let cause = now.repository_error.or(now.server_error).unwrap_or_default();
                    let message = format!(
                        "the WAL of the backup up to {end} does not get stored; it is up to \
                         {reached}: {cause}"
                    );
                    return Err(Error::new(Kind::Unavailable, message));
                }
                reached = now.durable_end_lsn;
            }
        }
    }
}

fn not_stored(needed: &NeededWal, stored_end: Lsn) -> Error {
    let range = needed.range;
    let found = match stored_end > range.start() {
        true => format!("it is stored up to {stored_end}"),
        false => "none of it is stored".to_owned(),
    };
    let message = format!("the WAL {range} of the backup is not in the repository: {found}");
    Error::new(Kind::Unavailable, message).hint(
        "Look after the process that streams the WAL (its log, or `tidemark list`), then take the \
         backup again.",
    )
}

/// How far the needed WAL is stored without a hole, by the repository's listing; its start when its
/// first byte is missing.
///
/// # Errors
/// What the store reports.
pub async fn stored_end(repository: &Repository, needed: &NeededWal) -> Result<Lsn> {
    let mut stored = Vec::new();
    for part in needed.history.path() {
        let begins = part.start < needed.range.end();
        if begins && part.end.is_none_or(|end| end > needed.range.start()) {
            // No extent crosses a segment boundary: none that begins before the segment matters.
            let from = needed.range.start();
            let wal =
                WalCatalog::load_tail(repository, part.timeline, from, needed.segment_size).await?;
            let end = part.end.unwrap_or(Lsn(u64::MAX));
            // The first segment of a timeline holds its parent's bytes too, up to the switch.
            stored.extend(
                wal.coverage(part.timeline)
                    .iter()
                    .filter_map(|range| LsnRange::new(range.start(), range.end().min(end))),
            );
        }
    }
    let start = needed.range.start();
    let chains = resume::join(stored);
    let chain = chains.iter().find(|range| range.start() <= start && start <= range.end());
    Ok(chain.map_or(start, |range| range.end()))
}

#[cfg(test)]
#[allow(clippy::type_complexity, reason = "tables of cases")]
mod tests {
    use super::*;

    use crate::repo::{ExtentName, Object};

    use bytes::Bytes;

    const SEG: u64 = 16 << 20;

    async fn repository(extents: &[(u32, u64, u64)]) -> Repository {
        let (_, repository) = Repository::in_memory(&Clock::system()).await;
        for (timeline, start, end) in extents {
            let timeline = TimelineId::new(*timeline).unwrap();
            let range = LsnRange::new(Lsn(*start), Lsn(*end)).unwrap();
            let extent = Object::Extent(ExtentName { timeline, range, time: None });
            let name = repository.name(&extent).unwrap();
            repository.store().put_if_absent(&name, Bytes::from_static(b"x")).await.unwrap();
        }
        repository
    }

    fn needed(history: TimelineHistory, start: u64, end: u64) -> NeededWal {
        NeededWal::of(history, Lsn(start), Lsn(end), SegmentSize::DEFAULT).unwrap()
    }

    #[tokio::test]
    async fn wal_is_stored_only_without_a_hole_from_the_start_of_its_first_segment() {
        let history = TimelineHistory::first_timeline_only(TimelineId::FIRST);
        let needed = needed(history, 3 * SEG + 40, 4 * SEG + 100);
        let (two, three) = ((1, 2 * SEG, 3 * SEG), (1, 3 * SEG, 4 * SEG));
        let cases = [
            (vec![], 3 * SEG),
            (vec![(1, 3 * SEG + 8, 4 * SEG)], 3 * SEG),
            (vec![two, three, (1, 4 * SEG + 8, 5 * SEG)], 4 * SEG),
            (vec![three, (1, 4 * SEG, 4 * SEG + 100)], 4 * SEG + 100),
        ];
        for (extents, expected) in cases {
            let repository = repository(&extents).await;
            let found = stored_end(&repository, &needed).await.unwrap();
            assert_eq!(found, Lsn(expected), "{extents:?}");
        }
    }

    #[tokio::test]
    async fn the_first_segment_of_a_timeline_may_be_shared_with_its_parent() {
        let second = TimelineId::new(2).unwrap();
        let history = TimelineHistory::decode(second, b"1\t0/3000100\twhy\n").unwrap();
        let needed = needed(history, 3 * SEG + 0x200, 3 * SEG + 0x900);
        let end = Lsn(3 * SEG + 0x900);
        for extents in [
            [(1, 3 * SEG, 3 * SEG + 0x100), (2, 3 * SEG + 0x100, 3 * SEG + 0x900)],
            [(1, SEG, 2 * SEG), (2, 3 * SEG, 3 * SEG + 0x900)],
        ] {
            let repository = repository(&extents).await;
            assert_eq!(stored_end(&repository, &needed).await.unwrap(), end, "{extents:?}");
        }
        let dead_branch = [(1, 3 * SEG, 3 * SEG + 0x900)];
        let repository = repository(&dead_branch).await;
        assert_eq!(stored_end(&repository, &needed).await.unwrap(), Lsn(3 * SEG + 0x100));
    }
}
