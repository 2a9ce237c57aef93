//! Sealed extents on their way into the store: several at a time, tried until they are there.
//!
//! # Durability
//! A [`Stored`] is reported only after [`Writer::put_extent`] returned `Ok`, which promises that
//! the object survives a crash. `AlreadyThere` is as good: the name holds timeline, range and
//! greatest commit time, so what is there was made from the same WAL by an earlier try or an earlier
//! life of this process.
//!
//! Where only a backup taken later leads on, the mark that says so ([`marks::put_barrier`]) is durable before
//! the extent that it speaks of is put: no listing shows that WAL without the mark, nothing is acknowledged
//! before both are there, and dying in between leaves a mark at the end of the WAL, where every interval ends
//! anyway. Who has lost the lease puts no mark: his server may be one that was rolled back, whose WAL at that
//! place is not the WAL that another stores.
//!
//! # Cancel safety
//! Dropping [`Uploads`] stops its tasks; what they leave behind is a whole object or none. Nothing
//! was acknowledged for them, so the server still has their WAL.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::intake::CutExtent;
use super::status::Status;
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::pg::TimelineId;
use crate::repo::lease::Guard;
use crate::repo::{SealedExtent, Writer, marks};

/// First pause after a failed upload; the store has retried by itself before.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause: the longest that a repository which came back stays unnoticed.
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// A sealed extent to be stored.
#[derive(Debug)]
pub struct Upload {
    /// The object and its name.
    pub sealed: SealedExtent,
    /// What is in it.
    pub extent: CutExtent,
    /// Which chain of WAL it continues: rises with every deliberate gap.
    pub chain: u64,
}

/// An extent that the store holds.
#[derive(Debug)]
pub struct Stored {
    /// What is in it.
    pub extent: CutExtent,
    /// Timeline of the WAL inside.
    pub timeline: TimelineId,
    /// Which chain of WAL it continues.
    pub chain: u64,
    /// Size of the object.
    pub stored_bytes: u64,
}

/// Extents waiting for the store or being put.
#[derive(Debug)]
pub struct Uploads {
    writer: Writer,
    guard: Guard,
    clock: Clock,
    status: Arc<Status>,
    tasks: JoinSet<Stored>,
    waiting: VecDeque<Upload>,
    uploads_max: usize,
    unstored_bytes: u64,
}

impl Uploads {
    /// None yet; `uploads_max` may run at a time.
    #[must_use]
    pub fn new(writer: Writer, guard: Guard, uploads_max: usize, status: &Arc<Status>) -> Self {
        Self {
            clock: writer.repository().clock().clone(),
            writer,
            guard,
            status: Arc::clone(status),
            tasks: JoinSet::new(),
            waiting: VecDeque::new(),
            uploads_max: uploads_max.max(1),
            unstored_bytes: 0,
        }
    }

    /// Adds an extent; it is put as soon as its turn comes.
    pub fn push(&mut self, upload: Upload) {
        self.unstored_bytes += upload.sealed.body.len() as u64;
        self.waiting.push_back(upload);
        self.start();
    }

    /// Sealed bytes that the store does not hold yet.
    #[must_use]
    pub fn unstored_bytes(&self) -> u64 {
        self.unstored_bytes
    }

    /// Extents that the store does not hold yet.
    #[must_use]
    pub fn unstored_count(&self) -> usize {
        self.tasks.len() + self.waiting.len()
    }

    /// Whether another upload could begin at once.
    #[must_use]
    pub fn has_free_place(&self) -> bool {
        self.unstored_count() < self.uploads_max
    }

    /// The next extent that the store holds; waits for ever when there is nothing to wait for.
    ///
    /// # Errors
    /// `bug` when a task ended in a way it must not.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn next_stored(&mut self) -> Result<Stored> {
        match self.tasks.join_next().await {
            Some(Ok(stored)) => {
                self.unstored_bytes = self.unstored_bytes.saturating_sub(stored.stored_bytes);
                self.start();
                Ok(stored)
            }
            Some(Err(error)) => {
                Err(Error::new(Kind::Bug, format!("the upload of an extent ended early: {error}")))
            }
            None => std::future::pending().await,
        }
    }

    fn start(&mut self) {
        while self.tasks.len() < self.uploads_max {
            let Some(upload) = self.waiting.pop_front() else { return };
            let put = Put {
                writer: self.writer.clone(),
                guard: self.guard.clone(),
                clock: self.clock.clone(),
                status: Arc::clone(&self.status),
                upload,
            };
            self.tasks.spawn(put.run());
        }
    }
}

/// One extent on its way.
struct Put {
    writer: Writer,
    guard: Guard,
    clock: Clock,
    status: Arc<Status>,
    upload: Upload,
}

impl Put {
    /// Puts the extent, however long it takes. Every kind of failure is tried again: what the operator
    /// must repair (rights, a full disk, a missing bucket) is repaired while the slot holds the WAL.
    async fn run(self) -> Stored {
        let (clock, status) = (self.clock.clone(), Arc::clone(&self.status));
        let mut pause = PAUSE_MIN;
        let began = clock.instant();
        let mut failed = false;
        while let Err(error) = self.attempt().await {
            let waited = clock.instant().saturating_duration_since(began).as_secs();
            tracing::warn!("{error}; trying again for {waited} s so far");
            status.update(|now| now.repository_error = Some(error.to_string()));
            failed = true;
            tokio::time::sleep(jittered(pause, &clock)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        let upload = self.upload;
        if failed {
            let waited = clock.instant().saturating_duration_since(began).as_secs();
            tracing::info!("the repository took WAL {} after {waited} s", upload.sealed.name.range);
        }
        status.update(|now| now.repository_error = None);
        Stored {
            stored_bytes: upload.sealed.body.len() as u64,
            timeline: upload.sealed.name.timeline,
            extent: upload.extent,
            chain: upload.chain,
        }
    }

    /// Tries once: first what must be known about the extent, then the extent.
    async fn attempt(&self) -> Result<()> {
        let sealed = &self.upload.sealed;
        for barrier in &self.upload.extent.barriers {
            self.guard.ensure_held()?;
            let repository = self.writer.repository();
            marks::put_barrier(repository, sealed.name.timeline, barrier).await?;
        }
        self.writer.put_extent(sealed).await.map(drop)
    }
}

/// Between half and the whole of `pause`, so that many writers do not come back in step.
pub(super) fn jittered(pause: Duration, clock: &Clock) -> Duration {
    let byte = clock.random::<1>().map_or(0, |[byte]| byte);
    pause / 2 + pause * u32::from(byte) / 512
}

#[cfg(test)]
mod tests {
    use super::super::cutter::{Cut, CutReason};
    use super::*;
    use crate::pg::{Lsn, LsnRange};
    use crate::repo::{Encryption, ExtentBuilder, Lease, LeaseOptions, Level, Repository};
    use crate::store::Store;
    use crate::store::memory::{Call, Memory, Outcome};

    use bytes::Bytes;

    async fn scene() -> (Memory, Writer, Lease) {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 1);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let lease = Lease::acquire(&repository, LeaseOptions::new("test")).await.unwrap();
        (memory, repository.writer(&Encryption::None).await.unwrap(), lease)
    }

    fn upload(writer: &Writer, start: u64) -> Upload {
        let range = LsnRange::new(Lsn(start), Lsn(start + 10)).unwrap();
        let cut = Cut { range, greatest_time: None, reason: CutReason::Idle };
        let (commit_times, barriers) = (Vec::new(), Vec::new());
        let extent = CutExtent { cut, boundary: Lsn(start), commit_times, barriers };
        let mut builder =
            ExtentBuilder::new(writer, TimelineId::FIRST, Lsn(start), Level::default()).unwrap();
        builder.push(Bytes::from_static(b"0123456789")).unwrap();
        Upload { sealed: builder.finish(None).unwrap(), extent, chain: 0 }
    }

    #[tokio::test(start_paused = true)]
    async fn extents_are_counted_until_the_store_holds_them() {
        let (_, writer, lease) = scene().await;
        let mut uploads = Uploads::new(writer.clone(), lease.guard(), 2, &Arc::new(Status::new()));
        for start in [1000, 1010, 1020] {
            uploads.push(upload(&writer, start));
        }
        assert!(uploads.unstored_bytes() > 300);
        assert!(!uploads.has_free_place());
        for left in (0..3).rev() {
            uploads.next_stored().await.unwrap();
            assert_eq!(uploads.unstored_count(), left);
        }
        assert_eq!(uploads.unstored_bytes(), 0);
        let store = writer.repository().store();
        assert_eq!(store.list_all("main/wal/").await.unwrap().len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_extent_that_is_there_already_counts_as_stored() {
        let (_, writer, lease) = scene().await;
        let again = upload(&writer, 1000);
        writer.put_extent(&again.sealed).await.unwrap();
        let mut uploads = Uploads::new(writer, lease.guard(), 2, &Arc::new(Status::new()));
        let range = again.extent.cut.range;
        uploads.push(again);
        assert_eq!(uploads.next_stored().await.unwrap().extent.cut.range, range);
    }

    const MARK: &str = "main/marks/minimal-00000001-00000000000003EA";

    fn marked_upload(writer: &Writer) -> Upload {
        let mut upload = upload(writer, 1000);
        upload.extent.barriers.push(marks::Barrier::minimal(Lsn(1002)));
        upload
    }

    async fn names(memory: &Memory) -> Vec<String> {
        let listed = memory.list_all("main/").await.unwrap();
        let names = listed.into_iter().map(|object| object.name.to_string());
        names.filter(|name| name.contains("/wal/") || name.contains("/marks/")).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn where_changes_are_left_out_is_marked_before_the_wal_behind_it_is_stored() {
        let (memory, writer, lease) = scene().await;
        let status = Arc::new(Status::new());
        let mut uploads = Uploads::new(writer.clone(), lease.guard(), 2, &status);
        // The mark's put fails: nothing else may be tried.
        memory.fail_next(Call::Put, Outcome::FailsBefore);
        uploads.push(marked_upload(&writer));
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(status.snapshot().repository_error.unwrap().contains("unable to mark"));
        assert!(names(&memory).await.is_empty());
        // The mark is there and the extent's put fails: dying here leaves the mark alone.
        memory.fail_next(Call::Put, Outcome::Passes);
        memory.fail_next(Call::Put, Outcome::FailsBefore);
        tokio::time::sleep(PAUSE_MIN).await;
        assert_eq!(names(&memory).await, [MARK]);
        uploads.next_stored().await.unwrap();
        assert_eq!(names(&memory).await.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn who_lost_the_lease_marks_nothing() {
        let (memory, writer, lease) = scene().await;
        let guard = lease.guard();
        lease.release().await;
        assert!(guard.ensure_held().is_err());
        let mut uploads = Uploads::new(writer.clone(), guard, 2, &Arc::new(Status::new()));
        uploads.push(marked_upload(&writer));
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(names(&memory).await.is_empty());
    }
}
