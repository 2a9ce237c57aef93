//! `tidemark verify`: reads back what is stored and proves that it can be restored.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::invocation::Invocation;
use super::progress::{Meter, Progress};
use super::words;
use crate::daemon::{keys, opening};
use crate::error::{Error, Kind, Result};
use crate::repo::BackupId;
use crate::repo::verify::{self, Depth, VerifyOptions, VerifyProgress};

/// How often a plain line says how far it is, where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Read back what is stored and prove that it can be restored.
///
/// Authenticates every frame, or a sample of them, and checks that each backup is complete, that the
/// WAL it needs is there, and that some backup leads to the newest WAL. Any defect is named with what
/// is lost by it, and the exit status is not 0. WAL that was lost and that no backup needs is named
/// too; it is no defect.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Read about this share of the packs and extents, in per cent, drawn anew each time.
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(super) sample: u8,
    /// Only this backup, and no WAL; may be given several times.
    #[arg(long = "backup", value_name = "ID")]
    pub(super) backups: Vec<BackupId>,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let Invocation { config, clock, terminal, stop } = &invocation;
    let repository = opening::repository(config, clock).await?;
    let reader = keys::reader(config, &repository)?;
    let mut options = VerifyOptions::new(config.jobs()?);
    if args.sample < 100 {
        options.depth = Depth::SamplePercent(args.sample);
    }
    let chosen: BTreeSet<BackupId> = args.backups.into_iter().collect();
    options.backups = (!chosen.is_empty()).then_some(chosen);
    let counters = Arc::new(VerifyProgress::default());
    let line = Progress::begin(terminal, clock, PLAIN_INTERVAL);
    let meter = Meter::begin(clock);
    let watch = line.watch(|| {
        let done = counters.done_bytes.load(Ordering::Relaxed);
        let total = counters.total_bytes.load(Ordering::Relaxed);
        let bad = counters.defect_count.load(Ordering::Relaxed);
        let defects = if bad == 0 { String::new() } else { format!(", {bad} bad objects") };
        format!("verifying: {}{defects}", meter.text(done, (total > 0).then_some(total)))
    });
    let report = tokio::select! {
        report = verify::verify(&repository, &reader, &options, &counters) => report?,
        () = stop.cancelled() => {
            return Err(Error::new(Kind::Cancelled, "stopped; nothing was proved"));
        }
        never = watch => match never {},
    };
    line.end();
    if args.json {
        terminal.json_line(&report)?;
    } else {
        terminal.data(&report.to_string())?;
    }
    report.ensure_sound()?;
    match report.lost_count() {
        0 => terminal.remark("everything that was read is whole"),
        count => terminal.remark(&format!(
            "everything that was read is whole; times in {} of the WAL cannot be restored",
            words::count(count, "gap")
        )),
    }
    Ok(())
}
