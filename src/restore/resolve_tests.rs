//! Targets on WAL made for the purpose: one backup, a second one, a promotion, a gap.

use super::craft::{Craft, Extents, ts};
use super::plan::Request;
use super::resolve::{Base, CaughtUp, Holdings, Resolved, is_on_path, resolve};
use super::settings::Stop;
use super::target::{Edge, Target, TimelineChoice};
use crate::error::{Error, Kind};
use crate::pg::{Lsn, LsnRange, TimelineHistory, TimelineId};
use crate::repo::marks::Barrier;
use crate::repo::names::BackupId;

const START: Lsn = Lsn(0x300_0000);

/// A cluster with a backup that ends at 10:00:10, commits 101 (10:00:20), 102 (10:00:30), 103 (10:00:40),
/// a restore point between 102 and 103, and a rollback at 10:00:35.
struct World {
    craft: Craft,
    extents: Extents,
    holdings: Holdings,
    commits: Vec<LsnRange>,
    abort: LsnRange,
    point: LsnRange,
}

fn base(craft: &Craft, start: Lsn, end: Lsn, end_time: &str) -> Base {
    let end_time = ts(end_time);
    Base {
        id: BackupId::new(end_time, craft.timeline, start),
        timeline: craft.timeline,
        start_lsn: start,
        end_lsn: end,
        start_time: end_time - jiff::SignedDuration::from_secs(6),
        end_time,
        segment_size: craft.segment_size,
    }
}

impl World {
    fn new() -> Self {
        let mut craft = Craft::new(1, START);
        craft.filler(100);
        let start = craft.filler(3000).start();
        let before = craft.commit(100, "10:00:05");
        let end = craft.filler(40).end();
        let mut cuts = vec![before.end(), end];
        let mut commits = Vec::new();
        commits.push(craft.commit(101, "10:00:20"));
        cuts.push(craft.filler(20_000).end());
        commits.push(craft.commit(102, "10:00:30"));
        // Cut inside a record that spans pages.
        let spanning = craft.filler(30_000);
        cuts.push(Lsn(spanning.start().0 + 10_001));
        let point = craft.restore_point("before migration");
        let abort = craft.abort(900, "10:00:35");
        cuts.push(craft.end());
        commits.push(craft.commit(103, "10:00:40"));
        cuts.push(Lsn(craft.end().0 - 5));
        craft.filler(500);
        let mut extents = Extents::default();
        extents.put(&craft, &cuts);
        let holdings = Holdings {
            bases: vec![base(&craft, start, end, "10:00:10")],
            wal: extents.catalog(),
            ..Holdings::default()
        };
        Self { craft, extents, holdings, commits, abort, point }
    }

    async fn ask(&self, request: &Request) -> Result<Resolved, Error> {
        resolve(&self.holdings, &self.extents, request).await
    }

    async fn to(&self, target: Target) -> Result<Resolved, Error> {
        self.ask(&Request { target, ..Request::default() }).await
    }

    async fn to_time(&self, time: &str, edge: Edge) -> Result<Resolved, Error> {
        self.to(Target::Time { at: ts(time), edge }).await
    }
}

/// The transactions around the stop.
fn around(resolved: &Resolved) -> (u32, u32) {
    let xid = |moment: &Option<super::plan::Moment>| moment.map_or(0, |moment| moment.xid);
    (xid(&resolved.commit_before), xid(&resolved.commit_after))
}

#[tokio::test]
async fn a_time_stops_before_the_first_commit_or_abort_after_it() {
    let world = World::new();
    for (time, edge, stop, xids) in [
        ("10:00:15", Edge::Inclusive, world.commits[0], (100, 101)),
        ("10:00:20", Edge::Inclusive, world.commits[1], (101, 102)),
        ("10:00:20", Edge::Exclusive, world.commits[0], (100, 101)),
        ("10:00:29.999999", Edge::Inclusive, world.commits[1], (101, 102)),
        ("10:00:33", Edge::Inclusive, world.abort, (102, 103)),
        ("10:00:35", Edge::Exclusive, world.abort, (102, 103)),
        ("10:00:37", Edge::Inclusive, world.commits[2], (102, 103)),
        ("10:00:40", Edge::Exclusive, world.commits[2], (102, 103)),
    ] {
        let resolved = world.to_time(time, edge).await.unwrap();
        assert_eq!(resolved.stop, Stop::Before { lsn: stop.start() }, "{time} {edge}");
        assert_eq!(resolved.needed_end, stop.end());
        assert_eq!(around(&resolved), xids, "{time} {edge}");
        assert!(resolved.chain.end() >= resolved.needed_end);
    }
}

#[tokio::test]
async fn a_time_needs_only_the_extents_on_both_sides_of_it_and_each_once() {
    let world = World::new();
    world.to_time("10:00:25", Edge::Inclusive).await.unwrap();
    let mut read = world.extents.read.lock().unwrap().clone();
    read.sort();
    assert!(read.is_sorted_by(|name, next| name < next), "{read:?}");
    assert!(read.iter().all(|name| name.range.start() < world.point.start()), "{read:?}");
}

#[tokio::test]
async fn a_time_after_the_newest_commit_is_reached_only_when_nothing_can_be_missing() {
    let mut world = World::new();
    let last = world.to_time("10:00:40", Edge::Inclusive).await.unwrap();
    assert_eq!((last.stop.clone(), around(&last)), (Stop::EndOfWal, (103, 0)));
    assert_eq!(last.applied_end, world.craft.end());

    let error = world.to_time("10:00:45", Edge::Inclusive).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.message().contains("after the newest durable commit"), "{error}");
    assert!(error.hint_text().unwrap().contains("2026-11-22T10:00:40Z"), "{error:?}");

    world.holdings.caught_up = Some(CaughtUp {
        timeline: TimelineId::FIRST,
        durable_end_lsn: world.craft.end(),
        time: ts("10:00:50"),
    });
    let silent = world.to_time("10:00:45", Edge::Inclusive).await.unwrap();
    assert_eq!(around(&silent), (103, 0));
    assert_eq!(silent.last_record.unwrap().end(), world.craft.end());
    let error = world.to_time("10:00:51", Edge::Inclusive).await.unwrap_err();
    assert!(error.hint_text().unwrap().contains("2026-11-22T10:00:50Z"), "{error:?}");
}

#[tokio::test]
async fn a_time_before_the_first_backup_names_the_first_reachable_one() {
    let world = World::new();
    let error = world.to_time("09:00:00", Edge::Inclusive).await.unwrap_err();
    assert!(error.message().contains("before the end of the first backup"), "{error}");
    assert!(error.hint_text().unwrap().contains("after it 2026-11-22T10:00:10Z"), "{error:?}");
    // This host's clock was ahead of the server's: positions decide.
    let mut skewed = World::new();
    skewed.holdings.bases[0].end_time = ts("10:00:22");
    let resolved = skewed.to_time("10:00:21", Edge::Inclusive).await.unwrap();
    assert_eq!(around(&resolved), (101, 102));
}

#[tokio::test]
async fn a_backup_that_holds_a_later_commit_is_never_taken() {
    let mut world = World::new();
    // Nothing was committed while this one ran, so that only what came before it can tell.
    let (start, end) = (world.commits[1].end(), world.point.end());
    let quiet = Base { start_time: ts("10:00:31"), ..base(&world.craft, start, end, "10:00:34") };
    world.holdings.bases = vec![quiet];
    for time in ["09:00:00", "10:00:15", "10:00:20", "10:00:29.999999"] {
        let error = world.to_time(time, Edge::Inclusive).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{time}");
        assert!(error.hint_text().unwrap().contains("after it 2026-11-22T10:00:34Z"), "{error:?}");
    }
    // The last commit before it is wanted: the files are what was asked for.
    for time in ["10:00:30", "10:00:32"] {
        let resolved = world.to_time(time, Edge::Inclusive).await.unwrap();
        assert_eq!(resolved.stop, Stop::Before { lsn: world.abort.start() }, "{time}");
    }
    assert!(world.to_time("10:00:30", Edge::Exclusive).await.is_err());

    // No WAL tells what came before it: the time at which it began decides.
    let from = world.holdings.bases[0].segment_size.start_of(start);
    while let Some(early) = world.extents.catalog().extents(world.craft.timeline).next()
        && early.name.range.end() <= start
    {
        world.extents.remove(early.name.range.start());
    }
    assert!(from < start);
    world.holdings.wal = world.extents.catalog();
    assert!(world.to_time("10:00:20", Edge::Inclusive).await.is_err());
}

#[tokio::test]
async fn positions_stop_at_the_record_that_postgres_stops_at() {
    let world = World::new();
    let commit = world.commits[1];
    for (at, edge, applied, xids) in [
        (commit.start(), Edge::Inclusive, commit.end(), (102, 103)),
        (commit.start(), Edge::Exclusive, commit.start(), (101, 102)),
        (Lsn(commit.start().0 - 3), Edge::Inclusive, commit.end(), (102, 103)),
        (Lsn(commit.start().0 + 1), Edge::Exclusive, commit.end(), (102, 103)),
    ] {
        let resolved = world.to(Target::Lsn { at, edge }).await.unwrap();
        let stop = match edge {
            Edge::Inclusive => Stop::After { lsn: at },
            Edge::Exclusive => Stop::Before { lsn: at },
        };
        assert_eq!((resolved.stop.clone(), resolved.applied_end), (stop, applied), "{at} {edge}");
        assert_eq!(around(&resolved), xids, "{at} {edge}");
    }
    let end = world.to(Target::Lsn { at: world.craft.end(), edge: Edge::Inclusive }).await.unwrap();
    assert_eq!((end.stop, end.applied_end), (Stop::EndOfWal, world.craft.end()));
    for (at, because) in [
        (Lsn(world.craft.end().0 + 1), "after the end of the durable WAL"),
        (START, "before the end of the first backup"),
    ] {
        let error = world.to(Target::Lsn { at, edge: Edge::Inclusive }).await.unwrap_err();
        assert!(error.message().contains(because), "{error}");
    }
}

#[tokio::test]
async fn transactions_and_restore_points_are_found_by_searching() {
    let world = World::new();
    let xid = |xid, edge| Target::Xid { xid, edge };
    let found = world.to(xid(102, Edge::Inclusive)).await.unwrap();
    assert_eq!(found.stop, Stop::After { lsn: world.commits[1].start() });
    assert_eq!(around(&found), (102, 103));
    let found = world.to(xid(102, Edge::Exclusive)).await.unwrap();
    assert_eq!(found.stop, Stop::Before { lsn: world.commits[1].start() });
    assert_eq!(around(&found), (101, 102));
    let found = world.to(xid(900, Edge::Inclusive)).await.unwrap();
    assert_eq!((found.applied_end, around(&found)), (world.abort.end(), (102, 103)));
    let found = world.to(Target::name("before migration").unwrap()).await.unwrap();
    assert_eq!((found.applied_end, around(&found)), (world.point.end(), (102, 103)));
    for target in [xid(555, Edge::Inclusive), Target::name("Before migration").unwrap()] {
        let error = world.to(target).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
    }
    // Committed while the only backup was running: never a consistent state.
    assert!(world.to(xid(100, Edge::Inclusive)).await.is_err());
}

#[tokio::test]
async fn no_time_before_a_commit_in_the_backups_own_wal_is_called_reachable() {
    let mut craft = Craft::new(1, START);
    let start = craft.filler(100).start();
    craft.commit(100, "10:00:15");
    let end = craft.filler(40).end();
    craft.commit(101, "10:00:20");
    let mut extents = Extents::default();
    extents.put(&craft, &[end]);
    // By this host's clock it ended before the commit that is in it.
    let bases = vec![base(&craft, start, end, "10:00:10")];
    let holdings = Holdings { bases, wal: extents.catalog(), ..Holdings::default() };
    for (time, reached) in [("10:00:12", false), ("10:00:15", true)] {
        let target = Target::Time { at: ts(time), edge: Edge::Inclusive };
        let request = Request { target, ..Request::default() };
        let resolved = resolve(&holdings, &extents, &request).await;
        assert_eq!(resolved.is_ok(), reached, "{time}: {resolved:?}");
        if let Err(error) = resolved {
            assert!(error.message().contains("before the end of the first backup"), "{error}");
            assert!(error.hint_text().unwrap().contains("after it 2026-11-22T10:00:15Z"));
        }
    }
}

#[tokio::test]
async fn latest_and_immediate_are_the_ends_of_the_wal_and_of_the_backup() {
    let world = World::new();
    let latest = world.to(Target::Latest).await.unwrap();
    assert_eq!((latest.stop.clone(), around(&latest)), (Stop::EndOfWal, (103, 0)));
    assert_eq!(latest.last_record.unwrap().end(), world.craft.end());
    let immediate = world.to(Target::Immediate).await.unwrap();
    assert_eq!((immediate.stop.clone(), around(&immediate)), (Stop::Immediate, (100, 101)));
}

#[tokio::test]
async fn the_newest_backup_that_is_consistent_before_the_stop_is_taken() {
    let mut world = World::new();
    let (start, end) = (world.commits[1].start(), world.abort.end());
    let second = base(&world.craft, start, end, "10:00:36");
    world.holdings.bases.push(second.clone());
    let chosen = |resolved: Result<Resolved, Error>| resolved.unwrap().base.end_lsn;
    assert_eq!(chosen(world.to_time("10:00:37", Edge::Inclusive).await), end);
    assert_ne!(chosen(world.to_time("10:00:25", Edge::Inclusive).await), end);
    assert_ne!(chosen(world.to(Target::Lsn { at: start, edge: Edge::Inclusive }).await), end);
    assert_eq!(chosen(world.to(Target::Latest).await), end);
    // Found in the WAL of the second backup, but before it is consistent.
    let point = Target::name("before migration").unwrap();
    assert_ne!(chosen(world.to(point.clone()).await), end);
    let forced = Request { target: point, backup: Some(second.id), ..Request::default() };
    assert!(world.ask(&forced).await.is_err());
    let xid = Target::Xid { xid: 103, edge: Edge::Inclusive };
    assert_eq!(chosen(world.to(xid).await), end);
}

#[tokio::test]
async fn a_target_in_a_gap_names_both_sides() {
    let mut world = World::new();
    world.extents.remove(world.commits[1].start());
    world.holdings.wal = world.extents.catalog();
    let error = world.to_time("10:00:33", Edge::Inclusive).await.unwrap_err();
    assert!(error.message().contains("in a gap"), "{error}");
    assert!(error.hint_text().unwrap().contains("before it 2026-11-22T10:00:20Z"), "{error:?}");
    assert!(
        world.to_time("10:00:15", Edge::Inclusive).await.is_ok_and(|r| r.stop != Stop::EndOfWal)
    );
    let latest = world.to(Target::Latest).await.unwrap();
    assert!(latest.notes[0].contains("is missing"), "{:?}", latest.notes);
    assert_eq!(around(&latest), (101, 0));

    // A backup taken after the gap makes what follows it reachable.
    let after = base(&world.craft, world.abort.start(), world.abort.end(), "10:00:38");
    world.holdings.bases.push(after);
    let error = world.to_time("10:00:33", Edge::Inclusive).await.unwrap_err();
    let hint = error.hint_text().unwrap();
    assert!(
        hint.contains("before it 2026-11-22T10:00:20Z, after it 2026-11-22T10:00:38Z"),
        "{hint}"
    );
}

#[tokio::test]
async fn nothing_behind_damaged_wal_is_reached_from_a_backup_that_began_before_its_end() {
    let mut world = World::new();
    let (start, end) = (world.abort.start(), world.abort.end());
    let barrier = Barrier::damaged(LsnRange::new(start, end).unwrap());
    world.holdings.barriers.insert((TimelineId::FIRST, barrier));
    let latest = world.to(Target::Latest).await.unwrap();
    assert_eq!((latest.chain.end(), around(&latest)), (start, (102, 0)));
    assert!(latest.notes[0].contains("the server's own WAL is damaged"), "{:?}", latest.notes);
    let behind = Target::Time { at: ts("10:00:37"), edge: Edge::Inclusive };
    let error = world.to(behind.clone()).await.unwrap_err();
    assert!(error.message().contains("the server's own WAL is damaged"), "{error}");
    // One that begins inside leads nowhere.
    let inside = Lsn(start.0 + 8);
    world.holdings.bases.push(base(&world.craft, inside, world.commits[2].start(), "10:00:36"));
    let error = world.to(behind.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    world.holdings.bases.push(base(&world.craft, end, world.commits[2].start(), "10:00:36"));
    assert_eq!(world.to(behind).await.unwrap().base.start_lsn, end);
}

#[tokio::test]
async fn nothing_behind_minimal_wal_is_reached_from_a_backup_that_began_before_it() {
    let mut world = World::new();
    let barrier = world.abort.start();
    world.holdings.barriers.insert((TimelineId::FIRST, Barrier::minimal(barrier)));
    let latest = world.to(Target::Latest).await.unwrap();
    assert_eq!((latest.chain.end(), around(&latest)), (barrier, (102, 0)));
    assert!(latest.notes[0].contains("wal_level = minimal"), "{:?}", latest.notes);
    assert!(latest.needed_end <= barrier);
    let before = world.to_time("10:00:25", Edge::Inclusive).await.unwrap();
    assert_eq!(before.stop, Stop::Before { lsn: world.commits[1].start() });
    let behind = [
        Target::Time { at: ts("10:00:37"), edge: Edge::Inclusive },
        Target::Lsn { at: world.commits[2].start(), edge: Edge::Inclusive },
        Target::Xid { xid: 103, edge: Edge::Inclusive },
    ];
    for target in &behind {
        let error = world.to(target.clone()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{target}");
    }
    let error = world.to(behind[0].clone()).await.unwrap_err();
    assert!(error.message().contains("wal_level = minimal"), "{error}");

    // A backup taken after it leads on, from the same segment; the other still leads to before it.
    let (start, end) = (world.abort.end(), world.commits[2].start());
    world.holdings.bases.push(base(&world.craft, start, end, "10:00:36"));
    for target in behind {
        assert_eq!(world.to(target).await.unwrap().base.start_lsn, start);
    }
    assert_eq!(around(&world.to(Target::Latest).await.unwrap()), (103, 0));
    let error = world.to_time("10:00:35.5", Edge::Inclusive).await.unwrap_err();
    assert!(error.hint_text().unwrap().contains("after it 2026-11-22T10:00:36Z"), "{error:?}");
}

#[tokio::test]
async fn of_damaged_wal_in_front_of_a_backup_no_time_is_known() {
    let mut world = World::new();
    // With the commit of 10:00:30 in it, which nobody has read.
    let damaged = LsnRange::new(world.commits[1].start(), world.abort.end()).unwrap();
    let base = base(&world.craft, damaged.end(), world.commits[2].start(), "10:00:36");
    let request = Request {
        target: Target::Time { at: ts("10:00:25"), edge: Edge::Inclusive },
        backup: Some(base.id),
        ..Request::default()
    };
    world.holdings.bases.push(base);
    let from = world.commits[0].end();
    world.extents.forget_times(LsnRange::new(from, damaged.end()).unwrap());
    world.holdings.wal = world.extents.catalog();
    assert!(world.ask(&request).await.is_ok(), "nothing says that there was a commit");
    world.holdings.barriers.insert((TimelineId::FIRST, Barrier::damaged(damaged)));
    assert_eq!(world.ask(&request).await.unwrap_err().kind(), Kind::NotFound);
}

#[tokio::test]
async fn a_promotion_is_followed_and_the_branch_left_behind_needs_its_number() {
    let mut world = World::new();
    let last = world.to(Target::Latest).await.unwrap().last_record.unwrap().start();
    let switch = world.craft.end();
    let mut second = world.craft.fork(2);
    second.commit(104, "10:01:00");
    second.filler(50);
    // The old primary went on alone.
    world.craft.commit(204, "10:02:00");
    world.craft.filler(50);
    world.extents.put(&world.craft, &[]);
    let mut only_new = Extents::default();
    only_new.put(&second, &[switch]);
    world.extents.put(&second, &[]);
    world.holdings.wal = world.extents.catalog();
    let history = format!("1\t{switch}\tno recovery target specified\n");
    let two = TimelineId::new(2).unwrap();
    let history = TimelineHistory::decode(two, history.as_bytes()).unwrap();
    world.holdings.histories.insert(two, history);

    let latest = world.to(Target::Latest).await.unwrap();
    assert_eq!((latest.timeline, around(&latest)), (two, (104, 0)));
    // A stop before the switch point lies on the old timeline: the new one must begin there.
    let earlier = world.to_time("10:00:37", Edge::Inclusive).await.unwrap();
    assert_eq!((earlier.timeline, around(&earlier)), (TimelineId::FIRST, (102, 103)));
    // Right before the switch point there is no record at or behind the stop on the old timeline, and
    // PostgreSQL needs one to stop at.
    for at in [switch, Lsn(switch.0 - 1)] {
        let before = world.to(Target::Lsn { at, edge: Edge::Exclusive }).await.unwrap();
        assert_eq!((before.timeline, before.applied_end), (TimelineId::FIRST, switch));
        assert_eq!((before.stop, before.needed_end), (Stop::After { lsn: last }, switch));
    }
    let error = world.to_time("10:01:30", Edge::Inclusive).await.unwrap_err();
    assert!(error.hint_text().unwrap().contains("add --timeline 1"), "{error:?}");
    let timeline = TimelineChoice::Exactly(TimelineId::FIRST);
    let target = Target::Time { at: ts("10:01:30"), edge: Edge::Inclusive };
    let branch = world.ask(&Request { target, timeline, backup: None }).await.unwrap();
    assert_eq!((branch.timeline, around(&branch)), (TimelineId::FIRST, (103, 204)));
    let timeline = TimelineChoice::Exactly(TimelineId::new(7).unwrap());
    let error = world.ask(&Request { timeline, ..Request::default() }).await.unwrap_err();
    assert!(error.message().contains("timeline 7"), "{error}");
}

#[tokio::test]
async fn without_a_backup_nothing_can_be_restored() {
    let mut world = World::new();
    world.holdings.bases.clear();
    let error = world.to(Target::Latest).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.hint_text().unwrap().contains("tidemark backup"));
}

proptest::proptest! {
    /// The model: PostgreSQL reads record after record and stops before the first commit or abort whose
    /// time is greater. Wherever the WAL is cut, the same record is found.
    #[test]
    fn every_time_on_any_cut_stops_where_reading_everything_stops(
        steps in proptest::collection::vec((0_u32..4, 0_u32..3, 0_usize..9000), 1..40),
        cut_seed in proptest::collection::vec(0_u64..1000, 0..12),
        target in 0_u32..100,
    ) {
        let mut craft = Craft::new(1, START);
        let start = craft.filler(10).start();
        let end = craft.filler(10).end();
        let mut clock = 0_i64;
        let mut ends = Vec::new();
        for (index, (kind, advance, filler)) in steps.iter().enumerate() {
            // Times may stand still, and run back a little now and then.
            clock += if *advance == 2 && clock > 3 { -2 } else { i64::from(*advance) };
            let time = format!("10:{:02}:{:02}", 1 + clock / 60, clock % 60);
            let xid = 1000 + u32::try_from(index).unwrap();
            match kind {
                0 => { craft.filler(*filler); }
                1 => ends.push((clock, craft.abort(xid, &time))),
                _ => ends.push((clock, craft.commit(xid, &time))),
            }
        }
        let length = craft.end().0 - end.0;
        let mut cuts: Vec<Lsn> = cut_seed.iter()
            .map(|part| Lsn(end.0 + length * part / 1000)).collect();
        cuts.sort();
        let mut extents = Extents::default();
        extents.put(&craft, &cuts);
        let holdings = Holdings {
            bases: vec![base(&craft, start, end, "10:00:10")],
            wal: extents.catalog(),
            ..Holdings::default()
        };
        let target = i64::from(target);
        let at = ts(&format!("10:{:02}:{:02}", 1 + target / 60, target % 60));
        let request = Request { target: Target::Time { at, edge: Edge::Inclusive }, ..Request::default() };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let resolved = runtime.block_on(resolve(&holdings, &extents, &request));
        let expected = ends.iter().find(|(time, _)| *time > target);
        match (expected, resolved) {
            (Some((_, range)), Ok(resolved)) => {
                proptest::prop_assert_eq!(resolved.stop, Stop::Before { lsn: range.start() });
            }
            (None, Ok(resolved)) => proptest::prop_assert_eq!(resolved.stop, Stop::EndOfWal),
            (None, Err(_)) => {
                let newest = ends.iter().map(|(time, _)| *time).max();
                proptest::prop_assert!(newest.is_none_or(|newest| newest < target));
            }
            (Some(expected), Err(error)) => {
                return Err(proptest::test_runner::TestCaseError::fail(format!("{expected:?} {error:?}")));
            }
        }
    }
}

#[test]
fn a_backup_of_a_standby_may_start_on_one_timeline_of_the_path_and_end_on_the_next() {
    let two = TimelineId::new(2).unwrap();
    let path = TimelineHistory::decode(two, b"1\t0/3001000\n").unwrap().path();
    let first = TimelineHistory::first_timeline_only(TimelineId::FIRST).path();
    let switch = Lsn(0x300_1000);
    let mut across = base(&Craft::new(1, START), START, Lsn(switch.0 + 8), "10:00:10");
    across.timeline = two;
    assert!(is_on_path(&across, &path));
    assert!(!is_on_path(&across, &first), "it is consistent on timeline 2 only");
    let off = Base { start_lsn: switch, ..across.clone() };
    assert!(!is_on_path(&off, &path), "timeline 1 went on without it");
    let early = Base { end_lsn: Lsn(switch.0 - 8), ..across };
    assert!(!is_on_path(&early, &path), "timeline 2 had not begun");
}
