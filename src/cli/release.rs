//! `tidemark release`: ends a hold.

use serde_json::json;

use super::invocation::Invocation;
use crate::daemon::opening;
use crate::error::Result;
use crate::repo::{BackupId, marks};

/// End the hold of a backup: retention decides about it again.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The backup, as 'tidemark list' names it.
    #[arg(value_name = "BACKUP")]
    pub(super) backup: BackupId,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let Invocation { config, clock, terminal, .. } = &invocation;
    let repository = opening::repository(config, clock).await?;
    let Args { backup, json } = args;
    let was_held = marks::release(&repository, backup).await?;
    if json {
        return terminal
            .json_line(&json!({ "backup": backup, "held": false, "was_held": was_held }));
    }
    terminal.remark(&match was_held {
        true => format!("backup {backup} is held no more"),
        false => format!("backup {backup} was not held"),
    });
    Ok(())
}
