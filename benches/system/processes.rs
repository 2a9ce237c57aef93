//! Who uses what: CPU and memory of the processes below this one, told apart by whose they are.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Sub;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions, getpid, set_child_subreaper, waitpid};

/// A process as `/proc/PID/stat` shows it; times in clock ticks.
#[derive(Clone, Debug)]
struct Process {
    pid: u32,
    parent: u32,
    name: String,
    is_zombie: bool,
    own_ticks: u64,
    /// Of children that ended and were waited for, and theirs.
    ended_ticks: u64,
    resident_bytes: u64,
}

/// CPU seconds used so far, by whom.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    /// The peer's processes.
    pub tool_s: f64,
    /// PostgreSQL's own.
    pub postgres_s: f64,
    /// The S3 server.
    pub s3_s: f64,
}

impl Sub for Cpu {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            tool_s: self.tool_s - earlier.tool_s,
            postgres_s: self.postgres_s - earlier.postgres_s,
            s3_s: self.s3_s - earlier.s3_s,
        }
    }
}

/// Has daemons that leave their parents hang below this process, where they are seen.
pub fn adopt_daemons() {
    set_child_subreaper(Some(getpid())).unwrap();
}

/// Waits for daemons that ended, so that their CPU is in our account. What was started from here is
/// waited for by whoever started it.
fn reap_daemons(all: &BTreeMap<u32, Process>) {
    let ourselves = std::process::id();
    for process in all.values().filter(|process| process.is_zombie && process.parent == ourselves) {
        let _ = waitpid(Pid::from_raw(process.pid.cast_signed()), WaitOptions::NOHANG);
    }
}

/// CPU used so far. Ended children of this process that are PostgreSQL servers count as the tool, so a
/// server has to outlive the stretch that is measured.
pub fn cpu(s3: Option<u32>) -> Cpu {
    reap_daemons(&all());
    let all = all();
    let mut used = Cpu::default();
    let ticks = |count: u64| count as f64 / rustix::param::clock_ticks_per_second() as f64;
    let ourselves = std::process::id();
    for process in below(&all, ourselves) {
        if process.pid == ourselves {
            used.tool_s += ticks(process.ended_ticks);
        } else if Some(process.pid) == s3 {
            used.s3_s += ticks(process.own_ticks);
        } else if is_postgres(process) {
            used.postgres_s += ticks(process.own_ticks);
            // A postmaster's children are PostgreSQL, a child's children are commands of the tool.
            let parent_is_postgres = all.get(&process.parent).is_some_and(is_postgres);
            let whose = if parent_is_postgres { &mut used.tool_s } else { &mut used.postgres_s };
            *whose += ticks(process.ended_ticks);
        } else {
            used.tool_s += ticks(process.own_ticks + process.ended_ticks);
        }
    }
    used
}

/// CPU seconds of a server and everything below it, archive and restore commands included.
pub fn cpu_below(pid: u32) -> f64 {
    let all = all();
    let ticks: u64 = below(&all, pid).map(|process| process.own_ticks + process.ended_ticks).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

fn is_postgres(process: &Process) -> bool {
    process.name == "postgres"
}

/// `root` and every process below it.
fn below(all: &BTreeMap<u32, Process>, root: u32) -> impl Iterator<Item = &Process> {
    let mut found = BTreeSet::from([root]);
    loop {
        let more: Vec<u32> = all
            .values()
            .filter(|process| found.contains(&process.parent) && !found.contains(&process.pid))
            .map(|process| process.pid)
            .collect();
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    found.into_iter().filter_map(|pid| all.get(&pid))
}

fn all() -> BTreeMap<u32, Process> {
    let entries = std::fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| Some((pid, process(pid)?))).collect()
}

fn process(pid: u32) -> Option<Process> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc(5): the name is in parentheses and may contain anything; field 3 follows it.
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Process {
        pid,
        parent: u32::try_from(number(4)?).ok()?,
        name: name.to_owned(),
        is_zombie: fields.first() == Some(&"Z"),
        own_ticks: number(14)? + number(15)?,
        ended_ticks: number(16)? + number(17)?,
        resident_bytes: number(24)? * rustix::param::page_size() as u64,
    })
}

/// Watches the memory of the tool's processes until dropped.
#[derive(Debug)]
pub struct MemoryWatch {
    stop: Arc<AtomicBool>,
    peak_bytes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl MemoryWatch {
    /// Starts to watch; the S3 server is not the tool's.
    pub fn start(s3: Option<u32>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let peak_bytes = Arc::new(AtomicU64::new(0));
        let (stopped, peak) = (Arc::clone(&stop), Arc::clone(&peak_bytes));
        let thread = std::thread::spawn(move || {
            let ourselves = std::process::id();
            while !stopped.load(Ordering::Relaxed) {
                let all = all();
                let tool = below(&all, ourselves).filter(|process| {
                    process.pid != ourselves && Some(process.pid) != s3 && !is_postgres(process)
                });
                peak.fetch_max(tool.map(|process| process.resident_bytes).sum(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { stop, peak_bytes, thread: Some(thread) }
    }

    /// The greatest sum seen so far, in MiB.
    pub fn peak_mib(&self) -> f64 {
        self.peak_bytes.load(Ordering::Relaxed) as f64 / f64::from(1 << 20)
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A stretch of time and what was used in it.
#[derive(Debug)]
pub struct Stretch {
    began: Instant,
    before: Cpu,
    s3: Option<u32>,
    memory: MemoryWatch,
}

/// What a [`Stretch`] cost.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Seconds.
    pub wall_s: f64,
    /// CPU seconds.
    pub cpu: Cpu,
    /// Peak memory of the tool in MiB.
    pub peak_mib: f64,
}

impl Stretch {
    /// Begins now.
    pub fn begin(s3: Option<u32>) -> Self {
        let (before, memory) = (cpu(s3), MemoryWatch::start(s3));
        Self { began: Instant::now(), before, s3, memory }
    }

    /// Seconds so far.
    pub fn elapsed_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Ends now.
    pub fn end(self) -> Cost {
        let wall_s = self.began.elapsed().as_secs_f64();
        let peak_mib = self.memory.peak_mib();
        drop(self.memory);
        Cost { wall_s, cpu: cpu(self.s3) - self.before, peak_mib }
    }
}
