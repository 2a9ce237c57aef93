//! The walsender's commands that answer with a result set.

use bytes::Bytes;

use crate::error::Result;
use crate::pg::{Lsn, SegmentSize, SystemId, TimelineId};

use super::Connection;

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

impl Connection {
    /// Which cluster, timeline and position the server is at.
    ///
    /// # Errors
    /// What the server says; `corrupt` for an answer that is no identification.
    pub async fn identify_system(&mut self) -> Result<SystemIdentification> {
        todo!()
    }

    /// The value of a server setting.
    ///
    /// # Errors
    /// `not found` when the server knows no such setting.
    pub async fn show(&mut self, name: &str) -> Result<String> {
        let _ = name;
        todo!()
    }

    /// The size of the server's WAL segments.
    ///
    /// # Errors
    /// As [`Connection::show`].
    pub async fn segment_size(&mut self) -> Result<SegmentSize> {
        todo!()
    }

    /// Creates a permanent physical slot that keeps WAL from now on.
    ///
    /// # Errors
    /// `conflict` when a slot of that name exists; `config` when the server has no free slot.
    pub async fn create_slot(&mut self, name: &str) -> Result<()> {
        let _ = name;
        todo!()
    }

    /// The slot, or `None` when there is none of that name.
    ///
    /// # Errors
    /// `conflict` when a logical slot has that name.
    pub async fn read_slot(&mut self, name: &str) -> Result<Option<Slot>> {
        let _ = name;
        todo!()
    }

    /// Drops a slot.
    ///
    /// # Errors
    /// `not found` when there is none; `conflict` when it is in use.
    pub async fn drop_slot(&mut self, name: &str) -> Result<()> {
        let _ = name;
        todo!()
    }

    /// File name and content of a timeline's history file.
    ///
    /// # Errors
    /// `not found` when the server has no such file (timeline 1 never has one).
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<(String, Bytes)> {
        let _ = timeline;
        todo!()
    }
}
