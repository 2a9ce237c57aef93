//! `tidemark check`: whether everything that backup and restore will need is there.

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// Check that server, repository and keys are ready, and that the WAL arrives.
///
/// Connects both ways, reads the server's settings and the slot, probes what the store enforces,
/// and proves with the identity, when there is one, that what is written can be read.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
