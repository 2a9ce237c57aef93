//! Checksums that uploads carry: computed as the bytes pass, compared with what was sent.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest as _, Md5};
use s3s::checksum::ChecksumHasher;
use s3s::crypto::Checksum as _;
use s3s::dto;
use s3s::{S3Error, S3ErrorCode, S3Result, TrailingHeaders, s3_error};
use serde::{Deserialize, Serialize};

/// A checksum that is kept with an object or part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checksum {
    /// `CRC32C` and so on.
    pub(crate) algorithm: String,
    /// `FULL_OBJECT` or `COMPOSITE`.
    pub(crate) kind: String,
    /// Base64, with `-count` for composites.
    pub(crate) value: String,
}

/// Names of the algorithms.
pub(crate) const ALGORITHMS: [&str; 5] = ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"];

/// What a request claims of its body.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claims {
    pub(crate) sums: dto::Checksum,
    pub(crate) algorithm: Option<String>,
    pub(crate) content_md5: Option<String>,
}

/// The checksums of anything that carries them under the names of the protocol: the requests have no
/// type for them.
macro_rules! sums {
    ($of:expr) => {
        s3s::dto::Checksum {
            checksum_crc32: $of.checksum_crc32,
            checksum_crc32c: $of.checksum_crc32c,
            checksum_crc64nvme: $of.checksum_crc64nvme,
            checksum_sha1: $of.checksum_sha1,
            checksum_sha256: $of.checksum_sha256,
            ..s3s::dto::Checksum::default()
        }
    };
}
pub(crate) use sums;

impl Claims {
    /// The algorithm that the request names or uses.
    pub(crate) fn named(&self) -> Option<String> {
        let used = ALGORITHMS.into_iter().find(|name| value_of(&self.sums, name).is_some());
        used.map(str::to_owned).or_else(|| self.algorithm.clone())
    }
}

/// The value for one algorithm.
pub(crate) fn value_of<'a>(sums: &'a dto::Checksum, algorithm: &str) -> Option<&'a String> {
    match algorithm {
        "CRC32" => sums.checksum_crc32.as_ref(),
        "CRC32C" => sums.checksum_crc32c.as_ref(),
        "CRC64NVME" => sums.checksum_crc64nvme.as_ref(),
        "SHA1" => sums.checksum_sha1.as_ref(),
        "SHA256" => sums.checksum_sha256.as_ref(),
        _ => None,
    }
}

/// The kept checksum in the form of a reply.
pub(crate) fn to_dto(kept: Option<&Checksum>) -> dto::Checksum {
    let mut sums = dto::Checksum::default();
    if let Some(kept) = kept {
        let value = Some(kept.value.clone());
        match kept.algorithm.as_str() {
            "CRC32" => sums.checksum_crc32 = value,
            "CRC32C" => sums.checksum_crc32c = value,
            "CRC64NVME" => sums.checksum_crc64nvme = value,
            "SHA1" => sums.checksum_sha1 = value,
            "SHA256" => sums.checksum_sha256 = value,
            _ => {}
        }
        sums.checksum_type = Some(dto::ChecksumType::from(kept.kind.clone()));
    }
    sums
}

/// Hashes a body as it passes.
pub(crate) struct Hashes {
    hasher: ChecksumHasher,
    md5: Option<Md5>,
}

impl Hashes {
    /// Computes what the claims can be held against.
    pub(crate) fn for_claims(claims: &Claims) -> Self {
        let mut hasher = ChecksumHasher::default();
        match claims.named().as_deref() {
            Some("CRC32") => hasher.crc32 = Some(s3s::crypto::Crc32::new()),
            Some("CRC32C") => hasher.crc32c = Some(s3s::crypto::Crc32c::new()),
            Some("CRC64NVME") => hasher.crc64nvme = Some(s3s::crypto::Crc64Nvme::new()),
            Some("SHA1") => hasher.sha1 = Some(s3s::crypto::Sha1::new()),
            Some("SHA256") => hasher.sha256 = Some(s3s::crypto::Sha256::new()),
            _ => {}
        }
        Self { hasher, md5: claims.content_md5.as_ref().map(|_| Md5::new()) }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        if let Some(md5) = &mut self.md5 {
            md5.update(bytes);
        }
    }

    /// Compares with the claims, those in the trailers included; returns what to keep.
    pub(crate) fn verify(
        self,
        claims: &Claims,
        trailers: Option<&TrailingHeaders>,
        believe: bool,
    ) -> S3Result<Option<Checksum>> {
        if let (Some(md5), Some(claimed)) = (self.md5, &claims.content_md5)
            && !believe
            && STANDARD.encode(md5.finalize()) != *claimed
        {
            return Err(s3_error!(BadDigest, "the Content-MD5 you specified did not match"));
        }
        let Some(algorithm) = claims.named() else { return Ok(None) };
        let computed = self.hasher.finalize();
        let Some(value) = value_of(&computed, &algorithm) else {
            return Err(s3_error!(InvalidRequest, "unknown checksum algorithm {algorithm}"));
        };
        let in_trailer = trailers.and_then(|trailers| {
            let header = format!("x-amz-checksum-{}", algorithm.to_lowercase());
            trailers.read(|headers| {
                headers
                    .get(header.as_str())
                    .and_then(|value| value.to_str().ok())
                    .map(str::to_owned)
            })
        });
        let claimed = value_of(&claims.sums, &algorithm).cloned().or(in_trailer.flatten());
        if claimed.is_some_and(|claimed| claimed != *value) && !believe {
            return Err(mismatch(&algorithm));
        }
        let kind = "FULL_OBJECT".to_owned();
        Ok(Some(Checksum { value: value.clone(), kind, algorithm }))
    }
}

pub(crate) fn mismatch(algorithm: &str) -> S3Error {
    let message = format!("The {algorithm} you specified did not match the calculated checksum.");
    S3Error::with_message(S3ErrorCode::BadDigest, message)
}

/// Checksum of an object from those of its parts.
pub(crate) fn joined(algorithm: &str, kind: &str, parts: &[(Checksum, u64)]) -> Option<Checksum> {
    let value = if kind == "FULL_OBJECT" {
        full_object(algorithm, parts)?
    } else {
        composite(algorithm, parts)?
    };
    Some(Checksum { algorithm: algorithm.to_owned(), kind: kind.to_owned(), value })
}

/// The checksum of the parts' checksums.
fn composite(algorithm: &str, parts: &[(Checksum, u64)]) -> Option<String> {
    let claims = Claims { algorithm: Some(algorithm.to_owned()), ..Claims::default() };
    let mut hashes = Hashes::for_claims(&claims);
    for (part, _) in parts {
        hashes.update(&STANDARD.decode(&part.value).ok()?);
    }
    let joined = hashes.hasher.finalize();
    Some(format!("{}-{}", value_of(&joined, algorithm)?, parts.len()))
}

/// The checksum of the joined bytes, which CRCs allow to compute from those of the parts.
fn full_object(algorithm: &str, parts: &[(Checksum, u64)]) -> Option<String> {
    let (crc, width) = match algorithm {
        "CRC32" => (crc_fast::CrcAlgorithm::Crc32IsoHdlc, 4),
        "CRC32C" => (crc_fast::CrcAlgorithm::Crc32Iscsi, 4),
        "CRC64NVME" => (crc_fast::CrcAlgorithm::Crc64Nvme, 8),
        _ => return None,
    };
    let mut all: Option<u64> = None;
    for (part, size) in parts {
        let bytes = STANDARD.decode(&part.value).ok()?;
        let value = bytes.iter().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        all = Some(match all {
            None => value,
            Some(before) => crc_fast::checksum_combine(crc, before, value, *size),
        });
    }
    Some(STANDARD.encode(all?.to_be_bytes().get(8 - width..)?))
}
