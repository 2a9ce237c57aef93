//! Questions to the catalog while the stream runs: is the slot in danger, does anybody wait for us,
//! how far is the server.
//!
//! Asked on short-lived ordinary connections, once a minute and every ten seconds while the
//! repository does not take WAL. A server that lets us in for replication only is no error: it is
//! then asked `IDENTIFY_SYSTEM`, and what only the catalog knows stays unknown.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::status::{Phase, SlotHealth, Status};
use super::upstream::Upstream;
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::pg::Lsn;
use crate::wire::{Connection, Row, Session};

/// Soon after a connection is made, so that the walsender is in the catalog.
const FIRST_AFTER: Duration = Duration::from_secs(2);
/// How often it is decided whether to ask.
const TICK: Duration = Duration::from_secs(10);
/// Ticks between two questions while all is well.
const TICKS_WHEN_WELL: u32 = 6;
/// Longest that the answer may take: the stream must not depend on it.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// The sqlstate of a server that is shutting down (or starting up, which one that streams is not);
/// our errors carry it in parentheses whatever the language of the server's messages.
const CANNOT_CONNECT_NOW: &str = "(57P03)";

/// What the server's catalog said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// End of the WAL the server has on disk.
    pub server_end_lsn: Lsn,
    /// The slot and whether it is waited for; empty when the catalog could not be asked.
    pub slot: SlotHealth,
    /// Oldest WAL the slot keeps; `None` when there is none, or it is not known.
    pub slot_restart_lsn: Option<Lsn>,
    /// Whether somebody streams by the slot, or holds it for another reason; `None` when the catalog could
    /// not be asked.
    pub slot_in_use: Option<bool>,
    /// The server accepts no connections although it streams: it is shutting down.
    pub shutting_down: bool,
    /// Number of the observation; 0 = none yet.
    pub number: u64,
}

impl Observation {
    /// Whether commits wait for the stream, which has told the server the flush position `told`; `None`
    /// when that cannot be said. Until the first position it shows every walsender as `async`, those
    /// that commits wait for as well (`pg_stat_get_wal_senders`).
    #[must_use]
    pub fn commits_wait(&self, told: Lsn) -> Option<bool> {
        let state = self.slot.sync_state.as_deref().filter(|_| told.is_valid())?;
        Some(matches!(state, "sync" | "quorum"))
    }

    /// Whether this may be said of the server that we stream from, which holds our slot while we do. Each
    /// question is a connection of its own, and of several hosts another one may answer it, with a slot of
    /// the same name that nobody uses or with none. Between two timelines ours is free for a moment, and
    /// when the connection has just broken: then the next answer is as good. An answer without the catalog
    /// cannot be told apart; it is one position, and WAL is given up only by what a server says that is met.
    #[must_use]
    pub fn may_be_of_our_stream(&self) -> bool {
        self.slot_in_use != Some(false)
    }
}

/// A task that asks, until dropped.
#[derive(Debug)]
pub struct Watch {
    task: JoinHandle<()>,
    observed: watch::Receiver<Observation>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// Begins to ask about the slot `slot_name`, which must be a slot's name.
    #[must_use]
    pub fn start(
        upstream: &Arc<dyn Upstream>,
        slot_name: &str,
        clock: &Clock,
        status: &Arc<Status>,
    ) -> Self {
        let (sender, observed) = watch::channel(Observation::default());
        let asking = Asking {
            upstream: Arc::clone(upstream),
            slot_name: slot_name.to_owned(),
            clock: clock.clone(),
            status: Arc::clone(status),
            catalog_refused: false,
        };
        Self { task: tokio::spawn(asking.run(sender)), observed }
    }

    /// Waits for the next observation.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn changed(&mut self) -> Observation {
        if self.observed.changed().await.is_err() {
            return std::future::pending().await;
        }
        self.observed.borrow_and_update().clone()
    }
}

struct Asking {
    upstream: Arc<dyn Upstream>,
    slot_name: String,
    clock: Clock,
    status: Arc<Status>,
    catalog_refused: bool,
}

impl Asking {
    async fn run(mut self, sender: watch::Sender<Observation>) {
        tokio::time::sleep(FIRST_AFTER).await;
        let mut number = 0;
        let mut ticks = 0;
        loop {
            let now = self.status.snapshot();
            let troubled =
                now.phase == Phase::WaitingForRepository || now.repository_error.is_some();
            if ticks == 0 || troubled {
                ticks = TICKS_WHEN_WELL;
                match tokio::time::timeout(ANSWER_MAX, self.ask()).await {
                    Ok(Ok(found)) => {
                        number += 1;
                        sender.send_replace(Observation { number, ..found });
                    }
                    Ok(Err(error)) if error.message().contains(CANNOT_CONNECT_NOW) => {
                        number += 1;
                        let (shutting_down, last) = (true, sender.borrow().clone());
                        sender.send_replace(Observation { number, shutting_down, ..last });
                    }
                    Ok(Err(error)) => tracing::debug!("unable to ask about the slot: {error}"),
                    Err(_elapsed) => tracing::debug!("no answer to a question about the slot"),
                }
            }
            ticks -= 1;
            tokio::time::sleep(TICK).await;
        }
    }

    async fn ask(&mut self) -> Result<Observation> {
        if !self.catalog_refused {
            match self.upstream.connect(Session::Database, &self.clock).await {
                Ok(mut connection) => {
                    let observed = connection.observe(&self.slot_name).await;
                    connection.close().await;
                    return observed;
                }
                Err(error) if error.is_transient() => return Err(error),
                Err(error) => {
                    self.catalog_refused = true;
                    tracing::warn!(
                        "the state of the replication slot cannot be watched: {error}; streaming \
                         goes on without"
                    );
                }
            }
        }
        let mut connection = self.upstream.connect(Session::Physical, &self.clock).await?;
        let server_end_lsn = connection.identify_system().await?.flushed_end_lsn;
        connection.close().await;
        Ok(Observation { server_end_lsn, ..Observation::default() })
    }
}

/// Asks the catalog, on an ordinary connection.
///
/// # Errors
/// What the server says; `corrupt` for an answer that is none.
pub(super) async fn observe(connection: &mut Connection, slot_name: &str) -> Result<Observation> {
    let sql = format!(
        "select case when pg_catalog.pg_is_in_recovery() \
         then coalesce(greatest(pg_catalog.pg_last_wal_receive_lsn(), \
         pg_catalog.pg_last_wal_replay_lsn()), '0/0') \
         else pg_catalog.pg_current_wal_flush_lsn() end, \
         s.wal_status, s.safe_wal_size, r.sync_state, s.restart_lsn, s.active \
         from (select 1) as one \
         left join pg_catalog.pg_replication_slots s on s.slot_name = '{slot_name}' \
         left join pg_catalog.pg_stat_replication r on r.pid = s.active_pid"
    );
    let rows = connection.query(&sql).await?;
    let row = rows.first().ok_or_else(|| unexpected("no row"))?;
    decode(row)
}

fn decode(row: &Row) -> Result<Observation> {
    let text = |index| row.get(index).map(|value| value.map(str::to_owned));
    let server_end_lsn = row.get(0)?.unwrap_or("0/0").parse()?;
    let safe_wal_bytes = match row.get(2)? {
        Some(size) => {
            let number = size.parse().ok();
            Some(number.ok_or_else(|| unexpected(&format!("safe_wal_size is '{size}'")))?)
        }
        None => None,
    };
    let slot = SlotHealth { wal_status: text(1)?, safe_wal_bytes, sync_state: text(3)? };
    let slot_restart_lsn = row.get(4)?.map(str::parse).transpose()?;
    let slot_in_use = Some(row.get(5)? == Some("t"));
    Ok(Observation {
        server_end_lsn,
        slot,
        slot_restart_lsn,
        slot_in_use,
        ..Observation::default()
    })
}

/// Shows an observation, and tells when the slot has come into danger.
pub(super) fn take_note(status: &Status, observed: &Observation) {
    let before = status.snapshot().slot.wal_status;
    status.update(|now| {
        now.server_end_lsn = now.server_end_lsn.max(observed.server_end_lsn);
        now.slot = observed.slot.clone();
    });
    if let Some(state) = observed.slot.wal_status.as_deref()
        && matches!(state, "unreserved" | "lost")
        && before.as_deref() != Some(state)
    {
        tracing::error!(
            "the server is about to remove, or has removed, WAL that is not stored yet: the slot is \
             '{state}' (max_slot_wal_keep_size)"
        );
    }
}

fn unexpected(found: &str) -> Error {
    Error::new(Kind::Corrupt, format!("unable to read the state of the replication slot: {found}"))
}

/// Whether `synchronous_standby_names` = `setting` names the application `name`: then commits may
/// wait for us. A superset is fine: it costs requests, not correctness.
#[must_use]
pub fn is_named(setting: &str, name: &str) -> bool {
    let part = |c: char| !(c.is_alphanumeric() || matches!(c, '_' | '$' | '*' | '-' | '.'));
    setting.split(part).any(|word| word == "*" || word.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walsender_that_was_told_nothing_says_nothing_about_waiting() {
        let shown = |state: &str| Observation {
            slot: SlotHealth { sync_state: Some(state.to_owned()), ..SlotHealth::default() },
            ..Observation::default()
        };
        assert_eq!(shown("async").commits_wait(Lsn::INVALID), None);
        assert_eq!(shown("async").commits_wait(Lsn(1)), Some(false));
        assert_eq!(shown("quorum").commits_wait(Lsn(1)), Some(true));
        assert_eq!(Observation::default().commits_wait(Lsn(1)), None);
    }

    #[test]
    fn a_slot_that_nobody_uses_is_not_the_one_we_stream_by() {
        let said = |slot_in_use| {
            Observation { slot_in_use, ..Observation::default() }.may_be_of_our_stream()
        };
        assert!(said(Some(true)) && said(None) && !said(Some(false)));
    }

    #[test]
    fn every_form_of_synchronous_standby_names_is_understood() {
        for yes in ["tidemark", "*", "FIRST 1 (a, tidemark)", "ANY 2 (\"Tidemark\",b,c)", "2 (*)"] {
            assert!(is_named(yes, "tidemark"), "{yes}");
        }
        for no in ["", "tidemark2", "FIRST 1 (tide, mark)", "any 1 (a_tidemark)"] {
            assert!(!is_named(no, "tidemark"), "{no}");
        }
    }
}
