//! `tidemark stream`: WAL into the repository until told to stop.

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// Stream WAL into the repository until told to stop.
///
/// Makes the replication slot and the repository when they are missing. Every commit is durable in
/// the repository about a second after the server wrote it. SIGTERM flushes what was received and
/// ends with status 0; killing it in any other way loses nothing either, it goes on where it was.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// When another process writes for this cluster, wait for its end instead of refusing.
    #[arg(long)]
    pub(super) wait: bool,
}

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
