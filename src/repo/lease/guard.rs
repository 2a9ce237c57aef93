//! Whether the lease is still held: told at once, without I/O.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Notify, watch};

use super::{Progress, tokens_held};
use crate::clock::{Clock, Instant};
use crate::error::{Error, Kind, Result};

/// Whether the lease is still ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// Held.
    Held,
    /// Lost, for this reason; for ever.
    Lost(Arc<str>),
}

/// What the lease and its guards share.
pub(super) struct Shared {
    pub(super) clock: Clock,
    pub(super) epoch: u64,
    pub(super) token: String,
    /// How long after a renewal was sent the holder stops: 9/10 of the time to live.
    pub(super) term: Duration,
    pub(super) held: Mutex<Term>,
    pub(super) state: watch::Sender<LeaseState>,
    pub(super) progress: Mutex<Option<Progress>>,
    /// Something of the progress is worth a renewal now.
    pub(super) news: Notify,
    pub(super) key_id: Mutex<Option<String>>,
}

/// When the renewal that counts was sent.
#[derive(Clone, Copy)]
pub(super) struct Term {
    pub(super) sent: Instant,
    pub(super) sent_time: Timestamp,
}

impl Shared {
    pub(super) fn held(&self) -> MutexGuard<'_, Term> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn deadline(&self) -> Instant {
        self.held().sent + self.term
    }

    /// Counts a renewal that was sent at `term` and won; false when the lease was lost meanwhile.
    pub(super) fn extend(&self, term: Term) -> bool {
        let mut held = self.held();
        if *self.state.borrow() != LeaseState::Held {
            return false;
        }
        if term.sent > held.sent {
            *held = term;
        }
        true
    }

    /// Signals the loss, once.
    pub(super) fn lose(&self, reason: &str) {
        let _held = self.held();
        tokens_held().remove(&self.token);
        self.state.send_if_modified(|state| {
            let first = *state == LeaseState::Held;
            if first {
                *state = LeaseState::Lost(Arc::from(reason));
            }
            first
        });
    }

    pub(super) fn ensure_held(&self) -> Result<()> {
        let term = *self.held();
        let now = self.clock.instant();
        let elapsed = self.clock.now().duration_since(term.sent_time);
        let term_signed = SignedDuration::try_from(self.term).unwrap_or(SignedDuration::MAX);
        if now >= term.sent + self.term || elapsed >= term_signed {
            self.lose("it was not renewed in time");
        }
        match &*self.state.borrow() {
            LeaseState::Held => Ok(()),
            LeaseState::Lost(reason) => Err(lost(reason)),
        }
    }
}

pub(super) fn lost(reason: &str) -> Error {
    Error::new(Kind::Conflict, format!("the lease of the cluster was lost: {reason}"))
}

/// Tells whether a lease is held; cheap, clonable, does no I/O.
#[derive(Clone)]
pub struct Guard {
    pub(super) shared: Arc<Shared>,
    pub(super) watch: watch::Receiver<LeaseState>,
}

impl Guard {
    /// Fails from the moment on at which a rival may start.
    ///
    /// # Errors
    /// `conflict` when the lease was lost, with the reason.
    pub fn ensure_held(&self) -> Result<()> {
        self.shared.ensure_held()
    }

    /// Number of this acquisition.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.shared.epoch
    }

    /// Returns when the lease is lost, with the error that says why.
    ///
    /// # Cancel safety
    /// Safe: nothing is lost when dropped.
    pub async fn lost(&mut self) -> Error {
        let state = self.watch.wait_for(|state| *state != LeaseState::Held).await;
        match state.as_deref() {
            Ok(LeaseState::Lost(reason)) => lost(reason),
            _ => lost("it was dropped"),
        }
    }

    /// The state and its changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<LeaseState> {
        self.watch.clone()
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guard(epoch {}, {:?})", self.shared.epoch, &*self.watch.borrow())
    }
}
