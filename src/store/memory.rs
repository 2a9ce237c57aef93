//! A store in memory, for tests and simulation: deterministic, and as hostile as its faults say.
//!
//! # Shape
//! Clones share the objects and the faults, so that a test keeps a handle on what the engine uses.
//! Faults surface as the errors a driver returns after its own retries: `unavailable`, with the write
//! stored or not. Where S3 is stricter than a file, this is as strict as S3.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::{Bound, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};

use super::{
    Capabilities, Latencies, ListPage, Multipart, ObjectInfo, ObjectName, PART_BYTES_MIN,
    PART_NUMBER_MAX, PutOutcome, Replace, RequestCounts, Requests, Store, VersionTag,
    checked_range, folder_prefix, is_stale, joined,
};
use crate::clock::{Clock, Instant};
use crate::error::{Error, Kind, Result};

/// Objects on one page of a listing.
const PAGE_OBJECTS: usize = 1000;

/// Objects in memory.
#[derive(Clone)]
pub struct Memory {
    clock: Clock,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    requests: Requests,
    latencies: Latencies,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Object>,
    uploads: BTreeMap<u64, Upload>,
    /// How uploads that are complete came out.
    completed: BTreeMap<u64, PutOutcome>,
    last_id: u64,
    faults: Faults,
    dice: Option<Clock>,
    script: VecDeque<(Call, Outcome)>,
    rivals: Vec<(String, Rival)>,
}

/// What somebody else does.
type Rival = BoxFuture<'static, ()>;

struct Object {
    body: Bytes,
    /// `None` once it was forgotten.
    modified: Option<Timestamp>,
    tag: u64,
}

struct Upload {
    name: ObjectName,
    begun: Timestamp,
    parts: BTreeMap<u32, Bytes>,
}

/// How often calls fail, in parts per million of calls, and how long they take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// What the dice are seeded with: the same seed and the same calls give the same faults.
    pub seed: u64,
    /// Calls that fail before anything happened.
    pub before_ppm: u32,
    /// Writes that are stored while their caller hears of a failure.
    pub after_ppm: u32,
    /// Each call takes a random time up to this.
    pub delay_max: Duration,
    /// Every call fails: the place cannot be reached.
    pub down: bool,
}

/// Which calls a scripted fault waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Any call.
    Any,
    /// `put_if_absent` and `replace_if`.
    Put,
    /// `put_part`.
    Part,
    /// `complete`.
    Complete,
    /// `get`, `head` and `read_versioned`.
    Read,
    /// `list`.
    List,
    /// `delete`.
    Delete,
}

/// How a call that was hit by a fault ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It fails before anything happened.
    FailsBefore,
    /// It does its work and its caller hears of a failure.
    FailsAfter,
    /// Rights are missing.
    Denied,
    /// It says that there is no such object, whether or not there is.
    NotFound,
    /// It is let through: the fault that follows in the script hits a later call.
    Passes,
}

impl Memory {
    /// An empty store without faults.
    #[must_use]
    pub fn new(clock: &Clock) -> Self {
        Self { clock: clock.clone(), shared: Arc::default() }
    }

    /// Sets the random faults from here on.
    pub fn set_faults(&self, faults: Faults) {
        let mut state = self.state();
        state.dice = Some(Clock::simulated(Timestamp::UNIX_EPOCH, faults.seed));
        state.faults = faults;
    }

    /// Makes the next call of that sort end so; several are used up in their order.
    pub fn fail_next(&self, call: Call, outcome: Outcome) {
        self.state().script.push_back((call, outcome));
    }

    /// Lets somebody else act just before the next listing of exactly `prefix`.
    pub fn before_list(&self, prefix: &str, rival: impl Future<Output = ()> + Send + 'static) {
        self.state().rivals.push((prefix.to_owned(), Box::pin(rival)));
    }

    /// Overwrites an object behind everybody's back, as rot or an attacker would.
    pub fn damage(&self, name: &ObjectName, change: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut state = self.state();
        let object = state.objects.get_mut(name.as_str()).ok_or_else(|| missing(name))?;
        let mut body = object.body.to_vec();
        change(&mut body);
        object.body = Bytes::from(body);
        Ok(())
    }

    /// From here on nobody is told when an object was made that is there now.
    pub fn forget_times(&self) {
        self.state().objects.values_mut().for_each(|object| object.modified = None);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes the time a call takes and decides whether it fails. Dice are thrown for every call in
    /// the same way, so that a seed means the same run.
    async fn fate(&self, call: Call) -> Result<Fate> {
        let (delay, fate) = self.state().decide(call)?;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        match fate {
            Some(Outcome::FailsBefore) => Err(unreachable_now("request lost")),
            Some(Outcome::Denied) => {
                Err(Error::new(Kind::Denied, "memory store: access denied by a fault"))
            }
            Some(Outcome::NotFound) => {
                Err(Error::new(Kind::NotFound, "memory store: no such object by a fault"))
            }
            Some(Outcome::FailsAfter) => Ok(Fate::FailsAfter),
            Some(Outcome::Passes) | None => Ok(Fate::Passes),
        }
    }

    fn note_upload(&self, begun: Instant) {
        let took = self.clock.instant().saturating_duration_since(begun);
        self.shared.latencies.upload.record(took);
    }

    fn publish(&self, state: &mut State, name: &ObjectName, body: Bytes) -> PutOutcome {
        if state.objects.contains_key(name.as_str()) {
            return PutOutcome::AlreadyThere;
        }
        self.store(state, name, body);
        PutOutcome::Created
    }

    fn store(&self, state: &mut State, name: &ObjectName, body: Bytes) -> VersionTag {
        state.last_id += 1;
        let tag = state.last_id;
        let object = Object { body, modified: Some(self.clock.now()), tag };
        state.objects.insert(name.as_str().to_owned(), object);
        VersionTag::new(tag.to_string())
    }
}

/// Whether a call that did its work says so.
#[derive(Clone, Copy)]
enum Fate {
    Passes,
    FailsAfter,
}

impl Fate {
    fn tell<T>(self, value: T) -> Result<T> {
        match self {
            Self::Passes => Ok(value),
            Self::FailsAfter => Err(unreachable_now("answer lost")),
        }
    }
}

fn unreachable_now(what: &str) -> Error {
    Error::new(Kind::Unavailable, format!("memory store: {what} by a fault"))
}

fn missing(name: &ObjectName) -> Error {
    Error::new(Kind::NotFound, format!("unable to read object '{name}': it does not exist"))
}

impl State {
    fn decide(&mut self, call: Call) -> Result<(Duration, Option<Outcome>)> {
        let mut delay = Duration::ZERO;
        let mut fate = None;
        if let Some(dice) = &self.dice {
            let throws = dice.random::<12>()?;
            let throw = |at: usize| -> u64 {
                throws.iter().skip(at).take(4).fold(0, |sum, byte| sum << 8 | u64::from(*byte))
            };
            if throw(0) % 1_000_000 < u64::from(self.faults.before_ppm) {
                fate = Some(Outcome::FailsBefore);
            } else if throw(4) % 1_000_000 < u64::from(self.faults.after_ppm) {
                fate = Some(Outcome::FailsAfter);
            }
            delay = self.faults.delay_max.mul_f64(throw(8) as f64 / f64::from(u32::MAX));
        }
        if self.faults.down {
            fate = Some(Outcome::FailsBefore);
        }
        let hit = self.script.iter().position(|(waits, _)| *waits == Call::Any || *waits == call);
        if let Some((_, outcome)) = hit.and_then(|index| self.script.remove(index)) {
            fate = Some(outcome);
        }
        Ok((delay, fate))
    }
}

#[async_trait]
impl Store for Memory {
    fn describe(&self) -> String {
        "memory:".to_owned()
    }

    async fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome> {
        self.shared.requests.puts.one();
        self.shared.requests.sent_bytes.add(body.len() as u64);
        let begun = self.clock.instant();
        let fate = self.fate(Call::Put).await?;
        let outcome = self.publish(&mut self.state(), name, body);
        self.note_upload(begun);
        fate.tell(outcome)
    }

    async fn begin_multipart(&self, name: &ObjectName) -> Result<Box<dyn Multipart>> {
        self.shared.requests.multipart_begins.one();
        let fate = self.fate(Call::Any).await?;
        let id = {
            let mut state = self.state();
            state.last_id += 1;
            let id = state.last_id;
            let (name, begun) = (name.clone(), self.clock.now());
            state.uploads.insert(id, Upload { name, begun, parts: BTreeMap::new() });
            id
        };
        fate.tell(Box::new(MemoryMultipart { memory: self.clone(), name: name.clone(), id }))
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        self.shared.requests.gets.one();
        let fate = self.fate(Call::Read).await?;
        let body = self.state().objects.get(name.as_str()).map(|object| object.body.clone());
        let body = body.ok_or_else(|| missing(name))?;
        let range = checked_range(name, range, body.len() as u64)?;
        self.shared.requests.received_bytes.add(range.len() as u64);
        fate.tell(body.slice(range))
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<ObjectInfo>> {
        self.shared.requests.heads.one();
        let fate = self.fate(Call::Read).await?;
        let info = self.state().objects.get(name.as_str()).map(|object| ObjectInfo {
            name: name.clone(),
            size_bytes: object.body.len() as u64,
            modified: object.modified,
        });
        fate.tell(info)
    }

    async fn list(&self, prefix: &str, after: Option<&ObjectName>) -> Result<ListPage> {
        self.shared.requests.lists.one();
        let rival = {
            let mut state = self.state();
            let waits = state.rivals.iter().position(|(awaited, _)| awaited == prefix);
            waits.map(|index| state.rivals.swap_remove(index).1)
        };
        if let Some(rival) = rival {
            rival.await;
        }
        let fate = self.fate(Call::List).await?;
        let mut page = ListPage { objects: Vec::new(), more: false };
        {
            let state = self.state();
            let from = match after {
                Some(after) if after.as_str() >= prefix => Bound::Excluded(after.as_str()),
                _ => Bound::Included(prefix),
            };
            for (name, object) in state.objects.range::<str, _>((from, Bound::Unbounded)) {
                if !name.starts_with(prefix) {
                    break;
                }
                if page.objects.len() == PAGE_OBJECTS {
                    page.more = true;
                    break;
                }
                page.objects.push(ObjectInfo {
                    name: ObjectName::new(name.clone())?,
                    size_bytes: object.body.len() as u64,
                    modified: object.modified,
                });
            }
        }
        fate.tell(page)
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<()> {
        self.shared.requests.deletes.one();
        let fate = self.fate(Call::Delete).await?;
        {
            let mut state = self.state();
            for name in names {
                state.objects.remove(name.as_str());
            }
        }
        fate.tell(())
    }

    async fn read_versioned(&self, name: &ObjectName) -> Result<Option<(Bytes, VersionTag)>> {
        self.shared.requests.gets.one();
        let fate = self.fate(Call::Read).await?;
        let found = self
            .state()
            .objects
            .get(name.as_str())
            .map(|object| (object.body.clone(), VersionTag::new(object.tag.to_string())));
        fate.tell(found)
    }

    async fn replace_if(
        &self,
        name: &ObjectName,
        body: Bytes,
        expected: Option<VersionTag>,
    ) -> Result<Replace> {
        self.shared.requests.puts.one();
        self.shared.requests.sent_bytes.add(body.len() as u64);
        let begun = self.clock.instant();
        let fate = self.fate(Call::Put).await?;
        let replaced = {
            let mut state = self.state();
            let found = state.objects.get(name.as_str()).map(|object| object.tag.to_string());
            if found.as_deref() == expected.as_ref().map(VersionTag::as_str) {
                Replace::Done(self.store(&mut state, name, body))
            } else {
                Replace::Lost
            }
        };
        self.note_upload(begun);
        fate.tell(replaced)
    }

    async fn probe(&self) -> Result<Capabilities> {
        self.fate(Call::Any).await?;
        Ok(Capabilities {
            conditional_put: true,
            conditional_complete: true,
            conditional_replace: true,
            wrong_checksum_refused: None,
            ranged_get: true,
            consistent_list: true,
            delete: true,
            versioning: None,
            object_lock: None,
            clock_skew: Some(SignedDuration::ZERO),
        })
    }

    async fn probe_replace(&self) -> Result<bool> {
        Ok(self.probe().await?.conditional_replace)
    }

    async fn time(&self) -> Result<Option<Timestamp>> {
        self.fate(Call::Any).await?;
        Ok(Some(self.clock.now()))
    }

    async fn abort_stale_multiparts(&self, folder: &str, older_than: Duration) -> Result<u64> {
        let fate = self.fate(Call::Any).await?;
        let (prefix, now) = (folder_prefix(folder), self.clock.now());
        let aborted = {
            let mut state = self.state();
            let before = state.uploads.len();
            state.uploads.retain(|_, upload| {
                let inside = upload.name.as_str().starts_with(&prefix);
                !(inside && is_stale(upload.begun, now, older_than))
            });
            before - state.uploads.len()
        };
        self.shared.requests.multipart_aborts.add(aborted as u64);
        fate.tell(aborted as u64)
    }

    fn requests(&self) -> RequestCounts {
        self.shared.requests.counts()
    }

    fn latencies(&self) -> &Latencies {
        &self.shared.latencies
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} objects)", self.state().objects.len())
    }
}

struct MemoryMultipart {
    memory: Memory,
    name: ObjectName,
    id: u64,
}

#[async_trait]
impl Multipart for MemoryMultipart {
    async fn put_part(&self, number: u32, body: Bytes) -> Result<()> {
        self.memory.shared.requests.parts.one();
        self.memory.shared.requests.sent_bytes.add(body.len() as u64);
        if !(1..=PART_NUMBER_MAX).contains(&number) {
            return Err(Error::new(Kind::Bug, format!("part number {number} of '{}'", self.name)));
        }
        let begun = self.memory.clock.instant();
        let fate = self.memory.fate(Call::Part).await?;
        self.memory.note_upload(begun);
        match self.memory.state().uploads.get_mut(&self.id) {
            Some(upload) => upload.parts.insert(number, body),
            None => return Err(gone(&self.name)),
        };
        fate.tell(())
    }

    async fn complete(&self) -> Result<PutOutcome> {
        self.memory.shared.requests.multipart_completes.one();
        let fate = self.memory.fate(Call::Complete).await?;
        let outcome = {
            let mut state = self.memory.state();
            if let Some(outcome) = state.completed.get(&self.id).copied() {
                return fate.tell(outcome);
            }
            let upload = state.uploads.remove(&self.id).ok_or_else(|| gone(&self.name))?;
            joined(&self.name, upload.parts.keys().copied())?;
            large_enough(&self.name, &upload.parts)?;
            let body = upload.parts.values().fold(BytesMut::new(), |mut body, part| {
                body.extend_from_slice(part);
                body
            });
            let outcome = self.memory.publish(&mut state, &self.name, body.freeze());
            state.completed.insert(self.id, outcome);
            outcome
        };
        fate.tell(outcome)
    }

    async fn abort(&self) -> Result<()> {
        self.memory.shared.requests.multipart_aborts.one();
        let fate = self.memory.fate(Call::Any).await?;
        self.memory.state().uploads.remove(&self.id);
        fate.tell(())
    }
}

/// Refuses what an S3 server refuses when an upload is completed: a small part that is not the last.
fn large_enough(name: &ObjectName, parts: &BTreeMap<u32, Bytes>) -> Result<()> {
    let small = |(_, body): &(&u32, &Bytes)| (body.len() as u64) < PART_BYTES_MIN;
    match parts.iter().rev().skip(1).find(small) {
        None => Ok(()),
        Some((number, body)) => Err(Error::new(
            Kind::Bug,
            format!("unable to complete '{name}': part {number} has {} bytes only", body.len()),
        )),
    }
}

fn gone(name: &ObjectName) -> Error {
    Error::new(
        Kind::Conflict,
        format!("unable to go on with the upload of '{name}': it was completed or aborted"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ObjectName {
        ObjectName::new(text).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_seed_gives_the_same_faults() {
        let mut runs = Vec::new();
        for _ in 0..2 {
            let memory = Memory::new(&Clock::system());
            memory.set_faults(Faults {
                seed: 42,
                before_ppm: 300_000,
                after_ppm: 300_000,
                ..Faults::default()
            });
            let mut run = Vec::new();
            for index in 0..50 {
                let put = memory.put_if_absent(&name(&format!("o{index}")), Bytes::new()).await;
                run.push(put.is_ok());
            }
            let stored = memory.state().objects.len();
            let reported = run.iter().filter(|ok| **ok).count();
            assert!(stored > reported, "some puts are stored though they were reported lost");
            runs.push((run, stored));
        }
        assert_eq!(runs[0], runs[1]);
    }

    #[tokio::test]
    async fn a_small_part_is_taken_as_the_last_one_only() {
        let memory = Memory::new(&Clock::system());
        let (small, large) = (Bytes::from_static(b"x"), Bytes::from(vec![7; 5 << 20]));
        for (parts, taken) in [([&large, &small], true), ([&small, &large], false)] {
            let upload = memory.begin_multipart(&name("a")).await.unwrap();
            for (number, part) in (1..).zip(parts) {
                upload.put_part(number, part.clone()).await.unwrap();
            }
            assert_eq!(upload.complete().await.is_ok(), taken);
        }
    }

    #[tokio::test]
    async fn a_scripted_fault_hits_the_next_call_of_its_sort_only() {
        let memory = Memory::new(&Clock::system());
        memory.fail_next(Call::Put, Outcome::FailsAfter);
        assert_eq!(memory.head(&name("a")).await.unwrap(), None);
        let error = memory.put_if_absent(&name("a"), Bytes::from_static(b"x")).await.unwrap_err();
        assert!(error.is_transient());
        let again = memory.put_if_absent(&name("a"), Bytes::from_static(b"y")).await.unwrap();
        assert_eq!(again, PutOutcome::AlreadyThere);
        assert_eq!(memory.get(&name("a"), None).await.unwrap().as_ref(), b"x");
    }
}
