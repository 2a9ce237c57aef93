//! The base backup: the server's data directory into packs, while it runs.
//!
//! # Shape
//! ```text
//!  BASE_BACKUP ──▶ tar splitter ──▶ files ──▶ BackupWriter (workers: checksums, zstd, seal) ──▶ packs
//!  stream of the WAL ───────────────────────────────────────────────────────────────▶ extents
//!                       both durable ──▶ manifest: the backup exists
//! ```
//!
//! # Durability
//! A backup is visible by its manifest only, which is put after all packs and all WAL from the start
//! of its first segment to its end. An attempt that fails or is cancelled discards its packs as far as
//! the store answers; one that is killed leaves packs without a manifest, which no listing shows as a
//! backup and the sweep removes.

mod agreement;
mod files;
mod names;
pub mod pages;
pub mod progress;
pub mod settings;
pub mod tar;
pub mod wal;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::capture::stream::{Status, Stream, StreamOptions};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::pg::backup_label::BackupFrom;
use crate::pg::{BackupLabel, Lsn, TimelineId};
use crate::repo::{
    BackupId, BackupWriter, ChecksumFailure, LeaseOptions, Manifest, ManifestFacts, PackOptions,
    PackedBackup, Repository, Tablespace, Writer,
};
use crate::wire::{
    BaseBackup, BaseBackupEvent, BaseBackupOptions, CheckpointMode, ConnectOptions, Connection,
    Session,
};

use agreement::Ends;
use files::Files;
use pages::Pages;
use settings::ServerFacts;
use tar::ArchiveEnd;
use wal::{Feed, NeededWal};

pub use progress::{BaseBackupPhase, BaseBackupProgress, Progress};

/// How long a manifest that is being put may still take when the backup is asked to stop.
const COMMIT_GRACE: Duration = Duration::from_secs(5);

/// Most damaged pages named in an error.
const NAMED_FAILURES_MAX: usize = 5;

/// What is done about page checksums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageChecksums {
    /// Not checked.
    Ignore,
    /// Checked; damage is a warning that marks the backup.
    #[default]
    Warn,
    /// Checked; damage fails the backup.
    Fail,
}

/// How a base backup is taken.
#[derive(Clone, Debug)]
pub struct BaseOptions {
    /// Label in `backup_label`.
    pub label: String,
    /// How the checkpoint is reached.
    pub checkpoint: CheckpointMode,
    /// Most KiB a second the server may send.
    pub rate_max_kib: Option<u32>,
    /// What is done about page checksums.
    pub page_checksums: PageChecksums,
    /// Threads, memory, level and size of packs.
    pub pack: PackOptions,
    /// Longest that the WAL of the backup may not get on.
    pub wal_stall_max: Duration,
}

/// Who streams the WAL.
#[derive(Clone, Debug)]
pub enum WalStreaming {
    /// The caller, in this process.
    InThisProcess(Arc<Status>),
    /// Another process if one holds the lease, else this backup with these options.
    Elsewhere(Box<(StreamOptions, LeaseOptions)>),
}

/// A base backup to be taken.
#[derive(Clone, Debug)]
pub struct Base {
    /// How.
    pub options: BaseOptions,
    /// From where.
    pub postgres: ConnectOptions,
    /// Into what.
    pub writer: Writer,
    /// Who streams the WAL.
    pub wal: WalStreaming,
    /// Where progress is shown.
    pub progress: Arc<Progress>,
}

/// A complete base backup.
#[derive(Clone, Debug)]
pub struct BackupReport {
    /// Its manifest, as stored.
    pub manifest: Manifest,
    /// Whether the server was a primary or a standby.
    pub from: BackupFrom,
    /// How long it took from connecting to the manifest.
    pub elapsed: Duration,
}

/// Takes a base backup.
///
/// # Errors
/// What the server and the store report; `conflict` for another cluster than the repository's,
/// `corrupt` for damaged pages under [`PageChecksums::Fail`], `cancelled` when `cancel` was.
///
/// # Cancel safety
/// Cancel by `cancel`, so that what was stored is discarded; a dropped future leaves it to the sweep.
pub async fn backup(base: &Base, cancel: &CancellationToken) -> Result<BackupReport> {
    let repository = base.writer.repository();
    let clock = repository.clock().clone();
    let began = clock.instant();
    let mut feed = tokio::select! {
        () = cancel.cancelled() => return Err(cancelled()),
        feed = open_feed(base, &clock) => feed?,
    };
    let outcome = take(base, &mut feed, cancel).await;
    if let Ok((manifest, _)) = &outcome {
        feed.backup_taken(manifest.public.timeline, manifest.public.start_lsn);
    }
    let closed = feed.close().await;
    if outcome.is_err() {
        // Nobody is to read on that it still waits for something.
        base.progress.enter(BaseBackupPhase::Preparing);
    }
    let (manifest, from) = outcome?;
    if let Err(error) = closed {
        tracing::warn!("the backup is complete, but the WAL stream ended badly: {error}");
    }
    base.progress.enter(BaseBackupPhase::Complete);
    let elapsed = clock.instant().saturating_duration_since(began);
    Ok(BackupReport { manifest, from, elapsed })
}

async fn open_feed(base: &Base, clock: &Clock) -> Result<Feed> {
    match &base.wal {
        WalStreaming::InThisProcess(status) => Ok(Feed::Caller(Arc::clone(status))),
        WalStreaming::Elsewhere(how) => {
            let (options, lease) = &**how;
            // Commits that wait for a sidecar must not return for what this repository holds, which
            // may be another one.
            let postgres = base.postgres.clone().with_application_name_suffix("_backup");
            let stream = Stream {
                options: options.clone(),
                upstream: Arc::new(postgres),
                writer: base.writer.clone(),
                status: Arc::new(Status::new()),
            };
            Feed::open(wal::for_one_backup(stream), lease.clone(), clock).await
        }
    }
}

/// Copies, waits for the WAL, and puts the manifest.
async fn take(
    base: &Base,
    feed: &mut Feed,
    cancel: &CancellationToken,
) -> Result<(Manifest, BackupFrom)> {
    let repository = base.writer.repository();
    let (facts, connection) = tokio::select! {
        () = cancel.cancelled() => return Err(cancelled()),
        met = settings::meet(&base.postgres, repository) => met?,
    };
    let mut copy = Copy::new(base, facts);
    let copied = tokio::select! {
        () = cancel.cancelled() => Err(cancelled()),
        copied = copy.run(connection) => copied,
    };
    let ended = match copied {
        Ok(ended) => ended,
        Err(error) => {
            copy.abort().await;
            return Err(error);
        }
    };
    base.progress.enter(BaseBackupPhase::Storing);
    let mut packed = copy.finish_packs(cancel).await?;
    let ready = tokio::select! {
        () = cancel.cancelled() => Err(cancelled()),
        ready = make_ready(base, feed, &mut packed, &ended) => ready,
    };
    if let Err(error) = ready {
        packed.abort().await;
        return Err(error);
    }
    let from = ended.label.from;
    let impatience = async {
        cancel.cancelled().await;
        tokio::time::sleep(COMMIT_GRACE).await;
    };
    tokio::select! {
        () = impatience => Err(cancelled()),
        manifest = packed.commit(ended.into_manifest_facts()) => Ok((manifest?, from)),
    }
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "the base backup was stopped on request")
}

/// What is known when the server has sent everything.
#[derive(Debug)]
struct Ended {
    id: BackupId,
    facts: ServerFacts,
    label: BackupLabel,
    end_lsn: Lsn,
    end_timeline: TimelineId,
    start_time: Timestamp,
    end_time: Timestamp,
    tablespaces: Vec<Tablespace>,
}

/// Rechecks suspects and waits for the WAL: after that the backup may become visible.
async fn make_ready(
    base: &Base,
    feed: &mut Feed,
    packed: &mut PackedBackup,
    ended: &Ended,
) -> Result<()> {
    let repository: &Repository = base.writer.repository();
    base.progress.enter(BaseBackupPhase::Rechecking);
    // Beyond a limit they are counted only.
    let suspects = packed.checksum_failures().to_vec();
    let suspect_count = packed.checksum_failure_count();
    let (start_lsn, timeline) = (ended.id.start_lsn(), ended.id.timeline());
    let origin = pages::Origin { system_id: repository.system_id(), timeline, start_lsn };
    let known = pages::recheck(&suspects, &origin, &base.postgres, repository.clock()).await;
    packed.forgive(|suspect| !known.damaged.contains(suspect) && !known.unread.contains(suspect));
    let damage = Damage {
        named: packed.checksum_failures(),
        count: packed.checksum_failure_count(),
        unread_count: suspect_count - suspects.len() as u64 + known.unread.len() as u64,
    };
    damage.judge(base.options.page_checksums)?;
    base.progress.enter(BaseBackupPhase::WaitingForWal);
    let facts = &ended.facts;
    let needed =
        NeededWal::of(facts.history.clone(), start_lsn, ended.end_lsn, facts.segment_size)?;
    feed.wait(&needed, repository, base.options.wal_stall_max).await
}

/// What is wrong with the pages.
#[derive(Clone, Copy, Debug)]
struct Damage<'a> {
    /// The first of them.
    named: &'a [ChecksumFailure],
    /// All of them.
    count: u64,
    /// Those of all that were not read again, as only so many are remembered or the server did not let us;
    /// torn pages may be among them.
    unread_count: u64,
}

impl Damage<'_> {
    /// Says what is wrong, or fails for it.
    fn judge(self, wanted: PageChecksums) -> Result<()> {
        for failure in self.named {
            let ChecksumFailure { path, block, expected, found } = failure;
            tracing::warn!(
                "block {block} of '{path}' has a wrong checksum: {found:04X}, expected {expected:04X}"
            );
        }
        let unread = match self.unread_count {
            0 => String::new(),
            count => format!(
                "; {count} of them were not read again and may only have been being written"
            ),
        };
        let found = match self.unread_count {
            0 => "pages on the server are damaged",
            _ => "pages have a wrong checksum",
        };
        if self.unread_count > 0 {
            tracing::warn!("{} {found}{unread}", self.count);
        }
        if self.count == 0 || wanted != PageChecksums::Fail {
            return Ok(());
        }
        let named = self.named.iter().take(NAMED_FAILURES_MAX);
        let named: Vec<String> =
            named.map(|failure| format!("block {} of '{}'", failure.block, failure.path)).collect();
        let more =
            if self.count > named.len() as u64 && !named.is_empty() { ", and more" } else { "" };
        let colon = if named.is_empty() { "" } else { ": " };
        let (count, named) = (self.count, named.join(", "));
        let message = format!("{count} {found}{colon}{named}{more}{unread}");
        Err(Error::new(Kind::Corrupt, message).hint(
            "Repair the tables from an older backup, or take this one with damage as a warning only \
             (--page-checksums warn).",
        ))
    }
}

impl Ended {
    fn into_manifest_facts(self) -> ManifestFacts {
        ManifestFacts {
            postgres_version_num: self.facts.version.server_version_num(),
            segment_size: self.facts.segment_size,
            end_timeline: self.end_timeline,
            end_lsn: self.end_lsn,
            start_time: self.start_time,
            end_time: self.end_time,
            tablespaces: self.tablespaces,
            settings: self.facts.settings,
        }
    }
}

/// The copy in the making.
struct Copy<'a> {
    base: &'a Base,
    facts: Option<ServerFacts>,
    backup: Option<BackupWriter>,
    files: Files,
    oids: Vec<Option<u32>>,
    tablespaces: Vec<Tablespace>,
    begun: Option<(BackupId, Timestamp)>,
}

impl<'a> Copy<'a> {
    fn new(base: &'a Base, facts: ServerFacts) -> Self {
        let archive_end =
            if facts.version.major() >= 15 { ArchiveEnd::Marked } else { ArchiveEnd::Bare };
        Self {
            base,
            facts: Some(facts),
            backup: None,
            files: Files::new(archive_end),
            oids: Vec::new(),
            tablespaces: Vec::new(),
            begun: None,
        }
    }

    /// Receives everything.
    async fn run(&mut self, connection: Connection) -> Result<Ended> {
        let options = &self.base.options;
        self.base.progress.enter(BaseBackupPhase::Checkpoint);
        let asked = BaseBackupOptions {
            label: options.label.clone(),
            checkpoint: options.checkpoint,
            rate_max_kib: options.rate_max_kib,
        };
        let here = connection.options().clone();
        let mut source: BaseBackup = connection.base_backup(&asked).await?;
        let mut end = None;
        while let Some(event) = source.next().await? {
            match event {
                BaseBackupEvent::Start { start_lsn, timeline, tablespaces } => {
                    self.ensure_leads_on(start_lsn).await?;
                    self.begin(start_lsn, timeline, tablespaces)?;
                }
                BaseBackupEvent::Archive { index } => {
                    let oid = self.oids.get(index).copied().flatten();
                    let tablespace = self.tablespaces.iter().find(|one| Some(one.oid) == oid);
                    self.files.begin_archive(tablespace.cloned())?;
                    if let Some(absent) = self.files.take_absent() {
                        self.ensure_dropped(&absent, &here).await?;
                    }
                }
                BaseBackupEvent::Data(bytes) => {
                    let backup = self.backup.as_mut().ok_or_else(out_of_order)?;
                    let len = bytes.len() as u64;
                    self.files.write(bytes, backup).await?;
                    let packed = backup.progress();
                    self.base.progress.update(|now| {
                        now.received_bytes += len;
                        now.file_count = packed.file_count;
                        now.stored_bytes = packed.stored_bytes;
                        now.suspect_page_count = packed.checksum_failure_count;
                    });
                }
                BaseBackupEvent::Progress { .. } => {}
                BaseBackupEvent::End { end_lsn, timeline } => end = Some((end_lsn, timeline)),
            }
        }
        // A server may have no more connections than this one to give.
        drop(source);
        let mut ended = self.end(end.ok_or_else(out_of_order)?)?;
        let ends = Ends {
            start_timeline: ended.id.timeline(),
            start_lsn: ended.id.start_lsn(),
            end_timeline: ended.end_timeline,
            end_lsn: ended.end_lsn,
        };
        let clock = self.base.writer.repository().clock();
        let facts = &mut ended.facts;
        facts.history =
            ends.history(&facts.history, facts.system_id, &self.base.postgres, clock).await?;
        Ok(ended)
    }

    /// Fails unless the `tablespace` of which the server has sent nothing was dropped meanwhile, as replay will.
    async fn ensure_dropped(&self, tablespace: &Tablespace, server: &ConnectOptions) -> Result<()> {
        let missing = files::missing_tablespace(tablespace);
        let clock = self.base.writer.repository().clock();
        let sql = format!("select 1 from pg_catalog.pg_tablespace where oid = {}", tablespace.oid);
        let ask = async {
            let mut connection = Connection::connect(server, Session::Database, clock).await?;
            let found = connection.query(&sql).await?;
            connection.close().await;
            Ok::<_, Error>(found.is_empty())
        };
        match ask.await {
            Ok(true) => {
                tracing::info!("tablespace {} was dropped while it was copied", tablespace.oid);
                Ok(())
            }
            Ok(false) => Err(missing),
            Err(error) => {
                Err(error.context(format!("{missing}; whether it was dropped cannot be asked")))
            }
        }
    }

    /// Ends a backup that could not be restored before it is copied: a standby, which cannot switch to a new
    /// segment, begins one where its last restartpoint does, which may be in damaged WAL or before a gap. What
    /// lies ahead may be behind its end, on a standby that replays late: that is asked at the end, and what is
    /// asked then may fail here.
    async fn ensure_leads_on(&self, start_lsn: Lsn) -> Result<()> {
        let repository = self.base.writer.repository();
        let history = &self.facts.as_ref().ok_or_else(out_of_order)?.history;
        if let WalStreaming::InThisProcess(status) = &self.base.wal {
            wal::ensure_no_gap_ahead(&status.snapshot().gaps, history, start_lsn)?;
        }
        let behind_start = Lsn(start_lsn.0.saturating_add(1));
        match wal::ensure_leads_on(repository, history, start_lsn, behind_start).await {
            Err(error) if error.kind() != Kind::Conflict => {
                tracing::debug!("unable to look for barriers for now: {error}");
                Ok(())
            }
            known => known,
        }
    }

    fn begin(
        &mut self,
        start_lsn: Lsn,
        timeline: TimelineId,
        tablespaces: Vec<crate::wire::Tablespace>,
    ) -> Result<()> {
        let base = self.base;
        let now = base.writer.repository().clock().now();
        let id = BackupId::new(now, timeline, start_lsn);
        let facts = self.facts.as_ref().ok_or_else(out_of_order)?;
        let check = facts.page_check(base.options.page_checksums);
        let pages = Arc::new(Pages::new(start_lsn, check));
        self.backup = Some(base.writer.backup(id, base.options.pack.clone(), pages)?);
        self.begun = Some((id, now));
        self.oids = tablespaces.iter().map(|tablespace| tablespace.oid).collect();
        let total_bytes = announced_bytes(&tablespaces);
        for tablespace in tablespaces {
            if let (Some(oid), Some(location)) = (tablespace.oid, tablespace.location) {
                self.tablespaces.push(Tablespace { oid, location });
            }
        }
        base.progress.update(|now| {
            now.phase = BaseBackupPhase::Copying;
            now.id = Some(id);
            now.total_bytes = total_bytes;
        });
        tracing::info!("base backup '{id}' begins at {start_lsn} on timeline {timeline}");
        Ok(())
    }

    fn end(&mut self, (end_lsn, end_timeline): (Lsn, TimelineId)) -> Result<Ended> {
        let (id, start_time) = self.begun.ok_or_else(out_of_order)?;
        let facts = self.facts.take().ok_or_else(out_of_order)?;
        let (label, control) = std::mem::take(&mut self.files).finish()?;
        agreement::check(id, &facts, &label, &control)?;
        Ok(Ended {
            id,
            facts,
            label,
            end_lsn,
            end_timeline,
            start_time,
            end_time: self.base.writer.repository().clock().now(),
            tablespaces: std::mem::take(&mut self.tablespaces),
        })
    }

    async fn finish_packs(&mut self, cancel: &CancellationToken) -> Result<PackedBackup> {
        let backup = self.backup.take().ok_or_else(out_of_order)?;
        match backup.finish_packs_unless(cancel).await {
            Err(error) if error.kind() == Kind::Cancelled => Err(cancelled()),
            other => other,
        }
    }

    async fn abort(&mut self) {
        if let Some(backup) = self.backup.take() {
            backup.abort().await;
        }
    }
}

/// What the server expects to send; `None` when it did not say so for all of it.
fn announced_bytes(tablespaces: &[crate::wire::Tablespace]) -> Option<u64> {
    let add =
        |total: u64, space: &crate::wire::Tablespace| Some(total.saturating_add(space.size_kib?));
    Some(tablespaces.iter().try_fold(0, add)?.saturating_mul(1024))
}

fn out_of_order() -> Error {
    Error::new(Kind::Bug, "the events of a base backup came out of order")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announced_sizes_are_added_whatever_they_are() {
        let spaces = |sizes: &[Option<u64>]| -> Vec<crate::wire::Tablespace> {
            let space = |size_kib| crate::wire::Tablespace { oid: None, location: None, size_kib };
            sizes.iter().copied().map(space).collect()
        };
        assert_eq!(announced_bytes(&spaces(&[Some(1), Some(2)])), Some(3072));
        assert_eq!(announced_bytes(&spaces(&[Some(1), None])), None);
        assert_eq!(announced_bytes(&spaces(&[Some(u64::MAX), Some(1)])), Some(u64::MAX));
        assert_eq!(announced_bytes(&[]), Some(0));
    }

    #[test]
    fn pages_that_were_not_read_again_fail_a_backup_as_well() {
        let failure =
            |block| ChecksumFailure { path: "base/5/1".to_owned(), block, expected: 1, found: 2 };
        let said = |named: &[ChecksumFailure], count, unread_count| {
            let damage = Damage { named, count, unread_count };
            damage.judge(PageChecksums::Warn).unwrap();
            let error = damage.judge(PageChecksums::Fail).err()?;
            assert_eq!(error.kind(), Kind::Corrupt);
            Some(error.message().to_owned())
        };
        assert_eq!(said(&[], 0, 0), None);
        assert_eq!(
            said(&[failure(7)], 1, 0).unwrap(),
            "1 pages on the server are damaged: block 7 of 'base/5/1'"
        );
        // All that were read again were fine, which says nothing of the others.
        assert_eq!(
            said(&[], 4, 4).unwrap(),
            "4 pages have a wrong checksum; 4 of them were not read again and may only have been \
             being written"
        );
        let message = said(&[failure(7)], 3, 2).unwrap();
        assert!(message.contains("block 7 of 'base/5/1', and more; 2 of them"), "{message}");
    }
}
