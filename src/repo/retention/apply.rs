//! Carrying a plan of deletions out.

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;

use crate::error::{Context, Error, Kind, Result};
use crate::store::ObjectName;

use crate::repo::Repository;
use crate::repo::catalog::Catalog;
use crate::repo::marks;
use crate::repo::names::{BackupId, Object};

use super::{CLOCK_SLACK, DeletedWal, DeletionPlan, check};

/// Objects deleted by one call.
const BATCH_OBJECTS: usize = 1000;
/// Most refusals that are kept one by one.
const REFUSALS_MAX: usize = 100;

/// Something that the store would not let us delete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The first object of it.
    pub object: String,
    /// Why.
    pub problem: String,
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeletionReport {
    /// Backups that are gone.
    pub backups: Vec<BackupId>,
    /// WAL extents that are gone.
    pub extent_count: u64,
    /// Objects that are gone, manifests and packs included.
    pub object_count: u64,
    /// What could not be deleted, such as objects under a lock. Nothing that depends on them, and no
    /// WAL at all, was deleted then.
    pub refused: Vec<Refusal>,
}

/// Carries `plan` out on what is there now.
///
/// # Durability
/// Everything is read again first and the plan checked against it: a backup that committed, a hold
/// that was placed or WAL that vanished since it was made stops it before the first deletion. Order:
/// of each backup its manifest, then its packs, newest backup first so that none loses a parent it
/// refers to; then, only if no deletion was refused, the mark that says which WAL goes on purpose,
/// then WAL from its oldest byte on. Dying in between leaves backups without a manifest, which are
/// swept, and WAL that the next plan finds.
///
/// Reading everything and deleting the backups before takes minutes, so each backup's hold is looked up
/// once more just before its manifest goes. One that is there ends the run: its backup is whole, its
/// parents come after it in the order above, and no WAL was deleted yet.
///
/// # Errors
/// `conflict` when the plan no longer fits or a backup of it was held meanwhile, `config` when this host's
/// clock and the store's are more than an hour apart, or the plan was made by a clock that was so far
/// ahead, and what the store reports. Refused deletions are no error but are reported.
pub async fn apply(repository: &Repository, plan: &DeletionPlan) -> Result<DeletionReport> {
    let mut report = DeletionReport::default();
    if plan.is_empty() {
        return Ok(report);
    }
    ensure_clock(repository, plan.planned_time).await?;
    let catalog = Catalog::load(repository).await?;
    // A newer backup is why an older one goes. Its process may have died before its name was durable.
    repository.store().make_durable(&repository.cluster().prefix()).await?;
    check(&catalog, plan).map_err(|error| {
        Error::new(Kind::Conflict, format!("the repository changed since the plan: {error}"))
            .hint("Run the command again to plan anew.")
    })?;
    for backup in plan.backups.iter().rev() {
        delete_backup(repository, backup.id, &mut report).await?;
    }
    if report.refused.is_empty() {
        for wal in &plan.wal {
            delete_wal(repository, wal, &mut report).await?;
        }
    }
    Ok(report)
}

/// Fails when a clock is far wrong, which makes everything look old.
pub(in crate::repo) async fn ensure_clock(
    repository: &Repository,
    planned_time: Timestamp,
) -> Result<()> {
    let store_time = repository.store().time().await?;
    compare_clocks(planned_time, repository.clock().now(), store_time)
}

/// Fails when the store's clock and ours are far apart, or the plan was made by a clock far ahead of
/// the store's, or of ours where the store says none: that ours is right by now, after somebody looked
/// at the plan, makes nothing older that it names. A plan may have waited, so one may lie in the past.
pub(super) fn compare_clocks(
    planned_time: Timestamp,
    now: Timestamp,
    store_time: Option<Timestamp>,
) -> Result<()> {
    let true_time = store_time.unwrap_or(now);
    let skew = true_time.duration_since(now);
    let ahead = planned_time.duration_since(true_time);
    let found = if skew.abs() >= CLOCK_SLACK {
        let seconds = skew.as_secs();
        format!("the store's clock is {seconds} s ahead of this host's")
    } else if ahead >= CLOCK_SLACK {
        let seconds = ahead.as_secs();
        format!("the clock that the plan was made by was {seconds} s ahead")
    } else {
        return Ok(());
    };
    Err(Error::new(Kind::Config, format!("unable to tell what is old: {found}"))
        .hint("Set this host's clock, then run the command again."))
}

/// Deletes, or notes that it was refused; other errors end the run.
async fn delete(
    repository: &Repository,
    names: &[ObjectName],
    report: &mut DeletionReport,
) -> Result<bool> {
    let is_deleted = delete_unless_refused(repository, names, &mut report.refused).await?;
    if is_deleted {
        report.object_count += names.len() as u64;
    }
    Ok(is_deleted)
}

/// Deletes; false when the store refused it, which is noted.
pub(in crate::repo) async fn delete_unless_refused(
    repository: &Repository,
    names: &[ObjectName],
    refused: &mut Vec<Refusal>,
) -> Result<bool> {
    match repository.store().delete(names).await {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), Kind::Denied | Kind::Conflict) => {
            if refused.len() < REFUSALS_MAX {
                let object = names.first().map(ToString::to_string).unwrap_or_default();
                refused.push(Refusal { object, problem: error.to_string() });
            }
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Fails when the backup is held.
async fn ensure_not_held(repository: &Repository, id: BackupId) -> Result<()> {
    if repository.store().head(&repository.name(&marks::held(id))?).await?.is_none() {
        return Ok(());
    }
    Err(Error::new(Kind::Conflict, "it was held meanwhile").hint(
        "No WAL was deleted. Run the command again to plan anew: what is held stays then, and the \
         WAL it needs.",
    ))
}

/// Deletes a backup, unless it is held: from its manifest on it is no longer listed.
async fn delete_backup(
    repository: &Repository,
    id: BackupId,
    report: &mut DeletionReport,
) -> Result<()> {
    let attempted = || format!("unable to delete backup '{id}'");
    ensure_not_held(repository, id).await.context(attempted)?;
    let manifest = repository.name(&Object::Manifest(id))?;
    if !delete(repository, &[manifest], report).await.context(attempted)? {
        return Ok(());
    }
    report.backups.push(id);
    let packs = repository.store().list_all(&repository.cluster().backup_prefix(id)).await;
    let names: Vec<ObjectName> = packs
        .context(attempted)?
        .into_iter()
        .map(|object| object.name)
        .filter(|name| matches!(Object::parse(repository.cluster(), name), Some(Object::Pack(_))))
        .collect();
    for batch in names.chunks(BATCH_OBJECTS) {
        if !delete(repository, batch, report).await.context(attempted)? {
            return Ok(());
        }
    }
    Ok(())
}

/// Deletes WAL from its oldest byte on.
async fn delete_wal(
    repository: &Repository,
    wal: &DeletedWal,
    report: &mut DeletionReport,
) -> Result<()> {
    let attempted = || format!("unable to delete WAL of timeline {}", wal.timeline);
    let mark = repository.name(&marks::expired(wal.timeline, wal.horizon_lsn))?;
    // First the mark: the hole is never seen without what says that it is meant.
    repository.store().put_if_absent(&mark, Bytes::new()).await.context(attempted)?;
    for batch in wal.extents.chunks(BATCH_OBJECTS) {
        let names: Result<Vec<ObjectName>> =
            batch.iter().map(|extent| repository.name(&Object::Extent(*extent))).collect();
        if !delete(repository, &names?, report).await.context(attempted)? {
            return Ok(());
        }
        report.extent_count += batch.len() as u64;
    }
    marks::drop_superseded(repository, wal.timeline, wal.horizon_lsn).await
}
