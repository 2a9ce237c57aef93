//! Tidemark: streaming backup and point-in-time recovery for PostgreSQL over the replication
//! protocol.
//!
//! The modules in the order data flows; each may import only those of lower levels (the table in
//! `tests/tidy.rs`).

pub mod clock;
pub mod error;
mod file;
pub mod metrics;

pub mod pg;

pub mod pipeline;

pub mod wire;

pub mod wal;

pub mod store;

pub mod repo;

pub mod capture;

pub mod restore;

pub mod config;

pub mod daemon;

pub mod cli;

#[doc(hidden)]
pub mod fuzz;
