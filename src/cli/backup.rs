//! `tidemark backup`: one base backup.

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

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

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
