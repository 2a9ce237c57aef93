//! Small extents of complete segments are merged while the stream runs.
//!
//! Every ten minutes, on one request at a time, and only while nothing waits for the repository: the
//! memory budget is the stream's. The first runs of a process look at all WAL of the timeline that is
//! streamed, later ones at what came since. While nobody streams nothing is merged, and what was small at
//! the end of a timeline that was left stays so. A host that may not delete cannot merge: it would store
//! all WAL once more with each run. It says so once and merges nothing for a day; then it begins with what it
//! was refused, and makes nothing more if that is refused again. In the months that a process runs, rights come
//! and a session that had expired at the wrong moment is renewed.
//!
//! # Durability
//! See [`compaction`]: nothing is deleted that another object was not read back to hold. Dying on any
//! line, or losing the lease, leaves what a later run goes on from.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::status::{Phase, Status};
use crate::error::Result;
use crate::pg::{Lsn, SegmentSize, TimelineId};
use crate::repo::compaction::{self, CompactionOptions};
use crate::repo::{Repository, WalCatalog, marks};

/// Between two runs: as long as extents settle before they are merged.
const PAUSE: Duration = Duration::from_secs(600);
/// After a store has refused to delete.
const REFUSED_PAUSE: Duration = Duration::from_secs(24 * 3600);
/// Largest merged object as stored: one merge holds it twice, out of what the budget leaves.
const MERGED_BYTES_MAX: u64 = 3 << 20;
/// Runs after which WAL is not looked at again: merged in one, what it was made of deleted in the
/// next or the one after.
const RUNS_TO_SETTLE: usize = 4;

/// A task that merges, until dropped.
#[derive(Debug)]
pub(super) struct Merging(JoinHandle<()>);

impl Drop for Merging {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Merging {
    pub(super) fn start(
        repository: &Repository,
        segment_size: SegmentSize,
        status: &Arc<Status>,
    ) -> Self {
        let (repository, status) = (repository.clone(), Arc::clone(status));
        Self(tokio::spawn(async move {
            let mut horizons = VecDeque::new();
            let (mut pause, mut has_warned) = (PAUSE, false);
            loop {
                tokio::time::sleep(pause).await;
                pause = PAUSE;
                let now = status.snapshot();
                let calm = now.phase == Phase::Streaming && now.repository_error.is_none();
                let Some(timeline) = now.timeline.filter(|_| calm) else { continue };
                horizons.push_back(now.durable_end_lsn);
                let from = match horizons.len() > RUNS_TO_SETTLE {
                    true => horizons.pop_front().unwrap_or_default(),
                    false => Lsn::INVALID,
                };
                match merge(&repository, timeline, from, segment_size).await {
                    Ok(None) => has_warned = false,
                    Ok(Some(refused)) => {
                        if !std::mem::replace(&mut has_warned, true) {
                            tracing::warn!(
                                "small WAL extents are not merged while this process may not delete what \
                                 a merged one holds; it tries again once a day: {refused}"
                            );
                        }
                        // What was refused is to be seen again.
                        horizons.clear();
                        pause = REFUSED_PAUSE;
                    }
                    Err(error) => tracing::warn!("small WAL extents could not be merged: {error}"),
                }
            }
        }))
    }
}

/// One run; why, when the store would not let it delete.
///
/// The marks are listed after the WAL. Each is put before the extent that it speaks of, which is listed only
/// then, and never deleted. Where a barrier begins in an extent before that one, this may be listed without the
/// mark; but it is joined only when it has been there for as long as extents settle, and while the stream runs,
/// the extent behind it, and with it the mark, comes within seconds or, for damage, a minute.
async fn merge(
    repository: &Repository,
    timeline: TimelineId,
    from: Lsn,
    segment_size: SegmentSize,
) -> Result<Option<String>> {
    let wal = WalCatalog::load_tail(repository, timeline, from, segment_size).await?;
    let (marks, _) = marks::load(repository).await?;
    let mut options = CompactionOptions::new(segment_size);
    options.stored_bytes_max = MERGED_BYTES_MAX;
    let plan = compaction::plan(&wal, &marks.barriers, &options, repository.clock().now());
    if plan.is_empty() {
        return Ok(None);
    }
    let report = compaction::apply(repository, &plan, &options).await?;
    tracing::debug!(
        "merged {} WAL extents into {}, deleted {}, left {} that others made",
        report.joined_count,
        report.joint_count,
        report.deleted_count,
        report.kept_count
    );
    for damaged in &report.damaged {
        tracing::error!("a WAL extent in the repository is damaged: {damaged}");
    }
    Ok(report.refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    use crate::repo::{Encryption, ExtentBuilder, Level, Writer};
    use crate::store::Store;
    use crate::store::memory::{Call, Memory, Outcome};

    use bytes::Bytes;

    const SIZE_BYTES: u64 = 1 << 20;

    struct Scene {
        memory: Memory,
        repository: Repository,
        writer: Writer,
        status: Arc<Status>,
    }

    impl Scene {
        async fn new() -> Self {
            let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
            let (memory, repository) = Repository::in_memory(&clock).await;
            let writer = repository.writer(&Encryption::None).await.unwrap();
            let status = Arc::new(Status::new());
            status.update(|now| {
                now.phase = Phase::Streaming;
                now.timeline = Some(TimelineId::FIRST);
                now.durable_end_lsn = Lsn(2 * SIZE_BYTES);
            });
            Self { memory, repository, writer, status }
        }

        /// Puts eight extents that make up segment `number`.
        async fn put_segment(&self, number: u64) {
            for index in 0..8_u64 {
                let start = Lsn(number * SIZE_BYTES + index * SIZE_BYTES / 8);
                let (timeline, level) = (TimelineId::FIRST, Level::default());
                let mut builder = ExtentBuilder::new(&self.writer, timeline, start, level).unwrap();
                builder.push(Bytes::from(vec![7; 1 << 17])).unwrap();
                self.writer.put_extent(&builder.finish(None).unwrap()).await.unwrap();
            }
        }

        fn start(&self) -> Merging {
            let size = SegmentSize::new(1 << 20).unwrap();
            Merging::start(&self.repository, size, &self.status)
        }

        async fn object_count(&self) -> usize {
            self.memory.list_all("main/wal/").await.unwrap().len()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_complete_segment_of_small_extents_becomes_one_object() {
        let scene = Scene::new().await;
        scene.put_segment(1).await;
        let merging = scene.start();
        tokio::time::sleep(PAUSE * 4).await;
        drop(merging);
        assert_eq!(scene.object_count().await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn where_nothing_may_be_deleted_nothing_more_is_made_until_it_may_and_that_is_said_once()
    {
        use std::io::{Read as _, Seek as _};
        let log = Arc::new(tempfile::tempfile().unwrap());
        let writer = Arc::clone(&log);
        let subscriber = tracing_subscriber::fmt().with_writer(writer).with_ansi(false).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let scene = Scene::new().await;
        // Of three days.
        for _ in 0..3 {
            scene.memory.fail_next(Call::Delete, Outcome::Denied);
        }
        scene.put_segment(1).await;
        let merging = scene.start();
        // Of an age to be joined in the run that would delete what the first has joined.
        tokio::time::sleep(PAUSE / 2).await;
        scene.put_segment(2).await;
        tokio::time::sleep(PAUSE).await;
        assert_eq!(scene.object_count().await, 8 + 1 + 8);
        tokio::time::sleep(REFUSED_PAUSE * 2 + PAUSE).await;
        assert_eq!(scene.object_count().await, 8 + 1 + 8);
        // By now it may.
        tokio::time::sleep(REFUSED_PAUSE + PAUSE * 3).await;
        drop(merging);
        assert_eq!(scene.object_count().await, 2);
        let mut said = String::new();
        (&*log).rewind().unwrap();
        (&*log).read_to_string(&mut said).unwrap();
        assert_eq!(said.matches(" WARN ").count(), 1, "{said}");
        assert!(said.contains("access denied"), "{said}");
    }
}
