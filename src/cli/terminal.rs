//! Where words go: results to standard output, remarks, live progress and errors to standard error.
//!
//! Progress is one line that redraws itself on a terminal, and a plain line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{MultiProgress, ProgressDrawTarget};

use crate::config::Environment;
use crate::error::{Context, Error, Kind, Result};

/// When to use colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum When {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// A cheap handle on the process's output.
#[derive(Clone, Debug)]
pub(super) struct Terminal(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    colour: bool,
    quiet: bool,
    json: bool,
    live: bool,
    answered: AtomicBool,
    bars: MultiProgress,
}

impl Terminal {
    /// Decides from flags, environment and what standard error is connected to.
    pub(super) fn new(colour: When, quiet: bool, json: bool, environment: &Environment) -> Self {
        let on_terminal = std::io::stderr().is_terminal();
        let no_colour = environment.get("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = environment.get("TERM").is_some_and(|term| term == "dumb");
        let colour = match colour {
            When::Always => true,
            When::Never => false,
            When::Auto => on_terminal && !no_colour && !dumb,
        };
        let live = on_terminal && !quiet && !dumb;
        let target = if live { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bars = MultiProgress::with_draw_target(target);
        let answered = AtomicBool::new(false);
        Self(Arc::new(Inner { colour, quiet, json, live, answered, bars }))
    }

    /// Whether results are wanted as JSON.
    pub(super) fn json(&self) -> bool {
        self.0.json
    }

    /// Whether standard error is coloured.
    pub(super) fn colour(&self) -> bool {
        self.0.colour
    }

    /// Whether standard error is a terminal that can redraw a line.
    pub(super) fn live(&self) -> bool {
        self.0.live
    }

    /// Whether remarks are unwanted.
    pub(super) fn quiet(&self) -> bool {
        self.0.quiet
    }

    /// The place of live lines.
    pub(super) fn bars(&self) -> &MultiProgress {
        &self.0.bars
    }

    /// Writes results to standard output. A reader that went away (`| head`) is no error.
    pub(super) fn data(&self, text: &str) -> Result<()> {
        let written = self.0.bars.suspend(|| {
            let mut out = std::io::stdout().lock();
            out.write_all(text.as_bytes()).and_then(|()| out.flush())
        });
        match written {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            written => written.context(|| "unable to write to standard output"),
        }
    }

    /// Writes one result as one line of JSON to standard output.
    pub(super) fn json_line(&self, result: &impl serde::Serialize) -> Result<()> {
        let line = serde_json::to_string(result)
            .map_err(|error| Error::new(Kind::Bug, format!("unable to write JSON: {error}")))?;
        self.0.answered.store(true, Ordering::Relaxed);
        self.data(&format!("{line}\n"))
    }

    /// Whether the result was written as JSON.
    pub(super) fn has_answered(&self) -> bool {
        self.0.answered.load(Ordering::Relaxed)
    }

    /// Tells the person something in passing.
    pub(super) fn remark(&self, text: &str) {
        if !self.0.quiet {
            self.error_text(&format!("{text}\n"));
        }
    }

    /// Warns the person, `--quiet` or not.
    pub(super) fn warn(&self, text: &str) {
        let (yellow, off) = if self.0.colour { ("\x1b[1;33m", "\x1b[0m") } else { ("", "") };
        self.error_text(&format!("{yellow}warning:{off} {}\n", plain(text)));
    }

    /// Writes to standard error as it is, around any live line.
    pub(super) fn error_text(&self, text: &str) {
        self.0.bars.suspend(|| {
            // Nobody is left to tell when standard error cannot be written.
            drop(std::io::stderr().lock().write_all(text.as_bytes()));
        });
    }

    /// Removes live lines.
    pub(super) fn finish_progress(&self) {
        // A line that cannot be cleared stays; the text that follows is still readable.
        drop(self.0.bars.clear());
    }
}

/// Text that a server or a store may have had a part in, without the characters that a terminal would take
/// for commands; lines stay.
pub(super) fn plain(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n', " ")
}

/// Log lines go through the terminal, so that they do not tear a live line.
impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.bars.suspend(|| std::io::stderr().lock().write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().lock().flush()
    }
}
