//! Timeline history files: which part of the WAL belongs to which timeline.
//!
//! # Source
//! `readTimeLineHistory` and `writeTimeLineHistory` in `src/backend/access/transam/timeline.c`
//! (read on 13, 15, 17, 18): lines `parent timeline`, tab, `switch point`, tab, `reason`; the rest
//! of a line after the switch point is free text, lines that start with `#` are comments.

use super::lsn::Lsn;
use super::segment::TimelineId;
use crate::error::{Error, Kind, Result};

/// Greatest size of a history file that is read, bytes: tens of thousands of promotions.
pub const HISTORY_BYTES_MAX: usize = 4 << 20;

/// One line of a history file: an ancestor and where its part of the history ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryEntry {
    /// The ancestor.
    pub timeline: TimelineId,
    /// First position that no longer belongs to the ancestor's part of this history.
    pub switch_lsn: Lsn,
    /// Why, as the server wrote it; free text, may be empty.
    pub reason: String,
}

/// A stretch of WAL on the way from the first timeline to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathPart {
    /// The timeline this stretch is read from.
    pub timeline: TimelineId,
    /// First position that is read from it.
    pub start: Lsn,
    /// First position that is not; `None` for the last stretch, which is still growing.
    pub end: Option<Lsn>,
}

/// A timeline and its ancestors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineHistory {
    /// The timeline whose history this is.
    pub timeline: TimelineId,
    /// Ancestors, oldest first; timelines rise and switch points never fall.
    entries: Vec<HistoryEntry>,
}

impl TimelineHistory {
    /// The history of a timeline without ancestors.
    #[must_use]
    pub fn first_timeline_only(timeline: TimelineId) -> Self {
        Self { timeline, entries: Vec::new() }
    }

    /// The history of `timeline` in the bytes of its history file.
    ///
    /// # Errors
    /// `corrupt` for what PostgreSQL refuses too: a line that is no entry, timelines that do not
    /// rise; and for switch points that run backwards.
    pub fn decode(timeline: TimelineId, bytes: &[u8]) -> Result<Self> {
        let damaged = |found: String| {
            let name = timeline.history_file_name();
            Error::new(Kind::Corrupt, format!("unable to read history file '{name}': {found}"))
        };
        if bytes.len() > HISTORY_BYTES_MAX {
            let found = format!("{} bytes, at most {HISTORY_BYTES_MAX} expected", bytes.len());
            return Err(damaged(found));
        }
        let mut entries: Vec<HistoryEntry> = Vec::new();
        for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            let line = String::from_utf8_lossy(line);
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let number = index + 1;
            let entry = decode_entry(line).ok_or_else(|| {
                damaged(format!("line {number} is not 'timeline<tab>LSN<tab>...'"))
            })?;
            if let Some(last) = entries.last() {
                if entry.timeline <= last.timeline {
                    return Err(damaged(format!("line {number}: timelines do not rise")));
                }
                if entry.switch_lsn < last.switch_lsn {
                    return Err(damaged(format!("line {number}: switch points run backwards")));
                }
            }
            entries.push(entry);
        }
        if entries.last().is_some_and(|last| last.timeline >= timeline) {
            return Err(damaged("an ancestor's number is not below the timeline's own".into()));
        }
        Ok(Self { timeline, entries })
    }

    /// The ancestors, oldest first.
    #[must_use]
    pub fn entries(&self) -> &[HistoryEntry] {
        &self.entries
    }

    /// The stretches of WAL that lead to `self.timeline`, oldest first; together they cover every
    /// position once. Stretches may be empty.
    #[must_use]
    pub fn path(&self) -> Vec<PathPart> {
        let mut start = Lsn::INVALID;
        let mut parts = Vec::with_capacity(self.entries.len() + 1);
        for entry in &self.entries {
            parts.push(PathPart { timeline: entry.timeline, start, end: Some(entry.switch_lsn) });
            start = entry.switch_lsn;
        }
        parts.push(PathPart { timeline: self.timeline, start, end: None });
        parts
    }

    /// Whether the path leaves `timeline` at `switch_lsn` for `next`.
    #[must_use]
    pub fn leads_on(&self, timeline: TimelineId, switch_lsn: Lsn, next: TimelineId) -> bool {
        let path = self.path();
        let mut steps = path.iter().zip(path.iter().skip(1));
        steps.any(|(part, follows)| {
            (part.timeline, part.end, follows.timeline) == (timeline, Some(switch_lsn), next)
        })
    }

    /// The timeline that the byte at `position` is read from on this path.
    #[must_use]
    pub fn timeline_at(&self, position: Lsn) -> TimelineId {
        let ancestor = self.entries.iter().find(|entry| position < entry.switch_lsn);
        ancestor.map_or(self.timeline, |entry| entry.timeline)
    }
}

/// `sscanf(line, "%u\t%X/%X")` and the rest of the line as the reason.
fn decode_entry(line: &str) -> Option<HistoryEntry> {
    let (timeline, rest) = line.split_once(|c: char| c.is_ascii_whitespace())?;
    let rest = rest.trim_ascii_start();
    let (switch_lsn, reason) =
        rest.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((rest, ""));
    Some(HistoryEntry {
        timeline: TimelineId::new(timeline.parse().ok()?)?,
        switch_lsn: switch_lsn.parse().ok()?,
        reason: reason.trim_ascii().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    #[test]
    fn a_history_file_gives_the_path_oldest_first() {
        let text = b"1\t0/3000148\tno recovery target specified\n\n# made by hand\n\
                     3\t0/5000000\tbefore 2026-11-22 10:00:00+00\n";
        let history = TimelineHistory::decode(timeline(7), text).unwrap();
        assert_eq!(history.entries()[0].reason, "no recovery target specified");
        let part = |number, start, end: Option<u64>| PathPart {
            timeline: timeline(number),
            start: Lsn(start),
            end: end.map(Lsn),
        };
        let expected = [
            part(1, 0, Some(0x300_0148)),
            part(3, 0x300_0148, Some(0x500_0000)),
            part(7, 0x500_0000, None),
        ];
        assert_eq!(history.path(), expected);
        let leads_on = |from, at, to| history.leads_on(timeline(from), Lsn(at), timeline(to));
        assert!(leads_on(1, 0x300_0148, 3) && leads_on(3, 0x500_0000, 7));
        assert!(!leads_on(1, 0x300_0148, 7) && !leads_on(1, 0x300_0140, 3));
        assert!(!leads_on(7, 0x500_0000, 8));
        assert_eq!(history.timeline_at(Lsn(0x300_0147)), timeline(1));
        assert_eq!(history.timeline_at(Lsn(0x300_0148)), timeline(3));
        assert_eq!(history.timeline_at(Lsn(0x500_0000)), timeline(7));
    }

    #[test]
    fn what_postgres_refuses_is_refused() {
        for text in [
            "x\t0/1\n",
            "1\n",
            "1\tzero\n",
            "0\t0/1\tno timeline 0\n",
            "2\t0/1\n2\t0/2\n",
            "7\t0/1\n",
            "1\t0/9\tx\n2\t0/8\tbackwards\n",
        ] {
            let error = TimelineHistory::decode(timeline(7), text.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{text}");
        }
    }

    #[test]
    fn an_empty_history_is_the_timeline_alone() {
        let history = TimelineHistory::decode(timeline(2), b"").unwrap();
        assert_eq!(history, TimelineHistory::first_timeline_only(timeline(2)));
        assert_eq!(history.path().len(), 1);
    }
}
