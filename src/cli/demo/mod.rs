//! `tidemark demo`: the whole job on a throwaway server, by the same commands a person would type.
//!
//! Everything happens in one temporary folder: two servers on Unix sockets, the repository, the
//! identity. Nothing else of this machine is read or written.

mod proof;
mod server;
mod workload;

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use jiff::SignedDuration;
use serde_json::json;
use tokio::process::{Child, Command};

use super::invocation::Invocation;
use super::terminal::Terminal;
use super::words;
use crate::clock::Clock;
use crate::error::{Context, Error, Kind, Result};
use server::{Account, Server};

/// How long the workload runs before the accident.
const WORKLOAD: Duration = Duration::from_secs(6);

/// How long the stream may take to stop.
const STOP_MAX: Duration = Duration::from_secs(30);

/// How long to wait for the stream to begin, and for the WAL of the accident to be durable.
const DURABLE_MAX: Duration = Duration::from_secs(60);

/// How often to look whether it has.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// How often to try to remove the folder while killed servers still write to it.
const REMOVALS_MAX: u32 = 40;

/// Show the main job on a throwaway PostgreSQL: backup, streaming, an accident, and the way back.
///
/// Starts a server of its own in a temporary folder, writes to it, destroys something, restores to
/// the moment before, compares row for row, and removes everything again. Nothing else of this
/// machine is touched.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder with PostgreSQL's programs (initdb and postgres).
    ///
    /// Without it the PATH and the usual places of distributions are searched, newest first.
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub(super) postgres_bin: Option<PathBuf>,
    /// Leave the temporary folder in place and print where it is.
    #[arg(long)]
    pub(super) keep: bool,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let Invocation { config, clock, terminal, stop } = &invocation;
    let programs = server::find_programs(args.postgres_bin.as_deref(), &config.environment)?;
    let account = Account::unprivileged()?;
    let folder = Folder::make(account, clock, args.keep, terminal)?;
    let demo = Demo {
        account,
        programs,
        home: folder.path.clone(),
        clock: clock.clone(),
        terminal: terminal.clone(),
        tidemark: std::env::current_exe().context(|| "unable to find our own program")?,
        environment: config.environment.bare(),
    };
    let told = tokio::select! {
        told = demo.tell() => told,
        () = stop.cancelled() => Err(Error::new(Kind::Cancelled, "the demo was stopped")),
    };
    let removed = folder.remove().await;
    let result = told?;
    removed?;
    if args.json { terminal.json_line(&result) } else { Ok(()) }
}

/// The folder of one demo; removed with all that is in it.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    keep: bool,
    terminal: Terminal,
}

impl Folder {
    fn make(account: Account, clock: &Clock, keep: bool, terminal: &Terminal) -> Result<Self> {
        let number = u32::from_le_bytes(clock.random::<4>()?);
        let path = std::env::temp_dir().join(format!("tidemark-demo-{number:08x}"));
        account.make_dir(&path)?;
        Ok(Self { path, keep, terminal: terminal.clone() })
    }

    /// Removes everything; servers that were killed with the story may need a moment to be gone.
    async fn remove(&self) -> Result<()> {
        if self.keep {
            self.terminal.remark(&format!("kept: '{}'", self.path.display()));
            return Ok(());
        }
        let mut removed = std::fs::remove_dir_all(&self.path);
        for _ in 0..REMOVALS_MAX {
            if removed.is_ok() {
                break;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
            removed = std::fs::remove_dir_all(&self.path);
        }
        removed.context(|| format!("unable to remove '{}'", self.path.display()))
    }
}

struct Demo {
    account: Account,
    programs: PathBuf,
    home: PathBuf,
    clock: Clock,
    terminal: Terminal,
    tidemark: PathBuf,
    /// For what runs without the caller's settings.
    environment: Vec<(String, String)>,
}

impl Demo {
    /// Tells the story, step by step; the result for `--json`.
    async fn tell(&self) -> Result<serde_json::Value> {
        let began = self.clock.instant();
        let mut server =
            Server::new(self.account, &self.programs, &self.home, &self.home.join("data"));
        self.step("A throwaway PostgreSQL server with a shop's orders in it");
        server.initialise().await?;
        server.start(&self.clock).await?;
        let version = server.ask(&self.clock, "SHOW server_version").await?.text(0)?.to_owned();
        workload::prepare(&server, &self.clock).await?;
        self.say(&format!("PostgreSQL {version} in '{}'", self.home.display()));

        self.step("Stream every byte of its WAL, encrypted, into a repository");
        let mut stream = self.spawn(&["stream", "--postgres", &server.url()])?;
        self.wait_streaming(&server, &mut stream).await?;
        self.step("Take a base backup while it runs");
        let backup_began = self.clock.instant();
        self.tidemark(&["backup", "--postgres", &server.url()]).await?;
        let backup_took = backup_began.elapsed();

        self.step("Customers order");
        let orders = workload::run(&server, &self.clock, WORKLOAD).await?;
        self.say(&format!("{orders} transactions committed, one by one"));
        let truth = proof::take(&server, &self.clock).await?;
        self.say(&format!("it is {}: {} rows, and all is well", truth.time, truth.rows()));

        self.step("The accident: an UPDATE without WHERE, and a DROP TABLE on the wrong server");
        let accident = workload::accident(&server, &self.clock).await?;
        for line in &accident.statements {
            self.say(line);
        }
        let durable_after = self.wait_durable(&accident).await?;
        self.end(&mut stream).await?;
        server.stop().await;
        self.say(&format!(
            "the accident itself was durable in the repository {} after it was committed; \
             the server is gone now",
            words::length(durable_after)
        ));

        self.step("Back to the moment before it");
        let list = self.tidemark_json(&["list", "--json"]).await?;
        self.tidemark(&["list"]).await?;
        let (found, restore_took) = self.restore(&truth).await?;

        self.step("The proof");
        let lost = truth.compare(&found)?;
        self.say(&format!(
            "every row of every table is what it was at {}: {} rows, nothing lost, nothing added",
            truth.time,
            truth.rows()
        ));
        self.say(&format!(
            "base backup {}, restore to a running server {}, everything {}",
            took(backup_took),
            took(restore_took),
            took(began.elapsed())
        ));
        Ok(json!({
            "postgres_version": version,
            "target_time": truth.time,
            "rows": truth.rows(),
            "rows_lost_before_target": lost,
            "transactions": orders,
            "backup_seconds": backup_took.as_secs_f64(),
            "restore_seconds": restore_took.as_secs_f64(),
            "commit_to_durable_seconds": durable_after.as_secs_f64(),
            "newest_durable_commit": list.get("newest_durable_commit"),
        }))
    }

    /// Restores to the moment of `truth` on another server: what that holds, and how long it took
    /// until it could be asked.
    async fn restore(&self, truth: &proof::Proof) -> Result<(proof::Proof, Duration)> {
        let began = self.clock.instant();
        let place = self.home.join("restored");
        self.account.make_dir(&place)?;
        let data = place.join("data");
        let into = data.display().to_string();
        self.tidemark(&["restore", "--to-time", &truth.time, "--into", &into]).await?;
        let mut server = Server::new(self.account, &self.programs, &place, &data);
        server.start(&self.clock).await?;
        let took = began.elapsed();
        let found = proof::take(&server, &self.clock).await;
        server.stop().await;
        Ok((found?, took))
    }

    fn step(&self, title: &str) {
        let (bold, off) = if self.terminal.colour() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        self.terminal.remark(&format!("\n{bold}{title}{off}"));
    }

    fn say(&self, line: &str) {
        self.terminal.remark(&format!("  {line}"));
    }

    /// `tidemark ARGS` with the demo's repository and home, and none of the caller's settings.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.tidemark);
        command
            .args(arguments)
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("HOME", &self.home)
            .env("TIDEMARK_CONFIG", "")
            .env("TIDEMARK_REPOSITORY", self.home.join("repository"))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let colour = if self.terminal.colour() { "always" } else { "never" };
        command.arg("--color").arg(colour);
        if self.terminal.quiet() {
            command.arg("--quiet");
        }
        command
    }

    fn show(&self, arguments: &[&str]) {
        let quoted = arguments.iter().map(|argument| {
            if argument.contains(' ') { format!("'{argument}'") } else { (*argument).to_owned() }
        });
        let text = quoted.collect::<Vec<_>>().join(" ");
        self.say(&format!("$ tidemark {text}"));
    }

    /// Runs a command to its end, its words going where ours go.
    async fn tidemark(&self, arguments: &[&str]) -> Result<()> {
        self.show(arguments);
        let printed = self.output(arguments).await?;
        let printed = String::from_utf8_lossy(&printed);
        if !printed.trim().is_empty() {
            self.terminal.remark(printed.trim_end());
        }
        Ok(())
    }

    async fn tidemark_json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.output(arguments).await?).map_err(|error| {
            Error::new(Kind::Bug, format!("unable to read what 'tidemark list' printed: {error}"))
        })
    }

    /// What a command that succeeds prints.
    async fn output(&self, arguments: &[&str]) -> Result<Vec<u8>> {
        let attempted = || "unable to run tidemark";
        let mut command = self.command(arguments);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
        let output = child.context(attempted)?.wait_with_output().await.context(attempted)?;
        ended(arguments, output.status)?;
        Ok(output.stdout)
    }

    fn spawn(&self, arguments: &[&str]) -> Result<Child> {
        self.show(arguments);
        self.command(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .context(|| "unable to start tidemark")
    }

    /// Asks the stream to end and waits for it.
    async fn end(&self, stream: &mut Child) -> Result<()> {
        let pid = stream.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            // What is gone already needs no signal.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let ended_in_time = tokio::time::timeout(STOP_MAX, stream.wait()).await;
        let status = ended_in_time
            .map_err(|_elapsed| Error::new(Kind::Unavailable, "the stream did not end in time"))?;
        ended(&["stream"], status.context(|| "unable to wait for the stream")?)
    }

    /// Waits until the stream has its slot, so that what it says about the new identity comes first.
    async fn wait_streaming(&self, server: &Server, stream: &mut Child) -> Result<()> {
        let deadline = self.clock.instant() + DURABLE_MAX;
        let streaming = "SELECT count(*) FROM pg_replication_slots WHERE active";
        while server.ask(&self.clock, streaming).await?.text(0)? == "0" {
            if let Some(status) = stream.try_wait().context(|| "unable to look at the stream")? {
                return ended(&["stream"], status);
            }
            if self.clock.instant() > deadline {
                return Err(Error::new(Kind::Unavailable, "the stream did not begin"));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ok(())
    }

    /// Waits until the accident is in the repository; how long after its commit that was.
    async fn wait_durable(&self, accident: &workload::Accident) -> Result<SignedDuration> {
        let deadline = self.clock.instant() + DURABLE_MAX;
        loop {
            let list = self.tidemark_json(&["list", "--json"]).await?;
            let newest = list.pointer("/newest_durable_commit/time").and_then(|t| t.as_str());
            let newest: Option<jiff::Timestamp> = newest.and_then(|time| time.parse().ok());
            if newest.is_some_and(|newest| newest >= accident.time) {
                return Ok(self.clock.now().duration_since(accident.time));
            }
            if self.clock.instant() > deadline {
                return Err(Error::new(
                    Kind::Unavailable,
                    "the accident's WAL never became durable",
                ));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

fn took(length: Duration) -> String {
    words::length(SignedDuration::try_from(length).unwrap_or_default())
}

fn ended(arguments: &[&str], status: std::process::ExitStatus) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let name = arguments.first().copied().unwrap_or_default();
    Err(Error::new(Kind::Bug, format!("the demo's 'tidemark {name}' failed: {status}")))
}
