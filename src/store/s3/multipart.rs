//! Objects in parts.
//!
//! # Invariants
//! Nothing is visible before the completion, and the completion is believed only after the object was
//! looked at: it must carry our id, or at least have our size. A completion that failed for good (one
//! that an outage stopped can be called again) takes its parts with it, as far as the server can be
//! reached; what cannot be aborted is found by `abort_stale_multiparts`.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;
use aws_sdk_s3::operation::upload_part::builders::UploadPartFluentBuilder;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;

use super::attempt::{Call, Tries};
use super::client::Client;
use super::failure::{Failure, Verdict};
use super::upload::{
    Algorithm, CONTENT_TYPE, ID_KEY, Owner, Sum, encryption, storage_class, tries_after,
};
use super::{Found, MapErrFailure, S3};
use crate::error::{Error, Kind, Result};
use crate::store::{Multipart, ObjectName, PART_NUMBER_MAX, PutOutcome, joined};

/// An upload in progress.
pub(super) struct Upload {
    store: Arc<S3>,
    name: ObjectName,
    /// S3's name for the upload.
    upload: String,
    /// Ours, in the object's metadata.
    id: String,
    algorithm: Option<Algorithm>,
    parts: Mutex<BTreeMap<u32, Part>>,
    /// A completion may have been done: it failed in a way that does not tell, or was answered well and
    /// not looked at yet.
    in_doubt: AtomicBool,
    /// Why a completion failed for good and took the parts with it.
    ended: OnceLock<Failure>,
}

#[derive(Clone)]
struct Part {
    etag: String,
    size_bytes: u64,
    sum: Option<Sum>,
}

impl Upload {
    pub(super) async fn begin(store: Arc<S3>, name: &ObjectName) -> Result<Self> {
        let id = store.upload_id()?;
        loop {
            let algorithm = store.algorithm();
            let call = Call::new(&store.requests.multipart_begins);
            let tried =
                store.attempt(call, |client| store.begin_upload(client, name, &id, algorithm));
            match tried.await?.result {
                Ok(upload) => {
                    let (name, parts) = (name.clone(), Mutex::default());
                    let (in_doubt, ended) = (AtomicBool::new(false), OnceLock::new());
                    return Ok(Self { store, name, upload, id, algorithm, parts, in_doubt, ended });
                }
                Err(failure) if store.give_up_checksum(&failure, algorithm) => {}
                Err(failure) => return Err(failure.into_error(store.unable("begin", name))),
            }
        }
    }

    fn parts(&self) -> MutexGuard<'_, BTreeMap<u32, Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn part_request(&self, client: &Client, number: i32) -> UploadPartFluentBuilder {
        client
            .sdk()
            .upload_part()
            .bucket(&self.store.bucket)
            .key(self.store.key(&self.name))
            .upload_id(&self.upload)
            .part_number(number)
    }

    async fn complete_once(
        &self,
        client: &Client,
        parts: CompletedMultipartUpload,
    ) -> std::result::Result<(), Failure> {
        let request = client
            .sdk()
            .complete_multipart_upload()
            .bucket(&self.store.bucket)
            .key(self.store.key(&self.name))
            .upload_id(&self.upload)
            .if_none_match("*")
            .set_checksum_type(checksum_type(self.algorithm))
            .multipart_upload(parts);
        request.send().await.map(|_| ()).map_err(Failure::from)
    }

    /// Whose object it is and how long.
    async fn look(&self, tries: Tries) -> Result<(Owner, u64)> {
        let store = &self.store;
        let call = Call { tries, ..Call::new(&store.requests.heads) };
        let tried = store.attempt(call, |client| store.head_once(client, &self.name)).await?;
        let found = tried.or_error(|| store.unable("look at", &self.name))?;
        Ok(match found {
            None => (Owner::Nobody, 0),
            Some(Found { upload_id: Some(found), size_bytes, .. }) if found != self.id => {
                (Owner::Rival, size_bytes)
            }
            Some(Found { size_bytes, tag, .. }) => (Owner::Us(tag), size_bytes),
        })
    }

    /// The completion was answered well: is the object there, ours and whole?
    async fn verify(&self, size_bytes: u64) -> Result<PutOutcome> {
        let wrong = |found: String| {
            let message = format!("the store said it completed the upload, but {found}");
            Err(Error::new(Kind::Corrupt, message).context(self.store.unable("write", &self.name)))
        };
        match self.look(Tries::AsConfigured).await? {
            (Owner::Us(_), found) if found == size_bytes => Ok(PutOutcome::Created),
            (Owner::Us(_), found) => wrong(format!("the object has {found} bytes of {size_bytes}")),
            (Owner::Nobody, _) => wrong("there is no object".to_owned()),
            // The store ignored the condition and a rival replaced ours, or said yes to both.
            (Owner::Rival, _) => Ok(PutOutcome::AlreadyThere),
        }
    }

    /// The completion failed, or an earlier answer to it was lost.
    async fn resolve(&self, failure: Failure, size_bytes: u64) -> Result<PutOutcome> {
        let taken = failure.is_precondition() || failure.is_missing_upload();
        let may_be_called_again = failure.verdict() != Verdict::Final;
        let outcome = match self.look(tries_after(&failure)).await {
            Ok((Owner::Us(_), found)) if found == size_bytes => return Ok(PutOutcome::Created),
            Ok((Owner::Rival | Owner::Us(_), _)) if taken => Ok(PutOutcome::AlreadyThere),
            _ => Err(failure),
        };
        match &outcome {
            Err(_) if may_be_called_again => self.in_doubt.store(true, Ordering::Relaxed),
            Err(failure) => {
                // Set once: the next completion asks the server nothing.
                let _ = self.ended.set(failure.clone());
                self.discard().await;
            }
            Ok(_) => self.discard().await,
        }
        outcome.map_err(|failure| self.unable_to_complete(failure))
    }

    fn unable_to_complete(&self, failure: Failure) -> Error {
        failure.into_error(self.store.unable("complete", &self.name))
    }

    /// Aborts with one try; whatever comes of it, the stale uploads are swept anyway.
    async fn discard(&self) {
        let call = Call::new(&self.store.requests.multipart_aborts).once();
        let tried = self.store.abort_upload(call, &self.store.key(&self.name), &self.upload).await;
        if let Err(error) = tried {
            tracing::debug!(?error, "unable to abort an upload");
        }
    }

    fn completed_parts(&self) -> Result<(CompletedMultipartUpload, u64)> {
        let parts = self.parts().clone();
        joined(&self.name, parts.keys().copied())?;
        let size_bytes = parts.values().map(|part| part.size_bytes).sum();
        let mut upload = CompletedMultipartUpload::builder();
        for (number, part) in parts {
            let completed = CompletedPart::builder()
                .set_part_number(i32::try_from(number).ok())
                .e_tag(part.etag);
            upload = upload.parts(match part.sum {
                None => completed.build(),
                Some(Sum { algorithm: Algorithm::Crc32c, value }) => {
                    completed.checksum_crc32_c(value).build()
                }
                Some(Sum { algorithm: Algorithm::Crc64Nvme, value }) => {
                    completed.checksum_crc64_nvme(value).build()
                }
            });
        }
        Ok((upload.build(), size_bytes))
    }
}

#[async_trait]
impl Multipart for Upload {
    async fn put_part(&self, number: u32, body: Bytes) -> Result<()> {
        let sdk_number = i32::try_from(number).unwrap_or(0);
        if !(1..=PART_NUMBER_MAX).contains(&number) {
            return Err(Error::new(Kind::Bug, format!("part number {number} of '{}'", self.name)));
        }
        let sum = self.algorithm.map(|algorithm| Sum { algorithm, value: algorithm.sum(&body) });
        let call = Call::new(&self.store.requests.parts).sending(body.len());
        let call = call.timed(&self.store.latencies.upload);
        let tried = self
            .store
            .attempt(call, |client| {
                let request = self.part_request(client, sdk_number);
                send_part(client, request, sum.as_ref(), body.clone())
            })
            .await?;
        let etag =
            tried.or_error(|| self.store.unable(&format!("write part {number} of"), &self.name))?;
        let size_bytes = body.len() as u64;
        self.parts().insert(number, Part { etag, size_bytes, sum });
        Ok(())
    }

    async fn complete(&self) -> Result<PutOutcome> {
        if let Some(failure) = self.ended.get() {
            // Another upload may do better, this one will not.
            let error = self.unable_to_complete(failure.clone());
            return Err(if error.is_transient() { error.with_kind(Kind::Conflict) } else { error });
        }
        let (parts, size_bytes) = self.completed_parts()?;
        let call = Call::new(&self.store.requests.multipart_completes);
        let tried =
            self.store.attempt(call, |client| self.complete_once(client, parts.clone())).await?;
        let maybe_done_before = tried.maybe_done_before || self.in_doubt.load(Ordering::Relaxed);
        match tried.result {
            Ok(()) => {
                // Should the look at the object fail, another completion finds what this one has made.
                self.in_doubt.store(true, Ordering::Relaxed);
                self.verify(size_bytes).await
            }
            Err(failure) if failure.is_precondition() && !maybe_done_before => {
                self.discard().await;
                Ok(PutOutcome::AlreadyThere)
            }
            Err(failure) => self.resolve(failure, size_bytes).await,
        }
    }

    async fn abort(&self) -> Result<()> {
        let call = Call::new(&self.store.requests.multipart_aborts);
        self.store.abort_upload(call, &self.store.key(&self.name), &self.upload).await
    }
}

impl S3 {
    async fn begin_upload(
        &self,
        client: &Client,
        name: &ObjectName,
        id: &str,
        algorithm: Option<Algorithm>,
    ) -> std::result::Result<String, Failure> {
        let (kind, key) = encryption(&self.options);
        let request = client
            .sdk()
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(self.key(name))
            .content_type(CONTENT_TYPE)
            .set_metadata(Some(HashMap::from([(ID_KEY.to_owned(), id.to_owned())])))
            .set_server_side_encryption(kind)
            .set_ssekms_key_id(key)
            .set_storage_class(storage_class(&self.options))
            .set_checksum_type(checksum_type(algorithm))
            .set_checksum_algorithm(algorithm.map(|algorithm| match algorithm {
                Algorithm::Crc32c => ChecksumAlgorithm::Crc32C,
                Algorithm::Crc64Nvme => ChecksumAlgorithm::Crc64Nvme,
            }));
        let answer = request.send().await.map_err(Failure::from)?;
        let upload = answer.upload_id().map(str::to_owned);
        upload.ok_or_else(|| Failure::nonsense("the server began an upload without an id"))
    }

    pub(super) async fn abort_upload(&self, call: Call<'_>, key: &str, upload: &str) -> Result<()> {
        let tried = self
            .attempt(call, |client| {
                let request = client.sdk().abort_multipart_upload().bucket(&self.bucket);
                request.key(key).upload_id(upload).send().map_err_failure()
            })
            .await?;
        match tried.result {
            Ok(_) => Ok(()),
            Err(failure) if failure.is_missing_upload() => Ok(()),
            Err(failure) => {
                let attempted = format!("unable to abort an upload in {}", self.describe());
                Err(failure.into_error(attempted))
            }
        }
    }
}

/// CRC-64/NVME exists for whole objects only; for CRC-32C the default of S3 is meant, and not said,
/// because older servers do not know the word.
fn checksum_type(algorithm: Option<Algorithm>) -> Option<ChecksumType> {
    (algorithm == Some(Algorithm::Crc64Nvme)).then_some(ChecksumType::FullObject)
}

/// Sends the request and returns the part's tag. Over TLS a body with a checksum needs no signature.
async fn send_part(
    client: &Client,
    request: UploadPartFluentBuilder,
    sum: Option<&Sum>,
    body: Bytes,
) -> std::result::Result<String, Failure> {
    let request = match sum {
        None => request,
        Some(Sum { algorithm: Algorithm::Crc32c, value }) => request.checksum_crc32_c(value),
        Some(Sum { algorithm: Algorithm::Crc64Nvme, value }) => request.checksum_crc64_nvme(value),
    };
    let request = request.body(ByteStream::from(body)).customize();
    let unsigned = client.tls && sum.is_some();
    let request = if unsigned { request.disable_payload_signing() } else { request };
    let answer = request.send().await.map_err(Failure::from)?;
    let etag = answer.e_tag().map(str::to_owned);
    // Without it there is no completion, so every server says it.
    etag.ok_or_else(|| Failure::stranger("the answer to a part has no tag"))
}
