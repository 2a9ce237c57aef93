//! The configuration file and the places it names.

use std::path::{Path, PathBuf};

use crate::config::file::{self, File};
use crate::config::key::Form;
use crate::config::settings::Value;
use crate::config::{Config, Environment, Settings};
use crate::error::{Error, MASK};
use crate::wire::ConnectOptions;

/// What was read can be shown, written and read again; no secret is shown; whatever is wrong is said
/// in a line that names a setting or a line of the file.
pub(super) fn file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let path = Path::new("tidemark.toml");
    let entries = match file::decode(text, path) {
        Ok(entries) => entries,
        Err(error) => return assert!(error.message().contains("tidemark.toml"), "{error}"),
    };
    let lines = text.lines().count().max(1);
    let mut secrets = Vec::new();
    for (key, value, line) in &entries {
        assert!((1..=lines).contains(line), "line {line} of {lines}");
        if let (Form::Secret, Value::Text(text)) = (key.form, value) {
            secrets.push(text.clone());
        }
    }
    let given = File { path: PathBuf::from(path), entries, world_readable: false };
    let environment = Environment::of([]);
    let settings = match Settings::resolve(Vec::new(), &environment, Some(given)) {
        Ok(settings) => settings,
        Err(error) => return check_error(&error, &secrets),
    };
    let config = Config { settings, environment };
    show(&config, &secrets);
    use_all(&config, &secrets);
}

fn check_error(error: &Error, secrets: &[String]) {
    let shown = format!("{error} {error:?} {:?}", error.hint_text());
    for secret in secrets.iter().filter(|secret| is_telling(secret)) {
        assert!(!shown.contains(secret.as_str()), "{shown}");
    }
}

/// Whether a text in an output can only be the secret: long and unlike words.
fn is_telling(secret: &str) -> bool {
    secret.len() >= 8 && secret.bytes().any(|byte| byte.is_ascii_digit())
}

fn show(config: &Config, secrets: &[String]) {
    let mut again = String::new();
    let mut secret_settings = 0;
    for shown in config.settings.shown() {
        let Some(values) = shown.value else { continue };
        let (section, leaf) = (shown.key.section(), shown.key.leaf());
        match shown.key.form {
            Form::Secret => {
                assert_eq!(values, [MASK]);
                secret_settings += 1;
            }
            Form::ConnectionString => {
                let raw = config.settings.text(shown.key.name).unwrap_or_default();
                let shown = values.concat();
                for secret in ConnectOptions::secrets_in(raw).unwrap_or_default() {
                    // Another part of it may be the same text, and is shown.
                    let count = |text: &str| text.matches(secret.as_str()).count();
                    let told = is_telling(&secret) && count(&shown) >= count(raw).max(1);
                    assert!(!told || secret == MASK, "{values:?}");
                }
            }
            Form::List => {
                let items: Vec<String> = values.iter().map(|item| file::quoted(item)).collect();
                again += &format!("{}\n", line(section, leaf, &format!("[{}]", items.join(", "))));
            }
            _ => again += &format!("{}\n", line(section, leaf, &file::quoted(&values.concat()))),
        }
    }
    assert!(secrets.len() >= secret_settings);
    // A URL of a repository or a server is shown without a user's name and password.
    let read = file::decode(&again, Path::new("again.toml")).expect("what is shown can be read");
    for (key, value, _) in read {
        let same = match value {
            Value::Text(text) => config.settings.text(key.name) == Some(text.as_str()),
            Value::List(items) => config.settings.list(key.name) == items,
        };
        assert!(same || matches!(key.form, Form::RepositoryUrl | Form::Endpoint), "{}", key.name);
    }
}

/// A key with its section as TOML's dotted key; the list of repositories has its own form.
fn line(section: &str, leaf: &str, value: &str) -> String {
    match section {
        "" => format!("{leaf} = {value}"),
        // In an inline form, so that one line stands for itself.
        "repository" => String::new(),
        section => format!("{section}.{leaf} = {value}"),
    }
}

/// Turns every setting into what the modules take, but for those that read files of this machine.
fn use_all(config: &Config, secrets: &[String]) {
    let outcomes = [
        config.repository_url().map(drop),
        config.store_options().map(drop),
        config.level().map(drop),
        config.memory_bytes(1 << 30).map(drop),
        config.jobs().map(drop),
        config.stream_options().map(drop),
        config.rate_limit_kib().map(drop),
        config.retention_options().map(drop),
        config.time_zone().map(drop),
    ];
    for outcome in outcomes {
        if let Err(error) = outcome {
            check_error(&error, secrets);
        }
    }
    let _ = (config.sealing(), config.recipients(), config.checkpoint(), config.page_checksums());
}

/// A place is understood or refused; its options as well.
pub(super) fn store_url(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    crate::store::fuzz::place(text);
}
