//! One connection's life: reads WAL, cuts and stores it, and tells the server how far it is durable.
//!
//! # Invariants
//! 1. The server hears from us at least every status interval, whatever the repository does: nothing
//!    here waits for the repository except in `select!`.
//! 2. Memory is bounded: nothing is read while the budget is used up. The server then keeps the WAL.
//! 3. One function sends the flush position: [`Pump::tell`].
//!
//! # Durability
//! See [`super::prefix`] for why a position told is durable. A lost lease is noticed before each
//! status is sent, so a fenced writer acknowledges nothing.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::cutter::{CutPolicy, CutReason};
use super::engine::{Engine, SessionEnd};
use super::intake::{Intake, Step};
use super::resume::Attempt;
use super::sealer::Place;
use super::server::{self, OurSlot};
use super::status::{Phase, Snapshot};
use super::upstream::{Sending, Walsender};
use super::watch::{Observation, Watch};
use crate::clock::Instant;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, PgTime, SegmentSize, TimelineHistory, TimelineId};
use crate::wire::{StandbyStatus, WalEvent};

/// Uploads at a time in synchronous mode: while two are on their way, commits gather for the next,
/// so that many clients cost two requests a round trip and not one each.
const SYNCHRONOUS_UPLOADS_MAX: usize = 2;
/// Shortest time between two answers to a server that asks the same again and again, as it does
/// while it shuts down and waits for us.
const REPLY_PAUSE: Duration = Duration::from_millis(100);
/// Longest that a polite goodbye may take.
const GOODBYE_MAX: Duration = Duration::from_secs(5);
/// Longest that a message of ours may wait for the server to read it.
const SEND_MAX: Duration = Duration::from_secs(60);

/// How the connection ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// We were asked to stop, and everything received is stored, and acknowledged if there was a server
    /// to tell.
    Stopped,
    /// The server keeps more WAL for us than it may.
    CeilingPassed,
    /// Going on makes no sense: somebody else writes now, the server was set back, or a stop ran out of
    /// time.
    Refused(Error),
    /// The server no longer has the WAL that was asked for.
    WalRemoved(Error),
}

impl From<SessionEnd> for Ended {
    fn from(end: SessionEnd) -> Self {
        match end {
            SessionEnd::Stopped => Self::Stopped,
            SessionEnd::CeilingPassed => Self::CeilingPassed,
            SessionEnd::Refused(error) => Self::Refused(error),
        }
    }
}

/// What became of one timeline's stream.
enum Flow {
    Ended(Ended),
    NextTimeline { timeline: TimelineId, start: Lsn },
}

/// A connection that streams.
pub(super) struct Pump<'e, 'a> {
    engine: &'e mut Engine<'a>,
    intake: Intake,
    /// The way to the server's timeline, as the attempt was planned with it.
    planned: &'e TimelineHistory,
    timeline: TimelineId,
    status_interval: Duration,
    synchronous: bool,
    told_at: Instant,
    told: Lsn,
    reply_owed: bool,
    /// When the server last asked for an answer, if it has sent no WAL since.
    asked_at: Option<Instant>,
    /// End of the WAL the server had when it last sent some.
    server_had: Lsn,
    /// The server's clock at its last sign of life, if it has sent no WAL since.
    quiet_since: Option<PgTime>,
    /// What the server had at a moment by its clock, until all of it is stored.
    had_at: Option<(Lsn, PgTime)>,
    /// The server replays what another one writes.
    in_recovery: bool,
    steps: Vec<Step>,
    requests: watch::Receiver<Lsn>,
}

impl<'e, 'a> Pump<'e, 'a> {
    pub(super) fn new(
        engine: &'e mut Engine<'a>,
        attempt: &Attempt,
        planned: &'e TimelineHistory,
        segment_size: SegmentSize,
        status_interval: Duration,
    ) -> Self {
        let options = &engine.stream.options;
        let policy = CutPolicy {
            segment_size,
            flush_interval: options.flush_interval,
            idle_flush_interval: options.idle_flush_interval,
        };
        let overlap = engine.ledger.held().expected(planned, attempt.stream_from);
        let intake = Intake::new(policy, attempt, overlap, engine.unreadable.clone());
        let requests = engine.status.flush_requests();
        let told_at = engine.clock.instant();
        Self {
            intake,
            planned,
            timeline: attempt.timeline,
            status_interval,
            synchronous: false,
            told_at,
            told: Lsn::INVALID,
            reply_owed: false,
            asked_at: None,
            server_had: Lsn::INVALID,
            quiet_since: None,
            had_at: None,
            in_recovery: false,
            steps: Vec::new(),
            requests,
            engine,
        }
    }

    /// Commits wait for us: each is flushed at once, as far as uploads are free.
    pub(super) fn set_synchronous(&mut self, synchronous: bool) {
        if synchronous != self.synchronous {
            let state = if synchronous { "wait" } else { "do not wait" };
            tracing::info!("commits on the server {state} for this stream");
        }
        self.synchronous = synchronous;
        let usual = self.engine.stream.options.flush_interval;
        self.intake.set_flush_interval(if synchronous { Duration::ZERO } else { usual });
        self.engine.status.update(|now| now.synchronous = synchronous);
    }

    /// Streams over `connection` until something ends it, across timelines.
    pub(super) async fn run(
        mut self,
        connection: Box<dyn Walsender>,
        slot: &OurSlot,
        cancel: &CancellationToken,
    ) -> Result<Ended> {
        let began_at = self.intake.received_end();
        let result = self.stream_timelines(connection, slot, cancel).await;
        self.engine.status.update(Snapshot::disconnect);
        self.engine.unreadable.learn(&self.intake);
        // Whatever ended it, what was received goes its way.
        self.cut(CutReason::StreamEnd).await?;
        match result {
            Err(error) if error.kind() == Kind::NotFound => {
                if self.intake.received_end() == began_at {
                    return Ok(Ended::WalRemoved(error));
                }
                Err(error)
            }
            other => other,
        }
    }

    async fn stream_timelines(
        &mut self,
        mut connection: Box<dyn Walsender>,
        slot: &OurSlot,
        cancel: &CancellationToken,
    ) -> Result<Ended> {
        let requested = *self.requests.borrow_and_update();
        self.intake.cutter().request(requested);
        let upstream = Arc::clone(&self.engine.stream.upstream);
        let (clock, status) = (self.engine.clock.clone(), self.engine.status.clone());
        let mut watch = Watch::start(&upstream, &slot.name, &clock, &status);
        loop {
            let start = self.intake.received_end();
            // Asked for each timeline: a promotion is followed on the same connection, and always ends
            // the standby's timeline (`XLogSendPhysical`).
            self.in_recovery = server::is_in_recovery(&mut *connection).await?;
            (self.quiet_since, self.had_at) = (None, None);
            let mut wal =
                connection.start_replication(Some(&slot.name), start, self.timeline).await?;
            tracing::info!("streaming timeline {} from {start}", self.timeline);
            self.show_begin();
            match self.stream_timeline(&mut *wal, &mut watch, cancel).await? {
                Flow::Ended(ended) => {
                    if matches!(ended, Ended::Stopped) {
                        self.say_goodbye(wal).await;
                    }
                    return Ok(ended);
                }
                Flow::NextTimeline { timeline, start } => {
                    connection = wal.finish().await?;
                    if let Some(ended) =
                        self.switch(&mut *connection, (timeline, start), cancel).await?
                    {
                        return Ok(ended);
                    }
                }
            }
        }
    }

    fn show_begin(&self) {
        let timeline = self.timeline;
        let (received_end_lsn, durable) =
            (self.intake.received_end(), self.engine.ledger.durable_end());
        self.engine.status.update(|now| {
            (now.phase, now.connected) = (Phase::Streaming, true);
            if now.timeline != Some(timeline) {
                // A server that took over may have had less WAL than the one before; and what the other one, which
                // may have gone on as well, was quiet about says nothing of this one's commits.
                now.server_end_lsn = received_end_lsn;
                (now.caught_up_at, now.all_stored_at) = (None, None);
            }
            now.timeline = Some(timeline);
            now.received_end_lsn = received_end_lsn;
            now.durable_end_lsn = durable;
            now.connection_count += 1;
            now.server_error = None;
        });
    }

    /// The server finished a timeline: so do we, exactly there; `None` to go on with the next one.
    ///
    /// A server may be promoted after it has said who it is, and before it has sent again what is stored.
    /// The new timeline then leaves the old one at the end of the last whole record (`FinishWalRecovery`),
    /// and what is stored behind that is WAL of a branch that nobody is on: the new timeline's own must
    /// not be taken for known. So the session ends, and the next one is planned with the new history.
    ///
    /// Between two timelines the walsender waits for a command, without a time-out of its own: nobody
    /// has to be answered while the store takes its time (`WalSndCheckTimeOut` is for one that sends).
    async fn switch(
        &mut self,
        connection: &mut dyn Walsender,
        (timeline, start): (TimelineId, Lsn),
        cancel: &CancellationToken,
    ) -> Result<Option<Ended>> {
        let received = self.intake.received_end();
        if received != start {
            let message = format!(
                "the server ended timeline {} at {start} and sent it up to {received}",
                self.timeline
            );
            return Err(Error::new(Kind::Unavailable, message));
        }
        if self.intake.expects_known() && !self.planned.leads_on(self.timeline, start, timeline) {
            let message = format!(
                "the server was promoted from timeline {} to timeline {timeline} at {start}, before \
                 what the repository holds behind that was sent again",
                self.timeline
            );
            return Err(Error::new(Kind::Unavailable, message));
        }
        tracing::info!("timeline {} ended at {start}; timeline {timeline} follows", self.timeline);
        self.cut(CutReason::StreamEnd).await?;
        // Its history is durable before any of its WAL is, and so before any is acknowledged.
        let writer = self.engine.stream.writer.clone();
        let mut storing = std::pin::pin!(server::store_history(connection, timeline, &writer));
        let history = loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {
                    return self.engine.stop_without_server().await.map(Ended::from).map(Some);
                }
                error = self.engine.guard.lost() => return Ok(Some(Ended::Refused(error))),
                stored = self.engine.uploads.next_stored() => {
                    let stored = stored?;
                    self.engine.on_stored(&stored);
                }
                sealed = self.engine.sealer.next() => {
                    let sealed = sealed?;
                    self.engine.upload([sealed]);
                }
                stored = &mut storing => break stored?,
            }
        };
        if let Some(content) = history {
            self.engine.note_history(timeline, content);
        }
        self.timeline = timeline;
        self.intake.timeline_begins(timeline);
        self.engine.note_timeline(timeline);
        Ok(None)
    }

    async fn stream_timeline(
        &mut self,
        wal: &mut dyn Sending,
        watch: &mut Watch,
        cancel: &CancellationToken,
    ) -> Result<Flow> {
        loop {
            self.cut_what_is_due().await?;
            let reads = self.may_read();
            self.show_phase(reads);
            let wake = self.wake_at();
            tokio::select! {
                biased;
                () = cancel.cancelled() => return self.stop(wal).await.map(Flow::Ended),
                error = self.engine.guard.lost() => {
                    return Ok(Flow::Ended(Ended::Refused(error)));
                }
                stored = self.engine.uploads.next_stored() => {
                    let stored = stored?;
                    self.engine.on_stored(&stored);
                    self.note_stored();
                    self.tell_if_moved(wal).await?;
                }
                sealed = self.engine.sealer.next() => {
                    let sealed = sealed?;
                    self.engine.upload([sealed]);
                }
                Ok(()) = self.requests.changed() => {
                    let requested = *self.requests.borrow_and_update();
                    self.intake.cutter().request(requested);
                }
                observed = watch.changed() => {
                    if self.engine.holds_up_shutdown(&observed) {
                        return Err(Error::new(
                            Kind::Unavailable,
                            "the server shuts down and the repository does not take its last WAL, \
                             which stays in the slot",
                        ));
                    }
                    if self.observe(&observed) {
                        return Ok(Flow::Ended(Ended::CeilingPassed));
                    }
                }
                () = tokio::time::sleep_until(wake) => {
                    if self.reply_owed || self.status_due_at() <= self.engine.clock.instant() {
                        self.tell(wal).await?;
                    }
                }
                event = wal.next(), if reads => {
                    if let Some(flow) = self.on_event(event?, wal).await? {
                        return Ok(flow);
                    }
                }
            }
        }
    }

    async fn on_event(&mut self, event: WalEvent, wal: &mut dyn Sending) -> Result<Option<Flow>> {
        match event {
            WalEvent::Wal { start_lsn, server_end_lsn, server_time, data } => {
                self.show_server_end(server_end_lsn);
                (self.server_had, self.quiet_since) = (server_end_lsn, None);
                self.asked_at = None;
                let now = self.engine.clock.instant();
                let mut steps = std::mem::take(&mut self.steps);
                let taken = self.intake.take(start_lsn, data, now, &mut steps);
                self.execute(&mut steps).await?;
                self.steps = steps;
                match taken {
                    Err(error) if error.kind() == Kind::Conflict => {
                        return Ok(Some(Flow::Ended(Ended::Refused(error))));
                    }
                    Err(error) => return Err(self.note_damage(error)),
                    Ok(()) => {}
                }
                let received_end_lsn = self.intake.received_end();
                self.engine.status.update(|now| now.received_end_lsn = received_end_lsn);
                self.had_at.get_or_insert((server_end_lsn, server_time));
                self.note_stored();
                self.tell_if_moved(wal).await?;
            }
            WalEvent::Keepalive { server_end_lsn, server_time, reply_requested } => {
                self.show_server_end(server_end_lsn);
                self.note_quiet(server_time);
                if reply_requested {
                    self.heed_question(server_end_lsn)?;
                }
            }
            WalEvent::TimelineEnded { next_timeline, next_start_lsn } => {
                return Ok(Some(Flow::NextTimeline {
                    timeline: next_timeline,
                    start: next_start_lsn,
                }));
            }
        }
        Ok(None)
    }

    /// The server gives a sign of life and no WAL.
    ///
    /// It names the position it has *sent*, and it answers before it looks for more to send: WAL may
    /// have been written that it has not looked at yet (`ProcessStandbyReplyMessage`, `WalSndLoop`). So
    /// the first sign of life promises nothing; the next one promises that nothing was there at the
    /// first, for that would have been sent in between. A commit of the very microsecond of the first may
    /// still come: what is promised ends before it.
    ///
    /// A standby promises nothing: what it has sent is what has reached it, and its primary goes on
    /// committing.
    fn note_quiet(&mut self, server_time: PgTime) {
        let all_stored = self.server_had <= self.intake.received_end()
            && !self.intake.cutter().holds_commit()
            && self.engine.unstored_count() == 0;
        if !all_stored {
            self.quiet_since = None;
            return;
        }
        if let Some(quiet_since) = self.quiet_since.replace(server_time) {
            let promised = PgTime(quiet_since.0.saturating_sub(1)).to_timestamp();
            let is_promised = !self.in_recovery;
            self.engine.status.update(|now| {
                now.all_stored_at = promised;
                if is_promised {
                    now.caught_up_at = promised;
                }
            });
            self.engine.report(self.timeline);
        }
    }

    /// Shows since when nothing is lost on a server that is never quiet: what it had at the moment of some WAL is
    /// stored by now, or what of it is not has no commit in it.
    ///
    /// This promises no time of a target, as [`Self::note_quiet`] does: a commit carries the time at which it
    /// began to be written, and that may be before what the server had then.
    fn note_stored(&mut self) {
        let Some((end, time)) = self.had_at else { return };
        let all_received = self.intake.received_end() >= end;
        let nothing_waits =
            !self.intake.cutter().holds_commit() && self.engine.unstored_count() == 0;
        if self.engine.ledger.durable_end() >= end || all_received && nothing_waits {
            self.had_at = None;
            self.engine.status.update(|now| now.all_stored_at = time.to_timestamp());
            self.engine.report(self.timeline);
        }
    }

    /// The server wants an answer. A standby that asks again right after one shuts down: it asks as long
    /// as not all it has sent is flushed here (`WalSndDone`), and otherwise only when it has heard nothing
    /// for half of its time-out (`WalSndKeepaliveIfNecessary`), more than our status interval. Its WAL ends
    /// where the primary's messages did, perhaps in the middle of a record, which is never acknowledged;
    /// so once all is stored the session ends, or the server would wait for ever. What a primary sends last
    /// is a whole record (see [`Intake`]).
    ///
    /// # Errors
    /// `unavailable` when only our going lets the server shut down.
    fn heed_question(&mut self, server_end_lsn: Lsn) -> Result<()> {
        self.reply_owed = true;
        let now = self.engine.clock.instant();
        let asked_before = self.asked_at.replace(now);
        let asks_again = asked_before
            .is_some_and(|before| now.saturating_duration_since(before) < self.status_interval);
        let received_end = self.intake.received_end();
        if !self.in_recovery || !asks_again || server_end_lsn != received_end {
            return Ok(());
        }
        self.intake.cutter().request(received_end);
        let ledger = &mut self.engine.ledger;
        if ledger.durable_end() < received_end || ledger.flush_position() >= received_end {
            return Ok(());
        }
        Err(Error::new(
            Kind::Unavailable,
            format!(
                "the standby shuts down and waits for {received_end}, which is no record's end"
            ),
        ))
    }

    /// Remembers where the decoder failed, so that it is not the same for ever.
    fn note_damage(&mut self, error: Error) -> Error {
        if error.kind() != Kind::Corrupt {
            return error;
        }
        let Some(at) = self.intake.last_record_end() else { return error };
        self.engine.unreadable.note(at, self.engine.clock.instant());
        let message = format!("the WAL received after {at} is damaged: {}", error.message());
        Error::new(Kind::Corrupt, message)
    }

    fn show_server_end(&self, server_end_lsn: Lsn) {
        self.engine.status.update(|now| {
            now.server_end_lsn = now.server_end_lsn.max(server_end_lsn);
        });
    }

    fn observe(&mut self, observed: &Observation) -> bool {
        if !observed.may_be_of_our_stream() {
            return false;
        }
        if let Some(waits) = observed.commits_wait(self.told)
            && waits != self.synchronous
        {
            self.set_synchronous(waits);
        }
        self.engine.on_observation(observed)
    }

    /// Whether the memory budget allows another message.
    fn may_read(&self) -> bool {
        let budget = &self.engine.stream.options.budget;
        let held = self.engine.sealer.held_bytes();
        let unstored = self.engine.uploads.unstored_bytes();
        held < budget.extent_bytes_cut as u64
            && unstored < budget.extent_bytes_in_flight
            && held + unstored < budget.extent_bytes_held
    }

    /// Whether an extent may be cut only because it is due: while all uploads are busy, more WAL
    /// gathers in it instead.
    fn has_free_place(&self) -> bool {
        let usual = self.engine.stream.options.uploads_max;
        let places = if self.synchronous { SYNCHRONOUS_UPLOADS_MAX.min(usual) } else { usual };
        self.engine.unstored_count() < places
    }

    async fn cut_what_is_due(&mut self) -> Result<()> {
        let now = self.engine.clock.instant();
        let budget = &self.engine.stream.options.budget;
        let held = self.engine.sealer.held_bytes();
        let unstored = self.engine.uploads.unstored_bytes();
        // One that is as large as it may be goes alone.
        let fits = unstored == 0 || unstored + held <= budget.extent_bytes_in_flight;
        if held >= budget.extent_bytes_cut as u64 && fits {
            return self.cut(CutReason::Budget).await;
        }
        match self.intake.cutter().due(now) {
            Some(reason) if self.has_free_place() => self.cut(reason).await,
            _ => Ok(()),
        }
    }

    async fn cut(&mut self, reason: CutReason) -> Result<()> {
        let mut steps = std::mem::take(&mut self.steps);
        self.intake.cut(reason, &mut steps);
        self.execute(&mut steps).await?;
        self.steps = steps;
        Ok(())
    }

    /// Does what the intake decided.
    async fn execute(&mut self, steps: &mut Vec<Step>) -> Result<()> {
        let mut sealed = Vec::new();
        for step in steps.drain(..) {
            match step {
                Step::Store { start, piece } => {
                    let place = Place { timeline: self.timeline, start };
                    self.engine.sealer.push(place, piece, &mut sealed).await?;
                }
                Step::Cut(extent) => {
                    self.engine.ledger.cut(&extent);
                    let chain = self.engine.ledger.chain();
                    self.engine.sealer.finish(extent, chain, &mut sealed).await?;
                }
                Step::Boundary(boundary) => self.engine.ledger.note_boundary(boundary),
                Step::Barrier(barrier) => self.engine.note_barrier(self.timeline, &barrier),
            }
        }
        self.engine.upload(sealed);
        Ok(())
    }

    fn status_due_at(&self) -> Instant {
        self.told_at + self.status_interval
    }

    /// When something is to be done though nothing happens.
    fn wake_at(&mut self) -> Instant {
        let mut wake = self.status_due_at();
        if self.reply_owed {
            wake = wake.min(self.told_at + REPLY_PAUSE);
        }
        if self.has_free_place()
            && let Some(due) = self.intake.cutter().deadline()
        {
            wake = wake.min(due);
        }
        wake
    }

    fn show_phase(&self, reads: bool) {
        let phase = if reads { Phase::Streaming } else { Phase::WaitingForRepository };
        if self.engine.status.phase() != phase {
            self.engine.status.update(|now| now.phase = phase);
        }
    }

    async fn tell_if_moved(&mut self, wal: &mut dyn Sending) -> Result<()> {
        if self.engine.ledger.flush_position() > self.told {
            self.tell(wal).await?;
        }
        Ok(())
    }

    /// Tells the server how far its WAL is durable: the only place that does.
    ///
    /// All three positions are the durable one: a COMMIT under any level of `synchronous_commit`
    /// that waits for a standby returns only for what the repository holds.
    ///
    /// # Durability
    /// The position is [`super::ledger::Ledger::flush_position`], and it is sent only while the
    /// lease is held: a rival that took over may have other WAL at the same positions.
    async fn tell(&mut self, wal: &mut dyn Sending) -> Result<()> {
        self.engine.guard.ensure_held()?;
        let flushed = self.engine.ledger.flush_position();
        let status = StandbyStatus {
            written_end_lsn: flushed,
            durable_end_lsn: flushed,
            applied_end_lsn: flushed,
            reply_requested: false,
        };
        match tokio::time::timeout(SEND_MAX, wal.send_status(status)).await {
            Ok(sent) => sent?,
            Err(_elapsed) => {
                let message = "the server does not read what it is told";
                return Err(Error::new(Kind::Unavailable, message));
            }
        }
        self.told = flushed;
        if let Some(slot) = &mut self.engine.left_slot {
            slot.lsn = slot.lsn.max(flushed);
        }
        self.told_at = self.engine.clock.instant();
        self.reply_owed = false;
        self.engine.status.update(|now| now.acknowledged_end_lsn = flushed);
        Ok(())
    }

    /// Stores what was received, tells the server, and ends.
    async fn stop(&mut self, wal: &mut dyn Sending) -> Result<Ended> {
        self.engine.status.update(|now| now.phase = Phase::Stopping);
        let deadline = self.engine.clock.instant() + self.engine.stream.options.stop_grace;
        self.cut(CutReason::Shutdown).await?;
        while self.engine.unstored_count() > 0 {
            let status_due_at = self.status_due_at();
            tokio::select! {
                biased;
                error = self.engine.guard.lost() => return Ok(Ended::Refused(error)),
                stored = self.engine.uploads.next_stored() => {
                    let stored = stored?;
                    self.engine.on_stored(&stored);
                    self.note_stored();
                    self.tell_if_moved(wal).await?;
                }
                sealed = self.engine.sealer.next() => {
                    let sealed = sealed?;
                    self.engine.upload([sealed]);
                }
                () = tokio::time::sleep_until(deadline) => {
                    return Ok(Ended::Refused(self.engine.not_all_stored()));
                }
                () = tokio::time::sleep_until(status_due_at) => self.tell(wal).await?,
            }
        }
        self.tell(wal).await?;
        Ok(Ended::Stopped)
    }

    /// Ends the stream so that the server logs no broken connection. What matters was said.
    async fn say_goodbye(&self, wal: Box<dyn Sending>) {
        match tokio::time::timeout(GOODBYE_MAX, wal.finish()).await {
            Ok(Ok(connection)) => connection.close().await,
            Ok(Err(error)) => tracing::debug!("the server ended the stream first: {error}"),
            Err(_elapsed) => tracing::debug!("the server did not end the stream in time"),
        }
    }
}
