//! Taking, renewing, losing and giving back, with simulated time and a store that fails.

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use super::*;
use crate::pg::{Lsn, TimelineId};
use crate::store::memory::{Call, Faults, Memory, Outcome};

const TTL: Duration = Duration::from_secs(60);

fn clock(seed: u64) -> Clock {
    Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), seed)
}

fn name() -> ObjectName {
    ObjectName::new("main/lease").unwrap()
}

/// How far a holder has come, all of it stored and caught up with at `time`.
fn progress(timeline: u32, end: u64, time: Option<Timestamp>) -> Progress {
    Progress {
        timeline: TimelineId::new(timeline).unwrap(),
        durable_end_lsn: Lsn(end),
        caught_up_time: time,
        all_stored_time: time,
    }
}

fn on_host(host: &str, wait: Wait) -> LeaseOptions {
    let process = ProcessIdentity { host: host.into(), pid: 7, ..ProcessIdentity::default() };
    LeaseOptions { ttl: TTL, wait, process, ..LeaseOptions::new("stream") }
}

async fn take(memory: &Memory, clock: &Clock, options: LeaseOptions) -> Result<Lease> {
    let store: Arc<dyn Store> = Arc::new(memory.clone());
    Lease::acquire_at(&store, name(), clock, options).await
}

#[tokio::test(start_paused = true)]
async fn one_that_ends_by_itself_is_waited_for_and_one_that_stays_is_not() {
    let clock = clock(11);
    let memory = Memory::new(&clock);
    let passing = LeaseOptions { tenure: Tenure::Passing, ..on_host("alpha", Wait::Refuse) };
    let backup = take(&memory, &clock, passing).await.unwrap();
    let error = take(&memory, &clock, on_host("beta", Wait::Refuse)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    let begun = clock.instant();
    let (stream, ()) =
        tokio::join!(take(&memory, &clock, on_host("beta", Wait::ForPassing)), async {
            tokio::time::sleep(TTL * 20).await;
            backup.release().await;
        });
    let stream = stream.unwrap();
    assert!(clock.instant() >= begun + TTL * 20);
    assert_eq!(stream.epoch(), 2);
    let error = take(&memory, &clock, on_host("gamma", Wait::ForPassing)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
}

#[tokio::test(start_paused = true)]
async fn a_second_writer_is_refused_at_once_and_told_who_holds_the_lease() {
    let clock = clock(1);
    let memory = Memory::new(&clock);
    let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
    assert_eq!(lease.epoch(), 1);
    let begun = clock.instant();
    let error = take(&memory, &clock, on_host("beta", Wait::Refuse)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.message().contains("'stream' (process 7 on 'alpha') holds it"), "{error}");
    assert!(error.hint_text().unwrap().contains("--wait"));
    assert_eq!(clock.instant(), begun);
    lease.guard().ensure_held().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_successor_keeps_the_times_of_its_predecessor_until_it_knows_its_own() {
    let (clock, memory) = (clock(1), Memory::new(&clock(1)));
    let first = take(&memory, &clock, on_host("a", Wait::Refuse)).await.unwrap();
    let then = clock.now();
    first.report(progress(1, 0x100, Some(then)));
    tokio::time::sleep(TTL).await;
    first.release().await;
    let second = take(&memory, &clock, on_host("b", Wait::Refuse)).await.unwrap();
    for (timeline, end, expected) in [(1, 0x100, Some(then)), (1, 0x80, None), (2, 0x200, None)] {
        second.report(progress(timeline, end, None));
        tokio::time::sleep(TTL).await;
        let found = read(&memory, &name()).await.unwrap().unwrap().progress.unwrap();
        assert_eq!((found.caught_up_time, found.all_stored_time), (expected, expected));
    }
}

#[tokio::test(start_paused = true)]
async fn a_released_lease_is_taken_at_once_with_the_next_epoch() {
    let clock = clock(2);
    let memory = Memory::new(&clock);
    let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
    let mut guard = lease.guard();
    let progress = progress(1, 0x100, Some(clock.now()));
    lease.report(progress);
    lease.seals_with("abc".into());
    lease.release().await;
    assert_eq!(guard.lost().await.kind(), Kind::Conflict);
    let info = read(&memory, &name()).await.unwrap().unwrap();
    assert!(info.released);
    assert_eq!(info.progress, Some(progress), "what was reached stays known");
    assert_eq!(info.key_id.as_deref(), Some("abc"));
    let lease = take(&memory, &clock, on_host("beta", Wait::Refuse)).await.unwrap();
    assert_eq!(lease.epoch(), 2);
    let info = read(&memory, &name()).await.unwrap().unwrap();
    assert_eq!((info.progress, info.key_id), (Some(progress), None), "and the key is its own");
}

#[tokio::test(start_paused = true)]
async fn a_first_report_and_one_of_another_timeline_are_published_at_once() {
    let clock = clock(19);
    let memory = Memory::new(&clock);
    let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
    let published = async |number, end| {
        lease.report(progress(number, end, None));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let told = read(&memory, &name()).await.unwrap().unwrap().progress;
        told.map(|told| (told.timeline.get(), told.durable_end_lsn.0))
    };
    assert_eq!(published(1, 10).await, Some((1, 10)));
    assert_eq!(published(1, 20).await, Some((1, 10)), "with the next renewal");
    assert_eq!(published(2, 30).await, Some((2, 30)));
    tokio::time::sleep(TTL * 3).await;
    lease.guard().ensure_held().unwrap();
}

/// Process 1 of a container of this name, in the process namespace that it has between restarts.
fn in_container(host: &str, namespace: &str, wait: Wait) -> LeaseOptions {
    let mut options = on_host(host, wait);
    options.process.boot_id = "boot".into();
    options.process.pid_namespace = namespace.into();
    options
}

#[tokio::test(start_paused = true)]
async fn a_container_that_was_killed_and_restarted_takes_its_lease_after_one_time_to_live() {
    let clock = clock(17);
    let memory = Memory::new(&clock);
    let before = in_container("pod", "pid:[1]", Wait::ForRestarted);
    drop(take(&memory, &clock, before).await.unwrap());
    for other in [
        in_container("pod", "pid:[2]", Wait::ForPassing),
        in_container("another", "pid:[2]", Wait::ForRestarted),
    ] {
        let error = take(&memory, &clock, other).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
    }
    let begun = clock.instant();
    let restarted = in_container("pod", "pid:[2]", Wait::ForRestarted);
    assert_eq!(take(&memory, &clock, restarted).await.unwrap().epoch(), 2);
    let waited = clock.instant() - begun;
    assert!((TTL..=TTL + TTL / 6).contains(&waited), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_container_of_the_same_name_that_lives_is_refused_when_it_renews() {
    let clock = clock(18);
    let memory = Memory::new(&clock);
    let first = in_container("pod", "pid:[1]", Wait::ForRestarted);
    let lease = take(&memory, &clock, first).await.unwrap();
    let begun = clock.instant();
    let second = in_container("pod", "pid:[2]", Wait::ForRestarted);
    let error = take(&memory, &clock, second).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(clock.instant() - begun <= TTL / 2, "one renewal is enough");
    lease.guard().ensure_held().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_held_lease_is_renewed_by_few_requests_and_never_taken() {
    let clock = clock(3);
    let memory = Memory::new(&clock);
    let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
    let before = memory.requests();
    let wait = Wait::AtMost(Duration::from_secs(3600));
    let error = take(&memory, &clock, on_host("beta", wait)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    lease.guard().ensure_held().unwrap();
    assert!(clock.now() >= "2026-01-01T01:00:00Z".parse().unwrap());
    let writes = memory.requests().since(&before).writes();
    assert!((170..=190).contains(&writes), "one renewal in 20 s for an hour, not {writes}");
}

#[tokio::test(start_paused = true)]
async fn a_dead_holder_is_replaced_after_its_time_without_an_operator() {
    for wait in [Wait::Forever, Wait::AtMost(TTL * 2)] {
        let clock = clock(4);
        let memory = Memory::new(&clock);
        drop(take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap());
        let begun = clock.instant();
        let lease = take(&memory, &clock, on_host("beta", wait)).await.unwrap();
        assert_eq!(lease.epoch(), 2);
        let waited = clock.instant() - begun;
        assert!((TTL..=TTL + TTL / 6).contains(&waited), "{waited:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusing_writer_that_is_restarted_takes_over_in_bounded_time() {
    let clock = clock(5);
    let memory = Memory::new(&clock);
    drop(take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap());
    let begun = clock.instant();
    let lease = loop {
        match take(&memory, &clock, on_host("beta", Wait::Refuse)).await {
            Ok(lease) => break lease,
            Err(error) => assert_eq!(error.kind(), Kind::Conflict),
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
    };
    assert_eq!(lease.epoch(), 2);
    assert!(clock.instant() - begun <= TTL * 5 / 2);
}

#[tokio::test(start_paused = true)]
async fn a_dead_process_of_this_machine_is_replaced_at_once() {
    let clock = clock(6);
    let memory = Memory::new(&clock);
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let dead = child.id();
    child.wait().unwrap();
    let process = ProcessIdentity { pid: dead, start_ticks: 1, ..ProcessIdentity::current() };
    let options = LeaseOptions { process, ..on_host("", Wait::Refuse) };
    drop(take(&memory, &clock, options).await.unwrap());
    let begun = clock.instant();
    let ours = LeaseOptions { ttl: TTL, ..LeaseOptions::new("stream") };
    let lease = take(&memory, &clock, ours.clone()).await.unwrap();
    assert_eq!(lease.epoch(), 2);
    // Our own, while it lives, is refused; left over from a failed attempt it is taken.
    let error = take(&memory, &clock, ours.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    drop(lease);
    assert_eq!(take(&memory, &clock, ours).await.unwrap().epoch(), 3);
    assert_eq!(clock.instant(), begun);
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_cannot_renew_stops_before_anybody_may_take_over() {
    let clock = clock(7);
    let memory = Memory::new(&clock);
    let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
    let begun = clock.instant();
    memory.set_faults(Faults { down: true, ..Faults::default() });
    let mut guard = lease.guard();
    let error = guard.lost().await;
    assert!(error.message().contains("not renewed in time"), "{error}");
    let after = clock.instant() - begun;
    assert!(after <= TTL * 9 / 10 && after >= TTL * 8 / 10, "{after:?}");
    memory.set_faults(Faults::default());
    let before = read(&memory, &name()).await.unwrap();
    tokio::time::sleep(TTL * 3).await;
    assert_eq!(read(&memory, &name()).await.unwrap(), before, "nothing renews a lost lease");
    assert!(guard.ensure_held().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_lease_lost_in_an_outage_is_taken_again_when_nobody_else_had_it() {
    let clock = clock(13);
    let memory = Memory::new(&clock);
    let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
    let progress = progress(1, 0x100, None);
    lease.report(progress);
    lease.seals_with("abc".into());
    let old = lease.guard();
    memory.set_faults(Faults { down: true, ..Faults::default() });
    old.clone().lost().await;
    let told = std::sync::atomic::AtomicUsize::new(0);
    let tell = |_: &Error| {
        told.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    };
    let back = tokio::time::sleep(TTL * 50);
    let (retaken, ()) = tokio::join!(lease.retake(&tell), async {
        back.await;
        memory.set_faults(Faults::default());
    });
    retaken.unwrap();
    assert!(told.into_inner() > 100, "it asked all the time");
    assert_eq!(lease.epoch(), 2);
    assert!(old.ensure_held().is_err(), "what was lost stays lost");
    let guard = lease.guard();
    tokio::time::sleep(TTL * 5).await;
    guard.ensure_held().unwrap();
    let info = read(&memory, &name()).await.unwrap().unwrap();
    assert_eq!((info.epoch, info.key_id.as_deref()), (2, Some("abc")));
    assert_eq!(info.progress, Some(progress));
    lease.release().await;
    assert!(read(&memory, &name()).await.unwrap().unwrap().released);
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_that_a_rival_had_is_not_taken_again_even_when_it_is_free() {
    for gives_back in [false, true] {
        let clock = clock(14);
        let memory = Memory::new(&clock);
        let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
        memory.set_faults(Faults { down: true, ..Faults::default() });
        lease.guard().lost().await;
        memory.set_faults(Faults::default());
        let rival = take(&memory, &clock, on_host("beta", Wait::Forever)).await.unwrap();
        if gives_back {
            rival.release().await;
        }
        let before = read(&memory, &name()).await.unwrap();
        let error = lease.retake(&|_| ()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
        assert!(error.message().contains("another writer took it"), "{error}");
        assert!(lease.guard().ensure_held().is_err());
        assert_eq!(read(&memory, &name()).await.unwrap(), before);
    }
}

#[tokio::test(start_paused = true)]
async fn taking_a_lease_again_survives_answers_that_are_lost() {
    let clock = clock(15);
    let memory = Memory::new(&clock);
    let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
    for epoch in 2..20 {
        memory.set_faults(Faults { down: true, ..Faults::default() });
        lease.guard().lost().await;
        memory.set_faults(Faults {
            seed: epoch,
            before_ppm: 300_000,
            after_ppm: 300_000,
            ..Faults::default()
        });
        lease.retake(&|_| ()).await.unwrap();
        assert_eq!(lease.epoch(), epoch);
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_in_a_folder_that_was_unmounted_is_taken_again_when_that_is_back() {
    let clock = clock(16);
    let home = tempfile::tempdir().unwrap();
    let (root, away) = (home.path().join("repository"), home.path().join("away"));
    let store: Arc<dyn Store> = Arc::new(crate::store::directory::Directory::new(&root, &clock));
    let options = on_host("alpha", Wait::Refuse);
    let lease = Lease::acquire_at(&store, name(), &clock, options).await.unwrap();
    std::fs::rename(&root, &away).unwrap();
    std::fs::create_dir(&root).unwrap();
    let error = lease.guard().lost().await;
    assert!(error.message().contains("not renewed in time"), "{error}");
    let (retaken, ()) = tokio::join!(lease.retake(&|_| ()), async {
        tokio::time::sleep(TTL * 3).await;
        std::fs::remove_dir(&root).unwrap();
        std::fs::rename(&away, &root).unwrap();
    });
    retaken.unwrap();
    assert_eq!(lease.epoch(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_hangs_does_not_delay_the_signal() {
    let clock = clock(8);
    let memory = Memory::new(&clock);
    let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
    let begun = clock.instant();
    memory.set_faults(Faults { delay_max: TTL * 1000, ..Faults::default() });
    let mut guard = lease.guard();
    guard.lost().await;
    assert!(clock.instant() - begun <= TTL * 9 / 10);
}

#[tokio::test(start_paused = true)]
async fn a_fenced_holder_is_told_at_its_next_renewal_and_leaves_the_object_alone() {
    let clock = clock(9);
    let memory = Memory::new(&clock);
    let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
    let (body, tag) = memory.read_versioned(&name()).await.unwrap().unwrap();
    let mut rival = Contents::decode(&name(), &body).unwrap();
    rival.token = "rival".into();
    rival.epoch = 2;
    memory.replace_if(&name(), rival.encode().unwrap(), Some(tag)).await.unwrap();
    let error = lease.guard().lost().await;
    assert!(error.message().contains("epoch 2"), "{error}");
    lease.release().await;
    let info = read(&memory, &name()).await.unwrap().unwrap();
    assert!(info.epoch == 2 && !info.released);
}

#[tokio::test(start_paused = true)]
async fn lost_answers_are_looked_up_and_cost_nothing() {
    let clock = clock(10);
    let memory = Memory::new(&clock);
    memory.fail_next(Call::Put, Outcome::FailsAfter);
    let store: Arc<dyn Store> = Arc::new(memory.clone());
    // The probe inside uses up scripted faults, so the candidate is driven directly.
    let candidate = Candidate {
        store,
        name: name(),
        clock: clock.clone(),
        options: on_host("alpha", Wait::Refuse),
        token: "ours".into(),
        follows: None,
    };
    let lease = Lease::begin(candidate.take().await.unwrap(), candidate, false);
    assert_eq!(lease.epoch(), 1);
    for _ in 0..20 {
        memory.fail_next(Call::Put, Outcome::FailsAfter);
        tokio::time::sleep(TTL).await;
        lease.guard().ensure_held().unwrap();
    }
    lease.release().await;
    assert!(read(&memory, &name()).await.unwrap().unwrap().released);
}

#[tokio::test(start_paused = true)]
async fn the_time_counts_from_the_first_try_even_when_that_arrives_after_the_second() {
    for was_there in [false, true] {
        let clock = clock(19);
        let memory = Memory::new(&clock);
        if was_there {
            take(&memory, &clock, on_host("beta", Wait::Refuse)).await.unwrap().release().await;
        }
        let candidate = |memory: &Memory| Candidate {
            store: Arc::new(memory.clone()),
            name: name(),
            clock: clock.clone(),
            options: on_host("alpha", Wait::Refuse),
            token: "ours".into(),
            follows: None,
        };
        let before = memory.read_versioned(&name()).await.unwrap();
        // What the first try sends, as a store that answers gets it.
        let ahead = Memory::new(&clock);
        if let Some((body, _)) = &before {
            ahead.replace_if(&name(), body.clone(), None).await.unwrap();
        }
        let mut look = Look::begin(&clock);
        let sent = candidate(&ahead).step(&mut look).await.unwrap().unwrap().contents;
        let (first, mut look) = (clock.instant(), Look::begin(&clock));
        for _ in 0..2 {
            memory.fail_next(Call::Put, Outcome::FailsBefore);
            let error = candidate(&memory).step(&mut look).await.err().unwrap();
            assert!(error.is_transient());
            tokio::time::sleep(TTL / 20).await;
        }
        let tag = before.map(|(_, tag)| tag);
        memory.replace_if(&name(), sent.encode().unwrap(), tag).await.unwrap();
        let taken = candidate(&memory).step(&mut look).await.unwrap().unwrap();
        assert_eq!(taken.term.sent, first, "{was_there}");
        assert_eq!(taken.contents.renewed_time, taken.term.sent_time);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_no_lease_is_refused_and_not_overwritten() {
    let clock = clock(11);
    let memory = Memory::new(&clock);
    memory.replace_if(&name(), Bytes::from_static(b"{}"), None).await.unwrap();
    let error = take(&memory, &clock, on_host("alpha", Wait::Forever)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
}

#[tokio::test(start_paused = true)]
async fn a_holder_whose_wall_clock_ran_on_while_suspended_stops() {
    let clock = clock(12);
    let memory = Memory::new(&clock);
    let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
    // Monotonic time stood still: the renewal seems recent, the wall clock knows better.
    lease.shared().held().sent_time =
        clock.now().checked_sub(SignedDuration::from_secs(55)).unwrap();
    assert!(lease.guard().ensure_held().is_err());
}

/// Holders come, work, crash, give back, over a store that loses requests and answers: at no
/// moment are there two, and epochs only grow.
#[test]
fn there_are_never_two_holders_whatever_the_store_does() {
    for seed in 0..60 {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let acquired = runtime.block_on(rivals(seed));
        assert!(acquired >= 3, "seed {seed}: the lease was hardly ever taken ({acquired})");
    }
}

async fn rivals(seed: u64) -> usize {
    let clock = clock(seed);
    let memory = Memory::new(&clock);
    memory.set_faults(Faults {
        seed,
        before_ppm: 150_000,
        after_ppm: 150_000,
        delay_max: Duration::from_secs(seed % 40),
        down: false,
    });
    let guards: Arc<Mutex<Vec<Guard>>> = Arc::default();
    let mut rivals = tokio::task::JoinSet::new();
    for host in ["alpha", "beta", "gamma"] {
        rivals.spawn(rival(host, memory.clone(), clock.clone(), Arc::clone(&guards)));
    }
    let end = clock.instant() + Duration::from_secs(3 * 3600);
    let mut greatest_epoch = 0;
    while clock.instant() < end {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let mut guards = guards.lock().unwrap();
        guards.retain(|guard| guard.ensure_held().is_ok());
        assert!(guards.len() <= 1, "seed {seed}: two holders: {guards:?}");
        if let Some(guard) = guards.first() {
            assert!(guard.epoch() >= greatest_epoch, "seed {seed}");
            greatest_epoch = guard.epoch();
        }
    }
    usize::try_from(greatest_epoch).unwrap()
}

async fn rival(host: &str, memory: Memory, clock: Clock, guards: Arc<Mutex<Vec<Guard>>>) {
    loop {
        let dice = u64::from(clock.random::<1>().unwrap()[0]);
        let store: Arc<dyn Store> = Arc::new(memory.clone());
        let token = format!("{host} {:?}", clock.random::<8>().unwrap());
        let options = on_host(host, Wait::AtMost(TTL * 10));
        let (name, clock) = (name(), clock.clone());
        let candidate = Candidate { store, name, clock, options, token, follows: None };
        let Ok(taken) = candidate.take().await else {
            tokio::time::sleep(Duration::from_secs(dice)).await;
            continue;
        };
        let lease = Lease::begin(taken, candidate, dice % 2 == 0);
        guards.lock().unwrap().push(lease.guard());
        let mut guard = lease.guard();
        let lost = tokio::time::timeout(Duration::from_secs(dice * 3), guard.lost()).await;
        if lost.is_ok() && lease.retake(&|_| ()).await.is_ok() {
            guards.lock().unwrap().push(lease.guard());
            tokio::time::sleep(Duration::from_secs(dice)).await;
        }
        if dice % 3 == 0 {
            lease.release().await;
        }
    }
}
