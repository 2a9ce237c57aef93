//! What a restored standby follows, from `--primary` and `--primary-slot`.

use serde::Serialize;

use super::Args;
use crate::config::Config;
use crate::error::{Context, Error, Kind, Result};
use crate::restore::Upstream;
use crate::wire::PrimaryConninfo;

/// What stands for "from no server".
const NO_PRIMARY: &str = "none";
/// Longest name of a replication slot (`NAMEDATALEN` without its end).
const SLOT_NAME_BYTES_MAX: usize = 63;

/// What a standby follows besides the repository; holds no secret.
#[derive(Debug, Serialize)]
pub(super) struct Standby {
    /// Empty for no server; `None` for what the backup's own files say.
    primary_conninfo: Option<String>,
    primary_slot: Option<String>,
    /// Keys whose secrets were given and not taken over.
    secrets_left_out: Vec<&'static str>,
}

impl Standby {
    /// What the command line says, else the server that is configured.
    pub(super) fn of(args: &Args, config: &Config) -> Result<Self> {
        if let Some(timeline) = args.timeline.as_deref().filter(|text| *text != "latest") {
            let message = format!("unable to restore a standby of timeline '{timeline}'");
            return Err(Error::new(Kind::Usage, message).hint(
                "A standby follows the newest timeline: leave --timeline or --as-standby away.",
            ));
        }
        let primary = match args.primary.as_deref() {
            Some(NO_PRIMARY) => None,
            Some(text) => Some(
                PrimaryConninfo::parse(text)
                    .context(|| "unable to read '--primary'")
                    .map_err(|error| error.with_kind(Kind::Usage))?,
            ),
            None => config.primary_conninfo()?,
        };
        let primary_slot =
            args.primary_slot.as_deref().map(|name| slot(name, config)).transpose()?;
        let left_out = primary.as_ref().map(PrimaryConninfo::left_out).unwrap_or_default();
        let said = args.primary.is_some() || primary.is_some();
        let conninfo = primary.as_ref().map(PrimaryConninfo::as_str).unwrap_or_default();
        Ok(Self {
            secrets_left_out: left_out.to_vec(),
            primary_conninfo: said.then(|| conninfo.to_owned()),
            primary_slot,
        })
    }

    /// The same for the restore.
    pub(super) fn upstream(&self) -> Upstream {
        Upstream { conninfo: self.primary_conninfo.clone(), slot: self.primary_slot.clone() }
    }

    /// Lines as those of a plan.
    pub(super) fn render(&self) -> String {
        let mut lines = match self.primary_conninfo.as_deref() {
            None => vec![
                "the repository, and a server if the backup's own configuration names one".into(),
            ],
            Some("") => vec!["the repository alone".into()],
            Some(text) => vec![format!("the repository, and streams from {text}")],
        };
        lines.extend(self.primary_slot.as_ref().map(|name| format!("through slot '{name}'")));
        if !self.secrets_left_out.is_empty() {
            lines.push(format!(
                "without {}: {}",
                self.secrets_left_out.join(", "),
                "put a password into the .pgpass of the user that runs PostgreSQL, or name a file \
                 with passfile="
            ));
        }
        let names = std::iter::once("follows").chain(std::iter::repeat(""));
        names.zip(lines).map(|(name, line)| format!("{name:<15}{line}\n")).collect()
    }
}

/// The name of a slot as PostgreSQL takes it (`ReplicationSlotValidateName`).
fn slot(name: &str, config: &Config) -> Result<String> {
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if name.is_empty() || name.len() > SLOT_NAME_BYTES_MAX || !name.bytes().all(fits) {
        return Err(Error::new(
            Kind::Usage,
            format!("unable to use '{name}' as the name of a replication slot"),
        )
        .hint("Use at most 63 lower-case letters, digits and underscores."));
    }
    if name == config.slot_name() {
        return Err(Error::new(
            Kind::Usage,
            format!("unable to use slot '{name}' for a standby: WAL is streamed through it"),
        )
        .hint("Make another one: select pg_create_physical_replication_slot('standby1')."));
    }
    Ok(name.to_owned())
}
