//! What fuzz targets need of this module's inside; see `crate::fuzz`.
#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a property that does not hold is a panic, and nothing but tests calls this"
)]

use super::header::ObjectHeader;
use super::keys::{self, DecryptionIdentity};
use super::marks::Marks;
use super::names::{KeyId, Object};
use crate::error::Result;
use crate::pg::SystemId;
use crate::pipeline::cipher::{DataKey, ObjectKey};

/// The key of an object without encryption, so that damage to its frames can be sealed again and
/// what lies behind the tags is reached.
pub(crate) fn public_key(
    header: &ObjectHeader,
    system_id: SystemId,
    thing: &Object,
) -> Result<ObjectKey> {
    header.object_key(&DataKey::public(), system_id, thing)
}

/// As a reader opens a key object.
pub(crate) fn unwrap(
    wrapped: &[u8],
    id: KeyId,
    system_id: SystemId,
    identities: &[DecryptionIdentity],
) -> Result<DataKey> {
    keys::unwrap(wrapped, id, system_id, identities)
}

/// The marks called so.
pub(crate) fn marks<'a>(names: impl Iterator<Item = &'a str>) -> Marks {
    let mut marks = Marks::default();
    for name in names {
        marks.add(name);
    }
    marks
}
