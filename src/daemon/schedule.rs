//! When the sidecar does what: pure decisions about times.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::clock::Instant;
use crate::error::{Kind, Retry};

/// After the first failure that may pass a backup is tried again so much later; each further one in a row
/// doubles it. Short: while WAL was lost, or for the first backup, every minute without one cannot be restored.
const RETRY_PAUSE_FIRST: Duration = Duration::from_secs(10);
/// The longest pause, or the interval of backups when that is shorter.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(600);
/// The longest pause of a question that is made with a few requests.
pub const ASK_PAUSE_MAX: Duration = Duration::from_secs(60);
/// The pause after a failure that an operator has to mend, while nothing new can be restored without a
/// backup: the mended thing should not have to wait for tomorrow.
const MENDED_PAUSE: Duration = Duration::from_secs(3600);

/// What is known about base backups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackupHistory {
    /// When the newest complete backup began.
    pub newest_start: Option<Timestamp>,
    /// What came of the last attempts, if they failed.
    pub failure: Option<Failure>,
    /// WAL was lost after the newest backup: without a new one nothing later can be restored.
    pub needed_at_once: bool,
}

/// Attempts in a row that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// When the last one did.
    pub time: Timestamp,
    /// How many there were.
    pub count: u32,
    /// Whether the last one may succeed with nothing changed by an operator.
    pub retry: Retry,
    /// Whether the last one was [needed at once](BackupHistory::needed_at_once).
    pub needed_at_once: bool,
}

impl BackupHistory {
    /// Of backups that are complete and began at `starts`. One that begins later than `now` was taken
    /// while a clock was wrong: counted, it would stop the schedule until then.
    #[must_use]
    pub fn of(starts: impl Iterator<Item = Timestamp>, now: Timestamp) -> Self {
        let newest_start = starts.filter(|start| *start <= now).max();
        Self { newest_start, ..Self::default() }
    }

    /// The same after `failure`; one before a backup that is there now, whoever took it, says nothing any
    /// more.
    #[must_use]
    pub fn after(self, failure: Option<Failure>) -> Self {
        let is_newer =
            |failure: &Failure| self.newest_start.is_none_or(|start| start < failure.time);
        Self { failure: failure.filter(is_newer), ..self }
    }

    /// Takes note of an attempt that failed at `time`. One that somebody else was in the way of may
    /// succeed the next time: a name that two wanted, or an upload that was taken away before its end.
    pub fn fail(&mut self, time: Timestamp, kind: Kind) {
        let retry = if kind == Kind::Conflict { Retry::Later } else { kind.retry() };
        let before = self.failure.map_or(0, |failure| failure.count);
        let needed_at_once = self.needed_at_once;
        let count = before.saturating_add(1);
        self.failure = Some(Failure { time, count, retry, needed_at_once });
    }
}

/// Whether a base backup is due.
#[must_use]
pub fn is_backup_due(history: BackupHistory, interval: Duration, now: Timestamp) -> bool {
    next_backup(history, interval, now) <= now
}

/// When the next base backup is due; `now` when it is at once. What happened later than `now` was noted
/// while the clock was wrong, and counts as of now: else it would stop the schedule until then.
fn next_backup(history: BackupHistory, interval: Duration, now: Timestamp) -> Timestamp {
    let due = match history.newest_start.filter(|start| *start <= now) {
        Some(start) if !history.needed_at_once => later(start, interval),
        _ => now,
    };
    match history.failure {
        None => due,
        Some(Failure { time, .. }) if time > now => due,
        Some(failure) => match failure.retry {
            Retry::Later => due.max(later(failure.time, retry_pause(failure.count).min(interval))),
            // It would end the same way, having read the whole database for it. But what it is needed
            // for was not there then: that is worth one attempt.
            Retry::Never if history.needed_at_once && !failure.needed_at_once => due,
            Retry::Never if history.needed_at_once => {
                due.max(later(failure.time, MENDED_PAUSE.min(interval)))
            }
            Retry::Never => due.max(later(failure.time, interval)),
        },
    }
}

/// When what failed `failure_count` times in a row, the last time at `time`, is tried again.
#[must_use]
pub fn retry_time(time: Instant, failure_count: u32) -> Instant {
    time + retry_pause(failure_count).min(ASK_PAUSE_MAX)
}

fn retry_pause(failure_count: u32) -> Duration {
    let doublings = failure_count.saturating_sub(1).min(16);
    RETRY_PAUSE_FIRST.saturating_mul(1 << doublings).min(RETRY_PAUSE_MAX)
}

/// `length` after `time`, or the end of time.
#[must_use]
fn later(time: Timestamp, length: Duration) -> Timestamp {
    let length = SignedDuration::try_from(length).unwrap_or(SignedDuration::MAX);
    time.checked_add(length).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn the_first_backup_is_due_at_once_and_the_next_an_interval_later() {
        let mut history = BackupHistory::default();
        assert_eq!(next_backup(history, DAY, at(500)), at(500));
        assert!(is_backup_due(history, DAY, at(500)));
        history.newest_start = Some(at(100));
        assert_eq!(next_backup(history, DAY, at(500)), at(100 + 86_400));
    }

    #[test]
    fn a_backup_that_begins_in_the_future_does_not_stop_the_schedule() {
        let starts = [at(100), at(9_999_999), at(50)].into_iter();
        let history = BackupHistory::of(starts, at(500));
        assert_eq!(next_backup(history, DAY, at(500)), at(100 + 86_400));
        let history = BackupHistory::of([at(501)].into_iter(), at(500));
        assert!(is_backup_due(history, DAY, at(500)));
    }

    #[test]
    fn a_clock_that_was_ahead_for_a_moment_does_not_stop_the_schedule() {
        let taken = BackupHistory { newest_start: Some(at(1_000_000)), ..BackupHistory::default() };
        assert_eq!(next_backup(taken, DAY, at(500)), at(500));
        let mut refused = BackupHistory { newest_start: Some(at(100)), ..BackupHistory::default() };
        refused.fail(at(1_000_000), Kind::Denied);
        assert_eq!(next_backup(refused, DAY, at(500)), at(100 + 86_400));
    }

    #[test]
    fn lost_wal_makes_a_backup_due_at_once_and_failures_make_it_wait_longer_and_longer() {
        let newest_start = Some(at(100));
        let mut history =
            BackupHistory { newest_start, needed_at_once: true, ..BackupHistory::default() };
        assert_eq!(next_backup(history, DAY, at(500)), at(500));
        for (count, pause) in [(1, 10), (2, 20), (3, 40), (7, 600), (u32::MAX, 600)] {
            history.failure =
                Some(Failure { time: at(490), count, retry: Retry::Later, needed_at_once: true });
            assert_eq!(next_backup(history, DAY, at(490)), at(490 + pause));
        }
        assert_eq!(next_backup(history, Duration::from_secs(60), at(500)), at(490 + 60));
    }

    #[test]
    fn a_failure_that_does_not_pass_waits_for_the_next_interval() {
        for newest_start in [None, Some(at(100))] {
            let mut history = BackupHistory { newest_start, ..BackupHistory::default() };
            history.fail(at(100_000), Kind::Denied);
            assert_eq!(next_backup(history, DAY, at(100_001)), at(100_000 + 86_400));
            // WAL is lost afterwards: one attempt at once, then one an hour.
            history.needed_at_once = true;
            assert_eq!(next_backup(history, DAY, at(100_500)), at(100_500));
            history.fail(at(100_600), Kind::Denied);
            assert_eq!(next_backup(history, DAY, at(100_601)), at(100_600 + 3_600));
            let minute = Duration::from_secs(60);
            assert_eq!(next_backup(history, minute, at(100_601)), at(100_600 + 60));
            // An outage in between is waited out as ever.
            history.fail(at(187_000), Kind::Unavailable);
            assert_eq!(next_backup(history, DAY, at(187_001)), at(187_000 + 40));
        }
    }

    #[test]
    fn a_failure_is_forgotten_once_there_is_a_newer_backup() {
        let history = BackupHistory { newest_start: Some(at(100)), ..BackupHistory::default() };
        let mut failed = history;
        failed.fail(at(200), Kind::Unavailable);
        assert_eq!(history.after(failed.failure), failed);
        let newer = BackupHistory { newest_start: Some(at(200)), ..history };
        assert_eq!(newer.after(failed.failure), newer);
    }

    #[test]
    fn an_upload_that_was_taken_away_does_not_cost_the_day() {
        for needed_at_once in [false, true] {
            let newest_start = Some(at(100));
            let mut history =
                BackupHistory { newest_start, needed_at_once, ..BackupHistory::default() };
            history.fail(at(100_000), Kind::Conflict);
            assert_eq!(next_backup(history, DAY, at(100_001)), at(100_010));
        }
    }
}
