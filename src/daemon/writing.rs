//! The right to write for a cluster: repository, keys and lease, taken in the order in which nothing
//! is left half done.

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use super::{keys, opening};
use crate::clock::Clock;
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::repo::lease::{UnconditionalStore, Wait};
use crate::repo::{ClusterName, Lease, LeaseOptions, Repository, Writer};

/// What a writer holds.
#[derive(Debug)]
pub struct Writing {
    /// Where it writes.
    pub repository: Repository,
    /// What it seals with.
    pub writer: Writer,
    /// What keeps others out.
    pub lease: Lease,
    /// The identity file that was made because nothing was configured: somebody must be told.
    pub identity_made: Option<PathBuf>,
}

/// Opens the repository, makes it when it is missing, and seals for whom the settings say.
///
/// The server is only asked when the repository must be made: a stream starts while it is down.
///
/// # Errors
/// What is wrong with settings, server or store.
pub async fn writer(config: &Config, clock: &Clock) -> Result<(Writer, Option<PathBuf>)> {
    let cluster = ClusterName::new(config.cluster())?;
    let store = opening::store(config, clock)?;
    let repository = match Repository::open(store, cluster, clock).await {
        Ok(repository) => repository,
        Err(error) if error.kind() == Kind::NotFound => {
            let server = opening::identify_server(config, clock).await?;
            opening::repository_for(config, clock, server.system_id).await?
        }
        Err(error) => return Err(error),
    };
    let seal = keys::seal(config, &repository).await?;
    Ok((repository.writer(&seal.encryption).await?, seal.made))
}

impl Writing {
    /// Takes the right to write, as `description`.
    ///
    /// # Errors
    /// `conflict` when another process has it and `wait` refuses to wait; `cancelled` when `stop`
    /// came first; what is wrong with settings, server or store.
    ///
    /// # Cancel safety
    /// Dropped at any point it leaves at most a wrapped key that nothing uses, which a sweep takes,
    /// and a lease that expires.
    pub async fn begin(
        config: &Config,
        clock: &Clock,
        description: &str,
        wait: Wait,
        stop: &CancellationToken,
    ) -> Result<Self> {
        let begin = async {
            let (writer, identity_made) = writer(config, clock).await?;
            let repository = writer.repository().clone();
            let mut options = LeaseOptions::new(description);
            options.ttl = config.interval("lease.ttl")?;
            options.wait = wait;
            options.key_id = Some(writer.key_id().to_string());
            if config.accepts_unconditional_store() {
                options.unconditional_store = UnconditionalStore::Accept;
            }
            let lease = Lease::acquire(&repository, options).await?;
            Ok(Self { repository, writer, lease, identity_made })
        };
        tokio::select! {
            begun = begin => begun,
            () = stop.cancelled() => Err(Error::new(
                Kind::Cancelled,
                "stopped before the right to write was taken",
            )),
        }
    }
}
