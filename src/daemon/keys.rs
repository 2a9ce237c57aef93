//! From settings to the keys that seal and open: recipients, identities, and the identity file that
//! the first write makes when nothing was configured.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use secrecy::ExposeSecret;

use crate::clock::Clock;
use crate::config::{Config, Sealing};
use crate::error::{Context, Error, Kind, Result};
use crate::file;
use crate::repo::{DecryptionIdentity, Encryption, Reader, Recipient, Repository};

/// An identity file longer than this is something else.
const IDENTITY_FILE_BYTES_MAX: u64 = 1 << 20;

/// How a writer seals.
#[derive(Debug)]
pub struct Seal {
    /// For whom.
    pub encryption: Encryption,
    /// The identity file that was made because nothing was configured: somebody must be told.
    pub made: Option<PathBuf>,
}

/// Everything that can open what is sealed: the identity file and the passphrases, as far as there
/// are any.
///
/// # Errors
/// `config` when a file that a setting names is missing or holds no key.
pub fn identities(config: &Config) -> Result<Vec<DecryptionIdentity>> {
    let mut identities = match existing_identity_file(config)? {
        Some(path) => read_identity_file(&path)?,
        None => Vec::new(),
    };
    identities.extend(passphrases(config)?);
    Ok(identities)
}

fn passphrases(config: &Config) -> Result<impl Iterator<Item = DecryptionIdentity>> {
    Ok(config.passphrases()?.into_iter().map(DecryptionIdentity::passphrase))
}

/// What reads `repository` with everything that can open it; objects that are not encrypted only when
/// the settings say so.
///
/// # Errors
/// As [`identities`].
pub fn reader(config: &Config, repository: &Repository) -> Result<Reader> {
    let reader = repository.reader(identities(config)?);
    match config.sealing() {
        Sealing::None => reader.accept_unencrypted(),
        Sealing::Age => Ok(reader),
    }
}

/// For whom to seal what is written to `repository`: the recipients configured, else those of the
/// identity file, else a new identity, which is then durable before this returns.
///
/// # Errors
/// `config` when the settings contradict one another, when others already write here and we do
/// not know for whom, or when they seal for a passphrase that none of ours is.
pub async fn seal(config: &Config, repository: &Repository) -> Result<Seal> {
    if let Some(encryption) = configured(config)? {
        let passphrases: Vec<DecryptionIdentity> = match config.sealing() {
            Sealing::None => Vec::new(),
            Sealing::Age => passphrases(config)?.collect(),
        };
        if !passphrases.is_empty() {
            repository.reader(passphrases).ensure_passphrase_goes_on().await?;
        }
        return Ok(Seal { encryption, made: None });
    }
    if repository.has_keys().await? {
        return Err(Error::new(
            Kind::Config,
            format!(
                "cluster '{}' has encrypted data, and neither a recipient nor an identity file is \
                 here to seal for",
                repository.cluster()
            ),
        )
        .hint(
            "Give --recipient age1... (the public key of who restores), or put the identity file \
             in its place; 'tidemark list' shows for whom the backups were sealed.",
        ));
    }
    let path = config.identity_file()?;
    let identity = DecryptionIdentity::generate();
    write_identity_file(&path, &identity, repository.clock())?;
    let recipient = identity.recipient();
    Ok(Seal { encryption: Encryption::Recipients(vec![recipient]), made: Some(path) })
}

/// For whom the settings and an existing identity file say to seal; `None` when they say nothing.
///
/// # Errors
/// `config` when they contradict one another or cannot be read.
pub fn configured(config: &Config) -> Result<Option<Encryption>> {
    if config.sealing() == Sealing::None {
        return Ok(Some(Encryption::None));
    }
    let mut recipients: Vec<Recipient> = Vec::new();
    for text in config.recipients() {
        recipients.push(text.parse::<Recipient>().context(|| {
            format!(
                "unable to read 'keys.recipients' from {}",
                config.settings.origin("keys.recipients")
            )
        })?);
    }
    // The others of a file are former ones, which only open.
    recipients.extend(config.passphrases()?.into_iter().next().map(Recipient::passphrase));
    if recipients.is_empty()
        && let Some(path) = existing_identity_file(config)?
    {
        recipients.extend(read_identity_file(&path)?.iter().map(DecryptionIdentity::recipient));
    }
    Ok((!recipients.is_empty()).then_some(Encryption::Recipients(recipients)))
}

/// The file a setting names, or the usual one when it exists.
fn existing_identity_file(config: &Config) -> Result<Option<PathBuf>> {
    if let Some(path) = config.named_identity_file() {
        return Ok(Some(path));
    }
    match config.identity_file() {
        Ok(path) if path.exists() => Ok(Some(path)),
        _ => Ok(None),
    }
}

/// The identities of a file.
///
/// # Errors
/// `config` when it cannot be read or holds no key; no content is repeated in the message.
pub fn read_identity_file(path: &Path) -> Result<Vec<DecryptionIdentity>> {
    let attempted = || format!("unable to read the identity file '{}'", path.display());
    let refused = |error: &std::io::Error| {
        Error::io(attempted(), error).with_kind(match error.kind() {
            std::io::ErrorKind::PermissionDenied => Kind::Denied,
            _ => Kind::Config,
        })
        .hint(
            "Name the identity file with --identity or TIDEMARK_KEYS_IDENTITY_FILE; this user must \
             be able to read it.",
        )
    };
    let text = file::read_to_string(path, IDENTITY_FILE_BYTES_MAX).map_err(|e| refused(&e))?;
    DecryptionIdentity::parse_file(&text).context(attempted)
}

/// Makes a new identity file that only its owner can read.
///
/// # Durability
/// The file, its folder and those above that had to be made are fsynced before this returns: nothing
/// may be sealed for an identity that a power failure could take away.
///
/// # Errors
/// `conflict` when the file exists: it is never overwritten.
pub fn write_identity_file(
    path: &Path,
    identity: &DecryptionIdentity,
    clock: &Clock,
) -> Result<()> {
    let attempted = || format!("unable to write the identity file '{}'", path.display());
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    file::make_folders(folder, 0o700).context(attempted)?;
    let mut file =
        std::fs::File::options().write(true).create_new(true).mode(0o600).open(path).map_err(
            |error| match error.kind() {
                std::io::ErrorKind::AlreadyExists => {
                    Error::new(Kind::Conflict, format!("{}: it exists already", attempted()))
                        .hint("An identity is never overwritten. Choose another file.")
                }
                _ => Error::io(attempted(), &error),
            },
        )?;
    let written = file
        .write_all(identity_text(identity, clock).as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::File::open(folder)?.sync_all());
    written.map_err(|error| {
        // Half a key must not be taken for a key later; what is left when this fails is named below.
        drop(std::fs::remove_file(path));
        Error::io(attempted(), &error)
    })
}

/// The text of an identity file.
#[must_use]
pub fn identity_text(identity: &DecryptionIdentity, clock: &Clock) -> String {
    let secret = identity.secret_line();
    let secret = secret.as_ref().map_or("", |secret| secret.expose_secret());
    format!(
        "# tidemark identity: the secret that opens backups. Keep a copy away from the database \
         host.\n# created: {:.0}\n# public key: {}\n{secret}\n",
        clock.now(),
        identity.recipient()
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use bytes::Bytes;

    use super::*;
    use crate::config::Environment;
    use crate::pg::{Lsn, SystemId, TimelineId};
    use crate::pipeline::Level;
    use crate::repo::{ClusterName, ExtentBuilder};
    use crate::store::memory::Memory;

    fn config(variables: &[(&str, &str)]) -> Config {
        let variables = variables.iter().copied().chain([("TIDEMARK_CONFIG", "")]);
        Config::load(None, Vec::new(), Environment::of(variables)).unwrap()
    }

    async fn empty_repository() -> Repository {
        let clock = Clock::system();
        let store = std::sync::Arc::new(Memory::new(&clock));
        let cluster = ClusterName::new("main").unwrap();
        Repository::create(store, cluster, SystemId(7), &clock).await.unwrap()
    }

    #[tokio::test]
    async fn the_first_write_makes_an_identity_and_the_next_uses_it() {
        let home = tempfile::tempdir().unwrap();
        let config = config(&[("HOME", home.path().to_str().unwrap())]);
        let repository = empty_repository().await;
        let first = seal(&config, &repository).await.unwrap();
        let path = first.made.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let second = seal(&config, &repository).await.unwrap();
        assert!(second.made.is_none());
        assert_eq!(format!("{:?}", first.encryption), format!("{:?}", second.encryption));
        assert_eq!(identities(&config).unwrap().len(), 1);
    }

    #[tokio::test]
    async fn nothing_is_sealed_for_a_new_identity_where_others_already_write() {
        let repository = empty_repository().await;
        let other = DecryptionIdentity::generate().recipient();
        repository.writer(&Encryption::Recipients(vec![other])).await.unwrap();
        let home = tempfile::tempdir().unwrap();
        let config = config(&[("HOME", home.path().to_str().unwrap())]);
        assert_eq!(seal(&config, &repository).await.unwrap_err().kind(), Kind::Config);
        assert!(!config.identity_file().unwrap().exists());
    }

    /// A passphrase has no checksum: one that is mistyped seals, and nothing opens with what was meant.
    #[tokio::test(start_paused = true)]
    async fn a_passphrase_changes_only_where_the_old_one_still_opens() {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 1);
        let (_, repository) = Repository::in_memory(&clock).await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passphrases");
        let with = |lines: &str| {
            std::fs::write(&path, lines).unwrap();
            config(&[("TIDEMARK_KEYS_PASSPHRASE_FILE", path.to_str().unwrap())])
        };
        let put = async |config: &Config, start: u64| {
            let encryption = seal(config, &repository).await?.encryption;
            let writer = repository.writer(&encryption).await?;
            let (timeline, level) = (TimelineId::FIRST, Level::default());
            let mut extent = ExtentBuilder::new(&writer, timeline, Lsn(start), level)?;
            extent.push(Bytes::from_static(b"wal"))?;
            let extent = extent.finish(None)?;
            writer.put_extent(&extent).await?;
            // The newest key is found by its time.
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            Ok::<_, Error>(extent.name)
        };
        let old = put(&with("a\n"), 0).await.unwrap();
        let error = put(&with("b\n"), 3).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Config, "{error}");
        assert!(error.hint_text().unwrap().contains("second line"), "{error:?}");
        let new = put(&with("b\na\n"), 3).await.unwrap();
        let both = reader(&with("b\na\n"), &repository).unwrap();
        for name in [old, new] {
            assert_eq!(both.extent(&name).await.unwrap(), &b"wal"[..]);
        }
        // Sealed with the first line: who forgets the old one is refused only what it sealed.
        put(&with("b\n"), 6).await.unwrap();
        let only_new = reader(&with("b\n"), &repository).unwrap();
        assert!(only_new.extent(&new).await.is_ok());
        assert_eq!(only_new.extent(&old).await.unwrap_err().kind(), Kind::Denied);
    }

    #[test]
    fn an_identity_file_without_end_is_refused() {
        let error = read_identity_file(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.message().ends_with("it has more than 1048576 bytes"), "{error}");
    }

    #[test]
    fn an_identity_file_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity.txt");
        let (clock, identity) = (Clock::system(), DecryptionIdentity::generate());
        write_identity_file(&path, &identity, &clock).unwrap();
        let before = std::fs::read_to_string(&path).unwrap();
        let error = write_identity_file(&path, &DecryptionIdentity::generate(), &clock);
        assert_eq!(error.unwrap_err().kind(), Kind::Conflict);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), before);
    }

    #[test]
    fn a_recipient_that_is_none_is_named_with_its_origin() {
        let error =
            configured(&config(&[("TIDEMARK_KEYS_RECIPIENTS", "age1nonsense")])).unwrap_err();
        assert!(error.message().contains("TIDEMARK_KEYS_RECIPIENTS"), "{error}");
    }
}
