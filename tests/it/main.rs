//! Integration tests that need no PostgreSQL server of their own.
#![allow(unreachable_pub)]
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::disallowed_methods)]

#[allow(unsafe_code, reason = "an allocator is unsafe to write; see there")]
mod allocation;
mod cli;
mod damaged;
mod expire;
mod fuzz_corpus;
mod golden;
mod minis3_semantics;
#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "../harness/proxy.rs"]
mod proxy;
mod s3_environment;
mod s3_server;
mod store_contract;
mod store_faults;
mod store_listings;
mod stranger;
#[path = "../harness/transcript.rs"]
mod transcript;
mod wal;
#[path = "../harness/wal_lines.rs"]
mod wal_lines;
