//! The binary under test, and the repository it writes to.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::Account;
use super::postgres::send_signal;
use super::transcript::transcript;

/// What a finished command printed.
#[derive(Debug)]
pub struct Output {
    /// Exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Data.
    pub stdout: String,
    /// Words for people.
    pub stderr: String,
}

impl Output {
    /// Runs `command` to its end.
    pub fn of(command: &mut Command) -> Self {
        let done = command.output().unwrap();
        Self {
            code: done.status.code(),
            stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
        }
    }

    /// The output, when the command succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// The output, when the command failed with this exit status.
    #[track_caller]
    pub fn failed(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// All of it, as a golden file shows it; `args` are those of the command.
    #[track_caller]
    pub fn transcript(&self, args: &[&str]) -> String {
        transcript(args, self.code.expect("not ended by a signal"), &self.stdout, &self.stderr)
    }

    /// The data as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}\n{}", self.stdout, self.stderr))
    }
}

/// How to call `tidemark`: its home (identity, configuration) and its repository.
#[derive(Debug)]
pub struct Tidemark {
    home: Arc<TempDir>,
    url: String,
    env: Vec<(String, String)>,
}

impl Tidemark {
    /// With a repository in a folder of its own.
    pub fn with_directory() -> Self {
        let home = Account::current().temp_dir("home");
        let repository = Account::current().make_dir(home.path(), "repository");
        Self { url: repository.display().to_string(), home: Arc::new(home), env: Vec::new() }
    }

    /// With a repository at `url`, whose credentials and endpoint are in `env`.
    pub fn with_url(url: &str, env: &[(&str, &str)]) -> Self {
        let home = Arc::new(Account::current().temp_dir("home"));
        let env = env.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        Self { url: url.into(), home, env }
    }

    /// The same home with another repository.
    pub fn at(&self, url: &str) -> Self {
        Self { home: Arc::clone(&self.home), url: url.into(), env: self.env.clone() }
    }

    /// With one more variable in the environment, or another value of it.
    pub fn with_env(mut self, name: &str, value: &str) -> Self {
        self.env.retain(|(had, _)| had != name);
        self.env.push((name.into(), value.into()));
        self
    }

    /// The home folder: `$HOME` of the binary.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Where the repository is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A folder for a restore: not existing yet, its parent owned by the account.
    pub fn new_target(&self, name: &str) -> PathBuf {
        Account::current().make_dir(self.home.path(), name).join("data")
    }

    /// `tidemark ARGS`, ready to run as the tests' account with the repository in its environment.
    pub fn command(&self, args: &[&str]) -> Command {
        let account = Account::current();
        let mut command = account.command(account.tidemark_binary());
        command
            .args(args)
            .env("HOME", self.home.path())
            .env_remove("XDG_CONFIG_HOME")
            .env("TIDEMARK_REPOSITORY", &self.url)
            .env("NO_COLOR", "1")
            .env("RUST_BACKTRACE", "1")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// Runs `tidemark ARGS` to its end.
    pub fn run(&self, args: &[&str]) -> Output {
        Output::of(&mut self.command(args))
    }

    /// Runs `tidemark ARGS` on a thread of its own.
    pub fn start(&self, args: &[&str]) -> std::thread::JoinHandle<Output> {
        let mut command = self.command(args);
        std::thread::spawn(move || Output::of(&mut command))
    }

    /// Starts `tidemark ARGS` and leaves it running; its words go to a file.
    pub fn spawn(&self, args: &[&str]) -> Process {
        self.spawn_as(args.first().unwrap_or(&"tidemark"), args)
    }

    /// As [`Tidemark::spawn`]; the file is `NAME.log` in the home folder.
    pub fn spawn_as(&self, name: &str, args: &[&str]) -> Process {
        let log = self.home.path().join(format!("{name}.log"));
        let file = std::fs::File::options().create(true).append(true).open(&log).unwrap();
        Account::current().give(&log);
        let mut command = self.command(args);
        let child = command.stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Process { child, log }
    }
}

/// A running `tidemark`; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has said so far, earlier runs of the same command included.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Sends a signal by name (`TERM`, `STOP`, `CONT`).
    pub fn signal(&self, name: &str) {
        send_signal(self.pid(), name);
    }

    /// kill -9, and waits for the end.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and waits for the end: the exit status.
    #[track_caller]
    pub fn terminate(mut self) -> Option<i32> {
        self.signal("TERM");
        self.wait(Duration::from_secs(60))
    }

    /// Waits for the end: the exit status.
    #[track_caller]
    pub fn wait(&mut self, at_most: Duration) -> Option<i32> {
        let deadline = Instant::now() + at_most;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "still running after {at_most:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Peak resident memory so far in KiB (`VmHWM`).
    pub fn peak_memory_kib(&self) -> u64 {
        self.status_kib("VmHWM:")
    }

    /// Resident memory now in KiB (`VmRSS`).
    pub fn memory_kib(&self) -> u64 {
        self.status_kib("VmRSS:")
    }

    fn status_kib(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
    }

    /// Count of open file descriptors.
    pub fn open_file_count(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The page of metrics at `port`, or nothing while nobody listens there.
pub fn metrics(port: u16) -> String {
    let Ok(mut socket) = TcpStream::connect(("127.0.0.1", port)) else { return String::new() };
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer.split_once("\r\n\r\n").map_or_else(String::new, |(_, body)| body.to_owned())
}
