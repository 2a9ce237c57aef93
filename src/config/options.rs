//! What the settings mean to each module: its own options, made here and nowhere else.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use secrecy::SecretString;

use super::{Config, file};
use crate::capture::base::PageChecksums;
use crate::capture::stream::{SlotLife, StreamOptions};
use crate::error::{Context, Error, Kind, Result};
use crate::pipeline::Level;
use crate::pipeline::budget::{Budget, STREAM_BYTES, stream_bytes_min};
use crate::repo::retention::RetentionOptions;
use crate::restore::time;
use crate::store::{StaticCredentials, StoreOptions};
use crate::wire::{CheckpointMode, ConnectOptions, PrimaryConninfo};

/// Name we go by at the server unless the connection string names another.
const APPLICATION_NAME: &str = "tidemark";

/// Least memory a command can work with: the process itself and two parts being uploaded.
const MEMORY_BYTES_MIN: u64 = 48 << 20;
/// Most: more than any machine has, and little enough that no sum of shares overflows.
const MEMORY_BYTES_MAX: u64 = 1 << 50;

/// Longest passphrase file that is read.
const PASSPHRASE_FILE_BYTES_MAX: u64 = 1 << 20;

/// So many passphrases of a file count: each that does not fit costs a third of a second of one core.
const PASSPHRASES_MAX: usize = 16;

/// Whether what is written is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sealing {
    /// Only recipients can read it.
    Age,
    /// Everybody who can read the repository can read it.
    None,
}

impl Config {
    fn text(&self, name: &'static str) -> Option<&str> {
        self.settings.text(name).filter(|text| !text.is_empty())
    }

    /// A value that one of our modules parses, with the setting named in front of its error.
    fn parsed<T: FromStr<Err = Error>>(&self, name: &'static str) -> Result<Option<T>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let origin = || format!("unable to read '{name}' from {}", self.settings.origin(name));
        text.parse::<T>().map(Some).context(origin)
    }

    /// A setting that the table gives a default.
    fn set<T>(name: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::new(Kind::Config, format!("'{name}' is not set")))
    }

    /// Name of the cluster inside the repository.
    #[must_use]
    pub fn cluster(&self) -> &str {
        self.text("cluster").unwrap_or_default()
    }

    /// Where and how to connect to PostgreSQL.
    ///
    /// # Errors
    /// `config` for a connection string libpq would refuse.
    pub fn connect_options(&self) -> Result<ConnectOptions> {
        let variable = |name: &str| self.environment.get(name).map(str::to_owned);
        ConnectOptions::parse(self.text("postgres.url").unwrap_or_default(), &variable)
            .map(|options| options.with_application_name(APPLICATION_NAME))
            .context(|| {
                let origin = self.settings.origin("postgres.url");
                format!("unable to read 'postgres.url' from {origin}")
            })
    }

    /// How a standby of the server that is configured connects to it; `None` when none is.
    ///
    /// # Errors
    /// `config` for a connection string libpq would refuse.
    pub fn primary_conninfo(&self) -> Result<Option<PrimaryConninfo>> {
        let variable = |name: &str| self.environment.get(name).map(str::to_owned);
        let read = |text| {
            PrimaryConninfo::of_ours(text, &variable).context(|| {
                let origin = self.settings.origin("postgres.url");
                format!("unable to read 'postgres.url' from {origin}")
            })
        };
        self.text("postgres.url").map(read).transpose()
    }

    /// Name of the slot through which WAL is streamed.
    #[must_use]
    pub fn slot_name(&self) -> &str {
        self.text("postgres.slot").unwrap_or_default()
    }

    /// Where the repository is.
    ///
    /// # Errors
    /// `config` when nothing says so.
    pub fn repository_url(&self) -> Result<&str> {
        self.text("repository.url").ok_or_else(|| {
            Error::new(Kind::Config, "no repository is named").hint(
                "Give --repository s3://bucket/prefix or a directory, set TIDEMARK_REPOSITORY, or \
                 write 'url' below [[repository]] in the configuration file.",
            )
        })
    }

    /// How to reach the store of the repository.
    ///
    /// # Errors
    /// `config` for a value that is not understood.
    pub fn store_options(&self) -> Result<StoreOptions> {
        let text = |name| self.text(name).map(str::to_owned);
        let secret = |name| self.text(name).map(|text| SecretString::from(text.to_owned()));
        let credentials = match (
            text("repository.access_key_id"),
            secret("repository.secret_access_key"),
        ) {
            (Some(access_key_id), Some(secret_access_key)) => Some(StaticCredentials {
                access_key_id,
                secret_access_key,
                session_token: secret("repository.session_token"),
            }),
            (None, None) => None,
            _ => {
                return Err(Error::new(
                    Kind::Config,
                    "only one of 'repository.access_key_id' and 'repository.secret_access_key' is set",
                )
                .hint("Set both, or neither to use the standard AWS credentials."));
            }
        };
        let settings = &self.settings;
        let attempts =
            Self::set("repository.attempts_max", settings.integer("repository.attempts_max")?)?;
        let attempt = settings.duration("repository.attempt_timeout")?;
        let overall = settings.duration("repository.overall_timeout")?;
        Ok(StoreOptions {
            endpoint: text("repository.endpoint"),
            region: text("repository.region"),
            addressing: self.parsed("repository.addressing")?.unwrap_or_default(),
            profile: text("repository.profile"),
            credentials,
            ca_file: text("repository.ca_file").map(PathBuf::from),
            server_side_encryption: self
                .parsed("repository.server_side_encryption")?
                .unwrap_or_default(),
            storage_class: text("repository.storage_class"),
            checksum: self.parsed("repository.checksum")?.unwrap_or_default(),
            attempt_timeout: Self::set("repository.attempt_timeout", attempt)?,
            overall_timeout: Self::set("repository.overall_timeout", overall)?,
            attempts_max: u32::try_from(attempts).unwrap_or(u32::MAX),
        })
    }

    /// Whether what is written is sealed.
    #[must_use]
    pub fn sealing(&self) -> Sealing {
        match self.text("encryption") {
            Some("none") => Sealing::None,
            _ => Sealing::Age,
        }
    }

    /// The public keys configured.
    #[must_use]
    pub fn recipients(&self) -> Vec<String> {
        self.settings.list("keys.recipients")
    }

    /// The passphrase itself, or those of its file, one a line: the first seals, and all open, so that
    /// what was sealed before a change can be read together with what was sealed after it.
    ///
    /// # Errors
    /// `config` when both are set, or the file cannot be read or its first line is empty.
    pub fn passphrases(&self) -> Result<Vec<SecretString>> {
        match (self.text("keys.passphrase"), self.text("keys.passphrase_file")) {
            (Some(_), Some(_)) => Err(Error::new(
                Kind::Config,
                "both 'keys.passphrase' and 'keys.passphrase_file' are set",
            )
            .hint("Keep one of them; 'tidemark config show' prints where each comes from.")),
            (Some(text), None) => Ok(vec![text.to_owned().into()]),
            (None, Some(path)) => {
                let attempted = format!("unable to read the passphrase file '{path}'");
                let text = crate::file::read_to_string(Path::new(path), PASSPHRASE_FILE_BYTES_MAX)
                    .map_err(|error| Error::io(&attempted, &error).with_kind(Kind::Config))?;
                if text.lines().next().unwrap_or_default().is_empty() {
                    let flaw = format!("{attempted}: its first line is empty");
                    return Err(Error::new(Kind::Config, flaw));
                }
                let lines = text.lines().filter(|line| !line.is_empty()).take(PASSPHRASES_MAX);
                Ok(lines.map(|line| line.to_owned().into()).collect())
            }
            (None, None) => Ok(Vec::new()),
        }
    }

    /// The identity file that a setting names.
    #[must_use]
    pub fn named_identity_file(&self) -> Option<PathBuf> {
        self.text("keys.identity_file").map(PathBuf::from)
    }

    /// Where an identity is read from, and made when a first write needs one.
    ///
    /// # Errors
    /// `config` when neither a setting nor the environment says where.
    pub fn identity_file(&self) -> Result<PathBuf> {
        let usual = || Some(file::user_folder(&self.environment)?.join("identity.txt"));
        self.named_identity_file().or_else(usual).ok_or_else(|| {
            Error::new(Kind::Config, "unable to tell where the identity file is: HOME is not set")
                .hint("Name it with --identity or TIDEMARK_KEYS_IDENTITY_FILE.")
        })
    }

    /// zstd level.
    ///
    /// # Errors
    /// `config` when it is out of bounds.
    pub fn level(&self) -> Result<Level> {
        let level = Self::set("compression.level", self.settings.integer("compression.level")?)?;
        Self::set("compression.level", i32::try_from(level).ok().and_then(Level::new))
    }

    /// Most memory the process may take: what the setting says, else the command's own `limit`.
    ///
    /// # Errors
    /// `config` when it is too little to work with, or more than there is.
    pub fn memory_bytes(&self, limit: u64) -> Result<u64> {
        match self.settings.size_bytes("pipeline.memory")? {
            None => Ok(limit),
            Some(bytes) if (MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) => Ok(bytes),
            Some(_) => {
                let origin = self.settings.origin("pipeline.memory");
                let text = self.text("pipeline.memory").unwrap_or_default();
                Err(Error::new(
                    Kind::Config,
                    format!(
                        "unable to read 'pipeline.memory' from {origin}: '{text}', expected \
                         from 48 MiB to 1024 TiB"
                    ),
                ))
            }
        }
    }

    /// Most memory the stream may take. Where the setting does not say, the levels that need more than
    /// usual get it.
    fn stream_memory_bytes(&self, level: Level) -> Result<u64> {
        let least = stream_bytes_min(level);
        let bytes = self.memory_bytes(STREAM_BYTES.max(least))?;
        if bytes >= least {
            return Ok(bytes);
        }
        let origin = self.settings.origin("pipeline.memory");
        let (level, least) = (level.get(), least >> 20);
        let message = format!(
            "unable to stream at 'compression.level' {level} within the 'pipeline.memory' from \
             {origin}: that level needs at least {least} MiB"
        );
        Err(Error::new(Kind::Config, message).hint("Choose a lower level, or allow more memory."))
    }

    /// How many threads compress and encrypt: what the setting says, else as many as the machine
    /// has cores.
    ///
    /// # Errors
    /// `config` for a value that is not understood.
    pub fn jobs(&self) -> Result<usize> {
        let set = self.settings.integer("pipeline.jobs")?;
        let set = set.and_then(|count| usize::try_from(count).ok());
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(set.unwrap_or_else(cores))
    }

    /// How the WAL stream runs.
    ///
    /// # Errors
    /// `config` for a value that is not understood.
    pub fn stream_options(&self) -> Result<StreamOptions> {
        let settings = &self.settings;
        let defaults = StreamOptions::default();
        let interval = |name| Self::set(name, settings.duration(name)?);
        let uploads = Self::set("wal.uploads_max", settings.integer("wal.uploads_max")?)?;
        let level = self.level()?;
        Ok(StreamOptions {
            slot_name: self.slot_name().to_owned(),
            slot_life: SlotLife::Permanent,
            flush_interval: interval("wal.flush_interval")?,
            idle_flush_interval: interval("wal.idle_flush_interval")?,
            lag_ceiling_bytes: settings.size_bytes("wal.lag_ceiling")?,
            level,
            budget: Budget::stream(self.stream_memory_bytes(level)?, level),
            uploads_max: usize::try_from(uploads).unwrap_or(defaults.uploads_max),
            stop_grace: interval("wal.stop_grace")?,
            ..defaults
        })
    }

    /// Whether a store that does not enforce conditional writes is good enough.
    #[must_use]
    pub fn accepts_unconditional_store(&self) -> bool {
        self.text("lease.unconditional_store") == Some("accept")
    }

    /// How the server makes the checkpoint that a backup begins with.
    #[must_use]
    pub fn checkpoint(&self) -> CheckpointMode {
        match self.text("backup.checkpoint") {
            Some("spread") => CheckpointMode::Spread,
            _ => CheckpointMode::Fast,
        }
    }

    /// What a page whose checksum is wrong does to a backup.
    #[must_use]
    pub fn page_checksums(&self) -> PageChecksums {
        match self.text("backup.page_checksums") {
            Some("fail") => PageChecksums::Fail,
            Some("ignore") => PageChecksums::Ignore,
            _ => PageChecksums::Warn,
        }
    }

    /// Most KiB a second that the server sends for a base backup.
    ///
    /// # Errors
    /// `config` outside what PostgreSQL accepts, 32 kB to 1 GB a second.
    pub fn rate_limit_kib(&self) -> Result<Option<NonZeroU32>> {
        let Some(bytes) = self.settings.size_bytes("backup.rate_limit")? else { return Ok(None) };
        let kib = u32::try_from(bytes / 1024).ok().filter(|kib| (32..=1_048_576).contains(kib));
        kib.and_then(NonZeroU32::new).map(Some).ok_or_else(|| {
            let origin = self.settings.origin("backup.rate_limit");
            let text = self.text("backup.rate_limit").unwrap_or_default();
            Error::new(
                Kind::Config,
                format!(
                    "unable to read 'backup.rate_limit' from {origin}: '{text}', expected 32 KiB \
                     to 1 GiB a second"
                ),
            )
        })
    }

    /// What to keep; `None` when nothing says so, and then nothing may be deleted.
    ///
    /// # Errors
    /// `config` for a value that is not understood.
    pub fn retention_options(&self) -> Result<Option<RetentionOptions>> {
        let count = |name| -> Result<Option<u32>> {
            Ok(self.settings.integer(name)?.and_then(|count| u32::try_from(count).ok()))
        };
        let options = RetentionOptions {
            keep_days: count("retention.keep_days")?,
            keep_count: count("retention.keep_count")?,
            pitr_days: count("retention.pitr_days")?,
        };
        Ok((options != RetentionOptions::default()).then_some(options))
    }

    /// A length of time that the table gives a default.
    ///
    /// # Errors
    /// `config` for a value that is not understood.
    pub fn interval(&self, name: &'static str) -> Result<Duration> {
        Self::set(name, self.settings.duration(name)?)
    }

    /// Where Prometheus may ask; `None`: nowhere.
    ///
    /// # Errors
    /// `config` for what is no address of this machine with a port.
    pub fn metrics_listen(&self) -> Result<Option<SocketAddr>> {
        let Some(text) = self.text("metrics.listen") else { return Ok(None) };
        text.parse().map(Some).map_err(|_not_an_address| {
            let origin = self.settings.origin("metrics.listen");
            let message = format!(
                "unable to read 'metrics.listen' from {origin}: '{text}', expected an address and a \
                 port such as 127.0.0.1:9187 or [::1]:9187"
            );
            Error::new(Kind::Config, message)
        })
    }

    /// The zone of times that name none.
    ///
    /// # Errors
    /// `config` or `usage` when there is no such zone.
    pub fn time_zone(&self) -> Result<Option<jiff::tz::TimeZone>> {
        self.text("restore.time_zone").map(time::parse_zone).transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use secrecy::ExposeSecret;

    use super::*;
    use crate::config::Environment;

    fn config(variables: &[(&str, &str)]) -> Config {
        let variables = variables.iter().copied().chain([("TIDEMARK_CONFIG", "")]);
        Config::load(None, Vec::new(), Environment::of(variables)).unwrap()
    }

    #[test]
    fn nothing_set_gives_the_documented_defaults_of_every_module() {
        let config = config(&[]);
        assert_eq!(config.cluster(), "main");
        assert_eq!(config.sealing(), Sealing::Age);
        assert!(config.identity_file().is_err());
        assert_eq!(config.repository_url().unwrap_err().kind(), Kind::Config);
        let (stream, default) = (config.stream_options().unwrap(), StreamOptions::default());
        assert_eq!(format!("{stream:?}"), format!("{default:?}"));
        let (store, default) = (config.store_options().unwrap(), StoreOptions::default());
        assert_eq!(format!("{store:?}"), format!("{default:?}"));
        assert_eq!(config.rate_limit_kib().unwrap(), None);
        assert!(config.time_zone().unwrap().is_none());
        assert_eq!(config.retention_options().unwrap(), None, "nothing is deleted by default");
    }

    #[test]
    fn a_stream_gets_the_memory_its_level_needs_or_is_refused() {
        let stream = |level, memory| {
            let set = [("TIDEMARK_COMPRESSION_LEVEL", level), ("TIDEMARK_PIPELINE_MEMORY", memory)];
            config(&set).stream_options().map(|options| options.budget.extent_bytes_held >> 20)
        };
        assert_eq!([stream("1", "").unwrap(), stream("7", "48MiB").unwrap()], [10, 7]);
        assert_eq!([stream("9", "").unwrap(), stream("19", "64MiB").unwrap()], [5, 9]);
        let error = stream("19", "59MiB").unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.message().ends_with("that level needs at least 60 MiB"), "{error}");
    }

    #[test]
    fn the_identity_file_stands_in_the_users_configuration_folder() {
        let expected = Path::new("/home/a/.config/tidemark/identity.txt");
        assert_eq!(config(&[("HOME", "/home/a")]).identity_file().unwrap(), expected);
    }

    #[test]
    fn each_line_of_a_passphrase_file_is_a_passphrase_as_it_stands() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passphrases");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let found =
                config(&[("TIDEMARK_KEYS_PASSPHRASE_FILE", path.to_str().unwrap())]).passphrases();
            found.map(|all| all.iter().map(|one| one.expose_secret().to_owned()).collect())
        };
        let expect = |text, expected: &[&str]| {
            let found: Vec<String> = read(text).unwrap();
            assert_eq!(found, expected, "{text:?}");
        };
        for text in ["a b ", "a b \n", "a b \r\n", "a b \n\n\n"] {
            expect(text, &["a b "]);
        }
        expect("b\n\n a\n", &["b", " a"]);
        expect(&"a\n".repeat(1000), &["a"; PASSPHRASES_MAX]);
        for text in ["", "\na"] {
            assert_eq!(read(text).unwrap_err().kind(), Kind::Config, "{text:?}");
        }
    }

    #[test]
    fn half_a_pair_of_s3_keys_is_refused() {
        let error = config(&[("TIDEMARK_REPOSITORY_ACCESS_KEY_ID", "A")]).store_options();
        assert_eq!(error.unwrap_err().kind(), Kind::Config);
    }

    #[test]
    fn a_value_its_module_refuses_is_named_with_its_origin() {
        let config = config(&[("TIDEMARK_REPOSITORY_SERVER_SIDE_ENCRYPTION", "rot13")]);
        let text = config.store_options().unwrap_err().to_string();
        assert!(text.starts_with(
            "unable to read 'repository.server_side_encryption' from \
             TIDEMARK_REPOSITORY_SERVER_SIDE_ENCRYPTION: "
        ));
    }

    #[test]
    fn rate_limits_outside_what_postgres_accepts_are_refused() {
        let limit = |text| config(&[("TIDEMARK_BACKUP_RATE_LIMIT", text)]).rate_limit_kib();
        assert_eq!(limit("1 MiB").unwrap().unwrap().get(), 1024);
        assert!(limit("1 KiB").is_err() && limit("2 GiB").is_err());
    }

    #[test]
    fn metrics_are_told_where_a_port_is_named() {
        let listen = |text| config(&[("TIDEMARK_METRICS_LISTEN", text)]).metrics_listen();
        assert_eq!(listen("[::1]:9187").unwrap().unwrap().port(), 9187);
        assert!(listen("").unwrap().is_none());
        let error = listen("9187").unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.to_string().contains("from TIDEMARK_METRICS_LISTEN: '9187'"), "{error}");
    }

    #[test]
    fn an_interval_of_nothing_is_refused() {
        for (name, least) in
            [("RUN_BACKUP_INTERVAL", "1000 ms"), ("REPOSITORY_ATTEMPT_TIMEOUT", "100 ms")]
        {
            let variable = format!("TIDEMARK_{name}");
            let variables = [("TIDEMARK_CONFIG", ""), (variable.as_str(), "0s")];
            let error = Config::load(None, Vec::new(), Environment::of(variables)).unwrap_err();
            assert_eq!(error.kind(), Kind::Config);
            assert!(error.to_string().contains(&format!("expected at least {least}")), "{error}");
        }
    }

    #[test]
    fn a_file_named_and_missing_is_an_error() {
        let named = Some(Path::new("/nonexistent/t.toml"));
        let error = Config::load(named, Vec::new(), Environment::default()).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
    }
}
