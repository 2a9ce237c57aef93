//! The password file, `~/.pgpass`. It is bytes: a password need not be UTF-8, and is sent as it is.
//!
//! # Source
//! `passwordFromFile` and `pwdfMatchesString` in `src/interfaces/libpq/fe-connect.c`.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use secrecy::{ExposeSecret, SecretSlice};
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
pub(super) fn lookup(path: &Path, wanted: Wanted<'_>) -> Option<SecretSlice<u8>> {
    find(read(path)?.expose_secret(), wanted)
}

/// The file's bytes, if it is one that libpq would use.
fn read(path: &Path) -> Option<SecretSlice<u8>> {
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
    Some(SecretSlice::from(bytes))
}

pub(super) fn find(file: &[u8], wanted: Wanted<'_>) -> Option<SecretSlice<u8>> {
    let port = wanted.port.to_string();
    let lines = file.split(|byte| *byte == b'\n').map(without_return);
    for line in lines.filter(|line| !line.is_empty() && !line.starts_with(b"#")) {
        let rest = strip_field(line, wanted.host)
            .and_then(|rest| strip_field(rest, &port))
            .and_then(|rest| strip_field(rest, wanted.database))
            .and_then(|rest| strip_field(rest, wanted.user));
        if let Some(rest) = rest {
            return Some(SecretSlice::from(unescape(rest)));
        }
    }
    None
}

fn without_return(mut line: &[u8]) -> &[u8] {
    while let Some(shorter) = line.strip_suffix(b"\r") {
        line = shorter;
    }
    line
}

/// What follows the field and its colon, when the field is `*` or, unescaped, `wanted`.
fn strip_field<'a>(line: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    if let Some(rest) = line.strip_prefix(b"*:") {
        return Some(rest);
    }
    let mut wanted = wanted.bytes();
    let mut bytes = line.iter();
    loop {
        match bytes.next()? {
            b':' => return wanted.next().is_none().then_some(bytes.as_slice()),
            b'\\' => {
                if *bytes.next()? != wanted.next()? {
                    return None;
                }
            }
            byte => {
                if *byte != wanted.next()? {
                    return None;
                }
            }
        }
    }
}

/// The password: up to an unescaped colon, backslashes removed.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut password = Vec::with_capacity(field.len());
    let mut bytes = field.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b':' => break,
            b'\\' => password.push(*bytes.next().unwrap_or(&b'\\')),
            byte => password.push(*byte),
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
        let found = find(text.as_bytes(), wanted)?;
        Some(String::from_utf8(found.expose_secret().to_vec()).unwrap())
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
    fn a_password_need_not_be_utf_8() {
        let wanted = Wanted { host: "h", port: 5432, database: "d", user: "u" };
        let found = find(b"\xfc:5432:d:u:no\nh:5432:d:u:gr\xfc\xdfe\\:\r\n", wanted).unwrap();
        assert_eq!(found.expose_secret(), b"gr\xfc\xdfe:");
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
        assert_eq!(lookup(&path, wanted).unwrap().expose_secret(), b"p");
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
