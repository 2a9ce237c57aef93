//! `tidemark hold`: keeps a backup whatever retention says, until it is released.

use serde_json::json;

use super::invocation::Invocation;
use crate::daemon::opening;
use crate::error::Result;
use crate::repo::{BackupId, marks};
use crate::store::PutOutcome;

/// Keep a backup, whatever retention says, until it is released.
///
/// 'expire' and 'run' leave a held backup alone, and the WAL from its start to its end: so much can
/// be restored. With --pitr-days the WAL after it, up to a later target, goes as that says, and a
/// longer window keeps it; without, it is kept too. Hold the backup that a restore reads from for as
/// long as the restore takes, if it is an old one.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The backup, as 'tidemark list' names it.
    #[arg(value_name = "BACKUP")]
    pub(super) backup: BackupId,
    /// Why, in a line of text that 'tidemark list' shows.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(super) reason: String,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let Invocation { config, clock, terminal, .. } = &invocation;
    let repository = opening::repository(config, clock).await?;
    let Args { backup, reason, json } = args;
    let was_held = marks::hold(&repository, backup, &reason).await? == PutOutcome::AlreadyThere;
    if json {
        return terminal
            .json_line(&json!({ "backup": backup, "held": true, "was_held": was_held }));
    }
    terminal.remark(&match was_held {
        true => format!("backup {backup} was held already, and its reason stays as it was"),
        false => format!("backup {backup} is held until 'tidemark release {backup}'"),
    });
    Ok(())
}
