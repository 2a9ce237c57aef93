//! Faults on demand: which requests they hit, and what becomes of those.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// An S3 operation, as far as faults and counters tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "S3's own names")]
pub enum Op {
    PutObject,
    GetObject,
    HeadObject,
    DeleteObject,
    DeleteObjects,
    ListObjects,
    ListVersions,
    CreateMultipartUpload,
    UploadPart,
    CompleteMultipartUpload,
    AbortMultipartUpload,
    ListParts,
    ListMultipartUploads,
    Other,
}

/// One kind of trouble.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Operations it hits; empty means all.
    #[serde(default)]
    pub on: Vec<Op>,
    /// Only requests whose path contains this.
    #[serde(default)]
    pub key_contains: String,
    /// Matching requests it lets pass first.
    #[serde(default)]
    pub skip: u64,
    /// Requests it hits before it is used up; `None` means until cleared.
    #[serde(default)]
    pub times: Option<u64>,
    /// Parts per million of the matching requests that it hits; 1,000,000 by default.
    #[serde(default = "always")]
    pub chance_ppm: u32,
    /// What becomes of a request that is hit.
    pub effect: Effect,
}

fn always() -> u32 {
    1_000_000
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Effect {
    /// This error instead of doing anything.
    Error {
        /// HTTP status.
        status: u16,
        /// S3's code, such as `SlowDown`.
        code: String,
    },
    /// The work is done, and answered by this error.
    ErrorAfter {
        /// HTTP status.
        status: u16,
        /// S3's code.
        code: String,
    },
    /// `200 OK` with an error document as body, nothing done.
    ErrorIn200 {
        /// S3's code.
        code: String,
    },
    /// `200 OK` with a page for people, nothing done: a proxy whose server restarts.
    Page,
    /// The connection closes before anything is done.
    Reset,
    /// The work is done and the connection closes without an answer.
    LostReply,
    /// The connection closes after this much of the request's body.
    ResetUpload {
        /// Bytes of the body read first.
        after_bytes: u64,
    },
    /// The connection closes after this much of the answer's body.
    CutDownload {
        /// Bytes of the body sent first.
        after_bytes: u64,
    },
    /// One bit of the answer's body is flipped.
    Rot {
        /// Where.
        at_byte: u64,
    },
    /// The answer carries another ETag.
    WrongEtag,
    /// The request is served after a pause.
    Delay {
        /// How long.
        ms: u64,
    },
    /// No answer, ever.
    Hang,
    /// The work is done, and no answer comes, ever.
    HangAfter,
    /// A part of a multipart upload is taken, confirmed, and forgotten; other work is done as asked.
    LosePart,
}

impl Effect {
    /// An error of that status and code.
    #[must_use]
    pub fn error(status: u16, code: &str) -> Self {
        Self::Error { status, code: code.to_owned() }
    }

    /// `503 SlowDown`.
    #[must_use]
    pub fn slow_down() -> Self {
        Self::error(503, "SlowDown")
    }
}

impl Fault {
    /// A fault that hits every request until cleared; narrow it with the methods below.
    #[must_use]
    pub fn new(effect: Effect) -> Self {
        Self {
            on: Vec::new(),
            key_contains: String::new(),
            skip: 0,
            times: None,
            chance_ppm: always(),
            effect,
        }
    }

    /// Only this operation (may be called for several).
    #[must_use]
    pub fn on(mut self, op: Op) -> Self {
        self.on.push(op);
        self
    }

    /// Only paths that contain this.
    #[must_use]
    pub fn key(mut self, part: &str) -> Self {
        part.clone_into(&mut self.key_contains);
        self
    }

    /// Lets that many matching requests pass first.
    #[must_use]
    pub fn skip(mut self, skip: u64) -> Self {
        self.skip = skip;
        self
    }

    /// Only that many requests.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.times = Some(times);
        self
    }

    /// Only so many of a million.
    #[must_use]
    pub fn chance_ppm(mut self, chance_ppm: u32) -> Self {
        self.chance_ppm = chance_ppm;
        self
    }

    fn matches(&self, op: Op, path: &str) -> bool {
        (self.on.is_empty() || self.on.contains(&op)) && path.contains(&self.key_contains)
    }
}

/// The faults in force.
#[derive(Debug)]
pub struct Faults(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    faults: Vec<FaultState>,
    last_id: u64,
    dice: u64,
}

/// A fault and how often it was met.
#[derive(Clone, Debug, Serialize)]
pub struct FaultState {
    /// Number to tell it by.
    pub id: u64,
    /// The fault.
    pub fault: Fault,
    /// Requests that matched it.
    pub met: u64,
    /// Requests that it hit.
    pub hit: u64,
}

impl Default for Faults {
    fn default() -> Self {
        Self(Mutex::new(Inner { faults: Vec::new(), last_id: 0, dice: 0x5eed }))
    }
}

impl Faults {
    /// Adds a fault and returns the number to tell it by. The first one added that matches a request
    /// and is not used up decides what becomes of it.
    pub fn add(&self, fault: Fault) -> u64 {
        let mut inner = self.lock();
        inner.last_id += 1;
        let id = inner.last_id;
        inner.faults.push(FaultState { id, fault, met: 0, hit: 0 });
        id
    }

    /// Removes all faults.
    pub fn clear(&self) {
        self.lock().faults.clear();
    }

    /// Removes one fault.
    pub fn remove(&self, id: u64) {
        self.lock().faults.retain(|state| state.id != id);
    }

    /// Seeds the dice of faults that hit by chance.
    pub fn seed(&self, seed: u64) {
        self.lock().dice = seed;
    }

    /// All faults and how often they were met.
    #[must_use]
    pub fn all(&self) -> Vec<FaultState> {
        self.lock().faults.clone()
    }

    /// How often a fault has hit.
    #[must_use]
    pub fn hits(&self, id: u64) -> u64 {
        self.lock().faults.iter().find(|state| state.id == id).map_or(0, |state| state.hit)
    }

    /// What becomes of this request, if it is hit.
    pub(crate) fn draw(&self, op: Op, path: &str) -> Option<Effect> {
        let mut inner = self.lock();
        let Inner { faults, dice, .. } = &mut *inner;
        for state in faults {
            let used_up = state.fault.times.is_some_and(|times| state.hit >= times);
            if used_up || !state.fault.matches(op, path) {
                continue;
            }
            state.met += 1;
            if state.met <= state.fault.skip || throw(dice) >= state.fault.chance_ppm {
                continue;
            }
            state.hit += 1;
            return Some(state.fault.effect.clone());
        }
        None
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number below a million; SplitMix64.
fn throw(state: &mut u64) -> u32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    u32::try_from((z ^ (z >> 31)) % 1_000_000).unwrap_or(0)
}
