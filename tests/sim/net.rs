//! The network to the store, and the store behind it: requests that are lost, late, or done and not
//! answered, in any order.
//!
//! A request that was sent lives on when its sender has died or has given up waiting: it arrives, and is
//! carried out, whenever the network pleases. Requests are carried out between the turns of the
//! processes, in the order in which they arrive, and answers travel back for a while, so the answers of
//! overlapping requests come in any order. The objects are those of `store::memory`.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use tidemark::clock::Clock;
use tidemark::error::{Error, Kind, Result};
use tidemark::store::memory::Memory;
use tidemark::store::{
    Capabilities, Latencies, ListPage, Multipart, ObjectInfo, ObjectName, PutOutcome, Replace,
    RequestCounts, Store, VersionTag,
};
use tokio::sync::oneshot;

use crate::dice::Dice;

/// A sender gives up after so long.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);

/// How bad the network is; chances in a thousand requests.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Never arrives.
    pub lost: u64,
    /// Is carried out and its answer never arrives.
    pub unanswered: u64,
    /// Arrives only when its sender has given up.
    pub late: u64,
    /// Longest way of a request or an answer.
    pub way_ms: u64,
    /// Nothing gets through.
    pub down: bool,
}

impl Weather {
    pub const FAIR: Self = Self { lost: 0, unanswered: 0, late: 0, way_ms: 40, down: false };
    pub const FOUL: Self = Self { lost: 120, unanswered: 120, late: 30, way_ms: 900, down: false };
    pub const SLOW: Self = Self { lost: 10, unanswered: 10, late: 10, way_ms: 6000, down: false };
    pub const DOWN: Self = Self { lost: 0, unanswered: 0, late: 0, way_ms: 40, down: true };
}

/// What a request changed.
#[derive(Clone, Debug)]
pub enum Change {
    /// An object that was not there.
    Made { name: String, process: usize },
    /// The mutable object.
    Replaced { name: String, process: usize },
    /// Objects that are gone; only those that were there.
    Deleted { names: Vec<String>, process: usize },
}

type Work = Box<dyn FnOnce(Memory) -> Pin<Box<dyn Future<Output = Vec<Change>> + Send>> + Send>;

struct Letter {
    arrives: Timestamp,
    work: Work,
}

#[derive(Default)]
struct Inside {
    letters: Vec<Letter>,
    /// Every object there is, by name: kept apart from the store's own books.
    names: BTreeMap<String, u64>,
    request_count: u64,
}

/// What all processes share.
pub struct Net {
    pub memory: Memory,
    inside: Mutex<Inside>,
    dice: Mutex<Dice>,
    weather: Mutex<Weather>,
}

impl Net {
    pub fn new(memory: Memory, dice: Dice) -> Arc<Self> {
        let weather = Mutex::new(Weather::FAIR);
        Arc::new(Self { memory, inside: Mutex::default(), dice: Mutex::new(dice), weather })
    }

    pub fn set_weather(&self, weather: Weather) {
        *self.weather.lock().unwrap() = weather;
    }

    /// The names there are.
    pub fn names(&self) -> BTreeMap<String, u64> {
        self.inside.lock().unwrap().names.clone()
    }

    pub fn request_count(&self) -> u64 {
        self.inside.lock().unwrap().request_count
    }

    /// Carries out what has arrived by `now`, one after the other; each time gives what it changed and
    /// the names there were before.
    pub async fn deliver(
        &self,
        now: Timestamp,
        mut changed: impl FnMut(&Change, &BTreeMap<String, u64>),
    ) {
        loop {
            let work = {
                let mut inside = self.inside.lock().unwrap();
                let arrived = inside.letters.iter().enumerate().filter(|(_, l)| l.arrives <= now);
                let first = arrived.min_by_key(|(index, letter)| (letter.arrives, *index));
                let Some(index) = first.map(|(index, _)| index) else { return };
                inside.letters.remove(index).work
            };
            for change in work(self.memory.clone()).await {
                let before = self.names();
                self.note(&change).await;
                changed(&change, &before);
            }
        }
    }

    async fn note(&self, change: &Change) {
        match change {
            Change::Made { name, .. } | Change::Replaced { name, .. } => {
                let info = self.memory.head(&ObjectName::new(name.clone()).unwrap()).await.unwrap();
                let size = info.unwrap().size_bytes;
                self.inside.lock().unwrap().names.insert(name.clone(), size);
            }
            Change::Deleted { names, .. } => {
                let mut inside = self.inside.lock().unwrap();
                inside.names.retain(|name, _| !names.contains(name));
            }
        }
    }
}

/// One process's way to the store.
#[derive(Clone)]
pub struct Wire {
    pub net: Arc<Net>,
    pub process: usize,
    pub clock: Clock,
}

impl Wire {
    /// Sends a request and waits for its answer.
    async fn ask<T, F, W>(&self, work: W) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = (Result<T>, Vec<Change>)> + Send + 'static,
        W: FnOnce(Memory) -> F + Send + 'static,
    {
        let weather = *self.net.weather.lock().unwrap();
        let (fate, way_there, way_back) = {
            let mut dice = self.net.dice.lock().unwrap();
            let micros = weather.way_ms * 1000;
            (dice.below(1000), dice.below(micros), dice.below(micros))
        };
        let (way_there, way_back) =
            (Duration::from_micros(way_there), Duration::from_micros(way_back));
        self.net.inside.lock().unwrap().request_count += 1;
        let lost = weather.down || fate < weather.lost;
        let unanswered = !lost && fate < weather.lost + weather.unanswered;
        let late = !lost && !unanswered && fate < weather.lost + weather.unanswered + weather.late;
        if lost {
            tokio::time::sleep(way_there + way_back).await;
            return Err(unreachable_now("no route"));
        }
        let (sender, receiver) = oneshot::channel();
        let delay = if late { ATTEMPT_TIMEOUT + way_there } else { way_there };
        let delay = SignedDuration::try_from(delay).unwrap();
        let work: Work = Box::new(move |memory| {
            let done = work(memory);
            Box::pin(async move {
                let (answer, changes) = done.await;
                // Nobody waits for it any more: then nobody is told.
                drop(sender.send(answer));
                changes
            })
        });
        let arrives = self.clock.now() + delay;
        self.net.inside.lock().unwrap().letters.push(Letter { arrives, work });
        match tokio::time::timeout(ATTEMPT_TIMEOUT, receiver).await {
            Ok(Ok(_)) if unanswered => {
                tokio::time::sleep(way_back).await;
                Err(unreachable_now("connection reset"))
            }
            Ok(Ok(answer)) => {
                tokio::time::sleep(way_back).await;
                answer
            }
            Ok(Err(_)) | Err(_) => Err(unreachable_now("timed out")),
        }
    }

    async fn look<T, F, W>(&self, work: W) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
        W: FnOnce(Memory) -> F + Send + 'static,
    {
        self.ask(move |memory| {
            let found = work(memory);
            async move { (found.await, Vec::new()) }
        })
        .await
    }
}

fn unreachable_now(how: &str) -> Error {
    Error::new(Kind::Unavailable, format!("simulated network: {how}"))
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wire({})", self.process)
    }
}

fn made(outcome: &Result<PutOutcome>, name: &ObjectName, process: usize) -> Vec<Change> {
    match outcome {
        Ok(PutOutcome::Created) => vec![Change::Made { name: name.to_string(), process }],
        _ => Vec::new(),
    }
}

#[async_trait]
impl Store for Wire {
    fn describe(&self) -> String {
        "simulated:".to_owned()
    }

    async fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome> {
        let (name, process) = (name.clone(), self.process);
        self.ask(move |memory| async move {
            let outcome = memory.put_if_absent(&name, body).await;
            let changes = made(&outcome, &name, process);
            (outcome, changes)
        })
        .await
    }

    async fn begin_multipart(&self, name: &ObjectName) -> Result<Box<dyn Multipart>> {
        let wanted = name.clone();
        let upload = self.look(move |memory| async move { memory.begin_multipart(&wanted).await });
        let upload = Arc::from(upload.await?);
        Ok(Box::new(WireMultipart {
            wire: self.clone(),
            name: name.clone(),
            upload,
            is_made: Arc::default(),
        }))
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        let name = name.clone();
        self.look(move |memory| async move { memory.get(&name, range).await }).await
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<ObjectInfo>> {
        let name = name.clone();
        self.look(move |memory| async move { memory.head(&name).await }).await
    }

    async fn list(&self, prefix: &str, after: Option<&ObjectName>) -> Result<ListPage> {
        let (prefix, after) = (prefix.to_owned(), after.cloned());
        self.look(move |memory| async move {
            let mut page = memory.list(&prefix, after.as_ref()).await?;
            // Short pages: what changes between two of them must not be missed.
            if page.objects.len() > 40 {
                page.objects.truncate(40);
                page.more = true;
            }
            Ok(page)
        })
        .await
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<()> {
        let (names, process) = (names.to_vec(), self.process);
        self.ask(move |memory| async move {
            let mut there = Vec::new();
            for name in &names {
                if memory.head(name).await.unwrap().is_some() {
                    there.push(name.to_string());
                }
            }
            let outcome = memory.delete(&names).await;
            (outcome, vec![Change::Deleted { names: there, process }])
        })
        .await
    }

    async fn read_versioned(&self, name: &ObjectName) -> Result<Option<(Bytes, VersionTag)>> {
        let name = name.clone();
        self.look(move |memory| async move { memory.read_versioned(&name).await }).await
    }

    async fn replace_if(
        &self,
        name: &ObjectName,
        body: Bytes,
        expected: Option<VersionTag>,
    ) -> Result<Replace> {
        let (name, process) = (name.clone(), self.process);
        self.ask(move |memory| async move {
            let outcome = memory.replace_if(&name, body, expected).await;
            let changes = match &outcome {
                Ok(Replace::Done(_)) => vec![Change::Replaced { name: name.to_string(), process }],
                _ => Vec::new(),
            };
            (outcome, changes)
        })
        .await
    }

    async fn probe(&self) -> Result<Capabilities> {
        self.look(|memory| async move { memory.probe().await }).await
    }

    async fn probe_replace(&self) -> Result<bool> {
        self.look(|memory| async move { memory.probe_replace().await }).await
    }

    async fn time(&self) -> Result<Option<Timestamp>> {
        self.look(|memory| async move { memory.time().await }).await
    }

    async fn abort_stale_multiparts(&self, prefix: &str, older_than: Duration) -> Result<u64> {
        let prefix = prefix.to_owned();
        self.look(
            move |memory| async move { memory.abort_stale_multiparts(&prefix, older_than).await },
        )
        .await
    }

    fn requests(&self) -> RequestCounts {
        self.net.memory.requests()
    }

    fn latencies(&self) -> &Latencies {
        self.net.memory.latencies()
    }
}

struct WireMultipart {
    wire: Wire,
    name: ObjectName,
    upload: Arc<dyn Multipart>,
    /// A completion may be asked for twice, and makes its object once.
    is_made: Arc<AtomicBool>,
}

#[async_trait]
impl Multipart for WireMultipart {
    async fn put_part(&self, number: u32, body: Bytes) -> Result<()> {
        let upload = Arc::clone(&self.upload);
        self.wire.look(move |_| async move { upload.put_part(number, body).await }).await
    }

    async fn complete(&self) -> Result<PutOutcome> {
        let (upload, name) = (Arc::clone(&self.upload), self.name.clone());
        let (is_made, process) = (Arc::clone(&self.is_made), self.wire.process);
        self.wire
            .ask(move |_| async move {
                let outcome = upload.complete().await;
                let mut changes = made(&outcome, &name, process);
                changes.retain(|_| !is_made.swap(true, Ordering::Relaxed));
                (outcome, changes)
            })
            .await
    }

    async fn abort(&self) -> Result<()> {
        let upload = Arc::clone(&self.upload);
        self.wire.look(move |_| async move { upload.abort().await }).await
    }
}
