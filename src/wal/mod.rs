//! WAL pages, records, block references and landmarks; sans-I/O.
//!
//! Bytes of WAL flow in, in any chunks; [`Scanner`] gives the few records that place commits,
//! restore points and checkpoints in time, [`RecordReader`] gives every record with its block
//! references. Both know PostgreSQL 13 to 18 by the magic number of the pages and check page
//! headers, the chain of records and their CRCs, so that damaged WAL is never taken for good.

mod assembler;
pub(crate) mod craft;
mod landmark;
mod page;
mod reader;
mod record;
mod rmgr;
mod scanner;
#[cfg(test)]
mod tests;
mod xact;

pub use assembler::CrcCheck;
pub use landmark::{CheckpointKind, Landmark};
pub use page::XLOG_BLCKSZ;
pub(crate) use page::holds_known_page;
pub use reader::RecordReader;
pub use record::{BlockReference, ImageCompression, PageImage, Record};
pub use rmgr::RmgrId;
pub use scanner::Scanner;
