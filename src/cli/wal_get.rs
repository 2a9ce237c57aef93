//! `tidemark wal-get`: PostgreSQL's `restore_command`.

use std::path::PathBuf;
use std::process::Command;

use super::invocation::Invocation;
use crate::config::key::{Form, Group};
use crate::config::{Config, settings::Origin};
use crate::daemon::{keys, opening};
use crate::error::{Context, Result};
use crate::restore::{self, WalGet, WalGetRequest};

/// Fetch one WAL segment or history file: PostgreSQL's restore_command.
///
/// Used as restore_command = 'tidemark wal-get %f %p'. Ends with status 1 where the WAL of the
/// repository ends, which ends recovery in good order, and with 200 when anything failed or WAL is
/// missing before that, which stops PostgreSQL instead of letting it end recovery early. A standby
/// asks again and is told 1 in both cases.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the file wanted, PostgreSQL's %f.
    #[arg(value_name = "NAME")]
    pub(super) name: String,
    /// Where to put it, PostgreSQL's %p.
    #[arg(value_name = "PATH", value_hint = clap::ValueHint::FilePath)]
    pub(super) path: PathBuf,
    /// Fetch this segment and those after it ahead of PostgreSQL; started by wal-get itself.
    #[arg(long, hide = true)]
    pub(super) prefetch: bool,
}

/// The flag of who fetches ahead.
pub(super) const PREFETCH: &str = "--prefetch";

/// What `wal-get` has to say by its exit status.
pub(super) async fn run(args: Args, invocation: Invocation) -> Result<WalGet> {
    let Invocation { config, clock, .. } = &invocation;
    let request = WalGetRequest { name: args.name, path: args.path };
    let open = async || {
        let repository = opening::repository(config, clock).await?;
        keys::reader(config, &repository)
    };
    if args.prefetch {
        restore::prefetch(&request, clock, open).await?;
        return Ok(WalGet::Found);
    }
    let words = command_words(config)?;
    let mut fetcher = words.split_first().map(|(program, words)| {
        let mut command = Command::new(program);
        command.args(words);
        command
    });
    if let Some(command) = &mut fetcher {
        command.arg(PREFETCH).arg(&request.name).arg(&request.path);
    }
    restore::wal_get(&request, clock, fetcher, open).await
}

/// The words that run `wal-get` on the repository of `config`, without secrets: those stay in the
/// configuration file or the environment.
///
/// # Errors
/// When the program's own path cannot be told.
pub(super) fn command_words(config: &Config) -> Result<Vec<String>> {
    let program = std::env::current_exe().context(|| "unable to find this program's own path")?;
    let mut words = vec![program.display().to_string(), "wal-get".to_owned()];
    let mut file = None;
    for shown in config.settings.shown() {
        let (Some(values), Some(flag)) = (shown.value, shown.key.flag) else { continue };
        let form = shown.key.form;
        let wanted = matches!(shown.key.group, Group::Repository | Group::Opening);
        let is_in_file = match shown.origin {
            Origin::Line(path, _) => {
                file = Some(path);
                true
            }
            Origin::Flag(_) | Origin::Variable(_) => false,
            Origin::Default => continue,
        };
        for value in values.into_iter().filter(|_| wanted && form != Form::Secret) {
            let whole = absolute(form, value.clone())?;
            // What the file says, wal-get reads there; a path that is not whole means another place to it.
            if !is_in_file || whole != value {
                words.extend([format!("--{flag}"), whole]);
            }
        }
    }
    if let Some(path) = file {
        words.push("--config".to_owned());
        words.push(absolute(Form::Path, path.display().to_string())?);
    }
    // Postgres runs it as its own user, whose home is another.
    let identity = config.identity_file().ok().filter(|path| path.exists());
    if let (None, Some(path)) = (config.named_identity_file(), identity) {
        words.push("--identity".to_owned());
        words.push(absolute(Form::Path, path.display().to_string())?);
    }
    Ok(words)
}

/// Postgres runs it in the data directory: what was relative to ours must not be.
fn absolute(form: Form, value: String) -> Result<String> {
    let is_path = match form {
        Form::Path => true,
        Form::RepositoryUrl => !value.contains(':'),
        _ => false,
    };
    if !is_path {
        return Ok(value);
    }
    let path = std::path::absolute(&value).context(|| format!("unable to use '{value}'"))?;
    Ok(path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;
    use crate::config::key::find;
    use crate::config::settings::{Given, Value};

    #[test]
    fn the_restore_command_names_what_opens_the_repository_and_no_secret() {
        let given = Given {
            key: find("keys.passphrase_file").unwrap(),
            value: Value::Text("relative/phrase".to_owned()),
        };
        let variables = [("TIDEMARK_CONFIG", ""), ("TIDEMARK_KEYS_IDENTITY_FILE", "/etc/identity")];
        let config = Config::load(None, vec![given], Environment::of(variables)).unwrap();
        let words = command_words(&config).unwrap();
        let follows = |flag| words.iter().skip_while(|word| *word != flag).nth(1).cloned();
        assert_eq!(follows("--identity").as_deref(), Some("/etc/identity"));
        let here = std::env::current_dir().unwrap().join("relative/phrase");
        assert_eq!(follows("--passphrase-file"), Some(here.display().to_string()));

        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tidemark.toml");
        let text = "[[repository]]\nurl = \"repo\"\n[keys]\nidentity_file = \"backup.key\"\n";
        std::fs::write(&file, text).unwrap();
        let config = Config::load(Some(&file), Vec::new(), Environment::default()).unwrap();
        let words = command_words(&config).unwrap();
        let follows = |flag| words.iter().skip_while(|word| *word != flag).nth(1).cloned();
        for (flag, path) in [("--repository", "repo"), ("--identity", "backup.key")] {
            let here = std::env::current_dir().unwrap().join(path);
            assert_eq!(follows(flag), Some(here.display().to_string()), "{words:?}");
        }

        let variables = [("TIDEMARK_CONFIG", ""), ("TIDEMARK_KEYS_PASSPHRASE", "hunter2")];
        let config = Config::load(None, Vec::new(), Environment::of(variables)).unwrap();
        let words = command_words(&config).unwrap();
        assert!(!words.iter().any(|word| word.contains("hunter2")), "{words:?}");
    }
}
