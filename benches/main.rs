//! Benchmarks of the parts, in CPU time, each beside what bounds it.
//!
//! `cargo bench` runs all of them and ends in a few minutes on two cores; `cargo bench -- wal` those
//! whose name holds the word. The last results and what they mean are in `benches/README.md`.
//!
//! # Shape
//! - What criterion prints is CPU time of the one thread that works, so that other load on the machine
//!   hardly shows; groups that end in `wall` are the exception, where several threads work.
//! - Lines that begin with `==` are reports: comparisons of several things in interleaved rounds (the
//!   median, and the least and the most in brackets), memory, and whole processes.
//! - The data is made once with a real PostgreSQL and kept below `target/tmp` (`samples`).
//!
//! One program for all of them: linking the library costs more than any of the measurements.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::disallowed_methods)]
#![allow(clippy::print_stdout, unreachable_pub, clippy::too_many_lines)]

use std::time::Duration;

use criterion::Criterion;

#[allow(unused_imports, reason = "only the PostgreSQL of the tests is needed here")]
#[path = "../tests/harness/mod.rs"]
mod harness;

mod catalog;
mod measure;
mod pages;
mod pipeline;
mod samples;
mod sink;
mod wal;
mod wire;

use measure::{Bench, CpuTime, Reports};

#[global_allocator]
static ALLOCATOR: measure::Counting = measure::Counting;

/// Enough for figures that repeat to a few per cent, and for all of them in a few minutes.
fn settings() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .nresamples(2000)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .without_plots()
}

fn main() {
    let mut bench = Bench {
        cpu: settings().with_measurement(CpuTime).configure_from_args(),
        wall: settings().configure_from_args(),
        reports: Reports::from_args(),
    };
    wal::bench(&mut bench);
    pages::bench(&mut bench);
    pipeline::bench(&mut bench);
    wire::bench(&mut bench);
    catalog::bench(&mut bench);
    bench.cpu.final_summary();
}
