//! `tidemark init`: makes a repository ready and says what its store can be trusted with.

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// Make a repository ready for a cluster and prove what its store can be trusted with.
///
/// Writes the identity of the cluster into the repository, so that another cluster can never be
/// written over it, and tests whether the store really refuses to overwrite. Doing it again changes
/// nothing. 'stream' and 'backup' do this by themselves when needed.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
