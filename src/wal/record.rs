//! Whole WAL records and the blocks they refer to.
//!
//! # Shape
//! Behind the fixed header: a header for each block reference, one for the main data, then the
//! blocks' images and data in the same order, then the main data. Nothing is aligned.
//!
//! # Source
//! `src/include/access/xlogrecord.h`, `DecodeXLogRecord` in
//! `src/backend/access/transam/xlogreader.c`, `RestoreBlockImage` there; read on 13 to 18. The flags
//! of page images changed with 15; `XLR_BLOCK_ID_TOPLEVEL_XID` came with 14.

use super::page::{RECORD_HEADER_BYTES, RecordHeader, damaged_record};
use super::rmgr::RmgrId;
use crate::error::Result;
use crate::pg::bytes::{u16_at, u32_at};
use crate::pg::data_dir::{Fork, Relation};
use crate::pg::page::BLCKSZ;
use crate::pg::{Lsn, LsnRange};

const XLR_MAX_BLOCK_ID: u8 = 32;
const XLR_BLOCK_ID_DATA_SHORT: u8 = 255;
const XLR_BLOCK_ID_DATA_LONG: u8 = 254;
const XLR_BLOCK_ID_ORIGIN: u8 = 253;
const XLR_BLOCK_ID_TOPLEVEL_XID: u8 = 252;

const BKPBLOCK_FORK_MASK: u8 = 0x0F;
const BKPBLOCK_HAS_IMAGE: u8 = 0x10;
const BKPBLOCK_HAS_DATA: u8 = 0x20;
const BKPBLOCK_WILL_INIT: u8 = 0x40;
const BKPBLOCK_SAME_REL: u8 = 0x80;

const BKPIMAGE_HAS_HOLE: u8 = 0x01;
/// `BLCKSZ` in the type of the lengths in a record.
const PAGE_BYTES: u16 = 8192;
const _: () = assert!(PAGE_BYTES as usize == BLCKSZ);

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
    pub previous_lsn: Lsn,
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
    /// Number of the reference in the record; they rise, with gaps.
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
    /// The resource manager's data for this block; empty for none.
    pub data: &'a [u8],
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

impl PageImage<'_> {
    /// The page, or `None` when the image is compressed or its parts do not make a page.
    #[must_use]
    pub fn restore_uncompressed(&self) -> Option<[u8; BLCKSZ]> {
        let mut page = [0; BLCKSZ];
        let before = usize::from(self.hole_offset);
        let behind = before.checked_add(usize::from(self.hole_length))?;
        let (head, tail) = self.bytes.split_at_checked(before)?;
        page.get_mut(..before)?.copy_from_slice(head);
        let room = page.get_mut(behind..)?;
        let whole = self.compression == ImageCompression::None && room.len() == tail.len();
        whole.then(|| room.copy_from_slice(tail))?;
        Some(page)
    }
}

/// A record's header, place and version, what is known before its body is decoded.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordFrame {
    pub(super) header: RecordHeader,
    pub(super) range: LsnRange,
    pub(super) major: u32,
}

impl<'a> Record<'a> {
    /// Decodes the body of a record: its bytes behind the fixed header, all of them.
    pub(super) fn decode(frame: &RecordFrame, body: &'a [u8]) -> Result<Self> {
        let header = &frame.header;
        let mut record = Self {
            range: frame.range,
            major: frame.major,
            length_bytes: header.length_bytes,
            xid: header.xid,
            info: header.info,
            rmgr: header.rmgr,
            previous_lsn: header.previous_lsn,
            origin: None,
            toplevel_xid: None,
            blocks: Vec::new(),
            main_data: &[],
        };
        record.decode_body(body).map_err(|found| damaged_record(frame.range.start(), found))?;
        Ok(record)
    }

    fn decode_body(&mut self, body: &'a [u8]) -> Result<(), &'static str> {
        const CUT_OFF: &str = "its parts are longer than the record";
        let mut cursor = Cursor { rest: body };
        let mut heads: Heads = Heads::default();
        let mut main_bytes = 0;
        let mut payload_bytes = 0;
        // As in DecodeXLogRecord: fragment headers go on until what is left is their payload.
        while cursor.rest.len() > payload_bytes {
            match cursor.u8().ok_or(CUT_OFF)? {
                XLR_BLOCK_ID_DATA_SHORT => {
                    main_bytes = usize::from(cursor.u8().ok_or(CUT_OFF)?);
                    break;
                }
                XLR_BLOCK_ID_DATA_LONG => {
                    main_bytes = cursor.u32().ok_or(CUT_OFF)? as usize;
                    break;
                }
                XLR_BLOCK_ID_ORIGIN => self.origin = Some(cursor.u16().ok_or(CUT_OFF)?),
                XLR_BLOCK_ID_TOPLEVEL_XID if self.major >= 14 => {
                    self.toplevel_xid = Some(cursor.u32().ok_or(CUT_OFF)?);
                }
                id if id <= XLR_MAX_BLOCK_ID => {
                    let head = BlockHead::decode(id, &mut cursor, &heads, self.major)?;
                    payload_bytes += head.payload_bytes();
                    heads.push(head);
                }
                _ => return Err("it has a block reference with an unknown number"),
            }
        }
        if cursor.rest.len() != payload_bytes + main_bytes {
            return Err(CUT_OFF);
        }
        self.blocks.reserve_exact(heads.0.len());
        for head in &heads.0 {
            self.blocks.push(head.with_payload(&mut cursor).ok_or(CUT_OFF)?);
        }
        self.main_data = cursor.rest;
        Ok(())
    }
}

/// The block headers of a record so far.
#[derive(Default)]
struct Heads(Vec<BlockHead>);

impl Heads {
    fn push(&mut self, head: BlockHead) {
        self.0.push(head);
    }

    fn last(&self) -> Option<&BlockHead> {
        self.0.last()
    }
}

/// `XLogRecordBlockHeader` with what follows it.
struct BlockHead {
    id: u8,
    relation: Relation,
    fork: Fork,
    block_number: u32,
    will_init: bool,
    image: Option<ImageHead>,
    data_bytes: usize,
}

struct ImageHead {
    apply: bool,
    hole_offset: u16,
    hole_length: u16,
    compression: ImageCompression,
    bytes: usize,
}

impl BlockHead {
    fn decode(
        id: u8,
        cursor: &mut Cursor<'_>,
        before: &Heads,
        major: u32,
    ) -> Result<Self, &'static str> {
        const CUT_OFF: &str = "a block reference is cut off";
        if before.last().is_some_and(|last| last.id >= id) {
            return Err("its block references are out of order");
        }
        let flags = cursor.u8().ok_or(CUT_OFF)?;
        let data_bytes = usize::from(cursor.u16().ok_or(CUT_OFF)?);
        if (flags & BKPBLOCK_HAS_DATA != 0) != (data_bytes > 0) {
            return Err("a block reference contradicts itself about its data");
        }
        let image = if flags & BKPBLOCK_HAS_IMAGE != 0 {
            Some(ImageHead::decode(cursor, major)?)
        } else {
            None
        };
        let relation = if flags & BKPBLOCK_SAME_REL != 0 {
            before.last().ok_or("a block reference says 'same relation' and is the first")?.relation
        } else {
            let (tablespace, database, number) = (cursor.u32(), cursor.u32(), cursor.u32());
            Relation {
                tablespace: tablespace.ok_or(CUT_OFF)?,
                database: database.ok_or(CUT_OFF)?,
                number: number.ok_or(CUT_OFF)?,
            }
        };
        let fork = Fork::from_number(flags & BKPBLOCK_FORK_MASK);
        Ok(Self {
            id,
            relation,
            fork: fork.ok_or("a block reference names an unknown fork")?,
            block_number: cursor.u32().ok_or(CUT_OFF)?,
            will_init: flags & BKPBLOCK_WILL_INIT != 0,
            image,
            data_bytes,
        })
    }

    fn payload_bytes(&self) -> usize {
        self.data_bytes + self.image.as_ref().map_or(0, |image| image.bytes)
    }

    fn with_payload<'a>(&self, cursor: &mut Cursor<'a>) -> Option<BlockReference<'a>> {
        let image = match &self.image {
            Some(image) => Some(PageImage {
                apply: image.apply,
                hole_offset: image.hole_offset,
                hole_length: image.hole_length,
                compression: image.compression,
                bytes: cursor.bytes(image.bytes)?,
            }),
            None => None,
        };
        Some(BlockReference {
            id: self.id,
            relation: self.relation,
            fork: self.fork,
            block_number: self.block_number,
            will_init: self.will_init,
            image,
            data: cursor.bytes(self.data_bytes)?,
        })
    }
}

impl ImageHead {
    /// `XLogRecordBlockImageHeader`, with the cross-checks of `DecodeXLogRecord`.
    fn decode(cursor: &mut Cursor<'_>, major: u32) -> Result<Self, &'static str> {
        const CUT_OFF: &str = "a page image's header is cut off";
        const CONTRADICTION: &str = "a page image contradicts itself about its hole";
        let length = cursor.u16().ok_or(CUT_OFF)?;
        let hole_offset = cursor.u16().ok_or(CUT_OFF)?;
        let flags = cursor.u8().ok_or(CUT_OFF)?;
        let (apply, compression) = image_flags(flags, major)?;
        let has_hole = flags & BKPIMAGE_HAS_HOLE != 0;
        let compressed = compression != ImageCompression::None;
        let hole_length = if compressed && has_hole {
            cursor.u16().ok_or(CUT_OFF)?
        } else if compressed {
            0
        } else {
            PAGE_BYTES.checked_sub(length).ok_or(CONTRADICTION)?
        };
        let hole_right = if has_hole {
            hole_offset != 0 && hole_length != 0 && length != PAGE_BYTES
        } else {
            hole_offset == 0 && hole_length == 0
        };
        if !hole_right || (compressed && length >= PAGE_BYTES) {
            return Err(CONTRADICTION);
        }
        if hole_offset.checked_add(hole_length).is_none_or(|end| end > PAGE_BYTES) {
            return Err(CONTRADICTION);
        }
        Ok(Self { apply, hole_offset, hole_length, compression, bytes: usize::from(length) })
    }
}

/// `bimg_info`: whether to apply the image, and its compression.
fn image_flags(flags: u8, major: u32) -> Result<(bool, ImageCompression), &'static str> {
    if major < 15 {
        // BKPIMAGE_IS_COMPRESSED, BKPIMAGE_APPLY
        let pglz = flags & 0x02 != 0;
        let compression = if pglz { ImageCompression::Pglz } else { ImageCompression::None };
        return Ok((flags & 0x04 != 0, compression));
    }
    let compression = match flags & (0x04 | 0x08 | 0x10) {
        0 => ImageCompression::None,
        0x04 => ImageCompression::Pglz,
        0x08 => ImageCompression::Lz4,
        0x10 => ImageCompression::Zstd,
        _ => return Err("a page image names two compressions"),
    };
    Ok((flags & 0x02 != 0, compression))
}

/// Reads the body of a record from front to back.
struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (now, later) = self.rest.split_at_checked(count)?;
        self.rest = later;
        Some(now)
    }

    fn u8(&mut self) -> Option<u8> {
        self.bytes(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        u16_at(self.bytes(2)?, 0)
    }

    fn u32(&mut self) -> Option<u32> {
        u32_at(self.bytes(4)?, 0)
    }
}

/// The main data, or as much of it as is there, in the first bytes of the body of a record that
/// refers to no blocks; `None` for other records.
pub(super) fn main_data_of_prefix(prefix: &[u8], major: u32) -> Option<&[u8]> {
    let mut cursor = Cursor { rest: prefix };
    loop {
        let length = match cursor.u8()? {
            XLR_BLOCK_ID_ORIGIN => {
                cursor.u16()?;
                continue;
            }
            XLR_BLOCK_ID_TOPLEVEL_XID if major >= 14 => {
                cursor.u32()?;
                continue;
            }
            XLR_BLOCK_ID_DATA_SHORT => usize::from(cursor.u8()?),
            XLR_BLOCK_ID_DATA_LONG => cursor.u32()? as usize,
            _ => return None,
        };
        return Some(cursor.rest.get(..length).unwrap_or(cursor.rest));
    }
}

/// Bytes of a record's body, by the length in its header.
pub(super) fn body_bytes(header: &RecordHeader) -> usize {
    (header.length_bytes as usize).saturating_sub(RECORD_HEADER_BYTES)
}
