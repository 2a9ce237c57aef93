//! What a restore will do, decided and printable before anything is written.
//!
//! A [`Plan`] is a value: base backup, WAL, the record at which Postgres stops and the commits on both
//! sides of it. `--dry-run` prints it, `run` carries it out and decides nothing of importance by itself.

use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

use crate::pg::timeline::PathPart;
use crate::pg::{Lsn, PgTime, SegmentSize, SystemId, TimelineId};
use crate::repo::Catalog;
use crate::repo::names::BackupId;
use crate::repo::retention::{Outlook, Reading, RetentionOptions};

use super::chain::Piece;
use super::settings::Stop;
use super::target::{Target, TimelineChoice};
use super::time;

/// Bytes of data a second that fetching and writing is expected to manage; for the estimate only.
const FILES_BYTES_PER_SECOND: u64 = 200 << 20;
/// Bytes of WAL a second that PostgreSQL is expected to replay; for the estimate only.
const REPLAY_BYTES_PER_SECOND: u64 = 50 << 20;

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Where to end.
    pub target: Target,
    /// Which line of history to follow.
    pub timeline: TimelineChoice,
    /// This backup and no other.
    pub backup: Option<BackupId>,
}

/// A commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Moment {
    /// The transaction.
    pub xid: u32,
    /// Its commit time; absent for years that cannot be shown.
    pub time: Option<Timestamp>,
    /// Start of its commit record.
    pub lsn: Lsn,
    /// End of its commit record.
    pub end_lsn: Lsn,
}

impl Moment {
    pub(crate) fn new(xid: u32, time: PgTime, range: crate::pg::LsnRange) -> Self {
        Self { xid, time: time.to_timestamp(), lsn: range.start(), end_lsn: range.end() }
    }
}

/// The base backup of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlannedBackup {
    /// Its id.
    pub id: BackupId,
    /// The timeline it was taken on.
    pub timeline: TimelineId,
    /// Where replay begins.
    pub start_lsn: Lsn,
    /// The first position at which the cluster is consistent.
    pub end_lsn: Lsn,
    /// When it was begun.
    pub start_time: Timestamp,
    /// When it was complete.
    pub end_time: Timestamp,
    /// Bytes of its packs in the store.
    pub stored_bytes: u64,
    /// Bytes of its files.
    pub plain_bytes: u64,
}

/// WAL of one timeline that is replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PlannedWal {
    /// The timeline.
    pub timeline: TimelineId,
    /// First position.
    pub start_lsn: Lsn,
    /// First position after.
    pub end_lsn: Lsn,
    /// Extents it is read from.
    pub extent_count: u64,
    /// Bytes of those extents in the store.
    pub stored_bytes: u64,
}

/// What a restore will do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Name of the cluster in the repository.
    pub cluster: String,
    /// The cluster's system identifier.
    pub system_id: SystemId,
    /// Size of a WAL segment.
    pub wal_segment_bytes: SegmentSize,
    /// What was asked for.
    pub target: Target,
    /// The base backup.
    pub backup: PlannedBackup,
    /// The timeline on which the target lies; what Postgres gets as `recovery_target_timeline`.
    pub timeline: TimelineId,
    /// Where Postgres is told to stop.
    pub stop: Stop,
    /// End of the last record that is replayed, as far as known.
    pub applied_end_lsn: Lsn,
    /// Start of the last record in the WAL of the plan, when it is replayed to its end.
    pub last_record_lsn: Option<Lsn>,
    /// WAL from here on is not given to Postgres: the end of what the repository held when the plan
    /// was made, or of the segment with the record at which Postgres stops.
    pub wal_end_lsn: Lsn,
    /// The last commit that is restored.
    pub commit_before: Option<Moment>,
    /// The first commit that is not.
    pub commit_after: Option<Moment>,
    /// The WAL, in the order it is replayed.
    pub wal: Vec<PlannedWal>,
    /// Bytes to fetch from the store.
    pub fetch_bytes: u64,
    /// Rough time from start to the target, seconds, on an ordinary machine.
    pub expected_s: u64,
    /// What the reader should know besides.
    pub notes: Vec<String>,
    /// The extents behind `wal`.
    #[serde(skip)]
    pub(crate) pieces: Vec<Piece>,
    /// The way to `timeline`.
    #[serde(skip)]
    pub(crate) path: Vec<PathPart>,
    /// Timelines with a history file.
    #[serde(skip)]
    pub(crate) histories: Vec<TimelineId>,
}

impl Plan {
    /// Bytes of WAL that are given to Postgres.
    #[must_use]
    pub fn wal_bytes(&self) -> u64 {
        self.wal.iter().map(|wal| wal.end_lsn.saturating_since(wal.start_lsn)).sum()
    }

    /// Notes what retention by `rules` takes of the plan within a day of `now`: nothing keeps it while it is
    /// restored.
    pub fn note_retention(&mut self, catalog: &Catalog, rules: &RetentionOptions, now: Timestamp) {
        let extents = self.pieces.iter().map(|piece| piece.extent).collect();
        let reading = Reading { backup: self.backup.id, extents: &extents };
        let at = |time: Timestamp| format!("at about {}", time.strftime("%Y-%m-%d %H:%M UTC"));
        let (what, when) = match Outlook::of(reading, catalog, rules, now) {
            Outlook::Stays => return,
            Outlook::BackupAfterNext => ("this backup", "when the next one is there".to_owned()),
            Outlook::BackupAt(time) => ("this backup", at(time)),
            Outlook::WalAt(time) => ("WAL of this plan", at(time)),
        };
        let remedy = match (what, rules.pitr_days) {
            ("this backup", None) => {
                format!("'tidemark hold {}' keeps it and its WAL", self.backup.id)
            }
            ("this backup", Some(_)) => format!(
                "'tidemark hold {}' keeps it, and a longer retention.pitr_days the WAL behind its end",
                self.backup.id
            ),
            _ => "a longer retention.pitr_days keeps it, holding the backup does not".to_owned(),
        };
        self.notes.push(format!("by the rules of retention {what} goes {when}; {remedy}"));
    }

    /// A rough duration for so much data and WAL.
    pub(crate) fn estimate_s(plain_bytes: u64, wal_bytes: u64) -> u64 {
        plain_bytes.div_ceil(FILES_BYTES_PER_SECOND) + wal_bytes.div_ceil(REPLAY_BYTES_PER_SECOND)
    }

    /// The plan for people; times in UTC and in `zone`.
    #[must_use]
    pub fn render(&self, zone: &TimeZone) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<15}{value}");
        };
        line("cluster", format!("{} (system identifier {})", self.cluster, self.system_id));
        line("target", self.target_text(zone));
        line("stops", self.stop_text());
        line("commit before", moment_text(self.commit_before.as_ref(), zone));
        line("commit after", moment_text(self.commit_after.as_ref(), zone));
        line("timeline", self.timeline.to_string());
        let backup = &self.backup;
        line("base backup", format!("{} (consistent at {})", backup.id, backup.end_lsn));
        line("", format!("taken {}", time::show(backup.end_time, zone)));
        for wal in &self.wal {
            let bytes = bytesize::ByteSize(wal.end_lsn.saturating_since(wal.start_lsn));
            let (from, to, timeline) = (wal.start_lsn, wal.end_lsn, wal.timeline);
            let count = wal.extent_count;
            line(
                "WAL",
                format!("{from} to {to} on timeline {timeline}, {bytes} in {count} extents"),
            );
        }
        let (fetch, plain) =
            (bytesize::ByteSize(self.fetch_bytes), bytesize::ByteSize(backup.plain_bytes));
        line("to fetch", format!("{fetch}; the files take {plain}"));
        line("expected", format!("about {}", duration_text(self.expected_s)));
        for note in &self.notes {
            line("note", note.clone());
        }
        text
    }

    fn target_text(&self, zone: &TimeZone) -> String {
        match &self.target {
            Target::Time { at, edge } => format!("{} ({edge})", time::show(*at, zone)),
            other => other.to_string(),
        }
    }

    /// What PostgreSQL is given as its target, except as a standby. The end of the WAL becomes its last
    /// record: PostgreSQL obeys the action only at a target, and only with one a recovery that ends early (at
    /// a record it cannot read) is an error to it, and not the end of the WAL and a server that lacks what
    /// comes after.
    pub(crate) fn recovery_target(&self) -> Stop {
        match (&self.stop, self.last_record_lsn) {
            (Stop::EndOfWal, Some(lsn)) => Stop::After { lsn },
            (stop, _) => stop.clone(),
        }
    }

    fn stop_text(&self) -> String {
        match self.stop {
            Stop::EndOfWal => format!("at the end of the WAL, {}", self.applied_end_lsn),
            Stop::Immediate => format!("as soon as consistent, {}", self.applied_end_lsn),
            Stop::Before { lsn } => format!("before the record at {lsn}"),
            Stop::After { lsn } => format!("after the record at {lsn}"),
        }
    }
}

fn moment_text(moment: Option<&Moment>, zone: &TimeZone) -> String {
    match moment {
        None => "none".to_owned(),
        Some(Moment { xid, time, lsn, .. }) => {
            let time =
                time.map_or_else(|| "at an unknown time".to_owned(), |time| time::show(time, zone));
            format!("{time}, transaction {xid}, record at {lsn}")
        }
    }
}

fn duration_text(seconds: u64) -> String {
    match seconds {
        0..=90 => format!("{} seconds", seconds.max(1)),
        91..=5400 => format!("{} minutes", seconds.div_ceil(60)),
        _ => format!("{} hours", seconds.div_ceil(3600)),
    }
}
