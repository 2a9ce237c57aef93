//! `tidemark list`: what there is, and which moments can be reached.

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// List backups, the moments that can be restored, gaps, and the newest durable commit.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
