use std::path::PathBuf;

use bytes::Bytes;

use super::*;
use crate::clock::Clock;
use crate::repo::{Encryption, ExtentBuilder, Level, Repository, Writer};

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
    data: tempfile::TempDir,
    repository: Repository,
    writer: Writer,
}

impl Scene {
    async fn new() -> Self {
        let clock = Clock::simulated("2026-11-22T10:00:00Z".parse().unwrap(), 3);
        let (_, repository) = Repository::in_memory(&clock).await;
        let writer = repository.writer(&Encryption::None).await.unwrap();
        let data = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(data.path().join("global")).unwrap();
        std::fs::create_dir_all(data.path().join("pg_wal")).unwrap();
        let control = crate::pg::control::tests::file(1300, 202_209_061);
        std::fs::write(data.path().join(XLOG_CONTROL_FILE), control).unwrap();
        Self { data, repository, writer }
    }

    /// Stores WAL whose every byte is the number of its timeline, one extent a segment.
    async fn store(&self, number: u32, start: Lsn, end: Lsn) {
        let mut from = start;
        while from < end {
            let until = end.min(Lsn((from.0 / SEGMENT + 1) * SEGMENT));
            let level = Level::default();
            let mut builder =
                ExtentBuilder::new(&self.writer, timeline(number), from, level).unwrap();
            let length = usize::try_from(until.0 - from.0).unwrap();
            let byte = u8::try_from(number).unwrap();
            builder.push(Bytes::from(vec![byte; length])).unwrap();
            self.writer.put_extent(&builder.finish(None).unwrap()).await.unwrap();
            from = until;
        }
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
        feeder.serve(&WalGetRequest { name, path: self.path() }).await
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
