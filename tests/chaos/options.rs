//! What to run, from the environment: `tools/chaos` sets it from its flags.

use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use crate::harness::commit::commit_seed;

use super::plan::Kind;

/// Seed of the rounds that every run of the tests makes.
const SEED_ALWAYS: u64 = 20_261_122;
/// How many of those rounds.
const ROUNDS_ALWAYS: u32 = 2;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Seed and number of each round.
    pub rounds: Vec<(u64, u32)>,
    /// Kinds of faults; empty means all.
    pub only: Vec<Kind>,
    /// Rounds at a time.
    pub jobs: usize,
    /// Write the summary as JSON to this file.
    pub json: Option<PathBuf>,
    /// Where the evidence of a failed round is kept.
    pub evidence: PathBuf,
    /// The rounds are those of every run of the tests.
    pub is_slice: bool,
    /// Print the plans and run nothing.
    pub plan_only: bool,
}

impl Options {
    /// `TIDEMARK_CHAOS_ROUNDS`, `_FROM`, `_SEED`, `_ROUND`, `_FAULTS`, `_JOBS`, `_JSON`, `_EVIDENCE`,
    /// `_PLAN`.
    /// Without rounds and seed: two rounds that are always the same and one of this commit's own.
    pub fn of_environment() -> Self {
        let text = |name: &str| {
            std::env::var(format!("TIDEMARK_CHAOS_{name}")).ok().filter(|text| !text.is_empty())
        };
        let number = |name: &str| {
            let parse = |text: String| {
                text.parse::<u64>().unwrap_or_else(|error| panic!("{name} '{text}': {error}"))
            };
            text(name).map(parse)
        };
        let drawn = UNIX_EPOCH.elapsed().unwrap().as_secs() % 1_000_000;
        let (count, seed, one) = (number("ROUNDS"), number("SEED"), number("ROUND"));
        let from = number("FROM").unwrap_or(0) as u32;
        let rounds = match (count, seed, one) {
            (None, None, None) => {
                let always = (0..ROUNDS_ALWAYS).map(|round| (SEED_ALWAYS, round));
                always.chain([(commit_seed() % 1_000_000, 0)]).collect()
            }
            (_, seed, Some(round)) => vec![(seed.unwrap_or(drawn), round as u32)],
            (count, seed, None) => {
                let (count, seed) = (count.unwrap_or(10) as u32, seed.unwrap_or(drawn));
                (from..count).map(|round| (seed, round)).collect()
            }
        };
        let named = |name: &str| {
            Kind::named(name).unwrap_or_else(|| {
                let names: Vec<&str> = Kind::ALL.iter().map(|(_, name)| *name).collect();
                panic!("there is no fault '{name}'; there are: {}", names.join(", "))
            })
        };
        let faults = text("FAULTS").unwrap_or_default();
        let only = faults.split(',').map(str::trim).filter(|name| !name.is_empty()).map(named);
        let evidence = text("EVIDENCE").map(PathBuf::from);
        Self {
            rounds,
            only: only.collect(),
            jobs: number("JOBS").unwrap_or(2) as usize,
            json: text("JSON").map(PathBuf::from),
            evidence: evidence
                .unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("chaos")),
            is_slice: (count, seed, one) == (None, None, None),
            plan_only: text("PLAN").is_some(),
        }
    }
}
