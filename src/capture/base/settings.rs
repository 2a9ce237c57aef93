//! What is asked of the server before a base backup: who it is, and what a restore must know.

use std::collections::BTreeMap;

use crate::capture::stream::server;
use crate::error::{Kind, Result};
use crate::pg::{SegmentSize, SystemId, TimelineHistory, Version};
use crate::repo::Repository;
use crate::wire::{ConnectOptions, Connection, Session};

use super::PageChecksums;
use super::pages::Check;

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

/// How the server writes the size of a relation's files that blocks are numbered by (`RELSEG_SIZE`).
const USUAL_SEGMENT_SIZE: &str = "1GB";

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

impl ServerFacts {
    /// Which pages are looked at when `wanted`.
    #[must_use]
    pub fn page_check(&self, wanted: PageChecksums) -> Check {
        if wanted == PageChecksums::Ignore || !self.has_checksums {
            return Check::None;
        }
        match self.settings.get("segment_size") {
            Some(found) if found != USUAL_SEGMENT_SIZE => {
                tracing::warn!(
                    "page checksums are not checked: the server's relation files have {found}, and pages \
                     are numbered here for {USUAL_SEGMENT_SIZE}"
                );
                Check::None
            }
            _ => Check::Every,
        }
    }
}

/// Refuses a server whose pages, or pages of WAL, have another size than those we know.
fn check_block_sizes(settings: &BTreeMap<String, String>) -> Result<()> {
    let mut shown = ["block_size", "wal_block_size"]
        .into_iter()
        .filter_map(|name| settings.get_key_value(name));
    shown.try_for_each(|(name, found)| server::check_block_size(name, found))
}

/// Connects and asks; the connection is ready for `BASE_BACKUP`.
///
/// # Errors
/// `conflict` when the server is another cluster than the repository's; `unsupported` for one that was
/// built with pages of another size; what the server says.
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
    check_block_sizes(&settings)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::TimelineId;

    fn settings(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
        entries.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn pages_of_another_size_are_refused() {
        let usual = [("block_size", "8192"), ("wal_block_size", "8192")];
        check_block_sizes(&settings(&usual)).unwrap();
        for (name, found) in [("block_size", "4096"), ("wal_block_size", "32768")] {
            let error = check_block_sizes(&settings(&[usual[0], usual[1], (name, found)]));
            let error = error.unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.message().contains(&format!("{found} bytes ({name})")), "{error}");
        }
    }

    #[test]
    fn pages_are_checked_only_where_their_numbers_are_known() {
        let facts = |has_checksums, segment_size| ServerFacts {
            system_id: SystemId(7),
            version: Version::from_server_version_num(150_004).unwrap(),
            segment_size: SegmentSize::DEFAULT,
            has_checksums,
            history: TimelineHistory::first_timeline_only(TimelineId::FIRST),
            settings: settings(&[("segment_size", segment_size)]),
        };
        for wanted in [PageChecksums::Warn, PageChecksums::Fail] {
            assert_eq!(facts(true, "1GB").page_check(wanted), Check::Every);
            assert_eq!(facts(false, "1GB").page_check(wanted), Check::None);
            assert_eq!(facts(true, "2GB").page_check(wanted), Check::None);
        }
        assert_eq!(facts(true, "1GB").page_check(PageChecksums::Ignore), Check::None);
    }
}
