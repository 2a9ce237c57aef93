//! Counted permits that tasks await and worker threads block on: how every queue and every
//! buffer of the engine is bounded.
//!
//! # Shape
//! A permit stands for an amount (bytes, or places in a queue) and gives it back when dropped, so it
//! travels with the buffer it pays for: from the thread that fills it to the task that uploads it.
//! Waiters are served in the order they came; a large request is not starved by small ones.
//!
//! # Cancel safety
//! A future of [`Permits::acquire`] that is dropped takes nothing: a permit granted in the same
//! moment is dropped with the channel that carried it, and so is given back.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{self, Poll};

use futures::channel::oneshot;

use crate::error::{Error, Kind, Result};

/// A handle on a bounded amount of something.
#[derive(Clone)]
pub struct Permits(Arc<Pot>);

struct Pot {
    total: u64,
    state: Mutex<State>,
}

struct State {
    available: u64,
    closed: bool,
    waiting: VecDeque<Waiter>,
}

struct Waiter {
    amount: u64,
    grant: oneshot::Sender<Permit>,
}

/// An amount taken from [`Permits`], given back on drop.
#[must_use = "a permit that is dropped is given back at once"]
pub struct Permit {
    pot: Arc<Pot>,
    amount: u64,
}

impl Permits {
    /// Permits for `total` in all.
    #[must_use]
    pub fn new(total: u64) -> Self {
        let state = State { available: total, closed: false, waiting: VecDeque::new() };
        Self(Arc::new(Pot { total, state: Mutex::new(state) }))
    }

    /// Waits until `amount` is free and takes it. A request for more than there is in all waits for
    /// all of it, so that one oversized item passes alone instead of never.
    ///
    /// The future gives `cancelled` when the permits were closed.
    pub fn acquire(&self, amount: u64) -> Acquire {
        Acquire(match self.request(amount) {
            Ok(Ok(permit)) => Stage::Ready(Some(Ok(permit))),
            Ok(Err(granted)) => Stage::Waiting(granted),
            Err(closed) => Stage::Ready(Some(Err(closed))),
        })
    }

    /// As [`Permits::acquire`], blocking the thread: for worker threads only.
    ///
    /// # Errors
    /// `cancelled` when the permits were closed.
    pub fn acquire_blocking(&self, amount: u64) -> Result<Permit> {
        futures::executor::block_on(self.acquire(amount))
    }

    /// Takes `amount` if it is free and nobody waits.
    #[must_use]
    pub fn try_acquire(&self, amount: u64) -> Option<Permit> {
        self.take(&mut self.0.lock(), amount.min(self.0.total))
    }

    fn request(&self, amount: u64) -> Result<Result<Permit, oneshot::Receiver<Permit>>> {
        let amount = amount.min(self.0.total);
        let mut state = self.0.lock();
        if state.closed {
            return Err(closed());
        }
        if let Some(permit) = self.take(&mut state, amount) {
            return Ok(Ok(permit));
        }
        let (grant, granted) = oneshot::channel();
        state.waiting.push_back(Waiter { amount, grant });
        Ok(Err(granted))
    }

    fn take(&self, state: &mut State, amount: u64) -> Option<Permit> {
        if state.closed || !state.waiting.is_empty() {
            return None;
        }
        state.available = state.available.checked_sub(amount)?;
        Some(Permit { pot: Arc::clone(&self.0), amount })
    }

    /// Makes every waiting and every later request fail: how blocked workers learn of an abort.
    pub fn close(&self) {
        let waiting = {
            let mut state = self.0.lock();
            state.closed = true;
            std::mem::take(&mut state.waiting)
        };
        drop(waiting);
    }

    /// What is free now.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.0.lock().available
    }

    /// What there is in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.total
    }
}

/// The future of [`Permits::acquire`].
#[must_use = "a request that is dropped takes nothing"]
#[derive(Debug)]
pub struct Acquire(Stage);

#[derive(Debug)]
enum Stage {
    Ready(Option<Result<Permit>>),
    Waiting(oneshot::Receiver<Permit>),
}

impl Future for Acquire {
    type Output = Result<Permit>;

    fn poll(mut self: Pin<&mut Self>, context: &mut task::Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Stage::Ready(outcome) => Poll::Ready(outcome.take().unwrap_or_else(|| Err(closed()))),
            Stage::Waiting(granted) => {
                Pin::new(granted).poll(context).map_err(|oneshot::Canceled| closed())
            }
        }
    }
}

fn closed() -> Error {
    Error::new(Kind::Cancelled, "the pipeline was stopped")
}

impl Pot {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives `amount` back and hands it on to those who wait. The grants are sent after the lock is
    /// let go: a receiver that has gone drops its permit, which comes back here.
    fn release(self: &Arc<Self>, amount: u64) {
        let mut grants = Vec::new();
        {
            let mut state = self.lock();
            state.available = state.available.saturating_add(amount).min(self.total);
            while let Some(waiter) = state.waiting.pop_front() {
                if let Some(left) = state.available.checked_sub(waiter.amount) {
                    state.available = left;
                    grants.push(waiter);
                } else {
                    state.waiting.push_front(waiter);
                    break;
                }
            }
        }
        for Waiter { amount, grant } in grants {
            drop(grant.send(Permit { pot: Arc::clone(self), amount }));
        }
    }
}

impl Permit {
    /// The amount it stands for.
    #[must_use]
    pub fn amount(&self) -> u64 {
        self.amount
    }

    /// Gives back all but `amount`: when a buffer turned out smaller than was paid for.
    pub fn shrink_to(&mut self, amount: u64) {
        let excess = self.amount.saturating_sub(amount);
        self.amount -= excess;
        if excess > 0 {
            self.pot.release(excess);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let amount = std::mem::take(&mut self.amount);
        if amount > 0 {
            self.pot.release(amount);
        }
    }
}

impl fmt::Debug for Permits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permits({} of {} free)", self.available(), self.total())
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permit({})", self.amount)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn waiters_are_served_in_order_and_large_requests_are_not_starved() {
        let permits = Permits::new(10);
        let first = permits.try_acquire(6).unwrap();
        let mut large = Box::pin(permits.acquire(8));
        assert!((&mut large).now_or_never().is_none());
        assert!(permits.try_acquire(1).is_none(), "nobody overtakes the large request");
        drop(first);
        let large = large.now_or_never().unwrap().unwrap();
        assert_eq!((large.amount(), permits.available()), (8, 2));
    }

    #[test]
    fn a_dropped_request_takes_nothing_even_when_it_was_granted() {
        let permits = Permits::new(4);
        let held = permits.try_acquire(4).unwrap();
        let mut waiting = Box::pin(permits.acquire(4));
        assert!((&mut waiting).now_or_never().is_none());
        drop(held);
        drop(waiting);
        assert_eq!(permits.available(), 4);
    }

    #[test]
    fn closing_wakes_blocked_threads() {
        let permits = Permits::new(1);
        let held = permits.try_acquire(1).unwrap();
        let other = permits.clone();
        let blocked = std::thread::spawn(move || other.acquire_blocking(1).map(drop));
        permits.close();
        assert_eq!(blocked.join().unwrap().unwrap_err().kind(), Kind::Cancelled);
        drop(held);
    }

    #[test]
    fn an_oversized_request_passes_alone_and_shrinking_gives_back() {
        let permits = Permits::new(4);
        let mut all = permits.acquire_blocking(100).unwrap();
        assert_eq!(permits.available(), 0);
        all.shrink_to(1);
        assert_eq!(permits.available(), 3);
        drop(all);
        assert_eq!(permits.available(), 4);
    }
}
