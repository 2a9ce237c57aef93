//! What an operator can set about a store.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use secrecy::SecretString;

use crate::error::{Error, Kind, Result};

/// Settings of a store. Everything has a default that works on AWS with credentials from the
/// environment; the directory driver uses none of them.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Base URL of an S3 server that is not AWS, such as `https://minio.example.com:9000`.
    pub endpoint: Option<String>,
    /// Region to sign for; else from the environment, the profile or the instance; else `us-east-1`.
    pub region: Option<String>,
    /// How the bucket is named in a request.
    pub addressing: Addressing,
    /// Profile of `~/.aws/config` to take region and credentials from.
    pub profile: Option<String>,
    /// Keys given by the configuration; `None` means the standard credential chain.
    pub credentials: Option<StaticCredentials>,
    /// PEM file with certificate authorities to trust besides those of the machine.
    pub ca_file: Option<PathBuf>,
    /// Encryption by the store of what it keeps.
    pub server_side_encryption: ServerSideEncryption,
    /// Storage class of new objects, such as `STANDARD_IA`; `None` is the bucket's default.
    pub storage_class: Option<String>,
    /// Checksum sent with every upload for the store to verify.
    pub checksum: Checksum,
    /// Longest time for one try of a request, body not counted: a body adds one second for every
    /// [`BODY_BYTES_PER_SECOND_MIN`] of it.
    pub attempt_timeout: Duration,
    /// No try of a call begins later than this after the first.
    pub overall_timeout: Duration,
    /// Most tries of one call.
    pub attempts_max: u32,
}

/// A transfer slower than this is given up and tried again.
pub const BODY_BYTES_PER_SECOND_MIN: u64 = 64 * 1024;

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            endpoint: None,
            region: None,
            addressing: Addressing::Auto,
            profile: None,
            credentials: None,
            ca_file: None,
            server_side_encryption: ServerSideEncryption::BucketDefault,
            storage_class: None,
            checksum: Checksum::Auto,
            attempt_timeout: Duration::from_secs(30),
            overall_timeout: Duration::from_secs(300),
            attempts_max: 8,
        }
    }
}

/// How the bucket is named in a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Addressing {
    /// Virtual-host style on AWS, path style with an `endpoint`.
    #[default]
    Auto,
    /// `https://endpoint/bucket/key`.
    Path,
    /// `https://bucket.endpoint/key`.
    VirtualHost,
}

/// Keys given by the configuration.
#[derive(Clone, Debug)]
pub struct StaticCredentials {
    /// Access key id, which is no secret.
    pub access_key_id: String,
    /// Secret access key.
    pub secret_access_key: SecretString,
    /// Session token of temporary credentials.
    pub session_token: Option<SecretString>,
}

/// Encryption by the store of what it keeps; independent of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ServerSideEncryption {
    /// Whatever the bucket is set to.
    #[default]
    BucketDefault,
    /// SSE-S3.
    S3,
    /// SSE-KMS with this key, or with the account's default key.
    Kms(Option<String>),
}

/// Checksum sent with every upload for the store to verify.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// CRC-32C, and none once the store has said that it does not know it.
    #[default]
    Auto,
    /// CRC-64/NVME over the whole object.
    Crc64Nvme,
    /// CRC-32C of every part.
    Crc32c,
    /// No checksum headers, for stores that refuse them.
    None,
}

/// Names of the values of an option, for parsing and printing.
macro_rules! spelled {
    ($type:ty, $what:literal, $($value:path => $name:literal),+) => {
        impl FromStr for $type {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                match text {
                    $($name => Ok($value),)+
                    _ => Err(Error::new(
                        Kind::Config,
                        format!("unable to use '{text}' as {}: expected one of {}",
                            $what, [$($name),+].join(", ")),
                    )),
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($value => $name,)+ })
            }
        }
    };
}

spelled!(Addressing, "addressing style",
    Addressing::Auto => "auto", Addressing::Path => "path", Addressing::VirtualHost => "virtual-host");
spelled!(Checksum, "upload checksum",
    Checksum::Auto => "auto", Checksum::Crc64Nvme => "crc64nvme",
    Checksum::Crc32c => "crc32c", Checksum::None => "none");

impl FromStr for ServerSideEncryption {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            None if text == "bucket-default" => Ok(Self::BucketDefault),
            None if text == "sse-s3" => Ok(Self::S3),
            None if text == "sse-kms" => Ok(Self::Kms(None)),
            Some(("sse-kms", key)) if !key.is_empty() => Ok(Self::Kms(Some(key.to_owned()))),
            _ => Err(Error::new(
                Kind::Config,
                format!(
                    "unable to use '{text}' as server-side encryption: expected one of \
                     bucket-default, sse-s3, sse-kms, sse-kms:KEY"
                ),
            )),
        }
    }
}

impl fmt::Display for ServerSideEncryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BucketDefault => f.write_str("bucket-default"),
            Self::S3 => f.write_str("sse-s3"),
            Self::Kms(None) => f.write_str("sse-kms"),
            Self::Kms(Some(key)) => write!(f, "sse-kms:{key}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_print_what_they_parse() {
        for text in ["auto", "path", "virtual-host"] {
            assert_eq!(text.parse::<Addressing>().unwrap().to_string(), text);
        }
        for text in ["auto", "crc64nvme", "crc32c", "none"] {
            assert_eq!(text.parse::<Checksum>().unwrap().to_string(), text);
        }
        for text in ["bucket-default", "sse-s3", "sse-kms", "sse-kms:alias/a:b"] {
            assert_eq!(text.parse::<ServerSideEncryption>().unwrap().to_string(), text);
        }
        let error = "md5".parse::<Checksum>().unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.to_string().ends_with("auto, crc64nvme, crc32c, none"), "{error}");
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let options = StoreOptions {
            credentials: Some(StaticCredentials {
                access_key_id: "AKIDEXAMPLE".to_owned(),
                secret_access_key: "hush-hush".to_owned().into(),
                session_token: Some("token-token".to_owned().into()),
            }),
            ..StoreOptions::default()
        };
        let shown = format!("{options:?}");
        assert!(!shown.contains("hush-hush") && !shown.contains("token-token"), "{shown}");
    }
}
