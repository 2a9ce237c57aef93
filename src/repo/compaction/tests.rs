//! Joining and deleting, by model over random cuts and with real objects.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::clock::Clock;
use crate::pg::{Lsn, PgTime};
use crate::repo::coverage::tests::timeline;
use crate::repo::interval::BackupSpan;
use crate::repo::marks::put_barrier;
use crate::repo::{
    BackupId, Catalog, DecryptionIdentity, Encryption, ExtentBuilder, Level, Reader, SealedExtent,
    Writer,
};
use crate::store::Store as _;
use crate::store::memory::{Call, Memory, Outcome};

const MIB: u64 = 1 << 20;

fn options() -> CompactionOptions {
    CompactionOptions::new(SegmentSize::new(1 << 20).unwrap())
}

fn plan(wal: &WalCatalog, options: &CompactionOptions, now: Timestamp) -> CompactionPlan {
    super::plan(wal, &BTreeSet::new(), options, now)
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn stored(number: u32, start: u64, end: u64, modified: i64) -> StoredExtent {
    StoredExtent {
        name: ExtentName {
            timeline: timeline(number),
            range: range(Lsn(start), Lsn(end)),
            time: Some(PgTime(i64::try_from(end).unwrap())),
        },
        stored_bytes: (end - start) / 4 + 100,
        modified: Some(at(modified)),
    }
}

fn ranges(names: &[ExtentName]) -> Vec<(u64, u64)> {
    names.iter().map(|name| (name.range.start().0, name.range.end().0)).collect()
}

#[test]
fn a_complete_segment_becomes_one_object_and_the_next_is_left_alone() {
    let cuts = [0, 100, 5000, MIB / 2, MIB, MIB + 10, MIB + 20];
    let wal = cuts.windows(2).map(|cut| stored(1, cut[0], cut[1], 0));
    let wal = WalCatalog::new(wal);
    let plan = plan(&wal, &options(), at(10_000));
    assert_eq!(plan.merges.len(), 1);
    let merge = &plan.merges[0];
    assert_eq!(ranges(&merge.parts), [(0, 100), (100, 5000), (5000, MIB / 2), (MIB / 2, MIB)]);
    assert_eq!(ranges(&[merge.joint]), [(0, MIB)]);
    assert_eq!(merge.joint.time, Some(PgTime(1 << 20)));
    assert!(plan.prunes.is_empty());
}

#[test]
fn an_open_segment_is_joined_only_where_it_pays() {
    let wal = |count: u64| WalCatalog::new((0..count).map(|i| stored(1, i * 10, (i + 1) * 10, 0)));
    assert!(plan(&wal(15), &options(), at(10_000)).is_empty());
    let merges = plan(&wal(40), &options(), at(10_000)).merges;
    assert_eq!(merges.len(), 1);
    assert_eq!(merges[0].parts.len(), 40);
    // What is new may still get neighbours.
    assert!(plan(&wal(40), &options(), at(599)).is_empty());
    // A timeline that ended gets none.
    let mut ended: Vec<StoredExtent> = wal(3).extents(timeline(1)).collect();
    ended.push(stored(2, 30, 31, 0));
    assert_eq!(plan(&WalCatalog::new(ended), &options(), at(10_000)).merges.len(), 1);
}

#[test]
fn only_extents_that_follow_one_another_exactly_are_joined() {
    let cuts = [(0, 30), (25, 60), (60, 90), (100, 120), (120, MIB)];
    let wal = WalCatalog::new(cuts.map(|(start, end)| stored(1, start, end, 0)));
    let all: Vec<StoredExtent> =
        wal.extents(timeline(1)).chain([stored(2, MIB, MIB + 1, 0)]).collect();
    let merges = plan(&WalCatalog::new(all), &options(), at(10_000)).merges;
    let parts: Vec<_> = merges.iter().map(|merge| ranges(&merge.parts)).collect();
    assert_eq!(parts, [vec![(25, 60), (60, 90)], vec![(100, 120), (120, MIB)]]);
}

#[test]
fn what_a_barrier_ends_is_not_joined_with_the_extent_it_begins_in() {
    let wal = [0, 50, 70, 100, MIB]
        .windows(2)
        .map(|cut| stored(1, cut[0], cut[1], 0))
        .collect::<Vec<_>>();
    let wal = WalCatalog::new(wal);
    let joined = |barriers: &[(u32, Barrier)]| {
        let barriers = barriers.iter().map(|(number, barrier)| (timeline(*number), *barrier));
        let plan = super::plan(&wal, &barriers.collect(), &options(), at(10_000));
        plan.merges.iter().map(|merge| ranges(&[merge.joint])[0]).collect::<Vec<_>>()
    };
    assert_eq!(joined(&[]), [(0, MIB)]);
    for start in [50, 60, 69] {
        let damaged = Barrier::damaged(range(Lsn(start), Lsn(MIB)));
        for barrier in [(1, damaged), (2, damaged), (1, Barrier::minimal(Lsn(start)))] {
            assert_eq!(joined(&[barrier]), [(50, MIB)], "{barrier:?}");
        }
    }
    let both = [50, 100].map(|start| (1, Barrier::minimal(Lsn(start))));
    assert_eq!(joined(&both), [(50, 100)]);
    assert_eq!(joined(&[(1, Barrier::minimal(Lsn(MIB)))]), [(0, MIB)]);
}

#[test]
fn what_a_larger_extent_holds_is_deleted_when_that_has_settled() {
    let wal = |modified| {
        WalCatalog::new([
            stored(1, 0, 10, 0),
            stored(1, 10, 30, 0),
            stored(1, 0, 30, modified),
            stored(1, 5, 25, 0),
            stored(1, 25, 40, 0),
        ])
    };
    let prunes = plan(&wal(1000), &options(), at(1600)).prunes;
    assert_eq!(prunes.len(), 1);
    assert_eq!(ranges(&[prunes[0].holder]), [(0, 30)]);
    assert_eq!(ranges(&prunes[0].held), [(0, 10), (5, 25), (10, 30)]);
    assert!(plan(&wal(1001), &options(), at(1600)).prunes.is_empty());
}

#[test]
fn an_extent_of_unknown_age_is_not_settled() {
    let of_age = |modified| {
        let small = [stored(1, 0, MIB / 2, 0), stored(1, MIB / 2, MIB, 0)];
        let joint = StoredExtent { modified, ..stored(1, 0, MIB, 0) };
        let all = small.map(|extent| StoredExtent { modified, ..extent });
        let merges = plan(&WalCatalog::new(all), &options(), at(10_000)).merges.len();
        let pruned = WalCatalog::new(small.into_iter().chain([joint]));
        (merges, plan(&pruned, &options(), at(10_000)).prunes.len())
    };
    assert_eq!(of_age(Some(at(0))), (1, 1));
    assert_eq!(of_age(None), (0, 0));
}

/// Random cuts of a few segments: several writers' cuts of the same WAL, one over another.
fn worlds() -> impl Strategy<Value = Vec<StoredExtent>> {
    let cuts = prop::collection::btree_set(0_u64..3 * MIB, 0..40);
    let writer = (cuts, 1_u32..3, 0_i64..2000);
    prop::collection::vec(writer, 1..4).prop_map(|writers| {
        let cut = |(cuts, number, modified): (BTreeSet<u64>, u32, i64)| {
            let mut cuts: Vec<u64> = cuts.into_iter().chain([MIB, 2 * MIB]).collect();
            cuts.sort_unstable();
            cuts.dedup();
            let pairs: Vec<(u64, u64)> = cuts.windows(2).map(|c| (c[0], c[1])).collect();
            pairs.into_iter().map(move |(start, end)| stored(number, start, end, modified))
        };
        writers.into_iter().flat_map(cut).collect()
    })
}

proptest! {
    /// Run after run, put by put, deletion by deletion, in any order: what is covered never changes,
    /// and in the end nothing is left to do.
    #[test]
    fn coverage_never_changes_whatever_step_it_stops_at(world in worlds(), reverse in any::<bool>()) {
        let coverage = |extents: &[StoredExtent]| {
            let wal = WalCatalog::new(extents.iter().copied());
            [1, 2].map(|number| wal.coverage(timeline(number)).to_vec())
        };
        let mut extents = world;
        extents.sort_by_key(|extent| extent.name);
        extents.dedup_by_key(|extent| extent.name);
        let covered = coverage(&extents);
        let count = extents.len();
        let mut now = 3000;
        for _ in 0..20 {
            let wal = WalCatalog::new(extents.iter().copied());
            let plan = plan(&wal, &options(), at(now));
            if plan.is_empty() && extents.iter().all(|e| e.modified < Some(at(now - 600))) {
                prop_assert!(extents.len() <= count);
                return Ok(());
            }
            for merge in &plan.merges {
                prop_assert!(merge.parts.windows(2).all(|p| p[0].range.end() == p[1].range.start()));
                prop_assert!(merge.joint.range.len_bytes() <= EXTENT_PLAIN_BYTES_MAX);
                let (start, end) = (merge.joint.range.start().0, merge.joint.range.end().0 - 1);
                prop_assert_eq!(start / MIB, end / MIB, "one segment");
                let parts = extents.iter().filter(|extent| merge.parts.contains(&extent.name));
                let stored_bytes = parts.map(|extent| extent.stored_bytes).sum();
                extents.push(StoredExtent { name: merge.joint, stored_bytes, modified: Some(at(now)) });
            }
            let mut gone: Vec<ExtentName> =
                plan.prunes.iter().flat_map(|prune| prune.held.iter().copied()).collect();
            if reverse {
                gone.reverse();
            }
            for name in gone {
                extents.retain(|extent| extent.name != name);
                prop_assert_eq!(&coverage(&extents), &covered);
            }
            now += 700;
        }
        prop_assert!(false, "it never ends");
    }
}

struct Scene {
    memory: Memory,
    repository: Repository,
    writer: Writer,
    reader: Reader,
}

async fn scene() -> Scene {
    let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
    let (memory, repository) = Repository::in_memory(&clock).await;
    let identity = DecryptionIdentity::generate();
    let encryption = Encryption::Recipients(vec![identity.recipient()]);
    let writer = repository.writer(&encryption).await.unwrap();
    let reader = repository.reader(vec![identity]);
    Scene { memory, repository, writer, reader }
}

/// WAL whose every byte tells its position.
fn wal_bytes(range: crate::pg::LsnRange) -> Bytes {
    (range.start().0..range.end().0).map(|at| (at / 7 % 251) as u8).collect()
}

impl Scene {
    fn sealed(&self, start: u64, end: u64, wal: Bytes) -> SealedExtent {
        let level = Level::default();
        let mut builder = ExtentBuilder::new(&self.writer, timeline(1), Lsn(start), level).unwrap();
        builder.push(wal).unwrap();
        builder.finish(Some(PgTime(1_000_000 + i64::try_from(end).unwrap()))).unwrap()
    }

    async fn put(&self, start: u64, end: u64) -> ExtentName {
        let sealed = self.sealed(start, end, wal_bytes(range(Lsn(start), Lsn(end))));
        self.writer.put_extent(&sealed).await.unwrap();
        sealed.name
    }

    async fn run(&self) -> CompactionReport {
        let catalog = Catalog::load(&self.repository).await.unwrap();
        let (barriers, now) = (&catalog.marks.barriers, self.repository.clock().now());
        let plan = super::plan(&catalog.wal, barriers, &options(), now);
        apply(&self.repository, &plan, &options()).await.unwrap()
    }

    async fn read(&self, start: u64, end: u64) {
        let catalog = Catalog::load(&self.repository).await.unwrap();
        let wanted = range(Lsn(start), Lsn(end));
        for name in catalog.wal.cover(timeline(1), wanted).unwrap() {
            assert_eq!(self.reader.extent(&name).await.unwrap(), wal_bytes(name.range));
        }
    }

    fn joint(&self, start: u64, end: u64) -> ObjectName {
        let time = Some(PgTime(1_000_000 + i64::try_from(end).unwrap()));
        let range = range(Lsn(start), Lsn(end));
        let name = ExtentName { timeline: timeline(1), range, time };
        self.repository.name(&Object::Extent(name)).unwrap()
    }

    async fn names(&self) -> Vec<(u64, u64)> {
        let catalog = Catalog::load(&self.repository).await.unwrap();
        let names: Vec<ExtentName> = catalog.wal.extents(timeline(1)).map(|e| e.name).collect();
        ranges(&names)
    }
}

async fn rest() {
    tokio::time::sleep(Duration::from_secs(700)).await;
}

#[tokio::test(start_paused = true)]
async fn joint_objects_open_as_the_same_wal_and_the_small_ones_go_later() {
    let scene = scene().await;
    let cuts = [0, 1000, 300_000, 300_001, MIB, MIB + 500];
    for cut in cuts.windows(2) {
        scene.put(cut[0], cut[1]).await;
    }
    assert_eq!(scene.run().await, CompactionReport::default(), "nothing has settled");
    rest().await;
    let report = scene.run().await;
    assert_eq!((report.joint_count, report.joined_count, report.deleted_count), (1, 4, 0));
    assert_eq!(scene.names().await.len(), 6);
    scene.read(0, MIB + 500).await;
    rest().await;
    let report = scene.run().await;
    assert_eq!((report.joint_count, report.deleted_count), (0, 4));
    assert_eq!(scene.names().await, [(0, MIB), (MIB, MIB + 500)]);
    scene.read(0, MIB + 500).await;
    rest().await;
    assert_eq!(scene.run().await, CompactionReport::default());
}

#[tokio::test(start_paused = true)]
async fn joining_takes_no_moment_from_what_can_be_restored_up_to_a_barrier() {
    let scene = scene().await;
    for cut in [0, 500_000, 700_000, MIB].windows(2) {
        scene.put(cut[0], cut[1]).await;
    }
    let barrier = Barrier::damaged(range(Lsn(600_000), Lsn(MIB)));
    put_barrier(&scene.repository, timeline(1), &barrier).await.unwrap();
    let until = async || {
        let catalog = Catalog::load(&scene.repository).await.unwrap();
        let backup = BackupSpan {
            id: BackupId::new(Timestamp::UNIX_EPOCH, timeline(1), Lsn(0)),
            end_timeline: timeline(1),
            end_lsn: Lsn(10),
            end_time: Timestamp::UNIX_EPOCH,
        };
        let interval = catalog.lineage().interval(&backup, timeline(1)).unwrap();
        (interval.until_lsn, interval.until_time)
    };
    let before = until().await;
    assert_eq!(before, (Lsn(600_000), PgTime(1_500_000).to_timestamp().unwrap()));
    for _ in 0..2 {
        rest().await;
        scene.run().await;
        assert_eq!(until().await, before);
    }
    assert_eq!(scene.names().await, [(0, 500_000), (500_000, MIB)]);
}

#[tokio::test(start_paused = true)]
async fn a_damaged_part_is_reported_and_never_joined() {
    let scene = scene().await;
    for cut in [0, 1000, 2000, MIB].windows(2) {
        scene.put(cut[0], cut[1]).await;
    }
    let bad = scene.put(MIB, MIB + 10).await;
    let name = scene.repository.name(&Object::Extent(bad)).unwrap();
    scene.put(MIB + 10, 2 * MIB).await;
    scene.memory.damage(&name, |body| body.truncate(100)).unwrap();
    rest().await;
    let report = scene.run().await;
    assert_eq!(report.joint_count, 1);
    assert_eq!(report.damaged.len(), 1);
    assert!(report.damaged[0].contains(name.as_str()), "{:?}", report.damaged);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_when_the_joint_object_is_not_whole() {
    let scene = scene().await;
    for cut in [0, 1000, MIB].windows(2) {
        scene.put(cut[0], cut[1]).await;
    }
    rest().await;
    scene.run().await;
    let joint = ExtentName {
        timeline: timeline(1),
        range: range(Lsn(0), Lsn(MIB)),
        time: Some(PgTime(1_000_000 + (1 << 20))),
    };
    let name = scene.repository.name(&Object::Extent(joint)).unwrap();
    scene.memory.damage(&name, |body| body.truncate(body.len() - 1)).unwrap();
    rest().await;
    let report = scene.run().await;
    assert_eq!(report.deleted_count, 0);
    assert_eq!(report.damaged.len(), 1);
    assert_eq!(scene.names().await.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_when_a_payload_bit_of_the_joint_object_is_not_as_it_was() {
    let scene = scene().await;
    for cut in [0, 1000, 2000, MIB].windows(2) {
        scene.put(cut[0], cut[1]).await;
    }
    rest().await;
    scene.run().await;
    let joint = scene.joint(0, MIB);
    // Behind all headers and lengths: only the bytes themselves tell.
    let flip = |body: &mut Vec<u8>| body[200] ^= 1;
    scene.memory.damage(&joint, flip).unwrap();
    rest().await;
    let report = scene.run().await;
    assert_eq!(report.deleted_count, 0);
    assert_eq!(report.damaged.len(), 1);
    assert!(report.damaged[0].contains(joint.as_str()), "{:?}", report.damaged);
    assert_eq!(scene.names().await.len(), 4);
    scene.memory.damage(&joint, flip).unwrap();
    assert_eq!(scene.run().await.deleted_count, 3);
    scene.read(0, MIB).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_for_a_joint_object_that_somebody_made_up() {
    let scene = scene().await;
    let cuts = [0, 1000, 2000, MIB];
    let mut forged = BytesMut::new();
    for cut in cuts.windows(2) {
        scene.put(cut[0], cut[1]).await;
        let garbage = Bytes::from(vec![0; usize::try_from(cut[1] - cut[0]).unwrap()]);
        forged.extend_from_slice(&scene.sealed(cut[0], cut[1], garbage).body);
    }
    scene.memory.put_if_absent(&scene.joint(0, MIB), forged.freeze()).await.unwrap();
    rest().await;
    let report = scene.run().await;
    assert_eq!((report.deleted_count, report.kept_count), (0, 3));
    assert_eq!(scene.names().await.len(), 4);
}

#[tokio::test(start_paused = true)]
async fn what_was_cut_elsewhere_than_the_members_of_the_joint_object_stays() {
    let scene = scene().await;
    for cut in [0, 1000, 2000, MIB].windows(2) {
        scene.put(cut[0], cut[1]).await;
    }
    rest().await;
    scene.run().await;
    // Another writer's: at the ends of members, and inside one.
    scene.put(0, 2000).await;
    scene.put(1500, 2000).await;
    rest().await;
    let report = scene.run().await;
    assert_eq!((report.deleted_count, report.kept_count), (3, 2));
    assert_eq!(report.damaged, [""; 0]);
    assert_eq!(scene.names().await, [(0, MIB), (0, 2000), (1500, 2000)]);
    scene.read(0, MIB).await;
}

#[tokio::test(start_paused = true)]
async fn an_interrupted_run_is_continued_by_the_next() {
    let scene = scene().await;
    for cut in [0, 1000, 5000, MIB].windows(2) {
        scene.put(cut[0], cut[1]).await;
    }
    for (call, outcome) in [
        (Call::Put, Outcome::FailsBefore),
        (Call::Put, Outcome::FailsAfter),
        (Call::Delete, Outcome::FailsBefore),
        (Call::Delete, Outcome::FailsAfter),
    ] {
        rest().await;
        scene.memory.fail_next(call, outcome);
        let catalog = Catalog::load(&scene.repository).await.unwrap();
        let plan = plan(&catalog.wal, &options(), scene.repository.clock().now());
        let error = apply(&scene.repository, &plan, &options()).await.unwrap_err();
        assert!(error.is_transient());
        scene.read(0, MIB).await;
    }
    assert_eq!(scene.names().await, [(0, MIB)]);
}
