//! The WAL stream, and beside it the chores that are due.
//!
//! # Invariants
//! A chore that fails never stops the stream: it is told and tried again later. Deleting happens
//! only while the lease is held.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use super::schedule::{self, ASK_PAUSE_MAX, BackupHistory, Failure};
use super::writing::Writing;
use super::{backup, upkeep};
use crate::capture::base::{self, Progress};
use crate::capture::stream::{self, Phase, Snapshot, Status, Stream};
use crate::clock::{Clock, Instant};
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, TimelineId};
use crate::repo::lease::CLOCK_DOUBT;
use crate::repo::retention::RetentionOptions;
use crate::repo::{BackupSummary, Catalog};

/// How often to look whether something is due.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Longest that a process waits before it sweeps and expires for the first time: one that is started anew
/// more often than it is due must do so too.
const UPKEEP_FIRST: Duration = Duration::from_secs(300);
/// How far this machine's clock may be set between two runs that expire; after more the later one is left out.
const CLOCK_SLACK: SignedDuration = SignedDuration::from_hours(1);
/// How long is waited then.
const CLOCK_SETTLES: Duration = Duration::from_secs(6 * 3600);

/// A process that takes no backups asks so often whether the one that is needed was taken by somebody else.
const OTHERS_BACKUP_PAUSE: Duration = Duration::from_secs(3600);

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
    fn of(now: &Snapshot) -> Self {
        Self { timeline: now.timeline, gap_start_lsn: now.gaps.last().map(|gap| gap.start_lsn) }
    }
}

/// What is due when.
struct Chores<'a> {
    supervisor: &'a Supervisor,
    config: &'a Config,
    clock: &'a Clock,
    /// What the repository said last; `None` before, after each backup of ours, and after a question
    /// without an answer. Whether one is needed at once, the stream's status knows.
    backups: Option<BackupHistory>,
    /// When it said so.
    looked: Option<Instant>,
    /// What was streamed then.
    streamed: Streamed,
    /// What came of our last attempts at a backup, if they failed.
    failure: Option<Failure>,
    /// How often in a row the repository gave no answer, when it did last, and what was told of it.
    unanswered: Unanswered,
    /// When sweeping and expiring is due.
    upkeep_due: Option<Instant>,
    /// Both clocks at one moment, to see when one of them was set.
    clocks: (Timestamp, Instant),
}

/// A question that found no answer.
#[derive(Debug, Default)]
struct Unanswered {
    count: u32,
    /// When to ask again.
    again: Option<Instant>,
    told: Option<String>,
}

impl<'a> Chores<'a> {
    fn new(supervisor: &'a Supervisor, config: &'a Config, clock: &'a Clock) -> Self {
        // One that is weeks ahead makes everything old. Over a store with a clock of its own that is found out; the
        // files of a folder are stamped by this machine's.
        let doubted = supervisor.writing.lease.clock_doubted_since();
        if doubted.is_some() {
            tracing::info!(
                "nothing is expired for a day: by this clock nobody has written here for longer than that"
            );
        }
        let doubted = doubted.map(|since| {
            let passed = clock.now().duration_since(since).unsigned_abs();
            clock.instant() + CLOCK_DOUBT.saturating_sub(passed)
        });
        let first = |interval: Duration| {
            doubted.unwrap_or_else(|| clock.instant() + interval.min(UPKEEP_FIRST))
        };
        Self {
            supervisor,
            config,
            clock,
            backups: None,
            looked: None,
            streamed: Streamed::default(),
            failure: None,
            unanswered: Unanswered::default(),
            upkeep_due: supervisor.duties.upkeep_interval.map(first),
            clocks: (clock.now(), clock.instant()),
        }
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
            // The backup stops by the token, so that what it stored is discarded; all else may be
            // dropped anywhere.
            let due = tokio::select! {
                () = stop.cancelled() => return,
                due = self.due_backup() => due,
            };
            if let Some(history) = due {
                self.back_up(history, stop).await;
            }
            let mut guard = self.supervisor.writing.lease.guard();
            tokio::select! {
                () = stop.cancelled() => return,
                // Another may write from here on: nothing is deleted any more.
                _lost = guard.lost() => {}
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

    /// What is known of the backups if one is due. The repository is asked right before: whoever else takes
    /// backups may have taken it, and one costs a read of the whole database.
    async fn due_backup(&mut self) -> Option<BackupHistory> {
        if self.is_look_due()
            && let Err(error) = self.look().await
        {
            self.note_unanswered(error);
        }
        self.known_due()
    }

    /// What is known of the backups if by that one is due.
    fn known_due(&self) -> Option<BackupHistory> {
        let interval = self.supervisor.duties.backup_interval?;
        let needed_at_once = self.supervisor.status.snapshot().base_backup_needed;
        let history = BackupHistory { needed_at_once, ..self.backups? };
        schedule::is_backup_due(history, interval, self.clock.now()).then_some(history)
    }

    /// Whether to ask the repository which backups there are.
    fn is_look_due(&self) -> bool {
        let now = self.clock.instant();
        if self.unanswered.again.is_some_and(|again| now < again) {
            return false;
        }
        let status = self.supervisor.status.snapshot();
        let takes_backups = self.supervisor.duties.backup_interval.is_some();
        let pause = if takes_backups { ASK_PAUSE_MAX } else { OTHERS_BACKUP_PAUSE };
        let again = self.looked.is_none_or(|looked| now >= looked + pause);
        let changed = self.streamed != Streamed::of(&status);
        // Somebody may have taken the one that is needed; and whoever leaves backups to others shows whether
        // one is, whatever an earlier process knew.
        if again && (status.base_backup_needed || self.looked.is_none() || changed) {
            return true;
        }
        takes_backups && (self.backups.is_none() || changed || self.known_due().is_some())
    }

    /// Asks the repository for all it holds, and takes note of its backups.
    async fn look(&mut self) -> Result<Catalog> {
        self.backups = None;
        let Supervisor { writing, duties, status, .. } = self.supervisor;
        // Asked before the listing, which then holds all WAL up to there.
        let before = status.snapshot();
        let catalog = Catalog::load(&writing.repository).await?;
        let restorable = catalog.backups.iter().filter(|backup| catalog.is_restorable(backup));
        let starts = restorable.map(|backup| backup.manifest.start_time);
        let history = BackupHistory::of(starts, self.clock.now());
        status.update(|now| {
            // Who takes no backups looks too seldom to say how old the newest is.
            if duties.backup_interval.is_some() {
                now.newest_base_backup_start = history.newest_start;
            }
        });
        if let Some(timeline) = before.timeline {
            let leads = |backup: &&BackupSummary| {
                let interval = catalog.interval(backup, timeline);
                interval.is_some_and(|interval| interval.until_lsn >= before.durable_end_lsn)
            };
            let leading: Vec<_> = catalog.backups.iter().filter(leads).collect();
            // A gap that an earlier process left, or a promotion, and nobody took a backup after.
            status.update(|now| now.base_backup_needed |= leading.is_empty());
            // A gap that is known here, and no listing shows yet, still counts.
            for backup in leading {
                status.base_backup_taken(backup.manifest.timeline, backup.manifest.start_lsn);
            }
        }
        let streamed = Streamed::of(&before);
        let history = history.after(self.failure.filter(|_| self.streamed == streamed));
        (self.backups, self.failure) = (Some(history), history.failure);
        (self.streamed, self.looked) = (streamed, Some(self.clock.instant()));
        self.unanswered = Unanswered::default();
        Ok(catalog)
    }

    /// The repository did not say which backups there are. That it does not answer at all, the stream
    /// tells; anything else is told once, for nobody else notices that no backup is taken.
    fn note_unanswered(&mut self, error: Error) {
        let count = self.unanswered.count.saturating_add(1);
        self.unanswered.count = count;
        self.unanswered.again = Some(schedule::retry_time(self.clock.instant(), count));
        let message = error.to_string();
        if error.kind() != Kind::Unavailable && self.unanswered.told.as_ref() != Some(&message) {
            self.unanswered.told = Some(message);
            self.tell("planning base backups", Err::<(), _>(error), |()| None);
        }
    }

    async fn back_up(&mut self, mut history: BackupHistory, stop: &CancellationToken) {
        let outcome = self.take_backup(stop).await;
        match &outcome {
            // Whether it leads to where the server is now, the repository tells: a promotion may have
            // left it on a dead branch.
            Ok(_) => (self.backups, self.failure) = (None, None),
            Err(_) if stop.is_cancelled() => return,
            Err(error) => {
                history.fail(self.clock.now(), error.kind());
                (self.backups, self.failure) = (Some(history), history.failure);
                self.supervisor.status.update(|now| now.base_backup_failure_count += 1);
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
        // By the clock that never steps: an interval is none of the calendar's.
        let now = self.clock.instant();
        let due = self.upkeep_due.is_some_and(|due| now >= due);
        if !due || held().is_err() {
            return;
        }
        self.upkeep_due = duties.upkeep_interval.map(|interval| now + interval);
        if self.was_clock_set() {
            self.upkeep_due =
                duties.upkeep_interval.map(|interval| now + interval.min(CLOCK_SETTLES));
            let hours = CLOCK_SETTLES.as_secs() / 3600;
            let message =
                format!("this machine's clock was set, or it was suspended: {hours} h are waited");
            self.note_failed_upkeep(true);
            self.tell("expiring", Err::<(), _>(Error::new(Kind::Unavailable, message)), |()| None);
            return;
        }
        if let Some(options) = &duties.retention {
            let outcome = upkeep::expire(repository, options, self.clock).await;
            let refused =
                outcome.as_ref().map_or(Ok(()), |done| upkeep::ensure_none_refused(&done.refused));
            self.note_failed_upkeep(outcome.is_err() || refused.is_err());
            self.tell("expiring", outcome, |report| {
                let count = report.backups.len();
                (count > 0 || report.extent_count > 0).then(|| {
                    format!("expired {count} backups and {} WAL objects", report.extent_count)
                })
            });
            self.tell("expiring", refused, |()| None);
        }
        let outcome = match self.look().await {
            Ok(catalog) => upkeep::sweep(repository, &catalog, self.clock).await,
            Err(error) => Err(error),
        };
        self.note_failed_upkeep(outcome.is_err());
        self.tell("sweeping", outcome, |report| {
            (report.pack_count > 0)
                .then(|| format!("swept {} packs of backups that were aborted", report.pack_count))
        });
    }

    /// Whether the calendar's clock has gone much further or less far than the other since this was last asked.
    fn was_clock_set(&mut self) -> bool {
        let now = (self.clock.now(), self.clock.instant());
        let (before_time, before) = std::mem::replace(&mut self.clocks, now);
        let by_calendar = now.0.duration_since(before_time);
        let elapsed = SignedDuration::try_from(now.1.saturating_duration_since(before));
        (by_calendar - elapsed.unwrap_or(SignedDuration::MAX)).abs() > CLOCK_SLACK
    }

    fn note_failed_upkeep(&self, has_failed: bool) {
        self.supervisor.status.update(|now| now.upkeep_failure_count += u64::from(has_failed));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use bytes::Bytes;

    use super::*;
    use crate::capture::stream::WalGap;
    use crate::config::Environment;
    use crate::pg::SegmentSize;
    use crate::repo::{
        BackupId, BackupKind, Encryption, ExtentBuilder, Lease, LeaseOptions, Level, Manifest,
        Object, PublicManifest, Repository,
    };
    use crate::store::Store as _;
    use crate::store::memory::{Call, Memory, Outcome};

    const DAY: Option<Duration> = Some(Duration::from_secs(86_400));
    const HOUR: Duration = Duration::from_secs(3600);

    /// Where backups begin, and where what is stored ends.
    const START: Lsn = Lsn(0x100);
    const END: Lsn = Lsn(0x200);

    /// A supervisor over a repository in memory, and what it told.
    struct Scene {
        store: Memory,
        clock: Clock,
        supervisor: Supervisor,
        told: Arc<Mutex<Vec<String>>>,
    }

    async fn scene(duties: Duties) -> Scene {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 1);
        let (store, repository) = Repository::in_memory(&clock).await;
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&told);
        let supervisor = Supervisor {
            writing: Writing {
                repository: repository.clone(),
                writer: repository.writer(&Encryption::None).await.unwrap(),
                lease: Lease::acquire(&repository, LeaseOptions::new("run")).await.unwrap(),
                identity_made: None,
            },
            duties,
            status: Arc::new(Status::new()),
            backup_progress: Arc::new(Progress::new()),
            tell: Arc::new(move |event| match event {
                Event::Done(text) | Event::Failed(text) => heard.lock().unwrap().push(text),
            }),
        };
        supervisor.status.update(|now| now.phase = Phase::Streaming);
        Scene { store, clock, supervisor, told }
    }

    impl Scene {
        async fn run_for(&self, time: Duration) {
            self.run_beside(tokio::time::sleep(time)).await;
        }

        /// Does what is due while `others` do something else.
        async fn run_beside(&self, others: impl Future<Output = ()>) {
            let (stop, config) = (CancellationToken::new(), config());
            let mut chores = Chores::new(&self.supervisor, &config, &self.clock);
            tokio::select! {
                () = chores.run(&stop) => {}
                () = others => {}
            }
        }

        /// WAL is streamed up to `END`, and a gap before `gap_end` is known.
        async fn stream_after_gap(&self, gap_end: Lsn) {
            let Writing { writer, .. } = &self.supervisor.writing;
            let (timeline, start) = (TimelineId::FIRST, Lsn(gap_end.0.min(START.0)));
            let mut extent = ExtentBuilder::new(writer, timeline, start, Level::default()).unwrap();
            extent.push(Bytes::from(vec![1; usize::try_from(END.0 - start.0).unwrap()])).unwrap();
            writer.put_extent(&extent.finish(None).unwrap()).await.unwrap();
            self.supervisor.status.update(|now| {
                (now.timeline, now.durable_end_lsn) = (Some(timeline), END);
                now.base_backup_needed = true;
                now.gaps.push(WalGap {
                    timeline,
                    start_lsn: Lsn(gap_end.0 - 8),
                    end_lsn: gap_end,
                    reason: "lost".to_owned(),
                    noticed_at: self.clock.now(),
                });
            });
        }

        /// Somebody else takes a backup from `START` to `END`.
        async fn put_backup(&self) {
            let Writing { repository, writer, .. } = &self.supervisor.writing;
            let (now, timeline) = (self.clock.now(), TimelineId::FIRST);
            let public = PublicManifest {
                id: BackupId::new(now, timeline, START),
                system_id: repository.system_id(),
                postgres_version_num: 150_000,
                wal_segment_size_bytes: SegmentSize::DEFAULT,
                kind: BackupKind::Full,
                parents: Vec::new(),
                timeline,
                end_timeline: timeline,
                start_lsn: START,
                end_lsn: END,
                start_time: now,
                end_time: now,
                plain_bytes: 0,
                stored_bytes: 0,
                file_count: 0,
                pack_bytes: Vec::new(),
                checksum_failure_count: 0,
                key_id: writer.key_id(),
                recipients: Vec::new(),
            };
            let name = repository.name(&Object::Manifest(public.id)).unwrap();
            let manifest = Manifest {
                public,
                tablespaces: Vec::new(),
                settings: [].into(),
                packs: Vec::new(),
                checksum_failures: Vec::new(),
            };
            self.store.put_if_absent(&name, manifest.seal(writer).unwrap()).await.unwrap();
        }

        /// Times that a backup was tried and failed.
        fn failures(&self) -> u64 {
            self.supervisor.status.snapshot().base_backup_failure_count
        }

        fn lists(&self) -> u64 {
            self.store.requests().lists
        }
    }

    /// No server is there, so a backup fails at once.
    fn config() -> Config {
        let variables = [
            ("TIDEMARK_CONFIG", ""),
            ("TIDEMARK_REPOSITORY", "/nowhere"),
            ("TIDEMARK_POSTGRES", "host=/nowhere"),
        ];
        Config::load(None, Vec::new(), Environment::of(variables)).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_repository_that_does_not_say_what_it_holds_is_told_once_and_asked_seldom() {
        let scene = scene(Duties { backup_interval: DAY, ..Duties::default() }).await;
        for _ in 0..1000 {
            scene.store.fail_next(Call::List, Outcome::Denied);
        }
        let before = scene.lists();
        scene.run_for(Duration::from_secs(600)).await;
        let told = scene.told.lock().unwrap().clone();
        assert!(told.len() == 1 && told[0].starts_with("planning base backups failed"), "{told:?}");
        let asked = scene.lists() - before;
        assert!(asked < 100, "{asked} listings in ten minutes");
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_is_started_anew_every_hour_keeps_the_repository_up() {
        let scene = scene(Duties { upkeep_interval: DAY, ..Duties::default() }).await;
        let before = scene.lists();
        scene.run_for(UPKEEP_FIRST - Duration::from_secs(10)).await;
        let look = scene.lists() - before;
        scene.run_for(Duration::from_secs(3500)).await;
        assert!(scene.lists() - before > 2 * look, "nothing was swept");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_expired_by_a_clock_that_may_be_far_ahead() {
        let mut scene = scene(Duties { upkeep_interval: DAY, ..Duties::default() }).await;
        let (_, other) = Repository::in_memory(&scene.clock).await;
        let take = async || Lease::acquire(&other, LeaseOptions::new("run")).await.unwrap();
        take().await.release().await;
        tokio::time::sleep(2 * CLOCK_DOUBT).await;
        // One more start in between does not end the doubt.
        let lease = take().await;
        tokio::time::sleep(HOUR).await;
        lease.release().await;
        scene.supervisor.writing.lease = take().await;
        let lists_in = async |time: Duration| {
            let before = scene.lists();
            scene.run_for(time).await;
            scene.lists() - before
        };
        let look = lists_in(Duration::from_secs(10)).await;
        assert_eq!(
            lists_in(CLOCK_DOUBT - 2 * HOUR).await,
            look,
            "no more than the look at the start"
        );
        assert!(lists_in(2 * HOUR).await > look, "the day is over");
        let config = config();
        let mut chores = Chores::new(&scene.supervisor, &config, &scene.clock);
        assert!(!chores.was_clock_set());
        scene.clock.suspend(SignedDuration::from_hours(24 * 40));
        assert!(chores.was_clock_set() && !chores.was_clock_set());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_takes_no_backups_knows_from_its_start_whether_one_is_needed() {
        for has_backup in [false, true] {
            let scene = scene(Duties::default()).await;
            scene.stream_after_gap(Lsn(0x80)).await;
            // Of another process: this one knows of no gap.
            scene.supervisor.status.update(|now| {
                (now.base_backup_needed, now.gaps) = (false, Vec::new());
            });
            if has_backup {
                scene.put_backup().await;
            }
            scene.run_for(Duration::from_secs(10)).await;
            let now = scene.supervisor.status.snapshot();
            assert_eq!(now.base_backup_needed, !has_backup);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn expiring_that_the_store_refuses_is_told_and_counted() {
        let retention = RetentionOptions { keep_count: Some(1), ..RetentionOptions::default() };
        let duties =
            Duties { upkeep_interval: DAY, retention: Some(retention), ..Duties::default() };
        let scene = scene(duties).await;
        scene.stream_after_gap(Lsn(0x80)).await;
        scene.put_backup().await;
        scene.store.fail_next(Call::Delete, Outcome::Denied);
        scene
            .run_beside(async {
                tokio::time::sleep(Duration::from_secs(60)).await;
                scene.put_backup().await;
                tokio::time::sleep(HOUR).await;
            })
            .await;
        let told = scene.told.lock().unwrap().clone();
        assert!(told.iter().any(|text| text.contains("refused to delete")), "{told:?}");
        assert_eq!(scene.supervisor.status.snapshot().upkeep_failure_count, 1, "{told:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_backup_that_somebody_else_took_meanwhile_is_not_taken_again() {
        let scene = scene(Duties { backup_interval: DAY, ..Duties::default() }).await;
        scene.stream_after_gap(Lsn(0x80)).await;
        let begun = scene.clock.now();
        scene
            .run_beside(async {
                tokio::time::sleep(Duration::from_secs(5)).await;
                assert_eq!(scene.failures(), 1, "{:?}", scene.told.lock().unwrap());
                scene.put_backup().await;
                tokio::time::sleep(2 * ASK_PAUSE_MAX).await;
            })
            .await;
        let now = scene.supervisor.status.snapshot();
        assert_eq!(scene.failures(), 1, "{:?}", scene.told.lock().unwrap());
        assert!(!now.base_backup_needed && now.newest_base_backup_start > Some(begun), "{now:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn upkeep_notices_the_backups_of_others() {
        let duties = Duties { backup_interval: DAY, upkeep_interval: Some(HOUR), retention: None };
        let scene = scene(duties).await;
        scene.stream_after_gap(Lsn(0x80)).await;
        scene.put_backup().await;
        let newest = || scene.supervisor.status.snapshot().newest_base_backup_start;
        scene
            .run_beside(async {
                tokio::time::sleep(20 * HOUR).await;
                let first = newest();
                let asked = scene.lists();
                scene.put_backup().await;
                tokio::time::sleep(HOUR).await;
                assert!(first.is_some() && newest() > first);
                assert!(scene.lists() - asked < 20, "{} listings", scene.lists() - asked);
                tokio::time::sleep(20 * HOUR).await;
            })
            .await;
        assert_eq!(scene.failures(), 0, "{:?}", scene.told.lock().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_takes_no_backups_notices_the_one_that_was_needed() {
        for (gap_end, needed_after) in [(Lsn(0x80), false), (Lsn(0x180), true)] {
            let scene = scene(Duties::default()).await;
            scene.stream_after_gap(gap_end).await;
            scene
                .run_beside(async {
                    tokio::time::sleep(HOUR / 2).await;
                    assert!(scene.supervisor.status.snapshot().base_backup_needed);
                    scene.put_backup().await;
                    tokio::time::sleep(HOUR).await;
                })
                .await;
            let now = scene.supervisor.status.snapshot();
            assert_eq!(now.base_backup_needed, needed_after, "a gap up to {gap_end}");
            assert_eq!(now.newest_base_backup_start, None);
            assert!(scene.lists() < 50, "{} listings", scene.lists());
        }
    }
}
