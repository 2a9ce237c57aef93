//! What the sidecars said and how they ended, held against what the faults of the round explain, and when.

use std::time::Duration;

use jiff::Timestamp;

use crate::harness::sidecar::Output;

use super::plan::{Kind, Plan};
use super::round::Times;
use super::sidecars::Exit;
use super::stage::{ATTEMPT_TIMEOUT, Stage};

/// Exit status of a conflict.
pub const CONFLICT: i32 = 7;

/// Longest that a request may take whose answer never comes: a try is given `ATTEMPT_TIMEOUT` and a second
/// for each 64 KiB (`BODY_BYTES_PER_SECOND_MIN`) of what it sends, which is 16 MiB at most.
const HUNG_MAX: Duration =
    ATTEMPT_TIMEOUT.saturating_add(Duration::from_secs((16 << 20) / (64 << 10)));
/// Longest that a backup waits before it tries a request again (`PAUSE_MAX` of `repo::patience`). Meanwhile
/// it reads nothing from the server, and does not see that this has gone.
const PATIENCE_PAUSE_MAX: Duration = Duration::from_secs(15);

/// Everything that no fault explains; `times` when the round came to its end. Once it has recovered
/// nothing is explained any more but what was still on its way.
pub fn unexpected(stage: &Stage, times: Option<&Times>) -> Vec<String> {
    let plan = &stage.plan;
    let mut found = Vec::new();
    for exit in stage.sidecar.exits() {
        let late = times.is_some_and(|times| exit.at > times.recovered && !exit.asked);
        if late || !explains_exit(plan, &exit) {
            found.push(format!("a sidecar ended in an unexpected way: {exit:?}"));
        }
    }
    for (name, log) in logs(stage) {
        let mut at = Timestamp::MIN;
        for line in log.lines() {
            // What has no time of its own was said along with what came before.
            at = line.split(' ').next().and_then(|time| time.parse().ok()).unwrap_or(at);
            let is_over = |after: Duration| {
                times.is_some_and(|times| at > times.recovered_time.max(times.over_time + after))
            };
            if is_complaint(line) && !explains(plan, line, is_over) {
                found.push(format!("unexpected in {name}: {line}"));
            }
        }
    }
    found
}

/// What a command complains of. Nothing is wrong any more when one is run, so nothing is explained but why
/// one failed: whether it had to is judged by who ran it.
pub fn of_command(done: &Output) -> Vec<String> {
    let reason = |line: &str| done.code != Some(0) && line.starts_with("error: ");
    let said = done.stderr.lines().filter(|line| is_complaint(line) && !reason(line));
    said.map(str::to_owned).collect()
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

/// One kind of complaint, by words that are in it; whether the plan explains it; and how long after the last
/// fault it still may be said, where that is later than the recovery.
type Rule = (&'static str, fn(&Plan) -> bool, fn(&Plan) -> Duration);

const RULES: &[Rule] = &[
    // Made on the first start, in every round that encrypts.
    ("no key was configured", |plan| plan.setup.encrypted, at_once),
    ("connecting again in", |plan| server(plan) || store(plan) || sidecar(plan), at_once),
    ("trying again for", |plan| store(plan) || late(plan), answered),
    ("could not be merged", store, answered),
    ("base backup failed", |plan| server(plan) || store(plan) || late(plan), backed_up),
    ("expiring failed", store, answered),
    ("sweeping failed", store, answered),
    ("of the abandoned backup", store, backed_up),
    ("another writer is at work", sidecar, at_once),
    (
        "is lost: it was removed on the server",
        |plan| plan.has(Kind::SlotDropGap) || plan.has(Kind::SlotLost),
        at_once,
    ),
    ("(max_slot_wal_keep_size)", |plan| plan.has(Kind::SlotLost), at_once),
    ("keeps no WAL", |plan| plan.has(Kind::SlotLost), at_once),
    ("had lost its WAL and is made anew", |plan| plan.has(Kind::SlotLost), at_once),
    ("is this an old primary that was replaced", |plan| plan.has(Kind::Promote), at_once),
    ("unable to take the lease", |plan| store(plan) || sidecar(plan), answered),
    ("the lease of the cluster was lost", |plan| store(plan) || late(plan), answered),
    ("unable to open", store, answered),
    ("unable to read", store, answered),
    ("unable to list", store, answered),
    ("unable to put", store, answered),
    ("stopped before the repository took all WAL", store, at_once),
    (
        "stopped before the right to write was taken",
        |plan| plan.has(Kind::SidecarTerm) || plan.has(Kind::Takeover) && store(plan),
        at_once,
    ),
    ("the state of the replication slot cannot be watched", server, at_once),
];

fn explains(plan: &Plan, line: &str, is_over: impl Fn(Duration) -> bool) -> bool {
    !line.contains("panicked at")
        && RULES.iter().any(|(words, explained, after)| {
            line.contains(words) && explained(plan) && !is_over(after(plan))
        })
}

fn at_once(_: &Plan) -> Duration {
    Duration::ZERO
}

/// Until a request that was on its way when the last fault ended is answered or given up.
fn answered(plan: &Plan) -> Duration {
    // Its connection stays open, and no fault that ends answers it.
    if plan.has(Kind::S3HangAfter) { HUNG_MAX } else { answers_max(plan) }
}

/// The same, but for requests that nobody will answer.
pub fn answers_max(plan: &Plan) -> Duration {
    if store(plan) || late(plan) { ATTEMPT_TIMEOUT } else { Duration::ZERO }
}

/// Until a backup that cannot succeed has failed.
fn backed_up(plan: &Plan) -> Duration {
    // A part that was lost is missed when its upload is completed, whenever that is.
    if plan.has(Kind::S3LosePart) {
        return Duration::from_secs(3600);
    }
    answered(plan) + if store(plan) { PATIENCE_PAUSE_MAX } else { Duration::ZERO }
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
        Some(5) => plan.has(Kind::S3Expired),
        // Not found.
        Some(6) => plan.has(Kind::S3BucketGone),
        // The lease ran out, or somebody else has it.
        Some(CONFLICT) => store(plan) || late(plan) || rival,
        _ => false,
    }
}
