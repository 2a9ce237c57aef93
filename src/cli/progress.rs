//! What a person sees while something runs: one line that redraws itself on a terminal, a plain
//! line now and then elsewhere.

use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::terminal::Terminal;
use crate::clock::{Clock, Instant};

/// How often a line on a terminal is redrawn.
pub(super) const REDRAW_INTERVAL: Duration = Duration::from_millis(200);

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

    /// Removes the line.
    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}
