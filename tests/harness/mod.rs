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

use std::io::Write as _;

pub use account::Account;
pub use postgres::{Binaries, Postgres, Settings};
pub use s3::S3;
pub use sidecar::Tidemark;

/// Says that a part of a test could not run here, and why.
pub fn not_run(what: &str) {
    // Not by a macro: what those print is not shown of a test that passes.
    std::io::stderr().write_all(format!("NOT RUN: {what}\n").as_bytes()).unwrap();
}
