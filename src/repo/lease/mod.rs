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

mod candidate;
mod contents;
mod guard;
mod holder;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use candidate::{Candidate, Look, Taken};
use contents::Contents;
pub use contents::{LeaseInfo, Progress};
use guard::Shared;
pub use guard::{Guard, LeaseState};
use holder::Holder;

use super::Repository;
use super::names::Object;
use super::process::ProcessIdentity;
use crate::clock::Clock;
use crate::error::{Context, Error, Kind, Result};
use crate::store::{ObjectName, Store};

/// Shorter than this, a slow store would lose the lease in ordinary operation.
const TTL_MIN: Duration = Duration::from_secs(5);
/// Longer than this, nobody would wait for a take-over.
const TTL_MAX: Duration = Duration::from_secs(3600);
/// Time to live by default: at a third of it, one small request a minute.
pub const TTL_DEFAULT: Duration = Duration::from_secs(180);
/// How long a clock is doubted by which nobody was at work for as long: it may not be set yet.
pub const CLOCK_DOUBT: Duration = Duration::from_secs(24 * 3600);
/// Longest pause between two tries to take a lost lease again: the longest that a store which came back
/// waits for us.
const RETAKE_PAUSE_MAX: Duration = Duration::from_secs(5);
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

/// Who holds, or last held, the lease; `None` when nobody ever took it.
///
/// # Errors
/// Those of the store, and `corrupt` when the object is no lease.
pub async fn read(store: &dyn Store, name: &ObjectName) -> Result<Option<LeaseInfo>> {
    let found = store.read_versioned(name).await.context(|| "unable to read the lease")?;
    found.map(|(body, _)| Ok(Contents::decode(name, &body)?.info())).transpose()
}

/// The right to be the one writer of a cluster; renews itself until dropped, released or lost.
pub struct Lease {
    holding: Mutex<Holding>,
    /// As whom and where it is taken again.
    candidate: Candidate,
    look_first: bool,
    clock_doubted_since: Option<Timestamp>,
}

/// One acquisition and the task that renews it.
struct Holding {
    shared: Arc<Shared>,
    stop: CancellationToken,
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
        let stop = CancellationToken::new();
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
        let clock_doubted_since = taken.contents.clock_doubted_since;
        let holding = Mutex::new(Holding::begin(&candidate, taken, look_first));
        Self { holding, candidate, look_first, clock_doubted_since }
    }

    /// Since when this machine's clock is doubted: nobody had been at work for more than [`CLOCK_DOUBT`] by it when
    /// this lease, or one before it, was taken less than that ago.
    #[must_use]
    pub fn clock_doubted_since(&self) -> Option<Timestamp> {
        self.clock_doubted_since
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
