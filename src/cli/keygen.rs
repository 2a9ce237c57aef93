//! `tidemark keygen`: a new key pair.

use std::path::PathBuf;

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// Make a key pair: an identity file for who restores, a recipient for who backs up.
///
/// A host that has only the recipient can write backups and cannot read them. Without --output the
/// identity is printed on standard output. Keep a copy of it away from the database host: without
/// it no backup can be restored.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Write the identity to this new file, readable by its owner only.
    #[arg(long, short, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub(super) output: Option<PathBuf>,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
