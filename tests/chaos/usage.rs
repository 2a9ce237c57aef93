//! What a round says about time and resources: data at risk, memory, file descriptors.

use std::time::{Duration, Instant};

use tidemark::pg::Lsn;

use super::check::Verdict;
use super::plan::Acknowledgement;
use super::round::Times;
use super::stage::Stage;

/// Most memory that a sidecar may have: the budgets of stream and backup together, and its own.
const PEAK_KIB_MAX: u64 = 160 << 10;
/// How much more memory it may have at the end than at the beginning.
const GROWTH_KIB_MAX: u64 = 64 << 10;
/// How many more file descriptors it may have at the end than at the beginning.
const OPEN_FILES_MORE_MAX: usize = 16;
/// Greatest age of a commit that is not durable while nothing is wrong.
const RPO_CALM_MAX: Duration = Duration::from_secs(20);

/// Fills in the figures that every round has, also one that was broken off.
pub fn count(stage: &Stage, verdict: &mut Verdict) {
    if stage.plan.setup.acknowledgement == Acknowledgement::ByFlushPosition {
        verdict.rpo_worst = rpo(stage, |_| true);
    }
    let usage = stage.sidecar.usage();
    verdict.peak_kib = usage.iter().map(|usage| usage.peak_kib).max().unwrap_or(0);
    verdict.open_file_count = usage.iter().map(|usage| usage.open_file_count).max().unwrap_or(0);
}

/// Fills in the others, and says what is wrong with any.
pub fn measure(stage: &Stage, times: &Times, verdict: &mut Verdict, flaws: &mut Vec<String>) {
    if stage.plan.setup.acknowledgement == Acknowledgement::ByFlushPosition {
        let settled = times.recovered + Duration::from_secs(1);
        let within = |from: Instant, until: Instant| rpo(stage, |at| (from..until).contains(&at));
        verdict.rpo_worst = within(times.calm, times.stopped);
        verdict.rpo_calm = within(times.calm, times.chaos).max(within(settled, times.stopped));
        if verdict.rpo_calm > RPO_CALM_MAX {
            flaws.push(format!("undisturbed, a commit waited for {:?}", verdict.rpo_calm));
        }
    }
    let usage = stage.sidecar.usage();
    if verdict.peak_kib > PEAK_KIB_MAX {
        flaws.push(format!("a sidecar had {} KiB of memory", verdict.peak_kib));
    }
    let most = |from: Instant, until: Instant| {
        let during = usage.iter().filter(move |usage| (from..until).contains(&usage.at));
        during.fold((0, 0), |(memory, files), usage| {
            (memory.max(usage.memory_kib), files.max(usage.open_file_count))
        })
    };
    // From the start of the sidecar: the first backup is part of what is usual.
    let first = usage.first().map_or(times.calm, |usage| usage.at);
    let (usual, last) = (most(first, times.chaos), most(times.recovered, times.stopped));
    // A round without calm before its faults shows nothing usual.
    if stage.plan.setup.early {
        return;
    }
    if last.0 > usual.0 + GROWTH_KIB_MAX || last.1 > usual.1 + OPEN_FILES_MORE_MAX {
        flaws.push(format!(
            "a sidecar grew: (KiB, open files) were {usual:?} and are {last:?} in the end"
        ));
    }
}

/// Greatest age of a commit that was acknowledged and not durable, as seen at the moments that count.
fn rpo(stage: &Stage, counts: impl Fn(Instant) -> bool) -> Duration {
    let samples = stage.samples.lock().unwrap().clone();
    let mut worst = Duration::ZERO;
    for server in 0..2 {
        let commits = stage.record.commits();
        let mut commits: Vec<(Lsn, Instant)> = commits
            .iter()
            .filter(|commit| commit.server == server)
            .filter_map(|commit| Some((commit.until_lsn?, commit.acknowledged_at)))
            .collect();
        commits.sort_unstable();
        let mut flushed = Lsn::default();
        for sample in samples.iter().filter(|sample| sample.server == server) {
            // What was at risk until this answer came.
            let at_risk = commits.partition_point(|(lsn, _)| *lsn <= flushed);
            if let Some((_, acknowledged_at)) = commits.get(at_risk)
                && counts(sample.at)
            {
                worst = worst.max(sample.at.saturating_duration_since(*acknowledged_at));
            }
            flushed = flushed.max(sample.flush_lsn);
        }
    }
    worst
}
