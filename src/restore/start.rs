//! Starting PostgreSQL on a restored directory and watching it until the target is reached.
//!
//! # Invariants
//! - It runs as the owner of the files, never as root, and with all groups of that account.
//! - The directory is the account's by now: what root writes there is written with the account's rights
//!   (see `rights`).
//! - Until the outcome is known a server that is still running is ours: whoever gives up, or drops the
//!   future, has it stopped.
//! - Where it stopped is compared with the plan; a difference is an error, not a remark.

use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use serde::Serialize;

use crate::clock::Clock;
use crate::error::{Context, Error, Kind, Result};
use crate::file;
use crate::pg::control::{ClusterState, ControlFile, PG_CONTROL_FILE_SIZE, XLOG_CONTROL_FILE};
use crate::pg::{Lsn, Version};
use crate::repo::Reader;

use super::directory::Owner;
use super::feed::{FetchAhead, WhenIdle};
use super::handover::Folder;
use super::plan::Plan;
use super::progress::{Phase, Progress};
use super::rights::{self, as_account};
use super::run::Role;
use super::server_log::{Outcome, ServerLog};
use super::settings::{Action, Stop};

/// Name of the log of the recovery, in the data directory.
pub const LOG: &str = "tidemark-recovery.log";
/// Pause between two looks at the server.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a server may take to stop before it is told to do so at once.
const STOP_MAX: Duration = Duration::from_secs(60);
/// Longest header of a WAL page, and padding.
const HEADER_BYTES_MAX: u64 = 48;
/// Most bytes of the log read at a time.
const LOG_BYTES_MAX: u64 = 1 << 20;
/// Longest `PG_VERSION` or `postmaster.pid` that is read: a few lines, some of them paths.
const SMALL_FILE_BYTES_MAX: u64 = 64 << 10;

/// Who may connect to the server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// Whom its own configuration lets in.
    #[default]
    AsConfigured,
    /// Nobody by network; anybody who may enter this folder, as any database user. Nothing is archived.
    /// For a look at the data, a drill, a demonstration.
    SocketOnly {
        /// The folder of the socket, which must be the owner's and closed to others.
        folder: PathBuf,
    },
}

/// How to start the server.
#[derive(Clone, Debug, Default)]
pub struct StartOptions {
    /// Folder with PostgreSQL's programs; `None` looks in the usual places.
    pub postgres_bin: Option<PathBuf>,
    /// Who may connect.
    pub isolation: Isolation,
    /// Port instead of the configured one.
    pub port: Option<u16>,
    /// What was told to [`run`](super::run()).
    pub action: Action,
    /// What was told to [`run`](super::run()).
    pub role: Role,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StartReport {
    /// How recovery ended.
    pub outcome: Outcome,
    /// The timeline the server is on now, when it was promoted.
    pub new_timeline: Option<u32>,
    /// Start of the last record replayed.
    pub last_record_lsn: Option<Lsn>,
    /// Time of the last transaction replayed, as PostgreSQL prints it.
    pub last_transaction: Option<String>,
    /// Process of the server, when it is running.
    pub pid: Option<u32>,
    /// From the start of the server to the outcome.
    pub elapsed_ms: u64,
    /// Where the server logged.
    pub log: PathBuf,
    /// What else happened.
    pub notes: Vec<String>,
}

/// Starts PostgreSQL on `into`, feeds it WAL, and waits for the outcome.
///
/// # Cancel safety
/// Dropping the future stops the server.
///
/// # Errors
/// `unavailable` with what PostgreSQL said when recovery failed, `not found` when there are no programs.
pub async fn start(
    plan: &Plan,
    into: &Path,
    options: &StartOptions,
    reader: &Reader,
    progress: &Progress,
) -> Result<StartReport> {
    let clock = reader.repository().clock();
    let owner = Owner::of(into)?;
    let programs = Programs::find(into, options.postgres_bin.as_deref())?;
    let mut notes = complete_configuration(into, owner)?;
    if let Isolation::SocketOnly { folder } = &options.isolation {
        write_once(&folder.join("pg_hba.conf"), "local all all trust\n", owner)?;
    }
    progress.begin(Phase::Replaying, plan.wal_bytes());
    let folder = Folder::of(&into.join("pg_wal")).of_account(owner);
    let begun = clock.instant();
    let mut server = Server::spawn(&programs, into, owner, options)?;
    let fetching = async {
        let Some(settings) = folder.settings()? else { return Ok(()) };
        let first = settings
            .wal_segment_bytes
            .number_of(settings.preplaced_end_lsn.max(settings.start_lsn));
        let ahead = FetchAhead {
            folder: &folder,
            owner: Owner::process_is_root().then_some(owner),
            settings: &settings,
            reader,
            when_idle: WhenIdle::Stay,
        };
        ahead.run(first).await
    };
    let recovery = Recovery { plan, options, progress };
    let (watched, fetched) = watch(&mut server, recovery, fetching).await;
    let outcome = match (watched, fetched) {
        (Err(error), Some(Err(cause))) => return Err(cause.context(error)),
        (watched, _) => watched?,
    };
    check_stop(&server.log, plan, &outcome)?;
    if outcome == Outcome::Promoted && options.action == Action::Pause {
        notes.push("PostgreSQL could not pause, because it allowed no connections yet at the target, and was promoted".to_owned());
    }
    progress.begin(Phase::Done, 0);
    let elapsed = clock.instant().saturating_duration_since(begun);
    if outcome == Outcome::Promoted && options.isolation == Isolation::AsConfigured {
        server.restart_as_configured(&programs, clock).await?;
    }
    let log = &server.log;
    let report = StartReport {
        outcome,
        new_timeline: log.new_timeline,
        last_record_lsn: log.redo_done_lsn,
        last_transaction: log.last_transaction.clone(),
        pid: None,
        elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        log: into.join(LOG),
        notes,
    };
    Ok(StartReport { pid: server.leave(), ..report })
}

/// A recovery under way: what is to come of it, and who is told.
#[derive(Clone, Copy)]
struct Recovery<'a> {
    plan: &'a Plan,
    options: &'a StartOptions,
    progress: &'a Progress,
}

/// Watches the server until the outcome is known; beside it WAL is fetched ahead, and what came of that is
/// given if it ended first.
async fn watch(
    server: &mut Server,
    recovery: Recovery<'_>,
    fetching: impl Future<Output = Result<()>>,
) -> (Result<Outcome>, Option<Result<()>>) {
    let mut fetching = std::pin::pin!(fetching);
    let mut fetched = None;
    let mut watching = std::pin::pin!(server.outcome(recovery));
    loop {
        tokio::select! {
            outcome = &mut watching => return (outcome, fetched),
            ended = &mut fetching, if fetched.is_none() => fetched = Some(ended),
        }
    }
}

/// Recovery must have ended where the plan said.
fn check_stop(log: &ServerLog, plan: &Plan, outcome: &Outcome) -> Result<()> {
    let expected = match plan.recovery_target() {
        Stop::Before { lsn } | Stop::After { lsn } => Some(lsn),
        Stop::EndOfWal | Stop::Immediate => None,
    };
    let Some(expected) = expected.filter(|_| *outcome != Outcome::Following) else { return Ok(()) };
    match log.stopping_lsn {
        // An LSN between records stops at the next one, which may begin behind a page header.
        Some(found)
            if found >= expected
                && found.saturating_since(plan.applied_end_lsn.max(expected))
                    < HEADER_BYTES_MAX =>
        {
            Ok(())
        }
        found => {
            let found = found.map_or_else(|| "nowhere it told".to_owned(), |lsn| lsn.to_string());
            let message = format!("PostgreSQL stopped at {found}, planned was {expected}");
            Err(Error::new(Kind::Bug, message).hint("The restored cluster is not at the target. Please report this with the log of the recovery."))
        }
    }
}

/// Where PostgreSQL's programs are.
struct Programs {
    folder: PathBuf,
}

impl Programs {
    fn find(into: &Path, given: Option<&Path>) -> Result<Self> {
        let version_file = into.join("PG_VERSION");
        let text = file::read(&version_file, SMALL_FILE_BYTES_MAX)
            .context(|| format!("unable to read '{}'", version_file.display()))?;
        let major = Version::from_version_file(&text)?.major();
        let usual = [format!("/usr/lib/postgresql/{major}/bin"), format!("/usr/pgsql-{major}/bin")];
        let other = ["/usr/local/pgsql/bin", "/usr/local/bin", "/usr/bin"].map(PathBuf::from);
        let places: Vec<PathBuf> = match given {
            Some(folder) => vec![folder.to_path_buf()],
            None => usual.iter().map(PathBuf::from).chain(other).collect(),
        };
        let fits = |folder: &PathBuf| program_major(&folder.join("postgres")) == Some(major);
        places.into_iter().find(fits).map(|folder| Self { folder }).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("unable to find the programs of PostgreSQL {major}"))
                .hint("Name the folder that has 'postgres' with --postgres-bin.")
        })
    }

    /// To be started by [`rights::spawn`].
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.folder.join(program));
        if Owner::process_is_root() {
            // Root's is not where a standby's .pgpass is; without one, libpq asks for the account's.
            command.env_remove("HOME");
        }
        let libraries = self.folder.join("../lib");
        if !self.folder.starts_with("/usr") && libraries.is_dir() {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command.stdin(Stdio::null());
        command
    }
}

fn program_major(program: &Path) -> Option<u32> {
    let folder = program.parent()?;
    let mut command = Command::new(program);
    let libraries = folder.join("../lib");
    if !folder.starts_with("/usr") && libraries.is_dir() {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    let answer = command.arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    let digits = text.split_whitespace().nth(2)?;
    digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

impl Owner {
    /// Who owns `path`.
    fn of(path: &Path) -> Result<Self> {
        let found =
            fs::metadata(path).context(|| format!("unable to look at '{}'", path.display()))?;
        if found.uid() == 0 {
            let message =
                format!("unable to start PostgreSQL on '{}': it belongs to root", path.display());
            return Err(Error::new(Kind::Usage, message)
                .hint("Restore with --owner and the user that runs PostgreSQL."));
        }
        Ok(Self { uid: found.uid(), gid: found.gid() })
    }
}

/// A server whose configuration is kept elsewhere (`/etc/postgresql` on Debian) does not start without
/// these files; the least of them is made.
fn complete_configuration(into: &Path, owner: Owner) -> Result<Vec<String>> {
    let files = [
        (
            "postgresql.conf",
            "# made by tidemark restore --start: the backup has no postgresql.conf\n",
        ),
        ("pg_hba.conf", "local all all peer\n"),
        ("pg_ident.conf", ""),
    ];
    let mut notes = Vec::new();
    for (name, content) in files {
        if !write_once(&into.join(name), content, owner)? {
            continue;
        }
        notes.push(format!("the backup has no {name}; a minimal one was made"));
    }
    Ok(notes)
}

/// Writes a small file unless it is there; whether it did.
fn write_once(path: &Path, content: &str, owner: Owner) -> Result<bool> {
    use std::io::Write as _;
    let attempted = || format!("unable to write '{}'", path.display());
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    as_account(Some(owner), || match options.open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        other => {
            other.and_then(|mut file| file.write_all(content.as_bytes())).context(attempted)?;
            Ok(true)
        }
    })
}

/// A log that begins empty, to be written and to be read.
fn open_log(path: &Path, owner: Owner) -> Result<(File, File)> {
    let attempted = || format!("unable to write '{}'", path.display());
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600);
    as_account(Some(owner), || {
        let written = options.open(path).context(attempted)?;
        written.set_len(0).context(attempted)?;
        Ok((written, File::open(path).context(attempted)?))
    })
}

/// A server of ours.
struct Server {
    child: Option<Child>,
    into: PathBuf,
    owner: Owner,
    log_file: File,
    log: ServerLog,
}

impl Server {
    fn spawn(
        programs: &Programs,
        into: &Path,
        owner: Owner,
        options: &StartOptions,
    ) -> Result<Self> {
        let log_path = into.join(LOG);
        let attempted = || format!("unable to write '{}'", log_path.display());
        let (log, log_file) = open_log(&log_path, owner)?;
        let mut command = programs.command("postgres");
        command.arg("-D").arg(into).current_dir(into);
        for setting in settings(into, options) {
            command.args(["-c", &setting]);
        }
        let errors = log.try_clone().context(attempted)?;
        // In a group of its own: a Ctrl-C meant for us is not the server's.
        command.stdout(log).stderr(errors).process_group(0);
        let child = rights::spawn(owner, command)?;
        let (into, log) = (into.to_path_buf(), ServerLog::default());
        Ok(Self { child: Some(child), into, owner, log_file, log })
    }

    /// Waits for the outcome.
    async fn outcome(&mut self, recovery: Recovery<'_>) -> Result<Outcome> {
        let Recovery { plan, options, progress } = recovery;
        loop {
            // Ended first, then the log: what it said last is not missed.
            let ended = self.ended()?;
            self.read_log()?;
            self.show_progress(plan, progress);
            if let Some(status) = ended {
                return self.after_end(status, options);
            }
            let state = self.postmaster_state();
            match (&options.role, state.as_deref()) {
                // A hot standby that lets clients in is "ready" too; only pg_control tells them apart.
                (_, Some("ready")) if self.is_in_production() => return Ok(Outcome::Promoted),
                (Role::Standby(_), Some("ready" | "standby")) => return Ok(Outcome::Following),
                _ if self.log.paused => return Ok(Outcome::Paused),
                _ if self.log.too_low.is_some() => return Err(self.too_low()),
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    fn after_end(&self, status: ExitStatus, options: &StartOptions) -> Result<Outcome> {
        if options.action == Action::Shutdown && self.log.shut_down_at_target {
            return Ok(Outcome::Stopped);
        }
        let log = self.into.join(LOG);
        let message = format!(
            "PostgreSQL ended with {status} before the target was reached: {}",
            self.log.why()
        );
        Err(Error::new(Kind::Unavailable, message).hint(format!("Its log is '{}'.", log.display())))
    }

    /// Recovery waits at a change of settings that hot standby cannot follow, and goes on only when it is
    /// told to end.
    fn too_low(&self) -> Error {
        let why = self.log.too_low.as_deref().unwrap_or_default();
        let message = format!("PostgreSQL does not replay any further: {why}");
        Error::new(Kind::Config, message).hint(format!(
            "The server's setting was raised after the backup. Raise it in '{}' and start PostgreSQL: \
             recovery goes on from there.",
            self.into.join("postgresql.auto.conf").display()
        ))
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let ended = self.child.as_mut().map(Child::try_wait).transpose();
        Ok(ended.context(|| "unable to watch PostgreSQL")?.flatten())
    }

    fn read_log(&mut self) -> Result<()> {
        let mut bytes = Vec::new();
        let read = (&mut self.log_file).take(LOG_BYTES_MAX).read_to_end(&mut bytes);
        read.context(|| "unable to read PostgreSQL's log")?;
        self.log.feed(&String::from_utf8_lossy(&bytes));
        Ok(())
    }

    fn show_progress(&self, plan: &Plan, progress: &Progress) {
        let size = plan.wal_segment_bytes;
        let segment = self.log.segment.as_ref().and_then(|name| size.parse_file_name(name));
        let restored = segment.and_then(|(_, number)| size.range_of(number));
        if let Some(range) = restored {
            progress.set_done(range.start().saturating_since(plan.backup.start_lsn));
        }
    }

    /// Whether recovery is over, as `pg_control` says; a file that is just being written says nothing.
    fn is_in_production(&self) -> bool {
        let path = self.into.join(XLOG_CONTROL_FILE);
        let control = file::read(&path, PG_CONTROL_FILE_SIZE as u64).ok();
        let control = control.and_then(|bytes| ControlFile::decode(&bytes).ok());
        control.is_some_and(|control| control.state == ClusterState::InProduction)
    }

    fn pid_file(&self) -> std::io::Result<String> {
        file::read_to_string(&self.into.join("postmaster.pid"), SMALL_FILE_BYTES_MAX)
    }

    /// The last line of `postmaster.pid`: `starting`, `standby`, `ready` or `stopping`.
    fn postmaster_state(&self) -> Option<String> {
        let text = self.pid_file().ok()?;
        let ours = text.lines().next()?.trim().parse::<u32>().ok()? == self.child.as_ref()?.id();
        ours.then(|| text.lines().nth(7).map(|line| line.trim().to_owned())).flatten()
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().and_then(|child| i32::try_from(child.id()).ok());
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            // A server that has just ended needs no signal.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Stops the server and starts it again without our settings, so that it runs from now on as it will
    /// after every later start.
    async fn restart_as_configured(&mut self, programs: &Programs, clock: &Clock) -> Result<()> {
        self.signal(Signal::INT);
        let deadline = clock.instant() + STOP_MAX;
        while self.ended()?.is_none() {
            if clock.instant() > deadline {
                return Err(Error::new(
                    Kind::Unavailable,
                    "PostgreSQL reached the target but does not stop for its restart",
                ));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.read_log()?;
        self.child = None;
        let log = self.into.join(LOG);
        let mut command = programs.command("pg_ctl");
        command.args(["start", "-w", "-t", "60", "-s", "-D"]).arg(&self.into).arg("-l").arg(&log);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let owner = self.owner;
        let run = move || rights::spawn(owner, command)?.wait().context(|| "unable to run pg_ctl");
        let started = super::scan::blocking(run).await??;
        self.read_log()?;
        if started.success() {
            return Ok(());
        }
        let message = format!(
            "the target was reached, but PostgreSQL does not start with its own configuration: {}",
            self.log.why()
        );
        Err(Error::new(Kind::Unavailable, message).hint(format!(
            "Its log is '{}'. Correct the configuration and start it; the restore is complete.",
            log.display()
        )))
    }

    /// Lets the server run on; its process, if it runs.
    fn leave(mut self) -> Option<u32> {
        let text = self.pid_file().ok();
        let running = text.and_then(|text| text.lines().next()?.trim().parse().ok());
        if let Some(mut child) = self.child.take() {
            // A server that has ended is reaped; another one goes on without us.
            let _ = child.try_wait();
        }
        running
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.signal(Signal::INT);
    }
}

/// Settings of the recovery run only.
fn settings(into: &Path, options: &StartOptions) -> Vec<String> {
    let mut settings = vec![
        // The log is read here, in English.
        "logging_collector=off".to_owned(),
        "log_destination=stderr".to_owned(),
        "lc_messages=C".to_owned(),
        "log_min_messages=warning".to_owned(),
        // Verbose puts an error code before each message.
        "log_error_verbosity=default".to_owned(),
        // Where an included file says otherwise, it would be another cluster that is started.
        format!("data_directory={}", into.display()),
    ];
    let looks_around = options.action == Action::Pause || options.role != Role::Primary;
    settings.push(format!("hot_standby={}", if looks_around { "on" } else { "off" }));
    settings.extend(options.port.map(|port| format!("port={port}")));
    if let Isolation::SocketOnly { folder } = &options.isolation {
        settings.push("listen_addresses=".to_owned());
        settings.push(format!("unix_socket_directories={}", folder.display()));
        settings.push("archive_mode=off".to_owned());
        settings.push(format!("hba_file={}", folder.join("pg_hba.conf").display()));
    }
    settings
}
