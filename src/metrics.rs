//! Numbers that say how the engine is doing: counters and latencies, cheap enough for every request
//! and every commit.
//!
//! # Shape
//! A [`Counter`] only grows. A [`Latency`] is a histogram of fixed size: three significant digits
//! from a microsecond to an hour, about 200 KiB once something was recorded and nothing before.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest latency told apart from longer ones, in microseconds: an hour.
const LATENCY_MICROS_MAX: u64 = 3_600_000_000;

/// Significant decimal digits kept of a latency: 1.23 s and 1.24 s are told apart.
const LATENCY_DIGITS: u8 = 3;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter at 0.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds to it.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// What was added so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long something takes, of what happened. Who waits for an answer before asking again asks less while
/// answers are slow, so of an outage it shows little: that is for how old something is to tell.
#[derive(Debug, Default)]
pub struct Latency(Mutex<Option<Histogram<u64>>>);

/// What a [`Latency`] has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LatencySummary {
    /// How many were recorded.
    pub count: u64,
    /// Half took no longer, in microseconds.
    pub p50_us: u64,
    /// 90 of 100 took no longer, in microseconds.
    pub p90_us: u64,
    /// 99 of 100 took no longer, in microseconds.
    pub p99_us: u64,
    /// The longest, in microseconds.
    pub max_us: u64,
}

/// What a [`Latency`] has seen, counted by bounds that its reader chose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LatencyBuckets {
    /// For each bound, in their order, how many took no longer.
    pub counts: Vec<u64>,
    /// How many were recorded.
    pub count: u64,
    /// Their sum, in microseconds; three digits are kept of each.
    pub sum_us: u64,
}

impl Latency {
    /// Nothing recorded yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Records one; what is longer than an hour counts as an hour.
    pub fn record(&self, took: Duration) {
        self.record_all([took]);
    }

    /// Records several at once.
    pub fn record_all(&self, took: impl IntoIterator<Item = Duration>) {
        self.change(|histogram| {
            took.into_iter().for_each(|took| histogram.saturating_record(micros(took)));
        });
    }

    fn change(&self, change: impl FnOnce(&mut Histogram<u64>)) {
        let mut histogram = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if histogram.is_none() {
            // The bounds are constants the constructor accepts, as the test below shows.
            *histogram = Histogram::new_with_bounds(1, LATENCY_MICROS_MAX, LATENCY_DIGITS).ok();
        }
        if let Some(histogram) = histogram.as_mut() {
            change(histogram);
        }
    }

    /// What was recorded so far.
    #[must_use]
    pub fn summary(&self) -> LatencySummary {
        let histogram = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        histogram.as_ref().map_or_else(LatencySummary::default, |histogram| LatencySummary {
            count: histogram.len(),
            p50_us: histogram.value_at_quantile(0.5),
            p90_us: histogram.value_at_quantile(0.9),
            p99_us: histogram.value_at_quantile(0.99),
            max_us: histogram.max(),
        })
    }

    /// What was recorded so far, counted by `bounds`, which ascend.
    #[must_use]
    pub fn buckets(&self, bounds: &[Duration]) -> LatencyBuckets {
        let mut buckets = LatencyBuckets { counts: vec![0; bounds.len()], ..Default::default() };
        let histogram = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(histogram) = histogram.as_ref() else { return buckets };
        for step in histogram.iter_recorded() {
            let (value, count) = (step.value_iterated_to(), step.count_since_last_iteration());
            buckets.count += count;
            buckets.sum_us = buckets.sum_us.saturating_add(value.saturating_mul(count));
            // Values that the histogram does not tell apart are on the same side of a bound.
            let lowest = histogram.lowest_equivalent(value);
            for (within, bound) in buckets.counts.iter_mut().zip(bounds) {
                if lowest <= micros(*bound) {
                    *within += count;
                }
            }
        }
        buckets
    }
}

/// A duration as a histogram takes it.
fn micros(took: Duration) -> u64 {
    u64::try_from(took.as_micros()).unwrap_or(u64::MAX).clamp(1, LATENCY_MICROS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let latency = Latency::new();
        assert_eq!(latency.summary(), LatencySummary::default());
        for millis in 1..=100 {
            latency.record(Duration::from_millis(millis));
        }
        let summary = latency.summary();
        assert_eq!(summary.count, 100);
        assert!((49_900..=50_100).contains(&summary.p50_us), "{summary:?}");
        assert!((98_900..=99_200).contains(&summary.p99_us), "{summary:?}");
    }

    #[test]
    fn what_is_out_of_bounds_is_recorded_at_the_bound() {
        let latency = Latency::new();
        latency.record(Duration::ZERO);
        latency.record(Duration::from_secs(100_000));
        let summary = latency.summary();
        assert_eq!(summary.count, 2);
        assert!(summary.max_us >= LATENCY_MICROS_MAX);
    }

    #[test]
    fn buckets_count_what_took_no_longer() {
        let latency = Latency::new();
        let bounds = [Duration::from_millis(1), Duration::from_millis(10), Duration::from_secs(60)];
        assert_eq!(latency.buckets(&bounds).counts, [0, 0, 0]);
        let millis = [1, 1, 2, 10, 11, 59_000, 61_000];
        latency.record_all(millis.map(Duration::from_millis));
        let buckets = latency.buckets(&bounds);
        assert_eq!((buckets.counts.as_slice(), buckets.count), ([2, 4, 6].as_slice(), 7));
        let sum_us = 1000 * millis.iter().sum::<u64>();
        assert!(buckets.sum_us.abs_diff(sum_us) * 500 < sum_us, "{buckets:?}");
    }

    #[test]
    fn counters_add_up_across_threads() {
        static COUNTER: Counter = Counter::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| COUNTER.add(1)));
            }
        });
        assert_eq!(COUNTER.value(), 4000);
    }
}
