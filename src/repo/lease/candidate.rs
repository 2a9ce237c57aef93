//! Taking a lease: looking at the object until it may be replaced.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::SignedDuration;

use super::contents::{Contents, LEASE_FORMAT, Standing};
use super::guard::{Term, lost};
use super::{LeaseOptions, TTL_MAX, Tenure, Wait, tokens_held};
use crate::clock::{Clock, Instant};
use crate::error::{Error, Kind, Result};
use crate::repo::process::Life;
use crate::store::{ObjectName, Replace, Store, VersionTag};

/// Tries of one version whose times are told apart; a later one that wins counts from the first.
const TRIES_MAX: usize = 64;

/// Who wants the lease.
#[derive(Clone)]
pub(super) struct Candidate {
    pub(super) store: Arc<dyn Store>,
    pub(super) name: ObjectName,
    pub(super) clock: Clock,
    pub(super) options: LeaseOptions,
    pub(super) token: String,
    /// Token of the acquisition that this one must follow directly.
    pub(super) follows: Option<String>,
}

pub(super) struct Taken {
    pub(super) contents: Contents,
    pub(super) tag: VersionTag,
    pub(super) term: Term,
}

/// What the one who wants the lease has seen so far.
pub(super) struct Look {
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
    pub(super) fn begin(clock: &Clock) -> Self {
        Self { begun: clock.instant(), observed: None, tried: Tried::default(), told: false }
    }
}

impl Candidate {
    pub(super) async fn take(&self) -> Result<Taken> {
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
    pub(super) async fn step(&self, look: &mut Look) -> Result<Option<Taken>> {
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

    pub(super) fn look_interval(&self) -> Duration {
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
            clock_doubted_since: before
                .and_then(|before| before.clock_doubted_since(term.sent_time)),
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
