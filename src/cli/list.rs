//! `tidemark list`: what there is, and which moments can be reached.

use std::collections::BTreeMap;
use std::fmt::Write;

use jiff::Timestamp;
use serde_json::json;

use super::invocation::Invocation;
use super::words::{self, Column};
use crate::daemon::opening;
use crate::error::Result;
use crate::pg::{Lsn, TimelineId};
use crate::repo::{BackupId, BackupSummary, Catalog, Interval, Repository, WalGap, marks};

/// List backups, the moments that can be restored, gaps, and how old the newest durable commit and
/// WAL are.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let repository = opening::repository(&invocation.config, &invocation.clock).await?;
    let catalog = Catalog::load(&repository).await?;
    let holds = marks::holds(&repository).await?;
    let now = invocation.clock.now();
    if args.json {
        return invocation.terminal.json_line(&as_json(&repository, &catalog, &holds, now));
    }
    invocation.terminal.data(&as_text(&repository, &catalog, &holds, now))
}

/// Held backups and why.
type Holds = BTreeMap<BackupId, String>;

/// A stretch of one timeline in which every moment can be restored, whatever backup it starts from.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
struct Window {
    timeline: TimelineId,
    from_time: Timestamp,
    until_time: Timestamp,
    from_lsn: Lsn,
    until_lsn: Lsn,
    /// Whether it grows as WAL arrives.
    open: bool,
    backup_count: usize,
}

/// Intervals of one timeline that touch, joined.
fn windows(intervals: &[Interval]) -> Vec<Window> {
    let mut sorted: Vec<&Interval> = intervals.iter().collect();
    sorted.sort_by_key(|interval| (interval.timeline, interval.from_lsn));
    let mut windows: Vec<Window> = Vec::new();
    for interval in sorted {
        match windows.last_mut() {
            Some(last)
                if last.timeline == interval.timeline && interval.from_lsn <= last.until_lsn =>
            {
                last.until_lsn = last.until_lsn.max(interval.until_lsn);
                last.until_time = last.until_time.max(interval.until_time);
                last.open |= interval.open;
                last.backup_count += 1;
            }
            _ => windows.push(Window {
                timeline: interval.timeline,
                from_time: interval.from_time,
                until_time: interval.until_time,
                from_lsn: interval.from_lsn,
                until_lsn: interval.until_lsn,
                open: interval.open,
                backup_count: 1,
            }),
        }
    }
    windows
}

/// What can be said of a backup in one word.
fn state(catalog: &Catalog, backup: &BackupSummary) -> &'static str {
    if !backup.has_all_packs() {
        "damaged"
    } else if !catalog.is_restorable(backup) {
        "no WAL"
    } else if backup.manifest.checksum_failure_count > 0 {
        "bad pages"
    } else {
        "ok"
    }
}

fn as_json(
    repository: &Repository,
    catalog: &Catalog,
    holds: &Holds,
    now: Timestamp,
) -> serde_json::Value {
    let backups: Vec<_> = catalog
        .backups
        .iter()
        .map(|backup| {
            let hold = holds.get(&backup.id());
            json!({ "state": state(catalog, backup), "hold": hold, "backup": backup })
        })
        .collect();
    let intervals = catalog.intervals();
    let newest = catalog.newest_commit().and_then(|extent| extent.name.time?.to_timestamp());
    json!({
        "repository": repository.store().describe(),
        "cluster": repository.cluster().as_str(),
        "system_id": repository.system_id(),
        "time": now,
        "backups": backups,
        "incomplete": catalog.incomplete,
        "windows": windows(&intervals),
        "intervals": intervals,
        "gaps": catalog.gaps_at(now),
        "damaged": catalog.damaged,
        "newest_durable_commit": newest.map(|time| json!({
            "time": time,
            "age_seconds": now.duration_since(time).as_secs_f64(),
        })),
        "durable_end": catalog.durable_end().map(|(timeline, lsn)| json!({
            "timeline": timeline,
            "lsn": lsn,
            "time": catalog.durable_end_time(),
            "age_seconds": catalog.durable_end_time().map(|time| {
                now.duration_since(time).as_secs_f64()
            }),
        })),
        "wal": {
            "stored_bytes": catalog.wal.stored_bytes(),
            "object_count": catalog.wal.extent_count(),
        },
        "writer": catalog.lease,
        "holds": holds.keys().collect::<Vec<_>>(),
        "foreign_object_count": catalog.foreign_count,
    })
}

fn as_text(repository: &Repository, catalog: &Catalog, holds: &Holds, now: Timestamp) -> String {
    let mut text = format!(
        "Cluster '{}' in {}, system identifier {}\n",
        repository.cluster(),
        repository.store().describe(),
        repository.system_id()
    );
    text.push_str(&backups(catalog));
    // Writing to a String cannot fail.
    for (id, reason) in holds {
        let colon = if reason.is_empty() { "" } else { ": " };
        let _ = writeln!(text, "Held: {id}{colon}{reason}");
    }
    text.push_str(&reachable(catalog));
    for WalGap { gap, last_commit_before, commit_after, expired, barrier, in_flight } in
        catalog.gaps_at(now)
    {
        let around = |time: Option<Timestamp>| time.map_or("unknown".to_owned(), words::time);
        let (what, place) = match (expired, barrier) {
            (true, _) => ("Expired WAL".to_owned(), gap.missing.to_string()),
            (false, Some(kind)) => {
                let from = gap.missing.start();
                let place = format!("from {from} on, only a backup taken later leads past it");
                (format!("GAP, {kind}"), place)
            }
            (false, None) if in_flight => {
                ("WAL not stored yet".to_owned(), gap.missing.to_string())
            }
            (false, None) => ("GAP, WAL lost".to_owned(), gap.missing.to_string()),
        };
        let _ = writeln!(
            text,
            "{what}: timeline {} {place} (last commit before {}, first after {})",
            gap.timeline,
            around(last_commit_before),
            around(commit_after)
        );
    }
    for object in &catalog.damaged {
        let _ = writeln!(text, "DAMAGED '{}': {}", object.object, object.problem);
    }
    text.push_str(&newest(catalog, now));
    text
}

fn backups(catalog: &Catalog) -> String {
    if catalog.backups.is_empty() && catalog.incomplete.is_empty() {
        return "\nNo backups.\n".to_owned();
    }
    use Column::{Numbers, Words};
    let columns = [
        Words("BACKUP"),
        Words("KIND"),
        Words("STATE"),
        Words("STARTED"),
        Numbers("TOOK"),
        Numbers("SIZE"),
        Numbers("STORED"),
        Words("WAL"),
    ];
    let mut rows: Vec<Vec<String>> = Vec::new();
    for backup in &catalog.backups {
        let manifest = &backup.manifest;
        rows.push(vec![
            manifest.id.to_string(),
            format!("{:?}", manifest.kind).to_lowercase(),
            state(catalog, backup).to_owned(),
            words::time(manifest.start_time),
            words::age(manifest.start_time, manifest.end_time),
            words::bytes(manifest.plain_bytes),
            words::bytes(backup.objects.stored_bytes),
            format!("{} to {}", manifest.start_lsn, manifest.end_lsn),
        ]);
    }
    for backup in &catalog.incomplete {
        rows.push(vec![
            backup.id.to_string(),
            String::new(),
            "incomplete".to_owned(),
            words::time(backup.id.start_time()),
            String::new(),
            String::new(),
            words::bytes(backup.objects.stored_bytes),
            String::new(),
        ]);
    }
    format!("\n{}", words::table(&columns, rows))
}

fn reachable(catalog: &Catalog) -> String {
    let windows = windows(&catalog.intervals());
    if windows.is_empty() {
        return "\nNothing can be restored yet.\n".to_owned();
    }
    use Column::{Numbers, Words};
    let columns = [
        Numbers("TIMELINE"),
        Words("RESTORABLE FROM"),
        Words("UNTIL"),
        Words("WAL FROM"),
        Words("UNTIL"),
        Numbers("BACKUPS"),
    ];
    let rows = windows.iter().map(|window| {
        vec![
            window.timeline.to_string(),
            words::time(window.from_time),
            match window.until_time >= window.from_time {
                true => words::time(window.until_time),
                // Nothing is known of the time after the backup yet.
                false => "its end".to_owned(),
            },
            window.from_lsn.to_string(),
            window.until_lsn.to_string(),
            window.backup_count.to_string(),
        ]
    });
    format!("\n{}", words::table(&columns, rows.collect()))
}

fn newest(catalog: &Catalog, now: Timestamp) -> String {
    let mut text = "\n".to_owned();
    if let Some(time) = catalog.newest_commit().and_then(|extent| extent.name.time?.to_timestamp())
    {
        let age = words::age(time, now);
        let _ = writeln!(text, "Newest durable commit: {time:.3}, {age} ago");
    }
    if let Some((timeline, lsn)) = catalog.durable_end() {
        let _ = writeln!(
            text,
            "Durable WAL ends at {lsn} on timeline {timeline}, stored {}; {} in {}",
            catalog.durable_end_time().map_or_else(
                || "at a time the store does not tell".to_owned(),
                |time| format!("{} ago", words::age(time, now))
            ),
            words::bytes(catalog.wal.stored_bytes()),
            words::count(catalog.wal.extent_count(), "object")
        );
    }
    if let Some(lease) = &catalog.lease {
        let state = if lease.released { "ended" } else { "renewed" };
        let _ = writeln!(
            text,
            "Writer: {} (process {} on '{}'), {state} {} ago",
            lease.description,
            lease.process.pid,
            lease.process.host,
            words::age(lease.renewed_time, now)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::{ExtentName, StoredExtent, WalCatalog};

    fn interval(timeline: u32, from: u64, until: u64) -> Interval {
        let timeline = TimelineId::new(timeline).unwrap();
        Interval {
            timeline,
            backup: BackupId::new(Timestamp::UNIX_EPOCH, timeline, Lsn(from)),
            from_lsn: Lsn(from),
            until_lsn: Lsn(until),
            from_time: Timestamp::UNIX_EPOCH,
            until_time: Timestamp::UNIX_EPOCH,
            arrived: true,
            open: false,
            path: Vec::new(),
        }
    }

    #[test]
    fn intervals_of_one_timeline_that_touch_are_one_window() {
        let all =
            [interval(1, 50, 90), interval(1, 10, 60), interval(1, 95, 99), interval(2, 10, 60)];
        let found: Vec<_> =
            windows(&all).iter().map(|w| (w.timeline.get(), w.from_lsn.0, w.until_lsn.0)).collect();
        assert_eq!(found, [(1, 10, 90), (1, 95, 99), (2, 10, 60)]);
    }

    #[test]
    fn how_old_the_last_durable_wal_is_is_shown_whether_or_not_anything_was_committed() {
        let range = crate::pg::LsnRange::new(Lsn(0x10), Lsn(0x90)).unwrap();
        let name = ExtentName { timeline: TimelineId::FIRST, range, time: None };
        let shown = |modified: Option<&str>| {
            let modified = modified.map(|time| time.parse().unwrap());
            let wal = WalCatalog::new([StoredExtent { name, stored_bytes: 7, modified }]);
            newest(&Catalog { wal, ..Catalog::default() }, "2026-11-22T10:05:00Z".parse().unwrap())
        };
        assert_eq!(
            shown(Some("2026-11-22T10:00:00Z")),
            "\nDurable WAL ends at 0/90 on timeline 1, stored 5 min ago; 7 B in 1 object\n"
        );
        assert!(shown(None).contains("the store does not tell"), "{}", shown(None));
    }

    #[tokio::test(start_paused = true)]
    async fn what_strangers_put_into_the_repository_gives_no_command_to_the_terminal() {
        use crate::clock::Clock;
        use crate::repo::{Lease, LeaseOptions, Object};
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let mut options = LeaseOptions::new("str\u{1b}]0;x\u{7}eam");
        options.process.host = "\u{1b}[2Jdb\u{9b}1m".into();
        let lease = Lease::acquire(&repository, options).await.unwrap();
        let shown = async || {
            let catalog = Catalog::load(&repository).await.unwrap();
            as_text(&repository, &catalog, &Holds::new(), clock.now())
        };
        let is_plain = |text: &str| !text.contains(|c: char| c.is_control() && c != '\n');
        let text = shown().await;
        assert!(text.contains("Writer: str ]0;x eam (process"), "{text:?}");
        assert!(is_plain(&text), "{text:?}");
        let refused = Lease::acquire(&repository, LeaseOptions::new("run")).await.unwrap_err();
        assert!(is_plain(refused.message()), "{refused:?}");
        drop(lease);
        let name = repository.name(&Object::Lease).unwrap();
        let variant = |body: &mut Vec<u8>| {
            let text = String::from_utf8(body.clone()).unwrap();
            *body = text.replace("\"held\"", "\"\\u001b[2J\"").into_bytes();
        };
        memory.damage(&name, variant).unwrap();
        let text = shown().await;
        assert!(text.contains("DAMAGED 'main/lease'") && text.contains("[2J"), "{text:?}");
        assert!(is_plain(&text), "{text:?}");
    }
}
