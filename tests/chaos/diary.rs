//! What happened when, in words: kept with the evidence.

use std::fmt::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines with their time since the round began.
#[derive(Debug)]
pub struct Diary {
    began: Instant,
    lines: Mutex<Vec<(Duration, String)>>,
}

impl Diary {
    /// An empty one.
    pub fn begin() -> Self {
        Self { began: Instant::now(), lines: Mutex::default() }
    }

    /// Adds a line.
    pub fn note(&self, text: impl Into<String>) {
        let line = (self.began.elapsed(), text.into());
        self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(line);
    }

    /// All of it.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (at, line) in
            self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter()
        {
            writeln!(text, "{:8.3} {line}", at.as_secs_f64()).unwrap();
        }
        text
    }
}
