//! `tidemark expire`: deletes what retention no longer asks for, after printing what that is.

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// Delete backups and WAL that retention no longer asks for.
///
/// The plan is printed first: what goes, what stays, and why. Nothing that a kept backup or the
/// window of point-in-time recovery needs is ever deleted.
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

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
