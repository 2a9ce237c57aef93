//! The sidecar under a supervisor, as systemd would run it: whenever it ends it is started again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use crate::harness::Tidemark;
use crate::harness::sidecar::Process;

use super::diary::Diary;

/// First and longest pause before a sidecar that ended is started again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(2));
/// A sidecar that ran so long was a good one: the next pause is short.
const GOOD_RUN: Duration = Duration::from_secs(5);

/// The end of a sidecar.
#[derive(Clone, Debug)]
pub struct Exit {
    /// When it was seen.
    pub at: Instant,
    /// Exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Whether we told it to end (SIGTERM).
    pub asked: bool,
    /// Whether it had streamed: from then on it waits outages out.
    pub had_streamed: bool,
    /// The last of what it said.
    pub last_words: String,
}

impl Exit {
    fn of(code: Option<i32>, asked: bool, said: &str) -> Self {
        let had_streamed = said.contains("streaming timeline");
        Self { at: Instant::now(), code, asked, had_streamed, last_words: last_words(said) }
    }
}

/// What a sidecar used at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// When.
    pub at: Instant,
    /// Resident memory.
    pub memory_kib: u64,
    /// The most it ever had.
    pub peak_kib: u64,
    /// Open file descriptors.
    pub open_file_count: usize,
}

/// A sidecar that is always started again.
#[derive(Debug)]
pub struct Supervised {
    tidemark: Arc<Tidemark>,
    conninfo: String,
    diary: Arc<Diary>,
    inner: Mutex<Inner>,
    /// Read by who starts or ends one, or more of them, until that is done; written by who needs that
    /// none runs: one that was told to end still stores.
    at_work: RwLock<()>,
}

#[derive(Debug)]
struct Inner {
    process: Option<Process>,
    /// Length of the log when it was started.
    log_bytes_before: usize,
    started: Instant,
    start_at: Option<Instant>,
    backoff: Duration,
    exits: Vec<Exit>,
    usage: Vec<Usage>,
    start_count: u32,
}

impl Supervised {
    /// Starts it.
    pub fn start(tidemark: Arc<Tidemark>, conninfo: String, diary: Arc<Diary>) -> Arc<Self> {
        let now = Instant::now();
        let inner = Inner {
            process: None,
            log_bytes_before: 0,
            started: now,
            start_at: Some(now),
            backoff: BACKOFF.0,
            exits: Vec::new(),
            usage: Vec::new(),
            start_count: 0,
        };
        let (inner, at_work) = (Mutex::new(inner), RwLock::new(()));
        let supervised = Arc::new(Self { tidemark, conninfo, diary, inner, at_work });
        let watched = Arc::downgrade(&supervised);
        std::thread::spawn(move || {
            while let Some(supervised) = watched.upgrade() {
                supervised.look();
                drop(supervised);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        supervised
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another sidecar with the same settings, beside this one.
    pub fn rival(&self, name: &str, more: &[&str]) -> Process {
        let args = [&["run", "--postgres", &self.conninfo], more].concat();
        self.tidemark.spawn_as(name, &args)
    }

    fn look(&self) {
        let mut inner = self.inner();
        let now = Instant::now();
        let (ran, before) = (now - inner.started, inner.log_bytes_before);
        if let Some(process) = &mut inner.process
            && let Some(status) = process.ended()
        {
            let exit = Exit::of(status.code(), false, &said(process, before));
            self.diary.note(format!("the sidecar ended: {status}: {}", exit.last_words));
            inner.exits.push(exit);
            inner.process = None;
            inner.backoff =
                if ran > GOOD_RUN { BACKOFF.0 } else { (inner.backoff * 2).min(BACKOFF.1) };
            inner.start_at = Some(now + inner.backoff);
        }
        if inner.process.is_none() && inner.start_at.is_some_and(|at| at <= now) {
            inner.start_at = None;
            inner.started = now;
            inner.start_count += 1;
            let log = self.tidemark.home().join("run.log");
            inner.log_bytes_before = std::fs::metadata(log).map_or(0, |log| log.len() as usize);
            inner.process = Some(self.rival("run", &[]));
        }
        let due = inner.usage.last().is_none_or(|last| now - last.at > Duration::from_millis(400));
        if let (true, Some(process)) = (due, &inner.process) {
            let usage = Usage {
                at: now,
                memory_kib: process.memory_kib(),
                peak_kib: process.peak_memory_kib(),
                open_file_count: process.open_file_count(),
            };
            // Between fork and exec it is still us.
            if ran > Duration::from_millis(500) && usage.memory_kib > 0 {
                inner.usage.push(usage);
            }
        }
    }

    /// Takes the process away from the supervisor, who starts no other until told to.
    fn take(&self) -> Option<Process> {
        let mut inner = self.inner();
        inner.start_at = None;
        inner.process.take()
    }

    /// Lets the supervisor start another one after `delay`.
    pub fn resume_in(&self, delay: Duration) {
        self.inner().start_at = Some(Instant::now() + delay);
    }

    /// While this is held none is started or ended but by those who hold it, of which there may be many,
    /// and nobody believes that none runs.
    pub fn at_work(&self) -> RwLockReadGuard<'_, ()> {
        self.at_work.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all others are done with theirs; then kill -9. None runs, nor is started by another
    /// fault, for as long as the result is held.
    pub fn kill_for_good(&self) -> RwLockWriteGuard<'_, ()> {
        let alone = self.at_work.write().unwrap_or_else(PoisonError::into_inner);
        self.kill();
        alone
    }

    /// kill -9; none is started until [`Supervised::resume_in`]. Whether there was one to kill.
    pub fn kill(&self) -> bool {
        self.take().is_some_and(|mut process| {
            let ran = process.is_running();
            process.kill();
            ran
        })
    }

    /// SIGTERM; none is started until [`Supervised::resume_in`]. The exit status, when there was one
    /// to end.
    pub fn terminate(&self) -> Option<Exit> {
        let before = self.inner().log_bytes_before;
        let mut process = self.take()?;
        process.signal("TERM");
        // One that was frozen by another fault cannot end.
        process.signal("CONT");
        let code = process.wait(Duration::from_secs(90));
        let exit = Exit::of(code, true, &said(&process, before));
        self.diary.note(format!("the sidecar was told to end: {code:?}: {}", exit.last_words));
        self.inner().exits.push(exit.clone());
        Some(exit)
    }

    /// Sends a signal by name to the running process: its id.
    pub fn signal(&self, name: &str) -> Option<u32> {
        let inner = self.inner();
        let process = inner.process.as_ref()?;
        process.signal(name);
        Some(process.pid())
    }

    /// The id of the process that runs.
    pub fn pid(&self) -> Option<u32> {
        self.inner().process.as_ref().map(Process::pid)
    }

    /// Whether a process of this id is the one that runs.
    pub fn is_running(&self, pid: u32) -> bool {
        self.inner().process.as_ref().is_some_and(|process| process.pid() == pid)
    }

    /// All ends so far.
    pub fn exits(&self) -> Vec<Exit> {
        self.inner().exits.clone()
    }

    /// What it used, over time.
    pub fn usage(&self) -> Vec<Usage> {
        self.inner().usage.clone()
    }

    /// How often it was started.
    pub fn start_count(&self) -> u32 {
        self.inner().start_count
    }
}

/// What a process has said, which began when its log had so many bytes.
fn said(process: &Process, log_bytes_before: usize) -> String {
    process.log().get(log_bytes_before..).unwrap_or_default().to_owned()
}

/// The last thing that was said before a process ended.
fn last_words(log: &str) -> String {
    let mut lines: Vec<&str> = log.lines().rev().filter(|line| !line.is_empty()).take(3).collect();
    lines.reverse();
    lines.join(" | ")
}
