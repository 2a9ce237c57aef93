//! Messages over a transport: a read buffer that messages are sliced from, a write buffer that is
//! emptied whenever the socket takes bytes.
//!
//! # Shape
//! Reads ask for whatever fits in the rest of a buffer of [`READ_BUFFER_BYTES`]. The buffer is given
//! away piece by piece as CopyData bodies; when it is used up a fresh one is made and only the
//! unfinished message at its end is copied.
//!
//! # Cancel safety
//! [`Channel::receive`] and [`Channel::flush`] lose nothing when dropped: what was read is in the
//! read buffer, what was not written is in the write buffer, and both go on with the next call.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWrite};

use super::message::{self, Decoded, Message, Phase};
use super::tls;
use super::transport::Transport;
use crate::error::{Error, Kind, Result};

/// A few WAL messages of 128 KiB: what is copied when a buffer is used up is at most one unfinished
/// message, a small part of this.
const READ_BUFFER_BYTES: usize = 512 << 10;

/// Before we are let in messages are small, and many connections never get further.
const STARTUP_BUFFER_BYTES: usize = 8 << 10;

/// A fresh buffer is made when less than this is left of the old one.
const READ_BYTES_MIN: usize = 8 << 10;

/// A framed connection.
pub(super) struct Channel {
    transport: Box<dyn Transport>,
    phase: Phase,
    read: BytesMut,
    write: BytesMut,
    /// Bytes were handed to the transport and may still sit in a TLS buffer.
    flush_due: bool,
    /// Why writing failed. Reading goes on, because the server's parting words tell more.
    write_error: Option<io::Error>,
}

impl Channel {
    pub(super) fn new(transport: Box<dyn Transport>) -> Self {
        Self {
            transport,
            phase: Phase::Startup,
            read: BytesMut::with_capacity(STARTUP_BUFFER_BYTES),
            write: BytesMut::new(),
            flush_due: false,
            write_error: None,
        }
    }

    /// From now on the other side is a server that has let us in.
    pub(super) fn begin_session(&mut self) {
        self.phase = Phase::Session;
    }

    /// Where to encode messages; they leave with [`Channel::flush`] or while receiving.
    pub(super) fn outgoing(&mut self) -> &mut BytesMut {
        &mut self.write
    }

    /// Writes everything out. A broken connection is not an error here: the next
    /// [`Channel::receive`] says what the server said last, or that the connection broke.
    pub(super) async fn flush(&mut self) {
        poll_fn(|cx| self.poll_write_out(cx)).await;
    }

    /// The next message.
    ///
    /// # Errors
    /// `unavailable` when the connection broke; `corrupt` for what is no message.
    pub(super) async fn receive(&mut self) -> Result<Message> {
        poll_fn(|cx| self.poll_receive(cx)).await
    }

    fn poll_receive(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<Message>> {
        loop {
            let missing = match message::decode(&mut self.read, self.phase)? {
                Decoded::Message(message) => return Poll::Ready(Ok(message)),
                Decoded::Missing(count) => count,
            };
            // Registers for writing as well, so a full socket never keeps a status from leaving.
            let _still_writing = self.poll_write_out(cx).is_pending();
            let count = match ready!(self.poll_read_in(cx, missing)) {
                Ok(count) => count,
                Err(error) => return Poll::Ready(Err(self.broken(Some(error)))),
            };
            if count == 0 {
                return Poll::Ready(Err(self.broken(None)));
            }
        }
    }

    fn poll_read_in(
        &mut self,
        cx: &mut TaskContext<'_>,
        missing: usize,
    ) -> Poll<io::Result<usize>> {
        let spare = self.read.capacity() - self.read.len();
        if spare < missing.max(READ_BYTES_MIN) {
            let buffer = match self.phase {
                Phase::Startup => STARTUP_BUFFER_BYTES,
                Phase::Session => READ_BUFFER_BYTES,
            };
            self.read.reserve(missing.max(buffer.saturating_sub(self.read.len())));
        }
        // The future holds nothing of its own, so a fresh one at every poll loses nothing.
        let reading = self.transport.read_buf(&mut self.read);
        std::pin::pin!(reading).poll(cx)
    }

    fn poll_write_out(&mut self, cx: &mut TaskContext<'_>) -> Poll<()> {
        match self.poll_write_all(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => Poll::Ready(()),
            Poll::Ready(Err(error)) => {
                self.write.clear();
                self.flush_due = false;
                self.write_error.get_or_insert(error);
                Poll::Ready(())
            }
        }
    }

    fn poll_write_all(&mut self, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        while !self.write.is_empty() {
            let count = ready!(Pin::new(&mut self.transport).poll_write(cx, &self.write))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.write.advance(count);
            self.flush_due = true;
        }
        if self.flush_due {
            ready!(Pin::new(&mut self.transport).poll_flush(cx))?;
            self.flush_due = false;
        }
        Poll::Ready(Ok(()))
    }

    fn broken(&mut self, read_error: Option<io::Error>) -> Error {
        let error = read_error.or(self.write_error.take());
        if let Some(refused) = error.as_ref().and_then(tls::refusal) {
            return refused;
        }
        let why = error.map(|error| format!(": {error}")).unwrap_or_default();
        Error::new(Kind::Unavailable, format!("the server closed the connection unexpectedly{why}"))
            .hint("The server's log says why, or the network between broke.")
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("phase", &self.phase).finish_non_exhaustive()
    }
}
