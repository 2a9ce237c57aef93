//! Single objects: put, get, head, delete.

use std::collections::BTreeMap;

use s3s::dto::*;
use s3s::{S3Error, S3Result, TrailingHeaders, s3_error};

use crate::backend::Piece;
use crate::checksum::{self, Claims, Hashes, sums, to_dto};
use crate::lock::{LockHeaders, protects};
use crate::quirks::Quirks;
use crate::service::{Shared, bucket, ms_of, now_ms, signed, timestamp};
use crate::state::{self, Attributes, Event, NULL_VERSION, State, Versioning};

/// The body of an upload and what came around it.
pub(crate) struct Sent {
    pub(crate) body: Option<StreamingBlob>,
    /// `Content-Length`, which says nothing where trailers follow.
    pub(crate) announced_bytes: Option<i64>,
    pub(crate) trailers: Option<TrailingHeaders>,
}

/// What an upload asks to be true of the object it would make.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conditions {
    pub(crate) if_match: Option<ETagCondition>,
    pub(crate) if_none_match: Option<ETagCondition>,
}

impl Conditions {
    /// S3's verdict, to be asked for under the same lock as the change.
    pub(crate) fn check(&self, bucket: &state::Bucket, key: &str) -> S3Result<()> {
        let current = bucket.current(key).map(|version| version.etag.as_str());
        let failed = || {
            let message = "At least one of the pre-conditions you specified did not hold";
            s3_error!(PreconditionFailed, "{message}")
        };
        let matches = |condition: &ETagCondition, etag: &str| match condition {
            ETagCondition::Any => true,
            ETagCondition::ETag(wanted) => wanted.value() == etag,
        };
        if let Some(condition) = &self.if_match {
            let missing = || s3_error!(NoSuchKey, "The specified key does not exist.");
            if !matches(condition, current.ok_or_else(missing)?) {
                return Err(failed());
            }
        }
        match (&self.if_none_match, current) {
            (Some(condition), Some(etag)) if matches(condition, etag) => Err(failed()),
            _ => Ok(()),
        }
    }
}

impl Shared {
    pub(crate) async fn put_object(
        &self,
        input: PutObjectInput,
        trailers: Option<TrailingHeaders>,
    ) -> S3Result<PutObjectOutput> {
        let quirks = self.quirks();
        let claims = Claims {
            sums: sums!(input),
            algorithm: input.checksum_algorithm.map(|name| name.as_str().to_owned()),
            content_md5: input.content_md5,
        };
        refuse_checksums(&quirks, &claims)?;
        let lock = LockHeaders {
            mode: input.object_lock_mode,
            until: input.object_lock_retain_until_date,
            hold: input.object_lock_legal_hold_status,
        };
        let attributes = Attributes {
            metadata: input.metadata.unwrap_or_default().into_iter().collect(),
            content_type: input.content_type,
            storage_class: input.storage_class.map(|class| class.as_str().to_owned()),
            encryption: input.server_side_encryption.map(|kind| kind.as_str().to_owned()),
            kms_key: input.ssekms_key_id,
            ..Attributes::default()
        };
        let attributes = {
            let state = self.state();
            lock.resolve(bucket(&state, &input.bucket)?, attributes, &claims, &quirks)?
        };
        let conditions =
            Conditions { if_match: input.if_match, if_none_match: input.if_none_match };

        let sent = Sent { body: input.body, announced_bytes: input.content_length, trailers };
        let (piece, checksum) = self.receive(sent, &claims).await?;
        let version = state::Version {
            id: String::new(),
            etag: String::new(),
            size: piece.size,
            modified_ms: self.time_ms(),
            pieces: vec![piece.clone()],
            checksum,
            attributes,
            delete_marker: false,
        };
        let conditions = (!quirks.ignore_conditions).then_some(conditions);
        let stored = self.publish(&input.bucket, &input.key, version, conditions);
        let version = stored.inspect_err(|_| self.backend.discard(&[piece]))?;
        let sums = to_dto(version.checksum.as_ref());
        Ok(PutObjectOutput {
            e_tag: (!quirks.put_without_etag).then(|| ETag::Strong(version.etag.clone())),
            version_id: shown_id(&version.id),
            checksum_crc32: sums.checksum_crc32,
            checksum_crc32c: sums.checksum_crc32c,
            checksum_crc64nvme: sums.checksum_crc64nvme,
            checksum_sha1: sums.checksum_sha1,
            checksum_sha256: sums.checksum_sha256,
            checksum_type: sums.checksum_type,
            ..PutObjectOutput::default()
        })
    }

    /// Takes in the body of an upload and holds it to what the request claims; of one that is not as
    /// claimed nothing is kept.
    pub(crate) async fn receive(
        &self,
        sent: Sent,
        claims: &Claims,
    ) -> S3Result<(Piece, Option<checksum::Checksum>)> {
        let Sent { body, announced_bytes, trailers } = sent;
        let mut hashes = Hashes::for_claims(claims);
        let piece = self.backend.receive(body, &mut hashes).await?;
        let checked = hashes.verify(claims, trailers.as_ref(), self.quirks().ignore_checksums);
        let announced = announced_bytes.and_then(|bytes| u64::try_from(bytes).ok());
        let whole = announced.is_none_or(|bytes| bytes == piece.size) || trailers.is_some();
        let checked = checked.and_then(|checksum| match whole {
            true => Ok(checksum),
            false => Err(s3_error!(IncompleteBody)),
        });
        match checked {
            Ok(checksum) => Ok((piece, checksum)),
            Err(error) => {
                self.backend.discard(&[piece]);
                Err(error)
            }
        }
    }

    /// Checks the conditions and makes the version current, under one lock.
    fn publish(
        &self,
        bucket_name: &str,
        key: &str,
        mut version: state::Version,
        conditions: Option<Conditions>,
    ) -> S3Result<state::Version> {
        let mut state = self.state();
        let bucket = bucket(&state, bucket_name)?;
        if let Some(conditions) = conditions {
            conditions.check(bucket, key)?;
        }
        let number = state.last_number + 1;
        version.id = bucket.version_id(number);
        version.etag = etag(number, now_ms());
        let (bucket, key) = (bucket_name.to_owned(), key.to_owned());
        let event = Event::Version { bucket, key, version: version.clone() };
        self.commit(&mut state, event)?;
        Ok(version)
    }

    pub(crate) fn get_object(&self, input: GetObjectInput) -> S3Result<GetObjectOutput> {
        let (version, reading, range) = {
            let state = self.state();
            let version =
                found(&state, &input.bucket, &input.key, input.version_id.as_deref())?.clone();
            read_conditions(&input, &version)?;
            let range = match &input.range {
                None => 0..version.size,
                Some(range) => range.check(version.size).map_err(|_| s3_error!(InvalidRange))?,
            };
            let reading = self.backend.read(&version.pieces, range.clone());
            (version, reading.map_err(S3Error::internal_error)?, range)
        };
        let content_range = input.range.map(|_| {
            format!("bytes {}-{}/{}", range.start, range.end.saturating_sub(1), version.size)
        });
        let whole = content_range.is_none();
        let asked = input.checksum_mode.is_some() && whole;
        let sums = to_dto(version.checksum.as_ref().filter(|_| asked));
        Ok(GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            body: Some(reading.into_blob()),
            content_length: Some(signed(range.end - range.start)),
            content_range,
            content_type: version.attributes.content_type.clone(),
            e_tag: Some(ETag::Strong(version.etag.clone())),
            last_modified: Some(timestamp(version.modified_ms)),
            metadata: self.shown_metadata(&version),
            object_lock_mode: mode(&version),
            object_lock_retain_until_date: until(&version),
            object_lock_legal_hold_status: hold(&version),
            version_id: shown_id(&version.id),
            checksum_crc32: sums.checksum_crc32,
            checksum_crc32c: sums.checksum_crc32c,
            checksum_crc64nvme: sums.checksum_crc64nvme,
            checksum_sha1: sums.checksum_sha1,
            checksum_sha256: sums.checksum_sha256,
            checksum_type: sums.checksum_type,
            storage_class: version.attributes.storage_class.clone().map(StorageClass::from),
            ..GetObjectOutput::default()
        })
    }

    pub(crate) fn head_object(&self, input: HeadObjectInput) -> S3Result<HeadObjectOutput> {
        let state = self.state();
        let version = found(&state, &input.bucket, &input.key, input.version_id.as_deref())?;
        let attributes = &version.attributes;
        let asked = input.checksum_mode.is_some();
        let sums = to_dto(version.checksum.as_ref().filter(|_| asked));
        Ok(HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: Some(signed(version.size)),
            content_type: attributes.content_type.clone(),
            e_tag: Some(ETag::Strong(version.etag.clone())),
            last_modified: (!self.quirks().objects_without_time)
                .then(|| timestamp(version.modified_ms)),
            metadata: self.shown_metadata(version),
            object_lock_mode: mode(version),
            object_lock_retain_until_date: until(version),
            object_lock_legal_hold_status: hold(version),
            version_id: shown_id(&version.id),
            checksum_crc32: sums.checksum_crc32,
            checksum_crc32c: sums.checksum_crc32c,
            checksum_crc64nvme: sums.checksum_crc64nvme,
            checksum_sha1: sums.checksum_sha1,
            checksum_sha256: sums.checksum_sha256,
            checksum_type: sums.checksum_type,
            storage_class: attributes.storage_class.clone().map(StorageClass::from),
            server_side_encryption: attributes.encryption.clone().map(ServerSideEncryption::from),
            ssekms_key_id: attributes.kms_key.clone(),
            ..HeadObjectOutput::default()
        })
    }

    fn shown_metadata(&self, version: &state::Version) -> Option<Metadata> {
        let metadata: &BTreeMap<String, String> = &version.attributes.metadata;
        let shown = !self.quirks().drop_metadata;
        shown.then(|| metadata.iter().map(|(name, value)| (name.clone(), value.clone())).collect())
    }

    pub(crate) fn delete_object(&self, input: &DeleteObjectInput) -> S3Result<DeleteObjectOutput> {
        let bypass = input.bypass_governance_retention.unwrap_or(false);
        let mut state = self.state();
        let id = input.version_id.as_deref();
        let target = Target { bucket: &input.bucket, key: &input.key, id, bypass };
        let (marker, id) = self.delete(&mut state, &target)?;
        Ok(DeleteObjectOutput {
            delete_marker: marker.then_some(true),
            version_id: id,
            ..DeleteObjectOutput::default()
        })
    }

    pub(crate) fn delete_objects(
        &self,
        input: DeleteObjectsInput,
    ) -> S3Result<DeleteObjectsOutput> {
        if self.quirks().refuse_bulk_delete {
            return Err(s3_error!(NotImplemented));
        }
        if input.delete.objects.len() > 1000 {
            return Err(s3_error!(MalformedXML));
        }
        let bypass = input.bypass_governance_retention.unwrap_or(false);
        let (mut deleted, mut errors) = (Vec::new(), Vec::new());
        let mut state = self.state();
        bucket(&state, &input.bucket)?;
        for object in input.delete.objects {
            let id = object.version_id.as_deref();
            let target = Target { bucket: &input.bucket, key: &object.key, id, bypass };
            match self.delete(&mut state, &target) {
                Ok((marker, id)) => deleted.push(DeletedObject {
                    delete_marker: marker.then_some(true),
                    delete_marker_version_id: id.filter(|_| marker),
                    key: Some(object.key),
                    version_id: object.version_id,
                }),
                Err(error) => errors.push(Error {
                    code: Some(error.code().as_str().to_owned()),
                    key: Some(object.key),
                    message: error.message().map(str::to_owned),
                    version_id: object.version_id,
                }),
            }
        }
        let quiet = input.delete.quiet.unwrap_or(false);
        Ok(DeleteObjectsOutput {
            deleted: (!quiet).then_some(deleted),
            errors: Some(errors),
            ..DeleteObjectsOutput::default()
        })
    }

    /// Removes a version, or hides the key behind a delete marker when versions are kept. Returns
    /// whether a marker was made or removed, and the id of what was touched.
    fn delete(&self, state: &mut State, target: &Target<'_>) -> S3Result<(bool, Option<String>)> {
        if self.quirks().deny_deletes {
            return Err(s3_error!(AccessDenied));
        }
        let &Target { bucket: bucket_name, key, id, bypass } = target;
        let bucket = bucket(state, bucket_name)?;
        let (owned_bucket, owned_key) = (bucket_name.to_owned(), key.to_owned());
        if let Some(id) = id {
            let Some(version) = bucket.version(key, Some(id)) else {
                return Ok((false, Some(id.to_owned())));
            };
            protects(&version.attributes, bypass)?;
            let (marker, id) = (version.delete_marker, id.to_owned());
            let event = Event::VersionGone { bucket: owned_bucket, key: owned_key, id: id.clone() };
            self.commit(state, event)?;
            return Ok((marker, Some(id)));
        }
        if bucket.settings.versioning == Versioning::Never {
            if bucket.current(key).is_some() {
                let id = NULL_VERSION.to_owned();
                let event = Event::VersionGone { bucket: owned_bucket, key: owned_key, id };
                self.commit(state, event)?;
            }
            return Ok((false, None));
        }
        let number = state.last_number + 1;
        let marker = state::Version {
            id: bucket.version_id(number),
            etag: String::new(),
            size: 0,
            modified_ms: self.time_ms(),
            pieces: Vec::new(),
            checksum: None,
            attributes: Attributes::default(),
            delete_marker: true,
        };
        let id = marker.id.clone();
        let event = Event::Version { bucket: owned_bucket, key: owned_key, version: marker };
        self.commit(state, event)?;
        Ok((true, Some(id)))
    }
}

/// What to delete, and whether governance retention may be passed over.
struct Target<'a> {
    bucket: &'a str,
    key: &'a str,
    id: Option<&'a str>,
    bypass: bool,
}

/// An ETag that no other object ever had: not a hash, which would cost more than all else here.
pub(crate) fn etag(number: u64, now_ms: u64) -> String {
    format!("{now_ms:016x}{number:016x}")
}

pub(crate) fn refuse_checksums(quirks: &Quirks, claims: &Claims) -> S3Result<()> {
    if quirks.refuse_checksums && claims.named().is_some() {
        let message = "A header you provided implies functionality that is not implemented";
        return Err(s3_error!(NotImplemented, "{message}"));
    }
    Ok(())
}

fn found<'a>(
    state: &'a State,
    bucket_name: &str,
    key: &str,
    id: Option<&str>,
) -> S3Result<&'a state::Version> {
    let version = bucket(state, bucket_name)?.version(key, id);
    match version {
        Some(version) if version.delete_marker => Err(s3_error!(MethodNotAllowed)),
        Some(version) => Ok(version),
        None if id.is_some() => Err(s3_error!(NoSuchVersion)),
        None => Err(s3_error!(NoSuchKey, "The specified key does not exist.")),
    }
}

fn read_conditions(input: &GetObjectInput, version: &state::Version) -> S3Result<()> {
    match &input.if_match {
        Some(ETagCondition::ETag(wanted)) if wanted.value() != version.etag => {
            return Err(s3_error!(PreconditionFailed));
        }
        _ => {}
    }
    match &input.if_none_match {
        Some(ETagCondition::ETag(known)) if known.value() == version.etag => {
            Err(s3_error!(NotModified))
        }
        _ => Ok(()),
    }
}

/// Buckets that never kept versions show no ids.
pub(crate) fn shown_id(id: &str) -> Option<String> {
    (id != NULL_VERSION).then(|| id.to_owned())
}

fn mode(version: &state::Version) -> Option<ObjectLockMode> {
    let retention = version.attributes.retention?;
    Some(ObjectLockMode::from_static(match retention.mode {
        state::Mode::Governance => ObjectLockMode::GOVERNANCE,
        state::Mode::Compliance => ObjectLockMode::COMPLIANCE,
    }))
}

fn until(version: &state::Version) -> Option<Timestamp> {
    version.attributes.retention.map(|retention| timestamp(retention.until_ms))
}

fn hold(version: &state::Version) -> Option<ObjectLockLegalHoldStatus> {
    version
        .attributes
        .legal_hold
        .then(|| ObjectLockLegalHoldStatus::from_static(ObjectLockLegalHoldStatus::ON))
}

/// Milliseconds of an optional time.
pub(crate) fn optional_ms(time: Option<&Timestamp>) -> Option<u64> {
    time.map(ms_of)
}
