//! `wal-get`: one file for PostgreSQL's `restore_command`, and the one that fetches ahead of it.
//!
//! # Invariants
//! See [`handover`](super::handover). In short: a segment that the restore needs is handed over whole, or
//! PostgreSQL is told to abort; it never takes trouble with the store for the end of the WAL. Only a
//! standby may be told that there is nothing yet, for it [asks again](asks_again).

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use futures::StreamExt as _;

use crate::clock::Clock;
use crate::error::{Context, Error, Kind, Result};
use crate::pg::timeline::PathPart;
use crate::pg::{Lsn, LsnRange, SegmentNumber};
use crate::repo::{Reader, Repository, WalCatalog, list_extents};

use super::advised;
use super::chain::Chain;
use super::directory::Owner;
use super::handover::{Folder, Settings};
use super::run::STANDBY_SIGNAL;
use super::segments::{self, Identity, Segment};
use super::source::RepositoryWal;
use super::tablespaces::Watch;

mod unplanned;

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
    O: FnOnce() -> F,
    F: Future<Output = Result<Reader>>,
{
    let outcome = async {
        let wal_directory = wal_directory_of(&request.path)?;
        let folder = Folder::of(&wal_directory);
        let Some(settings) = folder.settings()? else {
            return Feeder::without_plan(&open().await?).serve(request).await;
        };
        let planned = Planned { request, folder: &folder, settings: &settings };
        match planned.wait(clock, fetcher).await? {
            Some(outcome) => Ok(outcome),
            None => planned.fetch(&open().await?).await,
        }
    };
    outcome.await.context(|| format!("unable to get WAL file '{}'", request.name)).map_err(advised)
}

/// Whether PostgreSQL asks again for a file that it is not given: a standby does, which nothing but a
/// promotion ends, and no restore has planned what it must be given. Aborting it would take down a server
/// that could go on with what it has, or with what its primary sends.
#[must_use]
pub fn asks_again(request: &WalGetRequest) -> bool {
    let Ok(wal_directory) = wal_directory_of(&request.path) else { return false };
    let Ok(data) = data_directory_of(&request.path) else { return false };
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

/// A request in a data directory that a restore has made.
struct Planned<'a> {
    request: &'a WalGetRequest,
    folder: &'a Folder,
    settings: &'a Settings,
}

impl Planned<'_> {
    /// Waits for who fetches ahead; `None` when nobody does and nobody could be started.
    async fn wait(&self, clock: &Clock, mut fetcher: Option<Command>) -> Result<Option<WalGet>> {
        let Self { request, folder, settings } = *self;
        if wanted_segment(request, settings)?.is_none() {
            return Ok(Some(WalGet::NotThere));
        }
        if folder.hand_over(&request.name, &request.path)? {
            return Ok(Some(WalGet::Found));
        }
        // Why an earlier attempt ended says nothing about this one: the store may be back.
        folder.take_failure()?;
        folder.want(&request.name, std::process::id())?;
        let mut patience = clock.instant();
        loop {
            // Looked at in this order: who fetches ahead hands over first and ends then.
            let is_fetched_ahead = folder.is_fetched_ahead()?;
            if folder.hand_over(&request.name, &request.path)? {
                return Ok(Some(WalGet::Found));
            }
            if is_fetched_ahead {
                patience = clock.instant();
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
        let Self { request, folder, settings } = *self;
        let Some(number) = wanted_segment(request, settings)? else { return Ok(WalGet::NotThere) };
        let feeder = Feeder::of_plan(reader, settings)?;
        let unfinished = folder.unfinished(&request.name, std::process::id());
        feeder.write_planned((settings, &folder.data()), number, &unfinished).await?;
        fs::rename(&unfinished, &request.path)
            .context(|| format!("unable to rename '{}'", unfinished.display()))?;
        Ok(WalGet::Found)
    }
}

/// The segment that `request` names, when the restore hands it over.
fn wanted_segment(request: &WalGetRequest, settings: &Settings) -> Result<Option<SegmentNumber>> {
    let size = settings.wal_segment_bytes;
    // History files were all placed; others were never stored.
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
    let log_path = folder.path().join("prefetch.log");
    let log = fs::File::create(&log_path)
        .context(|| format!("unable to write '{}'", log_path.display()))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
    // Not waited for: it is the init process's child once this one has ended.
    #[allow(clippy::zombie_processes, reason = "this process ends first")]
    command.spawn().map(drop).context(|| "unable to start the process that fetches WAL ahead")
}

/// Fetches segments ahead of PostgreSQL, beginning with the one that `request` names, until the plan's end
/// or until nobody takes them any more. Returns at once when somebody else does.
///
/// # Errors
/// Why it could not go on; who waits for a segment is told too.
pub async fn prefetch(request: &WalGetRequest, reader: &Reader) -> Result<()> {
    let folder = Folder::of(&wal_directory_of(&request.path)?);
    let Some(settings) = folder.settings()? else { return Ok(()) };
    let Some((_, first)) = settings.wal_segment_bytes.parse_file_name(&request.name) else {
        return Ok(());
    };
    let ahead = FetchAhead {
        folder: &folder,
        owner: None,
        settings: &settings,
        reader,
        when_idle: WhenIdle::End,
    };
    ahead.run(first).await
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
        let Some(_lock) = self.folder.lock_for_long().await? else { return Ok(()) };
        self.folder.clear_unfinished()?;
        // A failure of an earlier attempt says nothing about this one.
        self.folder.take_failure()?;
        let outcome = self.fetch_from(first).await;
        if let Err(error) = &outcome
            && self.folder.path().exists()
        {
            self.folder.fail(error)?;
        }
        outcome
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
        let mut last_taken = self.clock.instant();
        let mut ready_before = 0;
        while self.folder.path().exists() {
            let spool = self.folder.spool()?;
            let ready = spool.iter().filter(|name| size.parse_file_name(name).is_some()).count();
            if ready < ready_before {
                last_taken = self.clock.instant();
            }
            ready_before = ready;
            // What PostgreSQL waits for comes first, wherever it is and however much is ready.
            let asked = self.asked_for(&spool)?;
            next = asked.unwrap_or(next);
            let room = window.saturating_sub(ready).min(FETCHES);
            let names = self.names_from(next, room.max(usize::from(asked.is_some())));
            if names.is_empty() {
                let idle = self.clock.instant().saturating_duration_since(last_taken) > IDLE_MAX;
                if idle && self.when_idle == WhenIdle::End {
                    return Ok(());
                }
                tokio::time::sleep(REST).await;
                continue;
            }
            next += names.len() as u64;
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

    /// The segment that PostgreSQL waits for, unless it is ready.
    fn asked_for(&self, spool: &[String]) -> Result<Option<SegmentNumber>> {
        let wanted = self.folder.take_wanted()?.filter(|wanted| !spool.contains(wanted));
        let size = self.settings.wal_segment_bytes;
        Ok(wanted.and_then(|wanted| size.parse_file_name(&wanted)).map(|(_, number)| number))
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
        self.folder.put_whole(&unfinished, &name)
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
mod tests {
    use super::super::handover::tests::settings;
    use super::*;
    use crate::pg::{SegmentSize, SystemId, TimelineHistory, TimelineId};
    use crate::repo::{Encryption, ExtentBuilder, Level};
    use crate::store::memory::{Faults, Memory};

    /// A repository with two segments, and a data directory into which a plan hands them over.
    struct Scene {
        clock: Clock,
        memory: Memory,
        reader: Reader,
        _data: tempfile::TempDir,
        folder: Folder,
        settings: Settings,
        request: WalGetRequest,
    }

    impl Scene {
        async fn new() -> Self {
            let clock = Clock::simulated("2026-11-22T10:00:00Z".parse().unwrap(), 3);
            let (memory, repository) = Repository::in_memory(&clock).await;
            let writer = repository.writer(&Encryption::None).await.unwrap();
            for start in [0x300_0000, 0x310_0000] {
                let (first, level) = (TimelineId::FIRST, Level::default());
                let mut builder = ExtentBuilder::new(&writer, first, Lsn(start), level).unwrap();
                builder.push(vec![7; 1 << 20].into()).unwrap();
                writer.put_extent(&builder.finish(None).unwrap()).await.unwrap();
            }
            let size = SegmentSize::new(1 << 20).unwrap();
            let path = TimelineHistory::first_timeline_only(TimelineId::FIRST).path();
            let span = LsnRange::new(Lsn(0x300_0028), Lsn(0x320_0000)).unwrap();
            let settings = Settings::new("main".into(), SystemId(7), size, &path, span);
            let data = tempfile::tempdir().unwrap();
            let folder = Folder::of(&data.path().join("pg_wal"));
            folder.create(&settings).unwrap();
            let path = data.path().join("pg_wal/RECOVERYXLOG");
            let request = WalGetRequest { name: settings.segment_name(0x30).unwrap(), path };
            let reader = repository.reader(Vec::new());
            Self { clock, memory, reader, _data: data, folder, settings, request }
        }

        fn set_down(&self, down: bool) {
            self.memory.set_faults(Faults { down, ..Faults::default() });
        }

        fn ahead(&self) -> FetchAhead<'_> {
            FetchAhead {
                folder: &self.folder,
                owner: None,
                settings: &self.settings,
                reader: &self.reader,
                when_idle: WhenIdle::End,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_of_the_past_keeps_no_segment_away() {
        let scene = Scene::new().await;
        scene.folder.fail(&Error::new(Kind::Unavailable, "no store")).unwrap();
        let open = async || Ok(scene.reader.clone());
        let given = wal_get(&scene.request, &scene.clock, None, open).await.unwrap();
        assert_eq!(given, WalGet::Found);
        assert!(scene.request.path.exists());
        assert!(scene.folder.take_failure().unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_minutes_ends_neither_who_fetches_ahead_nor_who_waits() {
        let scene = Scene::new().await;
        scene.set_down(true);
        let never = async || Err(Error::new(Kind::Bug, "the repository was opened"));
        let waiting = wal_get(&scene.request, &scene.clock, None, never);
        let back = async {
            tokio::time::sleep(Duration::from_secs(300)).await;
            scene.set_down(false);
        };
        let ahead = scene.ahead();
        let (fetched, given, ()) = tokio::join!(ahead.run(0x30), waiting, back);
        assert_eq!(given.unwrap(), WalGet::Found);
        fetched.unwrap();
        assert!(scene.folder.spooled(&scene.settings.segment_name(0x31).unwrap()).exists());
    }

    /// Asks a data directory with these notes for a segment that is on the way to the target.
    async fn asked(notes: &str) -> Result<WalGet> {
        let data = tempfile::tempdir().unwrap();
        let wal = data.path().join("pg_wal");
        let folder = Folder::of(&wal);
        folder.create(&settings()).unwrap();
        fs::write(folder.path().join("wal-get.json"), notes).unwrap();
        let name = settings().segment_name(0x33).unwrap();
        fs::write(folder.spooled(&name), "wal").unwrap();
        let request = WalGetRequest { name, path: wal.join("RECOVERYXLOG") };
        let never = async || Err(Error::new(Kind::Bug, "the repository was opened"));
        wal_get(&request, &Clock::system(), None, never).await
    }

    #[test]
    fn the_data_directory_is_above_the_name_of_pg_wal_and_not_above_what_it_links_to() {
        let place = tempfile::tempdir().unwrap();
        let (data, volume) = (place.path().join("data"), place.path().join("volume/wal"));
        fs::create_dir_all(&data).unwrap();
        fs::create_dir_all(&volume).unwrap();
        std::os::unix::fs::symlink(&volume, data.join("pg_wal")).unwrap();
        let path = data.join("pg_wal/RECOVERYXLOG");
        let request = WalGetRequest { name: "000000010000000000000003".into(), path };
        assert!(!asks_again(&request));
        fs::write(data.join(STANDBY_SIGNAL), "").unwrap();
        assert!(asks_again(&request));
        // As PostgreSQL asks, in the data directory, and as somebody does in pg_wal itself.
        let here = std::env::current_dir().unwrap();
        assert_eq!(data_directory_of(Path::new("pg_wal/RECOVERYXLOG")).unwrap(), here);
        assert_eq!(data_directory_of(Path::new("x")).unwrap(), here.parent().unwrap());
    }

    #[tokio::test]
    async fn a_hole_in_the_notes_is_an_error_and_not_the_end_of_the_wal() {
        let whole = serde_json::to_value(settings()).unwrap();
        assert_eq!(asked(&whole.to_string()).await.unwrap(), WalGet::Found);
        let mut holed = whole.clone();
        holed["path"].as_array_mut().unwrap().pop();
        let error = asked(&holed.to_string()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        let truncated = whole.to_string();
        let error = asked(&truncated[..truncated.len() / 2]).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        assert!(error.hint_text().unwrap().contains("restore again"), "{error:?}");
    }
}
