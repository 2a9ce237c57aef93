//! Named worker threads, each with its own compression contexts, behind one bounded queue.
//!
//! Async callers await a place in the queue ([`Pool::run`]); no tokio worker ever blocks on it, and
//! no compression or encryption runs on one. A job that panics ends with an error of kind `bug` for
//! its caller; the thread lives on with fresh contexts.
//!
//! # Cancel safety
//! A dropped [`Pool::run`] that had its place runs to its end and its result is dropped.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{self, Poll};
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use futures::channel::oneshot;
use futures::{FutureExt, TryFutureExt};

use super::codec::{Compressor, Decompressor, Level};
use super::permits::{Permit, Permits};
use crate::error::{Error, Kind, Result};

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// How a [`Pool`] is made.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// Prefix of the threads' names, at most 11 characters to survive the kernel's limit of 15.
    pub name: &'static str,
    /// Number of threads; 0: each job runs in place where it is submitted, for a simulation that must
    /// not depend on how fast a thread is.
    pub thread_count: usize,
    /// Jobs that may wait or run at once, at least `thread_count` and 1.
    pub jobs_max: usize,
    /// Level of the compression contexts.
    pub level: Level,
}

/// What a worker thread owns and lends to each job.
#[derive(Debug)]
pub struct Worker {
    /// Compression context at the pool's level.
    pub compressor: Compressor,
    /// Decompression context.
    pub decompressor: Decompressor,
    /// A buffer that jobs may use and leave behind grown; its content is nobody's.
    pub scratch: Vec<u8>,
}

impl Worker {
    /// Fresh contexts; for callers that run a job on a thread of their own.
    ///
    /// # Errors
    /// `unavailable` when there is no memory for the contexts.
    pub fn new(level: Level) -> Result<Self> {
        Ok(Self {
            compressor: Compressor::new(level)?,
            decompressor: Decompressor::new()?,
            scratch: Vec::new(),
        })
    }
}

/// A set of worker threads; they end when the pool and all its queued jobs are gone.
pub struct Pool {
    jobs: Jobs,
    places: Permits,
    thread_count: usize,
}

/// Where jobs go.
#[derive(Clone)]
enum Jobs {
    Threads(Sender<Job>),
    InPlace(Arc<Mutex<Worker>>),
}

impl Pool {
    /// Starts the threads.
    ///
    /// # Errors
    /// `unavailable` when the system refuses a thread or memory.
    pub fn start(options: &PoolOptions) -> Result<Self> {
        let thread_count = options.thread_count;
        let jobs_max = options.jobs_max.max(thread_count).max(1);
        let places = Permits::new(jobs_max as u64);
        if thread_count == 0 {
            let worker = Arc::new(Mutex::new(Worker::new(options.level)?));
            return Ok(Self { jobs: Jobs::InPlace(worker), places, thread_count });
        }
        let (sender, receiver) = bounded::<Job>(jobs_max);
        for index in 0..thread_count {
            let worker = Worker::new(options.level)?;
            let (receiver, level) = (receiver.clone(), options.level);
            thread::Builder::new()
                .name(format!("{}-{index}", options.name))
                .spawn(move || work(&receiver, worker, level))
                .map_err(|error| Error::io("unable to start a worker thread", &error))?;
        }
        Ok(Self { jobs: Jobs::Threads(sender), places, thread_count })
    }

    /// Number of threads.
    #[must_use]
    pub fn thread_count(&self) -> usize {
        self.thread_count
    }

    /// Waits for a place in the queue, queues `job`, and gives the future of its result: so that a
    /// caller can feed many jobs in order and collect their results as they come.
    ///
    /// The future gives `cancelled` when the pool was stopped; the inner one `bug` when the job
    /// panicked.
    pub fn submit<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> impl Future<Output = Result<Completion<T>>> {
        let jobs = self.jobs.clone();
        self.places.acquire(1).map(move |place| queue(&jobs, place?, job))
    }

    /// Runs `job` on a worker thread and gives its result, or fails as [`Pool::submit`] does.
    pub fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> impl Future<Output = Result<T>> {
        self.submit(job).and_then(|completion| completion)
    }

    /// Makes every later job fail as cancelled; jobs already queued still run.
    pub fn close(&self) {
        self.places.close();
    }

    /// A handle that can do what [`Pool::close`] does.
    #[must_use]
    pub fn closer(&self) -> Closer {
        Closer(self.places.clone())
    }
}

/// Closes a pool from elsewhere, without keeping its threads alive.
#[derive(Clone, Debug)]
pub struct Closer(Permits);

impl Closer {
    /// As [`Pool::close`].
    pub fn close(&self) {
        self.0.close();
    }
}

/// Queues a job that has its place.
fn queue<T: Send + 'static>(
    jobs: &Jobs,
    place: Permit,
    job: impl FnOnce(&mut Worker) -> T + Send + 'static,
) -> Result<Completion<T>> {
    let (sender, receiver) = oneshot::channel();
    let job: Job = Box::new(move |worker| {
        let result = job(worker);
        drop(place);
        // A caller that has gone does not want its result.
        drop(sender.send(result));
    });
    let jobs = match jobs {
        Jobs::Threads(jobs) => jobs,
        Jobs::InPlace(worker) => {
            job(&mut worker.lock().unwrap_or_else(PoisonError::into_inner));
            return Ok(Completion(receiver));
        }
    };
    // Never blocks: there are as many places as the channel holds.
    jobs.send(job).map_err(|_gone| {
        Error::new(Kind::Bug, "unable to queue a job: all worker threads have ended")
    })?;
    Ok(Completion(receiver))
}

/// The future of a job's result; dropping it drops the result, not the job.
#[derive(Debug)]
pub struct Completion<T>(oneshot::Receiver<T>);

impl<T> Future for Completion<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut task::Context<'_>) -> Poll<Result<T>> {
        Pin::new(&mut self.0).poll(context).map_err(|oneshot::Canceled| {
            Error::new(Kind::Bug, "a worker thread panicked; see the log for where")
        })
    }
}

fn work(jobs: &Receiver<Job>, mut worker: Worker, level: Level) {
    while let Ok(job) = jobs.recv() {
        if std::panic::catch_unwind(AssertUnwindSafe(|| job(&mut worker))).is_err() {
            // The contexts may be in any state; without new ones this thread cannot go on.
            match Worker::new(level) {
                Ok(fresh) => worker = fresh,
                Err(_no_memory) => return,
            }
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} threads, {:?})", self.thread_count, self.places)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(thread_count: usize) -> Pool {
        let options =
            PoolOptions { name: "test", thread_count, jobs_max: 4, level: Level::default() };
        Pool::start(&options).unwrap()
    }

    #[test]
    fn jobs_run_on_named_threads_and_return_their_results() {
        let pool = pool(2);
        let name = futures::executor::block_on(
            pool.run(|_| thread::current().name().unwrap_or_default().to_owned()),
        );
        assert!(name.unwrap().starts_with("test-"));
    }

    #[test]
    fn without_threads_a_job_is_done_when_it_is_submitted() {
        let (pool, here) = (pool(0), thread::current().id());
        let submitted = pool.submit(|_| thread::current().id());
        let completion = futures::executor::block_on(submitted).unwrap();
        assert_eq!(futures::executor::block_on(completion).unwrap(), here);
    }

    #[test]
    fn a_panicking_job_is_an_error_and_the_thread_lives_on() {
        let pool = pool(1);
        let error = futures::executor::block_on(pool.run(|_| panic!("on purpose"))).unwrap_err();
        assert_eq!(error.kind(), Kind::Bug);
        assert_eq!(futures::executor::block_on(pool.run(|_| 7)).unwrap(), 7);
    }

    #[test]
    fn feeding_waits_when_the_queue_is_full() {
        let pool = pool(1);
        let (release, blocked) = bounded::<()>(0);
        futures::executor::block_on(async {
            let mut results = Vec::new();
            for _ in 0..4 {
                let blocked = blocked.clone();
                results.push(pool.submit(move |_| blocked.recv().is_ok()).await.unwrap());
            }
            let mut fifth = Box::pin(pool.submit(|_| ()));
            assert!(futures::poll!(&mut fifth).is_pending(), "four jobs fill the queue");
            release.send(()).unwrap();
            fifth.await.unwrap();
            for _ in 0..3 {
                release.send(()).unwrap();
            }
            for result in results {
                assert!(result.await.unwrap());
            }
        });
    }
}
