//! What the sidecars said and how they ended, held against what the faults of the round explain.

use super::plan::{Kind, Plan};
use super::sidecars::Exit;
use super::stage::Stage;

/// Exit status of a conflict.
pub const CONFLICT: i32 = 7;

/// Everything that no fault explains.
pub fn unexpected(stage: &Stage) -> Vec<String> {
    let plan = &stage.plan;
    let mut found = Vec::new();
    for exit in stage.sidecar.exits() {
        if !explains_exit(plan, &exit) {
            found.push(format!("a sidecar ended in an unexpected way: {exit:?}"));
        }
    }
    for (name, log) in logs(stage) {
        let odd = log.lines().filter(|line| is_complaint(line) && !explains(plan, line));
        found.extend(odd.map(|line| format!("unexpected in {name}: {line}")));
    }
    found
}

/// What the sidecars have said: the one under the supervisor, and its rivals.
pub fn logs(stage: &Stage) -> [(&'static str, String); 2] {
    ["run.log", "second.log"].map(|name| {
        let log = std::fs::read(stage.tidemark.home().join(name)).unwrap_or_default();
        (name, String::from_utf8_lossy(&log).into_owned())
    })
}

/// Whether a line is a warning or an error.
fn is_complaint(line: &str) -> bool {
    [" WARN ", " ERROR ", "panicked at"].iter().any(|word| line.contains(word))
        || line.starts_with("warning: ")
        || line.starts_with("error: ")
}

/// One kind of complaint, by words that are in it, and whether the plan explains it.
type Rule = (&'static str, fn(&Plan) -> bool);

const RULES: &[Rule] = &[
    // Made on the first start, in every round that encrypts.
    ("no key was configured", |plan| plan.setup.encrypted),
    ("connecting again in", |plan| server(plan) || store(plan) || sidecar(plan)),
    ("trying again for", |plan| store(plan) || late(plan)),
    ("could not be merged", store),
    ("base backup failed", |plan| server(plan) || store(plan) || late(plan)),
    ("expiring failed", store),
    ("sweeping failed", store),
    ("of the abandoned backup", store),
    ("another writer is at work", sidecar),
    ("is lost: it was removed on the server", |plan| {
        plan.has(Kind::SlotDropGap) || plan.has(Kind::SlotLost)
    }),
    ("(max_slot_wal_keep_size)", |plan| plan.has(Kind::SlotLost)),
    ("keeps no WAL", |plan| plan.has(Kind::SlotLost)),
    ("had lost its WAL and is made anew", |plan| plan.has(Kind::SlotLost)),
    ("is this an old primary that was replaced", |plan| plan.has(Kind::Promote)),
    ("unable to take the lease", |plan| store(plan) || sidecar(plan)),
    ("the lease of the cluster was lost", |plan| store(plan) || late(plan)),
    ("unable to open", store),
    ("unable to read", store),
    ("unable to list", store),
    ("unable to put", store),
    ("stopped before the repository took all WAL", store),
    ("stopped before the right to write was taken", |plan| {
        plan.has(Kind::SidecarTerm) || plan.has(Kind::Takeover) && store(plan)
    }),
    ("the state of the replication slot cannot be watched", server),
];

fn explains(plan: &Plan, line: &str) -> bool {
    !line.contains("panicked at")
        && RULES.iter().any(|(words, explained)| line.contains(words) && explained(plan))
}

fn server(plan: &Plan) -> bool {
    plan.any(Kind::hits_server)
}

fn store(plan: &Plan) -> bool {
    plan.any(Kind::keeps_store_away)
}

fn sidecar(plan: &Plan) -> bool {
    plan.any(Kind::hits_sidecar)
}

/// The sidecar did not run for a while, so that its requests and its lease ran out of time.
fn late(plan: &Plan) -> bool {
    [Kind::SidecarStop, Kind::SidecarFreeze, Kind::Takeover].iter().any(|kind| plan.has(*kind))
}

/// One that had streamed waits for whatever is away: it ends when it is told to, and when another process
/// has taken its lease.
fn explains_exit(plan: &Plan, exit: &Exit) -> bool {
    let rival = plan.has(Kind::SecondSidecar) || plan.has(Kind::Takeover);
    if exit.had_streamed && !exit.asked {
        return exit.code == Some(CONFLICT) && rival;
    }
    match exit.code {
        // Done, or cancelled before it began.
        Some(0 | 10) => exit.asked,
        // Config: it starts while there is no bucket of that name.
        Some(3) => plan.has(Kind::S3BucketGone),
        // Unavailable: the store, while the sidecar starts or stores its last WAL, or the lease.
        Some(4) => store(plan) || late(plan),
        // Denied.
        Some(5) => plan.has(Kind::S3Expired) || plan.has(Kind::S3Skew),
        // Not found.
        Some(6) => plan.has(Kind::S3BucketGone),
        // The lease ran out, or somebody else has it.
        Some(CONFLICT) => store(plan) || late(plan) || rival,
        _ => false,
    }
}
