//! Retention carried out on real objects: what stays can be restored whatever fails on the way.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use tidemark::clock::Clock;
use tidemark::error::Kind;
use tidemark::pg::{Lsn, PgTime, SegmentSize, SystemId, TimelineId};
use tidemark::repo::packing::NoInspection;
use tidemark::repo::retention::{self, DeletionPlan, RetentionOptions};
use tidemark::repo::verify::{VerifyOptions, verify};
use tidemark::repo::{
    BackupId, Budget, Catalog, ClusterName, Encryption, ExtentBuilder, FileMeta, FilePath, Level,
    ManifestFacts, Object, PackName, PackOptions, Repository, Writer, marks,
};
use tidemark::store::Store;
use tidemark::store::directory::Directory;
use tidemark::store::memory::{Call, Memory, Outcome};

const PIECE_BYTES: u64 = 64 * 1024;
const DAYS: i64 = 4;

fn day(day: i64) -> Timestamp {
    let zero: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
    zero + SignedDuration::from_hours(24 * day)
}

fn id(number: i64) -> BackupId {
    let start = u64::try_from(number).unwrap() * PIECE_BYTES * 16;
    BackupId::new(day(number), TimelineId::FIRST, Lsn(start))
}

/// A backup a day and a MiB of WAL for each.
async fn scene() -> (Memory, Repository) {
    let clock = Clock::simulated(day(DAYS), 1);
    let memory = Memory::new(&clock);
    let store: Arc<dyn Store> = Arc::new(memory.clone());
    let cluster = ClusterName::new("main").unwrap();
    let repository = Repository::create(store, cluster, SystemId(7), &clock).await.unwrap();
    let writer = repository.writer(&Encryption::None).await.unwrap();
    for number in 0..DAYS {
        for piece in 0..16 {
            put_wal(&writer, number, piece).await;
        }
        put_backup(&writer, number).await;
    }
    (memory, repository)
}

async fn put_wal(writer: &Writer, number: i64, piece: u64) {
    let start = Lsn(id(number).start_lsn().0 + piece * PIECE_BYTES);
    let mut builder =
        ExtentBuilder::new(writer, TimelineId::FIRST, start, Level::default()).unwrap();
    builder.push(Bytes::from(vec![1; PIECE_BYTES as usize])).unwrap();
    let time = day(number) + SignedDuration::from_hours(i64::try_from(piece).unwrap());
    let sealed = builder.finish(Some(PgTime::from_timestamp(time))).unwrap();
    writer.put_extent(&sealed).await.unwrap();
}

async fn put_backup(writer: &Writer, number: i64) {
    let options = PackOptions {
        budget: Budget::backup(128 << 20, 1, Level::default()),
        level: Level::default(),
        pack_bytes: 512 << 20,
    };
    let mut backup = writer.backup(id(number), options, Arc::new(NoInspection)).unwrap();
    let path = FilePath::new("PG_VERSION").unwrap();
    backup.begin_file(FileMeta { path, mode: 0o600, mtime: 0, size_bytes: 3 }).await.unwrap();
    backup.write(Bytes::from_static(b"15\n")).await.unwrap();
    backup.end_file().await.unwrap();
    let facts = ManifestFacts {
        postgres_version_num: 150_000,
        segment_size: SegmentSize::new(1 << 20).unwrap(),
        end_timeline: TimelineId::FIRST,
        end_lsn: Lsn(id(number).start_lsn().0 + PIECE_BYTES),
        start_time: day(number),
        end_time: day(number) + SignedDuration::from_mins(10),
        tablespaces: Vec::new(),
        settings: [].into(),
    };
    backup.finish_packs().await.unwrap().commit(facts).await.unwrap();
}

/// Of the four backups the newest two stay.
async fn plan(repository: &Repository) -> DeletionPlan {
    let catalog = Catalog::load(repository).await.unwrap();
    let options = RetentionOptions { keep_count: Some(2), ..RetentionOptions::default() };
    retention::plan(&catalog, &options, repository.clock().now()).unwrap()
}

/// Lets days pass: packs are sealed by threads of their own, so time is paused for this only.
async fn pass_days(count: u64) {
    tokio::time::pause();
    tokio::time::advance(std::time::Duration::from_secs(count * 24 * 3600)).await;
    tokio::time::resume();
}

/// Long after all was written: one backup stays, and a week.
async fn plan_window(repository: &Repository) -> DeletionPlan {
    let catalog = Catalog::load(repository).await.unwrap();
    let options =
        RetentionOptions { keep_count: Some(1), pitr_days: Some(7), ..RetentionOptions::default() };
    retention::plan(&catalog, &options, repository.clock().now()).unwrap()
}

async fn ensure_sound(repository: &Repository) -> Catalog {
    ensure_whole(repository, &[DAYS - 2, DAYS - 1]).await
}

/// Everything is sound, and those backups lead to the end of the WAL.
async fn ensure_whole(repository: &Repository, numbers: &[i64]) -> Catalog {
    let reader = repository.reader(vec![]);
    let report =
        verify(repository, &reader, &VerifyOptions::new(1), &Arc::default()).await.unwrap();
    report.ensure_sound().unwrap();
    let catalog = Catalog::load(repository).await.unwrap();
    for number in numbers {
        let kept = catalog.backup(id(*number)).unwrap();
        let interval = catalog.interval(kept, TimelineId::FIRST).unwrap();
        assert_eq!(interval.until_lsn, Lsn(PIECE_BYTES * 16 * 4));
    }
    catalog
}

#[tokio::test]
async fn what_expires_is_gone_and_what_stays_can_be_restored() {
    let (memory, repository) = scene().await;
    let plan = plan(&repository).await;
    assert_eq!(plan.deleted_ids(), [id(0), id(1)].into());
    // All WAL is young by the store's clock, which keeps it: the plan says so by leaving it.
    assert!(plan.wal.is_empty());
    let report = retention::apply(&repository, &plan).await.unwrap();
    assert_eq!((report.backups.len(), report.object_count), (2, 4));
    let catalog = ensure_sound(&repository).await;
    assert_eq!(catalog.backups.len(), 2);
    assert!(catalog.incomplete.is_empty());
    assert!(retention::apply(&repository, &plan).await.is_err(), "a plan is for once");
    assert!(memory.list_all("main/base/").await.unwrap().len() == 4);
}

/// The same with WAL: without a young object to protect it, everything before the window goes.
#[tokio::test]
async fn wal_before_the_window_goes_and_its_hole_is_no_loss() {
    let (_, repository) = scene().await;
    pass_days(100).await;
    let stale = plan_window(&repository).await;
    assert!(stale.deleted_ids().contains(&id(0)));
    // The hold came after it: the plan must be made anew.
    marks::hold(&repository, id(0), "quarter").await.unwrap();
    let error = retention::apply(&repository, &stale).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.message().contains("is held"), "{error}");

    let plan = plan_window(&repository).await;
    assert_eq!(plan.deleted_ids(), [id(1), id(2)].into());
    assert_eq!(plan.wal[0].extent_count, 15 + 16 + 16);
    let report = retention::apply(&repository, &plan).await.unwrap();
    assert_eq!(report.extent_count, 47);
    let catalog = Catalog::load(&repository).await.unwrap();
    assert_eq!(catalog.backups.len(), 2);
    assert!(catalog.backups.iter().all(|backup| catalog.is_restorable(backup)));
    let gaps = catalog.gaps();
    assert_eq!(gaps.len(), 1);
    assert!(gaps[0].expired, "{gaps:?}");

    // Released, the old one and its piece of WAL go too, and the old mark with them.
    marks::release(&repository, id(0)).await.unwrap();
    let plan = plan_window(&repository).await;
    assert_eq!(plan.deleted_ids(), [id(0)].into());
    retention::apply(&repository, &plan).await.unwrap();
    let catalog = Catalog::load(&repository).await.unwrap();
    assert!(catalog.gaps().is_empty());
    assert_eq!(catalog.wal.extent_count(), 16);
}

#[tokio::test]
async fn lone_backups_are_sound_and_newest_wal_that_no_backup_leads_to_is_not() {
    let (_, repository) = scene().await;
    let catalog = Catalog::load(&repository).await.unwrap();
    let own = |number| id(number).start_lsn().0..id(number).start_lsn().0 + PIECE_BYTES;
    let between = catalog.wal.extents(TimelineId::FIRST).map(|extent| extent.name);
    let between = between.filter(|n| (0..DAYS).all(|i| !own(i).contains(&n.range.start().0)));
    let names: Vec<_> =
        between.map(|name| repository.name(&Object::Extent(name)).unwrap()).collect();
    repository.store().delete(&names).await.unwrap();
    let report = async || {
        let reader = repository.reader(vec![]);
        verify(&repository, &reader, &VerifyOptions::new(1), &Arc::default()).await.unwrap()
    };
    let lone = report().await;
    assert_eq!((lone.lost_count(), lone.is_sound()), (3, true), "{lone}");
    assert!(lone.to_string().contains("LOST"), "what was lost is told all the same: {lone}");

    let writer = repository.writer(&Encryption::None).await.unwrap();
    put_wal(&writer, DAYS, 0).await;
    let error = report().await.ensure_sound().unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.message().contains("no backup leads to 0/410000"), "{error}");
    put_backup(&writer, DAYS).await;
    report().await.ensure_sound().unwrap();

    // A backup without its own WAL cannot be restored, whatever comes after it.
    let first = catalog.wal.extents(TimelineId::FIRST).next().unwrap().name;
    let name = repository.name(&Object::Extent(first)).unwrap();
    repository.store().delete(&[name]).await.unwrap();
    let error = report().await.ensure_sound().unwrap_err();
    assert!(error.message().contains(&format!("the WAL of backup {}", id(0))), "{error}");
}

#[tokio::test]
async fn a_run_that_dies_anywhere_is_finished_by_the_next() {
    for outcome in [Outcome::FailsBefore, Outcome::FailsAfter] {
        for failing_call in 1..=4 {
            let (memory, repository) = scene().await;
            let plan_before = plan(&repository).await;
            fail_nth_delete(&memory, failing_call, outcome);
            let error = retention::apply(&repository, &plan_before).await.unwrap_err();
            assert!(error.is_transient(), "{error}");
            let catalog = Catalog::load(&repository).await.unwrap();
            for backup in &catalog.backups {
                assert!(backup.has_all_packs(), "a listed backup is whole");
            }
            ensure_sound(&repository).await;
            let plan_after = plan(&repository).await;
            retention::apply(&repository, &plan_after).await.unwrap();
            let catalog = ensure_sound(&repository).await;
            assert_eq!(catalog.backups.len(), 2);
        }
    }
}

#[tokio::test]
async fn what_is_locked_stays_and_so_does_all_wal() {
    let (memory, repository) = scene().await;
    pass_days(100).await;
    let plan = plan_window(&repository).await;
    assert!(!plan.wal.is_empty());
    memory.fail_next(Call::Delete, Outcome::Denied);
    let report = retention::apply(&repository, &plan).await.unwrap();
    assert_eq!(report.refused.len(), 1);
    assert_eq!((report.backups.len(), report.extent_count), (2, 0));
    let catalog = Catalog::load(&repository).await.unwrap();
    assert_eq!(catalog.backups.len(), 2);
    assert!(catalog.backups.iter().all(|backup| catalog.is_restorable(backup)));
}

/// The plan is printed, a person thinks about it, and meanwhile somebody sets the clock right.
#[tokio::test]
async fn a_plan_that_a_wrong_clock_made_is_not_carried_out_by_a_right_one() {
    let (_, repository) = scene().await;
    let catalog = Catalog::load(&repository).await.unwrap();
    let options = RetentionOptions { keep_days: Some(30), ..RetentionOptions::default() };
    let plan = retention::plan(&catalog, &options, day(100)).unwrap();
    assert_eq!(plan.deleted_ids(), [id(0), id(1), id(2)].into());
    let error = retention::apply(&repository, &plan).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config);
    assert!(error.message().contains("the plan was made by"), "{error}");
    assert_eq!(Catalog::load(&repository).await.unwrap().backups.len(), 4);
    pass_days(96).await;
    retention::apply(&repository, &plan).await.unwrap();
}

/// Listing a year of WAL takes minutes, in which somebody holds a backup and is told that it is held.
#[tokio::test]
async fn a_hold_that_comes_after_the_marks_were_read_stops_the_run() {
    let (memory, repository) = scene().await;
    pass_days(100).await;
    let plan = plan_window(&repository).await;
    assert_eq!(plan.deleted_ids(), [id(0), id(1), id(2)].into());
    let rival = repository.clone();
    memory.before_list(&repository.cluster().backup_prefix(id(2)), async move {
        marks::hold(&rival, id(1), "for a restore").await.unwrap();
    });
    let error = retention::apply(&repository, &plan).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.message().contains(&id(1).to_string()), "{error}");
    assert!(error.message().contains("held meanwhile"), "{error}");
    let catalog = ensure_whole(&repository, &[0, 1, 3]).await;
    assert_eq!(catalog.backups.len(), 3, "the newest had gone before");
}

/// What cannot be read at that moment may be read again later, and the hold was not forgotten.
#[tokio::test]
async fn a_held_backup_survives_a_run_that_cannot_read_its_manifest() {
    let (memory, repository) = scene().await;
    marks::hold(&repository, id(1), "quarter").await.unwrap();
    let manifest = repository.name(&Object::Manifest(id(1))).unwrap();
    let flip = |body: &mut Vec<u8>| body[60] ^= 1;
    memory.damage(&manifest, flip).unwrap();
    assert_eq!(Catalog::load(&repository).await.unwrap().damaged.len(), 1);
    pass_days(100).await;
    let plan = plan_window(&repository).await;
    assert_eq!(plan.deleted_ids(), [id(0), id(2)].into());
    let report = retention::apply(&repository, &plan).await.unwrap();
    assert_eq!((report.extent_count, report.refused.len()), (16, 0));

    memory.damage(&manifest, flip).unwrap();
    let catalog = ensure_whole(&repository, &[1, 3]).await;
    assert_eq!(catalog.backups.len(), 2);
}

fn fail_nth_delete(memory: &Memory, number: u64, outcome: Outcome) {
    for _ in 1..number {
        memory.fail_next(Call::Delete, Outcome::Passes);
    }
    memory.fail_next(Call::Delete, outcome);
}

fn expire(folder: &Path, args: &[&str]) -> (Option<i32>, String) {
    tidemark(folder, &[&["expire", "--keep-count", "1"], args].concat())
}

/// `tidemark ARGS` on the repository in `folder`: exit status and standard output.
fn tidemark(folder: &Path, args: &[&str]) -> (Option<i32>, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_tidemark"))
        .args(args)
        .arg("--repository")
        .arg(folder)
        .env_clear()
        .env("HOME", folder)
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

/// For who streams and takes backups by hand nobody else would ever remove it.
#[tokio::test]
async fn expire_removes_what_a_killed_backup_left_and_says_so_first() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Clock::system();
    let store = Arc::new(Directory::new(folder.path(), &clock));
    let cluster = ClusterName::new("main").unwrap();
    let repository = Repository::create(store, cluster, SystemId(7), &clock).await.unwrap();
    for (number, hours) in [(1, 49), (2, 47)] {
        let pack = PackName { backup: id(number), number: 1 };
        let name = repository.name(&Object::Pack(pack)).unwrap();
        repository.store().put_if_absent(&name, Bytes::from_static(b"12345")).await.unwrap();
        let made = std::time::SystemTime::now() - std::time::Duration::from_secs(hours * 3600);
        let file = std::fs::File::open(folder.path().join(name.as_str())).unwrap();
        file.set_modified(made).unwrap();
    }
    let incomplete = async || Catalog::load(&repository).await.unwrap().incomplete.len();
    let planned = format!("delete 1 packs of aborted backup {}: 5 B", id(1));
    let (status, text) = expire(folder.path(), &["--dry-run"]);
    assert_eq!(status, Some(0));
    assert!(text.contains(&planned) && !text.contains(&id(2).to_string()), "{text}");
    assert!(text.contains("uploads begun more than 48 h ago"), "{text}");
    let (status, json) = expire(folder.path(), &["--dry-run", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((status, json["sweep"]["backups"][0]["pack_count"].as_u64()), (Some(0), Some(1)));
    assert!(json["report"].is_null() && json["swept"].is_null());
    let (status, _) = expire(folder.path(), &[]);
    assert_eq!((status, incomplete().await), (Some(2), 2), "nobody confirmed it");
    let (status, text) = expire(folder.path(), &["--yes"]);
    assert!(text.contains(&planned), "{text}");
    assert_eq!((status, incomplete().await), (Some(0), 1), "one may be under way still");
    let (status, text) = expire(folder.path(), &[]);
    assert!(status == Some(0) && text.ends_with("nothing to delete\n"), "{text}");
}

#[tokio::test]
async fn a_backup_is_held_and_released_by_command() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Clock::system();
    let store = Arc::new(Directory::new(folder.path(), &clock));
    let cluster = ClusterName::new("main").unwrap();
    let repository = Repository::create(store, cluster, SystemId(7), &clock).await.unwrap();
    let writer = repository.writer(&Encryption::None).await.unwrap();
    for number in 0..2 {
        put_wal(&writer, number, 0).await;
        put_backup(&writer, number).await;
    }
    let run = |args: &[&str]| tidemark(folder.path(), args);
    let (old, none) = (id(0).to_string(), id(9).to_string());
    let goes = || expire(folder.path(), &["--dry-run"]).1.contains(&format!("delete backup {old}"));
    assert!(goes());
    assert_eq!(run(&["hold", &none]).0, Some(6), "there is no such backup");
    assert_eq!(run(&["hold", &old, "--reason", "two\nlines"]).0, Some(2));
    assert_eq!(run(&["hold", &old, "--reason", "audit"]).0, Some(0));
    assert!(!goes());
    let (_, json) = run(&["hold", &old, "--reason", "other", "--json"]);
    assert_eq!(json, format!("{{\"backup\":\"{old}\",\"held\":true,\"was_held\":true}}\n"));
    let (_, text) = run(&["list"]);
    assert!(text.contains(&format!("Held: {old}: audit\n")), "{text}");
    let (_, json) = run(&["list", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["holds"], serde_json::json!([old]));
    assert_eq!(
        (&json["backups"][0]["hold"], json["backups"][1]["hold"].is_null()),
        (&"audit".into(), true)
    );
    assert!(json["durable_end"]["age_seconds"].as_f64().is_some_and(|age| age < 3600.0), "{json}");
    assert_eq!(run(&["release", &old]).0, Some(0));
    assert!(goes() && run(&["release", &old]).0 == Some(0));
    assert!(!run(&["list"]).1.contains("Held"));
}
