//! `tidemark demo`: the whole job on a throwaway server.

use std::path::PathBuf;

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// Show the main job on a throwaway PostgreSQL: backup, streaming, an accident, and the way back.
///
/// Starts a server of its own in a temporary folder, writes to it, destroys something, restores to
/// the moment before, compares row for row, and removes everything again. Nothing of this machine
/// is touched.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder with PostgreSQL's programs (initdb, postgres, psql).
    ///
    /// Without it the PATH and the usual places of distributions are searched, newest first.
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub(super) postgres_bin: Option<PathBuf>,
    /// Leave the temporary folder and the restored server in place and print where they are.
    #[arg(long)]
    pub(super) keep: bool,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
