//! What every command works with: settings, clock, terminal and the request to stop.

use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::terminal::Terminal;
use crate::clock::Clock;
use crate::config::Config;
use crate::error::{Error, Kind, Result};

/// One run of one command.
#[derive(Debug)]
pub(super) struct Invocation {
    /// Effective settings.
    pub(super) config: Config,
    /// Time and randomness.
    pub(super) clock: Clock,
    /// Where words go.
    pub(super) terminal: Terminal,
    /// Cancelled by the first SIGTERM or SIGINT.
    pub(super) stop: CancellationToken,
}

impl Invocation {
    /// Starts logging and reports what is suspicious about the settings.
    pub(super) fn begin(
        config: Config,
        terminal: Terminal,
        stop: CancellationToken,
    ) -> Result<Self> {
        start_log(&config, &terminal)?;
        for warning in &config.settings.warnings {
            tracing::warn!("{warning}");
        }
        Ok(Self { config, clock: Clock::system(), terminal, stop })
    }
}

fn start_log(config: &Config, terminal: &Terminal) -> Result<()> {
    let level = config.settings.text("log.level").unwrap_or_default();
    let filter = EnvFilter::try_new(level).map_err(|error| {
        let origin = config.settings.origin("log.level");
        Error::new(
            Kind::Config,
            format!("unable to read 'log.level' from {origin}: '{level}', {error}"),
        )
        .hint("Write error, warn, info, debug or trace, or a filter such as 'info,tidemark::wire=debug'.")
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(terminal.colour())
        // It would tell standard error, by a panic when that is what cannot be written.
        .log_internal_errors(false)
        .with_writer(Lines(terminal.clone()));
    let started = match config.settings.text("log.format") {
        Some("json") => builder.json().flatten_event(true).try_init(),
        _ => builder.with_target(false).try_init(),
    };
    started.map_err(|error| Error::new(Kind::Bug, format!("unable to start the log: {error}")))
}

struct Lines(Terminal);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Terminal;

    fn make_writer(&'a self) -> Terminal {
        self.0.clone()
    }
}
