//! Whole WAL records and the blocks they refer to.

use super::rmgr::RmgrId;
use crate::pg::LsnRange;
use crate::pg::data_dir::{Fork, Relation};

/// A whole record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// From the first byte to `EndRecPtr`.
    pub range: LsnRange,
    /// Major version of the server that wrote it, by the magic of its page.
    pub major: u32,
    /// `xl_tot_len`.
    pub length_bytes: u32,
    /// Transaction, 0 for none.
    pub xid: u32,
    /// `xl_info`.
    pub info: u8,
    /// Resource manager.
    pub rmgr: RmgrId,
    /// `xl_prev`: start of the record before.
    pub previous_lsn: crate::pg::Lsn,
    /// Replication origin.
    pub origin: Option<u16>,
    /// Top-level transaction of a subtransaction (14 and later, `wal_level = logical`).
    pub toplevel_xid: Option<u32>,
    /// Referenced blocks in the order of the record.
    pub blocks: Vec<BlockReference<'a>>,
    /// The resource manager's own data.
    pub main_data: &'a [u8],
}

/// A block that a record refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockReference<'a> {
    /// Number of the reference in the record.
    pub id: u8,
    /// The relation.
    pub relation: Relation,
    /// The fork.
    pub fork: Fork,
    /// Block number in the fork.
    pub block_number: u32,
    /// `BKPBLOCK_WILL_INIT`: redo makes the page anew.
    pub will_init: bool,
    /// The page as it was, if it is in the record.
    pub image: Option<PageImage<'a>>,
    /// The resource manager's data for this block.
    pub data: Option<&'a [u8]>,
}

/// A page in a record, without its hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageImage<'a> {
    /// Whether redo restores it; otherwise it is there for consistency checks only.
    pub apply: bool,
    /// Bytes before the hole.
    pub hole_offset: u16,
    /// Bytes of zeros left out.
    pub hole_length: u16,
    /// How `bytes` are compressed.
    pub compression: ImageCompression,
    /// The page without its hole, compressed.
    pub bytes: &'a [u8],
}

/// `wal_compression` of a page image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageCompression {
    /// Not compressed.
    None,
    /// PostgreSQL's own.
    Pglz,
    /// LZ4 block (15 and later).
    Lz4,
    /// Zstandard (15 and later).
    Zstd,
}
