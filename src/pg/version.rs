//! PostgreSQL's version numbers.
//!
//! # Source
//! `server_version_num` (`PG_VERSION_NUM` in `pg_config.h`), and the file `PG_VERSION` of a data
//! directory (`write_version_file` in `src/bin/initdb/initdb.c`): the major version and a newline.

use std::fmt;
use std::ops::RangeInclusive;

use crate::error::{Error, Kind, Result};

/// The major versions this build knows in every format it reads and writes.
pub const SUPPORTED_MAJORS: RangeInclusive<u32> = 13..=18;

/// A server's version as `server_version_num` gives it: 150018 is 15.18; a minor version of 0 also
/// stands for "any", where only the major version is known.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct Version(u32);

impl Version {
    /// The version with this `server_version_num`.
    ///
    /// # Errors
    /// `unsupported` for a major version that this build does not know.
    pub fn from_server_version_num(number: u32) -> Result<Self> {
        let version = Self(number);
        if SUPPORTED_MAJORS.contains(&version.major()) {
            return Ok(version);
        }
        let (low, high) = (SUPPORTED_MAJORS.start(), SUPPORTED_MAJORS.end());
        Err(Error::new(
            Kind::Unsupported,
            format!("unable to work with PostgreSQL {version}: this build knows {low} to {high}"),
        )
        .hint("Use a release of Tidemark that knows this version of PostgreSQL."))
    }

    /// The version of a server that calls itself this in its `server_version_num` setting.
    ///
    /// # Errors
    /// `corrupt` when the text is not a number, `unsupported` as for a number.
    pub fn from_setting(text: &str) -> Result<Self> {
        let number = decimal(text).ok_or_else(|| unreadable(text))?;
        Self::from_server_version_num(number)
    }

    /// The major version in the text of a data directory's `PG_VERSION` file.
    ///
    /// # Errors
    /// `corrupt` when the text is no version, `unsupported` as for a number.
    pub fn from_version_file(text: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(text).map_or("not text", str::trim_ascii_end);
        let major = decimal(text).filter(|major| *major < 1000).ok_or_else(|| unreadable(text))?;
        Self::from_server_version_num(major * 10_000)
    }

    /// The major version, such as 15.
    #[must_use]
    pub fn major(self) -> u32 {
        self.0 / 10_000
    }

    /// The minor version, such as 18 of 15.18.
    #[must_use]
    pub fn minor(self) -> u32 {
        self.0 % 10_000
    }

    /// The number as `server_version_num` has it.
    #[must_use]
    pub fn server_version_num(self) -> u32 {
        self.0
    }
}

fn decimal(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn unreadable(text: &str) -> Error {
    let shown: String = text.chars().take(32).collect();
    Error::new(Kind::Corrupt, format!("unable to read '{shown}' as a PostgreSQL version"))
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.major())?;
        if self.minor() == 0 { Ok(()) } else { write!(f, ".{}", self.minor()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_the_setting_and_the_file() {
        let version = Version::from_setting("150018").unwrap();
        assert_eq!((version.major(), version.minor()), (15, 18));
        assert_eq!(version.to_string(), "15.18");
        let version = Version::from_version_file(b"18\n").unwrap();
        assert_eq!((version.major(), version.to_string().as_str()), (18, "18"));
    }

    #[test]
    fn unknown_majors_are_unsupported_and_rubbish_is_corrupt() {
        for text in ["120000", "190000", "90600"] {
            assert_eq!(
                Version::from_setting(text).unwrap_err().kind(),
                Kind::Unsupported,
                "{text}"
            );
        }
        for text in ["", "15.2", "-1", "+150000", "99999999999"] {
            assert_eq!(Version::from_setting(text).unwrap_err().kind(), Kind::Corrupt, "{text}");
        }
        for text in [&b"\xff"[..], b"", b"9.6\n", b"99999\n"] {
            assert_eq!(Version::from_version_file(text).unwrap_err().kind(), Kind::Corrupt);
        }
    }
}
