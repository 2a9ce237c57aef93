//! `tidemark check`: whether everything that backup and restore will need is there.

use serde::Serialize;
use serde_json::json;

use super::init;
use super::invocation::Invocation;
use super::words;
use crate::daemon::{keys, opening};
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, SystemId};
use crate::repo::{Catalog, Repository};
use crate::wire::{Connection, Session};

/// A writer that renewed its lease this much of its time to live ago is taken to be at work.
const RENEWED_SHARE: f64 = 0.9;

/// Check that server, repository and keys are ready, and that the WAL arrives.
///
/// Connects both ways, reads the server's settings and the slot, probes what the store enforces,
/// and proves with the identity, when there is one, that what is written can be read. The exit
/// status is that of the first thing that is wrong.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

/// How one thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Warning,
    Failed,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    state: State,
    found: String,
    hint: Option<String>,
    #[serde(skip)]
    kind: Option<Kind>,
}

#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, what: &'static str, state: State, found: impl Into<String>) {
        self.0.push(Finding { what, state, found: found.into(), hint: None, kind: None });
    }

    /// Takes note of a failure; the value otherwise.
    fn take<T>(&mut self, what: &'static str, result: Result<T>) -> Option<T> {
        result
            .map_err(|error| {
                self.0.push(Finding {
                    what,
                    state: State::Failed,
                    found: error.message().to_owned(),
                    hint: error.hint_text().map(str::to_owned),
                    kind: Some(error.kind()),
                });
            })
            .ok()
    }

    fn verdict(&self) -> Result<()> {
        let failed = self.0.iter().filter(|finding| finding.state == State::Failed);
        let Some(kind) = failed.clone().find_map(|finding| finding.kind) else { return Ok(()) };
        let message = format!("{} of {} checks failed", failed.count(), self.0.len());
        Err(Error::new(kind, message))
    }

    fn text(&self, colour: bool) -> String {
        let mut text = String::new();
        for finding in &self.0 {
            let (mark, paint) = match finding.state {
                State::Ok => ("ok", "\x1b[32m"),
                State::Warning => ("warning", "\x1b[1;33m"),
                State::Failed => ("FAILED", "\x1b[1;31m"),
            };
            let (paint, off) = if colour { (paint, "\x1b[0m") } else { ("", "") };
            text.push_str(&format!("{paint}{mark:<8}{off}{}: {}\n", finding.what, finding.found));
            if let Some(hint) = &finding.hint {
                text.push_str(&format!("        hint: {hint}\n"));
            }
        }
        text
    }
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let mut findings = Findings::default();
    let server = server(&invocation, &mut findings).await;
    let repository = repository(&invocation, &mut findings, server.as_ref()).await;
    if let Some(repository) = &repository {
        contents(&invocation, &mut findings, repository, server.as_ref()).await;
    }
    if args.json {
        let ok = findings.verdict().is_ok();
        invocation.terminal.json_line(&json!({ "ok": ok, "checks": findings.0 }))?;
    } else {
        // On a terminal both streams are seen together, so the colours of one do for the other.
        invocation.terminal.data(&findings.text(invocation.terminal.colour()))?;
    }
    findings.verdict()
}

/// What the other checks need to know of the server.
struct Server {
    system_id: SystemId,
    flushed_end_lsn: Lsn,
}

async fn server(invocation: &Invocation, findings: &mut Findings) -> Option<Server> {
    let what = "PostgreSQL";
    let options = findings.take(what, invocation.config.connect_options())?;
    let connected = Connection::connect(&options, Session::Physical, &invocation.clock).await;
    let mut server = findings.take(what, connected)?;
    let system = findings.take(what, server.identify_system().await)?;
    findings.add(
        what,
        State::Ok,
        format!(
            "{options}, version {}, system identifier {}, timeline {}, WAL up to {}",
            server.version(),
            system.system_id,
            system.timeline,
            system.flushed_end_lsn
        ),
    );
    if let Some(level) = findings.take("wal_level", server.show("wal_level").await) {
        if level == "minimal" {
            let error =
                Error::new(Kind::Config, "it is 'minimal': the WAL cannot be restored from")
                    .hint("Set wal_level = replica in postgresql.conf and restart the server.");
            findings.take::<()>("wal_level", Err(error));
        } else {
            findings.add("wal_level", State::Ok, level);
        }
    }
    for (name, off, remark) in [
        ("data_checksums", "off", "off: damaged pages are not noticed when they are backed up"),
        ("max_slot_wal_keep_size", "-1", "-1: WAL is kept for us until the server's disk is full"),
    ] {
        match server.show(name).await {
            Ok(value) if value == off => findings.add(name, State::Warning, remark),
            Ok(value) => findings.add(name, State::Ok, value),
            Err(error) => drop(findings.take::<()>(name, Err(error))),
        }
    }
    slot(invocation, findings, &mut server, system.flushed_end_lsn).await;
    server.close().await;
    Some(Server { system_id: system.system_id, flushed_end_lsn: system.flushed_end_lsn })
}

async fn slot(
    invocation: &Invocation,
    findings: &mut Findings,
    server: &mut Connection,
    flushed_end_lsn: Lsn,
) {
    let what = "replication slot";
    let Some(options) = findings.take(what, invocation.config.stream_options()) else { return };
    let name = options.slot_name;
    match server.read_slot(&name).await {
        Ok(None) => {
            findings.add(
                what,
                State::Warning,
                format!("'{name}' is not there yet: 'stream' makes it"),
            );
        }
        Ok(Some(slot)) => match slot.restart_lsn {
            Some(restart) => {
                let kept = flushed_end_lsn.saturating_since(restart);
                let found = format!("'{name}' keeps {} of WAL from {restart}", words::bytes(kept));
                findings.add(what, State::Ok, found);
            }
            None => findings.add(what, State::Warning, format!("'{name}' keeps no WAL")),
        },
        Err(error) => drop(findings.take::<()>(what, Err(error))),
    }
}

async fn repository(
    invocation: &Invocation,
    findings: &mut Findings,
    server: Option<&Server>,
) -> Option<Repository> {
    let what = "store";
    let store = findings.take(what, opening::store(&invocation.config, &invocation.clock))?;
    let capabilities = findings.take(what, store.probe().await)?;
    let remarks = init::remarks(&capabilities);
    if init::trustworthy(&capabilities) {
        let found = format!("{} can be read, written and trusted", store.describe());
        findings.add(what, State::Ok, found);
        for remark in remarks {
            findings.add(what, State::Warning, remark);
        }
    } else {
        let error = Error::new(Kind::Unsupported, remarks.join("; "));
        findings.take::<()>(what, Err(error));
    }
    let what = "repository";
    let opened = opening::repository(&invocation.config, &invocation.clock).await;
    let repository = match opened {
        Err(error) if error.kind() == Kind::NotFound => {
            let found =
                format!("nothing is there for cluster '{}' yet", invocation.config.cluster());
            findings.add(what, State::Warning, found);
            return None;
        }
        opened => findings.take(what, opened)?,
    };
    let same = server.map_or(Ok(()), |server| opening::same_system(&repository, server.system_id));
    findings.take(what, same)?;
    let found =
        format!("cluster '{}', system identifier {}", repository.cluster(), repository.system_id());
    findings.add(what, State::Ok, found);
    Some(repository)
}

async fn contents(
    invocation: &Invocation,
    findings: &mut Findings,
    repository: &Repository,
    server: Option<&Server>,
) {
    let Some(catalog) = findings.take("catalog", Catalog::load(repository).await) else { return };
    let lost = catalog.gaps().iter().filter(|gap| !gap.expired).count();
    let backups = words::count(catalog.backups.len(), "backup");
    if lost > 0 {
        let found = format!("{backups}, and {}: see 'tidemark list'", words::count(lost, "gap"));
        findings.add("catalog", State::Warning, found);
    } else if catalog.backups.is_empty() {
        findings.add("catalog", State::Warning, "no backup yet: run 'tidemark backup'");
    } else {
        findings.add("catalog", State::Ok, format!("{backups}, no gap in the WAL"));
    }
    readable(invocation, findings, repository, &catalog).await;
    let now = invocation.clock.now();
    let writer = catalog.lease.as_ref().filter(|lease| !lease.released);
    let Some(writer) = writer else {
        findings.add("WAL stream", State::Warning, "nobody streams: run 'tidemark stream'");
        return;
    };
    let silent = now.duration_since(writer.renewed_time);
    #[expect(clippy::cast_precision_loss, reason = "a share of minutes needs no precision")]
    let late = silent.as_millis_f64() > writer.ttl_ms as f64 * RENEWED_SHARE;
    let behind = match (server, catalog.durable_end()) {
        (Some(server), Some((_, durable))) => {
            let bytes = words::bytes(server.flushed_end_lsn.saturating_since(durable));
            format!(", {bytes} behind the server")
        }
        _ => String::new(),
    };
    let found = format!(
        "{} by process {} on '{}', renewed {} ago{behind}",
        writer.description,
        writer.process.pid,
        writer.process.host,
        words::age(writer.renewed_time, now)
    );
    findings.add("WAL stream", if late { State::Warning } else { State::Ok }, found);
}

/// Whether the identity here opens the newest backup, or at least the newest WAL.
async fn readable(
    invocation: &Invocation,
    findings: &mut Findings,
    repository: &Repository,
    catalog: &Catalog,
) {
    let what = "keys";
    let Some(identities) = findings.take(what, keys::identities(&invocation.config)) else {
        return;
    };
    let sealed = catalog.keys.iter().len() > 0;
    if identities.is_empty() && sealed {
        let found = "no identity is here: this host can write and not restore";
        findings.add(what, State::Warning, found);
        return;
    }
    let Some(reader) = findings.take(what, keys::reader(&invocation.config, repository)) else {
        return;
    };
    let opened = match (catalog.backups.last(), newest_extent(catalog)) {
        (Some(backup), _) => {
            reader.manifest(backup.id()).await.map(|_manifest| "the newest backup")
        }
        (None, Some(extent)) => reader.extent(&extent).await.map(|_plain| "the newest WAL"),
        (None, None) => return,
    };
    if let Some(opened) = findings.take(what, opened) {
        findings.add(what, State::Ok, format!("{opened} can be opened here"));
    }
}

fn newest_extent(catalog: &Catalog) -> Option<crate::repo::ExtentName> {
    let timeline = catalog.wal.timelines().last()?;
    catalog.wal.extents(timeline).last().map(|extent| extent.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_decides_the_exit_status_and_warnings_do_not() {
        let mut findings = Findings::default();
        findings.add("a", State::Warning, "so so");
        assert!(findings.verdict().is_ok());
        findings.take::<()>("b", Err(Error::new(Kind::Denied, "no").hint("Ask.")));
        findings.take::<()>("c", Err(Error::new(Kind::Corrupt, "bad")));
        let error = findings.verdict().unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (Kind::Denied, "2 of 3 checks failed")
        );
        assert!(findings.text(false).contains("FAILED  b: no\n        hint: Ask.\n"));
    }
}
