//! Listings of objects and versions.

use std::ops::Bound;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use s3s::dto::*;
use s3s::{S3Result, s3_error};

use crate::multipart::page_size;
use crate::quirks::{EmptyListToken, Quirks};
use crate::service::{Shared, bucket, signed, timestamp};

impl Shared {
    pub(crate) fn list_objects(&self, input: ListObjectsV2Input) -> S3Result<ListObjectsV2Output> {
        let state = self.state();
        let bucket = bucket(&state, &input.bucket)?;
        let quirks = self.quirks();
        if let Some(empty) = empty_page(&input, &quirks) {
            return Ok(empty);
        }
        // All of them, also those of a time when the clock was ahead.
        let newest_ms = match quirks.stale_list_ms {
            0 => u64::MAX,
            stale_ms => self.time_ms().saturating_sub(stale_ms),
        };
        let prefix = input.prefix.clone().unwrap_or_default();
        let delimiter = input.delimiter.clone().unwrap_or_default();
        let token = input.continuation_token.as_ref();
        let after = match token.filter(|token| !token.starts_with(EMPTY_PAGE)) {
            Some(token) => {
                let invalid = || s3_error!(InvalidArgument, "The continuation token is incorrect");
                let key =
                    URL_SAFE_NO_PAD.decode(token).ok().and_then(|key| String::from_utf8(key).ok());
                Some(key.ok_or_else(invalid)?)
            }
            None => input.start_after.clone(),
        };
        let from = match &after {
            Some(after) if *after >= prefix => Bound::Excluded(after.as_str()),
            _ => Bound::Included(prefix.as_str()),
        };
        let size = page_size(input.max_keys);
        let mut page = Page::default();
        let mut last = None;
        for (key, versions) in bucket.keys_from(from) {
            if !key.starts_with(&prefix) {
                break;
            }
            let Some(version) = versions.last().filter(|version| !version.delete_marker) else {
                continue;
            };
            let in_folder = folder_of(key, &prefix, &delimiter);
            let known = in_folder.is_some_and(|folder| {
                page.folders.last().map(String::as_str) == Some(folder)
                    || after.as_deref().is_some_and(|after| after.starts_with(folder))
            });
            if known || version.modified_ms > newest_ms {
                continue;
            }
            if page.objects.len() + page.folders.len() == size {
                page.truncated = true;
                break;
            }
            last = Some(in_folder.unwrap_or(key).to_owned());
            match in_folder {
                Some(folder) => page.folders.push(folder.to_owned()),
                None => page.objects.push(Object {
                    e_tag: Some(ETag::Strong(version.etag.clone())),
                    key: Some(key.clone()),
                    last_modified: (!quirks.objects_without_time)
                        .then(|| timestamp(version.modified_ms)),
                    size: Some(signed(version.size)),
                    ..Object::default()
                }),
            }
        }
        if quirks.list_backwards {
            page.objects.reverse();
        }
        let count = page.objects.len() + page.folders.len();
        Ok(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: input.prefix,
            delimiter: input.delimiter,
            start_after: input.start_after,
            continuation_token: input.continuation_token,
            key_count: i32::try_from(count).ok(),
            max_keys: i32::try_from(size).ok(),
            is_truncated: Some(page.truncated),
            next_continuation_token: last
                .filter(|_| page.truncated)
                .map(|last| URL_SAFE_NO_PAD.encode(last)),
            contents: Some(page.objects),
            common_prefixes: Some(
                page.folders
                    .into_iter()
                    .map(|prefix| CommonPrefix { prefix: Some(prefix) })
                    .collect(),
            ),
            ..ListObjectsV2Output::default()
        })
    }

    pub(crate) fn list_versions(
        &self,
        input: ListObjectVersionsInput,
    ) -> S3Result<ListObjectVersionsOutput> {
        let state = self.state();
        let bucket = bucket(&state, &input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let from = match &input.key_marker {
            Some(marker) if *marker >= prefix => Bound::Excluded(marker.as_str()),
            _ => Bound::Included(prefix.as_str()),
        };
        let size = page_size(input.max_keys);
        let (mut versions, mut markers) = (Vec::new(), Vec::new());
        let (mut truncated, mut last_key) = (false, None);
        for (key, all) in bucket.keys_from(from) {
            if !key.starts_with(&prefix) {
                break;
            }
            // A key's versions stay on one page, which may so be longer than asked for.
            if versions.len() + markers.len() >= size {
                truncated = true;
                break;
            }
            last_key = Some(key.clone());
            for (index, version) in all.iter().rev().enumerate() {
                let (is_latest, key) = (Some(index == 0), Some(key.clone()));
                let last_modified = Some(timestamp(version.modified_ms));
                let version_id = Some(version.id.clone());
                if version.delete_marker {
                    markers.push(DeleteMarkerEntry {
                        is_latest,
                        key,
                        last_modified,
                        owner: None,
                        version_id,
                    });
                } else {
                    versions.push(ObjectVersion {
                        e_tag: Some(ETag::Strong(version.etag.clone())),
                        is_latest,
                        key,
                        last_modified,
                        size: Some(signed(version.size)),
                        version_id,
                        ..ObjectVersion::default()
                    });
                }
            }
        }
        Ok(ListObjectVersionsOutput {
            name: Some(input.bucket),
            prefix: input.prefix,
            is_truncated: Some(truncated),
            next_key_marker: last_key.filter(|_| truncated),
            versions: Some(versions),
            delete_markers: Some(markers),
            ..ListObjectVersionsOutput::default()
        })
    }
}

/// What the tokens of pages without a name begin with; no other token has a dot.
const EMPTY_PAGE: &str = "empty.";

/// The page without a name that comes next, if one does.
fn empty_page(input: &ListObjectsV2Input, quirks: &Quirks) -> Option<ListObjectsV2Output> {
    let number = match &input.continuation_token {
        Some(token) => token.strip_prefix(EMPTY_PAGE)?.parse().ok()?,
        None => 0,
    };
    if number >= quirks.empty_list_pages {
        return None;
    }
    let next = match quirks.empty_list_token {
        EmptyListToken::Next => Some(number + 1),
        EmptyListToken::Same => Some(number),
        EmptyListToken::Missing => None,
    };
    Some(ListObjectsV2Output {
        name: Some(input.bucket.clone()),
        prefix: input.prefix.clone(),
        key_count: Some(0),
        is_truncated: Some(true),
        next_continuation_token: next.map(|next| format!("{EMPTY_PAGE}{next}")),
        ..ListObjectsV2Output::default()
    })
}

#[derive(Default)]
struct Page {
    objects: Vec<Object>,
    folders: Vec<String>,
    truncated: bool,
}

/// The common prefix that `key` is rolled up into.
fn folder_of<'a>(key: &'a str, prefix: &str, delimiter: &str) -> Option<&'a str> {
    if delimiter.is_empty() {
        return None;
    }
    let rest = key.get(prefix.len()..)?;
    let end = rest.find(delimiter)? + delimiter.len();
    key.get(..prefix.len() + end)
}
