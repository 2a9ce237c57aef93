//! Where and how to connect, from a connection string, the environment and libpq's files.

use std::fmt;
use std::time::Duration;

use crate::error::Result;

/// Everything needed to connect; `Display` and `Debug` show no secret.
#[derive(Clone)]
pub struct ConnectOptions {
    text: String,
}

impl ConnectOptions {
    /// Reads a connection string (URI or `key=value`), fills what it leaves open from `PG*`
    /// variables, the service file and the password file, as libpq does.
    ///
    /// # Errors
    /// `config` for a string libpq would refuse, an unknown key (with the nearest known one), or a
    /// service that does not exist.
    pub fn parse(conninfo: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let _ = env;
        Ok(Self { text: conninfo.to_owned() })
    }

    /// Sets `application_name` unless the connection string or the environment names one.
    #[must_use]
    pub fn with_application_name(self, name: &str) -> Self {
        let _ = name;
        self
    }

    /// Sets for how long a server may be silent before the connection counts as lost.
    #[must_use]
    pub fn with_read_timeout(self, silence_max: Duration) -> Self {
        let _ = silence_max;
        self
    }
}

impl fmt::Display for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.text.len())
    }
}

impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnectOptions({self})")
    }
}
