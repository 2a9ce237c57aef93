//! Counts of requests by operation.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::faults::Op;

/// Requests since the start or the last reset.
#[derive(Debug, Default)]
pub struct Counters(Mutex<Counts>);

/// What the counters show.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Requests by operation, those hit by faults included.
    pub requests: BTreeMap<Op, u64>,
    /// Requests hit by a fault.
    pub faults: u64,
    /// Bytes of request bodies announced.
    pub received_bytes: u64,
    /// Bytes of response bodies announced.
    pub sent_bytes: u64,
}

impl Counts {
    /// Requests for one operation.
    #[must_use]
    pub fn of(&self, op: Op) -> u64 {
        self.requests.get(&op).copied().unwrap_or(0)
    }

    /// Requests of any kind.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.requests.values().sum()
    }
}

impl Counters {
    /// The counts now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.lock().clone()
    }

    /// Starts again from nothing.
    pub fn reset(&self) {
        *self.lock() = Counts::default();
    }

    pub(crate) fn request(&self, op: Op, received_bytes: u64) {
        let mut counts = self.lock();
        *counts.requests.entry(op).or_default() += 1;
        counts.received_bytes += received_bytes;
    }

    pub(crate) fn sent(&self, bytes: u64) {
        self.lock().sent_bytes += bytes;
    }

    pub(crate) fn fault(&self) {
        self.lock().faults += 1;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
