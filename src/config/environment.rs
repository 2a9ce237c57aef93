//! The process environment as a value, so that everything that depends on it can be tested.

use std::collections::BTreeMap;
use std::fmt;

/// Environment variables whose names and values are UTF-8; others are of no use to us.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// The environment of this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        let text = |s: std::ffi::OsString| s.into_string().ok();
        Self(std::env::vars_os().filter_map(|(k, v)| Some((text(k)?, text(v)?))).collect())
    }

    /// An environment of these variables only.
    pub fn of<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(variables.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    /// The value of a variable.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// What a program of ours needs to run without the caller's settings: where programs and
    /// libraries are, and what the terminal can do.
    #[must_use]
    pub fn bare(&self) -> Vec<(String, String)> {
        let names = ["PATH", "LD_LIBRARY_PATH", "TMPDIR", "TERM"];
        let set = names.iter().filter_map(|name| Some((*name, self.get(name)?)));
        set.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// The names of all variables.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} variables", self.0.len())
    }
}
