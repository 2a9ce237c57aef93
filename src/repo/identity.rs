//! The cluster's `identity` object: which PostgreSQL cluster a folder of the repository belongs to.
//!
//! # Shape
//! Plain JSON, one line, at most 4 KiB:
//! `{"format":"tidemark","version":1,"system_id":"7300000000000000001","created":"2026-11-22T10:00:00Z"}`.
//! Unknown members are passed over.
//!
//! # Durability
//! Written once, first of all objects of a cluster.

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::header::FORMAT_VERSION;
use super::names::{ClusterName, Object};
use super::printable;
use crate::clock::Clock;
use crate::error::{Context, Error, Kind, Result};
use crate::pg::SystemId;
use crate::store::{PutOutcome, Store};

/// Longest identity object that is read.
const IDENTITY_BYTES_MAX: usize = 4096;
/// Value of the member that says whose format this is.
const FORMAT: &str = "tidemark";

/// Which PostgreSQL cluster this is, and since when it is backed up here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterIdentity {
    format: String,
    version: u16,
    /// The PostgreSQL cluster.
    pub system_id: SystemId,
    /// When the object was written.
    pub created: Timestamp,
}

impl ClusterIdentity {
    fn new(system_id: SystemId, created: Timestamp) -> Self {
        // Whole seconds: more digits say nothing.
        let created = Timestamp::from_second(created.as_second()).unwrap_or(created);
        Self { format: FORMAT.to_owned(), version: FORMAT_VERSION, system_id, created }
    }

    fn encode(&self) -> Result<Bytes> {
        let mut text = serde_json::to_vec(self)
            .map_err(|error| Error::new(Kind::Bug, format!("unable to write JSON: {error}")))?;
        text.push(b'\n');
        Ok(Bytes::from(text))
    }

    /// Reads an identity object.
    ///
    /// # Errors
    /// `corrupt` when it is none, `unsupported` when a later format wrote it.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > IDENTITY_BYTES_MAX {
            let length = bytes.len();
            let message = format!("it has {length} bytes, at most {IDENTITY_BYTES_MAX} expected");
            return Err(Error::new(Kind::Corrupt, message));
        }
        let identity: Self = serde_json::from_slice(bytes).map_err(|error| {
            Error::new(
                Kind::Corrupt,
                format!("it is not an identity: {}", printable(&error.to_string())),
            )
        })?;
        if identity.format != FORMAT {
            let format = &identity.format;
            return Err(Error::new(Kind::Corrupt, format!("its format is {format:?}")));
        }
        if identity.version != FORMAT_VERSION {
            let version = identity.version;
            let message = format!("it has format version {version}, this build reads version 1");
            return Err(Error::new(Kind::Unsupported, message)
                .hint("Use the release of Tidemark that wrote this repository, or a later one."));
        }
        Ok(identity)
    }
}

/// Puts the identity of `cluster`, or checks the one that is there.
pub(super) async fn create(
    store: &dyn Store,
    cluster: &ClusterName,
    system_id: SystemId,
    clock: &Clock,
) -> Result<ClusterIdentity> {
    let identity = ClusterIdentity::new(system_id, clock.now());
    let name = Object::Identity.name(cluster)?;
    let outcome = store
        .put_if_absent(&name, identity.encode()?)
        .await
        .context(|| format!("unable to create cluster '{cluster}' in {}", store.describe()))?;
    if outcome == PutOutcome::Created {
        return Ok(identity);
    }
    let found = read(store, cluster).await?;
    if found.system_id == system_id {
        return Ok(found);
    }
    Err(Error::new(
        Kind::Conflict,
        format!(
            "unable to use cluster '{cluster}' in {}: it belongs to the PostgreSQL cluster with \
             system identifier {}, this server has {system_id}",
            store.describe(),
            found.system_id
        ),
    )
    .hint("Choose another cluster name or repository, or connect to the server it was made for."))
}

/// Reads the identity of `cluster`.
pub(super) async fn read(store: &dyn Store, cluster: &ClusterName) -> Result<ClusterIdentity> {
    let name = Object::Identity.name(cluster)?;
    let attempted = || format!("unable to open cluster '{cluster}' in {}", store.describe());
    let bytes =
        store.get(&name, None).await.context(attempted).map_err(|error| match error.kind() {
            Kind::NotFound => error.hint(
                "Check the repository and the cluster name; 'tidemark init' makes a new cluster.",
            ),
            _ => error,
        })?;
    ClusterIdentity::decode(&bytes).context(|| format!("{}: object '{name}'", attempted())).map_err(
        |error| match error.kind() {
            Kind::Corrupt => error.hint(
                "Bring this object back from an older version or another copy of the repository; \
                 nothing else needs to be damaged.",
            ),
            _ => error,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::super::Repository;
    use super::*;
    use crate::store::{StoreOptions, open};

    #[tokio::test]
    async fn a_cluster_is_made_once_and_only_for_one_server() {
        let clock = Clock::simulated("2026-11-22T10:00:00.5Z".parse().unwrap(), 1);
        let store = open("memory:", &StoreOptions::default(), &clock).unwrap();
        let cluster = ClusterName::new("main").unwrap();
        let error = Repository::open(store.clone(), cluster.clone(), &clock).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.hint_text().unwrap().contains("init"));
        for _ in 0..2 {
            let repository =
                Repository::create(store.clone(), cluster.clone(), SystemId(7), &clock).await;
            assert_eq!(repository.unwrap().system_id(), SystemId(7));
        }
        let opened = Repository::open(store.clone(), cluster.clone(), &clock).await.unwrap();
        assert_eq!(opened.identity().created.to_string(), "2026-11-22T10:00:00Z");
        let error = Repository::create(store, cluster, SystemId(8), &clock).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
        assert!(error.to_string().contains("system identifier 7, this server has 8"), "{error}");
    }

    #[test]
    fn foreign_objects_are_corrupt_and_later_ones_unsupported() {
        for (text, kind) in [
            ("", Kind::Corrupt),
            ("[]", Kind::Corrupt),
            (
                r#"{"format":"x","version":1,"system_id":"1","created":"2026-01-01T00:00:00Z"}"#,
                Kind::Corrupt,
            ),
            (
                r#"{"format":"tidemark","version":1,"system_id":"-1","created":"2026-01-01T00:00:00Z"}"#,
                Kind::Corrupt,
            ),
            (
                r#"{"format":"tidemark","version":2,"system_id":"1","created":"2026-01-01T00:00:00Z"}"#,
                Kind::Unsupported,
            ),
        ] {
            assert_eq!(
                ClusterIdentity::decode(text.as_bytes()).unwrap_err().kind(),
                kind,
                "{text}"
            );
        }
        assert!(ClusterIdentity::decode(&[b' '; 5000]).is_err());
    }
}
