//! Relief of the server while nobody holds the lease: an outage of the repository that outlasts it ends
//! the session, and with it the one who would move the slot on past the ceiling.
//!
//! In: what the catalog says about the slot, where the last session left it, the ceiling. Out: a slot
//! that is moved on, by SQL and not by a flush position, when the server keeps more than the ceiling for
//! it.
//!
//! The slot is moved and not dropped. WAL written from then on is kept again, up to the ceiling, so the
//! gap is no larger than it must be; and a slot on the server is what keeps a process that is started
//! while the repository is not there from making a new one in its place.
//!
//! # Invariants
//! Without the lease nothing says that no rival is at work, so a slot is moved only when
//!
//! 1. nobody uses it: a rival that streams by it holds it, and PostgreSQL refuses to move a slot that is
//!    held, in the same moment in which it would;
//! 2. it is not past where we left it: a rival that streamed by it and is between two connections has
//!    moved it, and so has a sidecar that streams into another repository by a slot of this name;
//! 3. it was at that same place, unused, when it was looked at before: whoever had just taken the lease
//!    would have begun in between;
//! 4. the server is the PostgreSQL cluster of the repository.
//!
//! A rival that takes the lease after that and streams by the slot compares the slot with the same books
//! as we would, and finds the gap as we would. One that has a slot on another server is not concerned.
//!
//! # Durability
//! Nothing is acknowledged and nothing is written to the repository, so a fenced writer stays fenced.
//! What is given up is what [`super::StreamOptions::lag_ceiling_bytes`] says the server need not keep. It
//! is no gap yet, for the server may still have it: the next session asks for it, and reports the gap if
//! it is gone.
//!
//! # Source
//! `pg_replication_slot_advance`, `pg_physical_replication_slot_advance` (`slotfuncs.c`) of PostgreSQL 13
//! to 18: acquires the slot without waiting (55006 when it is active), and never moves it back.

use std::convert::Infallible;
use std::time::Duration;

use super::watch::{self, Observation, Watch};
use super::{SlotLife, Stream};
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, SegmentSize, SystemId};
use crate::wire::{Connection, Session};

/// Longest that moving the slot may take: then it is looked at again.
const MOVE_MAX: Duration = Duration::from_secs(20);

/// Our permanent slot as a session left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftSlot {
    /// Where it was, or the flush position told since.
    pub lsn: Lsn,
    /// Size of the server's WAL segments.
    pub segment_size: SegmentSize,
}

/// A slot on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotMove {
    /// Where it must be.
    pub from: Lsn,
    /// Where it is to be.
    pub to: Lsn,
}

/// Watches the slot and moves it on past the ceiling, until dropped; `left` follows it.
///
/// # Cancel safety
/// Dropped while the slot is being moved, it is moved or not: the next session reads where it is.
pub(super) async fn relieve(stream: &Stream, left: &mut Option<LeftSlot>) -> Infallible {
    let (options, status) = (&stream.options, &stream.status);
    if options.slot_life == SlotLife::Connection {
        return std::future::pending().await;
    }
    let clock = stream.writer.repository().clock();
    let mut watch = Watch::start(&stream.upstream, &options.slot_name, clock, status);
    let (mut seen, mut told) = (None, false);
    loop {
        let observed = watch.changed().await;
        watch::take_note(status, &observed);
        let (Some(ceiling_bytes), Some(left)) = (options.lag_ceiling_bytes, left.as_mut()) else {
            continue;
        };
        let Some(way) = decide(&observed, left, seen.replace(place(&observed)), ceiling_bytes)
        else {
            continue;
        };
        match tokio::time::timeout(MOVE_MAX, move_on(stream, &way)).await {
            Ok(Ok(true)) => {
                report(stream, &way, ceiling_bytes);
                left.lsn = way.to;
            }
            Ok(Ok(false)) => tracing::info!("the replication slot is in use and left alone"),
            Ok(Err(error)) if !std::mem::replace(&mut told, true) => {
                tracing::warn!("{error}; the server keeps more than wal.lag_ceiling for it");
            }
            Ok(Err(error)) => tracing::debug!("{error}"),
            Err(_elapsed) => tracing::debug!("no answer to moving the replication slot on"),
        }
    }
}

fn report(stream: &Stream, way: &SlotMove, ceiling_bytes: u64) {
    let SlotMove { from, to } = way;
    tracing::error!(
        "replication slot '{}' is moved on from {from} to {to}: the repository is away and the server \
         kept more than {ceiling_bytes} bytes (wal.lag_ceiling); WAL in between is lost if the server \
         removes it before the repository is back",
        stream.options.slot_name
    );
}

/// Where a slot is that nobody uses.
fn place(observed: &Observation) -> Option<Lsn> {
    let is_free = observed.slot_in_use == Some(false) && !observed.shutting_down;
    observed.slot_restart_lsn.filter(|_| is_free)
}

/// Whether the slot is to be moved, and how; `seen` is where it was, unused, at the look before.
fn decide(
    observed: &Observation,
    left: &LeftSlot,
    seen: Option<Option<Lsn>>,
    ceiling_bytes: u64,
) -> Option<SlotMove> {
    let from = place(observed)?;
    let stands = seen == Some(Some(from)) && from <= left.lsn;
    let lag_bytes = observed.server_end_lsn.saturating_since(from);
    // WAL is kept by whole segments, and a chain that begins anew begins with one.
    let to = left.segment_size.start_of(observed.server_end_lsn);
    (stands && lag_bytes > ceiling_bytes && to > from).then_some(SlotMove { from, to })
}

async fn move_on(stream: &Stream, way: &SlotMove) -> Result<bool> {
    let repository = stream.writer.repository();
    let name = &stream.options.slot_name;
    let attempted = |error: Error| {
        error.context(format!("unable to move replication slot '{name}' on to {}", way.to))
    };
    let opened = stream.upstream.connect(Session::Database, repository.clock()).await;
    let mut connection = opened.map_err(attempted)?;
    let moved = connection.move_slot(name, *way, repository.system_id()).await;
    connection.close().await;
    moved.map_err(attempted)
}

/// Moves the slot as `way` says, on an ordinary connection; false when it is elsewhere or in use, or the
/// server is not `system_id`.
///
/// # Errors
/// What the server says.
pub(super) async fn move_slot(
    connection: &mut Connection,
    slot_name: &str,
    way: SlotMove,
    system_id: SystemId,
) -> Result<bool> {
    let SlotMove { from, to } = way;
    let system_id = system_id.0.cast_signed();
    let sql = format!(
        "select pg_catalog.pg_replication_slot_advance(s.slot_name, '{to}') \
         from pg_catalog.pg_replication_slots s \
         where s.slot_name = '{slot_name}' and s.restart_lsn = '{from}' and not s.active \
         and (select system_identifier from pg_catalog.pg_control_system()) = {system_id}"
    );
    match connection.query(&sql).await {
        Ok(rows) => Ok(!rows.is_empty()),
        Err(error) if error.kind() == Kind::Conflict => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEG: u64 = 16 << 20;
    const CEILING: u64 = 10 * SEG;

    fn observed(at: u64, server_end: u64) -> Observation {
        Observation {
            server_end_lsn: Lsn(server_end),
            slot_restart_lsn: Some(Lsn(at)),
            slot_in_use: Some(false),
            ..Observation::default()
        }
    }

    fn decide(observed: &Observation, left: u64, seen: Option<u64>) -> Option<SlotMove> {
        let left = LeftSlot { lsn: Lsn(left), segment_size: SegmentSize::DEFAULT };
        super::decide(observed, &left, Some(seen.map(Lsn)), CEILING)
    }

    #[test]
    fn a_slot_that_stands_where_it_was_left_is_moved_past_the_ceiling() {
        let at = SEG + 100;
        let end = at + CEILING + 7;
        let moved = Some(SlotMove { from: Lsn(at), to: Lsn(end / SEG * SEG) });
        assert_eq!(decide(&observed(at, end), at, Some(at)), moved);
        // A crash of the server may have set it back.
        assert_eq!(decide(&observed(at, end), at + 5000, Some(at)), moved);
        assert_eq!(decide(&observed(at, at + CEILING), at, Some(at)), None);
    }

    #[test]
    fn a_slot_that_may_be_in_the_hands_of_a_rival_is_left_alone() {
        let (at, end) = (SEG + 100, SEG * 100);
        let in_use = Observation { slot_in_use: Some(true), ..observed(at, end) };
        let shutting_down = Observation { shutting_down: true, ..observed(at, end) };
        for (what, found, left, seen) in [
            ("used now", in_use, at, Some(at)),
            ("used before", observed(at, end), at, None),
            ("moved since", observed(at, end), at, Some(at - 1)),
            ("past where we left it", observed(at, end), at - 1, Some(at)),
            ("old news", shutting_down, at, Some(at)),
            ("no slot", Observation { slot_restart_lsn: None, ..observed(at, end) }, at, Some(at)),
        ] {
            assert_eq!(decide(&found, left, seen), None, "{what}");
        }
    }
}
