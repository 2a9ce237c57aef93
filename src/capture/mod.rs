//! Postgres to repository: base backup, WAL stream, slot.

pub mod base;
pub mod stream;
