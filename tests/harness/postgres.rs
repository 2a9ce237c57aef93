//! Real PostgreSQL servers of any major: start, query, crash, promote.

use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{Account, not_run};

/// An installed PostgreSQL.
#[derive(Clone, Debug)]
pub struct Binaries {
    dir: PathBuf,
    major: u32,
}

impl Binaries {
    /// The PostgreSQL of this run: the `bin` folder named by `TIDEMARK_TEST_PG_BIN`, else the newest
    /// below `/usr/lib/postgresql`.
    pub fn of_this_run() -> Self {
        if let Some(dir) = std::env::var_os("TIDEMARK_TEST_PG_BIN") {
            return Self::at(Path::new(&dir));
        }
        let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
        installed
            .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
            .filter(|bin| bin.join("postgres").exists())
            .map(|bin| Self::at(&bin))
            .max_by_key(|binaries| binaries.major)
            .expect("no PostgreSQL server: install it or set TIDEMARK_TEST_PG_BIN")
    }

    /// The PostgreSQL whose programs are in `dir`.
    pub fn at(dir: &Path) -> Self {
        let dir = std::fs::canonicalize(dir).unwrap();
        let mut this = Self { dir, major: 0 };
        let answer = this.command("postgres").arg("--version").output().unwrap();
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        let from_digit = text.trim_start_matches(|c: char| !c.is_ascii_digit());
        let digits: String = from_digit.chars().take_while(char::is_ascii_digit).collect();
        this.major = digits.parse().unwrap_or_else(|_| panic!("{}: {text}", this.dir.display()));
        this
    }

    /// The major version.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The folder with the programs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether this installation has `program`; some bring only the server.
    pub fn has(&self, program: &str) -> bool {
        self.dir.join(program).exists()
    }

    /// Whether this installation has a program that checks something; says so where it has not.
    pub fn brings(&self, program: &str, what: &str) -> bool {
        let found = self.has(program);
        if !found {
            not_run(&format!("{program}, {what}: PostgreSQL {} has none here", self.major));
        }
        found
    }

    /// A command that runs `program` of this installation as the tests' account.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Account::current().command(self.dir.join(program));
        let libraries = self.dir.join("../lib");
        if !self.dir.starts_with("/usr") && libraries.exists() {
            // Relocated builds bring their libraries beside their programs.
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command
    }

    /// A client program: this installation's, else another one's on this machine.
    pub fn client(&self, program: &str) -> Command {
        if self.has(program) {
            return self.command(program);
        }
        let folder = std::env::var_os("TIDEMARK_TEST_PG_CLIENT_BIN").map(PathBuf::from);
        match folder {
            Some(folder) => Self::at(&folder).command(program),
            None => Account::current().command(program),
        }
    }
}

/// How a server is made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Extra arguments of `initdb`.
    pub initdb: Vec<String>,
    /// Extra lines of `postgresql.conf`.
    pub conf: Vec<String>,
    /// Lines of `pg_hba.conf`; empty leaves `initdb`'s, which trust every local connection.
    pub hba: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { initdb: vec!["--data-checksums".into()], conf: Vec::new(), hba: Vec::new() }
    }
}

impl Settings {
    /// With one more line of `postgresql.conf`.
    pub fn conf(mut self, line: &str) -> Self {
        self.conf.push(line.into());
        self
    }

    /// With one more line of `pg_hba.conf`.
    pub fn hba(mut self, line: &str) -> Self {
        self.hba.push(line.into());
        self
    }

    /// With WAL segments of this size.
    pub fn segment_mib(mut self, mib: u32) -> Self {
        self.initdb.push(format!("--wal-segsize={mib}"));
        self
    }
}

/// How a server is stopped.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// Clients are disconnected, a shutdown checkpoint is written, walsenders are drained.
    Fast,
    /// Every process stops at once; the next start recovers.
    Immediate,
}

/// A server in a folder of its own; stopped and deleted when dropped.
#[derive(Debug)]
pub struct Postgres {
    binaries: Binaries,
    data: PathBuf,
    home: PathBuf,
    port: u16,
    /// The last one was killed, and its shared memory stays until the next start finds it.
    crashed: AtomicBool,
    _dir: Option<TempDir>,
}

impl Postgres {
    /// A new cluster, running.
    pub fn start(binaries: &Binaries, settings: &Settings) -> Self {
        let dir = Account::current().temp_dir("pg");
        let server = Self::in_folder(binaries, dir);
        let made = server
            .binaries
            .command("initdb")
            .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N", "-D"])
            .arg(&server.data)
            .args(&settings.initdb)
            .output()
            .unwrap();
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        server.write_conf(&settings.conf);
        if !settings.hba.is_empty() {
            let text = settings.hba.join("\n") + "\n";
            std::fs::write(server.data.join("pg_hba.conf"), text).unwrap();
        }
        server.run();
        server
    }

    fn in_folder(binaries: &Binaries, dir: TempDir) -> Self {
        let home = dir.path().to_path_buf();
        let data = home.join("data");
        let mut server = Self::somewhere(binaries, data, home, free_port());
        server._dir = Some(dir);
        server
    }

    fn somewhere(binaries: &Binaries, data: PathBuf, home: PathBuf, port: u16) -> Self {
        let (binaries, crashed) = (binaries.clone(), AtomicBool::new(false));
        Self { binaries, data, home, port, crashed, _dir: None }
    }

    /// A server whose data folder is a copy of that of the stopped `template`, not yet running.
    pub fn copy_of(template: &Self, settings: &Settings) -> Self {
        let server = Self::in_folder(&template.binaries, Account::current().temp_dir("pg"));
        let mut copy = Account::current().command("/bin/cp");
        copy.args(["-a", "--reflink=auto"]).arg(&template.data).arg(&server.data);
        assert!(copy.status().unwrap().success(), "copying {}", template.data.display());
        server.write_conf(&settings.conf);
        server
    }

    /// The server that a restore of `original` started on `data`: it has the original's port.
    pub fn restored(original: &Self, data: &Path) -> Self {
        Self::somewhere(&original.binaries, data.into(), original.home.clone(), original.port)
    }

    /// A server for the data folder `data` that something else made (a restore), not yet running.
    pub fn adopt(binaries: &Binaries, data: &Path) -> Self {
        let home = data.parent().unwrap().to_path_buf();
        let server = Self::somewhere(binaries, data.into(), home, free_port());
        server.write_conf(&[]);
        server
    }

    /// A streaming standby of this server, running; it follows by `primary_conninfo`.
    pub fn standby(&self) -> Self {
        self.standby_with(&[])
    }

    /// As [`Postgres::standby`], with more lines of `postgresql.conf`.
    pub fn standby_with(&self, conf: &[String]) -> Self {
        let server = Self::in_folder(&self.binaries, Account::current().temp_dir("pg"));
        let made = self
            .binaries
            .client("pg_basebackup")
            .args(["-X", "stream", "-c", "fast", "-d", &self.conninfo(), "-D"])
            .arg(&server.data)
            .output()
            .unwrap();
        assert!(made.status.success(), "pg_basebackup: {}", String::from_utf8_lossy(&made.stderr));
        // Not by `-R`: a newer pg_basebackup writes options that an older server does not know.
        let follow = format!("primary_conninfo = '{}'", self.conninfo());
        server.write_conf(&[conf, &[follow]].concat());
        let signal = server.data.join("standby.signal");
        std::fs::write(&signal, "").unwrap();
        Account::current().give(&signal);
        server.run();
        server
    }

    fn write_conf(&self, extra: &[String]) {
        let path = self.data.join("postgresql.conf");
        let mut text = std::fs::read_to_string(&path).unwrap_or_default();
        writeln!(text, "port = {}", self.port).unwrap();
        writeln!(text, "unix_socket_directories = '{}'", self.home.display()).unwrap();
        text += "listen_addresses = '127.0.0.1'\nmax_wal_senders = 10\nmax_replication_slots = 10\n\
                 wal_level = replica\nshared_buffers = 64MB\nmax_wal_size = 512MB\n\
                 logging_collector = off\nmax_prepared_transactions = 20\ntimezone = 'UTC'\n";
        for line in extra {
            writeln!(text, "{line}").unwrap();
        }
        std::fs::write(&path, text).unwrap();
        Account::current().give(&path);
    }

    /// Starts the server and waits until it answers.
    #[track_caller]
    pub fn run(&self) {
        assert!(self.try_run(), "postgres did not start:\n{}", self.log_tail());
    }

    /// Starts the server; `false` when it ended or did not answer within two minutes.
    pub fn try_run(&self) -> bool {
        let log = std::fs::File::options().create(true).append(true).open(self.log_path()).unwrap();
        Account::current().give(&self.log_path());
        let mut child = self
            .binaries
            .command("postgres")
            .arg("-D")
            .arg(&self.data)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        let mut answered = false;
        while !answered && Instant::now() < deadline {
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(50));
            answered = self.pid() == Some(child.id()) && self.try_psql("select 1").is_ok();
        }
        if answered {
            self.crashed.store(false, Ordering::Relaxed);
        }
        // Reaped by a thread: a server that ended must not look alive as a zombie.
        std::thread::spawn(move || child.wait());
        answered
    }

    /// kill -9 of one process of the server, by a word of its title; the postmaster then stops all
    /// others and starts anew. `false` when there is none.
    pub fn kill_child(&self, word: &str) -> bool {
        let Some(postmaster) = self.pid() else { return false };
        let children = format!("/proc/{postmaster}/task/{postmaster}/children");
        let children = std::fs::read_to_string(children).unwrap_or_default();
        let titled = children.split_whitespace().find(|pid| {
            let title = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&title).contains(word)
        });
        let Some(pid) = titled.and_then(|pid| pid.parse().ok()) else { return false };
        send_signal(pid, "KILL");
        true
    }

    /// Stops the server and waits until it is gone.
    pub fn stop(&self, how: Stop) {
        let Some(pid) = self.pid() else { return };
        send_signal(pid, if matches!(how, Stop::Fast) { "INT" } else { "QUIT" });
        self.wait_until_gone(pid);
    }

    /// kill -9 of the postmaster; its children notice and end.
    pub fn crash(&self) {
        let Some(pid) = self.pid() else { return };
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        self.crashed.store(true, Ordering::Relaxed);
        send_signal(pid, "KILL");
        self.wait_until_gone(pid);
        // The children hold the shared memory until they notice; a start before that is refused.
        for child in children.unwrap_or_default().split_whitespace() {
            self.wait_until_gone(child.parse().unwrap());
        }
    }

    fn wait_until_gone(&self, pid: u32) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while alive(pid) {
            assert!(Instant::now() < deadline, "postgres {pid} stays:\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a WAL stream of ours is connected. A backup begun before would take the lease, and the
    /// stream would be refused.
    #[track_caller]
    pub fn wait_for_stream(&self) {
        let active =
            "select count(*) from pg_replication_slots where slot_name = 'tidemark' and active";
        self.wait_for(active, "1");
    }

    /// Waits until `sql` gives `wanted`.
    #[track_caller]
    pub fn wait_for(&self, sql: &str, wanted: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let found = self.try_psql(sql);
            if found.as_deref() == Ok(wanted) {
                return;
            }
            assert!(Instant::now() < deadline, "{sql}: {found:?}\n{}", self.log_tail());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Promotes a standby and waits until it accepts writes.
    pub fn promote(&self) {
        self.psql("select pg_promote(true, 60)");
        assert_eq!(self.psql("select pg_is_in_recovery()"), "f", "not promoted");
    }

    /// Process id of the running postmaster.
    pub fn pid(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.data.join("postmaster.pid")).ok()?;
        text.lines().next()?.trim().parse().ok().filter(|pid| alive(*pid))
    }

    /// Runs SQL as superuser through psql; rows come as lines, columns split by `|`.
    #[track_caller]
    pub fn psql(&self, sql: &str) -> String {
        self.try_psql(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// As [`Postgres::psql`], the error being what psql printed.
    pub fn try_psql(&self, sql: &str) -> Result<String, String> {
        let answer = self
            .binaries
            .client("psql")
            .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d"])
            .arg(format!("{} dbname=postgres", self.conninfo()))
            .args(["-c", sql])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        if answer.status.success() {
            Ok(String::from_utf8_lossy(&answer.stdout).trim_end().to_owned())
        } else {
            Err(String::from_utf8_lossy(&answer.stderr).into_owned())
        }
    }

    /// A client that speaks the extended protocol, for concurrent load.
    pub async fn client(&self) -> tokio_postgres::Client {
        self.try_client().await.unwrap()
    }

    /// As [`Postgres::client`], failing when the server is not there.
    pub async fn try_client(&self) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let conninfo = format!("{} dbname=postgres", self.conninfo());
        let (client, connection) =
            tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// How to connect, as key=value; over TCP, without a database.
    pub fn conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres", self.port)
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The installation this server runs from.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// The data folder.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The folder around the data folder: socket, log, and room for tablespaces.
    pub fn home(&self) -> &Path {
        &self.home
    }

    fn log_path(&self) -> PathBuf {
        self.home.join("postgres.log")
    }

    /// The server's log.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// The end of the server's log.
    pub fn log_tail(&self) -> String {
        let text = self.log();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.crashed.load(Ordering::Relaxed) && self.data.exists() {
            self.try_run();
        }
        if let Some(pid) = self.pid() {
            send_signal(pid, "QUIT");
            let deadline = Instant::now() + Duration::from_secs(20);
            while alive(pid) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Sends a signal by name to a process.
pub fn send_signal(pid: u32, name: &str) {
    let signal = match name {
        "TERM" => Signal::TERM,
        "STOP" => Signal::STOP,
        "CONT" => Signal::CONT,
        "KILL" => Signal::KILL,
        "INT" => Signal::INT,
        "QUIT" => Signal::QUIT,
        "HUP" => Signal::HUP,
        other => panic!("signal {other}"),
    };
    // One that has ended meanwhile is no failure.
    let _ = kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal);
}

fn alive(pid: u32) -> bool {
    // A zombie has ended.
    process_state(pid).is_some_and(|state| state != 'Z')
}

/// The state of a process as the kernel shows it: `T` is stopped. `None` when there is no such process.
pub fn process_state(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // It follows the parenthesised name.
    stat.rsplit(')').next()?.trim_start().chars().next()
}

/// A TCP port nobody listens on now. From below the range that outgoing connections use, so that no
/// connection of a busy test takes it before the server binds it.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let spread = u16::try_from(std::process::id() % 97).unwrap() * 113;
    (0..4000)
        .map(|_| 20_000 + (spread + NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("no free port between 20000 and 32000")
}
