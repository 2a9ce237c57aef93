//! The base backup: the server's data directory into packs, while it runs.

pub mod tar;
