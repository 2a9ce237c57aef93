//! Object keys and authenticated encryption: the one file that names AES-256-GCM and HKDF.
//!
//! # Shape
//! An object key is derived for one object alone: HKDF-SHA-256 with the data key as input key, the
//! object's random salt, and a context that says which object of which cluster this is. The nonce of
//! a frame is its index in the object (little endian, 96 bits), so a nonce is never used twice with
//! one key as long as an index is not.
//!
//! Without encryption the same derivation from 32 zero bytes keys a BLAKE3 hash whose first 16 bytes
//! take the place of the tag: it finds damage, swaps and truncation, and stops no one who means harm.

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf;
use zeroize::Zeroizing;

use crate::error::{Error, Kind, Result};

/// Bytes of a tag.
pub const TAG_BYTES: usize = 16;
/// Bytes of an object's salt.
pub const SALT_BYTES: usize = 16;

/// How the frames of an object are protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// Readable by all; tags find damage only.
    None,
    /// AES-256-GCM.
    Aes256Gcm,
}

impl Cipher {
    /// The byte that stands for it in an object header.
    #[must_use]
    pub fn to_byte(self) -> u8 {
        match self {
            Cipher::None => 0,
            Cipher::Aes256Gcm => 1,
        }
    }

    /// The cipher a byte of an object header stands for.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Cipher::None),
            1 => Some(Cipher::Aes256Gcm),
            _ => None,
        }
    }
}

/// The 32 bytes from which object keys are derived; wiped when dropped, never shown.
#[derive(Clone)]
pub struct DataKey(Zeroizing<[u8; 32]>);

impl DataKey {
    /// The key of objects without encryption.
    #[must_use]
    pub fn public() -> Self {
        Self(Zeroizing::new([0; 32]))
    }

    /// A key of these bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes, to be wrapped.
    #[must_use]
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(hidden)")
    }
}

/// The key of one object.
pub struct ObjectKey(Kinds);

enum Kinds {
    Hash(Box<[u8; 32]>),
    Aead(Box<LessSafeKey>),
}

impl ObjectKey {
    /// Derives the key of the object that `context` names: the parts follow one another, so they
    /// must be unambiguous together.
    ///
    /// # Errors
    /// `bug` when the library refuses lengths that are constants here.
    pub fn derive(
        cipher: Cipher,
        data_key: &DataKey,
        salt: &[u8; SALT_BYTES],
        context: &[&[u8]],
    ) -> Result<Self> {
        let refused = |ring::error::Unspecified| {
            Error::new(Kind::Bug, "unable to derive an object key: the library refused")
        };
        let secret = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(data_key.expose());
        match cipher {
            Cipher::None => {
                let okm = secret.expand(context, hkdf::HKDF_SHA256).map_err(refused)?;
                let mut key = [0; 32];
                okm.fill(&mut key).map_err(refused)?;
                Ok(Self(Kinds::Hash(Box::new(key))))
            }
            Cipher::Aes256Gcm => {
                let okm = secret.expand(context, &AES_256_GCM).map_err(refused)?;
                Ok(Self(Kinds::Aead(Box::new(LessSafeKey::new(UnboundKey::from(okm))))))
            }
        }
    }

    /// Encrypts `payload` in place and returns the tag over it and `header`.
    ///
    /// # Errors
    /// `bug` when the library refuses.
    pub(super) fn seal(
        &self,
        index: u32,
        header: &[u8],
        payload: &mut [u8],
    ) -> Result<[u8; TAG_BYTES]> {
        match &self.0 {
            Kinds::Hash(key) => Ok(keyed_hash(key, index, header, payload)),
            Kinds::Aead(key) => {
                let tag = key
                    .seal_in_place_separate_tag(nonce(index), Aad::from(header), payload)
                    .map_err(|ring::error::Unspecified| {
                        Error::new(Kind::Bug, "unable to seal a frame: the library refused")
                    })?;
                let mut bytes = [0; TAG_BYTES];
                bytes.copy_from_slice(tag.as_ref());
                Ok(bytes)
            }
        }
    }

    /// Decrypts in place `sealed`, a payload followed by its tag, and returns the payload, or
    /// `None` when it is not authentic.
    pub(super) fn open<'a>(
        &self,
        index: u32,
        header: &[u8],
        sealed: &'a mut [u8],
    ) -> Option<&'a mut [u8]> {
        match &self.0 {
            Kinds::Hash(key) => {
                let (payload, tag) =
                    sealed.split_at_mut_checked(sealed.len().checked_sub(TAG_BYTES)?)?;
                let expected = keyed_hash(key, index, header, payload);
                (expected.as_slice() == tag).then_some(payload)
            }
            Kinds::Aead(key) => key.open_in_place(nonce(index), Aad::from(header), sealed).ok(),
        }
    }
}

/// The nonce of frame `index`: the index in little endian, 12 bytes.
fn nonce(index: u32) -> Nonce {
    let [a, b, c, d] = index.to_le_bytes();
    Nonce::assume_unique_for_key([a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0])
}

/// What stands for the tag without encryption.
fn keyed_hash(key: &[u8; 32], index: u32, header: &[u8], payload: &[u8]) -> [u8; TAG_BYTES] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(nonce(index).as_ref()).update(header).update(payload);
    let mut tag = [0; TAG_BYTES];
    hasher.finalize_xof().fill(&mut tag);
    tag
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kinds::Hash(_) => "ObjectKey(none)",
            Kinds::Aead(_) => "ObjectKey(hidden)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_is_shown() {
        let key = DataKey::new([0xAB; 32]);
        assert!(!format!("{key:?}").contains("171") && !format!("{key:?}").contains("ab"));
        let object = ObjectKey::derive(Cipher::Aes256Gcm, &key, &[0; 16], &[b"x"]).unwrap();
        assert_eq!(format!("{object:?}"), "ObjectKey(hidden)");
    }

    #[test]
    fn another_index_header_context_or_cipher_does_not_open() {
        for cipher in [Cipher::None, Cipher::Aes256Gcm] {
            let derive = |context: &[u8]| {
                ObjectKey::derive(cipher, &DataKey::public(), &[1; 16], &[context]).unwrap()
            };
            let seal = || {
                let mut payload = b"payload".to_vec();
                let tag = derive(b"a").seal(3, b"header", &mut payload).unwrap();
                payload.extend_from_slice(&tag);
                payload
            };
            let (mut ok, mut index, mut header, mut context) = (seal(), seal(), seal(), seal());
            assert_eq!(derive(b"a").open(3, b"header", &mut ok).unwrap(), b"payload");
            assert!(derive(b"a").open(4, b"header", &mut index).is_none());
            assert!(derive(b"a").open(3, b"Header", &mut header).is_none());
            assert!(derive(b"b").open(3, b"header", &mut context).is_none());
        }
    }
}
