//! What the tests that need real servers share: PostgreSQL, an S3 server, and the `tidemark` binary.
//!
//! Nothing here is a stand-in: servers are processes, started unprivileged in a folder of their own
//! under the system's temporary folder, and stopped and deleted when dropped.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod account;
pub mod commit;
pub mod postgres;
pub mod proxy;
pub mod room;
pub mod s3;
pub mod sidecar;
pub mod transcript;
pub mod wal_lines;

pub use account::Account;
pub use postgres::{Binaries, Postgres, Settings};
pub use s3::S3;
pub use sidecar::Tidemark;
