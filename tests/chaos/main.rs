//! Chaos: real Postgres, the real binary, our S3 test server (minis3) in this process, and faults drawn
//! from a seed.
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
mod inventory;
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

use harness::commit::commit_hash;
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
    println!("{}", report.text());
    if let Some(file) = &options.json {
        std::fs::write(file, format!("{:#}\n", report.json())).unwrap();
    }
    assert!(report.failures.is_empty(), "{} rounds failed", report.failures.len());
    assert_eq!(report.round_count, options.rounds.len());
    assert_eq!(report.never_effective(), [""; 0], "drawn again and again, and never of any effect");
}

#[test]
fn a_round_whose_store_loses_wal_fails() {
    let options = Options::of_environment();
    if !options.is_slice {
        return;
    }
    let mut plan = Plan::draw(1, 0, &[plan::Kind::SwitchStorm]);
    plan.setup.upkeep = false;
    plan.setup.early = false;
    plan.setup.backup_interval = std::time::Duration::from_secs(3600);
    let round = round::play_and(&plan, &options.evidence, |stage| {
        // What covers the middle of the WAL after the only backup, so that a hole is left.
        let middle = faults::extents(stage).iter().map(|extent| extent.range.0).collect::<Vec<_>>();
        let middle = middle[middle.len() - 3];
        for extent in faults::extents(stage) {
            if (extent.range.0..extent.range.1).contains(&middle) {
                assert!(stage.s3.server().vanish("tidemark", &extent.name));
            }
        }
    });
    let failure = round.failure().unwrap();
    for words in ["missing: [(0/", "LOST "] {
        assert!(failure.contains(words), "{words}: {failure}");
    }
    let mut report = Report::default();
    report.add(&round, &options.only);
    let (report, lost) = (report.json(), round.verdict.lost_count);
    assert!(lost > 0 && report["commits_lost"] == lost, "{report:#}");
    let _ = std::fs::remove_dir_all(round.evidence.unwrap());
}

fn play(plan: &Plan, options: &Options, report: &Mutex<Report>) {
    // Standard error, so that standard output has the summary alone.
    eprintln!("{plan}");
    let round = round::play(plan, &options.evidence);
    let seconds = round.elapsed.as_secs();
    match round.failure() {
        None => eprintln!(
            "seed {} round {}: passed in {seconds} s, {} commits durable",
            plan.seed, plan.round, round.verdict.durable_count
        ),
        Some(failure) => {
            let kept = round.evidence.as_ref().map(|at| at.display().to_string());
            eprintln!(
                "seed {} round {}: FAILED in {seconds} s\n{failure}\nthe evidence is kept in \
                 {}\nto repeat it at commit {}: {}",
                plan.seed,
                plan.round,
                kept.unwrap_or_default(),
                commit_hash(),
                plan.replay(&options.only)
            );
        }
    }
    for (kind, reason) in &round.verdict.not_run {
        eprintln!("NOT RUN: {}: {reason}", kind.name());
    }
    report.lock().unwrap().add(&round, &options.only);
}
