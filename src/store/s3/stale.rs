//! Uploads that nobody will complete any more.
//!
//! Aborting one throws away what a writer has sent, and if that writer lives, its backup. So the burden
//! of proof is on aborting.
//!
//! # Invariants
//! - An upload goes only if its key is a name of ours below the folder that was asked for, whatever else
//!   the server lists, and only if the server says when it began. Of the others a lifecycle rule of the
//!   bucket may take care.
//! - A listing that says there is more goes on behind its last markers. Markers that are missing, go
//!   back or stay where they are, and more than [`PAGES_MAX`] pages, are an error: neither an end, nor
//!   followed for ever.

use std::time::Duration;

use aws_sdk_s3::operation::list_multipart_uploads::ListMultipartUploadsOutput;
use aws_sdk_s3::types::MultipartUpload;
use jiff::Timestamp;

use super::attempt::{Call, Tried};
use super::failure::Failure;
use super::{MapErrFailure, S3, timestamp};
use crate::error::Result;
use crate::store::{ObjectName, folder_prefix, is_stale};

/// Most pages of one listing: a million uploads, hundreds of times what a writer that died every minute
/// would leave behind in the days before it is swept.
const PAGES_MAX: u32 = 1000;

/// Where a page of uploads begins: behind this key, or behind this upload of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Markers {
    key: Option<String>,
    upload: Option<String>,
}

/// Which uploads are stale.
struct Stale<'a> {
    /// Prefix of the root.
    root: &'a str,
    /// What the keys of all uploads begin with that may go.
    prefix: String,
    /// The time by the server's clock, as far as that is known.
    now: Timestamp,
    older_than: Duration,
}

impl S3 {
    /// Aborts the uploads in `folder` that are known to have begun `older_than` ago or longer.
    pub(super) async fn abort_stale(&self, folder: &str, older_than: Duration) -> Result<u64> {
        let prefix = format!("{}{}", self.prefix, folder_prefix(folder));
        let attempted = || format!("unable to list the uploads in {}", self.describe());
        let mut aborted = 0;
        let mut after = Markers::default();
        for _ in 0..PAGES_MAX {
            let page = self.list_uploads(&prefix, &after).await?.or_error(attempted)?;
            let now = self.server_time().await?.unwrap_or_else(|| self.clock.now());
            let stale = Stale { root: &self.prefix, prefix: prefix.clone(), now, older_than };
            for (key, id) in page.uploads().iter().filter_map(|upload| stale.key_and_id(upload)) {
                self.abort_upload(Call::new(&self.requests.multipart_aborts), key, id).await?;
                aborted += 1;
            }
            match after.next(&page).map_err(|failure| failure.into_error(attempted()))? {
                Some(next) => after = next,
                None => return Ok(aborted),
            }
        }
        let flaw = format!("there are more than {PAGES_MAX} pages");
        Err(Failure::nonsense(flaw).into_error(attempted()))
    }

    /// By the last answer; `None` when none has said it.
    pub(super) async fn server_time(&self) -> Result<Option<Timestamp>> {
        let now = self.clock.now();
        let skew = self.client().await?.skew.last();
        Ok(skew.map(|skew| now.saturating_add(skew).unwrap_or(now)))
    }

    async fn list_uploads(
        &self,
        prefix: &str,
        after: &Markers,
    ) -> Result<Tried<ListMultipartUploadsOutput>> {
        let call = Call::new(&self.requests.lists);
        self.attempt(call, |client| {
            let request = client.sdk().list_multipart_uploads().bucket(&self.bucket);
            request
                .prefix(prefix)
                .set_key_marker(after.key.clone())
                .set_upload_id_marker(after.upload.clone())
                .send()
                .map_err_failure()
        })
        .await
    }
}

impl Stale<'_> {
    /// Key and id of an upload that goes.
    fn key_and_id<'u>(&self, upload: &'u MultipartUpload) -> Option<(&'u str, &'u str)> {
        let key = upload.key().filter(|key| key.starts_with(&self.prefix))?;
        ObjectName::new(key.strip_prefix(self.root)?).ok()?;
        let begun = timestamp(upload.initiated())?;
        is_stale(begun, self.now, self.older_than).then_some((key, upload.upload_id()?))
    }
}

impl Markers {
    /// Where the page behind `page` begins, `None` when there is none. Uploads of one key come in the
    /// order of their beginning, so their ids tell no order.
    fn next(
        &self,
        page: &ListMultipartUploadsOutput,
    ) -> std::result::Result<Option<Self>, Failure> {
        let given = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(str::to_owned);
        let next = Self {
            key: given(page.next_key_marker()),
            upload: given(page.next_upload_id_marker()),
        };
        if !page.is_truncated().unwrap_or(next.key.is_some()) {
            return Ok(None);
        }
        let stuck = |how: &str| {
            let flaw = format!("the server says that there is more, but {how}");
            Err(Failure::nonsense(flaw))
        };
        match &next.key {
            None => stuck("not how to get there"),
            Some(_) if next.key < self.key || next == *self => stuck("its markers lead nowhere"),
            Some(_) => Ok(Some(next)),
        }
    }
}
