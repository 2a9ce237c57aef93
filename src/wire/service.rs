//! The service file, `~/.pg_service.conf`: named sets of connection keys.
//!
//! # Source
//! `parseServiceInfo` and `parseServiceFile` in `src/interfaces/libpq/fe-connect.c`. LDAP lookups are
//! refused.

use std::path::{Path, PathBuf};

use super::conninfo::{self, Pairs};
use crate::error::{Error, Kind, Result};
use crate::file;

/// The system-wide folders looked into when `PGSYSCONFDIR` is not set: Debian's and upstream's.
const SYSTEM_FOLDERS: [&str; 3] =
    ["/etc/postgresql-common", "/etc/sysconfig/pgsql", "/usr/local/pgsql/etc"];

/// A service file larger than this is not read: thousands of services.
const SERVICE_FILE_BYTES_MAX: u64 = 4 << 20;

/// Where service definitions are looked for.
#[derive(Debug, Default)]
pub(super) struct ServiceFiles {
    /// Named by `servicefile` or `PGSERVICEFILE`: must exist.
    pub(super) named: Option<PathBuf>,
    /// The user's home directory.
    pub(super) home: Option<PathBuf>,
    /// `PGSYSCONFDIR`.
    pub(super) system: Option<PathBuf>,
}

/// Adds the pairs of `service` that `pairs` does not have yet.
pub(super) fn apply(pairs: &mut Pairs, service: &str, files: &ServiceFiles) -> Result<()> {
    let mut candidates = Vec::new();
    match &files.named {
        Some(named) => candidates.push((named.clone(), true)),
        None => candidates.extend(files.home.iter().map(|h| (h.join(".pg_service.conf"), false))),
    }
    match &files.system {
        Some(folder) => candidates.push((folder.join("pg_service.conf"), false)),
        None => candidates.extend(
            SYSTEM_FOLDERS.iter().map(|folder| (Path::new(folder).join("pg_service.conf"), false)),
        ),
    }
    for (path, required) in candidates {
        let text = match file::read_to_string(&path, SERVICE_FILE_BYTES_MAX) {
            Ok(text) => text,
            Err(error) if !required && error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                let what = format!("unable to read service file '{}'", path.display());
                return Err(Error::io(what, &error).with_kind(Kind::Config));
            }
        };
        let found = parse(&text, service)
            .map_err(|error| error.context(format!("service file '{}'", path.display())))?;
        if let Some(found) = found {
            for (name, value) in found {
                pairs.entry(name).or_insert(value);
            }
            return Ok(());
        }
    }
    Err(Error::new(Kind::Config, format!("unable to find service '{service}' in any service file"))
        .hint("Define it in ~/.pg_service.conf, or name the file in PGSERVICEFILE."))
}

/// The pairs of a service, or `None` when the text does not define it.
pub(super) fn parse(text: &str, service: &str) -> Result<Option<Pairs>> {
    let mut found: Option<Pairs> = None;
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            if found.is_some() {
                break;
            }
            let ours = header.strip_prefix(service).is_some_and(|rest| rest.starts_with(']'));
            found = ours.then(Pairs::new);
            continue;
        }
        let Some(pairs) = found.as_mut() else { continue };
        let refuse = |why: &str| Error::new(Kind::Config, format!("line {number}: {why}"));
        if line.starts_with("ldap") {
            return Err(refuse("services looked up by LDAP are not supported"));
        }
        let (name, value) = line.split_once('=').ok_or_else(|| refuse("no '=' in it"))?;
        if matches!(name, "service" | "servicefile") {
            return Err(refuse("a service cannot refer to another service"));
        }
        if !pairs.contains_key(name) {
            conninfo::store(pairs, name, value.to_owned())
                .map_err(|error| error.context(format!("line {number}")))?;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# comment\n[one]\nhost=a\nhost=b\n  user=x  \n\n[two]\npassword=p = q\n";

    #[test]
    fn a_service_is_its_section_and_its_first_values() {
        let one = parse(TEXT, "one").unwrap().unwrap();
        assert_eq!((one["host"].as_str(), one["user"].as_str()), ("a", "x"));
        assert_eq!(parse(TEXT, "two").unwrap().unwrap()["password"], "p = q");
        assert_eq!(parse(TEXT, "on").unwrap(), None);
    }

    #[test]
    fn broken_lines_are_named() {
        for text in ["[s]\nhost\n", "[s]\nhots=a\n", "[s]\nservice=t\n", "[s]\nldap://x\n"] {
            let error = parse(text, "s").unwrap_err();
            assert!(error.message().contains("line 2"), "{error}");
        }
    }

    #[test]
    fn the_connection_string_wins_over_the_service() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("services");
        std::fs::write(&file, TEXT).unwrap();
        let files = ServiceFiles { named: Some(file), ..ServiceFiles::default() };
        let mut pairs = conninfo::parse("host=mine").unwrap();
        apply(&mut pairs, "one", &files).unwrap();
        assert_eq!((pairs["host"].as_str(), pairs["user"].as_str()), ("mine", "x"));
        let missing = apply(&mut pairs, "three", &files).unwrap_err();
        assert_eq!(missing.kind(), Kind::Config);
    }

    #[test]
    fn a_service_file_without_end_is_refused() {
        let named = Some(PathBuf::from("/dev/zero"));
        let files = ServiceFiles { named, ..ServiceFiles::default() };
        let error = apply(&mut Pairs::new(), "one", &files).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        let expected = "unable to read service file '/dev/zero': it has more than 4194304 bytes";
        assert_eq!(error.message(), expected);
    }
}
