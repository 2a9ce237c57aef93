//! Requests of a backup that outlast an outage of the store.
//!
//! A store tries for seconds, as a person in front of a command wants it. Behind a backup are hours of
//! work, so its requests are tried for minutes; the server waits meanwhile, for nothing is read from it
//! while no buffer is free.
//!
//! # Invariants
//! What was put is told from what was there before: a name that is taken after a try whose answer was
//! lost is ours when it holds our bytes, which are sealed with a salt of their own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;

use crate::clock::Clock;
use crate::error::{Context, Result};
use crate::store::{ObjectName, PutOutcome, Store};

/// Longest outage that costs a backup nothing but time. As long as its WAL may stand still.
const OUTAGE_MAX: Duration = Duration::from_secs(600);
/// First pause after a failure; the store has tried again by itself before.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause: the longest that a store which came back stays unnoticed.
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// Makes a request until it succeeds, fails for good, or the outage was too long.
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
    let begun = clock.instant();
    let mut pause = PAUSE_MIN;
    loop {
        let error = match request().await {
            Err(error) if error.is_transient() => error,
            done => return done.context(attempted),
        };
        let waited = clock.instant().saturating_duration_since(begun);
        if waited + pause > OUTAGE_MAX {
            return Err(error.context(attempted()));
        }
        tracing::warn!("{}: {error}; trying again for {} s so far", attempted(), waited.as_secs());
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
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
