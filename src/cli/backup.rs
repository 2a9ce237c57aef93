//! `tidemark backup`: one base backup.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::invocation::Invocation;
use super::progress::{Meter, Progress};
use super::stream::announce_identity;
use super::words;
use crate::capture::base::{self, BackupReport, BaseBackupPhase, BaseBackupProgress};
use crate::daemon::backup as daemon_backup;
use crate::daemon::writing;
use crate::error::Result;

/// How often a plain line says how far it is, where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Take a base backup now.
///
/// Streams the cluster's files into the repository without staging them on disk. The backup is
/// listed only once the WAL it needs is durable: from a running 'tidemark stream', or streamed by
/// this command itself when there is none.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let Invocation { config, clock, terminal, stop } = &invocation;
    let (writer, identity_made) = writing::writer(config, clock).await?;
    announce_identity(terminal, identity_made.as_deref());
    let progress = Arc::new(base::Progress::new());
    let base = daemon_backup::alone(config, writer, Arc::clone(&progress))?;
    terminal.remark(&format!(
        "backing up {} into {}, cluster '{}'",
        base.postgres,
        base.writer.repository().store().describe(),
        base.writer.repository().cluster()
    ));
    let line = Progress::begin(terminal, clock, PLAIN_INTERVAL);
    let meter = Meter::begin(clock);
    let watch = line.watch(|| text(&progress.snapshot(), &meter));
    let report = tokio::select! {
        report = base::backup(&base, stop) => report?,
        never = watch => match never {},
    };
    line.end();
    let manifest = &report.manifest.public;
    if args.json {
        let store = base.writer.repository().store();
        return terminal.json_line(&json!({
            "backup": manifest,
            "taken_from": format!("{:?}", report.from).to_lowercase(),
            "checksum_failures": report.manifest.checksum_failures,
            "elapsed_seconds": report.elapsed.as_secs_f64(),
            "requests": store.requests(),
            "upload_latency": store.latencies().upload.summary(),
        }));
    }
    for line in conclusion(&report) {
        terminal.remark(&line);
    }
    if manifest.checksum_failure_count > 0 {
        terminal.warn(&format!(
            "{} damaged in the database itself, first block {}; the backup holds them as they are",
            words::count(
                usize::try_from(manifest.checksum_failure_count).unwrap_or(usize::MAX),
                "page"
            ),
            report.manifest.checksum_failures.first().map_or("unknown".to_owned(), |failure| {
                format!("{} of '{}'", failure.block, failure.path)
            })
        ));
    }
    terminal.data(&format!("{}\n", manifest.id))
}

fn conclusion(report: &BackupReport) -> Vec<String> {
    let manifest = &report.manifest.public;
    let took = jiff::SignedDuration::try_from(report.elapsed).unwrap_or_default();
    vec![format!(
        "backup {} is complete: {} in {} files, stored as {}, in {}",
        manifest.id,
        words::bytes(manifest.plain_bytes),
        manifest.file_count,
        words::bytes(manifest.stored_bytes),
        words::length(took)
    )]
}

/// How far the backup is.
pub(super) fn text(now: &BaseBackupProgress, meter: &Meter) -> String {
    let copied = || meter.text(now.received_bytes, now.total_bytes);
    match now.phase {
        BaseBackupPhase::Preparing => "connecting".to_owned(),
        BaseBackupPhase::Checkpoint => "waiting for the server's checkpoint".to_owned(),
        BaseBackupPhase::Copying => {
            format!("copying: {}; {} stored", copied(), words::bytes(now.stored_bytes))
        }
        BaseBackupPhase::Storing => {
            format!("storing the rest; {} stored", words::bytes(now.stored_bytes))
        }
        BaseBackupPhase::Rechecking => {
            format!("reading {} suspect pages again", now.suspect_page_count)
        }
        BaseBackupPhase::WaitingForWal => "waiting for the backup's WAL to be durable".to_owned(),
        BaseBackupPhase::Complete => "complete".to_owned(),
    }
}
