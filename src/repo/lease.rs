//! The lease: one writer per cluster, taken by conditional write, fenced by an epoch.
//!
//! In: a store, the lease's name, who we are. Out: a [`Lease`] that renews itself in the background
//! and [`Guard`]s that tell, at once and without I/O, whether it is still held.
//!
//! # Shape
//! One small JSON object, the only mutable object of a repository. Every acquisition draws a random
//! token and adds one to `epoch`; every renewal adds one to `renewals`, so no two versions of the
//! object are alike and an entity tag made from content still tells them apart.
//!
//! # Invariants
//! 1. *The holder stops before a rival starts.* The holder counts its time from the instant before
//!    it sent the last renewal that succeeded and stops at 9/10 of the time to live. A rival counts
//!    from the instant after it read the same content and starts at the whole of it (of the longer
//!    of both settings). Only the rates of two monotonic clocks matter, never what they show; one
//!    tenth is far more than their drift. Monotonic clocks may stand still while a machine is
//!    suspended, so the holder also stops when its wall clock says that the time has passed.
//! 2. *A lost lease stays lost.* Nothing renews after a loss was signalled; a new acquisition has a
//!    new token and a greater epoch. [`Lease::retake`] is one, for a holder that could not renew: it
//!    succeeds only while the object is the one that this holder left, so nobody wrote in between.
//! 3. *An unknown answer is looked up, not assumed.* A renewal that failed in an unclear way, or
//!    that the store refused, is followed by a read: our own token in it means that our write won.
//!
//! # Durability
//! The lease protects no byte by itself: objects are written once, whoever writes them. It keeps
//! two servers that share a timeline after a split brain from mixing their WAL in one repository,
//! and it keeps a fenced writer from acknowledging. Dying on any line leaves an object that the next
//! writer takes over after the time to live, or at once where the dead process can be looked up.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::clock::{Clock, Instant};
use crate::error::{Context, Error, Kind, Result};
use crate::pg::{Lsn, TimelineId};
use crate::store::{ObjectName, Replace, Store, VersionTag};

use super::names::Object;
use super::process::{Life, ProcessIdentity};
use super::{Repository, printable};

/// Version of the lease's JSON.
const LEASE_FORMAT: u16 = 1;
/// A lease is under 2 KiB; anything longer is not one.
const LEASE_BYTES_MAX: usize = 16 * 1024;
/// Shorter than this, a slow store would lose the lease in ordinary operation.
const TTL_MIN: Duration = Duration::from_secs(5);
/// Longer than this, nobody would wait for a take-over.
const TTL_MAX: Duration = Duration::from_secs(3600);
/// Time to live by default: at a third of it, one small request a minute.
pub const TTL_DEFAULT: Duration = Duration::from_secs(180);
/// Longest pause between two tries to take a lost lease again: the longest that a store which came back
/// waits for us.
const RETAKE_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Tries of one version whose times are told apart; a later one that wins counts from the first.
const TRIES_MAX: usize = 64;
/// Longest time that giving the lease back may take before we leave it to expire.
const RELEASE_MAX: Duration = Duration::from_secs(10);

/// Tokens of the leases that this process holds: a lease that names this process but none of these
/// is left over from a failed attempt and may be taken at once.
static TOKENS_HELD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn tokens_held() -> MutexGuard<'static, BTreeSet<String>> {
    TOKENS_HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What to do when another writer holds the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Refuse and say who holds it. A lease whose holder looks dead (not renewed for its time to
    /// live by the wall clock) is still observed and taken over, so that a restart needs nobody.
    Refuse,
    /// As `Refuse`, but wait for the end of a holder that ends by itself ([`Tenure::Passing`]).
    ForPassing,
    /// As `ForPassing`; and a holder that may be ourselves before our container was restarted is
    /// observed for its time to live, however lately it renewed the lease, and refused at its next sign
    /// of life only.
    ForRestarted,
    /// Wait for at most this long.
    AtMost(Duration),
    /// Wait until it can be taken.
    Forever,
}

/// How long a holder means to keep the lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tenure {
    /// Until somebody stops it: a stream.
    #[default]
    Standing,
    /// Until its work is done: a base backup, which stores all WAL of that time as a stream would.
    Passing,
}

/// What to do on a store that does not enforce conditional writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnconditionalStore {
    /// Refuse: two writers could not be told apart.
    Refuse,
    /// Accepted in so many words by the configuration: the lease is then looked at before each
    /// renewal, which finds a rival but does not exclude one.
    Accept,
}

/// How to take a lease.
#[derive(Clone, Debug)]
pub struct LeaseOptions {
    /// What the holder does, for people: `stream`.
    pub description: String,
    /// How long the lease holds without a renewal; from 5 seconds to an hour.
    pub ttl: Duration,
    /// How long it is wanted.
    pub tenure: Tenure,
    /// What to do when somebody else holds it.
    pub wait: Wait,
    /// What to do on a store that does not enforce conditions.
    pub unconditional_store: UnconditionalStore,
    /// The process that holds the lease; another than ours only in tests.
    pub process: ProcessIdentity,
    /// Name of the data key that the holder seals with, so that a sweep keeps it.
    pub key_id: Option<String>,
}

impl LeaseOptions {
    /// The defaults for this process: 180 seconds, refuse a second writer, refuse a store without
    /// conditions.
    #[must_use]
    pub fn new(description: impl Into<String>) -> Self {
        Self {
            description: description.into(),
            ttl: TTL_DEFAULT,
            tenure: Tenure::Standing,
            wait: Wait::Refuse,
            unconditional_store: UnconditionalStore::Refuse,
            process: ProcessIdentity::current(),
            key_id: None,
        }
    }
}

/// How far the holder has come: published with each renewal and taken over by the next holder, so that the
/// time up to which a silent cluster can be restored is known although no extent was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Timeline that is being streamed.
    pub timeline: TimelineId,
    /// End of the contiguous WAL that the repository holds.
    pub durable_end_lsn: Lsn,
    /// The server's clock when it last said that it had no WAL, or no commit, beyond
    /// `durable_end_lsn`; absent until it did, and from a standby, whose primary may have.
    #[serde(default)]
    pub caught_up_time: Option<Timestamp>,
    /// The same, also from a standby: what the server has had is stored.
    #[serde(default)]
    pub all_stored_time: Option<Timestamp>,
}

/// Who holds, or last held, the lease: for listings and for the refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeaseInfo {
    /// Number of this acquisition, greater than that of every earlier one.
    pub epoch: u64,
    /// Whether it was given back.
    pub released: bool,
    /// What the holder does.
    pub description: String,
    /// How long the holder wanted it.
    pub tenure: Tenure,
    /// The holder.
    pub process: ProcessIdentity,
    /// When it was taken, by the holder's clock.
    pub acquired_time: Timestamp,
    /// When it was last renewed, by the holder's clock.
    pub renewed_time: Timestamp,
    /// Time to live without a renewal.
    pub ttl_ms: u64,
    /// How far the holder had come at that time.
    pub progress: Option<Progress>,
    /// The data key that the holder seals with.
    pub key_id: Option<String>,
}

impl LeaseInfo {
    /// Time to live without a renewal.
    pub(super) fn ttl(&self) -> SignedDuration {
        SignedDuration::from_millis(i64::try_from(self.ttl_ms).unwrap_or(i64::MAX))
    }

    /// Whether the holder is taken to be at work at the time `now`. One whose clock is far ahead of ours
    /// is not: nobody could tell when it died.
    pub(super) fn is_at_work(&self, now: Timestamp) -> bool {
        !self.released && now.duration_since(self.renewed_time).abs() <= self.ttl()
    }
}

/// Whether the lease is still ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// Held.
    Held,
    /// Lost, for this reason; for ever.
    Lost(Arc<str>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Standing {
    Held,
    Released,
}

/// The lease object.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Contents {
    format: u16,
    epoch: u64,
    standing: Standing,
    token: String,
    renewals: u64,
    ttl_ms: u64,
    description: String,
    process: ProcessIdentity,
    acquired_time: Timestamp,
    renewed_time: Timestamp,
    #[serde(default)]
    tenure: Tenure,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    progress: Option<Progress>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_id: Option<String>,
}

impl Contents {
    fn encode(&self) -> Result<Bytes> {
        serde_json::to_vec(self)
            .map(Bytes::from)
            .map_err(|error| Error::new(Kind::Bug, format!("unable to encode the lease: {error}")))
    }

    fn decode(name: &ObjectName, body: &[u8]) -> Result<Self> {
        let damaged = |found: String| {
            Error::new(Kind::Corrupt, format!("unable to read the lease '{name}': {found}"))
                .hint("Make sure that no writer runs on this cluster, delete that object, and start again.")
        };
        if body.len() > LEASE_BYTES_MAX {
            return Err(damaged(format!("{} bytes, at most {LEASE_BYTES_MAX}", body.len())));
        }
        let mut contents: Self =
            serde_json::from_slice(body).map_err(|error| damaged(printable(&error.to_string())))?;
        if contents.format != LEASE_FORMAT {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "unable to read the lease '{name}': format {}, this build knows {LEASE_FORMAT}",
                    contents.format
                ),
            )
            .hint("Use the newer tidemark that wrote it."));
        }
        // Anybody who can write to the store may have put it: it is shown, and said in refusals.
        contents.description = printable(&contents.description);
        contents.process.host = printable(&contents.process.host);
        Ok(contents)
    }

    fn is_free(&self) -> bool {
        self.standing == Standing::Released
    }

    fn ttl(&self) -> Duration {
        Duration::from_millis(self.ttl_ms).clamp(TTL_MIN, TTL_MAX)
    }

    fn info(&self) -> LeaseInfo {
        LeaseInfo {
            epoch: self.epoch,
            released: self.standing == Standing::Released,
            description: self.description.clone(),
            tenure: self.tenure,
            process: self.process.clone(),
            acquired_time: self.acquired_time,
            renewed_time: self.renewed_time,
            ttl_ms: self.ttl_ms,
            progress: self.progress,
            key_id: self.key_id.clone(),
        }
    }

    fn who(&self) -> String {
        format!(
            "'{}' ({}) holds it since {}, epoch {}, last renewed {}",
            self.description, self.process, self.acquired_time, self.epoch, self.renewed_time
        )
    }
}

/// Who holds, or last held, the lease; `None` when nobody ever took it.
///
/// # Errors
/// Those of the store, and `corrupt` when the object is no lease.
pub async fn read(store: &dyn Store, name: &ObjectName) -> Result<Option<LeaseInfo>> {
    let found = store.read_versioned(name).await.context(|| "unable to read the lease")?;
    found.map(|(body, _)| Ok(Contents::decode(name, &body)?.info())).transpose()
}

/// What the lease and its guards share.
struct Shared {
    clock: Clock,
    epoch: u64,
    token: String,
    /// How long after a renewal was sent the holder stops: 9/10 of the time to live.
    term: Duration,
    held: Mutex<Term>,
    state: watch::Sender<LeaseState>,
    progress: Mutex<Option<Progress>>,
    /// Something of the progress is worth a renewal now.
    news: Notify,
    key_id: Mutex<Option<String>>,
}

/// When the renewal that counts was sent.
#[derive(Clone, Copy)]
struct Term {
    sent: Instant,
    sent_time: Timestamp,
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Term> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deadline(&self) -> Instant {
        self.held().sent + self.term
    }

    /// Counts a renewal that was sent at `term` and won; false when the lease was lost meanwhile.
    fn extend(&self, term: Term) -> bool {
        let mut held = self.held();
        if *self.state.borrow() != LeaseState::Held {
            return false;
        }
        if term.sent > held.sent {
            *held = term;
        }
        true
    }

    /// Signals the loss, once.
    fn lose(&self, reason: &str) {
        let _held = self.held();
        tokens_held().remove(&self.token);
        self.state.send_if_modified(|state| {
            let first = *state == LeaseState::Held;
            if first {
                *state = LeaseState::Lost(Arc::from(reason));
            }
            first
        });
    }

    fn ensure_held(&self) -> Result<()> {
        let term = *self.held();
        let now = self.clock.instant();
        let elapsed = self.clock.now().duration_since(term.sent_time);
        let term_signed = SignedDuration::try_from(self.term).unwrap_or(SignedDuration::MAX);
        if now >= term.sent + self.term || elapsed >= term_signed {
            self.lose("it was not renewed in time");
        }
        match &*self.state.borrow() {
            LeaseState::Held => Ok(()),
            LeaseState::Lost(reason) => Err(lost(reason)),
        }
    }
}

fn lost(reason: &str) -> Error {
    Error::new(Kind::Conflict, format!("the lease of the cluster was lost: {reason}"))
}

/// Tells whether a lease is held; cheap, clonable, does no I/O.
#[derive(Clone)]
pub struct Guard {
    shared: Arc<Shared>,
    watch: watch::Receiver<LeaseState>,
}

impl Guard {
    /// Fails from the moment on at which a rival may start.
    ///
    /// # Errors
    /// `conflict` when the lease was lost, with the reason.
    pub fn ensure_held(&self) -> Result<()> {
        self.shared.ensure_held()
    }

    /// Number of this acquisition.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.shared.epoch
    }

    /// Returns when the lease is lost, with the error that says why.
    ///
    /// # Cancel safety
    /// Safe: nothing is lost when dropped.
    pub async fn lost(&mut self) -> Error {
        let state = self.watch.wait_for(|state| *state != LeaseState::Held).await;
        match state.as_deref() {
            Ok(LeaseState::Lost(reason)) => lost(reason),
            _ => lost("it was dropped"),
        }
    }

    /// The state and its changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<LeaseState> {
        self.watch.clone()
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guard(epoch {}, {:?})", self.shared.epoch, &*self.watch.borrow())
    }
}

/// The right to be the one writer of a cluster; renews itself until dropped, released or lost.
pub struct Lease {
    holding: Mutex<Holding>,
    /// As whom and where it is taken again.
    candidate: Candidate,
    look_first: bool,
}

/// One acquisition and the task that renews it.
struct Holding {
    shared: Arc<Shared>,
    stop: tokio_util::sync::CancellationToken,
    renewing: Option<JoinHandle<Holder>>,
}

impl Holding {
    fn begin(candidate: &Candidate, taken: Taken, look_first: bool) -> Self {
        let Taken { contents, tag, term } = taken;
        let ttl = candidate.options.ttl;
        tokens_held().insert(contents.token.clone());
        let shared = Arc::new(Shared {
            clock: candidate.clock.clone(),
            epoch: contents.epoch,
            token: contents.token.clone(),
            term: ttl - ttl / 10,
            held: Mutex::new(term),
            state: watch::Sender::new(LeaseState::Held),
            progress: Mutex::new(None),
            news: Notify::new(),
            key_id: Mutex::new(contents.key_id.clone()),
        });
        let stop = tokio_util::sync::CancellationToken::new();
        let holder = Holder {
            store: Arc::clone(&candidate.store),
            name: candidate.name.clone(),
            shared: Arc::clone(&shared),
            attempt: contents.renewals,
            contents,
            tag,
            ttl,
            in_doubt: Vec::new(),
            look_first,
        };
        let renewing = Some(tokio::spawn(holder.keep(stop.clone())));
        Self { shared, stop, renewing }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease(epoch {})", self.epoch())
    }
}

impl Lease {
    /// Takes the lease of a repository's cluster.
    ///
    /// # Errors
    /// `conflict` when somebody else holds it (and says who), `unsupported` when the store does not
    /// enforce conditions and that was not accepted, `config` for a time to live out of bounds, and
    /// the store's own.
    ///
    /// # Cancel safety
    /// Safe: a lease taken by a dropped call is taken again at once by this process, and by any
    /// other after its time to live.
    pub async fn acquire(repository: &Repository, options: LeaseOptions) -> Result<Self> {
        let name = repository.name(&Object::Lease)?;
        Self::acquire_at(repository.store(), name, repository.clock(), options)
            .await
            .context(|| format!("unable to take the lease of cluster '{}'", repository.cluster()))
    }

    /// As [`Lease::acquire`], for a lease by name.
    ///
    /// # Errors
    /// The same.
    pub async fn acquire_at(
        store: &Arc<dyn Store>,
        name: ObjectName,
        clock: &Clock,
        options: LeaseOptions,
    ) -> Result<Self> {
        if !(TTL_MIN..=TTL_MAX).contains(&options.ttl) {
            return Err(Error::new(
                Kind::Config,
                format!("a lease of {} s is out of bounds", options.ttl.as_secs_f64()),
            )
            .hint("Choose a time to live from 5 seconds to 1 hour."));
        }
        let look_first = !store.probe_replace().await?;
        if look_first && options.unconditional_store == UnconditionalStore::Refuse {
            return Err(Error::new(
                Kind::Unsupported,
                format!("the store {} does not enforce conditional writes", store.describe()),
            )
            .hint("Use a store that enforces If-Match, or accept in the configuration that a second writer is not excluded."));
        }
        let candidate = Candidate {
            store: Arc::clone(store),
            name,
            clock: clock.clone(),
            options,
            token: token(clock)?,
            follows: None,
        };
        Ok(Self::begin(candidate.take().await?, candidate, look_first))
    }

    fn begin(taken: Taken, candidate: Candidate, look_first: bool) -> Self {
        let holding = Mutex::new(Holding::begin(&candidate, taken, look_first));
        Self { holding, candidate, look_first }
    }

    fn holding(&self) -> MutexGuard<'_, Holding> {
        self.holding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.holding().shared)
    }

    /// Takes the lease again after it was lost because it could not be renewed: the guards of before
    /// stay lost, those made from here on are of the new acquisition. For as long as the store does not
    /// let us, whatever its reason, it is asked again and `told` hears why; a lease that is held is left
    /// alone.
    ///
    /// Whoever calls this must have stopped writing under the old guards. What the holder sealed with is
    /// still named by the lease, and nobody else wrote: the same data key and the same books may be used.
    ///
    /// # Errors
    /// `conflict` when somebody else took the lease meanwhile, even if it is free now, or when it is gone;
    /// `corrupt` and `unsupported` when it cannot be read.
    ///
    /// # Cancel safety
    /// As [`Lease::acquire`].
    pub async fn retake(&self, told: &(dyn Fn(&Error) + Send + Sync)) -> Result<()> {
        let before = self.shared();
        if before.ensure_held().is_ok() {
            return Ok(());
        }
        self.holding().stop.cancel();
        let key_id = before.key_id.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let options = LeaseOptions { key_id, ..self.candidate.options.clone() };
        let candidate = Candidate {
            options,
            token: token(&before.clock)?,
            follows: Some(before.token.clone()),
            ..self.candidate.clone()
        };
        let mut look = Look::begin(&before.clock);
        let taken = loop {
            match candidate.step(&mut look).await {
                Ok(Some(taken)) => break taken,
                Ok(None) => {}
                Err(error) if is_beyond_patience(error.kind()) => return Err(error),
                Err(error) => {
                    told(&error);
                    tokio::time::sleep(candidate.look_interval().min(RETAKE_PAUSE_MAX)).await;
                }
            }
        };
        let holding = Holding::begin(&candidate, taken, self.look_first);
        let progress = *before.progress.lock().unwrap_or_else(PoisonError::into_inner);
        *holding.shared.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress;
        *self.holding() = holding;
        Ok(())
    }

    /// Number of this acquisition, greater than that of every earlier one.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.holding().shared.epoch
    }

    /// A guard for those who must stop when the lease is lost.
    #[must_use]
    pub fn guard(&self) -> Guard {
        let shared = self.shared();
        Guard { watch: shared.state.subscribe(), shared }
    }

    /// What the next renewal publishes. The first one, and one of another timeline, is published at once:
    /// until then nobody can tell what is missing from what is on its way.
    pub fn report(&self, progress: Progress) {
        let shared = self.shared();
        let mut told = shared.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if told.replace(progress).is_none_or(|before| before.timeline != progress.timeline) {
            shared.news.notify_one();
        }
    }

    /// Names the data key that the holder seals with from now on, so that a sweep keeps it; published
    /// with the next renewal.
    pub fn seals_with(&self, key_id: String) {
        let shared = self.shared();
        *shared.key_id.lock().unwrap_or_else(PoisonError::into_inner) = Some(key_id);
    }

    /// Gives the lease back, so that the next writer need not wait; at most ten seconds. A store
    /// that does not answer is no error: the lease then expires by itself.
    ///
    /// # Durability
    /// The renewal task has ended before the last write is sent, so no renewal can follow it.
    pub async fn release(self) {
        let (shared, renewing) = {
            let mut holding = self.holding();
            holding.stop.cancel();
            (Arc::clone(&holding.shared), holding.renewing.take())
        };
        let Some(renewing) = renewing else { return };
        let Ok(holder) = renewing.await else { return };
        let was_held = shared.ensure_held().is_ok();
        shared.lose("it was given back");
        if was_held {
            match tokio::time::timeout(RELEASE_MAX, holder.give_back()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::info!("the lease was left to expire: {error}"),
                Err(_) => tracing::info!("the lease was left to expire: the store did not answer"),
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let holding = self.holding();
        holding.stop.cancel();
        holding.shared.lose("it was dropped");
    }
}

/// A token that no other acquisition has.
fn token(clock: &Clock) -> Result<String> {
    Ok(clock.random::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether waiting does not make it better: the rest is an outage, or what the operator repairs while
/// the server keeps the WAL.
fn is_beyond_patience(kind: Kind) -> bool {
    matches!(kind, Kind::Conflict | Kind::Corrupt | Kind::Unsupported | Kind::Usage | Kind::Bug)
}

/// Who wants the lease.
#[derive(Clone)]
struct Candidate {
    store: Arc<dyn Store>,
    name: ObjectName,
    clock: Clock,
    options: LeaseOptions,
    token: String,
    /// Token of the acquisition that this one must follow directly.
    follows: Option<String>,
}

struct Taken {
    contents: Contents,
    tag: VersionTag,
    term: Term,
}

/// What the one who wants the lease has seen so far.
struct Look {
    begun: Instant,
    /// The content that is being observed, and since when it has not changed.
    observed: Option<(Bytes, Instant)>,
    /// Our tries that may still win.
    tried: Tried,
    /// Whether it was said that somebody is waited for.
    told: bool,
}

/// Tries to take the lease that all replace the same version: one of them wins, however late it arrives.
#[derive(Default)]
struct Tried {
    /// The version; `None`: no object.
    expected: Option<VersionTag>,
    /// When they were sent, the first [`TRIES_MAX`].
    terms: Vec<Term>,
}

impl Tried {
    /// Notes one more. Those that named another version lost: that one is gone.
    fn add(&mut self, expected: &Option<VersionTag>, term: Term) {
        if self.expected != *expected {
            *self = Self { expected: expected.clone(), terms: Vec::new() };
        }
        if self.terms.len() < TRIES_MAX {
            self.terms.push(term);
        }
    }

    /// When the one that won was sent; none was sent before the first.
    fn term_of(&self, won: &Contents) -> Option<Term> {
        let known = self.terms.iter().find(|term| term.sent_time == won.acquired_time);
        known.or(self.terms.first()).copied()
    }
}

impl Look {
    fn begin(clock: &Clock) -> Self {
        Self { begun: clock.instant(), observed: None, tried: Tried::default(), told: false }
    }
}

impl Candidate {
    async fn take(&self) -> Result<Taken> {
        let mut look = Look::begin(&self.clock);
        loop {
            match self.step(&mut look).await {
                Ok(Some(taken)) => return Ok(taken),
                Ok(None) => {}
                // One who waits outlives a store that is away for a while.
                Err(error) if error.is_transient() && self.may_wait_on(&look) => {
                    tracing::debug!("unable to look at the lease for now: {error}");
                    tokio::time::sleep(self.look_interval()).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One look at the lease and what follows from it; `None` to look again.
    async fn step(&self, look: &mut Look) -> Result<Option<Taken>> {
        let Some((body, tag)) = self.store.read_versioned(&self.name).await? else {
            return match self.follows {
                Some(_) => Err(lost("its object was deleted")),
                None => self.try_take(None, None, &mut look.tried).await,
            };
        };
        let contents = Contents::decode(&self.name, &body)?;
        if contents.token == self.token
            && let Some(term) = look.tried.term_of(&contents)
        {
            return Ok(Some(Taken { contents, tag, term }));
        }
        if let Some(before) = &self.follows {
            return match contents.token == *before && !contents.is_free() {
                true => self.try_take(Some(&contents), Some(tag), &mut look.tried).await,
                false => Err(lost(&format!("another writer took it: {}", contents.who()))),
            };
        }
        let now = self.clock.instant();
        let unchanged_since = match &look.observed {
            Some((seen, since)) if *seen == body => *since,
            // A change while we look is a sign of life.
            Some(_) if self.refuses(&contents) && !contents.is_free() => {
                return Err(refused(&contents));
            }
            _ => {
                look.observed = Some((body, now));
                now
            }
        };
        if self.may_take(&contents, unchanged_since) {
            return self.try_take(Some(&contents), Some(tag), &mut look.tried).await;
        }
        self.pause(&contents, look).await?;
        Ok(None)
    }

    fn may_take(&self, contents: &Contents, unchanged_since: Instant) -> bool {
        let dead = match self.options.process.look_up(&contents.process) {
            Life::Dead => true,
            Life::Ourselves => !tokens_held().contains(&contents.token),
            Life::MayLive => false,
        };
        let patience = contents.ttl().max(self.options.ttl);
        contents.is_free() || dead || self.clock.instant() >= unchanged_since + patience
    }

    /// Whether a live holder is not waited for.
    fn refuses(&self, contents: &Contents) -> bool {
        match self.options.wait {
            Wait::Refuse => true,
            Wait::ForPassing | Wait::ForRestarted => contents.tenure == Tenure::Standing,
            Wait::AtMost(_) | Wait::Forever => false,
        }
    }

    /// Whether the holder may be what we were before a restart, and that is to be found out.
    fn may_be_restarted(&self, contents: &Contents) -> bool {
        self.options.wait == Wait::ForRestarted
            && self.options.process.may_follow(&contents.process)
    }

    fn look_interval(&self) -> Duration {
        self.options.ttl / 12
    }

    /// When the patience of the options ends.
    fn give_up_at(&self, look: &Look) -> Option<Instant> {
        match self.options.wait {
            Wait::Forever | Wait::ForPassing | Wait::ForRestarted => None,
            Wait::AtMost(limit) => Some(look.begun + limit),
            // Long enough to observe a dead holder and to take over.
            Wait::Refuse => Some(look.begun + TTL_MAX.min(self.options.ttl * 3)),
        }
    }

    fn may_wait_on(&self, look: &Look) -> bool {
        let patient = matches!(self.options.wait, Wait::AtMost(_) | Wait::Forever);
        let begun = patient || look.observed.is_some();
        begun && self.give_up_at(look).is_none_or(|end| self.clock.instant() < end)
    }

    /// Sleeps until the next look, or refuses.
    async fn pause(&self, contents: &Contents, look: &mut Look) -> Result<()> {
        let age = self.clock.now().duration_since(contents.renewed_time).abs();
        let ttl = contents.ttl().max(self.options.ttl);
        let looks_alive = age < SignedDuration::try_from(ttl).unwrap_or(SignedDuration::MAX);
        let restarted = self.may_be_restarted(contents);
        if self.refuses(contents) && looks_alive && !restarted {
            return Err(refused(contents));
        }
        if !std::mem::replace(&mut look.told, true) {
            let who = contents.who();
            match restarted {
                true => tracing::warn!(
                    "a writer was at work in this container, perhaps before it was restarted; waiting \
                     {} s for a sign of life: {who}",
                    ttl.as_secs()
                ),
                false => tracing::warn!("another writer is at work, waiting for its end: {who}"),
            }
        }
        let next = self.clock.instant() + self.look_interval();
        match (self.options.wait, self.give_up_at(look)) {
            (Wait::AtMost(_), Some(end)) if self.clock.instant() >= end => Err(refused(contents)),
            (Wait::AtMost(_), Some(end)) => {
                tokio::time::sleep_until(next.min(end)).await;
                Ok(())
            }
            _ => {
                tokio::time::sleep_until(next).await;
                Ok(())
            }
        }
    }

    /// One conditional write after what the lease said `before`; `None` when the object changed meanwhile.
    async fn try_take(
        &self,
        before: Option<&Contents>,
        expected: Option<VersionTag>,
        tried: &mut Tried,
    ) -> Result<Option<Taken>> {
        let term = Term { sent: self.clock.instant(), sent_time: self.clock.now() };
        let epoch = before.map_or(0, |before| before.epoch);
        let contents = Contents {
            format: LEASE_FORMAT,
            epoch: epoch.checked_add(1).ok_or_else(|| {
                Error::new(Kind::Corrupt, format!("unable to count on from epoch {epoch}"))
            })?,
            standing: Standing::Held,
            token: self.token.clone(),
            renewals: 0,
            ttl_ms: u64::try_from(self.options.ttl.as_millis()).unwrap_or(u64::MAX),
            description: self.options.description.clone(),
            process: self.options.process.clone(),
            acquired_time: term.sent_time,
            renewed_time: term.sent_time,
            tenure: self.options.tenure,
            // What the holder before us had reached stays true until we know more.
            progress: before.and_then(|before| before.progress),
            key_id: self.options.key_id.clone(),
        };
        tried.add(&expected, term);
        match self.store.replace_if(&self.name, contents.encode()?, expected).await {
            Ok(Replace::Done(tag)) => Ok(Some(Taken { contents, tag, term })),
            Ok(Replace::Lost) => {
                // A short rest, so that rivals never spin.
                tokio::time::sleep(self.options.ttl / 100).await;
                Ok(None)
            }
            // Nobody knows whether it was stored: the look that follows does.
            Err(error) if error.is_transient() => {
                match self.store.read_versioned(&self.name).await? {
                    Some((body, tag)) => {
                        let found = Contents::decode(&self.name, &body)?;
                        match tried.term_of(&found).filter(|_| found.token == self.token) {
                            Some(term) => Ok(Some(Taken { contents: found, tag, term })),
                            None => Err(error),
                        }
                    }
                    None => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }
}

fn refused(contents: &Contents) -> Error {
    Error::new(Kind::Conflict, format!("another writer is at work: {}", contents.who()))
        .hint("Stop that process, or run with --wait to take over when it ends.")
}

/// The renewing side of a lease.
struct Holder {
    store: Arc<dyn Store>,
    name: ObjectName,
    shared: Arc<Shared>,
    contents: Contents,
    tag: VersionTag,
    ttl: Duration,
    /// Number of the last renewal that was tried.
    attempt: u64,
    /// Renewals whose answer is not known: their number and when they were sent. Bounded by the
    /// tries that fit into one term.
    in_doubt: Vec<(u64, Term)>,
    /// On a store without conditions: look before each renewal.
    look_first: bool,
}

enum Renewal {
    Done,
    Again,
    Fenced(String),
}

impl Holder {
    async fn keep(mut self, stop: tokio_util::sync::CancellationToken) -> Self {
        let mut next = self.shared.held().sent + self.ttl / 3;
        let mut last_error: Option<Error> = None;
        loop {
            let deadline = self.shared.deadline();
            tokio::select! {
                biased;
                () = stop.cancelled() => return self,
                () = self.shared.news.notified() => {}
                () = tokio::time::sleep_until(next.min(deadline)) => {}
            }
            if self.shared.ensure_held().is_err() || self.shared.clock.instant() >= deadline {
                let cause = last_error.map(|error| format!(": {error}")).unwrap_or_default();
                self.shared.lose(&format!("it was not renewed in time{cause}"));
                return self;
            }
            let outcome = tokio::select! {
                biased;
                () = stop.cancelled() => return self,
                outcome = tokio::time::timeout_at(deadline, self.renew()) => outcome,
            };
            let now = self.shared.clock.instant();
            match outcome {
                Ok(Ok(Renewal::Done)) => {
                    last_error = None;
                    next = self.shared.held().sent + self.ttl / 3;
                }
                Ok(Ok(Renewal::Again)) => next = now + self.ttl / 100,
                Ok(Ok(Renewal::Fenced(by))) => {
                    self.shared.lose(&by);
                    return self;
                }
                Ok(Err(error)) => {
                    tracing::debug!("unable to renew the lease for now: {error}");
                    last_error = Some(error);
                    next = now + self.ttl / 30;
                }
                Err(_) => next = deadline,
            }
        }
    }

    /// One renewal.
    ///
    /// # Cancel safety
    /// Safe: a renewal that was sent and whose answer was not seen stays in doubt, and the next one
    /// looks first.
    async fn renew(&mut self) -> Result<Renewal> {
        if (self.look_first || !self.in_doubt.is_empty())
            && let Some(rival) = self.look().await?
        {
            return Ok(Renewal::Fenced(rival));
        }
        let clock = self.shared.clock.clone();
        let term = Term { sent: clock.instant(), sent_time: clock.now() };
        self.attempt += 1;
        let next =
            Contents { renewals: self.attempt, renewed_time: term.sent_time, ..self.published() };
        let body = next.encode()?;
        self.in_doubt.push((self.attempt, term));
        match self.store.replace_if(&self.name, body, Some(self.tag.clone())).await? {
            Replace::Done(tag) => {
                self.tag = tag;
                self.contents = next;
                self.in_doubt.clear();
                Ok(if self.shared.extend(term) { Renewal::Done } else { Renewal::Again })
            }
            // Perhaps overtaken by our own earlier try: only another token means a rival.
            Replace::Lost => Ok(self.look().await?.map_or(Renewal::Again, Renewal::Fenced)),
        }
    }

    /// Reads the lease: `None` when it is still ours (and then knows its tag and which renewal
    /// won), who fenced us otherwise.
    async fn look(&mut self) -> Result<Option<String>> {
        let Some((body, tag)) = self.store.read_versioned(&self.name).await? else {
            return Ok(Some("the lease object was deleted".to_owned()));
        };
        let found = Contents::decode(&self.name, &body)?;
        if found.token != self.shared.token || found.standing != Standing::Held {
            return Ok(Some(found.who()));
        }
        if let Some((_, term)) = self.in_doubt.iter().find(|(number, _)| *number == found.renewals)
        {
            self.shared.extend(*term);
        }
        // A try that did not win yet may still arrive late; its condition names an older version
        // than the one we are about to make, so it can no longer succeed after ours has.
        self.in_doubt.clear();
        self.tag = tag;
        self.contents = found;
        Ok(None)
    }

    /// The contents with what the holder has to say now.
    fn published(&self) -> Contents {
        let progress = *self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let key_id = self.shared.key_id.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Contents { progress: progress.or(self.contents.progress), key_id, ..self.contents.clone() }
    }

    async fn give_back(mut self) -> Result<()> {
        if self.look().await?.is_some() {
            return Ok(());
        }
        let last = Contents {
            standing: Standing::Released,
            renewals: self.attempt + 1,
            renewed_time: self.shared.clock.now(),
            ..self.published()
        };
        self.store.replace_if(&self.name, last.encode()?, Some(self.tag.clone())).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::{Call, Faults, Memory, Outcome};

    const TTL: Duration = Duration::from_secs(60);

    fn clock(seed: u64) -> Clock {
        Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), seed)
    }

    fn name() -> ObjectName {
        ObjectName::new("main/lease").unwrap()
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
    async fn a_released_lease_is_taken_at_once_with_the_next_epoch() {
        let clock = clock(2);
        let memory = Memory::new(&clock);
        let lease = take(&memory, &clock, on_host("alpha", Wait::Refuse)).await.unwrap();
        let mut guard = lease.guard();
        let progress = Progress {
            timeline: TimelineId::FIRST,
            durable_end_lsn: Lsn(0x100),
            caught_up_time: Some(clock.now()),
            all_stored_time: Some(clock.now()),
        };
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
            lease.report(Progress {
                timeline: TimelineId::new(number).unwrap(),
                durable_end_lsn: Lsn(end),
                caught_up_time: None,
                all_stored_time: None,
            });
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
        let progress = Progress {
            timeline: TimelineId::FIRST,
            durable_end_lsn: Lsn(0x100),
            caught_up_time: None,
            all_stored_time: None,
        };
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
        let store: Arc<dyn Store> =
            Arc::new(crate::store::directory::Directory::new(&root, &clock));
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
}
