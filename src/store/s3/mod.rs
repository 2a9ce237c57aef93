//! A store in an S3 bucket, AWS's or anybody's.
//!
//! # Shape
//! An object is a key: the root's prefix, a slash, the object's name. Bodies are sent from memory in
//! one piece, so that signature and checksum travel as headers: a streamed body would make the SDK
//! switch to aws-chunked encoding, which many servers get wrong. Over TLS the body is not signed (that
//! would cost more CPU than encrypting it) but carries a CRC that the server verifies.
//!
//! # Invariants
//! - Puts and completions carry `If-None-Match: *`, the lease `If-Match`; each upload carries an id of
//!   its own as metadata, by which it is recognised after a lost answer.
//! - One checksum algorithm from the begin of an upload to its completion.
//! - No listing is believed complete that does not come in order and to a told end (`listing`).
//! - Nothing is believed done before the server said so: an error in the body of a 200 is an error, an
//!   object or a part of which the answer tells no tag is not stored (a proxy that answers in the
//!   server's place says 200, too), and a completed upload is looked at once more for its size.
//!
//! # Durability
//! S3 answers a put or a completion when the object is durable in its sense; there is nothing to add.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use tokio::sync::OnceCell;

use super::{
    Capabilities, GET_BYTES_MAX, Latencies, ListPage, Multipart, ObjectInfo, ObjectName,
    PutOutcome, Reading, Replace, RequestCounts, Requests, Store, StoreOptions, VersionTag,
    asked_bytes, probe, too_short,
};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};

mod attempt;
mod client;
mod failure;
mod inspect;
mod listing;
mod multipart;
mod reading;
mod stale;
mod upload;

use attempt::{Call, Gate, Tries};
use client::Client;
use failure::Failure;
use reading::{Begun, broke_off};

/// Names of one DeleteObjects request, S3's own limit.
const DELETE_NAMES_MAX: usize = 1000;

/// Single deletes at a time, where the server knows no DeleteObjects.
const DELETES_MAX: usize = 16;

/// Longest mutable object.
const LEASE_BYTES_MAX: u64 = 1 << 20;

/// Room made for a body before its first byte has come.
const BODY_RESERVE_BYTES_MAX: u64 = 16 << 20;

/// Objects below a prefix of a bucket.
pub struct Bucket(Arc<S3>);

/// What the store and its uploads share.
struct S3 {
    bucket: String,
    /// Empty, or ending with a slash.
    prefix: String,
    options: StoreOptions,
    clock: Clock,
    requests: Requests,
    latencies: Latencies,
    client: OnceCell<Client>,
    gate: Gate,
    /// With the checksum `auto`: the server refused it once.
    checksum_refused: AtomicBool,
    /// The server knows no DeleteObjects.
    bulk_delete_refused: AtomicBool,
    /// The server wants the tag of a condition without its quotes.
    bare_tags: AtomicBool,
}

impl Bucket {
    /// The store below `prefix` of `bucket`. The client is set up by the first request.
    ///
    /// # Errors
    /// `config` when the endpoint is not a URL of http or https.
    pub fn new(bucket: &str, prefix: &str, options: &StoreOptions, clock: &Clock) -> Result<Self> {
        if let Some(endpoint) = &options.endpoint {
            client::check_endpoint(endpoint)?;
        }
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Ok(Self(Arc::new(S3 {
            bucket: bucket.to_owned(),
            prefix,
            options: options.clone(),
            clock: clock.clone(),
            requests: Requests::default(),
            latencies: Latencies::default(),
            client: OnceCell::new(),
            gate: Gate::default(),
            checksum_refused: AtomicBool::new(false),
            bulk_delete_refused: AtomicBool::new(false),
            bare_tags: AtomicBool::new(false),
        })))
    }
}

impl S3 {
    async fn client(&self) -> Result<&Client> {
        self.client.get_or_try_init(|| Client::connect(&self.options, &self.clock)).await
    }

    fn key(&self, name: &ObjectName) -> String {
        format!("{}{name}", self.prefix)
    }

    fn describe(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.prefix.trim_end_matches('/'))
    }

    /// "unable to VERB object 'name' in s3://bucket/prefix".
    fn unable(&self, verb: &str, name: &ObjectName) -> String {
        format!("unable to {verb} object '{name}' in {}", self.describe())
    }

    fn missing(&self, name: &ObjectName) -> Error {
        Error::new(Kind::NotFound, "it does not exist").context(self.unable("read", name))
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        let expected_bytes = range.as_ref().map(|range| asked_bytes(name, range)).transpose()?;
        if expected_bytes == Some(0) {
            // HTTP has no empty range.
            return match self.head(name).await? {
                Some(_) => Ok(Bytes::new()),
                None => Err(self.missing(name)),
            };
        }
        // How long a whole object is shows with its answer only: `get_once` sees to its time then.
        let expected_bytes = expected_bytes.unwrap_or(GET_BYTES_MAX);
        let call = Call::new(&self.requests.gets).expecting(expected_bytes);
        let tried = self
            .attempt(call, |client| self.get_once(client, name, range.clone(), GET_BYTES_MAX))
            .await?;
        match tried.result {
            Ok(Got::Body(body, _)) => {
                self.requests.received_bytes.add(body.len() as u64);
                Ok(body)
            }
            Ok(Got::TooShort(size_bytes)) => {
                Err(too_short(name, &range.unwrap_or_default(), size_bytes))
            }
            Err(failure) if failure.is_missing() => Err(self.missing(name)),
            Err(failure) => Err(failure.into_error(self.unable("read", name))),
        }
    }

    /// A range, or the whole object if it has at most `bytes_max`.
    async fn get_once(
        &self,
        client: &Client,
        name: &ObjectName,
        range: Option<Range<u64>>,
        bytes_max: u64,
    ) -> std::result::Result<Got, Failure> {
        let begun = self.clock.instant();
        let (answer, bytes) = match range {
            Some(range) => {
                let bytes = range.end - range.start;
                match self.begin_once(client, name, range).await? {
                    Begun::Answer(answer) => (*answer, bytes),
                    Begun::TooShort(size_bytes) => return Ok(Got::TooShort(size_bytes)),
                }
            }
            None => {
                let request = client.sdk().get_object().bucket(&self.bucket).key(self.key(name));
                let answer = self.in_time(begun, 0, request.send().map_err_failure()).await?;
                let bytes = whole_bytes(&answer, bytes_max)?;
                (answer, bytes)
            }
        };
        let tag = tag_of(answer.e_tag())?;
        Ok(Got::Body(self.in_time(begun, bytes, self.body(answer, bytes)).await?, tag))
    }

    /// Receives exactly `expected_bytes`.
    async fn body(
        &self,
        answer: GetObjectOutput,
        expected_bytes: u64,
    ) -> std::result::Result<Bytes, Failure> {
        let mut stream = answer.body;
        let reserve = usize::try_from(expected_bytes.min(BODY_RESERVE_BYTES_MAX)).unwrap_or(0);
        let mut body = BytesMut::with_capacity(reserve);
        while let Some(piece) = self.piece_of(&mut stream).await? {
            if (body.len() + piece.len()) as u64 > expected_bytes {
                return Err(Failure::nonsense("the answer is longer than it said"));
            }
            body.extend_from_slice(&piece);
        }
        if (body.len() as u64) < expected_bytes {
            return Err(broke_off());
        }
        Ok(body.freeze())
    }

    /// The next piece of a body, which must come in the time that a whole try has.
    async fn piece_of(
        &self,
        stream: &mut ByteStream,
    ) -> std::result::Result<Option<Bytes>, Failure> {
        let patience = self.options.attempt_timeout;
        match tokio::time::timeout(patience, stream.next()).await {
            Err(_elapsed) => Err(Failure::timed_out(patience.as_secs())),
            Ok(None) => Ok(None),
            Ok(Some(Err(error))) => {
                Err(Failure::transport(format!("the answer broke off: {error}")))
            }
            Ok(Some(Ok(piece))) => Ok(Some(piece)),
        }
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<ObjectInfo>> {
        let call = Call::new(&self.requests.heads);
        let tried = self.attempt(call, |client| self.head_once(client, name)).await?;
        let found = tried.or_error(|| self.unable("look at", name))?;
        Ok(found.map(|found| ObjectInfo {
            name: name.clone(),
            size_bytes: found.size_bytes,
            modified: found.modified,
        }))
    }

    async fn head_once(
        &self,
        client: &Client,
        name: &ObjectName,
    ) -> std::result::Result<Option<Found>, Failure> {
        let request = client.sdk().head_object().bucket(&self.bucket).key(self.key(name));
        match request.send().await.map_err(Failure::from) {
            Ok(answer) => Ok(Some(Found {
                tag: tag_of(answer.e_tag())?,
                size_bytes: size(answer.content_length()),
                modified: timestamp(answer.last_modified()),
                upload_id: answer.metadata().and_then(|all| all.get(upload::ID_KEY).cloned()),
            })),
            // The answer to a HEAD has no body, so it cannot say by a code that it is the server's own and not
            // that of a proxy which has lost it. What is said to be missing is taken for deleted: ask again.
            Err(failure) if failure.is_missing_for_head() => {
                self.requests.gets.one();
                let get = client.sdk().get_object().bucket(&self.bucket).key(self.key(name));
                match get.range("bytes=0-0").send().await.map_err(Failure::from) {
                    Err(missing) if missing.is_missing() => Ok(None),
                    // It is there, perhaps without a byte.
                    Err(empty) if empty.is("InvalidRange", 416) => Err(failure),
                    Err(other) => Err(other),
                    Ok(_there) => Err(failure),
                }
            }
            Err(failure) => Err(failure),
        }
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<()> {
        for batch in names.chunks(DELETE_NAMES_MAX) {
            if !self.bulk_delete_refused.load(Ordering::Relaxed) {
                match self.delete_batch(batch).await? {
                    Ok(()) => continue,
                    Err(failure) if lacks_bulk_delete(&failure) => {
                        self.bulk_delete_refused.store(true, Ordering::Relaxed);
                    }
                    Err(failure) => {
                        return Err(failure.into_error(self.unable_to_delete(batch)));
                    }
                }
            }
            self.delete_singly(batch).await?;
        }
        Ok(())
    }

    fn unable_to_delete(&self, batch: &[ObjectName]) -> String {
        match batch {
            [name] => self.unable("delete", name),
            _ => format!("unable to delete {} objects in {}", batch.len(), self.describe()),
        }
    }

    async fn delete_batch(&self, batch: &[ObjectName]) -> Result<std::result::Result<(), Failure>> {
        let objects: std::result::Result<Vec<_>, _> = batch
            .iter()
            .map(|name| ObjectIdentifier::builder().key(self.key(name)).build())
            .collect();
        let delete = objects
            .and_then(|objects| Delete::builder().set_objects(Some(objects)).quiet(true).build())
            .map_err(|error| Error::new(Kind::Bug, format!("unable to build a delete: {error}")))?;
        let call = Call::new(&self.requests.deletes);
        let tried = self.attempt(call, |client| self.delete_once(client, delete.clone())).await?;
        Ok(tried.result)
    }

    async fn delete_once(
        &self,
        client: &Client,
        delete: Delete,
    ) -> std::result::Result<(), Failure> {
        let request = client.sdk().delete_objects().bucket(&self.bucket).delete(delete);
        let answer = request.send().await.map_err(Failure::from)?;
        let refused = answer.errors().iter().find(|error| error.code() != Some("NoSuchKey"));
        match refused {
            None => Ok(()),
            Some(error) => Err(Failure::listed(
                error.code().unwrap_or_default(),
                error.message().unwrap_or_default(),
            )),
        }
    }

    async fn delete_singly(&self, batch: &[ObjectName]) -> Result<()> {
        let deletes = stream::iter(batch.to_vec()).map(|name| self.delete_one(name));
        deletes.buffer_unordered(DELETES_MAX).try_collect().await
    }

    async fn delete_one(&self, name: ObjectName) -> Result<()> {
        let call = Call::new(&self.requests.deletes);
        let tried = self.attempt(call, |client| {
            let request = client.sdk().delete_object().bucket(&self.bucket).key(self.key(&name));
            request.send().map_err_failure()
        });
        match tried.await?.result {
            Ok(_) => Ok(()),
            Err(failure) if failure.is_missing() => Ok(()),
            Err(failure) => Err(failure.into_error(self.unable("delete", &name))),
        }
    }

    /// The mutable object `name` and its tag.
    async fn read_mutable(
        &self,
        name: &ObjectName,
        tries: Tries,
    ) -> Result<Option<(Bytes, VersionTag)>> {
        let call = Call { tries, ..Call::new(&self.requests.gets).expecting(LEASE_BYTES_MAX) };
        let tried =
            self.attempt(call, |client| self.get_once(client, name, None, LEASE_BYTES_MAX)).await?;
        match tried.result {
            Ok(Got::Body(body, tag)) => Ok(Some((body, tag))),
            Ok(Got::TooShort(_)) => Err(Error::new(Kind::Bug, "no range was asked for")),
            Err(failure) if failure.is_missing() => Ok(None),
            Err(failure) => Err(failure.into_error(self.unable("read", name))),
        }
    }
}

/// A body, or how long the object is that ends before the range does.
enum Got {
    Body(Bytes, VersionTag),
    TooShort(u64),
}

/// What a HEAD says.
struct Found {
    size_bytes: u64,
    modified: Option<Timestamp>,
    upload_id: Option<String>,
    tag: VersionTag,
}

/// The tag of an object that is there. An answer without one is not from a server of S3.
fn tag_of(tag: Option<&str>) -> std::result::Result<VersionTag, Failure> {
    tag.map(VersionTag::new).ok_or_else(|| Failure::stranger("the answer has no tag"))
}

/// The size of the whole object, from `Content-Range: bytes 0-9/100`.
fn size_of_whole(answer: &GetObjectOutput) -> Option<u64> {
    answer.content_range()?.rsplit_once('/')?.1.parse().ok()
}

/// The size of an object that is sent whole.
fn whole_bytes(answer: &GetObjectOutput, bytes_max: u64) -> std::result::Result<u64, Failure> {
    match answer.content_length().and_then(|size| u64::try_from(size).ok()) {
        Some(size) if size <= bytes_max => Ok(size),
        Some(size) => {
            let message = format!("it has {size} bytes, at most {bytes_max} are read");
            Err(Failure::nonsense(message))
        }
        None => Err(Failure::nonsense("the answer does not say its length")),
    }
}

fn size(size: Option<i64>) -> u64 {
    size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0)
}

/// What the server says of a time, if it says one.
fn timestamp(time: Option<&DateTime>) -> Option<Timestamp> {
    let time = time?;
    let nanoseconds = i32::try_from(time.subsec_nanos()).unwrap_or(0);
    Timestamp::new(time.secs(), nanoseconds).ok()
}

fn lacks_bulk_delete(failure: &Failure) -> bool {
    failure.is_not_implemented()
        || failure.wants_content_md5()
        || failure.is("MethodNotAllowed", 405)
}

/// `send().await` with the SDK's error as a [`Failure`].
trait MapErrFailure<T> {
    fn map_err_failure(self) -> impl Future<Output = std::result::Result<T, Failure>>;
}

impl<T, E, F> MapErrFailure<T> for F
where
    F: Future<Output = std::result::Result<T, E>>,
    Failure: From<E>,
{
    async fn map_err_failure(self) -> std::result::Result<T, Failure> {
        self.await.map_err(Failure::from)
    }
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bucket({})", self.0.describe())
    }
}

#[async_trait]
impl Store for Bucket {
    fn describe(&self) -> String {
        self.0.describe()
    }

    async fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome> {
        self.0.put_if_absent(name, body).await
    }

    async fn begin_multipart(&self, name: &ObjectName) -> Result<Box<dyn Multipart>> {
        Ok(Box::new(multipart::Upload::begin(Arc::clone(&self.0), name).await?))
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        self.0.get(name, range).await
    }

    async fn read<'a>(
        &'a self,
        name: &'a ObjectName,
        range: Range<u64>,
    ) -> Result<Box<dyn Reading + 'a>> {
        Ok(Box::new(self.0.read(name, range).await?))
    }

    async fn head(&self, name: &ObjectName) -> Result<Option<ObjectInfo>> {
        self.0.head(name).await
    }

    async fn list(&self, prefix: &str, after: Option<&ObjectName>) -> Result<ListPage> {
        self.0.list(prefix, after).await
    }

    async fn delete(&self, names: &[ObjectName]) -> Result<()> {
        self.0.delete(names).await
    }

    async fn read_versioned(&self, name: &ObjectName) -> Result<Option<(Bytes, VersionTag)>> {
        self.0.read_mutable(name, Tries::AsConfigured).await
    }

    async fn replace_if(
        &self,
        name: &ObjectName,
        body: Bytes,
        expected: Option<VersionTag>,
    ) -> Result<Replace> {
        self.0.replace_if(name, body, expected).await
    }

    async fn probe(&self) -> Result<Capabilities> {
        self.0.inspect(probe::probe(self, &self.0.clock).await?).await
    }

    async fn probe_replace(&self) -> Result<bool> {
        probe::probe_replace(self, &self.0.clock).await
    }

    async fn time(&self) -> Result<Option<Timestamp>> {
        // Every answer says it, also that there is no such object.
        self.head(&ObjectName::new(format!("{}/time", probe::FOLDER))?).await?;
        self.0.server_time().await
    }

    async fn abort_stale_multiparts(&self, folder: &str, older_than: Duration) -> Result<u64> {
        self.0.abort_stale(folder, older_than).await
    }

    fn requests(&self) -> RequestCounts {
        self.0.requests.counts()
    }

    fn latencies(&self) -> &Latencies {
        &self.0.latencies
    }
}
