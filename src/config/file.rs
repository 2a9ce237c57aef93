//! The configuration file: where it is looked for, and its keys with the lines they stand on.
//!
//! # Shape
//! TOML: keys of the table in [`key`], sections as tables, `[[repository]]` as a list
//! of blocks of which exactly one is accepted for now.

use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::key::{self, Form, LIST_SECTION};
use super::settings::Value;
use super::{Environment, key::Key};
use crate::error::{Error, Kind, Result};

/// A file longer than this is not a configuration.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What a file sets.
#[derive(Debug)]
pub struct File {
    /// Where it was found.
    pub path: PathBuf,
    /// Each setting with its line, counted from 1.
    pub entries: Vec<(&'static Key, Value, usize)>,
    /// Whether every user of this machine may read it.
    pub world_readable: bool,
}

/// The file to read: what `--config` or `TIDEMARK_CONFIG` names (an empty name means none), else
/// the first that exists of the user's and the system's.
///
/// # Errors
/// When the file named is missing or unreadable, or holds something that is not a setting.
pub fn read(named: Option<&Path>, environment: &Environment) -> Result<Option<File>> {
    let named = named.map(Path::to_path_buf);
    match named.or_else(|| environment.get("TIDEMARK_CONFIG").map(PathBuf::from)) {
        Some(path) if path.as_os_str().is_empty() => Ok(None),
        Some(path) => File::read(path).map(Some),
        None => match usual_places(environment).into_iter().find(|path| path.exists()) {
            Some(path) => File::read(path).map(Some),
            None => Ok(None),
        },
    }
}

/// The user's configuration folder, when the environment says where it is.
#[must_use]
pub fn user_folder(environment: &Environment) -> Option<PathBuf> {
    let set = |name| environment.get(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))?;
    Some(folder.join("tidemark"))
}

/// Where a file is looked for when none is named, in this order.
#[must_use]
pub fn usual_places(environment: &Environment) -> Vec<PathBuf> {
    user_folder(environment)
        .into_iter()
        .chain([PathBuf::from("/etc/tidemark")])
        .map(|folder| folder.join("tidemark.toml"))
        .collect()
}

/// A text as a value of the file.
#[must_use]
pub fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

impl File {
    fn read(path: PathBuf) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let attempted = || format!("unable to read the configuration file '{}'", path.display());
        let metadata = std::fs::metadata(&path).map_err(|error| {
            Error::io(attempted(), &error)
                .with_kind(Kind::Config)
                .hint("Name an existing file with --config or TIDEMARK_CONFIG, or none at all.")
        })?;
        let text = crate::file::read_to_string(&path, FILE_BYTES_MAX)
            .map_err(|error| Error::io(attempted(), &error).with_kind(Kind::Config))?;
        let world_readable = metadata.permissions().mode() & 0o004 != 0;
        Ok(Self { entries: decode(&text, &path)?, path, world_readable })
    }
}

/// Reads the text of a file.
///
/// # Errors
/// `config` with the file and line: not TOML, an unknown key (and the nearest known one), a value
/// of the wrong type. `unsupported` for more than one repository.
pub fn decode(text: &str, path: &Path) -> Result<Vec<(&'static Key, Value, usize)>> {
    let reading = Reading { text, path };
    let document = DeTable::parse(text).map_err(|error| {
        let offset = error.span().map_or(0, |span| span.start);
        reading.error(offset, &format!("not TOML: {}", error.message().replace('\n', ", ")))
    })?;
    let mut entries = Vec::new();
    for (name, value) in document.get_ref() {
        let offset = name.span().start;
        match value.get_ref() {
            DeValue::Array(blocks) if name.get_ref() == LIST_SECTION => {
                let mut tables = Vec::new();
                for block in blocks {
                    match block.get_ref() {
                        DeValue::Table(table) => tables.push(table),
                        _ => return Err(reading.not_a_list(offset)),
                    }
                }
                if tables.len() > 1 {
                    return Err(Error::new(
                        Kind::Unsupported,
                        format!(
                            "{} [[repository]] blocks in '{}': this version writes to exactly one",
                            tables.len(),
                            path.display()
                        ),
                    )
                    .hint("Keep the first block and remove the others."));
                }
                for table in tables {
                    reading.section(LIST_SECTION, table, &mut entries)?;
                }
            }
            _ if name.get_ref() == LIST_SECTION => return Err(reading.not_a_list(offset)),
            DeValue::Table(table) if key::find(name.get_ref()).is_none() => {
                reading.section(name.get_ref(), table, &mut entries)?;
            }
            value => reading.entry(name.get_ref(), value, offset, &mut entries)?,
        }
    }
    Ok(entries)
}

struct Reading<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Reading<'_> {
    fn line(&self, offset: usize) -> usize {
        let before = self.text.as_bytes().iter().take(offset);
        before.filter(|byte| **byte == b'\n').count().saturating_add(1)
    }

    fn error(&self, offset: usize, what: &str) -> Error {
        let line = self.line(offset);
        Error::new(Kind::Config, format!("{what} in '{}', line {line}", self.path.display()))
    }

    fn not_a_list(&self, offset: usize) -> Error {
        self.error(offset, "'repository' is not a list of blocks")
            .hint("Write [[repository]] with two brackets, and its keys below it.")
    }

    fn section(
        &self,
        section: &str,
        table: &DeTable<'_>,
        entries: &mut Vec<(&'static Key, Value, usize)>,
    ) -> Result<()> {
        for (name, value) in table {
            let full = format!("{section}.{}", name.get_ref());
            self.entry(&full, value.get_ref(), name.span().start, entries)?;
        }
        Ok(())
    }

    fn entry(
        &self,
        name: &str,
        value: &DeValue<'_>,
        offset: usize,
        entries: &mut Vec<(&'static Key, Value, usize)>,
    ) -> Result<()> {
        let Some(key) = key::find(name) else {
            let error = self.error(offset, &format!("unknown key '{name}'"));
            return Err(match key::suggestion(name) {
                Some(near) => error.hint(format!("Did you mean '{near}'?")),
                None => error.hint("'tidemark config show' lists every key."),
            });
        };
        let value = match (key.form, value) {
            (Form::List, DeValue::Array(items)) => {
                let items = items.iter().map(|item| scalar(item.get_ref()));
                items.collect::<Option<Vec<String>>>().map(Value::List)
            }
            (Form::List, _) | (_, DeValue::Array(_)) => None,
            (_, value) => scalar(value).map(Value::Text),
        };
        let value = value.ok_or_else(|| {
            let expected = if key.form == Form::List { "a list of texts" } else { "one value" };
            self.error(offset, &format!("'{name}' must be {expected}"))
        })?;
        entries.push((key, value, self.line(offset)));
        Ok(())
    }
}

/// The text of a value that is neither a list nor a table.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.clone().into_owned()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .ok()
            .map(|number| number.to_string()),
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        DeValue::Boolean(switch) => Some(switch.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> Error {
        decode(text, Path::new("t.toml")).unwrap_err()
    }

    #[test]
    fn settings_come_with_the_line_they_stand_on() {
        let text =
            "cluster = \"a\"\n\n[keys]\nrecipients = [\"age1x\"]\n[[repository]]\nurl = \"/r\"";
        let entries = decode(text, Path::new("t.toml")).unwrap();
        let seen: Vec<_> = entries.iter().map(|(key, _, line)| (key.name, *line)).collect();
        assert!(seen.contains(&("cluster", 1)));
        assert!(seen.contains(&("keys.recipients", 4)));
        assert!(seen.contains(&("repository.url", 6)));
    }

    #[test]
    fn an_unknown_key_names_file_line_and_the_nearest_key() {
        let error = refused("\n[postgres]\nslto = \"x\"\n");
        assert_eq!(error.to_string(), "unknown key 'postgres.slto' in 't.toml', line 3");
        assert_eq!(error.hint_text(), Some("Did you mean 'postgres.slot'?"));
    }

    #[test]
    fn two_repositories_are_not_supported_yet() {
        let error = refused("[[repository]]\nurl=\"/a\"\n[[repository]]\nurl=\"/b\"\n");
        assert_eq!(error.kind(), Kind::Unsupported);
        let error = refused("[repository]\nurl=\"/a\"\n");
        assert!(error.hint_text().unwrap().contains("[[repository]]"));
    }

    #[test]
    fn types_and_syntax_are_checked_with_their_line() {
        assert!(refused("cluster = [\"a\"]").to_string().ends_with("line 1"));
        assert!(refused("a = 1\nb = = 2").to_string().contains("line 2"));
        assert!(refused("[keys]\nrecipients = \"age1\"").to_string().contains("a list"));
    }
}
