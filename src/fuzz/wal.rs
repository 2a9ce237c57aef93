//! WAL: the scanner and the reader agree with each other and with themselves however the bytes are
//! cut, and what is laid out as a server does is read back as it was.

use std::os::unix::ffi::OsStringExt as _;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;

use super::input::{Input, pieces};
use crate::capture::stream::cutter::{Cut, CutPolicy, CutReason};
use crate::capture::stream::intake::{Intake, Step, Unreadable};
use crate::capture::stream::overlap::{self, Overlap};
use crate::capture::stream::resume::Attempt;
use crate::clock::{Clock, Instant};
use crate::error::{Kind, Result};
use crate::pg::bytes::{i64_at, u16_at, u32_at, u64_at};
use crate::pg::control::StandbyLimits;
use crate::pg::{Checkpoint, Lsn, LsnRange, PgTime, SegmentSize, TimelineId, crc32c};
use crate::wal::craft::Craft;
use crate::wal::{CheckpointKind, CrcCheck, Landmark, Record, RecordReader, RmgrId, Scanner};

const MIB: u64 = 1 << 20;
const PAGE: usize = 8192;
/// `XLOG_PAGE_MAGIC` of 13 to 18.
const MAGICS: [u16; 6] = [0xD106, 0xD10D, 0xD110, 0xD113, 0xD116, 0xD118];
/// A segment's start, a page inside, and the last pages of a segment of 1 MiB.
const STARTS: [Lsn; 4] =
    [Lsn(5 * MIB), Lsn(5 * MIB + 8192), Lsn(6 * MIB - 2 * 8192), Lsn(6 * MIB - 8 * 8192)];
/// Room left in a segment for which filling it up with zeros is worth the time.
const PADDING_BYTES_MAX: u64 = 8 * 8192;
/// Crafted WAL ends when it is this long.
const CRAFTED_BYTES_MAX: usize = 128 << 10;
/// The body of a record of interest is kept to this length by the scanner.
const PREFIX_BYTES: usize = 1100;
const POSTGRES_EPOCH_UNIX_S: i64 = 946_684_800;

/// The segment size in all of this: the smallest there is.
pub(super) fn segment_size() -> SegmentSize {
    SegmentSize::new(1 << 20).expect("1 MiB is a segment size")
}

/// Pages as they come: as they are, or mended so that damage gets past headers, chain and CRC.
pub(super) fn pages(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let start = input.choose(&STARTS);
    let flags = input.byte();
    let check = if flags & 1 == 0 { CrcCheck::Every } else { CrcCheck::None };
    let sizes = input.sizes();
    let mut wal = input.rest().to_vec();
    if flags & 2 != 0 {
        mend_wal(&mut wal, start);
    }
    judge(&wal, start, check, &sizes);
}

/// Records of any content, laid out as a server does it, perhaps damaged afterwards.
pub(super) fn records(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let major = u32::from(input.byte()) % 6 + 13;
    let start = input.choose(&STARTS);
    let sizes = input.sizes();
    let damage = input.u16();
    let (wal, expected) = crafted(major, start, &mut input);
    let mut wal = wal;
    let place = usize::from(damage) * 7;
    let damaged = damage != 0 && place < wal.len();
    if damaged {
        wal[place] ^= 0x41;
    }
    let (records, error) = judge(&wal, start, CrcCheck::Every, &sizes);
    if damaged {
        return;
    }
    for (record, expected) in records.iter().zip(&expected) {
        assert_eq!(record, expected);
    }
    let unreadable = error.as_deref().is_some_and(|why| why.contains("there is no resource"));
    let whole = records.len() == expected.len() && error.is_none();
    assert!(whole || unreadable || error.is_some_and(|why| is_body_flaw(&why)));
}

/// The WAL of PostgreSQL `major` that an input of the target `wal_pages` means, mended.
#[must_use]
pub fn wal_of_pages(input: &[u8], major: u32) -> (Lsn, Vec<u8>) {
    let mut input = Input::new(input);
    let start = input.choose(&STARTS);
    let _flags = input.byte();
    let _sizes = input.sizes();
    let mut wal = input.rest().to_vec();
    if let Some(first) = wal.get_mut(..2) {
        first.copy_from_slice(&MAGICS[major as usize - 13].to_le_bytes());
    }
    mend_wal(&mut wal, start);
    (start, wal)
}

/// The WAL of PostgreSQL `major` that an input of the target `wal_records` means, undamaged.
#[must_use]
pub fn wal_of_records(input: &[u8], major: u32) -> (Lsn, Vec<u8>) {
    let mut input = Input::new(input);
    let _major = input.byte();
    let start = input.choose(&STARTS);
    let _sizes = input.sizes();
    let _damage = input.u16();
    (start, crafted(major, start, &mut input).0)
}

/// What is known of a crafted record beforehand: all but its contents.
type Known = (LsnRange, u8, u8, u32);

fn crafted(major: u32, start: Lsn, input: &mut Input<'_>) -> (Vec<u8>, Vec<Known>) {
    let mut wal = Craft::new(major, segment_size(), start);
    let mut expected = Vec::new();
    while !input.is_empty() && wal.bytes.len() < CRAFTED_BYTES_MAX {
        let room = segment_size().end_of(wal.position()).saturating_since(wal.position());
        let short = room <= PADDING_BYTES_MAX;
        match input.byte() % 16 {
            0 => {
                let (xid, time) = (input.u32(), PgTime(input.u64().cast_signed()));
                expected.push((wal.commit(xid, time), 1, 0, xid));
            }
            1 => {
                let length = usize::from(input.u16()) % 20_000;
                expected.push((wal.filler(length), 10, 0, 5));
            }
            2 if short => expected.push((wal.switch(), 0, 0x40, 0)),
            3 if short => {
                wal.zeros_to_segment_end();
                break;
            }
            4 => {
                wal.cut_off_record(8192 + usize::from(input.u16()) % 8192);
                // The record in its place says where the lost one began.
                let page = wal.position().align_down(PAGE as u64);
                let long = segment_size().start_of(page) == page;
                let begin = Lsn(page.0 + if long { 40 } else { 24 });
                let range = LsnRange::new(begin, wal.position()).expect("a page has a header");
                expected.push((range, 0, 0xD0, 0));
            }
            5 => wal.timeline = wal.timeline.saturating_add(1),
            kind => {
                let (rmgr, info, xid) = (input.byte(), input.byte(), u32::from(input.u16()));
                // Mostly the two resource managers that the scanner knows.
                let rmgr = if kind < 12 { rmgr % 2 } else { rmgr };
                let length = usize::from(input.u16()) % 3000;
                if (rmgr, info & 0xF0) != (0, 0x40) {
                    let range = wal.body((rmgr, info), xid, input.take(length));
                    expected.push((range, rmgr, info, xid));
                }
            }
        }
    }
    (wal.bytes, expected)
}

/// The end of a reading.
#[derive(Debug, PartialEq, Eq)]
struct End {
    error: Option<String>,
    position: Lsn,
    last_record_end: Lsn,
    at_record_boundary: bool,
    is_behind_end: bool,
    timeline: Option<TimelineId>,
}

/// A record as far as two readings of it are compared, and the landmark it must be.
#[derive(Debug, PartialEq, Eq)]
struct Read {
    known: Known,
    text: String,
    landmark: Expected,
}

fn read<'a>(start: Lsn, check: CrcCheck, cut: impl Iterator<Item = &'a [u8]>) -> (Vec<Read>, End) {
    let mut reader = RecordReader::new(segment_size(), start).with_crc_check(check);
    let (mut found, mut error) = (Vec::new(), None);
    for piece in cut {
        let each = &mut |record: &Record<'_>| {
            found.push(Read {
                known: (record.range, record.rmgr.0, record.info, record.xid),
                text: described(record),
                landmark: Expected::of(record),
            });
            Ok(())
        };
        if let Err(why) = reader.feed(piece, each) {
            error = Some(why.to_string());
            assert!(reader.feed(b"more", &mut |_| panic!("a record behind an error")).is_err());
            break;
        }
    }
    let end = End {
        error,
        position: reader.position(),
        last_record_end: reader.last_record_end(),
        at_record_boundary: reader.at_record_boundary(),
        is_behind_end: reader.is_behind_end(),
        timeline: reader.timeline(),
    };
    (found, end)
}

fn scan<'a>(
    start: Lsn,
    check: CrcCheck,
    cut: impl Iterator<Item = &'a [u8]>,
) -> (Vec<Landmark>, End) {
    let mut scanner = Scanner::new(segment_size(), start).with_crc_check(check);
    let (mut found, mut error) = (Vec::new(), None);
    for piece in cut {
        if let Err(why) = scanner.feed(piece, &mut |landmark| found.push(landmark)) {
            error = Some(why.to_string());
            break;
        }
    }
    let end = End {
        error,
        position: scanner.position(),
        last_record_end: scanner.last_record_end(),
        at_record_boundary: scanner.at_record_boundary(),
        is_behind_end: scanner.is_behind_end(),
        timeline: scanner.timeline(),
    };
    (found, end)
}

fn described(record: &Record<'_>) -> String {
    let mut text = format!(
        "{} {} {} {} {:02X} {} {} {:?} {:?} {:08x}",
        record.range,
        record.major,
        record.length_bytes,
        record.xid,
        record.info,
        record.rmgr,
        record.previous_lsn,
        record.origin,
        record.toplevel_xid,
        crc32c(record.main_data)
    );
    let mut parts_bytes = record.main_data.len();
    for block in &record.blocks {
        let image = block.image.map(|image| {
            parts_bytes += image.bytes.len();
            assert!(image.hole_offset + image.hole_length <= 8192);
            let restored = image.restore_uncompressed().map(|page| crc32c(&page));
            (image.apply, image.compression, crc32c(image.bytes), restored)
        });
        parts_bytes += block.data.len();
        let (id, relation, fork) = (block.id, block.relation, block.fork);
        let data = crc32c(block.data);
        text += &format!(" #{id} {relation} {fork:?} {} {image:?} {data:08x}", block.block_number);
    }
    let length_bytes = record.length_bytes as usize;
    assert!(24 + parts_bytes <= length_bytes, "a record holds more than its length says");
    assert!(record.range.len_bytes() >= u64::from(record.length_bytes));
    text
}

/// Whether it is the reader alone that sees this: the scanner does not take all bodies apart.
fn is_body_flaw(error: &str) -> bool {
    ["its parts are longer", "block reference", "page image"].iter().any(|why| error.contains(why))
}

/// Reads `wal` in all ways and compares; gives what is known of the records and the error.
fn judge(wal: &[u8], start: Lsn, check: CrcCheck, sizes: &[usize]) -> (Vec<Known>, Option<String>) {
    let (records, read_end) = read(start, check, std::iter::once(wal));
    let (pieced, pieced_end) = read(start, check, pieces(wal, sizes));
    assert_eq!(records, pieced);
    assert_ends(&read_end, &pieced_end);
    let (landmarks, scan_end) = scan(start, check, std::iter::once(wal));
    let (pieced, pieced_end) = scan(start, check, pieces(wal, sizes));
    assert_eq!(landmarks, pieced);
    assert_ends(&scan_end, &pieced_end);

    let mut before = start;
    for record in &records {
        let range = record.known.0;
        assert!(before <= range.start() && range.start().0.is_multiple_of(8), "{range}");
        before = range.end();
    }
    assert!(read_end.last_record_end <= read_end.position);
    assert!(read_end.position.saturating_since(start) <= wal.len() as u64);

    let known = records.iter().map(|record| record.known).collect();
    let mut landmarks = landmarks.into_iter();
    for record in records {
        match record.landmark {
            Expected::Nothing => {}
            Expected::Exactly(expected) => assert_eq!(landmarks.next(), Some(expected)),
            Expected::TooShort => {
                assert_eq!(landmarks.next(), None);
                assert!(scan_end.error.is_some_and(|why| why.contains("too short")));
                return (known, read_end.error);
            }
        }
    }
    if !read_end.error.as_deref().is_some_and(is_body_flaw) {
        assert_eq!(landmarks.next(), None);
        assert_ends(&read_end, &scan_end);
    }
    (known, read_end.error)
}

/// After an error the position is somewhere in the piece that held it; else all is the same.
fn assert_ends(one: &End, other: &End) {
    assert_eq!(one.error, other.error);
    assert_eq!(one.last_record_end, other.last_record_end);
    if one.error.is_none() {
        assert_eq!(one, other);
    }
}

/// What the scanner must make of a record.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    Nothing,
    TooShort,
    Exactly(Landmark),
}

impl Expected {
    /// By the whole of the main data, where the scanner has the pieces that came by.
    fn of(record: &Record<'_>) -> Self {
        let interesting = match record.rmgr {
            RmgrId::XACT => record.info & 0x70 <= 0x40,
            RmgrId::XLOG => {
                matches!(record.info & 0xF0, 0x00 | 0x10 | 0x40 | 0x50 | 0x60 | 0x70 | 0x90)
            }
            RmgrId::TABLESPACE => record.info & 0xF0 == 0x00,
            _ => false,
        };
        if !interesting {
            return Self::Nothing;
        }
        if (record.rmgr, record.info & 0xF0) == (RmgrId::XLOG, 0x40) {
            return Self::Exactly(Landmark::Switch { range: record.range });
        }
        if !record.blocks.is_empty() {
            return Self::TooShort;
        }
        let body_bytes = record.length_bytes as usize - 24;
        let room = PREFIX_BYTES.saturating_sub(body_bytes - record.main_data.len());
        let prefix = record.main_data.get(..room).unwrap_or(record.main_data);
        // A record may have no main data at all, not even the mark that says how much.
        if body_bytes == 0 || record.main_data.is_empty() {
            return Self::TooShort;
        }
        let landmark = match record.rmgr {
            RmgrId::XACT => transaction(record, prefix),
            RmgrId::TABLESPACE => tablespace(record, prefix),
            _ => log_record(record, prefix),
        };
        landmark.map_or(Self::TooShort, Self::Exactly)
    }
}

fn transaction(record: &Record<'_>, data: &[u8]) -> Option<Landmark> {
    let range = record.range;
    let time = || i64_at(data, 0).map(PgTime);
    let prepared = |commit| prepared_xid(record, commit);
    Some(match record.info & 0x70 {
        0x00 => Landmark::Commit { xid: record.xid, time: time()?, range },
        0x20 => Landmark::Abort { xid: record.xid, time: time()?, prepared: false, range },
        0x30 => Landmark::Commit { xid: prepared(true)?, time: time()?, range },
        0x40 => Landmark::Abort { xid: prepared(false)?, time: time()?, prepared: true, range },
        _ => {
            let (length, gid) = if record.major >= 15 { (54, 72) } else { (46, 64) };
            let gid = data.get(gid..gid + usize::from(u16_at(data, length)?))?;
            let time = PgTime(i64_at(data, 16)?);
            Landmark::Prepare { xid: u32_at(data, 8)?, time, gid: text(gid), range }
        }
    })
}

/// `ParseCommitRecord` and `ParseAbortRecord`, on all of the record at once.
fn prepared_xid(record: &Record<'_>, commit: bool) -> Option<u32> {
    let data = record.main_data;
    if record.info & 0x80 == 0 {
        return None;
    }
    let flags = u32_at(data, 8)?;
    let mut place = 12_usize;
    if flags & 1 != 0 {
        place += 8;
    }
    let stats_bytes = if record.major >= 18 { 16 } else { 12 };
    let lists =
        [(1 << 1, 4, true), (1 << 2, 12, true), (1 << 8, stats_bytes, true), (1 << 3, 16, commit)];
    for (flag, item_bytes, present) in lists {
        if flags & flag != 0 && present {
            let count = u32_at(data, place)? as usize;
            place = place.checked_add(4)?.checked_add(count.checked_mul(item_bytes)?)?;
        }
    }
    (flags & 1 << 4 != 0).then(|| u32_at(data, place)).flatten()
}

fn log_record(record: &Record<'_>, data: &[u8]) -> Option<Landmark> {
    let range = record.range;
    let time = || i64_at(data, 0).map(PgTime);
    let timeline = |offset| TimelineId::new(u32_at(data, offset)?);
    Some(match record.info & 0xF0 {
        info @ (0x00 | 0x10) => {
            let checkpoint = Checkpoint::decode(data)?;
            let seconds = checkpoint.time_unix_s.saturating_sub(POSTGRES_EPOCH_UNIX_S);
            Landmark::Checkpoint {
                kind: if info == 0 { CheckpointKind::Shutdown } else { CheckpointKind::Online },
                redo_lsn: checkpoint.redo_lsn,
                time: PgTime(seconds.saturating_mul(1_000_000)),
                timeline: checkpoint.timeline,
                range,
            }
        }
        0x50 => Landmark::BackupEnd { start_lsn: Lsn(u64_at(data, 0)?), range },
        0x60 => Landmark::ParameterChange {
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
        0x70 => Landmark::RestorePoint { name: text(data.get(8..)?), time: time()?, range },
        _ => Landmark::EndOfRecovery {
            time: time()?,
            timeline: timeline(8)?,
            previous_timeline: timeline(12)?,
            range,
        },
    })
}

fn tablespace(record: &Record<'_>, data: &[u8]) -> Option<Landmark> {
    let path = data.get(4..)?;
    let end = path.iter().position(|byte| *byte == 0).unwrap_or(path.len());
    let path = std::ffi::OsString::from_vec(path[..end].to_vec()).into();
    Some(Landmark::Tablespace { oid: u32_at(data, 0)?, path, range: record.range })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

/// Received WAL is stored as it came: no byte is lost, made up or moved by cutting it into extents,
/// and damage does not change that.
pub(super) fn intake(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let start = input.choose(&STARTS);
    let store_from = Lsn(start.0 + u64::from(input.u16()) % 20_000);
    let known_start = Lsn(store_from.0 + 1 + u64::from(input.u16()) % 40_000);
    let known_end = Lsn(known_start.0 + 1 + u64::from(input.u16()) % 40_000);
    let sizes = input.sizes();
    let mended = input.byte() & 1 != 0;
    let mut wal = input.rest().to_vec();
    if mended {
        mend_wal(&mut wal, start);
    }
    let wal = Bytes::from(wal);
    let attempt = Attempt {
        timeline: TimelineId::FIRST,
        stream_from: start,
        store_from,
        known: LsnRange::new(known_start, known_end).into_iter().collect(),
        gap: None,
    };
    let position = Lsn(start.0 + wal.len() as u64);
    let mut unreadable = Unreadable::default();
    // The WAL is of two segments at most, and damage in each is reported twice, a minute apart.
    let began = Clock::simulated(Timestamp::UNIX_EPOCH, 1).instant();
    let tries = (0..5).map(|minute| began + Duration::from_mins(minute)).find_map(|now| {
        match receive((&attempt, now), &wal, &sizes, &mut unreadable) {
            Err(error) if error.kind() == Kind::Corrupt => None,
            outcome => Some(outcome),
        }
    });
    let Ok(steps) = tries.expect("what was refused for long at one place is taken there") else {
        return;
    };

    let (mut next, mut extent_start) = (store_from, None);
    let mut stored = Vec::new();
    for step in steps {
        match step {
            Step::Store { start: at, piece } => {
                if at == known_end && next == known_start {
                    next = known_end;
                }
                assert_eq!(at, next, "stored bytes follow each other");
                let from = at.saturating_since(start) as usize;
                assert_eq!(piece, wal[from..from + piece.len()]);
                extent_start.get_or_insert(at);
                next = Lsn(at.0 + piece.len() as u64);
            }
            Step::Cut(extent) => {
                let range = extent.cut.range;
                assert_eq!(Some(range.start()), extent_start.take());
                assert_eq!(range.end(), next);
                let last = Lsn(range.end().0 - 1);
                assert_eq!(segment_size().number_of(range.start()), segment_size().number_of(last));
                assert!(extent.boundary <= range.end());
                for barrier in &extent.barriers {
                    // What is marked is not behind the extent, and what it says begins before its end.
                    assert!(barrier.range.start() < range.end(), "{barrier:?} {range}");
                    assert!(barrier.range.is_empty() || barrier.range.end() >= range.end());
                }
                stored.push(extent.cut);
            }
            Step::Boundary(at) => assert!(at <= position),
            Step::Barrier(barrier) => {
                assert!(start <= barrier.range.start() && barrier.range.start() <= position);
            }
        }
    }
    assert_eq!(extent_start, None, "bytes were left behind");
    let stored_all =
        if position > known_end || position <= known_start { position } else { known_start };
    assert_eq!(next, stored_all.max(store_from));
    check_sent_again(&attempt, &stored, unreadable, wal);
}

/// One connection on which all of `wal` comes, in pieces.
///
/// # Errors
/// `unsupported` when it begins with a page of no server that is known, and `corrupt`, which is noted.
fn receive(
    (attempt, now): (&Attempt, Instant),
    wal: &Bytes,
    sizes: &[usize],
    unreadable: &mut Unreadable,
) -> Result<Vec<Step>> {
    let mut intake = Intake::new(policy(), attempt, Overlap::default(), unreadable.clone());
    let mut steps = Vec::new();
    for piece in pieces(wal, sizes) {
        let piece = wal.slice_ref(piece);
        let end = Lsn(intake.received_end().0 + piece.len() as u64);
        if let Err(error) = intake.take(intake.received_end(), piece, now, &mut steps) {
            assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "{error}");
            unreadable.note(intake.last_record_end().expect("it was decoded"), now);
            unreadable.learn(&intake);
            return Err(error);
        }
        assert_eq!(intake.received_end(), end);
        assert!(intake.boundary() <= end);
        if intake.cutter().due(now).is_some() {
            intake.cut(CutReason::Commit, &mut steps);
        }
    }
    intake.cut(CutReason::StreamEnd, &mut steps);
    Ok(steps)
}

/// Each commit is due at once.
fn policy() -> CutPolicy {
    CutPolicy {
        segment_size: segment_size(),
        flush_interval: Duration::ZERO,
        idle_flush_interval: Duration::from_mins(1),
    }
}

/// A server that sends in one piece what was stored is not taken for one that was set back, and what is
/// `unreadable` in it begins at the same places.
fn check_sent_again(attempt: &Attempt, stored: &[Cut], unreadable: Unreadable, wal: Bytes) {
    let Some(last) = stored.last() else { return };
    let expected = stored.iter().filter_map(|cut| {
        let greatest_time = cut.greatest_time?;
        Some(overlap::Expected { timeline: attempt.timeline, range: cut.range, greatest_time })
    });
    let overlap = Overlap::new(expected.collect());
    let again = Attempt { store_from: last.range.end(), known: Vec::new(), ..attempt.clone() };
    let now = Clock::simulated(Timestamp::UNIX_EPOCH, 1).instant();
    let mut intake = Intake::new(policy(), &again, overlap, unreadable);
    intake.take(again.stream_from, wal, now, &mut Vec::new()).expect("this is what was stored");
}

/// Makes `wal`, pages from `start` on, right again as far as it can be: addresses, flags and lengths
/// in page headers, the chain of records and their CRCs. What the records say stays as it is.
pub fn mend_wal(wal: &mut [u8], start: Lsn) {
    let Some(first) = u16_at(wal, 0) else { return };
    let magic = if MAGICS.contains(&first) { first } else { MAGICS[usize::from(first) % 6] };
    let mut contents = Vec::with_capacity(wal.len());
    let first_continues = u16_at(wal, 2).is_some_and(|info| info & 1 != 0);
    let first_rest = u32_at(wal, 16).unwrap_or(0) as usize;
    for (number, page) in wal.chunks_mut(PAGE).enumerate() {
        let position = Lsn(start.0 + (number * PAGE) as u64);
        let long = segment_size().start_of(position) == position;
        let header_bytes = if long { 40 } else { 24 };
        if page.len() < header_bytes {
            break;
        }
        page[..2].copy_from_slice(&magic.to_le_bytes());
        page[2..4].copy_from_slice(&if long { 2_u16 } else { 0 }.to_le_bytes());
        page[4..8].copy_from_slice(&1_u32.to_le_bytes());
        page[8..16].copy_from_slice(&position.0.to_le_bytes());
        page[16..24].fill(0);
        if long {
            page[32..36].copy_from_slice(&(1_u32 << 20).to_le_bytes());
            page[36..40].copy_from_slice(&8192_u32.to_le_bytes());
        }
        contents.extend(number * PAGE + header_bytes..number * PAGE + page.len());
    }
    let mut at = 0;
    if first_continues && first_rest > 0 {
        let rest = first_rest.min(contents.len());
        continue_pages(wal, &contents[..rest], first_rest, Begun::Before);
        if first_rest >= contents.len() {
            return;
        }
        at = rest.next_multiple_of(8);
    }
    let mut previous = 0_u64;
    while let Some(places) = contents.get(at..).filter(|places| places.len() >= 24) {
        let word: Vec<u8> = places[..4].iter().map(|place| wal[*place]).collect();
        let length = u32_at(&word, 0).unwrap_or(0) as usize;
        let Some(record) = places.get(..length).filter(|_| length >= 24) else { return };
        let begin = start.0 + record[0] as u64;
        for (place, byte) in record[8..16].iter().zip(previous.to_le_bytes()) {
            wal[*place] = byte;
        }
        let covered = record[24..].iter().chain(&record[..20]);
        let covered: Vec<u8> = covered.map(|place| wal[*place]).collect();
        for (place, byte) in record[20..24].iter().zip(crc32c(&covered).to_le_bytes()) {
            wal[*place] = byte;
        }
        let switch = wal[record[17]] == 0 && wal[record[16]] & 0xF0 == 0x40;
        continue_pages(wal, record, length, Begun::Here);
        previous = begin;
        at += length.next_multiple_of(8);
        if switch {
            let end = segment_size().end_of(Lsn(begin));
            let later = contents.iter().position(|place| start.0 + *place as u64 >= end.0);
            let padding = at.min(contents.len())..later.unwrap_or(contents.len());
            for place in contents.get(padding).unwrap_or_default() {
                wal[*place] = 0;
            }
            let Some(later) = later else { return };
            at = later;
        }
    }
}

/// Says in the header of each page that `record` enters how much of its `length` is left there.
fn continue_pages(wal: &mut [u8], record: &[usize], length: usize, begun: Begun) {
    let mut page_before = match begun {
        Begun::Here => record.first().map(|place| place / PAGE),
        Begun::Before => None,
    };
    for (done, place) in record.iter().enumerate() {
        let page = place / PAGE;
        if Some(page) != page_before {
            page_before = Some(page);
            let rest = u32::try_from(length - done).unwrap_or(u32::MAX);
            wal[page * PAGE + 2] |= 1;
            wal[page * PAGE + 16..page * PAGE + 20].copy_from_slice(&rest.to_le_bytes());
        }
    }
}

/// Where a record begins.
enum Begun {
    Here,
    /// Before the first page.
    Before,
}
