//! `global/pg_control`: the state of a cluster, and the checkpoint record it keeps a copy of.
//!
//! # Shape
//! The file is 8192 bytes; the structure at its start ends with a CRC-32C of what is before it.
//! Written by a little-endian machine with 8-byte alignment, as every machine that PostgreSQL's
//! packages are built for is; files of other machines fail at the version number or the CRC.
//!
//! # Source
//! `ControlFileData`, `CheckPoint`, `DBState` in `src/include/catalog/pg_control.h`, read on 13 to
//! 18: 13 to 16 share version 1300; 17 added `wal_level` to `CheckPoint` where padding was; 18 put
//! `default_char_signedness` before the nonce. `src/include/catalog/catversion.h` tells the majors
//! apart.

use super::bytes::{array, i64_at, u32_at, u64_at};
use super::crc::crc32c;
use super::lsn::Lsn;
use super::segment::{SegmentSize, TimelineId};
use super::system_id::SystemId;
use crate::error::{Error, Kind, Result};

/// Path of the file in a data directory (`XLOG_CONTROL_FILE`).
pub const XLOG_CONTROL_FILE: &str = "global/pg_control";
/// Size of the file in bytes.
pub const PG_CONTROL_FILE_SIZE: usize = 8192;

/// `pg_control_version`, its length up to the CRC, and the offset of the nonce.
const LAYOUTS: [(u32, usize); 3] = [(1300, 288), (1700, 288), (1800, 292)];
/// `CATALOG_VERSION_NO` of each supported major version.
const CATALOG_VERSIONS: [(u32, u32); 6] = [
    (202_007_201, 13),
    (202_107_181, 14),
    (202_209_061, 15),
    (202_307_071, 16),
    (202_406_281, 17),
    (202_506_291, 18),
];
/// Size of `CheckPoint` in bytes, the same from 13 to 18.
pub const CHECKPOINT_BYTES: usize = 88;

/// `DBState`: what the cluster was doing when `pg_control` was last written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterState {
    /// `DB_STARTUP`
    Startup,
    /// `DB_SHUTDOWNED`
    ShutDown,
    /// `DB_SHUTDOWNED_IN_RECOVERY`
    ShutDownInRecovery,
    /// `DB_SHUTDOWNING`
    ShuttingDown,
    /// `DB_IN_CRASH_RECOVERY`
    InCrashRecovery,
    /// `DB_IN_ARCHIVE_RECOVERY`
    InArchiveRecovery,
    /// `DB_IN_PRODUCTION`
    InProduction,
}

impl ClusterState {
    fn decode(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Startup,
            1 => Self::ShutDown,
            2 => Self::ShutDownInRecovery,
            3 => Self::ShuttingDown,
            4 => Self::InCrashRecovery,
            5 => Self::InArchiveRecovery,
            6 => Self::InProduction,
            _ => return None,
        })
    }

    /// The state as `pg_controldata` words it (`dbState`).
    #[must_use]
    pub fn description(self) -> &'static str {
        match self {
            Self::Startup => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        }
    }
}

/// `CheckPoint`: the body of a checkpoint record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where recovery from this checkpoint begins.
    pub redo_lsn: Lsn,
    /// Timeline of the checkpoint.
    pub timeline: TimelineId,
    /// The timeline before, if this record begins a new one; otherwise the same.
    pub previous_timeline: TimelineId,
    /// Whether `full_page_writes` was on.
    pub full_page_writes: bool,
    /// Next free transaction id with its epoch in the upper half.
    pub next_xid: u64,
    /// Next free object id.
    pub next_oid: u32,
    /// Next free multixact id.
    pub next_multi: u32,
    /// Next free multixact member offset.
    pub next_multi_offset: u32,
    /// Oldest transaction id that a table may still hold.
    pub oldest_xid: u32,
    /// Database that holds it.
    pub oldest_xid_database: u32,
    /// Oldest multixact id that a table may still hold.
    pub oldest_multi: u32,
    /// Database that holds it.
    pub oldest_multi_database: u32,
    /// When the checkpoint was taken, seconds since the Unix epoch (`pg_time_t`).
    pub time_unix_s: i64,
    /// Oldest transaction id with a commit timestamp, 0 for none.
    pub oldest_commit_timestamp_xid: u32,
    /// Newest transaction id with a commit timestamp, 0 for none.
    pub newest_commit_timestamp_xid: u32,
    /// Oldest transaction id still running; 0 in a shutdown checkpoint.
    pub oldest_active_xid: u32,
}

impl Checkpoint {
    /// The checkpoint in the first [`CHECKPOINT_BYTES`] of `bytes`, or `None` when there are fewer
    /// or its timelines are 0.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        bytes.get(..CHECKPOINT_BYTES)?;
        Some(Self {
            redo_lsn: Lsn(u64_at(bytes, 0)?),
            timeline: TimelineId::new(u32_at(bytes, 8)?)?,
            previous_timeline: TimelineId::new(u32_at(bytes, 12)?)?,
            full_page_writes: *bytes.get(16)? != 0,
            next_xid: u64_at(bytes, 24)?,
            next_oid: u32_at(bytes, 32)?,
            next_multi: u32_at(bytes, 36)?,
            next_multi_offset: u32_at(bytes, 40)?,
            oldest_xid: u32_at(bytes, 44)?,
            oldest_xid_database: u32_at(bytes, 48)?,
            oldest_multi: u32_at(bytes, 52)?,
            oldest_multi_database: u32_at(bytes, 56)?,
            time_unix_s: i64_at(bytes, 64)?,
            oldest_commit_timestamp_xid: u32_at(bytes, 72)?,
            newest_commit_timestamp_xid: u32_at(bytes, 76)?,
            oldest_active_xid: u32_at(bytes, 80)?,
        })
    }
}

/// What `pg_control` says; field names follow `ControlFileData`.
#[derive(Clone, Debug, PartialEq)]
pub struct ControlFile {
    /// The cluster.
    pub system_id: SystemId,
    /// `PG_CONTROL_VERSION`: 1300, 1700 or 1800.
    pub pg_control_version: u32,
    /// `CATALOG_VERSION_NO`, part of the names of tablespace directories.
    pub catalog_version: u32,
    /// PostgreSQL's major version, known by the catalog version; `None` for a pre-release.
    pub major: Option<u32>,
    /// What the cluster was doing.
    pub state: ClusterState,
    /// When the file was last written, seconds since the Unix epoch.
    pub time_unix_s: i64,
    /// Start of the last checkpoint record.
    pub checkpoint_lsn: Lsn,
    /// Copy of that record.
    pub checkpoint: Checkpoint,
    /// Recovery must reach this position before the cluster is consistent; invalid outside recovery.
    pub min_recovery_lsn: Lsn,
    /// Timeline of `min_recovery_lsn`, `None` outside recovery.
    pub min_recovery_timeline: Option<TimelineId>,
    /// Redo position of the backup being recovered from; invalid when there is none.
    pub backup_start_lsn: Lsn,
    /// End of a backup taken from a standby; invalid when there is none.
    pub backup_end_lsn: Lsn,
    /// Whether recovery must see a backup-end record.
    pub backup_end_required: bool,
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: u32,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// Settings that a standby must not have lower than the primary.
    pub limits: StandbyLimits,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
    /// Size of a data page in bytes (`BLCKSZ`).
    pub block_bytes: u32,
    /// Pages in a full segment file of a relation (`RELSEG_SIZE`).
    pub relation_segment_blocks: u32,
    /// Size of a WAL page in bytes (`XLOG_BLCKSZ`).
    pub wal_block_bytes: u32,
    /// Size of a WAL segment.
    pub wal_segment_size: SegmentSize,
    /// 0 when data pages carry no checksum, else the version of the checksum (1).
    pub data_checksum_version: u32,
}

/// The settings that hot standby compares with the primary's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct StandbyLimits {
    /// `max_connections`
    pub max_connections: u32,
    /// `max_worker_processes`
    pub max_worker_processes: u32,
    /// `max_wal_senders`
    pub max_wal_senders: u32,
    /// `max_prepared_transactions`
    pub max_prepared_transactions: u32,
    /// `max_locks_per_transaction`
    pub max_locks_per_transaction: u32,
}

impl ControlFile {
    /// What the bytes of a `pg_control` file say.
    ///
    /// # Errors
    /// `corrupt` when the file is too short, its CRC is wrong, or a field is out of range;
    /// `unsupported` for another layout than those of 13 to 18.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let version = u32_at(bytes, 8).ok_or_else(|| short(bytes))?;
        let crc_offset = LAYOUTS
            .iter()
            .find(|layout| layout.0 == version)
            .map(|layout| layout.1)
            .ok_or_else(|| unknown_version(version))?;
        let found = u32_at(bytes, crc_offset).ok_or_else(|| short(bytes))?;
        let expected = crc32c(bytes.get(..crc_offset).ok_or_else(|| short(bytes))?);
        if found != expected {
            let what = format!("CRC is {found:08x}, expected {expected:08x}");
            return Err(damaged(&what));
        }
        Self::decode_fields(bytes).ok_or_else(|| damaged("a field is out of range"))
    }

    /// The fields, once version and CRC are known to be right.
    fn decode_fields(bytes: &[u8]) -> Option<Self> {
        let catalog_version = u32_at(bytes, 12)?;
        let flag = |offset: usize| array::<1>(bytes, offset).map(|byte| byte != [0]);
        Some(Self {
            system_id: SystemId(u64_at(bytes, 0)?),
            pg_control_version: u32_at(bytes, 8)?,
            catalog_version,
            major: CATALOG_VERSIONS.iter().find(|row| row.0 == catalog_version).map(|row| row.1),
            state: ClusterState::decode(u32_at(bytes, 16)?)?,
            time_unix_s: i64_at(bytes, 24)?,
            checkpoint_lsn: Lsn(u64_at(bytes, 32)?),
            checkpoint: Checkpoint::decode(bytes.get(40..)?)?,
            min_recovery_lsn: Lsn(u64_at(bytes, 136)?),
            min_recovery_timeline: TimelineId::new(u32_at(bytes, 144)?),
            backup_start_lsn: Lsn(u64_at(bytes, 152)?),
            backup_end_lsn: Lsn(u64_at(bytes, 160)?),
            backup_end_required: flag(168)?,
            wal_level: u32_at(bytes, 172)?,
            wal_log_hints: flag(176)?,
            limits: StandbyLimits {
                max_connections: u32_at(bytes, 180)?,
                max_worker_processes: u32_at(bytes, 184)?,
                max_wal_senders: u32_at(bytes, 188)?,
                max_prepared_transactions: u32_at(bytes, 192)?,
                max_locks_per_transaction: u32_at(bytes, 196)?,
            },
            track_commit_timestamp: flag(200)?,
            block_bytes: u32_at(bytes, 216)?,
            relation_segment_blocks: u32_at(bytes, 220)?,
            wal_block_bytes: u32_at(bytes, 224)?,
            wal_segment_size: SegmentSize::new(u32_at(bytes, 228)?)?,
            data_checksum_version: u32_at(bytes, 252)?,
        })
    }
}

fn damaged(what: &str) -> Error {
    Error::new(Kind::Corrupt, format!("unable to read '{XLOG_CONTROL_FILE}': {what}"))
}

fn short(bytes: &[u8]) -> Error {
    damaged(&format!("{} bytes, expected {PG_CONTROL_FILE_SIZE}", bytes.len()))
}

fn unknown_version(version: u32) -> Error {
    let message = format!(
        "unable to read '{XLOG_CONTROL_FILE}': its version is {version}, known are 1300, 1700 and 1800"
    );
    Error::new(Kind::Unsupported, message)
        .hint("Use a release of Tidemark that knows this version of PostgreSQL.")
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A file of this layout whose fields are recognisable, with a right CRC.
    pub(crate) fn file(version: u32, catalog_version: u32) -> Vec<u8> {
        let mut bytes = vec![0; PG_CONTROL_FILE_SIZE];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        put(0, &7_u64.to_le_bytes());
        put(8, &version.to_le_bytes());
        put(12, &catalog_version.to_le_bytes());
        put(16, &6_u32.to_le_bytes());
        put(32, &0x0200_0060_u64.to_le_bytes());
        put(40, &0x0200_0028_u64.to_le_bytes());
        put(48, &3_u32.to_le_bytes());
        put(52, &2_u32.to_le_bytes());
        put(216, &8192_u32.to_le_bytes());
        put(228, &(1_u32 << 20).to_le_bytes());
        put(252, &1_u32.to_le_bytes());
        let end = if version == 1800 { 292 } else { 288 };
        let crc = crc32c(&bytes[..end]);
        bytes[end..end + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn every_layout_is_read() {
        for (catalog, major) in CATALOG_VERSIONS {
            let version = [1300, 1700, 1800][usize::from(major >= 17) + usize::from(major >= 18)];
            let control = ControlFile::decode(&file(version, catalog)).unwrap();
            assert_eq!((control.major, control.system_id), (Some(major), SystemId(7)));
            assert_eq!(control.state, ClusterState::InProduction);
            assert_eq!(control.checkpoint_lsn, Lsn(0x0200_0060));
            assert_eq!(control.checkpoint.redo_lsn, Lsn(0x0200_0028));
            assert_eq!(control.checkpoint.previous_timeline.get(), 2);
            assert_eq!((control.wal_segment_size.bytes(), control.block_bytes), (1 << 20, 8192));
        }
    }

    #[test]
    fn damage_and_unknown_versions_are_refused() {
        let good = file(1300, 202_209_061);
        for place in [0, 40, 200, 287, 288] {
            let mut bytes = good.clone();
            bytes[place] ^= 1;
            assert_eq!(ControlFile::decode(&bytes).unwrap_err().kind(), Kind::Corrupt, "{place}");
        }
        assert_eq!(ControlFile::decode(&good[..200]).unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(ControlFile::decode(&[]).unwrap_err().kind(), Kind::Corrupt);
        let error = ControlFile::decode(&file(1900, 1)).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..400),
            version in prop_oneof![Just(1300_u32), Just(1700), Just(1800)],
        ) {
            let _ = ControlFile::decode(&bytes);
            let _ = Checkpoint::decode(&bytes);
            if let Some(place) = bytes.get_mut(8..12) {
                place.copy_from_slice(&version.to_le_bytes());
            }
            let end = if version == 1800 { 292 } else { 288 };
            if bytes.len() >= end + 4 {
                let crc = crc32c(&bytes[..end]);
                bytes[end..end + 4].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = ControlFile::decode(&bytes);
        }
    }
}
