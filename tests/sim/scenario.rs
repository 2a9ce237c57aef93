//! One run: a world and a row of things that happen to it, drawn from a seed, and the end, where
//! everything is mended and everything is read.

use std::time::Duration;

use jiff::SignedDuration;
use tidemark::repo::Catalog;
use tidemark::repo::retention::RetentionOptions;

use crate::dice::Dice;
use crate::model::Damage;
use crate::net::Weather;
use crate::reading;
use crate::work::{Command, Settings};
use crate::world::{Counts, World};

/// How a run went.
#[derive(Debug)]
pub struct Outcome {
    pub violations: Vec<String>,
    pub log: Vec<String>,
    pub counts: Counts,
    pub trace: u64,
}

/// What is drawn once for a run.
fn settings(dice: &mut Dice) -> Settings {
    let mut days = |of_thousand, low, high| {
        let drawn = dice.between(low, high) as u32;
        dice.chance(of_thousand).then_some(drawn)
    };
    let retention = RetentionOptions {
        keep_days: days(300, 1, 20),
        keep_count: days(700, 1, 3),
        pitr_days: days(400, 1, 20),
    };
    Settings {
        identity: dice.chance(300).then(World::identity),
        lease_ttl: Duration::from_secs(dice.pick(&[10, 30, 180])),
        wait: dice.chance(500),
        uploads_max: dice.between(1, 5) as usize,
        flush_interval: Duration::from_millis(dice.pick(&[100, 1000, 3000])),
        lag_ceiling_bytes: dice.chance(100).then_some(2 << 20),
        retention,
    }
}

/// Runs the scenario of `seed`.
pub fn run(seed: u64) -> Outcome {
    let mut dice = Dice::new(seed ^ 0x7469_6465_6d61_726b);
    let settings = settings(&mut dice);
    let mut world = World::new(seed, settings);
    let described = format!("{:?} encrypted: {}", world.settings.retention, encrypted(&world));
    world.note(described);
    let step = Duration::from_millis(dice.pick(&[20, 50, 100]));
    world.load_bytes = dice.pick(&[200, 3000, 30_000]);
    world.start_sidecar();
    world.run(Duration::from_secs(2), step);
    let acts = dice.between(12, 30);
    for _ in 0..acts {
        act(&mut world, &mut dice, step);
        if !world.judge.violations.is_empty() {
            break;
        }
    }
    if world.judge.violations.is_empty() {
        mend(&mut world, &mut dice, step);
    }
    finish(world)
}

fn encrypted(world: &World) -> bool {
    world.settings.identity.is_some()
}

fn finish(mut world: World) -> Outcome {
    world.counts.targets = world.judge.targets;
    world.counts.backups = world.judge.committed.len() as u64;
    Outcome {
        trace: world.trace(),
        violations: std::mem::take(&mut world.judge.violations),
        log: std::mem::take(&mut world.log),
        counts: world.counts,
    }
}

/// One thing happens, and the world goes on for a while.
fn act(world: &mut World, dice: &mut Dice, step: Duration) {
    let count = world.processes.len() as u64;
    let any = (count > 0).then(|| dice.below(count) as usize);
    let sidecars = world.sidecars();
    let now = world.now;
    match dice.below(30) {
        0..4 => world.start_sidecar(),
        4 | 5 => {
            if let Some(index) = any {
                world.kill(index);
            }
        }
        6 => {
            if let Some(index) = any {
                world.toggle_sleep(index);
            }
        }
        7 => sleep_through(world, dice, step),
        8 => {
            if let Some(index) = any {
                world.terminate(index);
            }
        }
        9..12 => match sidecars.first() {
            Some(index) => world.order_backup(*index),
            None => world.start_backup_alone(),
        },
        12 => world.start_backup_alone(),
        13 => world.set_weather(Weather::FOUL),
        14 => world.set_weather(Weather::SLOW),
        15 => world.set_weather(Weather::DOWN),
        16 | 17 => world.set_weather(Weather::FAIR),
        18 => world.server.checkpoint(now),
        19 => world.server.switch(),
        20 => world.server.restore_point(now),
        21 => server_trouble(world, dice),
        22 => {
            world.note("start the server");
            world.server.start(now);
        }
        23 | 24 => world.start_command(Command::Expire),
        25 => world.start_command(dice.pick(&[Command::Sweep, Command::SweepKeys])),
        26 => world.start_command(Command::Compact),
        27 => world.start_command(Command::Verify),
        28 => absence(world, dice, step),
        _ => look(world, dice),
    }
    let slow = Duration::from_millis(500);
    match dice.below(12) {
        // Long enough for extents to settle, and for the stream to merge them.
        0 => world.run(Duration::from_secs(dice.between(60, 900)), slow),
        1..4 => {}
        _ => world.run(Duration::from_millis(dice.between(10, 15_000)), step),
    }
}

/// A process is suspended, others go on, and it comes back.
fn sleep_through(world: &mut World, dice: &mut Dice, step: Duration) {
    let sidecars = world.sidecars();
    let Some(index) = sidecars.first().copied() else { return };
    let number = world.processes[index].number;
    if !world.processes[index].asleep {
        world.toggle_sleep(index);
    }
    if dice.chance(700) {
        world.start_sidecar();
    }
    let ttl = world.settings.lease_ttl.as_secs();
    let slow = step.max(Duration::from_millis(100));
    world.run(Duration::from_secs(dice.between(1, ttl * 3)), slow);
    let index = world.processes.iter().position(|process| process.number == number);
    if let Some(index) = index.filter(|index| world.processes[*index].asleep) {
        world.toggle_sleep(index);
    }
}

fn server_trouble(world: &mut World, dice: &mut Dice) {
    let now = world.now;
    match dice.below(8) {
        0 | 1 => {
            world.note("connections break");
            world.server.break_connections();
        }
        2 => {
            world.note("the server crashes");
            world.server.crash();
        }
        3 => {
            world.note("the slot is dropped");
            world.server.drop_slot();
            world.server.checkpoint(now);
        }
        6 => {
            world.note("the server runs with wal_level = minimal");
            world.server.minimal(now);
        }
        7 => {
            let how = [Damage::Byte, Damage::Rest, Damage::Segment][dice.below(3) as usize];
            world.note(format!("the server's WAL is damaged: {how:?}"));
            world.server.damage(how);
        }
        4 => {
            world.note("the server is promoted under the stream");
            world.server.promote(0, true, now);
        }
        _ => {
            let lost = dice.below(20) as usize;
            world.note(format!("another server takes over, {lost} records are lost"));
            world.server.promote(lost, false, now);
        }
    }
}

/// Nobody is there for hours or days.
fn absence(world: &mut World, dice: &mut Dice, step: Duration) {
    for index in 0..world.processes.len() {
        if world.processes[index].asleep {
            world.toggle_sleep(index);
        }
        world.terminate(index);
    }
    world.run(Duration::from_secs(40), step.max(Duration::from_millis(200)));
    while !world.processes.is_empty() {
        world.kill(0);
    }
    let hours = dice.pick(&[1, 26, 24 * 3, 24 * 10, 24 * 35]);
    world.skip(SignedDuration::from_hours(hours + dice.below(20) as i64));
}

/// Looks at the listing and aims at targets.
fn look(world: &mut World, dice: &mut Dice) {
    world.counts.listings += 1;
    let names = world.net.names();
    if !names.contains_key("main/identity") {
        return;
    }
    let mut dice = dice.fork();
    let looked = world.look(async |judge, repository, server| {
        reading::look_around(judge, repository, server, &names, &mut dice).await
    });
    if let Err(error) = looked {
        world.judge.accuse(format!("the listing cannot be read: {error:?}"));
    }
}

/// All faults end: the stream must catch up, a backup must succeed, and all that is listed is read.
fn mend(world: &mut World, dice: &mut Dice, step: Duration) {
    world.note("all faults end");
    world.load_bytes = 0;
    world.set_weather(Weather::FAIR);
    let now = world.now;
    world.server.start(now);
    for index in 0..world.processes.len() {
        if world.processes[index].asleep {
            world.toggle_sleep(index);
        }
        world.terminate(index);
    }
    world.run(Duration::from_secs(45), step);
    while !world.processes.is_empty() {
        world.kill(0);
    }
    world.settings.wait = true;
    world.start_sidecar();
    let now = world.now;
    world.server.work(500, now);
    // Damaged WAL is asked for again for a while before it is stored.
    let damaged = world.server.state().line().barriers.len() as u32;
    let patience = world.settings.lease_ttl * 3 + Duration::from_secs(120) * (1 + damaged);
    wait_for(world, patience, step, "the stream catches up", |world| {
        let end = world.server.state().line().end();
        world.server.state().slot == Some(end)
    });
    let before = world.judge.committed.len();
    if world.judge.violations.is_empty() {
        world.order_backup(0);
        wait_for(world, Duration::from_secs(120), step, "a backup succeeds", |world| {
            world.judge.committed.len() > before
        });
    }
    look(world, dice);
    if let Some(index) = world.sidecars().first().copied() {
        world.terminate(index);
        wait_for(world, Duration::from_secs(30), step, "a stop ends", |world| {
            world.processes.is_empty()
        });
    }
    let names = world.net.names();
    let read = world.look(async |judge, repository, server| {
        let catalog = Catalog::load(repository).await?;
        reading::nothing_is_missing(judge, &catalog, &server.state());
        reading::read_all(judge, repository, server, &names).await
    });
    if let Err(error) = read {
        world.judge.accuse(format!("not everything can be read: {error:?}"));
    }
}

fn wait_for(
    world: &mut World,
    patience: Duration,
    step: Duration,
    what: &str,
    done: impl Fn(&World) -> bool,
) {
    let deadline = world.now + SignedDuration::try_from(patience).unwrap();
    while !done(world) && world.judge.violations.is_empty() {
        if world.now > deadline {
            world.judge.accuse(format!("it never happens that {what}"));
        }
        world.run(step, step);
    }
    world.note(what);
}
