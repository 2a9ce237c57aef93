//! Data keys wrapped for their recipients: the one file that names the `age` crate.
//!
//! A host that writes needs recipients only: it draws a data key, wraps it, puts it, and forgets it
//! when it ends. A host that reads needs the decryption identity of one recipient.
//!
//! # Shape
//! `<cluster>/keys/<key id>` is a binary age file. Its plain content is 64 bytes:
//! `"TMKEY v1"`, the system identifier (little endian, 8 bytes), the key id (16), the data key (32); so
//! a key file under another's name, or of another cluster, is noticed when it is opened.
//!
//! The randomness inside an age file is the crate's own (the operating system's), not
//! [`Clock`](crate::clock::Clock)'s: it is the one thing a simulation does not repeat.

use std::fmt;
use std::io::{Read, Write};
use std::str::FromStr;

use bytes::Bytes;
use secrecy::{ExposeSecret, SecretString};

use super::header::array;
use super::names::KeyId;
use crate::error::{Error, Kind, Result};
use crate::pg::SystemId;
use crate::pipeline::cipher::DataKey;

/// First bytes of an unwrapped key.
const PAYLOAD_MAGIC: [u8; 8] = *b"TMKEY v1";
/// Bytes of an unwrapped key.
const PAYLOAD_BYTES: usize = 64;
/// Longest wrapped key that is read: room for over a hundred recipients.
pub(super) const WRAPPED_BYTES_MAX: u64 = 16 << 10;
/// scrypt's cost for a passphrase as a power of two: 128 MiB of memory, about 0.3 s, OWASP's minimum.
const PASSPHRASE_LOG_N: u8 = 17;
/// Greatest cost accepted from a key file: what the `age` tool itself chooses; more could only be
/// meant to exhaust us.
const PASSPHRASE_LOG_N_MAX: u8 = 18;

/// How what is written is protected. There is no default: a caller says it.
#[derive(Clone, Debug)]
pub enum Encryption {
    /// Not at all, as the operator asked for in so many words.
    None,
    /// Readable only with an identity of one of these recipients.
    Recipients(Vec<Recipient>),
}

/// Who can read what is written.
#[derive(Clone)]
pub struct Recipient(RecipientKind);

#[derive(Clone)]
enum RecipientKind {
    X25519(age::x25519::Recipient),
    Passphrase(SecretString),
}

impl Recipient {
    /// Whoever knows `passphrase`; it must then be the only recipient.
    #[must_use]
    pub fn passphrase(passphrase: SecretString) -> Self {
        Self(RecipientKind::Passphrase(passphrase))
    }
}

impl FromStr for Recipient {
    type Err = Error;

    /// An X25519 public key as `age-keygen` prints it.
    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.to_ascii_uppercase().contains("AGE-SECRET-KEY-") {
            // Not repeated in the message: it is a secret.
            return Err(Error::new(
                Kind::Config,
                "unable to use a recipient: it is a secret key where a public key belongs",
            )
            .hint("Give the matching public key, which begins with 'age1'."));
        }
        text.parse().map(|key| Self(RecipientKind::X25519(key))).map_err(|flaw: &str| {
            let message = format!("unable to use '{text}' as a recipient: {flaw}");
            Error::new(Kind::Config, message).hint(
                "A recipient is a public key that begins with 'age1'; 'tidemark keygen' makes one.",
            )
        })
    }
}

impl fmt::Display for Recipient {
    /// The public key, or that it is a passphrase.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            RecipientKind::X25519(key) => fmt::Display::fmt(key, f),
            RecipientKind::Passphrase(_) => f.write_str("passphrase"),
        }
    }
}

impl fmt::Debug for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The secret that opens what was written for its recipient: an age secret key or a passphrase.
/// (A cluster's `identity` object is [`ClusterIdentity`](super::ClusterIdentity), another thing.)
#[derive(Clone)]
pub struct DecryptionIdentity(IdentityKind);

#[derive(Clone)]
enum IdentityKind {
    X25519(age::x25519::Identity),
    Passphrase(SecretString),
}

impl DecryptionIdentity {
    /// A new X25519 secret key.
    #[must_use]
    pub fn generate() -> Self {
        Self(IdentityKind::X25519(age::x25519::Identity::generate()))
    }

    /// Whoever knows `passphrase`.
    #[must_use]
    pub fn passphrase(passphrase: SecretString) -> Self {
        Self(IdentityKind::Passphrase(passphrase))
    }

    /// All secret keys of an identity file: one a line, lines that begin with `#` are comments.
    ///
    /// # Errors
    /// `config` when a line is neither, or when there is no key; no line is repeated in the message.
    pub fn parse_file(text: &str) -> Result<Vec<Self>> {
        let mut identities = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let key = line.parse().map_err(|flaw: &str| {
                let number = index + 1;
                let message = format!("unable to read a secret key in line {number}: {flaw}");
                Error::new(Kind::Config, message)
                    .hint("An identity file holds lines that begin with 'AGE-SECRET-KEY-1'.")
            })?;
            identities.push(Self(IdentityKind::X25519(key)));
        }
        if identities.is_empty() {
            return Err(Error::new(Kind::Config, "there is no secret key in the identity file")
                .hint("An identity file holds lines that begin with 'AGE-SECRET-KEY-1'."));
        }
        Ok(identities)
    }

    /// The recipient this identity reads for.
    #[must_use]
    pub fn recipient(&self) -> Recipient {
        Recipient(match &self.0 {
            IdentityKind::X25519(key) => RecipientKind::X25519(key.to_public()),
            IdentityKind::Passphrase(text) => RecipientKind::Passphrase(text.clone()),
        })
    }

    /// As age takes it.
    fn key(&self) -> Box<dyn age::Identity> {
        match &self.0 {
            IdentityKind::X25519(key) => Box::new(key.clone()),
            IdentityKind::Passphrase(passphrase) => {
                let mut key = age::scrypt::Identity::new(passphrase.clone());
                key.set_max_work_factor(PASSPHRASE_LOG_N_MAX);
                Box::new(key)
            }
        }
    }

    /// The secret key as the line of an identity file, `None` for a passphrase.
    #[must_use]
    pub fn secret_line(&self) -> Option<SecretString> {
        match &self.0 {
            IdentityKind::X25519(key) => Some(key.to_string()),
            IdentityKind::Passphrase(_) => None,
        }
    }
}

impl fmt::Debug for DecryptionIdentity {
    /// The recipient it belongs to, never the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DecryptionIdentity({})", self.recipient())
    }
}

/// Wraps `key` for the recipients: the body of its key object.
pub(super) fn wrap(
    key: &DataKey,
    id: KeyId,
    system_id: SystemId,
    recipients: &[Recipient],
) -> Result<Bytes> {
    let failed = |error: &dyn fmt::Display| {
        Error::new(Kind::Bug, format!("unable to wrap a data key: {error}"))
    };
    let encryptor = encryptor(recipients)?;
    let mut wrapped = Vec::new();
    let mut writer = encryptor.wrap_output(&mut wrapped).map_err(|error| failed(&error))?;
    let mut payload = zeroize::Zeroizing::new(Vec::with_capacity(PAYLOAD_BYTES));
    payload.extend_from_slice(&PAYLOAD_MAGIC);
    payload.extend_from_slice(&system_id.0.to_le_bytes());
    payload.extend_from_slice(&id.0);
    payload.extend_from_slice(key.expose());
    writer.write_all(&payload).and_then(|()| writer.finish()).map_err(|error| failed(&error))?;
    if wrapped.len() as u64 > WRAPPED_BYTES_MAX {
        let count = recipients.len();
        return Err(Error::new(
            Kind::Config,
            format!("unable to wrap a data key for {count} recipients: at most about 120 fit"),
        ));
    }
    Ok(Bytes::from(wrapped))
}

fn encryptor(recipients: &[Recipient]) -> Result<age::Encryptor> {
    let mut keys: Vec<Box<dyn age::Recipient>> = Vec::with_capacity(recipients.len());
    for recipient in recipients {
        match &recipient.0 {
            RecipientKind::X25519(key) => keys.push(Box::new(key.clone())),
            RecipientKind::Passphrase(_) if recipients.len() > 1 => {
                return Err(Error::new(
                    Kind::Config,
                    "unable to encrypt for a passphrase and other recipients together",
                )
                .hint("Give either one passphrase or any number of public keys."));
            }
            RecipientKind::Passphrase(passphrase) => {
                let mut key = age::scrypt::Recipient::new(passphrase.clone());
                key.set_work_factor(PASSPHRASE_LOG_N);
                keys.push(Box::new(key));
            }
        }
    }
    age::Encryptor::with_recipients(keys.iter().map(|key| &**key)).map_err(|error| {
        let flaw = match error {
            age::EncryptError::MissingRecipients => "there is none",
            age::EncryptError::MixedRecipientAndPassphrase => {
                "a passphrase cannot be mixed with public keys or other passphrases"
            }
            _ => "they do not go together",
        };
        Error::new(Kind::Config, format!("unable to encrypt for these recipients: {flaw}"))
            .hint("Give at least one recipient; 'tidemark keygen' makes one.")
    })
}

/// Whether the body of a key object is sealed for a passphrase; what is no key object is not.
pub(super) fn is_for_passphrase(wrapped: &[u8]) -> bool {
    age::Decryptor::new_buffered(wrapped).is_ok_and(|decryptor| decryptor.is_scrypt())
}

/// Unwraps the body of key object `id` with the first identity that fits.
pub(super) fn unwrap(
    wrapped: &[u8],
    id: KeyId,
    system_id: SystemId,
    identities: &[DecryptionIdentity],
) -> Result<DataKey> {
    let is_passphrase = begun(wrapped)?.is_scrypt();
    let mut opened = None;
    for identity in identities {
        // Each by itself: of several that are given together, age tries none after a passphrase that
        // does not fit.
        match begun(wrapped)?.decrypt(std::iter::once(&*identity.key())) {
            Ok(reader) => {
                opened = Some(reader);
                break;
            }
            Err(
                age::DecryptError::NoMatchingKeys
                | age::DecryptError::DecryptionFailed
                | age::DecryptError::KeyDecryptionFailed,
            ) => {}
            Err(error) => return Err(damaged(flaw_of(&error))),
        }
    }
    let mut reader = opened.ok_or_else(|| denied(identities, is_passphrase))?;
    let mut payload = zeroize::Zeroizing::new(Vec::with_capacity(PAYLOAD_BYTES + 1));
    (&mut reader)
        .take(PAYLOAD_BYTES as u64 + 1)
        .read_to_end(&mut payload)
        .map_err(|error| damaged(flaw_of(&age::DecryptError::Io(error))))?;
    let parts = || {
        let magic: [u8; 8] = array(&payload, 0)?;
        let whole = payload.len() == PAYLOAD_BYTES && magic == PAYLOAD_MAGIC;
        whole.then_some((array(&payload, 8)?, array(&payload, 16)?, array(&payload, 32)?))
    };
    let (system, found, key) = parts().ok_or_else(|| damaged("it holds something else"))?;
    if SystemId(u64::from_le_bytes(system)) != system_id || KeyId(found) != id {
        return Err(damaged("it is another key under this name"));
    }
    Ok(DataKey::new(key))
}

fn begun(wrapped: &[u8]) -> Result<age::Decryptor<&[u8]>> {
    age::Decryptor::new_buffered(wrapped).map_err(|error| damaged(flaw_of(&error)))
}

fn damaged(found: &str) -> Error {
    Error::new(Kind::Corrupt, format!("the key object is damaged: {found}")).hint(
        "Nothing sealed with this key can be read without it: bring the object back from an older \
         version or another copy of the repository.",
    )
}

/// What is wrong with an age file. Never by its own `Display`: that looks for translations, and ends
/// the thread where it finds none.
fn flaw_of(error: &age::DecryptError) -> &'static str {
    match error {
        age::DecryptError::InvalidHeader => "its header makes no sense",
        age::DecryptError::InvalidMac => "its header is not authentic",
        age::DecryptError::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            "it is cut off"
        }
        age::DecryptError::ExcessiveWork { .. } => "it asks for far more work than we put into one",
        age::DecryptError::UnknownFormat => "it is in a format that this build does not know",
        _ => "it is not authentic",
    }
}

fn denied(identities: &[DecryptionIdentity], is_passphrase: bool) -> Error {
    let wanted = if is_passphrase { "a passphrase" } else { "one or more public keys" };
    let given = match identities {
        [] => "no identity (secret key or passphrase) was given".to_owned(),
        some => {
            let names: Vec<String> =
                some.iter().map(|identity| identity.recipient().to_string()).collect();
            format!("given were the identities of {}", names.join(", "))
        }
    };
    Error::new(Kind::Denied, format!("it is sealed for {wanted}, {given}")).hint(if is_passphrase {
        "Give the passphrase that was used when this was written, as a line of its own of the \
         passphrase file (--passphrase-file)."
    } else {
        "Give the identity file of a recipient that was configured when this was written \
             (--identity); 'tidemark list' shows for whom the backups were sealed."
    })
}

/// The secret as text, for tests and for the file `keygen` writes.
#[must_use]
pub fn expose(secret: &SecretString) -> &str {
    secret.expose_secret()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: KeyId = KeyId([3; 16]);
    const SYSTEM: SystemId = SystemId(42);

    fn wrapped(recipients: &[Recipient]) -> Bytes {
        wrap(&DataKey::new([7; 32]), ID, SYSTEM, recipients).unwrap()
    }

    #[test]
    fn any_one_of_the_recipients_opens_and_nobody_else() {
        let (a, b, c) = (
            DecryptionIdentity::generate(),
            DecryptionIdentity::generate(),
            DecryptionIdentity::generate(),
        );
        let body = wrapped(&[a.recipient(), b.recipient()]);
        for identity in [&a, &b] {
            let key = unwrap(&body, ID, SYSTEM, &[c.clone(), identity.clone()]).unwrap();
            assert_eq!(key.expose(), &[7; 32]);
        }
        let error = unwrap(&body, ID, SYSTEM, std::slice::from_ref(&c)).unwrap_err();
        assert_eq!(error.kind(), Kind::Denied);
        assert!(error.to_string().contains(&c.recipient().to_string()), "{error}");
        let error = unwrap(&body, ID, SYSTEM, &[]).unwrap_err();
        assert_eq!(error.kind(), Kind::Denied);
        assert!(error.hint_text().unwrap().contains("--identity"));
    }

    #[test]
    fn a_passphrase_opens_alone() {
        let secret = |text: &str| SecretString::from(text.to_owned());
        let recipient = Recipient::passphrase(secret("tide"));
        let body = wrapped(std::slice::from_ref(&recipient));
        let right = DecryptionIdentity::passphrase(secret("tide"));
        assert!(unwrap(&body, ID, SYSTEM, std::slice::from_ref(&right)).is_ok());
        let wrong = DecryptionIdentity::passphrase(secret("ebb"));
        let others = [DecryptionIdentity::generate(), wrong.clone(), right.clone()];
        assert!(unwrap(&body, ID, SYSTEM, &others).is_ok());
        let error = unwrap(&body, ID, SYSTEM, &[wrong]).unwrap_err();
        assert_eq!(error.kind(), Kind::Denied);
        assert!(!format!("{error:?}").contains("ebb"));
        let mixed = [recipient, DecryptionIdentity::generate().recipient()];
        let error = wrap(&DataKey::public(), ID, SYSTEM, &mixed).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert_eq!(wrap(&DataKey::public(), ID, SYSTEM, &[]).unwrap_err().kind(), Kind::Config);
    }

    #[test]
    fn what_is_sealed_for_a_passphrase_is_known_without_it() {
        let passphrase = Recipient::passphrase(SecretString::from("tide".to_owned()));
        assert!(is_for_passphrase(&wrapped(&[passphrase])));
        assert!(!is_for_passphrase(&wrapped(&[DecryptionIdentity::generate().recipient()])));
        assert!(!is_for_passphrase(b"age-encryption.org/v1"));
    }

    #[test]
    fn damaged_and_swapped_keys_are_corrupt() {
        let identity = [DecryptionIdentity::generate()];
        let body = wrapped(&[identity[0].recipient()]);
        for index in 0..body.len() {
            let mut bad = body.to_vec();
            bad[index] ^= 1;
            let error = unwrap(&bad, ID, SYSTEM, &identity).unwrap_err();
            assert!(matches!(error.kind(), Kind::Corrupt | Kind::Denied), "{index}: {error}");
            let error = unwrap(&body[..index], ID, SYSTEM, &identity).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt);
            assert!(error.message().starts_with("the key object is damaged: it"), "{error}");
        }
        for (id, system_id) in [(KeyId([4; 16]), SYSTEM), (ID, SystemId(43))] {
            let error = unwrap(&body, id, system_id, &identity).unwrap_err();
            assert!(error.to_string().contains("another key"), "{error}");
        }
    }

    #[test]
    fn secrets_are_never_shown_or_taken_for_recipients() {
        let identity = DecryptionIdentity::generate();
        let line = identity.secret_line().unwrap();
        assert!(!format!("{identity:?}").contains(expose(&line)));
        let error = expose(&line).parse::<Recipient>().unwrap_err();
        assert!(!format!("{error:?}").contains(expose(&line)));
        let file = format!("# made today\n\n{}\n", expose(&line));
        let quoted = format!("'{}'", expose(&line));
        for text in [&file, &quoted] {
            let error = text.parse::<Recipient>().unwrap_err();
            assert!(!format!("{error:?}").contains(expose(&line)), "{error:?}");
        }
        let read = DecryptionIdentity::parse_file(&file).unwrap();
        assert_eq!(read[0].recipient().to_string(), identity.recipient().to_string());
        let error = DecryptionIdentity::parse_file("AGE-SECRET-KEY-1QQ").unwrap_err();
        assert!(!error.to_string().contains("1QQ") && error.to_string().contains("line 1"));
        assert!(DecryptionIdentity::parse_file("# nothing\n").is_err());
    }
}
