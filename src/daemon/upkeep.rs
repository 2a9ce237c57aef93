//! What keeps a repository small: retention, and the sweep of what nothing refers to. Each is a plan
//! first; nothing here decides by itself what may go. (Small WAL objects are merged by the stream.)

use std::fmt;

use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::repo::retention::{self, DeletionPlan, DeletionReport, Refusal, RetentionOptions};
use crate::repo::sweep::{self, SweepOptions, SweepPlan, SweepReport};
use crate::repo::{Catalog, Repository};

/// All that may go, planned from one listing.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What retention no longer asks for.
    pub deletion: DeletionPlan,
    /// What aborted backups left behind.
    pub sweep: SweepPlan,
}

impl Plan {
    /// Whether no object is deleted. Uploads that were never completed are no objects yet: they are
    /// known only when they are discarded.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.deletion.is_empty() && self.sweep.is_empty()
    }

    /// Bytes of the objects that go.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.deletion.stored_bytes() + self.sweep.stored_bytes()
    }
}

impl fmt::Display for Plan {
    /// As `expire` prints it before it acts.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.deletion, self.sweep)?;
        if self.is_empty() {
            writeln!(f, "nothing to delete")?;
        }
        Ok(())
    }
}

/// What was done of a [`Plan`].
#[derive(Debug)]
pub struct Report {
    /// Of what retention no longer asks for.
    pub deletion: DeletionReport,
    /// Of what aborted backups left behind, or why that failed: the deletions before it are done.
    pub swept: Result<SweepReport>,
}

/// Plans both.
///
/// # Errors
/// What the store reports; `bug` when the plan and its check disagree, and then nothing may be deleted.
pub async fn plan(
    repository: &Repository,
    options: &RetentionOptions,
    clock: &Clock,
) -> Result<Plan> {
    let catalog = Catalog::load(repository).await?;
    let now = clock.now();
    Ok(Plan {
        deletion: retention::plan(&catalog, options, now)?,
        sweep: sweep::plan(&catalog, None, SweepOptions::default(), now),
    })
}

/// Carries a plan out: first the deletions, then the sweep, which looks again at each backup it takes.
///
/// # Errors
/// As [`expire`]; how the sweep ended is in the report.
pub async fn apply(repository: &Repository, plan: &Plan) -> Result<Report> {
    let deletion = retention::apply(repository, &plan.deletion).await?;
    let swept = sweep::apply(repository, &plan.sweep).await;
    Ok(Report { deletion, swept })
}

/// Deletes what retention no longer asks for.
///
/// # Errors
/// What the store reports; `not found` while a held backup is not listed, `bug` when the plan and its check
/// disagree, and then nothing is deleted.
///
/// # Cancel safety
/// Safe to drop anywhere: manifests go first, and a later run deletes the rest.
pub async fn expire(
    repository: &Repository,
    options: &RetentionOptions,
    clock: &Clock,
) -> Result<DeletionReport> {
    let catalog = Catalog::load(repository).await?;
    retention::ensure_held_listed(&catalog)?;
    let plan = retention::plan(&catalog, options, clock.now())?;
    // Nobody reads the plan, and what it leaves alone grows.
    for remark in &plan.remarks {
        tracing::info!("expiring: {remark}");
    }
    retention::apply(repository, &plan).await
}

/// Removes what aborted backups left behind, as `catalog` shows it. Keys stay: to know that one is unused every object's
/// header must be read.
///
/// # Errors
/// What the store reports; `denied` when it refused to delete something, once all else is gone.
///
/// # Cancel safety
/// Safe to drop anywhere: what is left is swept by a later run.
pub async fn sweep(
    repository: &Repository,
    catalog: &Catalog,
    clock: &Clock,
) -> Result<SweepReport> {
    let plan = sweep::plan(catalog, None, SweepOptions::default(), clock.now());
    let report = sweep::apply(repository, &plan).await?;
    for remark in &report.remarks {
        tracing::info!("{remark}");
    }
    ensure_none_refused(&report.refused)?;
    Ok(report)
}

/// Fails, with the first of them, when deletions were refused.
///
/// # Errors
/// `denied`.
pub fn ensure_none_refused<'a>(refused: impl IntoIterator<Item = &'a Refusal>) -> Result<()> {
    let mut refused = refused.into_iter();
    let Some(Refusal { object, problem }) = refused.next() else { return Ok(()) };
    let more = match refused.count() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Err(Error::new(
        Kind::Denied,
        format!("the store refused to delete '{object}'{more}: {problem}"),
    )
    .hint("What is locked or held is deleted by a later run, once the store allows it."))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::pg::{Lsn, TimelineId};
    use crate::repo::{BackupId, Object, PackName};
    use crate::store::Store;
    use crate::store::memory::{Call, Outcome};

    #[tokio::test(start_paused = true)]
    async fn expiring_fails_while_a_held_backup_is_missing() {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let options = RetentionOptions { keep_count: Some(1), ..RetentionOptions::default() };
        expire(&repository, &options, &clock).await.unwrap();
        let backup = BackupId::new(clock.now(), TimelineId::FIRST, Lsn(0x28));
        let hold = repository.name(&Object::Mark(format!("hold-{backup}"))).unwrap();
        memory.put_if_absent(&hold, Bytes::new()).await.unwrap();
        let error = expire(&repository, &options, &clock).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound, "{error}");
        assert!(error.hint_text().unwrap().contains("tidemark release"), "{error:?}");
    }

    /// What was deleted before is told, whatever becomes of the sweep.
    #[tokio::test(start_paused = true)]
    async fn a_sweep_that_fails_takes_nothing_from_the_report_of_the_deletions() {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let plan = plan(&repository, &RetentionOptions::default(), &clock).await.unwrap();
        memory.fail_next(Call::Any, Outcome::FailsBefore);
        let report = apply(&repository, &plan).await.unwrap();
        assert_eq!(report.deletion, DeletionReport::default());
        assert_eq!(report.swept.unwrap_err().kind(), Kind::Unavailable);
        assert!(apply(&repository, &plan).await.unwrap().swept.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_sweep_that_the_store_refuses_is_told() {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let backup = BackupId::new(clock.now(), TimelineId::FIRST, Lsn(0x28));
        let name = repository.name(&Object::Pack(PackName { backup, number: 1 })).unwrap();
        memory.put_if_absent(&name, Bytes::from_static(b"pack")).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_secs(72 * 3600)).await;
        let catalog = Catalog::load(&repository).await.unwrap();
        memory.fail_next(Call::Delete, Outcome::Denied);
        let error = sweep(&repository, &catalog, &clock).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Denied);
        assert!(error.message().contains(name.as_str()), "{error}");
        assert_eq!(sweep(&repository, &catalog, &clock).await.unwrap().pack_count, 1);
    }
}
