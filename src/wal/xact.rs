//! Records of the transaction manager: commits, aborts and preparations.
//!
//! # Shape
//! A commit or abort begins with its time; the flags of `xinfo`, present when `info` says so, tell
//! which parts follow, in a fixed order and without padding.
//!
//! # Source
//! `src/include/access/xact.h`, `ParseCommitRecord`, `ParseAbortRecord` in
//! `src/backend/access/rmgrdesc/xactdesc.c`, `TwoPhaseFileHeader` in `twophase.c`; read on 13 to
//! 18. Dropped statistics (12 bytes each) came with 15 and grew to 16 bytes in 18.

use super::scanner::c_string;
use crate::pg::PgTime;
use crate::pg::bytes::{i64_at, u16_at, u32_at};

pub(super) const XLOG_XACT_OPMASK: u8 = 0x70;
pub(super) const XLOG_XACT_COMMIT: u8 = 0x00;
pub(super) const XLOG_XACT_PREPARE: u8 = 0x10;
pub(super) const XLOG_XACT_ABORT: u8 = 0x20;
pub(super) const XLOG_XACT_COMMIT_PREPARED: u8 = 0x30;
pub(super) const XLOG_XACT_ABORT_PREPARED: u8 = 0x40;
const XLOG_XACT_HAS_INFO: u8 = 0x80;

const XACT_XINFO_HAS_DBINFO: u32 = 1 << 0;
const XACT_XINFO_HAS_SUBXACTS: u32 = 1 << 1;
const XACT_XINFO_HAS_RELFILELOCATORS: u32 = 1 << 2;
const XACT_XINFO_HAS_INVALS: u32 = 1 << 3;
const XACT_XINFO_HAS_TWOPHASE: u32 = 1 << 4;
const XACT_XINFO_HAS_DROPPED_STATS: u32 = 1 << 8;

/// Bytes of the time at the start of a commit or abort.
const TIME_BYTES: u64 = 8;
/// `xl_xact_dbinfo`
const DBINFO_BYTES: u64 = 8;
/// A transaction id.
const XID_BYTES: u64 = 4;
/// `RelFileLocator`
const RELATION_BYTES: u64 = 12;
/// `SharedInvalidationMessage`
const INVALIDATION_BYTES: u64 = 16;

/// `xl_xact_stats_item`
fn stats_item_bytes(major: u32) -> u64 {
    if major >= 18 { 16 } else { 12 }
}

/// The parts that may follow, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Xinfo,
    SubxactCount,
    RelationCount,
    StatsCount,
    InvalidationCount,
    TwophaseXid,
    Done,
}

/// Picks the transaction of a prepared one out of the main data of its commit or abort record,
/// which comes in pieces and may be long: it lies behind the lists of subtransactions, relations
/// and cache invalidations.
#[derive(Clone, Debug)]
pub(super) struct PreparedXid {
    part: Part,
    is_commit: bool,
    stats_item_bytes: u64,
    xinfo: u32,
    /// Bytes to pass over before the next word.
    skip_bytes: u64,
    /// The word being collected.
    word: u32,
    word_bytes_filled: u32,
    xid: Option<u32>,
}

impl PreparedXid {
    pub(super) fn new(info: u8, major: u32, is_commit: bool) -> Self {
        Self {
            // Without flags there is no prepared transaction in the record.
            part: if info & XLOG_XACT_HAS_INFO == 0 { Part::Done } else { Part::Xinfo },
            is_commit,
            stats_item_bytes: stats_item_bytes(major),
            xinfo: 0,
            skip_bytes: TIME_BYTES,
            word: 0,
            word_bytes_filled: 0,
            xid: None,
        }
    }

    /// Takes in the next bytes of the main data.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while self.part != Part::Done {
            let skip = usize::try_from(self.skip_bytes).unwrap_or(usize::MAX).min(rest.len());
            self.skip_bytes -= skip as u64;
            let Some((first, later)) = rest.get(skip..).and_then(<[u8]>::split_first) else {
                return;
            };
            self.word |= u32::from(*first) << (8 * self.word_bytes_filled);
            self.word_bytes_filled += 1;
            rest = later;
            if self.word_bytes_filled == 4 {
                let word = std::mem::take(&mut self.word);
                self.word_bytes_filled = 0;
                self.take_word(word);
            }
        }
    }

    /// The transaction, once its bytes were fed.
    pub(super) fn xid(&self) -> Option<u32> {
        self.xid
    }

    fn take_word(&mut self, word: u32) {
        let count = u64::from(word);
        match self.part {
            Part::Xinfo => {
                self.xinfo = word;
                if word & XACT_XINFO_HAS_DBINFO != 0 {
                    self.skip_bytes = DBINFO_BYTES;
                }
            }
            Part::SubxactCount => self.skip_bytes = count * XID_BYTES,
            Part::RelationCount => self.skip_bytes = count * RELATION_BYTES,
            Part::StatsCount => self.skip_bytes = count * self.stats_item_bytes,
            Part::InvalidationCount => self.skip_bytes = count * INVALIDATION_BYTES,
            Part::TwophaseXid => self.xid = Some(word),
            Part::Done => {}
        }
        self.part = self.part_after(self.part);
    }

    fn part_after(&self, part: Part) -> Part {
        let has = |flag: u32| self.xinfo & flag != 0;
        let order = [
            (Part::SubxactCount, has(XACT_XINFO_HAS_SUBXACTS)),
            (Part::RelationCount, has(XACT_XINFO_HAS_RELFILELOCATORS)),
            (Part::StatsCount, has(XACT_XINFO_HAS_DROPPED_STATS)),
            (Part::InvalidationCount, self.is_commit && has(XACT_XINFO_HAS_INVALS)),
            (Part::TwophaseXid, has(XACT_XINFO_HAS_TWOPHASE)),
        ];
        let passed = order.iter().position(|row| row.0 == part).map_or(0, |index| index + 1);
        order.iter().skip(passed).find(|row| row.1).map_or(Part::Done, |row| row.0)
    }
}

/// The start of a `PREPARE TRANSACTION` record (`xl_xact_prepare`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Prepare {
    pub(super) xid: u32,
    pub(super) time: PgTime,
    pub(super) gid: String,
}

impl Prepare {
    pub(super) fn decode(data: &[u8], major: u32) -> Option<Self> {
        // 15 put two counts of dropped statistics before the length of the identifier.
        let (gid_length_offset, gid_offset) = if major >= 15 { (54, 72) } else { (46, 64) };
        let gid_length = usize::from(u16_at(data, gid_length_offset)?);
        let gid = data.get(gid_offset..)?.get(..gid_length)?;
        Some(Self { xid: u32_at(data, 8)?, time: PgTime(i64_at(data, 16)?), gid: c_string(gid) })
    }
}
