//! Marks: small objects that say something about others, by their names alone.
//!
//! # Shape
//! ```text
//! <cluster>/marks/hold-<backup id>                      this backup is not deleted
//! <cluster>/marks/expired-<timeline 8 HEX>-<LSN 16 HEX> WAL before this was removed on purpose
//! ```
//! The content of a hold is its reason, for people; that of the others is empty.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, TimelineId};

use super::Repository;
use super::names::{BackupId, Object};

/// Longest reason of a hold.
const REASON_BYTES_MAX: usize = 1024;

/// What the marks of a cluster say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Backups that are held.
    pub holds: BTreeSet<BackupId>,
    /// Of each timeline, the position before which retention removed WAL.
    pub expired: BTreeMap<TimelineId, Lsn>,
}

impl Marks {
    /// Takes in the mark called `name`; false when it is none of ours.
    pub(super) fn add(&mut self, name: &str) -> bool {
        if let Some(id) = name.strip_prefix("hold-").and_then(|id| id.parse().ok()) {
            self.holds.insert(id);
            return true;
        }
        let Some((timeline, horizon)) = parse_expired(name) else { return false };
        let known = self.expired.entry(timeline).or_insert(horizon);
        *known = horizon.max(*known);
        true
    }
}

fn parse_expired(name: &str) -> Option<(TimelineId, Lsn)> {
    let (timeline, lsn) = name.strip_prefix("expired-")?.split_once('-')?;
    let hex = |text: &str, width| {
        let digits = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
        (text.len() == width && digits).then(|| u64::from_str_radix(text, 16).ok()).flatten()
    };
    let timeline = TimelineId::new(u32::try_from(hex(timeline, 8)?).ok()?)?;
    Some((timeline, Lsn(hex(lsn, 16)?)))
}

/// The mark that says that WAL of `timeline` before `horizon` was removed on purpose.
pub(super) fn expired(timeline: TimelineId, horizon: Lsn) -> Object {
    Object::Mark(format!("expired-{:08X}-{:016X}", timeline.get(), horizon.0))
}

/// Deletes the marks of `timeline` that a newer one says more than.
pub(super) async fn drop_superseded(
    repository: &Repository,
    timeline: TimelineId,
    horizon: Lsn,
) -> Result<()> {
    let prefix = format!("{}marks/expired-{:08X}-", repository.cluster().prefix(), timeline.get());
    let old = repository.store().list_all(&prefix).await?.into_iter().map(|object| object.name);
    let old: Vec<_> = old
        .filter(|name| match Object::parse(repository.cluster(), name) {
            Some(Object::Mark(mark)) => parse_expired(&mark).is_some_and(|(_, lsn)| lsn < horizon),
            _ => false,
        })
        .collect();
    if old.is_empty() { Ok(()) } else { repository.store().delete(&old).await }
}

/// Holds a backup: retention leaves it, and the WAL it needs, alone until the hold is released.
///
/// # Durability
/// When it returns, the hold is durable. A deletion that was planned before reads the holds again
/// before it acts; one that has begun to delete this backup goes on.
///
/// # Errors
/// `not found` when the backup has no manifest; what the store reports.
pub async fn hold(repository: &Repository, backup: BackupId, reason: &str) -> Result<()> {
    let manifest = repository.name(&Object::Manifest(backup))?;
    if reason.len() > REASON_BYTES_MAX {
        let found = reason.len();
        return Err(Error::new(
            Kind::Usage,
            format!("a reason of {found} bytes, at most {REASON_BYTES_MAX} are kept"),
        ));
    }
    let name = repository.name(&Object::Mark(format!("hold-{backup}")))?;
    repository.store().put_if_absent(&name, Bytes::from(reason.to_owned())).await?;
    // Looked up after the hold is there: a deletion that removed the manifest first is then seen.
    if repository.store().head(&manifest).await?.is_some() {
        return Ok(());
    }
    repository.store().delete(&[name]).await?;
    Err(Error::new(
        Kind::NotFound,
        format!("unable to hold backup '{backup}': there is no such backup"),
    )
    .hint("Run 'tidemark list' to see the backups."))
}

/// Releases a hold; does nothing when there is none.
///
/// # Errors
/// What the store reports.
pub async fn release(repository: &Repository, backup: BackupId) -> Result<()> {
    let name = repository.name(&Object::Mark(format!("hold-{backup}")))?;
    repository.store().delete(&[name]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_back_from_their_names() {
        let id = "20261122T100001Z-00000002-0000000003000028";
        let mut marks = Marks::default();
        assert!(marks.add(&format!("hold-{id}")));
        for horizon in [0x20, 0x30, 0x10] {
            let Object::Mark(name) = expired(TimelineId::FIRST, Lsn(horizon)) else { panic!() };
            assert!(marks.add(&name));
        }
        for foreign in ["hold-", "expired-1-2", "expired-00000000-0000000000000010", "x"] {
            assert!(!marks.add(foreign), "{foreign}");
        }
        assert_eq!(marks.holds, [id.parse().unwrap()].into());
        assert_eq!(marks.expired, [(TimelineId::FIRST, Lsn(0x30))].into());
    }
}
