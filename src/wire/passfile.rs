//! The password file, `~/.pgpass`.
//!
//! # Source
//! `passwordFromFile` and `pwdfMatchesString` in `src/interfaces/libpq/fe-connect.c`.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use secrecy::{ExposeSecret, SecretString};
use tracing::warn;

use crate::file;

/// A password file larger than this is not read.
const PASSFILE_BYTES_MAX: u64 = 4 << 20;

/// What a line of the file must match.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) database: &'a str,
    pub(super) user: &'a str,
}

/// The password for what is wanted, or `None` when the file is missing, has no line for it, or is not
/// used, which is logged: it may be read by others, or is too large.
pub(super) fn lookup(path: &Path, wanted: Wanted<'_>) -> Option<SecretString> {
    find(read(path)?.expose_secret(), wanted)
}

/// The file's text, if it is one that libpq would use.
fn read(path: &Path) -> Option<SecretString> {
    let open = File::open(path).ok()?;
    let metadata = open.metadata().ok()?;
    if !metadata.is_file() {
        warn!("password file '{}' is not a plain file, and is not used", path.display());
        return None;
    }
    if metadata.mode() & 0o077 != 0 {
        warn!(
            "password file '{}' may be read by others, and is not used; its mode should be 0600",
            path.display()
        );
        return None;
    }
    let mut bytes = Vec::new();
    if let Err(error) = file::read_into(&mut bytes, open, PASSFILE_BYTES_MAX) {
        warn!("password file '{}' cannot be read, and is not used: {error}", path.display());
        return None;
    }
    Some(SecretString::from(String::from_utf8_lossy(&bytes).into_owned()))
}

pub(super) fn find(text: &str, wanted: Wanted<'_>) -> Option<SecretString> {
    let port = wanted.port.to_string();
    let lines = text.split('\n').map(|line| line.trim_end_matches('\r'));
    for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let rest = strip_field(line, wanted.host)
            .and_then(|rest| strip_field(rest, &port))
            .and_then(|rest| strip_field(rest, wanted.database))
            .and_then(|rest| strip_field(rest, wanted.user));
        if let Some(rest) = rest {
            return Some(SecretString::from(unescape(rest)));
        }
    }
    None
}

/// What follows the field and its colon, when the field is `*` or, unescaped, `wanted`.
fn strip_field<'a>(line: &'a str, wanted: &str) -> Option<&'a str> {
    if let Some(rest) = line.strip_prefix("*:") {
        return Some(rest);
    }
    let mut wanted = wanted.chars();
    let mut chars = line.chars();
    loop {
        match chars.next()? {
            ':' => return wanted.next().is_none().then_some(chars.as_str()),
            '\\' => {
                if chars.next()? != wanted.next()? {
                    return None;
                }
            }
            c => {
                if c != wanted.next()? {
                    return None;
                }
            }
        }
    }
}

/// The password: up to an unescaped colon, backslashes removed.
fn unescape(field: &str) -> String {
    let mut password = String::with_capacity(field.len());
    let mut chars = field.chars();
    while let Some(c) = chars.next() {
        match c {
            ':' => break,
            '\\' => password.push(chars.next().unwrap_or('\\')),
            c => password.push(c),
        }
    }
    password
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn password(text: &str, host: &str, database: &str) -> Option<String> {
        let wanted = Wanted { host, port: 5432, database, user: "u" };
        find(text, wanted).map(|secret| secret.expose_secret().to_owned())
    }

    #[test]
    fn the_first_matching_line_gives_the_password() {
        let text = "# h:5432:d:u:comment\r\n\nother:5432:d:u:no\nh:5433:d:u:no\nh:*:replication:u:yes\n*:*:*:u:last\n";
        assert_eq!(password(text, "h", "replication").as_deref(), Some("yes"));
        assert_eq!(password(text, "h", "d").as_deref(), Some("last"));
        assert_eq!(password("h:5432:d:v:no\n", "h", "d"), None);
        assert_eq!(password("h:5432:d:u\n", "h", "d"), None);
    }

    #[test]
    fn colons_and_backslashes_are_escaped_with_a_backslash() {
        assert_eq!(password(r"\:\:1:5432:d:u:a\:b\\c:rest", "::1", "d").as_deref(), Some(r"a:b\c"));
        assert_eq!(password(r"h:5432:d:u:end\", "h", "d").as_deref(), Some(r"end\"));
    }

    #[test]
    fn a_file_that_others_may_read_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pass");
        std::fs::write(&path, "*:*:*:*:p\n").unwrap();
        let wanted = Wanted { host: "h", port: 1, database: "d", user: "u" };
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(lookup(&path, wanted).is_none());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(lookup(&path, wanted).unwrap().expose_secret(), "p");
        assert!(lookup(directory.path(), wanted).is_none());
    }

    #[test]
    fn a_file_that_is_too_large_is_not_used_up_to_where_it_was_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pass");
        let wanted = Wanted { host: "h", port: 1, database: "d", user: "u" };
        for (comment_bytes, used) in [(PASSFILE_BYTES_MAX - 10, true), (PASSFILE_BYTES_MAX, false)]
        {
            let comment = "#".repeat(usize::try_from(comment_bytes).unwrap());
            std::fs::write(&path, format!("*:*:*:*:p\n{comment}")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            assert_eq!(lookup(&path, wanted).is_some(), used, "{comment_bytes}");
        }
    }
}
