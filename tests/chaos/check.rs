//! The verdict on a round: what must be in the repository is restored and compared, what is listed is
//! held against what the store has.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use tidemark::pg::Lsn;

use crate::harness::postgres::Stop;
use crate::harness::proxy::Fault as NetFault;
use crate::harness::sidecar::Output;
use crate::harness::{Binaries, Postgres};

use super::complaints;
use super::faults::holes;
use super::inventory::{Inventory, Reach, Stretch};
use super::plan::{Acknowledgement, Kind, Target};
use super::round::{Times, words};
use super::stage::{Mount, Stage};
use super::usage;
use super::writer::Commit;

/// Too little for the data of a round.
const SMALL_DISK_MIB: u64 = 24;
/// So much of a restore is there when its disk can no longer be written.
const READ_ONLY_AT_MIB: u64 = 8;
/// Enough.
const LARGE_DISK_MIB: u64 = 4096;
/// Exit status of what does not exist, and of what is not sound.
const NOT_FOUND: i32 = 6;
const CORRUPT: i32 = 8;

/// What a round has shown, whether it passed or not.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Whether the round was played and judged to its end.
    pub is_whole: bool,
    /// Commits that writers tried.
    pub attempt_count: usize,
    /// Commits that Postgres acknowledged to a writer.
    pub commit_count: usize,
    /// Of those, the ones that were durable in the repository.
    pub durable_count: usize,
    /// Of those, the ones that were looked for in a restore.
    pub compared_count: usize,
    /// Commits that had to be in a restore, durable or listed as restorable, and were not.
    pub lost_count: usize,
    /// Restores that were started and compared.
    pub restore_count: u32,
    /// Restores that had to fail and did.
    pub refused_count: u32,
    /// Gaps that had to show and did.
    pub gap_count: usize,
    /// Greatest age of an acknowledged commit that was not durable, at any time.
    pub rpo_worst: Duration,
    /// The same while no fault was made.
    pub rpo_calm: Duration,
    /// From the end of the last fault until all was durable and acknowledged again.
    pub recovery: Duration,
    /// Most memory a sidecar ever had.
    pub peak_kib: u64,
    /// Most file descriptors a sidecar ever had.
    pub open_file_count: usize,
    /// How often a sidecar was started.
    pub start_count: u32,
    /// Rivals refused or fenced.
    pub fenced: Vec<Kind>,
    /// Faults that met what they are aimed at.
    pub effective: Vec<Kind>,
    /// Faults that this machine does not permit.
    pub not_run: Vec<(Kind, String)>,
}

/// Judges a round that was performed. Restores go below the sidecar's home.
pub fn judge(stage: &Stage, times: &Times) -> (Verdict, Vec<String>) {
    stage.s3.server().faults().clear();
    stage.to_store.set(NetFault::None);
    let mut judge = Judge {
        stage,
        expected: Expected::of(stage),
        flaws: stage.complaints.lock().unwrap().clone(),
        compared: BTreeSet::new(),
        lost: BTreeSet::new(),
        verdict: Verdict { recovery: times.recovered - times.over, ..Verdict::of(stage) },
    };
    let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| judge.all(times)));
    if let Err(panic) = judged {
        judge.flaws.push(words(&*panic));
    }
    judge.verdict.lost_count = judge.lost.len();
    judge.verdict.compared_count = judge.compared.len();
    (judge.verdict, judge.flaws)
}

/// What is known of a round that did not get as far as a verdict, because of `failure`.
pub fn broken_off(stage: &Stage, failure: String) -> (Verdict, Vec<String>) {
    let mut flaws = vec![failure];
    flaws.extend(stage.complaints.lock().unwrap().clone());
    flaws.extend(complaints::unexpected(stage, None));
    (Verdict::of(stage), flaws)
}

impl Verdict {
    /// What can be told before anything is restored, and of a round that was broken off.
    fn of(stage: &Stage) -> Self {
        let expected = Expected::of(stage);
        let mut verdict = Self {
            attempt_count: stage.record.attempt_count(),
            commit_count: stage.record.count(),
            durable_count: expected.newest.len() + expected.branch.len(),
            fenced: stage.fenced.lock().unwrap().clone(),
            effective: stage.effective.lock().unwrap().clone(),
            not_run: stage.not_run.lock().unwrap().clone(),
            start_count: stage.sidecar.start_count(),
            ..Self::default()
        };
        usage::count(stage, &mut verdict);
        verdict
    }
}

/// What must be found again, worked out from what the servers and writers saw.
struct Expected {
    /// Commits that must be in the newest state.
    newest: Vec<Commit>,
    /// Commits that must be on timeline 1 although the newest timeline does not have them.
    branch: Vec<Commit>,
    /// Commits that the listing claims besides.
    claimed: Vec<Commit>,
    /// The newest timeline.
    timeline: u32,
}

impl Expected {
    fn of(stage: &Stage) -> Self {
        let switch = switch_point(stage);
        let synchronous = stage.plan.setup.acknowledgement == Acknowledgement::Synchronous;
        let flushed = [stage.flushed(0), stage.flushed(1)];
        let mut expected = Self {
            newest: Vec::new(),
            branch: Vec::new(),
            claimed: Vec::new(),
            timeline: if switch.is_some() { 2 } else { 1 },
        };
        for commit in stage.record.commits() {
            let until = commit.until_lsn.unwrap_or(Lsn(u64::MAX));
            let before_switch = commit.server == 0 && switch.is_some_and(|switch| until <= switch);
            let durable = synchronous
                || until <= flushed[commit.server]
                || before_switch && flushed[1].is_valid();
            if !durable {
                continue;
            }
            match switch {
                Some(_) if commit.server == 0 && !before_switch => expected.branch.push(commit),
                _ => expected.newest.push(commit),
            }
        }
        expected
    }
}

/// Where timeline 2 begins, if there is one.
fn switch_point(stage: &Stage) -> Option<Lsn> {
    let servers = stage.servers();
    let history = servers.get(1)?.data().join("pg_wal/00000002.history");
    let text = fs::read_to_string(history).ok()?;
    let line = text.lines().find(|line| line.starts_with("1\t"))?;
    line.split('\t').nth(1)?.parse().ok()
}

/// Whether the store has a complete backup that began at `lsn` or later.
pub fn has_backup_after(stage: &Stage, lsn: Lsn) -> bool {
    stage.s3.names().iter().any(|name| {
        let id = name.strip_suffix("/manifest").and_then(|rest| rest.rsplit('/').next());
        let start = id.and_then(|id| id.rsplit('-').next());
        start.is_some_and(|start| u64::from_str_radix(start, 16).is_ok_and(|start| start >= lsn.0))
    })
}

/// A restore to be made, and what must and must not be in it.
#[derive(Default)]
struct Wanted {
    name: &'static str,
    arguments: Vec<String>,
    must: Vec<Commit>,
    must_not: BTreeSet<(i32, i64)>,
    trouble: Option<Kind>,
}

struct Judge<'a> {
    stage: &'a Stage,
    expected: Expected,
    flaws: Vec<String>,
    /// Durable commits that were looked for in a restore, and all that were not found.
    compared: BTreeSet<(i32, i64)>,
    lost: BTreeSet<(i32, i64)>,
    verdict: Verdict,
}

impl Judge<'_> {
    fn run(&mut self, args: &[&str]) -> Output {
        let done = self.stage.tidemark.run(args);
        self.note(args, &done);
        done
    }

    fn note(&mut self, args: &[&str], done: &Output) {
        self.stage.diary.note(format!("tidemark {}: {:?}", args.join(" "), done.code));
        for line in complaints::of_command(done) {
            self.flaw(format!("unexpected of 'tidemark {}': {line}", args.join(" ")));
        }
    }

    fn flaw(&mut self, text: impl Into<String>) {
        let text = text.into();
        self.stage.diary.note(format!("FLAW: {text}"));
        self.flaws.push(text);
    }

    fn all(&mut self, times: &Times) {
        self.durable();
        self.listing();
        self.soundness("before");
        self.earlier_target();
        self.dead_branch();
        if self.stage.plan.setup.expire {
            self.expire();
        }
        self.newest_state();
        let (compared, durable) = (self.compared.len(), self.verdict.durable_count);
        if compared != durable {
            self.flaw(format!("{compared} of {durable} durable commits were looked for"));
        }
        self.flaws.extend(complaints::unexpected(self.stage, Some(times)));
        usage::measure(self.stage, times, &mut self.verdict, &mut self.flaws);
        self.verdict.is_whole = true;
    }

    fn durable(&mut self) {
        if self.verdict.durable_count == 0 {
            self.flaw("no commit was durable, so nothing was shown");
        }
    }

    fn list(&mut self, name: &str) -> Value {
        let done = self.run(&["list", "--json"]);
        let _ = fs::write(self.stage.tidemark.home().join(name), &done.stdout);
        if done.code != Some(0) {
            self.flaw(format!("list failed: {done:?}"));
            return Value::Null;
        }
        let list = done.json();
        self.hold_against_store(name, &list);
        list
    }

    /// What is listed is what the store has: no backup leads less far or further, from no other moment,
    /// and nothing but what is missing is a gap.
    fn hold_against_store(&mut self, name: &str, list: &Value) {
        let inventory = Inventory::of(self.stage, switch_point(self.stage));
        let (listed, expected) = (reaches(list), inventory.reaches());
        if listed != expected {
            self.flaw(format!("{name}: intervals are {listed:?}, in the store {expected:?}"));
        }
        let listed = windows(list);
        let edges: Vec<&Stretch> = listed.iter().map(|window| &window.stretch).collect();
        let expected = inventory.stretches();
        if edges != expected.iter().collect::<Vec<_>>() {
            self.flaw(format!("{name}: windows are {edges:?}, in the store {expected:?}"));
        }
        let commits = self.stage.record.commits();
        for window in &listed {
            let (earliest, latest) = inventory.time_bounds(&window.stretch, &commits);
            if window.until_time < earliest || window.until_time > latest {
                self.flaw(format!("{name}: not {earliest} to {latest}: the end of {window:?}"));
            }
        }
        let (listed, expected) = (gaps(list, |_| true), inventory.holes());
        if listed != expected {
            self.flaw(format!("{name}: gaps are {listed:?}, in the store {expected:?}"));
        }
        // They end what can be restored, and no fault of ours is a reason for one.
        let barrier =
            |name: &&String| name.contains("/marks/minimal-") || name.contains("/marks/damaged-");
        if let Some(mark) = self.stage.s3.names().iter().find(barrier) {
            self.flaw(format!("{name}: there is a mark '{mark}'"));
        }
    }

    /// Intervals and gaps are those that the names of the objects and the faults made tell.
    fn listing(&mut self) {
        let list = self.list("list.json");
        let gaps = real_gaps(&list);
        let expected = self.stage.gaps.lock().unwrap().clone();
        let expected: Vec<_> = expected.iter().filter(|gap| gap.kept_from > gap.from).collect();
        let holes = holes(self.stage);
        self.verdict.gap_count = gaps.len();
        // Until there is a slot again the server removes more, if anything keeps the sidecar away or
        // writes; undisturbed, it may not give up a byte that the server still has.
        let mut kinds = self.stage.plan.faults.iter().map(|fault| fault.kind);
        let alone = kinds.all(|kind| kind == Kind::SlotDropGap || kind.is_at_restore());
        let ends_at = |end: Lsn, kept_from| end == kept_from || !alone && end > kept_from;
        let explained = match (expected.as_slice(), gaps.as_slice()) {
            // How much was lost with the slot nobody can tell but the names of what is there, for the
            // sidecar may still have had WAL in memory; that any was, it has said itself.
            ([], gaps) if self.stage.plan.has(Kind::SlotLost) => {
                gaps.is_empty() != loss_told(self.stage)
            }
            ([], []) => true,
            ([expected], [first, .., last]) => {
                first.0 == expected.from && ends_at(last.1, expected.kept_from)
            }
            ([expected], [only]) => only.0 == expected.from && ends_at(only.1, expected.kept_from),
            _ => false,
        };
        if !explained || gaps != holes {
            self.flaw(format!("listed: {gaps:?}, expected: {expected:?}, missing: {holes:?}"));
        }
        if list["damaged"].as_array().is_none_or(|damaged| !damaged.is_empty()) {
            self.flaw(format!("damaged objects are listed: {}", list["damaged"]));
        }
        let Some(last) = self.windows(&list).pop() else {
            return self.flaw("nothing can be restored of the newest timeline");
        };
        let (until, flushed) = (last.stretch.until_lsn, self.expected.timeline as usize - 1);
        let flushed = self.stage.flushed(flushed);
        if until < flushed {
            self.flaw(format!("listed until {until}, flushed until {flushed}"));
        }
        self.claimed_until(last.until_time);
        self.refuses(Lsn(until.0 + (64 << 20)));
        for (from, until) in gaps {
            self.refuses(Lsn((from.0 + until.0) / 2));
        }
    }

    /// What is listed of the newest timeline.
    fn windows(&self, list: &Value) -> Vec<Window> {
        let mut windows = windows(list);
        windows.retain(|window| window.stretch.timeline == self.expected.timeline);
        windows
    }

    /// What is listed as restorable up to a time has every commit up to that time, whether anybody said
    /// that it is durable or not.
    fn claimed_until(&mut self, until: Timestamp) {
        let known: BTreeSet<(i32, i64)> =
            self.expected.newest.iter().map(|c| (c.writer, c.number)).collect();
        let server = self.expected.timeline as usize - 1;
        let claimed = self.stage.record.commits().into_iter().filter(|commit| {
            let time = Timestamp::try_from(commit.acknowledged).unwrap();
            commit.server == server && time <= until
        });
        let more = claimed.filter(|commit| !known.contains(&(commit.writer, commit.number)));
        self.expected.claimed = more.collect();
    }

    /// A target that is not there fails in the plan.
    fn refuses(&mut self, target: Lsn) {
        let target = target.to_string();
        let done = self.run(&["restore", "--dry-run", "--to-lsn", &target]);
        if done.code == Some(NOT_FOUND) {
            self.verdict.refused_count += 1;
        } else {
            self.flaw(format!("a target that is not there, {target}, is not refused: {done:?}"));
        }
    }

    fn soundness(&mut self, when: &str) {
        let list = self.list(&format!("list-{when}.json"));
        let (lost, end) = (real_gaps(&list).len(), &list["durable_end"]);
        let leads_there = |window: &&Value| {
            window["timeline"] == end["timeline"] && window["until_lsn"] == end["lsn"]
        };
        let windows = list["windows"].as_array().cloned().unwrap_or_default();
        let reached = windows.iter().any(|window| leads_there(&window));
        let done = self.run(&["verify", "--json"]);
        let report: Value = serde_json::from_str(done.stdout.lines().next().unwrap_or_default())
            .unwrap_or_default();
        let defects = report["defects"].as_array().map_or(usize::MAX, Vec::len);
        let whole = |backup: &Value| backup["whole"] == true && backup["restorable"] == true;
        let backups = report["backups"].as_array().is_some_and(|all| all.iter().all(whole));
        let code = if reached { 0 } else { CORRUPT };
        if done.code != Some(code) || defects != 0 || !backups {
            self.flaw(format!("verify ({when}) with {lost} gaps: {done:?}"));
        }
    }

    fn earlier_target(&mut self) {
        let list = self.list("list-windows.json");
        let windows = self.windows(&list);
        let inside = |commit: &&Commit| {
            windows.iter().any(|window| {
                let time = Timestamp::try_from(commit.acknowledged).unwrap();
                let Stretch { from_lsn, until_lsn, from_time, .. } = window.stretch;
                let reached = commit.until_lsn.is_some_and(|until| until <= until_lsn);
                commit.from_lsn >= from_lsn
                    && reached
                    && (from_time..window.until_time).contains(&time)
            })
        };
        let candidates: Vec<Commit> = self.expected.newest.iter().filter(inside).copied().collect();
        if candidates.is_empty() {
            // A gap, or a promotion right after the first backup, can leave none.
            self.stage.diary.note("no earlier moment can be told from the newest");
            return;
        }
        let permille = self.stage.plan.setup.target_permille as usize;
        let chosen = candidates[(candidates.len() - 1) * permille / 1000];
        let wanted = self.moment(chosen);
        self.restore(&wanted);
    }

    /// The moment at which this commit is the last.
    fn moment(&self, chosen: Commit) -> Wanted {
        let all = self.stage.record.commits();
        let key = |commit: &Commit| (commit.writer, commit.number);
        let known = self.expected.newest.iter();
        let wanted = Wanted { name: "earlier", ..Wanted::default() };
        match self.stage.plan.setup.target {
            Target::Lsn => {
                let at = chosen.until_lsn.unwrap();
                let must = known.filter(|c| c.until_lsn.is_some_and(|until| until <= at));
                let later = all.iter().filter(|c| c.from_lsn > at);
                Wanted {
                    arguments: vec!["--to-lsn".into(), at.to_string()],
                    must: must.copied().collect(),
                    must_not: later.map(key).collect(),
                    ..wanted
                }
            }
            Target::Time => {
                let at = Timestamp::try_from(chosen.acknowledged).unwrap();
                // Times are kept to the microsecond.
                let micros = chosen.acknowledged + Duration::from_micros(1);
                let must = known.filter(|c| c.acknowledged <= chosen.acknowledged);
                let later = all.iter().filter(|c| c.sent > micros);
                Wanted {
                    arguments: vec!["--to-time".into(), at.to_string()],
                    must: must.copied().collect(),
                    must_not: later.map(key).collect(),
                    ..wanted
                }
            }
        }
    }

    /// What was acknowledged on a branch that the promotion left behind is still there.
    fn dead_branch(&mut self) {
        if self.expected.branch.is_empty() {
            return;
        }
        let must = self.expected.branch.clone();
        let arguments = vec!["--timeline".into(), "1".into()];
        self.restore(&Wanted { name: "branch", arguments, must, ..Wanted::default() });
    }

    fn expire(&mut self) {
        let done = self.run(&["expire", "--keep-count", "1", "--yes", "--json"]);
        if done.code != Some(0) {
            self.flaw(format!("expire failed: {done:?}"));
        }
        self.soundness("after");
    }

    fn newest_state(&mut self) {
        let plan = &self.stage.plan;
        let trouble = plan.faults.iter().map(|fault| fault.kind).find(|kind| kind.is_at_restore());
        let must = [&self.expected.newest[..], &self.expected.claimed].concat();
        self.restore(&Wanted { name: "newest", must, trouble, ..Wanted::default() });
    }

    fn restore(&mut self, wanted: &Wanted) {
        let Wanted { name, arguments, .. } = wanted;
        let target = self.stage.tidemark.new_target(name);
        let disk = wanted.trouble.and_then(|kind| self.bad_disk(kind, target.parent().unwrap()));
        let programs = Binaries::of_this_run().dir().display().to_string();
        let into = target.display().to_string();
        let command =
            ["restore", "--start", "--json", "--postgres-bin", &programs, "--into", &into];
        let more: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let command = [&command[..], &more].concat();
        let mut first = None;
        if let Some(disk) = &disk {
            first = self.fail_on(disk, &command, &target);
        }
        let done = first.unwrap_or_else(|| self.run(&command));
        if done.code != Some(0) {
            self.flaw(format!("restore '{name}' {arguments:?} failed: {done:?}"));
            return;
        }
        let conf = fs::read_to_string(target.join("postgresql.conf")).unwrap();
        let servers = self.stage.servers();
        // A standby's settings follow those it was copied with, and the last line counts.
        let port = conf.lines().rev().find_map(|line| line.strip_prefix("port = ")).unwrap();
        let of = |server: &&Arc<Postgres>| server.port().to_string() == port;
        let restored = Postgres::restored(servers.iter().find(of).unwrap(), &target);
        self.compare(wanted, &restored);
        restored.stop(Stop::Immediate);
        self.verdict.restore_count += 1;
        let _ = fs::remove_dir_all(&target);
    }

    /// The disk that a restore is to fail on.
    fn bad_disk(&mut self, kind: Kind, at: &Path) -> Option<(Kind, Mount)> {
        let mounted = match kind {
            Kind::RestoreDiskFull => Mount::tmpfs(at, SMALL_DISK_MIB),
            _ => Mount::ext4(at, LARGE_DISK_MIB),
        };
        match mounted {
            Ok(mount) => Some((kind, mount)),
            Err(reason) => {
                self.verdict.not_run.push((kind, reason));
                None
            }
        }
    }

    /// Restores onto a disk that fills up, or that nobody can write any more once a part is there, and
    /// mends the disk. What the restore came to, when it was done before that.
    fn fail_on(
        &mut self,
        (kind, disk): &(Kind, Mount),
        command: &[&str],
        target: &Path,
    ) -> Option<Output> {
        let running = self.stage.tidemark.start(command);
        if *kind == Kind::RestoreReadOnly {
            let empty = disk.used_mib();
            while !running.is_finished() && disk.used_mib() < empty + READ_ONLY_AT_MIB {
                std::thread::sleep(Duration::from_millis(1));
            }
            disk.fail();
            self.stage.diary.note(format!("read-only at {} MiB", disk.used_mib() - empty));
        }
        let done = running.join().unwrap();
        self.note(command, &done);
        let refused = done.code != Some(0);
        if refused {
            self.judge_refusal(*kind, &done, target);
        }
        match kind {
            Kind::RestoreDiskFull => disk.enlarge(LARGE_DISK_MIB),
            _ => disk.mend(),
        }
        (!refused).then_some(done)
    }

    /// A restore that cannot succeed says why and leaves nothing that starts by accident.
    fn judge_refusal(&mut self, kind: Kind, done: &Output, target: &Path) {
        let words = match kind {
            Kind::RestoreDiskFull => "No space left",
            _ => "Read-only file system",
        };
        let said = done.stderr.contains(words) || done.stdout.contains(words);
        if matches!(done.code, None | Some(0 | 70 | 101)) || !said {
            self.flaw(format!("{}: the restore ended so: {done:?}", kind.name()));
        }
        if target.join("global/pg_control").exists() {
            self.flaw(format!("{}: a directory that starts was left behind", kind.name()));
        }
        self.verdict.refused_count += 1;
        self.verdict.effective.extend(said.then_some(kind));
    }

    fn compare(&mut self, wanted: &Wanted, restored: &Postgres) {
        let Wanted { name, must, must_not, .. } = wanted;
        let rows = restored.psql("select writer, number from journal");
        let rows: BTreeSet<(i32, i64)> = rows
            .lines()
            .map(|line| {
                let (writer, number) = line.split_once('|').unwrap();
                (writer.parse().unwrap(), number.parse().unwrap())
            })
            .collect();
        let lost: Vec<&Commit> =
            must.iter().filter(|c| !rows.contains(&(c.writer, c.number))).collect();
        self.lost.extend(lost.iter().map(|c| (c.writer, c.number)));
        let durable = self.expected.newest.iter().chain(&self.expected.branch);
        let durable: BTreeSet<_> = durable.map(|c| (c.writer, c.number)).collect();
        let looked_for = must.iter().map(|c| (c.writer, c.number));
        self.compared.extend(looked_for.filter(|key| durable.contains(key)));
        if let Some(first) = lost.first() {
            self.flaw(format!(
                "'{name}': LOST {} of {} durable commits, first {first:?}",
                lost.len(),
                must.len()
            ));
        }
        let early: Vec<_> = rows.intersection(must_not).collect();
        if !early.is_empty() {
            self.flaw(format!("'{name}': {} rows from after the target: {early:?}", early.len()));
        }
        let attempts = self.stage.record.attempts();
        let unknown = |row: &&(i32, i64)| attempts.get(&row.0).is_none_or(|last| row.1 > *last);
        if let Some(row) = rows.iter().find(unknown) {
            self.flaw(format!("'{name}': a row that nobody wrote: {row:?}"));
        }
        let bad = restored.psql(
            "select count(*) from journal where filler <> \
             repeat(md5(writer || '.' || number), length(filler) / 32) or length(filler) = 0",
        );
        let ballast = restored.psql("select count(*), sum(length(filler)) from ballast");
        if bad != "0" || ballast != "5200|41600000" {
            self.flaw(format!("'{name}': {bad} rows with other content; ballast {ballast}"));
        }
        self.stage.diary.note(format!(
            "restored '{name}': {} rows, {} had to be there",
            rows.len(),
            must.len()
        ));
    }
}

/// Whether a sidecar has said that WAL is lost.
fn loss_told(stage: &Stage) -> bool {
    let told = "is lost: it was removed on the server";
    complaints::logs(stage).iter().any(|(_, log)| log.contains(told))
}

/// What can be restored towards a timeline, as listed.
#[derive(Clone, Debug)]
struct Window {
    stretch: Stretch,
    /// Up to when it has every commit.
    until_time: Timestamp,
}

fn windows(list: &Value) -> Vec<Window> {
    let window = |window: &Value| Window {
        stretch: Stretch {
            timeline: timeline(window),
            from_lsn: lsn(&window["from_lsn"]),
            until_lsn: lsn(&window["until_lsn"]),
            from_time: time(&window["from_time"]),
        },
        until_time: time(&window["until_time"]),
    };
    list["windows"].as_array().into_iter().flatten().map(window).collect()
}

/// What each backup leads to, as listed.
fn reaches(list: &Value) -> BTreeSet<Reach> {
    let reach = |interval: &Value| Reach {
        timeline: timeline(interval),
        from_lsn: lsn(&interval["from_lsn"]),
        until_lsn: lsn(&interval["until_lsn"]),
        from_time: time(&interval["from_time"]),
        backup: interval["backup"].as_str().unwrap().to_owned(),
    };
    list["intervals"].as_array().into_iter().flatten().map(reach).collect()
}

/// Listed gaps that are a loss.
fn real_gaps(list: &Value) -> Vec<(Lsn, Lsn)> {
    gaps(list, |gap| gap["expired"] == false)
        .into_iter()
        .map(|(_, from, until)| (from, until))
        .collect()
}

/// Listed gaps, each with the timeline that it is on.
fn gaps(list: &Value, wanted: impl Fn(&Value) -> bool) -> BTreeSet<(u32, Lsn, Lsn)> {
    let all = list["gaps"].as_array().into_iter().flatten().filter(|gap| wanted(gap));
    let missing = |gap: &Value| (lsn(&gap["missing"]["start"]), lsn(&gap["missing"]["end"]));
    all.map(|gap| (timeline(gap), missing(gap).0, missing(gap).1)).collect()
}

fn timeline(value: &Value) -> u32 {
    u32::try_from(value["timeline"].as_u64().unwrap()).unwrap()
}

fn lsn(value: &Value) -> Lsn {
    value.as_str().unwrap().parse().unwrap()
}

fn time(value: &Value) -> Timestamp {
    value.as_str().unwrap().parse().unwrap()
}
