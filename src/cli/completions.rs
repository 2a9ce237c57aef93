//! `tidemark completions`: a completion script for a shell.

use clap_complete::Shell;

use super::invocation::Invocation;
use crate::error::Result;

/// Print a completion script for a shell.
///
/// For bash: tidemark completions bash > /etc/bash_completion.d/tidemark
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell.
    #[arg(value_enum)]
    pub(super) shell: Shell,
}

pub(super) fn run(args: Args, invocation: Invocation) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::grammar(), "tidemark", &mut script);
    invocation.terminal.data(&String::from_utf8_lossy(&script))
}
