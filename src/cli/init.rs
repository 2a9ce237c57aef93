//! `tidemark init`: makes a repository ready and says what its store can be trusted with.

use serde_json::json;

use super::invocation::Invocation;
use super::stream::announce_identity;
use crate::daemon::{keys, opening};
use crate::error::{Error, Kind, Result};
use crate::repo::Encryption;
use crate::store::Capabilities;

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

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let Invocation { config, clock, terminal, .. } = &invocation;
    keys::configured(config)?;
    let store = opening::store(config, clock)?;
    let capabilities = store.probe().await?;
    if !trustworthy(&capabilities) && !config.accepts_unconditional_store() {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "{} does not enforce conditional writes, so two writers could not be kept apart",
                store.describe()
            ),
        )
        .hint(
            "Use a store that does (Amazon S3, Ceph, MinIO and most others), or accept the risk \
             with lease.unconditional_store = \"accept\".",
        ));
    }
    let server = opening::identify_server(config, clock).await?;
    let repository = opening::repository_for(config, clock, server.system_id).await?;
    let seal = keys::seal(config, &repository).await?;
    announce_identity(terminal, seal.made.as_deref());
    let recipients: Vec<String> = match &seal.encryption {
        Encryption::None => Vec::new(),
        Encryption::Recipients(all) => all.iter().map(ToString::to_string).collect(),
    };
    if args.json {
        return terminal.json_line(&json!({
            "repository": repository.store().describe(),
            "cluster": repository.cluster().as_str(),
            "system_id": repository.system_id(),
            "capabilities": capabilities,
            "recipients": recipients,
            "identity_file_made": seal.made,
        }));
    }
    terminal.remark(&format!(
        "cluster '{}' of {} is ready for the server with system identifier {}",
        repository.cluster(),
        repository.store().describe(),
        repository.system_id()
    ));
    terminal.remark(&match recipients.as_slice() {
        [] => "what is written will not be encrypted".to_owned(),
        all => format!("what is written can be opened by {}", all.join(", ")),
    });
    for line in remarks(&capabilities) {
        terminal.remark(&line);
    }
    Ok(())
}

/// Whether the store keeps two writers apart.
pub(super) fn trustworthy(capabilities: &Capabilities) -> bool {
    capabilities.conditional_put && capabilities.conditional_replace
}

/// What is worth knowing about a store.
pub(super) fn remarks(capabilities: &Capabilities) -> Vec<String> {
    let mut lines = Vec::new();
    let mut say = |condition: bool, text: &str| {
        if condition {
            lines.push(text.to_owned());
        }
    };
    say(!capabilities.conditional_put, "the store lets objects be overwritten");
    say(!capabilities.conditional_complete, "the store lets large objects be overwritten");
    say(!capabilities.conditional_replace, "the store does not keep two writers apart");
    say(capabilities.wrong_checksum_refused == Some(false), "the store does not verify checksums");
    say(!capabilities.ranged_get, "the store does not answer ranges exactly");
    say(!capabilities.consistent_list, "the store's listing lags behind");
    say(!capabilities.delete, "our credentials may not delete: 'expire' will not work from here");
    say(capabilities.versioning == Some(true), "the bucket keeps old versions of deleted objects");
    say(capabilities.object_lock == Some(true), "the bucket has Object Lock switched on");
    if let Some(skew) = capabilities.clock_skew.filter(|skew| skew.abs().as_secs() >= 60) {
        lines.push(format!("the store's clock differs from ours by {skew:#}"));
    }
    lines
}
