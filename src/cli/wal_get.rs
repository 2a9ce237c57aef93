//! `tidemark wal-get`: PostgreSQL's `restore_command`.

use std::path::PathBuf;

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

/// Fetch one WAL segment or history file: PostgreSQL's restore_command.
///
/// Used as restore_command = 'tidemark wal-get %f %p'. Ends with status 1 when the repository does
/// not hold the file, which ends recovery in good order, and with a status above 125 when the
/// repository cannot be reached, which stops PostgreSQL instead of letting it end recovery early.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the file wanted, PostgreSQL's %f.
    #[arg(value_name = "NAME")]
    pub(super) name: String,
    /// Where to put it, PostgreSQL's %p.
    #[arg(value_name = "PATH", value_hint = clap::ValueHint::FilePath)]
    pub(super) path: PathBuf,
}

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
