//! Page checksums of a base backup, checked on the worker threads that compress it.
//!
//! A page that is being written while the server reads it may arrive half old, half new. PostgreSQL's
//! own check reads such a block again; we cannot from inside a stream, so every page that looks
//! damaged is a suspect, and after the copy the suspects are read again through SQL. One that was
//! changed since the start was torn, and replay writes it anew from the full-page image that the
//! running backup forced. One that was not has no such image: what was copied stays bad, however good
//! the page looks now.
//!
//! # Source
//! `sendFile` and `verify_page_checksum` in `src/backend/backup/basebackup.c`; `MarkBufferDirtyHint`
//! (a hint is a change with an image and a position too, where there are checksums);
//! `visibilitymap_clear`, `vm_readbuf`, `fsm_readbuf` (13 to 18).

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use crate::clock::Clock;
use crate::error::{Context, Error, Kind, Result};
use crate::pg::data_dir::{Fork, RelationFile};
use crate::pg::page::{BLCKSZ, PageVerdict, RELSEG_SIZE, verify_page};
use crate::pg::{Lsn, SystemId, TimelineId};
use crate::repo::{ChecksumFailure, FileMeta, Inspect};
use crate::wire::{ConnectOptions, Connection, Session};

/// How often a suspect is read again: the server may be writing it once more.
const READS_MAX: u32 = 3;
/// Between two reads of a suspect.
const READ_PAUSE: Duration = Duration::from_millis(100);
/// How often suspects are gone on with after what may pass: a restart of the server takes some seconds.
const TRIES_MAX: u32 = 5;
/// Before they are gone on with.
const TRY_PAUSE: Duration = Duration::from_secs(1);

/// Checks pages while they are packed.
#[derive(Debug)]
pub struct Pages {
    /// Where the backup starts: what was changed later is repaired by replay.
    start_lsn: Lsn,
    /// Whether pages carry checksums and somebody wants to know.
    check: Check,
}

/// Whether pages are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Each page of each relation file.
    Every,
    /// None.
    None,
}

impl Pages {
    /// For a backup that starts at `start_lsn`.
    #[must_use]
    pub fn new(start_lsn: Lsn, check: Check) -> Self {
        Self { start_lsn, check }
    }
}

impl Inspect for Pages {
    fn block(&self, file: &FileMeta, file_offset: u64, data: &[Bytes]) -> Vec<ChecksumFailure> {
        let relation = match (self.check, file.path.as_str()) {
            (Check::Every, Some(path)) => RelationFile::from_path(path),
            _ => None,
        };
        let Some(relation) = relation else { return Vec::new() };
        let mut failures = Vec::new();
        let mut offset = file_offset;
        for_each_page(data, |page| {
            if let Some(block) = relation.block_number_at(offset)
                && let PageVerdict::Mismatch { expected, found } =
                    verify_page(page, block, self.start_lsn)
            {
                failures.push(ChecksumFailure {
                    path: file.path.to_string(),
                    block,
                    expected,
                    found,
                });
            }
            offset += BLCKSZ as u64;
        });
        failures
    }
}

/// Calls `look` with each whole page of `data`; only pages that straddle two slices are copied. Bytes
/// after the last whole page are no page (PostgreSQL does not check them either).
fn for_each_page(data: &[Bytes], mut look: impl FnMut(&[u8; BLCKSZ])) {
    let mut straddling = [0; BLCKSZ];
    let mut held = 0;
    for slice in data {
        let mut rest: &[u8] = slice;
        if held > 0 {
            let take = rest.len().min(BLCKSZ - held);
            let (front, back) = rest.split_at(take);
            if let Some(room) = straddling.get_mut(held..held + take) {
                room.copy_from_slice(front);
            }
            (rest, held) = (back, held + take);
            if held < BLCKSZ {
                continue;
            }
            look(&straddling);
        }
        let (pages, tail) = rest.as_chunks::<BLCKSZ>();
        pages.iter().for_each(&mut look);
        if let Some(room) = straddling.get_mut(..tail.len()) {
            room.copy_from_slice(tail);
        }
        held = tail.len();
    }
}

/// Where pages were copied from, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline on which the backup started.
    pub timeline: TimelineId,
    /// Where the backup started.
    pub start_lsn: Lsn,
}

/// What reading the suspects again told; those that are in neither list are fine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rechecked {
    /// Damaged indeed.
    pub damaged: Vec<ChecksumFailure>,
    /// Could not be read again, so torn pages may be among them.
    pub unread: Vec<ChecksumFailure>,
}

/// Reads suspects again. Unread are all of them when the server does not let us read (that takes the right
/// to execute this `pg_read_binary_file`, which `pg_read_server_files` does not give, or being superuser),
/// and those that are left when it stops answering for longer than a few tries.
///
/// The suspects are read on a connection of their own, and of several hosts another one may answer it than
/// the one that was copied. Any that has the WAL up to the start will do; on one that has not, a file may
/// be missing because it is not there yet, and would count as dropped.
///
/// # Errors
/// Never for a suspect: what cannot be read again stays one.
pub async fn recheck(
    suspects: &[ChecksumFailure],
    origin: &Origin,
    postgres: &ConnectOptions,
    clock: &Clock,
) -> Rechecked {
    let mut damaged = Vec::new();
    let mut left: VecDeque<ChecksumFailure> = suspects.iter().cloned().collect();
    for attempt in 1.. {
        match recheck_each(&mut left, &mut damaged, origin, postgres, clock).await {
            Ok(()) => break,
            Err(error) if error.kind() == Kind::Unavailable && attempt < TRIES_MAX => {
                tracing::info!("unable to read suspect pages a second time for now: {error}");
                tokio::time::sleep(TRY_PAUSE).await;
            }
            Err(error) => {
                tracing::warn!(
                    "pages whose checksum is wrong could not be read a second time, so pages that \
                     were only being written may be among them: {error}"
                );
                break;
            }
        }
    }
    Rechecked { damaged, unread: left.into() }
}

/// Takes each suspect off `left` once there is a verdict on it. One that cannot be read for now goes to the
/// back, so that it does not keep the others from theirs the next time.
async fn recheck_each(
    left: &mut VecDeque<ChecksumFailure>,
    damaged: &mut Vec<ChecksumFailure>,
    origin: &Origin,
    postgres: &ConnectOptions,
    clock: &Clock,
) -> Result<()> {
    if left.is_empty() {
        return Ok(());
    }
    let mut connection = Connection::connect(postgres, Session::Database, clock).await?;
    check_origin(&mut connection, origin).await?;
    while let Some(suspect) = left.pop_front() {
        match is_damaged_each_time(&mut connection, &suspect, origin.start_lsn).await {
            Ok(true) => damaged.push(suspect),
            Ok(false) => {}
            Err(error) => {
                left.push_back(suspect);
                return Err(error);
            }
        }
    }
    connection.close().await;
    Ok(())
}

async fn is_damaged_each_time(
    connection: &mut Connection,
    suspect: &ChecksumFailure,
    start_lsn: Lsn,
) -> Result<bool> {
    for attempt in 0..READS_MAX {
        if attempt > 0 {
            tokio::time::sleep(READ_PAUSE).await;
        }
        if !is_damaged(connection, suspect, start_lsn).await? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Refuses a server that has not come to where the backup started: another cluster, a standby that lags, or
/// a primary of an older timeline, which one that took over has replaced. A standby does not tell its
/// timeline (`pg_walfile_name` is refused during recovery).
///
/// # Errors
/// `unavailable` for such a server, and what it says itself.
async fn check_origin(connection: &mut Connection, origin: &Origin) -> Result<()> {
    let Origin { system_id, timeline, start_lsn } = *origin;
    let sql = format!(
        "select c.system_identifier, case when pg_catalog.pg_is_in_recovery() \
         then coalesce(pg_catalog.pg_last_wal_replay_lsn() >= '{start_lsn}', false) \
         else pg_catalog.pg_current_wal_lsn() >= '{start_lsn}' \
         and pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8) \
         >= '{:08X}' collate \"C\" end from pg_catalog.pg_control_system() as c",
        timeline.get()
    );
    let attempted = || "unable to tell whether this server has what was copied";
    let rows = connection.query(&sql).await.context(attempted)?;
    let row = rows.first().ok_or_else(|| Error::new(Kind::Corrupt, attempted()))?;
    let found = row.parse::<i64>(0)?.cast_unsigned();
    if found == system_id.0 && row.get(1)? == Some("t") {
        return Ok(());
    }
    let message = format!(
        "another server answers than the one that was copied: system identifier {found}, expected \
         {system_id}, with the WAL up to {start_lsn} of timeline {timeline}"
    );
    Err(Error::new(Kind::Unavailable, message))
}

async fn is_damaged(
    connection: &mut Connection,
    suspect: &ChecksumFailure,
    start_lsn: Lsn,
) -> Result<bool> {
    let offset = u64::from(suspect.block % RELSEG_SIZE) * BLCKSZ as u64;
    let path = suspect.path.replace('\'', "''");
    let sql = format!(
        "select pg_catalog.encode(pg_catalog.pg_read_binary_file('{path}', {offset}, {BLCKSZ}, \
         true), 'hex')"
    );
    let rows = connection
        .query(&sql)
        .await
        .context(|| format!("unable to read block {} of '{}'", suspect.block, suspect.path))?;
    let text = rows.first().map(|row| row.get(0)).transpose()?.flatten();
    // A file, or its end, that is gone was dropped or truncated; replay does the same.
    let Some(text) = text else { return Ok(false) };
    if text.len() < 2 * BLCKSZ {
        return Ok(false);
    }
    let page = decode_page(text).ok_or_else(|| {
        Error::new(Kind::Corrupt, "the server sent a page that is not hexadecimal")
    })?;
    let fork = RelationFile::from_path(&suspect.path).map_or(Fork::Main, |file| file.fork);
    Ok(!is_mended(verify_page(&page, suspect.block, start_lsn), fork))
}

/// Whether a restore mends the bad copy of a page of `fork` that has this verdict now.
///
/// The two maps are changed without a position of their own (a bit of the visibility map is cleared, the
/// free space map is kept by a standby), so they may be torn and look untouched. They need no image: a
/// page of theirs whose checksum is wrong is read as zeros, which say nothing that is not so.
///
/// Garbage in the place of a page's position stays a mismatch however often it is read; a server that
/// mends such a page by writing it gives it a position of its own. The first write of a new page may be
/// torn like any other, and the page has a position once it is complete (but one of a GIN, GiST or SP-GiST index
/// that is being built, which gets its own at the end of that, and counts as damaged until then).
fn is_mended(verdict: PageVerdict, fork: Fork) -> bool {
    match verdict {
        PageVerdict::ChangedSinceStart => true,
        PageVerdict::Ok | PageVerdict::New => matches!(fork, Fork::FreeSpace | Fork::Visibility),
        PageVerdict::Mismatch { .. } => false,
    }
}

fn decode_page(hex: &str) -> Option<[u8; BLCKSZ]> {
    let mut page = [0; BLCKSZ];
    let (pairs, rest) = hex.as_bytes().as_chunks::<2>();
    if pairs.len() != BLCKSZ || !rest.is_empty() {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    for (byte, [high, low]) in page.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::page::page_checksum;
    use crate::repo::FilePath;

    fn page(number: u8, block: u32) -> [u8; BLCKSZ] {
        let mut page = [number; BLCKSZ];
        page[..8].copy_from_slice(&[0, 0, 0, 0, 0, 16, 0, 0]);
        page[12..20].copy_from_slice(&[24, 0, 0, 32, 0, 32, 4, 32]);
        let sum = page_checksum(&page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    fn file(path: &str) -> FileMeta {
        let path = FilePath::new(path).unwrap();
        FileMeta { path, mode: 0o600, mtime: 0, size_bytes: 0 }
    }

    fn cut(bytes: &[u8], at: &[usize]) -> Vec<Bytes> {
        let mut slices = Vec::new();
        let mut from = 0;
        for at in at.iter().chain([&bytes.len()]) {
            slices.push(Bytes::copy_from_slice(&bytes[from..*at]));
            from = *at;
        }
        slices
    }

    #[test]
    fn damage_is_found_however_the_slices_lie_and_named_by_its_block() {
        let mut bytes = [page(1, 128), page(2, 129), page(3, 130)].concat();
        bytes[BLCKSZ + 5000] ^= 1;
        bytes.extend([9; 100]);
        let pages = Pages::new(Lsn(1 << 40), Check::Every);
        for at in [vec![], vec![10], vec![BLCKSZ], vec![1, 2, 9000, 9001, 20_000], vec![100, 100]] {
            let found = pages.block(&file("base/5/1234"), 1 << 20, &cut(&bytes, &at));
            assert_eq!(found.len(), 1, "{at:?}");
            assert_eq!((found[0].block, found[0].path.as_str()), (129, "base/5/1234"));
        }
        assert!(pages.block(&file("base/5/PG_VERSION"), 1 << 20, &cut(&bytes, &[])).is_empty());
        let off = Pages::new(Lsn(1 << 40), Check::None);
        assert!(off.block(&file("base/5/1234"), 1 << 20, &cut(&bytes, &[])).is_empty());
    }

    #[test]
    fn pages_changed_since_the_start_are_left_to_replay() {
        let mut bytes = page(1, 0).to_vec();
        bytes[5000] ^= 1;
        let pages = Pages::new(Lsn(1), Check::Every);
        assert!(pages.block(&file("base/5/1234"), 0, &cut(&bytes, &[])).is_empty());
    }

    #[test]
    fn a_new_page_that_is_not_all_zeros_is_a_suspect() {
        let pages = Pages::new(Lsn(1 << 40), Check::Every);
        let torn = [[0; BLCKSZ / 2], [7; BLCKSZ / 2]].concat();
        for (bytes, count) in [(vec![0; BLCKSZ], 0), (torn, 1)] {
            let found = pages.block(&file("base/5/1234"), 0, &cut(&bytes, &[]));
            assert_eq!(found.len(), count);
        }
    }

    #[test]
    fn a_bad_copy_is_mended_by_the_image_of_a_change_and_a_map_by_being_read_as_zeros() {
        let mismatch = PageVerdict::Mismatch { expected: 1, found: 2 };
        for (verdict, data, map) in [
            (PageVerdict::ChangedSinceStart, true, true),
            (PageVerdict::Ok, false, true),
            (PageVerdict::New, false, true),
            (mismatch, false, false),
        ] {
            for fork in [Fork::Main, Fork::Init] {
                assert_eq!(is_mended(verdict, fork), data, "{verdict:?} {fork:?}");
            }
            for fork in [Fork::FreeSpace, Fork::Visibility] {
                assert_eq!(is_mended(verdict, fork), map, "{verdict:?} {fork:?}");
            }
        }
    }

    #[test]
    fn a_page_comes_back_from_its_hexadecimal_form() {
        let page = page(7, 3);
        let hex: String = page.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(decode_page(&hex), Some(page));
        assert_eq!(decode_page(&hex[2..]), None);
    }
}
