//! `tidemark keygen`: a new key pair.

use std::path::PathBuf;

use serde_json::json;

use super::invocation::Invocation;
use crate::daemon::keys;
use crate::error::Result;
use crate::repo::DecryptionIdentity;

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
    /// Print the public key and the name of the file as JSON on standard output.
    #[arg(long, requires = "output")]
    pub(super) json: bool,
}

pub(super) fn run(args: Args, invocation: Invocation) -> Result<()> {
    let terminal = &invocation.terminal;
    let identity = DecryptionIdentity::generate();
    let recipient = identity.recipient().to_string();
    let Some(path) = args.output else {
        terminal.data(&keys::identity_text(&identity, &invocation.clock))?;
        terminal.remark(&format!("public key: {recipient}"));
        return Ok(());
    };
    keys::write_identity_file(&path, &identity, &invocation.clock)?;
    if args.json {
        return terminal.json_line(&json!({ "public_key": recipient, "identity_file": path }));
    }
    terminal.remark(&format!("wrote the identity to '{}'", path.display()));
    terminal.data(&format!("{recipient}\n"))
}
