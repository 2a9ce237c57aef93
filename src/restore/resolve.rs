//! From a target to a base backup, a stretch of WAL and the record at which to stop.
//!
//! In: what a repository holds (names and public facts only) and a way to read single extents. Out: a
//! [`Resolved`] target, or an error that names the nearest instants that can be reached.
//!
//! # Invariants
//! - The base backup is consistent before the stop: its end lies at or before the end of the last record
//!   that is replayed. For a time it also began before the stop: a commit that the target excludes and
//!   that is older than the backup would be in its files, where replay cannot leave it out. Which one is chosen is settled by positions; times of different clocks (server,
//!   this host) only decide which is tried first.
//! - WAL from the backup's start to the stop is there without a hole, and the record at which Postgres
//!   stops is complete in it, so "recovery ended before configured recovery target was reached" cannot
//!   happen.
//! - No chain leads past a barrier ([`crate::repo::marks`]), unless its backup
//!   began behind it: the WAL does not hold all changes from there on.
//! - Names decide, extents confirm: an extent whose greatest time is not after the target holds no record
//!   to stop at, so only extents on both sides of the target are read. A transaction or a restore point
//!   has no place in names; the WAL is searched for it, newest backup first.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use jiff::Timestamp;

use crate::error::{Error, Kind, Result};
use crate::pg::timeline::PathPart;
use crate::pg::{Lsn, LsnRange, PgTime, SegmentSize, TimelineHistory, TimelineId};
use crate::repo::coverage::{Gap, WalCatalog};
use crate::repo::interval::{barrier_after, damage_before};
use crate::repo::marks::{Barrier, BarrierKind};
use crate::repo::names::BackupId;
use crate::wal::Landmark;

use super::chain::{Chain, ChainEnd, Piece};
use super::plan::{Moment, Request};
use super::scan::{self, Remembering, WalSource};
use super::settings::Stop;
use super::target::{Edge, Target, TimelineChoice};

/// Extents with a commit that are looked at for the commit before or after the stop.
const TIMED_EXTENTS_MAX: usize = 8;

/// A complete backup, as far as choosing one needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) id: BackupId,
    /// Of its end; that of its start is in its id.
    pub(crate) timeline: TimelineId,
    pub(crate) start_lsn: Lsn,
    pub(crate) end_lsn: Lsn,
    pub(crate) start_time: Timestamp,
    pub(crate) end_time: Timestamp,
    pub(crate) segment_size: SegmentSize,
}

/// Up to where a silent cluster is known to be complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CaughtUp {
    pub(crate) timeline: TimelineId,
    pub(crate) durable_end_lsn: Lsn,
    /// No commit of this time or before lies after `durable_end_lsn`.
    pub(crate) time: Timestamp,
}

/// What a repository holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holdings {
    pub(crate) bases: Vec<Base>,
    pub(crate) wal: WalCatalog,
    pub(crate) histories: BTreeMap<TimelineId, TimelineHistory>,
    pub(crate) caught_up: Option<CaughtUp>,
    /// Places that only a backup taken later leads past.
    pub(crate) barriers: BTreeSet<(TimelineId, Barrier)>,
}

/// A target found.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    pub(crate) base: Base,
    pub(crate) chain: Chain,
    pub(crate) timeline: TimelineId,
    pub(crate) stop: Stop,
    pub(crate) applied_end: Lsn,
    /// First position after the WAL that Postgres must be given to stop there.
    pub(crate) needed_end: Lsn,
    /// Set when replay goes to the end of the WAL.
    pub(crate) last_record: Option<LsnRange>,
    pub(crate) commit_before: Option<Moment>,
    pub(crate) commit_after: Option<Moment>,
    pub(crate) notes: Vec<String>,
}

/// Where a target lies on one chain.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    At {
        stop: Stop,
        applied_end: Lsn,
        needed_end: Lsn,
    },
    /// All of the chain is before it, or at it.
    EndOfChain,
    /// Later than anything the chain is known to hold.
    Beyond,
    /// Not on this chain.
    Nowhere,
}

impl Holdings {
    /// Every timeline there is any trace of.
    fn timelines(&self) -> impl Iterator<Item = TimelineId> {
        let bases = self.bases.iter().map(|base| base.timeline);
        self.histories.keys().copied().chain(self.wal.timelines()).chain(bases)
    }

    fn path(&self, timeline: TimelineId) -> Vec<PathPart> {
        match self.histories.get(&timeline) {
            Some(history) => history.path(),
            None => TimelineHistory::first_timeline_only(timeline).path(),
        }
    }

    /// The timeline whose path is followed.
    fn choose_timeline(&self, request: &Request) -> Result<TimelineId> {
        let known = || {
            let mut all: Vec<TimelineId> = self.timelines().collect();
            all.sort_unstable();
            all.dedup();
            all
        };
        let forced = || match request.backup {
            Some(id) => self.bases.iter().find(|base| base.id == id),
            None => self.bases.iter().max_by_key(|base| base.id),
        };
        match request.timeline {
            TimelineChoice::Exactly(timeline) if known().contains(&timeline) => Ok(timeline),
            TimelineChoice::Exactly(timeline) => {
                let names: Vec<String> = known().iter().map(ToString::to_string).collect();
                Err(Error::new(
                    Kind::NotFound,
                    format!("unable to follow timeline {timeline}: the repository has none of it"),
                )
                .hint(format!("Its timelines are {}.", names.join(", "))))
            }
            TimelineChoice::Current => {
                forced().map(|base| base.timeline).ok_or_else(|| no_backup(request))
            }
            TimelineChoice::Latest => known().last().copied().ok_or_else(|| no_backup(request)),
        }
    }

    /// The backups on `path`, the one that ends last first; only the requested one if there is one.
    fn candidates(&self, request: &Request, path: &[PathPart]) -> Result<Vec<&Base>> {
        let mut bases: Vec<&Base> =
            self.bases.iter().filter(|base| is_on_path(base, path)).collect();
        bases.sort_by_key(|base| std::cmp::Reverse((base.end_lsn, base.id)));
        if let Some(id) = request.backup {
            if !self.bases.iter().any(|base| base.id == id) {
                let message = format!("unable to restore backup '{id}': there is no such backup");
                return Err(Error::new(Kind::NotFound, message)
                    .hint("Run 'tidemark list' to see the backups."));
            }
            bases.retain(|base| base.id == id);
            if bases.is_empty() {
                let message = format!(
                    "unable to restore backup '{id}' on the timeline asked for: it was taken on a branch that is not an ancestor"
                );
                return Err(Error::new(Kind::NotFound, message)
                    .hint("Name its timeline with --timeline, or 'current'."));
            }
        }
        if bases.is_empty() { Err(no_backup(request)) } else { Ok(bases) }
    }

    /// The WAL from the start of the segment in which `base` begins, or from as near to its start as
    /// there is any, for as far as `base` leads.
    fn chain_of(&self, base: &Base, path: &[PathPart]) -> Chain {
        let starts = [
            base.segment_size.start_of(base.start_lsn),
            base.start_lsn.align_down(scan::WAL_PAGE_BYTES),
            base.start_lsn,
        ];
        let chains = starts.map(|start| Chain::follow(&self.wal, path, start));
        let [.., last] = &chains;
        let chain =
            chains.iter().find(|chain| chain.end() > base.start_lsn).unwrap_or(last).clone();
        match barrier_after(path, &self.barriers, base.start_lsn) {
            Some((lsn, kind)) => chain.barred_at(lsn, kind),
            None => chain,
        }
    }
}

/// Whether the backup starts and ends on the path; that of a standby may do so on two timelines of it.
pub(super) fn is_on_path(base: &Base, path: &[PathPart]) -> bool {
    let part_of = |timeline| path.iter().find(|part| part.timeline == timeline);
    let starts = part_of(base.id.timeline()).is_some_and(|part| {
        part.start <= base.start_lsn && part.end.is_none_or(|end| base.start_lsn < end)
    });
    let ends = part_of(base.timeline).is_some_and(|part| {
        part.start <= base.end_lsn && part.end.is_none_or(|end| base.end_lsn <= end)
    });
    starts && ends
}

fn no_backup(request: &Request) -> Error {
    let message = format!(
        "unable to restore to {}: there is no complete backup to begin with",
        request.target
    );
    Error::new(Kind::NotFound, message)
        .hint("Run 'tidemark list'; take a backup with 'tidemark backup'.")
}

/// Finds where `request` leads.
///
/// # Errors
/// `not found` when it cannot be reached, with the nearest instants that can; `corrupt` and whatever the
/// store answers when an extent cannot be read.
pub(crate) async fn resolve<S: WalSource>(
    holdings: &Holdings,
    source: &S,
    request: &Request,
) -> Result<Resolved> {
    let timeline = holdings.choose_timeline(request)?;
    let path = holdings.path(timeline);
    let bases = holdings.candidates(request, &path)?;
    let source = &Remembering::new(source);
    let search = Search { holdings, source, request, path: &path, timeline };
    search.run(&bases).await
}

struct Search<'a, S> {
    holdings: &'a Holdings,
    source: &'a S,
    request: &'a Request,
    path: &'a [PathPart],
    timeline: TimelineId,
}

impl<S: WalSource> Search<'_, S> {
    async fn run(&self, bases: &[&Base]) -> Result<Resolved> {
        let mut notes = Vec::new();
        // WAL already searched in vain for a transaction or a restore point begins here.
        let mut searched_from: Option<Lsn> = None;
        let mut beyond: Option<Chain> = None;
        for base in self.in_order(bases) {
            let chain = self.holdings.chain_of(base, self.path);
            if chain.end() < base.end_lsn {
                let why = match chain.stopped_by() {
                    ChainEnd::Barrier(lsn, kind) => format!("from {lsn} on {kind}"),
                    _ => format!("WAL it needs is missing from {} on", chain.end()),
                };
                notes.push(format!("backup {} is passed over: {why}", base.id));
                continue;
            }
            if let Target::Time { at, .. } = self.request.target
                && self.holds_later_commits(base, at).await?
            {
                continue;
            }
            let place = self.place(base, &chain, searched_from).await?;
            match place {
                // It is there, but this backup is not consistent yet: an earlier one is needed.
                Place::At { applied_end, .. } if applied_end < base.end_lsn => {}
                Place::Nowhere => searched_from = Some(base.start_lsn),
                Place::Beyond => {
                    beyond = Some(chain);
                    break;
                }
                place => return self.finish(base, chain, place, notes).await,
            }
        }
        Err(self.unreachable(bases, beyond.as_ref(), &notes))
    }

    /// Whether a commit that a stop at `at` excludes came before `base`, and so is in its files. The WAL
    /// from before the backup tells; where there is none, the time at which the backup began.
    async fn holds_later_commits(&self, base: &Base, at: Timestamp) -> Result<bool> {
        let target = &self.request.target;
        let damage = damage_before(self.path, &self.holdings.barriers, base.start_lsn);
        // Of damaged WAL no time is known: it is as if it were not there.
        let read_from = damage.unwrap_or(Lsn(0)).min(base.start_lsn);
        let mut position = base.start_lsn;
        for part in self.path.iter().rev().filter(|part| part.start < base.start_lsn) {
            let until = part.end.map_or(position, |end| end.min(position));
            let runs = self.holdings.wal.coverage(part.timeline).iter().rev();
            let mut reaching = runs.filter(|run| run.start() < until && until <= run.end());
            let Some(run) = reaching.next() else { break };
            let from = run.start().max(part.start).max(read_from);
            let extents: Vec<_> =
                self.holdings.wal.extents_in(part.timeline, span(from, until)).collect();
            for extent in extents.iter().rev() {
                let Some(time) = extent.name.time else { continue };
                if !target.stops_before_time(time) {
                    return Ok(false);
                }
                if extent.name.range.end() <= until {
                    return Ok(true);
                }
                // Its greatest time may be that of a commit in the backup or after it.
                let start = base.segment_size.start_of(extent.name.range.start()).max(from);
                let chain = Chain::follow(&self.holdings.wal, self.path, start).cut(until);
                let mut is_later: Option<bool> = None;
                self.landmarks(base, &chain, span(start, until), &mut |landmark| {
                    if let Some(time) = landmark.transaction_time() {
                        is_later = Some(target.stops_before_time(time));
                    }
                    ControlFlow::Continue(())
                })
                .await?;
                if let Some(is_later) = is_later {
                    return Ok(is_later);
                }
            }
            if from > part.start {
                break;
            }
            position = part.start;
        }
        Ok(at < base.start_time)
    }

    /// The backups worth trying, best first.
    fn in_order<'b>(&self, bases: &[&'b Base]) -> Vec<&'b Base> {
        let mut bases = bases.to_vec();
        match &self.request.target {
            Target::Time { at, .. } => {
                // One that ended after the target by this host's clock is the last resort: clocks differ.
                let (mut before, after): (Vec<&Base>, Vec<&Base>) =
                    bases.into_iter().partition(|base| base.end_time <= *at);
                before.extend(after.into_iter().rev());
                before
            }
            Target::Lsn { at, .. } => {
                bases.retain(|base| base.end_lsn <= *at);
                bases
            }
            _ => bases,
        }
    }

    /// Where the target lies on the chain of `base`.
    async fn place(&self, base: &Base, chain: &Chain, searched_from: Option<Lsn>) -> Result<Place> {
        match &self.request.target {
            Target::Latest => Ok(Place::EndOfChain),
            Target::Immediate => Ok(Place::At {
                stop: Stop::Immediate,
                applied_end: base.end_lsn,
                needed_end: base.end_lsn,
            }),
            Target::Time { at, .. } => self.place_of_time(base, chain, *at).await,
            Target::Lsn { at, edge } => self.place_of_lsn(base, chain, *at, *edge).await,
            Target::Xid { .. } | Target::Name { .. } => {
                let end = searched_from.map_or(chain.end(), |searched| searched.min(chain.end()));
                self.place_by_search(base, chain, end).await
            }
        }
    }

    async fn place_of_time(&self, base: &Base, chain: &Chain, at: Timestamp) -> Result<Place> {
        let target = &self.request.target;
        let mut newest: Option<PgTime> = None;
        for piece in timed_pieces(chain, base.start_lsn) {
            // The time of an extent that the chain leaves before its end may belong to a commit outside.
            let certain = !is_cut(&piece);
            let time = piece.extent.time;
            let may_stop = time.is_some_and(|time| target.stops_before_time(time));
            if certain {
                newest = newest.max(time);
            }
            if certain && !may_stop {
                continue;
            }
            let mut found: Option<LsnRange> = None;
            let span = span(piece.range.start().max(base.start_lsn), piece.range.end());
            self.landmarks(base, chain, span, &mut |landmark| {
                let time = landmark.transaction_time();
                newest = newest.max(time);
                let stops = time.is_some_and(|time| target.stops_before_time(time));
                if stops && landmark.range().start() >= base.start_lsn {
                    found = Some(landmark.range());
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })
            .await?;
            if let Some(range) = found {
                return Ok(Place::At {
                    stop: Stop::Before { lsn: range.start() },
                    applied_end: range.start(),
                    needed_end: range.end(),
                });
            }
        }
        let complete_until = newest.and_then(PgTime::to_timestamp).max(self.caught_up(chain));
        Ok(if complete_until.is_some_and(|time| at <= time) {
            Place::EndOfChain
        } else {
            Place::Beyond
        })
    }

    /// The time up to which `chain` is known to hold every commit, beyond its own commits.
    fn caught_up(&self, chain: &Chain) -> Option<Timestamp> {
        let at_tip = chain.stopped_by() == ChainEnd::Tip;
        let caught_up = self.holdings.caught_up.filter(|caught_up| {
            at_tip
                && caught_up.timeline == self.timeline
                && caught_up.durable_end_lsn <= chain.end()
        });
        caught_up.map(|caught_up| caught_up.time)
    }

    async fn place_of_lsn(&self, base: &Base, chain: &Chain, at: Lsn, edge: Edge) -> Result<Place> {
        if at > chain.end() {
            return Ok(Place::Beyond);
        }
        let near = scan::neighbours(self.source, chain, base.segment_size, at).await?;
        Ok(match (near.after, edge) {
            (Some(record), Edge::Inclusive) => Place::At {
                stop: Stop::After { lsn: at },
                applied_end: record.end(),
                needed_end: record.end(),
            },
            (Some(record), Edge::Exclusive) => {
                let applied_end = near.before.map_or(at, |before| before.end().min(record.start()));
                match near.before {
                    // The record behind the stop belongs to a later timeline than all that is replayed,
                    // and PostgreSQL, which follows that one, would never see it.
                    Some(before)
                        if chain.timeline_before(applied_end)
                            != chain.timeline_before(record.end()) =>
                    {
                        let stop = Stop::After { lsn: before.start() };
                        Place::At { stop, applied_end, needed_end: applied_end }
                    }
                    _ => Place::At {
                        stop: Stop::Before { lsn: at },
                        applied_end,
                        needed_end: record.end(),
                    },
                }
            }
            (None, _) => Place::EndOfChain,
        })
    }

    /// Reads the WAL of `base` up to `end` for a transaction's end or a restore point.
    async fn place_by_search(&self, base: &Base, chain: &Chain, end: Lsn) -> Result<Place> {
        let target = &self.request.target;
        let mut place = Place::Nowhere;
        self.landmarks(base, chain, span(base.start_lsn, end), &mut |landmark| {
            let (range, edge) = match (&landmark, target) {
                (
                    Landmark::Commit { xid, range, .. } | Landmark::Abort { xid, range, .. },
                    Target::Xid { xid: wanted, edge },
                ) if xid == wanted => (*range, *edge),
                (Landmark::RestorePoint { name, range, .. }, Target::Name { name: wanted })
                    if name == wanted =>
                {
                    (*range, Edge::Inclusive)
                }
                _ => return ControlFlow::Continue(()),
            };
            let (stop, applied_end) = match edge {
                Edge::Inclusive => (Stop::After { lsn: range.start() }, range.end()),
                Edge::Exclusive => (Stop::Before { lsn: range.start() }, range.start()),
            };
            place = Place::At { stop, applied_end, needed_end: range.end() };
            ControlFlow::Break(())
        })
        .await?;
        Ok(place)
    }

    async fn landmarks(
        &self,
        base: &Base,
        chain: &Chain,
        span: LsnRange,
        each: &mut (dyn FnMut(Landmark) -> ControlFlow<()> + Send),
    ) -> Result<()> {
        scan::landmarks(self.source, chain, base.segment_size, span, each).await
    }

    /// Adds what the plan says about the stop.
    async fn finish(
        &self,
        base: &Base,
        chain: Chain,
        place: Place,
        mut notes: Vec<String>,
    ) -> Result<Resolved> {
        let (stop, applied_end, needed_end, last_record) = match place {
            Place::At { stop, applied_end, needed_end } => (stop, applied_end, needed_end, None),
            _ => {
                let near =
                    scan::neighbours(self.source, &chain, base.segment_size, chain.end()).await?;
                let applied_end = near.before.map_or(chain.end(), LsnRange::end);
                (Stop::EndOfWal, applied_end, chain.end(), near.before)
            }
        };
        if let (Target::Lsn { at, .. }, Stop::EndOfWal) = (&self.request.target, &stop) {
            notes.push(format!(
                "no record starts at {at} or after it yet: all WAL before it is replayed"
            ));
        }
        match chain.stopped_by() {
            ChainEnd::Gap(Gap { timeline, missing }) if stop == Stop::EndOfWal => {
                notes.push(format!("WAL {missing} of timeline {timeline} is missing; what is stored after it cannot be reached from this backup"));
            }
            ChainEnd::Barrier(lsn, kind) if stop == Stop::EndOfWal => {
                notes.push(format!("from {lsn} on {kind}; what is stored after it cannot be reached from this backup"));
            }
            _ => {}
        }
        let (commit_before, commit_after) = self.commits_around(base, &chain, applied_end).await?;
        let timeline =
            chain.timeline_before(applied_end.max(base.end_lsn)).unwrap_or(base.timeline);
        Ok(Resolved {
            base: base.clone(),
            timeline,
            stop,
            applied_end,
            needed_end,
            last_record,
            commit_before,
            commit_after,
            notes,
            chain,
        })
    }

    /// The last commit that ends at `position` or before, and the first that ends after it.
    async fn commits_around(
        &self,
        base: &Base,
        chain: &Chain,
        position: Lsn,
    ) -> Result<(Option<Moment>, Option<Moment>)> {
        let timed = timed_pieces(chain, base.start_lsn);
        let split = timed.partition_point(|piece| piece.range.start() < position);
        let (earlier, later) = timed.split_at_checked(split).unwrap_or_default();
        let (mut before, mut after) = (None, None);
        for piece in earlier.iter().rev().take(TIMED_EXTENTS_MAX) {
            self.commits_in(base, chain, piece, &mut |moment: Moment| {
                if moment.end_lsn <= position {
                    before = before.max_by_lsn(moment);
                } else if after.is_none() {
                    after = Some(moment);
                }
            })
            .await?;
            if before.is_some() {
                break;
            }
        }
        for piece in later.iter().take(TIMED_EXTENTS_MAX) {
            if after.is_some() {
                break;
            }
            self.commits_in(base, chain, piece, &mut |moment: Moment| {
                if after.is_none() && moment.end_lsn > position {
                    after = Some(moment);
                }
            })
            .await?;
        }
        Ok((before, after))
    }

    async fn commits_in(
        &self,
        base: &Base,
        chain: &Chain,
        piece: &Piece,
        each: &mut (dyn FnMut(Moment) + Send),
    ) -> Result<()> {
        let span = span(piece.range.start().max(base.start_lsn), piece.range.end());
        self.landmarks(base, chain, span, &mut |landmark| {
            if let Landmark::Commit { xid, time, range } = landmark {
                each(Moment::new(xid, time, range));
            }
            ControlFlow::Continue(())
        })
        .await
    }

    /// Why the target cannot be reached, and what can.
    fn unreachable(&self, bases: &[&Base], beyond: Option<&Chain>, notes: &[String]) -> Error {
        let target = &self.request.target;
        let intervals: Vec<Interval> = bases
            .iter()
            .map(|base| Interval::of(base, &self.holdings.chain_of(base, self.path), self))
            .collect();
        let (why, hint) = match target {
            Target::Time { at, .. } => why_not_time(*at, &intervals, beyond),
            Target::Lsn { at, .. } => why_not_lsn(*at, &intervals, beyond),
            Target::Xid { .. } => (
                "no commit or abort of it is in the WAL after the first backup".to_owned(),
                "Check the number; it may have rolled back without a trace, or still be running."
                    .to_owned(),
            ),
            Target::Name { .. } => (
                "no restore point of that name is in the WAL after the first backup".to_owned(),
                "Names are compared exactly, with upper and lower case.".to_owned(),
            ),
            Target::Latest | Target::Immediate => (
                "no backup has the WAL it needs".to_owned(),
                "Run 'tidemark verify' to see what is missing, and take a backup.".to_owned(),
            ),
        };
        let elsewhere = self.elsewhere().map_or_else(String::new, |timeline| {
            format!(" On timeline {timeline} it can be reached: add --timeline {timeline}.")
        });
        let notes: String = notes.iter().map(|note| format!("; {note}")).collect();
        Error::new(
            Kind::NotFound,
            format!("unable to restore to {target} on timeline {}: {why}{notes}", self.timeline),
        )
        .hint(hint + &elsewhere)
    }

    /// Another timeline whose recoverable intervals hold the target.
    fn elsewhere(&self) -> Option<TimelineId> {
        let mut others: Vec<TimelineId> =
            self.holdings.timelines().filter(|other| *other != self.timeline).collect();
        others.sort_unstable();
        others.dedup();
        others.into_iter().rev().find(|other| {
            let path = self.holdings.path(*other);
            let bases = self.holdings.bases.iter().filter(|base| is_on_path(base, &path));
            bases.map(|base| Interval::of(base, &self.holdings.chain_of(base, &path), self)).any(
                |interval| match &self.request.target {
                    Target::Time { at, .. } => interval.holds_time(*at),
                    Target::Lsn { at, .. } => interval.holds_lsn(*at),
                    _ => false,
                },
            )
        })
    }
}

/// Keeps the commit that stands last in the WAL.
trait MaxByLsn {
    fn max_by_lsn(self, other: Moment) -> Self;
}

impl MaxByLsn for Option<Moment> {
    fn max_by_lsn(self, other: Moment) -> Self {
        match self {
            Some(held) if held.lsn >= other.lsn => Some(held),
            _ => Some(other),
        }
    }
}

/// What can be reached from one backup.
#[derive(Clone, Copy, Debug)]
struct Interval {
    /// The end of the backup, or the newest commit known in its own WAL if that is later.
    from_time: Timestamp,
    /// Before the end of the backup where nothing is known of the time after it; `None` when not even
    /// its own WAL is there.
    until_time: Option<Timestamp>,
    from_lsn: Lsn,
    until_lsn: Lsn,
}

impl Interval {
    fn of<S: WalSource>(base: &Base, chain: &Chain, search: &Search<'_, S>) -> Self {
        let timed = timed_pieces(chain, base.end_lsn);
        let newest: Option<PgTime> =
            timed.iter().filter(|piece| !is_cut(piece)).filter_map(|piece| piece.extent.time).max();
        let until_time = newest.and_then(PgTime::to_timestamp).max(search.caught_up(chain));
        let own = timed_pieces(chain, base.start_lsn)
            .into_iter()
            .filter(|piece| !is_cut(piece) && piece.range.end() <= base.end_lsn);
        let own = own.filter_map(|piece| piece.extent.time).max().and_then(PgTime::to_timestamp);
        Self {
            from_time: own.map_or(base.end_time, |time| time.max(base.end_time)),
            until_time: until_time.max(Some(base.id.start_time())),
            from_lsn: base.end_lsn,
            until_lsn: chain.end(),
        }
        .unless_broken(base, chain)
    }

    /// A backup without its WAL reaches nothing.
    fn unless_broken(self, base: &Base, chain: &Chain) -> Self {
        if chain.end() < base.end_lsn {
            Self { until_time: None, until_lsn: Lsn::INVALID, ..self }
        } else {
            self
        }
    }

    fn holds_time(&self, at: Timestamp) -> bool {
        self.from_time <= at && self.until_time.is_some_and(|until| at <= until)
    }

    fn holds_lsn(&self, at: Lsn) -> bool {
        self.from_lsn <= at && at <= self.until_lsn
    }
}

fn why_not_time(at: Timestamp, intervals: &[Interval], beyond: Option<&Chain>) -> (String, String) {
    let reaches_time = |interval: &&Interval| interval.until_time >= Some(interval.from_time);
    let usable = || intervals.iter().filter(reaches_time);
    let before =
        usable().filter_map(|interval| interval.until_time).filter(|until| *until < at).max();
    let after = usable().map(|interval| interval.from_time).filter(|from| *from > at).min();
    let why = match (before, after, beyond.map(Chain::stopped_by)) {
        (None, Some(_), _) => "it is before the end of the first backup".to_owned(),
        (_, _, Some(ChainEnd::Gap(Gap { timeline, missing }))) => {
            format!("it is in a gap or behind it: WAL {missing} of timeline {timeline} is missing")
        }
        (_, _, Some(ChainEnd::Barrier(lsn, kind))) => behind_barrier(lsn, kind),
        (Some(_), Some(_), _) => {
            "it is between the WAL of one backup and the end of the next".to_owned()
        }
        _ => "it is after the newest durable commit".to_owned(),
    };
    let mut hint = String::from("Nearest reachable:");
    if let Some(before) = before {
        hint += &format!(" before it {before}");
    }
    if let Some(after) = after {
        hint += &format!("{} after it {after}", if before.is_some() { "," } else { "" });
    }
    let whole = intervals.iter().any(|interval| interval.until_time.is_some());
    if before.is_none() && after.is_none() && whole {
        hint = "Nothing is known of the time after the backup yet; it can be restored with \
                --to-immediate or --to-latest"
            .to_owned();
    } else if before.is_none() && after.is_none() {
        hint = "No backup can be restored to any time; run 'tidemark verify'".to_owned();
    }
    (why, hint + ".")
}

fn behind_barrier(lsn: Lsn, kind: BarrierKind) -> String {
    format!("it is after {lsn}, from where on {kind}, and before the end of a backup taken later")
}

fn why_not_lsn(at: Lsn, intervals: &[Interval], beyond: Option<&Chain>) -> (String, String) {
    let usable = || intervals.iter().filter(|interval| interval.until_lsn.is_valid());
    let before = usable().map(|interval| interval.until_lsn).filter(|until| *until < at).max();
    let after = usable().map(|interval| interval.from_lsn).filter(|from| *from > at).min();
    let why = match (before, after, beyond.map(Chain::stopped_by)) {
        (None, Some(_), _) => "it is before the end of the first backup".to_owned(),
        (_, _, Some(ChainEnd::Gap(Gap { timeline, missing }))) => {
            format!("it is in a gap or behind it: WAL {missing} of timeline {timeline} is missing")
        }
        (_, _, Some(ChainEnd::Barrier(lsn, kind))) => behind_barrier(lsn, kind),
        _ => "it is after the end of the durable WAL".to_owned(),
    };
    let sides =
        [before.map(|lsn| format!("before it {lsn}")), after.map(|lsn| format!("after it {lsn}"))];
    let sides: Vec<String> = sides.into_iter().flatten().collect();
    (why, format!("Nearest reachable: {}.", sides.join(", ")))
}

/// The pieces that hold the end of a commit or abort, as far as they lie after `from`.
fn timed_pieces(chain: &Chain, from: Lsn) -> Vec<Piece> {
    let pieces = chain.pieces().iter();
    let timed = |piece: &&Piece| piece.extent.time.is_some() && piece.range.end() > from;
    pieces.filter(timed).copied().collect()
}

/// Whether the chain leaves the extent before its end.
fn is_cut(piece: &Piece) -> bool {
    piece.range.end() < piece.extent.range.end()
}

/// `[start, end)`, empty when they are the wrong way round.
fn span(start: Lsn, end: Lsn) -> LsnRange {
    LsnRange::new(start, end.max(start)).unwrap_or_else(|| unreachable!("end is not before start"))
}
