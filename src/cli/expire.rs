//! `tidemark expire`: deletes what retention no longer asks for, after printing what that is.

use std::io::{BufRead, IsTerminal};

use serde_json::json;

use super::invocation::Invocation;
use super::words;
use crate::daemon::opening;
use crate::error::{Context, Error, Kind, Result};
use crate::repo::Catalog;
use crate::repo::retention::{self, DeletionPlan};

/// Delete backups and WAL that retention no longer asks for.
///
/// The plan is printed first: what goes, what stays, and why. Nothing that a kept backup or the
/// window of point-in-time recovery needs is ever deleted, nor the newest backup that can be
/// restored.
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
    let catalog = Catalog::load(&repository).await?;
    let plan = retention::plan(&catalog, &options, clock.now())?;
    if !args.json {
        terminal.data(&plan.to_string())?;
    }
    if args.dry_run || plan.is_empty() {
        if args.json {
            terminal.json_line(&json!({ "plan": plan, "report": null }))?;
        } else if plan.is_empty() {
            terminal.remark("nothing to delete");
        }
        return Ok(());
    }
    if !args.yes {
        confirm(&invocation, &plan).await?;
    }
    let report = retention::apply(&repository, &plan).await?;
    if args.json {
        terminal.json_line(&json!({ "plan": plan, "report": report }))?;
    } else {
        terminal.remark(&format!(
            "deleted {} and {}, {} in all",
            words::count(report.backups.len(), "backup"),
            words::count(usize::try_from(report.extent_count).unwrap_or(usize::MAX), "WAL object"),
            words::bytes(plan.stored_bytes())
        ));
    }
    match report.refused.as_slice() {
        [] => Ok(()),
        [first, ..] => Err(Error::new(
            Kind::Denied,
            format!(
                "the store refused to delete {}, first '{}': {}",
                words::count(report.refused.len(), "object"),
                first.object,
                first.problem
            ),
        )
        .hint("What is locked or held is deleted by a later run, once the store allows it.")),
    }
}

/// Asks the person at the terminal.
async fn confirm(invocation: &Invocation, plan: &DeletionPlan) -> Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(Error::new(Kind::Usage, "nobody is here to confirm the deletion")
            .hint("Look at the plan with --dry-run, then run again with --yes."));
    }
    invocation.terminal.error_text(&format!(
        "Delete {}, {} for good? [y/N] ",
        words::count(plan.backups.len(), "backup"),
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
