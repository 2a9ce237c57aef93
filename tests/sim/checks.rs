//! What must hold, judged from object names and the model alone, or by reading through the product's own
//! catalog, reader and plans and comparing with the model.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use tidemark::capture::stream::{Snapshot, WalGap as ReportedGap};
use tidemark::pg::{Lsn, TimelineId};
use tidemark::repo::{Catalog, Interval};

use crate::model::{Backup, Barrier, Ending, Line};
use crate::net::Change;
use crate::server::{Ack, State};
use crate::work::{Settings, days_before};

/// Packs without a manifest are left alone for so long; twice the time in which a backup commits.
const SWEPT_AFTER: Duration = Duration::from_secs(2 * 24 * 3600);

/// Beginnings of the names of what nobody ever deletes: it speaks of WAL, or of all of the cluster.
const LASTING: [&str; 3] = ["main/identity", "main/marks/minimal-", "main/marks/damaged-"];

pub type Names = BTreeMap<String, u64>;
/// Positions, first and first after.
pub type Span = (u64, u64);

/// What an extent's name says.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    pub timeline: u32,
    pub span: Span,
    /// Microseconds since 1970, 0 for none.
    pub time: u64,
}

/// Reads `main/wal/TTTTTTTT/SSSSSSSSSSSSSSSS-EEEEEEEEEEEEEEEE-MMMMMMMMMMMMMMMM`.
pub fn parse_extent(name: &str) -> Option<Stored> {
    let (timeline, rest) = name.strip_prefix("main/wal/")?.split_once('/')?;
    let mut parts = rest.split('-').map(|part| u64::from_str_radix(part, 16));
    let mut next = || parts.next()?.ok();
    let span = (next()?, next()?);
    Some(Stored { timeline: u32::from_str_radix(timeline, 16).ok()?, span, time: next()? })
}

/// The parts of `name` of a backup: its id and the object's last name.
fn parse_base(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("main/base/")?.split_once('/')
}

pub fn merge(mut spans: Vec<Span>) -> Vec<Span> {
    spans.retain(|(start, end)| start < end);
    spans.sort_unstable();
    let mut merged: Vec<Span> = Vec::new();
    for (start, end) in spans {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}

/// What of `wanted` is not in `spans`, which are merged.
pub fn holes(wanted: Span, spans: &[Span]) -> Vec<Span> {
    let mut position = wanted.0;
    let mut holes = Vec::new();
    for (start, end) in spans.iter().copied().filter(|(_, end)| *end > wanted.0) {
        if start >= wanted.1 {
            break;
        }
        if start > position {
            holes.push((position, start));
        }
        position = position.max(end);
    }
    if position < wanted.1 {
        holes.push((position, wanted.1));
    }
    holes
}

/// What is stored on the way to a line. Bytes before a switch point may be held under the timeline that
/// follows, which begins with a copy of them.
pub fn coverage(names: &Names, line: &Line) -> Vec<Span> {
    let stored: Vec<Stored> = names.keys().filter_map(|name| parse_extent(name)).collect();
    let parts = line.parts();
    let mut spans = Vec::new();
    for (index, (_, start, end)) in parts.iter().enumerate() {
        let holders: BTreeSet<u32> = parts[index..].iter().map(|part| part.0).collect();
        let held = stored.iter().filter(|extent| holders.contains(&extent.timeline));
        spans.extend(held.map(|extent| (extent.span.0.max(*start), extent.span.1.min(*end))));
    }
    merge(spans)
}

/// End of what is stored without a hole from `from` on.
pub fn contiguous_end(spans: &[Span], from: u64) -> u64 {
    let span = spans.iter().find(|(start, end)| *start <= from && from < *end);
    span.map_or(from, |(_, end)| *end)
}

/// Whether the WAL from `from` on leads to `window`, a moment: it holds a transaction that ended later,
/// or all there is.
fn reaches(line: &Line, spans: &[Span], from: u64, window: i64) -> bool {
    let end = contiguous_end(spans, from);
    let later = |e: &Ending| from <= e.start && e.last <= end && e.time >= window;
    line.endings.iter().any(later) || spans.last().is_some_and(|last| last.1 <= end)
}

/// End of the WAL that a backup which began at `start` leads to.
fn reach(line: &Line, spans: &[Span], start: u64) -> u64 {
    let end = contiguous_end(spans, start);
    line.barrier_after(start).map_or(end, |barrier| end.min(barrier))
}

/// Whether the listing can know of a timeline: by its WAL or by its history.
fn is_known(catalog: &Catalog, line: &Line) -> bool {
    let timeline = TimelineId::new(line.number).unwrap();
    catalog.wal.timelines().any(|other| other == timeline)
        || catalog.histories.contains_key(&timeline)
}

/// Whether an extent inside `span` on the way to `line` has `time` for its greatest.
fn is_named(names: &Names, line: &Line, (start, end): Span, time: i64) -> bool {
    let stored = names.keys().filter_map(|name| parse_extent(name));
    let mut inside = stored.filter(|extent| {
        let on_the_way = line.parts().iter().any(|(number, begin, part_end)| {
            *number == extent.timeline && *begin <= extent.span.0 && extent.span.1 <= *part_end
        });
        on_the_way && start <= extent.span.0 && extent.span.1 <= end
    });
    inside.any(|extent| extent.time == time as u64)
}

/// Whether a backup lies on the way to `line`.
fn leads_to(state: &State, backup: &Backup, line: &Line) -> bool {
    let last = backup.end.saturating_sub(1);
    let own = state.lines[backup.line].number;
    line.number_at(backup.start) == own && line.number_at(last) == own
}

/// The newest of the backups before `window`, a moment, from which the WAL leads to it.
fn window_base<'a>(
    line: &Line,
    spans: &[Span],
    listed: &[&'a Backup],
    window: Timestamp,
) -> Option<&'a Backup> {
    let window = window.as_microsecond();
    let before = listed
        .iter()
        .filter(|backup| backup.end_time <= window && reaches(line, spans, backup.start, window));
    before.max_by_key(|backup| backup.end_time).copied()
}

/// A backup without a manifest.
struct Pending {
    process: usize,
    /// When the last of its packs was stored.
    newest: Timestamp,
}

impl Pending {
    fn age(&self, now: Timestamp) -> Duration {
        Duration::try_from(now.duration_since(self.newest)).unwrap_or_default()
    }
}

/// The judge: sees everything that is told and changed.
pub struct Judge {
    pub settings: Settings,
    pub violations: Vec<String>,
    /// Who wrote the lease last.
    pub holder: Option<usize>,
    /// Backups that were committed and not deleted since, with their packs.
    pub committed: BTreeMap<String, BTreeSet<String>>,
    /// Backups that have packs and never had a manifest.
    pending: BTreeMap<String, Pending>,
    pub targets: u64,
}

impl Judge {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            violations: Vec::new(),
            holder: None,
            committed: BTreeMap::new(),
            pending: BTreeMap::new(),
            targets: 0,
        }
    }

    pub fn accuse(&mut self, what: impl Into<String>) {
        self.violations.push(what.into());
    }

    /// A flush position was told: everything up to it is stored, and the teller holds the lease.
    pub fn ack(&mut self, ack: &Ack, names: &Names, state: &State, gaps: &[ReportedGap]) {
        if ack.position <= ack.before {
            return;
        }
        if self.holder != Some(ack.process) {
            let holder = self.holder;
            self.accuse(format!("fenced: {ack:?} while {holder:?} holds the lease"));
        }
        let line = &state.lines[ack.line];
        let mut spans = coverage(names, line);
        // With a ceiling WAL is given up on purpose, and reported.
        if self.settings.lag_ceiling_bytes.is_some() {
            spans.extend(gaps.iter().map(|gap| (gap.start_lsn.0, gap.end_lsn.0)));
            spans = merge(spans);
        }
        let mut missing = holes((ack.before, ack.position), &spans);
        // What was on its way to the store when the rest was given up may arrive yet.
        let gave_up = |end| gaps.iter().any(|gap| gap.start_lsn.0 == end);
        missing.retain(|(_, end)| self.settings.lag_ceiling_bytes.is_none() || !gave_up(*end));
        if !missing.is_empty() {
            self.accuse(format!("acknowledged and not stored: {ack:?} {missing:x?}"));
        }
        if !line.is_boundary(ack.position) {
            let end = line.boundary_before(ack.position);
            self.accuse(format!("acknowledged in the middle of a record after {end}: {ack:?}"));
        }
    }

    /// A process says up to which time everything is stored: then no commit up to then is missing.
    pub fn promise(&mut self, process: usize, told: &Snapshot, state: &State) {
        let Some(caught_up) = told.caught_up_at else { return };
        let (until, durable) = (caught_up.as_microsecond(), told.durable_end_lsn.0);
        let mut newest = state.line().endings.iter().rev().take_while(|e| e.last > durable);
        if let Some(missing) = newest.find(|e| e.commit && e.time <= until) {
            let durable = told.durable_end_lsn;
            self.accuse(format!(
                "{process} has caught up with {caught_up}, stored {durable}, and lacks {missing:?}"
            ));
        }
    }

    /// Something changed in the store; `before` are the names there were.
    pub fn change(&mut self, change: &Change, before: &Names, state: &State, now: Timestamp) {
        match change {
            Change::Replaced { name, process } if name == "main/lease" => {
                self.holder = Some(*process);
            }
            Change::Made { name, process } => {
                match parse_base(name) {
                    Some((id, "manifest")) => self.committed_backup(id, before, state, now),
                    Some((id, _)) => {
                        let pending = Pending { process: *process, newest: now };
                        self.pending.insert(id.to_owned(), pending);
                    }
                    None => {}
                }
                self.barriers(name, before, state);
            }
            Change::Deleted { names, process } => {
                let gone: BTreeSet<&str> = names.iter().map(String::as_str).collect();
                self.swept(&gone, *process, now);
                let mut after = before.clone();
                after.retain(|name, _| !gone.contains(name.as_str()));
                self.deleted(&gone, (before, &after), state, now);
            }
            Change::Replaced { .. } => {}
        }
    }

    /// WAL behind a place that no backup from before leads past comes after the mark that says so, and no
    /// mark says so of any other place.
    fn barriers(&mut self, name: &str, before: &Names, state: &State) {
        let all = || {
            let lines = state.lines.iter();
            lines.flat_map(|line| line.barriers.iter().map(move |barrier| (line, barrier)))
        };
        let is_said = |(line, barrier): (&Line, &Barrier)| {
            line.parts().into_iter().any(|(number, _, _)| line.is_said(barrier, number, name))
        };
        let says_so = ["minimal", "damaged"].map(|kind| format!("main/marks/{kind}-"));
        if says_so.iter().any(|mark| name.starts_with(mark)) && !all().any(is_said) {
            return self.accuse(format!("{name} is said of WAL that leads on"));
        }
        let Some(Stored { timeline, span: (start, end), .. }) = parse_extent(name) else { return };
        let unmarked = all().find_map(|(line, barrier)| {
            let number = line.number_at(barrier.at);
            let inside = start < barrier.told && barrier.told <= end;
            let is_marked = || before.keys().any(|name| line.is_said(barrier, number, name));
            (inside && number == timeline && !is_marked()).then(|| barrier.mark(number))
        });
        if let Some(mark) = unmarked {
            self.accuse(format!("{name} is stored before {mark}"));
        }
    }

    /// A backup becomes visible: its packs and its WAL are there.
    fn committed_backup(&mut self, id: &str, names: &Names, state: &State, now: Timestamp) {
        if let Some(age) = self.pending.remove(id).map(|pending| pending.age(now))
            && age > SWEPT_AFTER
        {
            self.accuse(format!("backup {id} is listed {age:?} after its last pack"));
        }
        let Some(backup) = state.backups.iter().find(|backup| backup.id == id) else {
            return self.accuse(format!("a manifest of an unknown backup {id}"));
        };
        let prefix = format!("main/base/{id}/pack-");
        let packs = names.keys().filter(|name| name.starts_with(&prefix)).cloned();
        self.committed.insert(id.to_owned(), packs.collect());
        let line = &state.lines[backup.line];
        if let Some(barrier) = line.barrier_after(backup.start).filter(|at| *at < backup.end) {
            self.accuse(format!("backup {id} is listed and its WAL leads to {barrier:x} only"));
        }
        let spans = coverage(names, line);
        let missing = holes((backup.start, backup.end), &spans);
        if backup.end == 0 || !missing.is_empty() {
            self.accuse(format!("backup {id} is listed without its WAL {missing:x?}"));
        }
    }

    /// Nobody takes the packs of another's backup that may still become visible: it looks for them
    /// before it does, so what this leads to is seen rarely.
    fn swept(&mut self, gone: &BTreeSet<&str>, process: usize, now: Timestamp) {
        for (id, _) in gone.iter().filter_map(|name| parse_base(name)) {
            let Some(pending) = self.pending.get(id) else { continue };
            let age = pending.age(now);
            if pending.process != process && age < SWEPT_AFTER {
                self.accuse(format!("{process} deletes packs of {id} {age:?} after its newest"));
            }
        }
    }

    /// Nothing goes that is referred to.
    fn deleted(
        &mut self,
        gone: &BTreeSet<&str>,
        (before, after): (&Names, &Names),
        state: &State,
        now: Timestamp,
    ) {
        for name in gone {
            if LASTING.iter().any(|kind| name.starts_with(kind)) || name.ends_with(".history") {
                self.accuse(format!("{name} is deleted"));
            }
            let Some((id, what)) = parse_base(name) else { continue };
            if what == "manifest" {
                self.deleted_backup(id, before, state, now);
            } else if after.contains_key(&format!("main/base/{id}/manifest")) {
                self.accuse(format!("pack {name} is deleted while its backup is listed"));
            }
        }
        if !gone.iter().any(|name| name.starts_with("main/wal/")) {
            return;
        }
        for line in &state.lines {
            let (were, are) = (coverage(before, line), coverage(after, line));
            for needed in self.needed(line, (before, after), state, now) {
                let lost = holes(needed, &are);
                let lost: Vec<Span> =
                    lost.into_iter().filter(|hole| holes(*hole, &were) != [*hole]).collect();
                if !lost.is_empty() {
                    let line = line.number;
                    self.accuse(format!(
                        "WAL {lost:x?} towards timeline {line} is deleted, needed {needed:x?}"
                    ));
                }
            }
        }
    }

    /// The backups whose manifests are there, oldest first.
    fn listed<'a>(&self, names: &Names, state: &'a State) -> Vec<&'a Backup> {
        let there = |b: &&Backup| names.contains_key(&format!("main/base/{}/manifest", b.id));
        let mut listed: Vec<&Backup> = state.backups.iter().filter(there).collect();
        listed.sort_by(|a, b| a.id.cmp(&b.id));
        listed
    }

    /// The WAL towards `line` that no rule lets go.
    fn needed(
        &self,
        line: &Line,
        (before, after): (&Names, &Names),
        state: &State,
        now: Timestamp,
    ) -> Vec<Span> {
        let listed = self.listed_towards(line, after, state);
        let mut needed: Vec<Span> = listed.iter().map(|b| (b.start, b.end)).collect();
        let base = match self.settings.retention.pitr_days {
            None => listed.first().copied(),
            Some(days) => {
                let base =
                    window_base(line, &coverage(before, line), &listed, days_before(now, days));
                base.or(listed.first().copied())
            }
        };
        needed.extend(base.map(|backup| (backup.start, u64::MAX)));
        needed
    }

    /// The backups whose manifests are there and which `line` goes on from, oldest first.
    fn listed_towards<'a>(&self, line: &Line, names: &Names, state: &'a State) -> Vec<&'a Backup> {
        let mut listed = self.listed(names, state);
        listed.retain(|backup| leads_to(state, backup, line));
        listed
    }

    /// A backup goes only when no rule keeps it.
    fn deleted_backup(&mut self, id: &str, before: &Names, state: &State, now: Timestamp) {
        self.committed.remove(id);
        let rules = self.settings.retention.clone();
        let listed = self.listed(before, state);
        let Some(place) = listed.iter().position(|backup| backup.id == id) else { return };
        let backup = listed[place];
        let newer = listed.len() - place - 1;
        let ended_before = |days: u32| backup.end_time <= days_before(now, days).as_microsecond();
        let mut kept_by = Vec::new();
        if newer == 0 {
            kept_by.push("it is the newest");
        }
        if rules.keep_count.is_some_and(|count| newer < count as usize) {
            kept_by.push("the count");
        }
        if rules.keep_days.is_some_and(|days| !ended_before(days)) {
            kept_by.push("its age");
        }
        if rules.pitr_days.is_some_and(|days| !ended_before(days)) {
            kept_by.push("the window");
        }
        if let Some(days) = rules.pitr_days {
            let window = days_before(now, days);
            let is_base = |line: &Line| {
                let towards = self.listed_towards(line, before, state);
                let base = window_base(line, &coverage(before, line), &towards, window);
                base.is_some_and(|base| base.id == id)
            };
            if state.lines.iter().any(is_base) {
                kept_by.push("the window, which begins behind it");
            }
        }
        if rules.keep_days.is_none() && rules.keep_count.is_none() {
            kept_by.push("nothing says that backups go");
        }
        if !kept_by.is_empty() {
            self.accuse(format!("backup {id} is deleted, kept by {kept_by:?}"));
        }
    }

    /// The listing tells the truth: backups, intervals and gaps.
    pub fn listing(&mut self, catalog: &Catalog, names: &Names, state: &State) {
        let listed: BTreeSet<String> =
            self.listed(names, state).iter().map(|backup| backup.id.clone()).collect();
        let said: BTreeSet<String> =
            catalog.backups.iter().map(|backup| backup.id().to_string()).collect();
        if listed != said {
            self.accuse(format!("the backups are {listed:?}, listed {said:?}"));
        }
        if !catalog.damaged.is_empty() || catalog.foreign_count > 0 {
            self.accuse(format!("listed as damaged: {:?}", catalog.damaged));
        }
        for backup in &catalog.backups {
            if !catalog.is_restorable(backup) {
                self.accuse(format!("backup {} is listed and cannot be restored", backup.id()));
            }
        }
        self.intervals(catalog, names, state);
        self.gaps(catalog, names, state);
    }

    fn intervals(&mut self, catalog: &Catalog, names: &Names, state: &State) {
        let intervals = catalog.intervals();
        self.each_backup_leads_on(&intervals, catalog, names, state);
        for interval in &intervals {
            let number = interval.timeline.get();
            let Some(line) = state.lines.iter().find(|line| line.number == number) else {
                self.accuse(format!("an interval towards unknown timeline {number}"));
                continue;
            };
            let start = interval.backup.start_lsn().0;
            let end = reach(line, &coverage(names, line), start);
            let until = interval.until_lsn.0;
            if until != end && !(until < end && line.is_padding(until, end)) {
                self.accuse(format!("{interval:?}: the WAL reaches to {}", Lsn(end)));
            }
            let id = interval.backup.to_string();
            let backup = state.backups.iter().find(|backup| backup.id == id);
            if backup.is_none_or(|backup| backup.end != interval.from_lsn.0) {
                self.accuse(format!("{interval:?} does not begin at the end of {backup:?}"));
            }
            self.times(interval, line, (start, end), names);
        }
    }

    /// From each backup there is an interval towards each timeline that its WAL reaches, and no other.
    fn each_backup_leads_on(
        &mut self,
        intervals: &[Interval],
        catalog: &Catalog,
        names: &Names,
        state: &State,
    ) {
        let said: BTreeSet<(String, u32)> =
            intervals.iter().map(|it| (it.backup.to_string(), it.timeline.get())).collect();
        let mut expected: BTreeSet<(String, u32)> = BTreeSet::new();
        for line in state.lines.iter().filter(|line| is_known(catalog, line)) {
            let spans = coverage(names, line);
            for backup in self.listed_towards(line, names, state) {
                let end = reach(line, &spans, backup.start);
                if end >= backup.end && line.number_at(end - 1) == line.number {
                    expected.insert((backup.id.clone(), line.number));
                }
            }
        }
        if said != expected {
            self.accuse(format!("intervals are there {expected:?}, listed {said:?}"));
        }
    }

    /// Every commit up to the time that is promised is there, and what an extent's name says is promised.
    fn times(&mut self, interval: &Interval, line: &Line, (start, end): Span, names: &Names) {
        let until = interval.until_time.as_microsecond();
        let missing = line.endings.iter().find(|e| e.commit && e.last > end && e.time <= until);
        if let Some(missing) = missing {
            self.accuse(format!("{interval:?} promises {missing:?}, stored up to {end:x}"));
        }
        let backup_end = interval.from_lsn.0;
        let from = interval.from_time.as_microsecond();
        let own = line.endings.iter().filter(|e| start <= e.start && e.last <= backup_end);
        if own.clone().any(|e| e.time > from && is_named(names, line, (start, backup_end), e.time))
        {
            self.accuse(format!("{interval:?} begins before the commits of its backup's own WAL"));
        }
        let mut known = line.endings.iter().filter(|e| start <= e.start && e.last <= end);
        if let Some(later) =
            known.find(|e| e.time > until && is_named(names, line, (start, end), e.time))
        {
            self.accuse(format!("{interval:?} does not promise {later:?}, which a name tells"));
        }
    }

    /// Every hole is listed, and nothing else is.
    fn gaps(&mut self, catalog: &Catalog, names: &Names, state: &State) {
        let said: BTreeSet<(u32, Span)> = catalog
            .gaps()
            .iter()
            .filter(|gap| gap.barrier.is_none())
            .map(|gap| {
                let missing = gap.gap.missing;
                (gap.gap.timeline.get(), (missing.start().0, missing.end().0))
            })
            .collect();
        let mut holes_found: BTreeSet<(u32, Span)> = BTreeSet::new();
        for line in state.lines.iter().filter(|line| is_known(catalog, line)) {
            let spans = coverage(names, line);
            let (Some(first), Some(last)) = (spans.first(), spans.last()) else { continue };
            let whole = (first.0, last.1);
            for (number, start, end) in line.parts() {
                let part = (whole.0.max(start), whole.1.min(end));
                if part.0 < part.1 {
                    holes_found.extend(holes(part, &spans).into_iter().map(|hole| (number, hole)));
                }
            }
        }
        for hole in holes_found.difference(&said) {
            self.accuse(format!("a silent gap: {hole:x?}, listed {said:x?}"));
        }
        for gap in said.difference(&holes_found) {
            self.accuse(format!("a gap is listed that is none: {gap:x?}, found {holes_found:x?}"));
        }
    }
}
