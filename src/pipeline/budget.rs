//! The memory budget: what each command may hold, computed in one place.
//!
//! # Shape
//! Limits are on the resident memory of the whole process with default settings. `PROCESS_BYTES` is
//! what the process holds before the first block (binary, runtime, TLS roots, HTTP client, buffers of
//! the connection to PostgreSQL). The rest is shared out here, and every buffer that holds data is
//! paid for by a [`Permits`](super::Permits) of one of these amounts.
//!
//! | command | limit | what it is spent on |
//! |---|---|---|
//! | backup | 128 MiB | threads × (context + part being filled) + parts being uploaded + blocks waiting |
//! | stream | 48 MiB | context + extent being filled + extents being uploaded, each at most as much as the other |
//! | restore | 96 MiB | batches being fetched, and what their connections hold + threads × (context + block) + WAL segments |
//!
//! A passphrase costs 128 MiB on top for about 0.3 s at start, when the newest data key is opened with
//! it (once for each passphrase until one fits) and again when a new one is sealed: that is what makes it
//! expensive to guess (scrypt). X25519 recipients cost nothing.

use super::codec::{Level, compressed_bytes_max};
use super::frame::{BLOCK_BYTES, FRAME_OVERHEAD_BYTES};

const MIB: u64 = 1 << 20;

/// Whole-process limit of `backup` with defaults.
pub const BACKUP_BYTES: u64 = 128 * MIB;
/// Whole-process limit of `stream` with defaults; more at levels that need it ([`stream_bytes_min`]).
pub const STREAM_BYTES: u64 = 48 * MIB;
/// Whole-process limit of `restore` with defaults.
pub const RESTORE_BYTES: u64 = 96 * MIB;
/// What the process holds besides data, and what the allocator loses.
pub const PROCESS_BYTES: u64 = 24 * MIB;

/// What `restore` needs besides its batches: two WAL segments of the default size, plain and sealed,
/// made when all files are written and the allocator still keeps what the batches held.
pub const RESTORE_WAL_BYTES: u64 = 32 * MIB;

/// Kept out of the shares of `stream`: read buffers that wait to be compressed, the block being put
/// together, and what a repository that is away leaves its client with, retries in hand. Measured with WAL
/// that does not compress and a repository that was away: without it the process peaked at its limit.
const GROWTH_BYTES: u64 = 11 * MIB;

/// Least that `stream` works with: an extent being filled, and others on their way.
const HELD_BYTES_MIN: u64 = 5 * MIB;

/// Kept out of the shares of `backup`: what the store's client and TLS hold of parts on their way. Measured
/// with a slow store: without it the process peaked at 121 of its 128 MiB.
const CLIENT_BYTES: u64 = 8 * MIB;

/// Smallest part all stores take.
pub const PART_BYTES_MIN: u64 = 5 * MIB;
/// Part size where memory allows a thread for every core with it: so large that a request's latency
/// and its price are small beside its transfer.
pub const PART_BYTES_DEFAULT: u64 = 12 * MIB;
/// Part size where it does not.
pub const PART_BYTES_SMALL: u64 = 8 * MIB;
/// Frames of a restore that are opened together.
pub const BATCH_BYTES: u64 = 4 * MIB;
/// What a connection holds of an answer that is not wanted yet.
const ANSWER_BYTES: u64 = MIB;
/// Most threads one command uses unless told otherwise: the rest of the machine is the database's.
pub const THREADS_MAX: u64 = 16;

/// Shares of the memory of one command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Worker threads.
    pub thread_count: usize,
    /// A part is handed to the uploader when its frames have reached this size.
    pub part_bytes: usize,
    /// Part buffers that may exist, being filled or uploaded.
    pub parts_max: usize,
    /// Plain blocks that may wait for a worker or be with one.
    pub blocks_max: usize,
    /// WAL: an extent is cut when its sealed form has reached this size.
    pub extent_bytes_cut: usize,
    /// WAL: sealed bytes of extents that may wait or be uploaded.
    pub extent_bytes_in_flight: u64,
    /// WAL: sealed bytes of the extent being filled and of those in flight together, above which no more
    /// is read.
    pub extent_bytes_held: u64,
    /// Bytes that are opened together at most; a request of a restore fetches many times that.
    pub batch_bytes: usize,
    /// Batches that may be fetched or opened at once.
    pub batches_max: usize,
}

impl Budget {
    /// Shares for `backup` within `limit_bytes` on `cores` cores.
    #[must_use]
    pub fn backup(limit_bytes: u64, cores: usize, level: Level) -> Self {
        // Two blocks are with the feeder: the one of a large file, and the one small files share.
        let fixed = PROCESS_BYTES + CLIENT_BYTES + 2 * BLOCK_BYTES as u64;
        let data = limit_bytes.saturating_sub(fixed);
        let data = data.max(4 * PART_BYTES_MIN);
        let with = |part_bytes| Self::backup_with(data, cores, level, part_bytes);
        let large = with(PART_BYTES_DEFAULT);
        let small = with(PART_BYTES_SMALL);
        // Where there is memory for neither: one thread, and two parts on their way.
        let least = with(PART_BYTES_MIN).unwrap_or(Self {
            part_bytes: to_count(PART_BYTES_MIN),
            parts_max: 3,
            blocks_max: 2,
            ..Self::none()
        });
        match (large, small) {
            (Some(large), Some(small)) if large.thread_count < small.thread_count => small,
            (large, small) => large.or(small).unwrap_or(least),
        }
    }

    /// Shares with parts of `part_bytes`, `None` where not even one thread fits.
    fn backup_with(data: u64, cores: usize, level: Level, part_bytes: u64) -> Option<Self> {
        // A part runs over by at most one frame before it is handed on.
        let part_whole = part_bytes + frame_bytes_max();
        let thread = context_bytes(level) + part_whole + 2 * BLOCK_BYTES as u64;
        // Uploads get two fifths or more.
        let uploads = (data * 2 / 5 / part_whole).max(2);
        let threads = data.saturating_sub(uploads * part_whole) / thread;
        let threads = threads.min(THREADS_MAX.min(cores.max(1) as u64));
        // What the threads do not need goes to uploads: as many as there are threads at least, which
        // the packing needs so that workers never wait for each other.
        let uploads_for = |threads| (data.saturating_sub(threads * thread) / part_whole).min(32);
        let enough = |threads: &u64| uploads_for(*threads) >= (*threads).max(2);
        let threads = (1..=threads).rev().find(enough)?;
        Some(Self {
            thread_count: to_count(threads),
            part_bytes: to_count(part_bytes),
            parts_max: to_count(threads + uploads_for(threads)),
            blocks_max: to_count(2 * threads),
            ..Self::none()
        })
    }

    /// Shares for `stream` within `limit_bytes`, which is [`stream_bytes_min`] at least.
    #[must_use]
    pub fn stream(limit_bytes: u64, level: Level) -> Self {
        let fixed = PROCESS_BYTES + GROWTH_BYTES + context_bytes(level);
        let held = limit_bytes.saturating_sub(fixed).max(HELD_BYTES_MIN);
        // By default a segment that shrinks to 31 % is one object (the plain megabyte that waits to be
        // compressed counts as well), and another is filled meanwhile.
        let cut = (held * 3 / 5).clamp(MIB, 16 * MIB);
        Self {
            thread_count: 1,
            blocks_max: 2,
            extent_bytes_cut: to_count(cut),
            extent_bytes_in_flight: held - MIB,
            extent_bytes_held: held,
            ..Self::none()
        }
    }

    /// Shares for `restore` within `limit_bytes` on `cores` cores.
    #[must_use]
    pub fn restore(limit_bytes: u64, cores: usize) -> Self {
        let fixed = PROCESS_BYTES + RESTORE_WAL_BYTES;
        let data = limit_bytes.saturating_sub(fixed).max(4 * BATCH_BYTES);
        let threads = (cores.max(1) as u64).clamp(1, THREADS_MAX.min(data / 4 / (2 * MIB)));
        let batches = (data - threads * 2 * MIB) / (BATCH_BYTES + ANSWER_BYTES);
        Self {
            thread_count: to_count(threads),
            batch_bytes: to_count(BATCH_BYTES),
            batches_max: to_count(batches.max(1)),
            ..Self::none()
        }
    }

    fn none() -> Self {
        Self {
            thread_count: 1,
            part_bytes: to_count(PART_BYTES_DEFAULT),
            parts_max: 1,
            blocks_max: 1,
            extent_bytes_cut: to_count(MIB),
            extent_bytes_in_flight: 0,
            extent_bytes_held: 0,
            batch_bytes: to_count(BATCH_BYTES),
            batches_max: 1,
        }
    }

    /// Most bytes a backup's buffers hold under this budget.
    #[must_use]
    pub fn backup_bytes(&self, level: Level) -> u64 {
        let part = self.part_bytes as u64 + frame_bytes_max();
        self.parts_max as u64 * part
            + (self.blocks_max as u64 + 2) * BLOCK_BYTES as u64
            + self.thread_count as u64 * context_bytes(level)
    }
}

/// Least memory that `stream` can work with: 44 MiB with defaults, 60 at the highest levels.
#[must_use]
pub fn stream_bytes_min(level: Level) -> u64 {
    PROCESS_BYTES + GROWTH_BYTES + context_bytes(level) + HELD_BYTES_MIN
}

/// Most bytes a frame of one block takes while it is made.
fn frame_bytes_max() -> u64 {
    (compressed_bytes_max(BLOCK_BYTES) + FRAME_OVERHEAD_BYTES) as u64
}

/// Bytes of a compression context with its window and tables for blocks of 1 MiB, measured and
/// rounded up (the test beside this file holds it to the truth).
#[must_use]
pub fn context_bytes(level: Level) -> u64 {
    match level.get() {
        ..=2 => 3 * MIB,
        3..=7 => 6 * MIB,
        8..=12 => 13 * MIB,
        _ => 20 * MIB,
    }
}

/// A count or size that fits this machine.
fn to_count(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::codec::Compressor;
    use super::*;

    #[test]
    fn a_backup_stays_in_its_limit_whatever_the_machine() {
        for cores in [1, 2, 4, 16, 128] {
            for level in [Level::MIN, 1, 3, 9, Level::MAX] {
                let level = Level::new(level).unwrap();
                for limit in [BACKUP_BYTES, 256 * MIB, 1024 * MIB] {
                    let budget = Budget::backup(limit, cores, level);
                    let used = budget.backup_bytes(level) + PROCESS_BYTES;
                    assert!(used <= limit, "{cores} cores, {level:?}, {limit}: {used} {budget:?}");
                    assert!(budget.parts_max >= 2 * budget.thread_count);
                }
            }
        }
        let usual = Budget::backup(BACKUP_BYTES, 2, Level::default());
        assert_eq!((usual.thread_count, usual.part_bytes), (2, 12 << 20));
        let many_cores = Budget::backup(BACKUP_BYTES, 16, Level::default());
        assert_eq!((many_cores.thread_count, many_cores.part_bytes), (4, 8 << 20));
    }

    #[test]
    fn contexts_cost_no_more_than_the_budget_says() {
        let noise: Vec<u8> =
            (0..262_144_u32).flat_map(|n| (n.wrapping_mul(2_654_435_761)).to_le_bytes()).collect();
        for level in [Level::MIN, 1, 2, 3, 6, 8, 9, 12, 15, 16, Level::MAX] {
            let level = Level::new(level).unwrap();
            let mut compressor = Compressor::new(level).unwrap();
            let mut out = Vec::new();
            compressor.append(&[Bytes::from(noise.clone())], &mut out).unwrap();
            let bytes = compressor.memory_bytes() as u64;
            assert!(bytes <= context_bytes(level), "{level:?}: {bytes}");
        }
    }

    #[test]
    fn stream_and_restore_stay_in_their_limits() {
        let stream = Budget::stream(STREAM_BYTES, Level::default());
        let used = stream.extent_bytes_cut as u64 + stream.extent_bytes_in_flight + PROCESS_BYTES;
        assert!(stream.extent_bytes_held < used - PROCESS_BYTES);
        assert!(used <= STREAM_BYTES && stream.extent_bytes_in_flight > 8 * MIB);
        for level in (Level::MIN..=Level::MAX).filter_map(Level::new) {
            let least = stream_bytes_min(level);
            for limit in [least, least.max(STREAM_BYTES), 256 * MIB] {
                let stream = Budget::stream(limit, level);
                let held = stream.extent_bytes_held;
                let used = held + context_bytes(level) + PROCESS_BYTES + GROWTH_BYTES;
                assert!(used <= limit, "{level:?}, {limit}: {used} {stream:?}");
                assert!((stream.extent_bytes_cut as u64) < held);
            }
        }
        for cores in [1, 2, 64] {
            let restore = Budget::restore(RESTORE_BYTES, cores);
            let batches = restore.batches_max as u64 * (restore.batch_bytes as u64 + ANSWER_BYTES);
            let threads = restore.thread_count as u64 * 2 * MIB;
            let used = batches + threads + PROCESS_BYTES + RESTORE_WAL_BYTES;
            assert!(used <= RESTORE_BYTES, "{restore:?}");
        }
    }
}
