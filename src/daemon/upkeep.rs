//! What keeps a repository small: retention, and the sweep of what nothing refers to. Each is a plan
//! first; nothing here decides by itself what may go. (Small WAL objects are merged by the stream.)

use crate::clock::Clock;
use crate::error::Result;
use crate::repo::retention::{self, DeletionReport, RetentionOptions};
use crate::repo::sweep::{self, SweepOptions, SweepReport};
use crate::repo::{Catalog, Repository};

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
