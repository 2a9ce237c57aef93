//! What a repository holds: backups, WAL, and what can be restored from them.
//!
//! In: object names, and of manifests the section that needs no key. Out: a [`Catalog`], from which
//! listings, plans of restores and of deletions are made without further I/O. A host that can only
//! write can make one.
//!
//! # Invariants
//! - Every number comes from a listing made now; nothing is cached and no index object exists.
//! - Backups are listed before WAL: a backup that commits in between is not seen, one that is seen
//!   has its WAL in the listing that follows, unless it expires in between: of one that misses packs or WAL
//!   the manifest is looked for again.
//! - A hole is believed only after the names around it were listed a second time: WAL is uploaded out
//!   of order and compaction replaces small extents by a joint one, so that one listing in several
//!   pages may miss what was there at every moment.
//! - What cannot be read is listed as damaged and never stands in the way of the rest. An object that
//!   was listed and is not found counts as such unless a second listing does not show it either.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, SegmentSize, TimelineHistory, TimelineId};

use super::coverage::{Gap, StoredExtent, WalCatalog};
use super::interval::{BackupSpan, Interval, Lineage, WalGap};
use super::lease::{LeaseInfo, Progress};
use super::manifest::PublicManifest;
use super::marks::{BarrierKind, Marks};
use super::names::{BackupId, KeyId};

/// A backup that is listed: its manifest is there and can be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackupSummary {
    /// What its manifest says to everybody.
    #[serde(flatten)]
    pub manifest: PublicManifest,
    /// The objects that were found.
    #[serde(flatten)]
    pub objects: BackupObjects,
}

/// The objects of a backup, from the listing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BackupObjects {
    /// How many packs there are.
    #[serde(rename = "packs_found")]
    pub pack_count: u32,
    /// Bytes of all of its objects.
    #[serde(rename = "objects_bytes")]
    pub stored_bytes: u64,
    /// When the newest of them was made, by the store's clock; `None` when the store does not say so
    /// of all of them, since any of those may be the newest.
    #[serde(rename = "newest_object_time")]
    pub newest: Option<Timestamp>,
    /// Packs that the manifest lists and that are missing or of another size, by number; at most
    /// [`BAD_PACKS_MAX`]. Empty where there is no manifest.
    pub bad_packs: Vec<u32>,
}

/// Most bad packs kept of one backup.
pub const BAD_PACKS_MAX: usize = 100;

impl BackupSummary {
    /// The backup.
    #[must_use]
    pub fn id(&self) -> BackupId {
        self.manifest.id
    }

    /// What a restore needs of the WAL.
    #[must_use]
    pub fn span(&self) -> BackupSpan {
        BackupSpan {
            id: self.manifest.id,
            end_timeline: self.manifest.end_timeline,
            end_lsn: self.manifest.end_lsn,
            end_time: self.manifest.end_time,
        }
    }

    /// Whether all packs that the manifest lists are there in their size.
    #[must_use]
    pub fn has_all_packs(&self) -> bool {
        self.objects.bad_packs.is_empty()
    }
}

/// Packs without a manifest: a backup that is being taken, was aborted, or is being deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IncompleteBackup {
    /// The backup.
    pub id: BackupId,
    /// What there is of it.
    #[serde(flatten)]
    pub objects: BackupObjects,
}

/// An object that should tell us something and cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DamagedObject {
    /// Its name.
    pub object: String,
    /// The backup that is not listed because of it.
    pub backup: Option<BackupId>,
    /// The timeline whose ancestors are not known because of it.
    pub timeline: Option<TimelineId>,
    /// Why it cannot be read.
    pub problem: String,
}

/// A wrapped data key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StoredKey {
    /// The key.
    pub id: KeyId,
    /// When it was put, by the store's clock, if that says so.
    pub modified: Option<Timestamp>,
}

/// What a repository holds of one cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Catalog {
    /// The backups, oldest start first.
    pub backups: Vec<BackupSummary>,
    /// Packs without a manifest.
    pub incomplete: Vec<IncompleteBackup>,
    /// What could not be read.
    pub damaged: Vec<DamagedObject>,
    /// The WAL.
    pub wal: WalCatalog,
    /// The timeline histories.
    pub histories: BTreeMap<TimelineId, TimelineHistory>,
    /// Holds, and what retention removed.
    pub marks: Marks,
    /// Who writes, or wrote last.
    pub lease: Option<LeaseInfo>,
    /// The wrapped data keys.
    pub keys: Vec<StoredKey>,
    /// Objects under names that are not ours; they are never touched.
    pub foreign_count: u64,
}

impl Catalog {
    /// The WAL and how timelines descend from one another.
    #[must_use]
    pub fn lineage(&self) -> Lineage<'_> {
        let Self { wal, histories, marks, .. } = self;
        Lineage { wal, histories, barriers: &marks.barriers }
    }

    /// The backup with this id.
    ///
    /// # Errors
    /// `not found` when it is not listed; the message says when it is incomplete or damaged.
    pub fn backup(&self, id: BackupId) -> Result<&BackupSummary> {
        self.backups.iter().find(|backup| backup.id() == id).ok_or_else(|| {
            let why = if self.incomplete.iter().any(|backup| backup.id == id) {
                "it has no manifest, so it is being taken, was aborted or is being deleted"
            } else if self.damaged.iter().any(|object| object.backup == Some(id)) {
                "its manifest is damaged"
            } else {
                "there is no such backup"
            };
            Error::new(Kind::NotFound, format!("unable to find backup '{id}': {why}"))
                .hint("Run 'tidemark list' to see the backups.")
        })
    }

    /// Everything that can be restored: each backup towards each timeline that it reaches, by
    /// timeline, then oldest backup first. Backups with missing packs reach nothing.
    #[must_use]
    pub fn intervals(&self) -> Vec<Interval> {
        let mut all = self.intervals_towards_all();
        all.retain(|interval| interval.arrived);
        all
    }

    /// The same with those that end before the timeline they lead to.
    pub(super) fn intervals_towards_all(&self) -> Vec<Interval> {
        let timelines = self.lineage().timelines();
        let all = timelines.iter().flat_map(|timeline| {
            self.backups.iter().filter_map(|backup| self.interval(backup, *timeline))
        });
        all.collect()
    }

    /// What can be restored from `backup` towards `target`.
    #[must_use]
    pub fn interval(&self, backup: &BackupSummary, target: TimelineId) -> Option<Interval> {
        if !backup.has_all_packs() {
            return None;
        }
        let mut interval = self.lineage().interval(&backup.span(), target)?;
        // A silent cluster writes no extents; its writer says up to when there was nothing to write.
        let progress = self.lease.as_ref().and_then(|lease| lease.progress);
        if let Some(progress) = progress.filter(|progress| {
            progress.timeline == target && interval.until_lsn >= progress.durable_end_lsn
        }) {
            let caught_up = progress.caught_up_time.unwrap_or(interval.until_time);
            interval.until_time = interval.until_time.max(caught_up);
        }
        Some(interval)
    }

    /// Whether a restore of the backup can end at its own end at least.
    #[must_use]
    pub fn is_restorable(&self, backup: &BackupSummary) -> bool {
        backup.has_all_packs() && self.lineage().is_complete(&backup.span())
    }

    /// Whether some backup leads to `position` of `timeline`. Where none does (a gap came after all of
    /// them, or they lie on a branch that a promotion left behind), no commit from there on can be
    /// restored before another backup is taken.
    #[must_use]
    pub fn reaches(&self, timeline: TimelineId, position: Lsn) -> bool {
        let reaches = |backup| {
            let interval = self.interval(backup, timeline);
            interval.is_some_and(|interval| interval.until_lsn >= position)
        };
        self.backups.iter().any(reaches)
    }

    /// The holes in the WAL, and what only a backup taken later leads past, each once.
    #[must_use]
    pub fn gaps(&self) -> Vec<WalGap> {
        let lineage = self.lineage();
        let holes = lineage.gaps().into_iter().map(|gap| (gap, None));
        let barriers = lineage.barriers_within().map(|(gap, kind)| (gap, Some(kind)));
        let all: BTreeSet<(Gap, Option<BarrierKind>)> = holes.chain(barriers).collect();
        let gaps = all.into_iter().map(|(gap, barrier)| {
            let (last_commit_before, commit_after) = lineage.times_around(&gap);
            let horizon = self.marks.expired.get(&gap.timeline);
            let expired = horizon.is_some_and(|horizon| gap.missing.end() <= *horizon);
            let in_flight = false;
            WalGap { gap, last_commit_before, commit_after, expired, barrier, in_flight }
        });
        gaps.collect()
    }

    /// The same at the time `now`, when a writer at work may not have filled all of them yet.
    #[must_use]
    pub fn gaps_at(&self, now: Timestamp) -> Vec<WalGap> {
        let mut gaps = self.gaps();
        for gap in gaps.iter_mut().filter(|gap| !gap.expired && gap.barrier.is_none()) {
            let unsettled_from = self.unsettled_from(gap.gap.timeline, now);
            gap.in_flight = unsettled_from.is_some_and(|from| from <= gap.gap.missing.start());
        }
        gaps
    }

    /// The extent with the greatest commit time.
    #[must_use]
    pub fn newest_commit(&self) -> Option<StoredExtent> {
        self.wal.newest_commit()
    }

    /// The newest timeline with WAL and where its WAL ends.
    #[must_use]
    pub fn durable_end(&self) -> Option<(TimelineId, Lsn)> {
        let timeline = self.wal.timelines().last()?;
        Some((timeline, self.wal.last_end(timeline)?))
    }

    /// When the object with the last byte of the newest timeline's WAL was made, by the store's clock.
    /// That is when the WAL became durable, or when small objects were joined to one that holds it.
    #[must_use]
    pub fn durable_end_time(&self) -> Option<Timestamp> {
        let (timeline, _) = self.durable_end()?;
        self.wal.last_extent(timeline)?.modified
    }

    /// As [`Catalog::durable_end`], or where a writer at work at the time `now` has got to there, if that is
    /// before: a hole behind is no loss. `None` also when such a writer has not said yet where it is.
    #[must_use]
    pub fn settled_end(&self, now: Timestamp) -> Option<(TimelineId, Lsn)> {
        let (timeline, end) = self.durable_end()?;
        match self.unsettled_from(timeline, now) {
            None => Some((timeline, end)),
            Some(Lsn::INVALID) => None,
            Some(from) => Some((timeline, from.min(end))),
        }
    }

    /// From where on holes in `timeline` may still be filled: a writer at work at the time `now` uploads side
    /// by side what it received, so what lies behind its progress may wait for what comes before it, which
    /// the server still keeps. [`Lsn::INVALID`] when it has not told its progress there yet.
    fn unsettled_from(&self, timeline: TimelineId, now: Timestamp) -> Option<Lsn> {
        let lease = self.lease.as_ref().filter(|lease| lease.is_at_work(now))?;
        let leads_through = |progress: &Progress| {
            let path = self.lineage().path(progress.timeline);
            path.iter().any(|part| part.timeline == timeline)
        };
        if let Some(progress) = lease.progress.filter(leads_through) {
            return Some(progress.durable_end_lsn);
        }
        // It tells with its next renewal, unless it writes another branch. Its predecessor may have
        // stored something up to when it died, a time to live before it was replaced.
        let stored = self.wal.last_extent(timeline)?.modified?;
        (lease.renewed_time.duration_since(stored) <= lease.ttl() * 2).then_some(Lsn::INVALID)
    }

    /// Timelines whose ancestors are not known because their history file is missing or damaged.
    #[must_use]
    pub fn unknown_ancestries(&self) -> BTreeSet<TimelineId> {
        let lineage = self.lineage();
        let damaged = self.damaged.iter().filter_map(|object| object.timeline);
        self.wal.timelines().filter(|timeline| !lineage.knows(*timeline)).chain(damaged).collect()
    }

    /// Backups of which nothing but their packs or their name is known: without a manifest, or with
    /// one that cannot be read now.
    pub(super) fn unknown_backups(&self) -> impl Iterator<Item = BackupId> {
        let damaged = self.damaged.iter().filter_map(|object| object.backup);
        self.incomplete.iter().map(|backup| backup.id).chain(damaged)
    }

    /// Size of the cluster's WAL segments, as far as a backup tells.
    #[must_use]
    pub fn segment_size(&self) -> Option<SegmentSize> {
        self.backups.last().map(|backup| backup.manifest.wal_segment_size_bytes)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::coverage::tests::timeline;
    use super::super::manifest::BackupKind;
    use super::super::marks::Barrier;
    use jiff::SignedDuration;

    use super::*;
    use crate::pg::SystemId;

    /// The zero of the tests' time.
    pub(in crate::repo) fn at_minute(minute: i64) -> Timestamp {
        let zero: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        zero + SignedDuration::from_mins(minute)
    }

    /// A backup of timeline `number` that ran over `[start, end)` during those minutes.
    pub(in crate::repo) fn backup(
        number: u32,
        lsns: (u64, u64),
        minutes: (i64, i64),
    ) -> BackupSummary {
        let id = BackupId::new(at_minute(minutes.0), timeline(number), Lsn(lsns.0));
        let manifest = PublicManifest {
            id,
            system_id: SystemId(7),
            postgres_version_num: 150_000,
            wal_segment_size_bytes: SegmentSize::new(1 << 20).unwrap(),
            kind: BackupKind::Full,
            parents: Vec::new(),
            timeline: timeline(number),
            end_timeline: timeline(number),
            start_lsn: Lsn(lsns.0),
            end_lsn: Lsn(lsns.1),
            start_time: at_minute(minutes.0),
            end_time: at_minute(minutes.1),
            plain_bytes: 100,
            stored_bytes: 10,
            file_count: 1,
            pack_bytes: vec![10],
            checksum_failure_count: 0,
            key_id: KeyId::NONE,
            recipients: Vec::new(),
        };
        let objects = BackupObjects {
            pack_count: 1,
            stored_bytes: 12,
            newest: Some(at_minute(minutes.1)),
            bad_packs: Vec::new(),
        };
        BackupSummary { manifest, objects }
    }

    #[test]
    fn a_backup_before_a_gap_or_on_a_dead_branch_does_not_reach_what_is_streamed() {
        use super::super::coverage::tests::extent;
        let switch = Lsn(500);
        let history = format!("1\t{switch}\tpromoted\n");
        let history = TimelineHistory::decode(timeline(2), history.as_bytes()).unwrap();
        let mut catalog = Catalog {
            backups: vec![backup(1, (450, 520), (0, 1))],
            wal: WalCatalog::new([
                extent(1, 100, 600, 1),
                extent(2, 500, 700, 2),
                extent(2, 800, 900, 3),
            ]),
            histories: [(timeline(2), history)].into(),
            ..Catalog::default()
        };
        assert!(catalog.reaches(timeline(1), Lsn(600)));
        assert!(!catalog.reaches(timeline(2), Lsn(700)), "it ended past the switch");
        catalog.backups.insert(0, backup(1, (100, 200), (0, 1)));
        assert!(catalog.reaches(timeline(2), switch) && catalog.reaches(timeline(2), Lsn(700)));
        assert!(!catalog.reaches(timeline(2), Lsn(900)), "a gap comes before");
        catalog.backups.push(backup(2, (800, 850), (3, 4)));
        assert!(catalog.reaches(timeline(2), Lsn(900)));
    }

    #[test]
    fn a_backup_with_a_missing_pack_reaches_nothing() {
        let mut catalog = Catalog {
            backups: vec![backup(1, (10, 20), (0, 1))],
            wal: WalCatalog::new([super::super::coverage::tests::extent(1, 0, 100, 5)]),
            ..Catalog::default()
        };
        assert_eq!(catalog.intervals().len(), 1);
        assert!(catalog.is_restorable(&catalog.backups[0]));
        catalog.backups[0].objects.bad_packs = vec![1];
        assert!(catalog.intervals().is_empty());
    }

    #[test]
    fn a_silent_cluster_can_be_restored_up_to_what_its_writer_saw_last() {
        use super::super::lease::Progress;
        let mut catalog = Catalog {
            backups: vec![backup(1, (10, 20), (0, 1))],
            wal: WalCatalog::new([super::super::coverage::tests::extent(1, 0, 100, 0)]),
            ..Catalog::default()
        };
        let progress = |end| Progress {
            timeline: timeline(1),
            durable_end_lsn: Lsn(end),
            caught_up_time: Some(at_minute(90)),
            all_stored_time: Some(at_minute(90)),
        };
        let lease = |end| LeaseInfo {
            epoch: 1,
            released: false,
            description: "stream".into(),
            tenure: super::super::lease::Tenure::Standing,
            process: super::super::process::ProcessIdentity::default(),
            acquired_time: at_minute(0),
            renewed_time: at_minute(90),
            ttl_ms: 1,
            progress: Some(progress(end)),
            key_id: None,
        };
        assert_eq!(catalog.intervals()[0].until_time, at_minute(0), "its begin, not its end");
        catalog.lease = Some(lease(100));
        assert_eq!(catalog.intervals()[0].until_time, at_minute(90));
        catalog.lease = Some(lease(101));
        assert_eq!(catalog.intervals()[0].until_time, at_minute(0), "there is more than we see");
    }

    #[test]
    fn a_hole_behind_what_a_writer_at_work_has_acknowledged_is_no_loss_yet() {
        use super::super::coverage::tests::extent;
        use super::super::lease::Progress;
        let mut catalog = Catalog {
            backups: vec![backup(1, (10, 20), (0, 1))],
            wal: WalCatalog::new([extent(1, 0, 100, 0), extent(1, 120, 140, 0)]),
            ..Catalog::default()
        };
        let end = |catalog: &Catalog, minute| catalog.settled_end(at_minute(minute)).unwrap().1.0;
        assert_eq!(end(&catalog, 90), 140);
        let progress = Progress {
            timeline: timeline(1),
            durable_end_lsn: Lsn(100),
            caught_up_time: None,
            // A standby's.
            all_stored_time: Some(at_minute(90)),
        };
        catalog.lease = Some(LeaseInfo {
            epoch: 1,
            released: false,
            description: "stream".into(),
            tenure: super::super::lease::Tenure::Standing,
            process: super::super::process::ProcessIdentity::default(),
            acquired_time: at_minute(0),
            renewed_time: at_minute(90),
            ttl_ms: 60_000,
            progress: Some(progress),
            key_id: None,
        });
        let lost = |catalog: &Catalog, minute| {
            let gaps = catalog.gaps_at(at_minute(minute));
            gaps.iter().filter(|gap| gap.is_lost()).count()
        };
        assert_eq!((end(&catalog, 91), lost(&catalog, 91)), (100, 0));
        assert_eq!((end(&catalog, 92), lost(&catalog, 92)), (140, 1), "nobody is at work any more");
        let clock_ahead = end(&catalog, 80);
        assert_eq!(clock_ahead, 140, "nobody knows for how long it has been dead");
        catalog.lease.as_mut().unwrap().released = true;
        assert_eq!((end(&catalog, 91), lost(&catalog, 91)), (140, 1));
    }

    #[test]
    fn what_a_writer_at_work_stored_before_it_told_its_progress_is_not_taken_for_all() {
        use super::super::coverage::tests::extent;
        let stored = |number, start, end, minute| StoredExtent {
            modified: Some(at_minute(minute)),
            ..extent(number, start, end, 0)
        };
        let lease = |progress| LeaseInfo {
            epoch: 1,
            released: false,
            description: "stream".into(),
            tenure: super::super::lease::Tenure::Standing,
            process: super::super::process::ProcessIdentity::default(),
            acquired_time: at_minute(90),
            renewed_time: at_minute(90),
            ttl_ms: 60_000,
            progress,
            key_id: None,
        };
        let progress = |number, end| Progress {
            timeline: timeline(number),
            durable_end_lsn: Lsn(end),
            caught_up_time: None,
            all_stored_time: None,
        };
        let history = |number, text: &str| {
            let number = timeline(number);
            (number, TimelineHistory::decode(number, text.as_bytes()).unwrap())
        };
        let mut catalog = Catalog {
            backups: vec![backup(1, (10, 20), (0, 1))],
            wal: WalCatalog::new([stored(1, 0, 100, 0), stored(1, 120, 140, 90)]),
            ..Catalog::default()
        };
        let lost = |catalog: &Catalog| {
            let gaps = catalog.gaps_at(at_minute(91)).into_iter().filter(WalGap::is_lost);
            gaps.map(|gap| gap.gap.missing.start().0).collect::<Vec<_>>()
        };
        let settled = |catalog: &Catalog| catalog.settled_end(at_minute(91)).map(|end| end.1.0);
        catalog.lease = Some(lease(None));
        assert_eq!((settled(&catalog), lost(&catalog)), (None, vec![]));
        // A hole that has been there for long is one, whoever has the lease.
        catalog.wal = WalCatalog::new([stored(1, 0, 100, 0), stored(1, 120, 140, 80)]);
        assert_eq!((settled(&catalog), lost(&catalog)), (Some(140), vec![100]));
        // The server went on with timeline 2, and the lease is still to tell.
        let first = [stored(1, 0, 40, 0), stored(1, 60, 100, 0), stored(1, 110, 140, 90)];
        let second = [stored(2, 130, 150, 90), stored(2, 160, 170, 90)];
        catalog.wal = WalCatalog::new(first.into_iter().chain(second));
        catalog.histories = [history(2, "1\t0/8C\tpromoted\n")].into();
        catalog.lease = Some(lease(Some(progress(1, 100))));
        assert_eq!((settled(&catalog), lost(&catalog)), (None, vec![40]));
        // It tells where it is on timeline 2 while the end of timeline 1 is on its way.
        catalog.lease = Some(lease(Some(progress(2, 100))));
        assert_eq!((settled(&catalog), lost(&catalog)), (Some(100), vec![40]));
        catalog.lease = Some(lease(Some(progress(2, 150))));
        assert_eq!((settled(&catalog), lost(&catalog)), (Some(150), vec![40, 100]));
        // A branch that nobody writes any more, above the one that is written.
        let dead = [stored(3, 140, 145, 20), stored(3, 150, 155, 20)];
        catalog.wal = WalCatalog::new(first.into_iter().chain(dead));
        catalog.histories = [history(3, "1\t0/8C\tpromoted\n")].into();
        catalog.lease = Some(lease(Some(progress(1, 140))));
        assert_eq!((settled(&catalog), lost(&catalog)), (Some(155), vec![40, 100, 145]));
    }

    #[test]
    fn a_backup_from_before_minimal_wal_reaches_it_and_no_more_until_another_is_taken() {
        use super::super::coverage::tests::extent;
        let mut catalog = Catalog {
            backups: vec![backup(1, (10, 20), (0, 1))],
            wal: WalCatalog::new([extent(1, 0, 60, 1), extent(1, 60, 100, 2)]),
            ..Catalog::default()
        };
        assert!(catalog.reaches(timeline(1), Lsn(100)) && catalog.gaps().is_empty());
        catalog.marks.barriers.insert((timeline(1), Barrier::minimal(Lsn(60))));
        assert!(!catalog.reaches(timeline(1), Lsn(100)) && catalog.reaches(timeline(1), Lsn(60)));
        let [gap] = catalog.gaps()[..] else { panic!("{:?}", catalog.gaps()) };
        assert!(gap.barrier == Some(BarrierKind::Minimal) && !gap.expired);
        assert!(gap.gap.missing.is_empty());
        catalog.backups.push(backup(1, (70, 80), (2, 3)));
        assert!(catalog.reaches(timeline(1), Lsn(100)));
        let ends: Vec<_> = catalog.intervals().iter().map(|i| i.until_lsn.0).collect();
        assert_eq!(ends, [60, 100]);
        // A backup that ran across it cannot be restored.
        catalog.backups.push(backup(1, (55, 65), (2, 3)));
        assert!(!catalog.is_restorable(&catalog.backups[2]));
        // When all that came before has expired, so has this.
        catalog.marks.expired.insert(timeline(1), Lsn(60));
        assert!(catalog.gaps()[0].expired);
    }

    #[test]
    fn a_hole_that_retention_made_is_told_from_one_that_was_lost() {
        use super::super::coverage::tests::extent;
        let mut catalog = Catalog {
            wal: WalCatalog::new([extent(1, 0, 10, 1), extent(1, 20, 30, 3), extent(1, 40, 50, 5)]),
            ..Catalog::default()
        };
        catalog.marks.expired.insert(timeline(1), Lsn(20));
        let gaps = catalog.gaps();
        let seen: Vec<_> =
            gaps.iter().map(|gap| (gap.gap.missing.start().0, gap.expired)).collect();
        assert_eq!(seen, [(10, true), (30, false)]);
        assert!(gaps[1].last_commit_before < gaps[1].commit_after);
    }

    #[test]
    fn a_backup_that_is_not_listed_is_refused_with_the_reason() {
        let id = backup(1, (10, 20), (0, 1)).id();
        let mut catalog = Catalog::default();
        assert!(catalog.backup(id).unwrap_err().message().contains("no such backup"));
        catalog.incomplete.push(IncompleteBackup { id, objects: BackupObjects::default() });
        let error = catalog.backup(id).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.message().contains("no manifest"), "{error}");
    }
}
