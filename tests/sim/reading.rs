//! Reads everything that is listed through the product's own reader and plans, and compares it with the
//! model.

use std::collections::BTreeMap;

use tidemark::error::Result;
use tidemark::pg::{Lsn, LsnRange, TimelineId};
use tidemark::repo::verify::{VerifyOptions, VerifyProgress, verify};
use tidemark::repo::{
    BackupSummary, Catalog, Check, EntryKind, FrameBatch, Interval, Level, PackName, Reader,
    Repository, Worker,
};
use tidemark::restore::plan::Moment;
use tidemark::restore::{self, Edge, Request, Stop, Target, TimelineChoice};

use crate::checks::{Judge, Names, parse_extent};
use crate::dice::Dice;
use crate::model::{Ending, Line};
use crate::server::{Server, State};

/// Bytes of frames fetched at a time.
const BATCH_BYTES: usize = 1 << 20;

fn reader(judge: &Judge, repository: &Repository) -> Reader {
    repository.reader(judge.settings.identity.clone().into_iter().collect())
}

/// The listing, and a few targets of each interval.
pub async fn look_around(
    judge: &mut Judge,
    repository: &Repository,
    server: &Server,
    names: &Names,
    dice: &mut Dice,
) -> Result<()> {
    let catalog = Catalog::load(repository).await?;
    judge.listing(&catalog, names, &server.state());
    let reader = reader(judge, repository);
    for interval in catalog.intervals() {
        for _ in 0..3 {
            let state = snapshot(server, interval.timeline);
            aim(judge, &reader, &catalog, (&interval, &state), dice).await?;
        }
    }
    Ok(())
}

/// Everything, byte for byte.
pub async fn read_all(
    judge: &mut Judge,
    repository: &Repository,
    server: &Server,
    names: &Names,
) -> Result<()> {
    let catalog = Catalog::load(repository).await?;
    let reader = reader(judge, repository);
    extents(judge, &reader, server, names).await?;
    for interval in catalog.intervals() {
        rebuild(judge, &reader, &catalog, &interval, server).await?;
    }
    for backup in &catalog.backups {
        files(judge, &reader, backup, server).await?;
    }
    let options = VerifyOptions { thread_count: 0, ..VerifyOptions::new(1) };
    let progress = std::sync::Arc::new(VerifyProgress::default());
    let report = verify(repository, &reader, &options, &progress).await?;
    if let Some(defect) = report.defects.first() {
        judge.accuse(format!("verify finds {defect:?}"));
    }
    for backup in report.backups.iter().filter(|backup| !(backup.whole && backup.restorable)) {
        judge.accuse(format!("verify says {backup:?}"));
    }
    Ok(())
}

/// The line of a timeline, as it is now.
fn snapshot(server: &Server, timeline: TimelineId) -> Line {
    let state = server.state();
    let line = state.lines.iter().find(|line| line.number == timeline.get());
    line.unwrap_or(state.line()).clone()
}

/// Every extent that is there opens, holds the bytes its name says, and knows its greatest time.
async fn extents(judge: &mut Judge, reader: &Reader, server: &Server, names: &Names) -> Result<()> {
    for name in names.keys() {
        let Some(stored) = parse_extent(name) else { continue };
        let line = snapshot(server, TimelineId::new(stored.timeline).unwrap());
        let (start, end) = stored.span;
        let time = line.greatest_time(start, end).map_or(0, |time| time as u64);
        if time != stored.time {
            judge.accuse(format!("{name}: the greatest time in it is {time:x}"));
        }
        let object = tidemark::store::ObjectName::new(name.clone())?;
        let cluster = reader.repository().cluster().clone();
        let Some(tidemark::repo::Object::Extent(extent)) =
            tidemark::repo::Object::parse(&cluster, &object)
        else {
            judge.accuse(format!("{name} is no extent"));
            continue;
        };
        match reader.extent(&extent).await {
            Ok(bytes) if bytes == line.slice(start, end) => {}
            Ok(_) => judge.accuse(format!("{name} holds other bytes than the server wrote")),
            Err(error) => judge.accuse(format!("{name} cannot be read: {error:?}")),
        }
    }
    Ok(())
}

/// The WAL of an interval, as a restore reads it.
async fn rebuild(
    judge: &mut Judge,
    reader: &Reader,
    catalog: &Catalog,
    interval: &Interval,
    server: &Server,
) -> Result<()> {
    let line = snapshot(server, interval.timeline);
    let start = interval.backup.start_lsn();
    let wanted = LsnRange::new(start, interval.until_lsn).unwrap();
    let pieces = match catalog.lineage().cover(interval.timeline, wanted) {
        Ok(pieces) => pieces,
        Err(gap) => {
            judge.accuse(format!("{interval:?} has a gap {gap:?}"));
            return Ok(());
        }
    };
    let mut position = start;
    for piece in pieces {
        let plain = reader.extent(&piece.extent).await?;
        let from = piece.part.start().saturating_since(piece.extent.range.start()) as usize;
        let bytes = &plain[from..from + piece.part.len_bytes() as usize];
        let expected = line.slice(piece.part.start().0, piece.part.end().0);
        if piece.part.start() != position || bytes != expected {
            judge.accuse(format!("{interval:?}: {piece:?} is not the model's WAL at {position}"));
        }
        position = piece.part.end();
    }
    if position != interval.until_lsn {
        judge.accuse(format!("{interval:?}: its pieces end at {position}"));
    }
    Ok(())
}

/// The files of a backup.
async fn files(
    judge: &mut Judge,
    reader: &Reader,
    backup: &BackupSummary,
    server: &Server,
) -> Result<()> {
    let id = backup.id().to_string();
    let known = server.state().backups.iter().find(|known| known.id == id).cloned();
    let Some(known) = known else { return Ok(()) };
    let manifest = reader.manifest(backup.id()).await?;
    let mut found: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut worker = Worker::new(Level::default())?;
    for summary in &manifest.packs {
        let name = PackName { backup: backup.id(), number: summary.number };
        let pack = reader.pack(name).await?;
        let place = reader.footer_place(&pack, summary.stored_bytes).await?;
        let footer = reader.pack_footer(&pack, summary.stored_bytes, place).await?;
        for entry in &footer.entries {
            if let EntryKind::File { size_bytes, .. } = entry.kind {
                let file = found.entry(entry.path.to_string()).or_default();
                file.resize(size_bytes as usize, 0);
            }
        }
        for batch in FrameBatch::plan(&footer, BATCH_BYTES, |_| true) {
            let fetched = reader.fetch(&pack, batch).await?;
            fetched.open(&footer, Check::Hashes, &mut worker, |frame, mut block| {
                for span in &frame.spans {
                    let (piece, rest) = block.split_at(span.bytes as usize);
                    block = rest;
                    let path = footer.entries[span.entry as usize].path.to_string();
                    let start = span.file_offset as usize;
                    let file = found.get_mut(&path).unwrap();
                    file[start..start + piece.len()].copy_from_slice(piece);
                }
                Ok(())
            })?;
        }
    }
    let expected: BTreeMap<String, Vec<u8>> = known.files.into_iter().collect();
    if found != expected {
        judge.accuse(format!("the files of backup {id} are not those that were backed up"));
    }
    Ok(())
}

/// Where a recovery must stop, by the rules of `recoveryStopsBefore` and `recoveryStopsAfter`.
struct Expected {
    /// The last commit that is there.
    before: Option<u32>,
    /// The first that is not.
    after: Option<u32>,
}

/// Aims at a target inside `interval`.
async fn aim(
    judge: &mut Judge,
    reader: &Reader,
    catalog: &Catalog,
    (interval, line): (&Interval, &Line),
    dice: &mut Dice,
) -> Result<()> {
    judge.targets += 1;
    let start = interval.backup.start_lsn().0;
    let (from, until) = (interval.from_lsn.0, interval.until_lsn.0);
    // Of transactions, those that end after the backup and before the end of the WAL.
    let inside: Vec<&Ending> =
        line.endings.iter().filter(|e| e.start >= from && e.last <= until).collect();
    let edge = dice.pick(&[Edge::Inclusive, Edge::Exclusive]);
    let chosen = inside.get(dice.below(inside.len() as u64) as usize).copied();
    let points: Vec<_> = line.points.iter().filter(|p| p.start >= from && p.end <= until).collect();
    let target = match (dice.below(5), chosen) {
        (0, Some(ending)) => Target::Xid { xid: ending.xid, edge },
        (1, Some(ending)) => Target::Lsn { at: Lsn(ending.start), edge },
        (2, _) if !points.is_empty() => {
            let point = points[dice.below(points.len() as u64) as usize];
            Target::Name { name: point.name.clone() }
        }
        (3, _) => Target::Latest,
        _ if interval.until_time < interval.from_time => Target::Immediate,
        _ => {
            let low = interval.from_time.as_microsecond();
            let high = interval.until_time.as_microsecond();
            let micros = match chosen {
                Some(ending) if dice.chance(700) && ending.time >= low => ending.time,
                _ => low + dice.below((high - low) as u64 + 1) as i64,
            };
            Target::Time { at: jiff::Timestamp::from_microsecond(micros).unwrap(), edge }
        }
    };
    let stop = stop_of(&target, line, (start, from, until));
    let (timeline, backup) = (TimelineChoice::Exactly(interval.timeline), Some(interval.backup));
    let request = Request { target: target.clone(), timeline, backup };
    let plan = match restore::plan(reader, catalog, &request).await {
        Ok(plan) => plan,
        Err(error) => {
            judge.accuse(format!("{target:?} inside {interval:?} is refused: {error}"));
            return Ok(());
        }
    };
    let commits =
        || line.endings.iter().filter(|e| e.commit && e.start >= start && e.last <= until);
    let expected = Expected {
        before: commits().filter(|e| e.last <= stop).map(|e| e.xid).next_back(),
        after: commits().find(|e| e.last > stop).map(|e| e.xid),
    };
    let xid = |moment: &Option<Moment>| moment.as_ref().map(|moment| moment.xid);
    let (before, after) = (xid(&plan.commit_before), xid(&plan.commit_after));
    if (before, after) != (expected.before, expected.after) {
        judge.accuse(format!(
            "{target:?} inside {interval:?}: the plan stops {:?} between {before:?} and {after:?}, \
             the model between {:?} and {:?}",
            plan.stop, expected.before, expected.after
        ));
    }
    if plan.wal_end_lsn.0 < stop.min(until) && !matches!(plan.stop, Stop::EndOfWal) {
        judge.accuse(format!("{target:?}: the plan's WAL ends at {}", plan.wal_end_lsn));
    }
    Ok(())
}

/// The position before which everything is applied.
fn stop_of(target: &Target, line: &Line, (start, from, until): (u64, u64, u64)) -> u64 {
    let exclusive = |edge: &Edge| *edge == Edge::Exclusive;
    match target {
        Target::Time { at, edge } => {
            let at = at.as_microsecond();
            let stops = |e: &&Ending| if exclusive(edge) { e.time >= at } else { e.time > at };
            let later = line.endings.iter().filter(|e| e.start >= start && e.last <= until);
            later.clone().find(stops).map_or(until, |ending| ending.start)
        }
        Target::Xid { xid, edge } => {
            let ending = line.endings.iter().find(|e| e.xid == *xid).unwrap();
            if exclusive(edge) { ending.start } else { ending.end }
        }
        Target::Lsn { at, edge } => {
            let ending = line.endings.iter().find(|e| e.start == at.0).unwrap();
            if exclusive(edge) { ending.start } else { ending.end }
        }
        Target::Name { name } => line.points.iter().find(|point| point.name == *name).unwrap().end,
        Target::Immediate => from,
        Target::Latest => until,
    }
}

/// At the end everything since the slot was made is stored, unless retention took it.
pub fn nothing_is_missing(judge: &mut Judge, catalog: &Catalog, state: &State) {
    let gives_up = judge.settings.lag_ceiling_bytes.is_some();
    let Some(made) = state.slot_made.filter(|_| !gives_up) else { return };
    let line = state.line();
    for gap in catalog.gaps().iter().filter(|gap| !gap.expired && gap.barrier.is_none()) {
        let missing = gap.gap.missing;
        let ours = line.number_at(missing.start().0) == gap.gap.timeline.get();
        if ours && missing.start().0 >= made {
            judge.accuse(format!("WAL {missing} is missing though the slot has kept it"));
        }
    }
}
