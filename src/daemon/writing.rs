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

/// The repository, made when it is missing. The server is only asked then: a stream starts while
/// it is down.
///
/// # Durability
/// A slot of ours that keeps WAL means that the server's WAL went to a repository before. If that one is not
/// there (a share that is not mounted, another bucket or prefix), a new one in its place would take WAL,
/// the server would be told so and forget it, and the old repository would have a gap: so only
/// `tidemark init` makes one then.
async fn repository(config: &Config, clock: &Clock) -> Result<Repository> {
    let cluster = ClusterName::new(config.cluster())?;
    let store = opening::store(config, clock)?;
    let place = store.describe();
    match Repository::open(store, cluster, clock).await {
        Err(error) if error.kind() == Kind::NotFound => {
            if opening::slot_keeps_wal(config, clock).await? {
                return Err(vanished(&place, config.cluster(), config.slot_name()));
            }
            let server = opening::identify_server(config, clock).await?;
            opening::repository_for(config, clock, server.system_id).await
        }
        opened => opened,
    }
}

/// Why a repository that is not there must not be begun, or judged, as a new one.
pub(crate) fn vanished(place: &str, cluster: &str, slot: &str) -> Error {
    let message = format!(
        "nothing of cluster '{cluster}' is in {place}, but the server has replication slot '{slot}', \
         by which its WAL was streamed before"
    );
    Error::new(Kind::NotFound, message).hint(
        "Is the repository mounted, and are --repository and --cluster as they were? To begin a new \
         one, run 'tidemark init'.",
    )
}

/// A writer that needs no lease of its own: for base backups, whose names no rival can take.
///
/// # Errors
/// What is wrong with settings, server or store.
pub async fn writer(config: &Config, clock: &Clock) -> Result<(Writer, Option<PathBuf>)> {
    // What can be wrong with settings alone comes out before anybody is asked.
    keys::configured(config)?;
    let repository = repository(config, clock).await?;
    sealing_writer(config, &repository).await
}

async fn sealing_writer(
    config: &Config,
    repository: &Repository,
) -> Result<(Writer, Option<PathBuf>)> {
    let seal = keys::seal(config, repository).await?;
    Ok((repository.writer(&seal.encryption).await?, seal.made))
}

/// How the lease is taken; a rival is refused.
///
/// # Errors
/// `config` for a value that is not understood.
pub fn lease_options(config: &Config, description: &str) -> Result<LeaseOptions> {
    let mut options = LeaseOptions::new(description);
    options.ttl = config.interval("lease.ttl")?;
    if config.accepts_unconditional_store() {
        options.unconditional_store = UnconditionalStore::Accept;
    }
    Ok(options)
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
            // What can be wrong with settings alone comes out before anybody is asked.
            keys::configured(config)?;
            let repository = repository(config, clock).await?;
            let mut options = lease_options(config, description)?;
            options.wait = wait;
            let lease = Lease::acquire(&repository, options).await?;
            // Only who may write draws a key: a rival that is refused again and again leaves none.
            match sealing_writer(config, &repository).await {
                Ok((writer, identity_made)) => {
                    lease.seals_with(writer.key_id().to_string());
                    Ok(Self { repository, writer, lease, identity_made })
                }
                Err(error) => {
                    // Who mends the passphrase and starts again need not wait for it to expire.
                    lease.release().await;
                    Err(error)
                }
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;
    use crate::pg::SystemId;

    #[tokio::test]
    async fn a_start_that_the_passphrase_stopped_keeps_nobody_out() {
        let folder = tempfile::tempdir().unwrap();
        let (root, file) = (folder.path().join("repository"), folder.path().join("passphrase"));
        let variables = [
            ("TIDEMARK_CONFIG", ""),
            ("TIDEMARK_REPOSITORY", root.to_str().unwrap()),
            ("TIDEMARK_KEYS_PASSPHRASE_FILE", file.to_str().unwrap()),
        ];
        let config = Config::load(None, Vec::new(), Environment::of(variables)).unwrap();
        let (clock, stop) = (Clock::system(), CancellationToken::new());
        opening::repository_for(&config, &clock, SystemId(7)).await.unwrap();
        for (passphrase, refused) in [("a", None), ("b", Some(Kind::Config)), ("a", None)] {
            std::fs::write(&file, passphrase).unwrap();
            match Writing::begin(&config, &clock, "test", Wait::Refuse, &stop).await {
                Ok(writing) => {
                    assert_eq!(refused, None);
                    writing.lease.release().await;
                }
                Err(error) => assert_eq!(Some(error.kind()), refused, "{error}"),
            }
        }
    }
}
