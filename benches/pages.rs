//! Page checksums.
//!
//! Unit: bytes a second of one thread. Limit: reading the memory, for which `memcpy` and CRC-32C over
//! the same bytes stand.

use std::hint::black_box;

use bytes::Bytes;
use tidemark::capture::base::pages::{Check, Pages};
use tidemark::pg::Lsn;
use tidemark::pg::crc::crc32c;
use tidemark::pg::page::{BLCKSZ, PageVerdict, page_checksum, verify_page};
use tidemark::repo::{FileMeta, FilePath, Inspect};

use crate::measure::{Bench, bytes};
use crate::samples::Samples;

/// What a server of PostgreSQL 15 and later sends of a file at a time.
pub const PIECE_BYTES: usize = 32 << 10;

/// A block as it comes from the server.
pub fn pieces(block: &Bytes) -> Vec<Bytes> {
    let cut = |from: usize| block.slice(from..(from + PIECE_BYTES).min(block.len()));
    (0..block.len()).step_by(PIECE_BYTES).map(cut).collect()
}

pub fn bench(bench: &mut Bench) {
    let mut group = bench.cpu.benchmark_group("pages");
    // In the cache of one core, as a block is that was just received.
    let (path, content) = &Samples::get().files_of("pgbench").files[0];
    let block = content.slice(..1 << 20);
    let start = Lsn(u64::MAX);
    let (pages, _) = block.as_chunks::<BLCKSZ>();
    for (number, page) in (0..).zip(pages) {
        let verdict = verify_page(page, number, start);
        assert!(matches!(verdict, PageVerdict::Ok | PageVerdict::New), "{path}: {verdict:?}");
    }
    group.throughput(bytes(block.len()));
    group.bench_function("checksum", |run| {
        run.iter(|| {
            let sums = (0..).zip(pages).map(|(number, page)| page_checksum(page, number));
            sums.fold(0, |all, sum| all ^ sum)
        });
    });
    let meta = FileMeta {
        path: FilePath::new(path).unwrap(),
        mode: 0o600,
        mtime: 0,
        size_bytes: content.len() as u64,
    };
    let inspector = Pages::new(start, Check::Every);
    let slices = pieces(&block);
    group.bench_function("verified as they arrive", |run| {
        run.iter(|| inspector.block(&meta, 0, black_box(&slices)).len());
    });
    group.bench_function("limit: CRC-32C", |run| run.iter(|| crc32c(black_box(&block))));
    let mut copy = vec![0; block.len()];
    group.bench_function("limit: memcpy", |run| {
        run.iter(|| {
            copy.copy_from_slice(black_box(&block));
            black_box(copy.last().copied())
        });
    });
    group.finish();
}
