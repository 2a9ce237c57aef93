//! Postgres to repository: base backup, WAL stream, slot.
