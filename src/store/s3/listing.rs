//! Listings of objects, believed as far as they can be checked.
//!
//! A name that a listing leaves out is a hole in the WAL that is not there, or a pack whose backup a
//! sweep takes for dead. So whatever would hide one is an error.
//!
//! # Invariants
//! - The keys of a page rise in byte order, begin with the prefix and lie behind the place where the
//!   page was to begin: whoever goes on after the last of them misses none. Sorting what comes would
//!   not do: of a listing without order no page tells what the next ones hold.
//! - A page that says there is more is followed by another: after its last key, or, where it has none,
//!   by its token. A token that is missing or leads to itself is an error, and so are more than
//!   [`EMPTY_PAGES_MAX`] pages without a key in a row: neither is an end, and none is followed for ever.

use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::types::Object;

use super::attempt::Call;
use super::client::Client;
use super::failure::Failure;
use super::{MapErrFailure, S3, size, timestamp};
use crate::error::Result;
use crate::store::{ListPage, ObjectInfo, ObjectName};

/// Keys of one page, S3's own limit.
const PAGE_KEYS: i32 = 1000;

/// Pages in a row without a key. A server makes one when it has passed over some thousand deleted
/// objects of which it keeps versions, so that this many stand for more than retention deletes at once.
const EMPTY_PAGES_MAX: u32 = 1000;

/// Said of a server whose listing has another order than ours relies on.
const ORDER_HINT: &str = "The server must list names in byte order, which S3 directory buckets and \
                          servers that list folder by folder do not: use another one.";

/// Where the next page of a listing begins.
#[derive(Debug)]
struct Cursor {
    /// What all keys begin with.
    prefix: String,
    /// The page begins after this key.
    after: Option<String>,
    /// The server's own note of the place, when the page before had no key.
    token: Option<String>,
    /// Pages without a key since the last one with any.
    empty_page_count: u32,
}

impl S3 {
    /// One page; keys that are no names of ours are passed over, however many pages that takes.
    pub(super) async fn list(&self, prefix: &str, after: Option<&ObjectName>) -> Result<ListPage> {
        let attempted = || format!("unable to list '{prefix}' in {}", self.describe());
        let mut cursor = Cursor {
            prefix: format!("{}{prefix}", self.prefix),
            after: after.map(|after| self.key(after)),
            token: None,
            empty_page_count: 0,
        };
        loop {
            let call = Call::new(&self.requests.lists);
            let tried = self.attempt(call, |client| self.list_once(client, &cursor)).await?;
            let answer = tried.or_error(attempted)?;
            cursor
                .check(&answer)
                .map_err(|failure| failure.into_error(attempted()).hint(ORDER_HINT))?;
            let objects: Vec<ObjectInfo> =
                answer.contents().iter().filter_map(|object| self.ours(object)).collect();
            let more = says_more(&answer);
            if !more || !objects.is_empty() {
                return Ok(ListPage { objects, more });
            }
            cursor.advance(&answer).map_err(|failure| failure.into_error(attempted()))?;
        }
    }

    async fn list_once(
        &self,
        client: &Client,
        cursor: &Cursor,
    ) -> std::result::Result<ListObjectsV2Output, Failure> {
        let request = client.sdk().list_objects_v2().bucket(&self.bucket).prefix(&cursor.prefix);
        request
            .set_start_after(cursor.after.clone())
            .set_continuation_token(cursor.token.clone())
            .max_keys(PAGE_KEYS)
            .send()
            .map_err_failure()
            .await
    }

    fn ours(&self, object: &Object) -> Option<ObjectInfo> {
        let name = object.key()?.strip_prefix(&self.prefix)?;
        Some(ObjectInfo {
            name: ObjectName::new(name).ok()?,
            size_bytes: size(object.size()),
            modified: timestamp(object.last_modified()),
        })
    }
}

/// Whether there may be more behind this page. A server that does not say is asked until a page is
/// empty.
fn says_more(answer: &ListObjectsV2Output) -> bool {
    let named_any = !answer.contents().is_empty() || answer.next_continuation_token().is_some();
    answer.is_truncated().unwrap_or(named_any)
}

impl Cursor {
    /// Checks that going on after the last key of this page misses nothing.
    fn check(&self, answer: &ListObjectsV2Output) -> std::result::Result<(), Failure> {
        let mut last = self.after.as_deref();
        for object in answer.contents() {
            let key = object.key().ok_or_else(|| Failure::nonsense("an object has no name"))?;
            if !key.starts_with(&self.prefix) {
                let flaw = format!("the server lists '{key}', asked for was '{}'", self.prefix);
                return Err(Failure::nonsense(flaw));
            }
            if let Some(last) = last.filter(|last| key <= *last) {
                let flaw = format!("the server lists '{key}' after '{last}'");
                return Err(Failure::nonsense(flaw));
            }
            last = Some(key);
        }
        Ok(())
    }

    /// Goes on behind a page that has no name of ours.
    fn advance(&mut self, answer: &ListObjectsV2Output) -> std::result::Result<(), Failure> {
        if let Some(last) = answer.contents().last().and_then(|object| object.key()) {
            (self.after, self.token) = (Some(last.to_owned()), None);
            self.empty_page_count = 0;
            return Ok(());
        }
        let stuck = |how: &str| {
            let flaw = format!("the server says that there is more, but {how}");
            Err(Failure::nonsense(flaw))
        };
        let token = answer.next_continuation_token().filter(|token| !token.is_empty());
        let Some(token) = token else { return stuck("not how to get there") };
        if self.token.as_deref() == Some(token) {
            return stuck("its continuation token leads nowhere");
        }
        self.empty_page_count += 1;
        if self.empty_page_count > EMPTY_PAGES_MAX {
            return stuck(&format!("{EMPTY_PAGES_MAX} pages in a row name nothing"));
        }
        self.token = Some(token.to_owned());
        Ok(())
    }
}
