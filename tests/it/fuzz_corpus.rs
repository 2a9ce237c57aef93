//! Replays every input that was kept of fuzzing, through the very functions that libFuzzer calls.
//!
//! `fuzz/corpus/<target>` holds seeds, made by hand or by real servers, and where it was minimised the smallest
//! set of other inputs, of 16 KiB at most, that reaches what had been reached by then; several targets have seeds
//! alone. `fuzz/regressions/<target>` holds those that once broke a property. `tools/fuzz` finds and minimises.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use tidemark::fuzz::{TARGETS, Target};

use super::allocation::largest_bytes;

fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(kind)
}

/// The inputs of a target in one of the folders, in the order of their names.
fn inputs(kind: &str, target: &Target) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder(kind).join(target.name)) else { return Vec::new() };
    let mut inputs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    inputs
}

/// Most bytes that a decoder may ask for at once, as `tools/fuzz` has it (`-malloc_limit_mb`).
const ALLOCATION_BYTES_MAX: usize = 80 << 20;

/// Runs a target on these inputs and gives those that broke it.
fn broken(target: &Target, inputs: &[PathBuf]) -> Vec<String> {
    let breaks = |input: &PathBuf| {
        let bytes = std::fs::read(input).unwrap();
        let run = || largest_bytes(|| (target.run)(&bytes));
        match catch_unwind(AssertUnwindSafe(run)) {
            Err(_panic) => Some(input.display().to_string()),
            Ok(largest) if largest > ALLOCATION_BYTES_MAX => {
                Some(format!("{}: asks for {largest} bytes", input.display()))
            }
            Ok(_) => None,
        }
    };
    inputs.iter().filter_map(breaks).collect()
}

#[test]
fn every_property_holds_for_every_input_that_was_kept() {
    let broken = std::thread::scope(|scope| {
        let halves = [0, 1].map(|half| {
            let targets = TARGETS.iter().skip(half).step_by(2);
            scope.spawn(|| {
                let each = |target: &Target| {
                    let corpus = inputs("corpus", target);
                    assert!(!corpus.is_empty(), "target '{}' has no corpus", target.name);
                    let kept = [corpus, inputs("regressions", target)].concat();
                    broken(target, &kept)
                };
                targets.flat_map(each).collect::<Vec<String>>()
            })
        });
        halves.map(|half| half.join().unwrap()).concat()
    });
    assert!(broken.is_empty(), "inputs that break a property:\n  {}", broken.join("\n  "));
}

#[test]
fn every_folder_belongs_to_a_target() {
    for kind in ["corpus", "regressions"] {
        let Ok(entries) = std::fs::read_dir(folder(kind)) else { continue };
        for entry in entries {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(TARGETS.iter().any(|target| target.name == name), "{kind}/{name}");
        }
    }
    for (index, target) in TARGETS.iter().enumerate() {
        let twice = TARGETS.iter().skip(index + 1).any(|other| other.name == target.name);
        assert!(!twice, "two targets are called '{}'", target.name);
    }
}

#[test]
fn the_tool_knows_every_target_and_the_ledger_no_other() {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/fuzz");
    let listed = std::process::Command::new(tool).arg("--list").output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(listed.lines().collect::<Vec<_>>(), names);

    let ledger = std::fs::read_to_string(folder("LEDGER.tsv")).unwrap();
    for row in ledger.lines().skip(1) {
        let fields: Vec<&str> = row.split('\t').collect();
        let [target, seconds, runs, _coverage, _since, _until, _day] = fields[..] else {
            panic!("{row:?} has {} fields", fields.len());
        };
        assert!(names.contains(&target), "{row:?}");
        assert!(seconds.parse::<u64>().is_ok() && runs.parse::<u64>().is_ok(), "{row:?}");
    }
}
