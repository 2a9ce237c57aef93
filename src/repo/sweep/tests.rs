//! What goes, and what saves an object from going.

use bytes::Bytes;

use super::*;
use crate::clock::Clock;
use crate::pg::{Lsn, LsnRange, TimelineId};
use crate::repo::lease::{Lease, LeaseOptions};
use crate::repo::{DecryptionIdentity, Encryption, ExtentBuilder, Level, PackName, Writer};
use crate::store::Store;
use crate::store::memory::{Call, Memory, Outcome};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

struct Scene {
    memory: Memory,
    repository: Repository,
    encryption: Encryption,
}

async fn scene() -> Scene {
    let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
    let (memory, repository) = Repository::in_memory(&clock).await;
    let encryption = Encryption::Recipients(vec![DecryptionIdentity::generate().recipient()]);
    Scene { memory, repository, encryption }
}

impl Scene {
    async fn put_pack(&self, backup: BackupId, number: u32) {
        let name = self.repository.name(&Object::Pack(PackName { backup, number })).unwrap();
        self.memory.put_if_absent(&name, Bytes::from_static(b"pack")).await.unwrap();
    }

    async fn plan(&self) -> SweepPlan {
        let catalog = Catalog::load(&self.repository).await.unwrap();
        plan(&catalog, None, SweepOptions::default(), self.repository.clock().now())
    }

    async fn plan_keys(&self) -> SweepPlan {
        let evidence = scan_headers(&self.repository).await.unwrap();
        let catalog = Catalog::load(&self.repository).await.unwrap();
        let now = self.repository.clock().now();
        plan(&catalog, Some(&evidence), SweepOptions::default(), now)
    }

    async fn writer(&self) -> Writer {
        self.repository.writer(&self.encryption).await.unwrap()
    }

    async fn put_extent(&self, writer: &Writer, start: u64) -> crate::repo::SealedExtent {
        let mut builder =
            ExtentBuilder::new(writer, TimelineId::FIRST, Lsn(start), Level::default()).unwrap();
        builder.push(Bytes::from(vec![7; 10])).unwrap();
        let sealed = builder.finish(None).unwrap();
        writer.put_extent(&sealed).await.unwrap();
        sealed
    }
}

fn id() -> BackupId {
    BackupId::new("2026-01-01T00:00:00Z".parse().unwrap(), TimelineId::FIRST, Lsn(0x28))
}

#[tokio::test(start_paused = true)]
async fn packs_of_an_aborted_backup_go_when_nothing_was_added_for_two_days() {
    let scene = scene().await;
    scene.put_pack(id(), 1).await;
    tokio::time::sleep(47 * HOUR).await;
    assert!(scene.plan().await.backups.is_empty());
    scene.put_pack(id(), 2).await;
    tokio::time::sleep(47 * HOUR).await;
    assert!(scene.plan().await.backups.is_empty(), "it is alive");
    tokio::time::sleep(2 * HOUR).await;
    let plan = scene.plan().await;
    assert_eq!((plan.backups[0].id, plan.backups[0].pack_count), (id(), 2));
    let report = apply(&scene.repository, &plan).await.unwrap();
    assert_eq!(report.pack_count, 2);
    assert!(scene.plan().await.backups.is_empty());
    assert!(Catalog::load(&scene.repository).await.unwrap().incomplete.is_empty());
}

#[tokio::test(start_paused = true)]
async fn without_the_right_to_list_uploads_the_rest_is_swept_and_a_remark_says_so() {
    let scene = scene().await;
    scene.put_pack(id(), 1).await;
    tokio::time::sleep(3 * DAY).await;
    let plan = scene.plan().await;
    for outcome in [Outcome::Passes, Outcome::Denied] {
        scene.memory.fail_next(Call::Any, outcome);
    }
    let report = apply(&scene.repository, &plan).await.unwrap();
    assert_eq!((report.pack_count, report.upload_count, report.remarks.len()), (1, 0, 1));
    assert!(report.remarks[0].starts_with("uploads that were never completed stay: "));
}

#[tokio::test(start_paused = true)]
async fn while_a_held_backup_is_not_listed_nothing_is_swept() {
    let scene = scene().await;
    scene.writer().await;
    scene.put_pack(id(), 1).await;
    let hold = scene.repository.name(&super::super::marks::held(id())).unwrap();
    scene.memory.put_if_absent(&hold, Bytes::new()).await.unwrap();
    tokio::time::sleep(31 * DAY).await;
    for plan in [scene.plan().await, scene.plan_keys().await] {
        assert!(plan.is_empty(), "{plan}");
        assert!(plan.remarks[0].contains("is held and not listed"), "{plan}");
    }
    scene.memory.delete(&[hold]).await.unwrap();
    assert_eq!(scene.plan().await.backups.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_backup_that_shows_life_after_the_plan_is_left_alone() {
    let scene = scene().await;
    scene.put_pack(id(), 1).await;
    tokio::time::sleep(3 * DAY).await;
    let plan = scene.plan().await;
    scene.put_pack(id(), 2).await;
    let report = apply(&scene.repository, &plan).await.unwrap();
    assert_eq!((report.pack_count, report.saved), (0, vec![id()]));
}

#[tokio::test(start_paused = true)]
async fn what_the_store_refuses_to_delete_keeps_nothing_else_from_going() {
    let scene = scene().await;
    let key = scene.writer().await.key_id();
    tokio::time::sleep(31 * DAY).await;
    let keys = scene.plan_keys().await.keys;
    assert_eq!(keys, [key]);
    let other = BackupId::new(id().start_time(), TimelineId::FIRST, Lsn(0x1_0000_0028));
    for backup in [id(), other] {
        scene.put_pack(backup, 1).await;
    }
    let name = |object| scene.repository.name(&object).unwrap();
    let pack = |number| name(Object::Pack(PackName { backup: id(), number }));
    let _never_completed = scene.memory.begin_multipart(&pack(2)).await.unwrap();
    tokio::time::sleep(3 * DAY).await;
    let plan = SweepPlan { keys, ..scene.plan().await };
    for outcome in [Outcome::Denied, Outcome::Passes, Outcome::Denied] {
        scene.memory.fail_next(Call::Delete, outcome);
    }
    let report = apply(&scene.repository, &plan).await.unwrap();
    let refused: Vec<&str> = report.refused.iter().map(|refusal| &*refusal.object).collect();
    assert_eq!(refused, [pack(1).as_str(), name(Object::Key(key)).as_str()]);
    assert_eq!((report.pack_count, report.key_count, report.upload_count), (1, 0, 1));
    let report = apply(&scene.repository, &plan).await.unwrap();
    assert_eq!((report.pack_count, report.key_count, report.refused.len()), (1, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn what_becomes_of_the_uploads_keeps_no_pack_from_going() {
    let scene = scene().await;
    scene.put_pack(id(), 1).await;
    tokio::time::sleep(3 * DAY).await;
    let plan = scene.plan().await;
    for outcome in [Outcome::Passes, Outcome::FailsBefore] {
        scene.memory.fail_next(Call::Any, outcome);
    }
    let error = apply(&scene.repository, &plan).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(Catalog::load(&scene.repository).await.unwrap().incomplete.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_host_whose_clock_is_days_ahead_sweeps_nothing() {
    let Scene { memory, repository, .. } = scene().await;
    let scene = async |clock: &str| {
        let clock = Clock::simulated(clock.parse().unwrap(), 4);
        let (store, cluster) = (std::sync::Arc::new(memory.clone()), repository.cluster().clone());
        let repository = Repository::open(store, cluster, &clock).await.unwrap();
        Scene { memory: memory.clone(), repository, encryption: Encryption::None }
    };
    let ahead = scene("2026-01-04T00:00:00Z").await;
    ahead.put_pack(id(), 1).await;
    let plan = ahead.plan().await;
    assert_eq!(plan.backups.len(), 1, "it looks old");
    let error = apply(&ahead.repository, &plan).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config);
    assert!(error.to_string().contains("clock"), "{error}");
    assert_eq!(Catalog::load(&ahead.repository).await.unwrap().incomplete.len(), 1);
    let close = scene("2026-01-01T00:30:00Z").await;
    let error = apply(&close.repository, &plan).await.unwrap_err();
    assert!(error.to_string().contains("the plan was made by"), "set right meanwhile: {error}");
    assert_eq!(Catalog::load(&ahead.repository).await.unwrap().incomplete.len(), 1);
    tokio::time::sleep(3 * DAY).await;
    let plan = close.plan().await;
    assert_eq!(apply(&close.repository, &plan).await.unwrap().pack_count, 1);
}

#[tokio::test(start_paused = true)]
async fn a_backup_of_unknown_age_is_not_swept() {
    let scene = scene().await;
    scene.put_pack(id(), 1).await;
    tokio::time::sleep(3 * DAY).await;
    let plan = scene.plan().await;
    assert_eq!((plan.backups.len(), plan.remarks.len()), (1, 0));
    scene.memory.forget_times();
    let ageless = scene.plan().await;
    assert_eq!(ageless.backups, []);
    assert!(ageless.remarks[0].contains(&id().to_string()), "{ageless}");
    // Nor does a plan go through that was made while the ages were known.
    let report = apply(&scene.repository, &plan).await.unwrap();
    assert_eq!((report.pack_count, report.saved), (0, vec![id()]));
    // One object of unknown age among old ones may be the newest.
    scene.put_pack(id(), 2).await;
    tokio::time::sleep(3 * DAY).await;
    assert_eq!(scene.plan().await.backups, []);
}

#[tokio::test(start_paused = true)]
async fn a_key_of_unknown_age_is_not_swept() {
    let scene = scene().await;
    scene.writer().await;
    tokio::time::sleep(31 * DAY).await;
    assert_eq!(scene.plan_keys().await.keys.len(), 1);
    scene.memory.forget_times();
    assert_eq!(scene.plan_keys().await.keys, []);
}

#[tokio::test(start_paused = true)]
async fn shorter_times_than_are_safe_are_not_taken() {
    let scene = scene().await;
    scene.put_pack(id(), 1).await;
    tokio::time::sleep(HOUR).await;
    let catalog = Catalog::load(&scene.repository).await.unwrap();
    let options = SweepOptions { grace: Duration::ZERO, key_grace: Duration::ZERO };
    let now = scene.repository.clock().now();
    assert_eq!(plan(&catalog, None, options, now).backups, []);
}

#[tokio::test(start_paused = true)]
async fn a_key_goes_only_when_it_is_old_and_no_header_names_it() {
    let scene = scene().await;
    let (used, unused) = (scene.writer().await, scene.writer().await);
    scene.put_extent(&used, 0).await;
    assert_eq!(scene.plan().await.keys, [], "never without evidence");
    tokio::time::sleep(29 * DAY).await;
    assert_eq!(scene.plan_keys().await.keys, []);
    tokio::time::sleep(2 * DAY).await;
    let young = scene.writer().await;
    let plan = scene.plan_keys().await;
    assert_eq!(plan.keys, [unused.key_id()]);
    assert_eq!(apply(&scene.repository, &plan).await.unwrap().key_count, 1);
    let mut left: Vec<KeyId> =
        Catalog::load(&scene.repository).await.unwrap().keys.iter().map(|key| key.id).collect();
    left.sort_unstable();
    let mut expected = [used.key_id(), young.key_id()];
    expected.sort_unstable();
    assert_eq!(left, expected);
}

#[tokio::test(start_paused = true)]
async fn keys_inside_joint_extents_count() {
    let scene = scene().await;
    let (first, second) = (scene.writer().await, scene.writer().await);
    let parts = [scene.put_extent(&first, 0).await, scene.put_extent(&second, 10).await];
    let mut joint = parts[0].name;
    joint.range = LsnRange::new(Lsn(0), Lsn(20)).unwrap();
    let body: Bytes = parts.iter().flat_map(|part| part.body.clone()).collect();
    let name = |extent| scene.repository.name(&Object::Extent(extent)).unwrap();
    scene.memory.put_if_absent(&name(joint), body).await.unwrap();
    scene.memory.delete(&[name(parts[0].name), name(parts[1].name)]).await.unwrap();
    tokio::time::sleep(31 * DAY).await;
    assert_eq!(scene.plan_keys().await.keys, []);
}

#[tokio::test(start_paused = true)]
async fn one_header_that_cannot_be_read_saves_all_keys() {
    let scene = scene().await;
    let (used, _unused) = (scene.writer().await, scene.writer().await);
    let sealed = scene.put_extent(&used, 0).await;
    tokio::time::sleep(31 * DAY).await;
    assert_eq!(scene.plan_keys().await.keys.len(), 1);
    let name = scene.repository.name(&Object::Extent(sealed.name)).unwrap();
    scene.memory.damage(&name, |body| body[0] ^= 1).unwrap();
    let plan = scene.plan_keys().await;
    assert_eq!(plan.keys, []);
    assert!(plan.remarks[0].contains(name.as_str()), "{plan}");
}

#[tokio::test(start_paused = true)]
async fn the_key_of_a_silent_stream_stays_and_so_do_all_when_it_does_not_name_its_key() {
    let scene = scene().await;
    let (silent, _other) = (scene.writer().await, scene.writer().await);
    let lease = Lease::acquire(&scene.repository, LeaseOptions::new("stream")).await.unwrap();
    tokio::time::sleep(31 * DAY).await;
    assert_eq!(scene.plan_keys().await.keys, []);
    lease.seals_with(silent.key_id().to_string());
    tokio::time::sleep(HOUR).await;
    let keys = scene.plan_keys().await.keys;
    assert_eq!(keys.len(), 1);
    assert!(!keys.contains(&silent.key_id()));
}
