//! The summary of all rounds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::json;

use crate::harness::commit::commit_hash;

use super::plan::{Acknowledgement, Kind};
use super::round::Round;

/// So often a kind of fault may be drawn and meet nothing.
const DRAWN_MIN: usize = 5;

/// What all rounds came to.
#[derive(Debug, Default)]
pub struct Report {
    /// Rounds that were played.
    pub round_count: usize,
    /// Rounds that failed: the command that repeats each, and why.
    pub failures: Vec<(String, String)>,
    /// Faults that met what they are aimed at.
    faults: BTreeMap<Kind, usize>,
    /// Faults that were drawn and met nothing: there was no process, no connection, no request.
    without_effect: BTreeMap<Kind, usize>,
    not_run: BTreeMap<Kind, (usize, String)>,
    broken_off: usize,
    together: usize,
    synchronous: usize,
    segments: BTreeMap<u32, usize>,
    attempts: usize,
    commits: usize,
    durable: usize,
    compared: usize,
    lost: usize,
    restores: u32,
    refused: u32,
    gaps: usize,
    fenced: BTreeMap<Kind, usize>,
    starts: u32,
    rpo_worst: Duration,
    rpo_calm: Duration,
    recovery: Duration,
    peak_kib: u64,
    open_files: usize,
    played: Duration,
}

impl Report {
    /// Adds a round, whether it failed or not: what a failed round lost must not be missing from the sum.
    pub fn add(&mut self, round: &Round, only: &[Kind]) {
        self.round_count += 1;
        self.played += round.elapsed;
        let plan = &round.plan;
        let verdict = &round.verdict;
        self.failures.extend(round.failure().map(|failure| (plan.replay(only), failure)));
        self.broken_off += usize::from(!verdict.is_whole);
        for (kind, reason) in &verdict.not_run {
            let entry = self.not_run.entry(*kind).or_default();
            *entry = (entry.0 + 1, reason.clone());
        }
        let ran = |kind: Kind| verdict.not_run.iter().all(|(missing, _)| *missing != kind);
        for fault in plan.faults.iter().filter(|fault| ran(fault.kind)) {
            let counts = match verdict.effective.contains(&fault.kind) {
                true => &mut self.faults,
                // It may not have come to it.
                false if !verdict.is_whole => continue,
                false => &mut self.without_effect,
            };
            *counts.entry(fault.kind).or_default() += 1;
        }
        for kind in &verdict.fenced {
            *self.fenced.entry(*kind).or_default() += 1;
        }
        self.together += usize::from(plan.faults.len() > 1);
        let synchronous = plan.setup.acknowledgement == Acknowledgement::Synchronous;
        self.synchronous += usize::from(synchronous);
        *self.segments.entry(plan.setup.segment_mib).or_default() += 1;
        self.attempts += verdict.attempt_count;
        self.commits += verdict.commit_count;
        self.durable += verdict.durable_count;
        self.compared += verdict.compared_count;
        self.lost += verdict.lost_count;
        self.restores += verdict.restore_count;
        self.refused += verdict.refused_count;
        self.gaps += verdict.gap_count;
        self.starts += verdict.start_count;
        self.rpo_worst = self.rpo_worst.max(verdict.rpo_worst);
        self.rpo_calm = self.rpo_calm.max(verdict.rpo_calm);
        self.recovery = self.recovery.max(verdict.recovery);
        self.peak_kib = self.peak_kib.max(verdict.peak_kib);
        self.open_files = self.open_files.max(verdict.open_file_count);
    }

    /// Kinds that were drawn again and again in rounds that passed and never met anything: what they are
    /// to show was not shown.
    pub fn never_effective(&self) -> Vec<&'static str> {
        let never = self
            .without_effect
            .iter()
            .filter(|(kind, count)| **count >= DRAWN_MIN && !self.faults.contains_key(kind));
        never.map(|(kind, _)| kind.name()).collect()
    }

    /// For people.
    pub fn text(&self) -> String {
        let seconds = Duration::as_secs_f64;
        let passed = self.round_count - self.failures.len();
        let mut text = format!(
            "{} rounds, {passed} passed, {} failed\n",
            self.round_count,
            self.failures.len()
        );
        let mut line = |label: &str, value: String| writeln!(text, "{label:<44}{value}").unwrap();
        line("commit", commit_hash());
        line("commits tried", self.attempts.to_string());
        line("  of which acknowledged by PostgreSQL", self.commits.to_string());
        line("  of which durable in the repository", self.durable.to_string());
        line("  of which looked for in a restore", self.compared.to_string());
        line("commits LOST: not in a restore (must be 0)", self.lost.to_string());
        line("restores started and compared", self.restores.to_string());
        line("restores that had to be refused, and were", self.refused.to_string());
        line("gaps that had to be listed, and were", self.gaps.to_string());
        line("starts of the sidecar", self.starts.to_string());
        line(
            "worst age of a commit not durable, calm",
            format!("{:.1} s", seconds(&self.rpo_calm)),
        );
        line(
            "worst age of a commit not durable, at all",
            format!("{:.1} s", seconds(&self.rpo_worst)),
        );
        line("longest recovery after the last fault", format!("{:.1} s", seconds(&self.recovery)));
        line("peak memory of a sidecar", format!("{} MiB", self.peak_kib >> 10));
        line("most file descriptors of a sidecar", self.open_files.to_string());
        line("rounds with several faults", self.together.to_string());
        line("rounds in which COMMIT waits for the sidecar", self.synchronous.to_string());
        for (mib, count) in &self.segments {
            line(&format!("rounds with WAL segments of {mib} MiB"), count.to_string());
        }
        for (kind, count) in &self.faults {
            let fenced = self.fenced.get(kind);
            let fenced = fenced.map_or(String::new(), |count| format!(" ({count} fenced)"));
            line(&format!("fault {}", kind.name()), format!("{count}{fenced}"));
        }
        for (kind, count) in &self.without_effect {
            line(&format!("drawn without effect: {}", kind.name()), count.to_string());
        }
        for (kind, (count, reason)) in &self.not_run {
            line(
                &format!("NOT RUN {}", kind.name()),
                format!("{count}: {reason} (root may mount file systems)"),
            );
        }
        if self.broken_off > 0 {
            line("rounds broken off before their verdict", self.broken_off.to_string());
        }
        for (replay, failure) in &self.failures {
            writeln!(text, "FAILED: {replay}\n{failure}").unwrap();
        }
        text
    }

    /// For machines.
    pub fn json(&self) -> serde_json::Value {
        let named = |counts: &BTreeMap<Kind, usize>| -> BTreeMap<&'static str, usize> {
            counts.iter().map(|(kind, count)| (kind.name(), *count)).collect()
        };
        let not_run: BTreeMap<&str, &str> =
            self.not_run.iter().map(|(kind, (_, why))| (kind.name(), why.as_str())).collect();
        let failures: Vec<_> = self
            .failures
            .iter()
            .map(|(replay, failure)| json!({ "replay": replay, "failure": failure }))
            .collect();
        json!({
            "rounds": self.round_count,
            "passed": self.round_count - self.failures.len(),
            "failures": failures,
            "commit": commit_hash(),
            "rounds_broken_off": self.broken_off,
            "commits_tried": self.attempts,
            "commits_acknowledged": self.commits,
            "commits_durable": self.durable,
            "commits_compared": self.compared,
            "commits_lost": self.lost,
            "restores": self.restores,
            "refusals": self.refused,
            "gaps": self.gaps,
            "sidecar_starts": self.starts,
            "rpo_calm_seconds": self.rpo_calm.as_secs_f64(),
            "rpo_worst_seconds": self.rpo_worst.as_secs_f64(),
            "recovery_worst_seconds": self.recovery.as_secs_f64(),
            "peak_memory_kib": self.peak_kib,
            "open_files_max": self.open_files,
            "rounds_with_several_faults": self.together,
            "rounds_synchronous": self.synchronous,
            "rounds_by_segment_mib": self.segments,
            "faults": named(&self.faults),
            "without_effect": named(&self.without_effect),
            "fenced": named(&self.fenced),
            "not_run": not_run,
            "round_seconds": self.played.as_secs_f64(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::super::plan::Plan;
    use super::*;

    #[test]
    fn a_round_that_failed_is_in_every_total() {
        let mut report = Report::default();
        let plan = Plan::draw(1, 0, &[Kind::SidecarKill]);
        for (lost_count, flaws) in [(10_000, vec!["LOST 10000".to_owned()]), (0, Vec::new())] {
            let verdict = Verdict {
                attempt_count: 30_000,
                commit_count: 20_000,
                durable_count: 15_000,
                compared_count: 15_000,
                lost_count,
                restore_count: 2,
                rpo_worst: Duration::from_secs(lost_count as u64 / 1000),
                effective: vec![Kind::SidecarKill],
                is_whole: true,
                ..Verdict::default()
            };
            let (elapsed, evidence) = (Duration::from_secs(9), None);
            report.add(&Round { plan: plan.clone(), elapsed, verdict, flaws, evidence }, &[]);
        }
        let json = report.json();
        let totals = [
            ("rounds", 2),
            ("passed", 1),
            ("commits_tried", 60_000),
            ("commits_acknowledged", 40_000),
            ("commits_durable", 30_000),
            ("commits_compared", 30_000),
            ("commits_lost", 10_000),
            ("restores", 4),
        ];
        for (name, total) in totals {
            assert_eq!(json[name], total, "{name}");
        }
        assert_eq!(
            (&json["faults"]["sidecar-kill"], &json["rpo_worst_seconds"]),
            (&json!(2), &json!(10.0))
        );
        assert_eq!(json["commit"], commit_hash());
        let text = report.text();
        let shown = |label: &str, value: &str| {
            text.lines().any(|line| line.starts_with(label) && line.ends_with(value))
        };
        assert!(shown("commits LOST", " 10000") && shown("commit ", &commit_hash()), "{text}");
    }
}
