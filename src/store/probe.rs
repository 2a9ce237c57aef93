//! Finds out what a store really does with conditions, ranges and listings, through the trait alone.
//!
//! Some S3 servers answer 200 to a condition and ignore it, some let several of many rivals win, so
//! nothing is believed here that was not seen.

use std::ops::Range;
use std::slice;

use bytes::Bytes;
use futures::future::try_join_all;

use super::{Capabilities, ObjectName, PutOutcome, Replace, Store};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};

/// Folder of the objects that a probe writes and deletes.
pub(super) const FOLDER: &str = "tidemark-probe";

/// Rivals for one name: enough for a check-then-write race to show.
const RIVALS: usize = 8;

/// Tries everything that can be tried through the trait; what only a driver can find out is left
/// `None` for it to fill in.
pub(super) async fn probe(store: &dyn Store, clock: &Clock) -> Result<Capabilities> {
    let folder = folder(clock)?;
    let names = Names::below(&folder)?;
    let (found, delete) = tidy_up(store, &names.all(), try_all(store, &folder, &names)).await?;
    Ok(Capabilities { delete, ..found })
}

/// Tries the replacement alone.
pub(super) async fn probe_replace(store: &dyn Store, clock: &Clock) -> Result<bool> {
    let name = ObjectName::new(format!("{}/lease", folder(clock)?))?;
    Ok(tidy_up(store, slice::from_ref(&name), replace(store, &name)).await?.0)
}

fn folder(clock: &Clock) -> Result<String> {
    Ok(format!("{FOLDER}/{:032x}", u128::from_le_bytes(clock.random::<16>()?)))
}

/// What `trial` found, and whether what it wrote may be deleted, which is done.
async fn tidy_up<T>(
    store: &dyn Store,
    names: &[ObjectName],
    trial: impl Future<Output = Result<T>>,
) -> Result<(T, bool)> {
    let found = trial.await;
    let delete = match store.delete(names).await {
        Ok(()) => true,
        Err(error) if error.kind() == Kind::Denied => false,
        Err(error) => return Err(found.err().unwrap_or(error)),
    };
    Ok((found?, delete))
}

struct Names {
    put: ObjectName,
    parts: ObjectName,
    lease: ObjectName,
}

impl Names {
    fn below(folder: &str) -> Result<Self> {
        Ok(Self {
            put: ObjectName::new(format!("{folder}/put"))?,
            parts: ObjectName::new(format!("{folder}/parts"))?,
            lease: ObjectName::new(format!("{folder}/lease"))?,
        })
    }

    fn all(&self) -> [ObjectName; 3] {
        [self.put.clone(), self.parts.clone(), self.lease.clone()]
    }
}

async fn try_all(store: &dyn Store, folder: &str, names: &Names) -> Result<Capabilities> {
    let conditional_put = put(store, &names.put).await?;
    let conditional_complete = complete(store, &names.parts).await?;
    let conditional_replace = replace(store, &names.lease).await?;
    let ranged_get = store.get(&names.put, Some(RANGE)).await?.as_ref() == RANGE_TEXT.as_bytes();
    let listed = store.list_all(&format!("{folder}/")).await?;
    let listed: Vec<&ObjectName> = listed.iter().map(|object| &object.name).collect();
    Ok(Capabilities {
        conditional_put,
        conditional_complete,
        conditional_replace,
        wrong_checksum_refused: None,
        ranged_get,
        consistent_list: listed == [&names.lease, &names.parts, &names.put],
        delete: false,
        versioning: None,
        object_lock: None,
        clock_skew: None,
    })
}

/// Begins every probe object; rivals differ in the byte after it.
const BODY: &str = "tidemark probe, safe to delete ";

/// A piece of [`BODY`] and where it is.
const RANGE: Range<u64> = 9..14;
const RANGE_TEXT: &str = "probe";

fn body(rival: usize) -> Bytes {
    Bytes::from(format!("{BODY}{rival}"))
}

/// Whether exactly one of several rivals, and nobody after it, gets a name.
async fn put(store: &dyn Store, name: &ObjectName) -> Result<bool> {
    let rivals = (0..RIVALS).map(|rival| store.put_if_absent(name, body(rival)));
    let outcomes = try_join_all(rivals).await?;
    let later = store.put_if_absent(name, body(RIVALS)).await?;
    Ok(one_winner(&outcomes) && later == PutOutcome::AlreadyThere)
}

/// The same for uploads in parts: two begun before either is completed.
async fn complete(store: &dyn Store, name: &ObjectName) -> Result<bool> {
    let (first, second) =
        futures::try_join!(store.begin_multipart(name), store.begin_multipart(name))?;
    futures::try_join!(first.put_part(1, body(1)), second.put_part(1, body(2)))?;
    let outcomes = [first.complete().await?, second.complete().await?];
    let kept = store.get(name, None).await?;
    Ok(outcomes == [PutOutcome::Created, PutOutcome::AlreadyThere] && kept == body(1))
}

fn one_winner(outcomes: &[PutOutcome]) -> bool {
    outcomes.iter().filter(|outcome| **outcome == PutOutcome::Created).count() == 1
}

/// Whether a replacement happens when it should and does not when it should not.
async fn replace(store: &dyn Store, name: &ObjectName) -> Result<bool> {
    let Replace::Done(first) = store.replace_if(name, body(1), None).await? else {
        return Ok(false);
    };
    if store.replace_if(name, body(2), None).await? != Replace::Lost {
        return Ok(false);
    }
    let Replace::Done(_) = store.replace_if(name, body(3), Some(first.clone())).await? else {
        return Ok(false);
    };
    if store.replace_if(name, body(4), Some(first)).await? != Replace::Lost {
        return Ok(false);
    }
    let (kept, tag) = store.read_versioned(name).await?.ok_or_else(|| {
        Error::new(Kind::Corrupt, format!("unable to read '{name}' just written: it is missing"))
    })?;
    let rivals =
        (5..5 + RIVALS).map(|rival| store.replace_if(name, body(rival), Some(tag.clone())));
    let outcomes = try_join_all(rivals).await?;
    let won = outcomes.iter().filter(|outcome| matches!(outcome, Replace::Done(_))).count();
    Ok(kept == body(3) && won == 1)
}
