//! Files asked for without a plan: of timelines that were left, at holes and at barriers.

use std::path::PathBuf;

use bytes::Bytes;

use super::*;
use crate::clock::Clock;
use crate::repo::marks::Barrier;
use crate::repo::{Encryption, ExtentBuilder, Level, Repository, Writer};
use crate::store::memory::{Call, Memory, Outcome};

const SEGMENT: u64 = 1 << 20;

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

/// A position in segment `number`.
fn lsn(number: u64, offset: u64) -> Lsn {
    Lsn(number * SEGMENT + offset)
}

/// A repository, and a data directory that no restore has made.
struct Scene {
    memory: Memory,
    data: tempfile::TempDir,
    repository: Repository,
    writer: Writer,
}

impl Scene {
    async fn new() -> Self {
        let clock = Clock::simulated("2026-11-22T10:00:00Z".parse().unwrap(), 3);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let writer = repository.writer(&Encryption::None).await.unwrap();
        let data = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(data.path().join("global")).unwrap();
        std::fs::create_dir_all(data.path().join("pg_wal")).unwrap();
        let control = crate::pg::control::tests::file(1300, 202_209_061);
        std::fs::write(data.path().join(XLOG_CONTROL_FILE), control).unwrap();
        Self { memory, data, repository, writer }
    }

    /// Lets PostgreSQL have a file of its own: so many bytes of timeline 1, then zeros.
    fn place(&self, name: &str, count: usize) {
        let mut bytes = vec![0; WHOLE];
        bytes[..count].fill(1);
        std::fs::write(self.path().with_file_name(name), bytes).unwrap();
    }

    async fn store(&self, number: u32, start: Lsn, end: Lsn) {
        store(&self.writer, number, start, end).await;
    }

    async fn store_history(&self, number: u32, switches: &[(u32, Lsn)]) {
        let lines = switches.iter().map(|(parent, at)| format!("{parent}\t{at}\ttest\n"));
        let text: String = lines.collect();
        self.writer.put_history(timeline(number), Bytes::from(text)).await.unwrap();
    }

    fn make_standby(&self) {
        std::fs::write(self.data.path().join(STANDBY_SIGNAL), "").unwrap();
    }

    fn path(&self) -> PathBuf {
        self.data.path().join("pg_wal/RECOVERYXLOG")
    }

    async fn asked(&self, number: u32, segment: u64) -> Result<WalGet> {
        let size = SegmentSize::new(u32::try_from(SEGMENT).unwrap()).unwrap();
        let name = size.file_name(timeline(number), segment);
        let feeder = Feeder::without_plan(&self.repository.reader(Vec::new()));
        let request = WalGetRequest { name, path: self.path() };
        feeder.serve(&Asked::now(&request)?).await
    }

    /// What is given of a segment: runs of bytes of one timeline, 0 for what is padded.
    async fn given(&self, number: u32, segment: u64) -> Vec<(u8, usize)> {
        if self.asked(number, segment).await.unwrap() == WalGet::NotThere {
            return Vec::new();
        }
        let bytes = std::fs::read(self.path()).unwrap();
        assert_eq!(bytes.len() as u64, SEGMENT);
        bytes.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect()
    }
}

const WHOLE: usize = 1 << 20;

/// Stores WAL whose every byte is the number of its timeline, one extent a segment.
async fn store(writer: &Writer, number: u32, start: Lsn, end: Lsn) {
    let mut from = start;
    while from < end {
        let until = end.min(Lsn((from.0 / SEGMENT + 1) * SEGMENT));
        let level = Level::default();
        let mut builder = ExtentBuilder::new(writer, timeline(number), from, level).unwrap();
        let length = usize::try_from(until.0 - from.0).unwrap();
        builder.push(Bytes::from(vec![u8::try_from(number).unwrap(); length])).unwrap();
        writer.put_extent(&builder.finish(None).unwrap()).await.unwrap();
        from = until;
    }
}

/// Timelines 2 and 3 left 1, the newer one earlier; 1 went on.
async fn forked() -> Scene {
    let scene = Scene::new().await;
    scene.store(1, lsn(2, 0), lsn(7, 0)).await;
    scene.store_history(2, &[(1, lsn(5, 100))]).await;
    scene.store(2, lsn(5, 100), lsn(6, 500)).await;
    scene.store_history(3, &[(1, lsn(3, 200))]).await;
    scene.store(3, lsn(3, 200), lsn(3, 300)).await;
    scene
}

#[tokio::test(start_paused = true)]
async fn a_recovery_gets_the_timeline_that_it_asks_for_whoever_has_left_it() {
    let scene = forked().await;
    for segment in 2..7 {
        assert_eq!(scene.given(1, segment).await, [(1, WHOLE)], "segment {segment}");
    }
    assert_eq!(scene.given(2, 5).await, [(1, 100), (2, WHOLE - 100)]);
    assert_eq!(scene.given(2, 6).await, [(2, 500), (0, WHOLE - 500)]);
    assert_eq!(scene.given(3, 3).await, [(1, 200), (3, 100), (0, WHOLE - 300)]);
    for (number, segment) in [(1, 7), (2, 4), (2, 7), (3, 2), (3, 4), (4, 3)] {
        assert_eq!(scene.given(number, segment).await, [], "{number}, {segment}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_standby_is_stopped_at_the_fork_of_the_newest_timeline_until_it_is_past_it() {
    let scene = forked().await;
    scene.make_standby();
    assert_eq!(scene.given(1, 2).await, [(1, WHOLE)]);
    assert_eq!(scene.given(1, 3).await, [(1, 200), (0, WHOLE - 200)]);
    for segment in 4..7 {
        assert_eq!(scene.given(1, segment).await, [(1, WHOLE)], "segment {segment}");
    }
    assert_eq!(scene.given(2, 5).await, [(1, 100), (2, WHOLE - 100)]);
    // At the very end of a segment it has not come past it.
    scene.store_history(4, &[(1, lsn(4, 0))]).await;
    assert_eq!(scene.given(1, 3).await, [(1, WHOLE)]);
    assert_eq!(scene.given(1, 4).await, []);
}

#[tokio::test(start_paused = true)]
async fn the_segment_of_a_fork_goes_by_the_name_of_the_branch_before_that_has_any_wal() {
    let scene = Scene::new().await;
    scene.store(1, lsn(2, 0), lsn(4, 0)).await;
    scene.store_history(2, &[(1, lsn(3, 700))]).await;
    assert_eq!(scene.given(2, 3).await, [(1, 700), (0, WHOLE - 700)]);
    assert_eq!(scene.given(2, 4).await, []);
    // What the branch alone holds of the time before it.
    let scene = Scene::new().await;
    scene.store(1, lsn(2, 0), lsn(3, 50)).await;
    scene.store_history(2, &[(1, lsn(3, 700))]).await;
    scene.store(2, lsn(3, 0), lsn(3, 900)).await;
    assert_eq!(scene.given(1, 3).await, [(1, 50), (2, 650), (0, WHOLE - 700)]);
}

/// The error for a segment; its message and hint name the place.
async fn refused(scene: &Scene, number: u32, segment: u64, place: Lsn) {
    let error = scene.asked(number, segment).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.message().contains(&place.to_string()), "{error}");
    assert!(error.hint_text().unwrap().contains("tidemark restore"), "{error:?}");
    assert!(!scene.path().exists());
}

#[tokio::test(start_paused = true)]
async fn a_hole_is_not_the_end_of_the_wal_for_a_recovery() {
    let scene = Scene::new().await;
    scene.store(1, lsn(2, 0), lsn(3, 40)).await;
    assert_eq!(scene.given(1, 3).await, [(1, 40), (0, WHOLE - 40)]);
    assert_eq!(scene.given(1, 4).await, []);
    std::fs::remove_file(scene.path()).unwrap();
    scene.store(1, lsn(5, 60), lsn(5, 90)).await;
    refused(&scene, 1, 3, lsn(3, 40)).await;
    refused(&scene, 1, 4, lsn(4, 0)).await;
    refused(&scene, 1, 5, lsn(5, 60)).await;
    assert_eq!(scene.given(1, 2).await, [(1, WHOLE)]);
    assert_eq!(scene.given(1, 6).await, []);
    scene.make_standby();
    assert_eq!(scene.given(1, 3).await, [(1, 40), (0, WHOLE - 40)]);
    assert_eq!(scene.given(1, 4).await, []);
}

#[tokio::test(start_paused = true)]
async fn wal_that_only_a_branch_has_tells_that_its_parents_is_missing() {
    let scene = Scene::new().await;
    scene.store(1, lsn(2, 0), lsn(3, 40)).await;
    scene.store_history(2, &[(1, lsn(4, 100))]).await;
    assert_eq!(scene.given(1, 3).await, [(1, 40), (0, WHOLE - 40)]);
    std::fs::remove_file(scene.path()).unwrap();
    scene.store(2, lsn(5, 0), lsn(5, 10)).await;
    refused(&scene, 1, 3, lsn(3, 40)).await;
    refused(&scene, 2, 4, lsn(5, 0)).await;
    // It leads on from the fork; the parent ended there.
    scene.store(1, lsn(3, 40), lsn(4, 100)).await;
    scene.store(2, lsn(4, 100), lsn(5, 0)).await;
    assert_eq!(scene.given(1, 4).await, [(1, 100), (0, WHOLE - 100)]);
    assert_eq!(scene.given(2, 5).await, [(2, 10), (0, WHOLE - 10)]);
}

#[tokio::test(start_paused = true)]
async fn an_extent_that_is_just_being_stored_is_no_hole() {
    let scene = Scene::new().await;
    scene.store(1, lsn(2, 0), lsn(2, 70)).await;
    scene.store(1, lsn(3, 0), lsn(3, 10)).await;
    let arriving = async {
        tokio::time::sleep(GAP_PAUSE * 3).await;
        scene.store(1, lsn(2, 70), lsn(3, 0)).await;
    };
    let (given, ()) = tokio::join!(scene.given(1, 2), arriving);
    assert_eq!(given, [(1, WHOLE)]);
}

#[tokio::test(start_paused = true)]
async fn a_recovery_is_not_led_to_a_place_that_only_a_later_backup_leads_past() {
    let scene = Scene::new().await;
    // pg_control says that recovery begins at 20/28 in the numbers of this segment size.
    scene.store(1, lsn(0x20, 0), lsn(0x24, 0)).await;
    let damaged = Barrier::damaged(LsnRange::new(lsn(0x22, 8), lsn(0x23, 0)).unwrap());
    marks::put_barrier(&scene.repository, timeline(1), &damaged).await.unwrap();
    assert_eq!(scene.given(1, 0x21).await, [(1, WHOLE)]);
    std::fs::remove_file(scene.path()).unwrap();
    refused(&scene, 1, 0x22, lsn(0x22, 8)).await;
    // A backup that began behind it.
    let label = "START WAL LOCATION: 0/2300028 (file 000000010000000000000023)\n\
                 CHECKPOINT LOCATION: 0/2300060\n";
    std::fs::write(scene.data.path().join("backup_label"), label).unwrap();
    assert_eq!(scene.given(1, 0x23).await, [(1, WHOLE)]);
    std::fs::remove_file(scene.data.path().join("backup_label")).unwrap();
    scene.make_standby();
    assert_eq!(scene.given(1, 0x22).await, [(1, WHOLE)]);
}

#[tokio::test(start_paused = true)]
async fn who_may_follow_a_branch_that_begins_with_a_segment_does_not_get_its_parents() {
    let scene = Scene::new().await;
    scene.store(1, lsn(2, 0), lsn(4, 10)).await;
    scene.store_history(2, &[(1, lsn(3, 0))]).await;
    // It follows timeline 1.
    assert_eq!(scene.given(1, 3).await, [(1, WHOLE)]);
    let history = scene.path().with_file_name("00000002.history");
    std::fs::write(&history, "").unwrap();
    assert_eq!(scene.given(1, 2).await, [(1, WHOLE)]);
    assert_eq!(scene.given(2, 3).await, []);
    let error = scene.asked(1, 3).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.hint_text().unwrap().contains("00000002.history"), "{error:?}");
    // With the branch's own file it never asks for this one.
    scene.store(2, lsn(3, 0), lsn(3, 30)).await;
    assert_eq!(scene.given(2, 3).await, [(2, 30), (0, WHOLE - 30)]);
    assert_eq!(scene.given(1, 3).await, [(1, WHOLE)]);
}

#[tokio::test(start_paused = true)]
async fn wal_that_the_server_has_is_not_taken_from_it() {
    const NAME: &str = "000000010000000000000003";
    let scene = Scene::new().await;
    scene.store(1, lsn(2, 0), lsn(3, 20)).await;
    scene.store(1, lsn(3, 20), lsn(3, 40)).await;
    for make in [|_: &Scene| (), Scene::make_standby] {
        make(&scene);
        scene.place(NAME, 20);
        assert_eq!(scene.given(1, 3).await, [(1, 40), (0, WHOLE - 40)]);
        for count in [40, 100, WHOLE] {
            scene.place(NAME, count);
            assert_eq!(scene.given(1, 3).await, [], "{count}");
        }
        // A page that was lost is in the repository.
        let own = scene.path().with_file_name(NAME);
        let mut bytes = std::fs::read(&own).unwrap();
        bytes[7] = 0;
        std::fs::write(&own, &bytes).unwrap();
        assert_eq!(scene.given(1, 3).await, [(1, 40), (0, WHOLE - 40)]);
        // One that is shorter than a segment PostgreSQL would not read.
        std::fs::write(&own, [1; 50]).unwrap();
        assert_eq!(scene.given(1, 3).await, [(1, 40), (0, WHOLE - 40)]);
    }
    // What was streamed past a fork stays too. A whole segment replaces what there is.
    scene.place(NAME, 100);
    scene.store_history(2, &[(1, lsn(3, 30))]).await;
    assert_eq!(scene.given(1, 3).await, []);
    scene.store(1, lsn(3, 40), lsn(4, 0)).await;
    assert_eq!(scene.given(1, 3).await, []);
    std::fs::remove_file(scene.data.path().join(STANDBY_SIGNAL)).unwrap();
    assert_eq!(scene.given(1, 3).await, [(1, WHOLE)]);
}

#[tokio::test(start_paused = true)]
async fn who_fails_leaves_the_file_of_another_alone() {
    let scene = Scene::new().await;
    scene.store(1, lsn(2, 0), lsn(3, 0)).await;
    scene.place("RECOVERYXLOG", WHOLE);
    // There are no histories; then the extent is read.
    for outcome in [Outcome::NotFound, Outcome::NotFound, Outcome::FailsBefore] {
        scene.memory.fail_next(Call::Read, outcome);
    }
    scene.asked(1, 2).await.unwrap_err();
    assert_eq!(std::fs::read(scene.path()).unwrap(), [1; WHOLE]);
    let entries = std::fs::read_dir(scene.data.path().join("pg_wal")).unwrap();
    assert_eq!(entries.count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_mark_that_is_put_while_the_wal_is_listed_bars_the_wal_behind_it() {
    let scene = Scene::new().await;
    scene.store(1, lsn(0x20, 0), lsn(0x20, 500)).await;
    let (memory, repository) = (scene.memory.clone(), scene.repository.clone());
    let writer = scene.repository.writer(&Encryption::None).await.unwrap();
    memory.before_list(&repository.cluster().timeline_prefix(timeline(1)), async move {
        let barrier = Barrier::minimal(lsn(0x20, 500));
        marks::put_barrier(&repository, timeline(1), &barrier).await.unwrap();
        store(&writer, 1, lsn(0x20, 500), lsn(0x20, 900)).await;
    });
    refused(&scene, 1, 0x20, lsn(0x20, 500)).await;
}
