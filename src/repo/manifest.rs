//! The manifest: last object of a backup, and the one that makes it visible.
//!
//! # Shape
//! ```text
//! header             64 bytes
//! u32                bytes of the public section
//! u32                CRC-32C of the public section
//! public section     JSON; padded with spaces so that it ends at a multiple of 4096 bytes
//! frames             the private section, JSON, in blocks of 1 MiB; the last is flagged
//! ```
//! The public section needs no key, so that a host that can only write can list and expire. The
//! private section holds the public one's BLAKE3 hash: whoever can open it knows that both belong
//! together.
//!
//! # Invariants
//! A manifest is put when all packs it lists are there and the WAL from its start to its end is
//! durable; so whatever has a manifest can be restored.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::header::{HEADER_BYTES, ObjectHeader, ObjectKind, array};
use super::names::{BackupId, KeyId, Object};
use super::pack::FooterPlace;
use super::writer::{Writer, seal_blocks};
use super::{Repository, printable};
use crate::error::{Context, Error, Kind, Result};
use crate::pg::{Lsn, SegmentSize, SystemId, TimelineId, crc32c};
use crate::pipeline::codec::{Compressor, Level};

/// Longest public section that is read: the sizes of half a million packs.
pub const PUBLIC_BYTES_MAX: usize = 8 << 20;
/// Longest private section that is read.
pub const PRIVATE_BYTES_MAX: usize = 128 << 20;
/// Most checksum failures kept one by one; all are counted.
pub const CHECKSUM_FAILURES_MAX: usize = 1000;

/// The public section ends at a multiple of this, so the first so many bytes can always be read.
const PUBLIC_STEP_BYTES: usize = 4096;
/// Where the public section begins.
const PUBLIC_OFFSET: usize = HEADER_BYTES + 8;

/// How a backup stands to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupKind {
    /// It holds all of its content.
    Full,
    /// Its footers refer to frames of its parents too.
    Incremental,
}

/// The part of a manifest that needs no key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicManifest {
    /// The backup.
    pub id: BackupId,
    /// The PostgreSQL cluster.
    pub system_id: SystemId,
    /// `server_version_num` of the server it was taken from.
    pub postgres_version_num: u32,
    /// Size of a WAL segment.
    pub wal_segment_size_bytes: SegmentSize,
    /// Whether it is whole by itself.
    pub kind: BackupKind,
    /// Backups whose packs its footers refer to; empty for a full backup.
    pub parents: Vec<BackupId>,
    /// Timeline it began on.
    pub timeline: TimelineId,
    /// Timeline it ended on.
    pub end_timeline: TimelineId,
    /// First WAL position a restore needs.
    pub start_lsn: Lsn,
    /// First WAL position after what a restore must replay to be consistent.
    pub end_lsn: Lsn,
    /// When it began.
    pub start_time: Timestamp,
    /// When its last byte was received.
    pub end_time: Timestamp,
    /// Bytes of all files as PostgreSQL sent them.
    pub plain_bytes: u64,
    /// Bytes of all its packs.
    pub stored_bytes: u64,
    /// Number of regular files.
    pub file_count: u64,
    /// Size of pack 1, 2, and so on: whether one is missing or cut can be seen without a key.
    pub pack_bytes: Vec<u64>,
    /// Pages whose checksum was wrong when they were read.
    pub checksum_failure_count: u64,
    /// The data key, zero without encryption.
    pub key_id: KeyId,
    /// Public keys of those who can open it, or `passphrase`.
    pub recipients: Vec<String>,
}

/// A tablespace besides the default ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its OID: its files are below `pg_tblspc/<oid>/`.
    pub oid: u32,
    /// Where it was on the server.
    pub location: String,
}

/// A page whose checksum was wrong when it was backed up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChecksumFailure {
    /// The file, as text.
    pub path: String,
    /// Number of the block in its relation fork.
    pub block: u32,
    /// The checksum its content has.
    pub expected: u16,
    /// The checksum it says.
    pub found: u16,
}

/// One line a pack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackSummary {
    /// Its number, from 1.
    pub number: u32,
    /// Its size.
    pub stored_bytes: u64,
    /// Plain bytes of its frames and zero runs.
    pub plain_bytes: u64,
    /// Its files, directories and links.
    pub entry_count: u32,
    /// Its frames, the footer's not counted.
    pub frame_count: u32,
    /// Where its footer is.
    pub footer: FooterPlace,
}

/// What the one who takes a backup knows about it, and the packs do not.
#[derive(Clone, Debug)]
pub struct ManifestFacts {
    /// `server_version_num`.
    pub postgres_version_num: u32,
    /// Size of a WAL segment.
    pub segment_size: SegmentSize,
    /// Timeline it ended on.
    pub end_timeline: TimelineId,
    /// First WAL position after what must be replayed.
    pub end_lsn: Lsn,
    /// When it began, to the microsecond.
    pub start_time: Timestamp,
    /// When its last byte was received.
    pub end_time: Timestamp,
    /// Tablespaces besides the default ones.
    pub tablespaces: Vec<Tablespace>,
    /// Settings a restore must not go below, and others worth knowing.
    pub settings: BTreeMap<String, String>,
}

/// A whole manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// What needs no key.
    pub public: PublicManifest,
    /// Tablespaces besides the default ones.
    pub tablespaces: Vec<Tablespace>,
    /// Settings of the server.
    pub settings: BTreeMap<String, String>,
    /// Its packs, pack 1 first.
    pub packs: Vec<PackSummary>,
    /// The first pages whose checksum was wrong.
    pub checksum_failures: Vec<ChecksumFailure>,
}

/// The private section as written.
#[derive(Serialize, Deserialize)]
struct Private {
    public_blake3: String,
    tablespaces: Vec<Tablespace>,
    settings: BTreeMap<String, String>,
    packs: Vec<PackSummary>,
    checksum_failures: Vec<ChecksumFailure>,
}

fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value)
        .map_err(|error| Error::new(Kind::Bug, format!("unable to write JSON: {error}")))
}

fn corrupt(found: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, found)
}

impl Manifest {
    /// The object, sealed. Putting it makes the backup visible: see
    /// [`PackedBackup::commit`](super::packing::PackedBackup::commit).
    ///
    /// # Errors
    /// `unsupported` when its public section would be longer than is read.
    pub fn seal(&self, writer: &Writer) -> Result<Bytes> {
        let header = writer.header(ObjectKind::Manifest)?;
        let key = writer.object_key(&header, &Object::Manifest(self.public.id))?;
        let mut public = to_json(&self.public)?;
        let end = (PUBLIC_OFFSET + public.len()).next_multiple_of(PUBLIC_STEP_BYTES);
        public.resize(end - PUBLIC_OFFSET, b' ');
        let length = u32::try_from(public.len())
            .ok()
            .filter(|_| public.len() <= PUBLIC_BYTES_MAX)
            .ok_or_else(|| Error::new(Kind::Unsupported, "the backup has too many packs"))?;
        let private = to_json(&Private {
            public_blake3: blake3::hash(&public).to_hex().to_string(),
            tablespaces: self.tablespaces.clone(),
            settings: self.settings.clone(),
            packs: self.packs.clone(),
            checksum_failures: self.checksum_failures.clone(),
        })?;
        let mut body = header.encode();
        body.extend_from_slice(&length.to_le_bytes());
        body.extend_from_slice(&crc32c(&public).to_le_bytes());
        body.extend_from_slice(&public);
        seal_blocks(
            &mut Compressor::new(Level::default())?,
            &key,
            Bytes::from(private),
            &mut body,
        )?;
        Ok(Bytes::from(body))
    }
}

/// The unencrypted front of a manifest object.
#[derive(Debug)]
pub(super) struct Front {
    /// The object's header.
    pub(super) header: ObjectHeader,
    /// First byte after the public section.
    pub(super) end: usize,
    crc: u32,
}

impl Front {
    /// Reads the header and the length that follows it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let header = ObjectHeader::decode(bytes, ObjectKind::Manifest)?;
        let number = |offset| {
            array(bytes, offset).map(u32::from_le_bytes).ok_or_else(|| corrupt("it is cut off"))
        };
        let (length, crc) = (number(HEADER_BYTES)? as usize, number(HEADER_BYTES + 4)?);
        if !(1..=PUBLIC_BYTES_MAX).contains(&length) {
            return Err(corrupt(format!("its public section has {length} bytes")));
        }
        Ok(Self { header, end: PUBLIC_OFFSET + length, crc })
    }

    /// The public section in `bytes`, which begin with the object and reach to [`Front::end`], and
    /// what it says of backup `id`.
    pub(super) fn public<'a>(
        &self,
        bytes: &'a [u8],
        id: BackupId,
        system_id: SystemId,
    ) -> Result<(&'a [u8], PublicManifest)> {
        let section = bytes.get(PUBLIC_OFFSET..self.end).ok_or_else(|| corrupt("it is cut off"))?;
        let found = crc32c(section);
        if found != self.crc {
            let expected = self.crc;
            return Err(corrupt(format!(
                "its public section has CRC {found:08x}, expected {expected:08x}"
            )));
        }
        let mut public: PublicManifest = serde_json::from_slice(section).map_err(|error| {
            let found = printable(&error.to_string());
            corrupt(format!("its public section is not a manifest: {found}"))
        })?;
        // Shown before anything of it is authenticated.
        for recipient in &mut public.recipients {
            *recipient = printable(recipient);
        }
        if public.id != id || public.system_id != system_id {
            let (found, system) = (public.id, public.system_id);
            return Err(corrupt(format!("it is the manifest of '{found}' of cluster {system}")));
        }
        Ok((section, public))
    }

    /// Reads a whole manifest object; `open` opens its private frames, which begin where it is told.
    pub(super) fn decode_whole(
        object: &[u8],
        id: BackupId,
        system_id: SystemId,
        open: impl FnOnce(usize) -> Result<Vec<u8>>,
    ) -> Result<Manifest> {
        let front = Self::decode(object)?;
        let (section, public) = front.public(object, id, system_id)?;
        let private = open(front.end)?;
        let private: Private = serde_json::from_slice(&private)
            .map_err(|error| corrupt(format!("its private section is not a manifest: {error}")))?;
        if private.public_blake3 != blake3::hash(section).to_hex().as_str() {
            return Err(corrupt("its public section was changed after it was written"));
        }
        let numbered = (1_u32..).zip(&private.packs).all(|(number, pack)| pack.number == number);
        let sizes = private
            .packs
            .iter()
            .map(|pack| pack.stored_bytes)
            .eq(public.pack_bytes.iter().copied());
        if !numbered || !sizes {
            return Err(corrupt("its two sections list different packs"));
        }
        Ok(Manifest {
            public,
            tablespaces: private.tablespaces,
            settings: private.settings,
            packs: private.packs,
            checksum_failures: private.checksum_failures,
        })
    }
}

/// Reads the public section of a backup's manifest: one small request, two when it has very many
/// packs.
pub(super) async fn read_public(repository: &Repository, id: BackupId) -> Result<PublicManifest> {
    let name = repository.name(&Object::Manifest(id))?;
    let attempted = || format!("unable to read manifest '{name}'");
    let store = repository.store();
    let first = store.get(&name, Some(0..PUBLIC_STEP_BYTES as u64)).await.context(attempted)?;
    let front = Front::decode(&first).context(attempted)?;
    let bytes = if front.end <= first.len() {
        first
    } else {
        store.get(&name, Some(0..front.end as u64)).await.context(attempted)?
    };
    let (_, public) = front.public(&bytes, id, repository.system_id()).context(attempted)?;
    Ok(public)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::repo::Encryption;
    use crate::repo::catalog::tests::backup;
    use crate::store::Store as _;

    #[tokio::test]
    async fn who_may_open_a_manifest_is_told_without_commands_to_a_terminal() {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let writer = repository.writer(&Encryption::None).await.unwrap();
        let mut public = backup(1, (0x1000, 0x2000), (0, 1)).manifest;
        public.recipients = vec!["age1\u{1b}[2Jx".to_owned()];
        let id = public.id;
        let manifest = Manifest {
            public,
            tablespaces: Vec::new(),
            settings: BTreeMap::new(),
            packs: Vec::new(),
            checksum_failures: Vec::new(),
        };
        let name = repository.name(&Object::Manifest(id)).unwrap();
        memory.put_if_absent(&name, manifest.seal(&writer).unwrap()).await.unwrap();
        let read = repository.public_manifest(id).await.unwrap();
        assert_eq!(read.recipients, ["age1 [2Jx"]);
    }
}
