//! `tidemark verify`: reads back what is stored and proves that it can be restored.

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// Read back what is stored and prove that it can be restored.
///
/// Authenticates every frame, or a sample of them, checks that each backup is complete and that the
/// WAL after it is contiguous. Any defect is named with what is lost by it, and the exit status is
/// not 0.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Read this share of the packs and extents, in per cent, chosen at random.
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(super) sample: u8,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
