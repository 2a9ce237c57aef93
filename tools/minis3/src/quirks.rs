//! Ways in which real servers differ from AWS, to be switched on.

use serde::{Deserialize, Serialize};

/// What this server does worse than AWS; none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quirks {
    /// Answers 200 to `If-None-Match` and `If-Match` on uploads and ignores them (Garage, rclone).
    pub ignore_conditions: bool,
    /// Ignores them on CompleteMultipartUpload only (Ceph 16).
    pub ignore_conditions_on_complete: bool,
    /// Asks whether they hold before it asks whether there is such an upload (MinIO).
    pub conditions_before_upload_id: bool,
    /// Compares a quoted tag in `If-Match` to its own without quotes, and so refuses it (Ceph 16).
    pub bare_tags: bool,
    /// Takes uploads whose checksum is wrong (moto, Ceph 16).
    pub ignore_checksums: bool,
    /// Answers 501 to uploads that carry a checksum header.
    pub refuse_checksums: bool,
    /// Answers 501 to DeleteObjects (Google Cloud Storage).
    pub refuse_bulk_delete: bool,
    /// Refuses to delete anything, as to keys without the right; DeleteObjects says so of each name in
    /// an answer of status 200.
    pub deny_deletes: bool,
    /// Answers 200 to Object Lock headers and ignores them (Garage).
    pub ignore_object_lock: bool,
    /// Objects younger than this are missing from listings.
    pub stale_list_ms: u64,
    /// Lists a page's names backwards: S3's directory buckets have no order at all.
    pub list_backwards: bool,
    /// So many pages without a name come before every listing of objects, as behind many deletions.
    pub empty_list_pages: u32,
    /// How those say where the listing goes on.
    pub empty_list_token: EmptyListToken,
    /// Lists the uploads of the whole bucket, whatever prefix is asked for.
    pub list_all_uploads: bool,
    /// Says of every page of uploads that there is more: behind its last upload, or where it was asked
    /// to begin.
    pub endless_uploads: bool,
    /// Does not say when an upload was begun.
    pub uploads_without_time: bool,
    /// Does not say when an object was made.
    pub objects_without_time: bool,
    /// Does not return user metadata.
    pub drop_metadata: bool,
    /// Answers PutObject without an ETag.
    pub put_without_etag: bool,
    /// Answers CompleteMultipartUpload without an ETag (Ceph 16).
    pub complete_without_etag: bool,
}

/// The continuation tokens of pages without a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EmptyListToken {
    /// Each leads to the next page.
    #[default]
    Next,
    /// It leads to the page that it comes with.
    Same,
    /// There is none.
    Missing,
}
