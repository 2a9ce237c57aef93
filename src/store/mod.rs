//! Objects: put once, put if absent, multipart, get range, list, delete, replace if unchanged.
//!
//! A [`Store`] keeps objects by name below one root. The promises below are the same for every driver
//! and one contract suite (`tests/it/store_contract.rs`) holds each of them to it.
//!
//! # Invariants
//! - **Written once.** [`Store::put_if_absent`] and [`Multipart::complete`] publish a whole object or
//!   nothing, and never replace one. Of any number of rivals for a name exactly one is told
//!   [`PutOutcome::Created`]. (An S3 server may accept the condition and ignore it;
//!   [`Store::probe`] finds that out.)
//! - **Seen when answered.** After a successful put every later get, head and list anywhere sees it.
//! - **The only mutable object** is one written through [`Store::replace_if`] alone.
//! - **Bounded.** A page of a listing, a get, a retry and the time it takes have maxima.
//!
//! # Durability
//! When a put, a complete, a replace or a delete returns `Ok`, it survives a crash of this machine
//! (directory: file and every folder on the way are fsynced; S3: the answer was received and checked).
//! An error that [is transient](crate::error::Error::is_transient) leaves open whether it happened.
//!
//! What a get, a head or a list shows may survive less: a put in a directory is seen before its folder
//! is fsynced, and whoever was at it may have been killed in between. Who builds on an object that it
//! finds, and did not put, calls [`Store::make_durable`] after it has seen it.
//!
//! # Retries
//! A driver retries by itself what may pass (throttling, time-outs, broken connections), within
//! [`StoreOptions`]; a caller that gets `unavailable` has seen all of that fail. Before it retries a
//! put it learns whether the last try won, so its own object is never reported as a rival's within a
//! call.
//!
//! # Cancel safety
//! Dropping a future of a read stops it. Dropping that of a write leaves open whether it happened;
//! what it leaves behind is never half an object, at most a temporary one for
//! [`Store::abort_stale_multiparts`].

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::clock::Clock;
use crate::error::{Error, Kind, Result, mask_user_info};

pub mod directory;
pub(crate) mod fuzz;
pub mod memory;
mod name;
mod options;
mod probe;
mod reading;
mod requests;
pub mod s3;

pub use name::{NAME_BYTES_MAX, ObjectName};
pub use options::{
    Addressing, BODY_BYTES_PER_SECOND_MIN, Checksum, ServerSideEncryption, StaticCredentials,
    StoreOptions,
};
pub use reading::Reading;
pub use requests::{Latencies, RequestCounts, Requests};

/// Longest range one [`Store::get`] may ask for, and longest object it returns whole: the largest WAL
/// segment PostgreSQL knows and room for our framing.
pub const GET_BYTES_MAX: u64 = (1 << 30) + (16 << 20);

/// Greatest number of a part, S3's own limit.
pub const PART_NUMBER_MAX: u32 = 10_000;

/// What to do with credentials found in a URL.
const CREDENTIALS_HINT: &str = "Credentials belong into the environment or a profile.";

/// Smallest part but the last that every S3 server takes.
pub const PART_BYTES_MIN: u64 = 5 << 20;

/// Objects by name below one root; see the module for what every driver promises.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// The place as an operator writes it, without secrets: `s3://bucket/prefix` or a path.
    fn describe(&self) -> String;

    /// Puts `body` under `name` unless an object is there already, which is left as it is.
    /// A lost answer is resolved by looking whether it was our try that won.
    async fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome>;

    /// Begins an object that arrives in parts; nothing is visible before [`Multipart::complete`].
    async fn begin_multipart(&self, name: &ObjectName) -> Result<Box<dyn Multipart>>;

    /// The bytes of an object, or exactly those of `range`. `not found` when there is no such object,
    /// `corrupt` when it ends before the range does.
    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes>;

    /// Begins to read `range` of an object from front to back: by one request where requests cost
    /// something, and holding no more of it than is asked for at a time. Errors as [`Store::get`], at
    /// the latest with the piece they concern.
    async fn read<'a>(
        &'a self,
        name: &'a ObjectName,
        range: Range<u64>,
    ) -> Result<Box<dyn Reading + 'a>> {
        asked_bytes(name, &range)?;
        Ok(Box::new(reading::Piecewise { store: self, name, left: range }))
    }

    /// Size and time of an object, `None` when it does not exist.
    async fn head(&self, name: &ObjectName) -> Result<Option<ObjectInfo>>;

    /// One page of the objects whose name begins with `prefix` (any text, a folder by a slash at its
    /// end, empty for all), in ascending byte order of names, those after `after` only. No name of
    /// that order is left out before the last one of the page, and [`ListPage::next_after`] says
    /// whether there are others behind it. A place that lists otherwise is refused with an error: it
    /// is never taken for an end.
    async fn list(&self, prefix: &str, after: Option<&ObjectName>) -> Result<ListPage>;

    /// Every page of [`Store::list`] in one vector: for places whose number of objects is bounded by
    /// retention, such as the catalog of one cluster.
    async fn list_all(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        let mut all: Vec<ObjectInfo> = Vec::new();
        let mut after = None;
        loop {
            let page = self.list(prefix, after.as_ref()).await?;
            after = page.next_after()?;
            all.extend(page.objects);
            if after.is_none() {
                return Ok(all);
            }
        }
    }

    /// Returns when all objects in `folder` (with or without the slash at its end, empty for the whole
    /// root) that anybody saw before this call survive a crash, by whomever they were put. Where nothing
    /// is seen before it is durable there is nothing to do.
    async fn make_durable(&self, _folder: &str) -> Result<()> {
        Ok(())
    }

    /// Deletes the objects; one that does not exist is fine. After an error some may be gone.
    async fn delete(&self, names: &[ObjectName]) -> Result<()>;

    /// The small mutable object `name` with the tag of what was read, `None` when there is none.
    async fn read_versioned(&self, name: &ObjectName) -> Result<Option<(Bytes, VersionTag)>>;

    /// Replaces `name` by `body` if it is still as `expected` says (`None`: if it does not exist).
    /// Bodies must never repeat: a tag may be a hash of the content, and a lost answer is resolved by
    /// comparing it.
    async fn replace_if(
        &self,
        name: &ObjectName,
        body: Bytes,
        expected: Option<VersionTag>,
    ) -> Result<Replace>;

    /// Finds out by trying what the place really does; writes and deletes a few tiny objects.
    async fn probe(&self) -> Result<Capabilities>;

    /// The one promise that a writer's life hangs on, [`Capabilities::conditional_replace`], found out
    /// as [`Store::probe`] does and with a third of its requests: a writer asks at each start.
    async fn probe_replace(&self) -> Result<bool>;

    /// What time it is at the store, to about a second, asked without leaving anything there; `None`
    /// where it does not say.
    async fn time(&self) -> Result<Option<Timestamp>>;

    /// Removes what abandoned uploads in `folder` (with or without the slash at its end, empty for
    /// the whole root) left behind, if they are known to have begun `older_than` ago or longer; says
    /// how many. One of unknown age stays, and so does whatever lies outside of the root: it may be
    /// the upload of a living writer, and what it has sent so far would be lost.
    async fn abort_stale_multiparts(&self, folder: &str, older_than: Duration) -> Result<u64>;

    /// Requests made so far, by kind.
    fn requests(&self) -> RequestCounts;

    /// How long puts took so far.
    fn latencies(&self) -> &Latencies;
}

/// An object in the making. Dropping it leaves its parts for [`Store::abort_stale_multiparts`].
#[async_trait]
pub trait Multipart: Send + Sync {
    /// Puts part `number`, counted from 1, up to [`PART_NUMBER_MAX`]. Parts may have any sizes (all
    /// but the last at least [`PART_BYTES_MIN`]), come in any order and at the same time. Putting a
    /// part again after an error replaces it.
    async fn put_part(&self, number: u32, body: Bytes) -> Result<()>;

    /// Publishes the parts, joined in the order of their numbers, unless an object of that name is
    /// there already. The numbers must be 1 to the count of parts. When it fails for good the parts
    /// are discarded as by [`Multipart::abort`], as far as the store can be reached. After an error
    /// that is transient it may be called again, and then knows whether the call before has won.
    async fn complete(&self) -> Result<PutOutcome>;

    /// Discards the parts.
    async fn abort(&self) -> Result<()>;
}

/// Who won a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// This call made the object.
    Created,
    /// An object of that name was there and is unchanged.
    AlreadyThere,
}

/// What a [`Store::replace_if`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Replace {
    /// The object holds our bytes, known by this tag.
    Done(VersionTag),
    /// The object was not as expected and is unchanged.
    Lost,
}

/// Which content of a mutable object was seen; only equality means anything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VersionTag(String);

impl VersionTag {
    /// A tag as the driver spells it.
    #[must_use]
    pub fn new(tag: impl Into<String>) -> Self {
        Self(tag.into())
    }

    /// The driver's spelling.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a listing says about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its name relative to the root.
    pub name: ObjectName,
    /// Its size.
    pub size_bytes: u64,
    /// When it was made, by the store's clock; `None` when the store does not say. Then nobody knows
    /// how old it is, and nobody may take it for old enough to be deleted.
    pub modified: Option<Timestamp>,
}

/// A bounded piece of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListPage {
    /// In ascending byte order of names; empty only on the last page.
    pub objects: Vec<ObjectInfo>,
    /// Whether there may be names after the last of these.
    pub more: bool,
}

impl ListPage {
    /// The name after which the next page begins, `None` when this is the last one.
    ///
    /// # Errors
    /// `bug` when the page says that there is more and names nothing: to stop there would hide
    /// objects, to ask again would never end.
    pub fn next_after(&self) -> Result<Option<ObjectName>> {
        match self.objects.last() {
            _ if !self.more => Ok(None),
            Some(last) => Ok(Some(last.name.clone())),
            None => Err(Error::new(
                Kind::Bug,
                "unable to go on with a listing: the store says that there is more and names nothing",
            )),
        }
    }
}

/// What a place really does, found out by trying. `None` where the driver has no such thing or the
/// answer could not be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// Of rivals for one name exactly one wins, the others are refused.
    pub conditional_put: bool,
    /// The same for an object uploaded in parts.
    pub conditional_complete: bool,
    /// A replacement is refused when the object changed meanwhile, and done when it did not.
    pub conditional_replace: bool,
    /// An upload whose checksum is wrong is refused.
    pub wrong_checksum_refused: Option<bool>,
    /// A range is answered with exactly its bytes.
    pub ranged_get: bool,
    /// What was put is in the listing at once, in order.
    pub consistent_list: bool,
    /// Objects can be deleted with our rights.
    pub delete: bool,
    /// Old versions are kept by the store.
    pub versioning: Option<bool>,
    /// The bucket has Object Lock switched on.
    pub object_lock: Option<bool>,
    /// The store's clock minus ours.
    pub clock_skew: Option<SignedDuration>,
}

/// Opens the place that `url` names: `s3://bucket/prefix`, `file:///folder`, an absolute or relative
/// path, or `memory:` (tests). Nothing is asked of the place yet.
///
/// # Errors
/// `config` when the URL or an option makes no sense.
pub fn open(url: &str, options: &StoreOptions, clock: &Clock) -> Result<Arc<dyn Store>> {
    match Place::parse(url)? {
        Place::S3 { bucket, prefix } => {
            Ok(Arc::new(s3::Bucket::new(&bucket, &prefix, options, clock)?))
        }
        Place::Directory(root) => Ok(Arc::new(directory::Directory::new(root, clock))),
        Place::Memory => Ok(Arc::new(memory::Memory::new(clock))),
    }
}

/// What a URL names.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    S3 { bucket: String, prefix: String },
    Directory(PathBuf),
    Memory,
}

impl Place {
    fn parse(url: &str) -> Result<Self> {
        let shown = mask_user_info(url);
        let refused = |flaw: String| {
            Error::new(Kind::Config, format!("unable to use '{shown}' as a repository: {flaw}"))
                .hint("Write s3://BUCKET/PREFIX, file:///FOLDER or the path of a folder.")
        };
        if url == "memory:" {
            return Ok(Self::Memory);
        }
        // Without it below no part of the URL can be a secret, and all of them may be shown.
        if url.contains("://") && shown != url {
            return Err(Error::new(
                Kind::Config,
                format!("unable to use '{shown}' as a repository: it has a user name in it"),
            )
            .hint(CREDENTIALS_HINT));
        }
        if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let prefix = prefix.trim_end_matches('/');
            if bucket.is_empty() || bucket.contains(|c: char| "@?#%:".contains(c)) {
                return Err(refused(format!("'{bucket}' is not the name of a bucket")));
            }
            if !prefix.is_empty() {
                ObjectName::new(prefix).map_err(|error| refused(error.message().to_owned()))?;
            }
            return Ok(Self::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() });
        }
        let path = match url.split_once("://") {
            Some(("file", path)) if path.starts_with('/') => path,
            Some(("file", _)) => return Err(refused("a file URL needs an absolute path".into())),
            Some((scheme, _)) => return Err(refused(format!("unknown scheme '{scheme}'"))),
            None => url,
        };
        if path.is_empty() {
            return Err(refused("it is empty".into()));
        }
        Ok(Self::Directory(PathBuf::from(path)))
    }
}

/// What the names of all objects in `folder` begin with.
fn folder_prefix(folder: &str) -> String {
    match folder.trim_end_matches('/') {
        "" => String::new(),
        folder => format!("{folder}/"),
    }
}

/// Whether what began at `begun` is known to have an age of `least` at `now`. Younger than nothing is
/// what two clocks make of something just begun.
fn is_stale(begun: Timestamp, now: Timestamp, least: Duration) -> bool {
    Duration::try_from(now.duration_since(begun)).unwrap_or_default() >= least
}

/// The part of an object of `size_bytes` that `range` asks for, as indexes.
fn checked_range(
    name: &ObjectName,
    range: Option<Range<u64>>,
    size_bytes: u64,
) -> Result<Range<usize>> {
    let range = range.unwrap_or(0..size_bytes);
    asked_bytes(name, &range)?;
    if range.end > size_bytes {
        return Err(too_short(name, &range, size_bytes));
    }
    match (usize::try_from(range.start), usize::try_from(range.end)) {
        (Ok(start), Ok(end)) => Ok(start..end),
        _ => Err(too_much(name, range.end - range.start)),
    }
}

/// How many bytes `range` asks for.
fn asked_bytes(name: &ObjectName, range: &Range<u64>) -> Result<u64> {
    let bytes = range.end.checked_sub(range.start).ok_or_else(|| {
        Error::new(Kind::Bug, format!("range {}..{} of object '{name}'", range.start, range.end))
    })?;
    if bytes > GET_BYTES_MAX { Err(too_much(name, bytes)) } else { Ok(bytes) }
}

fn too_much(name: &ObjectName, bytes: u64) -> Error {
    Error::new(
        Kind::Corrupt,
        format!("unable to read {bytes} bytes of object '{name}' at once: at most {GET_BYTES_MAX}"),
    )
}

fn too_short(name: &ObjectName, range: &Range<u64>, size_bytes: u64) -> Error {
    Error::new(
        Kind::Corrupt,
        format!(
            "unable to read bytes {}..{} of object '{name}': it has only {size_bytes}",
            range.start, range.end
        ),
    )
}

/// Checks that the parts of an upload are numbered 1 to their count.
fn joined(name: &ObjectName, numbers: impl Iterator<Item = u32>) -> Result<()> {
    let mut count = 0;
    for number in numbers {
        count += 1;
        if number != count {
            return Err(Error::new(
                Kind::Bug,
                format!("unable to complete the upload of '{name}': part {count} is missing"),
            ));
        }
    }
    if count == 0 {
        return Err(Error::new(Kind::Bug, format!("unable to upload '{name}' without parts")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_places() {
        let s3 = |bucket: &str, prefix: &str| Place::S3 {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
        };
        assert_eq!(Place::parse("s3://b").unwrap(), s3("b", ""));
        assert_eq!(Place::parse("s3://b.c-d/").unwrap(), s3("b.c-d", ""));
        assert_eq!(Place::parse("s3://b/p/q/").unwrap(), s3("b", "p/q"));
        for url in ["file:///var/b", "/var/b"] {
            assert_eq!(Place::parse(url).unwrap(), Place::Directory(PathBuf::from("/var/b")));
        }
        assert_eq!(Place::parse("b/c").unwrap(), Place::Directory(PathBuf::from("b/c")));
        for url in
            ["s3://AKIA:hush@b/p", "s3://AKIA:hu/hush@b/p", "k:hush@http://h", "file://k:hush@b"]
        {
            let error = Place::parse(url).unwrap_err();
            assert_eq!(error.kind(), Kind::Config, "{url}");
            assert!(!format!("{error:?}").contains("hush"), "{error:?}");
            assert_eq!(error.hint_text(), Some(CREDENTIALS_HINT));
        }
        for url in ["", "s3://", "s3:///p", "s3://k:s@b/p", "s3://b//p", "gs://b", "file://b"] {
            let error = Place::parse(url).unwrap_err();
            assert_eq!(error.kind(), Kind::Config, "{url}");
            assert!(error.hint_text().is_some());
        }
    }

    #[test]
    fn a_page_that_promises_more_and_names_nothing_is_not_the_last() {
        let object =
            ObjectInfo { name: ObjectName::new("a").unwrap(), size_bytes: 1, modified: None };
        let page = |objects: &[ObjectInfo], more| ListPage { objects: objects.to_vec(), more };
        let named = [object.clone()];
        assert_eq!(page(&named, true).next_after().unwrap(), Some(object.name));
        assert_eq!(page(&named, false).next_after().unwrap(), None);
        assert_eq!(page(&[], false).next_after().unwrap(), None);
        assert_eq!(page(&[], true).next_after().unwrap_err().kind(), Kind::Bug);
    }

    #[test]
    fn ranges_beyond_the_end_are_refused_not_shortened() {
        let name = ObjectName::new("a").unwrap();
        assert_eq!(checked_range(&name, None, 5).unwrap(), 0..5);
        assert_eq!(checked_range(&name, Some(2..5), 5).unwrap(), 2..5);
        assert_eq!(checked_range(&name, Some(2..6), 5).unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(
            checked_range(&name, None, GET_BYTES_MAX + 1).unwrap_err().kind(),
            Kind::Corrupt
        );
    }
}
