//! What the files of a base backup say must be what the protocol said.
//!
//! A backup of a standby whose primary fails over during the copy, or shortly before it, starts on one
//! timeline and ends on the next: it starts where the last restart point was, and ends where replay has
//! come to. So the end may lie on a timeline that was not there when the server was asked; its history
//! must lead through the start.
//!
//! # Source
//! `do_pg_backup_start` (timeline of the checkpoint in `pg_control`) and `do_pg_backup_stop` (in recovery
//! `minRecoveryPointTLI`) in `src/backend/access/transam/xlog.c` (13 to 18; before 15
//! `do_pg_start_backup`, `do_pg_stop_backup`).

use super::settings::ServerFacts;
use crate::capture::stream::server;
use crate::clock::Clock;
use crate::error::{Context as _, Error, Kind, Result};
use crate::pg::{BackupLabel, ControlFile, Lsn, SystemId, TimelineHistory, TimelineId};
use crate::repo::BackupId;
use crate::wire::{ConnectOptions, Connection, Session};

/// Checks that label and `pg_control` are of the backup `id` of the server that was asked.
///
/// # Errors
/// `corrupt` when they are not, `conflict` for another cluster.
pub(super) fn check(
    id: BackupId,
    facts: &ServerFacts,
    label: &BackupLabel,
    control: &ControlFile,
) -> Result<()> {
    if label.start_lsn != id.start_lsn() || label.timeline != id.timeline() {
        let (lsn, timeline) = (label.start_lsn, label.timeline);
        let found = format!("backup_label names {lsn} on timeline {timeline} for '{id}'");
        return Err(contradiction(&found));
    }
    server::check_system(facts.system_id, control.system_id)?;
    if control.wal_segment_size != facts.segment_size {
        return Err(contradiction("pg_control names another WAL segment size"));
    }
    Ok(())
}

/// Where a backup starts and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    /// Timeline of its start.
    pub(super) start_timeline: TimelineId,
    /// Its start.
    pub(super) start_lsn: Lsn,
    /// Timeline of its end.
    pub(super) end_timeline: TimelineId,
    /// Its end.
    pub(super) end_lsn: Lsn,
}

impl Ends {
    /// The way to the end's timeline, on which both ends are: `known`, or what the server has by now.
    ///
    /// # Errors
    /// `unavailable` when the history of that timeline cannot be read, `corrupt` when it does not lead
    /// through start and end.
    pub(super) async fn history(
        self,
        known: &TimelineHistory,
        system_id: SystemId,
        postgres: &ConnectOptions,
        clock: &Clock,
    ) -> Result<TimelineHistory> {
        let timeline = self.end_timeline;
        let history = match known.timeline == timeline {
            true => known.clone(),
            false => read_history(timeline, system_id, postgres, clock)
                .await
                .map_err(|error| error.with_kind(Kind::Unavailable))
                .context(|| {
                    format!("the base backup ends on timeline {timeline}, which is new to us")
                })?,
        };
        self.check_way(&history)?;
        Ok(history)
    }

    /// Checks that `history`, which is that of the end's timeline, leads through start and end.
    fn check_way(self, history: &TimelineHistory) -> Result<()> {
        let Self { start_timeline, start_lsn, end_timeline, end_lsn } = self;
        let is_lost = history.entries().is_empty() && end_timeline != TimelineId::FIRST;
        if is_lost && start_timeline != end_timeline {
            let file = end_timeline.history_file_name();
            let message = format!(
                "unable to find the way from timeline {start_timeline}, where the base backup starts, \
                 to {end_timeline}, where it ends: the server has no '{file}'"
            );
            return Err(Error::new(Kind::Unavailable, message)
                .hint("Take the backup again when the server has made a checkpoint."));
        }
        if history.timeline_at(start_lsn) != start_timeline {
            return Err(contradiction(&format!(
                "it starts at {start_lsn} on timeline {start_timeline}, which is not on the way to \
                 timeline {end_timeline}, where it ends"
            )));
        }
        if history.timeline_at(end_lsn) != end_timeline {
            return Err(contradiction(&format!(
                "it ends at {end_lsn} on timeline {end_timeline}, which begins later"
            )));
        }
        Ok(())
    }
}

/// The history of `timeline`, asked for on a connection of its own.
async fn read_history(
    timeline: TimelineId,
    system_id: SystemId,
    postgres: &ConnectOptions,
    clock: &Clock,
) -> Result<TimelineHistory> {
    let mut connection = Connection::connect(postgres, Session::Physical, clock).await?;
    // Of several servers that are named it may be another one than before.
    server::check_system(system_id, connection.identify_system().await?.system_id)?;
    let (history, _) = server::read_history(&mut connection, timeline).await?;
    connection.close().await;
    Ok(history)
}

fn contradiction(found: &str) -> Error {
    let message = format!("the server's base backup contradicts itself: {found}");
    Error::new(Kind::Corrupt, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn ends(start: (u32, u64), end: (u32, u64)) -> Ends {
        Ends {
            start_timeline: timeline(start.0),
            start_lsn: Lsn(start.1),
            end_timeline: timeline(end.0),
            end_lsn: Lsn(end.1),
        }
    }

    #[test]
    fn a_standby_may_follow_a_promotion_during_its_backup() {
        let history = TimelineHistory::decode(timeline(3), b"1\t0/100\n2\t0/200\n").unwrap();
        for (start, end) in [
            ((1, 0x80), (3, 0x200)),
            ((2, 0x100), (3, 0x250)),
            ((2, 0x1ff), (3, 0x201)),
            ((3, 0x200), (3, 0x300)),
        ] {
            ends(start, end).check_way(&history).unwrap();
        }
        for (start, end, why) in [
            ((1, 0x100), (3, 0x250), "starts at 0/100 on timeline 1, which is not on the way"),
            ((2, 0x80), (3, 0x250), "starts at 0/80 on timeline 2"),
            ((4, 0x220), (3, 0x250), "starts at 0/220 on timeline 4"),
            ((2, 0x180), (3, 0x1ff), "ends at 0/1FF on timeline 3, which begins later"),
        ] {
            let error = ends(start, end).check_way(&history).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{error}");
            assert!(error.message().contains(why), "{error}");
        }
    }

    #[test]
    fn a_history_that_the_server_lost_is_missed_only_between_two_timelines() {
        let lost = TimelineHistory::first_timeline_only(timeline(2));
        ends((2, 0x80), (2, 0x90)).check_way(&lost).unwrap();
        let error = ends((1, 0x80), (2, 0x90)).check_way(&lost).unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");
        let first = TimelineHistory::first_timeline_only(timeline(1));
        ends((1, 0x80), (1, 0x90)).check_way(&first).unwrap();
    }

    #[tokio::test]
    async fn a_server_that_is_asked_in_vain_makes_no_backup_corrupt() {
        // Nobody listens in a folder that is not there.
        let text = "host=/nowhere/at/all user=u dbname=d connect_timeout=2";
        let postgres = ConnectOptions::parse(text, &|_| None).unwrap();
        let known = TimelineHistory::first_timeline_only(timeline(1));
        let clock = Clock::system();
        let history =
            ends((1, 0x80), (2, 0x90)).history(&known, SystemId(7), &postgres, &clock).await;
        let error = history.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");
        assert!(error.message().contains("ends on timeline 2"), "{error}");
    }
}
