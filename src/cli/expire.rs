//! `tidemark expire`: deletes what retention no longer asks for and what aborted backups left, after
//! printing what that is.

use std::io::{BufRead, IsTerminal};

use serde_json::json;

use super::invocation::Invocation;
use super::words;
use crate::daemon::opening;
use crate::daemon::upkeep::{self, Plan, Report};
use crate::error::{Context, Error, Kind, Result};
use crate::repo::sweep::SweepReport;

/// Delete backups and WAL that retention no longer asks for, and what aborted backups left.
///
/// The plan is printed first: what goes, what stays, and why. Nothing that a kept backup or the
/// window of point-in-time recovery needs is ever deleted, nor the newest backup that can be
/// restored. Packs of a backup that was killed, and uploads that were never completed, go when
/// they are old enough that nobody can still be writing them.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print the plan and delete nothing.
    #[arg(long, short = 'n')]
    pub(super) dry_run: bool,
    /// Do not ask before deleting.
    #[arg(long, short = 'y')]
    pub(super) yes: bool,
    /// Print the plan and the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let Invocation { config, clock, terminal, .. } = &invocation;
    let options = config.retention_options()?.ok_or_else(|| {
        Error::new(Kind::Usage, "nothing says what to keep, so nothing is deleted").hint(
            "Give --keep-count, --keep-days or --pitr-days, or set them below [retention] in the \
             configuration file.",
        )
    })?;
    let repository = opening::repository(config, clock).await?;
    let plan = upkeep::plan(&repository, &options, clock).await?;
    if !args.json {
        terminal.data(&plan.to_string())?;
    }
    if args.dry_run {
        return show(&invocation, args.json, &plan, None);
    }
    if !args.yes && !plan.is_empty() {
        confirm(&invocation, &plan).await?;
    }
    let report = upkeep::apply(&repository, &plan).await?;
    show(&invocation, args.json, &plan, Some(&report))?;
    let of_sweep = report.swept.iter().flat_map(|swept| &swept.refused);
    upkeep::ensure_none_refused(report.deletion.refused.iter().chain(of_sweep))?;
    report.swept.map(drop)
}

/// Tells what was done, if anything was.
fn show(
    invocation: &Invocation,
    as_json: bool,
    plan: &Plan,
    report: Option<&Report>,
) -> Result<()> {
    let terminal = &invocation.terminal;
    if as_json {
        return terminal.json_line(&json!({
            "plan": plan.deletion,
            "sweep": plan.sweep,
            "report": report.map(|report| &report.deletion),
            "swept": report.and_then(|report| report.swept.as_ref().ok()),
        }));
    }
    let Some(Report { deletion, swept }) = report else { return Ok(()) };
    let unswept = SweepReport::default();
    let (swept, bytes) = match swept {
        Ok(swept) => (swept, plan.stored_bytes()),
        // The error says so, after what was deleted before.
        Err(_) if plan.deletion.is_empty() => return Ok(()),
        Err(_) => (&unswept, plan.deletion.stored_bytes()),
    };
    for remark in &swept.remarks {
        terminal.remark(remark);
    }
    if plan.is_empty() && swept.upload_count == 0 {
        terminal.remark("nothing to delete");
        return Ok(());
    }
    let count = |count: u64, noun| words::count(usize::try_from(count).unwrap_or(usize::MAX), noun);
    let mut done = vec![
        words::count(deletion.backups.len(), "backup"),
        count(deletion.extent_count, "WAL object"),
    ];
    if swept.pack_count > 0 {
        done.push(format!("{} of aborted backups", count(swept.pack_count, "pack")));
    }
    if swept.upload_count > 0 {
        done.push(count(swept.upload_count, "unfinished upload"));
    }
    let last = done.pop().unwrap_or_default();
    let bytes = words::bytes(bytes);
    terminal.remark(&format!("deleted {} and {last}, {bytes} in all", done.join(", ")));
    Ok(())
}

/// Asks the person at the terminal.
async fn confirm(invocation: &Invocation, plan: &Plan) -> Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::new(Kind::Usage, "nobody is here to confirm the deletion")
            .hint("Look at the plan with --dry-run, then run again with --yes."));
    }
    let aborted = match plan.sweep.backups.len() {
        0 => String::new(),
        count => format!(" and what is left of {}", words::count(count, "aborted backup")),
    };
    invocation.terminal.error_text(&format!(
        "Delete {}{aborted}, {} for good? [y/N] ",
        words::count(plan.deletion.backups.len(), "backup"),
        words::bytes(plan.stored_bytes())
    ));
    // A thread of its own waits for the answer, so that a signal still ends the command.
    let asked = tokio::task::spawn_blocking(|| {
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer).map(|_count| answer)
    });
    let answer = tokio::select! {
        answer = asked => answer,
        () = invocation.stop.cancelled() => {
            return Err(Error::new(Kind::Cancelled, "stopped; nothing was deleted"));
        }
    };
    let answer = answer
        .map_err(|error| Error::new(Kind::Bug, format!("unable to wait for an answer: {error}")))?
        .context(|| "unable to read the answer")?;
    if ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) {
        return Ok(());
    }
    Err(Error::new(Kind::Cancelled, "not confirmed; nothing was deleted"))
}
