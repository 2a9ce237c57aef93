//! The sidecar: everything supervised and scheduled, and the opening moves that every command
//! shares: the repository, and the keys to write and read it.

pub mod backup;
pub mod endpoint;
pub mod exposition;
pub mod keys;
pub mod opening;
pub mod schedule;
pub mod supervisor;
pub mod upkeep;
pub mod writing;
