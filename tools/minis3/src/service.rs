//! The S3 operations by name; each is carried out in the module of its subject.

use std::io;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use s3s::auth::{S3Auth, SecretKey};
use s3s::dto::*;
use s3s::{S3, S3Error, S3Request, S3Response, S3Result, s3_error};

use crate::backend::{Backend, Piece};
use crate::counters::Counters;
use crate::faults::Faults;
use crate::journal::Journal;
use crate::quirks::Quirks;
use crate::state::{Bucket, Event, Settings, State, Versioning};
use crate::{BucketConfig, Config};

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) backend: Backend,
    pub(crate) faults: Faults,
    pub(crate) counters: Counters,
    pub(crate) part_bytes_min: u64,
    pub(crate) region: Option<String>,
    state: Mutex<State>,
    journal: Option<Journal>,
    quirks: Mutex<Quirks>,
    /// Access key id and its secret.
    keys: Mutex<(String, String)>,
    /// How far the server's clock is ahead of the machine's.
    pub(crate) clock_ahead_ms: AtomicI64,
    /// Requests refused because of their date.
    pub(crate) skewed_count: AtomicU64,
}

impl Shared {
    pub(crate) fn open(config: &Config) -> io::Result<Self> {
        let mut state = State::default();
        let (backend, journal) = match &config.root {
            None => (Backend::Memory, None),
            Some(root) => (Backend::folder(root)?, Some(Journal::open(root, &mut state)?)),
        };
        let shared = Self {
            backend,
            faults: Faults::default(),
            counters: Counters::default(),
            part_bytes_min: config.part_bytes_min,
            region: config.region.clone(),
            state: Mutex::new(state),
            journal,
            quirks: Mutex::default(),
            keys: Mutex::new((config.access_key.clone(), config.secret_key.clone())),
            clock_ahead_ms: AtomicI64::new(0),
            skewed_count: AtomicU64::new(0),
        };
        for bucket in &config.buckets {
            shared.make_bucket(bucket).map_err(|error| io::Error::other(error.to_string()))?;
        }
        Ok(shared)
    }

    fn make_bucket(&self, config: &BucketConfig) -> S3Result<()> {
        if !s3s::path::check_bucket_name(&config.name) {
            return Err(s3_error!(InvalidBucketName, "not a bucket's name: '{}'", config.name));
        }
        let mut state = self.state();
        if state.buckets.contains_key(&config.name) {
            return Ok(());
        }
        let versioned = config.versioning || config.object_lock;
        let settings = Settings {
            created_ms: now_ms(),
            versioning: if versioned { Versioning::Enabled } else { Versioning::Never },
            object_lock: config.object_lock,
            default_retention: None,
        };
        self.commit(&mut state, Event::Bucket { bucket: config.name.clone(), settings })
    }

    /// The time by the server's clock, in milliseconds since 1970.
    pub(crate) fn time_ms(&self) -> u64 {
        now_ms().saturating_add_signed(self.clock_ahead_ms.load(Ordering::Relaxed))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the change down and makes it.
    pub(crate) fn commit(&self, state: &mut State, event: Event) -> S3Result<()> {
        if let Some(journal) = &self.journal {
            journal.append(&event).map_err(S3Error::internal_error)?;
        }
        let freed: Vec<Piece> = state.apply(event);
        self.backend.discard(&freed);
        Ok(())
    }

    pub(crate) fn quirks(&self) -> Quirks {
        self.quirks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_keys(&self, access_key: &str, secret_key: &str) {
        let keys = (access_key.to_owned(), secret_key.to_owned());
        *self.keys.lock().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    pub(crate) fn set_quirks(&self, quirks: Quirks) {
        *self.quirks.lock().unwrap_or_else(PoisonError::into_inner) = quirks;
    }

    pub(crate) fn damage(
        &self,
        bucket: &str,
        key: &str,
        change: impl FnOnce(&mut Vec<u8>),
    ) -> io::Result<bool> {
        let mut state = self.state();
        let found = state.buckets.get(bucket).and_then(|bucket| bucket.current(key)).cloned();
        let Some(mut version) = found else { return Ok(false) };
        let mut bytes = self.backend.read_all(&version.pieces)?;
        change(&mut bytes);
        version.size = bytes.len() as u64;
        version.pieces = vec![self.backend.store(bytes)?];
        let event = Event::Version { bucket: bucket.to_owned(), key: key.to_owned(), version };
        self.commit(&mut state, event).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(true)
    }

    pub(crate) fn vanish(&self, bucket: &str, key: &str) -> bool {
        let mut state = self.state();
        let versions = state.buckets.get(bucket).and_then(|bucket| bucket.keys.get(key));
        let ids: Vec<String> =
            versions.into_iter().flatten().map(|version| version.id.clone()).collect();
        for id in &ids {
            let (bucket, key, id) = (bucket.to_owned(), key.to_owned(), id.clone());
            let _ = self.commit(&mut state, Event::VersionGone { bucket, key, id });
        }
        !ids.is_empty()
    }

    pub(crate) fn lose_part(&self, bucket: &str, id: &str, number: u32) {
        let (bucket, id) = (bucket.to_owned(), id.to_owned());
        let _ = self.commit(&mut self.state(), Event::PartGone { bucket, id, number });
    }

    pub(crate) fn object(&self, bucket: &str, key: &str) -> io::Result<Option<Vec<u8>>> {
        let state = self.state();
        let version = state.buckets.get(bucket).and_then(|bucket| bucket.current(key));
        version.map(|version| self.backend.read_all(&version.pieces)).transpose()
    }

    pub(crate) fn keys(&self, bucket: &str) -> Vec<String> {
        let state = self.state();
        let Some(bucket) = state.buckets.get(bucket) else { return Vec::new() };
        bucket.keys.keys().filter(|key| bucket.current(key).is_some()).cloned().collect()
    }

    pub(crate) fn stored_bytes(&self, bucket: &str) -> u64 {
        let state = self.state();
        let Some(bucket) = state.buckets.get(bucket) else { return 0 };
        let current = bucket.keys.keys().filter_map(|key| bucket.current(key));
        current.map(|version| version.size).sum()
    }

    pub(crate) fn upload_count(&self, bucket: &str) -> usize {
        self.state().buckets.get(bucket).map_or(0, |bucket| bucket.uploads.len())
    }
}

/// The bucket, or S3's error.
pub(crate) fn bucket<'a>(state: &'a State, name: &str) -> S3Result<&'a Bucket> {
    let missing = || s3_error!(NoSuchBucket, "The specified bucket does not exist");
    state.buckets.get(name).ok_or_else(missing)
}

pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

pub(crate) fn timestamp(ms: u64) -> Timestamp {
    Timestamp::from(UNIX_EPOCH + Duration::from_millis(ms))
}

/// Milliseconds of a time that a request names; 0 when it is before 1970 or makes no sense.
pub(crate) fn ms_of(time: &Timestamp) -> u64 {
    let mut text = Vec::new();
    let _ = time.format(TimestampFormat::EpochSeconds, &mut text);
    let seconds: f64 = String::from_utf8_lossy(&text).parse().unwrap_or(0.0);
    u64::try_from(Duration::try_from_secs_f64(seconds).unwrap_or_default().as_millis()).unwrap_or(0)
}

pub(crate) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Knows the pair of keys in force.
pub(crate) struct Keys(pub(crate) std::sync::Arc<Shared>);

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        let (known_key, secret_key) =
            self.0.keys.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if access_key == known_key {
            return Ok(SecretKey::from(secret_key));
        }
        let message = "The AWS Access Key Id you provided does not exist in our records.";
        Err(s3_error!(InvalidAccessKeyId, "{message}"))
    }
}

/// The service behind the signature check.
#[derive(Debug)]
pub(crate) struct MiniS3(pub(crate) std::sync::Arc<Shared>);

type Reply<T> = S3Result<S3Response<T>>;

fn reply<T>(output: S3Result<T>) -> Reply<T> {
    output.map(S3Response::new)
}

#[async_trait::async_trait]
impl S3 for MiniS3 {
    async fn put_object(&self, req: S3Request<PutObjectInput>) -> Reply<PutObjectOutput> {
        let tag = req.headers.get("if-match");
        if self.0.quirks().bare_tags && tag.is_some_and(|tag| tag.as_bytes().starts_with(b"\"")) {
            return Err(s3_error!(PreconditionFailed));
        }
        reply(self.0.put_object(req.input, req.trailing_headers).await)
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> Reply<GetObjectOutput> {
        reply(self.0.get_object(req.input))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> Reply<HeadObjectOutput> {
        reply(self.0.head_object(req.input))
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> Reply<DeleteObjectOutput> {
        reply(self.0.delete_object(&req.input))
    }

    async fn delete_objects(
        &self,
        req: S3Request<DeleteObjectsInput>,
    ) -> Reply<DeleteObjectsOutput> {
        reply(self.0.delete_objects(req.input))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> Reply<CreateMultipartUploadOutput> {
        reply(self.0.create_upload(req.input))
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> Reply<UploadPartOutput> {
        reply(self.0.upload_part(req.input, req.trailing_headers).await)
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> Reply<CompleteMultipartUploadOutput> {
        reply(self.0.complete_upload(req.input))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> Reply<AbortMultipartUploadOutput> {
        reply(self.0.abort_upload(&req.input))
    }

    async fn list_parts(&self, req: S3Request<ListPartsInput>) -> Reply<ListPartsOutput> {
        reply(self.0.list_parts(req.input))
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> Reply<ListMultipartUploadsOutput> {
        reply(self.0.list_uploads(req.input))
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> Reply<ListObjectsV2Output> {
        reply(self.0.list_objects(req.input))
    }

    async fn list_object_versions(
        &self,
        req: S3Request<ListObjectVersionsInput>,
    ) -> Reply<ListObjectVersionsOutput> {
        reply(self.0.list_versions(req.input))
    }

    async fn list_buckets(&self, _req: S3Request<ListBucketsInput>) -> Reply<ListBucketsOutput> {
        let state = self.0.state();
        let buckets = state.buckets.iter().map(|(name, bucket)| s3s::dto::Bucket {
            name: Some(name.clone()),
            creation_date: Some(timestamp(bucket.settings.created_ms)),
            ..Default::default()
        });
        reply(Ok(ListBucketsOutput { buckets: Some(buckets.collect()), ..Default::default() }))
    }

    async fn create_bucket(&self, req: S3Request<CreateBucketInput>) -> Reply<CreateBucketOutput> {
        if self.0.state().buckets.contains_key(&req.input.bucket) {
            return Err(s3_error!(BucketAlreadyOwnedByYou));
        }
        let object_lock = req.input.object_lock_enabled_for_bucket.unwrap_or(false);
        let name = req.input.bucket;
        self.0.make_bucket(&BucketConfig { name, versioning: false, object_lock })?;
        reply(Ok(CreateBucketOutput::default()))
    }

    async fn delete_bucket(&self, req: S3Request<DeleteBucketInput>) -> Reply<DeleteBucketOutput> {
        let mut state = self.0.state();
        if !bucket(&state, &req.input.bucket)?.keys.is_empty() {
            return Err(s3_error!(BucketNotEmpty));
        }
        self.0.commit(&mut state, Event::BucketGone { bucket: req.input.bucket })?;
        reply(Ok(DeleteBucketOutput {}))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> Reply<HeadBucketOutput> {
        bucket(&self.0.state(), &req.input.bucket)?;
        reply(Ok(HeadBucketOutput::default()))
    }

    async fn get_bucket_location(
        &self,
        req: S3Request<GetBucketLocationInput>,
    ) -> Reply<GetBucketLocationOutput> {
        bucket(&self.0.state(), &req.input.bucket)?;
        let location_constraint = self.0.region.clone().map(BucketLocationConstraint::from);
        reply(Ok(GetBucketLocationOutput { location_constraint }))
    }

    async fn get_bucket_versioning(
        &self,
        req: S3Request<GetBucketVersioningInput>,
    ) -> Reply<GetBucketVersioningOutput> {
        reply(self.0.get_versioning(&req.input.bucket))
    }

    async fn put_bucket_versioning(
        &self,
        req: S3Request<PutBucketVersioningInput>,
    ) -> Reply<PutBucketVersioningOutput> {
        reply(self.0.put_versioning(req.input))
    }

    async fn get_object_lock_configuration(
        &self,
        req: S3Request<GetObjectLockConfigurationInput>,
    ) -> Reply<GetObjectLockConfigurationOutput> {
        reply(self.0.get_lock_configuration(&req.input.bucket))
    }

    async fn put_object_lock_configuration(
        &self,
        req: S3Request<PutObjectLockConfigurationInput>,
    ) -> Reply<PutObjectLockConfigurationOutput> {
        reply(self.0.put_lock_configuration(req.input))
    }

    async fn get_object_retention(
        &self,
        req: S3Request<GetObjectRetentionInput>,
    ) -> Reply<GetObjectRetentionOutput> {
        reply(self.0.get_retention(&req.input))
    }

    async fn put_object_retention(
        &self,
        req: S3Request<PutObjectRetentionInput>,
    ) -> Reply<PutObjectRetentionOutput> {
        reply(self.0.put_retention(req.input))
    }

    async fn get_object_legal_hold(
        &self,
        req: S3Request<GetObjectLegalHoldInput>,
    ) -> Reply<GetObjectLegalHoldOutput> {
        reply(self.0.get_legal_hold(&req.input))
    }

    async fn put_object_legal_hold(
        &self,
        req: S3Request<PutObjectLegalHoldInput>,
    ) -> Reply<PutObjectLegalHoldOutput> {
        reply(self.0.put_legal_hold(req.input))
    }
}
