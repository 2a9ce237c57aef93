//! Settings that recovery with hot standby refuses to have lower than the server the WAL comes from.
//!
//! # Source
//! `CheckRequiredParameterValues` in `src/backend/access/transam/xlogrecovery.c` (15 to 18; `xlog.c` in 13
//! and 14) and the defaults in `guc_tables.c` (`guc.c` before 16).

use crate::pg::control::StandbyLimits;

use super::settings::{RecoverySettings, lines_of, push_setting, setting_of};

/// The settings, their values in `pg_control`, and PostgreSQL's defaults.
fn rows(limits: &StandbyLimits) -> [(&'static str, u32, u32); 5] {
    [
        ("max_connections", limits.max_connections, 100),
        ("max_worker_processes", limits.max_worker_processes, 8),
        ("max_wal_senders", limits.max_wal_senders, 10),
        ("max_prepared_transactions", limits.max_prepared_transactions, 0),
        ("max_locks_per_transaction", limits.max_locks_per_transaction, 64),
    ]
}

/// Says whose lines these are.
const RAISED: &[u8] =
    b"# raised by tidemark restore to what the server had, or recovery is refused\n";

/// `auto_conf` with `settings`, and with those of `limits` that neither it nor `conf` grants. They stand
/// outside the block that goes when recovery has ended: transactions that are prepared then need theirs at
/// every later start.
pub(crate) fn apply(
    settings: &RecoverySettings,
    limits: &StandbyLimits,
    (conf, auto_conf): (&[u8], &[u8]),
) -> Vec<u8> {
    let mut text = settings.strip(auto_conf);
    let missing = missing(limits, &[conf, &text]);
    if !missing.is_empty() {
        text.extend_from_slice(RAISED);
    }
    for (name, value) in missing {
        push_setting(&mut text, name, &value.to_string());
    }
    settings.push_block(&mut text);
    text
}

/// The settings that `files` (configuration files, the one that counts most last) leave lower than `limits`,
/// with the values they need.
pub(crate) fn missing(limits: &StandbyLimits, files: &[&[u8]]) -> Vec<(&'static str, u32)> {
    let effective = |name: &str| -> Option<u32> {
        let mut lines = files.iter().rev().flat_map(|file| lines_of(file).rev());
        let value = lines.find_map(|(_, line)| {
            let (found, value) = setting_of(&line)?;
            found.eq_ignore_ascii_case(name).then(|| value.to_owned())
        });
        value?.parse().ok()
    };
    let needed = rows(limits)
        .into_iter()
        .filter(|(name, limit, default)| effective(name).unwrap_or(*default) < *limit);
    needed.map(|(name, limit, _)| (name, limit)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::settings::{Action, Stop};

    #[test]
    fn what_an_earlier_restore_raised_stays_and_outlives_the_recovery() {
        let settings = RecoverySettings {
            restore_command: "tidemark wal-get %f %p".to_owned(),
            recovery_end_command: None,
            stop: Stop::EndOfWal,
            timeline: None,
            action: Action::Pause,
            upstream: None,
        };
        let limits = StandbyLimits {
            max_connections: 200,
            max_worker_processes: 8,
            max_wal_senders: 10,
            max_prepared_transactions: 0,
            max_locks_per_transaction: 64,
        };
        let first = apply(&settings, &limits, (b"", b""));
        let raised = "max_connections = '200'\n# tidemark restore: begin";
        assert!(String::from_utf8_lossy(&first).contains(raised));
        assert_eq!(apply(&settings, &limits, (b"", &first)), first);
    }

    #[test]
    fn only_what_is_too_low_is_raised() {
        let limits = StandbyLimits {
            max_connections: 200,
            max_worker_processes: 8,
            max_wal_senders: 20,
            max_prepared_transactions: 5,
            max_locks_per_transaction: 64,
        };
        let conf = "max_connections = 50 # old\nmax_connections = '300'\n#max_wal_senders = 99\nMax_Prepared_Transactions 5\n";
        let auto = "max_wal_senders = '15'\n";
        assert_eq!(
            missing(&limits, &[conf.as_bytes(), auto.as_bytes()]),
            [("max_wal_senders", 20)]
        );
        let names: Vec<&str> = missing(&limits, &[]).iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["max_connections", "max_wal_senders", "max_prepared_transactions"]);
    }
}
