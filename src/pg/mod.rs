//! PostgreSQL's nouns as values: no I/O, no async.

pub mod backup_label;
pub mod backup_manifest;
pub(crate) mod bytes;
pub mod control;
pub mod crc;
pub mod data_dir;
pub mod lsn;
pub mod page;
pub mod segment;
pub mod system_id;
pub mod time;
pub mod timeline;
pub mod version;

pub use backup_label::BackupLabel;
pub use backup_manifest::BackupManifest;
pub use control::{Checkpoint, ClusterState, ControlFile};
pub use crc::{Crc32c, crc32c, crc32c_combine};
pub use lsn::{Lsn, LsnRange};
pub use segment::{SegmentNumber, SegmentSize, TimelineId};
pub use system_id::SystemId;
pub use time::PgTime;
pub use timeline::TimelineHistory;
pub use version::Version;
