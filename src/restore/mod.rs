//! Repository to Postgres: a target becomes a plan, the plan becomes a data directory that Postgres
//! starts from.
//!
//! In: a [`Target`], the catalog of a repository, an identity. Out: a data directory whose recovery ends
//! exactly at the target, or an error before anything was written that names the nearest instants that
//! can be reached.

mod chain;
mod cover;
#[cfg(test)]
mod craft;
pub mod directory;
mod feed;
mod files;
pub(crate) mod handover;
pub(crate) mod limits;
pub mod plan;
pub mod progress;
mod resolve;
#[cfg(test)]
mod resolve_tests;
mod rights;
pub mod run;
mod scan;
mod segments;
pub(crate) mod server_log;
pub mod settings;
mod source;
pub mod start;
mod tablespaces;
pub mod target;
pub mod time;

pub use directory::{Owner, TablespaceMapping};
pub use feed::{WalGet, WalGetRequest, asks_again, prefetch, wal_get};
pub use plan::{Moment, Plan, Request};
pub use progress::{Phase, Progress, ProgressNow};
pub use run::{Engine, Options, RestoreReport, Role, WalDelivery, run};
pub use server_log::Outcome;
pub use settings::{Action, Stop, Upstream};
pub use start::{Isolation, StartOptions, StartReport, start};
pub use target::{Edge, Target, TimelineChoice};

use crate::error::{Error, Kind, Result};
use crate::pg::timeline::PathPart;
use crate::pg::{LsnRange, TimelineHistory, TimelineId};
use crate::repo::{BackupId, BackupSummary, Catalog, Object, PackName, Reader, Repository};

use chain::Piece;
use plan::{PlannedBackup, PlannedWal};
use resolve::{Base, CaughtUp, Holdings, Resolved};
use source::RepositoryWal;

/// Exit status of `wal-get` for a failure: above 125 PostgreSQL aborts recovery, where a lower one
/// means that the WAL ends here (`RestoreArchivedFile` in `xlogarchive.c`, 13 to 18).
pub const WAL_GET_FATAL_EXIT: u8 = 200;

/// Decides how `request` is restored; reads one or two extents for a time or a position, all WAL after a
/// backup for a transaction or a restore point, and writes nothing.
///
/// # Errors
/// `not found` when the target cannot be reached, with the nearest instants that can; `corrupt`,
/// `denied`, and whatever the store reports.
pub async fn plan(reader: &Reader, catalog: &Catalog, request: &Request) -> Result<Plan> {
    let source = RepositoryWal::new(reader);
    if let Some(id) = request.backup {
        whole_backup(reader.repository(), catalog, id)?;
    }
    let holdings = holdings_of(catalog);
    let resolved = resolve::resolve(&holdings, &source, request).await.map_err(advised);
    let mut resolved = resolved.map_err(|error| match damaged_backups(catalog).as_slice() {
        [] => error,
        damaged => error.further_hint(&format!(
            "Left out because they are damaged: {} (see 'tidemark verify').",
            damaged.iter().map(BackupId::to_string).collect::<Vec<_>>().join(", ")
        )),
    })?;
    let base = &resolved.base;
    let better = |id: &BackupId| *id > base.id && id.start_lsn() < resolved.applied_end;
    if request.backup.is_none()
        && let Some(id) = damaged_backups(catalog).into_iter().rev().find(better)
    {
        resolved.notes.push(format!("backup {id} is passed over: it is damaged"));
    }
    let backup = catalog.backup(resolved.base.id)?;
    Ok(plan_of(reader.repository(), catalog, backup, &request.target, resolved))
}

/// An error about damage in the repository, with what can be done.
fn advised(error: Error) -> Error {
    match error.kind() {
        Kind::Corrupt => error.hint(
            "Run 'tidemark verify': it names all that is damaged and what can still be restored, \
             by another backup (--backup) or to an earlier target.",
        ),
        _ => error,
    }
}

/// The backup that was asked for, as far as its manifest and the listing can tell.
fn whole_backup(repository: &Repository, catalog: &Catalog, id: BackupId) -> Result<()> {
    let attempted = || format!("unable to restore backup '{id}'");
    let hint = "Leave out --backup to use the newest one that is whole; 'tidemark verify' says what \
                is lost.";
    if let Some(object) = catalog.damaged.iter().find(|object| object.backup == Some(id)) {
        let found = format!("{}: '{}' is damaged: {}", attempted(), object.object, object.problem);
        return Err(Error::new(Kind::Corrupt, found).hint(hint));
    }
    let backup = catalog.backup(id)?;
    match backup.objects.bad_packs.as_slice() {
        [] => Ok(()),
        [first, ..] => {
            let name = repository.name(&Object::Pack(PackName { backup: id, number: *first }))?;
            let more = match backup.objects.bad_packs.len() - 1 {
                0 => String::new(),
                more => format!(", and so are {more} others"),
            };
            let found = format!(
                "{}: '{name}' is missing or not of the size that its manifest says{more}",
                attempted()
            );
            Err(Error::new(Kind::Corrupt, found).hint(hint))
        }
    }
}

/// Backups that cannot be used, oldest first.
fn damaged_backups(catalog: &Catalog) -> Vec<BackupId> {
    let no_manifest = catalog.damaged.iter().filter_map(|object| object.backup);
    let bad = catalog.backups.iter().filter(|backup| !backup.has_all_packs());
    let mut all: Vec<BackupId> = no_manifest.chain(bad.map(BackupSummary::id)).collect();
    all.sort_unstable();
    all
}

fn holdings_of(catalog: &Catalog) -> Holdings {
    let usable = catalog.backups.iter().filter(|backup| backup.has_all_packs());
    let base = |backup: &BackupSummary| Base {
        id: backup.id(),
        timeline: backup.manifest.end_timeline,
        start_lsn: backup.manifest.start_lsn,
        end_lsn: backup.manifest.end_lsn,
        start_time: backup.manifest.start_time,
        end_time: backup.manifest.end_time,
        segment_size: backup.manifest.wal_segment_size_bytes,
    };
    let progress = catalog.lease.as_ref().and_then(|lease| lease.progress);
    Holdings {
        bases: usable.map(base).collect(),
        wal: catalog.wal.clone(),
        histories: catalog.histories.clone(),
        barriers: catalog.marks.barriers.clone(),
        caught_up: progress.and_then(|progress| {
            let (timeline, durable_end_lsn) = (progress.timeline, progress.durable_end_lsn);
            progress.caught_up_time.map(|time| CaughtUp { timeline, durable_end_lsn, time })
        }),
    }
}

fn plan_of(
    repository: &Repository,
    catalog: &Catalog,
    backup: &BackupSummary,
    target: &Target,
    resolved: Resolved,
) -> Plan {
    let Resolved { base, chain, stop, needed_end, .. } = resolved;
    // Whole segments are cheaper to hand over, and what follows the stop is not replayed. WAL of a later
    // timeline would only hide the segment in which that begins under another name.
    let of_timeline = chain.pieces().iter().filter(|piece| piece.timeline <= resolved.timeline);
    let timeline_end = of_timeline.map(|piece| piece.range.end()).max().unwrap_or(chain.end());
    let wal_end_lsn = match stop {
        Stop::EndOfWal => chain.end(),
        _ => base.segment_size.end_of(needed_end).min(timeline_end),
    };
    let pieces = chain.within(chain.start(), wal_end_lsn);
    let wal = planned_wal(catalog, &pieces);
    let manifest = &backup.manifest;
    let wal_bytes = wal_end_lsn.saturating_since(chain.start());
    let wal_stored: u64 = wal.iter().map(|wal| wal.stored_bytes).sum();
    Plan {
        cluster: repository.cluster().to_string(),
        system_id: repository.system_id(),
        wal_segment_bytes: base.segment_size,
        target: target.clone(),
        backup: PlannedBackup {
            id: base.id,
            timeline: manifest.timeline,
            start_lsn: base.start_lsn,
            end_lsn: base.end_lsn,
            start_time: manifest.start_time,
            end_time: manifest.end_time,
            stored_bytes: manifest.stored_bytes,
            plain_bytes: manifest.plain_bytes,
        },
        timeline: resolved.timeline,
        stop,
        applied_end_lsn: resolved.applied_end,
        last_record_lsn: resolved.last_record.map(LsnRange::start),
        wal_end_lsn,
        commit_before: resolved.commit_before,
        commit_after: resolved.commit_after,
        wal,
        fetch_bytes: manifest.stored_bytes + wal_stored,
        expected_s: Plan::estimate_s(manifest.plain_bytes, wal_bytes),
        notes: resolved.notes,
        pieces,
        path: path_of(catalog, resolved.timeline),
        histories: catalog.histories.keys().copied().collect(),
    }
}

fn path_of(catalog: &Catalog, timeline: TimelineId) -> Vec<PathPart> {
    match catalog.histories.get(&timeline) {
        Some(history) => history.path(),
        None => TimelineHistory::first_timeline_only(timeline).path(),
    }
}

/// The pieces summed up by timeline.
fn planned_wal(catalog: &Catalog, pieces: &[Piece]) -> Vec<PlannedWal> {
    let mut planned: Vec<PlannedWal> = Vec::new();
    for piece in pieces {
        let timeline = piece.timeline;
        let stored = catalog.wal.extents_in(piece.extent.timeline, piece.range);
        let stored = stored.filter(|stored| stored.name == piece.extent);
        let stored_bytes: u64 = stored.map(|stored| stored.stored_bytes).sum();
        match planned.last_mut() {
            Some(last) if last.timeline == timeline => {
                last.end_lsn = piece.range.end();
                last.extent_count += 1;
                last.stored_bytes += stored_bytes;
            }
            _ => planned.push(PlannedWal {
                timeline,
                start_lsn: piece.range.start(),
                end_lsn: piece.range.end(),
                extent_count: 1,
                stored_bytes,
            }),
        }
    }
    planned
}
