//! A store that takes packs and keeps nothing of them: what the pipeline costs without a store.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tidemark::clock::Clock;
use tidemark::error::Result;
use tidemark::pg::SystemId;
use tidemark::repo::{ClusterName, DecryptionIdentity, Encryption, Repository, Writer};
use tidemark::store::memory::Memory;
use tidemark::store::{
    Capabilities, Latencies, ListPage, Multipart, ObjectInfo, ObjectName, PutOutcome, Replace,
    RequestCounts, Store, VersionTag,
};

/// Keeps what is put whole, and nothing that comes in parts.
#[derive(Debug)]
pub struct Sink(pub Memory);

impl Sink {
    /// A writer into a new one, sealing as the product does by default.
    pub async fn writer() -> Writer {
        let clock = Clock::system();
        let repository = repository(Arc::new(Self(Memory::new(&clock)))).await;
        writer(&repository).await.0
    }
}

/// A repository in `store`.
pub async fn repository(store: Arc<dyn Store>) -> Repository {
    let cluster = ClusterName::new("main").unwrap();
    Repository::create(store, cluster, SystemId(7), &Clock::system()).await.unwrap()
}

/// A writer and who can read what it writes.
pub async fn writer(repository: &Repository) -> (Writer, DecryptionIdentity) {
    let identity = DecryptionIdentity::generate();
    let encryption = Encryption::Recipients(vec![identity.recipient()]);
    (repository.writer(&encryption).await.unwrap(), identity)
}

#[async_trait]
impl Store for Sink {
    fn describe(&self) -> String {
        "sink:".to_owned()
    }

    async fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome> {
        // A copy: the body of a small pack is the front of a buffer made for a large one.
        self.0.put_if_absent(name, Bytes::copy_from_slice(&body)).await
    }

    async fn begin_multipart(&self, _: &ObjectName) -> Result<Box<dyn Multipart>> {
        Ok(Box::new(Dropped))
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        self.0.get(name, range).await
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<ObjectInfo>> {
        self.0.head(name).await
    }

    async fn list(&self, prefix: &str, after: Option<&ObjectName>) -> Result<ListPage> {
        self.0.list(prefix, after).await
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<()> {
        self.0.delete(names).await
    }

    async fn read_versioned(&self, name: &ObjectName) -> Result<Option<(Bytes, VersionTag)>> {
        self.0.read_versioned(name).await
    }

    async fn replace_if(
        &self,
        name: &ObjectName,
        body: Bytes,
        expected: Option<VersionTag>,
    ) -> Result<Replace> {
        self.0.replace_if(name, body, expected).await
    }

    async fn probe(&self) -> Result<Capabilities> {
        self.0.probe().await
    }

    async fn probe_replace(&self) -> Result<bool> {
        self.0.probe_replace().await
    }

    async fn time(&self) -> Result<Option<jiff::Timestamp>> {
        self.0.time().await
    }

    async fn abort_stale_multiparts(&self, prefix: &str, older_than: Duration) -> Result<u64> {
        self.0.abort_stale_multiparts(prefix, older_than).await
    }

    fn requests(&self) -> RequestCounts {
        self.0.requests()
    }

    fn latencies(&self) -> &Latencies {
        self.0.latencies()
    }
}

struct Dropped;

#[async_trait]
impl Multipart for Dropped {
    async fn put_part(&self, _: u32, _: Bytes) -> Result<()> {
        Ok(())
    }

    async fn complete(&self) -> Result<PutOutcome> {
        Ok(PutOutcome::Created)
    }

    async fn abort(&self) -> Result<()> {
        Ok(())
    }
}
