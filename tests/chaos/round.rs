//! One round from the first server to the verdict.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::check::{self, Verdict};
use super::complaints;
use super::faults;
use super::plan::{End, Kind, Plan};
use super::stage::Stage;

/// Longest that everything may take to work again once the last fault is over.
const RECOVERY_MAX: Duration = Duration::from_secs(180);
/// How long is written, undisturbed, after that and after the last answer to a request of before.
const QUIET: Duration = Duration::from_millis(2500);
/// Longest that the first backup may take.
const FIRST_BACKUP_MAX: Duration = Duration::from_secs(180);

/// When the parts of a round began.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// The first backup is there and the stream runs.
    pub calm: Instant,
    /// The first fault may begin.
    pub chaos: Instant,
    /// The last fault is over.
    pub over: Instant,
    /// What was written until `over` is durable.
    pub recovered: Instant,
    /// `over` and `recovered` as the logs tell the time.
    pub over_time: Timestamp,
    pub recovered_time: Timestamp,
    /// The writers were stopped.
    pub stopped: Instant,
}

/// What a round came to.
#[derive(Debug)]
pub struct Round {
    /// What happened in it.
    pub plan: Plan,
    /// How it took.
    pub elapsed: Duration,
    /// What was counted in it, whether it failed or not.
    pub verdict: Verdict,
    /// Why it failed; none when it passed.
    pub flaws: Vec<String>,
    /// Where the evidence of a failure is.
    pub evidence: Option<PathBuf>,
}

impl Round {
    /// Why it failed, when it did.
    pub fn failure(&self) -> Option<String> {
        (!self.flaws.is_empty()).then(|| self.flaws.join("\n"))
    }
}

/// Plays a round. Whatever goes wrong in it is in the result.
pub fn play(plan: &Plan, evidence: &Path) -> Round {
    play_and(plan, evidence, |_| ())
}

/// As [`play`]; `then` comes between the performance and the verdict.
pub fn play_and(plan: &Plan, evidence: &Path, then: impl Fn(&Stage)) -> Round {
    let began = Instant::now();
    let folder = evidence.join(format!("seed-{}-round-{}", plan.seed, plan.round));
    let _ = std::fs::remove_dir_all(&folder);
    let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let stage = Stage::set(plan.clone());
        let times = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let times = perform(&stage);
            then(&stage);
            times
        }));
        let (verdict, flaws) = match times {
            Ok(times) => check::judge(&stage, &times),
            Err(panic) => check::broken_off(&stage, words(&*panic)),
        };
        if !flaws.is_empty() {
            keep_evidence(&stage, &flaws.join("\n"), &folder);
        }
        (verdict, flaws)
    }));
    let (verdict, flaws) =
        played.unwrap_or_else(|panic| (Verdict::default(), vec![words(&*panic)]));
    let evidence = (!flaws.is_empty()).then_some(folder);
    Round { plan: plan.clone(), elapsed: began.elapsed(), verdict, flaws, evidence }
}

/// What a panic said.
pub fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

fn perform(stage: &Stage) -> Times {
    let first = || stage.s3.names().iter().any(|name| name.ends_with("/manifest"));
    if !stage.plan.setup.early {
        assert!(stage.wait(FIRST_BACKUP_MAX, first), "no backup within {FIRST_BACKUP_MAX:?}");
    }
    if stage.plan.has(Kind::Promote) {
        stage.add_standby();
    }
    stage.write();
    let calm = if stage.plan.setup.early {
        Instant::now()
    } else {
        let (_, server) = stage.primary();
        let streams = stage.wait(Duration::from_secs(30), || stage.flushed(0).is_valid());
        assert!(streams, "no stream:\n{}", server.log_tail());
        stage.diary.note("calm: the first backup is there and the stream runs");
        let calm = Instant::now();
        std::thread::sleep(Duration::from_millis(1200));
        calm
    };
    let chaos = Instant::now();
    faults::make(stage);
    let (over, over_time) = (Instant::now(), Timestamp::now());
    stage.diary.note("all faults are over");
    wait_until_recovered(stage);
    assert!(stage.wait(FIRST_BACKUP_MAX, first), "no backup within {FIRST_BACKUP_MAX:?}");
    let (recovered, recovered_time) = (Instant::now(), Timestamp::now());
    stage.diary.note("recovered");
    let answered = over + complaints::answers_max(&stage.plan);
    std::thread::sleep(answered.saturating_duration_since(recovered) + QUIET);
    if stage.plan.setup.end == End::Term {
        stage.stop.store(true, Ordering::Relaxed);
    }
    let stopped = Instant::now();
    finish(stage);
    Times { calm, chaos, over, recovered, over_time, recovered_time, stopped }
}

/// Waits until what was written up to now is durable, commits are acknowledged, and a gap is followed
/// by a backup.
fn wait_until_recovered(stage: &Stage) {
    let (index, server) = stage.primary();
    let target = server.psql("select pg_current_wal_insert_lsn()").parse().unwrap();
    let before = stage.record.count();
    let durable = stage.wait(RECOVERY_MAX, || stage.flushed(index) >= target);
    assert!(
        durable,
        "{RECOVERY_MAX:?} after the last fault the flush position is {}, not {target}",
        stage.flushed(index)
    );
    let writing = stage.wait(Duration::from_secs(30), || stage.record.count() > before + 5);
    assert!(writing, "no commit is acknowledged after the last fault");
    for (from, until) in faults::holes(stage) {
        let followed = stage.wait(RECOVERY_MAX, || check::has_backup_after(stage, until));
        assert!(followed, "no backup was taken within {RECOVERY_MAX:?} after the gap at {from}");
    }
}

/// Ends the sidecar and the servers as the plan says: only the repository is left.
fn finish(stage: &Stage) {
    match stage.plan.setup.end {
        End::Term => {
            // The writers' last commits return or are given up.
            std::thread::sleep(Duration::from_millis(400));
            let exit = stage.sidecar.terminate();
            let code = exit.as_ref().and_then(|exit| exit.code);
            if code != Some(0) {
                stage.complain(format!("told to end while all was well, the sidecar: {exit:?}"));
            }
        }
        End::Kill => {
            stage.sidecar.kill();
        }
    }
    stage.strike();
    stage.stop.store(true, Ordering::Relaxed);
    stage.diary.note("only the repository is left");
}

fn keep_evidence(stage: &Stage, failure: &str, folder: &Path) {
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    std::fs::create_dir_all(folder).unwrap();
    write("failure.txt", failure);
    write("plan.txt", &format!("{}\n{:#?}\n", stage.plan, stage.plan));
    write("diary.txt", &stage.diary.text());
    write("objects.txt", &stage.s3.names().join("\n"));
    for (index, server) in stage.servers().iter().enumerate() {
        write(&format!("postgres-{index}.log"), &server.log());
    }
    for entry in std::fs::read_dir(stage.tidemark.home()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "log" || extension == "json") {
            std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
        }
    }
    let commits: Vec<String> =
        stage.record.commits().iter().map(|commit| format!("{commit:?}")).collect();
    write("commits.txt", &commits.join("\n"));
    let samples = stage.samples.lock().unwrap();
    let samples: Vec<String> = samples.iter().map(|sample| format!("{sample:?}")).collect();
    write("flush-positions.txt", &samples.join("\n"));
}
