//! Removes what nobody will ever refer to: packs of aborted backups, data keys that no object names,
//! uploads that were never completed.
//!
//! In: a [`Catalog`], and for keys [`KeyEvidence`]. Out: a [`SweepPlan`], pure; [`apply`] carries it
//! out.
//!
//! # When is a pack unreferenced?
//! A backup is referred to by its manifest alone, and by later backups' manifests that name it as a
//! parent, which exists only after its own. So packs without a manifest are needed only by a backup
//! that is still being taken. That one puts packs all the time, and refuses to commit when its last
//! pack is older than [`COMMIT_TIME_MAX`] or when a pack is missing;
//! a sweep waits for twice that time since the newest object of the backup, by the store's clock. Where
//! the store does not say when an object was made, nobody knows that so much time has passed: the
//! backup, or the key, stays.
//!
//! # When is a key unused?
//! A wrapped key is tiny and losing one that is needed loses everything sealed with it, so the burden
//! of proof is on deleting. A key may go only when all of this holds:
//! 1. the header of *every* object of the cluster was read after the keys were listed (of joint WAL
//!    extents those of all members), and none names it; one header that cannot be read stops the
//!    sweep of all keys;
//! 2. it was put longer than [`SweepOptions::key_grace`] ago: a writer puts its key, then seals. A
//!    backup that lives so long without a visible pack cannot commit any more;
//! 3. no lease names it. The one writer that may be silent for longer is the stream, and it holds the
//!    lease; while a lease is held that does not say which key its holder uses, no key goes.
//!
//! Scanning reads a few bytes of every object, and joint extents whole: a request an object, which for a
//! year of WAL costs more than the keys of a hundred years. So no chore does it (README, "Limits").
//!
//! # Durability
//! Nothing that is listed depends on what goes, so dying anywhere leaves less rubbish, never less of a
//! backup. Before packs are deleted the backup's names are listed again: a manifest, or anything new,
//! saves it.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::time::Duration;

use bytesize::ByteSize;
use futures::StreamExt as _;
use futures::stream;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::error::{Context, Error, Kind, Result};
use crate::store::{ObjectInfo, ObjectName};

use super::Repository;
use super::catalog::{Catalog, StoredKey};
use super::extent::ExtentMember;
use super::header::{EXTENT_HEADER_BYTES, HEADER_BYTES, ObjectHeader, ObjectKind};
use super::names::{BackupId, ExtentName, KeyId, Object};
use super::packing::COMMIT_TIME_MAX;
use super::retention::{
    Refusal, delete_unless_refused, ensure_clock, missing_held, missing_held_remark,
};

/// Headers read at a time.
const SCAN_JOBS: usize = 16;
/// Times the names are listed before a scan gives up; one more than there are changes under way.
const PASSES_MAX: usize = 6;
/// Objects deleted by one call.
const BATCH_OBJECTS: usize = 1000;

/// How long rubbish is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SweepOptions {
    /// Since the newest object of a backup without a manifest, and since an upload began; never less
    /// than twice the time in which a backup must commit.
    pub grace: Duration,
    /// Since a key was put; never less than 30 days.
    pub key_grace: Duration,
}

impl Default for SweepOptions {
    fn default() -> Self {
        Self { grace: COMMIT_TIME_MAX * 2, key_grace: Duration::from_secs(30 * 24 * 3600) }
    }
}

impl SweepOptions {
    /// Shorter times than the default would break the argument of the module.
    fn bounded(self) -> Self {
        let least = Self::default();
        Self { grace: self.grace.max(least.grace), key_grace: self.key_grace.max(least.key_grace) }
    }
}

/// Packs without a manifest that go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SweptBackup {
    /// The backup.
    pub id: BackupId,
    /// Its packs as listed.
    pub pack_count: u32,
    /// Their bytes.
    pub stored_bytes: u64,
    /// When the newest of them was made.
    pub newest: Timestamp,
}

/// What goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SweepPlan {
    /// The time by which things are old.
    pub planned_time: Timestamp,
    /// Packs without a manifest.
    pub backups: Vec<SweptBackup>,
    /// Keys that no object names.
    pub keys: Vec<KeyId>,
    /// Uploads begun longer ago than this are discarded.
    pub upload_grace_s: u64,
    /// What an operator should know.
    pub remarks: Vec<String>,
}

impl SweepPlan {
    /// Whether no object is deleted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.backups.is_empty() && self.keys.is_empty()
    }

    /// Bytes of the packs that go.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.backups.iter().map(|backup| backup.stored_bytes).sum()
    }
}

impl fmt::Display for SweepPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for SweptBackup { id, pack_count, stored_bytes, newest } in &self.backups {
            let size = ByteSize::b(*stored_bytes);
            writeln!(
                f,
                "delete {pack_count} packs of aborted backup {id}: {size}, last written {newest}"
            )?;
        }
        for key in &self.keys {
            writeln!(f, "delete unused key {key}")?;
        }
        let hours = self.upload_grace_s / 3600;
        writeln!(f, "discard uploads begun more than {hours} h ago and never completed, if any")?;
        for remark in &self.remarks {
            writeln!(f, "note: {remark}")?;
        }
        Ok(())
    }
}

/// Which keys the objects of a cluster name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyEvidence {
    /// Keys that some header names.
    used: BTreeSet<KeyId>,
    /// Objects whose header could not be read: they may name any key.
    unreadable: Vec<String>,
    /// The keys there were before the first header was read.
    keys: Vec<StoredKey>,
}

/// Decides what goes at the time `now`; keys only with evidence.
#[must_use]
pub fn plan(
    catalog: &Catalog,
    evidence: Option<&KeyEvidence>,
    options: SweepOptions,
    now: Timestamp,
) -> SweepPlan {
    let options = options.bounded();
    let aborted = catalog.incomplete.iter().filter_map(|backup| {
        let newest = backup.objects.newest.filter(|time| is_older(*time, options.grace, now))?;
        Some(SweptBackup {
            id: backup.id,
            pack_count: backup.objects.pack_count,
            stored_bytes: backup.objects.stored_bytes,
            newest,
        })
    });
    let ageless = catalog.incomplete.iter().filter(|backup| backup.objects.newest.is_none());
    let mut plan = SweepPlan {
        planned_time: now,
        backups: aborted.collect(),
        upload_grace_s: options.grace.as_secs(),
        remarks: ageless.map(|backup| ageless_remark(backup.id)).collect(),
        ..SweepPlan::default()
    };
    // Part of the repository is out of sight, with what would save a pack or a key.
    let missing = missing_held(catalog);
    if !missing.is_empty() {
        plan.backups.clear();
        plan.remarks.extend(missing.into_iter().map(missing_held_remark));
        return plan;
    }
    if let Some(evidence) = evidence {
        plan_keys(catalog, evidence, options, now, &mut plan);
    }
    plan
}

fn ageless_remark(id: BackupId) -> String {
    format!(
        "backup {id} has no manifest and stays: the store does not say when its packs were made"
    )
}

fn is_older(time: Timestamp, than: Duration, now: Timestamp) -> bool {
    let than = SignedDuration::try_from(than).unwrap_or(SignedDuration::MAX);
    now.duration_since(time) >= than
}

fn plan_keys(
    catalog: &Catalog,
    evidence: &KeyEvidence,
    options: SweepOptions,
    now: Timestamp,
    plan: &mut SweepPlan,
) {
    if let Some(first) = evidence.unreadable.first() {
        let count = evidence.unreadable.len();
        plan.remarks.push(format!(
            "no key is deleted: {count} objects may name any of them, the first is '{first}'"
        ));
        return;
    }
    let lease = catalog.lease.as_ref();
    let named = lease.and_then(|lease| lease.key_id.as_deref()?.parse::<KeyId>().ok());
    let may_be_held = |lease: &super::lease::LeaseInfo| {
        !lease.released && !is_older(lease.renewed_time, options.key_grace, now)
    };
    if named.is_none() && lease.is_some_and(may_be_held) {
        plan.remarks
            .push("no key is deleted: the writer does not say which one it uses".to_owned());
        return;
    }
    let unused = evidence.keys.iter().filter(|key| {
        !evidence.used.contains(&key.id)
            && named != Some(key.id)
            && key.modified.is_some_and(|time| is_older(time, options.key_grace, now))
    });
    plan.keys.extend(unused.map(|key| key.id));
}

/// Reads the header of every object.
///
/// Names are listed again until nothing new is found: compaction puts a joint object, perhaps behind
/// the place that was reached, before it deletes what it holds, perhaps before that place.
///
/// # Errors
/// What the store reports; an object whose header cannot be read is no error but part of the evidence.
pub async fn scan_headers(repository: &Repository) -> Result<KeyEvidence> {
    // The keys first: one that is put from here on is not in the evidence at all.
    let listed = repository.store().list_all(&repository.cluster().keys_prefix()).await?;
    let keys = listed.iter().filter_map(|object| {
        match Object::parse(repository.cluster(), &object.name) {
            Some(Object::Key(id)) => Some(StoredKey { id, modified: object.modified }),
            _ => None,
        }
    });
    let mut evidence = KeyEvidence { keys: keys.collect(), ..KeyEvidence::default() };
    let mut seen = Seen::default();
    for _ in 0..PASSES_MAX {
        let before = seen.0.len();
        for prefix in [repository.cluster().base_prefix(), repository.cluster().wal_prefix()] {
            scan_below(repository, &prefix, &mut seen, &mut evidence).await?;
        }
        if seen.0.len() == before {
            return Ok(evidence);
        }
    }
    evidence.unreadable.push("names that change all the time".to_owned());
    Ok(evidence)
}

/// Names that were scanned, by the first half of their hash.
#[derive(Default)]
struct Seen(HashSet<[u8; 16]>);

impl Seen {
    fn is_new(&mut self, name: &ObjectName) -> bool {
        let mut hash = [0; 16];
        blake3::Hasher::new().update(name.as_str().as_bytes()).finalize_xof().fill(&mut hash);
        self.0.insert(hash)
    }
}

/// Scans what was not seen yet.
async fn scan_below(
    repository: &Repository,
    prefix: &str,
    seen: &mut Seen,
    evidence: &mut KeyEvidence,
) -> Result<()> {
    let mut after: Option<ObjectName> = None;
    loop {
        let page = repository.store().list(prefix, after.as_ref()).await?;
        after = page.next_after()?;
        // Owned, so that the future can run in a task of its own.
        let new = page.objects.into_iter().filter(|object| seen.is_new(&object.name));
        let mut scans = stream::iter(new.collect::<Vec<ObjectInfo>>())
            .map(|object| async move {
                let keys = scan(repository, &object).await;
                (object, keys)
            })
            .buffer_unordered(SCAN_JOBS);
        while let Some((object, keys)) = scans.next().await {
            evidence.take(&object, keys)?;
        }
        if after.is_none() {
            return Ok(());
        }
    }
}

impl KeyEvidence {
    fn take(&mut self, object: &ObjectInfo, keys: Result<Vec<KeyId>>) -> Result<()> {
        match keys {
            Ok(keys) => self.used.extend(keys),
            // Deleted since it was listed; whatever replaced it is read as well or is newer.
            Err(error) if error.kind() == Kind::NotFound => {
                self.unreadable.push(format!("{} (deleted meanwhile)", object.name));
            }
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) => {
                self.unreadable.push(object.name.to_string());
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// The keys that an object names.
async fn scan(repository: &Repository, object: &ObjectInfo) -> Result<Vec<KeyId>> {
    let name = &object.name;
    let (kind, bytes) = match Object::parse(repository.cluster(), name) {
        Some(Object::Pack(_)) => (ObjectKind::Pack, HEADER_BYTES),
        Some(Object::Manifest(_)) => (ObjectKind::Manifest, HEADER_BYTES),
        Some(Object::Extent(extent)) => return scan_extent(repository, object, &extent).await,
        // Never sealed with a data key.
        Some(Object::History(_)) => return Ok(Vec::new()),
        _ => {
            return Err(Error::new(
                Kind::Unsupported,
                format!("'{name}' is not an object of ours"),
            ));
        }
    };
    let header = repository.store().get(name, Some(0..bytes as u64)).await?;
    Ok(vec![ObjectHeader::decode(&header, kind)?.key_id])
}

async fn scan_extent(
    repository: &Repository,
    object: &ObjectInfo,
    extent: &ExtentName,
) -> Result<Vec<KeyId>> {
    let first = Some(0..EXTENT_HEADER_BYTES as u64);
    let header = repository.store().get(&object.name, first).await?;
    let header = ObjectHeader::decode(&header, ObjectKind::Extent)?;
    let own_bytes = header.extent.map(|fields| u64::from(fields.frames_bytes));
    if own_bytes == object.size_bytes.checked_sub(EXTENT_HEADER_BYTES as u64) {
        return Ok(vec![header.key_id]);
    }
    let body = repository.store().get(&object.name, None).await?;
    let members = ExtentMember::walk(extent, &body)?;
    Ok(members.iter().map(|member| member.key_id).collect())
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SweepReport {
    /// Packs that are gone.
    pub pack_count: u64,
    /// Backups that were left alone because they are alive after all.
    pub saved: Vec<BackupId>,
    /// Keys that are gone.
    pub key_count: u64,
    /// Uploads that were discarded.
    pub upload_count: u64,
    /// What could not be deleted, such as packs under a lock. It is no reason to leave the rest.
    pub refused: Vec<Refusal>,
    /// What an operator should know.
    pub remarks: Vec<String>,
}

/// Carries `plan` out. Nothing of it depends on anything else, so what goes wrong with one thing does
/// not keep the others from going.
///
/// # Errors
/// Refused deletions are no error but are reported, and so is that we may not look for uploads.
/// `config` when this host's clock and the store's are far apart or the plan was made by a clock that was
/// far ahead, what the store reports; `bug` when a manifest appeared while its packs were deleted, which
/// the writer's rules exclude.
pub async fn apply(repository: &Repository, plan: &SweepPlan) -> Result<SweepReport> {
    let mut report = SweepReport::default();
    if !plan.is_empty() {
        ensure_clock(repository, plan.planned_time).await?;
    }
    let grace = Duration::from_secs(plan.upload_grace_s).max(SweepOptions::default().grace);
    let prefix = repository.cluster().prefix();
    let uploads = repository.store().abort_stale_multiparts(&prefix, grace).await;
    for backup in &plan.backups {
        sweep_backup(repository, backup, &mut report)
            .await
            .context(|| format!("unable to remove aborted backup '{}'", backup.id))?;
    }
    let keys: Result<Vec<ObjectName>> =
        plan.keys.iter().map(|id| repository.name(&Object::Key(*id))).collect();
    for batch in keys?.chunks(BATCH_OBJECTS) {
        let deleted = delete_unless_refused(repository, batch, &mut report.refused).await;
        if deleted.context(|| "unable to delete unused keys")? {
            report.key_count += batch.len() as u64;
        }
    }
    match uploads {
        Ok(count) => report.upload_count = count,
        // A right that many policies lack; a lifecycle rule of the bucket does the same work.
        Err(error) if error.kind() == Kind::Denied => {
            report.remarks.push(format!("uploads that were never completed stay: {error}"));
        }
        Err(error) => return Err(error),
    }
    Ok(report)
}

async fn sweep_backup(
    repository: &Repository,
    backup: &SweptBackup,
    report: &mut SweepReport,
) -> Result<()> {
    let manifest = repository.name(&Object::Manifest(backup.id))?;
    let listed =
        repository.store().list_all(&repository.cluster().backup_prefix(backup.id)).await?;
    let is_new = |made: Option<Timestamp>| made.is_none_or(|made| made > backup.newest);
    let alive = |object: &ObjectInfo| object.name == manifest || is_new(object.modified);
    if listed.iter().any(alive) {
        report.saved.push(backup.id);
        return Ok(());
    }
    let names: Vec<ObjectName> = listed
        .into_iter()
        .map(|object| object.name)
        .filter(|name| matches!(Object::parse(repository.cluster(), name), Some(Object::Pack(_))))
        .collect();
    for batch in names.chunks(BATCH_OBJECTS) {
        if !delete_unless_refused(repository, batch, &mut report.refused).await? {
            break;
        }
        report.pack_count += batch.len() as u64;
    }
    if repository.store().head(&manifest).await?.is_some() {
        let message = "its manifest appeared while its packs were deleted";
        return Err(Error::new(Kind::Bug, message)
            .hint("That backup cannot be restored: delete it, take another, and report this."));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
