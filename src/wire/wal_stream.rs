//! `START_REPLICATION PHYSICAL`: WAL as it is written, and our word on how far we hold it.
//!
//! # Invariants
//! Pieces of WAL follow each other without a gap, beginning exactly where we asked. No position is
//! told to the server but those of [`WalStream::send_status`].
//!
//! # Source
//! `StartReplication`, `XLogSendPhysical`, `WalSndKeepalive`, `ProcessStandbyReplyMessage` in
//! `src/backend/replication/walsender.c`, PostgreSQL 13 to 18.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::frontend::{self, CopyData};

use super::connection::{Connection, Row, silent, unexpected};
use super::message::Message;
use super::replication::{quote_name, timeline as read_timeline};
use crate::clock::Instant;
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, PgTime, TimelineId};

/// Bytes of a status message.
const STATUS_BYTES: usize = 1 + 8 + 8 + 8 + 8 + 1;

/// What a walsender says.
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// Where in the dialogue we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// WAL comes.
    Streaming,
    /// The server has sent everything; its word on what follows comes next.
    Ending(Option<(TimelineId, Lsn)>),
    /// The server is ready for another command.
    Over,
}

/// A running WAL stream.
#[derive(Debug)]
pub struct WalStream {
    connection: Connection,
    state: State,
    /// Where the next piece of WAL must begin.
    next_start_lsn: Lsn,
    /// What the server was told last, to be repeated when it is asked for a sign of life.
    told: StandbyStatus,
    heard_at: Instant,
    /// When the server was asked for a sign of life, if it has been silent since.
    asked_at: Option<Instant>,
}

impl Connection {
    /// Starts streaming `timeline` at `start`, through `slot` if one is named.
    ///
    /// # Errors
    /// `not found` when the WAL was removed, the slot does not exist, or it was invalidated (the WAL
    /// it kept is gone either way); `conflict` when the slot is in use, or the server's history does
    /// not hold `start`. Some of these come with the first event only.
    pub async fn start_replication(
        mut self,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<WalStream> {
        let through = slot.map(|name| format!("SLOT {} ", quote_name(name))).unwrap_or_default();
        let command = format!("START_REPLICATION {through}PHYSICAL {start} TIMELINE {timeline}");
        self.begin_command(&command).await?;
        let silence_max = Some(self.options().read_timeout);
        let state = match self.receive(silence_max).await? {
            Message::CopyBothResponse => State::Streaming,
            // The timeline ends exactly where we want to begin.
            Message::RowDescription => State::Ending(None),
            Message::ErrorResponse(error) => return Err(self.fail_command(error).await),
            other => return Err(unexpected(&other)),
        };
        let heard_at = self.clock().instant();
        Ok(WalStream {
            connection: self,
            state,
            next_start_lsn: start,
            told: StandbyStatus::default(),
            heard_at,
            asked_at: None,
        })
    }
}

impl WalStream {
    /// The next event. After `TimelineEnded` only [`WalStream::finish`] makes sense.
    ///
    /// A server that is silent for half the read time-out is asked for a sign of life; that repeats
    /// the status told last. A keepalive that wants a reply is answered by the caller, who knows how
    /// far we are.
    ///
    /// # Errors
    /// `unavailable` when the connection broke, was silent for too long, or the server shuts down
    /// (having sent all its WAL); `not found` when it removed WAL we still needed; `conflict` when
    /// its history does not hold our position; `corrupt` when the pieces do not fit.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped: the next call goes on where this one was.
    pub async fn next(&mut self) -> Result<WalEvent> {
        loop {
            let message = self.receive().await?;
            if let Some(event) = self.read(message)? {
                return Ok(event);
            }
        }
    }

    /// Tells the server how far we are.
    ///
    /// # Durability
    /// The server forgets WAL before `durable_end_lsn` and lets synchronous commits before it
    /// return: it must never be past the end of what is durable.
    ///
    /// # Errors
    /// `bug` for a durable position past the received one. A broken connection shows in the next
    /// call of [`WalStream::next`], with what the server said last.
    ///
    /// # Cancel safety
    /// A status that was begun is completed by the next call of any method.
    pub async fn send_status(&mut self, status: StandbyStatus) -> Result<()> {
        if status.durable_end_lsn > status.written_end_lsn {
            return Err(Error::new(
                Kind::Bug,
                format!(
                    "a durable position {} past the received one {}",
                    status.durable_end_lsn, status.written_end_lsn
                ),
            ));
        }
        if self.state != State::Streaming {
            return Ok(());
        }
        self.put_status(status)?;
        self.told = StandbyStatus { reply_requested: false, ..status };
        self.connection.channel().flush().await;
        Ok(())
    }

    /// Ends the stream politely and gives the connection back for further commands.
    ///
    /// # Errors
    /// `unavailable` when the connection broke, or the server did not answer in time.
    pub async fn finish(mut self) -> Result<Connection> {
        let limit = self.connection.options().read_timeout;
        match tokio::time::timeout(limit, self.end()).await {
            Ok(ended) => ended.map(|()| self.connection),
            Err(_elapsed) => Err(silent(limit)),
        }
    }

    async fn end(&mut self) -> Result<()> {
        if self.state == State::Streaming {
            frontend::copy_done(self.connection.channel().outgoing());
            self.connection.channel().flush().await;
        }
        while self.state != State::Over {
            match self.connection.receive(None).await? {
                Message::ReadyForQuery => {
                    self.connection.end_command();
                    self.state = State::Over;
                }
                Message::ErrorResponse(error) => return Err(self.connection.server_error(error)),
                // WAL that was under way, and the server's CopyDone.
                _ => {}
            }
        }
        Ok(())
    }

    /// The next message, with a question when the server is silent for half the time-out and an
    /// error when it stays so.
    async fn receive(&mut self) -> Result<Message> {
        let limit = self.connection.options().read_timeout;
        loop {
            let since = self.asked_at.unwrap_or(self.heard_at);
            let deadline = since + limit / 2;
            // Polls the connection first: what has arrived is read, however long nobody looked.
            match tokio::time::timeout_at(deadline, self.connection.receive(None)).await {
                Ok(message) => {
                    self.heard_at = self.connection.clock().instant();
                    self.asked_at = None;
                    return message;
                }
                Err(_elapsed) if self.asked_at.is_some() => return Err(silent(limit)),
                Err(_elapsed) => self.ask_for_life(limit)?,
            }
        }
    }

    fn ask_for_life(&mut self, limit: Duration) -> Result<()> {
        if self.state != State::Streaming {
            return Err(silent(limit));
        }
        // No await: it leaves while the next message is waited for.
        self.put_status(StandbyStatus { reply_requested: true, ..self.told })?;
        self.asked_at = Some(self.connection.clock().instant());
        Ok(())
    }

    fn put_status(&mut self, status: StandbyStatus) -> Result<()> {
        let now = PgTime::from_timestamp(self.connection.clock().now());
        let message = encode_status(status, now);
        CopyData::new(message.freeze())
            .map_err(|error| Error::new(Kind::Bug, format!("unable to encode a status: {error}")))?
            .write(self.connection.channel().outgoing());
        Ok(())
    }

    fn read(&mut self, message: Message) -> Result<Option<WalEvent>> {
        match (self.state, message) {
            (State::Streaming, Message::CopyData(data)) => {
                let event = decode(data)?;
                if let WalEvent::Wal { start_lsn, data, .. } = &event {
                    self.advance(*start_lsn, data.len())?;
                }
                Ok(Some(event))
            }
            (State::Streaming, Message::CopyDone) => {
                // Leaves while the rest of the answer is waited for.
                frontend::copy_done(self.connection.channel().outgoing());
                self.state = State::Ending(None);
                Ok(None)
            }
            (State::Streaming, Message::CommandComplete) => Err(Error::new(
                Kind::Unavailable,
                "the server is shutting down and has sent all its WAL",
            )),
            (_, Message::ErrorResponse(error)) => Err(self.connection.server_error(error)),
            (State::Ending(_), Message::RowDescription | Message::CommandComplete) => Ok(None),
            (State::Ending(_), Message::DataRow(columns)) => {
                let row = Row::new(columns);
                let next = (read_timeline(row.parse(0)?)?, row.parse(1)?);
                self.state = State::Ending(Some(next));
                Ok(None)
            }
            (State::Ending(next), Message::ReadyForQuery) => {
                self.connection.end_command();
                self.state = State::Over;
                let (next_timeline, next_start_lsn) = next.ok_or_else(|| {
                    Error::new(
                        Kind::Corrupt,
                        "the server ended the timeline without naming the next",
                    )
                })?;
                Ok(Some(WalEvent::TimelineEnded { next_timeline, next_start_lsn }))
            }
            (_, other) => Err(unexpected(&other)),
        }
    }

    /// Pieces must follow each other.
    fn advance(&mut self, start_lsn: Lsn, len: usize) -> Result<()> {
        let expected = self.next_start_lsn;
        let end = u64::try_from(len).ok().and_then(|len| start_lsn.checked_add(len));
        match end {
            Some(end) if start_lsn == expected => {
                self.next_start_lsn = end;
                Ok(())
            }
            _ => Err(Error::new(
                Kind::Corrupt,
                format!(
                    "the server sent {len} bytes of WAL at {start_lsn}, expected at {expected}"
                ),
            )),
        }
    }
}

/// A status as the server takes it.
fn encode_status(status: StandbyStatus, now: PgTime) -> BytesMut {
    let mut message = BytesMut::with_capacity(STATUS_BYTES);
    message.put_u8(b'r');
    message.put_u64(status.written_end_lsn.0);
    message.put_u64(status.durable_end_lsn.0);
    message.put_u64(status.applied_end_lsn.0);
    message.put_i64(now.0);
    message.put_u8(u8::from(status.reply_requested));
    message
}

/// What is inside a CopyData message of a walsender.
pub(super) fn decode(mut data: Bytes) -> Result<WalEvent> {
    let cut_short = |_short| Error::new(Kind::Corrupt, "a message of the WAL stream is cut short");
    match data.try_get_u8().map_err(cut_short)? {
        b'w' => {
            let start_lsn = Lsn(data.try_get_u64().map_err(cut_short)?);
            let server_end_lsn = Lsn(data.try_get_u64().map_err(cut_short)?);
            let server_time = PgTime(data.try_get_i64().map_err(cut_short)?);
            Ok(WalEvent::Wal { start_lsn, server_end_lsn, server_time, data })
        }
        b'k' => Ok(WalEvent::Keepalive {
            server_end_lsn: Lsn(data.try_get_u64().map_err(cut_short)?),
            server_time: PgTime(data.try_get_i64().map_err(cut_short)?),
            reply_requested: data.try_get_u8().map_err(cut_short)? != 0,
        }),
        kind => Err(Error::new(
            Kind::Corrupt,
            format!("a message of type {:?} in the WAL stream", char::from(kind)),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wal_is_a_slice_of_its_message() {
        let mut message = BytesMut::new();
        message.put_u8(b'w');
        message.put_u64(0x100);
        message.put_u64(0x200);
        message.put_i64(-5);
        message.put_slice(b"wal");
        let message = message.freeze();
        let place = message.as_ptr() as usize;
        let WalEvent::Wal { start_lsn, server_end_lsn, server_time, data } =
            decode(message).unwrap()
        else {
            panic!("no WAL");
        };
        assert_eq!((start_lsn, server_end_lsn, server_time), (Lsn(0x100), Lsn(0x200), PgTime(-5)));
        assert_eq!((&data[..], data.as_ptr() as usize), (&b"wal"[..], place + 25));
    }

    #[test]
    fn a_status_is_what_process_standby_reply_message_reads() {
        let status = StandbyStatus {
            written_end_lsn: Lsn(3),
            durable_end_lsn: Lsn(2),
            applied_end_lsn: Lsn(1),
            reply_requested: true,
        };
        let encoded = encode_status(status, PgTime(9));
        assert_eq!(encoded.len(), STATUS_BYTES);
        assert_eq!(&encoded[..9], b"r\0\0\0\0\0\0\0\x03");
        assert_eq!(encoded[32..], [9, 1]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_event_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode(Bytes::from(bytes));
        }
    }
}
