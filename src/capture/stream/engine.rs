//! The engine: connects, streams, and begins again after whatever went wrong.
//!
//! A *session* is one connection. Everything received is handed to the sealer and the uploads, which
//! outlive sessions; a new session begins only when all of that is stored, so that it can be planned
//! from the books alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use tokio_util::sync::CancellationToken;

use super::intake::Unreadable;
use super::ledger::{Held, Ledger};
use super::merging::Merging;
use super::pump::{Ended, Pump};
use super::relief::LeftSlot;
use super::resume::{self, Attempt, OlderWal, Situation};
use super::sealer::Sealer;
use super::server::{self, Met, OurSlot, Server};
use super::status::{Phase, Status};
use super::uploads::{Stored, Upload, Uploads, jittered};
use super::upstream::Walsender;
use super::watch::{self, Observation, Watch};
use super::{Compaction, SlotLife, Stream};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, PgTime, SegmentSize, TimelineHistory, TimelineId};
use crate::repo::lease::{Guard, Lease, Progress};
use crate::repo::marks::Barrier;

/// First pause before connecting again.
const PAUSE_MIN: Duration = Duration::from_millis(200);
/// Longest pause: the longest that a server which came back waits for us.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// How a session ended when nothing went wrong.
#[derive(Debug)]
pub(super) enum SessionEnd {
    /// We were asked to stop.
    Stopped,
    /// The server keeps more WAL for us than it may: go on from its present end.
    CeilingPassed,
    /// Never to be tried again.
    Refused(Error),
}

/// What a session begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begin {
    /// Where the books end.
    Resume,
    /// At the server's present end, giving up what is between.
    GiveUp,
}

/// The state that outlives sessions.
#[derive(Debug)]
pub(super) struct Engine<'a> {
    pub(super) stream: &'a Stream,
    pub(super) lease: &'a Lease,
    pub(super) guard: Guard,
    pub(super) clock: Clock,
    pub(super) status: Arc<Status>,
    pub(super) ledger: Ledger,
    /// Whether what earlier processes stored is in the books.
    loaded: bool,
    pub(super) uploads: Uploads,
    pub(super) sealer: Sealer,
    pub(super) lag: LagWatch,
    /// Where the decoder failed.
    pub(super) unreadable: Unreadable,
    merging: Option<Merging>,
    connected_before: bool,
    /// The newest timeline of a server that this process has streamed.
    pub(super) newest_timeline: Option<TimelineId>,
    /// The histories this engine has put: they need no repository any more. A handful, and small.
    histories: BTreeMap<TimelineId, Bytes>,
    /// Where the slot stood whose WAL was gone.
    void_slot_lsn: Option<Lsn>,
    segment_size: Option<SegmentSize>,
    /// The permanent slot, once a session has used it.
    pub(super) left_slot: Option<LeftSlot>,
    /// Where a stream for one backup began: from there on its WAL has no hole.
    pub(super) began_at: Option<Lsn>,
}

/// Whether the server keeps too much WAL for us.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LagWatch {
    ceiling_bytes: Option<u64>,
    before_bytes: Option<u64>,
}

impl LagWatch {
    /// Whether the lag is above the ceiling and has not shrunk since the last observation: a stream
    /// that catches up, say after having been away, is left alone.
    pub(super) fn is_passed(&mut self, lag_bytes: u64) -> bool {
        let before = self.before_bytes.replace(lag_bytes);
        let above = self.ceiling_bytes.is_some_and(|ceiling| lag_bytes > ceiling);
        above && before.is_some_and(|before| before <= lag_bytes)
    }
}

impl<'a> Engine<'a> {
    /// Gets ready; what the repository holds is read with the first session.
    pub(super) fn start(stream: &'a Stream, lease: &'a Lease) -> Result<Self> {
        let options = &stream.options;
        Ok(Self {
            stream,
            lease,
            guard: lease.guard(),
            clock: stream.writer.repository().clock().clone(),
            status: Arc::clone(&stream.status),
            ledger: Ledger::new(Held::default()),
            loaded: false,
            uploads: Uploads::new(
                stream.writer.clone(),
                lease.guard(),
                options.uploads_max,
                &stream.status,
            ),
            sealer: Sealer::start(
                stream.writer.clone(),
                options.level,
                options.budget.thread_count,
            )?,
            lag: LagWatch { ceiling_bytes: options.lag_ceiling_bytes, before_bytes: None },
            unreadable: Unreadable::default(),
            merging: None,
            connected_before: false,
            newest_timeline: None,
            histories: BTreeMap::new(),
            void_slot_lsn: None,
            segment_size: None,
            left_slot: None,
            began_at: None,
        })
    }

    /// Streams until asked to stop or until going on makes no sense.
    ///
    /// Giving up is decided anew after each failure: by then the repository may take everything, and
    /// the server still has it.
    pub(super) async fn run(&mut self, cancel: &CancellationToken) -> Result<()> {
        let (mut pause, mut furthest) = (PAUSE_MIN, Lsn::INVALID);
        let mut begin = Begin::Resume;
        loop {
            let error = match self.session(begin, cancel).await {
                Ok(SessionEnd::Stopped) => return Ok(()),
                Ok(SessionEnd::Refused(error)) => return Err(error),
                Ok(SessionEnd::CeilingPassed) => {
                    begin = Begin::GiveUp;
                    continue;
                }
                Err(error) => error,
            };
            self.guard.ensure_held()?;
            if self.is_final(&error) {
                return Err(error);
            }
            // A session that got further than all before was a good one: the next pause is short.
            let received_end = self.status.received_end();
            if received_end > furthest {
                (furthest, pause) = (received_end, PAUSE_MIN);
            }
            let wait = jittered(pause, &self.clock);
            tracing::warn!("{error}; connecting again in {} ms", wait.as_millis());
            self.status.update(|now| {
                now.phase = Phase::Connecting;
                now.server_error = Some(error.to_string());
            });
            pause = (pause * 2).min(PAUSE_MAX);
            begin = Begin::Resume;
            tokio::select! {
                () = cancel.cancelled() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Whether an error of the server's is worth no second try. Before the first connection, what
    /// the operator got wrong is told at once; later it may be repaired while we wait.
    fn is_final(&self, error: &Error) -> bool {
        match error.kind() {
            Kind::Unavailable | Kind::Conflict | Kind::Corrupt | Kind::NotFound => false,
            Kind::Config | Kind::Denied => !self.connected_before,
            Kind::Usage | Kind::Unsupported | Kind::Cancelled | Kind::Bug => true,
        }
    }

    async fn session(&mut self, begin: Begin, cancel: &CancellationToken) -> Result<SessionEnd> {
        if begin == Begin::Resume
            && let Some(end) = self.drain(cancel).await?
        {
            return Ok(end);
        }
        let mut guard = self.lease.guard();
        tokio::select! {
            // First the request to stop: a server that refuses at once would win half of the draws.
            biased;
            () = cancel.cancelled() => self.stop_without_server().await,
            error = guard.lost() => Ok(SessionEnd::Refused(error)),
            met = self.meet() => match met? {
                Ok((server, slot)) => {
                    let mut begin = begin;
                    if begin == Begin::GiveUp && !self.must_give_up(&server)? {
                        if let Some(end) = self.drain(cancel).await? {
                            return Ok(end);
                        }
                        begin = Begin::Resume;
                    }
                    self.stream_from(begin, server, slot, cancel).await
                }
                Err(refused) => Ok(SessionEnd::Refused(refused)),
            }
        }
    }

    /// Whether what the server keeps is above the ceiling still: meeting it may have taken long, and the
    /// repository may have taken something meanwhile.
    fn must_give_up(&mut self, server: &Server) -> Result<bool> {
        while let Some(stored) = self.uploads.next_stored().now_or_never() {
            self.on_stored(&stored?);
        }
        Ok(self.is_ceiling_passed(server.flushed_end_lsn))
    }

    /// Waits until everything handed over is stored.
    async fn drain(&mut self, cancel: &CancellationToken) -> Result<Option<SessionEnd>> {
        let options = &self.stream.options;
        let clock = self.clock.clone();
        let (upstream, slot_name) = (&self.stream.upstream, &options.slot_name);
        let mut watch = None;
        while self.unstored_count() > 0 {
            self.status.update(|now| now.phase = Phase::WaitingForRepository);
            let watch = watch
                .get_or_insert_with(|| Watch::start(upstream, slot_name, &clock, &self.status));
            tokio::select! {
                biased;
                () = cancel.cancelled() => return self.stop_without_server().await.map(Some),
                error = self.guard.lost() => return Ok(Some(SessionEnd::Refused(error))),
                stored = self.uploads.next_stored() => self.on_stored(&stored?),
                sealed = self.sealer.next() => self.uploads.push(sealed?),
                observed = watch.changed() => {
                    if self.on_observation(&observed) {
                        return Ok(Some(SessionEnd::CeilingPassed));
                    }
                }
            }
        }
        self.status.update(|now| now.phase = Phase::Connecting);
        Ok(None)
    }

    /// Connects and prepares server and slot. The inner error is final.
    async fn meet(&mut self) -> Result<Result<(Server, OurSlot)>> {
        let stream = self.stream;
        if !self.loaded {
            self.ledger = Ledger::new(Held::load(stream.writer.repository()).await?);
            self.loaded = true;
        }
        let expected = stream.writer.repository().system_id();
        let mut server = match Server::meet(&*stream.upstream, expected, &self.clock).await? {
            Ok(server) => server,
            Err(refused) => return Ok(Err(refused)),
        };
        self.check_not_replaced(&server)?;
        let (timeline, history_file) = (server.timeline, server.history_file.as_ref());
        if let Err(error) = self.store_history(timeline, history_file).await {
            return if error.kind() == Kind::Conflict { Ok(Err(error)) } else { Err(error) };
        }
        let mut stored = self.ledger.held().ranges();
        if let Some(void_lsn) = self.void_slot_lsn.take() {
            match stream.options.slot_life {
                SlotLife::Permanent => {
                    server::drop_void_slot(&mut server, void_lsn, &stream.options).await?;
                }
                // It is not ours to drop; what it was said to keep is not asked for again.
                SlotLife::Connection => stored.clear(),
            }
        }
        let slot = server::ensure_slot(&mut server, &stored, &stream.options, &self.clock).await?;
        self.segment_size = Some(server.segment_size);
        if stream.options.slot_life == SlotLife::Permanent {
            let segment_size = server.segment_size;
            self.left_slot = Some(LeftSlot { lsn: slot.restart_lsn, segment_size });
        }
        self.warn_of_other_timelines(&server);
        self.connected_before = true;
        self.note_timeline(server.timeline);
        Ok(Ok((server, slot)))
    }

    /// Stores the history of a timeline before any WAL of it. One that is stored already is left alone:
    /// a server is relieved while the repository is away.
    async fn store_history(&mut self, timeline: TimelineId, content: Option<&Bytes>) -> Result<()> {
        let Some(content) = content else { return Ok(()) };
        if self.histories.get(&timeline) == Some(content) {
            return Ok(());
        }
        self.stream.writer.put_history(timeline, content.clone()).await?;
        self.note_history(timeline, content.clone());
        Ok(())
    }

    /// The history of `timeline` is in the repository.
    pub(super) fn note_history(&mut self, timeline: TimelineId, content: Bytes) {
        self.histories.insert(timeline, content);
    }

    /// Opens a connection for `attempt`, if `open` is not one, and stores the history of the timeline it
    /// begins on when the server has left that one: the histories of those that follow are stored as the
    /// stream comes to them. A slot that lives as long as a connection is made anew on another one. The inner
    /// error is final.
    async fn open(
        &mut self,
        open: Option<Box<dyn Walsender>>,
        attempt: &Attempt,
        met: &Met,
        slot: &mut OurSlot,
    ) -> Result<Result<Box<dyn Walsender>>> {
        let mut open = match open {
            Some(open) => open,
            None => {
                let mut again = met.reconnect(&*self.stream.upstream, &self.clock).await?;
                let options = &self.stream.options;
                if options.slot_life == SlotLife::Connection {
                    let name = &options.slot_name;
                    slot.name =
                        server::renew_temporary_slot(&mut *again, name, &self.clock).await?;
                }
                again
            }
        };
        if attempt.timeline == met.timeline {
            return Ok(Ok(open));
        }
        let (_, history_file) = server::read_history(&mut *open, attempt.timeline).await?;
        match self.store_history(attempt.timeline, history_file.as_ref()).await {
            Err(error) if error.kind() == Kind::Conflict => Ok(Err(error)),
            Err(error) => Err(error),
            Ok(()) => Ok(Ok(open)),
        }
    }

    /// Tries the ways to begin until one works, and streams.
    async fn stream_from(
        &mut self,
        begin: Begin,
        server: Server,
        mut slot: OurSlot,
        cancel: &CancellationToken,
    ) -> Result<SessionEnd> {
        let older = self.older();
        let attempts = match begin {
            Begin::GiveUp => vec![self.give_up(&server)],
            Begin::Resume => self.plan(&server, &slot, older),
        };
        if let Some(refused) = self.check_not_behind(&server, &attempts)? {
            return Ok(SessionEnd::Refused(refused));
        }
        let stream = self.stream;
        let met = server.met(stream.writer.repository().system_id());
        let Server { connection, status_interval, synchronous, .. } = server;
        let Server { segment_size, history, .. } = server;
        let mut connection = Some(connection);
        let last = attempts.len().saturating_sub(1);
        if stream.options.compaction == Compaction::On && self.merging.is_none() {
            let repository = stream.writer.repository();
            self.merging = Some(Merging::start(repository, segment_size, &self.status));
        }
        for (index, attempt) in attempts.iter().enumerate() {
            let mut guard = self.lease.guard();
            let opened = tokio::select! {
                biased;
                () = cancel.cancelled() => return self.stop_without_server().await,
                error = guard.lost() => return Ok(SessionEnd::Refused(error)),
                opened = self.open(connection.take(), attempt, &met, &mut slot) => opened?,
            };
            let open = match opened {
                Ok(open) => open,
                Err(refused) => return Ok(SessionEnd::Refused(refused)),
            };
            if begin == Begin::Resume {
                self.ledger.begin(attempt, slot.restart_lsn);
                self.began_at.get_or_insert(attempt.store_from);
            }
            if let Some(gap) = attempt.gap {
                self.record_gap(&history, gap, "it was removed on the server");
            }
            let mut pump = Pump::new(self, attempt, &history, segment_size, status_interval);
            pump.set_synchronous(synchronous);
            match pump.run(open, &slot, cancel).await {
                Ok(Ended::Stopped) => return Ok(SessionEnd::Stopped),
                Ok(Ended::CeilingPassed) => return Ok(SessionEnd::CeilingPassed),
                Ok(Ended::Refused(error)) => return Ok(SessionEnd::Refused(error)),
                Ok(Ended::WalRemoved(error)) if index < last => {
                    tracing::info!("WAL from {} on is gone: {error}", attempt.stream_from);
                }
                Ok(Ended::WalRemoved(error)) if matches!(older, OlderWal::Since(_)) => {
                    let message = "the WAL that the base backup still needs is gone on the server";
                    return Ok(SessionEnd::Refused(error.context(message)));
                }
                Ok(Ended::WalRemoved(error)) => {
                    // Not even what the slot promised: it was invalidated, and a new one is needed.
                    (self.void_slot_lsn, self.began_at) = (Some(slot.restart_lsn), None);
                    return Err(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(Kind::Bug, "no way to begin the WAL stream was tried"))
    }

    /// What to do about WAL that no slot keeps.
    fn older(&self) -> OlderWal {
        match (self.stream.options.older, self.began_at) {
            // A connection lost in the middle of a backup must not leave a hole in its WAL.
            (OlderWal::Leave, Some(began_at)) => OlderWal::Since(began_at),
            (older, _) => older,
        }
    }

    fn plan(&self, server: &Server, slot: &OurSlot, older: OlderWal) -> Vec<Attempt> {
        resume::attempts(&Situation {
            history: &server.history,
            stored: &self.ledger.held().ranges(),
            slot_restart_lsn: slot.kept_lsn,
            segment_size: server.segment_size,
            older,
            unreadable_after: self.unreadable.after(),
        })
    }

    /// The server must have WAL as far as the repository: else it is a standby that lags, or it was
    /// rolled back, and would write other WAL at the same positions of the same timeline. One that has
    /// written as much since is told by what it sends (see [`super::overlap`]).
    fn check_not_behind(&self, server: &Server, attempts: &[Attempt]) -> Result<Option<Error>> {
        let Some(first) = attempts.first() else { return Ok(None) };
        let (ours, theirs) = (first.store_from, server.flushed_end_lsn);
        if ours <= theirs || server.history.timeline_at(ours) != server.timeline {
            return Ok(None);
        }
        let timeline = server.timeline;
        let message = format!(
            "the server's WAL on timeline {timeline} ends at {theirs}, the repository holds it up \
             to {ours}"
        );
        if server.in_recovery {
            return Err(Error::new(Kind::Unavailable, format!("{message}: the standby lags")));
        }
        Ok(Some(resume::set_back(message)))
    }

    /// A server on an older timeline than the one before was replaced by that one, or is a standby that
    /// has not followed yet (as `WalReceiverMain` has it). It is asked again, and so are the other hosts
    /// of the connection string: it may be gone, or have followed, by then.
    fn check_not_replaced(&self, server: &Server) -> Result<()> {
        match self.newest_timeline.filter(|newest| *newest > server.timeline) {
            None => Ok(()),
            Some(newest) => {
                let message = format!(
                    "the server is on timeline {}, this stream was on timeline {newest}: is this an \
                     old primary that was replaced?",
                    server.timeline
                );
                Err(Error::new(Kind::Unavailable, message))
            }
        }
    }

    /// A server on `timeline` is streamed.
    pub(super) fn note_timeline(&mut self, timeline: TimelineId) {
        self.newest_timeline = self.newest_timeline.max(Some(timeline));
    }

    /// On the first connection a server on an older timeline than the repository is streamed, for what
    /// it writes may be all there is; but somebody should know.
    fn warn_of_other_timelines(&self, server: &Server) {
        let newest = self.ledger.held().newest_timeline();
        if self.newest_timeline.is_none()
            && let Some(newest) = newest.filter(|newest| *newest > server.timeline)
        {
            tracing::warn!(
                "the repository holds timeline {newest}, the server is on timeline {}: is this an \
                 old primary that was replaced?",
                server.timeline
            );
        }
    }

    /// Decides to go on from the server's present end, recording the gap.
    fn give_up(&mut self, server: &Server) -> Attempt {
        let lost_from = self.ledger.cut_end();
        let position = server.segment_size.start_of(server.flushed_end_lsn);
        let position = position.max(lost_from);
        if let Some(gap) = LsnRange::new(lost_from, position).filter(|gap| !gap.is_empty()) {
            let reason = "the repository did not take it and the server kept more than \
                          wal.lag_ceiling";
            self.record_gap(&server.history, gap, reason);
        }
        self.ledger.give_up_before(position);
        Attempt {
            timeline: server.history.timeline_at(position),
            stream_from: server.segment_size.start_of(position),
            store_from: position,
            known: Vec::new(),
            gap: None,
        }
    }

    /// Notes what is missing of each timeline on the way of `history`.
    fn record_gap(&self, history: &TimelineHistory, gap: LsnRange, reason: &str) {
        for part in history.path() {
            let end = part.end.map_or(gap.end(), |end| end.min(gap.end()));
            let missing = LsnRange::new(part.start.max(gap.start()), end);
            if let Some(missing) = missing.filter(|missing| !missing.is_empty()) {
                self.record_gap_of(part.timeline, missing, reason);
            }
        }
    }

    fn record_gap_of(&self, timeline: TimelineId, gap: LsnRange, reason: &str) {
        if self.stream.options.slot_life == SlotLife::Connection {
            tracing::info!("WAL {gap} of timeline {timeline} is not stored: {reason}");
            return;
        }
        tracing::error!(
            "WAL {gap} of timeline {timeline} is lost: {reason}; times in it cannot be restored, \
             and later ones only from a base backup that is still to be taken"
        );
        self.status.add_gap(Status::gap(timeline, gap, reason, self.clock.now()));
    }

    /// Extents received and not yet stored.
    pub(super) fn unstored_count(&self) -> usize {
        self.uploads.unstored_count() + self.sealer.cuts_pending()
    }

    /// Enters a stored extent in the books.
    pub(super) fn on_stored(&mut self, stored: &Stored) {
        self.ledger.stored(stored);
        let now = PgTime::from_timestamp(self.clock.now());
        let waited = stored.extent.commit_times.iter().map(|committed| {
            let waited_us = now.0.saturating_sub(committed.0).max(0);
            Duration::from_micros(waited_us.unsigned_abs())
        });
        self.status.latency().record_all(waited);
        let durable_end_lsn = self.ledger.durable_end();
        self.status.update(|now| {
            now.durable_end_lsn = durable_end_lsn;
            now.newest_durable_commit =
                now.newest_durable_commit.max(stored.extent.cut.greatest_time);
            now.extent_count += 1;
            now.plain_bytes += stored.extent.cut.range.len_bytes();
            now.stored_bytes += stored.stored_bytes;
        });
        self.show_uploads();
        self.report(stored.timeline);
    }

    /// Tells the lease how far we are, so that its next renewal publishes it.
    pub(super) fn report(&self, timeline: TimelineId) {
        let durable_end_lsn = self.ledger.durable_end();
        let (caught_up_time, all_stored_time) = self.status.quiet_at();
        let progress = Progress { timeline, durable_end_lsn, caught_up_time, all_stored_time };
        self.lease.report(progress);
    }

    /// No base backup from before leads past `barrier`. The repository is told by the upload of the extent that
    /// it belongs to (see [`super::uploads`]).
    pub(super) fn note_barrier(&self, timeline: TimelineId, barrier: &Barrier) {
        let (range, kind) = (barrier.range, barrier.kind);
        let from = range.start();
        if self.stream.options.slot_life == SlotLife::Connection {
            tracing::warn!("from {from} of timeline {timeline} on {kind}");
            return;
        }
        tracing::error!(
            "from {from} of timeline {timeline} on {kind}: what follows can be restored only from a \
             base backup that is still to be taken"
        );
        self.status.add_gap(Status::gap(timeline, range, &kind.to_string(), self.clock.now()));
    }

    /// Hands sealed extents to the uploads.
    pub(super) fn upload(&mut self, sealed: impl IntoIterator<Item = Upload>) {
        sealed.into_iter().for_each(|upload| self.uploads.push(upload));
        self.show_uploads();
    }

    fn show_uploads(&self) {
        let (count, bytes) = (self.uploads.unstored_count(), self.uploads.unstored_bytes());
        self.status.update(|now| {
            now.uploads_in_flight = count;
            now.unstored_bytes = bytes;
        });
    }

    /// Takes note of the catalog's answer; whether the lag ceiling is passed.
    pub(super) fn on_observation(&mut self, observed: &Observation) -> bool {
        watch::take_note(&self.status, observed);
        self.is_ceiling_passed(observed.server_end_lsn)
    }

    fn is_ceiling_passed(&mut self, server_end_lsn: Lsn) -> bool {
        let durable_end = self.ledger.durable_end();
        let passed = self.lag.is_passed(server_end_lsn.saturating_since(durable_end));
        passed && self.has_what_to_give_up(server_end_lsn)
    }

    /// Whether the server has whole segments that were not received: what was, is on its way to the
    /// store. Moving the slot past that alone would acknowledge it before it is stored, and no gap would
    /// say so; it is as much as the budget holds, and waited for.
    fn has_what_to_give_up(&self, server_end: Lsn) -> bool {
        let received_end = self.status.received_end();
        self.segment_size.is_none_or(|segment| segment.start_of(server_end) > received_end)
    }

    /// Whether the server shuts down and waits for us, while we wait for the repository
    /// (`WalSndDone` does not return before all WAL is flushed here). It must not wait as long as
    /// the repository is away: it keeps the WAL in the slot.
    pub(super) fn holds_up_shutdown(&self, observed: &Observation) -> bool {
        observed.shutting_down && self.status.snapshot().repository_error.is_some()
    }

    /// Asked to stop with no server at hand: stores what was received, for as long as a stop may
    /// take.
    pub(super) async fn stop_without_server(&mut self) -> Result<SessionEnd> {
        self.status.update(|now| now.phase = Phase::Stopping);
        let deadline = self.clock.instant() + self.stream.options.stop_grace;
        while self.unstored_count() > 0 {
            tokio::select! {
                biased;
                error = self.guard.lost() => return Ok(SessionEnd::Refused(error)),
                stored = self.uploads.next_stored() => self.on_stored(&stored?),
                sealed = self.sealer.next() => self.uploads.push(sealed?),
                () = tokio::time::sleep_until(deadline) => {
                    return Ok(SessionEnd::Refused(self.not_all_stored()));
                }
            }
        }
        Ok(SessionEnd::Stopped)
    }

    /// The error of a stop that ran out of time.
    pub(super) fn not_all_stored(&self) -> Error {
        let durable_end = self.ledger.durable_end();
        let message = format!(
            "stopped before the repository took all WAL that was received: it is stored up to \
             {durable_end}"
        );
        Error::new(Kind::Unavailable, message)
            .hint("Nothing is lost: the server keeps the rest in the replication slot.")
    }
}
