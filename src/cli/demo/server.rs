//! A throwaway PostgreSQL: found, made, started, asked, stopped. It never runs as root.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};

use crate::clock::Clock;
use crate::config::Environment;
use crate::error::{Context, Error, Kind, Result};
use crate::wire::{ConnectOptions, Connection, Row, Session};

/// How long a server may take to start or to end its recovery.
const START_MAX: Duration = Duration::from_secs(120);

/// How often to look whether it has.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// How long a server may take to stop before it is killed.
const STOP_MAX: Duration = Duration::from_secs(20);

/// Where distributions put PostgreSQL's programs, a folder a major version.
const USUAL_PLACES: [(&str, &str); 4] = [
    ("/usr/lib/postgresql", "bin"),
    ("/usr/pgsql-*", "bin"),
    ("/usr/local/pgsql", "bin"),
    ("/opt/homebrew/opt", "bin"),
];

/// Who runs the server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Account {
    /// `None`: whoever runs us.
    ids: Option<(u32, u32)>,
}

impl Account {
    /// Ourselves, or an unprivileged account when we are root, which PostgreSQL refuses.
    pub(super) fn unprivileged() -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self { ids: None });
        }
        let accounts = std::fs::read_to_string("/etc/passwd")
            .context(|| "unable to read the accounts of this machine in '/etc/passwd'")?;
        let find = |name: &str| {
            let line = accounts.lines().find(|line| line.split(':').next() == Some(name))?;
            let mut fields = line.split(':').skip(2);
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        };
        let ids = find("postgres").or_else(|| find("nobody")).ok_or_else(|| {
            Error::new(
                Kind::Config,
                "unable to run PostgreSQL: we are root and there is no account 'postgres' or 'nobody'",
            )
            .hint("Run the demo as an ordinary user.")
        })?;
        Ok(Self { ids: Some(ids) })
    }

    /// A new folder of this account, closed to others.
    pub(super) fn make_dir(self, path: &Path) -> Result<()> {
        let attempted = || format!("unable to make the folder '{}'", path.display());
        std::fs::create_dir(path).context(attempted)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o700)).context(attempted)?;
        match self.ids {
            Some((user, group)) => chown(path, Some(user), Some(group)).context(attempted),
            None => Ok(()),
        }
    }

    fn command(self, program: &Path, home: &Path) -> Command {
        let mut command = Command::new(program);
        if let Some((user, group)) = self.ids {
            command.uid(user).gid(group);
        }
        command.current_dir(home).env_clear().env("HOME", home).env("LC_ALL", "C").env("TZ", "UTC");
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }
}

/// The folder with PostgreSQL's programs: the one named, one of the PATH, or the newest installed.
pub(super) fn find_programs(named: Option<&Path>, environment: &Environment) -> Result<PathBuf> {
    let complete = |dir: &PathBuf| dir.join("initdb").exists() && dir.join("postgres").exists();
    if let Some(dir) = named {
        let dir = dir.to_path_buf();
        return complete(&dir).then_some(dir.clone()).ok_or_else(|| {
            let message = format!("there is no 'initdb' and 'postgres' in '{}'", dir.display());
            Error::new(Kind::NotFound, message)
        });
    }
    let path = environment.get("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(path).find(complete);
    on_path.or_else(|| installed().into_iter().rfind(complete)).ok_or_else(|| {
        Error::new(Kind::NotFound, "unable to find PostgreSQL's server programs on this machine")
            .hint("Install them (apt-get install postgresql), or name their folder with --postgres-bin.")
    })
}

/// Folders of installed versions, oldest version first.
fn installed() -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for (place, below) in USUAL_PLACES {
        let (parent, prefix) =
            match place.strip_suffix('*').and_then(|place| place.rsplit_once('/')) {
                Some((parent, prefix)) => (parent, prefix),
                None => (place, ""),
            };
        for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(version) = name.strip_prefix(prefix) else { continue };
            let digits: String = version.chars().filter(char::is_ascii_digit).collect();
            found.push((digits.parse().unwrap_or(0), entry.path().join(below)));
        }
        found.push((0, Path::new(place).join(below)));
    }
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// A server on a Unix socket in a folder of its own.
#[derive(Debug)]
pub(super) struct Server {
    account: Account,
    programs: PathBuf,
    /// Its socket and log.
    home: PathBuf,
    /// Its data directory.
    pub(super) data: PathBuf,
    process: Option<Child>,
}

impl Server {
    /// A server for the data directory `data`, which may not exist yet, with its socket in `home`.
    pub(super) fn new(account: Account, programs: &Path, home: &Path, data: &Path) -> Self {
        Self {
            account,
            programs: programs.to_path_buf(),
            home: home.to_path_buf(),
            data: data.to_path_buf(),
            process: None,
        }
    }

    /// Makes the data directory.
    pub(super) async fn initialise(&self) -> Result<()> {
        let mut command = self.account.command(&self.programs.join("initdb"), &self.home);
        let made = command
            .args(["--username=demo", "--auth=trust", "--data-checksums", "--encoding=UTF8"])
            .args(["--locale=C", "--no-sync", "-D"])
            .arg(&self.data)
            .output()
            .await
            .context(|| "unable to run initdb")?;
        if made.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&made.stderr);
        Err(Error::new(Kind::Unavailable, format!("initdb failed: {}", said.trim())))
    }

    /// Starts it and waits until it takes writes, an end of recovery included.
    pub(super) async fn start(&mut self, clock: &Clock) -> Result<()> {
        let log = self.home.join("postgres.log");
        let output = std::fs::File::options().create(true).append(true).open(&log);
        let output = output.context(|| format!("unable to open '{}'", log.display()))?;
        let again = output.try_clone().context(|| "unable to share the server's log")?;
        let mut command = self.account.command(&self.programs.join("postgres"), &self.home);
        let socket = format!("unix_socket_directories={}", self.home.display());
        let mut process = command
            .arg("-D")
            .arg(&self.data)
            .args(["-c", &socket, "-c", "listen_addresses=", "-c", "max_wal_senders=4"])
            .stdout(output)
            .stderr(again)
            .spawn()
            .context(|| "unable to start PostgreSQL")?;
        let deadline = clock.instant() + START_MAX;
        loop {
            if let Some(status) = process.try_wait().context(|| "unable to look at PostgreSQL")? {
                return Err(self.failed(&format!("it ended with {status}")));
            }
            if let Ok(row) = self.ask(clock, "SELECT pg_is_in_recovery()").await
                && row.text(0)? == "f"
            {
                self.process = Some(process);
                return Ok(());
            }
            if clock.instant() > deadline {
                return Err(self.failed("it did not answer in time"));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    fn failed(&self, why: &str) -> Error {
        let log = std::fs::read_to_string(self.home.join("postgres.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(8).collect();
        let tail = lines.into_iter().rev().collect::<Vec<_>>().join("\n");
        Error::new(Kind::Unavailable, format!("unable to start PostgreSQL: {why}\n{tail}"))
    }

    /// How to connect to it.
    pub(super) fn url(&self) -> String {
        format!("host={} user=demo dbname=postgres", self.home.display())
    }

    /// A connection for SQL.
    pub(super) async fn connect(&self, clock: &Clock) -> Result<Connection> {
        let options = ConnectOptions::parse(&self.url(), &|_| None)?;
        let mut connection = Connection::connect(&options, Session::Database, clock).await?;
        connection.query("SET search_path = public").await?;
        Ok(connection)
    }

    /// The one row that a query answers.
    pub(super) async fn ask(&self, clock: &Clock, sql: &str) -> Result<Row> {
        self.connect(clock).await?.query_one(sql).await
    }

    /// Stops it: fast shutdown, or by force when that takes too long.
    pub(super) async fn stop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let pid = process.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            // What is gone already needs no signal.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
        if tokio::time::timeout(STOP_MAX, process.wait()).await.is_err() {
            // Its folder is deleted next; nothing in it is worth a clean end.
            drop(process.kill().await);
        }
    }
}
