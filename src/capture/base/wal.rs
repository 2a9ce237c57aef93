//! The WAL of a base backup: who stores it, and proof that all of it is stored.
//!
//! Three cases. The caller streams in this process and gives its status. Nobody streams: we take the
//! lease and run the stream for as long as the backup lasts, through a slot that vanishes with its
//! connection. Somebody else holds the lease: we watch the repository and the lease. When the holder ends
//! before the backup's WAL is stored (it was another backup, or it was stopped), we take over and begin
//! where the WAL of the backup is not stored.
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

use jiff::SignedDuration;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::capture::stream::{self, OlderWal, Phase, SlotLife, Status, Stream, WalGap, resume};
use crate::clock::{Clock, Instant};
use crate::error::{Context as _, Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, SegmentSize, TimelineHistory, TimelineId};
use crate::repo::interval::{barrier_after, damage_before};
use crate::repo::{Lease, LeaseOptions, Object, Repository, WalCatalog, lease, marks};

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
    Other(Box<OtherStream>),
}

/// A stream that runs for one backup; dropped, it stops.
#[derive(Debug)]
pub struct OwnStream {
    status: Arc<Status>,
    stop: DropGuard,
    task: JoinHandle<Result<()>>,
}

/// The stream of another process, and how ours would run in its place.
#[derive(Debug)]
pub struct OtherStream {
    ours: Stream,
    lease: LeaseOptions,
}

/// The WAL that a backup needs.
#[derive(Clone, Debug)]
pub struct NeededWal {
    /// Timeline of its end.
    pub timeline: TimelineId,
    /// Where replay begins.
    pub start_lsn: Lsn,
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
        Ok(Self { timeline, start_lsn, range, history, segment_size })
    }
}

impl Feed {
    /// Finds out who streams, and streams if nobody does. `stream` is how.
    ///
    /// # Errors
    /// What taking the lease reports, except that somebody else holds it; what the stream reports
    /// when it cannot begin.
    pub async fn open(stream: Stream, lease: LeaseOptions, clock: &Clock) -> Result<Self> {
        match Lease::acquire(stream.writer.repository(), lease.clone()).await {
            Ok(held) => {
                tracing::info!("nobody streams WAL: it is streamed until this backup is complete");
                OwnStream::begin(stream, held, clock).await.map(Self::Own)
            }
            Err(error) if error.kind() == Kind::Conflict => {
                tracing::info!("the WAL is left to the process that streams it: {error}");
                Ok(Self::Other(Box::new(OtherStream { ours: stream, lease })))
            }
            Err(error) => Err(error),
        }
    }

    /// Waits until `needed` is stored, for as long as it gets on within `stall_max`.
    ///
    /// # Errors
    /// `unavailable` when it does not, or the stream ended; what taking over from another process
    /// reports: `not found` when the server has removed what that one left.
    pub async fn wait(
        &mut self,
        needed: &NeededWal,
        repository: &Repository,
        stall_max: Duration,
    ) -> Result<()> {
        if let Self::Other(other) = self {
            match other.wait(needed, repository, stall_max).await? {
                Some(own) => *self = Self::Own(own),
                None => return Ok(()),
            }
        }
        let status = match self {
            Self::Caller(status) => Some(Arc::clone(status)),
            Self::Own(own) => Some(Arc::clone(&own.status)),
            Self::Other(_) => None,
        };
        if let Some(status) = status {
            let end = needed.range.end();
            status.request_flush(end);
            wait_durable(&status, end, stall_max).await?;
        }
        let mut looks = Looks::begin(needed, repository, stall_max);
        // A stream of this process said that all is stored: then it must be, at once.
        while !looks.is_stored(LOOK_PAUSE).await? {
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        Ok(())
    }

    /// Ends a stream of ours.
    ///
    /// # Errors
    /// What it reported.
    pub async fn close(self) -> Result<()> {
        match self {
            Self::Own(own) => {
                drop(own.stop);
                joined(own.task.await)
            }
            Self::Caller(_) | Self::Other(_) => Ok(()),
        }
    }

    /// Tells a stream of this process that a backup which starts at `start_lsn` of `timeline` is
    /// complete.
    pub fn backup_taken(&self, timeline: TimelineId, start_lsn: Lsn) {
        match self {
            Self::Caller(status) => status.base_backup_taken(timeline, start_lsn),
            Self::Own(own) => own.status.base_backup_taken(timeline, start_lsn),
            Self::Other(_) => {}
        }
    }
}

impl OwnStream {
    /// Streams under `lease` until dropped; returns when it streams.
    async fn begin(stream: Stream, lease: Lease, clock: &Clock) -> Result<Self> {
        let (cancel, status) = (CancellationToken::new(), Arc::clone(&stream.status));
        let stop = cancel.clone().drop_guard();
        let task = tokio::spawn(async move {
            let outcome = stream::run(&stream, &lease, &cancel).await;
            lease.release().await;
            outcome
        });
        let mut own = Self { status, stop, task };
        let deadline = clock.instant() + BEGIN_MAX;
        let mut changes = own.status.subscribe();
        let begun = async {
            let streams = changes.wait_for(|now| now.phase == Phase::Streaming).await;
            streams.map(drop).map_err(|_gone| Error::new(Kind::Bug, "the status went away"))
        };
        tokio::select! {
            ended = &mut own.task => {
                joined(ended)?;
                Err(Error::new(Kind::Unavailable, "the WAL stream ended before it began"))
            }
            begun = begun => begun.map(|()| own),
            () = tokio::time::sleep_until(deadline) => Err(own.abandon().await),
        }
    }

    /// Ends a stream that does not begin; the error says why it does not.
    async fn abandon(self) -> Error {
        // Before it is stopped: a stream that ends as it was told has no error any more.
        let found = self.status.snapshot();
        let cause = found.server_error.or(found.repository_error);
        let cause = cause.unwrap_or_else(|| "the server does not answer".to_owned());
        drop(self.stop);
        if let Err(error) = joined(self.task.await) {
            tracing::debug!("the WAL stream that did not begin ended so: {error}");
        }
        let limit = BEGIN_MAX.as_secs();
        let message =
            format!("unable to begin the WAL stream of the backup within {limit} s: {cause}");
        Error::new(Kind::Unavailable, message)
            .hint("Run 'tidemark check' to see what stands in the way, then take the backup again.")
    }
}

impl OtherStream {
    /// Waits until `needed` is stored; when the other process ends first, gives the stream that was
    /// begun in its place.
    async fn wait(
        &self,
        needed: &NeededWal,
        repository: &Repository,
        stall_max: Duration,
    ) -> Result<Option<OwnStream>> {
        let mut looks = Looks::begin(needed, repository, stall_max);
        loop {
            if looks.is_stored(stall_max).await? {
                return Ok(None);
            }
            if self.has_ended(repository).await?
                && let Some(own) = self.take_over(needed, repository).await?
            {
                return Ok(Some(own));
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    /// Whether the lease was given back, or looks as if its holder had died.
    async fn has_ended(&self, repository: &Repository) -> Result<bool> {
        let name = repository.name(&Object::Lease)?;
        let found = match lease::read(&**repository.store(), &name).await {
            Err(error) if error.is_transient() => {
                tracing::debug!("unable to look at the lease for now: {error}");
                return Ok(false);
            }
            found => found?,
        };
        Ok(found.is_none_or(|holder| {
            let age = repository.clock().now().duration_since(holder.renewed_time);
            let ttl = SignedDuration::from_millis(holder.ttl_ms.try_into().unwrap_or(i64::MAX));
            holder.released || age > ttl
        }))
    }

    /// Streams in place of the process that ended; `None` when somebody streams after all.
    ///
    /// Nothing but that process kept the WAL of the backup on the server. So the stream begins where
    /// the backup's WAL is not stored, or it fails at once.
    async fn take_over(
        &self,
        needed: &NeededWal,
        repository: &Repository,
    ) -> Result<Option<OwnStream>> {
        let held = match Lease::acquire(repository, self.lease.clone()).await {
            Err(error) if error.is_transient() || error.kind() == Kind::Conflict => {
                tracing::debug!("the WAL is still left to another process: {error}");
                return Ok(None);
            }
            held => held?,
        };
        tracing::info!("the process that streamed the WAL has ended: it is streamed here");
        let mut stream = self.ours.clone();
        stream.options.older = OlderWal::Since(needed.range.start());
        let begun = OwnStream::begin(stream, held, repository.clock()).await;
        begun.map(Some).context(|| {
            "the process that streamed the WAL of the backup ended before all of it was stored, and \
             it cannot be streamed here"
        })
    }
}

/// Looks at the repository until the WAL of a backup is there.
struct Looks<'a> {
    needed: &'a NeededWal,
    repository: &'a Repository,
    outage_max: Duration,
    best: Lsn,
    since: Instant,
}

impl<'a> Looks<'a> {
    fn begin(needed: &'a NeededWal, repository: &'a Repository, outage_max: Duration) -> Self {
        let since = repository.clock().instant();
        Self { needed, repository, outage_max, best: Lsn::INVALID, since }
    }

    /// How far the WAL is stored, for certain and to be replayed when that is all of it.
    async fn look(&self) -> Result<Lsn> {
        let (repository, needed) = (self.repository, self.needed);
        let stored_end = stored_end(repository, needed).await?;
        let end = needed.range.end();
        if stored_end >= end {
            // The process that put it may have died before it was sure of that.
            let wal = repository.cluster().wal_prefix();
            repository.store().make_durable(&wal).await?;
            ensure_leads_on(repository, &needed.history, needed.start_lsn, end).await?;
        }
        Ok(stored_end)
    }

    /// One look.
    ///
    /// # Errors
    /// `unavailable` when nothing was stored for longer than `limit`; what the store reports, when it
    /// cannot be asked for too long.
    async fn is_stored(&mut self, limit: Duration) -> Result<bool> {
        let idle = || self.repository.clock().instant().saturating_duration_since(self.since);
        let stored_end = match self.look().await {
            // An outage now must not cost the whole backup.
            Err(error) if error.is_transient() && idle() < self.outage_max => {
                tracing::debug!("unable to list the WAL of the backup for now: {error}");
                return Ok(false);
            }
            asked => asked?,
        };
        if stored_end >= self.needed.range.end() {
            return Ok(true);
        }
        if stored_end > self.best {
            (self.best, self.since) = (stored_end, self.repository.clock().instant());
        } else if idle() > limit {
            return Err(not_stored(self.needed, self.best));
        }
        Ok(false)
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

/// Looks for a mark by which WAL from `start_lsn` to `end_lsn` on the way of `history` leads nowhere.
///
/// # Errors
/// `conflict` when there is one: a backup that begins behind it succeeds. What the store reports.
pub(super) async fn ensure_leads_on(
    repository: &Repository,
    history: &TimelineHistory,
    start_lsn: Lsn,
    end_lsn: Lsn,
) -> Result<()> {
    let (marks, _) = marks::load(repository).await?;
    let (path, barriers) = (history.path(), &marks.barriers);
    let barrier = barrier_after(&path, barriers, start_lsn);
    let Some((lsn, kind)) = barrier.filter(|(lsn, _)| *lsn < end_lsn) else { return Ok(()) };
    let message = format!(
        "the WAL of the backup, which begins at {start_lsn}, cannot be replayed: from {lsn} on {kind}"
    );
    // Up to there, the end of a segment, no backup may begin; a checkpoint does not leave its segment.
    let end = damage_before(&path, barriers, Lsn(lsn.0.saturating_add(1)));
    let end = end.map_or(lsn, |end| end.max(lsn));
    Err(Error::new(Kind::Conflict, message).hint(begin_behind(end)))
}

fn begin_behind(end: Lsn) -> String {
    format!(
        "Take the backup again: it must begin behind {end}. On a standby it begins where the last \
         restartpoint does: run SELECT pg_switch_wal() and then CHECKPOINT on the primary, and CHECKPOINT on \
         the standby when that has replayed them."
    )
}

/// Refuses a backup that begins before the end of one of the `gaps` in what this process has streamed.
///
/// # Errors
/// `conflict` when there is one: a backup that begins behind it succeeds.
pub(super) fn ensure_no_gap_ahead(
    gaps: &[WalGap],
    history: &TimelineHistory,
    start_lsn: Lsn,
) -> Result<()> {
    // Of its timeline a gap lacks what is on the way: that may have left it before the gap ends.
    let end_of = |gap: &WalGap| {
        let own = history.path().into_iter().find(|part| part.timeline == gap.timeline)?;
        let end_lsn = own.end.map_or(gap.end_lsn, |switch| switch.min(gap.end_lsn));
        (gap.start_lsn < end_lsn).then_some(end_lsn)
    };
    let mut ends = gaps.iter().filter_map(|gap| Some((end_of(gap)?, &gap.reason)));
    let Some((end_lsn, reason)) = ends.rfind(|(end_lsn, _)| *end_lsn > start_lsn) else {
        return Ok(());
    };
    let message = format!(
        "the WAL of the backup, which begins at {start_lsn}, is missing up to {end_lsn}: {reason}"
    );
    Err(Error::new(Kind::Conflict, message).hint(begin_behind(end_lsn)))
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

    use crate::capture::stream::upstream::{Upstream, Walsender};
    use crate::capture::stream::{Compaction, StreamOptions};
    use crate::repo::{Encryption, ExtentName};
    use crate::wire::Session;

    use async_trait::async_trait;
    use bytes::Bytes;

    const SEG: u64 = 16 << 20;

    /// A server that lets nobody in.
    #[derive(Debug)]
    struct Closed;

    #[async_trait]
    impl Upstream for Closed {
        async fn connect(&self, _: Session, _: &Clock) -> Result<Box<dyn Walsender>> {
            Err(Error::new(Kind::Unavailable, "the server is closed today"))
        }
    }

    #[test]
    fn a_backup_that_begins_before_a_known_gap_ends_is_refused_at_once() {
        let history =
            TimelineHistory::decode(TimelineId::new(2).unwrap(), b"1\t0/5000\tx\n").unwrap();
        let gap = |timeline, start, end| WalGap {
            timeline: TimelineId::new(timeline).unwrap(),
            start_lsn: Lsn(start),
            end_lsn: Lsn(end),
            reason: "it was removed on the server".to_owned(),
            noticed_at: simulated().now(),
        };
        // The second of a branch that was left, the third before and behind where it was.
        let gaps = [
            gap(1, 0x1000, 0x2000),
            gap(1, 0x6000, 0x9000),
            gap(1, 0x4000, 0x9000),
            gap(2, 0x6000, 0x7000),
        ];
        for (start, refused) in [(0x1500, true), (0x6500, true), (0x7000, false)] {
            let outcome = ensure_no_gap_ahead(&gaps, &history, Lsn(start));
            assert_eq!(outcome.is_err(), refused, "{start:x}: {outcome:?}");
        }
        ensure_no_gap_ahead(&gaps[..3], &history, Lsn(0x5000)).unwrap();
        let error = ensure_no_gap_ahead(&gaps[..1], &history, Lsn(0x1500)).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
        assert!(error.message().contains("missing up to 0/2000"), "{error}");
    }

    fn simulated() -> Clock {
        Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 1)
    }

    async fn lone_stream(repository: &Repository) -> Stream {
        let mut options = StreamOptions { compaction: Compaction::Off, ..StreamOptions::default() };
        options.budget.thread_count = 0;
        for_one_backup(Stream {
            options,
            upstream: Arc::new(Closed),
            writer: repository.writer(&Encryption::None).await.unwrap(),
            status: Arc::new(Status::new()),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_does_not_begin_says_why_and_gives_the_lease_back() {
        let clock = simulated();
        let (_, repository) = Repository::in_memory(&clock).await;
        let stream = lone_stream(&repository).await;
        let error = Feed::open(stream, LeaseOptions::new("backup"), &clock).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.message().contains("the server is closed today"), "{error}");
        assert!(error.hint_text().is_some());
        let name = repository.name(&Object::Lease).unwrap();
        let left = lease::read(&**repository.store(), &name).await.unwrap().unwrap();
        assert!(left.released);
    }

    #[tokio::test(start_paused = true)]
    async fn the_wal_of_a_process_that_ends_is_taken_over_and_not_waited_for() {
        let clock = simulated();
        let (_, repository) = Repository::in_memory(&clock).await;
        let mut theirs = LeaseOptions::new("another backup");
        theirs.process.host = "elsewhere".to_owned();
        let holder = Lease::acquire(&repository, theirs).await.unwrap();
        let stream = lone_stream(&repository).await;
        let mut feed = Feed::open(stream, LeaseOptions::new("backup"), &clock).await.unwrap();
        assert!(matches!(feed, Feed::Other(_)));

        let history = TimelineHistory::first_timeline_only(TimelineId::FIRST);
        let needed = needed(history, 3 * SEG, 4 * SEG);
        let began = clock.instant();
        let ends = async {
            tokio::time::sleep(Duration::from_secs(30)).await;
            holder.release().await;
        };
        let (waited, ()) =
            tokio::join!(feed.wait(&needed, &repository, Duration::from_secs(3600)), ends);
        // This server lets nobody in: that is said, and not that nothing was stored for an hour.
        let error = waited.unwrap_err();
        assert!(error.message().contains("ended before all of it was stored"), "{error}");
        assert!(error.message().contains("the server is closed today"), "{error}");
        assert!(clock.instant() - began < Duration::from_secs(200));
    }

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
    async fn a_backup_whose_wal_cannot_be_replayed_is_not_complete() {
        let history = TimelineHistory::first_timeline_only(TimelineId::FIRST);
        let needed = needed(history, 3 * SEG + 40, 4 * SEG + 100);
        let cases = [
            ((2 * SEG, 3 * SEG), true),
            ((4 * SEG + 100, 5 * SEG), true),
            ((3 * SEG - 10, 4 * SEG), false),
            ((4 * SEG, 5 * SEG), false),
        ];
        for ((start, end), complete) in cases {
            let repository = repository(&[(1, 3 * SEG, 4 * SEG + 100)]).await;
            let barrier = marks::Barrier::damaged(LsnRange::new(Lsn(start), Lsn(end)).unwrap());
            marks::put_barrier(&repository, TimelineId::FIRST, &barrier).await.unwrap();
            let mut looks = Looks::begin(&needed, &repository, Duration::ZERO);
            match looks.is_stored(Duration::ZERO).await {
                Ok(stored) => assert!(stored && complete, "{barrier:?}"),
                Err(error) => {
                    assert!(!complete, "{barrier:?}");
                    assert!(error.message().contains("the server's own WAL is damaged"), "{error}");
                    assert_eq!(error.kind(), Kind::Conflict, "the next one succeeds");
                    let hint = error.hint_text().unwrap();
                    assert!(hint.contains(&format!("begin behind {}.", Lsn(end))), "{hint}");
                    let switch = hint.find("SELECT pg_switch_wal()").unwrap();
                    assert!(switch < hint.find("CHECKPOINT on the primary").unwrap(), "{hint}");
                    assert!(hint.contains("CHECKPOINT on the standby"), "{hint}");
                }
            }
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
