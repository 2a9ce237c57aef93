//! The last step of a backup: its manifest.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use super::collector::{Collected, TAKE_BACK_TIME};
use crate::error::{Context, Error, Kind, Result};
use crate::repo::manifest::{BackupKind, ChecksumFailure, Manifest, ManifestFacts, PublicManifest};
use crate::repo::names::{BackupId, Object, PackName};
use crate::repo::patience::{self, outlast};
use crate::store::PutOutcome;

/// A manifest is refused so long after its last pack was put: the sweep takes packs without a
/// manifest for leftovers after twice as long, and must never race with a commit.
pub const COMMIT_TIME_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// A backup whose packs are durable and that has no manifest yet.
pub struct PackedBackup {
    shared: Arc<Shared>,
    collected: Collected,
}

impl PackedBackup {
    pub(super) fn new(shared: Arc<Shared>, collected: Collected) -> Self {
        Self { shared, collected }
    }

    /// The backup's id.
    #[must_use]
    pub fn id(&self) -> BackupId {
        self.shared.backup
    }

    /// Bytes of all packs.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.collected.packs.iter().map(|pack| pack.stored_bytes).sum()
    }

    /// Number of bad pages found and not forgiven.
    #[must_use]
    pub fn checksum_failure_count(&self) -> u64 {
        self.collected.failure_count
    }

    /// The first bad pages, by path and block, at most
    /// [`CHECKSUM_FAILURES_MAX`](crate::repo::manifest::CHECKSUM_FAILURES_MAX).
    #[must_use]
    pub fn checksum_failures(&self) -> &[ChecksumFailure] {
        &self.collected.failures
    }

    /// Strikes out the bad pages that `is_fine` says are not: a page that was torn while it was being
    /// read looks damaged, and its WAL repairs it.
    pub fn forgive(&mut self, is_fine: impl Fn(&ChecksumFailure) -> bool) {
        let before = self.collected.failures.len();
        self.collected.failures.retain(|failure| !is_fine(failure));
        let forgiven = before - self.collected.failures.len();
        self.collected.failure_count -= forgiven as u64;
    }

    /// Puts the manifest: the backup is visible on return. To be called only once the WAL from its
    /// start to `facts.end_lsn` is durable (invariant 3 of the design).
    ///
    /// # Durability
    /// The packs are durable since `finish_packs`, and are looked for once more here; the manifest is
    /// durable on return. Dying in between leaves packs without a manifest.
    ///
    /// # Errors
    /// `conflict` when a pack is missing or has another size than was put, when the last was put more
    /// than a day ago, or when there is a manifest already; what the store reports.
    pub async fn commit(self, facts: ManifestFacts) -> Result<Manifest> {
        let id = self.shared.backup;
        let attempted = || format!("unable to commit backup '{id}'");
        self.check_age().context(attempted)?;
        let clock = self.shared.writer.repository().clock().clone();
        outlast(&clock, attempted, || self.check_packs()).await?;
        let writer = self.shared.writer.clone();
        let repository = writer.repository().clone();
        let manifest = self.manifest(facts);
        let (body, manifest) = tokio::task::spawn_blocking(move || {
            manifest.seal(&writer).map(|body| (body, manifest))
        })
        .await
        .map_err(|error| Error::new(Kind::Bug, format!("sealing a manifest: {error}")))?
        .context(attempted)?;
        let name = repository.name(&Object::Manifest(id))?;
        match patience::put(&**repository.store(), &clock, &name, body).await.context(attempted)? {
            PutOutcome::Created => Ok(manifest),
            PutOutcome::AlreadyThere => Err(Error::new(
                Kind::Conflict,
                format!("{}: it has a manifest already", attempted()),
            )),
        }
    }

    /// Gives the backup up: deletes its packs, as far as the store lets us; the sweep does the rest.
    pub async fn abort(self) {
        let repository = self.shared.writer.repository();
        let backup = self.shared.backup;
        let name = |number| repository.name(&Object::Pack(PackName { backup, number })).ok();
        let names: Vec<_> =
            self.collected.packs.iter().filter_map(|pack| name(pack.number)).collect();
        let deleted = tokio::time::timeout(TAKE_BACK_TIME, repository.store().delete(&names)).await;
        let problem = match deleted {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_elapsed) => format!("the store took longer than {} s", TAKE_BACK_TIME.as_secs()),
        };
        tracing::warn!("packs of the abandoned backup '{backup}' are left behind: {problem}");
    }

    fn check_age(&self) -> Result<()> {
        let clock = self.shared.writer.repository().clock();
        let age = self.collected.last_put.map_or(Duration::ZERO, |put| {
            let by_wall_clock = Duration::try_from(clock.now().duration_since(put.time));
            clock.instant().duration_since(put.instant).max(by_wall_clock.unwrap_or_default())
        });
        if age <= COMMIT_TIME_MAX {
            return Ok(());
        }
        let hours = age.as_secs() / 3600;
        let message = format!("its last pack was put {hours} hours ago, at most 24 are safe");
        Err(Error::new(Kind::Conflict, message)
            .hint("Find out why its WAL did not become durable, then take a new backup."))
    }

    /// Looks for every pack with its size: a sweep that took one away, or a store that lost one, must
    /// not end in a manifest.
    async fn check_packs(&self) -> Result<()> {
        let repository = self.shared.writer.repository();
        let prefix = repository.cluster().backup_prefix(self.shared.backup);
        let objects = repository.store().list_all(&prefix).await?;
        // By number: a backup of 10 TB has thousands.
        let found: HashMap<u32, u64> = objects
            .iter()
            .filter_map(|object| match Object::parse(repository.cluster(), &object.name) {
                Some(Object::Pack(pack)) => Some((pack.number, object.size_bytes)),
                _ => None,
            })
            .collect();
        for pack in &self.collected.packs {
            let (number, expected) = (pack.number, pack.stored_bytes);
            let what = match found.get(&number) {
                Some(size) if *size == expected => continue,
                Some(size) => format!("pack {number} has {size} bytes, {expected} were put"),
                None => format!("pack {number} is gone"),
            };
            return Err(Error::new(Kind::Conflict, what)
                .hint("Something deletes or changes objects in this repository; stop it, then take a new backup."));
        }
        Ok(())
    }

    fn manifest(self, facts: ManifestFacts) -> Manifest {
        let progress = self.shared.counters.progress();
        let (writer, id) = (&self.shared.writer, self.shared.backup);
        let packs = self.collected.packs;
        Manifest {
            public: PublicManifest {
                id,
                system_id: writer.repository().system_id(),
                postgres_version_num: facts.postgres_version_num,
                wal_segment_size_bytes: facts.segment_size,
                kind: BackupKind::Full,
                parents: Vec::new(),
                timeline: id.timeline(),
                end_timeline: facts.end_timeline,
                start_lsn: id.start_lsn(),
                end_lsn: facts.end_lsn,
                start_time: facts.start_time,
                end_time: facts.end_time,
                plain_bytes: progress.plain_bytes,
                stored_bytes: packs.iter().map(|pack| pack.stored_bytes).sum(),
                file_count: progress.file_count,
                pack_bytes: packs.iter().map(|pack| pack.stored_bytes).collect(),
                checksum_failure_count: self.collected.failure_count,
                key_id: writer.key_id(),
                recipients: writer.recipients().to_vec(),
            },
            tablespaces: facts.tablespaces,
            settings: facts.settings,
            packs,
            checksum_failures: self.collected.failures,
        }
    }
}

impl fmt::Debug for PackedBackup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedBackup({:?}, {} packs)", self.shared.backup, self.collected.packs.len())
    }
}
