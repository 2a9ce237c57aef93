//! Every setting with its effective value and where that came from: flag, then environment, then
//! file, then default.
//!
//! # Invariants
//! A secret's text leaves this module only through [`Settings::text`]; what is shown is masked.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::file::File;
use super::key::{self, Form, KEYS, Key};
use super::{Environment, value};
use crate::error::{Error, Kind, MASK, Result, mask_user_info};
use crate::wire::ConnectOptions;

/// A setting's raw value.
#[derive(Clone, PartialEq, Eq)]
pub enum Value {
    /// One text.
    Text(String),
    /// Several texts.
    List(Vec<String>),
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag(String),
    /// An environment variable.
    Variable(String),
    /// A line of the file.
    Line(PathBuf, usize),
    /// The table of settings.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "--{flag}"),
            Self::Variable(name) => f.write_str(name),
            Self::Line(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A setting as given on the command line.
#[derive(Clone, Debug)]
pub struct Given {
    /// Which setting.
    pub key: &'static Key,
    /// Its value.
    pub value: Value,
}

/// One setting as `config show` prints it.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Which setting.
    pub key: &'static Key,
    /// Its value with secrets masked; `None` when nothing sets it.
    pub value: Option<Vec<String>>,
    /// Where the value came from.
    pub origin: Origin,
}

/// All settings, resolved.
#[derive(Debug, Default)]
pub struct Settings {
    entries: BTreeMap<&'static str, (Value, Origin)>,
    /// What is suspicious but no error, for the log.
    pub warnings: Vec<String>,
}

impl Settings {
    /// Lays the four sources over each other and checks every value's form.
    ///
    /// # Errors
    /// `config` naming the setting, what was found, what was expected and where it stands.
    pub fn resolve(
        given: Vec<Given>,
        environment: &Environment,
        file: Option<File>,
    ) -> Result<Self> {
        let mut settings = Self::default();
        for key in KEYS {
            if let Some(default) = key.default {
                settings.set(key, Value::Text(default.to_owned()), Origin::Default);
            }
        }
        if let Some(file) = file {
            for (key, value, line) in file.entries {
                if key.form == Form::Secret && file.world_readable {
                    settings.warnings.push(format!(
                        "'{}' holds the secret '{}' and every user of this machine may read it",
                        file.path.display(),
                        key.name
                    ));
                }
                settings.set(key, value, Origin::Line(file.path.clone(), line));
            }
        }
        settings.warnings.extend(misspelt(environment));
        for key in KEYS {
            for name in key.variables() {
                let Some(text) = environment.get(&name).filter(|text| !text.is_empty()) else {
                    continue;
                };
                let value = if key.form == Form::List {
                    Value::List(
                        text.split([',', ' '])
                            .filter(|s| !s.is_empty())
                            .map(str::to_owned)
                            .collect(),
                    )
                } else {
                    Value::Text(text.to_owned())
                };
                settings.set(key, value, Origin::Variable(name));
            }
        }
        for Given { key, value } in given {
            settings.set(key, value, Origin::Flag(key.flag.unwrap_or(key.name).to_owned()));
        }
        for key in KEYS {
            settings.check(key)?;
        }
        Ok(settings)
    }

    fn set(&mut self, key: &'static Key, value: Value, origin: Origin) {
        self.entries.insert(key.name, (value, origin));
    }

    fn check(&self, key: &'static Key) -> Result<()> {
        match key.form {
            Form::Integer { .. } => self.integer(key.name).map(drop),
            Form::Size => self.size_bytes(key.name).map(drop),
            Form::Duration { .. } => self.duration(key.name).map(drop),
            Form::Switch => self.switch(key.name).map(drop),
            Form::Choice(words) => self
                .parsed(key.name, |text| {
                    if words.contains(&text) {
                        return Ok(());
                    }
                    Err(format!("expected one of '{}'", words.join("', '")))
                })
                .map(drop),
            _ => Ok(()),
        }
    }

    fn parsed<T>(
        &self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>> {
        let Some((Value::Text(text), origin)) = self.entries.get(name) else {
            return Ok(None);
        };
        parse(text).map(Some).map_err(|expected| {
            let kind = if matches!(origin, Origin::Flag(_)) { Kind::Usage } else { Kind::Config };
            Error::new(kind, format!("unable to read '{name}' from {origin}: '{text}', {expected}"))
        })
    }

    /// The text of a setting.
    #[must_use]
    pub fn text(&self, name: &'static str) -> Option<&str> {
        match self.entries.get(name) {
            Some((Value::Text(text), _)) => Some(text),
            _ => None,
        }
    }

    /// The texts of a list, none when nothing sets it.
    #[must_use]
    pub fn list(&self, name: &'static str) -> Vec<String> {
        match self.entries.get(name) {
            Some((Value::List(items), _)) => items.clone(),
            _ => Vec::new(),
        }
    }

    /// A path.
    #[must_use]
    pub fn path(&self, name: &'static str) -> Option<PathBuf> {
        self.text(name).map(PathBuf::from)
    }

    /// A whole number within the bounds of the table.
    ///
    /// # Errors
    /// `config` or `usage` when the text is something else.
    pub fn integer(&self, name: &'static str) -> Result<Option<i64>> {
        let bounds = key::find(name).map(|key| key.form);
        self.parsed(name, |text| match (bounds, text.trim().parse::<i64>()) {
            (Some(Form::Integer { min, max }), Ok(number)) if (min..=max).contains(&number) => {
                Ok(number)
            }
            (Some(Form::Integer { min, max }), _) if max == i64::MAX => {
                Err(format!("expected a whole number of at least {min}"))
            }
            (Some(Form::Integer { min, max }), _) => {
                Err(format!("expected a whole number from {min} to {max}"))
            }
            _ => Err("expected a whole number".to_owned()),
        })
    }

    /// A number of bytes.
    ///
    /// # Errors
    /// `config` or `usage` when the text is something else.
    pub fn size_bytes(&self, name: &'static str) -> Result<Option<u64>> {
        self.parsed(name, value::size_bytes)
    }

    /// A length of time.
    ///
    /// # Errors
    /// `config` or `usage` when the text is something else.
    pub fn duration(&self, name: &'static str) -> Result<Option<Duration>> {
        let least = match key::find(name).map(|key| key.form) {
            Some(Form::Duration { min }) => min,
            _ => Duration::ZERO,
        };
        self.parsed(name, |text| match value::duration(text)? {
            length if length < least => Err(format!("expected at least {} ms", least.as_millis())),
            length => Ok(length),
        })
    }

    /// A switch.
    ///
    /// # Errors
    /// `config` or `usage` when the text is something else.
    pub fn switch(&self, name: &'static str) -> Result<Option<bool>> {
        self.parsed(name, value::switch)
    }

    /// Where a setting's value came from.
    #[must_use]
    pub fn origin(&self, name: &str) -> Origin {
        self.entries.get(name).map_or(Origin::Default, |(_, origin)| origin.clone())
    }

    /// Every setting with secrets masked, in the order of the table.
    #[must_use]
    pub fn shown(&self) -> Vec<Shown> {
        KEYS.iter()
            .map(|key| Shown {
                key,
                value: self.entries.get(key.name).map(|(value, _)| mask(key.form, value)),
                origin: self.origin(key.name),
            })
            .collect()
    }
}

fn mask(form: Form, value: &Value) -> Vec<String> {
    match (form, value) {
        (Form::Secret, _) => vec![MASK.to_owned()],
        (Form::ConnectionString, Value::Text(text)) => vec![mask_password(text)],
        (Form::RepositoryUrl | Form::Endpoint, Value::Text(text)) => vec![mask_user_info(text)],
        (_, Value::Text(text)) => vec![text.clone()],
        (_, Value::List(items)) => items.clone(),
    }
}

/// A connection string without its secrets: as it was written where none is left then, else as the
/// parser understood it.
fn mask_password(text: &str) -> String {
    // Only the secrets that the parser sees count: it knows percent-encoded names of keys as well.
    let is_clean = |text: &str| {
        let secrets = ConnectOptions::secrets_in(text);
        secrets.is_ok_and(|secrets| secrets.iter().all(|secret| secret == MASK))
    };
    let in_usual_place = || {
        let (scheme, rest) = text.split_once("://")?;
        let (who, place) = rest.rsplit_once('@')?;
        Some(format!("{scheme}://{}:{MASK}@{place}", who.split_once(':')?.0))
    };
    if is_clean(text) {
        return text.to_owned();
    }
    in_usual_place().filter(|masked| is_clean(masked)).unwrap_or_else(|| {
        // An empty environment: only what the text itself says is shown.
        let parsed = ConnectOptions::parse(text, &|_| None);
        parsed.map_or_else(|_| MASK.to_owned(), |options| options.to_string())
    })
}

/// Variables that look like a misspelt setting of ours. Only near misses are reported: Kubernetes
/// puts variables such as `TIDEMARK_SERVICE_HOST` into every container beside a service so named.
fn misspelt(environment: &Environment) -> Vec<String> {
    let known: Vec<String> = KEYS.iter().flat_map(Key::variables).collect();
    let reserved = ["TIDEMARK_CONFIG"];
    let given = environment.names().filter(|name| name.starts_with("TIDEMARK_"));
    given
        .filter(|name| !known.iter().any(|k| k == name) && !reserved.contains(name))
        .filter_map(|name| {
            let near = key::nearest(name, known.iter().map(String::as_str))?;
            Some(format!("the environment variable {name} is not used; did you mean {near}?"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::file;

    fn flag(name: &str, value: &str) -> Given {
        Given { key: key::find(name).unwrap(), value: Value::Text(value.to_owned()) }
    }

    fn file_of(text: &str) -> File {
        let path = PathBuf::from("/etc/t.toml");
        File {
            entries: file::decode(text, Path::new("/etc/t.toml")).unwrap(),
            path,
            world_readable: true,
        }
    }

    #[test]
    fn flag_beats_environment_beats_file_beats_default() {
        let env =
            Environment::of([("TIDEMARK_CLUSTER", "from-env"), ("TIDEMARK_POSTGRES_SLOT", "env")]);
        let file = file_of("cluster = \"f\"\nencryption = \"none\"\n[postgres]\nslot = \"f\"\n");
        let settings =
            Settings::resolve(vec![flag("cluster", "from-flag")], &env, Some(file)).unwrap();
        assert_eq!(settings.text("cluster"), Some("from-flag"));
        assert_eq!(settings.origin("cluster").to_string(), "--cluster");
        assert_eq!(settings.text("postgres.slot"), Some("env"));
        assert_eq!(settings.text("encryption"), Some("none"));
        assert_eq!(settings.origin("encryption").to_string(), "/etc/t.toml:2");
        assert_eq!(settings.text("log.level"), Some("warn"));
        assert_eq!(settings.origin("log.level"), Origin::Default);
    }

    #[test]
    fn a_wrong_value_names_its_origin_and_what_is_expected() {
        let error =
            Settings::resolve(vec![flag("encryption", "rot13")], &Environment::default(), None)
                .unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert_eq!(
            error.to_string(),
            "unable to read 'encryption' from --encryption: 'rot13', expected one of 'age', 'none'"
        );
    }

    #[test]
    fn an_empty_variable_is_no_variable() {
        let env = Environment::of([("TIDEMARK_CLUSTER", "")]);
        let settings = Settings::resolve(Vec::new(), &env, None).unwrap();
        assert_eq!(settings.origin("cluster"), Origin::Default);
    }

    #[test]
    fn secrets_are_masked_and_a_readable_file_that_holds_one_is_reported() {
        let file =
            file_of("[keys]\npassphrase = \"hunter2\"\n[[repository]]\nurl = \"s3://u:p@b/x\"\n");
        let settings = Settings::resolve(Vec::new(), &Environment::default(), Some(file)).unwrap();
        let shown = format!("{:?} {settings:?}", settings.shown());
        assert!(!shown.contains("hunter2") && !shown.contains("u:p"), "{shown}");
        assert_eq!(settings.warnings.len(), 1);
        for (name, text, shown) in [
            ("repository.url", "s3://AKIA:hun/ter2@b/x", "s3://********@b/x"),
            ("repository.url", "/srv/back@up", "/srv/back@up"),
            ("repository.endpoint", "minioadmin:hunter2@h:9000", "********@h:9000"),
            ("repository.endpoint", "http://h:9000", "http://h:9000"),
        ] {
            let given = vec![flag(name, text)];
            let settings = Settings::resolve(given, &Environment::default(), None).unwrap();
            let seen = settings.shown().into_iter().find(|seen| seen.key.name == name).unwrap();
            assert_eq!(seen.value, Some(vec![shown.to_owned()]));
        }
        for text in [
            "postgres://u:hunter2@h/d",
            "postgres://u:hunter2@h/d?sslpassword=hunter2",
            "postgres://h/d?passw%6Frd=hunter2",
            "host=h password = hunter2",
            "host=h password='",
            "host=h pasword=hunter2",
            "host=h scram_client_key=hunter2 oauth_client_secret=hunter2",
        ] {
            let given = vec![flag("postgres.url", text)];
            let settings = Settings::resolve(given, &Environment::default(), None).unwrap();
            assert!(!format!("{:?}", settings.shown()).contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn near_misses_among_variables_are_reported_and_strangers_are_not() {
        let env =
            Environment::of([("TIDEMARK_CLUSTR", "x"), ("TIDEMARK_SERVICE_HOST", "10.0.0.1")]);
        let settings = Settings::resolve(Vec::new(), &env, None).unwrap();
        assert_eq!(settings.warnings.len(), 1);
        assert!(settings.warnings[0].contains("TIDEMARK_CLUSTER?"));
    }
}
