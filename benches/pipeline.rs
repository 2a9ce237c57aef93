//! From plain blocks to sealed frames and back.
//!
//! Unit: plain bytes and frames a second. Limit: zstd alone on the same blocks, and AES-256-GCM alone
//! on what zstd makes of them. The report "overhead" is what all the rest costs, page checksums, CRC of
//! files, content hashes, sealing, threads and books, in per cent of the CPU time of zstd alone.

use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Throughput};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use tidemark::capture::base::pages::{Check, Pages};
use tidemark::pg::crc::crc32c;
use tidemark::pg::{Lsn, TimelineId};
use tidemark::pipeline::cipher::{Cipher, DataKey, ObjectKey};
use tidemark::pipeline::codec::{Compressor, Decompressor, parameters};
use tidemark::pipeline::frame::{self, Expected, Last};
use tidemark::repo::budget::BACKUP_BYTES;
use tidemark::repo::{
    BackupId, Budget, ExtentBuilder, FileMeta, FilePath, Inspect, Level, PackOptions, Writer,
};
use tidemark::wal::Scanner;
use tokio::runtime::Runtime;
use zstd::bulk;

use crate::measure::{Bench, Rounds, cpu_seconds, report};
use crate::pages::pieces;
use crate::samples::{Files, Samples, Wal};
use crate::sink::Sink;

const LEVELS: [i32; 4] = [-5, -1, 1, 3];
/// Blocks that criterion measures with: enough to leave the caches, few enough for ten samples.
const BLOCK_COUNT: usize = 16;
/// Rounds of the reports.
const ROUNDS: usize = 5;
/// What a walsender puts into a message.
const WAL_PIECE_BYTES: usize = 128 << 10;

fn level(number: i32) -> Level {
    Level::new(number).unwrap()
}

fn object_key() -> ObjectKey {
    ObjectKey::derive(Cipher::Aes256Gcm, &DataKey::new([9; 32]), &[5; 16], &[b"bench"]).unwrap()
}

/// AES-256-GCM of the library, without anything of ours.
struct Gcm(LessSafeKey);

impl Gcm {
    fn new() -> Self {
        Self(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[7; 32]).unwrap()))
    }

    fn seal(&self, payload: &mut [u8]) -> u8 {
        let nonce = Nonce::assume_unique_for_key([0; 12]);
        let tag = self.0.seal_in_place_separate_tag(nonce, Aad::empty(), payload).unwrap();
        tag.as_ref()[0]
    }
}

/// Some blocks from all over the sample.
fn spread(files: &Files, count: usize) -> Vec<Bytes> {
    let all = files.blocks();
    let step = (all.len() / count).max(1);
    all.into_iter().step_by(step).take(count).collect()
}

fn total(blocks: &[Bytes]) -> usize {
    blocks.iter().map(Bytes::len).sum()
}

/// zstd as the pipeline sets it.
fn encoder(number: i32) -> bulk::Compressor<'static> {
    let mut compressor = bulk::Compressor::default();
    parameters(level(number)).for_each(|parameter| compressor.set_parameter(parameter).unwrap());
    compressor
}

fn zstd_alone(compressor: &mut bulk::Compressor<'_>, blocks: &[Bytes], out: &mut Vec<u8>) -> usize {
    let compress = |block: &Bytes| {
        out.clear();
        compressor.compress_to_buffer(block, out).unwrap()
    };
    blocks.iter().map(compress).sum()
}

/// Each block as a sealed frame.
fn sealed_frames(blocks: &[Bytes], number: i32) -> Vec<Vec<u8>> {
    let (key, mut compressor) = (object_key(), Compressor::new(level(number)).unwrap());
    let seal = |block: &Bytes| {
        let mut out = Vec::new();
        frame::append_compressed(&mut compressor, std::slice::from_ref(block), &mut out).unwrap();
        frame::seal(&key, &mut out, 0, Last::No).unwrap();
        out
    };
    blocks.iter().map(seal).collect()
}

pub fn bench(bench: &mut Bench) {
    samples(bench);
    frames(bench);
    opening(bench);
    packs(bench);
    if bench.reports.wants("pipeline overhead") {
        overhead(Samples::get());
    }
    if bench.reports.wants("wal segment") {
        wal_segments(Samples::get());
    }
}

/// What the data is like: its ratio by level.
fn samples(bench: &Bench) {
    if !bench.reports.wants("pipeline samples") {
        return;
    }
    for files in &Samples::get().files {
        let blocks = files.blocks();
        let ratio = |number: &i32| {
            let mut compressor = encoder(*number);
            let mut out = Vec::with_capacity(2 << 20);
            let stored = zstd_alone(&mut compressor, &blocks, &mut out);
            format!("level {number}: {:.2}", total(&blocks) as f64 / stored as f64)
        };
        let ratios: Vec<String> = LEVELS.iter().map(ratio).collect();
        let text = format!(
            "{} of {} bytes; ratio at {}",
            files.content,
            files.size_bytes(),
            ratios.join(", ")
        );
        report("pipeline samples", text);
    }
}

/// Making frames on one thread.
fn frames(bench: &mut Bench) {
    let mut group = bench.cpu.benchmark_group("frames");
    for files in &Samples::get().files {
        let blocks = spread(files, BLOCK_COUNT);
        let slices: Vec<Vec<Bytes>> = blocks.iter().map(pieces).collect();
        let (elements, size) = (blocks.len() as u64, total(&blocks) as u64);
        group.throughput(Throughput::ElementsAndBytes { elements, bytes: size });
        let levels = if files.content == "app" { &LEVELS[..] } else { &[1] };
        for number in levels {
            let id =
                |what: &str| BenchmarkId::new(what, format!("{}, level {number}", files.content));
            let (key, mut out) = (object_key(), Vec::with_capacity(2 << 20));
            let mut compressor = Compressor::new(level(*number)).unwrap();
            group.bench_function(id("compressed and sealed"), |run| {
                run.iter(|| {
                    for (index, block) in (0..).zip(&slices) {
                        out.clear();
                        frame::append_compressed(&mut compressor, block, &mut out).unwrap();
                        frame::seal(&key, &mut out, index, Last::No).unwrap();
                    }
                    out.len()
                });
            });
            let mut alone = encoder(*number);
            group.bench_function(id("limit: zstd alone"), |run| {
                run.iter(|| zstd_alone(&mut alone, &blocks, &mut out));
            });
        }
        let mut frames = sealed_frames(&blocks, 1);
        let gcm = Gcm::new();
        group.bench_function(
            BenchmarkId::new("AES-256-GCM alone, of level 1's output", &files.content),
            |run| {
                run.iter(|| frames.iter_mut().map(|frame| gcm.seal(frame)).fold(0, |a, b| a ^ b));
            },
        );
    }
    group.finish();
}

/// Opening frames on one thread.
fn opening(bench: &mut Bench) {
    let mut group = bench.cpu.benchmark_group("open");
    for files in &Samples::get().files {
        let blocks = spread(files, BLOCK_COUNT);
        let (elements, size) = (blocks.len() as u64, total(&blocks) as u64);
        group.throughput(Throughput::ElementsAndBytes { elements, bytes: size });
        let frames = sealed_frames(&blocks, 1);
        let (key, mut decompressor) = (object_key(), Decompressor::new().unwrap());
        let mut scratch = Vec::with_capacity(1 << 20);
        group.bench_function(BenchmarkId::new("opened and decompressed", &files.content), |run| {
            run.iter_batched_ref(
                || frames.clone(),
                |frames| {
                    for frame in frames {
                        let expected = Expected { index: 0, last: Last::No };
                        let plain =
                            frame::open(&key, &mut decompressor, frame, expected, &mut scratch);
                        black_box(plain.unwrap().len());
                    }
                },
                BatchSize::PerIteration,
            );
        });
        let mut compressor = encoder(1);
        let payloads: Vec<Vec<u8>> =
            blocks.iter().map(|block| compressor.compress(block).unwrap()).collect();
        let mut alone = bulk::Decompressor::new().unwrap();
        group.bench_function(BenchmarkId::new("limit: zstd alone", &files.content), |run| {
            run.iter(|| {
                for payload in &payloads {
                    scratch.clear();
                    black_box(alone.decompress_to_buffer(payload, &mut scratch).unwrap());
                }
            });
        });
    }
    group.finish();
}

/// A backup of the files into a store that keeps nothing; the bytes it would have stored.
async fn pack(files: &Files, thread_count: usize, number: i32) -> u64 {
    let writer = Sink::writer().await;
    let budget = Budget {
        thread_count,
        blocks_max: 2 * thread_count,
        ..Budget::backup(BACKUP_BYTES, thread_count, level(number))
    };
    let options = PackOptions { budget, level: level(number), pack_bytes: 512 << 20 };
    let id = BackupId::new(writer.repository().clock().now(), TimelineId::FIRST, Lsn(1 << 24));
    let inspect: Arc<dyn Inspect> = Arc::new(Pages::new(Lsn(u64::MAX), Check::Every));
    let mut backup = writer.backup(id, options, inspect).unwrap();
    for (path, content) in &files.files {
        let path = FilePath::new(path).unwrap();
        let size_bytes = content.len() as u64;
        let meta = FileMeta { path, mode: 0o600, mtime: 1_700_000_000, size_bytes };
        backup.begin_file(meta).await.unwrap();
        for piece in pieces(content) {
            backup.write(piece).await.unwrap();
        }
        backup.end_file().await.unwrap();
    }
    let packed = backup.finish_packs().await.unwrap();
    assert_eq!(packed.checksum_failure_count(), 0);
    packed.stored_bytes()
}

/// The whole packing by number of threads: time as it passes.
fn packs(bench: &mut Bench) {
    let mut group = bench.wall.benchmark_group("packs, wall");
    let runtime = Runtime::new().unwrap();
    for files in &Samples::get().files {
        let (elements, size) = (files.blocks().len() as u64, files.size_bytes() as u64);
        group.throughput(Throughput::ElementsAndBytes { elements, bytes: size });
        let levels = if files.content == "app" { &LEVELS[..] } else { &[1] };
        for number in levels {
            for threads in [1, 2] {
                let id = format!("{}, level {number}, {threads} threads", files.content);
                group.bench_function(id, |run| {
                    run.iter(|| runtime.block_on(pack(files, threads, *number)));
                });
            }
        }
    }
    group.finish();
}

/// CPU time of everything that is not zstd.
fn overhead(samples: &Samples) {
    let runtime = Runtime::new().unwrap();
    for files in &samples.files {
        for number in LEVELS {
            let blocks = files.blocks();
            // The ends of files, which the pipeline takes too, belong to zstd alone as well.
            let rest: Vec<Bytes> = files
                .files
                .iter()
                .map(|(_, content)| content.slice(content.len() >> 20 << 20..))
                .filter(|rest| !rest.is_empty())
                .collect();
            let all = [blocks, rest].concat();
            let [mut alone, mut one, mut two, mut gcm] = [(); 4].map(|()| Rounds::default());
            let mut compressor = encoder(number);
            let mut out = Vec::with_capacity(2 << 20);
            let mut frames = sealed_frames(&all, number);
            let cipher = Gcm::new();
            for _ in 0..ROUNDS {
                alone.push(cpu_seconds(|| zstd_alone(&mut compressor, &all, &mut out)).0);
                gcm.push(cpu_seconds(|| frames.iter_mut().map(|f| cipher.seal(f)).max()).0);
                one.push(cpu_seconds(|| runtime.block_on(pack(files, 1, number))).0);
                two.push(cpu_seconds(|| runtime.block_on(pack(files, 2, number))).0);
            }
            let percent = |of: f64| (of / alone.median() - 1.0) * 100.0;
            report(
                &format!("pipeline overhead, {}, level {number}", files.content),
                format!(
                    "{:.0} MB: zstd alone {} CPU s, AES-256-GCM alone {}; everything with 1 thread \
                     {}, with 2 {}; not zstd: {:.1} % and {:.1} %",
                    files.size_bytes() as f64 / 1e6,
                    alone.show(4),
                    gcm.show(4),
                    one.show(4),
                    two.show(4),
                    percent(one.median()),
                    percent(two.median())
                ),
            );
        }
        components(files);
    }
}

/// What the overhead is made of: each piece alone, over the same blocks.
fn components(files: &Files) {
    let blocks = files.blocks();
    let slices: Vec<Vec<Bytes>> = blocks.iter().map(pieces).collect();
    let inspector = Pages::new(Lsn(u64::MAX), Check::Every);
    let meta = FileMeta {
        path: FilePath::new(&files.files[0].0).unwrap(),
        mode: 0o600,
        mtime: 0,
        size_bytes: 1 << 30,
    };
    let [mut sums, mut crcs, mut hashes, mut alone] = [(); 4].map(|()| Rounds::default());
    let mut compressor = encoder(1);
    let mut out = Vec::with_capacity(2 << 20);
    for _ in 0..ROUNDS {
        // The place of a block in the file changes what is found, not what it costs; the list of what
        // is found is made for pages of this first file only.
        let first = files.files[0].1.len() >> 20;
        let looked = slices.iter().take(first).enumerate();
        let scale = slices.len() as f64 / first.max(1) as f64;
        let look = |(index, block): (usize, &Vec<Bytes>)| {
            inspector.block(&meta, (index as u64) << 20, block).len()
        };
        sums.push(cpu_seconds(|| looked.map(look).sum::<usize>()).0 * scale);
        crcs.push(cpu_seconds(|| blocks.iter().map(|block| crc32c(block)).max()).0);
        hashes.push(cpu_seconds(|| blocks.iter().map(|b| blake3::hash(b).as_bytes()[0]).max()).0);
        alone.push(cpu_seconds(|| zstd_alone(&mut compressor, &blocks, &mut out)).0);
    }
    let part = |rounds: &Rounds| format!("{:.1} %", rounds.median() / alone.median() * 100.0);
    report(
        &format!("pipeline overhead, {}, parts of it at level 1", files.content),
        format!(
            "page checksums {}, CRC-32C {}, BLAKE3 {} of zstd alone",
            part(&sums),
            part(&crcs),
            part(&hashes)
        ),
    );
}

/// The WAL's way, decoded, compressed, sealed: CPU time of a segment of 16 MiB.
fn wal_segments(samples: &Samples) {
    let writer = Runtime::new().unwrap().block_on(Sink::writer());
    for wal in &samples.wal {
        let pieces: Vec<Bytes> = wal_pieces(wal);
        let segments = wal.bytes.len() as f64 / f64::from(16 << 20);
        let [mut alone, mut decoded, mut sealed] = [(); 3].map(|()| Rounds::default());
        let mut compressor = encoder(1);
        let mut out = Vec::with_capacity(2 << 20);
        let blocks: Vec<Bytes> =
            (0..wal.bytes.len() >> 20).map(|n| wal.bytes.slice(n << 20..(n + 1) << 20)).collect();
        let milliseconds = |seconds: f64| seconds * 1000.0 / segments;
        let mut stored_bytes = 0;
        for _ in 0..ROUNDS {
            let zstd = || zstd_alone(&mut compressor, &blocks, &mut out);
            alone.push(milliseconds(cpu_seconds(zstd).0));
            decoded.push(milliseconds(cpu_seconds(|| scan(wal, &pieces)).0));
            let (took, bytes) = cpu_seconds(|| extents(&writer, wal, &pieces));
            sealed.push(milliseconds(took));
            stored_bytes = bytes;
        }
        let sum = decoded.median() + sealed.median();
        report(
            &format!("wal segment, {}", wal.load),
            format!(
                "of 16 MiB, ratio {:.2}: zstd alone {} CPU ms, decoding {}, extent compressed and \
                 sealed {}; not zstd: {:.1} %",
                wal.bytes.len() as f64 / stored_bytes as f64,
                alone.show(2),
                decoded.show(2),
                sealed.show(2),
                (sum / alone.median() - 1.0) * 100.0
            ),
        );
    }
}

fn wal_pieces(wal: &Wal) -> Vec<Bytes> {
    let cut = |from: usize| wal.bytes.slice(from..(from + WAL_PIECE_BYTES).min(wal.bytes.len()));
    (0..wal.bytes.len()).step_by(WAL_PIECE_BYTES).map(cut).collect()
}

fn scan(wal: &Wal, pieces: &[Bytes]) -> u64 {
    let mut scanner = Scanner::new(wal.segment_size, wal.start);
    let mut count = 0;
    for piece in pieces {
        scanner.feed(piece, &mut |_| count += 1).unwrap();
    }
    count
}

/// An extent a segment, as under load; the bytes of all.
fn extents(writer: &Writer, wal: &Wal, pieces: &[Bytes]) -> usize {
    let mut stored = 0;
    let mut start = wal.start;
    let per_segment = wal.segment_size.bytes() as usize / WAL_PIECE_BYTES;
    for segment in pieces.chunks(per_segment) {
        let mut extent =
            ExtentBuilder::new(writer, TimelineId::FIRST, start, Level::default()).unwrap();
        for piece in segment {
            extent.push(piece.clone()).unwrap();
        }
        start = extent.end();
        stored += extent.finish(None).unwrap().body.len();
    }
    stored
}
