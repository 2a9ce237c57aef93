//! Holding a lease: renewing it until it is lost or given back.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::contents::{Contents, Standing};
use super::guard::{Shared, Term};
use crate::error::{Error, Result};
use crate::store::{ObjectName, Replace, Store, VersionTag};

/// The renewing side of a lease.
pub(super) struct Holder {
    pub(super) store: Arc<dyn Store>,
    pub(super) name: ObjectName,
    pub(super) shared: Arc<Shared>,
    pub(super) contents: Contents,
    pub(super) tag: VersionTag,
    pub(super) ttl: Duration,
    /// Number of the last renewal that was tried.
    pub(super) attempt: u64,
    /// Renewals whose answer is not known: their number and when they were sent. Bounded by the
    /// tries that fit into one term.
    pub(super) in_doubt: Vec<(u64, Term)>,
    /// On a store without conditions: look before each renewal.
    pub(super) look_first: bool,
}

enum Renewal {
    Done,
    Again,
    Fenced(String),
}

impl Holder {
    pub(super) async fn keep(mut self, stop: CancellationToken) -> Self {
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
        let progress = progress.map(|now| now.with_times_of(self.contents.progress));
        let key_id = self.shared.key_id.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Contents { progress: progress.or(self.contents.progress), key_id, ..self.contents.clone() }
    }

    pub(super) async fn give_back(mut self) -> Result<()> {
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
