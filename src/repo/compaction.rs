//! Joins small WAL extents into larger objects, without a key.
//!
//! In: the WAL's names and the barriers in it. Out: a [`CompactionPlan`], pure; [`apply`] carries it out. A joint object is
//! the concatenation of whole sealed extents that follow one another, so a host that can only write
//! can make it and nothing is decrypted.
//!
//! # Shape
//! Two passes that share nothing but the names: *merges* put joint objects, *prunes* delete extents
//! that a joint object holds. A joint object lies in one WAL segment and holds at most
//! [`EXTENT_PLAIN_BYTES_MAX`] of WAL. Joining begins when a segment is complete, and earlier only for
//! long runs of extents that differ little in size, so that each byte is written again a few times at
//! most however long the segment stays open.
//!
//! # Invariants
//! - *What is deleted is held elsewhere.* An extent is deleted only after an extent that strictly
//!   contains its range was read back whole, its headers, frames and lengths were found right, and the
//!   object to be deleted was found in it byte for byte. Names and headers are not authenticated without
//!   a key, the same bytes are as good. One that was cut or sealed by itself is not in it so and stays;
//!   when one with the same headers differs, none that the larger contains is deleted. Containment is an
//!   order without circles: whatever several compactions do at the same time, an extent that no other
//!   contains is deleted by none of them.
//! - *A reader never looks in vain.* An extent is deleted only when the one that contains it has been
//!   in the listing for [`CompactionOptions::settle`]: a reader that listed before still finds the
//!   small ones for as long, and a listing in several pages sees one or the other. An object of which
//!   the store does not say when it was made never counts as settled.
//! - *No moment is lost.* Of the greatest times only those of extents that end before a barrier count for
//!   what can be restored from a backup before it, so none of those is joined with the extent in which the
//!   barrier begins.
//!
//! # Durability
//! Dying before a joint object is put changes nothing. Dying after leaves it beside the small ones:
//! both are valid, readers prefer the larger, and the next run prunes. Dying while pruning leaves some
//! of the small ones, which the next run finds. No state is kept anywhere else.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use futures::stream;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::error::{Context, Error, Kind, Result};
use crate::pg::{SegmentNumber, SegmentSize, TimelineId};
use crate::store::{ObjectName, PutOutcome};

use super::Repository;
use super::coverage::{StoredExtent, WalCatalog, range};
use super::extent::ExtentMember;
use super::marks::Barrier;
use super::names::{EXTENT_PLAIN_BYTES_MAX, ExtentName, Object};

/// Piece of an object that is read back at a time.
const READ_BACK_BYTES: usize = 4 << 20;
/// In a segment that is still being written, so many extents of like size are joined.
const OPEN_RUN_MIN: usize = 16;
/// Objects deleted by one call.
const BATCH_OBJECTS: usize = 1000;

/// When to join and when to delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompactionOptions {
    /// Size of the cluster's WAL segments.
    pub segment_size: SegmentSize,
    /// Greatest size of a joint object as stored: what one merge holds in memory.
    pub stored_bytes_max: u64,
    /// How long an extent has been there before it is joined, and a joint one before what it holds
    /// is deleted.
    pub settle: Duration,
    /// Merges at a time; memory is this times `stored_bytes_max`, and as much again to read back.
    pub jobs: usize,
    /// Most merges of one run.
    pub merges_max: usize,
}

impl CompactionOptions {
    /// The defaults: objects of up to 8 MiB, ten minutes to settle, one merge at a time.
    #[must_use]
    pub fn new(segment_size: SegmentSize) -> Self {
        Self {
            segment_size,
            stored_bytes_max: 8 << 20,
            settle: Duration::from_secs(600),
            jobs: 1,
            merges_max: 10_000,
        }
    }
}

/// Extents that become one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The object to be made.
    pub joint: ExtentName,
    /// What it is made of; each begins where the one before ends.
    pub parts: Vec<ExtentName>,
}

/// Extents that another one holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prune {
    /// The one that stays.
    pub holder: ExtentName,
    /// Those that go.
    pub held: Vec<ExtentName>,
}

/// What to join and what to delete.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompactionPlan {
    /// Objects to make.
    pub merges: Vec<Merge>,
    /// Objects to delete.
    pub prunes: Vec<Prune>,
}

impl CompactionPlan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.merges.is_empty() && self.prunes.is_empty()
    }
}

/// Decides what to do at the time `now`. The `barriers` were listed after the WAL: a mark is put before the
/// extent that it speaks of, so none is missing that this WAL needs.
#[must_use]
pub fn plan(
    wal: &WalCatalog,
    barriers: &BTreeSet<(TimelineId, Barrier)>,
    options: &CompactionOptions,
    now: Timestamp,
) -> CompactionPlan {
    let settle = SignedDuration::try_from(options.settle).unwrap_or(SignedDuration::MAX);
    let settled_before = now.checked_sub(settle).unwrap_or(Timestamp::MIN);
    let newest = wal.timelines().last();
    let mut plan = CompactionPlan::default();
    for timeline in wal.timelines() {
        let grows = newest == Some(timeline);
        let joiner = Joiner { wal, barriers, options, settled_before, timeline, grows };
        plan.prunes.extend(joiner.prunes());
        let room = options.merges_max.saturating_sub(plan.merges.len());
        plan.merges.extend(joiner.merges().into_iter().take(room));
    }
    plan
}

/// The decision for one timeline.
struct Joiner<'a> {
    wal: &'a WalCatalog,
    barriers: &'a BTreeSet<(TimelineId, Barrier)>,
    options: &'a CompactionOptions,
    settled_before: Timestamp,
    timeline: TimelineId,
    /// Whether WAL may still arrive.
    grows: bool,
}

impl Joiner<'_> {
    fn is_settled(&self, extent: &StoredExtent) -> bool {
        extent.modified.is_some_and(|modified| modified <= self.settled_before)
    }

    /// Extents come by start, of one start the longest first: of those before, only the one that
    /// reaches furthest can contain the next.
    fn prunes(&self) -> Vec<Prune> {
        let mut prunes: Vec<Prune> = Vec::new();
        let mut furthest: Option<StoredExtent> = None;
        for extent in self.wal.extents(self.timeline) {
            match furthest {
                Some(holder) if strictly_contains(&holder, &extent) => {
                    if !self.is_settled(&holder) {
                        continue;
                    }
                    match prunes.last_mut().filter(|prune| prune.holder == holder.name) {
                        Some(prune) => prune.held.push(extent.name),
                        None => prunes.push(Prune { holder: holder.name, held: vec![extent.name] }),
                    }
                }
                Some(holder) if holder.name.range.end() >= extent.name.range.end() => {}
                _ => furthest = Some(extent),
            }
        }
        prunes
    }

    fn merges(&self) -> Vec<Merge> {
        let size = self.options.segment_size;
        let mut segments: BTreeMap<SegmentNumber, Vec<StoredExtent>> = BTreeMap::new();
        for extent in self.wal.extents(self.timeline) {
            let number = size.number_of(extent.name.range.start());
            // One that crosses a segment's end was not cut by us, or the size given is wrong.
            if extent.name.range.end() <= size.end_of(extent.name.range.start()) {
                segments.entry(number).or_default().push(extent);
            }
        }
        let segments = segments.into_iter().flat_map(|(number, extents)| {
            let whole = size.range_of(number);
            let is_complete = whole.is_some_and(|whole| {
                self.wal.contiguous_end(self.timeline, whole.start()) >= whole.end()
            });
            let min = if is_complete || !self.grows { 2 } else { OPEN_RUN_MIN };
            self.merges_of(&chains(&extents), min)
        });
        segments.collect()
    }

    /// Cuts chains into runs that fit into one object.
    fn merges_of(&self, chains: &[Vec<StoredExtent>], run_min: usize) -> Vec<Merge> {
        let mut merges = Vec::new();
        for chain in chains {
            let mut run: Vec<StoredExtent> = Vec::new();
            for extent in chain {
                if self.holds_barrier(extent) || !self.fits(&run, extent, run_min) {
                    merges.extend(merge(&run, run_min));
                    run.clear();
                }
                // One that is too large or too new for any run is left out of all.
                if self.fits(&[], extent, run_min) {
                    run.push(*extent);
                }
            }
            merges.extend(merge(&run, run_min));
        }
        merges
    }

    /// Whether a barrier begins in the extent; of whatever timeline, for the first segment of one begins with
    /// a copy of its parent's, and one object more costs little.
    fn holds_barrier(&self, extent: &StoredExtent) -> bool {
        let StoredExtent { name: ExtentName { range, .. }, .. } = extent;
        let mut starts = self.barriers.iter().map(|(_, barrier)| barrier.range.start());
        starts.any(|start| range.start() <= start && start < range.end())
    }

    fn fits(&self, run: &[StoredExtent], next: &StoredExtent, run_min: usize) -> bool {
        let plain = |extent: &StoredExtent| extent.name.range.len_bytes();
        let plain_bytes = run.iter().map(plain).sum::<u64>() + plain(next);
        let stored_bytes =
            run.iter().map(|extent| extent.stored_bytes).sum::<u64>() + next.stored_bytes;
        // In an open segment what is large already waits for the segment's end.
        let like = run_min == 2
            || run.iter().chain([next]).map(plain).max() <= Some(self.open_part_bytes());
        plain_bytes <= EXTENT_PLAIN_BYTES_MAX
            && stored_bytes <= self.options.stored_bytes_max
            && like
            && self.is_settled(next)
    }

    fn open_part_bytes(&self) -> u64 {
        let whole = self.options.segment_size.bytes().min(EXTENT_PLAIN_BYTES_MAX);
        whole / OPEN_RUN_MIN as u64
    }
}

fn strictly_contains(holder: &StoredExtent, extent: &StoredExtent) -> bool {
    let (outer, inner) = (holder.name.range, extent.name.range);
    outer.covers(inner) && outer.len_bytes() > inner.len_bytes()
}

/// Extents of one segment as chains in which each begins exactly where the one before ends, without
/// those that another contains.
fn chains(extents: &[StoredExtent]) -> Vec<Vec<StoredExtent>> {
    let mut chains: Vec<Vec<StoredExtent>> = Vec::new();
    let mut end = None;
    for extent in extents {
        let (start, own_end) = (extent.name.range.start(), extent.name.range.end());
        if end.is_some_and(|end| own_end <= end) {
            continue;
        }
        match chains.last_mut().filter(|_| end == Some(start)) {
            Some(chain) => chain.push(*extent),
            None => chains.push(vec![*extent]),
        }
        end = Some(own_end);
    }
    chains
}

fn merge(run: &[StoredExtent], run_min: usize) -> Option<Merge> {
    let (first, last) = (run.first()?.name, run.last()?.name);
    let joint = ExtentName {
        timeline: first.timeline,
        range: range(first.range.start(), last.range.end()),
        time: run.iter().filter_map(|extent| extent.name.time).max(),
    };
    let parts = run.iter().map(|extent| extent.name).collect();
    (run.len() >= run_min).then_some(Merge { joint, parts })
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CompactionReport {
    /// Joint objects that were made.
    pub joint_count: u64,
    /// Extents that were joined in them.
    pub joined_count: u64,
    /// Extents that were deleted.
    pub deleted_count: u64,
    /// Extents whose range a larger one contains, but which are not in it, because they were cut or sealed
    /// by themselves: left alone.
    pub kept_count: u64,
    /// Objects that are not what their names say, each with the reason; nothing that depends on them
    /// was touched.
    pub damaged: Vec<String>,
    /// Why the store would not let us delete; the run ended there.
    pub refused: Option<String>,
}

/// Carries `plan` out; see the module for why dying anywhere loses nothing. What a joint object holds is
/// deleted first: where that is refused nothing is joined, for each joint object would come on top of what
/// it holds.
///
/// # Errors
/// What the store reports, but that it refuses to delete. Damaged objects are reported, not returned; those
/// that vanished since the plan was made (by retention) are passed over.
pub async fn apply(
    repository: &Repository,
    plan: &CompactionPlan,
    options: &CompactionOptions,
) -> Result<CompactionReport> {
    let mut report = CompactionReport::default();
    for prune in &plan.prunes {
        let outcome = delete_held(repository, prune, &mut report).await;
        report.saw(outcome)?;
        if report.refused.is_some() {
            return Ok(report);
        }
    }
    let jobs = options.jobs.max(1);
    // Owned, so that the future can run in a task of its own.
    let mut merges = stream::iter(plan.merges.clone())
        .map(|merge| {
            let repository = repository.clone();
            async move {
                let outcome = join(&repository, &merge).await;
                (merge, outcome)
            }
        })
        .buffer_unordered(jobs);
    while let Some((merge, outcome)) = merges.next().await {
        if report.saw(outcome)? {
            report.joint_count += 1;
            report.joined_count += merge.parts.len() as u64;
        }
    }
    Ok(report)
}

impl CompactionReport {
    /// Whether it was done; notes what is damaged.
    fn saw(&mut self, outcome: Result<()>) -> Result<bool> {
        match outcome {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == Kind::NotFound => Ok(false),
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Unsupported) => {
                self.damaged.push(error.to_string());
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

/// Puts one joint object.
///
/// # Durability
/// Each part is checked before it goes in and the whole after; what was put is read back and
/// compared. Nothing is deleted here.
async fn join(repository: &Repository, merge: &Merge) -> Result<()> {
    let name = repository.name(&Object::Extent(merge.joint))?;
    let mut whole = BytesMut::new();
    for part in &merge.parts {
        whole.extend_from_slice(&read_extent(repository, part).await?);
    }
    let whole = whole.freeze();
    ExtentMember::walk(&merge.joint, &whole)
        .context(|| format!("unable to join WAL extents to '{name}'"))?;
    match repository.store().put_if_absent(&name, whole.clone()).await? {
        PutOutcome::Created => read_back(repository, &name, &whole).await,
        // Another compaction may have joined other parts to the same range.
        PutOutcome::AlreadyThere => read_extent(repository, &merge.joint).await.map(drop),
    }
}

/// Compares what is stored with what was put.
async fn read_back(repository: &Repository, name: &ObjectName, whole: &Bytes) -> Result<()> {
    let found = repository.store().head(name).await?.map(|object| object.size_bytes);
    if found != Some(whole.len() as u64) {
        return Err(differs(name));
    }
    let mut offset = 0_u64;
    for piece in whole.chunks(READ_BACK_BYTES) {
        let end = offset + piece.len() as u64;
        if repository.store().get(name, Some(offset..end)).await? != piece {
            return Err(differs(name));
        }
        offset = end;
    }
    Ok(())
}

fn differs(name: &ObjectName) -> Error {
    Error::new(
        Kind::Corrupt,
        format!("WAL extent '{name}' does not hold what was joined; the parts are kept"),
    )
}

/// An extent object, found to be what its name says as far as can be told without a key.
async fn read_extent(repository: &Repository, extent: &ExtentName) -> Result<Bytes> {
    read_members(repository, extent).await.map(|(body, _)| body)
}

/// The same, with its members.
async fn read_members(
    repository: &Repository,
    extent: &ExtentName,
) -> Result<(Bytes, Vec<ExtentMember>)> {
    let name = repository.name(&Object::Extent(*extent))?;
    let attempted = || format!("unable to use WAL extent '{name}'");
    let body = repository.store().get(&name, None).await.context(attempted)?;
    let members = ExtentMember::walk(extent, &body).context(attempted)?;
    Ok((body, members))
}

/// Deletes what the holder holds.
///
/// # Shape
/// One request an extent, besides the holder; the holder and one extent are in memory.
///
/// # Durability
/// The holder is read back whole first, now, and then each extent: it is there, its members cover its
/// range, and every object that is deleted is some of them byte for byte. When one differs that has the
/// same headers, nobody can tell without a key which of the two is damaged, and nothing is deleted.
async fn delete_held(
    repository: &Repository,
    prune: &Prune,
    report: &mut CompactionReport,
) -> Result<()> {
    let holder = prune.holder.range;
    let contained = |held: &ExtentName| {
        held.timeline == prune.holder.timeline
            && holder.covers(held.range)
            && holder.len_bytes() > held.range.len_bytes()
    };
    assert!(prune.held.iter().all(contained), "a plan deletes WAL that nothing else holds");
    let held = Held::read(repository, &prune.holder).await?;
    let mut names = Vec::new();
    for extent in &prune.held {
        let name = repository.name(&Object::Extent(*extent))?;
        match held.find(repository, extent, &name).await? {
            Finding::Same => names.push(name),
            Finding::Another => report.kept_count += 1,
            Finding::Gone => {}
        }
    }
    for batch in names.chunks(BATCH_OBJECTS) {
        match repository.store().delete(batch).await {
            Ok(()) => report.deleted_count += batch.len() as u64,
            Err(error) if error.kind() == Kind::Denied => {
                report.refused = Some(error.to_string());
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A joint object and what is in it.
struct Held {
    name: ObjectName,
    body: Bytes,
    members: Vec<ExtentMember>,
}

/// What a joint object has of an extent.
enum Finding {
    /// The same bytes.
    Same,
    /// The same WAL, cut or sealed by itself.
    Another,
    /// The extent was deleted meanwhile.
    Gone,
}

impl Held {
    async fn read(repository: &Repository, holder: &ExtentName) -> Result<Self> {
        let name = repository.name(&Object::Extent(*holder))?;
        let (body, members) = read_members(repository, holder).await?;
        Ok(Self { name, body, members })
    }

    /// Compares the stored `extent` with what is here.
    async fn find(
        &self,
        repository: &Repository,
        extent: &ExtentName,
        name: &ObjectName,
    ) -> Result<Finding> {
        let wanted = |member: &&ExtentMember| extent.range.covers(member.name.range);
        let own: Vec<&ExtentMember> = self.members.iter().filter(wanted).collect();
        let (Some(first), Some(last)) = (own.first(), own.last()) else {
            return Ok(Finding::Another);
        };
        let (body, members) = match read_members(repository, extent).await {
            Err(error) if error.kind() == Kind::NotFound => return Ok(Finding::Gone),
            read => read?,
        };
        if self.body.get(first.range.start..last.range.end) == Some(&body[..]) {
            return Ok(Finding::Same);
        }
        if !members.iter().map(ExtentMember::header).eq(own.iter().map(|own| own.header())) {
            return Ok(Finding::Another);
        }
        let holder = &self.name;
        Err(Error::new(
            Kind::Corrupt,
            format!("WAL extents '{holder}' and '{name}' differ in what was joined; both are kept"),
        ))
    }
}

#[cfg(test)]
mod tests;
