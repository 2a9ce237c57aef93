//! PostgreSQL's nouns as values: no I/O, no async.

pub mod lsn;
pub mod segment;
pub mod system_id;
pub mod time;

pub use lsn::{Lsn, LsnRange};
pub use segment::{SegmentNumber, SegmentSize, TimelineId};
pub use system_id::SystemId;
pub use time::PgTime;
