//! Verdicts by what is known.

use super::*;
use crate::pg::{LsnRange, PgTime, TimelineId};
use crate::repo::lease::Progress;
use crate::repo::{ExtentName, StoredExtent, WalCatalog};

const SLOTS: [Slot; 4] = [Slot::Unknown, Slot::Absent, Slot::Idle, Slot::Keeps(Lsn(500))];

fn now() -> Timestamp {
    "2026-01-01T12:00:00Z".parse().unwrap()
}

fn ago(seconds: i64) -> Timestamp {
    now() - SignedDuration::from_secs(seconds)
}

/// A writer that renewed its lease so many seconds ago, of 180.
fn lease(tenure: Tenure, renewed: i64) -> LeaseInfo {
    LeaseInfo {
        epoch: 1,
        released: false,
        description: "run".into(),
        tenure,
        process: crate::repo::LeaseOptions::new("").process,
        acquired_time: ago(renewed),
        renewed_time: ago(renewed),
        ttl_ms: 180_000,
        progress: None,
        key_id: None,
    }
}

/// What a writer published that has stored up to 1000 of `timeline`, and all there was so many seconds ago.
fn progress(timeline: u32, all_stored: i64) -> Progress {
    Progress {
        timeline: TimelineId::new(timeline).unwrap(),
        durable_end_lsn: Lsn(1000),
        caught_up_time: None,
        all_stored_time: Some(ago(all_stored)),
    }
}

/// WAL up to 1000, whose newest commit was so many seconds ago.
fn catalog(lease: Option<LeaseInfo>, newest_commit: i64) -> Catalog {
    let name = ExtentName {
        timeline: TimelineId::FIRST,
        range: LsnRange::new(Lsn(0), Lsn(1000)).unwrap(),
        time: Some(PgTime::from_timestamp(ago(newest_commit))),
    };
    let extent = StoredExtent { name, stored_bytes: 1, modified: None };
    Catalog { wal: WalCatalog::new([extent]), lease, ..Catalog::default() }
}

fn streaming(catalog: &Catalog, slot: Slot, flushed: u64) -> Streaming<'_> {
    let server_end = Some((TimelineId::FIRST, Lsn(flushed)));
    Streaming { slot, server_end, catalog: Some(catalog), now: now() }
}

fn state(verdict: Option<Verdict>) -> State {
    verdict.unwrap().map_or(State::Failed, |(state, _)| state)
}

#[test]
fn that_nobody_streams_is_a_failure_where_somebody_should() {
    let released = LeaseInfo { released: true, ..lease(Tenure::Standing, 10_000) };
    let killed_backup = lease(Tenure::Passing, 10_000);
    for left in [None, Some(released), Some(killed_backup)] {
        let catalog = catalog(left, 0);
        let states = SLOTS.map(|slot| state(streaming(&catalog, slot, 2000).writer()));
        let warned = State::Warning;
        assert_eq!(states, [warned, warned, warned, State::Failed]);
    }
    // A stream that was killed, even if its slot is gone.
    let killed = catalog(Some(lease(Tenure::Standing, 181)), 0);
    for slot in SLOTS {
        let error = streaming(&killed, slot, 2000).writer().unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
    }
    // Nothing was streamed yet.
    let fresh = Catalog::default();
    assert_eq!(state(streaming(&fresh, Slot::Keeps(Lsn(1)), 2000).writer()), State::Warning);
    for (renewed, expected) in [(10, State::Ok), (170, State::Warning)] {
        let catalog = catalog(Some(lease(Tenure::Standing, renewed)), 0);
        assert_eq!(state(streaming(&catalog, Slot::Keeps(Lsn(1)), 2000).writer()), expected);
    }
}

#[test]
fn a_slot_without_wal_is_a_failure_once_the_repository_is_in_use() {
    let used = catalog(None, 0);
    let states = |catalog| SLOTS.map(|slot| streaming(catalog, slot, 2000).slot(""));
    let [unknown, absent, idle, keeps] = states(&used);
    assert!(unknown.is_none());
    assert_eq!([absent, idle, keeps].map(state), [State::Warning, State::Failed, State::Ok]);
    let fresh = Catalog::default();
    let [_, absent, idle, keeps] = states(&fresh);
    assert_eq!([absent, idle, keeps].map(state), [State::Warning, State::Warning, State::Ok]);
}

#[test]
fn to_be_far_behind_is_a_failure_and_to_have_nothing_to_do_is_not() {
    let keeps = Slot::Keeps(Lsn(1));
    let held = || Some(lease(Tenure::Standing, 10));
    let verdict =
        |catalog: &Catalog, slot, flushed| state(streaming(catalog, slot, flushed).writer());
    // The limit is five minutes and the minute between renewals.
    assert_eq!(verdict(&catalog(held(), 355), keeps, 2000), State::Ok);
    let behind = catalog(held(), 365);
    assert_eq!(verdict(&behind, keeps, 2000), State::Failed);
    assert_eq!(verdict(&behind, keeps, 1000), State::Ok, "everything is there");
    let idle = LeaseInfo { progress: Some(progress(1, 20)), ..lease(Tenure::Standing, 10) };
    assert_eq!(verdict(&catalog(Some(idle), 100_000), keeps, 2000), State::Ok);
    // A base backup that nobody else streams beside.
    let backup = catalog(Some(lease(Tenure::Passing, 10)), 100_000);
    assert_eq!(verdict(&backup, Slot::Absent, 2000), State::Ok);
}

#[test]
fn a_writer_that_streams_another_server_is_a_failure_however_well_it_does() {
    for (tenure, expected) in [(Tenure::Standing, State::Failed), (Tenure::Passing, State::Ok)] {
        let holder = LeaseInfo { progress: Some(progress(2, 1)), ..lease(tenure, 10) };
        let catalog = catalog(Some(holder), 10);
        for flushed in [900, 2000] {
            let verdict = streaming(&catalog, Slot::Absent, flushed).writer();
            assert_eq!(state(verdict), expected, "{tenure:?} {flushed}");
        }
    }
}

#[test]
fn times_of_a_clock_far_ahead_hide_nothing() {
    let keeps = Slot::Keeps(Lsn(1));
    let dead = catalog(Some(lease(Tenure::Standing, -7200)), 0);
    let error = streaming(&dead, keeps, 2000).writer().unwrap().unwrap_err();
    assert!(error.message().contains("ahead of this one"), "{error}");
    let stalled = LeaseInfo { progress: Some(progress(1, 1000)), ..lease(Tenure::Standing, 10) };
    let verdict = streaming(&catalog(Some(stalled), -100_000), keeps, 2000).writer();
    assert_eq!(state(verdict), State::Failed);
}
