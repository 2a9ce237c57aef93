//! Sealed extents on their way into the store: several at a time, tried until they are there.
//!
//! # Durability
//! A [`Stored`] is reported only after [`Writer::put_extent`] returned `Ok`, which promises that
//! the object survives a crash. `AlreadyThere` is as good: the name holds timeline, range and
//! greatest commit time, so what is there was made from the same WAL by an earlier try or an earlier
//! life of this process.
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
use crate::repo::{SealedExtent, Writer};

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
    pub fn new(writer: Writer, uploads_max: usize, status: &Arc<Status>) -> Self {
        Self {
            clock: writer.repository().clock().clone(),
            writer,
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
            let (writer, clock) = (self.writer.clone(), self.clock.clone());
            self.tasks.spawn(put(writer, upload, clock, Arc::clone(&self.status)));
        }
    }
}

/// Puts one extent, however long it takes. Every kind of failure is tried again: what the operator
/// must repair (rights, a full disk, a missing bucket) is repaired while the slot holds the WAL.
async fn put(writer: Writer, upload: Upload, clock: Clock, status: Arc<Status>) -> Stored {
    let mut pause = PAUSE_MIN;
    let began = clock.instant();
    let mut failed = false;
    loop {
        match writer.put_extent(&upload.sealed).await {
            Ok(_) => break,
            Err(error) => {
                let waited = clock.instant().saturating_duration_since(began).as_secs();
                tracing::warn!("{error}; trying again for {waited} s so far");
                status.update(|now| now.repository_error = Some(error.to_string()));
                failed = true;
            }
        }
        tokio::time::sleep(jittered(pause, &clock)).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
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
    use crate::repo::Level;
    use crate::repo::{Encryption, ExtentBuilder, Repository};

    use bytes::Bytes;

    async fn writer() -> Writer {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 1);
        let (_, repository) = Repository::in_memory(&clock).await;
        repository.writer(&Encryption::None).await.unwrap()
    }

    fn upload(writer: &Writer, start: u64) -> Upload {
        let range = LsnRange::new(Lsn(start), Lsn(start + 10)).unwrap();
        let cut = Cut { range, greatest_time: None, reason: CutReason::Idle };
        let extent = CutExtent { cut, boundary: Lsn(start), commit_times: Vec::new() };
        let mut builder =
            ExtentBuilder::new(writer, TimelineId::FIRST, Lsn(start), Level::default()).unwrap();
        builder.push(Bytes::from_static(b"0123456789")).unwrap();
        Upload { sealed: builder.finish(None).unwrap(), extent, chain: 0 }
    }

    #[tokio::test(start_paused = true)]
    async fn extents_are_counted_until_the_store_holds_them() {
        let writer = writer().await;
        let mut uploads = Uploads::new(writer.clone(), 2, &Arc::new(Status::new()));
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
        let writer = writer().await;
        let again = upload(&writer, 1000);
        writer.put_extent(&again.sealed).await.unwrap();
        let mut uploads = Uploads::new(writer, 2, &Arc::new(Status::new()));
        let range = again.extent.cut.range;
        uploads.push(again);
        assert_eq!(uploads.next_stored().await.unwrap().extent.cut.range, range);
    }
}
