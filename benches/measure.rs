//! How things are measured here: CPU time, memory, and comparisons in one run.
#![allow(unsafe_code, reason = "an allocator that counts, and the CPU clocks of the C library")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Display;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{Criterion, Throughput};

/// What the benchmarks run with.
pub struct Bench {
    /// Measures the CPU time of the calling thread.
    pub cpu: Criterion<CpuTime>,
    /// Measures time as it passes.
    pub wall: Criterion,
    /// What criterion does not measure.
    pub reports: Reports,
}

/// Which reports are wanted.
pub struct Reports {
    measured: bool,
    filter: Option<String>,
}

impl Reports {
    /// As the arguments for criterion say: none when it only tries or lists its benchmarks.
    pub fn from_args() -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
        let filter = arguments.iter().find(|argument| !argument.starts_with('-')).cloned();
        Self { measured: has("--bench") && !has("--list") && !has("--test"), filter }
    }

    /// Whether the report called `name` is wanted.
    pub fn wants(&self, name: &str) -> bool {
        let named = self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()));
        self.measured && named
    }
}

/// Prints a line of a report.
pub fn report(name: &str, text: impl Display) {
    println!("== {name}: {text}");
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours, which outlives the call.
    let answer = unsafe { libc::clock_gettime(id, &raw mut time) };
    assert_eq!(answer, 0, "no CPU clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// CPU time of this thread, user and system.
pub fn thread_cpu() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time of this process, all threads.
pub fn process_cpu() -> Duration {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// CPU time of the processes that were started and have ended.
pub fn children_cpu() -> Duration {
    // SAFETY: an rusage is plain numbers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to an rusage of ours, which outlives the call.
    let answer = unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) };
    assert_eq!(answer, 0, "no usage of children");
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Criterion's measure: CPU time of the thread that runs the benchmark.
pub struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        thread_cpu()
    }

    fn end(&self, begun: Duration) -> Duration {
        thread_cpu() - begun
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter_of_nanoseconds()
    }
}

/// The formatter of wall time takes nanoseconds, which these are too.
trait Nanoseconds {
    fn formatter_of_nanoseconds(&self) -> &'static dyn ValueFormatter;
}

impl Nanoseconds for WallTime {
    fn formatter_of_nanoseconds(&self) -> &'static dyn ValueFormatter {
        static WALL: WallTime = WallTime;
        WALL.formatter()
    }
}

/// So many bytes a second, in decimal units.
pub fn bytes(count: usize) -> Throughput {
    Throughput::BytesDecimal(count as u64)
}

/// Several measurements of one thing.
#[derive(Clone, Debug, Default)]
pub struct Rounds(Vec<f64>);

impl Rounds {
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    pub fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }

    /// The median and the range, with `digits` after the point.
    pub fn show(&self, digits: usize) -> String {
        let (median, least, most) = (self.median(), self.0[0], self.0[self.0.len() - 1]);
        format!("{median:.digits$} [{least:.digits$}..{most:.digits$}]")
    }
}

/// The CPU seconds that `work` takes in all threads of this process.
pub fn cpu_seconds<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let begun = process_cpu();
    let done = work();
    ((process_cpu() - begun).as_secs_f64(), done)
}

/// The seconds that `work` takes.
pub fn seconds<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let begun = Instant::now();
    let done = work();
    (begun.elapsed().as_secs_f64(), done)
}

/// What a piece of work held in memory beyond what was there before it.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// At its most.
    pub peak_bytes: usize,
    /// Still held by what it returned.
    pub kept_bytes: usize,
}

/// How much memory `work` allocates.
pub fn memory<T>(work: impl FnOnce() -> T) -> (Memory, T) {
    let before = CURRENT.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let done = work();
    let peak_bytes = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    let kept_bytes = CURRENT.load(Ordering::Relaxed).saturating_sub(before);
    (Memory { peak_bytes, kept_bytes }, done)
}

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counting.
pub struct Counting;

fn grown(by: usize) {
    let now = CURRENT.fetch_add(by, Ordering::Relaxed) + by;
    if now > PEAK.load(Ordering::Relaxed) {
        PEAK.fetch_max(now, Ordering::Relaxed);
    }
}

// SAFETY: every call is handed to the system's allocator as it came; only numbers are added.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        let pointer = unsafe { System.alloc(layout) };
        if !pointer.is_null() {
            grown(layout.size());
        }
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        if !pointer.is_null() {
            grown(layout.size());
        }
        pointer
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        if !moved.is_null() {
            CURRENT.fetch_sub(layout.size(), Ordering::Relaxed);
            grown(size);
        }
        moved
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) };
        CURRENT.fetch_sub(layout.size(), Ordering::Relaxed);
    }
}
