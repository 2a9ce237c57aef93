//! Repository to Postgres: a target becomes a plan, the plan becomes a data directory that Postgres
//! starts from.
//!
//! In: a [`Target`], the catalog of a repository, an identity. Out: a data directory whose recovery ends
//! exactly at the target, or an error before anything was written that names the nearest instants that
//! can be reached.

pub mod directory;
pub mod settings;
pub mod target;
pub mod time;

pub use directory::{Owner, TablespaceMapping};
pub use settings::Action;
pub use target::{Edge, Target, TimelineChoice};
