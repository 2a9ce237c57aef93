//! Requests of a backup or a restore that outlast an outage of the store.
//!
//! A store tries for seconds, as a person in front of a command wants it. Behind a backup are hours of
//! work, so its requests are tried for minutes; the server waits meanwhile, for nothing is read from it
//! while no buffer is free. Behind a restore are hours as well, and it begins from nothing when it is run
//! again; a recovery that is fed with WAL stops when a segment is not to be had.
//!
//! # Invariants
//! What was put is told from what was there before: a name that is taken after a try whose answer was
//! lost is ours when it holds our bytes, which are sealed with a salt of their own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;

use crate::clock::{Clock, Instant};
use crate::error::{Context, Error, Result};
use crate::store::{ObjectName, PutOutcome, Store};

/// Longest outage that costs nothing but time. As long as the WAL of a backup may stand still.
const OUTAGE_MAX: Duration = Duration::from_secs(600);
/// First pause after a failure; the store has tried again by itself before.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause: the longest that a store which came back stays unnoticed.
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// An outage, as one request meets it.
#[derive(Debug)]
pub(crate) struct Outage<'a> {
    clock: &'a Clock,
    begun: Instant,
    pause: Duration,
}

impl<'a> Outage<'a> {
    /// For a request that is about to be made for the first time.
    pub(crate) fn new(clock: &'a Clock) -> Self {
        Self { clock, begun: clock.instant(), pause: PAUSE_MIN }
    }

    /// Waits after a try that failed; then the request may be made again.
    ///
    /// # Errors
    /// The error of that try, when it is for good or the outage was too long.
    pub(crate) async fn outlast(&mut self, error: Error) -> Result<()> {
        let waited = self.clock.instant().saturating_duration_since(self.begun);
        if !error.is_transient() || waited + self.pause > OUTAGE_MAX {
            return Err(error);
        }
        tracing::warn!("{error}; trying again for {} s so far", waited.as_secs());
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        Ok(())
    }
}

/// Makes a request until it succeeds, fails for good, or the outage was too long.
///
/// # Errors
/// Those of the request.
///
/// # Cancel safety
/// As the request.
pub(crate) async fn insist<T, F: Future<Output = Result<T>>>(
    clock: &Clock,
    request: impl Fn() -> F,
) -> Result<T> {
    let mut outage = Outage::new(clock);
    loop {
        match request().await {
            Ok(done) => return Ok(done),
            Err(error) => outage.outlast(error).await?,
        }
    }
}

/// As [`insist`], for a request that does not say itself what was `attempted`.
///
/// # Errors
/// Those of the request, with what was `attempted`.
///
/// # Cancel safety
/// As the request.
pub(super) async fn outlast<T, F: Future<Output = Result<T>>>(
    clock: &Clock,
    attempted: impl Fn() -> String,
    request: impl Fn() -> F,
) -> Result<T> {
    let (attempted, request) = (&attempted, &request);
    insist(clock, || async move { request().await.context(attempted) }).await
}

/// Puts an object in one request, however often its answer is lost.
///
/// # Errors
/// As [`outlast`].
pub(super) async fn put(
    store: &dyn Store,
    clock: &Clock,
    object: &ObjectName,
    body: Bytes,
) -> Result<PutOutcome> {
    let in_doubt = AtomicBool::new(false);
    let (in_doubt, body) = (&in_doubt, &body);
    let attempted = || format!("unable to put '{object}'");
    outlast(clock, attempted, || async move {
        let outcome = store.put_if_absent(object, body.clone()).await;
        match outcome {
            Ok(PutOutcome::AlreadyThere) if in_doubt.load(Ordering::Relaxed) => {
                let ours = store.get(object, None).await? == *body;
                Ok(if ours { PutOutcome::Created } else { PutOutcome::AlreadyThere })
            }
            outcome => {
                in_doubt.fetch_or(outcome.is_err(), Ordering::Relaxed);
                outcome
            }
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::store::memory::{Call, Faults, Memory, Outcome};

    fn object() -> ObjectName {
        ObjectName::new("main/base/x/pack-1").unwrap()
    }

    fn place() -> (Clock, Memory) {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 1);
        let memory = Memory::new(&clock);
        (clock, memory)
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_minutes_is_outlasted_and_one_without_end_is_not() {
        let (clock, memory) = place();
        let body = Bytes::from_static(b"sealed");
        memory.set_faults(Faults { down: true, ..Faults::default() });
        let object = object();
        let putting = put(&memory, &clock, &object, body.clone());
        let (outcome, ()) = tokio::join!(putting, async {
            tokio::time::sleep(OUTAGE_MAX - Duration::from_secs(30)).await;
            memory.set_faults(Faults::default());
        });
        assert_eq!(outcome.unwrap(), PutOutcome::Created);
        memory.set_faults(Faults { down: true, ..Faults::default() });
        let begun = clock.instant();
        let error = put(&memory, &clock, &object, body).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(clock.instant() - begun <= OUTAGE_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_answer_is_no_rival_and_a_rival_is_no_lost_answer() {
        let (clock, memory) = place();
        memory.fail_next(Call::Put, Outcome::FailsAfter);
        let body = Bytes::from_static(b"ours");
        let outcome = put(&memory, &clock, &object(), body).await.unwrap();
        assert_eq!(outcome, PutOutcome::Created);
        memory.fail_next(Call::Put, Outcome::FailsBefore);
        let other = Bytes::from_static(b"a rival's");
        let outcome = put(&memory, &clock, &object(), other).await.unwrap();
        assert_eq!(outcome, PutOutcome::AlreadyThere);
    }
}
