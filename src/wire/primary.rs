//! The connection string with which a standby reaches its primary, for `primary_conninfo`.
//!
//! In: a connection string as a person types it, or the one we connect with ourselves. Out: `key=value`
//! pairs as `pg_basebackup --write-recovery-conf` writes them, but without any secret.
//!
//! # Invariants
//! No secret is in the text: a standby finds its password in a password file. What was left out is known
//! by the name of its key.
//!
//! # Source
//! `GenerateRecoveryConfig` in `src/fe_utils/recovery_gen.c` and `appendConnStrVal` in
//! `src/fe_utils/string_utils.c` (13 to 18).

use std::fmt::Write as _;

use super::conninfo::{self, Pairs};
use super::{options, os_user};
use crate::error::{Context, Error, Kind, Result};

/// Keys whose values are secrets.
const SECRETS: [&str; 5] =
    ["password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"];

/// Keys that PostgreSQL's walreceiver sets itself.
const SET_BY_WALRECEIVER: [&str; 2] = ["replication", "fallback_application_name"];

/// Keys that name files, which a server looks for in its data directory when they are relative.
const FILES: [&str; 6] = ["passfile", "sslcert", "sslkey", "sslrootcert", "sslcrl", "sslcrldir"];

/// How a standby connects to its primary; holds no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrimaryConninfo {
    text: String,
    left_out: Vec<&'static str>,
}

impl PrimaryConninfo {
    /// What a person says about the primary (URI or `key=value`). What it leaves open is up to the
    /// standby: its own environment, user and files.
    ///
    /// # Errors
    /// `config` for a string libpq would refuse, or one that says nothing: the setting would then mean
    /// that there is no primary.
    pub fn parse(text: &str) -> Result<Self> {
        Self::of(conninfo::parse(text)?)
    }

    /// What we connect with ourselves, for a standby that runs elsewhere and as another user: variables
    /// and the service are written out, and so is the role. `application_name` is not taken over, since
    /// `synchronous_standby_names` would count the standby in our place.
    ///
    /// # Errors
    /// As [`PrimaryConninfo::parse`], and `config` for a service that does not exist.
    pub fn of_ours(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let mut pairs = conninfo::parse(text)?;
        let os_user = os_user::current();
        let home = options::home(env, os_user.as_ref());
        options::fill(&mut pairs, env, home.as_ref())?;
        if let Some(user) = os_user {
            pairs.entry("user").or_insert(user.name);
        }
        for known in ["service", "servicefile", "application_name"] {
            pairs.remove(known);
        }
        Self::of(pairs)
    }

    fn of(mut pairs: Pairs) -> Result<Self> {
        pairs.retain(|name, value| !value.is_empty() && !SET_BY_WALRECEIVER.contains(name));
        let mut left_out: Vec<&'static str> =
            SECRETS.into_iter().filter(|name| pairs.remove(name).is_some()).collect();
        if pairs.contains_key("passfile") {
            left_out.retain(|name| *name != "password");
        }
        if pairs.is_empty() {
            return Err(Error::new(Kind::Config, "the connection string of the primary is empty")
                .hint("Write at least host=NAME or a URI such as postgresql://user@host:5432/."));
        }
        let mut text = String::new();
        for (name, value) in &pairs {
            let blank = if text.is_empty() { "" } else { " " };
            let value = absolute(name, value)?;
            // Writing to a String cannot fail.
            let _ = write!(text, "{blank}{name}={}", quote(&value));
        }
        Ok(Self { text, left_out })
    }

    /// The pairs, ready for `primary_conninfo`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Keys whose secret was given and is not in the text. A password that a `passfile` replaces is not
    /// among them.
    #[must_use]
    pub fn left_out(&self) -> &[&'static str] {
        &self.left_out
    }
}

/// The value, absolute when it is a path.
fn absolute(name: &str, value: &str) -> Result<String> {
    if !FILES.contains(&name) || (name, value) == ("sslrootcert", "system") {
        return Ok(value.to_owned());
    }
    let path = std::path::absolute(value).context(|| format!("unable to use '{value}'"))?;
    Ok(path.display().to_string())
}

/// A value as a `key=value` string takes it.
fn quote(value: &str) -> String {
    if value.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/')) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said(text: &str) -> (String, Vec<&'static str>) {
        let primary = PrimaryConninfo::parse(text).unwrap();
        (primary.text, primary.left_out)
    }

    #[test]
    fn what_is_said_is_written_without_secrets() {
        let (text, left_out) = said("postgresql://rep:se%20cret@db1:5433,db2/?sslmode=verify-full");
        assert_eq!(text, "host='db1,db2' port='5433,' sslmode=verify-full user=rep");
        assert_eq!(left_out, ["password"]);
        let (text, left_out) =
            said("host=a replication=true password=secret passfile=/etc/pass application_name=b");
        assert_eq!(text, "application_name=b host=a passfile=/etc/pass");
        assert!(left_out.is_empty());
        let (text, left_out) = said(r"host='it\'s' sslpassword=secret sslrootcert=system");
        assert_eq!(text, r"host='it\'s' sslrootcert=system");
        assert_eq!(left_out, ["sslpassword"]);
        let (text, _) = said("host=a sslkey=k");
        assert!(text.contains("sslkey=/"), "{text}");
    }

    #[test]
    fn a_primary_that_is_not_named_is_refused() {
        for text in ["", "password=x", "host=''", "replication=true", "primary"] {
            assert_eq!(PrimaryConninfo::parse(text).unwrap_err().kind(), Kind::Config, "{text}");
        }
    }

    #[test]
    fn our_own_connection_is_written_out_and_keeps_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("services");
        std::fs::write(&file, "[prod]\nhost=db\npassword=secret\n").unwrap();
        let file = file.display().to_string();
        let env = |name: &str| match name {
            "PGSERVICEFILE" => Some(file.clone()),
            "PGPORT" => Some("5433".to_owned()),
            "PGUSER" => Some("rep".to_owned()),
            "PGAPPNAME" => Some("tidemark".to_owned()),
            _ => None,
        };
        let ours = PrimaryConninfo::of_ours("service=prod", &env).unwrap();
        assert_eq!(ours.as_str(), "host=db port=5433 user=rep");
        assert_eq!(ours.left_out(), ["password"]);
        let nobody = PrimaryConninfo::of_ours("host=db", &|_| None).unwrap();
        let us = os_user::current().map(|user| format!(" user={}", quote(&user.name)));
        assert_eq!(nobody.as_str(), format!("host=db{}", us.unwrap_or_default()));
    }

    proptest! {
        #[test]
        fn libpq_reads_the_same_values(host in "[^\\x00]{1,40}", user in "[^\\x00]{1,40}") {
            let pairs = Pairs::from([("host", host), ("user", user)]);
            let text = PrimaryConninfo::of(pairs.clone()).unwrap().text;
            prop_assert_eq!(conninfo::parse(&text).unwrap(), pairs);
        }
    }
}
