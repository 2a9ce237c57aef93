//! Runs written by hand: what a seed once found, so small that nothing else is in the way.

use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use tidemark::repo::Catalog;
use tidemark::repo::retention::RetentionOptions;
use tidemark::repo::verify::{VerifyOptions, verify};

use crate::checks::{Stored, parse_extent};
use crate::model::{Damage, SEGMENT};
use crate::net::Weather;
use crate::reading;
use crate::server::Elsewhere;
use crate::work::{Command, Settings};
use crate::world::World;

const STEP: Duration = Duration::from_millis(50);

fn world() -> World {
    let settings = Settings {
        identity: None,
        lease_ttl: Duration::from_secs(10),
        wait: true,
        uploads_max: 3,
        flush_interval: Duration::from_secs(1),
        lag_ceiling_bytes: None,
        retention: RetentionOptions::default(),
    };
    World::new(1, settings)
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// The histories of a server on its third timeline, when the stream last saw it on the first, hold
/// the second as well: the WAL of the second is stored, and nothing else says where it belongs.
#[test]
fn a_timeline_that_nobody_saw_begin_is_stored_with_its_history() {
    let mut world = world();
    world.start_sidecar();
    world.run(seconds(5), STEP);
    world.kill(0);
    for _ in 0..2 {
        let now = world.now;
        world.server.promote(0, false, now);
        world.server.work(5000, now);
    }
    world.start_sidecar();
    world.run(seconds(60), STEP);
    let known = world.look(async |_, repository, _| {
        let catalog = Catalog::load(repository).await?;
        Ok((catalog.wal.timelines().count(), catalog.unknown_ancestries().len()))
    });
    assert_eq!(world.judge.violations, Vec::<String>::new());
    assert_eq!(known.unwrap(), (3, 0));
}

/// A standby that is promoted between two answers has less WAL than the repository by the first one and is
/// no standby by the second. It was not rolled back.
#[test]
fn a_standby_promoted_while_it_is_asked_was_not_rolled_back() {
    let mut world = world();
    world.start_sidecar();
    world.run(seconds(5), STEP);
    let now = world.now;
    world.server.work(5000, now);
    world.run(seconds(5), STEP);
    let end = world.server.state().line().end();
    assert_eq!(world.processes[0].status.snapshot().durable_end_lsn.0, end);
    world.server.state().standby_end = Some(end - 1000);
    world.server.break_connections();
    world.run(seconds(30), STEP);
    assert_eq!(world.judge.violations, Vec::<String>::new());
    assert!(!world.processes.is_empty(), "{:?}", world.log);
    let told = world.processes[0].status.snapshot();
    assert_eq!(told.timeline.unwrap().get(), 2);
    assert!(told.durable_end_lsn.0 > end, "{told:#?}");
}

/// A standby has received the WAL into the middle of a record, and so has the repository. The record is no
/// part of the timeline that begins when it is promoted, which may be after it has said who it is.
#[test]
fn a_standby_promoted_after_it_was_asked_has_other_wal_than_what_is_stored_of_a_torn_record() {
    let mut world = world();
    world.start_sidecar();
    world.run(seconds(5), STEP);
    let end = world.server.state().line().end();
    world.server.receive(end);
    let now = world.now;
    world.server.work(50_000, now);
    let torn = {
        let state = world.server.state();
        let long = state.line().records.iter().rfind(|(start, end)| end - start > 500);
        long.unwrap().0 + 300
    };
    world.server.receive(torn);
    world.run(seconds(5), STEP);
    world.server.break_connections();
    world.server.state().promoted_at_start = true;
    world.run(seconds(2), STEP);
    let now = world.now;
    world.server.work(50_000, now);
    world.run(seconds(30), STEP);
    assert!(world.net.names().keys().any(|name| name.contains(&format!("-{torn:016X}-"))));
    assert_eq!(world.judge.violations, Vec::<String>::new());
    let told = world.processes[0].status.snapshot();
    let end = world.server.state().line().end();
    assert!(told.timeline.unwrap().get() == 2 && end > torn);
    assert_eq!((told.durable_end_lsn.0, told.acknowledged_end_lsn.0), (end, end), "{told:#?}");
}

/// The server has removed the WAL that is asked for first; the next connection is one to the old primary,
/// which came up in between, has our old slot, and would send its own timeline without end.
#[test]
fn another_host_that_answers_the_next_attempt_is_not_streamed() {
    let mut world = world();
    world.start_sidecar();
    world.run(seconds(5), STEP);
    let now = world.now;
    world.server.work(5000, now);
    world.run(seconds(5), STEP);
    let now = world.now;
    world.server.promote(0, false, now);
    world.server.work(3 * SEGMENT, now);
    world.server.checkpoint(now);
    world.server.work(500, now);
    {
        let mut state = world.server.state();
        let old = &mut state.lines[0];
        for salt in 0..10 {
            old.filler(SEGMENT as usize / 2, salt);
        }
        old.ending(9000, now.as_microsecond(), true);
        state.elsewhere = Some(Elsewhere::OldPrimary);
    }
    world.run(seconds(30), STEP);
    let (was_gone, acks) = {
        let state = world.server.state();
        (state.elsewhere.is_none(), state.old_primary_acks)
    };
    assert_eq!((was_gone, acks), (true, 0));
    assert_eq!(world.judge.violations, Vec::<String>::new());
    let told = world.processes[0].status.snapshot();
    let end = world.server.state().line().end();
    assert_eq!((told.timeline.unwrap().get(), told.durable_end_lsn.0), (2, end), "{told:#?}");
    assert_eq!(told.gaps.len(), 1);
}

/// A slot that lost its WAL is made anew; one of the same name on another host is not that one.
#[test]
fn a_slot_of_another_host_is_not_dropped_for_one_that_lost_its_wal() {
    let mut world = world();
    world.start_sidecar();
    world.run(seconds(5), STEP);
    let now = world.now;
    world.server.work(3 * SEGMENT + SEGMENT / 4, now);
    world.run(seconds(5), STEP);
    let made = world.server.state().slot_made;
    let now = world.now;
    world.server.checkpoint(now);
    world.server.crash();
    {
        let mut state = world.server.state();
        let stored = state.slot.unwrap();
        let (slot, kept_from) = (state.line().boundary_before(stored - 5000), state.kept_from);
        state.elsewhere = Some(Elsewhere::Sound { slot, kept_from });
        state.kept_from = (stored / SEGMENT + 1) * SEGMENT;
    }
    world.server.start(now);
    world.run(seconds(30), STEP);
    let (was_gone, slot_made, slot, end) = {
        let state = world.server.state();
        (state.elsewhere.is_none(), state.slot_made, state.slot, state.line().end())
    };
    assert!(was_gone, "{:?}", world.log);
    assert_eq!((slot_made, slot), (made, Some(end)));
    assert_eq!(world.judge.violations, Vec::<String>::new());
}

/// Of several hosts another one than the one that streams may answer what the catalog says.
#[test]
fn what_another_host_says_of_its_slot_is_not_said_of_ours() {
    let mut world = world();
    world.start_sidecar();
    world.run(seconds(10), STEP);
    let shown = |world: &World| world.processes[0].status.snapshot().slot.wal_status;
    assert_eq!(shown(&world).as_deref(), Some("reserved"));
    world.server.state().catalog_elsewhere = true;
    world.run(seconds(130), STEP);
    assert_eq!(shown(&world).as_deref(), Some("reserved"));
    assert_eq!(world.judge.violations, Vec::<String>::new());
}

/// A walsender answers a status before it looks for more WAL to send.
#[test]
fn a_sign_of_life_in_front_of_a_commit_does_not_say_that_all_is_stored() {
    let mut world = world();
    world.start_sidecar();
    let now = world.now;
    world.server.work(100, now);
    world.run(seconds(100), STEP);
    let caught_up = world.processes[0].status.snapshot().caught_up_at;
    assert!(caught_up.is_some(), "a silent server was heard twice");
    let now = world.now;
    world.server.state().answers_first = true;
    world.server.work(100, now);
    world.run(STEP, STEP);
    assert!(!world.server.state().answers_first, "the answer came first");
    world.run(seconds(10), STEP);
    assert_eq!(world.judge.violations, Vec::<String>::new());
}

/// A store that is away for longer than the lease lives: nobody else took it, so the same process goes on
/// when the store is back, and the base backup under way in it is not lost.
#[test]
fn a_sidecar_outlives_an_outage_that_is_longer_than_its_lease() {
    let mut world = world();
    world.start_sidecar();
    world.run(seconds(5), STEP);
    world.order_backup(0);
    let now = world.now;
    world.server.work(5000, now);
    world.net.set_weather(Weather::DOWN);
    world.run(seconds(60), STEP);
    let told = world.server.state().slot;
    let now = world.now;
    world.server.work(5000, now);
    world.run(seconds(240), STEP);
    let shown = world.processes[0].status.snapshot();
    assert!(!shown.is_connected(), "nobody streams without the lease: {shown:#?}");
    world.net.set_weather(Weather::FAIR);
    world.run(seconds(60), STEP);
    assert_eq!(world.judge.violations, Vec::<String>::new());
    assert_eq!(world.counts.processes, 1);
    assert!(!world.processes.is_empty(), "{:?}", world.log);
    assert!(world.server.state().slot > told);
}

/// A process that dies between the mark and the WAL behind it leaves nothing that is shown wrongly, the next
/// one goes on, and a backup leads past it.
#[test]
fn a_past_with_minimal_wal_is_not_forgotten_by_whoever_comes_later() {
    is_not_forgotten(|world| world.server.minimal(world.now));
}

/// The same, for a server whose own WAL is damaged.
#[test]
fn a_past_with_damaged_wal_is_not_forgotten_by_whoever_comes_later() {
    is_not_forgotten(|world| world.server.damage(Damage::Byte));
}

fn is_not_forgotten(spoil: fn(&World)) {
    let mut world = world();
    world.load_bytes = 2000;
    world.start_sidecar();
    world.run(seconds(3), STEP);
    world.order_backup(0);
    while world.judge.committed.is_empty() && world.judge.violations.is_empty() {
        world.run(STEP, STEP);
    }
    world.run(seconds(5), STEP);
    spoil(&world);
    let barrier = world.server.state().line().barriers[0].clone();
    let (at, mark) = (barrier.at, barrier.mark(1));
    let short = Duration::from_millis(2);
    while !world.net.names().contains_key(&mark) && world.judge.violations.is_empty() {
        world.run(short, short);
    }
    world.kill(0);
    let ends = |world: &mut World| {
        let catalog = world.look(async |_, repository, _| Catalog::load(repository).await).unwrap();
        let ends: Vec<u64> = catalog.intervals().iter().map(|it| it.until_lsn.0).collect();
        (ends, catalog.gaps().iter().filter(|gap| gap.barrier.is_some()).count(), catalog)
    };
    let (before, gap_count, catalog) = ends(&mut world);
    let stored_end = catalog.durable_end().unwrap().1.0;
    // Uploads overtake each other: what lies further on may be there.
    let holds = |stored: &Stored| stored.span.0 < barrier.told && barrier.told <= stored.span.1;
    let is_stored =
        world.net.names().keys().filter_map(|name| parse_extent(name)).any(|it| holds(&it));
    assert!(before[0] <= at && !is_stored);
    assert_eq!(gap_count, usize::from(stored_end > at), "only what lies behind something is a gap");
    world.start_sidecar();
    world.run(seconds(120), STEP);
    let (after, gap_count, catalog) = ends(&mut world);
    assert_eq!((after, gap_count), (vec![at], 1));
    let (timeline, end) = catalog.durable_end().unwrap();
    assert!(end.0 > at && !catalog.reaches(timeline, end), "a backup is needed at once");
    world.order_backup(0);
    while world.judge.committed.len() < 2 && world.judge.violations.is_empty() {
        world.run(STEP, STEP);
    }
    let (_, _, catalog) = ends(&mut world);
    let (timeline, end) = catalog.durable_end().unwrap();
    assert!(catalog.reaches(timeline, end));
    assert_eq!(world.judge.violations, Vec::<String>::new());
}

/// The end of a backup is known by the clock of the host that took it. A commit of that very moment may
/// be in WAL that is not stored yet.
#[test]
fn a_listing_promises_no_moment_after_a_backup_before_a_commit_was_stored() {
    let mut world = world();
    world.start_sidecar();
    world.run(seconds(3), STEP);
    world.order_backup(0);
    let deadline = world.now + SignedDuration::from_secs(60);
    // After a violation time stands still.
    while world.judge.committed.is_empty() && world.judge.violations.is_empty() {
        assert!(world.now < deadline, "no backup: {:?}", world.log);
        world.run(STEP, STEP);
    }
    let promised = world.look(async |_, repository, _| {
        let catalog = Catalog::load(repository).await?;
        let intervals = catalog.intervals();
        Ok(intervals
            .iter()
            .map(|interval| interval.from_time <= interval.until_time)
            .collect::<Vec<_>>())
    });
    assert_eq!(promised.unwrap(), vec![false]);
    let now = world.now;
    world.server.work(100, now);
    world.run(seconds(4), STEP);
    let promised = world.look(async |_, repository, _| {
        let catalog = Catalog::load(repository).await?;
        let intervals = catalog.intervals();
        Ok(intervals
            .iter()
            .map(|interval| interval.from_time <= interval.until_time)
            .collect::<Vec<_>>())
    });
    assert_eq!(promised.unwrap(), vec![true]);
}

/// At a promotion the history of the new timeline is put before anything else happens. A store that does
/// not answer keeps nobody from hearing that he is to stop.
#[test]
fn a_stop_is_heard_while_the_history_of_a_new_timeline_is_on_its_way() {
    let mut world = world();
    world.settings.lease_ttl = seconds(180);
    world.start_sidecar();
    world.run(seconds(10), STEP);
    let now = world.now;
    world.server.work(5000, now);
    world.run(seconds(20), STEP);
    world.net.set_weather(Weather { late: 1000, ..Weather::FAIR });
    let now = world.now;
    world.server.promote(0, true, now);
    world.run(seconds(2), STEP);
    world.terminate(0);
    // Giving the lease back is tried for ten seconds; a request to the store waits for thirty.
    world.run(seconds(15), STEP);
    assert_eq!(world.judge.violations, Vec::<String>::new());
    assert!(world.processes.is_empty(), "{:?}", world.log);
}

/// An outage that outlasts the lease leaves nobody who may acknowledge; the server is relieved all the
/// same, and the gap is seen by the process that goes on.
#[test]
fn past_the_ceiling_the_server_is_relieved_while_nobody_holds_the_lease() {
    let mut world = world();
    world.settings.lag_ceiling_bytes = Some(2 << 20);
    world.judge.settings.lag_ceiling_bytes = Some(2 << 20);
    world.start_sidecar();
    world.run(seconds(5), STEP);
    let now = world.now;
    world.server.work(5000, now);
    world.run(seconds(30), STEP);
    let left_at = world.server.state().slot.unwrap();
    world.net.set_weather(Weather::DOWN);
    world.run(seconds(60), STEP);
    let now = world.now;
    world.server.work(1 << 20, now);
    world.run(seconds(60), STEP);
    assert_eq!(world.server.state().slot, Some(left_at), "below the ceiling");
    let now = world.now;
    world.server.work(2 << 20, now);
    world.run(seconds(60), STEP);
    assert!(world.server.state().slot.unwrap() > left_at + (2 << 20), "{:?}", world.log);
    assert!(world.processes[0].status.snapshot().gaps.is_empty(), "it is no gap yet");
    let now = world.now;
    world.server.checkpoint(now);
    world.server.work(5000, now);
    world.net.set_weather(Weather::FAIR);
    world.run(seconds(60), STEP);
    let told = world.processes[0].status.snapshot();
    assert_eq!((told.gaps.len(), told.base_backup_needed), (1, true), "{told:#?}");
    let listed = world.look(async |_, repository, _| {
        let catalog = Catalog::load(repository).await?;
        Ok(catalog.gaps().iter().map(|gap| gap.gap.missing).collect::<Vec<_>>())
    });
    let missing = listed.unwrap();
    assert_eq!(missing.len(), 1, "{missing:?}");
    assert_eq!(missing[0].end(), told.gaps[0].end_lsn);
    assert_eq!(world.judge.violations, Vec::<String>::new());
}

/// Past the ceiling, with everything received: only what the store has not answered for is missing, and
/// moving the slot past it would acknowledge it.
#[test]
fn what_is_on_its_way_to_the_store_is_not_given_up_for_the_ceiling() {
    let mut world = world();
    world.settings.lag_ceiling_bytes = Some(2 << 20);
    world.judge.settings.lag_ceiling_bytes = Some(2 << 20);
    world.settings.lease_ttl = seconds(600);
    world.start_sidecar();
    world.run(seconds(5), STEP);
    let now = world.now;
    world.server.work(5000, now);
    world.run(seconds(30), STEP);
    let left_at = world.server.state().slot;
    world.net.set_weather(Weather::DOWN);
    let now = world.now;
    world.server.work(3 << 20, now);
    world.run(seconds(120), STEP);
    assert_eq!(world.judge.violations, Vec::<String>::new());
    assert_eq!(world.server.state().slot, left_at);
    world.net.set_weather(Weather::FAIR);
    world.run(seconds(60), STEP);
    assert_eq!(world.judge.violations, Vec::<String>::new());
    assert!(world.processes[0].status.snapshot().gaps.is_empty());
    assert!(world.server.state().slot > left_at);
}

/// Keys go when no object names them, and not before.
#[test]
fn a_sweep_of_keys_leaves_those_that_open_something() {
    let mut world = world();
    world.settings.identity = Some(World::identity());
    world.judge.settings.identity = world.settings.identity.clone();
    world.load_bytes = 2000;
    world.start_sidecar();
    world.run(seconds(3), STEP);
    world.order_backup(0);
    while world.judge.committed.is_empty() && world.judge.violations.is_empty() {
        world.run(STEP, STEP);
    }
    world.run(seconds(5), STEP);
    world.kill(0);
    // The lease names the key of the next one.
    world.start_sidecar();
    world.run(seconds(40), STEP);
    world.kill(0);
    let keys = |world: &World| {
        let names = world.net.names();
        names.keys().filter(|name| name.starts_with("main/keys/")).count()
    };
    let before = keys(&world);
    assert_eq!(before, 2);
    world.skip(SignedDuration::from_hours(24 * 40));
    world.start_command(Command::SweepKeys);
    world.run(seconds(60), STEP);
    assert!(world.processes.is_empty(), "{:?}", world.log);
    assert_eq!(keys(&world), before);
    let names = world.net.names();
    let read = world.look(async |judge, repository, server| {
        reading::read_all(judge, repository, server, &names).await
    });
    read.unwrap();
    assert_eq!(world.judge.violations, Vec::<String>::new());
}

/// The newest backup before the recovery window is where its first moments are restored from, however old
/// it is.
#[test]
fn the_base_of_the_recovery_window_outlives_every_other_rule() {
    let mut world = world();
    let retention = RetentionOptions { keep_days: Some(1), pitr_days: Some(3), keep_count: None };
    world.settings.retention = retention.clone();
    world.judge.settings.retention = retention;
    for count in 1..=3 {
        world.load_bytes = 2000;
        world.start_sidecar();
        world.run(seconds(3), STEP);
        world.order_backup(0);
        while world.judge.committed.len() < count && world.judge.violations.is_empty() {
            world.run(STEP, STEP);
        }
        world.run(seconds(10), STEP);
        world.kill(0);
        if count < 3 {
            world.skip(SignedDuration::from_hours(48));
        }
    }
    // The window begins a day after the first backup and a day before the second.
    world.start_command(Command::Expire);
    world.run(seconds(60), STEP);
    assert_eq!(world.judge.violations, Vec::<String>::new());
    assert_eq!(world.judge.committed.len(), 3);
    // A day and a half later it begins behind the second.
    world.skip(SignedDuration::from_hours(36));
    world.start_command(Command::Expire);
    world.run(seconds(60), STEP);
    assert_eq!(world.judge.violations, Vec::<String>::new());
    assert_eq!(world.judge.committed.len(), 2);
}

/// A sidecar that is killed leaves WAL behind a hole, and the one that takes over fills it from what the slot
/// has kept. Until it is done, nothing is lost and the backup leads to all that counts.
#[test]
fn what_a_killed_sidecar_left_behind_a_hole_is_no_loss_once_another_is_at_work() {
    let mut world = world();
    world.start_sidecar();
    world.run(seconds(5), STEP);
    world.order_backup(0);
    world.run(seconds(30), STEP);
    world.net.set_weather(Weather { lost: 400, way_ms: 1500, ..Weather::FAIR });
    let unseen = |world: &mut World| {
        let found = world.look(async |_, repository, _| {
            let catalog = Catalog::load(repository).await?;
            let reader = repository.reader(Vec::new());
            let options = VerifyOptions { thread_count: 0, ..VerifyOptions::new(1) };
            let report = verify(repository, &reader, &options, &Arc::default()).await?;
            let epoch = catalog.lease.as_ref().map_or(0, |lease| lease.epoch);
            assert_eq!(catalog.backups.len(), 1);
            Ok((epoch, catalog.gaps().len(), report.lost_count(), report.unreached_end))
        });
        found.unwrap()
    };
    for _ in 0..400 {
        let now = world.now;
        world.server.work(3000, now);
        world.run(STEP * 4, STEP);
        if unseen(&mut world).1 > 0 {
            break;
        }
    }
    world.kill(0);
    // What was under way arrives, or is lost.
    world.run(seconds(4), STEP);
    assert!(unseen(&mut world).1 > 0, "{:?}", world.log);
    world.net.set_weather(Weather::FAIR);
    world.start_sidecar();
    let mut looks = 0;
    for _ in 0..400 {
        world.run(STEP, STEP);
        let (epoch, holes, lost, unreached) = unseen(&mut world);
        if epoch > 1 {
            assert_eq!((lost, unreached), (0, None), "{:?}", world.log);
            looks += usize::from(holes > 0);
        }
    }
    assert!(looks > 0, "it was too quick");
    assert_eq!(unseen(&mut world).1, 0, "the hole is filled");
}

/// A stream for one backup, whose slot ends with its connection, begins again where damage in a record is
/// seen: not in the middle of that record, where the segment it begins in is stored already.
#[test]
fn a_backup_by_itself_is_refused_for_damage_in_a_record_that_crosses_a_segment() {
    let mut world = world();
    world.start_backup_alone();
    let deadline = world.now + SignedDuration::from_secs(60);
    while world.server.state().backups.is_empty() {
        assert!(world.now < deadline, "no backup: {:?}", world.log);
        world.run(STEP, STEP);
    }
    world.server.damage(Damage::Across);
    world.run(seconds(180), STEP);
    assert_eq!(world.judge.violations, Vec::<String>::new());
    assert!(world.processes.is_empty() && world.judge.committed.is_empty());
    let ended = world.log.last().unwrap();
    assert!(ended.contains("(conflict)") && ended.contains("cannot be replayed"), "{ended}");
}

/// A standby sends what it cannot replay, and fetches it anew from its primary after a few seconds.
#[test]
fn damage_that_the_server_heals_leaves_no_mark() {
    let mut world = world();
    world.start_sidecar();
    world.run(seconds(5), STEP);
    world.server.damage(Damage::Byte);
    world.run(seconds(5), STEP);
    let told = world.processes[0].status.snapshot();
    assert!(told.connection_count > 3 && told.server_error.is_some(), "{told:#?}");
    world.server.heal();
    let now = world.now;
    world.server.work(5000, now);
    world.run(seconds(30), STEP);
    let told = world.processes[0].status.snapshot();
    assert_eq!((told.gaps.len(), told.server_error), (0, None));
    assert_eq!(told.durable_end_lsn.0, world.server.state().line().end());
    assert!(!world.net.names().keys().any(|name| name.contains("/marks/")));
    assert_eq!(world.judge.violations, Vec::<String>::new());
}
