//! `START_REPLICATION PHYSICAL`: WAL as it is written, and our word on how far we hold it.

use bytes::Bytes;

use crate::error::Result;
use crate::pg::{Lsn, PgTime, TimelineId};

use super::Connection;

/// What a walsender says.
#[derive(Clone, Debug)]
pub enum WalEvent {
    /// A piece of WAL.
    Wal {
        /// Position of the first byte of `data`.
        start_lsn: Lsn,
        /// End of the WAL on the server when it sent this.
        server_end_lsn: Lsn,
        /// The server's clock when it sent this.
        server_time: PgTime,
        /// The WAL: a slice of the read buffer, at most 128 KiB, not aligned to anything.
        data: Bytes,
    },
    /// A sign of life.
    Keepalive {
        /// End of the WAL the server has sent us.
        server_end_lsn: Lsn,
        /// The server's clock when it sent this.
        server_time: PgTime,
        /// Whether the server wants a status at once, lest it hang up.
        reply_requested: bool,
    },
    /// The server has sent all of the timeline that was asked for; the stream is over.
    TimelineEnded {
        /// The timeline that follows in the server's history.
        next_timeline: TimelineId,
        /// Where it follows: end of our timeline's part.
        next_start_lsn: Lsn,
    },
}

/// How far we are, as told to the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StandbyStatus {
    /// End of the WAL received; never behind `durable_end_lsn`.
    pub written_end_lsn: Lsn,
    /// End of the WAL that is durable: what the slot may forget, and what a synchronous COMMIT
    /// waits for.
    pub durable_end_lsn: Lsn,
    /// End of the WAL applied: what `synchronous_commit = remote_apply` waits for.
    pub applied_end_lsn: Lsn,
    /// Asks the server for a keepalive.
    pub reply_requested: bool,
}

/// A running WAL stream.
#[derive(Debug)]
pub struct WalStream {
    _private: (),
}

impl Connection {
    /// Starts streaming `timeline` at `start`, through `slot` if one is named.
    ///
    /// # Errors
    /// `not found` when the WAL was removed or the slot does not exist, `conflict` when the slot is
    /// in use, `corrupt` when the slot was invalidated.
    pub async fn start_replication(
        self,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<WalStream> {
        let _ = (slot, start, timeline);
        todo!()
    }
}

impl WalStream {
    /// The next event. After `TimelineEnded` only [`WalStream::finish`] makes sense.
    ///
    /// # Errors
    /// `unavailable` when the connection broke, was silent for too long, or the server shut down.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped: the next call goes on where this one was.
    pub async fn next(&mut self) -> Result<WalEvent> {
        todo!()
    }

    /// Tells the server how far we are.
    ///
    /// # Errors
    /// `unavailable` when the connection broke.
    ///
    /// # Cancel safety
    /// A status that was begun is completed by the next call of any method.
    pub async fn send_status(&mut self, status: StandbyStatus) -> Result<()> {
        let _ = status;
        todo!()
    }

    /// Ends the stream politely and gives the connection back for further commands.
    ///
    /// # Errors
    /// `unavailable` when the connection broke.
    pub async fn finish(self) -> Result<Connection> {
        todo!()
    }
}
