//! Finding landmarks in a stream of WAL at little cost.
//!
//! # Shape
//! Bytes of one timeline's WAL, contiguous, in any chunks. Memory is a few hundred bytes whatever
//! the records hold: of a record of interest the first [`PREFIX_BYTES`] are kept, and the one fact
//! that may lie deeper (the transaction of a `COMMIT PREPARED`) is picked out as it passes by.
//!
//! # Source
//! `xact_redo`, `ParseCommitRecord`, `ParseAbortRecord` in `xact.c` and `xactdesc.c`; `xlog_redo` in
//! `xlog.c`; `tblspc_redo` in `tablespace.c`; the structures in
//! `src/include/access/{xact,xlog_internal}.h`, `src/include/catalog/pg_control.h` and
//! `src/include/commands/tablespace.h`; read on 13 to 18.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use super::assembler::{Assembler, CrcCheck, Sink, WholeRecord, XLOG_SWITCH};
use super::landmark::{CheckpointKind, Landmark};
use super::page::{RecordHeader, damaged_record};
use super::record::main_data_of_prefix;
use super::rmgr::RmgrId;
use super::xact::{self, PreparedXid};
use crate::error::Result;
use crate::pg::bytes::{i64_at, u32_at, u64_at};
use crate::pg::control::StandbyLimits;
use crate::pg::{Checkpoint, Lsn, LsnRange, PgTime, SegmentSize, SystemId, TimelineId};

/// How much of the body of an interesting record is kept: more than the fixed part of any, with the
/// longest name, global identifier and path (`MAXPGPATH` is 1024).
const PREFIX_BYTES: usize = 1100;

const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const XLOG_CHECKPOINT_ONLINE: u8 = 0x10;
const XLOG_BACKUP_END: u8 = 0x50;
const XLOG_PARAMETER_CHANGE: u8 = 0x60;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XLOG_END_OF_RECOVERY: u8 = 0x90;
const XLOG_TBLSPC_CREATE: u8 = 0x00;

/// Seconds from the Unix epoch to PostgreSQL's.
const PG_EPOCH_UNIX_S: i64 = 946_684_800;

/// Finds the landmarks in a contiguous stream of WAL that comes in any chunks, and checks page
/// headers, the chain of records and their CRCs on the way.
#[derive(Debug)]
pub struct Scanner {
    assembler: Assembler,
    pick: Pick,
}

impl Scanner {
    /// Begins at `start`, the start of a WAL page (a multiple of 8192). A record that began before
    /// is skipped.
    #[must_use]
    pub fn new(segment_size: SegmentSize, start: Lsn) -> Self {
        Self { assembler: Assembler::new(segment_size, start), pick: Pick::default() }
    }

    /// Turns the CRC check on (the default) or off.
    #[must_use]
    pub fn with_crc_check(mut self, check: CrcCheck) -> Self {
        self.assembler.set_crc_check(check);
        self
    }

    /// Refuses WAL whose segments say that they belong to another cluster.
    #[must_use]
    pub fn with_system_id(mut self, expected: SystemId) -> Self {
        self.assembler.set_system_id(expected);
        self
    }

    /// For WAL that a server sends, or that one has sent: it ends where the last byte is, so zeros where a
    /// page or a record should begin are no end of it. Behind a switch they are padding, also where a
    /// scan begins in the middle of that.
    #[must_use]
    pub fn of_sent_wal(mut self) -> Self {
        self.assembler.set_sent();
        self
    }

    /// Takes in the bytes at [`Scanner::position`] and gives the landmarks whose last byte is among
    /// them, in order.
    ///
    /// # Errors
    /// `corrupt` or `unsupported`, naming the position. The scanner takes no more bytes then; what
    /// it gave before is right, and its positions stay. A segment file of a running server may hold
    /// pages of an older segment behind its end: reading them ends with such an error, at
    /// `last_record_end`.
    pub fn feed(&mut self, bytes: &[u8], found: &mut dyn FnMut(Landmark)) -> Result<()> {
        self.assembler.feed(bytes, &mut Picker { pick: &mut self.pick, found })
    }

    /// Position of the next byte to feed.
    #[must_use]
    pub fn position(&self) -> Lsn {
        self.assembler.position()
    }

    /// End of the last record that is complete (PostgreSQL's `EndRecPtr`), which is where the first
    /// record not yet complete begins, or the page that holds it; never after
    /// [`Scanner::position`]. The padding behind a switch counts as complete. Before the end of the
    /// first record this is where the scanner began.
    #[must_use]
    pub fn last_record_end(&self) -> Lsn {
        self.assembler.last_record_end()
    }

    /// Whether no record has been begun and not ended at [`Scanner::position`].
    #[must_use]
    pub fn at_record_boundary(&self) -> bool {
        self.assembler.at_record_boundary()
    }

    /// Whether zeros were found where a record could begin: the end of the WAL in a segment file
    /// that is not full. The end itself is [`Scanner::last_record_end`].
    #[must_use]
    pub fn is_behind_end(&self) -> bool {
        self.assembler.is_behind_end()
    }

    /// Timeline of the last page, `None` before the first. The page in which a new timeline begins
    /// may still name the old one.
    #[must_use]
    pub fn timeline(&self) -> Option<TimelineId> {
        self.assembler.timeline()
    }

    /// Major version of the server that wrote the WAL, by the pages' magic number; `None` before
    /// the first page.
    #[must_use]
    pub fn major(&self) -> Option<u32> {
        self.assembler.major()
    }
}

/// Which record is being looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interest {
    Commit,
    Abort,
    CommitPrepared,
    AbortPrepared,
    Prepare,
    Checkpoint(CheckpointKind),
    BackupEnd,
    ParameterChange,
    RestorePoint,
    EndOfRecovery,
    Switch,
    Tablespace,
}

impl Interest {
    #[inline]
    fn of(header: &RecordHeader) -> Option<Self> {
        match header.rmgr {
            RmgrId::XACT => match header.info & xact::XLOG_XACT_OPMASK {
                xact::XLOG_XACT_COMMIT => Some(Self::Commit),
                xact::XLOG_XACT_PREPARE => Some(Self::Prepare),
                xact::XLOG_XACT_ABORT => Some(Self::Abort),
                xact::XLOG_XACT_COMMIT_PREPARED => Some(Self::CommitPrepared),
                xact::XLOG_XACT_ABORT_PREPARED => Some(Self::AbortPrepared),
                _ => None,
            },
            RmgrId::XLOG => match header.operation() {
                XLOG_CHECKPOINT_SHUTDOWN => Some(Self::Checkpoint(CheckpointKind::Shutdown)),
                XLOG_CHECKPOINT_ONLINE => Some(Self::Checkpoint(CheckpointKind::Online)),
                XLOG_SWITCH => Some(Self::Switch),
                XLOG_BACKUP_END => Some(Self::BackupEnd),
                XLOG_PARAMETER_CHANGE => Some(Self::ParameterChange),
                XLOG_RESTORE_POINT => Some(Self::RestorePoint),
                XLOG_END_OF_RECOVERY => Some(Self::EndOfRecovery),
                _ => None,
            },
            RmgrId::TABLESPACE if header.operation() == XLOG_TBLSPC_CREATE => {
                Some(Self::Tablespace)
            }
            _ => None,
        }
    }

    fn is_prepared(self) -> bool {
        matches!(self, Self::CommitPrepared | Self::AbortPrepared)
    }
}

/// What is kept of the record being looked at.
#[derive(Debug, Default)]
struct Pick {
    interest: Option<Interest>,
    major: u32,
    prefix: Vec<u8>,
    /// Set when the prefix is full and the record is of a prepared transaction.
    prepared: Option<PreparedXid>,
}

impl Pick {
    fn begin(&mut self, header: &RecordHeader, major: u32) {
        self.interest = Interest::of(header);
        self.major = major;
        self.prefix.clear();
        self.prepared = None;
    }

    fn body(&mut self, header_info: u8, piece: &[u8]) {
        let Some(interest) = self.interest else { return };
        let room = PREFIX_BYTES - self.prefix.len();
        let (now, later) = piece.split_at_checked(room).unwrap_or((piece, &[]));
        self.prefix.extend_from_slice(now);
        if later.is_empty() || !interest.is_prepared() {
            return;
        }
        if self.prepared.is_none() {
            self.prepared = self.begin_prepared(interest, header_info);
        }
        if let Some(prepared) = &mut self.prepared {
            prepared.feed(later);
        }
    }

    fn begin_prepared(&self, interest: Interest, header_info: u8) -> Option<PreparedXid> {
        let mut prepared =
            PreparedXid::new(header_info, self.major, interest == Interest::CommitPrepared);
        prepared.feed(main_data_of_prefix(&self.prefix, self.major)?);
        Some(prepared)
    }

    /// The landmark of a record that is complete, or `None` when it cannot be read.
    fn landmark(
        &self,
        interest: Interest,
        header: &RecordHeader,
        range: LsnRange,
    ) -> Option<Landmark> {
        if interest == Interest::Switch {
            return Some(Landmark::Switch { range });
        }
        let data = main_data_of_prefix(&self.prefix, self.major)?;
        let time = |offset| i64_at(data, offset).map(PgTime);
        Some(match interest {
            Interest::Commit => Landmark::Commit { xid: header.xid, time: time(0)?, range },
            Interest::Abort => {
                Landmark::Abort { xid: header.xid, time: time(0)?, prepared: false, range }
            }
            Interest::CommitPrepared => {
                Landmark::Commit { xid: self.prepared_xid(header)?, time: time(0)?, range }
            }
            Interest::AbortPrepared => {
                let xid = self.prepared_xid(header)?;
                Landmark::Abort { xid, time: time(0)?, prepared: true, range }
            }
            Interest::Prepare => {
                let prepare = xact::Prepare::decode(data, self.major)?;
                Landmark::Prepare { xid: prepare.xid, time: prepare.time, gid: prepare.gid, range }
            }
            Interest::Checkpoint(kind) => {
                let checkpoint = Checkpoint::decode(data)?;
                Landmark::Checkpoint {
                    kind,
                    redo_lsn: checkpoint.redo_lsn,
                    time: from_unix_s(checkpoint.time_unix_s),
                    timeline: checkpoint.timeline,
                    range,
                }
            }
            Interest::BackupEnd => Landmark::BackupEnd { start_lsn: Lsn(u64_at(data, 0)?), range },
            Interest::ParameterChange => Landmark::ParameterChange {
                limits: StandbyLimits {
                    max_connections: u32_at(data, 0)?,
                    max_worker_processes: u32_at(data, 4)?,
                    max_wal_senders: u32_at(data, 8)?,
                    max_prepared_transactions: u32_at(data, 12)?,
                    max_locks_per_transaction: u32_at(data, 16)?,
                },
                wal_level: u32_at(data, 20)?,
                range,
            },
            Interest::RestorePoint => {
                Landmark::RestorePoint { name: c_string(data.get(8..)?), time: time(0)?, range }
            }
            Interest::EndOfRecovery => Landmark::EndOfRecovery {
                time: time(0)?,
                timeline: TimelineId::new(u32_at(data, 8)?)?,
                previous_timeline: TimelineId::new(u32_at(data, 12)?)?,
                range,
            },
            Interest::Switch => Landmark::Switch { range },
            Interest::Tablespace => {
                let path = data.get(4..)?.split(|byte| *byte == 0).next().unwrap_or_default();
                let path = PathBuf::from(OsStr::from_bytes(path));
                Landmark::Tablespace { oid: u32_at(data, 0)?, path, range }
            }
        })
    }

    fn prepared_xid(&self, header: &RecordHeader) -> Option<u32> {
        match &self.prepared {
            Some(prepared) => prepared.xid(),
            None => self.begin_prepared(self.interest?, header.info)?.xid(),
        }
    }
}

/// A [`Pick`] at work: what it needs besides is there only during a call of `feed`.
struct Picker<'a> {
    pick: &'a mut Pick,
    found: &'a mut dyn FnMut(Landmark),
}

impl Sink for Picker<'_> {
    #[inline]
    fn begin(&mut self, header: &RecordHeader, major: u32) {
        self.pick.begin(header, major);
    }

    #[inline]
    fn body(&mut self, header: &RecordHeader, piece: &[u8]) {
        self.pick.body(header.info, piece);
    }

    #[inline]
    fn whole(&mut self, record: &WholeRecord<'_>) -> Result<()> {
        // Nearly every record: nothing is kept, nothing was.
        if Interest::of(record.header).is_none() {
            return Ok(());
        }
        self.begin(record.header, record.major);
        self.body(record.header, record.body);
        self.end(record.header, record.range)
    }

    fn end(&mut self, header: &RecordHeader, range: LsnRange) -> Result<()> {
        let Some(interest) = self.pick.interest else { return Ok(()) };
        let landmark = self.pick.landmark(interest, header, range).ok_or_else(|| {
            let (rmgr, info) = (header.rmgr, header.info);
            let what =
                format!("the contents of a {rmgr} record with info {info:02X} are too short");
            damaged_record(range.start(), &what)
        })?;
        (self.found)(landmark);
        Ok(())
    }
}

/// The text up to the first zero byte; names that are not UTF-8 are shown as well as they can be.
pub(super) fn c_string(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

fn from_unix_s(seconds: i64) -> PgTime {
    PgTime(seconds.saturating_sub(PG_EPOCH_UNIX_S).saturating_mul(1_000_000))
}
