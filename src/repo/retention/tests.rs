//! The rules one by one, the second check, and both against a model over random repositories.

use proptest::prelude::*;

use super::*;
use crate::error::Kind;
use crate::pg::{PgTime, TimelineHistory};
use crate::repo::catalog::tests::{at_minute, backup};
use crate::repo::catalog::{BackupObjects, DamagedObject, IncompleteBackup};
use crate::repo::coverage::WalCatalog;
use crate::repo::coverage::tests::timeline;
use crate::repo::marks::Barrier;

/// 128 KiB of WAL a minute, so that positions and times mean the same.
const MINUTE_BYTES: u64 = 1 << 17;
const DAY: i64 = 24 * 60;

/// WAL of timeline `number` from one minute to another, stored as it was written.
fn wal(number: u32, from: i64, until: i64) -> StoredExtent {
    let lsn = |minute: i64| Lsn(u64::try_from(minute).unwrap() * MINUTE_BYTES);
    StoredExtent {
        name: ExtentName {
            timeline: timeline(number),
            range: LsnRange::new(lsn(from), lsn(until)).unwrap(),
            time: Some(PgTime::from_timestamp(at_minute(until))),
        },
        stored_bytes: 100,
        modified: Some(at_minute(until)),
    }
}

fn days_of_wal(number: u32, from: i64, until: i64) -> impl Iterator<Item = StoredExtent> {
    (from..until).map(move |day| wal(number, day * DAY, (day + 1) * DAY))
}

/// A backup taken in the first hour of `day`.
fn daily(number: u32, day: i64) -> BackupSummary {
    let lsn = u64::try_from(day * DAY).unwrap() * MINUTE_BYTES;
    backup(number, (lsn, lsn + 60 * MINUTE_BYTES), (day * DAY, day * DAY + 60))
}

fn month() -> Catalog {
    Catalog {
        backups: (0..30).map(|day| daily(1, day)).collect(),
        wal: WalCatalog::new(days_of_wal(1, 0, 30)),
        ..Catalog::default()
    }
}

fn options(days: Option<u32>, count: Option<u32>, pitr: Option<u32>) -> RetentionOptions {
    RetentionOptions { keep_days: days, keep_count: count, pitr_days: pitr }
}

fn kept_days(plan: &DeletionPlan) -> Vec<i64> {
    let day = |id: BackupId| id.start_time().duration_since(at_minute(0)).as_mins() / DAY;
    plan.keep.iter().map(|kept| day(kept.id)).collect()
}

fn now(day: i64) -> Timestamp {
    at_minute(day * DAY)
}

#[test]
fn without_a_rule_nothing_goes() {
    let plan = plan(&month(), &options(None, None, None), now(30)).unwrap();
    assert!(plan.is_empty());
    assert!(plan.to_string().lines().all(|line| line.ends_with("keep_count is set")));
}

#[test]
fn a_window_alone_deletes_no_backup_and_the_plan_says_so() {
    let of = |count| plan(&month(), &options(None, count, Some(7)), now(30)).unwrap();
    let alone = of(None);
    assert!(alone.backups.is_empty());
    assert!(alone.to_string().contains("note: pitr_days alone deletes no backup"), "{alone}");
    assert!(of(Some(1)).remarks.is_empty());
}

#[test]
fn count_keeps_the_newest_and_the_wal_from_the_oldest_of_them() {
    let plan = plan(&month(), &options(None, Some(3), None), now(30)).unwrap();
    assert_eq!(kept_days(&plan), [27, 28, 29]);
    assert_eq!(plan.wal[0].horizon_lsn.0, 26 * 1440 * MINUTE_BYTES, "an hour of slack is kept");
    assert_eq!(plan.wal[0].extent_count, 26);
    assert_eq!(plan.stored_bytes(), 27 * 12 + 26 * 100);
    let text = plan.to_string();
    assert!(text.contains("delete backup 20260101T000000Z-00000001-0000000000000000: ended"));
    assert!(
        text.contains("delete WAL of timeline 1 before 1/24800000: 26 extents, 2.5 KiB"),
        "{text}"
    );
}

#[test]
fn age_and_count_both_have_to_agree() {
    let by =
        |days, count| kept_days(&plan(&month(), &options(days, count, None), now(30)).unwrap());
    assert_eq!(by(Some(2), Some(5)), [25, 26, 27, 28, 29]);
    assert_eq!(by(Some(5), Some(2)), [25, 26, 27, 28, 29]);
    assert_eq!(by(Some(0), None), [29], "the newest always stays");
    assert_eq!(by(None, Some(0)), [29]);
}

#[test]
fn the_window_keeps_the_backup_it_begins_with() {
    let plan = plan(&month(), &options(None, Some(1), Some(7)), now(30)).unwrap();
    // The window begins on day 23 less an hour, so with the backup of day 22.
    assert_eq!(kept_days(&plan), [22, 23, 24, 25, 26, 27, 28, 29]);
    assert_eq!(plan.keep[0].reasons, [Reason::WindowBase].into());
    assert_eq!(plan.wal[0].horizon_lsn.0, 22 * 1440 * MINUTE_BYTES);
}

#[test]
fn a_backup_that_minimal_wal_cut_off_from_the_window_is_no_base_of_it() {
    let mut catalog = Catalog { backups: vec![daily(1, 0), daily(1, 20)], ..month() };
    let window = options(None, Some(1), Some(15));
    assert_eq!(kept_days(&plan(&catalog, &window, now(30)).unwrap()), [0, 20]);
    let noon = Lsn((10 * DAY + DAY / 2).unsigned_abs() * MINUTE_BYTES);
    catalog.marks.barriers.insert((timeline(1), Barrier::minimal(noon)));
    assert_eq!(kept_days(&plan(&catalog, &window, now(30)).unwrap()), [20]);
    // The second check sees the same barrier: what stays reaches as far as before.
    let all = plan(&catalog, &options(None, Some(2), None), now(30)).unwrap();
    assert_eq!((kept_days(&all), all.backups.len()), (vec![0, 20], 0));
    let longer = plan(&catalog, &options(None, Some(1), Some(21)), now(30)).unwrap();
    assert_eq!(kept_days(&longer), [0, 20], "the window begins before the barrier");
}

#[test]
fn a_backup_that_damaged_wal_cut_off_from_the_window_is_no_base_of_it() {
    let mut catalog = Catalog { backups: vec![daily(1, 0), daily(1, 20)], ..month() };
    let at = |day: i64| Lsn((day * DAY + DAY / 2).unsigned_abs() * MINUTE_BYTES);
    let damaged = LsnRange::new(at(10), Lsn(at(10).0 + MINUTE_BYTES)).unwrap();
    catalog.marks.barriers.insert((timeline(1), Barrier::damaged(damaged)));
    let window = options(None, Some(1), Some(15));
    assert_eq!(kept_days(&plan(&catalog, &window, now(30)).unwrap()), [20]);
    // What retention has taken is no gap any more.
    assert!(!catalog.gaps()[0].expired);
    catalog.marks.expired.insert(timeline(1), damaged.end());
    assert!(catalog.gaps()[0].expired);
}

#[test]
fn an_old_backup_that_is_held_keeps_only_the_wal_it_needs_itself() {
    let mut catalog = month();
    catalog.marks.holds.insert(catalog.backups[3].id());
    let plan = plan(&catalog, &options(None, Some(1), Some(2)), now(30)).unwrap();
    assert_eq!(kept_days(&plan), [3, 27, 28, 29]);
    assert_eq!(plan.keep[0].reasons, [Reason::Held].into());
    let stretches: Vec<_> = plan.wal[0]
        .stretches
        .iter()
        .map(|s| (s.range.start().0 / MINUTE_BYTES / 1440, s.range.end().0 / MINUTE_BYTES / 1440))
        .collect();
    assert_eq!(stretches, [(0, 3), (4, 27)]);
}

#[test]
fn while_a_held_backup_is_not_listed_nothing_goes() {
    let mut catalog = month();
    let hidden = catalog.backups.remove(3);
    let blind = plan(&catalog, &options(None, Some(1), None), now(30)).unwrap();
    assert!(!blind.backups.is_empty() && !blind.wal.is_empty());
    catalog.marks.holds.insert(hidden.id());
    let error = check(&catalog, &blind).unwrap_err();
    assert!(error.message().contains("is held and not there"), "{error}");
    for window in [None, Some(0), Some(2)] {
        let plan = plan(&catalog, &options(None, Some(1), window), now(30)).unwrap();
        assert!(plan.is_empty(), "{plan}");
        assert!(plan.keep[0].reasons.contains(&Reason::HeldMissing));
        let release = format!("tidemark release {}", hidden.id());
        assert!(plan.remarks[0].contains(&release), "{plan}");
    }
    // One that is there and cannot be read is not missing.
    catalog.damaged.push(damaged(Some(hidden.id()), None));
    let plan = plan(&catalog, &options(None, Some(1), None), now(30)).unwrap();
    assert_eq!((plan.backups.len(), plan.wal[0].horizon_lsn.0), (28, 3 * 1440 * MINUTE_BYTES));
}

#[test]
fn the_parents_of_a_kept_backup_stay() {
    let mut catalog = month();
    let (first, second) = (catalog.backups[1].id(), catalog.backups[2].id());
    catalog.backups[29].manifest.parents = vec![second];
    catalog.backups[2].manifest.parents = vec![first];
    let plan = plan(&catalog, &options(None, Some(1), Some(0)), now(30)).unwrap();
    assert_eq!(kept_days(&plan), [1, 2, 29]);
    assert_eq!(plan.keep[0].reasons, [Reason::Parent].into());
}

#[test]
fn a_backup_in_progress_keeps_its_wal_and_is_no_reason_to_delete_another() {
    let mut catalog = month();
    let running = catalog.backups.remove(20);
    catalog
        .incomplete
        .push(IncompleteBackup { id: running.id(), objects: BackupObjects::default() });
    let plan = plan(&catalog, &options(None, Some(1), Some(0)), now(30)).unwrap();
    assert_eq!(kept_days(&plan), [29]);
    assert_eq!(plan.wal[0].horizon_lsn.0, 20 * 1440 * MINUTE_BYTES);
}

fn damaged(backup: Option<BackupId>, timeline: Option<TimelineId>) -> DamagedObject {
    let (object, problem) = ("main/x".to_owned(), "flipped".to_owned());
    DamagedObject { object, backup, timeline, problem }
}

#[test]
fn a_backup_whose_manifest_cannot_be_read_keeps_its_wal() {
    let mut catalog = month();
    let hidden = catalog.backups.remove(20);
    let rules = options(None, Some(1), Some(0));
    let blind = plan(&catalog, &rules, now(30)).unwrap();
    assert_eq!(blind.wal[0].horizon_lsn.0, 29 * 1440 * MINUTE_BYTES);
    catalog.damaged.push(damaged(Some(hidden.id()), None));
    let error = check(&catalog, &blind).unwrap_err();
    assert!(error.message().contains("may need its WAL"), "{error}");
    let plan = plan(&catalog, &rules, now(30)).unwrap();
    assert_eq!(kept_days(&plan), [29]);
    assert_eq!(plan.wal[0].horizon_lsn.0, 20 * 1440 * MINUTE_BYTES);
    assert!(plan.remarks[0].contains("left alone, as is all WAL since it began"), "{plan}");
}

#[test]
fn a_backup_that_cannot_be_restored_does_not_count() {
    let mut catalog = month();
    // The WAL of the newest two is lost.
    catalog.wal = WalCatalog::new(days_of_wal(1, 0, 28));
    let plan = plan(&catalog, &options(None, Some(2), None), now(30)).unwrap();
    assert_eq!(kept_days(&plan), [26, 27, 29]);
}

#[test]
fn without_a_backup_all_wal_stays() {
    let catalog = Catalog { backups: Vec::new(), ..month() };
    let plan = plan(&catalog, &options(Some(0), Some(0), Some(0)), now(3000)).unwrap();
    assert!(plan.is_empty());
    assert_eq!(plan.remarks, ["there is no backup yet: all WAL is kept"]);
}

#[test]
fn a_silent_cluster_keeps_its_window_base_however_old_its_last_commit_is() {
    let mut catalog = month();
    catalog.backups.truncate(3);
    let plan = plan(&catalog, &options(None, Some(1), Some(7)), now(300)).unwrap();
    assert_eq!(kept_days(&plan), [2]);
    assert_eq!(plan.wal[0].horizon_lsn.0, 2 * 1440 * MINUTE_BYTES);
}

/// Timeline 2 left 1 on day 10; 1 went on until day 12.
fn promoted() -> Catalog {
    let switch = Lsn(10 * 1440 * MINUTE_BYTES);
    let history = format!("1\t{switch}\tpromoted\n");
    let history = TimelineHistory::decode(timeline(2), history.as_bytes()).unwrap();
    Catalog {
        backups: (0..30).map(|day| daily(if day < 10 { 1 } else { 2 }, day)).collect(),
        wal: WalCatalog::new(days_of_wal(1, 0, 12).chain(days_of_wal(2, 10, 30))),
        histories: [(timeline(2), history)].into(),
        ..Catalog::default()
    }
}

#[test]
fn a_window_across_a_promotion_keeps_the_old_timeline_up_to_the_switch() {
    let plan = plan(&promoted(), &options(None, Some(1), Some(3)), now(12)).unwrap();
    assert!(kept_days(&plan).starts_with(&[8, 9, 10]), "{plan}");
    assert_eq!(plan.wal.len(), 1);
    assert_eq!(plan.wal[0].timeline, timeline(1));
    assert_eq!(plan.wal[0].horizon_lsn.0, 8 * 1440 * MINUTE_BYTES);
}

#[test]
fn a_dead_branch_goes_when_the_window_has_left_it() {
    let plan = plan(&promoted(), &options(None, Some(1), Some(5)), now(30)).unwrap();
    assert_eq!(kept_days(&plan), [24, 25, 26, 27, 28, 29]);
    let gone: Vec<_> = plan.wal.iter().map(|w| (w.timeline.get(), w.extent_count)).collect();
    assert_eq!(gone, [(1, 12), (2, 14)]);
}

#[test]
fn wal_of_which_the_store_tells_no_age_is_kept() {
    let options = options(Some(7), None, Some(7));
    let aged = plan(&month(), &options, now(30)).unwrap();
    assert!(aged.wal[0].extent_count > 10 && aged.remarks.is_empty(), "{aged}");
    let ageless = |extent| StoredExtent { modified: None, ..extent };
    let catalog = Catalog { wal: WalCatalog::new(days_of_wal(1, 0, 30).map(ageless)), ..month() };
    let plan = plan(&catalog, &options, now(30)).unwrap();
    assert_eq!(plan.wal, []);
    assert!(plan.remarks[0].contains("30 WAL extents"), "{plan}");
}

/// The newest backup was taken on timeline 1 after timeline 2 had left it, none on timeline 2 yet.
fn only_a_dead_branch_has_a_new_backup() -> Catalog {
    let mut catalog = promoted();
    catalog.backups.retain(|backup| backup.id().timeline() == timeline(1));
    catalog.backups.push(daily(1, 11));
    catalog
}

#[test]
fn the_newest_backup_that_leads_to_the_newest_timeline_stays() {
    let catalog = only_a_dead_branch_has_a_new_backup();
    let plan = plan(&catalog, &options(None, Some(1), None), now(12)).unwrap();
    assert_eq!(kept_days(&plan), [9, 11]);
    assert!(plan.wal.iter().all(|wal| wal.timeline == timeline(1)), "{plan}");
    assert_eq!(plan.wal[0].horizon_lsn.0, 8 * 1440 * MINUTE_BYTES);
}

#[test]
fn a_plan_that_leaves_only_a_dead_branch_is_refused_by_the_second_check() {
    let catalog = only_a_dead_branch_has_a_new_backup();
    let mut plan = plan(&catalog, &options(None, Some(1), None), now(12)).unwrap();
    let leading = &catalog.backups[9];
    plan.backups.push(DeletedBackup {
        id: leading.id(),
        end_time: leading.manifest.end_time,
        pack_count: 1,
        stored_bytes: 1,
    });
    let error = check(&catalog, &plan).unwrap_err();
    assert!(error.message().contains("less of the newest timeline"), "{error}");
}

#[test]
fn wal_of_unknown_descent_stays() {
    let mut catalog = promoted();
    catalog.histories.clear();
    catalog.backups.drain(..3);
    let plan = plan(&catalog, &options(None, Some(1), Some(5)), now(30)).unwrap();
    let gone: Vec<_> = plan.wal.iter().map(|wal| (wal.timeline, wal.extent_count)).collect();
    assert_eq!(gone, [(timeline(1), 3)], "what no backup leads to may go");
    assert!(plan.remarks[0].contains("history file of timeline 2 is missing"));
}

#[test]
fn while_a_history_cannot_be_read_no_backup_goes_that_may_lead_to_its_timeline() {
    for with_wal in [true, false] {
        let mut catalog = only_a_dead_branch_has_a_new_backup();
        if !with_wal {
            catalog.wal = WalCatalog::new(days_of_wal(1, 0, 12));
        }
        let history = std::mem::take(&mut catalog.histories);
        let rules = [None, Some(0)].map(|window| options(None, Some(1), window));
        let blind = rules.clone().map(|rules| plan(&catalog, &rules, now(30)));
        catalog.damaged.push(damaged(None, Some(timeline(2))));
        for blind in blind.into_iter().flatten().filter(|plan| !plan.backups.is_empty()) {
            let error = check(&catalog, &blind).unwrap_err();
            assert!(error.message().contains("may lead to timeline 2"), "{error}");
        }
        for rules in rules {
            let plan = plan(&catalog, &rules, now(30)).unwrap();
            assert_eq!((plan.backups.len(), plan.wal.len()), (0, 0), "{plan}");
            assert!(plan.keep[0].reasons.contains(&Reason::UnknownDescent));
        }
        catalog.damaged.clear();
        catalog.histories = history;
        let plan = plan(&catalog, &options(None, Some(1), None), now(30)).unwrap();
        assert_eq!(kept_days(&plan), [9, 11]);
    }
}

#[test]
fn a_plan_that_breaks_a_promise_is_refused_by_the_second_check() {
    let catalog = month();
    let good = plan(&catalog, &options(Some(2), Some(2), Some(2)), now(30)).unwrap();
    check(&catalog, &good).unwrap();
    let refused = |change: &dyn Fn(&mut Catalog, &mut DeletionPlan), promise: &str| {
        let (mut catalog, mut plan) = (catalog.clone(), good.clone());
        change(&mut catalog, &mut plan);
        let error = check(&catalog, &plan).unwrap_err();
        assert!(error.message().contains(promise), "{error}");
    };
    let take = |plan: &mut DeletionPlan, index: usize| {
        let backup = &catalog.backups[index];
        plan.backups.push(DeletedBackup {
            id: backup.id(),
            end_time: backup.manifest.end_time,
            pack_count: 1,
            stored_bytes: 1,
        });
    };
    refused(&|_, plan| take(plan, 29), "is the newest backup");
    refused(&|_, plan| take(plan, 28), "younger than is to be kept");
    refused(&|_, plan| take(plan, 27), "could not be recovered any more");
    let hold = |catalog: &mut Catalog, _: &mut DeletionPlan| {
        catalog.marks.holds.insert(catalog.backups[0].id());
    };
    refused(&hold, "is held");
    refused(
        &|catalog, _| {
            let parent = catalog.backups[0].id();
            catalog.backups[29].manifest.parents.push(parent);
        },
        "refers to packs of",
    );
    refused(
        &|catalog, _| {
            let running = catalog.backups.remove(0);
            let objects = BackupObjects::default();
            catalog.incomplete.push(IncompleteBackup { id: running.id(), objects });
        },
        "is not listed",
    );
    refused(
        &|_, plan| {
            let extents = days_of_wal(1, 29, 30).map(|extent| extent.name);
            plan.wal[0].extents.extend(extents);
        },
        "could not be restored",
    );
    refused(&|_, plan| plan.options = options(None, None, Some(2)), "no rule says");
}

#[test]
fn no_clock_may_be_an_hour_off_and_a_plan_may_only_be_older() {
    let fails = |planned, now, store: Option<i64>| {
        let compared =
            super::apply::compare_clocks(at_minute(planned), at_minute(now), store.map(at_minute));
        compared.map_err(|error| (error.kind() == Kind::Config, error.message().to_owned())).err()
    };
    for store in [Some(100), None] {
        for planned in [0, 100, 159] {
            assert_eq!(fails(planned, 100, store), None);
        }
        let (is_config, text) = fails(160, 100, store).unwrap();
        assert!(is_config && text.contains("plan was made by was 3600 s ahead"), "{text}");
    }
    let (_, text) = fails(150, 130, Some(90)).unwrap();
    assert!(text.contains("3600 s ahead"), "the store's time counts, not ours: {text}");
    assert_eq!(fails(50, 100, Some(41)), None);
    for now in [40, 160] {
        let (is_config, text) = fails(0, now, Some(100)).unwrap();
        assert!(is_config && text.contains("the store's clock is"), "{text}");
    }
}

/// A tree of timelines with holes, backups here and there, and commits all the time.
#[derive(Debug, Clone)]
struct World {
    catalog: Catalog,
    /// What the catalog does not show, and what becomes known again afterwards.
    hidden: Catalog,
    options: RetentionOptions,
    now_day: i64,
}

fn worlds() -> impl Strategy<Value = World> {
    let rules =
        (prop::option::of(0_u32..25), prop::option::of(0_u32..6), prop::option::of(0_u32..25));
    (
        prop::collection::vec(1_i64..28, 0..3),
        prop::collection::vec((1_u32..4, 0_i64..30, 1_i64..4), 1..45),
        prop::collection::vec((1_u32..4, 0_i64..30, 0_u32..20), 0..14),
        rules,
        (30_i64..40, prop::option::weighted(0.2, 2_u32..4)),
        prop::collection::btree_set(0_usize..14, 0..2),
    )
        .prop_map(|(mut switches, extents, backups, rules, (now_day, unread), held)| {
            switches.sort_unstable();
            let extents = extents.iter().map(|(t, day, len)| wal(*t, day * DAY, (day + len) * DAY));
            let mut catalog = Catalog { wal: WalCatalog::new(extents), ..Catalog::default() };
            let parents: Vec<(u32, i64)> = (1..).zip(switches).collect();
            for count in 1..=parents.len() {
                let lines = parents.iter().take(count).map(|(parent, day)| {
                    let lsn = Lsn(u64::try_from(day * DAY).unwrap() * MINUTE_BYTES);
                    format!("{parent}\t{lsn}\n")
                });
                let id = timeline(u32::try_from(count).unwrap() + 1);
                let text: String = lines.collect();
                let history = TimelineHistory::decode(id, text.as_bytes()).unwrap();
                catalog.histories.insert(id, history);
            }
            let mut hidden = Catalog::default();
            for (number, day, state) in backups {
                let summary = daily(number, day);
                match state {
                    0 | 1 => {
                        let objects = BackupObjects::default();
                        catalog.incomplete.push(IncompleteBackup { id: summary.id(), objects });
                        hidden.backups.push(summary);
                    }
                    2 | 3 => {
                        catalog.damaged.push(damaged(Some(summary.id()), None));
                        hidden.backups.push(summary);
                    }
                    _ => catalog.backups.push(summary),
                }
            }
            if let Some((id, history)) =
                unread.and_then(|number| catalog.histories.remove_entry(&timeline(number)))
            {
                catalog.damaged.push(damaged(None, Some(id)));
                hidden.histories.insert(id, history);
            }
            catalog.backups.sort_by_key(BackupSummary::id);
            catalog.backups.dedup_by_key(|backup| backup.id());
            for index in held {
                if let Some(backup) = catalog.backups.get(index) {
                    catalog.marks.holds.insert(backup.id());
                }
            }
            let options = options(rules.0, rules.1, rules.2);
            World { catalog, hidden, options, now_day }
        })
}

/// The model: which days of a timeline's path can be recovered to, day by day, asking only whether
/// each day's WAL is in some extent of a timeline that may hold it.
fn recoverable_days(catalog: &Catalog, target: TimelineId, backups: &[BackupSummary]) -> Vec<i64> {
    let path = catalog.lineage().path(target);
    let lsn = |day: i64| Lsn(u64::try_from(day * DAY).unwrap() * MINUTE_BYTES);
    let part_of =
        |day: i64| path.iter().position(|part| part.end.is_none_or(|end| lsn(day) < end)).unwrap();
    let held = |day: i64| {
        path[part_of(day)..].iter().any(|holder| {
            catalog.wal.extents(holder.timeline).any(|e| e.name.range.contains(lsn(day)))
        })
    };
    let mut days = Vec::new();
    for end in 1..34 {
        let possible = backups.iter().any(|backup| {
            let start = i64::try_from(backup.id().start_lsn().0 / MINUTE_BYTES).unwrap() / DAY;
            start < end
                && path[part_of(start)].timeline == backup.id().timeline()
                && (start..end).all(held)
                && path[part_of(end - 1)..].iter().any(|part| part.timeline == target)
        });
        if possible {
            days.push(end);
        }
    }
    days
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever the repository looks like: both checks agree, and by a model that shares nothing
    /// with either, all that was promised can still be recovered.
    #[test]
    fn no_plan_ever_takes_what_a_kept_moment_needs(world in worlds()) {
        let World { mut catalog, hidden, options, now_day } = world;
        let plan = plan(&catalog, &options, now(now_day)).unwrap();
        let gone = plan.deleted_ids();
        let taken: BTreeSet<ExtentName> =
            plan.wal.iter().flat_map(|wal| wal.extents.iter().copied()).collect();
        // Doing it twice finds nothing more to do.
        let mut after = catalog.clone();
        after.backups.retain(|backup| !gone.contains(&backup.id()));
        after.wal = catalog.wal.without(|name| taken.contains(name));
        let again = super::plan(&after, &options, now(now_day)).unwrap();
        prop_assert!(again.backups.is_empty(), "a second plan deletes more: {}", again);

        // From here on with the histories that could not be read meanwhile.
        catalog.histories.extend(hidden.histories);
        let mut after = catalog.clone();
        after.backups.retain(|backup| !gone.contains(&backup.id()));
        after.wal = catalog.wal.without(|name| taken.contains(name));

        prop_assert_eq!(after.backups.last(), catalog.backups.last());
        prop_assert!(catalog.marks.holds.is_disjoint(&gone));
        for target in catalog.lineage().timelines() {
            // What stays can be restored as before; without a window as far as before.
            for backup in after.backups.iter().chain(&hidden.backups) {
                let is_hidden = hidden.backups.contains(backup);
                let alone = std::slice::from_ref(backup);
                let before_days = recoverable_days(&catalog, target, alone);
                let after_days = recoverable_days(&after, target, alone);
                if options.pitr_days.is_none() || is_hidden {
                    prop_assert_eq!(&before_days, &after_days);
                }
                prop_assert_eq!(before_days.first(), after_days.first());
            }
            // Inside the window nothing changes.
            if let Some(pitr) = options.pitr_days {
                let first = now_day - i64::from(pitr);
                let inside = |days: Vec<i64>| -> Vec<i64> {
                    days.into_iter().filter(|day| *day > first).collect()
                };
                prop_assert_eq!(
                    inside(recoverable_days(&catalog, target, &catalog.backups)),
                    inside(recoverable_days(&after, target, &after.backups))
                );
            }
        }
        // The newest timeline is recovered as far as before, whatever other branches have.
        if let Some(newest) = catalog.lineage().timelines().last() {
            let last = |catalog: &Catalog| {
                recoverable_days(catalog, *newest, &catalog.backups).last().copied()
            };
            prop_assert_eq!(last(&catalog), last(&after));
        }
    }
}

#[test]
fn what_the_rules_take_within_a_day_is_known_before() {
    let of = |catalog: &Catalog, backup: i64, wal_days: std::ops::Range<i64>, options| {
        let wal = days_of_wal(1, wal_days.start, wal_days.end);
        let extents = wal.map(|stored| stored.name).collect();
        let reading = Reading { backup: daily(1, backup).id(), extents: &extents };
        Outlook::of(reading, catalog, &options, now(30))
    };
    let at = |backup, options| of(&month(), backup, backup..30, options);
    assert_eq!(at(3, options(None, None, None)), Outlook::Stays);
    let week = options(Some(7), None, None);
    assert_eq!(at(24, week.clone()), Outlook::Stays);
    // It ended an hour into day 23.
    assert_eq!(at(23, week.clone()), Outlook::BackupAt(at_minute(30 * DAY + 60)));
    // Gone already, if anybody looks.
    assert_eq!(at(22, week), Outlook::BackupAt(now(30)));
    // The third of three, and the first of one, go with the next.
    assert_eq!(at(27, options(None, Some(3), None)), Outlook::BackupAfterNext);
    assert_eq!(at(28, options(None, Some(3), None)), Outlook::Stays);
    assert_eq!(at(29, options(None, Some(1), None)), Outlook::BackupAfterNext);
    assert_eq!(at(29, options(Some(7), Some(1), None)), Outlook::Stays);

    // All are kept by age, and of their WAL what the window needs. In two hours it begins after the last.
    let few = Catalog { backups: [0, 20, 23].map(|day| daily(1, day)).into(), ..month() };
    let at = |backup, wal_days| of(&few, backup, wal_days, options(Some(90), None, Some(7)));
    assert_eq!(at(0, 0..30), Outlook::WalAt(now(30)));
    assert_eq!(at(20, 20..30), Outlook::WalAt(at_minute(30 * DAY + 120)));
    assert_eq!(at(20, 20..21), Outlook::Stays, "its own");
    assert_eq!(at(23, 23..30), Outlook::Stays);
}
