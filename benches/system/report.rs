//! Figures by phase and peer: medians with the least and the greatest.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::Options;
use crate::processes::Cost;

/// Everything that was measured.
#[derive(Debug, Default)]
pub struct Report {
    versions: Vec<(String, String)>,
    data_set: String,
    /// Phases and peers that failed in them.
    failures: Vec<(String, String)>,
    /// Phases, peers and figures in the order they first came; a value for each round.
    phases: Vec<(String, Vec<Row>)>,
}

#[derive(Debug)]
struct Row {
    peer: String,
    figures: Vec<(String, Vec<f64>)>,
}

impl Report {
    /// What was measured.
    pub fn version(&mut self, name: &str, version: &str) {
        println!("{name}: {version}");
        self.versions.push((name.into(), version.into()));
    }

    /// On what.
    pub fn data_set(&mut self, bytes: u64, options: &Options) {
        self.data_set = format!(
            "{:.2} GiB: pgbench scale {}, {} MiB random bytes, the rest JSON",
            bytes as f64 / f64::from(1 << 30),
            options.scale,
            options.noise_mib
        );
    }

    /// A peer failed in a phase, with these words.
    pub fn failed(&mut self, phase: &str, peer: &str, words: &str) {
        println!("{phase:<9} {peer:<18} FAILED: {words}");
        self.failures.push((phase.into(), peer.into()));
    }

    /// Whether it did.
    pub fn has_failed(&self, phase: &str, peer: &str) -> bool {
        self.failures.iter().any(|failure| (&*failure.0, &*failure.1) == (phase, peer))
    }

    /// Everybody who failed in something.
    pub fn failures(&self) -> &[(String, String)] {
        &self.failures
    }

    /// One value.
    pub fn figure(&mut self, phase: &str, peer: &str, name: &str, value: f64) {
        let phase = entry(&mut self.phases, phase);
        let place = phase.iter().position(|row| row.peer == peer).unwrap_or_else(|| {
            phase.push(Row { peer: peer.into(), figures: Vec::new() });
            phase.len() - 1
        });
        entry(&mut phase[place].figures, name).push(value);
    }

    /// What a stretch cost.
    pub fn cost(&mut self, phase: &str, peer: &str, cost: &Cost) {
        println!(
            "{phase:<9} {peer:<18} {:7.2} s, CPU {:6.2} s, postgres {:6.2} s, S3 {:6.2} s, {:6.1} MiB",
            cost.wall_s, cost.cpu.tool_s, cost.cpu.postgres_s, cost.cpu.s3_s, cost.peak_mib
        );
        for (name, value) in [
            ("wall s", cost.wall_s),
            ("tool CPU s", cost.cpu.tool_s),
            ("postgres CPU s", cost.cpu.postgres_s),
            ("S3 CPU s", cost.cpu.s3_s),
            ("peak MiB", cost.peak_mib),
        ] {
            self.figure(phase, peer, name, value);
        }
    }

    /// Tables for people.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for (name, version) in &self.versions {
            writeln!(text, "- {name}: {version}").unwrap();
        }
        writeln!(text, "- data set: {}", self.data_set).unwrap();
        for (phase, rows) in &self.phases {
            let mut names: Vec<&str> = Vec::new();
            for (name, _) in rows.iter().flat_map(|row| &row.figures) {
                if !names.contains(&name.as_str()) {
                    names.push(name);
                }
            }
            writeln!(text, "\n| {phase} | {} |", names.join(" | ")).unwrap();
            writeln!(text, "|---|{}", "---:|".repeat(names.len())).unwrap();
            for row in rows {
                let cell = |name: &&str| {
                    let values = row.figures.iter().find(|(had, _)| had == name);
                    values.map_or_else(String::new, |(_, values)| spread(values))
                };
                let cells: Vec<String> = names.iter().map(cell).collect();
                writeln!(text, "| {} | {} |", row.peer, cells.join(" | ")).unwrap();
            }
        }
        text
    }

    /// All values for machines.
    pub fn json(&self) -> serde_json::Value {
        let phases: BTreeMap<_, BTreeMap<_, BTreeMap<_, _>>> = self
            .phases
            .iter()
            .map(|(phase, rows)| {
                let rows = rows.iter().map(|row| {
                    let figures = row.figures.iter().map(|(name, values)| (name, values));
                    (&row.peer, figures.collect())
                });
                (phase, rows.collect())
            })
            .collect();
        let versions: BTreeMap<_, _> = self.versions.iter().cloned().collect();
        serde_json::json!({ "versions": versions, "data_set": self.data_set, "phases": phases })
    }
}

/// The value of `key`, made if it is new.
fn entry<'a, V: Default>(list: &'a mut Vec<(String, V)>, key: &str) -> &'a mut V {
    let place = list.iter().position(|(had, _)| had == key).unwrap_or_else(|| {
        list.push((key.into(), V::default()));
        list.len() - 1
    });
    &mut list[place].1
}

/// The median, with the least and the greatest where they differ in what is shown.
fn spread(values: &[f64]) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (least, greatest) = (number(sorted[0]), number(sorted[sorted.len() - 1]));
    let median = number((sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0);
    if least == greatest { median } else { format!("{median} ({least}–{greatest})") }
}

fn number(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}
