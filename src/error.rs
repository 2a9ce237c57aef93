//! The one error type of the library: a closed list of kinds, each with its exit status and whether
//! trying again can help, and a message for the person who reads it at three in the morning.
//!
//! # Shape
//! `message` says what was attempted and why it failed ("unable to *verb* *thing* 'name': found,
//! expected, where"), lower case, no full stop. `hint` is a separate sentence naming an action or an
//! option. Context is added in front as an error travels up; the hint nearest the cause is kept.

use std::fmt;

/// What stands for a secret wherever one would be shown.
pub const MASK: &str = "********";

/// A URL as it may be shown: without the user's name and password that may be in it, also where it
/// lacks its scheme, or where they hold what ends them (`/`, `#`) by the rules of URLs. A path that
/// begins with a slash or a dot is left as it is.
#[must_use]
pub fn mask_user_info(text: &str) -> String {
    let in_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) if scheme.chars().all(in_scheme) => (format!("{scheme}://"), rest),
        _ => (String::new(), text),
    };
    let authority = rest.split('/').next().unwrap_or(rest);
    match rest.rsplit_once('@') {
        Some((_, place)) if authority.contains(['@', ':']) => format!("{scheme}{MASK}@{place}"),
        _ => text.to_owned(),
    }
}

/// What went wrong, as far as a caller may branch on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The command line asks for something that makes no sense.
    Usage,
    /// The configuration (file, environment, flags, server settings) must be changed first.
    Config,
    /// Something we need does not answer, or refuses for now.
    Unavailable,
    /// Credentials or rights are missing or wrong.
    Denied,
    /// The named thing does not exist.
    NotFound,
    /// Somebody else holds or has made the thing.
    Conflict,
    /// Bytes are not what their checksum, tag or format says they must be.
    Corrupt,
    /// A version or feature that this build does not handle.
    Unsupported,
    /// Stopped on request.
    Cancelled,
    /// An invariant of ours was broken.
    Bug,
}

/// Whether the same call may succeed later with nothing changed by an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Worth trying again with backoff.
    Later,
    /// Trying again gives the same answer.
    Never,
}

/// The table of kinds: name, process exit status, whether to retry.
const TABLE: [(Kind, &str, u8, Retry); 10] = [
    (Kind::Usage, "usage", 2, Retry::Never),
    (Kind::Config, "config", 3, Retry::Never),
    (Kind::Unavailable, "unavailable", 4, Retry::Later),
    (Kind::Denied, "denied", 5, Retry::Never),
    (Kind::NotFound, "not found", 6, Retry::Never),
    (Kind::Conflict, "conflict", 7, Retry::Never),
    (Kind::Corrupt, "corrupt", 8, Retry::Never),
    (Kind::Unsupported, "unsupported", 9, Retry::Never),
    (Kind::Cancelled, "cancelled", 10, Retry::Never),
    (Kind::Bug, "bug", 70, Retry::Never),
];

impl Kind {
    fn row(self) -> (&'static str, u8, Retry) {
        TABLE
            .iter()
            .find(|row| row.0 == self)
            .map_or(("bug", 70, Retry::Never), |row| (row.1, row.2, row.3))
    }

    /// The kind's name as `--json` output and the documentation spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// Exit status of the process that ends with an error of this kind.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        self.row().1
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub fn retry(self) -> Retry {
        self.row().2
    }

    /// All kinds in the order of the documented table.
    pub fn all() -> impl Iterator<Item = Kind> {
        TABLE.iter().map(|row| row.0)
    }
}

/// An error of the library; see the module for the wording.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    message: String,
    hint: Option<String>,
}

/// Result of every fallible function of the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A new error of `kind`; see the module for how `message` is worded.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), hint: None }))
    }

    /// Adds the sentence that says what to do, unless one nearer the cause is there already.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        if self.0.hint.is_none() {
            self.0.hint = Some(hint.into());
        }
        self
    }

    /// Adds one more sentence after the hint: for the place that knows what was left behind.
    #[must_use]
    pub fn further_hint(mut self, sentence: &str) -> Self {
        self.0.hint = Some(match self.0.hint.take() {
            Some(hint) => format!("{hint} {sentence}"),
            None => sentence.to_owned(),
        });
        self
    }

    /// Puts what was being attempted in front of the message.
    #[must_use]
    pub fn context(mut self, attempted: impl fmt::Display) -> Self {
        self.0.message = format!("{attempted}: {}", self.0.message);
        self
    }

    /// The same error as another kind: for the place that knows better what the failure means.
    #[must_use]
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.0.kind = kind;
        self
    }

    /// What went wrong, to branch on.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The message without the hint.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What to do about it, if known.
    #[must_use]
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.0.kind.retry() == Retry::Later
    }

    /// An operating system error as ours: rights, missing, existing and full disk keep their meaning.
    pub fn io(attempted: impl fmt::Display, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::NotFound => Kind::NotFound,
            Io::PermissionDenied | Io::ReadOnlyFilesystem => Kind::Denied,
            Io::AlreadyExists | Io::DirectoryNotEmpty => Kind::Conflict,
            Io::InvalidData | Io::UnexpectedEof => Kind::Corrupt,
            Io::Unsupported => Kind::Unsupported,
            _ => Kind::Unavailable,
        };
        let made = Self::new(kind, format!("{attempted}: {error}"));
        match error.kind() {
            Io::StorageFull | Io::QuotaExceeded => {
                made.hint("Free space on that file system, or choose another one, and run again.")
            }
            _ => made,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.0.message, self.0.kind.name())?;
        self.0.hint.as_ref().map_or(Ok(()), |hint| write!(f, " hint: {hint}"))
    }
}

impl std::error::Error for Error {}

/// Context for results, as [`Error::context`] for errors.
pub trait Context<T> {
    /// Puts what was being attempted in front of the message of an error.
    ///
    /// # Errors
    /// The same error with the longer message.
    fn context<D: fmt::Display>(self, attempted: impl FnOnce() -> D) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context<D: fmt::Display>(self, attempted: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| error.context(attempted()))
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context<D: fmt::Display>(self, attempted: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| Error::io(attempted(), &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_shown_without_what_may_be_a_secret() {
        for text in ["s3://b/p", "s3://b/p@q", "http://h:9000/", "/var/b@c", "./b@c", "b/c@d", ""] {
            assert_eq!(mask_user_info(text), text);
        }
        for (text, shown) in [
            ("s3://k:hush@b/p", "s3://********@b/p"),
            ("s3://k:hu/sh@b/p", "s3://********@b/p"),
            ("http://u:hu#sh@h", "http://********@h"),
            ("https://u:hu@sh@h:1", "https://********@h:1"),
            ("u:hush@h:9000", "********@h:9000"),
            ("u:hush@http://h", "********@http://h"),
            ("s3:/k:hush@b", "********@b"),
        ] {
            assert_eq!(mask_user_info(text), shown);
        }
    }

    #[test]
    fn exit_codes_are_distinct_and_never_success() {
        let mut codes: Vec<u8> = Kind::all().map(Kind::exit_code).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Kind::all().count());
        assert!(!codes.contains(&0));
    }

    #[test]
    fn the_hint_nearest_the_cause_wins() {
        let error = Error::new(Kind::Denied, "password refused").hint("Check it.").hint("Later.");
        assert_eq!(error.hint_text(), Some("Check it."));
        let error = error.context("unable to connect to 'db'");
        assert_eq!(error.to_string(), "unable to connect to 'db': password refused");
        assert_eq!(error.further_hint("Or ask.").hint_text(), Some("Check it. Or ask."));
        let error = Error::new(Kind::Denied, "no").further_hint("Ask.");
        assert_eq!(error.hint_text(), Some("Ask."));
    }
}
