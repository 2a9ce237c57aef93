//! Files for a data directory that no restore has made: a standby, a server set up by hand, `pg_rewind`.
//!
//! # Invariants
//! - Whoever names a timeline gets the WAL of that timeline. Other timelines that left it say nothing about
//!   which one the server follows: it may have been told to stay (`recovery_target_timeline`), or to take an
//!   older branch than the newest. One that follows a branch asks for the branch's own file first
//!   (`XLogFileReadAnyTLI`) and is given one from the segment of the fork on, even while there is no more in
//!   it than the parent's bytes; so it never comes to what the parent wrote after the fork.
//! - A standby alone is stopped at a fork that it has not come to yet: it learns of a new timeline only when
//!   its WAL has ended (`rescanLatestTimeLine`), and having replayed more of the old one it could not follow
//!   any more. One that is past the fork stays there on purpose.

use std::fs;

use crate::error::{Context, Kind, Result};
use crate::file;
use crate::pg::control::{ControlFile, PG_CONTROL_FILE_SIZE, XLOG_CONTROL_FILE};
use crate::pg::timeline::PathPart;
use crate::pg::{Lsn, LsnRange, SegmentSize, TimelineHistory, TimelineId};

use super::{Feeder, WalGet, WalGetRequest, data_directory_of};
use crate::restore::chain::Chain;
use crate::restore::run::STANDBY_SIGNAL;
use crate::restore::segments::{self, Identity, Segment};

/// Most timelines that are tried for a newer one, as PostgreSQL does in `findNewestTimeLine`.
const NEWER_TIMELINES_MAX: u32 = 1000;

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
    segment_size: SegmentSize,
    at_end: AtEnd,
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
        Ok(Self { segment_size: ControlFile::decode(&bytes)?.wal_segment_size, at_end })
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

    /// Whether `chain`, of the segment `whole`, goes by the name of the timeline: it comes to the timeline,
    /// or to where that begins in the segment.
    fn is_named_for(&self, chain: &Chain, whole: LsnRange) -> bool {
        let begins_at = self.own.last().map(|part| part.start);
        let comes_to_it = begins_at == Some(chain.end()) && chain.end() < whole.end();
        match chain.timeline_before(chain.end()) {
            Some(timeline) => timeline == self.timeline || comes_to_it,
            None => false,
        }
    }
}

impl Feeder {
    /// Gives whatever the repository has under that name now.
    pub(super) async fn serve(&self, request: &WalGetRequest) -> Result<WalGet> {
        if let Some(number) = request.name.strip_suffix(".history") {
            let number = u32::from_str_radix(number, 16).ok().and_then(TimelineId::new);
            return match number {
                Some(timeline) => self.serve_history(timeline, request).await,
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
        let identity =
            Identity { system_id: self.repository().system_id(), size, owner: self.owner };
        let written = segments::write(&self.source, &segment, &request.path, identity).await;
        if written.is_err() {
            // PostgreSQL must not find half a segment, and does not look once it is told to stop.
            drop(fs::remove_file(&request.path));
        }
        written.map(|()| WalGet::Found)
    }

    async fn serve_history(&self, timeline: TimelineId, request: &WalGetRequest) -> Result<WalGet> {
        let path = &request.path;
        match self.repository().history_file(timeline).await {
            Ok(content) => {
                let written = fs::write(path, &content);
                if written.is_err() {
                    drop(fs::remove_file(path));
                }
                written.context(|| format!("unable to write '{}'", path.display()))?;
                Ok(WalGet::Found)
            }
            Err(error) if error.kind() == Kind::NotFound => Ok(WalGet::NotThere),
            Err(error) => Err(error),
        }
    }

    /// The WAL of the segment `whole` that goes by the name of `timeline`, as far as `server` is given it.
    async fn stored(
        &self,
        timeline: TimelineId,
        whole: LsnRange,
        server: &Server,
    ) -> Result<Option<Chain>> {
        let ways = self.ways_through(timeline).await?;
        let limit = match server.at_end {
            AtEnd::Waits => ways.fork_ahead(whole.start()),
            AtEnd::Stops => None,
        };
        let end = limit.map_or(whole.end(), |fork| fork.min(whole.end()));
        let wanted = LsnRange::new(whole.start(), end).filter(|range| !range.is_empty());
        let Some(wanted) = wanted else { return Ok(None) };
        let chain = self.longest(&ways, wanted).await?;
        Ok(ways.is_named_for(&chain, whole).then_some(chain))
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
