//! The WAL stream, and beside it the chores that are due.
//!
//! # Invariants
//! A chore that fails never stops the stream: it is told and tried again later. Deleting happens
//! only while the lease is held.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::schedule::{self, BackupHistory};
use super::writing::Writing;
use super::{backup, upkeep};
use crate::capture::base::{self, Progress};
use crate::capture::stream::{self, Phase, Status, Stream};
use crate::clock::Clock;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::{Lsn, TimelineId};
use crate::repo::Catalog;
use crate::repo::retention::RetentionOptions;

/// How often to look whether something is due.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What a process does besides streaming; `None` is left to somebody else.
#[derive(Clone, Debug, Default)]
pub struct Duties {
    /// How often to take a base backup.
    pub backup_interval: Option<Duration>,
    /// How often to sweep, and to expire when `retention` says what to keep.
    pub upkeep_interval: Option<Duration>,
    /// What to keep; without it nothing is expired.
    pub retention: Option<RetentionOptions>,
}

/// Something worth telling a person.
#[derive(Clone, Debug)]
pub enum Event {
    /// It went as it should.
    Done(String),
    /// It failed and will be tried again.
    Failed(String),
}

/// Takes events as they happen.
pub type Tell = Arc<dyn Fn(Event) + Send + Sync>;

/// A sidecar for one cluster.
pub struct Supervisor {
    /// The right to write.
    pub writing: Writing,
    /// What to do besides streaming.
    pub duties: Duties,
    /// Progress of the stream.
    pub status: Arc<Status>,
    /// Progress of the base backup that is being taken.
    pub backup_progress: Arc<Progress>,
    /// Who is told what happens.
    pub tell: Tell,
}

impl Supervisor {
    /// Streams and does what is due until `stop`, then stores what was received and gives the lease
    /// back.
    ///
    /// # Errors
    /// Why the stream cannot go on.
    pub async fn run(self, config: &Config, clock: &Clock, stop: &CancellationToken) -> Result<()> {
        let stream = Stream {
            options: config.stream_options()?,
            upstream: Arc::new(config.connect_options()?),
            writer: self.writing.writer.clone(),
            status: Arc::clone(&self.status),
        };
        let chores_stop = stop.child_token();
        let streaming = async {
            let outcome = stream::run(&stream, &self.writing.lease, stop).await;
            chores_stop.cancel();
            outcome
        };
        let mut chores = Chores::new(&self, config, clock);
        let (outcome, ()) = tokio::join!(streaming, chores.run(&chores_stop));
        self.writing.lease.release().await;
        outcome
    }
}

/// What makes a backup needed when it changes: a promotion, and WAL that was lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Streamed {
    timeline: Option<TimelineId>,
    /// Where the newest gap begins; its end may move on.
    gap_start_lsn: Option<Lsn>,
}

impl Streamed {
    fn of(status: &Status) -> Self {
        let now = status.snapshot();
        Self { timeline: now.timeline, gap_start_lsn: now.gaps.last().map(|gap| gap.start_lsn) }
    }
}

/// What is due when.
struct Chores<'a> {
    supervisor: &'a Supervisor,
    config: &'a Config,
    clock: &'a Clock,
    /// `None` until the repository was asked, which is done again after each backup.
    backups: Option<BackupHistory>,
    /// What was streamed when the repository was asked.
    streamed: Streamed,
    kept_up: Timestamp,
}

impl<'a> Chores<'a> {
    fn new(supervisor: &'a Supervisor, config: &'a Config, clock: &'a Clock) -> Self {
        let now = clock.now();
        let streamed = Streamed::default();
        Self { supervisor, config, clock, backups: None, streamed, kept_up: now }
    }

    async fn run(&mut self, stop: &CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
            if self.supervisor.status.snapshot().phase != Phase::Streaming {
                continue;
            }
            // The backup stops by the token, so that what it stored is discarded; the others may be
            // dropped anywhere.
            self.back_up(stop).await;
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.keep_up() => {}
            }
        }
    }

    fn tell<T>(&self, what: &str, outcome: Result<T>, done: impl FnOnce(T) -> Option<String>) {
        let tell = &self.supervisor.tell;
        match outcome {
            Ok(value) => {
                if let Some(text) = done(value) {
                    tracing::info!("{text}");
                    tell(Event::Done(text));
                }
            }
            Err(error) => {
                let hint = error.hint_text().map(|hint| format!(" ({hint})")).unwrap_or_default();
                tracing::error!(kind = error.kind().name(), "{what} failed: {error}{hint}");
                tell(Event::Failed(format!(
                    "{what} failed and will be tried again: {error}{hint}"
                )));
            }
        }
    }

    async fn back_up(&mut self, stop: &CancellationToken) {
        let Some(interval) = self.supervisor.duties.backup_interval else { return };
        let streamed = Streamed::of(&self.supervisor.status);
        let mut history = match self.backups.filter(|_| self.streamed == streamed) {
            Some(history) => history,
            None => match self.history().await {
                Ok(history) => history,
                // The store is down: the stream tells so already.
                Err(_) => return,
            },
        };
        self.streamed = streamed;
        history.needed_at_once |= self.supervisor.status.snapshot().base_backup_needed;
        self.backups = Some(history);
        if !schedule::is_backup_due(history, interval, self.clock.now()) {
            return;
        }
        let outcome = self.take_backup(stop).await;
        match &outcome {
            // Whether it leads to where the server is now, the repository tells: a promotion may have
            // left it on a dead branch.
            Ok(_) => self.backups = None,
            Err(_) if stop.is_cancelled() => return,
            Err(error) => {
                history.fail(self.clock.now(), error.kind());
                self.backups = Some(history);
            }
        }
        self.tell("base backup", outcome, |report| {
            let manifest = &report.manifest.public;
            Some(format!(
                "base backup {} is complete: {} stored as {} in {:.0} s",
                manifest.id,
                bytesize::ByteSize(manifest.plain_bytes),
                bytesize::ByteSize(manifest.stored_bytes),
                report.elapsed.as_secs_f64()
            ))
        });
    }

    async fn history(&self) -> Result<BackupHistory> {
        // Asked before the listing, which then holds all WAL up to there.
        let streamed = self.supervisor.status.snapshot();
        let catalog = Catalog::load(&self.supervisor.writing.repository).await?;
        let restorable = catalog.backups.iter().filter(|backup| catalog.is_restorable(backup));
        let starts = restorable.map(|backup| backup.manifest.start_time);
        // A gap that an earlier process left, or a promotion, and nobody took a backup after.
        let reached = streamed
            .timeline
            .is_none_or(|timeline| catalog.reaches(timeline, streamed.durable_end_lsn));
        let needed_at_once = !reached;
        Ok(BackupHistory { needed_at_once, ..BackupHistory::of(starts, self.clock.now()) })
    }

    async fn take_backup(&self, stop: &CancellationToken) -> Result<base::BackupReport> {
        let Supervisor { writing, status, backup_progress, .. } = self.supervisor;
        let (status, progress) = (Arc::clone(status), Arc::clone(backup_progress));
        let base = backup::beside(self.config, writing.writer.clone(), status, progress)?;
        base::backup(&base, stop).await
    }

    async fn keep_up(&mut self) {
        let Supervisor { writing, duties, .. } = self.supervisor;
        let repository = &writing.repository;
        let held = || -> Result<(), Error> { writing.lease.guard().ensure_held() };
        let now = self.clock.now();
        let due = |last, interval: Option<Duration>| {
            interval.is_some_and(|interval| now >= schedule::later(last, interval))
                && held().is_ok()
        };
        if !due(self.kept_up, duties.upkeep_interval) {
            return;
        }
        self.kept_up = now;
        if let Some(options) = &duties.retention {
            let outcome = upkeep::expire(repository, options, self.clock).await;
            self.tell("expiring", outcome, |report| {
                let count = report.backups.len();
                (count > 0 || report.extent_count > 0).then(|| {
                    format!("expired {count} backups and {} WAL objects", report.extent_count)
                })
            });
        }
        let outcome = upkeep::sweep(repository, self.clock).await;
        self.tell("sweeping", outcome, |report| {
            (report.pack_count > 0)
                .then(|| format!("swept {} packs of backups that were aborted", report.pack_count))
        });
    }
}
