//! The command line: one file a command, each turning flags and settings into a call of the engine
//! and its result into words or JSON.
//!
//! # Invariants
//! Standard output carries only what was asked for; progress, logs and errors go to standard
//! error. A command that deletes prints its plan first.

mod backup;
mod check;
mod completions;
mod config;
mod demo;
mod expire;
mod flags;
mod hold;
mod init;
mod inspect;
mod invocation;
mod keygen;
mod list;
mod progress;
mod release;
mod render;
mod restore;
mod run;

mod stream;
mod terminal;
mod verify;
mod wal_get;
mod words;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Environment};
use crate::error::{Error, Kind, Result};
use crate::restore::{WAL_GET_FATAL_EXIT, WalGet, asks_again};
use invocation::Invocation;
use terminal::{Terminal, When};

/// Exit status of `wal-get` when the repository does not hold the file: recovery ends in good order.
const WAL_NOT_THERE_EXIT: u8 = 1;

/// Streaming backup and point-in-time recovery for PostgreSQL.
///
/// Tidemark copies a running PostgreSQL cluster and every byte of its WAL over the replication
/// protocol into S3 or a directory, compressed and encrypted, and brings the cluster back at any
/// moment in between.
#[derive(Debug, Parser)]
#[command(name = "tidemark", version, after_long_help = after_help(), max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

/// What every command takes besides its settings.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// Configuration file. An empty name reads none.
    ///
    /// Without it TIDEMARK_CONFIG names the file; else the first that exists of
    /// $XDG_CONFIG_HOME/tidemark/tidemark.toml (~/.config when unset) and
    /// /etc/tidemark/tidemark.toml is read. [env: TIDEMARK_CONFIG]
    #[arg(long, global = true, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    config: Option<PathBuf>,
    /// When to colour what is written to standard error.
    ///
    /// 'auto' colours on a terminal unless NO_COLOR is set. [default: auto] [env: NO_COLOR]
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        value_enum,
        default_value_t,
        hide_default_value = true
    )]
    color: When,
    /// Print no progress and no remarks, only results and errors.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Args),
    Init(init::Args),
    Keygen(keygen::Args),
    Check(check::Args),
    Backup(backup::Args),
    Stream(stream::Args),
    Run(run::Args),
    Restore(Box<restore::Args>),
    List(list::Args),
    Verify(verify::Args),
    Expire(expire::Args),
    Hold(hold::Args),
    Release(release::Args),
    WalGet(wal_get::Args),
    Inspect(inspect::Args),
    Config(config::Args),
    Completions(completions::Args),
}

impl Command {
    /// Whether the result, and an error, are wanted as JSON on standard output.
    fn json(&self) -> bool {
        match self {
            Self::Init(args) => args.json,
            Self::Keygen(args) => args.json,
            Self::Check(args) => args.json,
            Self::Backup(args) => args.json,
            Self::Restore(args) => args.json,
            Self::List(args) => args.json,
            Self::Verify(args) => args.json,
            Self::Expire(args) => args.json,
            Self::Hold(args) => args.json,
            Self::Release(args) => args.json,
            Self::Inspect(args) => args.json,
            Self::Config(args) => args.json(),
            Self::Demo(args) => args.json,
            Self::Stream(_) | Self::Run(_) | Self::WalGet(_) | Self::Completions(_) => false,
        }
    }
}

fn after_help() -> String {
    format!(
        "Settings come from flags, environment variables, the configuration file and defaults, in \
         this order;\n'tidemark config show' prints each with its origin.\n\n{}",
        render::exit_code_table()
    )
}

/// The command line's grammar with the flags of all settings in place.
fn grammar() -> clap::Command {
    flags::add(Cli::command())
}

/// The exit status of a failure of what `arguments` ask for, before they were read and after a panic
/// included.
///
/// PostgreSQL takes a low status of its `restore_command` for the end of the WAL and would end recovery too
/// early: whatever went wrong must stop it instead. Only a standby is told that there is nothing yet, for it
/// asks again; unless we were asked to stop, which it was too, then. Nobody waits for who fetches ahead, whose
/// failure is told otherwise; but where the postmaster is the init process of a container that process is its
/// child, and with another status than 0 or 1 taken for one of its own that crashed (`CleanupBackend` in
/// `postmaster.c`, 13 to 18), for which it ends all others.
#[must_use]
pub fn failed(arguments: &[OsString], kind: Kind) -> ExitCode {
    let has = |wanted| arguments.iter().any(|word| word == wanted);
    // One of the words is the place for the file. Which one is not known of a line that makes no sense.
    let comes_back = || arguments.iter().any(|word| asks_again(Path::new(word)));
    ExitCode::from(match has("wal-get") {
        true if has(wal_get::PREFETCH) => WAL_NOT_THERE_EXIT,
        true if kind != Kind::Cancelled && comes_back() => WAL_NOT_THERE_EXIT,
        true => WAL_GET_FATAL_EXIT,
        false => kind.exit_code(),
    })
}

/// Runs the command that `arguments` (the program's name first) ask for, and reports its error.
pub async fn run(
    arguments: Vec<OsString>,
    environment: Environment,
    stop: CancellationToken,
) -> ExitCode {
    match run_command(arguments.clone(), environment, stop).await {
        Ok(code) => code,
        Err(kind) => failed(&arguments, kind),
    }
}

async fn run_command(
    arguments: Vec<OsString>,
    environment: Environment,
    stop: CancellationToken,
) -> std::result::Result<ExitCode, Kind> {
    let wants_json = arguments.iter().any(|word| word == "--json");
    let parsed = grammar().try_get_matches_from(arguments);
    let parsed = parsed.and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        // Asking for help is no failure.
        Err(error) if error.use_stderr() => {
            render::misused(&error, wants_json);
            return Err(Kind::Usage);
        }
        Err(help) => {
            render::help(&help);
            return Ok(ExitCode::SUCCESS);
        }
    };
    let json = cli.command.json();
    let terminal = Terminal::new(cli.global.color, cli.global.quiet, json, &environment);
    let result = async {
        let given = flags::given(&matches);
        let config = Config::load(cli.global.config.as_deref(), given, environment)?;
        let invocation = Invocation::begin(config, terminal.clone(), stop)?;
        dispatch(cli.command, invocation).await
    }
    .await;
    result.map_err(|error| {
        render::error(&error, &terminal);
        error.kind()
    })
}

async fn dispatch(command: Command, invocation: Invocation) -> Result<ExitCode> {
    let stop = invocation.stop.clone();
    let done = match command {
        Command::Demo(args) => demo::run(args, invocation).await,
        Command::Init(args) => unless_stopped(&stop, init::run(args, invocation)).await,
        Command::Keygen(args) => keygen::run(args, invocation),
        Command::Check(args) => unless_stopped(&stop, check::run(args, invocation)).await,
        Command::Backup(args) => backup::run(args, invocation).await,
        Command::Stream(args) => stream::run(args, invocation).await,
        Command::Run(args) => run::run(args, invocation).await,
        Command::Restore(args) => restore::run(*args, invocation).await,
        Command::List(args) => unless_stopped(&stop, list::run(args, invocation)).await,
        Command::Verify(args) => verify::run(args, invocation).await,
        Command::Expire(args) => unless_stopped(&stop, expire::run(args, invocation)).await,
        Command::Hold(args) => unless_stopped(&stop, hold::run(args, invocation)).await,
        Command::Release(args) => unless_stopped(&stop, release::run(args, invocation)).await,
        Command::WalGet(args) => {
            let found = unless_stopped(&stop, wal_get::run(args, invocation)).await?;
            return Ok(match found {
                WalGet::Found => ExitCode::SUCCESS,
                WalGet::NotThere => ExitCode::from(WAL_NOT_THERE_EXIT),
            });
        }
        Command::Inspect(args) => unless_stopped(&stop, inspect::run(args, invocation)).await,
        Command::Config(args) => config::run(args, invocation),
        Command::Completions(args) => completions::run(args, invocation),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Does `work`, which may be dropped wherever it waits, until it is done or `stop`.
async fn unless_stopped<T>(
    stop: &CancellationToken,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        done = work => done,
        () = stop.cancelled() => Err(Error::new(Kind::Cancelled, "stopped before it was done")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_holds_together() {
        grammar().debug_assert();
    }
}
