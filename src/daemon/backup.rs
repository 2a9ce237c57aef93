//! A base backup as the settings want it.

use std::sync::Arc;
use std::time::Duration;

use super::writing;
use crate::capture::base::{Base, BaseOptions, Progress, WalStreaming};
use crate::capture::stream::{SlotLife, Status};
use crate::config::Config;
use crate::error::Result;
use crate::repo::lease::Tenure;
use crate::repo::packing::PACK_BYTES_DEFAULT;
use crate::repo::{Budget, PackOptions, Writer, budget};

/// Label in `backup_label`, and what `pg_stat_activity` shows.
const LABEL: &str = "tidemark";

/// Longest that the WAL of a backup may not get on before the backup is given up.
const WAL_STALL_MAX: Duration = Duration::from_secs(600);

/// A backup taken by a process of its own: its WAL comes from whoever holds the lease, else it is
/// streamed here.
///
/// # Errors
/// `config` for a value that is not understood.
pub fn alone(config: &Config, writer: Writer, progress: Arc<Progress>) -> Result<Base> {
    let mut stream = config.stream_options()?;
    // A slot that stays behind would fill the server's disk when nobody streams.
    stream.slot_life = SlotLife::Connection;
    let mut lease = writing::lease_options(config, "backup")?;
    lease.tenure = Tenure::Passing;
    lease.key_id = Some(writer.key_id().to_string());
    let wal = WalStreaming::Elsewhere(Box::new((stream, lease)));
    base(config, writer, wal, progress)
}

/// A backup beside a stream of this process.
///
/// # Errors
/// `config` for a value that is not understood.
pub fn beside(
    config: &Config,
    writer: Writer,
    stream: Arc<Status>,
    progress: Arc<Progress>,
) -> Result<Base> {
    base(config, writer, WalStreaming::InThisProcess(stream), progress)
}

fn base(
    config: &Config,
    writer: Writer,
    wal: WalStreaming,
    progress: Arc<Progress>,
) -> Result<Base> {
    let level = config.level()?;
    let memory = config.memory_bytes(budget::BACKUP_BYTES)?;
    let options = BaseOptions {
        label: LABEL.to_owned(),
        checkpoint: config.checkpoint(),
        rate_max_kib: config.rate_limit_kib()?.map(std::num::NonZero::get),
        page_checksums: config.page_checksums(),
        pack: PackOptions {
            budget: Budget::backup(memory, config.jobs()?, level),
            level,
            pack_bytes: PACK_BYTES_DEFAULT,
        },
        wal_stall_max: WAL_STALL_MAX,
    };
    Ok(Base { options, postgres: config.connect_options()?, writer, wal, progress })
}
