//! What is asked of the server before a base backup: who it is, and what a restore must know.

use std::collections::BTreeMap;

use crate::capture::stream::server;
use crate::error::{Kind, Result};
use crate::pg::{SegmentSize, SystemId, TimelineHistory, Version};
use crate::repo::Repository;
use crate::wire::{ConnectOptions, Connection, Session};

/// Settings that a standby or a recovery must not have lower than the server had.
const REQUIRED: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];

/// Settings worth knowing when a backup is looked at years later; some may be withheld.
const WORTH_KNOWING: [&str; 10] = [
    "server_version",
    "wal_segment_size",
    "wal_level",
    "data_checksums",
    "block_size",
    "wal_block_size",
    "segment_size",
    "track_commit_timestamp",
    "cluster_name",
    "shared_preload_libraries",
];

/// The server of a base backup.
#[derive(Clone, Debug)]
pub struct ServerFacts {
    /// Which cluster it is.
    pub system_id: SystemId,
    /// Its version.
    pub version: Version,
    /// Size of its WAL segments.
    pub segment_size: SegmentSize,
    /// Whether its pages carry checksums.
    pub has_checksums: bool,
    /// The way to its timeline.
    pub history: TimelineHistory,
    /// Settings for the manifest.
    pub settings: BTreeMap<String, String>,
}

/// Connects and asks; the connection is ready for `BASE_BACKUP`.
///
/// # Errors
/// `conflict` when the server is another cluster than the repository's; what the server says.
pub async fn meet(
    postgres: &ConnectOptions,
    repository: &Repository,
) -> Result<(ServerFacts, Connection)> {
    let mut connection =
        Connection::connect(postgres, Session::Physical, repository.clock()).await?;
    let identity = connection.identify_system().await?;
    server::check_system(repository.system_id(), identity.system_id)?;
    let (history, _) = server::read_history(&mut connection, identity.timeline).await?;
    let mut settings = BTreeMap::new();
    for name in REQUIRED {
        settings.insert(name.to_owned(), connection.show(name).await?);
    }
    for name in WORTH_KNOWING {
        match connection.show(name).await {
            Ok(value) => {
                settings.insert(name.to_owned(), value);
            }
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Denied) => {}
            Err(error) => return Err(error),
        }
    }
    let facts = ServerFacts {
        system_id: identity.system_id,
        version: connection.version(),
        segment_size: connection.segment_size().await?,
        has_checksums: settings.get("data_checksums").is_some_and(|value| value == "on"),
        history,
        settings,
    };
    Ok((facts, connection))
}
