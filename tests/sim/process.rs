//! A process of the product: a runtime of its own, with time that only the world moves.
//!
//! Dropping the runtime is `kill -9`: every task ends at the await point it happens to be at. Leaving it
//! alone is SIGSTOP: when it wakes, its clock has moved on and everything is due at once.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tidemark::capture::stream::Status;
use tidemark::clock::{Clock, Instant};
use tidemark::error::{Error, Kind, Result};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::dice::Dice;
use crate::net::{Net, Wire};
use crate::server::Server;

/// What a process is told besides to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Backup,
}

/// What a process works with.
pub struct Surroundings {
    pub number: usize,
    pub wire: Wire,
    pub server: Server,
    pub clock: Clock,
    pub dice: Dice,
    pub status: Arc<Status>,
    pub stop: CancellationToken,
    pub orders: mpsc::Receiver<Order>,
}

/// A runtime whose time stands still unless it is moved.
pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

/// A process.
pub struct Process {
    pub number: usize,
    pub what: &'static str,
    pub status: Arc<Status>,
    pub stop: CancellationToken,
    pub orders: mpsc::Sender<Order>,
    pub asleep: bool,
    clock: Clock,
    began: Timestamp,
    origin: Instant,
    task: JoinHandle<Result<()>>,
    runtime: Runtime,
}

impl Process {
    /// Starts `body` at `now`.
    pub fn start<F>(
        (number, what): (usize, &'static str),
        now: Timestamp,
        (net, server): (&Arc<Net>, &Server),
        dice: &mut Dice,
        body: impl FnOnce(Surroundings) -> F,
    ) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let runtime = runtime();
        let guard = runtime.enter();
        let clock = Clock::simulated(now, dice.next());
        let origin = clock.instant();
        let (orders, received) = mpsc::channel(4);
        let (status, stop) = (Arc::new(Status::new()), CancellationToken::new());
        let wire = Wire { net: Arc::clone(net), process: number, clock: clock.clone() };
        let surroundings = Surroundings {
            number,
            wire,
            server: server.clone(),
            clock: clock.clone(),
            dice: dice.fork(),
            status: Arc::clone(&status),
            stop: stop.clone(),
            orders: received,
        };
        let task = runtime.spawn(body(surroundings));
        drop(guard);
        let began = now;
        Self {
            number,
            what,
            status,
            stop,
            orders,
            asleep: false,
            clock,
            began,
            origin,
            task,
            runtime,
        }
    }

    /// Lets it run until its clock shows `until`.
    pub fn turn(&self, until: Timestamp) {
        if self.asleep {
            return;
        }
        let elapsed = Duration::try_from(until.duration_since(self.began)).unwrap();
        let until = self.origin + elapsed;
        self.runtime.block_on(async { tokio::time::sleep_until(until).await });
    }

    /// Wakes it after a sleep: its clock jumps to `now`.
    pub fn wake(&mut self, now: Timestamp) {
        self.asleep = false;
        let missed = Duration::try_from(now.duration_since(self.clock_now())).unwrap_or_default();
        self.runtime.block_on(async { tokio::time::advance(missed).await });
    }

    fn clock_now(&self) -> Timestamp {
        let _guard = self.runtime.enter();
        self.clock.now()
    }

    pub fn is_finished(&self) -> bool {
        !self.asleep && self.task.is_finished()
    }

    /// How it ended.
    pub fn outcome(self) -> Result<()> {
        let Self { runtime, task, .. } = self;
        runtime.block_on(task).unwrap_or_else(|error| {
            Err(Error::new(Kind::Bug, format!("the process ended in an unforeseen way: {error}")))
        })
    }
}
