//! Data pages: their header, their checksum, and what a page in a base backup is worth.
//!
//! # Source
//! `PageHeaderData` in `src/include/storage/bufpage.h`, `pg_checksum_page` in
//! `src/include/storage/checksum_impl.h`, `verify_page_checksum` in
//! `src/backend/backup/basebackup.c` (13: `src/backend/replication/basebackup.c`); the same rules
//! in 13 to 18. `PageIsVerified` in `src/backend/storage/page/bufpage.c`, which is stricter than that
//! check about pages that were never initialised, and so are we.

use super::bytes::{u16_at, u32_at};
use super::lsn::Lsn;

/// Size of a data page in bytes (`BLCKSZ`); servers built with another size are refused.
pub const BLCKSZ: usize = 8192;

/// Pages in a full segment file of a relation (`RELSEG_SIZE` of every packaged server): 1 GiB.
pub const RELSEG_SIZE: u32 = 131_072;

/// Farthest behind the start of a backup that a page may say it was changed: 16 TiB, as no server writes
/// more WAL while a backup runs. Garbage in the place of the position nearly always lies farther.
pub const CHANGE_BYTES_MAX: u64 = 1 << 44;

const N_SUMS: usize = 32;
const FNV_PRIME: u32 = 16_777_619;

/// `checksumBaseOffsets`: where each of the parallel hashes starts.
const CHECKSUM_BASE_OFFSETS: [u32; N_SUMS] = [
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
];

/// Bytes of one row of the page seen as rows of [`N_SUMS`] 32-bit values.
const ROW_BYTES: usize = N_SUMS * 4;

/// The fields of `PageHeaderData` that say something about the whole page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// End of the last WAL record that changed the page.
    pub lsn: Lsn,
    /// The checksum stored in the page; 0 where checksums are off.
    pub checksum: u16,
    /// `pd_flags`.
    pub flags: u16,
    /// Start of free space.
    pub lower: u16,
    /// End of free space; 0 on a page that was never initialised (`PageIsNew`).
    pub upper: u16,
    /// Start of the access method's own area at the end of the page.
    pub special: u16,
}

impl PageHeader {
    /// The header of `page`.
    #[must_use]
    pub fn decode(page: &[u8; BLCKSZ]) -> Self {
        let half = |offset| u16_at(page, offset).unwrap_or(0);
        let word = |offset| u64::from(u32_at(page, offset).unwrap_or(0));
        Self {
            // PageXLogRecPtr is two 32-bit halves, the upper one first.
            lsn: Lsn(word(0) << 32 | word(4)),
            checksum: half(8),
            flags: half(10),
            lower: half(12),
            upper: half(14),
            special: half(16),
        }
    }

    /// Whether the page was never initialised (`PageIsNew`).
    #[must_use]
    pub fn is_new(self) -> bool {
        self.upper == 0
    }
}

/// The checksum that `page` must carry as block `block_number` of its relation fork
/// (`pg_checksum_page`); the checksum stored in the page has no part in it.
#[must_use]
#[allow(clippy::cast_possible_truncation, reason = "the value is at most 65535")]
pub fn page_checksum(page: &[u8; BLCKSZ], block_number: u32) -> u16 {
    let mut sums = CHECKSUM_BASE_OFFSETS;
    let (rows, _) = page.as_chunks::<ROW_BYTES>();
    let (first, rest) = rows.split_first().unwrap_or((&[0; ROW_BYTES], &[]));
    let mut row = *first;
    row[8] = 0;
    row[9] = 0;
    add_row(&mut sums, &row);
    for row in rest {
        add_row(&mut sums, row);
    }
    for _ in 0..2 {
        add_row(&mut sums, &[0; ROW_BYTES]);
    }
    let folded = sums.iter().fold(0, |folded, sum| folded ^ sum) ^ block_number;
    (folded % 65_535 + 1) as u16
}

/// One round of all hashes (`CHECKSUM_COMP`). Written so that the compiler keeps all of `sums` in
/// vector registers.
#[inline(always)]
fn add_row(sums: &mut [u32; N_SUMS], row: &[u8; ROW_BYTES]) {
    let (words, _) = row.as_chunks::<4>();
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ u32::from_le_bytes(*word);
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

/// What a page read while the server was running is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageVerdict {
    /// The checksum is right.
    Ok,
    /// Never initialised: all zeros, so without a checksum.
    New,
    /// Changed since the backup started: it may be torn, and replay will write it anew from its
    /// full-page image.
    ChangedSinceStart,
    /// The checksum is wrong, or the page says that it was never initialised and is not all zeros: no
    /// checksum is right for such a page, `expected` is what any other with these bytes must carry.
    ///
    /// A page that was being written while it was read can look like this too when the half with
    /// the LSN is the old one; PostgreSQL reads such a block a second time. Whoever cannot do that
    /// finds a full-page image of the block in the WAL of the backup, from start to end, if it was
    /// torn and none if it is damaged.
    Mismatch {
        /// The checksum the page must carry.
        expected: u16,
        /// The checksum it carries.
        found: u16,
    },
}

/// The verdict on block `block_number` of a relation fork in a backup that started at
/// `backup_start_lsn` (the redo position), in a cluster with checksums.
#[must_use]
pub fn verify_page(page: &[u8; BLCKSZ], block_number: u32, backup_start_lsn: Lsn) -> PageVerdict {
    let header = PageHeader::decode(page);
    if header.is_new() {
        if *page == [0; BLCKSZ] {
            return PageVerdict::New;
        }
    } else if is_changed_since(header.lsn, backup_start_lsn) {
        return PageVerdict::ChangedSinceStart;
    }
    let expected = page_checksum(page, block_number);
    if expected == header.checksum && !header.is_new() {
        PageVerdict::Ok
    } else {
        PageVerdict::Mismatch { expected, found: header.checksum }
    }
}

/// Whether a page with this position was changed by WAL of the backup.
fn is_changed_since(page_lsn: Lsn, backup_start_lsn: Lsn) -> bool {
    page_lsn.0.checked_sub(backup_start_lsn.0).is_some_and(|bytes| bytes <= CHANGE_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `pg_checksum_page`, word by word as PostgreSQL writes it down.
    fn plain_checksum(page: &[u8; BLCKSZ], block_number: u32) -> u16 {
        let mut page = *page;
        page[8..10].fill(0);
        let word = |row: usize, column: usize| u32_at(&page, (row * N_SUMS + column) * 4).unwrap();
        let mut sums = CHECKSUM_BASE_OFFSETS;
        for row in 0..BLCKSZ / (4 * N_SUMS) + 2 {
            for (column, sum) in sums.iter_mut().enumerate() {
                let value = if row < BLCKSZ / (4 * N_SUMS) { word(row, column) } else { 0 };
                let mixed = *sum ^ value;
                *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
            }
        }
        let folded = sums.into_iter().fold(0, |folded, sum| folded ^ sum) ^ block_number;
        u16::try_from(folded % 65_535 + 1).unwrap()
    }

    fn page_with(lsn: u64, upper: u16, fill: u8) -> [u8; BLCKSZ] {
        let mut page = [fill; BLCKSZ];
        page[0..4].copy_from_slice(&u32::try_from(lsn >> 32).unwrap().to_le_bytes());
        page[4..8].copy_from_slice(&u32::try_from(lsn & 0xffff_ffff).unwrap().to_le_bytes());
        page[14..16].copy_from_slice(&upper.to_le_bytes());
        page
    }

    #[test]
    fn a_page_is_judged_by_the_rules_of_a_base_backup() {
        let start = Lsn(0x1_0000_0010);
        let new = page_with(0, 0, 0);
        assert_eq!(verify_page(&new, 0, start), PageVerdict::New);
        let changed = page_with(start.0, 8000, 3);
        assert_eq!(verify_page(&changed, 0, start), PageVerdict::ChangedSinceStart);
        let mut page = page_with(start.0 - 1, 8000, 3);
        let expected = page_checksum(&page, 9);
        let found = 0x0303;
        assert_eq!(verify_page(&page, 9, start), PageVerdict::Mismatch { expected, found });
        page[8..10].copy_from_slice(&expected.to_le_bytes());
        assert_eq!(verify_page(&page, 9, start), PageVerdict::Ok);
        assert_ne!(verify_page(&page, 10, start), PageVerdict::Ok, "a block in another's place");
        assert_eq!(PageHeader::decode(&page).lsn, Lsn(start.0 - 1));
    }

    #[test]
    fn a_page_is_new_only_if_it_is_all_zeros() {
        let start = Lsn(0x1_0000_0010);
        for at in [0, 5, 8, 16, 4096, BLCKSZ - 1] {
            let mut page = [0; BLCKSZ];
            page[at] = 1;
            let mismatch = |page: &[u8; BLCKSZ]| {
                matches!(verify_page(page, 3, start), PageVerdict::Mismatch { .. })
            };
            assert!(mismatch(&page), "byte {at}");
            // Whatever its checksum and its position say.
            page[..8].copy_from_slice(&[1, 0, 0, 0, 0xff, 0, 0, 0]);
            let sum = page_checksum(&page, 3);
            page[8..10].copy_from_slice(&sum.to_le_bytes());
            assert!(mismatch(&page), "byte {at}, with a checksum");
        }
    }

    #[test]
    fn a_position_that_no_backup_reaches_does_not_excuse_a_wrong_checksum() {
        let start = Lsn(0x1_0000_0010);
        let verdict = |lsn| verify_page(&page_with(lsn, 8000, 3), 9, start);
        assert_eq!(verdict(start.0 + CHANGE_BYTES_MAX), PageVerdict::ChangedSinceStart);
        for lsn in [start.0 + CHANGE_BYTES_MAX + 1, 0x7f3a_0000_1234_5678, u64::MAX] {
            assert!(matches!(verdict(lsn), PageVerdict::Mismatch { .. }), "{lsn:X}");
        }
        let mut page = page_with(u64::MAX, 8000, 3);
        let sum = page_checksum(&page, 9);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(verify_page(&page, 9, start), PageVerdict::Ok);
    }

    proptest! {
        #[test]
        fn the_fast_checksum_is_the_plain_one(
            seed in proptest::collection::vec(any::<u8>(), 64),
            block_number in any::<u32>(),
        ) {
            let mut page = [0; BLCKSZ];
            for (index, byte) in page.iter_mut().enumerate() {
                *byte = seed[index % 64].wrapping_mul(u8::try_from(index / 64 % 251).unwrap());
            }
            prop_assert_eq!(page_checksum(&page, block_number), plain_checksum(&page, block_number));
        }
    }
}
