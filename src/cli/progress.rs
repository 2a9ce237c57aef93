//! What a person sees while something runs: one line that redraws itself on a terminal, a plain
//! line now and then elsewhere.

use std::convert::Infallible;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use jiff::SignedDuration;

use super::terminal::Terminal;
use super::words;
use crate::clock::{Clock, Instant};

/// How often a line on a terminal is redrawn.
pub(super) const REDRAW_INTERVAL: Duration = Duration::from_millis(200);

/// Before this the speed says nothing about the time left.
const SETTLED: Duration = Duration::from_secs(3);

/// One line about one activity.
#[derive(Debug)]
pub(super) struct Progress {
    terminal: Terminal,
    clock: Clock,
    /// Only on a terminal.
    bar: Option<ProgressBar>,
    /// Least time between two plain lines.
    plain_interval: Duration,
    last_plain: Mutex<Instant>,
}

impl Progress {
    /// A line; elsewhere than on a terminal one every `plain_interval` at most.
    pub(super) fn begin(terminal: &Terminal, clock: &Clock, plain_interval: Duration) -> Self {
        let bar = terminal.live().then(|| {
            let bar = terminal.bars().add(ProgressBar::new_spinner());
            // The template is a constant that the parser accepts; the default is readable too.
            if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self {
            terminal: terminal.clone(),
            clock: clock.clone(),
            bar,
            plain_interval,
            last_plain: Mutex::new(clock.instant()),
        }
    }

    /// Shows how far it has come.
    pub(super) fn show(&self, text: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text());
            bar.tick();
            return;
        }
        let now = self.clock.instant();
        let mut last = self.last_plain.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if now.saturating_duration_since(*last) >= self.plain_interval {
            *last = now;
            self.terminal.remark(&text());
        }
    }

    /// Shows `text` again and again; to be dropped when the work is done.
    pub(super) async fn watch(&self, text: impl Fn() -> String) -> Infallible {
        loop {
            self.show(&text);
            tokio::time::sleep(REDRAW_INTERVAL).await;
        }
    }

    /// Removes the line.
    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How fast bytes go by, and how long the rest will take.
#[derive(Debug)]
pub(super) struct Meter {
    clock: Clock,
    began: Instant,
}

impl Meter {
    /// From now on.
    pub(super) fn begin(clock: &Clock) -> Self {
        Self { clock: clock.clone(), began: clock.instant() }
    }

    /// `1.2 GiB of 4.0 GiB (30 %), 120 MiB/s, 24 s left`, as far as it is known.
    pub(super) fn text(&self, done_bytes: u64, total_bytes: Option<u64>) -> String {
        let elapsed = self.clock.instant().saturating_duration_since(self.began);
        meter_text(done_bytes, total_bytes, elapsed)
    }
}

fn meter_text(done_bytes: u64, total_bytes: Option<u64>, elapsed: Duration) -> String {
    let done = words::bytes(done_bytes);
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
    let rate = done_bytes.saturating_mul(1000) / millis;
    let speed = format!("{}/s", words::bytes(rate));
    let Some(total) = total_bytes.filter(|total| *total > 0) else {
        return format!("{done}, {speed}");
    };
    // A server's estimate may be too small.
    let percent = (done_bytes.saturating_mul(100) / total).min(100);
    let text = format!("{done} of {} ({percent} %), {speed}", words::bytes(total));
    let left = total.saturating_sub(done_bytes).checked_div(rate);
    match left.and_then(|seconds| i64::try_from(seconds).ok()) {
        Some(seconds) if elapsed > SETTLED && seconds > 0 => {
            format!("{text}, {} left", words::length(SignedDuration::from_secs(seconds)))
        }
        _ => text,
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meter_tells_speed_at_once_and_the_rest_when_it_has_settled() {
        let (gib, second) = (1 << 30, Duration::from_secs(1));
        assert_eq!(meter_text(gib, None, 2 * second), "1.0 GiB, 512.0 MiB/s");
        let early = meter_text(gib, Some(4 * gib), 2 * second);
        assert_eq!(early, "1.0 GiB of 4.0 GiB (25 %), 512.0 MiB/s");
        let later = meter_text(gib, Some(4 * gib), 8 * second);
        assert_eq!(later, "1.0 GiB of 4.0 GiB (25 %), 128.0 MiB/s, 24 s left");
        assert!(meter_text(5 * gib, Some(4 * gib), 8 * second).contains("(100 %)"));
        assert!(meter_text(0, Some(gib), Duration::ZERO).contains("(0 %)"));
    }
}
