//! The thread that compresses and seals extents, so that no tokio worker does.
//!
//! Orders go in through a bounded queue in the order of the WAL, sealed extents come out in the same
//! order. What the thread holds is visible without asking it ([`Sealer::held_bytes`]).
//!
//! A simulation asks for no thread: then the same work is done in place, at the call that orders it,
//! so that nothing depends on how fast a thread is.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::intake::CutExtent;
use super::uploads::Upload;
use crate::error::{Context, Error, Kind, Result};
use crate::pg::{Lsn, TimelineId};
use crate::repo::Level;
use crate::repo::{ExtentBuilder, Writer};

/// Pieces that may wait for the thread: 1 MiB at PostgreSQL's 128 KiB a message, a few milliseconds
/// of compression.
const ORDERS_MAX: usize = 8;

/// Below this a sealed extent is copied out of the buffer it was made in, which has room for a
/// megabyte more.
const SMALL_BYTES: usize = 1 << 20;

/// Where the pieces of an extent belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Timeline of the WAL.
    pub timeline: TimelineId,
    /// Position of the first byte of the piece.
    pub start: Lsn,
}

enum Order {
    Push(Place, Bytes),
    Finish(CutExtent, u64),
}

/// A thread that seals extents; it ends when this is dropped.
#[derive(Debug)]
pub struct Sealer {
    place: Workplace,
    held_bytes: Arc<AtomicU64>,
    cuts_pending: usize,
}

/// Where extents are sealed.
#[derive(Debug)]
enum Workplace {
    Thread { orders: mpsc::Sender<Order>, sealed: mpsc::Receiver<Result<Upload>> },
    InPlace { bench: Box<Bench>, sealed: VecDeque<Upload> },
}

/// What is needed to seal, and the extent being filled.
#[derive(Debug)]
struct Bench {
    writer: Writer,
    level: Level,
    filling: Option<ExtentBuilder>,
    held_bytes: Arc<AtomicU64>,
}

impl Sealer {
    /// Starts the thread; one is all it takes, and with a `thread_count` of 0 there is none.
    ///
    /// # Errors
    /// `unavailable` when the system refuses a thread.
    pub fn start(writer: Writer, level: Level, thread_count: usize) -> Result<Self> {
        let held_bytes = Arc::new(AtomicU64::new(0));
        let bench = Bench { writer, level, filling: None, held_bytes: Arc::clone(&held_bytes) };
        if thread_count == 0 {
            let place = Workplace::InPlace { bench: Box::new(bench), sealed: VecDeque::new() };
            return Ok(Self { place, held_bytes, cuts_pending: 0 });
        }
        let (orders, todo) = mpsc::channel(ORDERS_MAX);
        let (done, sealed) = mpsc::channel(ORDERS_MAX);
        thread::Builder::new()
            .name("tm-seal".to_owned())
            .spawn(move || work(bench, todo, &done))
            .context(|| "unable to start the sealing thread")?;
        Ok(Self { place: Workplace::Thread { orders, sealed }, held_bytes, cuts_pending: 0 })
    }

    /// Bytes held for the extent being filled.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes.load(Ordering::Relaxed)
    }

    /// Extents cut and not yet given by [`Sealer::next`].
    #[must_use]
    pub fn cuts_pending(&self) -> usize {
        self.cuts_pending
    }

    /// Appends a piece to the extent being filled; extents that are sealed meanwhile go to `sealed`,
    /// so that thread and caller never wait for each other.
    ///
    /// # Errors
    /// As [`Sealer::next`].
    pub async fn push(
        &mut self,
        place: Place,
        piece: Bytes,
        sealed: &mut Vec<Upload>,
    ) -> Result<()> {
        self.order(Order::Push(place, piece), sealed).await
    }

    /// Ends the extent being filled; `chain` is handed through.
    ///
    /// # Errors
    /// As [`Sealer::next`].
    pub async fn finish(
        &mut self,
        extent: CutExtent,
        chain: u64,
        sealed: &mut Vec<Upload>,
    ) -> Result<()> {
        self.cuts_pending += 1;
        self.order(Order::Finish(extent, chain), sealed).await
    }

    async fn order(&mut self, order: Order, ready: &mut Vec<Upload>) -> Result<()> {
        let (orders, sealed) = match &mut self.place {
            Workplace::Thread { orders, sealed } => (orders, sealed),
            Workplace::InPlace { bench, sealed } => {
                sealed.extend(bench.execute(order)?);
                return Ok(());
            }
        };
        loop {
            tokio::select! {
                place = orders.reserve() => {
                    place.map_err(gone)?.send(order);
                    return Ok(());
                }
                Some(upload) = sealed.recv() => {
                    self.cuts_pending = self.cuts_pending.saturating_sub(1);
                    ready.push(upload?);
                }
            }
        }
    }

    /// The next sealed extent; waits for ever when none was cut.
    ///
    /// # Errors
    /// `bug` when the thread was asked for the impossible, `unavailable` without memory.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Upload> {
        let upload = match &mut self.place {
            Workplace::Thread { sealed, .. } => sealed.recv().await.ok_or_else(|| gone(()))??,
            Workplace::InPlace { sealed, .. } => match sealed.pop_front() {
                Some(upload) => upload,
                None => return std::future::pending().await,
            },
        };
        self.cuts_pending = self.cuts_pending.saturating_sub(1);
        Ok(upload)
    }
}

fn gone<T>(_: T) -> Error {
    Error::new(Kind::Bug, "the sealing thread has ended")
}

fn work(mut bench: Bench, mut todo: mpsc::Receiver<Order>, done: &mpsc::Sender<Result<Upload>>) {
    while let Some(order) = todo.blocking_recv() {
        match bench.execute(order) {
            Ok(None) => {}
            Ok(Some(upload)) => {
                if done.blocking_send(Ok(upload)).is_err() {
                    return;
                }
            }
            Err(error) => {
                // Whoever asks next is told; there is nobody left to tell if that fails.
                drop(done.blocking_send(Err(error)));
                return;
            }
        }
    }
}

impl Bench {
    fn execute(&mut self, order: Order) -> Result<Option<Upload>> {
        let sealed = match order {
            Order::Push(place, piece) => self.push(place, piece).map(|()| None),
            Order::Finish(extent, chain) => self.finish(extent, chain).map(Some),
        };
        let held = self.filling.as_ref().map_or(0, ExtentBuilder::held_bytes);
        self.held_bytes.store(held as u64, Ordering::Relaxed);
        sealed
    }

    fn push(&mut self, place: Place, piece: Bytes) -> Result<()> {
        let mut filling = match self.filling.take() {
            Some(filling) => filling,
            None => ExtentBuilder::new(&self.writer, place.timeline, place.start, self.level)?,
        };
        assert!(filling.end() == place.start, "a piece does not follow on in its extent");
        filling.push(piece)?;
        self.filling = Some(filling);
        Ok(())
    }

    fn finish(&mut self, extent: CutExtent, chain: u64) -> Result<Upload> {
        let empty = || Error::new(Kind::Bug, "an extent was ended that was never begun");
        let filled = self.filling.take().ok_or_else(empty)?;
        let extent_end = extent.cut.range.end();
        assert!(filled.end() == extent_end, "an extent does not hold what it is called");
        let mut sealed = filled.finish(extent.cut.greatest_time)?;
        // A small extent in a buffer made for a large one would be counted for what it holds.
        if sealed.body.len() < SMALL_BYTES {
            sealed.body = Bytes::copy_from_slice(&sealed.body);
        }
        Ok(Upload { sealed, extent, chain })
    }
}
