//! Seals and puts: what a host with recipients only can do.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use super::extent::SealedExtent;
use super::header::{ObjectHeader, ObjectKind};
use super::keys::{self, Encryption};
use super::names::{BackupId, KeyId, Object};
use super::packing::{BackupWriter, Inspect, PackOptions};
use super::{ClusterName, Repository};
use crate::error::{Context, Error, Kind, Result};
use crate::pg::TimelineId;
use crate::pipeline::cipher::{Cipher, DataKey, ObjectKey};
use crate::pipeline::codec::{Compressor, Level};
use crate::pipeline::frame::{self, Last};
use crate::store::PutOutcome;

/// Writes sealed objects with one data key, kept in memory only. Cheap to clone.
#[derive(Clone)]
pub struct Writer(Arc<Inner>);

struct Inner {
    repository: Repository,
    cipher: Cipher,
    key_id: KeyId,
    data_key: DataKey,
    recipients: Vec<String>,
}

impl Writer {
    /// Draws a data key and puts it wrapped; see [`Repository::writer`].
    pub(super) async fn begin(repository: &Repository, encryption: &Encryption) -> Result<Self> {
        let mut inner = Inner {
            repository: repository.clone(),
            cipher: Cipher::None,
            key_id: KeyId::NONE,
            data_key: DataKey::public(),
            recipients: Vec::new(),
        };
        if let Encryption::Recipients(recipients) = encryption {
            inner.cipher = Cipher::Aes256Gcm;
            inner.key_id = KeyId(repository.clock().random()?);
            inner.data_key = DataKey::new(repository.clock().random()?);
            inner.recipients = recipients.iter().map(ToString::to_string).collect();
            inner.put_key(recipients).await?;
        }
        Ok(Self(Arc::new(inner)))
    }

    /// The repository written to.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.0.repository
    }

    /// The id of the data key, zero without encryption.
    #[must_use]
    pub fn key_id(&self) -> KeyId {
        self.0.key_id
    }

    /// Public keys of those who can read what is written, or `passphrase`; empty without encryption.
    #[must_use]
    pub fn recipients(&self) -> &[String] {
        &self.0.recipients
    }

    /// A header with a fresh salt for an object of `kind`.
    pub(super) fn header(&self, kind: ObjectKind) -> Result<ObjectHeader> {
        let inner = &self.0;
        ObjectHeader::new(kind, inner.cipher, inner.key_id, inner.repository.clock())
    }

    /// The key of the object with `header`, which is `thing`.
    pub(super) fn object_key(&self, header: &ObjectHeader, thing: &Object) -> Result<ObjectKey> {
        header.object_key(&self.0.data_key, self.0.repository.system_id(), thing)
    }

    /// Puts a sealed extent. One that is there already says the same: its name is its range and
    /// time, and WAL at a position of a timeline never changes.
    ///
    /// # Durability
    /// On return the extent is durable (invariant 1 of the design: only now may it be acknowledged).
    ///
    /// # Errors
    /// What the store reports.
    pub async fn put_extent(&self, extent: &SealedExtent) -> Result<PutOutcome> {
        let repository = self.repository();
        let name = repository.name(&Object::Extent(extent.name))?;
        repository
            .store()
            .put_if_absent(&name, extent.body.clone())
            .await
            .context(|| format!("unable to put WAL {}", extent.name.range))
    }

    /// Puts the content of a timeline history file, unencrypted (see [`Repository::history`]).
    ///
    /// # Errors
    /// `conflict` when another history of that timeline is there, what the store reports.
    pub async fn put_history(&self, timeline: TimelineId, content: Bytes) -> Result<PutOutcome> {
        let repository = self.repository();
        let thing = Object::History(timeline);
        let body = seal_history(repository, timeline, content.clone())?;
        let name = repository.name(&thing)?;
        let attempted = || format!("unable to put the history of timeline {timeline}");
        let outcome = repository.store().put_if_absent(&name, body).await.context(attempted)?;
        if outcome == PutOutcome::AlreadyThere
            && repository.history_file(timeline).await.context(attempted)? != content
        {
            let cluster: &ClusterName = repository.cluster();
            return Err(Error::new(
                Kind::Conflict,
                format!("{}: cluster '{cluster}' has another history of it", attempted()),
            )
            .hint("Two servers were promoted to the same timeline; give one of them a cluster name of its own."));
        }
        Ok(outcome)
    }

    /// Begins a backup.
    ///
    /// # Errors
    /// `unavailable` when the system refuses threads or memory.
    pub fn backup(
        &self,
        id: BackupId,
        options: PackOptions,
        inspect: Arc<dyn Inspect>,
    ) -> Result<BackupWriter> {
        BackupWriter::begin(self.clone(), id, options, inspect)
    }
}

impl Inner {
    async fn put_key(&self, recipients: &[keys::Recipient]) -> Result<()> {
        let repository = &self.repository;
        let attempted = || format!("unable to put data key {}", self.key_id);
        let (key, id, system) = (self.data_key.clone(), self.key_id, repository.system_id());
        let recipients = recipients.to_vec();
        // A passphrase costs a third of a second of one core.
        let wrapped =
            tokio::task::spawn_blocking(move || keys::wrap(&key, id, system, &recipients))
                .await
                .map_err(|error| Error::new(Kind::Bug, format!("wrapping a key: {error}")))??;
        let name = repository.name(&Object::Key(self.key_id))?;
        match repository.store().put_if_absent(&name, wrapped).await.context(attempted)? {
            PutOutcome::Created => Ok(()),
            PutOutcome::AlreadyThere => {
                Err(Error::new(Kind::Bug, format!("{}: 128 random bits met again", attempted())))
            }
        }
    }
}

/// The object of a timeline history file.
fn seal_history(repository: &Repository, timeline: TimelineId, content: Bytes) -> Result<Bytes> {
    let header =
        ObjectHeader::new(ObjectKind::History, Cipher::None, KeyId::NONE, repository.clock())?;
    let thing = Object::History(timeline);
    let key = header.object_key(&DataKey::public(), repository.system_id(), &thing)?;
    let mut body = header.encode();
    seal_blocks(&mut Compressor::new(Level::default())?, &key, content, &mut body)?;
    Ok(Bytes::from(body))
}

/// Appends `content` to `body` as frames of a block each, the last flagged.
pub(super) fn seal_blocks(
    compressor: &mut Compressor,
    key: &ObjectKey,
    content: Bytes,
    body: &mut Vec<u8>,
) -> Result<()> {
    seal_blocks_from(compressor, key, content, 0, body).map(drop)
}

/// As [`seal_blocks`] with the first frame's index given; returns the index after the last.
pub(super) fn seal_blocks_from(
    compressor: &mut Compressor,
    key: &ObjectKey,
    mut content: Bytes,
    mut index: u32,
    body: &mut Vec<u8>,
) -> Result<u32> {
    loop {
        let block = content.split_to(content.len().min(frame::BLOCK_BYTES));
        let last = if content.is_empty() { Last::Yes } else { Last::No };
        let range = frame::append_compressed(compressor, &[block], body)?;
        let sealed = body.get_mut(range).unwrap_or_default();
        frame::seal(key, sealed, index, last)?;
        index += 1;
        if last == Last::Yes {
            return Ok(index);
        }
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Writer({:?}, {:?})", self.0.repository.cluster(), self.0.key_id)
    }
}
