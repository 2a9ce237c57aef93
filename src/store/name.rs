//! Names of objects, relative to the root of a store.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Kind, Result};

/// Longest name in bytes: S3 allows 1024 for the key, and the root's prefix needs its part of it.
pub const NAME_BYTES_MAX: usize = 512;

/// The name of an object: segments of `[A-Za-z0-9._-]`, joined by `/`, none of them empty or beginning
/// with a dot. So a name is the same thing in S3, in a directory and in a log, and can neither climb
/// out of the root nor meet the temporary files of the directory driver.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(String);

impl ObjectName {
    /// Checks `name` against the rules above.
    ///
    /// # Errors
    /// `usage` when it breaks one of them.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        match flaw(&name) {
            None => Ok(Self(name)),
            Some(flaw) => Err(Error::new(
                Kind::Usage,
                format!("unable to use {name:?} as the name of an object: {flaw}"),
            )),
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What is wrong with `name`, if anything.
fn flaw(name: &str) -> Option<String> {
    if name.len() > NAME_BYTES_MAX {
        return Some(format!("{} bytes, at most {NAME_BYTES_MAX} are allowed", name.len()));
    }
    for segment in name.split('/') {
        if segment.is_empty() {
            return Some("an empty segment".to_owned());
        }
        if segment.starts_with('.') {
            return Some(format!("the segment '{segment}' begins with a dot"));
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if let Some(c) = segment.chars().find(|&c| !allowed(c)) {
            return Some(format!("the character {c:?}, only A-Z a-z 0-9 . _ - are allowed"));
        }
    }
    None
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.0)
    }
}

impl FromStr for ObjectName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::new(name)
    }
}

impl AsRef<str> for ObjectName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_format_are_accepted() {
        for name in [
            "main/identity",
            "main/wal/00000001/0000000001000000-0000000002000000-0000000000000000",
            "main/wal/00000002.history",
            "a_b-C.9/base/20261122T100000Z-00000001-0000000001000028/pack-0",
        ] {
            assert_eq!(ObjectName::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn names_that_could_leave_the_root_or_hide_are_refused() {
        for name in [
            "", "/a", "a/", "a//b", "..", "a/../b", ".tmp/x", "a/.b", "a b", "a\\b", "ä", "a\0",
            "a%2f",
        ] {
            let error = ObjectName::new(name).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{name:?}");
        }
        assert!(ObjectName::new("x".repeat(NAME_BYTES_MAX)).is_ok());
        assert!(ObjectName::new("x".repeat(NAME_BYTES_MAX + 1)).is_err());
    }
}
