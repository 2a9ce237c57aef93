//! `tidemark run`: everything, supervised.

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// Do everything by schedule: stream WAL, take base backups, expire, compact, sweep.
///
/// This is what runs beside a database as a service. SIGTERM flushes what was received and ends
/// with status 0.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// When another process writes for this cluster, wait for its end instead of refusing.
    #[arg(long)]
    pub(super) wait: bool,
}

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
