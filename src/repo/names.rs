//! Names of objects: what is stored where, and all of a WAL extent's facts in its name.
//!
//! # Shape
//! ```text
//! <cluster>/identity
//! <cluster>/keys/<key id: 32 hex digits>
//! <cluster>/base/<backup id>/pack-<number: 6 decimal digits, from 1>
//! <cluster>/base/<backup id>/manifest
//! <cluster>/wal/<timeline: 8 HEX>/<start: 16 HEX>-<end: 16 HEX>-<time: 16 HEX>
//! <cluster>/wal/<timeline: 8 HEX>.history
//! <cluster>/marks/<see marks>  <cluster>/reports/…  <cluster>/lease
//! ```
//! A backup id is `<start time YYYYMMDDTHHMMSSZ>-<timeline 8 HEX>-<start LSN 16 HEX>`. An extent's time
//! is the greatest time of a commit or abort record that ends inside, in microseconds since 1970, 0
//! when there is none. All parts
//! have fixed width, so the order of names is the order of things.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, PgTime, TimelineId};
use crate::store::ObjectName;

/// Most plain WAL bytes one extent holds, and one object that joins several.
pub const EXTENT_PLAIN_BYTES_MAX: u64 = 16 << 20;
/// Longest name of a cluster.
pub const CLUSTER_NAME_BYTES_MAX: usize = 64;
/// Greatest number of a pack: six digits keep names in order, 512 TB stored.
pub const PACK_NUMBER_MAX: u32 = 999_999;

/// Name of one cluster in a repository: the first segment of all its objects.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterName(String);

impl ClusterName {
    /// This name.
    ///
    /// # Errors
    /// `config` when it is not 1 to 64 letters, digits, dots, underscores and hyphens, or begins with
    /// a dot.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let length = (1..=CLUSTER_NAME_BYTES_MAX).contains(&name.len());
        if length && !name.starts_with('.') && name.bytes().all(allowed) {
            return Ok(Self(name));
        }
        Err(Error::new(Kind::Config, format!("unable to use '{name}' as the name of a cluster"))
            .hint("Use 1 to 64 letters, digits, dots, underscores or hyphens, not beginning with a dot."))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Prefix of the names of all objects of this cluster.
    #[must_use]
    pub fn prefix(&self) -> String {
        format!("{}/", self.0)
    }

    /// Prefix of the names of all backups' objects.
    #[must_use]
    pub fn base_prefix(&self) -> String {
        format!("{}/base/", self.0)
    }

    /// Prefix of the names of all objects of one backup.
    #[must_use]
    pub fn backup_prefix(&self, backup: BackupId) -> String {
        format!("{}/base/{backup}/", self.0)
    }

    /// Prefix of the names of all WAL extents and history files.
    #[must_use]
    pub fn wal_prefix(&self) -> String {
        format!("{}/wal/", self.0)
    }

    /// Prefix of the names of the WAL extents of one timeline.
    #[must_use]
    pub fn timeline_prefix(&self, timeline: TimelineId) -> String {
        format!("{}/wal/{:08X}/", self.0, timeline.get())
    }

    /// Prefix of the names of all wrapped data keys.
    #[must_use]
    pub fn keys_prefix(&self) -> String {
        format!("{}/keys/", self.0)
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.0)
    }
}

impl FromStr for ClusterName {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::new(text)
    }
}

/// Which data key an object is sealed with; all zero for objects without encryption.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 16]);

impl KeyId {
    /// The id in objects without encryption.
    pub const NONE: KeyId = KeyId([0; 16]);
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {self}")
    }
}

impl FromStr for KeyId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let lower = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            (text.len() == 32 && lower).then(|| u128::from_str_radix(text, 16).ok()).flatten()
        };
        let number = parse().ok_or_else(|| unreadable(text, "the id of a key"))?;
        Ok(Self(number.to_be_bytes()))
    }
}

impl serde::Serialize for KeyId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for KeyId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A base backup: when and where in the WAL it began. Orders by time of start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId {
    start_time: Timestamp,
    timeline: TimelineId,
    start_lsn: Lsn,
}

impl BackupId {
    /// The backup that began at this time (cut to a second) and position.
    #[must_use]
    pub fn new(start_time: Timestamp, timeline: TimelineId, start_lsn: Lsn) -> Self {
        // Four digits of year is what the name has room for.
        let seconds = start_time.as_second().clamp(0, 253_402_300_799);
        let start_time = Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH);
        Self { start_time, timeline, start_lsn }
    }

    /// When it began, to the second.
    #[must_use]
    pub fn start_time(self) -> Timestamp {
        self.start_time
    }

    /// The timeline it began on.
    #[must_use]
    pub fn timeline(self) -> TimelineId {
        self.timeline
    }

    /// The first WAL position a restore of it needs.
    #[must_use]
    pub fn start_lsn(self) -> Lsn {
        self.start_lsn
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.start_time.to_zoned(TimeZone::UTC);
        write!(
            f,
            "{:04}{:02}{:02}T{:02}{:02}{:02}Z-{:08X}-{:016X}",
            time.year(),
            time.month(),
            time.day(),
            time.hour(),
            time.minute(),
            time.second(),
            self.timeline.get(),
            self.start_lsn.0
        )
    }
}

impl fmt::Debug for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{self}'")
    }
}

impl FromStr for BackupId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let mut parts = text.split('-');
            let (time, timeline, lsn) = (parts.next()?, parts.next()?, parts.next()?);
            let digits = |range: std::ops::Range<usize>| -> Option<i8> {
                let part = time.get(range)?;
                part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok()).flatten()
            };
            let fixed = time.len() == 16 && time.get(8..9)? == "T" && time.get(15..)? == "Z";
            let century = i16::from(digits(0..2)?);
            let year = century.checked_mul(100)?.checked_add(i16::from(digits(2..4)?))?;
            let start = jiff::civil::DateTime::new(
                year,
                digits(4..6)?,
                digits(6..8)?,
                digits(9..11)?,
                digits(11..13)?,
                digits(13..15)?,
                0,
            )
            .ok()?
            .to_zoned(TimeZone::UTC)
            .ok()?
            .timestamp();
            let timeline = TimelineId::new(u32::try_from(hex(timeline, 8)?).ok()?)?;
            let id = Self::new(start, timeline, Lsn(hex(lsn, 16)?));
            (fixed && parts.next().is_none() && id.start_time == start).then_some(id)
        };
        parse().ok_or_else(|| {
            unreadable(text, "the id of a backup").hint("Run 'tidemark list' to see the backups.")
        })
    }
}

impl serde::Serialize for BackupId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for BackupId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A WAL extent: which bytes of which timeline, and the greatest commit time inside. Orders by
/// timeline, then start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExtentName {
    /// The timeline whose WAL this is.
    pub timeline: TimelineId,
    /// The bytes `[start, end)`, at least one.
    pub range: LsnRange,
    /// Greatest time of the commit and abort records that end inside, `None` when there is none.
    pub time: Option<PgTime>,
}

impl ExtentName {
    /// The time as names and headers write it: microseconds since 1970, 0 for none.
    #[must_use]
    pub fn time_micros(&self) -> u64 {
        time_to_micros(self.time)
    }
}

impl fmt::Display for ExtentName {
    /// The name below `<cluster>/wal/`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:08X}/{:016X}-{:016X}-{:016X}",
            self.timeline.get(),
            self.range.start().0,
            self.range.end().0,
            self.time_micros()
        )
    }
}

impl FromStr for ExtentName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (timeline, rest) = text.split_once('/')?;
            let mut parts = rest.split('-');
            let start = Lsn(hex(parts.next()?, 16)?);
            let end = Lsn(hex(parts.next()?, 16)?);
            let micros = hex(parts.next()?, 16)?;
            let range = LsnRange::new(start, end).filter(|range| !range.is_empty())?;
            let name = Self {
                timeline: TimelineId::new(u32::try_from(hex(timeline, 8)?).ok()?)?,
                range,
                time: micros_to_time(micros)?,
            };
            parts.next().is_none().then_some(name)
        };
        parse().ok_or_else(|| unreadable(text, "the name of a WAL extent"))
    }
}

/// A commit time as microseconds since 1970, 0 for none. A commit is never before 1970; a clock that
/// says so is written as the first microsecond after it.
pub(super) fn time_to_micros(time: Option<PgTime>) -> u64 {
    time.map_or(0, |time| u64::try_from(time.to_unix_micros()).unwrap_or(0).max(1))
}

/// The reverse of [`time_to_micros`]; the outer `None` when no PostgreSQL time can be that.
pub(super) fn micros_to_time(micros: u64) -> Option<Option<PgTime>> {
    if micros == 0 {
        return Some(None);
    }
    Some(Some(PgTime::from_unix_micros(i64::try_from(micros).ok()?)))
}

/// Exactly `width` upper-case hexadecimal digits.
fn hex(text: &str, width: usize) -> Option<u64> {
    let digits = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    (text.len() == width && digits).then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

fn unreadable(text: &str, what: &str) -> Error {
    Error::new(Kind::Usage, format!("unable to read '{text}' as {what}"))
}

/// What an object of a cluster is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Object {
    /// Which cluster this is.
    Identity,
    /// A wrapped data key.
    Key(KeyId),
    /// Pack `number` (from 1) of a backup.
    Pack(PackName),
    /// The manifest of a backup.
    Manifest(BackupId),
    /// A piece of WAL.
    Extent(ExtentName),
    /// A timeline history file.
    History(TimelineId),
    /// A small object that says something about others.
    Mark(String),
    /// A report of a verification or a drill.
    Report(String),
    /// Who may write WAL.
    Lease,
}

/// Which pack of which backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackName {
    /// The backup that wrote it.
    pub backup: BackupId,
    /// Its number in the backup, from 1.
    pub number: u32,
}

impl Object {
    /// Its name in the store.
    ///
    /// # Errors
    /// `usage` when a mark's or report's own name cannot be one, `unsupported` when a pack's number
    /// is too great.
    pub fn name(&self, cluster: &ClusterName) -> Result<ObjectName> {
        ObjectName::new(format!("{cluster}/{}", self.local_name()?))
    }

    /// Its name below the cluster's: what its object key is bound to.
    pub(super) fn local_name(&self) -> Result<String> {
        Ok(match self {
            Object::Identity => "identity".to_owned(),
            Object::Key(id) => format!("keys/{id}"),
            Object::Pack(PackName { backup, number }) if (1..=PACK_NUMBER_MAX).contains(number) => {
                format!("base/{backup}/pack-{number:06}")
            }
            Object::Pack(PackName { number, .. }) => {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!(
                        "unable to name pack {number}: a backup has packs 1 to {PACK_NUMBER_MAX}"
                    ),
                ));
            }
            Object::Manifest(backup) => format!("base/{backup}/manifest"),
            Object::Extent(extent) => format!("wal/{extent}"),
            Object::History(timeline) => format!("wal/{}", timeline.history_file_name()),
            Object::Mark(name) => format!("marks/{name}"),
            Object::Report(name) => format!("reports/{name}"),
            Object::Lease => "lease".to_owned(),
        })
    }

    /// What the object `name` of `cluster` is; `None` for names that are not ours, which every
    /// listing passes over.
    #[must_use]
    pub fn parse(cluster: &ClusterName, name: &ObjectName) -> Option<Self> {
        let rest = name.as_str().strip_prefix(cluster.as_str())?.strip_prefix('/')?;
        match rest.split_once('/') {
            None if rest == "identity" => Some(Object::Identity),
            None if rest == "lease" => Some(Object::Lease),
            None => None,
            Some(("keys", id)) => id.parse().ok().map(Object::Key),
            Some(("base", rest)) => Self::parse_base(rest),
            Some(("wal", rest)) => match rest.strip_suffix(".history") {
                Some(timeline) => {
                    let number = u32::try_from(hex(timeline, 8)?).ok()?;
                    TimelineId::new(number).map(Object::History)
                }
                None => rest.parse().ok().map(Object::Extent),
            },
            Some(("marks", name)) => Some(Object::Mark(name.to_owned())),
            Some(("reports", name)) => Some(Object::Report(name.to_owned())),
            Some(_) => None,
        }
    }

    fn parse_base(rest: &str) -> Option<Self> {
        let (backup, object) = rest.split_once('/')?;
        let backup = backup.parse().ok()?;
        if object == "manifest" {
            return Some(Object::Manifest(backup));
        }
        let digits = object.strip_prefix("pack-")?;
        let fixed = digits.len() == 6 && digits.bytes().all(|b| b.is_ascii_digit());
        let number = fixed.then(|| digits.parse().ok()).flatten()?;
        (number > 0).then_some(Object::Pack(PackName { backup, number }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backup() -> BackupId {
        let time = "2026-11-22T10:00:01.9Z".parse().unwrap();
        BackupId::new(time, TimelineId::new(2).unwrap(), Lsn(0x300_0028))
    }

    fn extent(time: Option<PgTime>) -> ExtentName {
        let range = LsnRange::new(Lsn(0x1_0000_0000), Lsn(0x1_0000_2000)).unwrap();
        ExtentName { timeline: TimelineId::new(0x1A).unwrap(), range, time }
    }

    #[test]
    fn every_object_name_is_read_back() {
        let cluster = ClusterName::new("main").unwrap();
        let time = PgTime::from_timestamp("2026-11-22T10:00:00.123456Z".parse().unwrap());
        let objects = [
            (Object::Identity, "main/identity"),
            (Object::Key(KeyId([0xAB; 16])), "main/keys/abababababababababababababababab"),
            (
                Object::Pack(PackName { backup: backup(), number: 12 }),
                "main/base/20261122T100001Z-00000002-0000000003000028/pack-000012",
            ),
            (
                Object::Manifest(backup()),
                "main/base/20261122T100001Z-00000002-0000000003000028/manifest",
            ),
            (
                Object::Extent(extent(None)),
                "main/wal/0000001A/0000000100000000-0000000100002000-0000000000000000",
            ),
            (
                Object::Extent(extent(Some(time))),
                "main/wal/0000001A/0000000100000000-0000000100002000-0006442C6FEEA240",
            ),
            (Object::History(TimelineId::new(0x1A).unwrap()), "main/wal/0000001A.history"),
            (Object::Mark("hold-x".to_owned()), "main/marks/hold-x"),
            (Object::Report("a/b".to_owned()), "main/reports/a/b"),
            (Object::Lease, "main/lease"),
        ];
        for (object, name) in objects {
            let made = object.name(&cluster).unwrap();
            if !matches!(object, Object::Extent(ExtentName { time: Some(_), .. })) {
                assert_eq!(made.as_str(), name);
            }
            assert_eq!(Object::parse(&cluster, &made), Some(object));
        }
    }

    #[test]
    fn names_that_are_not_ours_are_passed_over() {
        let cluster = ClusterName::new("main").unwrap();
        for name in [
            "other/identity",
            "main",
            "main/what",
            "main/keys/ABABABABABABABABABABABABABABABAB",
            "main/keys/ab",
            "main/base/20261122T100001Z-00000002-0000000003000028",
            "main/base/20261122T100001Z-00000002-0000000003000028/pack-000000",
            "main/base/20261122T100001Z-00000002-0000000003000028/pack-1",
            "main/base/20261322T100001Z-00000002-0000000003000028/manifest",
            "main/base/20261122T100001Z-00000000-0000000003000028/manifest",
            "main/wal/0000001A/0000000100000000-0000000100000000-0000000000000000",
            "main/wal/0000001A/0000000100000001-0000000100000000-0000000000000000",
            "main/wal/0000001A/000000010000000a-000000010000000b-0000000000000000",
            "main/wal/0000001A/0000000100000000-0000000100002000-FFFFFFFFFFFFFFFF",
            "main/wal/0000001A/0000000100000000-0000000100002000",
            "main/wal/00000000.history",
            "main/wal/1.history",
        ] {
            let name = ObjectName::new(name).unwrap();
            assert_eq!(Object::parse(&cluster, &name), None, "{name}");
        }
    }

    #[test]
    fn a_cluster_name_is_one_safe_segment() {
        for bad in ["", ".", "..", ".a", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert_eq!(ClusterName::new(bad).unwrap_err().kind(), Kind::Config, "{bad}");
        }
        assert_eq!(ClusterName::new("prod-1.eu_a").unwrap().wal_prefix(), "prod-1.eu_a/wal/");
    }

    #[test]
    fn commit_times_keep_their_microseconds_and_never_become_none() {
        for micros in [i64::MIN, -1, 0, 1, 1_795_341_600_123_456] {
            let written = time_to_micros(Some(PgTime::from_unix_micros(micros)));
            assert!(written > 0);
            let back = micros_to_time(written).unwrap().unwrap();
            assert_eq!(back, PgTime::from_unix_micros(micros.max(1)));
        }
        assert_eq!(micros_to_time(0), Some(None));
        assert_eq!(micros_to_time(u64::MAX), None);
    }
}
