//! The walsender's commands that answer with a result set: who it is, settings, slots, timelines.
//!
//! # Source
//! `src/backend/replication/{repl_gram.y,walsender.c}`, PostgreSQL 13 to 18.

use std::time::Duration;

use bytes::Bytes;

use super::connection::{Connection, Session};
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, SegmentSize, SystemId, TimelineId};

/// A backend that ended a moment ago still holds its slot; how often to look again.
const SLOT_RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// The answer to `IDENTIFY_SYSTEM`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemIdentification {
    /// Which cluster this is.
    pub system_id: SystemId,
    /// The server's current timeline (of a standby: the one it replays).
    pub timeline: TimelineId,
    /// End of the WAL the server holds on disk (of a standby: received or replayed).
    pub flushed_end_lsn: Lsn,
}

/// A physical replication slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Oldest WAL the slot keeps; `None` before it was ever reserved, or once it was invalidated.
    pub restart_lsn: Option<Lsn>,
    /// The timeline of `restart_lsn`; `None` when unknown (always before PostgreSQL 15).
    pub restart_timeline: Option<TimelineId>,
}

/// How long a slot lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotLife {
    /// Until it is dropped: it keeps WAL while nobody is connected.
    Permanent,
    /// As long as the connection that made it.
    Temporary,
}

impl Connection {
    /// Which cluster, timeline and position the server is at.
    ///
    /// # Errors
    /// What the server says; `corrupt` for an answer that is no identification.
    pub async fn identify_system(&mut self) -> Result<SystemIdentification> {
        let row = self.query_one("IDENTIFY_SYSTEM").await?;
        Ok(SystemIdentification {
            system_id: row.parse(0)?,
            timeline: timeline(row.parse(1)?)?,
            flushed_end_lsn: row.parse(2)?,
        })
    }

    /// The value of a server setting.
    ///
    /// # Errors
    /// `not found` when the server knows no such setting.
    pub async fn show(&mut self, name: &str) -> Result<String> {
        let quoted: Vec<String> = name.split('.').map(quote_name).collect();
        let row = self.query_one(&format!("SHOW {}", quoted.join("."))).await?;
        Ok(row.text(0)?.to_owned())
    }

    /// The size of the server's WAL segments.
    ///
    /// # Errors
    /// As [`Connection::show`].
    pub async fn segment_size(&mut self) -> Result<SegmentSize> {
        let text = self.show("wal_segment_size").await?;
        parse_size_bytes(&text)
            .and_then(|bytes| u32::try_from(bytes).ok())
            .and_then(SegmentSize::new)
            .ok_or_else(|| {
                Error::new(Kind::Corrupt, format!("the server's wal_segment_size is '{text}'"))
            })
    }

    /// Creates a physical slot that keeps WAL from now on.
    ///
    /// # Errors
    /// `conflict` when a slot of that name exists; `config` when the server has no free slot.
    pub async fn create_slot(&mut self, name: &str, life: SlotLife) -> Result<()> {
        let option = if self.version().major() >= 15 { "(RESERVE_WAL)" } else { "RESERVE_WAL" };
        let name = quote_name(name);
        let life = if life == SlotLife::Temporary { "TEMPORARY " } else { "" };
        self.query_one(&format!("CREATE_REPLICATION_SLOT {name} {life}PHYSICAL {option}")).await?;
        Ok(())
    }

    /// The slot, or `None` when there is none of that name. A replication connection to PostgreSQL 13
    /// or 14 cannot say, so an ordinary one to the same host is opened for the question.
    ///
    /// # Errors
    /// `conflict` when a logical slot has that name.
    pub async fn read_slot(&mut self, name: &str) -> Result<Option<Slot>> {
        let row = match self.session() {
            Session::Physical if self.version().major() >= 15 => {
                let command = format!("READ_REPLICATION_SLOT {}", quote_name(name));
                let asked = self.query_one(&command).await;
                Some(asked.map_err(|error| match error.kind() {
                    Kind::Unsupported => error.with_kind(Kind::Conflict),
                    _ => error,
                })?)
            }
            Session::Physical => {
                let (options, clock) = (self.options().clone(), self.clock().clone());
                let mut other = Connection::connect(&options, Session::Database, &clock)
                    .await
                    .map_err(|error| {
                        error.context(format!(
                            "unable to read slot '{name}' of a server before PostgreSQL 15 without \
                             an ordinary connection"
                        ))
                    })?;
                let row = other.query_slot(name).await?;
                other.close().await;
                row
            }
            Session::Database => self.query_slot(name).await?,
        };
        let Some(row) = row.filter(|row| matches!(row.get(0), Ok(Some(_)))) else {
            return Ok(None);
        };
        if row.text(0)? != "physical" {
            return Err(Error::new(Kind::Conflict, format!("slot '{name}' is a logical one"))
                .hint("Choose another slot name."));
        }
        let restart_lsn = row.get(1)?.map(|_| row.parse(1)).transpose()?;
        let restart_timeline = match row.get(2)? {
            Some(_) => Some(timeline(row.parse(2)?)?),
            None => None,
        };
        Ok(Some(Slot { restart_lsn, restart_timeline }))
    }

    async fn query_slot(&mut self, name: &str) -> Result<Option<super::Row>> {
        let sql = format!(
            "SELECT slot_type, restart_lsn, NULL FROM pg_catalog.pg_replication_slots \
             WHERE slot_name = {}",
            quote_text(name)
        );
        Ok(self.query(&sql).await?.pop())
    }

    /// Drops a slot; one that is in use is waited for, up to the read time-out.
    ///
    /// # Errors
    /// `not found` when there is none; `conflict` when it stays in use.
    pub async fn drop_slot(&mut self, name: &str) -> Result<()> {
        let command = format!("DROP_REPLICATION_SLOT {}", quote_name(name));
        let deadline = self.clock().instant() + self.options().read_timeout;
        loop {
            match self.query(&command).await {
                Ok(_) => return Ok(()),
                Err(error)
                    if error.kind() == Kind::Conflict && self.clock().instant() < deadline =>
                {
                    tokio::time::sleep(SLOT_RETRY_INTERVAL).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// File name and content of a timeline's history file.
    ///
    /// # Errors
    /// `not found` when the server has no such file (timeline 1 never has one).
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<(String, Bytes)> {
        let row = self.query_one(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let content = row.bytes(1)?.cloned().unwrap_or_default();
        // The row is a slice of the whole read buffer; a history is small and kept for long.
        Ok((row.text(0)?.to_owned(), Bytes::copy_from_slice(&content)))
    }
}

/// A timeline as servers write it: some as a signed number.
pub(super) fn timeline(number: i64) -> Result<TimelineId> {
    u32::try_from(number)
        .ok()
        .or_else(|| i32::try_from(number).ok().map(i32::cast_unsigned))
        .and_then(TimelineId::new)
        .ok_or_else(|| Error::new(Kind::Corrupt, format!("the server names timeline {number}")))
}

/// A name as replication commands and SQL take it.
pub(super) fn quote_name(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text as replication commands and SQL (with `standard_conforming_strings`) take it.
pub(super) fn quote_text(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// `16MB` and the like, as `SHOW` writes sizes.
fn parse_size_bytes(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    let factor = match unit {
        "" | "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_timelines_are_read_as_servers_write_them() {
        assert_eq!(parse_size_bytes("16MB"), Some(16 << 20));
        assert_eq!(parse_size_bytes("1GB"), Some(1 << 30));
        assert_eq!(parse_size_bytes("16777216"), Some(16 << 20));
        assert_eq!(parse_size_bytes("16 MB"), None);
        assert_eq!(timeline(-1).unwrap().get(), u32::MAX);
        assert!(timeline(0).is_err() && timeline(1 << 40).is_err());
    }

    #[test]
    fn names_and_texts_cannot_break_out_of_their_quotes() {
        assert_eq!(quote_name("a\"b"), "\"a\"\"b\"");
        assert_eq!(quote_text("it's"), "'it''s'");
    }
}
