//! Versioning and Object Lock.

use s3s::dto::*;
use s3s::{S3Result, s3_error};

use crate::checksum::Claims;
use crate::objects::optional_ms;
use crate::quirks::Quirks;
use crate::service::{Shared, bucket, ms_of, now_ms, timestamp};
use crate::state::{self, Attributes, Event, Mode, Retention, State, Versioning};

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// What an upload says about locking its object.
pub(crate) struct LockHeaders {
    pub(crate) mode: Option<ObjectLockMode>,
    pub(crate) until: Option<Timestamp>,
    pub(crate) hold: Option<ObjectLockLegalHoldStatus>,
}

impl Claims {
    /// For requests without a body, which Object Lock asks no checksum of.
    pub(crate) fn unneeded() -> Self {
        Self { algorithm: Some("CRC32".to_owned()), ..Self::default() }
    }
}

impl LockHeaders {
    /// Adds the lock that the object gets: its own, else the bucket's default.
    pub(crate) fn resolve(
        &self,
        bucket: &state::Bucket,
        mut attributes: Attributes,
        claims: &Claims,
        quirks: &Quirks,
    ) -> S3Result<Attributes> {
        if quirks.ignore_object_lock {
            return Ok(attributes);
        }
        let asked = self.mode.is_some() || self.until.is_some() || self.hold.is_some();
        if asked && !bucket.settings.object_lock {
            return Err(s3_error!(InvalidRequest, "Bucket is missing ObjectLockConfiguration"));
        }
        if asked && claims.named().is_none() && claims.content_md5.is_none() {
            return Err(s3_error!(
                InvalidRequest,
                "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests \
                 with Object Lock parameters"
            ));
        }
        attributes.legal_hold = self.hold.as_ref().is_some_and(|hold| hold.as_str() == "ON");
        attributes.retention = match (&self.mode, &self.until) {
            (Some(mode), Some(until)) => {
                let until_ms = ms_of(until);
                if until_ms <= now_ms() {
                    return Err(s3_error!(
                        InvalidArgument,
                        "The retain until date must be in the future"
                    ));
                }
                Some(Retention { mode: mode_of(mode.as_str())?, until_ms })
            }
            (None, None) => bucket.settings.default_retention.as_ref().map(|default| Retention {
                mode: default.mode,
                until_ms: now_ms() + u64::from(default.days) * DAY_MS,
            }),
            _ => {
                return Err(s3_error!(
                    InvalidArgument,
                    "x-amz-object-lock-retain-until-date and x-amz-object-lock-mode must both be supplied"
                ));
            }
        };
        Ok(attributes)
    }
}

fn mode_of(name: &str) -> S3Result<Mode> {
    match name {
        "GOVERNANCE" => Ok(Mode::Governance),
        "COMPLIANCE" => Ok(Mode::Compliance),
        _ => Err(s3_error!(InvalidArgument, "Unknown wormMode directive")),
    }
}

fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Governance => "GOVERNANCE",
        Mode::Compliance => "COMPLIANCE",
    }
}

/// Refuses to remove a version that is held or retained.
pub(crate) fn protects(attributes: &Attributes, bypass: bool) -> S3Result<()> {
    let retained = attributes.retention.is_some_and(|retention| {
        let bypassed = bypass && retention.mode == Mode::Governance;
        retention.until_ms > now_ms() && !bypassed
    });
    if attributes.legal_hold || retained {
        let message = "Access Denied because object protected by object lock.";
        return Err(s3_error!(AccessDenied, "{message}"));
    }
    Ok(())
}

impl Shared {
    pub(crate) fn get_versioning(&self, name: &str) -> S3Result<GetBucketVersioningOutput> {
        let state = self.state();
        let status = match bucket(&state, name)?.settings.versioning {
            Versioning::Never => None,
            Versioning::Enabled => Some(BucketVersioningStatus::ENABLED),
            Versioning::Suspended => Some(BucketVersioningStatus::SUSPENDED),
        };
        let status = status.map(BucketVersioningStatus::from_static);
        Ok(GetBucketVersioningOutput { status, ..GetBucketVersioningOutput::default() })
    }

    pub(crate) fn put_versioning(
        &self,
        input: PutBucketVersioningInput,
    ) -> S3Result<PutBucketVersioningOutput> {
        let mut state = self.state();
        let mut settings = bucket(&state, &input.bucket)?.settings.clone();
        let status = input.versioning_configuration.status;
        settings.versioning = match status.as_ref().map(BucketVersioningStatus::as_str) {
            Some(BucketVersioningStatus::ENABLED) => Versioning::Enabled,
            Some(BucketVersioningStatus::SUSPENDED) if !settings.object_lock => {
                Versioning::Suspended
            }
            _ => return Err(s3_error!(InvalidBucketState)),
        };
        self.commit(&mut state, Event::Bucket { bucket: input.bucket, settings })?;
        Ok(PutBucketVersioningOutput {})
    }

    pub(crate) fn get_lock_configuration(
        &self,
        name: &str,
    ) -> S3Result<GetObjectLockConfigurationOutput> {
        let state = self.state();
        let settings = &bucket(&state, name)?.settings;
        if !settings.object_lock {
            let message = "Object Lock configuration does not exist for this bucket";
            return Err(s3_error!(ObjectLockConfigurationNotFoundError, "{message}"));
        }
        let rule = settings.default_retention.as_ref().map(|default| ObjectLockRule {
            default_retention: Some(DefaultRetention {
                days: i32::try_from(default.days).ok(),
                mode: Some(ObjectLockRetentionMode::from_static(mode_name(default.mode))),
                years: None,
            }),
        });
        let enabled = ObjectLockEnabled::from_static(ObjectLockEnabled::ENABLED);
        let configuration = ObjectLockConfiguration { object_lock_enabled: Some(enabled), rule };
        Ok(GetObjectLockConfigurationOutput { object_lock_configuration: Some(configuration) })
    }

    pub(crate) fn put_lock_configuration(
        &self,
        input: PutObjectLockConfigurationInput,
    ) -> S3Result<PutObjectLockConfigurationOutput> {
        let mut state = self.state();
        let mut settings = bucket(&state, &input.bucket)?.settings.clone();
        if settings.versioning != Versioning::Enabled {
            return Err(s3_error!(
                InvalidBucketState,
                "Versioning must be 'Enabled' on the bucket"
            ));
        }
        settings.object_lock = true;
        let configuration = input.object_lock_configuration.unwrap_or_default();
        let default = configuration.rule.and_then(|rule| rule.default_retention);
        settings.default_retention = match default {
            None => None,
            Some(default) => {
                let mode = default.mode.as_ref().map_or("", ObjectLockRetentionMode::as_str);
                let days = default.days.unwrap_or(0) + 365 * default.years.unwrap_or(0);
                let days = u32::try_from(days).unwrap_or(0);
                Some(state::DefaultRetention { mode: mode_of(mode)?, days })
            }
        };
        self.commit(&mut state, Event::Bucket { bucket: input.bucket, settings })?;
        Ok(PutObjectLockConfigurationOutput::default())
    }

    pub(crate) fn get_retention(
        &self,
        input: &GetObjectRetentionInput,
    ) -> S3Result<GetObjectRetentionOutput> {
        let state = self.state();
        let version = lockable(&state, &input.bucket, &input.key, input.version_id.as_deref())?;
        let missing = || s3_error!(NoSuchObjectLockConfiguration);
        let retention = version.attributes.retention.ok_or_else(missing)?;
        let retention = ObjectLockRetention {
            mode: Some(ObjectLockRetentionMode::from_static(mode_name(retention.mode))),
            retain_until_date: Some(timestamp(retention.until_ms)),
        };
        Ok(GetObjectRetentionOutput { retention: Some(retention) })
    }

    pub(crate) fn put_retention(
        &self,
        input: PutObjectRetentionInput,
    ) -> S3Result<PutObjectRetentionOutput> {
        let mut state = self.state();
        let version = lockable(&state, &input.bucket, &input.key, input.version_id.as_deref())?;
        let asked = input.retention.unwrap_or_default();
        let until_ms = optional_ms(asked.retain_until_date.as_ref());
        let wanted = match (asked.mode, until_ms) {
            (Some(mode), Some(until_ms)) => {
                Some(Retention { mode: mode_of(mode.as_str())?, until_ms })
            }
            (None, None) => None,
            _ => return Err(s3_error!(MalformedXML)),
        };
        let bypass = input.bypass_governance_retention.unwrap_or(false);
        may_change(version.attributes.retention, wanted, bypass)?;
        let (id, legal_hold) = (version.id.clone(), version.attributes.legal_hold);
        let (bucket, key) = (input.bucket, input.key);
        let event = Event::Lock { bucket, key, id, retention: wanted, legal_hold };
        self.commit(&mut state, event)?;
        Ok(PutObjectRetentionOutput::default())
    }

    pub(crate) fn get_legal_hold(
        &self,
        input: &GetObjectLegalHoldInput,
    ) -> S3Result<GetObjectLegalHoldOutput> {
        let state = self.state();
        let version = lockable(&state, &input.bucket, &input.key, input.version_id.as_deref())?;
        let status = if version.attributes.legal_hold { "ON" } else { "OFF" };
        let status = Some(ObjectLockLegalHoldStatus::from_static(status));
        Ok(GetObjectLegalHoldOutput { legal_hold: Some(ObjectLockLegalHold { status }) })
    }

    pub(crate) fn put_legal_hold(
        &self,
        input: PutObjectLegalHoldInput,
    ) -> S3Result<PutObjectLegalHoldOutput> {
        let mut state = self.state();
        let version = lockable(&state, &input.bucket, &input.key, input.version_id.as_deref())?;
        let status = input.legal_hold.and_then(|hold| hold.status);
        let legal_hold = status.is_some_and(|status| status.as_str() == "ON");
        let (id, retention) = (version.id.clone(), version.attributes.retention);
        let (bucket, key) = (input.bucket, input.key);
        let event = Event::Lock { bucket, key, id, retention, legal_hold };
        self.commit(&mut state, event)?;
        Ok(PutObjectLegalHoldOutput::default())
    }
}

/// Retention may grow; it shrinks or goes only in governance mode and with the bypass.
fn may_change(now: Option<Retention>, wanted: Option<Retention>, bypass: bool) -> S3Result<()> {
    let Some(now) = now.filter(|now| now.until_ms > now_ms()) else { return Ok(()) };
    let grows = wanted.is_some_and(|wanted| {
        wanted.until_ms >= now.until_ms
            && (wanted.mode == now.mode || wanted.mode == Mode::Compliance)
    });
    if grows || (bypass && now.mode == Mode::Governance) {
        return Ok(());
    }
    Err(s3_error!(AccessDenied, "Access Denied because object protected by object lock."))
}

fn lockable<'a>(
    state: &'a State,
    bucket_name: &str,
    key: &str,
    id: Option<&str>,
) -> S3Result<&'a state::Version> {
    let bucket = bucket(state, bucket_name)?;
    if !bucket.settings.object_lock {
        return Err(s3_error!(InvalidRequest, "Bucket is missing Object Lock Configuration"));
    }
    bucket.version(key, id).ok_or_else(|| s3_error!(NoSuchKey))
}
