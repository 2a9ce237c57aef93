//! When the sidecar does what: pure decisions about times.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// After the first failure a backup is tried again so much later; each further one in a row doubles it.
/// Short: while WAL was lost, or for the first backup, every minute without one cannot be restored.
const RETRY_PAUSE_FIRST: Duration = Duration::from_secs(10);
/// The longest pause, or the interval of backups when that is shorter.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(600);

/// What is known about base backups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackupHistory {
    /// When the newest complete backup began.
    pub newest_start: Option<Timestamp>,
    /// When the last attempt failed, if it did.
    pub failed: Option<Timestamp>,
    /// How many attempts in a row failed.
    pub failure_count: u32,
    /// WAL was lost after the newest backup: without a new one nothing later can be restored.
    pub needed_at_once: bool,
}

/// Whether a base backup is due.
#[must_use]
pub fn is_backup_due(history: BackupHistory, interval: Duration, now: Timestamp) -> bool {
    next_backup(history, interval, now) <= now
}

/// When the next base backup is due; `now` when it is at once.
fn next_backup(history: BackupHistory, interval: Duration, now: Timestamp) -> Timestamp {
    let due = match history.newest_start {
        Some(start) if !history.needed_at_once => later(start, interval),
        _ => now,
    };
    match history.failed {
        Some(failed) => due.max(later(failed, retry_pause(history.failure_count).min(interval))),
        None => due,
    }
}

fn retry_pause(failure_count: u32) -> Duration {
    let doublings = failure_count.saturating_sub(1).min(16);
    RETRY_PAUSE_FIRST.saturating_mul(1 << doublings).min(RETRY_PAUSE_MAX)
}

/// `length` after `time`, or the end of time.
#[must_use]
pub fn later(time: Timestamp, length: Duration) -> Timestamp {
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
    fn lost_wal_makes_a_backup_due_at_once_and_failures_make_it_wait_longer_and_longer() {
        let newest_start = Some(at(100));
        let mut history =
            BackupHistory { newest_start, needed_at_once: true, ..BackupHistory::default() };
        assert_eq!(next_backup(history, DAY, at(500)), at(500));
        history.failed = Some(at(490));
        for (failure_count, pause) in [(1, 10), (2, 20), (3, 40), (7, 600), (u32::MAX, 600)] {
            history.failure_count = failure_count;
            assert_eq!(next_backup(history, DAY, at(490)), at(490 + pause));
        }
        assert_eq!(next_backup(history, Duration::from_secs(60), at(500)), at(490 + 60));
    }
}
