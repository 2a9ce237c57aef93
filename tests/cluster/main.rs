//! Tests against real PostgreSQL servers.
//!
//! `TIDEMARK_TEST_PG_BIN` names the `bin` folder of the PostgreSQL to test with; without it the newest
//! below `/usr/lib/postgresql` is used. `TIDEMARK_TEST_PG_CLIENT_BIN` names where the client programs
//! are when that folder has only the server.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::disallowed_methods)]
#![allow(clippy::print_stdout, unreachable_pub, clippy::too_many_lines)]

#[path = "../harness/mod.rs"]
mod harness;

mod bad_input;
mod barriers;
mod base;
mod check;
mod demo;
mod kill;
mod memory;
mod pitr;
mod restore;
mod run;
mod server;
mod standby;
mod stream;
mod stream_trouble;
mod trickle;
mod wal_differential;
mod wal_oracle;
mod wal_sample;
mod wire;
