//! A tool under measurement: an executable that is called with a verb. `tools/peers/README.md` says
//! what each verb must do and what the environment tells it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::Account;
use crate::harness::postgres::send_signal;
use crate::s3::S3;
use crate::stage::Stage;

/// The exit status for a verb that a tool does not have.
const NO_SUCH_VERB: i32 = 64;
/// Longest that one verb may take.
const VERB_MAX: Duration = Duration::from_secs(1200);

/// An installed peer.
#[derive(Clone, Debug)]
pub struct Peer {
    script: PathBuf,
    version: String,
}

impl Peer {
    /// Those that say their version, of `names` or of all: first the scripts of `tools/peers`, ours in
    /// front, then what `TIDEMARK_BENCH_PEERS` names.
    pub fn installed(names: &[String]) -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/peers");
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut scripts: Vec<PathBuf> = files
            .filter(|file| file.metadata().unwrap().permissions().mode() & 0o100 != 0)
            .collect();
        scripts.sort_by_key(|script| (!script.ends_with("tidemark"), script.clone()));
        let more = std::env::var_os("TIDEMARK_BENCH_PEERS").unwrap_or_default();
        scripts.extend(std::env::split_paths(&more).filter(|path| path.exists()));
        let wanted = |script: &PathBuf| {
            let name = script.file_name().unwrap().to_string_lossy().into_owned();
            names.is_empty() || names.contains(&name)
        };
        scripts.into_iter().filter(wanted).filter_map(Self::of).collect()
    }

    fn of(script: PathBuf) -> Option<Self> {
        let mut peer = Self { script, version: String::new() };
        let mut command = Command::new(&peer.script);
        command.arg("version").env("BENCH_HOME", "/nonexistent");
        let mut command = peer.with_tools(command);
        // What a script expects of a server is not looked at before its first verb that needs one.
        for name in ["BENCH_S3_BUCKET", "BENCH_S3_ENDPOINT", "BENCH_CA_FILE", "AWS_REGION"] {
            command.env(name, "");
        }
        for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "BENCH_JOBS"] {
            command.env(name, "");
        }
        let pg_bin = crate::harness::Binaries::of_this_run().dir().to_path_buf();
        command.envs([("PGHOST", ""), ("PGPORT", ""), ("PGUSER", ""), ("PGDATA", "")]);
        let output = command.env("PGBIN", pg_bin).stderr(Stdio::null()).output().ok()?;
        if !output.status.success() {
            println!("{} is not installed: it does not say its version", peer.name());
            return None;
        }
        peer.version = String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned();
        Some(peer)
    }

    fn with_tools(&self, mut command: Command) -> Command {
        command.env("BENCH_TIDEMARK", Account::current().tidemark_binary());
        command
    }

    /// The script's name.
    pub fn name(&self) -> &str {
        self.script.file_name().unwrap().to_str().unwrap()
    }

    /// What the tool says its version is.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Gets a peer ready for a round: an empty bucket, a folder of its own, and `setup`.
    pub fn enter<'a>(&'a self, stage: &'a Stage, keep: Keep) -> Result<Round<'a>, String> {
        let s3 = S3::start(&stage.certificates);
        let home = Account::current().make_dir(stage.home(), &format!("{}-home", self.name()));
        let script = home.join(self.name());
        // The checkout may be where the account may not look.
        std::fs::copy(&self.script, &script).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let metrics_port = crate::harness::postgres::free_port();
        let round = Round { peer: self, stage, s3, home, script, keep, metrics_port };
        round.run(&["setup"])?;
        Ok(round)
    }
}

/// Where a peer's repository is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// On the S3 server.
    S3,
    /// In a directory; ours alone knows how.
    Directory,
}

/// A peer with an empty repository.
#[derive(Debug)]
pub struct Round<'a> {
    peer: &'a Peer,
    stage: &'a Stage,
    /// The server with its bucket.
    pub s3: S3,
    home: PathBuf,
    script: PathBuf,
    keep: Keep,
    /// Where a script may let its tool serve metrics.
    pub metrics_port: u16,
}

impl Round<'_> {
    fn command(&self, words: &[&str]) -> Command {
        let (stage, postgres) = (self.stage, &self.stage.postgres);
        let mut command = self.peer.with_tools(Account::current().command(&self.script));
        if let Some(walg) = std::env::var_os("TIDEMARK_BENCH_WALG") {
            command.env("TIDEMARK_BENCH_WALG", walg);
        }
        command
            .args(words)
            .envs(self.s3.environment(&stage.certificates))
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", postgres.port().to_string())
            .env("PGUSER", "postgres")
            .env("PGDATA", postgres.data())
            .env("PGBIN", postgres.binaries().dir())
            .env("BENCH_HOME", &self.home)
            .env("BENCH_JOBS", stage.jobs.to_string())
            .env("BENCH_METRICS_PORT", self.metrics_port.to_string())
            .stdin(Stdio::null());
        if self.keep == Keep::Directory {
            command.env("BENCH_DIRECTORY", self.home.join("repository"));
        }
        command
    }

    fn log(&self) -> std::fs::File {
        let path = self.log_path();
        let log = std::fs::File::options().create(true).append(true).open(&path).unwrap();
        Account::current().give(&path);
        log
    }

    fn log_path(&self) -> PathBuf {
        self.home.join("peer.log")
    }

    /// What the peer said at the end.
    pub fn words(&self) -> String {
        let text = std::fs::read(self.log_path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Runs a verb to its end. `None` when the tool does not have it, `Err` with the end of what it said
    /// when it failed.
    pub fn run(&self, words: &[&str]) -> Result<Option<()>, String> {
        let log = self.log();
        let mut command = self.command(words);
        let mut child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let deadline = Instant::now() + VERB_MAX;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return match status.code() {
                    Some(0) => Ok(Some(())),
                    Some(NO_SUCH_VERB) => Ok(None),
                    _ => Err(format!("{words:?}: {status}\n{}", self.words())),
                };
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{words:?} does not end\n{}", self.words()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The `archive_command` that it needs; empty for none.
    pub fn archive_command(&self) -> String {
        let output = self.command(&["archive-command"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Starts to carry WAL away by the replication protocol; `None` when the tool cannot.
    pub fn stream(&self) -> Result<Option<Stream>, String> {
        let log = self.log();
        let mut command = self.command(&["stream"]);
        let mut child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let connected = "select count(*) from pg_stat_replication where state = 'streaming'";
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.stage.postgres.psql(connected) != "1" {
            if let Some(status) = child.try_wait().unwrap() {
                let cannot = status.code() == Some(NO_SUCH_VERB);
                return if cannot { Ok(None) } else { Err(format!("stream: {}", self.words())) };
            }
            if Instant::now() > deadline {
                drop(Stream { child: Some(child) });
                return Err(format!("stream does not connect: {}", self.words()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(Some(Stream { child: Some(child) }))
    }
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.home);
    }
}

/// A peer that carries WAL away.
#[derive(Debug)]
pub struct Stream {
    child: Option<Child>,
}

impl Stream {
    /// SIGTERM, and waits for the end.
    pub fn stop(mut self) {
        let mut child = self.child.take().unwrap();
        send_signal(child.id(), "TERM");
        let deadline = Instant::now() + Duration::from_secs(30);
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                let _ = child.kill();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
