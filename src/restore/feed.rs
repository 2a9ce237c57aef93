//! `wal-get`: one file for PostgreSQL's `restore_command`, and the one that fetches ahead of it.
//!
//! # Invariants
//! See [`handover`](super::handover). In short: a segment that the restore needs is handed over whole, or
//! PostgreSQL is told to abort; it never takes trouble with the store for the end of the WAL. Only a
//! standby may be told that there is nothing yet, for it [asks again](asks_again).
//!
//! PostgreSQL prefers what it is given to the file of that name in `pg_wal`, and deletes that
//! (`KeepFileRestoredFromArchive` in `xlogarchive.c`, 13 to 18). That file may have more than the repository:
//! WAL that was streamed since, or saved from the lost server. So who would be given less than a whole segment,
//! and has the same already, is told that there is none: then PostgreSQL takes its own (`XLogFileReadAnyTLI`).
//! What is beyond the repository in it is replayed by a standby, and by a recovery without a target. A planned
//! restore has one, be it the last record that the repository has: PostgreSQL ends there.

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use futures::StreamExt as _;

use crate::clock::Clock;
use crate::error::{Context, Error, Kind, Result};
use crate::pg::timeline::PathPart;
use crate::pg::{Lsn, LsnRange, SegmentNumber, TimelineId};
use crate::repo::patience::insist;
use crate::repo::{Reader, Repository, WalCatalog, list_extents};

use super::advised;
use super::chain::Chain;
use super::directory::Owner;
use super::handover::{Folder, Settings, remove_if_there};
use super::run::STANDBY_SIGNAL;
use super::segments::{self, Identity, Segment};
use super::source::RepositoryWal;
use super::tablespaces::Watch;

mod asked;
mod unplanned;

use asked::Asked;

/// Bytes of WAL kept ahead of PostgreSQL: ten seconds of replay at a fair rate.
const AHEAD_BYTES: u64 = 256 << 20;
/// Segments being fetched at once.
const FETCHES: usize = 2;
/// A fetcher whose segments nobody takes for so long has no server any more.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// How long a fetcher that was just started may take to be ready.
const START_MAX: Duration = Duration::from_secs(20);
/// Pause between two looks into the spool by who waits for a segment; a rename is seen this late.
const LOOK_EVERY: Duration = Duration::from_millis(3);
/// Pause between two looks whether the server is still there, and two notes of what it waits for.
const LOOK_FOR_SERVER_EVERY: Duration = Duration::from_secs(1);
/// Who waits for so long says so in the server's log, where else there would be nothing.
const SILENT_MAX: Duration = Duration::from_secs(10);
/// Pause between two looks by who fetches ahead.
const REST: Duration = Duration::from_millis(20);

/// What `restore_command` is asked for.
#[derive(Clone, Debug)]
pub struct WalGetRequest {
    /// Name of the file, PostgreSQL's `%f`.
    pub name: String,
    /// Where to put it, PostgreSQL's `%p`: inside `pg_wal`.
    pub path: PathBuf,
}

/// What became of a request; a failure is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalGet {
    /// The file is there.
    Found,
    /// The file is not wanted, or the repository does not have it: exit status 1.
    NotThere,
}

/// Gives PostgreSQL the file it asks for.
///
/// `fetcher` is a command that runs [`prefetch`] for the same request in a process of its own, started
/// when nobody fetches ahead yet. `open` opens the repository; most of the time it is not called.
///
/// # Errors
/// Whatever keeps a wanted file away; the process must then exit with
/// [`WAL_GET_FATAL_EXIT`](super::WAL_GET_FATAL_EXIT).
pub async fn wal_get<O, F>(
    request: &WalGetRequest,
    clock: &Clock,
    fetcher: Option<Command>,
    open: O,
) -> Result<WalGet>
where
    O: Fn() -> F,
    F: Future<Output = Result<Reader>>,
{
    let outcome = async {
        let asked = Asked::now(request)?;
        let wal_directory = wal_directory_of(&request.path)?;
        let folder = Folder::of(&wal_directory);
        let Some(settings) = folder.settings()? else {
            return Feeder::without_plan(&open().await?).serve(&asked).await;
        };
        if let Some(timeline) = later_history(request, &settings) {
            return Ok(look_for_history(&asked, &settings, timeline, open).await);
        }
        let planned = Planned { asked: &asked, folder: &folder, settings: &settings };
        match planned.wait(clock, fetcher).await? {
            Some(outcome) => Ok(outcome),
            None => planned.fetch(&insist(clock, open).await?).await,
        }
    };
    outcome.await.context(|| format!("unable to get WAL file '{}'", request.name)).map_err(advised)
}

/// Whether PostgreSQL, when it is not given a file at `path`, asks again: a standby does, which nothing but
/// a promotion ends, and no restore has planned what it must be given. Aborting it would take down a server
/// that could go on with what it has, or with what its primary sends.
#[must_use]
pub fn asks_again(path: &Path) -> bool {
    let Ok(wal_directory) = wal_directory_of(path) else { return false };
    let Ok(data) = data_directory_of(path) else { return false };
    let is_standby = data.join(STANDBY_SIGNAL).exists();
    is_standby && matches!(Folder::of(&wal_directory).settings(), Ok(None))
}

fn wal_directory_of(path: &Path) -> Result<PathBuf> {
    path.parent().map(Path::to_path_buf).ok_or_else(|| {
        Error::new(Kind::Usage, format!("unable to put a WAL file at '{}'", path.display()))
            .hint("Use it as restore_command = 'tidemark wal-get %f %p'.")
    })
}

/// The data directory whose `pg_wal` a file is put into. By the names of the path: `pg_wal` may be a link
/// to another volume (`initdb --waldir`), and what is above that volume is not the data directory.
fn data_directory_of(path: &Path) -> Result<PathBuf> {
    let whole = std::path::absolute(path)
        .context(|| format!("unable to find the data directory around '{}'", path.display()))?;
    Ok(whole.ancestors().nth(2).unwrap_or(Path::new("/")).to_path_buf())
}

/// The timeline whose history `request` names, when it is later than that of the plan.
fn later_history(request: &WalGetRequest, settings: &Settings) -> Option<TimelineId> {
    let number = request.name.strip_suffix(".history")?;
    let timeline = u32::from_str_radix(number, 16).ok().and_then(TimelineId::new)?;
    settings.path.last().is_some_and(|last| timeline > last.timeline).then_some(timeline)
}

/// Gives the history of a timeline that is later than the plan's, if the repository has it.
///
/// PostgreSQL follows the one timeline that the restore has written into its configuration. It asks for later
/// ones only when recovery has ended, to find a number that nobody has for its own (`findNewestTimeLine`); and
/// since the restore was planned, another server of the cluster may have been promoted. A repository that is
/// away keeps no server from its promotion.
async fn look_for_history<F: Future<Output = Result<Reader>>>(
    asked: &Asked<'_>,
    settings: &Settings,
    timeline: TimelineId,
    open: impl Fn() -> F,
) -> WalGet {
    let given =
        async { Feeder::of_plan(&open().await?, settings)?.serve_history(timeline, asked).await };
    given.await.unwrap_or_else(|error| {
        let name = &asked.request.name;
        tracing::warn!("unable to look for '{name}', which another server may have made: {error}");
        WalGet::NotThere
    })
}

/// A request in a data directory that a restore has made.
struct Planned<'a> {
    asked: &'a Asked<'a>,
    folder: &'a Folder,
    settings: &'a Settings,
}

impl Planned<'_> {
    /// Waits for who fetches ahead; `None` when nobody does and nobody could be started.
    async fn wait(&self, clock: &Clock, mut fetcher: Option<Command>) -> Result<Option<WalGet>> {
        let Self { asked, folder, settings } = *self;
        let name = &asked.request.name;
        let Some(number) = wanted_segment(asked.request, settings)? else {
            return Ok(Some(WalGet::NotThere));
        };
        let spooled = folder.spooled(name);
        if let Some(given) = self.give(number, &spooled)? {
            return Ok(Some(given));
        }
        // Why an earlier attempt ended says nothing about this one: the store may be back.
        folder.take_failure()?;
        folder.want(name, std::process::id())?;
        let begun = clock.instant();
        let (mut patience, mut looked, mut is_silent) = (begun, begun, true);
        loop {
            // Looked at in this order: who fetches ahead hands over first and ends then.
            let is_fetched_ahead = folder.is_fetched_ahead()?;
            if let Some(given) = self.give(number, &spooled)? {
                folder.want_no_more(name);
                return Ok(Some(given));
            }
            let now = clock.instant();
            if now.saturating_duration_since(looked) >= LOOK_FOR_SERVER_EVERY {
                asked.still_waits()?;
                // Again, for who fetches ahead passes over what it takes for an old note.
                folder.want(name, std::process::id())?;
                looked = now;
            }
            if is_silent && now.saturating_duration_since(begun) >= SILENT_MAX {
                let log = folder.prefetch_log();
                tracing::warn!("WAL file '{name}' is being waited for; see '{}'", log.display());
                is_silent = false;
            }
            if is_fetched_ahead {
                patience = now;
            } else {
                if let Some(failure) = folder.take_failure()? {
                    return Err(failure);
                }
                match fetcher.take() {
                    Some(command) => {
                        start_detached(command, folder)?;
                        patience = clock.instant() + START_MAX;
                    }
                    None if clock.instant() >= patience => return Ok(None),
                    None => {}
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Fetches the segment here and now.
    async fn fetch(&self, reader: &Reader) -> Result<WalGet> {
        let Self { asked: Asked { request, .. }, folder, settings } = *self;
        let Some(number) = wanted_segment(request, settings)? else { return Ok(WalGet::NotThere) };
        let feeder = Feeder::of_plan(reader, settings)?;
        let unfinished = folder.unfinished(&request.name, std::process::id());
        feeder.write_planned((settings, &folder.data()), number, &unfinished).await?;
        self.give(number, &unfinished)?.ok_or_else(|| {
            Error::new(Kind::NotFound, format!("'{}' is gone", unfinished.display()))
        })
    }

    /// Gives the file of segment `number` that is at `from`; `None` when there is none.
    fn give(&self, number: SegmentNumber, from: &Path) -> Result<Option<WalGet>> {
        if !from.exists() {
            return Ok(None);
        }
        if self.is_held(number, from)? {
            remove_if_there(from)?;
            return Ok(Some(WalGet::NotThere));
        }
        Ok(self.asked.give(from)?.then_some(WalGet::Found))
    }

    /// Whether the plan ends inside segment `number`, and the file in `pg_wal` has all that the one at `ours`
    /// is needed for.
    fn is_held(&self, number: SegmentNumber, ours: &Path) -> Result<bool> {
        let Self { asked: Asked { request, .. }, settings, .. } = *self;
        let size = settings.wal_segment_bytes;
        let Some((_, range)) = settings.segment(number) else { return Ok(false) };
        let start = range.start().max(settings.start_lsn);
        let wanted = LsnRange::new(start, range.end()).filter(|_| range.len_bytes() < size.bytes());
        let Some(wanted) = wanted else { return Ok(false) };
        match own_file(request)? {
            Some(own) => segments::is_held_of(ours, wanted, &own, size),
            None => Ok(false),
        }
    }
}

/// Where PostgreSQL has a file of the name that it asks for; `None` when that is where it wants it.
fn own_file(request: &WalGetRequest) -> Result<Option<PathBuf>> {
    let own = wal_directory_of(&request.path)?.join(&request.name);
    Ok((own != request.path).then_some(own))
}

/// The segment that `request` names, when the restore hands it over.
fn wanted_segment(request: &WalGetRequest, settings: &Settings) -> Result<Option<SegmentNumber>> {
    let size = settings.wal_segment_bytes;
    // History files of before the plan were placed; others were never stored.
    let Some((_, number)) = size.parse_file_name(&request.name) else { return Ok(None) };
    if settings.segment_name(number).as_deref() != Some(request.name.as_str()) {
        return Ok(None);
    }
    let Some((_, range)) = settings.segment(number) else { return Ok(None) };
    if range.end() <= settings.preplaced_end_lsn {
        // PostgreSQL takes the file in pg_wal when told that there is no other.
        let placed = wal_directory_of(&request.path)?.join(&request.name);
        let whole = fs::metadata(&placed).is_ok_and(|found| found.len() == size.bytes());
        return Ok((!whole).then_some(number));
    }
    Ok(Some(number))
}

/// Starts a process that outlives this one, in a group of its own so that a signal to PostgreSQL's does
/// not end it.
fn start_detached(mut command: Command, folder: &Folder) -> Result<()> {
    use std::os::unix::process::CommandExt as _;
    let log_path = folder.prefetch_log();
    let log = fs::File::create(&log_path)
        .context(|| format!("unable to write '{}'", log_path.display()))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
    // Not waited for: it is the init process's child once this one has ended.
    #[allow(clippy::zombie_processes, reason = "this process ends first")]
    command.spawn().map(drop).context(|| "unable to start the process that fetches WAL ahead")
}

/// Fetches segments ahead of PostgreSQL, beginning with the one that `request` names, until the plan's end
/// or until nobody takes them any more. Returns at once when somebody else does. `open` opens the repository.
///
/// # Errors
/// Why it could not go on; who waits for a segment is told too.
pub async fn prefetch<O, F>(request: &WalGetRequest, clock: &Clock, open: O) -> Result<()>
where
    O: Fn() -> F,
    F: Future<Output = Result<Reader>>,
{
    let folder = Folder::of(&wal_directory_of(&request.path)?);
    let Some(settings) = folder.settings()? else { return Ok(()) };
    let Some((_, first)) = settings.wal_segment_bytes.parse_file_name(&request.name) else {
        return Ok(());
    };
    // Locked before the repository is opened, which takes as long as an outage: who waits for the segment
    // would take it that nobody fetches, and would not wait as long by himself.
    let fetched = locked(&folder, async {
        let reader = &insist(clock, open).await?;
        let (folder, settings, when_idle) = (&folder, &settings, WhenIdle::End);
        let ahead = FetchAhead { folder, owner: None, settings, reader, when_idle };
        ahead.fetch_from(first).await
    });
    fetched.await
}

/// Does the work of who fetches ahead, unless somebody else does it.
///
/// # Errors
/// Those of `work`; who waits for a segment is told them.
async fn locked(folder: &Folder, work: impl Future<Output = Result<()>>) -> Result<()> {
    let Some(_lock) = folder.lock_for_long().await? else { return Ok(()) };
    folder.clear_unfinished()?;
    // A failure of an earlier attempt says nothing about this one.
    folder.take_failure()?;
    match work.await {
        // Recovery has ended, and what was being fetched has no place any more.
        Err(_) if matches!(folder.spool(), Ok(None)) => Ok(()),
        Err(error) => {
            folder.fail(&error)?;
            Err(error)
        }
        Ok(()) => Ok(()),
    }
}

/// What to do when nobody takes segments for long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhenIdle {
    /// The server is gone: end.
    End,
    /// Whoever started the server says when to end.
    Stay,
}

/// Whoever fetches ahead.
pub(crate) struct FetchAhead<'a> {
    pub(crate) folder: &'a Folder,
    /// The account that may write to the folder, when it is not this process's user.
    pub(crate) owner: Option<Owner>,
    pub(crate) settings: &'a Settings,
    pub(crate) reader: &'a Reader,
    pub(crate) when_idle: WhenIdle,
}

impl FetchAhead<'_> {
    /// Fetches from segment `first` on, as [`prefetch`].
    pub(crate) async fn run(&self, first: SegmentNumber) -> Result<()> {
        locked(self.folder, self.fetch_from(first)).await
    }

    async fn fetch_from(&self, first: SegmentNumber) -> Result<()> {
        let Self { folder, owner, settings, reader, when_idle } = *self;
        let feeder = Feeder { owner, ..Feeder::of_plan(reader, settings)? };
        let clock = reader.repository().clock();
        Ahead { folder, settings, feeder: &feeder, clock, when_idle }.run(first).await
    }
}

struct Ahead<'a> {
    folder: &'a Folder,
    settings: &'a Settings,
    feeder: &'a Feeder,
    clock: &'a Clock,
    when_idle: WhenIdle,
}

impl Ahead<'_> {
    async fn run(&self, first: SegmentNumber) -> Result<()> {
        let size = self.settings.wal_segment_bytes;
        let window = usize::try_from(AHEAD_BYTES / size.bytes()).unwrap_or(2).max(FETCHES);
        let mut next = first;
        let mut just_fetched = first..first;
        let mut last_taken = self.clock.instant();
        let mut ready_before = 0;
        while let Some(spool) = self.folder.spool()? {
            let wanted = self.wanted()?;
            let numbers = self.ready(&spool, wanted)?;
            let ready = numbers.len();
            if ready < ready_before {
                last_taken = self.clock.instant();
            }
            ready_before = ready;
            // What PostgreSQL waits for comes first, wherever it is and however much is ready. A note for what
            // was fetched a moment ago is an old one: it was written before that, and PostgreSQL has it.
            let asked =
                wanted.filter(|number| !just_fetched.contains(number) && !numbers.contains(number));
            next = asked.unwrap_or_else(|| wanted.map_or(next, |wanted| next.max(wanted)));
            let room = window.saturating_sub(ready).min(FETCHES);
            let names = self.names_from(next, room.max(usize::from(asked.is_some())));
            just_fetched = next..next + names.len() as u64;
            if names.is_empty() {
                let idle = self.clock.instant().saturating_duration_since(last_taken) > IDLE_MAX;
                if idle && self.when_idle == WhenIdle::End {
                    return Ok(());
                }
                tokio::time::sleep(REST).await;
                continue;
            }
            next = just_fetched.end;
            let mut fetches = futures::stream::iter(names)
                .map(|(number, name)| self.fetch(number, name))
                .buffered(FETCHES);
            while let Some(fetched) = fetches.next().await {
                fetched?;
            }
            last_taken = self.clock.instant();
            ready_before = usize::MAX;
        }
        Ok(())
    }

    /// The segment that PostgreSQL waits for, or has waited for.
    fn wanted(&self) -> Result<Option<SegmentNumber>> {
        let wanted = self.folder.take_wanted()?;
        let size = self.settings.wal_segment_bytes;
        Ok(wanted.and_then(|wanted| size.parse_file_name(&wanted)).map(|(_, number)| number))
    }

    /// The segments in `spool`. Those before the one that is `wanted` are removed: on the way to the target
    /// each number has one name ([`Settings::segment_name`]), and replay has passed them.
    fn ready(&self, spool: &[String], wanted: Option<SegmentNumber>) -> Result<Vec<SegmentNumber>> {
        let size = self.settings.wal_segment_bytes;
        let mut ready = Vec::new();
        for name in spool {
            let Some((_, number)) = size.parse_file_name(name) else { continue };
            match wanted.is_some_and(|wanted| number < wanted) {
                true => self.folder.drop_whole(name)?,
                false => ready.push(number),
            }
        }
        Ok(ready)
    }

    /// The next segments to fetch, at most `count`.
    fn names_from(&self, next: SegmentNumber, count: usize) -> Vec<(SegmentNumber, String)> {
        let numbers = next..next.saturating_add(count as u64);
        numbers.map_while(|number| Some((number, self.settings.segment_name(number)?))).collect()
    }

    async fn fetch(&self, number: SegmentNumber, name: String) -> Result<()> {
        if self.folder.spooled(&name).exists() {
            return Ok(());
        }
        let unfinished = self.folder.unfinished(&name, std::process::id());
        let plan = (self.settings, &*self.folder.data());
        self.feeder.write_planned(plan, number, &unfinished).await?;
        self.folder.put_whole(unfinished, &name).await
    }
}

/// Rebuilds single files from what the repository holds now.
pub(crate) struct Feeder {
    source: RepositoryWal,
    /// Who owns the files, when it is not this process's user.
    owner: Option<Owner>,
}

impl Feeder {
    /// For a data directory that no restore has made: a standby, or a server set up by hand.
    pub(crate) fn without_plan(reader: &Reader) -> Self {
        Self { source: RepositoryWal::new(reader), owner: None }
    }

    fn repository(&self) -> &Repository {
        self.source.repository()
    }

    /// For a planned restore.
    ///
    /// # Errors
    /// `conflict` when the repository holds another cluster than the one being restored.
    pub(crate) fn of_plan(reader: &Reader, settings: &Settings) -> Result<Self> {
        let (found, expected) = (reader.repository().system_id(), settings.system_id);
        if found != expected {
            let message = format!("the repository holds cluster {found}, restored is {expected}");
            return Err(Error::new(Kind::Conflict, message)
                .hint("Use the repository that the cluster was restored from."));
        }
        Ok(Self { source: RepositoryWal::of_restore(reader), owner: None })
    }

    /// Writes segment `number` of a plan to `path`, for the server in a data directory.
    async fn write_planned(
        &self,
        (settings, data): (&Settings, &Path),
        number: SegmentNumber,
        path: &Path,
    ) -> Result<()> {
        let size = settings.wal_segment_bytes;
        let (timeline, wanted) = settings.segment(number).ok_or_else(|| {
            Error::new(Kind::Bug, format!("segment {number} is not part of the restore"))
        })?;
        let chain = self.chain(&settings.path(), wanted, settings.start_lsn).await?;
        if chain.end() < wanted.end() {
            let name = size.file_name(timeline, number);
            let message = format!(
                "WAL from {} on is no longer in the repository, segment '{name}' needs it up to {}",
                chain.end(),
                wanted.end()
            );
            return Err(Error::new(Kind::NotFound, message)
                .hint("It was there when the restore was planned. Plan it again: run 'tidemark restore --dry-run'."));
        }
        let range = size.range_of(number).unwrap_or(wanted);
        let pieces = chain.pieces().to_vec();
        let segment = Segment { name: size.file_name(timeline, number), timeline, range, pieces };
        let identity = Identity { system_id: settings.system_id, size, owner: self.owner };
        segments::write(&self.source, &segment, path, identity).await?;
        let watch = Watch::new(size, data, settings.replayed());
        watch.see(path.to_path_buf(), segment.known()).await.map(drop)
    }

    /// What the repository holds now of `wanted`, all of it in one segment, along `path`; from
    /// `first_needed` on where what is before it was never stored.
    async fn chain(&self, path: &[PathPart], wanted: LsnRange, first_needed: Lsn) -> Result<Chain> {
        let mut extents = Vec::new();
        for part in path {
            let before = part.end.is_some_and(|end| end <= wanted.start());
            if before || part.start >= wanted.end() {
                continue;
            }
            // None crosses the start of a segment, so all that hold a byte of it begin inside.
            let list = || list_extents(self.repository(), part.timeline, wanted);
            extents.extend(self.source.ask(list).await?);
        }
        let wal = WalCatalog::new(extents);
        let page = first_needed.align_down(super::scan::WAL_PAGE_BYTES);
        let starts = [wanted.start(), page.max(wanted.start()), first_needed.max(wanted.start())];
        let mut chain = Chain::follow(&wal, path, wanted.start());
        for start in starts {
            if chain.end() > start {
                break;
            }
            chain = Chain::follow(&wal, path, start);
        }
        Ok(chain.cut(wanted.end()))
    }
}

#[cfg(test)]
mod tests;
