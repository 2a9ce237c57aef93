//! The header every sealed object begins with, and the object key that follows from it.
//!
//! # Shape
//! 64 bytes (96 for a WAL extent), plain, little endian:
//! ```text
//! offset size
//!      0    8  magic "TIDEMARK"
//!      8    2  format version, 1
//!     10    1  kind: 1 pack, 2 manifest, 3 WAL extent, 4 timeline history
//!     11    1  cipher: 0 none, 1 AES-256-GCM
//!     12    2  length of this header
//!     14    2  zero
//!     16   16  id of the data key, zero without encryption
//!     32   16  salt
//!     48   16  zero
//!             of an extent further
//!     64    4  timeline
//!     68    4  bytes of the extent's frames, after this header
//!     72    8  start LSN
//!     80    8  end LSN
//!     88    8  greatest commit or abort time, microseconds since 1970, 0 for none
//! ```
//!
//! # Invariants
//! The whole header is part of the context its object key is derived from: change a bit of it and no
//! frame of the object opens.

use super::names::{ExtentName, KeyId, Object, micros_to_time};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, SystemId, TimelineId};
use crate::pipeline::cipher::{Cipher, DataKey, ObjectKey, SALT_BYTES};

/// First bytes of every sealed object.
pub const MAGIC: [u8; 8] = *b"TIDEMARK";
/// The version of the format this build writes, and the only one so far.
pub const FORMAT_VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of the header of a WAL extent.
pub const EXTENT_HEADER_BYTES: usize = 96;

/// First words of the context of every object key.
const CONTEXT: &[u8] = b"tidemark v1";

/// What a sealed object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectKind {
    /// Frames of file content and a footer.
    Pack,
    /// What a backup is.
    Manifest,
    /// A piece of WAL.
    Extent,
    /// A timeline history file.
    History,
}

impl ObjectKind {
    fn to_byte(self) -> u8 {
        match self {
            ObjectKind::Pack => 1,
            ObjectKind::Manifest => 2,
            ObjectKind::Extent => 3,
            ObjectKind::History => 4,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(ObjectKind::Pack),
            2 => Some(ObjectKind::Manifest),
            3 => Some(ObjectKind::Extent),
            4 => Some(ObjectKind::History),
            _ => None,
        }
    }

    /// The kind in words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ObjectKind::Pack => "pack",
            ObjectKind::Manifest => "manifest",
            ObjectKind::Extent => "WAL extent",
            ObjectKind::History => "timeline history",
        }
    }

    /// Bytes of the header of such an object.
    #[must_use]
    pub fn header_bytes(self) -> usize {
        if self == ObjectKind::Extent { EXTENT_HEADER_BYTES } else { HEADER_BYTES }
    }
}

/// The header of a sealed object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectHeader {
    /// What the object is.
    pub kind: ObjectKind,
    /// How its frames are protected.
    pub cipher: Cipher,
    /// The data key its object key is derived from.
    pub key_id: KeyId,
    /// Drawn for this object alone.
    pub salt: [u8; SALT_BYTES],
    /// What only an extent has: its name and the length of its frames.
    pub extent: Option<ExtentFields>,
}

/// The part of a header that only a WAL extent has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentFields {
    /// Timeline, range and greatest commit time.
    pub name: ExtentName,
    /// Bytes of the frames after the header.
    pub frames_bytes: u32,
}

impl ObjectHeader {
    /// A header with a fresh salt.
    pub(super) fn new(
        kind: ObjectKind,
        cipher: Cipher,
        key_id: KeyId,
        clock: &Clock,
    ) -> Result<Self> {
        Ok(Self { kind, cipher, key_id, salt: clock.random()?, extent: None })
    }

    /// The bytes of the header.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(EXTENT_HEADER_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&[self.kind.to_byte(), self.cipher.to_byte()]);
        let length = if self.extent.is_some() { 96_u16 } else { 64 };
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&self.key_id.0);
        bytes.extend_from_slice(&self.salt);
        bytes.extend_from_slice(&[0; 16]);
        if let Some(ExtentFields { name, frames_bytes }) = &self.extent {
            bytes.extend_from_slice(&name.timeline.get().to_le_bytes());
            bytes.extend_from_slice(&frames_bytes.to_le_bytes());
            bytes.extend_from_slice(&name.range.start().0.to_le_bytes());
            bytes.extend_from_slice(&name.range.end().0.to_le_bytes());
            bytes.extend_from_slice(&name.time_micros().to_le_bytes());
        }
        bytes
    }

    /// Reads the header at the front of `bytes`, which may end anywhere after it.
    ///
    /// # Errors
    /// `corrupt` when it is not a header of ours or not that of a `kind`, `unsupported` when a later
    /// format or an unknown cipher wrote it.
    pub fn decode(bytes: &[u8], kind: ObjectKind) -> Result<Self> {
        let corrupt = |found: String| Error::new(Kind::Corrupt, found);
        let cut = || {
            let (found, expected) = (bytes.len(), kind.header_bytes());
            corrupt(format!("the object ends in its header: {found} bytes, expected {expected}"))
        };
        let magic: [u8; 8] = array(bytes, 0).ok_or_else(cut)?;
        if magic != MAGIC {
            return Err(corrupt("it does not begin with 'TIDEMARK'".to_owned())
                .hint("This object was not written by Tidemark, or its first bytes are damaged."));
        }
        let version = u16::from_le_bytes(array(bytes, 8).ok_or_else(cut)?);
        if version != FORMAT_VERSION {
            let message = format!("it has format version {version}, this build reads version 1");
            return Err(Error::new(Kind::Unsupported, message)
                .hint("Use the release of Tidemark that wrote this repository, or a later one."));
        }
        let [kind_byte, cipher_byte]: [u8; 2] = array(bytes, 10).ok_or_else(cut)?;
        let found = ObjectKind::from_byte(kind_byte)
            .ok_or_else(|| corrupt(format!("its kind is {kind_byte}, known are 1 to 4")))?;
        if found != kind {
            let (found, expected) = (found.name(), kind.name());
            return Err(corrupt(format!("it is a {found} where a {expected} was expected")));
        }
        let cipher = Cipher::from_byte(cipher_byte).ok_or_else(|| {
            Error::new(Kind::Unsupported, format!("its cipher is {cipher_byte}, known are 0 and 1"))
        })?;
        let length = u16::from_le_bytes(array(bytes, 12).ok_or_else(cut)?);
        if usize::from(length) != kind.header_bytes() {
            return Err(corrupt(format!("its header says it is {length} bytes long")));
        }
        let zero: [u8; 2] = array(bytes, 14).ok_or_else(cut)?;
        let reserved: [u8; 16] = array(bytes, 48).ok_or_else(cut)?;
        if zero != [0; 2] || reserved != [0; 16] {
            return Err(corrupt("bits of its header are set that must be zero".to_owned()));
        }
        let key_id = KeyId(array(bytes, 16).ok_or_else(cut)?);
        if (cipher == Cipher::None) != (key_id == KeyId::NONE) {
            return Err(corrupt(format!("its cipher is {cipher_byte} but its key is {key_id}")));
        }
        let salt = array(bytes, 32).ok_or_else(cut)?;
        let extent = match kind {
            ObjectKind::Extent => Some(ExtentFields::decode(bytes, &cut)?),
            _ => None,
        };
        Ok(Self { kind, cipher, key_id, salt, extent })
    }

    /// The key of the object with this header, which is `thing` of the cluster `system_id`.
    pub(super) fn object_key(
        &self,
        data_key: &DataKey,
        system_id: SystemId,
        thing: &Object,
    ) -> Result<ObjectKey> {
        let name = thing.local_name()?;
        let length = u16::try_from(name.len())
            .map_err(|_too_long| Error::new(Kind::Bug, "the name of an object is too long"))?;
        let context: [&[u8]; 5] = [
            CONTEXT,
            &system_id.0.to_le_bytes(),
            &length.to_le_bytes(),
            name.as_bytes(),
            &self.encode(),
        ];
        ObjectKey::derive(self.cipher, data_key, &self.salt, &context)
    }
}

impl ExtentFields {
    fn decode(bytes: &[u8], cut: &dyn Fn() -> Error) -> Result<Self> {
        let u64_at = |offset| array(bytes, offset).map(u64::from_le_bytes).ok_or_else(cut);
        let u32_at = |offset| array(bytes, offset).map(u32::from_le_bytes).ok_or_else(cut);
        let timeline = TimelineId::try_from(u32_at(64)?)?;
        let (start, end, micros) = (Lsn(u64_at(72)?), Lsn(u64_at(80)?), u64_at(88)?);
        let range =
            LsnRange::new(start, end).filter(|range| !range.is_empty()).ok_or_else(|| {
                Error::new(Kind::Corrupt, format!("its header says WAL from {start} to {end}"))
            })?;
        let time = micros_to_time(micros).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("its header says commit time {micros}"))
        })?;
        let name = ExtentName { timeline, range, time };
        Ok(Self { name, frames_bytes: u32_at(68)? })
    }
}

/// The `N` bytes at `offset`, `None` when there are not so many.
pub(super) fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pg::PgTime;

    fn extent() -> ObjectHeader {
        let range = LsnRange::new(Lsn(0x100), Lsn(0x200)).unwrap();
        let time = Some(PgTime(5));
        let name = ExtentName { timeline: TimelineId::FIRST, range, time };
        ObjectHeader {
            kind: ObjectKind::Extent,
            cipher: Cipher::Aes256Gcm,
            key_id: KeyId([1; 16]),
            salt: [2; 16],
            extent: Some(ExtentFields { name, frames_bytes: 77 }),
        }
    }

    #[test]
    fn headers_come_back_and_every_cut_is_noticed() {
        let plain = ObjectHeader { kind: ObjectKind::Pack, extent: None, ..extent() };
        for header in [extent(), plain] {
            let bytes = header.encode();
            assert_eq!(bytes.len(), header.kind.header_bytes());
            assert_eq!(ObjectHeader::decode(&bytes, header.kind).unwrap(), header);
            for cut in 0..bytes.len() {
                let error = ObjectHeader::decode(&bytes[..cut], header.kind).unwrap_err();
                assert_eq!(error.kind(), Kind::Corrupt);
            }
        }
    }

    #[test]
    fn another_kind_version_or_magic_says_so() {
        let bytes = extent().encode();
        let error = ObjectHeader::decode(&bytes, ObjectKind::Pack).unwrap_err();
        assert!(error.to_string().contains("WAL extent where a pack"), "{error}");
        let mut later = bytes.clone();
        later[8] = 2;
        let error = ObjectHeader::decode(&later, ObjectKind::Extent).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        let error = ObjectHeader::decode(&[0; 96], ObjectKind::Extent).unwrap_err();
        assert!(error.to_string().contains("TIDEMARK"));
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..128),
            at in 0_usize..96,
            byte: u8,
        ) {
            drop(ObjectHeader::decode(&bytes, ObjectKind::Extent));
            bytes = extent().encode();
            bytes[at] = byte;
            drop(ObjectHeader::decode(&bytes, ObjectKind::Extent));
        }
    }
}
