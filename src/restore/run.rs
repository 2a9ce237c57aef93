//! Carrying out a plan: files, WAL, settings, and the one rename that makes the directory startable.

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;

use crate::error::{Context, Error, Kind, Result};
use crate::file;
use crate::pg::control::ControlFile;
use crate::pg::timeline::PathPart;
use crate::pg::{Lsn, LsnRange, SystemId, TimelineId};
use crate::repo::patience::insist;
use crate::repo::{BackupId, Budget, Manifest, Reader};

use super::advised;
use super::chain::Piece;
use super::directory::{self, Directory, Marker, Owner, TablespaceMapping, TablespacePlace, Token};
use super::files::{self, Files};
use super::handover::{Folder, Settings};
use super::limits;
use super::plan::Plan;
use super::progress::{Phase, Progress};
use super::segments::{self, Identity};
use super::settings::{
    Action, REMOVE_BLOCK, RecoverySettings, Stop, Upstream, shell_word, without_data_directory,
};
use super::source::RepositoryWal;
use super::tablespaces::Watch;
use super::target::Target;

/// WAL up to this much is placed in `pg_wal` before the start: a minute of replay, and less disk than
/// most servers keep there anyway. More comes through `wal-get`, a little ahead of replay.
pub const PREPLACED_BYTES_MAX: u64 = 512 << 20;

const CONF: &str = "postgresql.conf";
const AUTO_CONF: &str = "postgresql.auto.conf";
/// Longest configuration file of a backup that is read: those of PostgreSQL have tens of kilobytes.
const CONF_BYTES_MAX: u64 = 16 << 20;
const RECOVERY_SIGNAL: &str = "recovery.signal";
pub(crate) const STANDBY_SIGNAL: &str = "standby.signal";
/// A `restore_command` is required even when all WAL is in place already.
const NOTHING_TO_RESTORE: &str = "false";
/// Removes what `wal-get` kept, when recovery has ended.
const CLEAN_UP: &str = "rm -rf pg_wal/tidemark";

/// How WAL is replayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// By PostgreSQL itself.
    #[default]
    Postgres,
    /// By us up to a checkpoint before the target, by PostgreSQL from there.
    Native,
}

/// What the restored cluster is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// A server of its own, on a new timeline once it is promoted.
    #[default]
    Primary,
    /// A standby that goes on following the repository, and another server if one is named.
    Standby(Upstream),
}

/// How to carry a plan out.
#[derive(Clone, Debug)]
pub struct Options {
    /// The data directory: missing or empty.
    pub into: PathBuf,
    /// Tablespaces that go elsewhere.
    pub tablespaces: Vec<TablespaceMapping>,
    /// What PostgreSQL does at the target.
    pub action: Action,
    /// What the cluster is to be.
    pub role: Role,
    /// Who owns the files; `None` is this process's user, or for root the owner of the directory above.
    pub owner: Option<Owner>,
    /// How WAL is replayed.
    pub engine: Engine,
    /// Words of a command that, followed by a file's name and a path, runs `wal_get` on this repository.
    /// No secrets: they are written to `postgresql.auto.conf`.
    pub wal_get_command: Vec<String>,
    /// Shares of memory and threads.
    pub budget: Budget,
    /// WAL up to this much is placed before the start.
    pub preplaced_bytes_max: u64,
}

/// How WAL gets to PostgreSQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WalDelivery {
    /// All of it is in `pg_wal`.
    InPlace,
    /// PostgreSQL fetches it by `restore_command`.
    OnDemand,
}

/// What a restore has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoreReport {
    /// The data directory.
    pub into: PathBuf,
    /// The backup it was made from.
    pub backup: BackupId,
    /// Regular files written.
    pub file_count: u64,
    /// Bytes of them.
    pub plain_bytes: u64,
    /// WAL segments placed in `pg_wal`.
    pub segment_count: u64,
    /// How WAL gets to PostgreSQL.
    pub wal: WalDelivery,
    /// From the first request to the last sync.
    pub elapsed_ms: u64,
    /// What must be known besides, or seen to.
    pub notes: Vec<String>,
}

/// Carries `plan` out: when it returns, PostgreSQL started on the directory ends at the target.
///
/// # Durability
/// All files are on disk before `global/pg_control` appears; see [`directory`]. Whoever
/// interrupts this leaves a directory that does not start and that the same call clears and fills again.
///
/// # Errors
/// `conflict` when the directory is not empty, `corrupt` for damage in the repository, and whatever store
/// and file system report.
pub async fn run(
    plan: &Plan,
    options: &Options,
    reader: &Reader,
    progress: &Arc<Progress>,
) -> Result<RestoreReport> {
    let clock = reader.repository().clock();
    let begun = clock.instant();
    check_options(plan, options)?;
    progress.begin(Phase::Preparing, 0);
    let manifest = reader.manifest(plan.backup.id).await.map_err(advised)?;
    let places = places_of(&manifest, options)?;
    let owner = owner_of(options)?;
    let token = Token::draw(clock)?;
    let marker = Marker::new(&plan.cluster, &plan.backup.id.to_string(), &places, token);
    let claimed = Directory::claim(&options.into, &marker, owner)?;
    let fill = async {
        progress.begin(Phase::Files, manifest.public.plain_bytes);
        let (directory, places, budget) = (&claimed, &places, &options.budget);
        let files = Files { reader, manifest: &manifest, directory, places, budget, progress };
        let restored = files::restore(files).await?;
        let control = check_control(&restored.control, plan)?;

        let delivery = Delivery { plan, options, reader, directory, progress };
        delivery.place_histories().await?;
        let PlacedWal { delivery: wal, segment_count, mut notes } = delivery.place_wal().await?;
        let elsewhere = delivery.write_settings(wal, &control)?;
        notes.extend(elsewhere.map(|place| {
            format!(
                "its postgresql.conf had data_directory = '{place}', where a server started here would \
                 have run: that line is a comment now"
            )
        }));
        notes.extend(delivery.place_later_histories(wal).await?);

        progress.begin(Phase::Syncing, 0);
        restored.directory_modes.set()?;
        directory.give(directory_mode(directory))?;
        claimed.finish(&restored.control, restored.control_mode)?;
        progress.begin(Phase::Done, 0);
        let elapsed = clock.instant().saturating_duration_since(begun);
        Ok(RestoreReport {
            into: options.into.clone(),
            backup: plan.backup.id,
            file_count: restored.file_count,
            plain_bytes: restored.plain_bytes,
            segment_count,
            wal,
            elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            notes,
        })
    };
    let filled = match fill.await {
        Err(error) => Err(removed_meanwhile(error, reader, plan.backup.id).await),
        filled => filled,
    };
    filled.map_err(advised).map_err(|error: Error| {
        match options.into.join(directory::MARKER).exists() {
            true => error.further_hint(&format!(
                "'{}' is incomplete and PostgreSQL does not start on it; the next restore into it \
             clears it and begins anew.",
                options.into.display()
            )),
            false => error,
        }
    })
}

/// An error about something that is not there, with what became of the backup if that is gone.
async fn removed_meanwhile(error: Error, reader: &Reader, id: BackupId) -> Error {
    if error.kind() != Kind::NotFound {
        return error;
    }
    // Whoever removes a backup begins with its manifest.
    match reader.manifest(id).await {
        Err(manifest) if manifest.kind() == Kind::NotFound => error.hint(format!(
            "Backup '{id}' was removed meanwhile, by retention most likely. Restore from another one \
             ('tidemark list' shows them). 'tidemark hold ID' keeps that and its WAL up to its end; with \
             retention.pitr_days the WAL behind it goes as that says."
        )),
        _ => error,
    }
}

fn check_options(plan: &Plan, options: &Options) -> Result<()> {
    if options.engine == Engine::Native {
        return Err(Error::new(
            Kind::Unsupported,
            "unable to replay with engine 'native': it is not in this build",
        )
        .hint("Use engine 'postgres'."));
    }
    let is_standby = matches!(options.role, Role::Standby(_));
    if is_standby && !matches!(plan.target, Target::Latest | Target::Immediate) {
        return Err(Error::new(
            Kind::Usage,
            format!("unable to restore a standby to {}: a standby follows all WAL", plan.target),
        )
        .hint("Leave the target out, or leave out --as-standby and use --action pause."));
    }
    Ok(())
}

fn places_of(manifest: &Manifest, options: &Options) -> Result<Vec<TablespacePlace>> {
    let spaces: Vec<(u32, PathBuf)> = manifest
        .tablespaces
        .iter()
        .map(|space| (space.oid, PathBuf::from(&space.location)))
        .collect();
    directory::map_tablespaces(&spaces, &options.tablespaces)
}

/// PostgreSQL refuses to run as root, so root must not be left owning what it restores.
fn owner_of(options: &Options) -> Result<Option<Owner>> {
    if options.owner.is_some() || !Owner::process_is_root() {
        return Ok(options.owner);
    }
    let path = std::path::absolute(&options.into)
        .context(|| format!("unable to find the directory '{}'", options.into.display()))?;
    if let Some(owner) = directory::interrupted_for(&path) {
        return Ok(Some(owner));
    }
    let nearest = path.ancestors().find_map(|folder| fs::metadata(folder).ok());
    match nearest.map(|found| Owner { uid: found.uid(), gid: found.gid() }) {
        Some(owner) if owner.uid != 0 => Ok(Some(owner)),
        _ => Err(Error::new(
            Kind::Usage,
            format!(
                "unable to restore into '{}' as root: PostgreSQL does not run as root",
                path.display()
            ),
        )
        .hint("Name the user that will run it with --owner, like --owner postgres.")),
    }
}

/// The `pg_control` of the backup must be that of the cluster the plan is about.
fn check_control(bytes: &[u8], plan: &Plan) -> Result<ControlFile> {
    let control = ControlFile::decode(bytes)?;
    let said = |system_id: SystemId, size| {
        format!("cluster {system_id} with WAL segments of {size} bytes")
    };
    let found = said(control.system_id, control.wal_segment_size.bytes());
    let expected = said(plan.system_id, plan.wal_segment_bytes.bytes());
    if found != expected {
        let message = format!(
            "unable to restore backup '{}': its pg_control is of {found}, expected {expected}",
            plan.backup.id
        );
        return Err(Error::new(Kind::Corrupt, message));
    }
    Ok(control)
}

/// A configuration file as it is; one that the backup does not have is empty.
fn read_conf(path: &Path) -> Result<Vec<u8>> {
    match file::read(path, CONF_BYTES_MAX) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.context(|| format!("unable to read '{}'", path.display())),
    }
}

/// Puts a new file with `content` in the place of a configuration file, which may be read-only, with the
/// mode of that one if there is one. It is durable with all the rest, by [`Directory::finish`].
fn replace(path: &Path, content: &[u8], owner: Option<Owner>) -> Result<()> {
    use std::io::Write as _;
    let attempted = || format!("unable to write '{}'", path.display());
    let mode = match fs::symlink_metadata(path) {
        Ok(found) => found.permissions().mode() & 0o777,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0o600,
        Err(error) => return Err(Error::io(attempted(), &error)),
    };
    // Beside the marker, and with its name: no backup holds a file like that.
    let fresh = path.with_file_name(format!("{}.conf", directory::MARKER));
    let mut options = OpenOptions::new();
    let mut file =
        options.write(true).create_new(true).mode(0o600).open(&fresh).context(attempted)?;
    file.write_all(content).context(attempted)?;
    file.set_permissions(Permissions::from_mode(mode)).context(attempted)?;
    owner.map_or(Ok(()), |owner| owner.give(&fresh))?;
    fs::rename(&fresh, path).context(attempted)
}

/// 0700, or 0750 when the cluster allows its group to read: what PostgreSQL accepts.
fn directory_mode(directory: &Directory) -> u32 {
    let version_file = directory.path().join("PG_VERSION");
    let mode = fs::metadata(&version_file).map_or(0o600, |found| found.permissions().mode());
    if mode & 0o040 == 0 { 0o700 } else { 0o750 }
}

/// What became of the WAL.
struct PlacedWal {
    delivery: WalDelivery,
    segment_count: u64,
    notes: Vec<String>,
}

/// Placing what recovery needs besides the files.
struct Delivery<'a> {
    plan: &'a Plan,
    options: &'a Options,
    reader: &'a Reader,
    directory: &'a Directory,
    progress: &'a Progress,
}

impl Delivery<'_> {
    fn wal_directory(&self) -> PathBuf {
        self.directory.path().join("pg_wal")
    }

    /// Makes a folder of ours, or one that the backup left out.
    fn make_folder(&self, path: &Path) -> Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        let mut builder = fs::DirBuilder::new();
        builder
            .mode(0o700)
            .create(path)
            .context(|| format!("unable to make directory '{}'", path.display()))?;
        self.give(path)
    }

    fn give(&self, path: &Path) -> Result<()> {
        self.directory.owner().map_or(Ok(()), |owner| owner.give(path))
    }

    /// Writes a file of ours; for one that the backup may hold see [`replace`].
    fn write(&self, path: &Path, content: &[u8]) -> Result<()> {
        use std::io::Write as _;
        let attempted = || format!("unable to write '{}'", path.display());
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(path).context(attempted)?;
        file.write_all(content).context(attempted)?;
        self.give(path)
    }

    /// Tells the archiver that a file in `pg_wal` is archived already.
    fn mark_archived(&self, name: &str) -> Result<()> {
        let status = self.wal_directory().join("archive_status").join(format!("{name}.done"));
        self.write(&status, b"")
    }

    /// Puts every history file into `pg_wal`: PostgreSQL learns the path to its timeline from them, and
    /// takes for the new timeline a number that no history has (`findNewestTimeLine`).
    async fn place_histories(&self) -> Result<()> {
        let wal = self.wal_directory();
        self.make_folder(&wal)?;
        self.make_folder(&wal.join("archive_status"))?;
        for timeline in &self.plan.histories {
            let content = self.history(*timeline).await?;
            self.write_history(*timeline, &content)?;
        }
        Ok(())
    }

    async fn history(&self, timeline: TimelineId) -> Result<Bytes> {
        let repository = self.reader.repository();
        insist(repository.clock(), || repository.history_file(timeline)).await
    }

    fn write_history(&self, timeline: TimelineId, content: &[u8]) -> Result<()> {
        let name = timeline.history_file_name();
        self.write(&self.wal_directory().join(&name), content)?;
        self.mark_archived(&name)
    }

    /// Places the histories that other servers have stored since the plan was made, for who has no `wal-get`
    /// to look for them when it takes a number of its own. One number is looked for after the other until
    /// there is none, as PostgreSQL does. Gives a note when the repository is away.
    async fn place_later_histories(&self, wal: WalDelivery) -> Result<Option<String>> {
        if wal != WalDelivery::InPlace {
            return Ok(None);
        }
        let later = (self.plan.timeline.get()..u32::MAX).map(|number| number + 1);
        for timeline in later.filter_map(TimelineId::new) {
            if self.plan.histories.contains(&timeline) {
                continue;
            }
            // Once: everything is written, and waiting for a store that is away may cost all of it.
            match self.reader.repository().history_file(timeline).await {
                Ok(content) => self.write_history(timeline, &content)?,
                Err(error) if error.kind() == Kind::NotFound => break,
                Err(error) => {
                    return Ok(Some(format!(
                        "a server that was promoted since the plan was made may have the timeline that this \
                         one takes: unable to look for it: {error}"
                    )));
                }
            }
        }
        Ok(None)
    }

    /// Places WAL, all of it when it is little, or prepares for handing it over.
    async fn place_wal(&self) -> Result<PlacedWal> {
        let plan = self.plan;
        let is_standby = matches!(self.options.role, Role::Standby(_));
        let all = plan.wal_bytes() <= self.options.preplaced_bytes_max;
        // pg_verifybackup wants to see the WAL of the backup itself.
        let backup_end =
            plan.wal_segment_bytes.end_of(Lsn(plan.backup.end_lsn.0.saturating_sub(1)));
        let of_backup = backup_end.saturating_since(plan.backup.start_lsn);
        let placed_end = match (all, of_backup <= self.options.preplaced_bytes_max) {
            (true, _) => plan.wal_end_lsn,
            (false, true) => backup_end.min(plan.wal_end_lsn),
            (false, false) => Lsn::INVALID,
        };
        let pieces: Vec<Piece> =
            plan.pieces.iter().filter(|piece| piece.range.end() <= placed_end).copied().collect();
        let (count, notes) = self.place_segments(&pieces).await?;
        let wal = match all && !is_standby {
            true => WalDelivery::InPlace,
            false => WalDelivery::OnDemand,
        };
        if wal == WalDelivery::OnDemand && !is_standby {
            self.prepare_hand_over(&plan.path, placed_end)?;
        }
        Ok(PlacedWal { delivery: wal, segment_count: count, notes })
    }

    /// Places the segments of `pieces`; how many there are, and what replay will want besides.
    async fn place_segments(&self, pieces: &[Piece]) -> Result<(u64, Vec<String>)> {
        let wanted = segments::of_pieces(pieces, self.plan.wal_segment_bytes);
        let size = self.plan.wal_segment_bytes;
        self.progress.begin(Phase::Wal, wanted.len() as u64 * size.bytes());
        let source = RepositoryWal::of_restore(self.reader);
        let identity = Identity { system_id: self.plan.system_id, size, owner: None };
        let replayed = self.plan.backup.start_lsn..self.replay_end();
        let mut watch = Watch::new(size, self.directory.path(), replayed);
        for segment in &wanted {
            let path = self.wal_directory().join(&segment.name);
            segments::write(&source, segment, &path, identity).await?;
            self.give(&path)?;
            watch = watch.see(path, segment.known()).await?;
            self.mark_archived(&segment.name)?;
            self.progress.add_written(size.bytes());
        }
        let note = |place: PathBuf| {
            format!(
                "replay creates a tablespace in '{}', where nothing is: make an empty directory there for \
                 PostgreSQL's account, or recovery stops",
                place.display()
            )
        };
        Ok((wanted.len() as u64, watch.into_missing().into_iter().map(note).collect()))
    }

    /// Records from here on are not replayed.
    fn replay_end(&self) -> Lsn {
        match self.plan.stop {
            Stop::Before { .. } | Stop::After { .. } => self.plan.applied_end_lsn,
            Stop::EndOfWal | Stop::Immediate => self.plan.wal_end_lsn,
        }
    }

    fn prepare_hand_over(&self, path: &[PathPart], placed_end: Lsn) -> Result<()> {
        let plan = self.plan;
        let span = LsnRange::new(plan.backup.start_lsn, plan.wal_end_lsn)
            .ok_or_else(|| Error::new(Kind::Bug, "a plan whose WAL ends before its backup"))?;
        let size = plan.wal_segment_bytes;
        let mut settings = Settings::new(plan.cluster.clone(), plan.system_id, size, path, span);
        settings.preplaced_end_lsn = placed_end;
        settings.replay_end_lsn = Some(self.replay_end());
        let folder = Folder::of(&self.wal_directory());
        folder.create(&settings)?;
        for path in folder.made() {
            self.give(&path)?;
        }
        Ok(())
    }

    /// Signal file and `postgresql.auto.conf`; gives the other directory that `postgresql.conf` named, and
    /// names no more.
    fn write_settings(&self, wal: WalDelivery, control: &ControlFile) -> Result<Option<String>> {
        let root = self.directory.path();
        let (signal, upstream) = match &self.options.role {
            Role::Primary => (RECOVERY_SIGNAL, None),
            Role::Standby(upstream) => (STANDBY_SIGNAL, Some(upstream.clone())),
        };
        let is_standby = signal == STANDBY_SIGNAL;
        let settings = RecoverySettings {
            restore_command: match wal {
                WalDelivery::InPlace => NOTHING_TO_RESTORE.to_owned(),
                WalDelivery::OnDemand => self.wal_get_command(),
            },
            recovery_end_command: Some(match wal {
                WalDelivery::InPlace => REMOVE_BLOCK.to_owned(),
                WalDelivery::OnDemand => format!("{REMOVE_BLOCK}; {CLEAN_UP}"),
            }),
            stop: if is_standby { Stop::EndOfWal } else { self.plan.recovery_target() },
            timeline: (!is_standby).then_some(self.plan.timeline),
            action: self.options.action,
            upstream,
        };
        let (path, conf) = (root.join(AUTO_CONF), root.join(CONF));
        let (conf_text, auto_text) = (read_conf(&conf)?, read_conf(&path)?);
        let text = limits::apply(&settings, &control.limits, (&conf_text, &auto_text));
        let is_here = |place: &str| fs::canonicalize(place).ok() == fs::canonicalize(root).ok();
        let elsewhere = without_data_directory(&conf_text, is_here);
        if let Some((edited, _)) = &elsewhere {
            replace(&conf, edited, self.directory.owner())?;
        }
        replace(&path, &text, self.directory.owner())?;
        self.write(&root.join(signal), b"")?;
        Ok(elsewhere.map(|(_, place)| place))
    }

    fn wal_get_command(&self) -> String {
        let words = self.options.wal_get_command.iter().map(|word| shell_word(word));
        words.chain(["%f".to_owned(), "%p".to_owned()]).collect::<Vec<_>>().join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::repo::Repository;

    #[tokio::test]
    async fn a_backup_that_is_removed_while_it_is_restored_is_told_from_a_damaged_one() {
        let clock = Clock::simulated("2026-11-22T10:00:00Z".parse().unwrap(), 3);
        let (_, repository) = Repository::in_memory(&clock).await;
        let reader = repository.reader(Vec::new());
        let id = BackupId::new(clock.now(), TimelineId::FIRST, Lsn(0x200_0028));
        let missing = Error::new(Kind::NotFound, "no pack");
        let told = removed_meanwhile(missing, &reader, id).await;
        assert!(told.hint_text().unwrap().contains("tidemark hold"), "{told:?}");
        let damaged = Error::new(Kind::Corrupt, "a bad pack");
        assert_eq!(removed_meanwhile(damaged, &reader, id).await.hint_text(), None);
    }

    #[test]
    fn a_read_only_configuration_file_is_replaced_and_stays_read_only() {
        let root = tempfile::tempdir().unwrap();
        let (conf, fresh) = (root.path().join(AUTO_CONF), root.path().join("fresh.conf"));
        fs::write(&conf, "work_mem = 1").unwrap();
        fs::set_permissions(&conf, Permissions::from_mode(0o440)).unwrap();
        let old = fs::File::open(&conf).unwrap();
        for (path, mode) in [(&conf, 0o440), (&fresh, 0o600)] {
            replace(path, b"new", None).unwrap();
            assert_eq!(fs::read(path).unwrap(), b"new");
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, mode);
        }
        // By another file: root may write to this one, its owner may not.
        assert_eq!(std::io::read_to_string(&old).unwrap(), "work_mem = 1");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
    }
}
