//! Decides where a stream begins, from what the repository holds, what the slot keeps, and which
//! history the server has.
//!
//! Pure: the engine asks the questions, this module weighs the answers, and the engine tries the
//! attempts in order until the server serves one.
//!
//! # Invariants
//! 1. Nothing that the repository lacks is skipped while the server may still have it: an attempt
//!    with a gap comes after every attempt without.
//! 2. What an attempt gives up is written in it ([`Attempt::gap`]), so that no gap is silent.
//! 3. Streaming begins early enough that every record which ends after the durable end is decoded
//!    whole: at the slot's position, which is a record boundary, or a whole segment earlier, or, while the
//!    decoder fails at a record, before that one, which may be longer than a segment.
//! 4. A chain that begins anew begins at a segment start: PostgreSQL reads the first page of every
//!    segment it opens.

use crate::error::{Error, Kind};
use crate::pg::TimelineHistory;
use crate::pg::{Lsn, LsnRange, SegmentSize, TimelineId};

/// Pages of the WAL, `XLOG_BLCKSZ`: where the decoder can begin.
const WAL_PAGE_BYTES: u64 = 8192;

/// Most ends of earlier chains that are tried before a gap is accepted: each costs a connection.
const CHAIN_ENDS_MAX: usize = 4;

/// What the decision rests on.
#[derive(Clone, Debug)]
pub struct Situation<'a> {
    /// The way to the server's timeline.
    pub history: &'a TimelineHistory,
    /// What the repository holds of each timeline on that way, in any order.
    pub stored: &'a [(TimelineId, LsnRange)],
    /// Oldest position that a slot keeps for us.
    pub slot_restart_lsn: Lsn,
    /// Size of the server's WAL segments.
    pub segment_size: SegmentSize,
    /// Whether WAL the slot does not keep is worth asking for.
    pub older: OlderWal,
    /// End of the last record before the one at which the decoder failed, until it is past that.
    pub unreadable_after: Option<Lsn>,
}

impl Situation<'_> {
    /// Where streaming begins early enough for what follows `end`, without the slot.
    fn enough_for(&self, end: Lsn) -> Lsn {
        let enough = segment_before(self.segment_size, end);
        self.unreadable_after.map_or(enough, |at| enough.min(at.align_down(WAL_PAGE_BYTES)))
    }
}

/// What to do about WAL that is missing in the repository and older than the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OlderWal {
    /// Ask the server for it; it may still have it.
    Ask,
    /// Leave it: the stream runs only for one base backup.
    Leave,
    /// Ask for what follows this position, and begin nowhere else: the stream runs for one base backup
    /// that needs all WAL from here on. The position is a segment's first, or where such a stream began.
    Since(Lsn),
}

/// One way to begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Timeline to ask for.
    pub timeline: TimelineId,
    /// Position to stream from; a page boundary, not after `store_from`.
    pub stream_from: Lsn,
    /// First position to store: everything before is durable or given up.
    pub store_from: Lsn,
    /// Ranges after `store_from` that the repository holds already, ascending, not touching.
    pub known: Vec<LsnRange>,
    /// WAL that is lost if this attempt is the one that works.
    pub gap: Option<LsnRange>,
}

/// The ways to begin, best first; never empty.
#[must_use]
pub fn attempts(situation: &Situation<'_>) -> Vec<Attempt> {
    let stored = stored_on_path(situation.history, situation.stored);
    let slot = situation.slot_restart_lsn;
    if let OlderWal::Since(begin) = situation.older {
        let covers = |range: &&LsnRange| range.start() <= begin && begin <= range.end();
        let chain = stored.iter().find(covers);
        let store_from = chain.map_or(begin, |range| range.end());
        let enough = chain.map(|_| situation.enough_for(store_from));
        let begins = enough.into_iter().chain([situation.segment_size.start_of(store_from)]);
        return begins.map(|from| attempt(situation, &stored, from, store_from, None)).collect();
    }
    if let Some(chain) = stored.iter().find(|range| range.start() <= slot && slot <= range.end()) {
        // The slot trails the durable end by what was in flight, or, after a crash of the server,
        // by up to a checkpoint: no need to read all of that again.
        let enough = situation.enough_for(chain.end());
        let stream_from = slot.align_down(WAL_PAGE_BYTES).max(enough);
        return vec![attempt(situation, &stored, stream_from, chain.end(), None)];
    }
    let segment_start = situation.segment_size.start_of(slot);
    let ends: Vec<Lsn> = stored.iter().map(|range| range.end()).filter(|end| *end < slot).collect();
    let mut found = Vec::new();
    for end in ends.iter().skip(ends.len().saturating_sub(CHAIN_ENDS_MAX)) {
        let kept = segment_start <= *end;
        if kept || situation.older == OlderWal::Ask {
            let segment = situation.segment_size;
            // A record may go on here that began a segment earlier; but that one may be gone, and this
            // one not.
            for stream_from in [situation.enough_for(*end), segment.start_of(*end)] {
                found.push(attempt(situation, &stored, stream_from, *end, None));
            }
        }
    }
    if ends.last().is_none_or(|end| *end < segment_start) {
        let gap = ends.last().and_then(|end| LsnRange::new(*end, segment_start));
        found.push(attempt(situation, &stored, segment_start, segment_start, gap));
    }
    found
}

/// Start of the segment before the one that `position` is in.
fn segment_before(segment: SegmentSize, position: Lsn) -> Lsn {
    segment.start_of(Lsn(segment.start_of(position).0.saturating_sub(1)))
}

fn attempt(
    situation: &Situation<'_>,
    stored: &[LsnRange],
    stream_from: Lsn,
    store_from: Lsn,
    gap: Option<LsnRange>,
) -> Attempt {
    let known = stored.iter().filter(|range| range.end() > store_from).copied().collect();
    let timeline = situation.history.timeline_at(stream_from);
    Attempt { timeline, stream_from, store_from, known, gap }
}

/// A server whose WAL is not the one that the repository holds of its timeline.
#[must_use]
pub fn set_back(message: String) -> Error {
    Error::new(Kind::Conflict, message).hint(
        "The server was rolled back (a snapshot, a copy) without a new timeline. Restore it \
         with tidemark, or promote it from a standby, so that it gets one; or give it a \
         cluster name of its own.",
    )
}

/// Whether what is stored on the way to a timeline reaches `position` without a hole right before it.
#[must_use]
pub fn touches(
    history: &TimelineHistory,
    stored: &[(TimelineId, LsnRange)],
    position: Lsn,
) -> bool {
    let stored = stored_on_path(history, stored);
    stored.iter().any(|range| range.start() <= position && position <= range.end())
}

/// The parts of the repository's WAL that lie on the path, joined where they touch.
fn stored_on_path(history: &TimelineHistory, stored: &[(TimelineId, LsnRange)]) -> Vec<LsnRange> {
    let mut clipped = Vec::new();
    for part in history.path() {
        let part_end = part.end.unwrap_or(Lsn(u64::MAX));
        for (_, range) in stored.iter().filter(|(timeline, _)| *timeline == part.timeline) {
            let range = LsnRange::new(range.start().max(part.start), range.end().min(part_end));
            clipped.extend(range.filter(|range| !range.is_empty()));
        }
    }
    join(clipped)
}

/// Sorts ranges and joins those that touch or overlap.
#[must_use]
pub fn join(mut ranges: Vec<LsnRange>) -> Vec<LsnRange> {
    ranges.sort_unstable();
    let mut joined: Vec<LsnRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start() <= last.end() => {
                let end = last.end().max(range.end());
                *last = LsnRange::new(last.start(), end).unwrap_or(*last);
            }
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEG: u64 = 16 << 20;

    fn range(start: u64, end: u64) -> LsnRange {
        LsnRange::new(Lsn(start), Lsn(end)).unwrap()
    }

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn decide(history: &TimelineHistory, stored: &[(u32, u64, u64)], slot: u64) -> Vec<Attempt> {
        let stored: Vec<_> =
            stored.iter().map(|(t, start, end)| (timeline(*t), range(*start, *end))).collect();
        attempts(&Situation {
            history,
            stored: &stored,
            slot_restart_lsn: Lsn(slot),
            segment_size: SegmentSize::DEFAULT,
            older: OlderWal::Ask,
            unreadable_after: None,
        })
    }

    fn first() -> TimelineHistory {
        TimelineHistory::first_timeline_only(timeline(1))
    }

    #[test]
    fn an_empty_repository_begins_at_the_segment_of_the_slot() {
        let found = decide(&first(), &[], 5 * SEG + 1000);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].stream_from, Lsn(5 * SEG));
        assert_eq!(found[0].store_from, Lsn(5 * SEG));
        assert_eq!(found[0].gap, None);
    }

    #[test]
    fn a_restart_reads_from_the_slot_and_stores_from_the_durable_end() {
        let slot = 5 * SEG + 8192 + 40;
        let found = decide(&first(), &[(1, 2 * SEG, 5 * SEG + 70_000)], slot);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].stream_from, Lsn(5 * SEG + 8192));
        assert_eq!(found[0].store_from, Lsn(5 * SEG + 70_000));
        assert_eq!(found[0].gap, None);
    }

    #[test]
    fn a_slot_far_behind_costs_at_most_the_segment_before_the_durable_end() {
        let found = decide(&first(), &[(1, 2 * SEG, 50 * SEG + 70_000)], 3 * SEG + 77);
        assert_eq!(found[0].stream_from, Lsn(49 * SEG));
        let found = decide(&first(), &[(1, 2 * SEG, 50 * SEG)], 3 * SEG + 77);
        assert_eq!(found[0].stream_from, Lsn(49 * SEG));
    }

    #[test]
    fn a_hole_of_uploads_in_flight_is_filled_and_what_follows_is_known() {
        let stored = [(1, 2 * SEG, 5 * SEG), (1, 5 * SEG + 500, 5 * SEG + 900)];
        let found = decide(&first(), &stored, 5 * SEG - 100);
        assert_eq!(found[0].store_from, Lsn(5 * SEG));
        assert_eq!(found[0].known, vec![range(5 * SEG + 500, 5 * SEG + 900)]);
    }

    #[test]
    fn a_new_slot_ahead_of_the_repository_asks_for_the_older_wal_first() {
        let found = decide(&first(), &[(1, 2 * SEG, 5 * SEG + 16)], 9 * SEG + 100);
        assert_eq!(found.len(), 3);
        for (attempt, stream_from) in found.iter().zip([4 * SEG, 5 * SEG]) {
            assert_eq!(attempt.store_from, Lsn(5 * SEG + 16));
            assert_eq!(attempt.stream_from, Lsn(stream_from));
            assert_eq!(attempt.gap, None);
        }
        assert_eq!(found[2].store_from, Lsn(9 * SEG));
        assert_eq!(found[2].gap, Some(range(5 * SEG + 16, 9 * SEG)));
    }

    #[test]
    fn a_new_slot_in_the_segment_of_the_durable_end_loses_nothing() {
        let found = decide(&first(), &[(1, 2 * SEG, 5 * SEG + 16)], 5 * SEG + 100);
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|attempt| attempt.gap.is_none()));
        assert!(found.iter().all(|attempt| attempt.store_from == Lsn(5 * SEG + 16)));
    }

    #[test]
    fn an_end_between_two_segments_is_reached_in_the_middle_of_its_record_if_the_server_can() {
        let found = decide(&first(), &[(1, 2 * SEG, 5 * SEG)], 9 * SEG + 100);
        let begins: Vec<_> = found.iter().map(|one| (one.stream_from, one.store_from)).collect();
        assert_eq!(
            begins,
            [
                (Lsn(4 * SEG), Lsn(5 * SEG)),
                (Lsn(5 * SEG), Lsn(5 * SEG)),
                (Lsn(9 * SEG), Lsn(9 * SEG))
            ]
        );
        assert_eq!((found[0].gap, found[1].gap), (None, None));
    }

    #[test]
    fn a_stream_for_one_backup_leaves_the_older_wal() {
        let history = first();
        let found = attempts(&Situation {
            history: &history,
            stored: &[(timeline(1), range(SEG, 2 * SEG))],
            slot_restart_lsn: Lsn(9 * SEG + 100),
            segment_size: SegmentSize::DEFAULT,
            older: OlderWal::Leave,
            unreadable_after: None,
        });
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].store_from, Lsn(9 * SEG));
    }

    #[test]
    fn a_stream_for_a_backup_under_way_begins_where_its_wal_is_not_stored() {
        let history = first();
        let decide = |stored: &[(TimelineId, LsnRange)], since: u64| {
            let found = attempts(&Situation {
                history: &history,
                stored,
                slot_restart_lsn: Lsn(9 * SEG + 100),
                segment_size: SegmentSize::DEFAULT,
                older: OlderWal::Since(Lsn(since)),
                unreadable_after: None,
            });
            assert!(found.iter().all(|attempt| attempt.gap.is_none()));
            let begins = found.iter().map(|one| (one.stream_from.0, one.store_from.0));
            begins.collect::<Vec<_>>()
        };
        let older = (timeline(1), range(SEG, 2 * SEG));
        assert_eq!(decide(&[older], 5 * SEG), [(5 * SEG, 5 * SEG)]);
        // A record may go on there that began a segment earlier.
        for end in [6 * SEG, 6 * SEG + 70] {
            let ours = (timeline(1), range(4 * SEG, end));
            assert_eq!(decide(&[older, ours], 5 * SEG), [(5 * SEG, end), (6 * SEG, end)]);
        }
        // Not where the slot would be touched: the hole before it is in the backup.
        let later = (timeline(1), range(9 * SEG, 10 * SEG));
        assert_eq!(decide(&[later], 8 * SEG), [(8 * SEG, 8 * SEG)]);
    }

    #[test]
    fn a_record_at_which_the_decoder_fails_is_asked_for_whole_however_long_it_is() {
        let history = first();
        let failed_after = 5 * SEG + 2 * 8192 + 40;
        let from = |stored: (u64, u64), slot: u64, older: OlderWal| {
            let found = attempts(&Situation {
                history: &history,
                stored: &[(timeline(1), range(stored.0, stored.1))],
                slot_restart_lsn: Lsn(slot),
                segment_size: SegmentSize::DEFAULT,
                older,
                unreadable_after: Some(Lsn(failed_after)),
            });
            found[0].stream_from.0
        };
        let stored = (2 * SEG, 9 * SEG + 70_000);
        let page = failed_after / 8192 * 8192;
        assert_eq!(from(stored, 3 * SEG + 77, OlderWal::Ask), page);
        assert_eq!(from(stored, failed_after, OlderWal::Ask), page);
        assert_eq!(from(stored, 20 * SEG, OlderWal::Ask), page);
        assert_eq!(from(stored, 20 * SEG, OlderWal::Since(Lsn(4 * SEG))), page);
        // The segment before is enough when it is earlier.
        assert_eq!(from((2 * SEG, 5 * SEG + 70_000), 3 * SEG, OlderWal::Ask), 4 * SEG);
    }

    #[test]
    fn what_touches_a_position_ends_or_goes_on_there() {
        let stored = [(timeline(1), range(SEG, 2 * SEG)), (timeline(2), range(3 * SEG, 4 * SEG))];
        for (position, expected) in
            [(SEG, true), (2 * SEG, true), (2 * SEG + 1, false), (3 * SEG, false)]
        {
            assert_eq!(touches(&first(), &stored, Lsn(position)), expected, "{position}");
        }
    }

    #[test]
    fn after_a_promotion_the_old_timeline_is_finished_first() {
        let history = TimelineHistory::decode(timeline(2), b"1\t0/5000100\twhy\n").unwrap();
        let found = decide(&history, &[(1, 2 * SEG, 5 * SEG)], 5 * SEG + 0x200);
        assert_eq!(found[0].timeline, timeline(1));
        assert_eq!(found[0].store_from, Lsn(5 * SEG));
    }

    #[test]
    fn wal_past_the_switch_point_is_a_dead_branch() {
        let history = TimelineHistory::decode(timeline(2), b"1\t0/5000100\twhy\n").unwrap();
        let found = decide(&history, &[(1, 2 * SEG, 5 * SEG + 0x9000)], 5 * SEG + 0x200);
        assert_eq!(found[0].store_from, Lsn(5 * SEG + 0x100));
        assert_eq!(found[0].timeline, timeline(1));
        assert_eq!((found[0].stream_from, found[1].stream_from), (Lsn(4 * SEG), Lsn(5 * SEG)));
        let more = [(1, 2 * SEG, 5 * SEG + 0x9000), (2, 5 * SEG + 0x100, 5 * SEG + 0x300)];
        let found = decide(&history, &more, 5 * SEG + 0x200);
        assert_eq!(found[0].store_from, Lsn(5 * SEG + 0x300));
    }

    #[test]
    fn an_unrelated_branch_counts_for_nothing() {
        let history = TimelineHistory::decode(timeline(3), b"1\t0/3000100\twhy\n").unwrap();
        let stored = [(1, 2 * SEG, 4 * SEG), (2, 4 * SEG, 7 * SEG)];
        let found = decide(&history, &stored, 6 * SEG + 4);
        assert_eq!(found[0].store_from, Lsn(3 * SEG + 0x100));
        assert_eq!(found[2].gap, Some(range(3 * SEG + 0x100, 6 * SEG)));
    }

    #[test]
    fn every_attempt_begins_on_a_page_not_after_what_it_stores() {
        let history = TimelineHistory::decode(timeline(2), b"1\t0/5000100\twhy\n").unwrap();
        for slot in (SEG..8 * SEG).step_by(777_777) {
            let stored = [(1, 2 * SEG, 3 * SEG + 8), (1, 4 * SEG, 4 * SEG + 99)];
            let found = decide(&history, &stored, slot);
            assert!(!found.is_empty());
            for attempt in found {
                assert_eq!(attempt.stream_from.0 % 8192, 0);
                assert!(attempt.stream_from <= attempt.store_from);
                assert!(attempt.known.iter().all(|known| known.start() > attempt.store_from));
            }
        }
    }
}
