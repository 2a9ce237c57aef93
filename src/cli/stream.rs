//! `tidemark stream`: WAL into the repository until told to stop.

use std::io::IsTerminal as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::invocation::Invocation;
use super::progress::{Meter, Progress, REDRAW_INTERVAL};
use super::terminal::Terminal;
use super::words;
use crate::capture::base::{self, BaseBackupPhase};
use crate::capture::stream::{Phase, Snapshot, Status};
use crate::clock::Clock;
use crate::daemon::endpoint::Endpoint;
use crate::daemon::exposition;
use crate::daemon::supervisor::{Duties, Event, Supervisor};
use crate::daemon::writing::Writing;
use crate::error::Result;
use crate::metrics::LatencySummary;
use crate::repo::lease::Wait;

/// How often a plain line says how far the stream is, where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(60);

/// Stream WAL into the repository until told to stop.
///
/// Makes the replication slot and the repository when they are missing. Every commit is durable in
/// the repository about a second after the server wrote it. SIGTERM flushes what was received and
/// ends with status 0; with 10 when the lease was not taken yet, with 4 when the repository did not
/// take all of it in wal.stop_grace. A second signal ends it at once, with 130; that, or killing it,
/// loses nothing either, it goes on where it was. SIGHUP changes nothing.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// When another process streams for this cluster, wait for its end instead of refusing.
    ///
    /// A base backup that streams its own WAL is always waited for.
    #[arg(long)]
    pub(super) wait: bool,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let wait = if args.wait { Wait::Forever } else { Wait::ForPassing };
    supervise("stream", wait, Duties::default(), &invocation).await
}

/// Streams, and does what else is to be done, until told to stop.
pub(super) async fn supervise(
    description: &str,
    wait: Wait,
    duties: Duties,
    invocation: &Invocation,
) -> Result<()> {
    let Invocation { config, clock, terminal, stop } = invocation;
    let slot_name = config.stream_options()?.slot_name;
    let postgres = config.connect_options()?;
    // Before the right to write is taken: what is wrong here must not cost it.
    let endpoint = match config.metrics_listen()? {
        Some(address) => Some(Endpoint::bind(address).await?),
        None => None,
    };
    let _hangups = AbortOnDropHandle::new(tokio::spawn(answer_hangups(stop.clone())));
    let writing = Writing::begin(config, clock, description, wait, stop).await?;
    announce_identity(terminal, writing.identity_made.as_deref());
    terminal.remark(&format!(
        "streaming {postgres} by slot '{slot_name}' into {}, cluster '{}'",
        writing.repository.store().describe(),
        writing.repository.cluster()
    ));
    let status = Arc::new(Status::new());
    let _answering = endpoint.map(|endpoint| {
        let (status, repository) = (Arc::clone(&status), writing.repository.clone());
        let page = Arc::new(move || exposition::page(&status, &repository));
        AbortOnDropHandle::new(tokio::spawn(endpoint.serve(exposition::CONTENT_TYPE, page)))
    });
    let backup_progress = Arc::new(base::Progress::new());
    let voice = terminal.clone();
    let supervisor = Supervisor {
        writing,
        duties,
        status: Arc::clone(&status),
        backup_progress: Arc::clone(&backup_progress),
        tell: Arc::new(move |event| match event {
            Event::Done(text) => voice.remark(&text),
            Event::Failed(text) => voice.warn(&text),
        }),
    };
    let narrator = Narrator {
        status: Arc::clone(&status),
        backup: backup_progress,
        terminal: terminal.clone(),
        clock: clock.clone(),
    };
    let narrator = tokio::spawn(narrator.narrate());
    let outcome = supervisor.run(config, clock, stop).await;
    narrator.abort();
    terminal.finish_progress();
    outcome?;
    let last = status.snapshot();
    terminal.remark(&format!(
        "stopped; WAL is durable up to {}, {} stored{}",
        last.durable_end_lsn,
        words::bytes(last.stored_bytes),
        waits(&status.latency().summary())
    ));
    Ok(())
}

/// A service does not end by SIGHUP, which some send for a reload and systemd takes for an end in good
/// order, after which nobody streams. Where a person watches, it says that they have gone.
async fn answer_hangups(stop: CancellationToken) {
    // Without a handler of ours the kernel's default ends the process, which is safe at any line.
    let Ok(mut hangups) = signal(SignalKind::hangup()) else { return };
    while hangups.recv().await.is_some() {
        if std::io::stderr().is_terminal() {
            stop.cancel();
        } else {
            tracing::warn!("SIGHUP changes nothing: the configuration is read at the start only");
        }
    }
}

/// How long commits waited until they were durable.
fn waits(latency: &LatencySummary) -> String {
    if latency.count == 0 {
        return String::new();
    }
    let [half, most, longest] = [latency.p50_us, latency.p99_us, latency.max_us]
        .map(|micros| format!("{:.2} s", Duration::from_micros(micros).as_secs_f64()));
    format!("; commits were durable after {half} (half), {most} (99 %), {longest} (all)")
}

/// Tells loudly that a secret was made that nobody has a copy of.
pub(super) fn announce_identity(terminal: &Terminal, made: Option<&Path>) {
    if let Some(path) = made {
        terminal.warn(&format!(
            "no key was configured, so a new one was made: '{}'. Without this file NOTHING can be \
             restored: copy it to a safe place away from this machine now.",
            path.display()
        ));
    }
}

/// Says what the stream, and a base backup beside it, do.
struct Narrator {
    status: Arc<Status>,
    backup: Arc<base::Progress>,
    terminal: Terminal,
    clock: Clock,
}

impl Narrator {
    /// Until it is aborted.
    async fn narrate(self) {
        let Self { status, backup, terminal, clock } = self;
        let progress = Progress::begin(&terminal, &clock, PLAIN_INTERVAL);
        let mut before = Snapshot::default();
        let mut meter = Meter::begin(&clock);
        loop {
            let now = status.snapshot();
            for line in news(&before, &now) {
                terminal.remark(&line);
            }
            for gap in now.gaps.iter().filter(|gap| !before.gaps.contains(gap)) {
                terminal.warn(&format!(
                    "WAL {} to {} of timeline {} is lost: {}; take a base backup",
                    gap.start_lsn, gap.end_lsn, gap.timeline, gap.reason
                ));
            }
            let copying = backup.snapshot();
            let idle = [BaseBackupPhase::Preparing, BaseBackupPhase::Complete];
            if idle.contains(&copying.phase) {
                meter = Meter::begin(&clock);
                let waited = || waits(&status.latency().summary());
                progress.show(|| format!("{}{}", line(&now, &clock), waited()));
            } else {
                let copied = super::backup::text(&copying, &meter);
                progress.show(|| format!("{}; base backup: {copied}", line(&now, &clock)));
            }
            before = now;
            tokio::time::sleep(REDRAW_INTERVAL).await;
        }
    }
}

/// What a person should know at once, from one look to the next.
fn news(before: &Snapshot, now: &Snapshot) -> Vec<String> {
    let mut lines = Vec::new();
    if now.phase == Phase::Streaming && before.connection_count != now.connection_count {
        let timeline = now.timeline.map(|timeline| format!(" on timeline {timeline}"));
        lines.push(format!(
            "connected; the repository holds WAL up to {}{}",
            now.durable_end_lsn,
            timeline.unwrap_or_default()
        ));
    }
    for (name, before, now) in [
        ("server", &before.server_error, &now.server_error),
        ("repository", &before.repository_error, &now.repository_error),
    ] {
        match (before, now) {
            (_, Some(error)) if before != now => {
                lines.push(format!("waiting for the {name}: {error}"))
            }
            (Some(_), None) => lines.push(format!("the {name} answers again")),
            _ => {}
        }
    }
    if now.phase == Phase::Stopping && before.phase != Phase::Stopping {
        lines.push("stopping: storing what was received".to_owned());
    }
    lines
}

/// How far the stream is.
fn line(now: &Snapshot, clock: &Clock) -> String {
    let phase = match now.phase {
        Phase::Connecting => "connecting",
        Phase::Streaming => "streaming",
        Phase::WaitingForRepository => "waiting for the repository",
        Phase::Stopping => "stopping",
        Phase::Stopped => "stopped",
    };
    let commit = now.newest_durable_commit.and_then(|time| time.to_timestamp());
    let commit = commit.map_or(String::new(), |time| {
        format!(", newest durable commit {} ago", words::age(time, clock.now()))
    });
    format!(
        "{phase}: durable up to {}, {} behind{commit}; {} of WAL stored in {}",
        now.durable_end_lsn,
        words::bytes(now.lag_bytes()),
        words::bytes(now.plain_bytes),
        words::bytes(now.stored_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_told_in_seconds_once_there_are_any() {
        assert_eq!(waits(&LatencySummary::default()), "");
        let latency = LatencySummary {
            count: 3,
            p50_us: 612_000,
            p90_us: 900_000,
            p99_us: 1_130_000,
            max_us: 1_630_000,
        };
        let expected = "; commits were durable after 0.61 s (half), 1.13 s (99 %), 1.63 s (all)";
        assert_eq!(waits(&latency), expected);
    }

    #[test]
    fn an_outage_is_told_once_and_so_is_its_end() {
        let fine = Snapshot::default();
        let down = Snapshot { repository_error: Some("no answer".into()), ..fine.clone() };
        assert_eq!(news(&fine, &down), ["waiting for the repository: no answer"]);
        assert!(news(&down, &down).is_empty());
        assert_eq!(news(&down, &fine), ["the repository answers again"]);
    }
}
