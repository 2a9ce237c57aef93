//! What the objects of a store mean: one cluster's backups and WAL.
//!
//! A [`Repository`] is a store and the name of a cluster in it. A [`Writer`] seals and puts (it needs
//! recipients only), a [`Reader`] fetches and opens (it needs a decryption identity). The byte-exact
//! format is in [`mod@format`].
//!
//! # Invariants
//! - Objects are written once. What consists of several becomes visible by its last: a backup by its
//!   manifest, a data key before the first object sealed with it.
//! - No byte from the store is believed: lengths have maxima, frames are authenticated before they are
//!   parsed, and whatever is wrong is an error of kind `corrupt` that names object and offset.

pub mod catalog;
pub mod compaction;
pub mod coverage;
pub mod extent;
pub(crate) mod fuzz;
pub mod header;
pub mod identity;
pub mod interval;
pub mod keys;
pub mod lease;
mod load;
pub mod manifest;
pub mod marks;
pub mod names;
pub mod pack;
pub mod packing;
pub(crate) mod patience;
mod process;
pub mod reader;
pub mod retention;
pub mod sweep;
pub mod verify;
pub mod writer;

pub use catalog::{BackupSummary, Catalog, IncompleteBackup};
pub use coverage::{Gap, StoredExtent, WalCatalog};
pub use extent::{ExtentBuilder, ExtentMember, SealedExtent};
pub use header::ObjectHeader;
pub use identity::ClusterIdentity;
pub use interval::{Interval, Lineage, Piece, WalGap};
pub use keys::{DecryptionIdentity, Encryption, Recipient};
pub use lease::{Lease, LeaseOptions};
pub use load::list_extents;
pub(crate) use load::list_wal;
pub use manifest::{
    BackupKind, ChecksumFailure, Manifest, ManifestFacts, PackSummary, PublicManifest, Tablespace,
};
pub use names::{BackupId, ClusterName, ExtentName, KeyId, Object, PackName};
pub use pack::{Entry, EntryKind, FilePath, FooterPlace, FrameRecord, PackFooter, Span, ZeroRun};
pub use packing::{BackupWriter, FileMeta, Inspect, PackOptions, PackProgress, PackedBackup};
pub use reader::{Check, FetchedBatch, FetchedExtent, FrameBatch, PackHandle, Reader};
pub use writer::Writer;

/// What this module's interface is spoken in, for those above it.
pub use crate::pipeline::{Budget, Level, Permit, Permits, Pool, PoolOptions, Worker, budget};

use std::sync::Arc;

use bytes::Bytes;

use crate::clock::Clock;
use crate::error::Result;
use crate::pg::{SystemId, TimelineHistory, TimelineId};
use crate::store::{ObjectName, Store};

/// Text that nobody has authenticated, without the characters that a terminal would take for commands.
fn printable(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// The byte-exact repository format, version 1.
#[doc = include_str!("FORMAT.md")]
pub mod format {}

/// One cluster's part of a store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Repository(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Arc<dyn Store>,
    cluster: ClusterName,
    identity: ClusterIdentity,
    clock: Clock,
}

#[cfg(test)]
impl Repository {
    /// One in memory, and its store.
    pub(crate) async fn in_memory(clock: &Clock) -> (crate::store::memory::Memory, Self) {
        let memory = crate::store::memory::Memory::new(clock);
        let (store, cluster) = (Arc::new(memory.clone()), ClusterName::new("main").unwrap());
        (memory, Self::create(store, cluster, SystemId(7), clock).await.unwrap())
    }
}

impl Repository {
    /// Makes `cluster` a part of `store`, for the PostgreSQL cluster `system_id`; does nothing when it
    /// is that already.
    ///
    /// # Errors
    /// `conflict` when `cluster` belongs to another PostgreSQL cluster; what the store reports.
    pub async fn create(
        store: Arc<dyn Store>,
        cluster: ClusterName,
        system_id: SystemId,
        clock: &Clock,
    ) -> Result<Self> {
        let identity = identity::create(&*store, &cluster, system_id, clock).await?;
        Ok(Self(Arc::new(Inner { store, cluster, identity, clock: clock.clone() })))
    }

    /// Opens what [`Repository::create`] made.
    ///
    /// # Errors
    /// `not found` when `cluster` was never made here; what the store reports.
    pub async fn open(store: Arc<dyn Store>, cluster: ClusterName, clock: &Clock) -> Result<Self> {
        let identity = identity::read(&*store, &cluster).await?;
        Ok(Self(Arc::new(Inner { store, cluster, identity, clock: clock.clone() })))
    }

    /// The store all clusters of the repository live in.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.0.store
    }

    /// The name of the cluster.
    #[must_use]
    pub fn cluster(&self) -> &ClusterName {
        &self.0.cluster
    }

    /// The PostgreSQL cluster whose data this is.
    #[must_use]
    pub fn system_id(&self) -> SystemId {
        self.0.identity.system_id
    }

    /// What the identity object says.
    #[must_use]
    pub fn identity(&self) -> &ClusterIdentity {
        &self.0.identity
    }

    /// The source of time and randomness of all that is written here.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// Name of an object of this cluster.
    ///
    /// # Errors
    /// As [`Object::name`].
    pub fn name(&self, object: &Object) -> Result<ObjectName> {
        object.name(&self.0.cluster)
    }

    /// Whether anything here was ever encrypted: a writer without recipients must not go on then by
    /// mistake.
    ///
    /// # Errors
    /// What the store reports.
    pub async fn has_keys(&self) -> Result<bool> {
        let page = self.store().list(&self.cluster().keys_prefix(), None).await?;
        Ok(!page.objects.is_empty())
    }

    /// A writer with a data key of its own, wrapped for the recipients and put before this returns.
    ///
    /// # Durability
    /// The wrapped key is durable before anything is sealed with it, so nothing can be sealed that
    /// no identity opens.
    ///
    /// # Errors
    /// `config` when the recipients cannot be used together; what the store reports.
    pub async fn writer(&self, encryption: &Encryption) -> Result<Writer> {
        Writer::begin(self, encryption).await
    }

    /// A reader with these identities (none are needed for what is not encrypted).
    #[must_use]
    pub fn reader(&self, identities: Vec<DecryptionIdentity>) -> Reader {
        Reader::new(self.clone(), identities)
    }

    /// The part of a backup's manifest that needs no key.
    ///
    /// # Errors
    /// `not found` when there is no such backup, `corrupt` when its manifest is damaged.
    pub async fn public_manifest(&self, backup: BackupId) -> Result<PublicManifest> {
        manifest::read_public(self, backup).await
    }

    /// A timeline's history. It is never encrypted: it holds LSNs only, and a host that can only
    /// write needs it to follow timelines.
    ///
    /// # Errors
    /// `not found` when there is none, `corrupt` when it is damaged.
    pub async fn history(&self, timeline: TimelineId) -> Result<TimelineHistory> {
        TimelineHistory::decode(timeline, &self.history_file(timeline).await?)
    }

    /// The content of a timeline's history file, byte for byte as PostgreSQL wrote it.
    ///
    /// # Errors
    /// As [`Repository::history`].
    pub async fn history_file(&self, timeline: TimelineId) -> Result<Bytes> {
        reader::read_history(self, timeline).await
    }
}
