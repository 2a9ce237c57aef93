//! `tidemark check`: whether everything that backup and restore will need is there.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;

mod streaming;

use super::init;
use super::invocation::Invocation;
use super::terminal::plain;
use super::words;
use crate::daemon::{keys, opening, writing};
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, SystemId, TimelineId};
use crate::repo::{BackupSummary, Catalog, Repository};
use crate::wire::{Connection, Session, SystemIdentification};
use streaming::{Slot, Streaming};

/// Check that server, repository and keys are ready, and that the WAL arrives.
///
/// Connects both ways, reads the server's settings and the slot, probes what the store enforces,
/// and proves with the identity, when there is one, that what is written can be read. Fit for
/// monitoring: while a slot keeps WAL, or a writer has not given its lease back, it is a failure
/// that nobody streams, that commits older than five minutes and a third of lease.ttl are not
/// durable, that no backup leads to the WAL that arrives, and that the repository is not there; so
/// is a slot that the server has given up on. A slot that is missing, a gap, and that there is no
/// backup yet are warnings. The exit status is that of the first failure; a warning leaves it 0.
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

    fn fail(&mut self, what: &'static str, error: Error) {
        self.take::<()>(what, Err(error));
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
            let found = plain(&finding.found);
            text.push_str(&format!("{paint}{mark:<8}{off}{}: {found}\n", finding.what));
            if let Some(hint) = &finding.hint {
                text.push_str(&format!("        hint: {}\n", plain(hint)));
            }
        }
        text
    }
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let mut findings = Findings::default();
    let server = server(&invocation, &mut findings).await;
    let repository = repository(&invocation, &mut findings, server.as_ref()).await;
    let catalog = match &repository {
        Some(repository) => findings.take("catalog", Catalog::load(repository).await),
        None => None,
    };
    let now = invocation.clock.now();
    let streaming = Streaming::of(server.as_ref(), catalog.as_ref(), now);
    if let (Some(repository), Some(catalog)) = (&repository, &catalog) {
        contents(&mut findings, catalog, &streaming, now);
        readable(&invocation, &mut findings, repository, catalog).await;
    }
    let slot_name = invocation.config.slot_name();
    for (what, verdict) in
        [("replication slot", streaming.slot(slot_name)), ("WAL stream", streaming.writer())]
    {
        match verdict {
            Some(Ok((state, found))) => findings.add(what, state, found),
            Some(Err(error)) => findings.fail(what, error),
            None => {}
        }
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
    timeline: TimelineId,
    flushed_end_lsn: Lsn,
    slot: Slot,
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
            findings.fail("wal_level", error);
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
            Err(error) => findings.fail(name, error),
        }
    }
    let slot = findings
        .take("replication slot", server.read_slot(invocation.config.slot_name()).await)
        .map_or(Slot::Unknown, |found| found.map_or(Slot::Absent, |slot| slot.restart_lsn.into()));
    server.close().await;
    let SystemIdentification { system_id, timeline, flushed_end_lsn, .. } = system;
    Some(Server { system_id, timeline, flushed_end_lsn, slot })
}

/// The repository, when there is one. Only then is the store tried: what is written to a folder that
/// is not mounted can be read there too, and says nothing of the repository.
async fn repository(
    invocation: &Invocation,
    findings: &mut Findings,
    server: Option<&Server>,
) -> Option<Repository> {
    let what = "repository";
    let config = &invocation.config;
    let place = findings.take(what, opening::store(config, &invocation.clock))?.describe();
    let repository = match opening::repository(config, &invocation.clock).await {
        Err(error) if error.kind() == Kind::NotFound => {
            match server.map(|server| server.slot) {
                Some(Slot::Keeps(_)) => findings
                    .fail(what, writing::vanished(&place, config.cluster(), config.slot_name())),
                _ => findings.add(what, State::Warning, nothing_there(&place, config.cluster())),
            }
            return None;
        }
        opened => findings.take(what, opened)?,
    };
    store(findings, &repository).await?;
    let same = server.map_or(Ok(()), |server| opening::same_system(&repository, server.system_id));
    findings.take(what, same)?;
    let found =
        format!("cluster '{}', system identifier {}", repository.cluster(), repository.system_id());
    findings.add(what, State::Ok, found);
    Some(repository)
}

fn nothing_there(place: &str, cluster: &str) -> String {
    format!(
        "nothing is there for cluster '{cluster}' yet, so {place} was not tried: run 'tidemark init'"
    )
}

async fn store(findings: &mut Findings, repository: &Repository) -> Option<()> {
    let what = "store";
    let store = repository.store();
    let capabilities = findings.take(what, store.probe().await)?;
    let remarks = init::remarks(&capabilities);
    if init::trustworthy(&capabilities) {
        let found = format!("{} can be read, written and trusted", store.describe());
        findings.add(what, State::Ok, found);
        for remark in remarks {
            findings.add(what, State::Warning, remark);
        }
    } else {
        findings.fail(what, Error::new(Kind::Unsupported, remarks.join("; ")));
    }
    Some(())
}

/// What to do about damage in the repository.
const SEE_VERIFY: &str =
    "'tidemark verify' says what is lost. Take a base backup now, and find out why.";

fn contents(findings: &mut Findings, catalog: &Catalog, streaming: &Streaming<'_>, now: Timestamp) {
    let what = "catalog";
    let lost = catalog.gaps_at(now).iter().filter(|gap| gap.is_lost()).count();
    let backups = words::count(catalog.backups.len(), "backup");
    let is_broken = |backup: &&BackupSummary| !catalog.is_restorable(backup);
    let broken = catalog.backups.iter().filter(is_broken).count();
    if let Some(damaged) = catalog.damaged.first() {
        let others = match catalog.damaged.len() {
            1 => String::new(),
            count => format!(", and {} more", count - 1),
        };
        let found = format!("'{}' is damaged: {}{others}", damaged.object, damaged.problem);
        findings.fail(what, Error::new(Kind::Corrupt, found).hint(SEE_VERIFY));
    } else if broken > 0 && broken == catalog.backups.len() {
        let found = format!("{backups}, and none can be restored: what they need is gone");
        findings.fail(what, Error::new(Kind::Corrupt, found).hint(SEE_VERIFY));
    } else if let Some(error) = streaming.dead_end() {
        findings.fail(what, error);
    } else if broken > 0 {
        let found = format!("{backups}, {broken} of which cannot be restored: see 'tidemark list'");
        findings.add(what, State::Warning, found);
    } else if lost > 0 {
        let found = format!("{backups}, and {}: see 'tidemark list'", words::count(lost, "gap"));
        findings.add(what, State::Warning, found);
    } else if catalog.backups.is_empty() {
        findings.add(what, State::Warning, "no backup yet: run 'tidemark backup'");
    } else {
        findings.add(what, State::Ok, format!("{backups}, no gap in the WAL"));
    }
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
