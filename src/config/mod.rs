//! Settings: file, environment and flags, laid over each other once and turned into each module's
//! own options.
//!
//! In: the command line's flags, the process environment, one TOML file. Out: [`Config`]. This is
//! the only module that reads the environment.

mod environment;
pub mod file;
pub mod key;
pub mod settings;
pub mod value;

use std::path::{Path, PathBuf};

use secrecy::SecretString;

pub use environment::Environment;
pub use settings::Settings;

use crate::error::{Error, Kind, Result};

/// Effective settings with their types.
#[derive(Debug)]
pub struct Config {
    /// Name of the cluster inside the repository.
    pub cluster: String,
    /// The server.
    pub postgres: Postgres,
    /// Where things are kept.
    pub repository: Repository,
    /// Who may open what is written.
    pub keys: Keys,
    /// What is logged, and how.
    pub log: Log,
    /// Everything again with its origin, for `config show`.
    pub settings: Settings,
    /// The process environment, for libpq's variables and the usual places of files.
    pub environment: Environment,
}

/// `[postgres]`
#[derive(Debug)]
pub struct Postgres {
    /// Connection string; empty means libpq's defaults.
    pub url: SecretString,
    /// Name of the replication slot.
    pub slot: String,
}

/// `[[repository]]`
#[derive(Debug)]
pub struct Repository {
    /// `s3://bucket/prefix` or a directory, when set.
    pub url: Option<String>,
}

/// `encryption` and `[keys]`
#[derive(Debug)]
pub struct Keys {
    /// Whether what is written is sealed for recipients.
    pub sealing: Sealing,
    /// age public keys.
    pub recipients: Vec<String>,
    /// File with age secret keys.
    pub identity_file: Option<PathBuf>,
    /// Passphrase, read from its file when that was given.
    pub passphrase: Option<SecretString>,
}

/// Whether what is written is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sealing {
    /// Only recipients can read it.
    Age,
    /// Everybody who can read the repository can read it.
    None,
}

/// `[log]`
#[derive(Debug)]
pub struct Log {
    /// Filter in tracing-subscriber's syntax.
    pub level: String,
    /// Form of the lines.
    pub format: LogFormat,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
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
        Self::of(Settings::resolve(given, &environment, file)?, environment)
    }

    fn of(settings: Settings, environment: Environment) -> Result<Self> {
        let s = &settings;
        let text = |name| s.text(name).unwrap_or_default().to_owned();
        Ok(Self {
            cluster: text("cluster"),
            postgres: Postgres { url: text("postgres.url").into(), slot: text("postgres.slot") },
            repository: Repository { url: s.text("repository.url").map(str::to_owned) },
            keys: Keys {
                sealing: match s.text("encryption") {
                    Some("none") => Sealing::None,
                    _ => Sealing::Age,
                },
                recipients: s.list("keys.recipients"),
                identity_file: s.path("keys.identity_file"),
                passphrase: passphrase(s)?,
            },
            log: Log {
                level: text("log.level"),
                format: match s.text("log.format") {
                    Some("json") => LogFormat::Json,
                    _ => LogFormat::Text,
                },
            },
            settings,
            environment,
        })
    }

    /// Where an identity is read from, and made when a first write needs one.
    ///
    /// # Errors
    /// `config` when neither a setting nor the environment says where.
    pub fn identity_file(&self) -> Result<PathBuf> {
        if let Some(path) = &self.keys.identity_file {
            return Ok(path.clone());
        }
        file::user_folder(&self.environment).map(|folder| folder.join("identity.txt")).ok_or_else(
            || {
                Error::new(
                    Kind::Config,
                    "unable to tell where the identity file is: HOME is not set",
                )
                .hint("Name it with --identity or TIDEMARK_KEYS_IDENTITY_FILE.")
            },
        )
    }
}

/// The passphrase itself or the first line of its file.
fn passphrase(settings: &Settings) -> Result<Option<SecretString>> {
    match (settings.text("keys.passphrase"), settings.path("keys.passphrase_file")) {
        (Some(_), Some(_)) => Err(Error::new(
            Kind::Config,
            "both 'keys.passphrase' and 'keys.passphrase_file' are set",
        )
        .hint("Keep one of them; 'tidemark config show' prints where each comes from.")),
        (Some(text), None) => Ok(Some(text.to_owned().into())),
        (None, Some(path)) => {
            let attempted = format!("unable to read the passphrase file '{}'", path.display());
            let text = std::fs::read_to_string(&path)
                .map_err(|error| Error::io(&attempted, &error).with_kind(Kind::Config))?;
            let line = text.lines().next().unwrap_or_default();
            if line.is_empty() {
                return Err(Error::new(
                    Kind::Config,
                    format!("{attempted}: its first line is empty"),
                ));
            }
            Ok(Some(line.to_owned().into()))
        }
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_set_gives_working_defaults() {
        let config = Config::load(None, Vec::new(), Environment::default()).unwrap();
        assert_eq!((config.cluster.as_str(), config.postgres.slot.as_str()), ("main", "tidemark"));
        assert_eq!(config.keys.sealing, Sealing::Age);
        assert!(config.identity_file().is_err());
    }

    #[test]
    fn the_identity_file_stands_in_the_users_configuration_folder() {
        let environment = Environment::of([("HOME", "/home/a"), ("TIDEMARK_CONFIG", "")]);
        let config = Config::load(None, Vec::new(), environment).unwrap();
        let expected = Path::new("/home/a/.config/tidemark/identity.txt");
        assert_eq!(config.identity_file().unwrap(), expected);
    }

    #[test]
    fn a_file_named_and_missing_is_an_error() {
        let named = Some(Path::new("/nonexistent/t.toml"));
        let error = Config::load(named, Vec::new(), Environment::default()).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
    }
}
