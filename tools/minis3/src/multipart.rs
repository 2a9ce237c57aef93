//! Multipart uploads.

use std::collections::BTreeMap;

use s3s::dto::*;
use s3s::{S3Result, TrailingHeaders, s3_error};

use crate::checksum::{self, Claims, sums, to_dto, value_of};
use crate::lock::LockHeaders;
use crate::objects::{Conditions, Sent, etag, refuse_checksums, shown_id};
use crate::service::{Shared, bucket, now_ms, signed, timestamp};
use crate::state::{self, Attributes, Event, State, Upload};

/// Most entries of one page.
const PAGE_ENTRIES: usize = 1000;

impl Shared {
    pub(crate) fn create_upload(
        &self,
        input: CreateMultipartUploadInput,
    ) -> S3Result<CreateMultipartUploadOutput> {
        let quirks = self.quirks();
        let algorithm = input.checksum_algorithm.map(|name| name.as_str().to_owned());
        let claims = Claims { algorithm: algorithm.clone(), ..Claims::default() };
        refuse_checksums(&quirks, &claims)?;
        let kind = match (&input.checksum_type, algorithm.as_deref()) {
            (Some(kind), _) => kind.as_str().to_owned(),
            (None, Some("CRC64NVME")) => ChecksumType::FULL_OBJECT.to_owned(),
            (None, _) => ChecksumType::COMPOSITE.to_owned(),
        };
        let attributes = Attributes {
            metadata: input.metadata.unwrap_or_default().into_iter().collect(),
            content_type: input.content_type,
            storage_class: input.storage_class.map(|class| class.as_str().to_owned()),
            encryption: input.server_side_encryption.map(|kind| kind.as_str().to_owned()),
            kms_key: input.ssekms_key_id,
            ..Attributes::default()
        };
        let lock = LockHeaders {
            mode: input.object_lock_mode,
            until: input.object_lock_retain_until_date,
            hold: input.object_lock_legal_hold_status,
        };
        let mut state = self.state();
        let attributes = {
            let bucket = bucket(&state, &input.bucket)?;
            lock.resolve(bucket, attributes, &Claims::unneeded(), &quirks)?
        };
        let id = format!("upload-{:016x}-{:016x}", state.last_number + 1, now_ms());
        let upload = Upload {
            key: input.key.clone(),
            begun_ms: self.time_ms(),
            attributes,
            checksum: algorithm.clone().map(|algorithm| (algorithm, kind.clone())),
            parts: BTreeMap::new(),
        };
        let event = Event::Upload { bucket: input.bucket.clone(), id: id.clone(), upload };
        self.commit(&mut state, event)?;
        Ok(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            checksum_type: algorithm.as_ref().map(|_| ChecksumType::from(kind)),
            checksum_algorithm: algorithm.map(ChecksumAlgorithm::from),
            ..CreateMultipartUploadOutput::default()
        })
    }

    pub(crate) async fn upload_part(
        &self,
        input: UploadPartInput,
        trailers: Option<TrailingHeaders>,
    ) -> S3Result<UploadPartOutput> {
        let quirks = self.quirks();
        let mut claims = Claims {
            sums: sums!(input),
            algorithm: input.checksum_algorithm.map(|name| name.as_str().to_owned()),
            content_md5: input.content_md5,
        };
        refuse_checksums(&quirks, &claims)?;
        let number = u32::try_from(input.part_number).unwrap_or(0);
        if !(1..=10_000).contains(&number) {
            return Err(s3_error!(InvalidArgument, "Part number must be 1 to 10000"));
        }
        {
            let state = self.state();
            let upload = upload(&state, &input.bucket, &input.key, &input.upload_id)?;
            match (&upload.checksum, claims.named()) {
                (Some((wanted, _)), Some(found)) if *wanted != found => {
                    return Err(s3_error!(
                        InvalidRequest,
                        "Checksum Type mismatch occurred, expected checksum Type: {wanted}, \
                         actual checksum Type: {found}"
                    ));
                }
                (Some((wanted, _)), None) => claims.algorithm = Some(wanted.clone()),
                _ => {}
            }
        }
        let sent = Sent { body: input.body, announced_bytes: input.content_length, trailers };
        let (piece, checksum) = self.receive(sent, &claims).await?;
        let stored = {
            let mut state = self.state();
            let etag = etag(state.last_number + 1, now_ms());
            let part =
                state::Part { etag, modified_ms: self.time_ms(), piece: piece.clone(), checksum };
            let (bucket, id) = (input.bucket.clone(), input.upload_id.clone());
            upload(&state, &input.bucket, &input.key, &input.upload_id)
                .map(|_| ())
                .and_then(|()| {
                    let event = Event::Part { bucket, id, number, part: part.clone() };
                    self.commit(&mut state, event)
                })
                .map(|()| part)
        };
        let part = stored.inspect_err(|_| self.backend.discard(&[piece]))?;
        let sums = to_dto(part.checksum.as_ref());
        Ok(UploadPartOutput {
            e_tag: Some(ETag::Strong(part.etag)),
            checksum_crc32: sums.checksum_crc32,
            checksum_crc32c: sums.checksum_crc32c,
            checksum_crc64nvme: sums.checksum_crc64nvme,
            checksum_sha1: sums.checksum_sha1,
            checksum_sha256: sums.checksum_sha256,
            ..UploadPartOutput::default()
        })
    }

    pub(crate) fn complete_upload(
        &self,
        mut input: CompleteMultipartUploadInput,
    ) -> S3Result<CompleteMultipartUploadOutput> {
        let quirks = self.quirks();
        let mut state = self.state();
        let (if_match, if_none_match) = (input.if_match.take(), input.if_none_match.take());
        let conditions = Conditions { if_match, if_none_match };
        if quirks.conditions_before_upload_id {
            conditions.check(bucket(&state, &input.bucket)?, &input.key)?;
        }
        let upload = upload(&state, &input.bucket, &input.key, &input.upload_id)?.clone();
        let parts = self.chosen_parts(&upload, input.multipart_upload)?;
        let checksum = joined_checksum(&upload, &parts);
        if let (Some(checksum), false) = (&checksum, quirks.ignore_checksums) {
            let sums = sums!(input);
            let claimed = value_of(&sums, &checksum.algorithm);
            if claimed.is_some_and(|claimed| *claimed != checksum.value) {
                return Err(checksum::mismatch(&checksum.algorithm));
            }
        }
        let size = parts.iter().map(|part| part.piece.size).sum();
        if input.mpu_object_size.is_some_and(|claimed| claimed != signed(size)) {
            return Err(s3_error!(InvalidRequest, "the object size does not match"));
        }
        let number = state.last_number + 1;
        let bucket = bucket(&state, &input.bucket)?;
        if !(quirks.ignore_conditions || quirks.ignore_conditions_on_complete) {
            conditions.check(bucket, &input.key)?;
        }
        let version = state::Version {
            id: bucket.version_id(number),
            etag: format!("{}-{}", etag(number, now_ms()), parts.len()),
            size,
            modified_ms: self.time_ms(),
            pieces: parts.into_iter().map(|part| part.piece).collect(),
            checksum,
            attributes: upload.attributes,
            delete_marker: false,
        };
        let (id, shown) = (input.upload_id, version.clone());
        self.commit(&mut state, Event::Completed { bucket: input.bucket.clone(), id, version })?;
        let sums = to_dto(shown.checksum.as_ref());
        Ok(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: (!quirks.complete_without_etag).then_some(ETag::Strong(shown.etag)),
            version_id: shown_id(&shown.id),
            checksum_crc32: sums.checksum_crc32,
            checksum_crc32c: sums.checksum_crc32c,
            checksum_crc64nvme: sums.checksum_crc64nvme,
            checksum_sha1: sums.checksum_sha1,
            checksum_sha256: sums.checksum_sha256,
            checksum_type: sums.checksum_type,
            ..CompleteMultipartUploadOutput::default()
        })
    }

    /// The parts that the request names, checked as S3 checks them.
    fn chosen_parts(
        &self,
        upload: &Upload,
        request: Option<CompletedMultipartUpload>,
    ) -> S3Result<Vec<state::Part>> {
        let named = request.and_then(|request| request.parts).unwrap_or_default();
        if named.is_empty() {
            return Err(s3_error!(MalformedXML, "You must specify at least one part"));
        }
        let numbers: Vec<u32> = named
            .iter()
            .map(|name| name.part_number.and_then(|number| u32::try_from(number).ok()).unwrap_or(0))
            .collect();
        if !numbers.is_sorted_by(|earlier, later| earlier < later) {
            return Err(s3_error!(InvalidPartOrder));
        }
        let mut parts = Vec::new();
        let last_index = named.len() - 1;
        for (index, (name, number)) in named.into_iter().zip(numbers).enumerate() {
            let message = "One or more of the specified parts could not be found.";
            let Some(part) = upload.parts.get(&number) else {
                return Err(s3_error!(InvalidPart, "{message}"));
            };
            if name.e_tag.as_ref().is_none_or(|etag| etag.value() != part.etag) {
                return Err(s3_error!(InvalidPart, "{message}"));
            }
            part_checksum_agrees(upload, &name, part, number)?;
            if index < last_index && part.piece.size < self.part_bytes_min {
                return Err(s3_error!(
                    EntityTooSmall,
                    "Your proposed upload is smaller than the minimum allowed size"
                ));
            }
            parts.push(part.clone());
        }
        Ok(parts)
    }

    pub(crate) fn abort_upload(
        &self,
        input: &AbortMultipartUploadInput,
    ) -> S3Result<AbortMultipartUploadOutput> {
        let mut state = self.state();
        upload(&state, &input.bucket, &input.key, &input.upload_id)?;
        let (bucket, id) = (input.bucket.clone(), input.upload_id.clone());
        self.commit(&mut state, Event::UploadGone { bucket, id })?;
        Ok(AbortMultipartUploadOutput::default())
    }

    pub(crate) fn list_parts(&self, input: ListPartsInput) -> S3Result<ListPartsOutput> {
        let state = self.state();
        let upload = upload(&state, &input.bucket, &input.key, &input.upload_id)?;
        let after = input.part_number_marker.and_then(|marker| u32::try_from(marker).ok());
        let after = after.unwrap_or(0);
        let size = page_size(input.max_parts);
        let mut parts: Vec<Part> = upload
            .parts
            .range(after + 1..)
            .take(size + 1)
            .map(|(number, part)| {
                let sums = to_dto(part.checksum.as_ref());
                Part {
                    e_tag: Some(ETag::Strong(part.etag.clone())),
                    last_modified: Some(timestamp(part.modified_ms)),
                    part_number: i32::try_from(*number).ok(),
                    size: Some(signed(part.piece.size)),
                    checksum_crc32: sums.checksum_crc32,
                    checksum_crc32c: sums.checksum_crc32c,
                    checksum_crc64nvme: sums.checksum_crc64nvme,
                    checksum_sha1: sums.checksum_sha1,
                    checksum_sha256: sums.checksum_sha256,
                }
            })
            .collect();
        let truncated = parts.len() > size;
        parts.truncate(size);
        Ok(ListPartsOutput {
            next_part_number_marker: parts.last().and_then(|part| part.part_number),
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(input.upload_id),
            is_truncated: Some(truncated),
            parts: Some(parts),
            ..ListPartsOutput::default()
        })
    }

    pub(crate) fn list_uploads(
        &self,
        input: ListMultipartUploadsInput,
    ) -> S3Result<ListMultipartUploadsOutput> {
        let state = self.state();
        let bucket = bucket(&state, &input.bucket)?;
        let quirks = self.quirks();
        let prefix = input.prefix.clone().filter(|_| !quirks.list_all_uploads).unwrap_or_default();
        let asked = (input.key_marker, input.upload_id_marker);
        let after = (asked.0.clone().unwrap_or_default(), asked.1.clone().unwrap_or_default());
        let mut found: Vec<(&String, &String, &Upload)> = bucket
            .uploads
            .iter()
            .map(|(id, upload)| (&upload.key, id, upload))
            .filter(|(key, id, _)| {
                key.starts_with(&prefix) && ((*key).clone(), (*id).clone()) > after
            })
            .collect();
        found.sort_by_key(|(key, id, _)| (*key, *id));
        let size = page_size(input.max_uploads);
        let truncated = found.len() > size || quirks.endless_uploads;
        found.truncate(size);
        let next = found.last().filter(|_| truncated);
        let next = next.map(|(key, id, _)| (Some((*key).clone()), Some((*id).clone())));
        let next = next.unwrap_or(if truncated { asked } else { (None, None) });
        Ok(ListMultipartUploadsOutput {
            next_key_marker: next.0,
            next_upload_id_marker: next.1,
            uploads: Some(
                found
                    .iter()
                    .map(|(key, id, upload)| MultipartUpload {
                        key: Some((*key).clone()),
                        upload_id: Some((*id).clone()),
                        initiated: (!quirks.uploads_without_time)
                            .then(|| timestamp(upload.begun_ms)),
                        ..MultipartUpload::default()
                    })
                    .collect(),
            ),
            bucket: Some(input.bucket),
            prefix: input.prefix,
            is_truncated: Some(truncated),
            ..ListMultipartUploadsOutput::default()
        })
    }
}

/// Page size that a request gets.
pub(crate) fn page_size(asked: Option<i32>) -> usize {
    let asked = asked.and_then(|asked| usize::try_from(asked).ok()).unwrap_or(PAGE_ENTRIES);
    asked.clamp(1, PAGE_ENTRIES)
}

fn upload<'a>(state: &'a State, bucket_name: &str, key: &str, id: &str) -> S3Result<&'a Upload> {
    let found = bucket(state, bucket_name)?.uploads.get(id).filter(|upload| upload.key == key);
    let message = "The specified upload does not exist. The upload ID may be invalid, or the \
                   upload may have been aborted or completed.";
    found.ok_or_else(|| s3_error!(NoSuchUpload, "{message}"))
}

/// A composite upload must be completed with the checksum of every part, as S3 wants it.
fn part_checksum_agrees(
    upload: &Upload,
    name: &CompletedPart,
    part: &state::Part,
    number: u32,
) -> S3Result<()> {
    let name = name.clone();
    let sums = sums!(name);
    if let Some(kept) = &part.checksum
        && value_of(&sums, &kept.algorithm).is_some_and(|claimed| *claimed != kept.value)
    {
        return Err(s3_error!(InvalidPart, "the checksum of part {number} does not match"));
    }
    match &upload.checksum {
        Some((algorithm, kind))
            if kind == ChecksumType::COMPOSITE && value_of(&sums, algorithm).is_none() =>
        {
            Err(s3_error!(
                InvalidRequest,
                "The upload was created using a {algorithm} checksum. The complete request must \
                 include the checksum for each part. It was missing for part {number} in the \
                 request."
            ))
        }
        _ => Ok(()),
    }
}

fn joined_checksum(upload: &Upload, parts: &[state::Part]) -> Option<checksum::Checksum> {
    let (algorithm, kind) = upload.checksum.as_ref()?;
    let sums: Option<Vec<(checksum::Checksum, u64)>> =
        parts.iter().map(|part| Some((part.checksum.clone()?, part.piece.size))).collect();
    checksum::joined(algorithm, kind, &sums?)
}
