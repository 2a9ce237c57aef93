//! Decoding WAL.
//!
//! Unit: bytes and records a second of one thread. Limit: CRC-32C over the same bytes, which every
//! record carries; beside it `pg_waldump` as a whole process on the same files.

use std::hint::black_box;
use std::process::{Command, Stdio};

use criterion::{BenchmarkId, Throughput};
use tidemark::pg::crc::crc32c;
use tidemark::wal::{CrcCheck, RecordReader, Scanner};

use crate::measure::{Bench, Rounds, children_cpu, report};
use crate::samples::{Samples, Wal};

/// What a walsender puts into a message.
const PIECE_BYTES: usize = 128 << 10;
/// Rounds of the whole processes.
const ROUNDS: usize = 5;

fn scan(wal: &Wal, check: CrcCheck) -> u64 {
    let mut scanner = Scanner::new(wal.segment_size, wal.start).with_crc_check(check);
    let mut count = 0;
    for piece in wal.bytes.chunks(PIECE_BYTES) {
        scanner.feed(piece, &mut |_| count += 1).unwrap();
    }
    count
}

fn read(wal: &Wal) -> u64 {
    let mut reader = RecordReader::new(wal.segment_size, wal.start);
    let mut blocks = 0;
    for piece in wal.bytes.chunks(PIECE_BYTES) {
        let mut each = |record: &tidemark::wal::Record<'_>| {
            blocks += record.blocks.len() as u64;
            Ok(())
        };
        reader.feed(piece, &mut each).unwrap();
    }
    blocks
}

pub fn bench(bench: &mut Bench) {
    if bench.reports.wants("wal") {
        let samples = Samples::get();
        report("wal samples", &samples.origin);
        for wal in &samples.wal {
            let (bytes, count) = (wal.bytes.len(), wal.record_count);
            let each = bytes as u64 / count;
            report(
                "wal samples",
                format!("{}: {bytes} bytes, {count} records of {each}", wal.load),
            );
        }
    }
    let mut group = bench.cpu.benchmark_group("wal");
    for wal in &Samples::get().wal {
        let (elements, bytes) = (wal.record_count, wal.bytes.len() as u64);
        group.throughput(Throughput::ElementsAndBytes { elements, bytes });
        let id = |what: &str| BenchmarkId::new(what, &wal.load);
        group.bench_function(id("landmarks"), |run| run.iter(|| scan(wal, CrcCheck::Every)));
        group.bench_function(id("landmarks without CRC"), |run| {
            run.iter(|| scan(wal, CrcCheck::None));
        });
        group.bench_function(id("records"), |run| run.iter(|| read(wal)));
        group.bench_function(id("limit: CRC-32C in one piece"), |run| {
            run.iter(|| crc32c(black_box(&wal.bytes)));
        });
    }
    group.finish();
    if bench.reports.wants("wal whole process") {
        for wal in &Samples::get().wal {
            whole_processes(Samples::get(), wal);
        }
    }
}

/// `pg_waldump` and `tidemark inspect` on the same segment files, nothing printed.
fn whole_processes(samples: &Samples, wal: &Wal) {
    let Some(binaries) = &samples.binaries else { return };
    let (Some(first), Some(last)) = (wal.segments.first(), wal.segments.last()) else { return };
    let mut waldump = Command::new(binaries.dir().join("pg_waldump"));
    // Since 15; before, it can only be told to count.
    waldump.arg(if binaries.major() >= 15 { "--quiet" } else { "--stats" });
    waldump.arg("-p").arg(first.parent().unwrap());
    waldump.args([first.file_name().unwrap(), last.file_name().unwrap()]);
    let mut inspect: Vec<Command> = Vec::new();
    for segment in &wal.segments {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidemark"));
        command.arg("inspect").arg(segment).env("TIDEMARK_CONFIG", "");
        inspect.push(command);
    }
    let (mut theirs, mut ours) = (Rounds::default(), Rounds::default());
    for _ in 0..ROUNDS {
        theirs.push(cpu_of(std::slice::from_mut(&mut waldump)));
        ours.push(cpu_of(&mut inspect));
    }
    let megabytes = wal.bytes.len() as f64 / 1e6;
    report(
        &format!("wal whole process, {}", wal.load),
        format!(
            "{megabytes:.0} MB: pg_waldump {} CPU s, tidemark inspect ({} times a segment) {} CPU s; \
             ratio {:.2}",
            theirs.show(3),
            wal.segments.len(),
            ours.show(3),
            ours.median() / theirs.median()
        ),
    );
}

fn cpu_of(commands: &mut [Command]) -> f64 {
    let begun = children_cpu();
    for command in commands {
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(status.success(), "{command:?}");
    }
    (children_cpu() - begun).as_secs_f64()
}
