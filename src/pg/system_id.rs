//! The number that tells one PostgreSQL cluster from every other.
//!
//! # Source
//! `ControlFileData.system_identifier` in `src/include/catalog/pg_control.h`.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Kind, Result};

/// A cluster's system identifier, drawn by `initdb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SystemId(pub u64);

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for SystemId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let number = text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
        number.map(SystemId).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("unable to read '{text}' as a system identifier"))
        })
    }
}

impl serde::Serialize for SystemId {
    /// As text: JSON numbers lose digits past 2^53.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for SystemId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}
