//! Marks: small objects that say something about others, by their names alone.
//!
//! # Shape
//! ```text
//! <cluster>/marks/hold-<backup id>                      this backup is not deleted
//! <cluster>/marks/expired-<timeline 8 HEX>-<LSN 16 HEX> WAL before this was removed on purpose
//! <cluster>/marks/minimal-<timeline 8 HEX>-<LSN 16 HEX> no backup from before leads past this record
//! <cluster>/marks/damaged-<timeline 8 HEX>-<start LSN 16 HEX>-<end LSN 16 HEX>
//!                                                       no backup from before the end leads past the start
//! ```
//! The content of a hold is its reason, for people; that of the others is empty.
//!
//! # Barriers
//! WAL can be there without a hole and yet lead nowhere; no name of an extent tells.
//! - `minimal`: a server that is started with `wal_level = minimal` says so in its WAL
//!   (`XLOG_PARAMETER_CHANGE`) and from there on leaves changes out. PostgreSQL 14 and later refuse to
//!   replay that record, 13 replays it and is silently incomplete. The mark names the start of the record,
//!   the last position that a backup from before reaches. One that begins after it does not need what was
//!   left out: while the level is minimal none can be taken.
//! - `damaged`: the server sends WAL that cannot be decoded, and still does when it was asked again for half a
//!   minute, within which a standby heals what it can (see `capture::stream::intake`). A recovery stops at
//!   the end of the last record before. There the mark's range begins, or where decoding or storing began, if
//!   that is later or no record ended since. Up to the end of the segment, where it ends, nothing is known of
//!   what is stored.
//!
//! # Durability
//! The mark is durable before the extent that it speaks of is put (the one with the end of the record; the
//! one with the first bytes that could not be decoded), so whatever listing shows such WAL shows the mark,
//! and nothing is acknowledged in between. Dying after the mark and before the extent leaves a mark at the
//! end of the WAL, where every interval ends anyway; the server still has that WAL and sends it again. If it
//! never does (the timeline ended before it on another server), the mark lies behind the switch point, on no
//! path. Nothing deletes a mark: there is one for each such start of a server or damaged segment, and what
//! it says stays true. Only a server that was healed between the mark and the extent makes one bar WAL that
//! is sound; then the base backup that follows every barrier leads on.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytes::Bytes;

use crate::error::{Context, Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, TimelineId};

use super::coverage::range;
use super::names::{BackupId, Object};
use super::{Repository, printable};
use crate::store::PutOutcome;

/// Longest reason of a hold.
const REASON_BYTES_MAX: usize = 1024;

/// Why WAL that is there leads no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BarrierKind {
    /// The server went on with `wal_level = minimal`: from here on not all changes are there.
    Minimal,
    /// The server's own WAL is damaged here: a recovery stops.
    Damaged,
}

impl fmt::Display for BarrierKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Minimal => "the server ran with wal_level = minimal",
            Self::Damaged => "the server's own WAL is damaged",
        })
    }
}

/// A place that only a backup taken later leads past.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Barrier {
    /// What is there.
    pub range: LsnRange,
    /// Why it is one.
    pub kind: BarrierKind,
}

impl Barrier {
    /// The record at `record_lsn` says that the server goes on with `wal_level = minimal`; the range is
    /// empty, nothing is missing.
    #[must_use]
    pub fn minimal(record_lsn: Lsn) -> Self {
        Self { range: range(record_lsn, record_lsn), kind: BarrierKind::Minimal }
    }

    /// Within `range` the server's WAL cannot be decoded.
    #[must_use]
    pub fn damaged(range: LsnRange) -> Self {
        Self { range, kind: BarrierKind::Damaged }
    }

    /// The mark that says so of WAL of `timeline`.
    fn mark(&self, timeline: TimelineId) -> Object {
        let (start, end) = (self.range.start().0, self.range.end().0);
        let timeline = timeline.get();
        Object::Mark(match self.kind {
            BarrierKind::Minimal => format!("minimal-{timeline:08X}-{start:016X}"),
            BarrierKind::Damaged => format!("damaged-{timeline:08X}-{start:016X}-{end:016X}"),
        })
    }

    /// What the mark called `name` says.
    fn parse(name: &str) -> Option<(TimelineId, Self)> {
        if let Some((timeline, record_lsn)) = parse_position(name, "minimal-") {
            return Some((timeline, Self::minimal(record_lsn)));
        }
        let (head, end) = name.rsplit_once('-')?;
        let (timeline, start) = parse_position(head, "damaged-")?;
        let range = LsnRange::new(start, Lsn(hex(end, 16)?)).filter(|range| !range.is_empty())?;
        Some((timeline, Self::damaged(range)))
    }
}

/// What the marks of a cluster say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Backups that are held.
    pub holds: BTreeSet<BackupId>,
    /// Of each timeline, the position before which retention removed WAL.
    pub expired: BTreeMap<TimelineId, Lsn>,
    /// Places that only a backup taken later leads past.
    pub barriers: BTreeSet<(TimelineId, Barrier)>,
}

impl Marks {
    /// Takes in the mark called `name`; false when it is none of ours.
    pub(super) fn add(&mut self, name: &str) -> bool {
        if let Some(id) = name.strip_prefix("hold-").and_then(|id| id.parse().ok()) {
            self.holds.insert(id);
            return true;
        }
        if let Some(barrier) = Barrier::parse(name) {
            self.barriers.insert(barrier);
            return true;
        }
        let Some((timeline, horizon)) = parse_position(name, "expired-") else { return false };
        let known = self.expired.entry(timeline).or_insert(horizon);
        *known = horizon.max(*known);
        true
    }
}

/// The marks of a cluster, and how many objects below them are none of ours.
///
/// # Errors
/// What the store reports.
pub(crate) async fn load(repository: &Repository) -> Result<(Marks, u64)> {
    let mut marks = Marks::default();
    let mut foreign_count = 0;
    let prefix = format!("{}marks/", repository.cluster().prefix());
    for object in repository.store().list_all(&prefix).await? {
        match Object::parse(repository.cluster(), &object.name) {
            Some(Object::Mark(name)) if marks.add(&name) => {}
            _ => foreign_count += 1,
        }
    }
    Ok((marks, foreign_count))
}

/// `<kind><timeline 8 HEX>-<LSN 16 HEX>`.
fn parse_position(name: &str, kind: &str) -> Option<(TimelineId, Lsn)> {
    let (timeline, lsn) = name.strip_prefix(kind)?.split_once('-')?;
    let timeline = TimelineId::new(u32::try_from(hex(timeline, 8)?).ok()?)?;
    Some((timeline, Lsn(hex(lsn, 16)?)))
}

/// The number that `text` is, in exactly `width` upper-case hexadecimal digits.
fn hex(text: &str, width: usize) -> Option<u64> {
    let digits = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    (text.len() == width && digits).then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

/// The mark that says that WAL of `timeline` before `horizon` was removed on purpose.
pub(super) fn expired(timeline: TimelineId, horizon: Lsn) -> Object {
    Object::Mark(format!("expired-{:08X}-{:016X}", timeline.get(), horizon.0))
}

/// Says that no backup from before `barrier` leads past it on `timeline`.
///
/// # Durability
/// When it returns, the mark is durable; it must be before the extent that it speaks of is put.
///
/// # Errors
/// What the store reports.
pub async fn put_barrier(
    repository: &Repository,
    timeline: TimelineId,
    barrier: &Barrier,
) -> Result<()> {
    let name = repository.name(&barrier.mark(timeline))?;
    let put = repository.store().put_if_absent(&name, Bytes::new()).await;
    put.map(drop).context(|| {
        let Barrier { range, kind } = barrier;
        let from = range.start();
        format!("unable to mark that from {from} of timeline {timeline} on {kind}")
    })
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
            Some(Object::Mark(mark)) => {
                parse_position(&mark, "expired-").is_some_and(|(_, lsn)| lsn < horizon)
            }
            _ => false,
        })
        .collect();
    if old.is_empty() { Ok(()) } else { repository.store().delete(&old).await }
}

/// The mark that a backup is held.
pub(super) fn held(backup: BackupId) -> Object {
    Object::Mark(format!("hold-{backup}"))
}

/// Holds a backup: retention leaves it, and the WAL it needs, alone until the hold is released.
///
/// # Durability
/// When it returns, the hold is durable. A run of retention looks for it just before it deletes the
/// backup's manifest, the first object of it to go, and stops there. Only one whose request to delete
/// the manifest is already on its way at this moment goes on.
///
/// A hold that is there already stays as it is, with its reason: the outcome tells.
///
/// # Errors
/// `not found` when the backup has no manifest, `usage` when the reason is too long or more than one line;
/// what the store reports.
pub async fn hold(repository: &Repository, backup: BackupId, reason: &str) -> Result<PutOutcome> {
    let manifest = repository.name(&Object::Manifest(backup))?;
    if reason.len() > REASON_BYTES_MAX {
        let found = reason.len();
        return Err(Error::new(
            Kind::Usage,
            format!("unable to keep a reason of {found} bytes, at most {REASON_BYTES_MAX}"),
        ));
    }
    if reason.contains(char::is_control) {
        return Err(Error::new(
            Kind::Usage,
            "unable to keep a reason of more than one line of text",
        ));
    }
    let name = repository.name(&held(backup))?;
    let outcome = repository.store().put_if_absent(&name, Bytes::from(reason.to_owned())).await?;
    // Looked up after the hold is there: a deletion that removed the manifest first is then seen.
    if repository.store().head(&manifest).await?.is_some() {
        return Ok(outcome);
    }
    let missing = format!("unable to hold backup '{backup}': there is no such backup");
    if outcome == PutOutcome::AlreadyThere {
        // Somebody's hold of what went missing: while it is there nothing is deleted.
        let found = format!("{missing}, though it is held");
        return Err(Error::new(Kind::NotFound, found).hint(
            "Bring its objects back, or give it up with 'tidemark release'; until then nothing is deleted.",
        ));
    }
    repository.store().delete(&[name]).await?;
    Err(Error::new(Kind::NotFound, missing).hint("Run 'tidemark list' to see the backups."))
}

/// Releases a hold; whether there was one.
///
/// # Durability
/// When it returns, the hold is gone: the next run of retention decides by its rules alone.
///
/// # Errors
/// What the store reports.
pub async fn release(repository: &Repository, backup: BackupId) -> Result<bool> {
    let name = repository.name(&held(backup))?;
    let was_held = repository.store().head(&name).await?.is_some();
    if was_held {
        repository.store().delete(&[name]).await?;
    }
    Ok(was_held)
}

/// The holds there are now, each with its reason, which may be empty. Not a byte of a reason that a
/// terminal would take for a command is given back.
///
/// # Errors
/// What the store reports.
pub async fn holds(repository: &Repository) -> Result<BTreeMap<BackupId, String>> {
    let mut holds = BTreeMap::new();
    let prefix = format!("{}marks/hold-", repository.cluster().prefix());
    for object in repository.store().list_all(&prefix).await? {
        let Some(Object::Mark(mark)) = Object::parse(repository.cluster(), &object.name) else {
            continue;
        };
        let Some(id) = mark.strip_prefix("hold-").and_then(|id| id.parse().ok()) else { continue };
        let bytes = object.size_bytes.min(REASON_BYTES_MAX as u64);
        let reason = match bytes {
            0 => Ok(Bytes::new()),
            bytes => repository.store().get(&object.name, Some(0..bytes)).await,
        };
        match reason {
            Ok(reason) => {
                holds.insert(id, printable(&String::from_utf8_lossy(&reason)));
            }
            // Released since it was listed.
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(holds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn holding_again_what_went_missing_leaves_the_hold_that_protects_the_rest() {
        use crate::clock::Clock;
        use crate::store::Store as _;
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let backup = BackupId::new(clock.now(), TimelineId::FIRST, Lsn(0x28));
        let name = repository.name(&held(backup)).unwrap();
        memory.put_if_absent(&name, Bytes::from_static(b"audit")).await.unwrap();
        let error = hold(&repository, backup, "again").await.unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.message().contains("though it is held"), "{error}");
        assert_eq!(holds(&repository).await.unwrap()[&backup], "audit");
        assert!(release(&repository, backup).await.unwrap());
        assert_eq!(hold(&repository, backup, "x").await.unwrap_err().kind(), Kind::NotFound);
        assert!(
            holds(&repository).await.unwrap().is_empty(),
            "one that holds nothing is taken back"
        );
    }

    #[test]
    fn marks_are_read_back_from_their_names() {
        let id = "20261122T100001Z-00000002-0000000003000028";
        let mut marks = Marks::default();
        assert!(marks.add(&format!("hold-{id}")));
        for horizon in [0x20, 0x30, 0x10] {
            let Object::Mark(name) = expired(TimelineId::FIRST, Lsn(horizon)) else { panic!() };
            assert!(marks.add(&name));
        }
        let second = TimelineId::new(2).unwrap();
        let range = LsnRange::new(Lsn(0x300_00A8), Lsn(0x400_0000)).unwrap();
        let barriers = [Barrier::minimal(Lsn(0x300_00A8)), Barrier::damaged(range)];
        for (barrier, known) in barriers.iter().zip([
            "minimal-00000002-00000000030000A8",
            "damaged-00000002-00000000030000A8-0000000004000000",
        ]) {
            assert_eq!(barrier.mark(second), Object::Mark(known.to_owned()));
            assert!(marks.add(known));
        }
        for foreign in [
            "hold-",
            "expired-1-2",
            "expired-00000000-0000000000000010",
            "minimal-00000002-00000000030000a8",
            "minimal-00000000-00000000030000A8",
            "minimal-",
            "minimal-00000002-00000000030000A8-0000000004000000",
            "damaged-00000002-00000000030000A8",
            "damaged-00000002-00000000030000A8-00000000030000A8",
            "damaged-00000002-00000000030000A8-0000000003000000",
            "damaged-00000002-00000000030000A8-0000000004000000-",
            "x",
        ] {
            assert!(!marks.add(foreign), "{foreign}");
        }
        assert_eq!(marks.barriers, barriers.map(|barrier| (second, barrier)).into());
        assert_eq!(marks.holds, [id.parse().unwrap()].into());
        assert_eq!(marks.expired, [(TimelineId::FIRST, Lsn(0x30))].into());
    }
}
