//! The one place that tries again.
//!
//! # Invariants
//! Every call makes at most `attempts_max` tries, begins none after `overall_timeout`, and lets none
//! run longer than `attempt_timeout` and the time its bytes may take; one more is made with credentials
//! that were looked for anew, as those before were refused. Pauses double, with jitter. A
//! server that asks for less gets it from all requests of this store, not only from the one it told.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::S3;
use super::client::Client;
use super::failure::{Failure, Verdict};
use crate::clock::Instant;
use crate::error::{Error, Result};
use crate::metrics::Latency;
use crate::store::requests::Counter;
use crate::store::{BODY_BYTES_PER_SECOND_MIN, ObjectName};

/// First pause after an ordinary failure, and after being told to slow down.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_SLOW_FIRST: Duration = Duration::from_millis(500);

/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(20);

/// What a call is, for counting and for its time-outs.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) counter: &'a Counter,
    pub(super) sent_bytes: u64,
    pub(super) expected_bytes: u64,
    /// Where it is noted how long it took, should it succeed.
    pub(super) latency: Option<&'a Latency>,
    pub(super) tries: Tries,
}

/// How often to try.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tries {
    AsConfigured,
    Once,
}

/// How a call ended.
pub(super) struct Tried<T> {
    pub(super) result: std::result::Result<T, Failure>,
    /// An earlier try failed without telling whether it had done its work.
    pub(super) maybe_done_before: bool,
}

/// The clients share one pause.
#[derive(Debug, Default)]
pub(super) struct Gate(Mutex<Option<Instant>>);

impl Gate {
    fn open_at(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close_until(&self, instant: Instant) {
        let mut open_at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *open_at = Some(open_at.map_or(instant, |earlier| earlier.max(instant)));
    }
}

impl<'a> Call<'a> {
    pub(super) fn new(counter: &'a Counter) -> Self {
        Self {
            counter,
            sent_bytes: 0,
            expected_bytes: 0,
            latency: None,
            tries: Tries::AsConfigured,
        }
    }

    pub(super) fn sending(self, bytes: usize) -> Self {
        Self { sent_bytes: bytes as u64, ..self }
    }

    pub(super) fn timed(self, latency: &'a Latency) -> Self {
        Self { latency: Some(latency), ..self }
    }

    pub(super) fn expecting(self, bytes: u64) -> Self {
        Self { expected_bytes: bytes, ..self }
    }

    pub(super) fn once(self) -> Self {
        Self { tries: Tries::Once, ..self }
    }
}

impl S3 {
    /// Makes the request until it succeeds, fails for good, or has been tried enough. The outer error
    /// is about ourselves: the client could not even be set up.
    pub(super) async fn attempt<'c, T, F>(
        &'c self,
        call: Call<'_>,
        request: impl Fn(&'c Client) -> F,
    ) -> Result<Tried<T>>
    where
        F: Future<Output = std::result::Result<T, Failure>>,
    {
        let client = self.client().await?;
        let begun = self.clock.instant();
        let attempts_max = match call.tries {
            Tries::AsConfigured => self.options.attempts_max.max(1),
            Tries::Once => 1,
        };
        let mut maybe_done_before = false;
        let mut renewed = false;
        let mut attempt = 1;
        loop {
            self.wait_at_gate().await?;
            let try_begun = self.clock.instant();
            // On the heap: the SDK's futures have tens of kilobytes, and those of everybody who waits for
            // one would hold it as well, several times over on a worker's stack.
            let trying = Box::pin(request(client));
            let failure = match self.try_once(call, trying).await {
                Ok(done) => {
                    if let Some(latency) = call.latency {
                        latency.record(self.clock.instant().saturating_duration_since(begun));
                    }
                    return Ok(Tried { result: Ok(done), maybe_done_before });
                }
                Err(failure) => failure,
            };
            if failure.may_blame_credentials() && !renewed {
                renewed = client.renew_credentials(&self.options, try_begun).await;
                if renewed {
                    self.requests.retries.one();
                    continue;
                }
            }
            let verdict = self.judge(&failure, attempt);
            let pause = self.pause(verdict, attempt)?;
            if verdict == Verdict::SlowDown {
                self.requests.throttled.one();
                self.gate.close_until(self.clock.instant() + pause);
            }
            let late = self.clock.instant() + pause > begun + self.options.overall_timeout;
            if verdict == Verdict::Final || attempt >= attempts_max || late {
                return Ok(Tried { result: Err(failure), maybe_done_before });
            }
            tracing::debug!(attempt, ?failure, ?pause, "store request failed, trying again");
            maybe_done_before |= failure.is_ambiguous();
            self.requests.retries.one();
            attempt += 1;
            tokio::time::sleep(pause).await;
        }
    }

    /// Waits before an answer that broke off for the `broken`-th time in one piece is asked for again.
    ///
    /// # Errors
    /// The failure, when that has happened as often as a call is tried, or asking again is vain.
    pub(super) async fn pause_after_break(
        &self,
        failure: Failure,
        broken: u32,
        name: &ObjectName,
    ) -> Result<()> {
        let verdict = self.judge(&failure, broken);
        if verdict == Verdict::Final || broken >= self.options.attempts_max.max(1) {
            return Err(failure.into_error(self.unable("read", name)));
        }
        let pause = self.pause(verdict, broken)?;
        tracing::debug!(broken, ?failure, ?pause, "an answer broke off, asking for the rest");
        self.requests.retries.one();
        tokio::time::sleep(pause).await;
        Ok(())
    }

    async fn try_once<T>(
        &self,
        call: Call<'_>,
        request: impl Future<Output = std::result::Result<T, Failure>>,
    ) -> std::result::Result<T, Failure> {
        call.counter.one();
        self.requests.sent_bytes.add(call.sent_bytes);
        let bytes = call.sent_bytes + call.expected_bytes;
        self.in_time(self.clock.instant(), bytes, request).await
    }

    /// Does `work` within the time of a try that has begun, and has so many bytes to send or receive.
    pub(super) async fn in_time<T>(
        &self,
        begun: Instant,
        bytes: u64,
        work: impl Future<Output = std::result::Result<T, Failure>>,
    ) -> std::result::Result<T, Failure> {
        let seconds = bytes / BODY_BYTES_PER_SECOND_MIN;
        let patience = self.options.attempt_timeout + Duration::from_secs(seconds);
        match tokio::time::timeout_at(begun + patience, work).await {
            Ok(result) => result,
            Err(_elapsed) => Err(Failure::timed_out(patience.as_secs())),
        }
    }

    /// The failure's own verdict, but for what no repetition mends: after the second refusal the
    /// clock is not being corrected.
    fn judge(&self, failure: &Failure, attempt: u32) -> Verdict {
        if attempt > 2 && failure.is("RequestTimeTooSkewed", 0) {
            return Verdict::Final;
        }
        failure.verdict()
    }

    /// Half of the pause is certain, half is chance.
    fn pause(&self, verdict: Verdict, attempt: u32) -> Result<Duration> {
        let first = if verdict == Verdict::SlowDown { PAUSE_SLOW_FIRST } else { PAUSE_FIRST };
        let full = first.saturating_mul(1 << (attempt - 1).min(16)).min(PAUSE_MAX);
        Ok(full / 2 + (full / 2).mul_f64(self.chance()?))
    }

    /// A number from 0 to 1.
    fn chance(&self) -> Result<f64> {
        Ok(f64::from(u32::from_le_bytes(self.clock.random()?)) / f64::from(u32::MAX))
    }

    /// Waits while the server wants quiet; then everybody comes back at a time of their own.
    async fn wait_at_gate(&self) -> Result<()> {
        let now = self.clock.instant();
        if let Some(open_at) = self.gate.open_at().filter(|open_at| *open_at > now) {
            let spread = PAUSE_SLOW_FIRST.mul_f64(self.chance()?);
            tokio::time::sleep_until(open_at + spread).await;
        }
        Ok(())
    }
}

impl<T> Tried<T> {
    /// The result with the failure in words.
    pub(super) fn or_error<D: std::fmt::Display>(
        self,
        attempted: impl FnOnce() -> D,
    ) -> Result<T, Error> {
        self.result.map_err(|failure| failure.into_error(attempted()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Bucket;
    use super::*;
    use crate::clock::Clock;
    use crate::store::StoreOptions;

    /// All callers' futures hold that of a request, and an unoptimised build holds several copies of each
    /// on its stack.
    #[test]
    fn the_future_of_a_request_is_small() {
        let bucket = Bucket::new("b", "", &StoreOptions::default(), &Clock::system()).unwrap();
        let name = ObjectName::new("c/a").unwrap();
        let bytes = size_of_val(&bucket.0.replace_if(&name, bytes::Bytes::new(), None));
        assert!(bytes < 16 << 10, "{bytes}");
    }
}
