//! `tidemark restore`: plan, then files, then recovery.

use std::path::PathBuf;

use super::invocation::Invocation;
use crate::error::{Error, Kind, Result};

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
    #[arg(long)]
    pub(super) as_standby: bool,
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

pub(super) async fn run(_args: Args, _invocation: Invocation) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "not built yet"))
}
