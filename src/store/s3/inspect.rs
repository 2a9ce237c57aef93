//! What only a bucket can tell about itself: checksums, versions, locks, clock.

use super::attempt::Call;
use super::{MapErrFailure, S3};
use crate::error::Result;
use crate::store::probe::FOLDER;
use crate::store::{Capabilities, ObjectName};

impl S3 {
    /// Adds to what was found out through the trait.
    pub(super) async fn inspect(&self, found: Capabilities) -> Result<Capabilities> {
        let name = ObjectName::new(format!("{FOLDER}/{}", self.upload_id()?))?;
        let wrong_checksum_refused = self.refuses_wrong_checksum(&name).await?;
        if wrong_checksum_refused != Some(true) && found.delete {
            self.delete(&[name]).await?;
        }
        Ok(Capabilities {
            wrong_checksum_refused,
            versioning: self.versioning().await?,
            object_lock: self.object_lock().await?,
            clock_skew: self.client().await?.skew.last(),
            ..found
        })
    }

    /// `None` when the server does not tell us: it lacks the call, or we the right to it.
    async fn versioning(&self) -> Result<Option<bool>> {
        let call = Call::new(&self.requests.heads);
        let tried = self.attempt(call, |client| {
            client.sdk().get_bucket_versioning().bucket(&self.bucket).send().map_err_failure()
        });
        let answer = tried.await?.result.ok();
        Ok(answer.map(|answer| answer.status().is_some_and(|status| status.as_str() == "Enabled")))
    }

    async fn object_lock(&self) -> Result<Option<bool>> {
        let call = Call::new(&self.requests.heads);
        let tried = self.attempt(call, |client| {
            let request = client.sdk().get_object_lock_configuration().bucket(&self.bucket);
            request.send().map_err_failure()
        });
        Ok(match tried.await?.result {
            Ok(answer) => Some(
                answer
                    .object_lock_configuration()
                    .and_then(|configuration| configuration.object_lock_enabled())
                    .is_some_and(|enabled| enabled.as_str() == "Enabled"),
            ),
            Err(failure) if failure.is("ObjectLockConfigurationNotFoundError", 0) => Some(false),
            Err(_) => None,
        })
    }
}
