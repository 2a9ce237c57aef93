//! The world: the server, the store, the processes, and time, moved in small steps.
//!
//! In each step every process that is awake runs until its clock shows the end of the step; then the
//! requests that have arrived at the store are carried out, and what was told and changed is judged. So
//! two processes may be apart by one step, which no real clocks beat, and all of it happens on one
//! thread in an order that only the seed decides.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Debug;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tidemark::clock::{Clock, Instant};
use tidemark::error::{Error, Kind, Result};
use tidemark::repo::{DecryptionIdentity, Repository};
use tidemark::store::memory::Memory;
use tokio::runtime::Runtime;

use crate::checks::Judge;
use crate::dice::Dice;
use crate::model::ORIGIN;
use crate::net::{Change, Net, Weather};
use crate::process::{self, Order, Process};
use crate::server::Server;
use crate::work::{self, Command, Settings};

/// Above this the load is small.
const WAL_BYTES_MAX: u64 = 6 << 20;
/// When every run begins.
const BEGIN: &str = "2026-03-01T00:00:00Z";

/// What happened, for the summary.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub processes: u64,
    pub kills: u64,
    pub sleeps: u64,
    pub acks: u64,
    pub made: u64,
    pub deleted: u64,
    pub targets: u64,
    pub listings: u64,
    pub backups: u64,
    pub requests: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.processes += other.processes;
        self.kills += other.kills;
        self.sleeps += other.sleeps;
        self.acks += other.acks;
        self.made += other.made;
        self.deleted += other.deleted;
        self.targets += other.targets;
        self.listings += other.listings;
        self.backups += other.backups;
        self.requests += other.requests;
    }
}

/// A world.
pub struct World {
    pub now: Timestamp,
    pub dice: Dice,
    pub server: Server,
    pub net: Arc<Net>,
    pub settings: Settings,
    pub processes: Vec<Process>,
    pub judge: Judge,
    pub log: Vec<String>,
    pub counts: Counts,
    /// A hash of everything that was told and changed: the same for the same seed.
    pub trace: DefaultHasher,
    runtime: Runtime,
    clock: Clock,
    origin: Instant,
    began: Timestamp,
    /// Commits arrive by themselves while the world runs: so many bytes a second, on average.
    pub load_bytes: u64,
}

impl World {
    pub fn new(seed: u64, settings: Settings) -> Self {
        let mut dice = Dice::new(seed);
        let began: Timestamp = BEGIN.parse().unwrap();
        let runtime = process::runtime();
        let guard = runtime.enter();
        let clock = Clock::simulated(began, dice.next());
        let origin = clock.instant();
        drop(guard);
        let net = Net::new(Memory::new(&clock), dice.fork());
        let server = Server::new(&mut dice, began);
        let judge = Judge::new(settings.clone());
        Self {
            now: began,
            dice,
            server,
            net,
            settings,
            processes: Vec::new(),
            judge,
            log: Vec::new(),
            counts: Counts::default(),
            trace: DefaultHasher::new(),
            runtime,
            clock,
            origin,
            began,
            load_bytes: 0,
        }
    }

    pub fn note(&mut self, what: impl Into<String>) {
        let at = self.now.duration_since(self.began).as_secs_f64();
        self.log.push(format!("{at:>12.3} {}", what.into()));
    }

    /// Moves time by `length` in steps of `step`.
    pub fn run(&mut self, length: Duration, step: Duration) {
        let end = self.now + SignedDuration::try_from(length).unwrap();
        while self.now < end && self.judge.violations.is_empty() {
            self.step(step);
        }
    }

    fn step(&mut self, step: Duration) {
        // What is committed now is there for the processes' turns, which come after it.
        self.produce(step);
        self.now += SignedDuration::try_from(step).unwrap();
        for index in 0..self.processes.len() {
            self.processes[index].turn(self.now);
            self.judge_acks();
        }
        for process in &self.processes {
            let told = process.status.snapshot();
            self.judge.promise(process.number, &told, &self.server.state());
        }
        self.deliver();
        self.server.tick(self.now);
        self.reap();
    }

    fn produce(&mut self, step: Duration) {
        if self.load_bytes == 0 {
            return;
        }
        // Every byte is kept and compared: a run has only so many.
        let written = self.server.state().line().end() - ORIGIN;
        let load = if written > WAL_BYTES_MAX { 100 } else { self.load_bytes };
        let mean = load * step.as_millis() as u64 / 1000;
        // One burst in four steps.
        if self.dice.chance(250) {
            let bytes = self.dice.below(mean * 8 + 64);
            self.server.work(bytes, self.now);
        } else if self.dice.chance(10) {
            self.server.idle_work();
        }
    }

    fn judge_acks(&mut self) {
        let acks = std::mem::take(&mut self.server.state().acks);
        if acks.is_empty() {
            return;
        }
        let names = self.net.names();
        for ack in acks {
            self.counts.acks += 1;
            (ack.process, ack.position).hash(&mut self.trace);
            let process = self.processes.iter().find(|process| process.number == ack.process);
            let gaps = process.map(|process| process.status.snapshot().gaps).unwrap_or_default();
            self.judge.ack(&ack, &names, &self.server.state(), &gaps);
        }
    }

    fn deliver(&mut self) {
        let since = Duration::try_from(self.now.duration_since(self.began)).unwrap();
        let until = self.origin + since;
        let (net, now, server) = (Arc::clone(&self.net), self.now, self.server.clone());
        let (judge, counts, trace) = (&mut self.judge, &mut self.counts, &mut self.trace);
        self.runtime.block_on(async {
            tokio::time::sleep_until(until).await;
            net.deliver(now, |change, before| {
                match change {
                    Change::Made { name, .. } => {
                        counts.made += 1;
                        name.hash(trace);
                    }
                    Change::Deleted { names, .. } => {
                        counts.deleted += names.len() as u64;
                        names.hash(trace);
                    }
                    Change::Replaced { process, .. } => process.hash(trace),
                }
                judge.change(change, before, &server.state(), now);
            })
            .await;
        });
        self.counts.requests = self.net.request_count();
    }

    /// Takes note of processes that have ended.
    fn reap(&mut self) {
        while let Some(index) = self.processes.iter().position(Process::is_finished) {
            let process = self.processes.remove(index);
            let (number, what) = (process.number, process.what);
            let asked = process.stop.is_cancelled();
            let had_streamed = process.status.snapshot().connection_count > 0;
            let outcome = process.outcome();
            self.note(format!("{what} {number} ended: {outcome:?}"));
            if let Err(error) = outcome {
                self.judge_end(what, number, &error, what == "sidecar" && had_streamed && !asked);
            }
        }
    }

    /// A sidecar `at_work` waits for whatever is away, and ends for nothing but a lost lease. No server here
    /// is ever rolled back.
    fn judge_end(&mut self, what: &str, number: usize, error: &Error, at_work: bool) {
        let never = [Kind::Bug, Kind::Corrupt, Kind::Usage, Kind::Unsupported];
        let set_back = error.to_string().contains("rolled back");
        if set_back || never.contains(&error.kind()) || at_work && error.kind() != Kind::Conflict {
            self.judge.accuse(format!("{what} {number} ended with {error:?}"));
        }
    }

    fn start<F>(
        &mut self,
        what: &'static str,
        body: impl FnOnce(process::Surroundings) -> F,
    ) -> usize
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.counts.processes += 1;
        let number = self.counts.processes as usize;
        self.note(format!("start {what} {number}"));
        let around = (&self.net, &self.server);
        let process = Process::start((number, what), self.now, around, &mut self.dice, body);
        self.processes.push(process);
        number
    }

    pub fn start_sidecar(&mut self) {
        let settings = self.settings.clone();
        self.start("sidecar", |inside| work::sidecar(inside, settings));
    }

    pub fn start_backup_alone(&mut self) {
        let settings = self.settings.clone();
        self.start("backup", |inside| work::backup_alone(inside, settings));
    }

    pub fn start_command(&mut self, command: Command) {
        let settings = self.settings.clone();
        let what = match command {
            Command::Expire => "expire",
            Command::Sweep => "sweep",
            Command::SweepKeys => "sweep of keys",
            Command::Compact => "compaction",
            Command::Verify => "verify",
        };
        self.start(what, move |inside| work::command(inside, settings, command));
    }

    pub fn sidecars(&self) -> Vec<usize> {
        let all = 0..self.processes.len();
        all.filter(|index| self.processes[*index].what == "sidecar").collect()
    }

    /// kill -9.
    pub fn kill(&mut self, index: usize) {
        let process = self.processes.remove(index);
        self.counts.kills += 1;
        self.note(format!("kill {} {}", process.what, process.number));
    }

    /// SIGSTOP, or SIGCONT when it sleeps.
    pub fn toggle_sleep(&mut self, index: usize) {
        let (number, asleep) = (self.processes[index].number, self.processes[index].asleep);
        self.note(format!("{} {number}", if asleep { "continue" } else { "suspend" }));
        if asleep {
            self.processes[index].wake(self.now);
            self.judge_acks();
        } else {
            self.counts.sleeps += 1;
            self.processes[index].asleep = true;
        }
    }

    /// SIGTERM.
    pub fn terminate(&mut self, index: usize) {
        let number = self.processes[index].number;
        self.note(format!("terminate {number}"));
        self.processes[index].stop.cancel();
    }

    pub fn order_backup(&mut self, index: usize) {
        let number = self.processes[index].number;
        self.note(format!("order a backup from {number}"));
        // One that has enough to do ignores it.
        let _ = self.processes[index].orders.try_send(Order::Backup);
    }

    pub fn set_weather(&mut self, weather: Weather) {
        self.note(format!("{weather:?}"));
        self.net.set_weather(weather);
    }

    /// Nobody is there for so long.
    pub fn skip(&mut self, length: SignedDuration) {
        assert!(self.processes.is_empty(), "processes need their turns");
        self.note(format!("nothing runs for {length}"));
        self.now += length;
        self.deliver();
        self.server.tick(self.now);
    }

    /// Runs `look` on the store itself, where nothing fails and no time passes.
    pub fn look<T: Debug>(
        &mut self,
        look: impl AsyncFnOnce(&mut Judge, &Repository, &Server) -> Result<T>,
    ) -> Result<T> {
        let store = Arc::new(self.net.memory.clone());
        let (judge, server) = (&mut self.judge, self.server.clone());
        self.runtime.block_on(async {
            let repository = Repository::open(store, work::cluster(), &self.clock).await?;
            look(judge, &repository, &server).await
        })
    }

    /// A secret of its own for each run; nothing that is decided depends on it.
    pub fn identity() -> DecryptionIdentity {
        DecryptionIdentity::generate()
    }

    pub fn trace(&self) -> u64 {
        self.trace.finish()
    }
}
