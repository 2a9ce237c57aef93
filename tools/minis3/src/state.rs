//! What the server knows: buckets, versions, uploads. Every change is an [`Event`], applied under one
//! mutex and, in a folder, written to the journal first.

use std::collections::BTreeMap;
use std::ops::Bound;

use serde::{Deserialize, Serialize};

use crate::backend::Piece;
use crate::checksum::Checksum;

/// Version id of objects in buckets that keep no versions.
pub(crate) const NULL_VERSION: &str = "null";

/// Everything.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) buckets: BTreeMap<String, Bucket>,
    /// Number for the next version, upload or ETag.
    pub(crate) last_number: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Bucket {
    pub(crate) settings: Settings,
    /// Versions of each key, oldest first.
    pub(crate) keys: BTreeMap<String, Vec<Version>>,
    pub(crate) uploads: BTreeMap<String, Upload>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) created_ms: u64,
    pub(crate) versioning: Versioning,
    pub(crate) object_lock: bool,
    pub(crate) default_retention: Option<DefaultRetention>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Versioning {
    #[default]
    Never,
    Enabled,
    Suspended,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DefaultRetention {
    pub(crate) mode: Mode,
    pub(crate) days: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Mode {
    Governance,
    Compliance,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Retention {
    pub(crate) mode: Mode,
    pub(crate) until_ms: u64,
}

/// What is set about an object when it is made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Attributes {
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) content_type: Option<String>,
    pub(crate) storage_class: Option<String>,
    pub(crate) encryption: Option<String>,
    pub(crate) kms_key: Option<String>,
    pub(crate) retention: Option<Retention>,
    pub(crate) legal_hold: bool,
}

/// One version of an object, or a delete marker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Version {
    pub(crate) id: String,
    pub(crate) etag: String,
    pub(crate) size: u64,
    pub(crate) modified_ms: u64,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) checksum: Option<Checksum>,
    pub(crate) attributes: Attributes,
    pub(crate) delete_marker: bool,
}

/// A multipart upload in progress.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Upload {
    pub(crate) key: String,
    pub(crate) begun_ms: u64,
    pub(crate) attributes: Attributes,
    /// Algorithm and type that parts and completion must keep to.
    pub(crate) checksum: Option<(String, String)>,
    pub(crate) parts: BTreeMap<u32, Part>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) etag: String,
    pub(crate) modified_ms: u64,
    pub(crate) piece: Piece,
    pub(crate) checksum: Option<Checksum>,
}

/// A change.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Event {
    Bucket {
        bucket: String,
        settings: Settings,
    },
    BucketGone {
        bucket: String,
    },
    /// A new current version; one of the same id is replaced.
    Version {
        bucket: String,
        key: String,
        version: Version,
    },
    Lock {
        bucket: String,
        key: String,
        id: String,
        retention: Option<Retention>,
        legal_hold: bool,
    },
    VersionGone {
        bucket: String,
        key: String,
        id: String,
    },
    Upload {
        bucket: String,
        id: String,
        upload: Upload,
    },
    Part {
        bucket: String,
        id: String,
        number: u32,
        part: Part,
    },
    PartGone {
        bucket: String,
        id: String,
        number: u32,
    },
    /// Aborted; the parts go.
    UploadGone {
        bucket: String,
        id: String,
    },
    /// Completed: the pieces of the new version stay, those of unused parts go.
    Completed {
        bucket: String,
        id: String,
        version: Version,
    },
}

impl State {
    /// Carries out a change and returns the pieces that nothing refers to any more.
    pub(crate) fn apply(&mut self, event: Event) -> Vec<Piece> {
        self.last_number += 1;
        match event {
            Event::Bucket { bucket, settings } => {
                self.buckets.entry(bucket).or_default().settings = settings;
                Vec::new()
            }
            Event::BucketGone { bucket } => {
                self.buckets.remove(&bucket);
                Vec::new()
            }
            Event::Version { bucket, key, version } => self.put(&bucket, key, version),
            Event::Lock { bucket, key, id, retention, legal_hold } => {
                if let Some(version) = self.version_mut(&bucket, &key, &id) {
                    version.attributes.retention = retention;
                    version.attributes.legal_hold = legal_hold;
                }
                Vec::new()
            }
            Event::VersionGone { bucket, key, id } => self.remove(&bucket, &key, &id),
            Event::Upload { bucket, id, upload } => {
                self.buckets.entry(bucket).or_default().uploads.insert(id, upload);
                Vec::new()
            }
            Event::Part { bucket, id, number, part } => {
                let upload =
                    self.buckets.get_mut(&bucket).and_then(|bucket| bucket.uploads.get_mut(&id));
                match upload {
                    Some(upload) => {
                        upload.parts.insert(number, part).map(|old| old.piece).into_iter().collect()
                    }
                    None => vec![part.piece],
                }
            }
            Event::PartGone { bucket, id, number } => {
                let bucket = self.buckets.get_mut(&bucket);
                let upload = bucket.and_then(|bucket| bucket.uploads.get_mut(&id));
                let part = upload.and_then(|upload| upload.parts.remove(&number));
                part.map(|part| part.piece).into_iter().collect()
            }
            Event::UploadGone { bucket, id } => self
                .take_upload(&bucket, &id)
                .map(|upload| upload.parts.into_values().map(|part| part.piece).collect())
                .unwrap_or_default(),
            Event::Completed { bucket, id, version } => {
                let Some(upload) = self.take_upload(&bucket, &id) else { return Vec::new() };
                let kept = |piece: &Piece| version.pieces.iter().any(|kept| kept.same(piece));
                let unused: Vec<Piece> = upload
                    .parts
                    .into_values()
                    .map(|part| part.piece)
                    .filter(|piece| !kept(piece))
                    .collect();
                let mut freed = self.put(&bucket, upload.key, version);
                freed.extend(unused);
                freed
            }
        }
    }

    fn put(&mut self, bucket: &str, key: String, version: Version) -> Vec<Piece> {
        let versions =
            self.buckets.entry(bucket.to_owned()).or_default().keys.entry(key).or_default();
        let same = versions.iter().position(|old| old.id == version.id);
        let freed = same.map(|index| versions.remove(index).pieces).unwrap_or_default();
        versions.push(version);
        freed
    }

    fn remove(&mut self, bucket: &str, key: &str, id: &str) -> Vec<Piece> {
        let Some(bucket) = self.buckets.get_mut(bucket) else { return Vec::new() };
        let Some(versions) = bucket.keys.get_mut(key) else { return Vec::new() };
        let index = versions.iter().position(|version| version.id == id);
        let freed = index.map(|index| versions.remove(index).pieces).unwrap_or_default();
        if versions.is_empty() {
            bucket.keys.remove(key);
        }
        freed
    }

    fn take_upload(&mut self, bucket: &str, id: &str) -> Option<Upload> {
        self.buckets.get_mut(bucket)?.uploads.remove(id)
    }

    fn version_mut(&mut self, bucket: &str, key: &str, id: &str) -> Option<&mut Version> {
        let versions = self.buckets.get_mut(bucket)?.keys.get_mut(key)?;
        versions.iter_mut().find(|version| version.id == id)
    }
}

impl Bucket {
    /// The current version, unless it is a delete marker.
    pub(crate) fn current(&self, key: &str) -> Option<&Version> {
        self.keys.get(key)?.last().filter(|version| !version.delete_marker)
    }

    /// The version of that id, or the current one.
    pub(crate) fn version(&self, key: &str, id: Option<&str>) -> Option<&Version> {
        match id {
            None => self.current(key),
            Some(id) => self.keys.get(key)?.iter().find(|version| version.id == id),
        }
    }

    /// Keys from `from` on.
    pub(crate) fn keys_from<'a>(
        &'a self,
        from: Bound<&'a str>,
    ) -> impl Iterator<Item = (&'a String, &'a Vec<Version>)> {
        self.keys.range::<str, _>((from, Bound::Unbounded))
    }

    /// Id of a new version.
    pub(crate) fn version_id(&self, number: u64) -> String {
        match self.settings.versioning {
            Versioning::Enabled => format!("v{number:016x}"),
            Versioning::Never | Versioning::Suspended => NULL_VERSION.to_owned(),
        }
    }
}
