//! The `tidemark` binary: the runtime, the signals, and the exit status.

use std::ffi::OsString;
use std::io::Write as _;
use std::panic::catch_unwind;
use std::process::ExitCode;

use tidemark::cli;
use tidemark::config::Environment;
use tidemark::error::Kind;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Threads of the asynchronous runtime. It only moves bytes between sockets; compression and
/// encryption have threads of their own, so more would cost memory and bring nothing.
const RUNTIME_THREADS: usize = 2;

/// Exit status after a second signal: 128 and SIGINT's number, as shells report it.
const INTERRUPTED: i32 = 130;

/// Blocks of at least this many bytes (parts, batches, WAL segments) go back to the kernel when they are
/// freed; the plain blocks of 1 MiB, of which a backup of 1 GiB takes a thousand, are kept for reuse.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES_MIN: libc::c_int = (2 << 20) + (128 << 10);

/// Free bytes at the end of the heap that are kept.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAP_SPARE_BYTES_MAX: libc::c_int = 64 << 20;

/// Heaps, which all threads share: a second one costs a stream 4 MiB and a backup 13, and saves no time.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAPS_MAX: libc::c_int = 1;

/// Keeps glibc's allocator from holding several times what is in use.
///
/// Left alone it makes a heap for every thread, and after the first free of a large block takes all
/// such blocks from those heaps (`M_MMAP_THRESHOLD` in mallopt(3) grows by itself up to 32 MiB), where
/// they leave holes: 1.6 GiB from S3 restored with a peak of 80 to 117 MiB, and with these three settings
/// of 42 MiB; its backup with 92 to 128 MiB, and then 45 to 61 MiB, for the same CPU time.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code, reason = "measured above; there is no safe way to ask glibc for it")]
fn bound_allocator() {
    // SAFETY: mallopt takes two integers by value and dereferences nothing. It changes settings of the
    // allocator, which is allowed at any time in a process with one thread: it is called first in
    // `main`, before the runtime starts others. A setting that is refused leaves the default in place.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, HEAPS_MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN);
        libc::mallopt(libc::M_TRIM_THRESHOLD, HEAP_SPARE_BYTES_MAX);
    }
}

/// Other allocators have no such settings.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn bound_allocator() {}

fn main() -> ExitCode {
    bound_allocator();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    // A panic was told by its hook.
    let outcome = catch_unwind(|| run(arguments.clone())).unwrap_or(Err(Kind::Bug));
    outcome.unwrap_or_else(|kind| cli::failed(&arguments, kind))
}

/// Runs the command that `arguments` ask for; fails where it could not be begun or was not ended.
fn run(arguments: Vec<OsString>) -> Result<ExitCode, Kind> {
    let environment = Environment::of_this_process();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| {
        tell(&format!("unable to start the runtime: {error}"));
        Kind::Unavailable
    })?;
    let stop = CancellationToken::new();
    // A task of its own: signals are answered whatever the command does with its thread.
    runtime.spawn(answer_signals(stop.clone()));
    // On a thread of the runtime: on this one, every answer of a socket would have to be handed over from
    // the thread that waits for them, two switches for each read of a backup.
    let command = runtime.spawn(cli::run(arguments, environment, stop));
    let status = runtime.block_on(command).map_err(|failed| {
        tell(&format!("the command failed: {failed}"));
        Kind::Bug
    });
    // What still runs, such as a thread that waits for an answer at the terminal, is left behind.
    runtime.shutdown_background();
    status
}

/// Tells the person, if standard error can still be written.
fn tell(what: &str) {
    drop(writeln!(std::io::stderr(), "error: {what}"));
}

/// The first SIGTERM or SIGINT asks the command to end, the second ends the process: nothing is lost
/// by that which a kill -9 would not lose too.
#[allow(clippy::disallowed_methods, reason = "the process ends here, in main")]
async fn answer_signals(stop: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers of ours the kernel's default ends the process, which is safe at any line.
        return;
    };
    let mut next = async || {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    };
    next().await;
    stop.cancel();
    next().await;
    std::process::exit(INTERRUPTED);
}
