//! What the store has and what follows from it: what can be restored, and where WAL is missing.
//!
//! Read from the names of WAL, from the open section of manifests and from the servers' own history, as
//! `FORMAT.md` describes them. Nothing of the product's code that lists or restores takes part: its
//! listings are held against this.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde_json::Value;
use tidemark::pg::Lsn;

use super::stage::Stage;
use super::writer::Commit;

const BUCKET: &str = "tidemark";
/// A manifest's header, the length of its open section, and the CRC of that.
const MANIFEST_HEADER_BYTES: usize = 64;
const MANIFEST_OPEN_AT: usize = MANIFEST_HEADER_BYTES + 8;

/// Positions from and until.
pub type Span = (Lsn, Lsn);

/// What is there.
#[derive(Debug)]
pub struct Inventory {
    backups: Vec<Backup>,
    /// The WAL of each timeline, joined where it touches.
    wal: BTreeMap<u32, Vec<Span>>,
    /// Where timeline 2 left timeline 1.
    switch: Option<Lsn>,
}

/// What a manifest says.
#[derive(Debug)]
struct Backup {
    id: String,
    timeline: u32,
    end_timeline: u32,
    start_lsn: Lsn,
    end_lsn: Lsn,
    end_time: Timestamp,
}

/// What one backup leads to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reach {
    /// The timeline that is restored.
    pub timeline: u32,
    /// The end of the backup.
    pub from_lsn: Lsn,
    /// The end of the WAL that follows without a hole.
    pub until_lsn: Lsn,
    /// When the backup ended.
    pub from_time: Timestamp,
    /// The backup.
    pub backup: String,
}

/// A stretch of a timeline in which every moment can be restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The timeline that is restored.
    pub timeline: u32,
    /// The end of the first backup.
    pub from_lsn: Lsn,
    /// The end of the WAL.
    pub until_lsn: Lsn,
    /// When the first backup ended.
    pub from_time: Timestamp,
}

/// A timeline on the way to another, and which of its WAL belongs to that way.
struct Part {
    timeline: u32,
    from: Lsn,
    until: Lsn,
    /// Held under its own timeline or one that follows: a promoted server copies the last segment of the
    /// old timeline to the new one (`XLogFileCopy`).
    held: Vec<Span>,
}

impl Inventory {
    /// Reads it. `switch` is where the promoted server says that timeline 2 begins.
    pub fn of(stage: &Stage, switch: Option<Lsn>) -> Self {
        let names = stage.s3.names();
        let manifests = names.iter().filter(|name| name.ends_with("/manifest"));
        let backups = manifests.map(|name| {
            let bytes = stage.s3.server().object(BUCKET, name).unwrap().unwrap();
            Backup::decode(&bytes)
        });
        let mut wal: BTreeMap<u32, Vec<Span>> = BTreeMap::new();
        for (timeline, range) in names.iter().filter_map(|name| parse_extent(name)) {
            wal.entry(timeline).or_default().push(range);
        }
        Self { backups: backups.collect(), wal, switch }.joined()
    }

    fn joined(mut self) -> Self {
        self.wal.values_mut().for_each(|ranges| *ranges = joined(std::mem::take(ranges)));
        self
    }

    fn timelines(&self) -> BTreeSet<u32> {
        let known = self.wal.keys().copied();
        known.chain(self.switch.map(|_| 2)).collect()
    }

    /// The way to a timeline.
    fn way(&self, to: u32) -> Vec<Part> {
        let end = Lsn(u64::MAX);
        let parts = match (to, self.switch) {
            (2, Some(switch)) => vec![(1, Lsn(0), switch), (2, switch, end)],
            _ => vec![(to, Lsn(0), end)],
        };
        let holds = |timeline: u32| self.wal.get(&timeline).into_iter().flatten();
        let part = |(timeline, from, until): (u32, Lsn, Lsn)| {
            let held = (timeline..=to).flat_map(holds);
            let held = held.map(|range| (range.0.max(from), range.1.min(until)));
            let held = joined(held.filter(|(from, until)| from < until).collect());
            Part { timeline, from, until, held }
        };
        parts.into_iter().map(part).collect()
    }

    /// What each backup leads to, by timeline and position.
    pub fn reaches(&self) -> BTreeSet<Reach> {
        let mut all = BTreeSet::new();
        for timeline in self.timelines() {
            let way = self.way(timeline);
            let timeline_at = |at: Lsn| {
                way.iter().find(|part| part.from <= at && at < part.until).map(|part| part.timeline)
            };
            for backup in &self.backups {
                let last = Lsn(backup.end_lsn.0 - 1);
                let descends = timeline_at(backup.start_lsn) == Some(backup.timeline)
                    && timeline_at(last) == Some(backup.end_timeline);
                let until_lsn = reached(&way, backup.start_lsn);
                let arrives = way.last().is_some_and(|own| until_lsn > own.from);
                if descends && arrives && until_lsn >= backup.end_lsn {
                    all.insert(Reach {
                        timeline,
                        from_lsn: backup.end_lsn,
                        until_lsn,
                        from_time: backup.end_time,
                        backup: backup.id.clone(),
                    });
                }
            }
        }
        all
    }

    /// What can be restored, whatever backup it starts from.
    pub fn stretches(&self) -> Vec<Stretch> {
        let mut all: Vec<Stretch> = Vec::new();
        for Reach { timeline, from_lsn, until_lsn, from_time, .. } in self.reaches() {
            match all.last_mut() {
                Some(last) if last.timeline == timeline && from_lsn <= last.until_lsn => {
                    last.until_lsn = last.until_lsn.max(until_lsn);
                }
                _ => all.push(Stretch { timeline, from_lsn, until_lsn, from_time }),
            }
        }
        all
    }

    /// What is missing between WAL that is there, on the way to each timeline, with the timeline that it
    /// is missing on.
    pub fn holes(&self) -> BTreeSet<(u32, Lsn, Lsn)> {
        let mut holes = BTreeSet::new();
        for timeline in self.timelines() {
            // What is missing behind all that is there is no hole.
            let (mut begun, mut behind) = (false, Vec::new());
            for part in self.way(timeline) {
                let mut position = part.from;
                for (from, until) in &part.held {
                    if begun && *from > position {
                        behind.push((part.timeline, position, *from));
                    }
                    holes.extend(behind.drain(..));
                    (begun, position) = (true, *until);
                }
                if begun && position < part.until {
                    behind.push((part.timeline, position, part.until));
                }
            }
        }
        holes
    }

    /// The bounds of the time up to which a stretch has every commit: not before the newest commit that is
    /// inside, not after the first one that lies behind. Of both only those count of which a writer knows
    /// it for sure.
    pub fn time_bounds(&self, stretch: &Stretch, commits: &[Commit]) -> (Timestamp, Timestamp) {
        let is_on_way = |commit: &&Commit| match (stretch.timeline, commit.server, self.switch) {
            (1, server, _) => server == 0,
            (_, 0, Some(switch)) => commit.until_lsn.is_some_and(|until| until <= switch),
            (_, server, _) => server == 1,
        };
        let is_inside = |commit: &&Commit| {
            let inside = |until| until <= stretch.until_lsn;
            commit.from_lsn >= stretch.from_lsn && commit.until_lsn.is_some_and(inside)
        };
        let on_way = || commits.iter().filter(is_on_way);
        let inside = on_way().filter(is_inside).map(|commit| whole_micros(commit.sent));
        let behind = on_way().filter(|commit| commit.from_lsn >= stretch.until_lsn);
        let behind = behind.map(|commit| Timestamp::try_from(commit.acknowledged).unwrap());
        (inside.max().unwrap_or(Timestamp::MIN), behind.min().unwrap_or(Timestamp::MAX))
    }
}

/// PostgreSQL's times have no more.
fn whole_micros(time: std::time::SystemTime) -> Timestamp {
    let micros = Timestamp::try_from(time).unwrap().as_microsecond();
    Timestamp::from_microsecond(micros).unwrap()
}

impl Backup {
    fn decode(manifest: &[u8]) -> Self {
        let bytes = |at: usize| manifest[at..at + 4].try_into().unwrap();
        let length = u32::from_le_bytes(bytes(MANIFEST_HEADER_BYTES)) as usize;
        let open = &manifest[MANIFEST_OPEN_AT..MANIFEST_OPEN_AT + length];
        let open: Value = serde_json::from_slice(open).unwrap();
        let text = |name: &str| open[name].as_str().unwrap();
        let timeline = |name: &str| u32::try_from(open[name].as_u64().unwrap()).unwrap();
        Self {
            id: text("id").to_owned(),
            timeline: timeline("timeline"),
            end_timeline: timeline("end_timeline"),
            start_lsn: text("start_lsn").parse().unwrap(),
            end_lsn: text("end_lsn").parse().unwrap(),
            end_time: text("end_time").parse().unwrap(),
        }
    }
}

/// Timeline and range of a WAL object.
pub fn parse_extent(name: &str) -> Option<(u32, Span)> {
    let (folder, extent) = name.rsplit_once('/')?;
    let (above, timeline) = folder.rsplit_once('/')?;
    if !above.ends_with("/wal") {
        return None;
    }
    let mut parts = extent.split('-').map(|part| u64::from_str_radix(part, 16));
    let range = (Lsn(parts.next()?.ok()?), Lsn(parts.next()?.ok()?));
    Some((u32::from_str_radix(timeline, 16).ok()?, range))
}

/// By position, joined where they touch.
pub fn joined(mut ranges: Vec<Span>) -> Vec<Span> {
    ranges.sort_unstable();
    let mut runs: Vec<Span> = Vec::new();
    for (from, until) in ranges {
        match runs.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(until),
            _ => runs.push((from, until)),
        }
    }
    runs
}

/// Where the WAL ends that follows `from` without a hole.
fn reached(way: &[Part], from: Lsn) -> Lsn {
    let mut position = from;
    for part in way.iter().filter(|part| part.until > from) {
        let run = part.held.iter().find(|(from, until)| *from <= position && position < *until);
        position = run.map_or(position, |(_, until)| *until);
        if position < part.until {
            break;
        }
    }
    position
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn backup(timeline: u32, start: u64, end: u64, second: i64) -> Backup {
        let (start_lsn, end_lsn) = (Lsn(start), Lsn(end));
        let id = format!("{timeline}-{start}");
        Backup { id, timeline, end_timeline: timeline, start_lsn, end_lsn, end_time: at(second) }
    }

    fn stretch(timeline: u32, from: u64, until: u64, second: i64) -> Stretch {
        Stretch { timeline, from_lsn: Lsn(from), until_lsn: Lsn(until), from_time: at(second) }
    }

    fn inventory(backups: Vec<Backup>, wal: &[(u32, u64, u64)], switch: Option<u64>) -> Inventory {
        let mut held: BTreeMap<u32, Vec<Span>> = BTreeMap::new();
        for (timeline, from, until) in wal {
            held.entry(*timeline).or_default().push((Lsn(*from), Lsn(*until)));
        }
        Inventory { backups, wal: held, switch: switch.map(Lsn) }.joined()
    }

    #[test]
    fn a_gap_with_a_backup_on_either_side_leaves_two_stretches() {
        let backups = vec![backup(1, 10, 20, 1), backup(1, 30, 40, 2), backup(1, 80, 90, 3)];
        let wal = [(1, 0, 25), (1, 25, 60), (1, 70, 100)];
        let inventory = inventory(backups, &wal, None);
        assert_eq!(inventory.stretches(), [stretch(1, 20, 60, 1), stretch(1, 90, 100, 3)]);
        assert_eq!(inventory.holes(), [(1, Lsn(60), Lsn(70))].into());
    }

    #[test]
    fn a_promotion_leaves_a_branch_and_a_way_through_it() {
        let backups = vec![backup(1, 10, 20, 1), backup(1, 40, 55, 2), backup(2, 60, 70, 3)];
        // The new timeline holds the last bytes of the old one as well.
        let wal = [(1, 0, 48), (1, 52, 58), (2, 45, 90)];
        let inventory = inventory(backups, &wal, Some(50));
        assert_eq!(inventory.stretches(), [stretch(1, 20, 48, 1), stretch(2, 20, 90, 1)]);
        let holes = [(1, Lsn(48), Lsn(52))];
        assert_eq!(inventory.holes(), holes.into(), "towards timeline 2 nothing is missing");
    }

    #[test]
    fn what_ends_before_the_switch_does_not_lead_to_the_new_timeline() {
        let wal = [(1, 0, 40), (2, 60, 90)];
        let inventory = inventory(vec![backup(1, 10, 20, 1)], &wal, Some(50));
        assert_eq!(inventory.stretches(), [stretch(1, 20, 40, 1)]);
        assert_eq!(inventory.holes(), [(1, Lsn(40), Lsn(50)), (2, Lsn(50), Lsn(60))].into());
    }
}
