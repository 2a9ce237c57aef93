//! What went wrong with a request: whether to try again, and what to tell the operator.

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use crate::error::{Error, Kind};

/// One failed try.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    stage: Stage,
    /// HTTP status, 0 without an answer.
    status: u16,
    /// S3's error code, empty without one.
    code: String,
    message: String,
    /// The bucket's region, where the answer tells.
    region: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Before anything was sent: credentials, mostly.
    Construction,
    /// No answer, or half of one. What was asked for may have been done.
    Transport,
    /// An answer that says no.
    Answered,
    /// An answer that is not what was asked for.
    Nonsense,
    /// An answer that no S3 server gives: that of a proxy in its place.
    Stranger,
}

/// What to do about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Try again after a pause.
    Retry,
    /// Try again after a longer pause, and hold all other requests back too.
    SlowDown,
    /// Trying again gives the same answer.
    Final,
}

impl Failure {
    /// The tries took too long.
    pub(super) fn timed_out(seconds: u64) -> Self {
        Self::transport(format!("no answer within {seconds} s"))
    }

    /// The connection failed us.
    pub(super) fn transport(message: String) -> Self {
        Self { stage: Stage::Transport, status: 0, code: String::new(), message, region: None }
    }

    /// The server's answer is not what was asked for.
    pub(super) fn nonsense(message: impl Into<String>) -> Self {
        let message = message.into();
        Self { stage: Stage::Nonsense, status: 0, code: String::new(), message, region: None }
    }

    /// The answer is none that a server of S3 gives. What was asked for may have been done.
    pub(super) fn stranger(message: &str) -> Self {
        let (code, message) = (String::new(), message.to_owned());
        Self { stage: Stage::Stranger, status: 0, code, message, region: None }
    }

    /// An error that the server put into a list of results.
    pub(super) fn listed(code: &str, message: &str) -> Self {
        let (code, message) = (code.to_owned(), message.to_owned());
        Self { stage: Stage::Answered, status: 200, code, message, region: None }
    }

    /// Whether the server answered with this code, or with this status and no code (a HEAD has none).
    pub(super) fn is(&self, code: &str, status: u16) -> bool {
        self.stage == Stage::Answered
            && (self.code == code || self.status == status && self.codeless())
    }

    fn codeless(&self) -> bool {
        self.code.is_empty() || self.code == "NotFound" || self.code == "Unknown"
    }

    /// The object's name was taken, or it was not as expected.
    pub(super) fn is_precondition(&self) -> bool {
        self.is("PreconditionFailed", 412)
    }

    /// There is no such object. The server said so by its code: a 404 without one is what a proxy says
    /// that has lost its server.
    pub(super) fn is_missing(&self) -> bool {
        self.stage == Stage::Answered && self.code == "NoSuchKey"
    }

    /// The same of a HEAD, which can have no code (and does not tell an object from a bucket).
    pub(super) fn is_missing_for_head(&self) -> bool {
        self.is("NoSuchKey", 404)
    }

    /// There is no such upload, or no more.
    pub(super) fn is_missing_upload(&self) -> bool {
        self.stage == Stage::Answered && self.code == "NoSuchUpload"
    }

    /// The server does not know what was asked of it.
    pub(super) fn is_not_implemented(&self) -> bool {
        self.stage == Stage::Answered && (self.code == "NotImplemented" || self.status == 501)
    }

    /// The server may be refusing the checksum headers of an upload.
    pub(super) fn may_blame_checksum(&self) -> bool {
        let about = |what: &str| {
            self.code.to_ascii_lowercase().contains(what)
                || self.message.to_ascii_lowercase().contains(what)
        };
        let refused = matches!(self.code.as_str(), "InvalidRequest" | "InvalidArgument");
        self.is_not_implemented() || refused && (about("checksum") || about("crc"))
    }

    /// The server insists on the header that checksums have replaced.
    pub(super) fn wants_content_md5(&self) -> bool {
        let refused = matches!(
            self.code.as_str(),
            "MissingContentMD5" | "InvalidRequest" | "InvalidArgument" | "InvalidDigest"
        );
        refused && (self.code == "MissingContentMD5" || self.message.contains("MD5"))
    }

    /// The upload was corrupted on its way.
    pub(super) fn is_checksum_mismatch(&self) -> bool {
        matches!(
            self.code.as_str(),
            "BadDigest"
                | "XAmzContentChecksumMismatch"
                | "XAmzContentSHA256Mismatch"
                | "InvalidDigest"
        )
    }

    /// The credentials were refused and others may do. A HEAD does not say which of all refusals it is.
    pub(super) fn may_blame_credentials(&self) -> bool {
        let refused = matches!(
            self.code.as_str(),
            "ExpiredToken"
                | "InvalidToken"
                | "TokenRefreshRequired"
                | "InvalidAccessKeyId"
                | "SignatureDoesNotMatch"
        );
        let unsaid = self.codeless() && matches!(self.status, 400 | 401 | 403);
        self.stage == Stage::Answered && (refused || unsaid)
    }

    /// Whether what was asked for may have been done all the same.
    pub(super) fn is_ambiguous(&self) -> bool {
        match self.stage {
            Stage::Transport | Stage::Nonsense | Stage::Stranger => true,
            Stage::Construction => false,
            Stage::Answered => self.status >= 500 || self.status == 200,
        }
    }

    pub(super) fn verdict(&self) -> Verdict {
        match self.stage {
            Stage::Construction | Stage::Nonsense => return Verdict::Final,
            Stage::Transport if self.is_untrusted_certificate() => return Verdict::Final,
            Stage::Transport | Stage::Stranger => return Verdict::Retry,
            Stage::Answered => {}
        }
        match self.code.as_str() {
            "SlowDown"
            | "SlowDownRead"
            | "SlowDownWrite"
            | "RequestLimitExceeded"
            | "Throttling"
            | "ThrottlingException"
            | "TooManyRequests"
            | "BandwidthLimitExceeded" => Verdict::SlowDown,
            "InternalError"
            | "RequestTimeout"
            | "RequestTimeTooSkewed"
            | "OperationAborted"
            | "ConditionalRequestConflict"
            | "ServiceUnavailable"
            | "Busy"
            | "IncompleteBody" => Verdict::Retry,
            // Of each name that DeleteObjects was refused, in an answer of status 200.
            "AccessDenied" | "AllAccessDisabled" | "InvalidObjectState" | "NotImplemented" => {
                Verdict::Final
            }
            _ if self.is_checksum_mismatch() => Verdict::Retry,
            _ => match self.status {
                429 | 503 | 509 => Verdict::SlowDown,
                501 | 505 => Verdict::Final,
                404 if self.codeless() => Verdict::Retry,
                408 | 500..=599 => Verdict::Retry,
                // An answer that cannot be read; whoever asked looks what came of it.
                200 if self.code.is_empty() => Verdict::Final,
                // The body was an error that we do not know.
                200 => Verdict::Retry,
                _ => Verdict::Final,
            },
        }
    }

    fn is_untrusted_certificate(&self) -> bool {
        self.message.contains("invalid peer certificate")
    }

    /// The error for people. `attempted` says what for, with the object and the store in it.
    pub(super) fn into_error(self, attempted: impl std::fmt::Display) -> Error {
        let (kind, hint) = self.meaning();
        let error = Error::new(kind, self.described()).context(attempted);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }

    fn described(&self) -> String {
        match (self.code.as_str(), self.message.as_str()) {
            ("", "") if self.status == 200 => "the server's answer cannot be read".to_owned(),
            ("", "") => format!("the server answered with status {}", self.status),
            ("", message) => message.to_owned(),
            (code, "") => format!("{code} (status {})", self.status),
            (code, message) => format!("{code}: {}", message.trim_end_matches('.')),
        }
    }

    fn meaning(&self) -> (Kind, Option<String>) {
        match self.stage {
            Stage::Construction => return self.construction(),
            Stage::Transport if self.is_untrusted_certificate() => {
                let hint = "If the server's certificate comes from a private authority, name that \
                            authority's certificate in the option ca_file. Else see whether it is \
                            valid today, by this machine's clock.";
                // Not 'config': one that is not valid yet, by a clock that is not set yet, passes.
                return (Kind::Denied, Some(hint.to_owned()));
            }
            Stage::Transport => {
                let hint = "Check the endpoint and that this machine can reach it.";
                return (Kind::Unavailable, Some(hint.to_owned()));
            }
            Stage::Nonsense => return (Kind::Unsupported, None),
            Stage::Stranger => return (Kind::Unavailable, Some(STRANGER_HINT.to_owned())),
            Stage::Answered => {}
        }
        let (kind, hint) = self.answered();
        (kind, hint.map(str::to_owned).or_else(|| self.region_hint()))
    }

    fn construction(&self) -> (Kind, Option<String>) {
        if self.message.contains("redential") || self.message.contains("dentity") {
            let hint = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile, or give the \
                        machine a role.";
            return (Kind::Denied, Some(hint.to_owned()));
        }
        (Kind::Config, None)
    }

    fn answered(&self) -> (Kind, Option<&'static str>) {
        match self.code.as_str() {
            "NoSuchBucket" | "InvalidBucketName" => (
                Kind::Config,
                Some(
                    "Check the bucket's name in --repository and the endpoint, or make the bucket.",
                ),
            ),
            "InvalidAccessKeyId" | "NotSignedUp" => (
                Kind::Denied,
                Some(
                    "The server does not know this access key id: check it (AWS_ACCESS_KEY_ID, or that of the profile), and that it belongs to this endpoint.",
                ),
            ),
            "SignatureDoesNotMatch" => (
                Kind::Denied,
                Some(
                    "Most often the secret access key is wrong (AWS_SECRET_ACCESS_KEY, or that of the profile), else the region or this machine's clock.",
                ),
            ),
            "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" => {
                (Kind::Denied, Some("The session token is no longer valid: renew the credentials."))
            }
            "RequestTimeTooSkewed" => (
                Kind::Denied,
                Some("This machine's clock and the server's differ too much: set it right."),
            ),
            "AccessDenied" | "AllAccessDisabled" | "AccountProblem" | "Forbidden" => {
                (Kind::Denied, Some(RIGHTS))
            }
            "PermanentRedirect"
            | "AuthorizationHeaderMalformed"
            | "IllegalLocationConstraintException"
            | "TemporaryRedirect" => (Kind::Config, None),
            // What is wrong is this one object: those beside it may be there.
            "InvalidObjectState" => (
                Kind::Unsupported,
                Some(
                    "The object was moved to an archive class: restore it there first, and exclude the repository from that lifecycle rule.",
                ),
            ),
            "QuotaExceeded" | "InsufficientStorage" | "XMinioStorageFull" => {
                (Kind::Unavailable, Some("The store is full or over its quota: make room."))
            }
            "KeyTooLongError" | "EntityTooSmall" | "EntityTooLarge" | "InvalidPartOrder" => {
                (Kind::Bug, None)
            }
            "NoSuchUpload" => (
                Kind::Conflict,
                Some("The upload was aborted meanwhile, by a lifecycle rule or another process."),
            ),
            // Nothing that was stored is damaged: the object was never made, and a new upload can be.
            "InvalidPart" => (
                Kind::Unavailable,
                Some("The store confirmed a part of the upload and does not have it any more."),
            ),
            "NotImplemented" => (
                Kind::Unsupported,
                Some("The server lacks something that is needed; `tidemark check` says what."),
            ),
            _ if self.is_checksum_mismatch() => (
                Kind::Corrupt,
                Some(
                    "Data is being changed between this machine and the store: check memory, network devices and proxies.",
                ),
            ),
            _ => self.by_status(),
        }
    }

    fn by_status(&self) -> (Kind, Option<&'static str>) {
        match (self.verdict(), self.status) {
            (Verdict::SlowDown, _) => {
                (Kind::Unavailable, Some("The store is asking for fewer requests."))
            }
            (Verdict::Retry, 404) => (Kind::Unavailable, Some(STRANGER_HINT)),
            (Verdict::Retry, _) => (Kind::Unavailable, None),
            (Verdict::Final, 301 | 307 | 400) => (Kind::Config, None),
            (Verdict::Final, 401 | 403) => (Kind::Denied, Some(RIGHTS)),
            (Verdict::Final, 404) => (Kind::NotFound, None),
            (Verdict::Final, 409 | 412) => (Kind::Conflict, None),
            (Verdict::Final, 416) => (Kind::Corrupt, None),
            (Verdict::Final, _) => (Kind::Unsupported, None),
        }
    }

    fn region_hint(&self) -> Option<String> {
        let wrong = matches!(
            self.code.as_str(),
            "PermanentRedirect"
                | "AuthorizationHeaderMalformed"
                | "IllegalLocationConstraintException"
        ) || self.status == 301;
        if !wrong {
            return None;
        }
        Some(match &self.region {
            Some(region) => {
                format!("The bucket is in region {region}: set the option region to it.")
            }
            None => "Set the option region to the bucket's region.".to_owned(),
        })
    }
}

/// Said of an answer that no S3 server gives.
const STRANGER_HINT: &str =
    "Something else answers in the server's place: check the endpoint, and the proxies before it.";

/// What a missing right may be.
const RIGHTS: &str = "The credentials need the rights s3:GetObject, s3:PutObject, s3:ListBucket, \
                      s3:ListBucketMultipartUploads, s3:AbortMultipartUpload and, to expire backups, \
                      s3:DeleteObject on this prefix.";

impl<E: ProvideErrorMetadata> From<SdkError<E, HttpResponse>> for Failure {
    fn from(error: SdkError<E, HttpResponse>) -> Self {
        let bare =
            |stage, message| Self { stage, status: 0, code: String::new(), message, region: None };
        match error {
            SdkError::ConstructionFailure(_) => bare(Stage::Construction, deepest(&error)),
            SdkError::DispatchFailure(ref failure) if is_about_credentials(failure) => {
                bare(Stage::Construction, deepest(&error))
            }
            SdkError::TimeoutError(_) | SdkError::DispatchFailure(_) => {
                bare(Stage::Transport, deepest(&error))
            }
            SdkError::ResponseError(ref answer) => {
                let status = answer.raw().status().as_u16();
                let mut failure = bare(Stage::Transport, deepest(&error));
                failure.status = status;
                failure
            }
            SdkError::ServiceError(answer) => {
                let raw = answer.raw();
                let header = |name: &str| raw.headers().get(name).map(str::to_owned);
                let meta = answer.err().meta();
                let is_page = header("content-type").is_some_and(|kind| kind.contains("html"));
                if raw.status().is_success() && is_page {
                    return Self::stranger("the answer is a page for people");
                }
                Self {
                    stage: Stage::Answered,
                    status: raw.status().as_u16(),
                    code: meta.code().unwrap_or_default().to_owned(),
                    message: meta.message().unwrap_or_default().to_owned(),
                    region: header("x-amz-bucket-region")
                        .or_else(|| expected_region(meta.message())),
                }
            }
            _ => bare(Stage::Transport, "unknown failure".to_owned()),
        }
    }
}

fn is_about_credentials(failure: &aws_smithy_runtime_api::client::result::DispatchFailure) -> bool {
    let text = failure.as_connector_error().map(|error| format!("{error:?}"));
    text.is_some_and(|text| {
        text.contains("CredentialsNotLoaded") || text.contains("IdentityNotFound")
    })
}

/// AWS names the right region in the message: "the region 'a' is wrong; expecting 'b'".
fn expected_region(message: Option<&str>) -> Option<String> {
    let rest = message?.split_once("expecting '")?.1;
    rest.split_once('\'').map(|(region, _)| region.to_owned())
}

/// The cause furthest down, which is the one that says something.
fn deepest<E, R>(error: &SdkError<E, R>) -> String {
    let source: Option<&(dyn std::error::Error + 'static)> = match error {
        SdkError::ConstructionFailure(_) => return debug_cause(error_text(error)),
        SdkError::DispatchFailure(failure) => failure.as_connector_error().map(|e| e as _),
        _ => None,
    };
    let Some(mut cause) = source else { return debug_cause(error_text(error)) };
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn error_text<E, R>(error: &SdkError<E, R>) -> String {
    match error {
        SdkError::ConstructionFailure(failure) => format!("{failure:?}"),
        SdkError::TimeoutError(failure) => format!("{failure:?}"),
        SdkError::ResponseError(_) => "the answer broke off or could not be read".to_owned(),
        _ => "the request failed".to_owned(),
    }
}

/// The SDK hides what it was unable to construct behind `Debug`; the usual case gets its own words.
fn debug_cause(text: String) -> String {
    if text.contains("CredentialsNotLoaded") || text.contains("no providers in chain") {
        return "no credentials were found".to_owned();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_in_a_list_of_results_is_refused_for_good() {
        for code in ["AccessDenied", "AllAccessDisabled", "InvalidObjectState"] {
            assert_eq!(Failure::listed(code, "").verdict(), Verdict::Final, "{code}");
        }
        for code in ["InternalError", "SomethingNew"] {
            assert_eq!(Failure::listed(code, "").verdict(), Verdict::Retry, "{code}");
        }
    }

    #[test]
    fn an_archived_object_is_a_trouble_of_its_own_and_not_of_the_configuration() {
        let error = Failure::listed("InvalidObjectState", "").into_error("unable to read it");
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.hint_text().unwrap().contains("archive class"));
    }
}
