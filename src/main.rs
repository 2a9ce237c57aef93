//! The `tidemark` binary: the runtime, the signals, and the exit status.

use std::process::ExitCode;

use tidemark::cli;
use tidemark::config::Environment;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Threads of the asynchronous runtime. It only moves bytes between sockets; compression and
/// encryption have threads of their own, so more would cost memory and bring nothing.
const RUNTIME_THREADS: usize = 2;

/// Exit status after a second signal: 128 and SIGINT's number, as shells report it.
const INTERRUPTED: i32 = 130;

fn main() -> ExitCode {
    let arguments = std::env::args_os().collect();
    let environment = Environment::of_this_process();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: unable to start the runtime: {error}");
            return ExitCode::from(tidemark::error::Kind::Unavailable.exit_code());
        }
    };
    let stop = CancellationToken::new();
    // A task of its own: signals are answered whatever the command does with its thread.
    runtime.spawn(answer_signals(stop.clone()));
    let status = runtime.block_on(cli::run(arguments, environment, stop));
    // What still runs, such as a thread that waits for an answer at the terminal, is left behind.
    runtime.shutdown_background();
    status
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
