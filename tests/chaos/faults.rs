//! Carrying out the faults of a plan, each in a thread of its own.

use std::time::{Duration, Instant};

use minis3::{Effect, Fault as StoreFault, Op};
use tidemark::pg::Lsn;

use crate::harness::Postgres;
use crate::harness::postgres::{Stop, process_state};
use crate::harness::proxy::Fault as NetFault;

use super::complaints::CONFLICT;
use super::inventory::{joined, parse_extent};
use super::plan::{Fault, Kind};
use super::sidecars::Supervised;
use super::stage::{GapExpected, Stage};

/// Longest that a server may take to come back by itself after one of its processes was killed.
const SELF_RESTART_MAX: Duration = Duration::from_secs(60);
/// More than the 15 minutes that S3 lets pass.
const SKEW_MS: i64 = 20 * 60 * 1000;
/// Longest that a refused or fenced sidecar may take to end.
const REFUSAL_MAX: Duration = Duration::from_secs(30);

/// Makes all faults that happen before the restore, at their times; returns when all are over.
pub fn make(stage: &Stage) {
    let began = Instant::now();
    std::thread::scope(|scope| {
        for fault in stage.plan.faults.iter().filter(|fault| !fault.kind.is_at_restore()) {
            scope.spawn(move || {
                std::thread::sleep(fault.at.saturating_sub(began.elapsed()));
                stage.diary.note(format!("begins: {fault}"));
                let effective = make_one(stage, fault);
                stage.effective.lock().unwrap().extend(effective.then_some(fault.kind));
                let idle = if effective { "" } else { ", without effect" };
                stage.diary.note(format!("over: {}{idle}", fault.kind.name()));
            });
        }
    });
}

/// Makes a fault: whether it met what it is aimed at.
fn make_one(stage: &Stage, fault: &Fault) -> bool {
    use Kind::*;
    match fault.kind {
        SidecarKill => end_sidecar(stage, fault.lasts, Supervised::kill),
        SidecarTerm => end_sidecar(stage, fault.lasts, |sidecar| sidecar.terminate().is_some()),
        SidecarStop => freeze(stage, fault.lasts, false),
        SidecarFreeze => freeze(stage, fault.lasts, true),
        SecondSidecar => second_sidecar(stage, fault.lasts),
        Takeover => takeover(stage, fault.lasts),
        ServerImmediate => restart(stage, fault.lasts, |server| server.stop(Stop::Immediate)),
        ServerCrash => restart(stage, fault.lasts, Postgres::crash),
        ServerRestart => restart(stage, fault.lasts, |server| server.stop(Stop::Fast)),
        ServerChildKill => kill_child(stage, fault.strength),
        WalsenderKill => kill_walsenders(stage, fault),
        Promote => promote(stage, fault),
        SlotDrop => {
            let _hand = stage.take_hand();
            drop_slot(stage, &stage.primary().1) == Slot::Dropped
        }
        SlotDropGap => drop_slot_and_wal(stage, fault),
        SlotLost => lose_slot(stage, fault.lasts),
        SwitchStorm => switch_storm(stage, fault),
        WalDiskFull => fill_wal_disk(stage, fault.lasts),
        S3Outage => outage(stage, fault),
        S3Skew => skew(stage, fault),
        _ if fault.kind.name().starts_with("net-") => net(stage, fault),
        _ => store(stage, fault),
    }
}

/// Ends the sidecar, and lets another start after a while.
fn end_sidecar(stage: &Stage, lasts: Duration, end: impl FnOnce(&Supervised) -> bool) -> bool {
    let ended = {
        let _at_work = stage.sidecar.at_work();
        let ended = end(&stage.sidecar);
        stage.sidecar.resume_in(lasts);
        ended
    };
    std::thread::sleep(lasts);
    ended
}

fn freeze(stage: &Stage, lasts: Duration, beyond_lease: bool) -> bool {
    let Some(pid) = stage.sidecar.signal("STOP") else { return false };
    let told_before = losses_told(stage);
    std::thread::sleep(lasts);
    if !stage.sidecar.is_running(pid) {
        return false;
    }
    let state = process_state(pid);
    stage.sidecar.signal("CONT");
    if state != Some('T') {
        stage.complain(format!("the sidecar was not frozen all the time: {state:?}"));
        return false;
    }
    if !beyond_lease {
        return true;
    }
    // Nobody could have told it that it still has the lease: it must say that it lost it, whether a
    // rival came or not, and may go on only with a new one.
    let noticed = || losses_told(stage) > told_before || !stage.sidecar.is_running(pid);
    if stage.wait(REFUSAL_MAX, noticed) {
        stage.fenced.lock().unwrap().push(Kind::SidecarFreeze);
    } else {
        stage.complain("a sidecar that was frozen for longer than its lease lives went on");
    }
    true
}

/// How often sidecars have said that they lost the lease.
fn losses_told(stage: &Stage) -> usize {
    let log = std::fs::read(stage.tidemark.home().join("run.log")).unwrap_or_default();
    String::from_utf8_lossy(&log).matches("the lease of the cluster was lost").count()
}

fn second_sidecar(stage: &Stage, lasts: Duration) -> bool {
    let _at_work = stage.sidecar.at_work();
    let undisturbed = !stage.plan.any(|kind| {
        kind != Kind::SecondSidecar && (kind.hits_sidecar() || kind.keeps_store_away())
    });
    let mut second = stage.sidecar.rival("second", &[]);
    let began = Instant::now();
    let mut status = None;
    while status.is_none() && began.elapsed() < lasts.max(REFUSAL_MAX) {
        status = second.ended();
        std::thread::sleep(Duration::from_millis(50));
    }
    let log = second.log();
    let code = status.map(|status| status.code());
    let refused = code == Some(Some(CONFLICT)) && log.contains("another writer is at work");
    match code {
        _ if refused => {
            stage.fenced.lock().unwrap().push(Kind::SecondSidecar);
        }
        ended if undisturbed => {
            stage.complain(format!("a second sidecar was not refused: {ended:?}:\n{log}"));
        }
        ended => stage.diary.note(format!("the second sidecar: {ended:?}")),
    }
    if status.is_none() {
        second.terminate();
    }
    refused
}

fn takeover(stage: &Stage, lease_ttl: Duration) -> bool {
    let _at_work = stage.sidecar.at_work();
    let Some(pid) = stage.sidecar.signal("STOP") else { return false };
    let told_before = losses_told(stage);
    let mut second = stage.sidecar.rival("second", &["--wait"]);
    let taken = |second: &crate::harness::sidecar::Process| second.log().contains("streaming ");
    let took_over = stage.wait(lease_ttl * 2 + Duration::from_secs(20), || {
        taken(&second) || !stage.sidecar.is_running(pid) || second.ended().is_some()
    }) && taken(&second);
    let still_first = stage.sidecar.is_running(pid);
    // Beside it, both believe for a moment that they are the one.
    std::thread::sleep(Duration::from_secs(1));
    stage.sidecar.signal("CONT");
    if took_over && still_first {
        if !stage.wait(REFUSAL_MAX, || !stage.sidecar.is_running(pid)) {
            stage.complain("a sidecar whose lease was taken over went on");
        } else if losses_told(stage) == told_before {
            stage.complain("a sidecar whose lease was taken over ended and did not name the lease");
        } else {
            stage.fenced.lock().unwrap().push(Kind::Takeover);
        }
    } else if still_first && !stage.plan.any(Kind::keeps_store_away) {
        // Where another fault has ended the first one, who comes next is not settled yet.
        stage.complain(format!("the waiting sidecar did not take over:\n{}", second.log()));
    }
    std::thread::sleep(Duration::from_secs(1));
    if second.ended().is_none() {
        let code = second.terminate();
        stage.diary.note(format!("the second sidecar was told to end: {code:?}"));
    }
    took_over && still_first
}

fn restart(stage: &Stage, down: Duration, stop: impl FnOnce(&Postgres)) -> bool {
    let _hand = stage.take_hand();
    let (_, server) = stage.primary();
    let ran = server.pid().is_some();
    stop(&server);
    std::thread::sleep(down);
    server.run();
    ran
}

fn kill_child(stage: &Stage, which: u64) -> bool {
    let _hand = stage.take_hand();
    let (_, server) = stage.primary();
    let word = ["walwriter", "checkpointer", "INSERT"][which as usize % 3];
    let killed = server.kill_child(word) || server.kill_child("walwriter");
    stage.diary.note(format!("killed a child ({word}): {killed}"));
    // It may still answer for a moment, so the answer counts once it came twice.
    std::thread::sleep(Duration::from_millis(300));
    let back = stage.wait(SELF_RESTART_MAX, || server.try_psql("select 1").is_ok());
    assert!(back, "the server did not restart by itself:\n{}", server.log_tail());
    killed
}

fn kill_walsenders(stage: &Stage, fault: &Fault) -> bool {
    let mut terminated = false;
    for _ in 0..fault.strength {
        let (_, server) = stage.primary();
        let all = "select application_name, pg_terminate_backend(pid) from pg_stat_replication";
        terminated |= server.try_psql(all).is_ok_and(|answers| answers.contains("tidemark|t"));
        std::thread::sleep(fault.lasts / fault.strength as u32);
    }
    terminated
}

fn promote(stage: &Stage, fault: &Fault) -> bool {
    let _hand = stage.take_hand();
    let servers = stage.servers();
    let (old, new) = (&servers[0], &servers[1]);
    if fault.strength > 0 {
        // What the old primary writes from here on is on a branch of its own.
        new.stop(Stop::Fast);
        std::thread::sleep(Duration::from_millis(fault.strength));
    }
    let ran = old.pid().is_some();
    old.crash();
    if fault.strength > 0 {
        new.run();
    }
    new.promote();
    stage.diary.note("the standby is promoted");
    stage.move_to(1);
    if !fault.lasts.is_zero() {
        std::thread::sleep(fault.lasts / 2);
        old.run();
        stage.diary.note("the old primary is back, and the sidecar is led to it");
        stage.aim(0);
        // Somebody still writes there. A sidecar that has streamed the new one refuses it; what another
        // acknowledges must be there like anything else.
        stage.write_one(0, fault.lasts);
        stage.aim(1);
        stage.diary.note("the sidecar is led to the new primary again");
        old.stop(Stop::Immediate);
    }
    ran
}

/// What became of the slot that was to be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Dropped,
    Missing,
    Stays,
}

fn drop_slot(stage: &Stage, server: &Postgres) -> Slot {
    let mut slot = Slot::Stays;
    stage.wait(Duration::from_secs(15), || {
        let _ = server.try_psql(
            "select pg_terminate_backend(active_pid) from pg_replication_slots \
             where slot_name = 'tidemark' and active",
        );
        slot = match server.try_psql("select pg_drop_replication_slot('tidemark')") {
            Ok(_) => Slot::Dropped,
            Err(error) if error.contains("does not exist") => Slot::Missing,
            Err(_) => Slot::Stays,
        };
        slot != Slot::Stays
    });
    slot
}

fn drop_slot_and_wal(stage: &Stage, fault: &Fault) -> bool {
    let none_runs = stage.sidecar.kill_for_good();
    let _hand = stage.take_hand();
    // A request that has come through may be served; none is on its way.
    stage.to_store.cut();
    std::thread::sleep(Duration::from_millis(400));
    let (_, server) = stage.primary();
    let slot = drop_slot(stage, &server);
    assert!(slot != Slot::Stays, "the slot cannot be dropped:\n{}", server.log_tail());
    let from = stored_end(stage);
    for _ in 0..4 {
        let _ = server.try_psql(
            "select pg_logical_emit_message(false, 'chaos', repeat('x', 1200000)); \
             select pg_switch_wal(); checkpoint",
        );
    }
    let kept_from = oldest_wal(&server, stage.plan.setup.segment_mib);
    stage.diary.note(format!("the repository ends at {from}, the server begins at {kept_from}"));
    stage.gaps.lock().unwrap().push(GapExpected { from, kept_from });
    std::thread::sleep(fault.lasts);
    stage.sidecar.resume_in(Duration::ZERO);
    drop(none_runs);
    if fault.strength % 2 == 1 {
        let log = || std::fs::read_to_string(stage.tidemark.home().join("run.log"));
        stage.wait(Duration::from_secs(30), || log().is_ok_and(|log| log.contains("is lost")));
        stage.diary.note("the gap was found: the sidecar is killed before the backup is there");
        stage.sidecar.kill();
        stage.sidecar.resume_in(Duration::from_millis(300));
    }
    kept_from > from
}

/// Keeps the store away until the server has given the slot up.
fn lose_slot(stage: &Stage, lasts: Duration) -> bool {
    let _hand = stage.take_hand();
    let (_, server) = stage.primary();
    stage.to_store.set(NetFault::Refuse);
    let lost = stage.wait(Duration::from_secs(30), || {
        let _ = server.try_psql(
            "select pg_logical_emit_message(false, 'chaos', repeat('x', 3000000)) \
             from generate_series(1, 5); select pg_switch_wal(); checkpoint",
        );
        let state = server
            .try_psql("select wal_status from pg_replication_slots where slot_name = 'tidemark'");
        state.is_ok_and(|state| state == "lost")
    });
    if !lost {
        stage.complain("the server did not give the slot up");
    }
    std::thread::sleep(lasts);
    stage.to_store.set(NetFault::None);
    lost
}

/// End of the contiguous WAL on timeline 1 in the store.
pub fn stored_end(stage: &Stage) -> Lsn {
    stored(stage).first().map_or(Lsn(0), |run| run.1)
}

/// What is missing between the WAL of timeline 1 in the store.
pub fn holes(stage: &Stage) -> Vec<(Lsn, Lsn)> {
    stored(stage).windows(2).map(|pair| (pair[0].1, pair[1].0)).collect()
}

/// The WAL of timeline 1 in the store, joined where it touches.
fn stored(stage: &Stage) -> Vec<(Lsn, Lsn)> {
    joined(extents(stage).into_iter().map(|extent| extent.range).collect())
}

/// A WAL object.
pub struct Extent {
    /// Its name.
    pub name: String,
    /// What it holds, from and until.
    pub range: (Lsn, Lsn),
}

/// The WAL objects of timeline 1 by position, read from their names.
pub fn extents(stage: &Stage) -> Vec<Extent> {
    let parse = |name: String| {
        let (timeline, range) = parse_extent(&name)?;
        (timeline == 1).then_some(Extent { name, range })
    };
    let mut extents: Vec<Extent> = stage.s3.wal_names().into_iter().filter_map(parse).collect();
    extents.sort_unstable_by_key(|extent| extent.range);
    extents
}

/// Start of the oldest WAL segment of timeline 1 on the server.
fn oldest_wal(server: &Postgres, segment_mib: u32) -> Lsn {
    let files = std::fs::read_dir(server.data().join("pg_wal")).unwrap();
    let names = files.map(|file| file.unwrap().file_name().to_string_lossy().into_owned());
    let numbers = names.filter(|name| name.len() == 24 && name.starts_with("00000001"));
    let bytes = u64::from(segment_mib) << 20;
    let numbers = numbers.map(|name| {
        let part = |range| u64::from_str_radix(&name[range], 16).unwrap();
        part(8..16) * ((1 << 32) / bytes) + part(16..24)
    });
    Lsn(numbers.min().unwrap() * bytes)
}

fn switch_storm(stage: &Stage, fault: &Fault) -> bool {
    // 64 MiB a time would be more than the machine can store in the time.
    let count = if stage.plan.setup.segment_mib > 16 { 3 } else { fault.strength };
    let mut switched = false;
    for _ in 0..count {
        let (_, server) = stage.primary();
        let done = server.try_psql(
            "select pg_logical_emit_message(false, 'chaos', 'x'); select pg_switch_wal()",
        );
        switched |= done.is_ok();
        std::thread::sleep(fault.lasts / count as u32);
    }
    switched
}

/// Fills the file system of `pg_wal`, so that the server panics, and makes room again.
fn fill_wal_disk(stage: &Stage, lasts: Duration) -> bool {
    if !stage.has_wal_disk() {
        return false;
    }
    let _hand = stage.take_hand();
    let (_, server) = stage.primary();
    let balloon = server.home().join("wal-disk/balloon");
    let mut file = std::fs::File::create(&balloon).unwrap();
    let block = vec![0; 1 << 20];
    while std::io::Write::write_all(&mut file, &block).is_ok() {}
    drop(file);
    let deadline = Instant::now() + Duration::from_secs(15);
    let mut full = false;
    while !full && Instant::now() < deadline {
        // Recycled segments are used up first.
        let _ = server.try_psql(
            "select pg_logical_emit_message(false, 'chaos', repeat('x', 4000000)) \
             from generate_series(1, 8)",
        );
        full = server.log().contains("No space left on device");
    }
    if !full {
        stage.complain("the server did not notice that its WAL disk is full");
    }
    std::thread::sleep(lasts);
    std::fs::remove_file(&balloon).unwrap();
    // It may be gone, be about to go, or be restarting by itself.
    let answers = |server: &Postgres| server.try_psql("select 1").is_ok();
    if !stage.wait(Duration::from_secs(10), || answers(&server)) {
        server.stop(Stop::Immediate);
        server.run();
    }
    full
}

fn net(stage: &Stage, fault: &Fault) -> bool {
    use Kind::*;
    let way = if fault.kind.hits_store() { &stage.to_store } else { &stage.to_server };
    let slow = || NetFault::Slow(u32::try_from(fault.strength).unwrap());
    let before = way.hits();
    way.set(match fault.kind {
        NetServerCut | NetStoreCut => NetFault::Refuse,
        NetServerHole | NetStoreHole => NetFault::Stall,
        NetServerSlow | NetStoreSlow => slow(),
        NetServerReset => NetFault::ResetAfter(fault.strength),
        _ => NetFault::ResetAfterSent(fault.strength),
    });
    std::thread::sleep(fault.lasts);
    way.set(NetFault::None);
    way.hits() > before
}

/// Nobody else is there to take the lease, so the sidecar that lost it goes on with a new one.
fn outage(stage: &Stage, fault: &Fault) -> bool {
    let pid = stage.sidecar.pid();
    let told_before = losses_told(stage);
    let effective = store(stage, fault);
    // One that has not begun yet, or is ended by another fault, shows nothing.
    let undisturbed = !stage.plan.setup.early && !stage.plan.any(Kind::hits_sidecar);
    let Some(pid) = pid.filter(|_| undisturbed) else { return effective };
    if !stage.wait(REFUSAL_MAX, || losses_told(stage) > told_before) {
        stage.complain("a sidecar that could not renew its lease did not say that it lost it");
    }
    if !stage.sidecar.is_running(pid) {
        stage.complain("the sidecar did not live through an outage longer than its lease");
    }
    effective
}

/// Sets the store's clock. Its answers tell by how much the clocks differ, and what is signed anew by that is
/// taken: again when the clock is set back.
fn skew(stage: &Stage, fault: &Fault) -> bool {
    let server = stage.s3.server();
    let before = server.skewed_count();
    let ahead = if fault.strength.is_multiple_of(2) { SKEW_MS } else { -SKEW_MS };
    server.set_clock_ahead_ms(ahead);
    std::thread::sleep(fault.lasts);
    let hits = server.skewed_count() - before;
    server.set_clock_ahead_ms(0);
    stage.diary.note(format!("{} hit {hits} requests", fault.kind.name()));
    hits > 0
}

fn store(stage: &Stage, fault: &Fault) -> bool {
    let faults = stage.s3.server().faults();
    faults.seed(stage.plan.seed ^ u64::from(stage.plan.round));
    let chance = u32::try_from(fault.strength).unwrap().min(1_000_000);
    let error = |status, code: &str| StoreFault::new(Effect::error(status, code));
    let half = |effect| StoreFault::new(effect).chance_ppm(chance / 2);
    let added = match fault.kind {
        Kind::S3Errors => {
            vec![half(Effect::slow_down()), half(Effect::error(500, "InternalError"))]
        }
        Kind::S3LostReply => vec![
            half(Effect::LostReply),
            half(Effect::ErrorAfter { status: 500, code: "InternalError".into() }),
        ],
        Kind::S3Outage => vec![error(503, "ServiceUnavailable")],
        Kind::S3HangAfter => [Op::PutObject, Op::UploadPart, Op::CompleteMultipartUpload]
            .map(|op| StoreFault::new(Effect::HangAfter).chance_ppm(chance).on(op))
            .to_vec(),
        Kind::S3CompleteError => {
            let effect = Effect::ErrorIn200 { code: "InternalError".into() };
            vec![StoreFault::new(effect).chance_ppm(chance).on(Op::CompleteMultipartUpload)]
        }
        Kind::S3LosePart => {
            vec![StoreFault::new(Effect::LosePart).chance_ppm(chance).on(Op::UploadPart)]
        }
        Kind::S3SlowList => {
            vec![StoreFault::new(Effect::Delay { ms: fault.strength }).on(Op::ListObjects)]
        }
        Kind::S3Expired => vec![error(400, "ExpiredToken")],
        Kind::S3BucketGone => vec![error(404, "NoSuchBucket")],
        other => panic!("{} is no fault of the store", other.name()),
    };
    let ids: Vec<u64> = added.into_iter().map(|fault| faults.add(fault)).collect();
    std::thread::sleep(fault.lasts);
    let hits: u64 = ids.iter().map(|id| faults.hits(*id)).sum();
    stage.diary.note(format!("{} hit {hits} requests", fault.kind.name()));
    ids.into_iter().for_each(|id| faults.remove(id));
    hits > 0
}
