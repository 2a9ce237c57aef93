//! What keeps a repository small: retention, merging of small WAL objects, and the sweep of what
//! nothing refers to. Each is a plan first; nothing here decides by itself what may go.

use crate::clock::Clock;
use crate::error::Result;
use crate::repo::compaction::{self, CompactionOptions, CompactionReport};
use crate::repo::retention::{self, DeletionReport, RetentionOptions};
use crate::repo::sweep::{self, SweepOptions, SweepReport};
use crate::repo::{Catalog, Repository};

/// Most stored bytes of a joint WAL object: it is in memory twice while it is made, beside a stream
/// whose whole process is to stay below 48 MiB.
const JOINT_BYTES_MAX: u64 = 4 << 20;

/// Merges small WAL objects and deletes those that a settled joint one holds. `None` while no backup
/// tells how large the cluster's segments are.
///
/// # Errors
/// What the store reports.
///
/// # Cancel safety
/// Safe to drop anywhere: a joint object is whole before what it holds goes, in a later pass.
pub async fn compact(repository: &Repository, clock: &Clock) -> Result<Option<CompactionReport>> {
    let catalog = Catalog::load(repository).await?;
    let Some(segment_size) = catalog.segment_size() else { return Ok(None) };
    let options = CompactionOptions {
        stored_bytes_max: JOINT_BYTES_MAX,
        ..CompactionOptions::new(segment_size)
    };
    let plan = compaction::plan(&catalog.wal, &options, clock.now());
    compaction::apply(repository, &plan, &options).await.map(Some)
}

/// Deletes what retention no longer asks for.
///
/// # Errors
/// What the store reports; `bug` when the plan and its check disagree, and then nothing is deleted.
///
/// # Cancel safety
/// Safe to drop anywhere: manifests go first, and a later run deletes the rest.
pub async fn expire(
    repository: &Repository,
    options: &RetentionOptions,
    clock: &Clock,
) -> Result<DeletionReport> {
    let catalog = Catalog::load(repository).await?;
    let plan = retention::plan(&catalog, options, clock.now())?;
    retention::apply(repository, &plan).await
}

/// Removes what aborted backups left behind. Keys stay: to know that one is unused every object's
/// header must be read.
///
/// # Errors
/// What the store reports.
///
/// # Cancel safety
/// Safe to drop anywhere: what is left is swept by a later run.
pub async fn sweep(repository: &Repository, clock: &Clock) -> Result<SweepReport> {
    let catalog = Catalog::load(repository).await?;
    let plan = sweep::plan(&catalog, None, SweepOptions::default(), clock.now());
    sweep::apply(repository, &plan).await
}
