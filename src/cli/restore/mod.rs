//! `tidemark restore`: plan, then files, then recovery.

mod standby;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use self::standby::Standby;
use super::invocation::Invocation;
use super::terminal::Terminal;
use super::{progress, wal_get, words};
use crate::clock::Clock;
use crate::config::Config;
use crate::daemon::{keys, opening};
use crate::error::{Context, Error, Kind, Result};
use crate::pg::TimelineId;
use crate::repo::{Budget, Catalog, budget::RESTORE_BYTES};
use crate::restore::run::PREPLACED_BYTES_MAX;
use crate::restore::time::Reading;
use crate::restore::{
    self, Action, Edge, Engine, Isolation, Options, Outcome, Owner, Phase, Progress, ProgressNow,
    Request, RestoreReport, Role, StartOptions, StartReport, TimelineChoice, WalDelivery,
};

/// How often a plain line says how far the restore is, where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);
/// What to do about a restore that was stopped before the directory was complete.
const STOPPED_FILLING: &str = "The directory cannot be started by accident. Run the same command again: it \
     clears the directory and begins anew.";
/// What to do about one that was stopped while PostgreSQL was replaying.
const STOPPED_RECOVERY: &str = "The directory is complete and PostgreSQL was told to stop: start \
     PostgreSQL on it to go on to the target, or empty it to restore again.";

/// Bring a cluster back at a chosen moment.
///
/// The plan comes first and is printed: which backup, which WAL, the exact commit the target means
/// and the next one after it. A target that cannot be reached fails there, naming the nearest ones
/// that can. Targets mean what PostgreSQL's recovery_target_* settings mean.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory to restore into: missing or empty.
    #[arg(long, short = 'D', value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub(super) into: Option<PathBuf>,
    #[command(flatten)]
    pub(super) target: Target,
    /// Timeline to follow: a number, 'latest' or 'current' (that of the backup). [default: latest]
    #[arg(long, value_name = "TIMELINE", help_heading = "Target")]
    pub(super) timeline: Option<String>,
    /// Stop just before the target instead of just after it.
    #[arg(long, help_heading = "Target")]
    pub(super) exclusive: bool,
    /// Restore from this backup instead of the newest that reaches the target.
    #[arg(long, value_name = "ID", help_heading = "Target")]
    pub(super) backup: Option<String>,
    /// Place a tablespace elsewhere; may be given several times.
    #[arg(long = "tablespace", value_name = "OLD=NEW")]
    pub(super) tablespaces: Vec<String>,
    /// What PostgreSQL does at the target: accept writes, wait read-only, or stop.
    #[arg(long, value_name = "ACTION", default_value = "promote", value_parser = ["promote", "pause", "shutdown"])]
    pub(super) action: String,
    /// Restore as a standby that goes on following, instead of a server of its own.
    ///
    /// It streams from --primary and takes from the repository what that no longer has; with no
    /// primary it follows the repository alone.
    #[arg(long, help_heading = "Standby")]
    pub(super) as_standby: bool,
    /// Server that the standby streams from: a libpq connection string, or 'none'. [default: the
    /// configured PostgreSQL server]
    ///
    /// A password in it is left out: the standby finds it in the .pgpass of the user that runs
    /// PostgreSQL, or in the file that passfile=FILE names.
    #[arg(long, value_name = "CONNINFO", requires = "as_standby", help_heading = "Standby")]
    pub(super) primary: Option<String>,
    /// Replication slot that the standby streams through; make it on the primary first.
    ///
    /// On the primary: select pg_create_physical_replication_slot('NAME'). Without a slot the
    /// standby takes from the repository what the primary has removed.
    #[arg(long, value_name = "NAME", requires = "as_standby", help_heading = "Standby")]
    pub(super) primary_slot: Option<String>,
    /// Start PostgreSQL, wait until the target is reached, and report.
    #[arg(long)]
    pub(super) start: bool,
    /// Folder with PostgreSQL's programs, for --start.
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub(super) postgres_bin: Option<PathBuf>,
    /// User that will own the files, when run as root. [default: owner of the parent directory]
    #[arg(long, value_name = "USER")]
    pub(super) owner: Option<String>,
    /// Print the plan and change nothing.
    #[arg(long, short = 'n')]
    pub(super) dry_run: bool,
    /// Print plan and result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

/// Where to stop.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
pub(super) struct Target {
    /// The commits up to a moment, such as '2026-11-22 10:00:00+01' or '10 minutes ago'.
    #[arg(long, value_name = "TIME", help_heading = "Target", allow_hyphen_values = true)]
    pub(super) to_time: Option<String>,
    /// The WAL up to a position, such as 0/3000148.
    #[arg(long, value_name = "LSN", help_heading = "Target")]
    pub(super) to_lsn: Option<String>,
    /// Everything up to the end of a transaction.
    #[arg(long, value_name = "XID", help_heading = "Target")]
    pub(super) to_xid: Option<String>,
    /// Everything up to a restore point made with pg_create_restore_point.
    #[arg(long, value_name = "NAME", help_heading = "Target")]
    pub(super) to_name: Option<String>,
    /// All there is (default).
    #[arg(long, help_heading = "Target")]
    pub(super) to_latest: bool,
    /// Only until the backup is consistent.
    #[arg(long, help_heading = "Target")]
    pub(super) to_immediate: bool,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let Invocation { config, clock, terminal, stop } = &invocation;
    let into = into_of(&args)?;
    let request = request_of(&args, config, clock.now())?;
    let standby = args.as_standby.then(|| Standby::of(&args, config)).transpose()?;
    let planning = async {
        let repository = opening::repository(config, clock).await?;
        let reader = keys::reader(config, &repository)?;
        let catalog = Catalog::load(&repository).await?;
        let mut plan = restore::plan(&reader, &catalog, &request).await?;
        if let Some(rules) = config.retention_options()? {
            plan.note_retention(&catalog, &rules, clock.now());
        }
        Ok((reader, plan))
    };
    let (reader, plan) = super::unless_stopped(stop, planning).await?;
    let zone = config.time_zone()?.unwrap_or_else(TimeZone::system);
    let text = plan.render(&zone) + &standby.as_ref().map(Standby::render).unwrap_or_default();
    if args.dry_run {
        return match args.json {
            true => terminal.json_line(&json!({ "plan": plan, "standby": standby })),
            false => terminal.data(&text),
        };
    }
    let Some(into) = into else {
        return Err(Error::new(Kind::Usage, "unable to restore: no directory was named")
            .hint("Name one with --into DIR, or see the plan alone with --dry-run."));
    };
    show_plan(&plan, &text, terminal);
    let options = options_of(&args, into, standby.as_ref(), config)?;
    let progress = Arc::new(Progress::default());
    let narrator =
        tokio::spawn(narrate(Arc::clone(&progress), terminal.clone(), invocation.clock.clone()));
    let filled = AtomicBool::new(false);
    let work = async {
        let report = restore::run(&plan, &options, &reader, &progress).await?;
        filled.store(true, Ordering::Relaxed);
        let Some(start) = start_of(&args, &options) else { return Ok((report, None)) };
        let recovery = restore::start(&plan, &report.into, &start, &reader, &progress).await?;
        Ok((report, Some(recovery)))
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        () = stop.cancelled() => {
            Err(Error::new(Kind::Cancelled, "the restore was stopped")
                .hint(if filled.load(Ordering::Relaxed) { STOPPED_RECOVERY } else { STOPPED_FILLING }))
        }
    };
    narrator.abort();
    terminal.finish_progress();
    let (report, recovery) = outcome?;
    if args.json {
        let all = json!({
            "plan": plan, "standby": standby, "result": report, "recovery": recovery,
        });
        return terminal.json_line(&all);
    }
    tell(&report, recovery.as_ref(), terminal);
    Ok(())
}

/// What was done, in words.
fn tell(report: &RestoreReport, recovery: Option<&StartReport>, terminal: &Terminal) {
    let next = match recovery {
        None => "; start PostgreSQL on it to reach the target",
        Some(_) => "",
    };
    terminal.remark(&format!(
        "restored {} in {} files into '{}' in {}{next}",
        words::bytes(report.plain_bytes),
        report.file_count,
        report.into.display(),
        words::length(SignedDuration::from_millis(i64::try_from(report.elapsed_ms).unwrap_or(0)))
    ));
    report.notes.iter().for_each(|note| terminal.warn(note));
    if let Some(recovery) = recovery {
        terminal.remark(&said_of(recovery));
    } else if report.wal == WalDelivery::OnDemand {
        terminal.remark(
            "PostgreSQL will fetch WAL by 'tidemark wal-get': it needs the same credentials in its \
             environment and must be able to read the identity file",
        );
    }
}

/// Shows the plan before anything is done; with `--quiet` only what must be known all the same.
fn show_plan(plan: &restore::Plan, text: &str, terminal: &Terminal) {
    terminal.remark(text.trim_end());
    if terminal.quiet() {
        plan.notes.iter().for_each(|note| terminal.warn(note));
    }
}

/// The directory, absolute; `None` is good enough for a plan.
fn into_of(args: &Args) -> Result<Option<PathBuf>> {
    let absolute = |path: &PathBuf| {
        std::path::absolute(path).context(|| format!("unable to use '{}'", path.display()))
    };
    args.into.as_ref().map(absolute).transpose()
}

/// What the command line asks for.
fn request_of(args: &Args, config: &Config, now: Timestamp) -> Result<Request> {
    let edge = if args.exclusive { Edge::Exclusive } else { Edge::Inclusive };
    let wanted = &args.target;
    let target = if let Some(text) = &wanted.to_time {
        let reading = Reading { now, zone: config.time_zone()? };
        restore::Target::Time { at: restore::time::parse(text, &reading)?, edge }
    } else if let Some(text) = &wanted.to_lsn {
        restore::Target::Lsn { at: text.parse()?, edge }
    } else if let Some(text) = &wanted.to_xid {
        restore::Target::xid(text, edge)?
    } else if let Some(name) = &wanted.to_name {
        restore::Target::name(name)?
    } else if wanted.to_immediate {
        restore::Target::Immediate
    } else {
        restore::Target::Latest
    };
    let edged = matches!(
        target,
        restore::Target::Time { .. } | restore::Target::Lsn { .. } | restore::Target::Xid { .. }
    );
    if args.exclusive && !edged {
        return Err(Error::new(Kind::Usage, format!("'--exclusive' means nothing for {target}"))
            .hint("Use it with --to-time, --to-lsn or --to-xid."));
    }
    let backup = args.backup.as_deref().map(str::parse).transpose()?;
    Ok(Request { target, timeline: timeline_of(args.timeline.as_deref())?, backup })
}

fn timeline_of(text: Option<&str>) -> Result<TimelineChoice> {
    match text {
        None | Some("latest") => Ok(TimelineChoice::Latest),
        Some("current") => Ok(TimelineChoice::Current),
        Some(text) => {
            let number = text.parse().ok().and_then(TimelineId::new);
            number.map(TimelineChoice::Exactly).ok_or_else(|| {
                Error::new(Kind::Usage, format!("unable to read '{text}' as a timeline"))
                    .hint("Write its number as 'tidemark list' shows it, 'latest' or 'current'.")
            })
        }
    }
}

fn options_of(
    args: &Args,
    into: PathBuf,
    standby: Option<&Standby>,
    config: &Config,
) -> Result<Options> {
    let action = match args.action.as_str() {
        "pause" => Action::Pause,
        "shutdown" => Action::Shutdown,
        _ => Action::Promote,
    };
    let role = standby.map_or(Role::Primary, |standby| Role::Standby(standby.upstream()));
    let tablespaces = args.tablespaces.iter().map(|text| text.parse());
    Ok(Options {
        into,
        tablespaces: tablespaces.collect::<Result<_>>()?,
        action,
        role,
        owner: args.owner.as_deref().map(Owner::parse).transpose()?,
        engine: Engine::Postgres,
        wal_get_command: wal_get::command_words(config)?,
        budget: Budget::restore(config.memory_bytes(RESTORE_BYTES)?, config.jobs()?),
        preplaced_bytes_max: PREPLACED_BYTES_MAX,
    })
}

/// How PostgreSQL is to be started, if it is.
fn start_of(args: &Args, options: &Options) -> Option<StartOptions> {
    args.start.then(|| StartOptions {
        postgres_bin: args.postgres_bin.clone(),
        isolation: Isolation::AsConfigured,
        port: None,
        action: options.action,
        role: options.role.clone(),
    })
}

/// What came of the start, for people.
fn said_of(recovery: &StartReport) -> String {
    let now = match (recovery.outcome, recovery.new_timeline) {
        (Outcome::Promoted, Some(timeline)) => {
            format!("PostgreSQL reached the target and runs as a primary on timeline {timeline}")
        }
        (Outcome::Promoted, None) => "PostgreSQL reached the target and runs as a primary".into(),
        (Outcome::Paused, _) => "PostgreSQL waits at the target, read-only; \
             'select pg_wal_replay_resume()' promotes it"
            .into(),
        (Outcome::Stopped, _) => "PostgreSQL reached the target and has stopped".into(),
        (Outcome::Following, _) => "PostgreSQL runs as a standby".to_owned(),
    };
    let length = SignedDuration::from_millis(i64::try_from(recovery.elapsed_ms).unwrap_or(0));
    let process = recovery.pid.map(|pid| format!(", process {pid}")).unwrap_or_default();
    let last = recovery.last_transaction.as_ref();
    let last = last.map(|time| format!("; last transaction {time}")).unwrap_or_default();
    let notes: String = recovery.notes.iter().map(|note| format!("; {note}")).collect();
    let log = recovery.log.display();
    format!("{now} after {}{process}{last}{notes}; its log is '{log}'", words::length(length))
}

/// Says how far the restore is until it is aborted.
async fn narrate(now: Arc<Progress>, terminal: Terminal, clock: Clock) {
    let shown = progress::Progress::begin(&terminal, &clock, PLAIN_INTERVAL);
    let begun = clock.instant();
    loop {
        shown.show(|| line(now.now(), clock.instant().saturating_duration_since(begun)));
        tokio::time::sleep(progress::REDRAW_INTERVAL).await;
    }
}

/// How far the restore is, its rate and the time left.
fn line(now: ProgressNow, elapsed: Duration) -> String {
    let phase = match now.phase {
        Phase::Preparing => "preparing",
        Phase::Files => "files",
        Phase::Wal => "WAL",
        Phase::Syncing => "syncing to disk",
        Phase::Replaying => "PostgreSQL replays",
        Phase::Done => "done",
    };
    if now.total_bytes == 0 {
        return phase.to_owned();
    }
    let rate = now.done_bytes / elapsed.as_secs().max(1);
    let left = now.total_bytes.saturating_sub(now.done_bytes).checked_div(rate).unwrap_or(0);
    format!(
        "{phase}: {} of {}, {} a second, {} left",
        words::bytes(now.done_bytes),
        words::bytes(now.total_bytes),
        words::bytes(rate),
        words::length(SignedDuration::from_secs(i64::try_from(left).unwrap_or(i64::MAX)))
    )
}
