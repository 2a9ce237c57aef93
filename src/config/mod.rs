//! Settings: file, environment and flags, laid over each other once and turned into each module's
//! own options.
//!
//! In: the command line's flags, the process environment, one TOML file. Out: [`Config`]. This is
//! the only module that reads the environment.

mod environment;
pub mod file;
pub mod key;
mod options;
pub mod settings;
pub mod value;

use std::path::Path;

pub use environment::Environment;
pub use options::Sealing;
pub use settings::Settings;

use crate::error::Result;

/// Effective settings, and what they mean to each module.
#[derive(Debug)]
pub struct Config {
    /// Every setting with its origin.
    pub settings: Settings,
    /// The process environment, for libpq's variables and the usual places of files.
    pub environment: Environment,
}

impl Config {
    /// Reads the file, lays the environment and `given` flags over it, and checks every value.
    ///
    /// # Errors
    /// `config` or `usage`, naming the setting and where its value came from.
    pub fn load(
        named_file: Option<&Path>,
        given: Vec<settings::Given>,
        environment: Environment,
    ) -> Result<Self> {
        let file = file::read(named_file, &environment)?;
        Ok(Self { settings: Settings::resolve(given, &environment, file)?, environment })
    }
}
