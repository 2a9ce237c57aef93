//! The server as the stream needs it: what is asked, what is told, what arrives.
//!
//! A PostgreSQL server behind [`ConnectOptions`] is the one implementation of the product. The traits
//! are here so that a simulation can put a server of its own in that place and run the engine's
//! decisions with a seed, without a network and without a protocol.
//!
//! # Invariants
//! Whatever stands here keeps the promises of [`Connection`] and [`WalStream`]: pieces of WAL follow
//! each other without a hole, and dropping the future of [`Sending::next`] loses nothing.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;

use super::relief::{self, SlotMove};
use super::watch::{self, Observation};
use crate::clock::Clock;
use crate::error::Result;
use crate::pg::{Lsn, SegmentSize, SystemId, TimelineId};
use crate::wire::{
    ConnectOptions, Connection, Session, Slot, SlotLife, StandbyStatus, SystemIdentification,
    WalEvent, WalStream,
};

/// Where WAL comes from.
#[async_trait]
pub trait Upstream: Send + Sync + fmt::Debug {
    /// A new connection.
    async fn connect(&self, session: Session, clock: &Clock) -> Result<Box<dyn Walsender>>;
}

/// An open connection; each method is the one of [`Connection`] with its name.
#[async_trait]
pub trait Walsender: Send + Sync + fmt::Debug {
    /// Which cluster, timeline and position.
    async fn identify_system(&mut self) -> Result<SystemIdentification>;
    /// The size of a WAL segment.
    async fn segment_size(&mut self) -> Result<SegmentSize>;
    /// The value of a setting.
    async fn show(&mut self, name: &str) -> Result<String>;
    /// A setting that the server reported by itself.
    fn parameter(&self, name: &str) -> Option<&str>;
    /// The slot, if it exists.
    async fn read_slot(&mut self, name: &str) -> Result<Option<Slot>>;
    /// Makes a slot that keeps WAL from now on.
    async fn create_slot(&mut self, name: &str, life: SlotLife) -> Result<()>;
    /// Drops a slot.
    async fn drop_slot(&mut self, name: &str) -> Result<()>;
    /// Name and content of a timeline's history file.
    async fn timeline_history(&mut self, timeline: TimelineId) -> Result<(String, Bytes)>;
    /// What the catalog says about a slot; only on a [`Session::Database`].
    async fn observe(&mut self, slot_name: &str) -> Result<Observation>;
    /// Moves a slot on that nobody uses; false when that is not what was found. Only on a
    /// [`Session::Database`].
    async fn move_slot(
        &mut self,
        slot_name: &str,
        way: SlotMove,
        system_id: SystemId,
    ) -> Result<bool>;
    /// Starts streaming.
    async fn start_replication(
        self: Box<Self>,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<Box<dyn Sending>>;
    /// Says goodbye.
    async fn close(self: Box<Self>);
}

/// A running stream; each method is the one of [`WalStream`] with its name.
#[async_trait]
pub trait Sending: Send + fmt::Debug {
    /// The next event.
    async fn next(&mut self) -> Result<WalEvent>;
    /// Tells the server how far we are.
    async fn send_status(&mut self, status: StandbyStatus) -> Result<()>;
    /// Ends the stream and gives the connection back.
    async fn finish(self: Box<Self>) -> Result<Box<dyn Walsender>>;
}

#[async_trait]
impl Upstream for ConnectOptions {
    async fn connect(&self, session: Session, clock: &Clock) -> Result<Box<dyn Walsender>> {
        Ok(Box::new(Connection::connect(self, session, clock).await?))
    }
}

#[async_trait]
impl Walsender for Connection {
    async fn identify_system(&mut self) -> Result<SystemIdentification> {
        self.identify_system().await
    }

    async fn segment_size(&mut self) -> Result<SegmentSize> {
        self.segment_size().await
    }

    async fn show(&mut self, name: &str) -> Result<String> {
        self.show(name).await
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        self.parameter(name)
    }

    async fn read_slot(&mut self, name: &str) -> Result<Option<Slot>> {
        self.read_slot(name).await
    }

    async fn create_slot(&mut self, name: &str, life: SlotLife) -> Result<()> {
        self.create_slot(name, life).await
    }

    async fn drop_slot(&mut self, name: &str) -> Result<()> {
        self.drop_slot(name).await
    }

    async fn timeline_history(&mut self, timeline: TimelineId) -> Result<(String, Bytes)> {
        self.timeline_history(timeline).await
    }

    async fn observe(&mut self, slot_name: &str) -> Result<Observation> {
        watch::observe(self, slot_name).await
    }

    async fn move_slot(
        &mut self,
        slot_name: &str,
        way: SlotMove,
        system_id: SystemId,
    ) -> Result<bool> {
        relief::move_slot(self, slot_name, way, system_id).await
    }

    async fn start_replication(
        self: Box<Self>,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<Box<dyn Sending>> {
        Ok(Box::new((*self).start_replication(slot, start, timeline).await?))
    }

    async fn close(self: Box<Self>) {
        (*self).close().await;
    }
}

#[async_trait]
impl Sending for WalStream {
    async fn next(&mut self) -> Result<WalEvent> {
        self.next().await
    }

    async fn send_status(&mut self, status: StandbyStatus) -> Result<()> {
        self.send_status(status).await
    }

    async fn finish(self: Box<Self>) -> Result<Box<dyn Walsender>> {
        Ok(Box::new((*self).finish().await?))
    }
}
