//! `tidemark run`: everything, supervised.

use super::invocation::Invocation;
use super::stream;
use crate::daemon::supervisor::Duties;
use crate::error::Result;
use crate::repo::lease::Wait;

/// Do everything by schedule: stream WAL, take base backups, expire, compact, sweep.
///
/// This is what runs beside a database as a service: the WAL stream, a base backup every
/// run.backup_interval, and what keeps the repository small. No complete backup and no WAL is
/// deleted unless [retention] says what to keep; what aborted backups and uploads left is removed,
/// and small WAL objects give way to the one they were merged into. SIGTERM flushes what was
/// received and ends with status 0; with 10 when the lease was not taken yet, with 4 when the
/// repository did not take all of it in wal.stop_grace. A second signal ends it at once, with 130;
/// that, or killing it, loses nothing either. SIGHUP changes nothing: settings are read at the start.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// When another process streams for this cluster, wait for its end instead of refusing.
    ///
    /// A base backup that streams its own WAL is always waited for; and so is, for lease.ttl, what may be
    /// this container before it was restarted.
    #[arg(long)]
    pub(super) wait: bool,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let config = &invocation.config;
    let duties = Duties {
        backup_interval: Some(config.interval("run.backup_interval")?),
        upkeep_interval: Some(config.interval("run.upkeep_interval")?),
        retention: config.retention_options()?,
    };
    if duties.retention.is_none() {
        invocation.terminal.remark(
            "nothing says what to keep ([retention] in the configuration), so no backup and no WAL \
             is deleted",
        );
    }
    let wait = if args.wait { Wait::Forever } else { Wait::ForRestarted };
    stream::supervise("run", wait, duties, &invocation).await
}
