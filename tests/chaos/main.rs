//! Chaos: real Postgres, a real S3 server, the real binary, and faults drawn from a seed.
//!
//! A round writes numbered rows on several connections, makes its faults, ends the sidecar and the
//! servers, and then has only the repository: what Postgres was told is durable must be in a restore,
//! listings must be true, `verify` must agree, and nobody may have complained without a reason.
//!
//! `cargo test` runs a bounded slice; `tools/chaos` runs as many rounds as it is told to. A failure
//! prints the command that repeats its round, and keeps logs, plan and record of the round.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::disallowed_methods)]
#![allow(clippy::print_stdout, unreachable_pub, clippy::too_many_lines)]

#[path = "../harness/mod.rs"]
mod harness;

mod check;
mod complaints;
mod diary;
mod faults;
mod options;
mod plan;
mod random;
mod report;
mod round;
mod sidecars;
mod stage;
mod usage;
mod writer;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use options::Options;
use plan::Plan;
use report::Report;

#[test]
fn nothing_that_was_acknowledged_is_lost_whatever_happens() {
    let options = Options::of_environment();
    if options.plan_only {
        for (seed, round) in &options.rounds {
            println!("{}", Plan::draw(*seed, *round, &options.only));
        }
        return;
    }
    let report = Mutex::new(Report::default());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                while let Some((seed, round)) =
                    options.rounds.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    play(&Plan::draw(*seed, *round, &options.only), &options, &report);
                }
            });
        }
    });
    stage::delete_templates();
    let report = report.into_inner().unwrap();
    match options.json {
        true => println!("{:#}", report.json()),
        false => println!("{}", report.text()),
    }
    assert!(report.failures.is_empty(), "{} rounds failed", report.failures.len());
    assert_eq!(report.round_count, options.rounds.len());
}

fn play(plan: &Plan, options: &Options, report: &Mutex<Report>) {
    // Standard error, so that standard output has the summary alone.
    eprintln!("{plan}");
    let round = round::play(plan, &options.evidence);
    let seconds = round.elapsed.as_secs();
    match (&round.verdict, &round.evidence) {
        (Ok(verdict), _) => {
            eprintln!(
                "seed {} round {}: passed in {seconds} s, {} commits durable",
                plan.seed, plan.round, verdict.durable_count
            );
            for (kind, reason) in &verdict.not_run {
                eprintln!("NOT RUN: {}: {reason}", kind.name());
            }
        }
        (Err(failure), evidence) => {
            let kept = evidence.as_ref().map(|at| at.display().to_string()).unwrap_or_default();
            eprintln!(
                "seed {} round {}: FAILED in {seconds} s\n{failure}\nthe evidence is kept in \
                 {kept}\nto repeat it: {}",
                plan.seed,
                plan.round,
                plan.replay(&options.only)
            );
        }
    }
    report.lock().unwrap().add(&round, &options.only);
}
