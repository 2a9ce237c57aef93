//! The table of settings: one row says a setting's name, form, default, flag and help, and the file
//! reader, the environment, the command line, `config show` and the error messages all follow it.
//!
//! # Shape
//! A name is `section.key`, or `key` alone at the top of the file. Its environment variable is
//! `TIDEMARK_` and the name in capitals, the dot an underscore.

use std::time::Duration;

/// What a setting's text must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Any text.
    Text,
    /// Text that is never shown.
    Secret,
    /// A libpq connection string: its password is never shown.
    ConnectionString,
    /// The place of a repository: `s3://bucket/prefix` or a directory. A user's name and password in
    /// it are never shown.
    RepositoryUrl,
    /// The URL of an S3 server: a user's name and password in it are never shown.
    Endpoint,
    /// A path of this machine.
    Path,
    /// A whole number within bounds, both inclusive.
    Integer {
        /// The least number accepted.
        min: i64,
        /// The greatest number accepted.
        max: i64,
    },
    /// A number of bytes: `64 MiB`, `1.5 GB`, `4096`.
    Size,
    /// A length of time: `500ms`, `1m 30s`, `7d`; a day has 24 hours.
    Duration {
        /// The shortest.
        min: Duration,
    },
    /// `true` or `false`.
    Switch,
    /// One of a closed list of words.
    Choice(&'static [&'static str]),
    /// Several texts.
    List,
}

/// Which commands take a setting as a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Every command.
    Everywhere,
    /// Commands that talk to PostgreSQL.
    Postgres,
    /// Commands that talk to a repository.
    Repository,
    /// Commands that write to a repository.
    Sealing,
    /// Commands that read what is sealed in a repository (all that write do as well).
    Opening,
    /// Commands that compress, encrypt, or the reverse, in bulk.
    Jobs,
    /// Commands that keep within a memory that can be set.
    Memory,
    /// Commands that stream WAL.
    Stream,
    /// Commands that take base backups.
    Backup,
    /// Commands that restore.
    Restore,
    /// Commands that delete by age and count.
    Retention,
    /// The supervisor.
    Run,
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// `section.key`.
    pub name: &'static str,
    /// What its text must look like.
    pub form: Form,
    /// What holds when nothing sets it; `None` is "not set".
    pub default: Option<&'static str>,
    /// The flag without its two dashes, where a person would type it.
    pub flag: Option<&'static str>,
    /// The letter that stands for the flag after one dash.
    pub short: Option<char>,
    /// Which commands take the flag.
    pub group: Group,
    /// Help: the first sentence alone is shown by `-h`.
    pub help: &'static str,
}

const fn key(name: &'static str, form: Form, group: Group, help: &'static str) -> Key {
    Key { name, form, default: None, flag: None, short: None, group, help }
}

impl Key {
    const fn default(mut self, default: &'static str) -> Self {
        self.default = Some(default);
        self
    }

    const fn flag(mut self, flag: &'static str) -> Self {
        self.flag = Some(flag);
        self
    }

    const fn short(mut self, short: char) -> Self {
        self.short = Some(short);
        self
    }

    /// The environment variable that sets it.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("TIDEMARK_{}", self.name.replace('.', "_").to_ascii_uppercase())
    }

    /// All environment variables that set it, the one that wins last: what a section is mainly
    /// about, its `url`, is also set by the section's name alone.
    #[must_use]
    pub fn variables(&self) -> Vec<String> {
        let full = self.variable();
        match full.strip_suffix("_URL") {
            Some(short) => vec![short.to_owned(), full],
            None => vec![full],
        }
    }

    /// The section of the file it stands in; empty at the top.
    #[must_use]
    pub fn section(&self) -> &'static str {
        self.name.split_once('.').map_or("", |(section, _)| section)
    }

    /// Its name inside its section.
    #[must_use]
    pub fn leaf(&self) -> &'static str {
        self.name.split_once('.').map_or(self.name, |(_, leaf)| leaf)
    }

    /// What stands for its value in help texts.
    #[must_use]
    pub fn value_name(&self) -> &'static str {
        match self.form {
            Form::Text | Form::Secret | Form::Endpoint | Form::List => "TEXT",
            Form::ConnectionString | Form::RepositoryUrl => "URL",
            Form::Path => "FILE",
            Form::Integer { .. } => "N",
            Form::Size => "SIZE",
            Form::Duration { .. } => "DURATION",
            Form::Switch => "BOOL",
            Form::Choice(_) => "WORD",
        }
    }
}

/// The section whose blocks are a list in the file: `[[repository]]`.
pub const LIST_SECTION: &str = "repository";

/// Every setting there is, in the order `config show` prints them.
pub const KEYS: &[Key] = &[
    key(
        "cluster",
        Form::Text,
        Group::Repository,
        "Name of the database cluster inside the repository. One repository may hold many.",
    )
    .default("main")
    .flag("cluster"),
    key(
        "encryption",
        Form::Choice(&["age", "none"]),
        Group::Opening,
        "How what is written is sealed, and what is accepted when it is read. 'age' encrypts every \
         object with a key that only the recipients' identities can unwrap, and refuses to read \
         what is not encrypted; 'none' stores it compressed and readable by anybody who can read \
         the repository, and reads both.",
    )
    .default("age")
    .flag("encryption"),
    key(
        "postgres.url",
        Form::ConnectionString,
        Group::Postgres,
        "The PostgreSQL server, as a libpq URI or key=value string. What it leaves out comes from \
         the PG* environment variables, the service file and .pgpass, as with psql.",
    )
    .flag("postgres"),
    key(
        "postgres.slot",
        Form::Text,
        Group::Stream,
        "Name of the physical replication slot, made when missing and kept for ever after.",
    )
    .default("tidemark")
    .flag("slot"),
    key(
        "repository.url",
        Form::RepositoryUrl,
        Group::Repository,
        "Where backups and WAL are kept: s3://bucket/prefix, or a directory.",
    )
    .flag("repository"),
    key(
        "repository.endpoint",
        Form::Endpoint,
        Group::Repository,
        "URL of an S3 server that is not Amazon's, for example http://127.0.0.1:9000.",
    )
    .flag("s3-endpoint"),
    key(
        "repository.region",
        Form::Text,
        Group::Repository,
        "S3 region. Without it the AWS environment and profile decide.",
    )
    .flag("s3-region"),
    key(
        "repository.addressing",
        Form::Choice(&["auto", "path", "virtual-host"]),
        Group::Repository,
        "How the S3 bucket is named in requests. 'auto' is virtual-host on Amazon and path style \
         with an endpoint.",
    )
    .default("auto")
    .flag("s3-addressing"),
    key(
        "repository.profile",
        Form::Text,
        Group::Repository,
        "Profile of ~/.aws/config to take region and credentials from.",
    )
    .flag("s3-profile"),
    key(
        "repository.access_key_id",
        Form::Text,
        Group::Repository,
        "S3 access key. Without it the standard AWS chain is asked: environment, profile, web \
         identity, instance.",
    ),
    key(
        "repository.secret_access_key",
        Form::Secret,
        Group::Repository,
        "Secret of the S3 access key.",
    ),
    key(
        "repository.session_token",
        Form::Secret,
        Group::Repository,
        "Session token of temporary S3 credentials.",
    ),
    key(
        "repository.ca_file",
        Form::Path,
        Group::Repository,
        "PEM file with certificate authorities to trust for S3 besides those of the machine.",
    )
    .flag("s3-ca-file"),
    key(
        "repository.server_side_encryption",
        Form::Text,
        Group::Repository,
        "Encryption by the S3 store itself: bucket-default, sse-s3, sse-kms or sse-kms:KEY. It is \
         independent of ours.",
    )
    .default("bucket-default"),
    key(
        "repository.storage_class",
        Form::Text,
        Group::Repository,
        "S3 storage class of new objects, such as STANDARD_IA. Without it the bucket decides.",
    ),
    key(
        "repository.checksum",
        Form::Choice(&["auto", "crc64nvme", "crc32c", "none"]),
        Group::Repository,
        "Checksum sent with every S3 upload for the store to verify. 'auto' is CRC-32C, and none \
         once the store has said that it does not know it.",
    )
    .default("auto"),
    key(
        "repository.attempt_timeout",
        Form::Duration { min: Duration::from_millis(100) },
        Group::Repository,
        "Longest time for one try of an S3 request, besides the time its body needs.",
    )
    .default("30s"),
    key(
        "repository.overall_timeout",
        Form::Duration { min: Duration::from_millis(100) },
        Group::Repository,
        "Longest time for an S3 call with all its tries and pauses.",
    )
    .default("5m"),
    key(
        "repository.attempts_max",
        Form::Integer { min: 1, max: 100 },
        Group::Repository,
        "Most tries of one S3 call.",
    )
    .default("8"),
    key(
        "keys.recipients",
        Form::List,
        Group::Sealing,
        "Public key (age1...) that may open what is written; may be given several times. With none \
         configured, the first write makes an identity file and uses its public key.",
    )
    .flag("recipient"),
    key(
        "keys.identity_file",
        Form::Path,
        Group::Opening,
        "File with the secret key (AGE-SECRET-KEY-...) that opens the repository. Without it \
         $XDG_CONFIG_HOME/tidemark/identity.txt, else ~/.config/tidemark/identity.txt, is read.",
    )
    .flag("identity"),
    key(
        "keys.passphrase",
        Form::Secret,
        Group::Opening,
        "Passphrase that seals and opens the repository in place of key pairs: together with \
         keys.recipients it is refused.",
    ),
    key(
        "keys.passphrase_file",
        Form::Path,
        Group::Opening,
        "File with the passphrase that seals and opens the repository in place of key pairs. To change \
         it, put the new one into the first line and leave the old ones below, one a line: the first \
         seals, and all (16 at most) open.",
    )
    .flag("passphrase-file"),
    key(
        "compression.level",
        Form::Integer { min: -7, max: 19 },
        Group::Sealing,
        "zstd level: below 0 faster and larger, above smaller and slower. On database pages 3 saves \
         2 to 5 per cent over 1 and takes twice as long.",
    )
    .default("1")
    .flag("compression-level"),
    key(
        "pipeline.jobs",
        Form::Integer { min: 1, max: 64 },
        Group::Jobs,
        "Threads that compress, encrypt, and the reverse. Without it as many as the machine has \
         cores. A backup or a restore uses 16 at most, and no more than its memory has room for.",
    )
    .flag("jobs")
    .short('j'),
    key(
        "pipeline.memory",
        Form::Size,
        Group::Memory,
        "Most memory the process may take; 'tidemark run' takes as much for the stream and once more \
         while it takes a backup. Without it backup keeps below 128 MiB, stream below 48 MiB \
         (53 from compression.level 8 on, 60 from 13 on) and restore below 96 MiB. A restore may take 72 MiB whatever is set, and a passphrase takes 128 \
         MiB more for moments at the start.",
    )
    .flag("memory"),
    key(
        "wal.flush_interval",
        Form::Duration { min: Duration::ZERO },
        Group::Stream,
        "Longest that a commit waits before its WAL is uploaded. Shorter loses less when the server \
         is lost, and costs more requests.",
    )
    .default("1s")
    .flag("flush-interval"),
    key(
        "wal.idle_flush_interval",
        Form::Duration { min: Duration::ZERO },
        Group::Stream,
        "Longest that WAL without any commit waits before it is uploaded.",
    )
    .default("60s"),
    key(
        "wal.lag_ceiling",
        Form::Size,
        Group::Stream,
        "Most WAL the server may keep for us while the repository does not take it. Past it the slot \
         is moved on, the gap is shown in every listing, and a new base backup is needed. Without it \
         the server keeps WAL until max_slot_wal_keep_size, or its disk, is used up.",
    )
    .flag("lag-ceiling"),
    key(
        "wal.uploads_max",
        Form::Integer { min: 1, max: 64 },
        Group::Stream,
        "Most WAL uploads at a time.",
    )
    .default("4"),
    key(
        "wal.stop_grace",
        Form::Duration { min: Duration::ZERO },
        Group::Stream,
        "How long a stop may take to store what was received.",
    )
    .default("20s"),
    key(
        "lease.ttl",
        Form::Duration { min: Duration::ZERO },
        Group::Stream,
        "How long a writer that stopped renewing its lease keeps others out, unless it is seen to be \
         dead. It is renewed every third of this, one request each.",
    )
    .default("3m"),
    key(
        "lease.unconditional_store",
        Form::Choice(&["refuse", "accept"]),
        Group::Stream,
        "What to do on a store that does not enforce conditional writes. 'accept' goes on although \
         two writers at a time could then not be kept apart.",
    )
    .default("refuse"),
    key(
        "backup.checkpoint",
        Form::Choice(&["fast", "spread"]),
        Group::Backup,
        "How the server makes the checkpoint a backup begins with: at once, or spread over \
         checkpoint_completion_target to keep its load low.",
    )
    .default("fast")
    .flag("checkpoint"),
    key(
        "backup.rate_limit",
        Form::Size,
        Group::Backup,
        "Most bytes a second the server sends for a base backup. Without it as fast as it can.",
    )
    .flag("rate-limit"),
    key(
        "backup.page_checksums",
        Form::Choice(&["warn", "fail", "ignore"]),
        Group::Backup,
        "What a page whose checksum is wrong does to a backup. 'warn' marks the backup and keeps it, \
         'fail' ends it, 'ignore' does not check.",
    )
    .default("warn")
    .flag("page-checksums"),
    key(
        "retention.keep_days",
        Form::Integer { min: 1, max: 36_500 },
        Group::Retention,
        "Keep backups that are younger than this many days.",
    )
    .flag("keep-days"),
    key(
        "retention.keep_count",
        Form::Integer { min: 1, max: 100_000 },
        Group::Retention,
        "Keep this many of the newest backups that can be restored.",
    )
    .flag("keep-count"),
    key(
        "retention.pitr_days",
        Form::Integer { min: 1, max: 36_500 },
        Group::Retention,
        "Keep every moment of this many days restorable. Without it, every moment that can be \
         reached from a backup that is kept. Alone it deletes WAL only: backups go by \
         retention.keep_days and retention.keep_count.",
    )
    .flag("pitr-days"),
    key(
        "run.backup_interval",
        Form::Duration { min: Duration::from_secs(1) },
        Group::Run,
        "How often 'tidemark run' takes a base backup, counted from the start of the newest one.",
    )
    .default("1d")
    .flag("backup-interval"),
    key(
        "run.upkeep_interval",
        Form::Duration { min: Duration::from_secs(1) },
        Group::Run,
        "How often 'tidemark run' deletes what retention does not ask for and what aborted backups left.",
    )
    .default("1h")
    .flag("upkeep-interval"),
    key(
        "metrics.listen",
        Form::Text,
        Group::Stream,
        "Address and port, such as 127.0.0.1:9187, where 'tidemark stream' and 'tidemark run' answer \
         GET /metrics for Prometheus. Without it nothing listens.",
    ),
    key(
        "restore.time_zone",
        Form::Text,
        Group::Restore,
        "Time zone of times that name none, such as Europe/Berlin or 'local'. Without it such a \
         time is refused.",
    )
    .flag("time-zone"),
    key(
        "log.level",
        Form::Text,
        Group::Everywhere,
        "What is logged to standard error: error, warn, info, debug, trace, or a filter such as \
         'info,tidemark::wire=debug'.",
    )
    .default("warn")
    .flag("log-level"),
    key(
        "log.format",
        Form::Choice(&["text", "json"]),
        Group::Everywhere,
        "Form of log lines: for people, or one JSON object a line.",
    )
    .default("text")
    .flag("log-format"),
];

/// The row named `name`.
#[must_use]
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// Similarity from which a name is worth suggesting; 1 is equal. Two letters wrong of ten pass.
const SUGGEST_SIMILARITY_MIN: f64 = 0.75;

/// The candidate nearest to `given`, when there is one worth suggesting.
pub fn nearest<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::normalized_damerau_levenshtein(given, candidate), candidate))
        .filter(|(similarity, _)| *similarity >= SUGGEST_SIMILARITY_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// The setting a wrong name was probably meant to be: near as a whole, or right but in another
/// section.
#[must_use]
pub fn suggestion(given: &str) -> Option<&'static str> {
    let leaf = given.rsplit('.').next().unwrap_or(given);
    nearest(given, KEYS.iter().map(|key| key.name))
        .or_else(|| KEYS.iter().find(|key| key.leaf() == leaf).map(|key| key.name))
        .or_else(|| {
            let leaf = nearest(leaf, KEYS.iter().map(Key::leaf))?;
            KEYS.iter().find(|key| key.leaf() == leaf).map(|key| key.name)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_flags_and_variables_are_unique_and_sections_contiguous() {
        let distinct = |mut all: Vec<String>| {
            let count = all.len();
            all.sort();
            all.dedup();
            all.len() == count
        };
        assert!(distinct(KEYS.iter().map(|key| key.name.to_owned()).collect()));
        assert!(distinct(KEYS.iter().flat_map(Key::variables).collect()));
        assert!(distinct(KEYS.iter().filter_map(|key| key.flag.map(str::to_owned)).collect()));
        let shorts = KEYS.iter().filter_map(|key| key.short.map(String::from));
        assert!(distinct(shorts.collect()));
        let mut sections: Vec<&str> = KEYS.iter().map(Key::section).collect();
        sections.dedup();
        assert!(distinct(sections.into_iter().map(str::to_owned).collect()));
    }

    #[test]
    fn help_ends_as_a_sentence() {
        for key in KEYS {
            assert!(key.help.ends_with('.'), "{}", key.name);
            assert!(!key.help.contains("  "), "{}", key.name);
        }
    }

    #[test]
    fn a_misspelt_or_misplaced_name_finds_the_right_one() {
        assert_eq!(suggestion("postgres.slott"), Some("postgres.slot"));
        assert_eq!(suggestion("postgres.recipients"), Some("keys.recipients"));
        assert_eq!(suggestion("identity_fil"), Some("keys.identity_file"));
        assert_eq!(suggestion("zzz"), None);
    }
}
