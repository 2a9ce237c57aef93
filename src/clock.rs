//! The only source of wall-clock time, monotonic time and randomness.
//!
//! Everything else takes a [`Clock`], so that a simulation can run the engine in paused time with a
//! seed. Monotonic time is tokio's, which a paused runtime advances by itself.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use ring::rand::{SecureRandom, SystemRandom};

use crate::error::{Error, Kind, Result};

/// A cheap handle on time and randomness.
#[derive(Clone)]
pub struct Clock(Arc<Source>);

enum Source {
    System(SystemRandom),
    Simulated { start: Mutex<Timestamp>, origin: tokio::time::Instant, state: Mutex<u64> },
}

/// A point in monotonic time, for deadlines and durations.
pub type Instant = tokio::time::Instant;

impl Clock {
    /// The machine's own clock and the operating system's random numbers.
    #[must_use]
    pub fn system() -> Self {
        Self(Arc::new(Source::System(SystemRandom::new())))
    }

    /// A clock that shows `start` now, runs with tokio's (pausable) time, and draws its random
    /// numbers from `seed`. For tests and simulation only: the numbers are predictable.
    #[must_use]
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the monotonic clock")]
    pub fn simulated(start: Timestamp, seed: u64) -> Self {
        let origin = tokio::time::Instant::now();
        let start = Mutex::new(start);
        Self(Arc::new(Source::Simulated { start, origin, state: Mutex::new(seed) }))
    }

    /// Lets wall-clock time alone pass, as while a machine is suspended. Of a simulated clock.
    #[cfg(test)]
    pub(crate) fn suspend(&self, passed: jiff::SignedDuration) {
        if let Source::Simulated { start, .. } = &*self.0 {
            let mut start = start.lock().unwrap_or_else(PoisonError::into_inner);
            *start = start.checked_add(passed).unwrap_or(Timestamp::MAX);
        }
    }

    /// Wall-clock time.
    #[must_use]
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the system clock")]
    pub fn now(&self) -> Timestamp {
        match &*self.0 {
            Source::System(_) => Timestamp::now(),
            Source::Simulated { start, origin, .. } => {
                let elapsed = jiff::SignedDuration::try_from(origin.elapsed()).unwrap_or_default();
                let start = *start.lock().unwrap_or_else(PoisonError::into_inner);
                start.checked_add(elapsed).unwrap_or(Timestamp::MAX)
            }
        }
    }

    /// Monotonic time.
    #[must_use]
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the monotonic clock")]
    pub fn instant(&self) -> Instant {
        tokio::time::Instant::now()
    }

    /// `N` random bytes, fit for keys and salts when the clock is the system's.
    ///
    /// # Errors
    /// `bug` when the operating system has no randomness to give.
    pub fn random<const N: usize>(&self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        match &*self.0 {
            Source::System(random) => {
                random.fill(&mut bytes).map_err(|ring::error::Unspecified| {
                    Error::new(Kind::Bug, "unable to draw random bytes from the operating system")
                })?
            }
            Source::Simulated { state, .. } => {
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                for byte in &mut bytes {
                    *byte = split_mix_64(&mut state).to_le_bytes()[0];
                }
            }
        }
        Ok(bytes)
    }
}

/// SplitMix64, enough for simulations. Source: Steele, Lea, Flood, "Fast splittable pseudorandom
/// number generators", OOPSLA 2014.
fn split_mix_64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &*self.0 {
            Source::System(_) => "Clock(system)",
            Source::Simulated { .. } => "Clock(simulated)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_simulated_clock_follows_paused_time_and_its_seed() {
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let clock = Clock::simulated(start, 7);
        tokio::time::advance(std::time::Duration::from_secs(90)).await;
        assert_eq!(clock.now().to_string(), "2026-01-01T00:01:30Z");
        let again = Clock::simulated(start, 7);
        assert_eq!(clock.random::<16>().unwrap(), again.random::<16>().unwrap());
    }
}
