//! Files for a data directory that no restore has made: a standby, a server set up by hand, `pg_rewind`.
//!
//! # Invariants
//! - Whoever names a timeline gets the WAL of that timeline. Other timelines that left it say nothing about
//!   which one the server follows: it may have been told to stay (`recovery_target_timeline`), or to take an
//!   older branch than the newest. One that follows a branch asks for the branch's own file first
//!   (`XLogFileReadAnyTLI`) and is given one from the segment of the fork on, even while there is no more in
//!   it than the parent's bytes; so it never comes to what the parent wrote after the fork. Only where a
//!   timeline begins with a segment there are no such bytes: there the parent's file is refused as long as
//!   nothing of the branch is stored, when the server has the branch's history in `pg_wal`, where PostgreSQL
//!   keeps that of the timeline it follows (`readTimeLineHistory`).
//! - A standby alone is stopped at a fork that it has not come to yet: it learns of a new timeline only when
//!   its WAL has ended (`rescanLatestTimeLine`), and having replayed more of the old one it could not follow
//!   any more. One that is past the fork stays there on purpose, and keeps what it has streamed behind it.
//! - A recovery that is given less than a segment, or none, ends there and is promoted. So it is told so only
//!   at the newest WAL: with more of it stored behind a hole, or at a place that leads no further (see
//!   [`marks`](crate::repo::marks)), it gets an error that names the place. A standby only asks again.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Context, Error, Kind, Result};
use crate::file;
use crate::pg::backup_label::{BACKUP_LABEL_BYTES_MAX, BackupLabel};
use crate::pg::control::{ControlFile, PG_CONTROL_FILE_SIZE, XLOG_CONTROL_FILE};
use crate::pg::timeline::PathPart;
use crate::pg::{Lsn, LsnRange, SegmentSize, TimelineHistory, TimelineId};
use crate::repo::interval::barrier_after;
use crate::repo::{list_extents, marks};

use super::asked::Asked;
use super::{Feeder, WalGet, WalGetRequest, data_directory_of, own_file, wal_directory_of};
use crate::restore::chain::Chain;
use crate::restore::run::STANDBY_SIGNAL;
use crate::restore::segments::{self, Identity, Segment};

/// Most timelines that are tried for a newer one, as PostgreSQL does in `findNewestTimeLine`.
const NEWER_TIMELINES_MAX: u32 = 1000;
/// How often a hole is looked at again, and how long apart: extents are stored several at a time, so one
/// before the newest may still be on its way.
const GAP_LOOKS: u32 = 10;
const GAP_PAUSE: Duration = Duration::from_secs(1);
/// What to do where WAL leads no further.
const ENDS_EARLY: &str = "Recovery would end there as if it were the end of the WAL. 'tidemark list' shows what can be restored: use 'tidemark restore' to a target before that place, or a backup taken after it.";

/// What a server does where its WAL ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtEnd {
    /// It asks again: a standby.
    Waits,
    /// It ends its recovery, for good.
    Stops,
}

/// Who asks, as its data directory shows.
struct Server {
    wal_directory: PathBuf,
    segment_size: SegmentSize,
    at_end: AtEnd,
    /// Where its recovery has begun, or is known to have come to.
    replay_start_lsn: Lsn,
}

impl Server {
    /// That of the `pg_wal` that `request` is put into.
    fn of(request: &WalGetRequest) -> Result<Self> {
        let data = data_directory_of(&request.path)?;
        let control = data.join(XLOG_CONTROL_FILE);
        let bytes = file::read(&control, PG_CONTROL_FILE_SIZE as u64)
            .context(|| format!("unable to read '{}'", control.display()))?;
        let at_end = match data.join(STANDBY_SIGNAL).exists() {
            true => AtEnd::Waits,
            false => AtEnd::Stops,
        };
        let control = ControlFile::decode(&bytes)?;
        // As long as there is a label, pg_control may be of a later checkpoint than the backup's start.
        let label = file::read(&data.join("backup_label"), BACKUP_LABEL_BYTES_MAX as u64);
        let label = label.ok().and_then(|bytes| BackupLabel::decode(&bytes).ok());
        let redo_lsn = control.checkpoint.redo_lsn;
        let replay_start_lsn = label.map_or(redo_lsn, |label| label.start_lsn);
        let (wal_directory, segment_size) =
            (wal_directory_of(&request.path)?, control.wal_segment_size);
        Ok(Self { wal_directory, segment_size, at_end, replay_start_lsn })
    }
}

/// The ways through a timeline.
struct Ways {
    timeline: TimelineId,
    /// To the timeline and on in it.
    own: Vec<PathPart>,
    /// To each timeline that descends from it.
    branches: Vec<Branch>,
}

/// A way that leaves the timeline.
struct Branch {
    /// Where it does.
    fork: Lsn,
    path: Vec<PathPart>,
}

impl Ways {
    /// The fork of the newest branch, unless it lies before `position`.
    fn fork_ahead(&self, position: Lsn) -> Option<Lsn> {
        self.branches.last().map(|branch| branch.fork).filter(|fork| *fork >= position)
    }

    /// Whether the timeline begins after `whole`.
    fn begin_behind(&self, whole: LsnRange) -> bool {
        self.own.last().is_some_and(|part| part.start >= whole.end())
    }

    /// Whether `chain`, of the segment `whole`, goes by the name of the timeline: it comes to the timeline,
    /// or to where that begins in the segment.
    fn is_named_for(&self, chain: &Chain, whole: LsnRange) -> bool {
        let begins_at = self.own.last().map(|part| part.start);
        let comes_to_it = begins_at == Some(chain.end()) && !self.begin_behind(whole);
        match chain.timeline_before(chain.end()) {
            Some(timeline) => timeline == self.timeline || comes_to_it,
            None => false,
        }
    }

    /// What WAL behind `position` may be stored as: timelines, each with the first position that is on none
    /// of the ways.
    fn holders_behind(&self, position: Lsn) -> BTreeSet<(TimelineId, Lsn)> {
        let branches = self.branches.iter().filter(|branch| branch.fork > position);
        // The timeline itself is on its own way without an end.
        let later = branches
            .flat_map(|branch| branch.path.iter().filter(|part| part.timeline > self.timeline));
        let parts = self.own.iter().chain(later);
        let holders = parts.map(|part| (part.timeline, part.end.unwrap_or(Lsn(u64::MAX))));
        holders.filter(|(_, end)| *end > position).collect()
    }
}

impl Feeder {
    /// Gives whatever the repository has under that name now.
    pub(super) async fn serve(&self, asked: &Asked<'_>) -> Result<WalGet> {
        let request = asked.request;
        if let Some(number) = request.name.strip_suffix(".history") {
            let number = u32::from_str_radix(number, 16).ok().and_then(TimelineId::new);
            return match number {
                Some(timeline) => self.serve_history(timeline, asked).await,
                None => Ok(WalGet::NotThere),
            };
        }
        let server = Server::of(request)?;
        let size = server.segment_size;
        let named = size.parse_file_name(&request.name);
        let Some((timeline, whole)) =
            named.and_then(|(t, number)| Some((t, size.range_of(number)?)))
        else {
            return Ok(WalGet::NotThere);
        };
        let Some(chain) = self.stored(timeline, whole, &server).await? else {
            return Ok(WalGet::NotThere);
        };
        let pieces = chain.pieces().to_vec();
        let segment = Segment { name: request.name.clone(), timeline, range: whole, pieces };
        if segment.known().end() < whole.end()
            && let Some(own) = own_file(request)?
            && segments::is_held(&self.source, &segment, &own, size).await?
        {
            return Ok(WalGet::NotThere);
        }
        let identity =
            Identity { system_id: self.repository().system_id(), size, owner: self.owner };
        let unfinished = asked.unfinished()?;
        segments::write(&self.source, &segment, unfinished.path(), identity).await?;
        asked.give_made(&unfinished)
    }

    /// Gives the history of `timeline`, if there is one.
    pub(super) async fn serve_history(
        &self,
        timeline: TimelineId,
        asked: &Asked<'_>,
    ) -> Result<WalGet> {
        match self.repository().history_file(timeline).await {
            Ok(content) => {
                let unfinished = asked.unfinished()?;
                let path = unfinished.path();
                fs::write(path, &content)
                    .context(|| format!("unable to write '{}'", path.display()))?;
                asked.give_made(&unfinished)
            }
            Err(error) if error.kind() == Kind::NotFound => Ok(WalGet::NotThere),
            Err(error) => Err(error),
        }
    }

    /// The WAL of the segment `whole` that goes by the name of `timeline`, as far as `server` is given it.
    ///
    /// # Errors
    /// `not found` when the server's recovery would end with it too early.
    async fn stored(
        &self,
        timeline: TimelineId,
        whole: LsnRange,
        server: &Server,
    ) -> Result<Option<Chain>> {
        let ways = self.ways_through(timeline).await?;
        let chain = match server.at_end {
            AtEnd::Waits => {
                let fork = ways.fork_ahead(whole.start());
                let end = fork.map_or(whole.end(), |fork| fork.min(whole.end()));
                let wanted = LsnRange::new(whole.start(), end).filter(|range| !range.is_empty());
                let Some(wanted) = wanted else { return Ok(None) };
                self.longest(&ways, wanted).await?
            }
            AtEnd::Stops if ways.begin_behind(whole) => return Ok(None),
            AtEnd::Stops => {
                self.refuse_past_fork(&ways, server, whole).await?;
                let chain = self.longest_to_the_tip(&ways, whole).await;
                // The marks after the WAL: one that belongs to WAL which is just being stored was put before
                // it (FORMAT.md). It also says more than that WAL is missing behind it.
                self.refuse_barrier(&ways, server.replay_start_lsn, whole).await?;
                chain?
            }
        };
        Ok(ways.is_named_for(&chain, whole).then_some(chain))
    }

    /// The longest chain of `whole`; when it ends before that does, it ends where all the WAL does.
    async fn longest_to_the_tip(&self, ways: &Ways, whole: LsnRange) -> Result<Chain> {
        let mut looks = 0;
        loop {
            let chain = self.longest(ways, whole).await?;
            if chain.end() >= whole.end() {
                return Ok(chain);
            }
            let Some(next) = self.first_stored(ways, chain.end()).await? else { return Ok(chain) };
            if looks == GAP_LOOKS {
                let (end, timeline) = (chain.end(), ways.timeline);
                let message = format!(
                    "the repository has no WAL from {end} to {next} on timeline {timeline}, and more behind it"
                );
                return Err(Error::new(Kind::NotFound, message).hint(ENDS_EARLY));
            }
            looks += 1;
            tokio::time::sleep(GAP_PAUSE).await;
        }
    }

    /// Where the first extent begins that is stored from `position` on, on any of the ways.
    async fn first_stored(&self, ways: &Ways, position: Lsn) -> Result<Option<Lsn>> {
        let mut first = None;
        for (timeline, end) in ways.holders_behind(position) {
            // No further than what was found already.
            let end = first.map_or(end, |first: Lsn| first.min(end));
            let Some(starts) = LsnRange::new(position, end) else { continue };
            let stored = list_extents(self.repository(), timeline, starts).await?;
            first = stored.iter().map(|extent| extent.name.range.start()).chain(first).min();
        }
        Ok(first)
    }

    /// Refuses a segment that begins with the fork of a branch which the server may follow, when it would get
    /// the branch's own file if there were one.
    async fn refuse_past_fork(&self, ways: &Ways, server: &Server, whole: LsnRange) -> Result<()> {
        for Branch { path, .. } in ways.branches.iter().filter(|b| b.fork == whole.start()) {
            let later = path.iter().filter(|part| part.timeline > ways.timeline);
            let timelines: Vec<TimelineId> = later.map(|part| part.timeline).collect();
            let Some(newest) = timelines.last() else { continue };
            let history = server.wal_directory.join(newest.history_file_name());
            if !history.exists() {
                continue;
            }
            let mut is_stored = false;
            for timeline in &timelines {
                is_stored |= !list_extents(self.repository(), *timeline, whole).await?.is_empty();
            }
            if !is_stored {
                let message = format!(
                    "nothing is stored of timeline {newest}, which left timeline {} at {}",
                    ways.timeline,
                    whole.start()
                );
                return Err(Error::new(Kind::NotFound, message).hint(format!(
                    "A server that follows timeline {newest} must not get this file. Wait until its WAL \
                     is in the repository; if this one is to stay on timeline {}, remove '{}'.",
                    ways.timeline,
                    history.display()
                )));
            }
        }
        Ok(())
    }

    /// Refuses the segment in which WAL leads no further for a recovery that begins at `start`.
    async fn refuse_barrier(&self, ways: &Ways, start: Lsn, whole: LsnRange) -> Result<()> {
        let (marks, _) = marks::load(self.repository()).await?;
        match barrier_after(&ways.own, &marks.barriers, start) {
            Some((lsn, kind)) if lsn < whole.end() => {
                let message = format!("WAL leads no further than {lsn}: {kind}");
                Err(Error::new(Kind::NotFound, message).hint(ENDS_EARLY))
            }
            _ => Ok(()),
        }
    }

    /// The longest chain of `wanted`. Bytes before a fork may be held under the branch's name alone.
    async fn longest(&self, ways: &Ways, wanted: LsnRange) -> Result<Chain> {
        let mut longest = self.chain(&ways.own, wanted, wanted.start()).await?;
        for Branch { fork, path } in &ways.branches {
            if longest.end() >= wanted.end() {
                break;
            }
            let chain = self.chain(path, wanted, wanted.start()).await?.cut(*fork);
            if chain.end() > longest.end() {
                longest = chain;
            }
        }
        Ok(longest)
    }

    /// The ways through `timeline`; newer timelines are found as PostgreSQL finds them.
    async fn ways_through(&self, timeline: TimelineId) -> Result<Ways> {
        let own = match self.history(timeline).await? {
            Some(history) => history.path(),
            None => TimelineHistory::first_timeline_only(timeline).path(),
        };
        let mut branches = Vec::new();
        for number in (timeline.get() + 1..).take(NEWER_TIMELINES_MAX as usize) {
            let Some(newer) = TimelineId::new(number) else { break };
            let Some(history) = self.history(newer).await? else { break };
            let path = history.path();
            let left = path.iter().find(|part| part.timeline == timeline);
            if let Some(fork) = left.and_then(|part| part.end) {
                branches.push(Branch { fork, path });
            }
        }
        Ok(Ways { timeline, own, branches })
    }

    async fn history(&self, timeline: TimelineId) -> Result<Option<TimelineHistory>> {
        match self.repository().history(timeline).await {
            Ok(history) => Ok(Some(history)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
