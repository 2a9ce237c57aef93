//! Objects in one request: put if absent, replace if unchanged.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use aws_sdk_s3::operation::put_object::PutObjectOutput;
use aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ServerSideEncryption as Sse, StorageClass};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;

use super::attempt::{Call, Tried, Tries};
use super::client::Client;
use super::failure::{Failure, Verdict};
use super::{Got, S3};
use crate::error::Result;
use crate::store::{
    Checksum, ObjectName, PutOutcome, Replace, ServerSideEncryption, StoreOptions, VersionTag,
};

/// Metadata key of the id that each upload gets, to recognise it by.
pub(super) const ID_KEY: &str = "tidemark-upload";

/// Content type of everything: no server or browser is to guess.
pub(super) const CONTENT_TYPE: &str = "application/octet-stream";

/// The algorithm in use for one upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Crc32c,
    Crc64Nvme,
}

impl Algorithm {
    /// The checksum as S3 writes it.
    pub(super) fn sum(self, body: &[u8]) -> String {
        match self {
            Self::Crc32c => STANDARD.encode(crc_fast::crc32_iscsi(body).to_be_bytes()),
            Self::Crc64Nvme => STANDARD.encode(crc_fast::crc64_nvme(body).to_be_bytes()),
        }
    }
}

/// Under which condition an object is written.
#[derive(Clone)]
enum Condition {
    Absent,
    Tag(VersionTag),
}

/// An upload's checksum, if it carries one.
#[derive(Clone)]
pub(super) struct Sum {
    pub(super) algorithm: Algorithm,
    pub(super) value: String,
}

/// Encryption by the store as the SDK takes it: the kind and the key.
pub(super) fn encryption(options: &StoreOptions) -> (Option<Sse>, Option<String>) {
    match &options.server_side_encryption {
        ServerSideEncryption::BucketDefault => (None, None),
        ServerSideEncryption::S3 => (Some(Sse::Aes256), None),
        ServerSideEncryption::Kms(key) => (Some(Sse::AwsKms), key.clone()),
    }
}

pub(super) fn storage_class(options: &StoreOptions) -> Option<StorageClass> {
    options.storage_class.as_deref().map(StorageClass::from)
}

/// How often to ask what became of an upload that failed so: once, when everything was tried in vain
/// before.
pub(super) fn tries_after(failure: &Failure) -> Tries {
    if failure.verdict() == Verdict::Final { Tries::AsConfigured } else { Tries::Once }
}

/// Whose object was found under the name.
pub(super) enum Owner {
    /// Ours, with its tag.
    Us(VersionTag),
    Rival,
    Nobody,
}

impl S3 {
    /// The algorithm for new uploads.
    pub(super) fn algorithm(&self) -> Option<Algorithm> {
        match self.options.checksum {
            Checksum::None => None,
            Checksum::Crc64Nvme => Some(Algorithm::Crc64Nvme),
            Checksum::Crc32c => Some(Algorithm::Crc32c),
            Checksum::Auto if self.checksum_refused.load(Ordering::Relaxed) => None,
            Checksum::Auto => Some(Algorithm::Crc32c),
        }
    }

    /// With `auto`, a server that does not know the checksum gets none from now on; true when it is
    /// worth trying again so.
    pub(super) fn give_up_checksum(&self, failure: &Failure, used: Option<Algorithm>) -> bool {
        let auto = self.options.checksum == Checksum::Auto;
        let give_up = auto && used.is_some() && failure.may_blame_checksum();
        if give_up && !self.checksum_refused.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                store = %self.describe(),
                "the store refuses upload checksums; uploads go without them"
            );
        }
        give_up
    }

    /// An id that no other upload has.
    pub(super) fn upload_id(&self) -> Result<String> {
        Ok(format!("{:032x}", u128::from_le_bytes(self.clock.random()?)))
    }

    pub(super) async fn put_if_absent(&self, name: &ObjectName, body: Bytes) -> Result<PutOutcome> {
        let id = self.upload_id()?;
        let tried = self.put(name, &body, &id, &Condition::Absent).await?;
        let failure = match tried.result {
            Ok(_tag) => return Ok(PutOutcome::Created),
            Err(failure) => failure,
        };
        if failure.is_precondition() && !tried.maybe_done_before {
            return Ok(PutOutcome::AlreadyThere);
        }
        if !failure.is_precondition() && !failure.is_ambiguous() && !tried.maybe_done_before {
            return Err(failure.into_error(self.unable("write", name)));
        }
        // An answer was lost somewhere on the way: whose object is it?
        match self.owner(name, &id, &body, tries_after(&failure)).await {
            Ok(Owner::Us(_)) => Ok(PutOutcome::Created),
            Ok(Owner::Rival) if failure.is_precondition() => Ok(PutOutcome::AlreadyThere),
            _ => Err(failure.into_error(self.unable("write", name))),
        }
    }

    pub(super) async fn replace_if(
        &self,
        name: &ObjectName,
        body: Bytes,
        expected: Option<VersionTag>,
    ) -> Result<Replace> {
        let replaced = self.replace_once(name, &body, expected.as_ref()).await?;
        let (Replace::Lost, Some(expected)) = (&replaced, expected) else { return Ok(replaced) };
        if self.bare_tags.load(Ordering::Relaxed) {
            return Ok(replaced);
        }
        // Ceph 16 compares the tag with its quotes to its own without, and so never finds it equal.
        // The object as expected in spite of the refusal is how such a server is recognised.
        match self.read_mutable(name, Tries::AsConfigured).await? {
            Some((_, found)) if found == expected => {
                self.bare_tags.store(true, Ordering::Relaxed);
                self.replace_once(name, &body, Some(&expected)).await
            }
            _ => Ok(replaced),
        }
    }

    async fn replace_once(
        &self,
        name: &ObjectName,
        body: &Bytes,
        expected: Option<&VersionTag>,
    ) -> Result<Replace> {
        let id = self.upload_id()?;
        let condition = expected.cloned().map_or(Condition::Absent, Condition::Tag);
        let tried = self.put(name, body, &id, &condition).await?;
        let failure = match tried.result {
            Ok(tag) => return Ok(Replace::Done(tag)),
            Err(failure) => failure,
        };
        // An object that is to be replaced and is gone was not as expected either.
        let lost = failure.is_precondition() || failure.is_missing();
        if lost && !tried.maybe_done_before {
            return Ok(Replace::Lost);
        }
        if !lost && !failure.is_ambiguous() && !tried.maybe_done_before {
            return Err(failure.into_error(self.unable("replace", name)));
        }
        match self.read_mutable(name, tries_after(&failure)).await {
            Ok(Some((found, tag))) if found == *body => Ok(Replace::Done(tag)),
            Ok(_) if lost => Ok(Replace::Lost),
            _ => Err(failure.into_error(self.unable("replace", name))),
        }
    }

    /// Puts the object; the tag of what was written.
    async fn put(
        &self,
        name: &ObjectName,
        body: &Bytes,
        id: &str,
        condition: &Condition,
    ) -> Result<Tried<VersionTag>> {
        loop {
            let algorithm = self.algorithm();
            let sum = algorithm.map(|algorithm| Sum { algorithm, value: algorithm.sum(body) });
            let call = Call::new(&self.requests.puts).sending(body.len());
            let call = call.timed(&self.latencies.upload);
            let tried = self
                .attempt(call, |client| {
                    self.put_once(client, (name, id, condition), sum.as_ref(), body)
                })
                .await?;
            match &tried.result {
                Err(failure) if self.give_up_checksum(failure, algorithm) => {}
                _ => return Ok(tried),
            }
        }
    }

    async fn put_once(
        &self,
        client: &Client,
        (name, id, condition): (&ObjectName, &str, &Condition),
        sum: Option<&Sum>,
        body: &Bytes,
    ) -> std::result::Result<VersionTag, Failure> {
        let request = self.put_request(client, name, id, condition);
        let answer = send_put(client, request, sum, body.clone()).await?;
        if let Some(tag) = answer.e_tag() {
            return Ok(VersionTag::new(tag));
        }
        // Some servers leave the tag out, and a proxy says 200 without having asked the server at all.
        self.requests.heads.one();
        match self.owner_once(client, name, id, body).await? {
            Owner::Us(tag) => Ok(tag),
            Owner::Rival | Owner::Nobody => {
                Err(Failure::stranger("the answer said yes, but the object is not there"))
            }
        }
    }

    fn put_request(
        &self,
        client: &Client,
        name: &ObjectName,
        id: &str,
        condition: &Condition,
    ) -> PutObjectFluentBuilder {
        let (kind, key) = encryption(&self.options);
        let request = client
            .sdk()
            .put_object()
            .bucket(&self.bucket)
            .key(self.key(name))
            .content_type(CONTENT_TYPE)
            .set_metadata(Some(HashMap::from([(ID_KEY.to_owned(), id.to_owned())])))
            .set_server_side_encryption(kind)
            .set_ssekms_key_id(key)
            .set_storage_class(storage_class(&self.options));
        match condition {
            Condition::Absent => request.if_none_match("*"),
            Condition::Tag(tag) if self.bare_tags.load(Ordering::Relaxed) => {
                request.if_match(tag.as_str().trim_matches('"'))
            }
            Condition::Tag(tag) => request.if_match(tag.as_str()),
        }
    }

    /// Looks whose object it is.
    async fn owner(
        &self,
        name: &ObjectName,
        id: &str,
        body: &Bytes,
        tries: Tries,
    ) -> Result<Owner> {
        let call = Call { tries, ..Call::new(&self.requests.heads) }.expecting(body.len() as u64);
        let tried = self.attempt(call, |client| self.owner_once(client, name, id, body)).await?;
        tried.or_error(|| self.unable("look at", name))
    }

    /// Ours carries our id, or, on a server that keeps no metadata, our bytes, which hold enough random
    /// ones to be nobody else's.
    async fn owner_once(
        &self,
        client: &Client,
        name: &ObjectName,
        id: &str,
        body: &Bytes,
    ) -> std::result::Result<Owner, Failure> {
        let found = match self.head_once(client, name).await? {
            None => return Ok(Owner::Nobody),
            Some(found) => found,
        };
        match found.upload_id {
            Some(found_id) if found_id == id => return Ok(Owner::Us(found.tag)),
            Some(_) => return Ok(Owner::Rival),
            None if found.size_bytes != body.len() as u64 => return Ok(Owner::Rival),
            None => {}
        }
        self.requests.gets.one();
        Ok(match self.get_once(client, name, None, body.len() as u64).await? {
            Got::Body(found, tag) if found == *body => Owner::Us(tag),
            _ => Owner::Rival,
        })
    }

    /// Puts an object with a checksum that is not its own; whether the server refused it.
    pub(super) async fn refuses_wrong_checksum(&self, name: &ObjectName) -> Result<Option<bool>> {
        let Some(algorithm) = self.algorithm() else { return Ok(None) };
        let body = Bytes::from_static(b"tidemark probe, safe to delete: wrong checksum");
        let sum = Sum { algorithm, value: algorithm.sum(b"something else") };
        let id = self.upload_id()?;
        let call = Call::new(&self.requests.puts).sending(body.len()).once();
        let tried = self
            .attempt(call, |client| {
                let request = self.put_request(client, name, &id, &Condition::Absent);
                send_put(client, request, Some(&sum), body.clone())
            })
            .await?;
        Ok(match tried.result {
            Ok(answer) => answer.e_tag().map(|_stored| false),
            Err(failure) if failure.is_ambiguous() => None,
            Err(_) => Some(true),
        })
    }
}

/// Sends the request. Over TLS a body with a checksum needs no signature.
async fn send_put(
    client: &Client,
    request: PutObjectFluentBuilder,
    sum: Option<&Sum>,
    body: Bytes,
) -> std::result::Result<PutObjectOutput, Failure> {
    let request = match sum {
        None => request,
        Some(Sum { algorithm: Algorithm::Crc32c, value }) => request.checksum_crc32_c(value),
        Some(Sum { algorithm: Algorithm::Crc64Nvme, value }) => request.checksum_crc64_nvme(value),
    };
    let request = request.body(ByteStream::from(body)).customize();
    let unsigned = client.tls && sum.is_some();
    let request = if unsigned { request.disable_payload_signing() } else { request };
    request.send().await.map_err(Failure::from)
}
