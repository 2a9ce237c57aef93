//! Client of PostgreSQL's frontend/backend protocol, made for replication.
//!
//! A [`ConnectOptions`] is parsed from a connection string as libpq takes it; [`Connection::connect`]
//! turns it into a [`Connection`], which runs simple queries and the commands of a walsender; two of
//! those take the connection over: [`BaseBackup`] and [`WalStream`].
//!
//! # Invariants
//! The length of every message is checked against a named maximum before memory is reserved for it.
//! No secret is shown by `Display` or `Debug` of anything here.

mod auth;
mod base_backup;
mod certificate;
mod channel;
mod connect;
mod connection;
mod conninfo;
pub(crate) mod fuzz;
mod message;
mod options;
mod os_user;
mod passfile;
mod primary;
mod replication;
mod server_error;
mod service;
mod tls;
mod transport;
mod verifier;
mod wal_stream;

pub use base_backup::{BaseBackup, BaseBackupEvent, BaseBackupOptions, CheckpointMode, Tablespace};
pub use connection::{Connection, Row, Session};
pub use options::ConnectOptions;
pub use primary::PrimaryConninfo;
pub use replication::{Slot, SlotLife, SystemIdentification};
pub use server_error::ServerError;
pub use wal_stream::{StandbyStatus, WalEvent, WalStream};
