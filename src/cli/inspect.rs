//! `tidemark inspect`: what is inside a WAL segment or an object of the repository.

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// Show what is inside a WAL segment file, or a pack, manifest, extent or key of the repository.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A WAL segment file, or an object's name as 'tidemark list' and errors print it.
    #[arg(value_name = "WHAT", value_hint = clap::ValueHint::FilePath)]
    pub(super) what: String,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
