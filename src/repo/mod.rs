//! What the objects of a store mean.

pub mod lease;
mod process;
