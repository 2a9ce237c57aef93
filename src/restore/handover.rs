//! How WAL segments come from whoever fetches them to PostgreSQL's `restore_command`.
//!
//! # Shape
//! A folder `tidemark` inside `pg_wal`: on the file system of the WAL, left out of every base backup, and
//! passed over by PostgreSQL and `pg_verifybackup`.
//! ```text
//! pg_wal/tidemark/wal-get.json      what to hand over; no secrets
//! pg_wal/tidemark/prefetch.lock     locked by whoever fetches ahead, as long as it lives
//! pg_wal/tidemark/prefetch.log      what that has to say
//! pg_wal/tidemark/spool/<segment>   whole segments, fetched ahead
//! pg_wal/tidemark/spool/wanted      the segment that PostgreSQL waits for
//! pg_wal/tidemark/spool/error       why fetching ahead has ended
//! ```
//!
//! # Invariants
//! - A file with a segment's name in the spool is whole: it gets that name by a rename when it is. Handing
//!   it over is one more rename.
//! - "Not there" is said only of what the restore does not need: a name that is not on the way to the
//!   target, or WAL at or after the end of the plan. It is known from `wal-get.json` alone. Whatever goes
//!   wrong on the way to a segment that is needed is an error, never the end of the WAL.
//! - So the notes are believed only when they are whole: they name a timeline for every position from the
//!   first to the last that is handed over. With a hole in them, or when they are gone, nothing is served.
//! - A file is given only to the server that has asked for it (see [`feed`](super::feed)).
//! - Fetching ahead is a convenience: when nobody does, the segment is fetched by who wants it. Both outlast
//!   an outage of the store of minutes. Why fetching ahead has ended concerns who waits at that time: who
//!   comes later has another try made.
//!
//! # Durability
//! A segment in the spool is durable before it gets its name: after a power failure one that has its name and
//! its size might hold zeros, which recovery takes for the end of the WAL, and nobody fetches what is there.
//! Who fetches ahead waits for the disk, PostgreSQL does not; that syncs a segment itself when it takes it
//! over (`KeepFileRestoredFromArchive`). The names need no syncing: a segment that lost its name is fetched
//! again, and a note that is lost is written again. `wal-get.json` is made durable with the restore.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Kind, Result};
use crate::file;
use crate::pg::timeline::PathPart;
use crate::pg::{Lsn, LsnRange, SegmentNumber, SegmentSize, SystemId, TimelineId};

use super::directory::Owner;
use super::rights::as_account;
use super::scan::blocking;

/// The folder inside `pg_wal`.
pub(crate) const FOLDER: &str = "tidemark";
const SETTINGS: &str = "wal-get.json";
const LOCK: &str = "prefetch.lock";
const SPOOL: &str = "spool";
const WANTED: &str = "wanted";
const ERROR: &str = "error";
/// How often, and how long apart, the lock is tried that somebody holds.
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Version of `wal-get.json`.
const FORMAT: u32 = 1;
/// `wal-get.json` has one line a timeline.
const SETTINGS_BYTES_MAX: u64 = 8 << 20;
/// A message of ours is never longer.
const NOTE_BYTES_MAX: u64 = 64 << 10;

/// A stretch of the path to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stretch {
    pub(crate) timeline: TimelineId,
    pub(crate) start_lsn: Lsn,
    pub(crate) end_lsn: Option<Lsn>,
}

/// What a restore hands to PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    format: u32,
    /// The cluster in the repository.
    pub(crate) cluster: String,
    pub(crate) system_id: SystemId,
    pub(crate) wal_segment_bytes: SegmentSize,
    /// The way to the target, oldest timeline first.
    pub(crate) path: Vec<Stretch>,
    /// Where replay begins.
    pub(crate) start_lsn: Lsn,
    /// Nothing from here on is handed over.
    pub(crate) end_lsn: Lsn,
    /// Segments that end here or before are in `pg_wal` already.
    pub(crate) preplaced_end_lsn: Lsn,
    /// Records from here on are not replayed; `None` when all that are handed over are.
    #[serde(default)]
    pub(crate) replay_end_lsn: Option<Lsn>,
}

impl Settings {
    pub(crate) fn new(
        cluster: String,
        system_id: SystemId,
        wal_segment_bytes: SegmentSize,
        path: &[PathPart],
        span: LsnRange,
    ) -> Self {
        let stretch = |part: &PathPart| Stretch {
            timeline: part.timeline,
            start_lsn: part.start,
            end_lsn: part.end,
        };
        Self {
            format: FORMAT,
            cluster,
            system_id,
            wal_segment_bytes,
            path: path.iter().map(stretch).collect(),
            start_lsn: span.start(),
            end_lsn: span.end(),
            preplaced_end_lsn: Lsn::INVALID,
            replay_end_lsn: None,
        }
    }

    /// The settings in the bytes of `wal-get.json`.
    ///
    /// # Errors
    /// `corrupt` for what is no such file, and for one with a hole: a segment in it would be taken for
    /// one that the restore does not need, and so for the end of the WAL. `unsupported` for another format.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let settings: Self = serde_json::from_slice(bytes)
            .map_err(|error| Error::new(Kind::Corrupt, error.to_string()))?;
        if settings.format != FORMAT {
            let message = format!("it has format {}, expected {FORMAT}", settings.format);
            return Err(Error::new(Kind::Unsupported, message));
        }
        settings.flaw().map_or(Ok(settings), |flaw| Err(Error::new(Kind::Corrupt, flaw)))
    }

    /// Why these settings do not say of every position whose WAL is handed over.
    fn flaw(&self) -> Option<String> {
        let (start, end) = (self.start_lsn, self.end_lsn);
        if start >= end || self.preplaced_end_lsn > end {
            let placed = self.preplaced_end_lsn;
            return Some(format!(
                "it begins at {start}, is in place to {placed} and ends at {end}"
            ));
        }
        let size = self.wal_segment_bytes;
        if size.range_of(size.number_of(end)).is_none() {
            return Some(format!("it ends at {end}, behind the last WAL segment that has a name"));
        }
        let mut reached = Some(self.path.first().map_or(Lsn::INVALID, |part| part.start_lsn));
        let mut before = None;
        for part in &self.path {
            if reached != Some(part.start_lsn) || part.end_lsn.is_some_and(|e| e < part.start_lsn) {
                let timeline = part.timeline;
                return Some(format!("timeline {timeline} does not follow on what is before it"));
            }
            if before.is_some_and(|before| part.timeline <= before) {
                return Some(format!("timeline {} comes after a later one", part.timeline));
            }
            (reached, before) = (part.end_lsn, Some(part.timeline));
        }
        let first = self.path.first().filter(|first| first.start_lsn <= start);
        let whole = first.is_some() && reached.is_none_or(|reached| reached >= end);
        (!whole).then(|| format!("it names no timeline for all of the WAL from {start} to {end}"))
    }

    /// Where the records begin that are replayed.
    pub(crate) fn replayed(&self) -> Range<Lsn> {
        self.start_lsn..self.replay_end_lsn.unwrap_or(self.end_lsn)
    }

    /// The path as chains are followed along.
    pub(crate) fn path(&self) -> Vec<PathPart> {
        let part = |stretch: &Stretch| PathPart {
            timeline: stretch.timeline,
            start: stretch.start_lsn,
            end: stretch.end_lsn,
        };
        self.path.iter().map(part).collect()
    }

    /// The part of segment `number` that is handed over, and the timeline in the name of its file.
    pub(crate) fn segment(&self, number: SegmentNumber) -> Option<(TimelineId, LsnRange)> {
        let whole = self.wal_segment_bytes.range_of(number)?;
        let end = whole.end().min(self.end_lsn);
        let first = self.wal_segment_bytes.start_of(self.start_lsn);
        let range = LsnRange::new(whole.start(), end).filter(|range| !range.is_empty())?;
        let last_byte = Lsn(end.0 - 1);
        let on = self.path.iter().find(|part| part.end_lsn.is_none_or(|end| last_byte < end))?;
        (first <= whole.start()).then_some((on.timeline, range))
    }

    /// Name of the file of segment `number`, if it is handed over.
    pub(crate) fn segment_name(&self, number: SegmentNumber) -> Option<String> {
        let (timeline, _) = self.segment(number)?;
        Some(self.wal_segment_bytes.file_name(timeline, number))
    }
}

/// The folder of one data directory, and the account that may write to it if that is another one's.
#[derive(Clone, Debug)]
pub(crate) struct Folder(PathBuf, Option<Owner>);

impl Folder {
    /// That of `wal_directory`, a `pg_wal`.
    pub(crate) fn of(wal_directory: &Path) -> Self {
        Self(wal_directory.join(FOLDER), None)
    }

    /// The same, where root writes and removes with the rights of `account` only.
    pub(crate) fn of_account(self, account: Owner) -> Self {
        Self(self.0, Some(account))
    }

    /// Where the folder is.
    #[cfg(test)]
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// What who fetches ahead has to say.
    pub(crate) fn prefetch_log(&self) -> PathBuf {
        self.0.join("prefetch.log")
    }

    /// The data directory it is in.
    pub(crate) fn data(&self) -> PathBuf {
        self.0.ancestors().nth(2).map_or_else(PathBuf::new, Path::to_path_buf)
    }

    /// Makes the folder with these settings.
    pub(crate) fn create(&self, settings: &Settings) -> Result<()> {
        let attempted = || format!("unable to write '{}'", self.0.join(SETTINGS).display());
        fs::create_dir_all(self.0.join(SPOOL)).context(attempted)?;
        // Made here and given away with the rest: one that a fetcher of root's made under a strict umask
        // would be closed to PostgreSQL's account.
        File::create(self.0.join(LOCK)).context(attempted)?;
        let text = serde_json::to_vec_pretty(settings)
            .map_err(|error| Error::new(Kind::Bug, format!("{}: {error}", attempted())))?;
        fs::write(self.0.join(SETTINGS), text).context(attempted)
    }

    /// What [`Folder::create`] has made.
    pub(crate) fn made(&self) -> [PathBuf; 4] {
        [self.0.clone(), self.0.join(SPOOL), self.0.join(SETTINGS), self.0.join(LOCK)]
    }

    /// The settings, `None` when no restore has made this folder.
    ///
    /// # Errors
    /// `corrupt` when it was made and what it has to say is lost: then nobody knows which WAL is needed.
    pub(crate) fn settings(&self) -> Result<Option<Settings>> {
        let path = self.0.join(SETTINGS);
        let attempted = || format!("unable to read '{}'", path.display());
        let hint = "It was written by 'tidemark restore' and says which WAL recovery needs: restore \
                    again, into an empty directory.";
        let Some(text) = read_note(&path, SETTINGS_BYTES_MAX)? else {
            return match self.0.try_exists().context(attempted)? {
                false => Ok(None),
                true => {
                    Err(Error::new(Kind::Corrupt, "it is gone").context(attempted()).hint(hint))
                }
            };
        };
        let decoded = Settings::decode(text.as_bytes());
        decoded.map(Some).map_err(|error| error.context(attempted()).hint(hint))
    }

    /// Where a segment lies when it is whole.
    pub(crate) fn spooled(&self, name: &str) -> PathBuf {
        self.0.join(SPOOL).join(name)
    }

    /// Where a segment is while it is being fetched by process `pid`.
    pub(crate) fn unfinished(&self, name: &str, pid: u32) -> PathBuf {
        self.0.join(SPOOL).join(format!("{name}.{pid}.part"))
    }

    /// Names of what is in the spool; `None` when it is gone: recovery has ended and PostgreSQL removed it.
    pub(crate) fn spool(&self) -> Result<Option<Vec<String>>> {
        names_in(&self.0.join(SPOOL))
    }

    /// Removes what a fetcher that died left behind. One that lives may be at work: who waits for a segment
    /// fetches it himself when nobody else seems to.
    pub(crate) fn clear_unfinished(&self) -> Result<()> {
        as_account(self.1, || remove_unfinished(&self.0.join(SPOOL), None))
    }

    /// As [`Folder::lock`], but told from who only [looks](Folder::is_fetched_ahead), which takes the lock
    /// for an instant.
    pub(crate) async fn lock_for_long(&self) -> Result<Option<File>> {
        for _ in 1..LOCK_TRIES {
            if let Some(locked) = self.lock()? {
                return Ok(Some(locked));
            }
            tokio::time::sleep(LOCK_PAUSE).await;
        }
        self.lock()
    }

    /// Takes the place of the one that fetches ahead; `None` when somebody has it.
    pub(crate) fn lock(&self) -> Result<Option<File>> {
        let path = self.0.join(LOCK);
        let attempted = || format!("unable to lock '{}'", path.display());
        // For writing too: NFS locks a range of bytes for this, exclusively, and refuses to (EBADF) where
        // nothing could be written.
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = as_account(self.1, || options.open(&path).context(attempted))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(Error::io(attempted(), &error)),
        }
    }

    /// Whether somebody fetches ahead.
    pub(crate) fn is_fetched_ahead(&self) -> Result<bool> {
        Ok(self.lock()?.is_none())
    }

    /// Puts a segment that was fetched into `unfinished` among those that are whole.
    pub(crate) async fn put_whole(&self, unfinished: PathBuf, name: &str) -> Result<()> {
        let (account, whole) = (self.1, self.spooled(name));
        let put = move || {
            let attempted = |verb: &str| format!("unable to {verb} '{}'", unfinished.display());
            let synced = File::open(&unfinished).and_then(|file| file.sync_data());
            synced.context(|| attempted("sync"))?;
            fs::rename(&unfinished, &whole).context(|| attempted("rename"))
        };
        blocking(move || as_account(account, put)).await?
    }

    /// Removes a segment that nobody will ask for any more.
    pub(crate) fn drop_whole(&self, name: &str) -> Result<()> {
        self.remove_if_there(&self.spooled(name))
    }

    /// Says which segment PostgreSQL waits for.
    pub(crate) fn want(&self, name: &str, pid: u32) -> Result<()> {
        let place = self.0.join(SPOOL).join(WANTED);
        let new = self.0.join(SPOOL).join(format!("{WANTED}.{pid}.part"));
        let attempted = || format!("unable to write '{}'", place.display());
        fs::write(&new, name).context(attempted)?;
        fs::rename(&new, &place).context(attempted)
    }

    /// Takes the note of [`Folder::want`] back, if it is still there: `name` was handed over. One that stays
    /// all the same costs no more than a segment fetched in vain.
    pub(crate) fn want_no_more(&self, name: &str) {
        let place = self.0.join(SPOOL).join(WANTED);
        if matches!(read_note(&place, NOTE_BYTES_MAX), Ok(Some(wanted)) if wanted == name) {
            drop(fs::remove_file(&place));
        }
    }

    /// Takes the note of [`Folder::want`].
    pub(crate) fn take_wanted(&self) -> Result<Option<String>> {
        let place = self.0.join(SPOOL).join(WANTED);
        let wanted = read_note(&place, NOTE_BYTES_MAX)?;
        if wanted.is_some() {
            self.remove_if_there(&place)?;
        }
        Ok(wanted)
    }

    /// Leaves word why fetching ahead has ended.
    pub(crate) fn fail(&self, error: &Error) -> Result<()> {
        let place = self.0.join(SPOOL).join(ERROR);
        let hint = error.hint_text().map(|hint| format!("\n{hint}")).unwrap_or_default();
        let attempted = || format!("unable to write '{}'", place.display());
        as_account(self.1, || fs::write(&place, format!("{error}{hint}")).context(attempted))
    }

    /// Takes the word that [`Folder::fail`] left. An empty one says nothing: the disk was full.
    pub(crate) fn take_failure(&self) -> Result<Option<Error>> {
        let place = self.0.join(SPOOL).join(ERROR);
        let Some(text) = read_note(&place, NOTE_BYTES_MAX)? else { return Ok(None) };
        self.remove_if_there(&place)?;
        if text.is_empty() {
            return Ok(None);
        }
        let (message, hint) = text.split_once('\n').unwrap_or((&text, ""));
        let error = Error::new(Kind::Unavailable, message);
        Ok(Some(if hint.is_empty() { error } else { error.hint(hint) }))
    }

    fn remove_if_there(&self, path: &Path) -> Result<()> {
        as_account(self.1, || remove_if_there(path))
    }
}

/// Whether `pid` is of a process that runs and is not this one.
fn is_of_another(pid: &str) -> bool {
    let pid = pid.parse().ok().filter(|pid| u32::try_from(*pid) != Ok(std::process::id()));
    let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) else { return false };
    // Of another user it may not even be asked.
    rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
}

/// Removes from `folder` the files `<name>.<pid>.part`, of any `name` or the given one, that no other process
/// is at.
pub(crate) fn remove_unfinished(folder: &Path, name: Option<&str>) -> Result<()> {
    for found in names_in(folder)?.unwrap_or_default() {
        let Some(rest) = found.strip_suffix(".part") else { continue };
        let (of, pid) = rest.rsplit_once('.').unwrap_or((rest, ""));
        if name.is_none_or(|name| name == of) && !is_of_another(pid) {
            remove_if_there(&folder.join(found))?;
        }
    }
    Ok(())
}

/// Names of what is in `folder`, `None` when that is not there.
fn names_in(folder: &Path) -> Result<Option<Vec<String>>> {
    let attempted = || format!("unable to list '{}'", folder.display());
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.context(attempted)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.context(attempted)?.file_name().to_string_lossy().into_owned());
    }
    Ok(Some(names))
}

pub(crate) fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::io(format!("unable to remove '{}'", path.display()), &error))
        }
        _ => Ok(()),
    }
}

/// A small text file, `None` when it is not there.
fn read_note(path: &Path, bytes_max: u64) -> Result<Option<String>> {
    match file::read_to_string(path, bytes_max) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some).context(|| format!("unable to read '{}'", path.display())),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn settings() -> Settings {
        let timeline = |number| TimelineId::new(number).unwrap();
        let size = SegmentSize::new(1 << 20).unwrap();
        let switch = Lsn(0x320_0100);
        let path = [
            PathPart { timeline: timeline(1), start: Lsn(0), end: Some(switch) },
            PathPart { timeline: timeline(2), start: switch, end: None },
        ];
        let span = LsnRange::new(Lsn(0x300_0028), Lsn(0x340_0500)).unwrap();
        Settings::new("main".into(), SystemId(42), size, &path, span)
    }

    #[test]
    fn only_segments_on_the_way_to_the_target_have_a_name() {
        let settings = settings();
        let names: Vec<Option<String>> =
            (0x2f..0x36).map(|number| settings.segment_name(number)).collect();
        let expected = [
            None,
            Some("000000010000000000000030"),
            Some("000000010000000000000031"),
            // The segment of the promotion carries the new timeline.
            Some("000000020000000000000032"),
            Some("000000020000000000000033"),
            Some("000000020000000000000034"),
            None,
        ];
        assert_eq!(names.iter().map(Option::as_deref).collect::<Vec<_>>(), expected);
        let (_, last) = settings.segment(0x34).unwrap();
        assert_eq!(last.end(), Lsn(0x340_0500));
    }

    #[test]
    fn notes_with_a_hole_are_refused() {
        let decoded = |change: &dyn Fn(&mut Settings)| {
            let mut settings = settings();
            change(&mut settings);
            Settings::decode(&serde_json::to_vec(&settings).unwrap()).map_err(|error| error.kind())
        };
        assert_eq!(decoded(&|_| {}), Ok(settings()));
        let changes: [&dyn Fn(&mut Settings); 10] = [
            &|s| s.path.clear(),
            &|s| s.path.truncate(1),
            &|s| s.path = s.path[1..].to_vec(),
            &|s| s.path[1].start_lsn.0 += 1,
            &|s| s.path[0].end_lsn = None,
            &|s| s.path[1].end_lsn = Some(Lsn(s.end_lsn.0 - 1)),
            &|s| s.path[1].timeline = s.path[0].timeline,
            &|s| s.end_lsn = s.start_lsn,
            &|s| s.end_lsn = Lsn(u64::MAX),
            &|s| s.preplaced_end_lsn = Lsn(s.end_lsn.0 + 1),
        ];
        for (index, change) in changes.iter().enumerate() {
            assert_eq!(decoded(change), Err(Kind::Corrupt), "change {index}");
        }
        assert_eq!(decoded(&|s| s.format += 1), Err(Kind::Unsupported));
    }

    #[test]
    fn notes_that_are_gone_are_not_notes_that_never_were() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::of(dir.path());
        assert_eq!(folder.settings().unwrap(), None);
        folder.create(&settings()).unwrap();
        fs::remove_file(dir.path().join(FOLDER).join(SETTINGS)).unwrap();
        let error = folder.settings().unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(error.message().ends_with("wal-get.json': it is gone"), "{error}");
    }

    #[test]
    fn settings_and_notes_come_back_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::of(dir.path());
        assert_eq!(folder.settings().unwrap(), None);
        folder.create(&settings()).unwrap();
        assert_eq!(folder.settings().unwrap(), Some(settings()));

        assert!(folder.take_failure().unwrap().is_none());
        folder.fail(&Error::new(Kind::Unavailable, "no store").hint("Look.")).unwrap();
        let failure = folder.take_failure().unwrap().unwrap();
        assert_eq!((failure.message(), failure.hint_text()), ("no store", Some("Look.")));
        assert!(folder.take_failure().unwrap().is_none());
        // As it is left on a full disk.
        fs::write(folder.spooled(ERROR), "").unwrap();
        assert!(folder.take_failure().unwrap().is_none());
        assert_eq!(folder.spool().unwrap(), Some(Vec::new()));

        folder.want("b", 1).unwrap();
        folder.want_no_more("a");
        assert_eq!(folder.take_wanted().unwrap().as_deref(), Some("b"));
        folder.want("b", 1).unwrap();
        folder.want_no_more("b");
        assert_eq!(folder.take_wanted().unwrap(), None);

        // No process has so great a number; the one that started this one lives.
        let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get().cast_unsigned();
        let own = std::process::id();
        for (name, pid) in [("c", 0x7fff_fff0), ("c", own), ("d", parent)] {
            fs::write(folder.unfinished(name, pid), "").unwrap();
        }
        folder.clear_unfinished().unwrap();
        assert_eq!(folder.spool().unwrap(), Some(vec![format!("d.{parent}.part")]));
        fs::remove_dir_all(dir.path().join(FOLDER)).unwrap();
        assert_eq!(folder.spool().unwrap(), None);
        folder.clear_unfinished().unwrap();
    }

    #[tokio::test]
    async fn a_segment_is_synced_before_it_gets_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::of(dir.path());
        folder.create(&settings()).unwrap();
        let unfinished = folder.unfinished("a", 1);
        // A thing that can be opened and renamed, and not synced.
        std::os::unix::fs::symlink("/dev/null", &unfinished).unwrap();
        let error = folder.put_whole(unfinished.clone(), "a").await.unwrap_err();
        assert!(error.message().contains("unable to sync"), "{error}");
        assert!(folder.spooled("a").symlink_metadata().is_err());
        fs::remove_file(&unfinished).unwrap();
        fs::write(&unfinished, "wal").unwrap();
        folder.put_whole(unfinished, "a").await.unwrap();
        assert_eq!(fs::read(folder.spooled("a")).unwrap(), b"wal");
    }

    #[test]
    fn the_lock_is_open_for_writing() {
        use rustix::fs::{OFlags, fcntl_getfl};
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::of(dir.path());
        folder.create(&settings()).unwrap();
        let held = folder.lock().unwrap().unwrap();
        assert!(fcntl_getfl(&held).unwrap().contains(OFlags::RDWR));
    }

    #[tokio::test(start_paused = true)]
    async fn who_looks_whether_the_lock_is_held_keeps_nobody_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::of(dir.path());
        folder.create(&settings()).unwrap();
        let looking = folder.lock().unwrap().unwrap();
        let (locked, ()) = tokio::join!(folder.lock_for_long(), async {
            tokio::time::sleep(LOCK_PAUSE * 3).await;
            drop(looking);
        });
        let held = locked.unwrap().unwrap();
        assert!(folder.lock_for_long().await.unwrap().is_none());
        drop(held);
    }

    #[test]
    fn one_at_a_time_fetches_ahead() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::of(dir.path());
        folder.create(&settings()).unwrap();
        // All that is given to the server's account, the lock among it.
        let made = |path: PathBuf| assert!(folder.made().contains(&path), "{}", path.display());
        for entry in fs::read_dir(folder.path()).unwrap() {
            made(entry.unwrap().path());
        }
        let held = folder.lock().unwrap().unwrap();
        assert!(folder.is_fetched_ahead().unwrap());
        drop(held);
        assert!(!folder.is_fetched_ahead().unwrap());
    }
}
