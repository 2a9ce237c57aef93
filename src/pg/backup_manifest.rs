//! Writing a `backup_manifest` that `pg_verifybackup` accepts.
//!
//! # Shape
//! A JSON document in the very form PostgreSQL writes: a line a file, the WAL ranges, and a SHA-256
//! of everything before the checksum line. Paths that are not UTF-8 are hexadecimal
//! (`Encoded-Path`); a CRC-32C is shown as the four bytes of its little-endian form.
//! The document is made piece by piece, so memory does not grow with the number of files.
//!
//! # Source
//! `src/backend/backup/backup_manifest.c` (before 15: `src/backend/replication/`),
//! `pg_checksum_final` in `src/common/checksum_helper.c`, `src/common/parse_manifest.c`; read on
//! 13, 15, 17, 18. Version 2, since 17, adds the system identifier.

use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use ring::digest;

use super::lsn::LsnRange;
use super::segment::TimelineId;
use super::system_id::SystemId;
use super::version::Version;

/// Name of the file in a data directory.
pub const BACKUP_MANIFEST: &str = "backup_manifest";

/// The first major version whose manifests name the system identifier.
const SYSTEM_ID_SINCE_MAJOR: u32 = 17;

/// One file of a backup. `backup_manifest` itself, the contents of `pg_wal` and
/// `postgresql.auto.conf` changes made by a restore are for the caller to think of.
#[derive(Clone, Copy, Debug)]
pub struct ManifestFile<'a> {
    /// Path relative to the data directory; bytes of the server's file system.
    pub path: &'a [u8],
    /// Size in bytes.
    pub size_bytes: u64,
    /// Last modification.
    pub modified: Timestamp,
    /// CRC-32C of the whole file, `None` for a file whose content is not checked.
    pub crc32c: Option<u32>,
}

/// A manifest in the making.
pub struct BackupManifest {
    text: String,
    digest: digest::Context,
    file_count: u64,
}

impl BackupManifest {
    /// Begins the manifest of a backup of this cluster.
    #[must_use]
    pub fn new(version: Version, system_id: SystemId) -> Self {
        let head = if version.major() >= SYSTEM_ID_SINCE_MAJOR {
            format!(
                "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\
                 \"System-Identifier\": {system_id},\n\"Files\": ["
            )
        } else {
            "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [".to_owned()
        };
        Self { text: head, digest: digest::Context::new(&digest::SHA256), file_count: 0 }
    }

    /// Adds a file.
    pub fn file(&mut self, file: &ManifestFile<'_>) {
        self.text.push_str(if self.file_count == 0 { "\n" } else { ",\n" });
        self.file_count += 1;
        match std::str::from_utf8(file.path) {
            Ok(path) => {
                self.text.push_str("{ \"Path\": ");
                push_json_string(&mut self.text, path);
            }
            Err(_) => {
                self.text.push_str("{ \"Encoded-Path\": \"");
                push_hex(&mut self.text, file.path);
                self.text.push('"');
            }
        }
        let modified = file.modified.to_zoned(TimeZone::UTC);
        let modified = modified.strftime("%Y-%m-%d %H:%M:%S");
        let size_bytes = file.size_bytes;
        _ = write!(self.text, ", \"Size\": {size_bytes}, \"Last-Modified\": \"{modified} GMT\"");
        if let Some(crc) = file.crc32c {
            self.text.push_str(", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"");
            push_hex(&mut self.text, &crc.to_le_bytes());
            self.text.push('"');
        }
        self.text.push_str(" }");
    }

    /// The text made since the last call, for the caller to write to the file; call it now and then
    /// to keep memory small.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        self.digest.update(self.text.as_bytes());
        std::mem::take(&mut self.text).into_bytes()
    }

    /// Ends the manifest with the WAL that recovery needs, newest timeline first as PostgreSQL
    /// lists it, and gives the rest of the text.
    #[must_use]
    pub fn finish(mut self, wal_ranges: &[(TimelineId, LsnRange)]) -> Vec<u8> {
        self.text.push_str("\n],\n\"WAL-Ranges\": [\n");
        for (index, (timeline, range)) in wal_ranges.iter().enumerate() {
            let separator = if index == 0 { "" } else { ",\n" };
            let (start, end) = (range.start(), range.end());
            _ = write!(
                self.text,
                "{separator}{{ \"Timeline\": {timeline}, \"Start-LSN\": \"{start}\", \"End-LSN\": \"{end}\" }}"
            );
        }
        self.text.push_str("\n],\n");
        let mut bytes = self.take();
        let mut last = "\"Manifest-Checksum\": \"".to_owned();
        push_hex(&mut last, self.digest.finish().as_ref());
        last.push_str("\"}\n");
        bytes.extend_from_slice(last.as_bytes());
        bytes
    }
}

impl std::fmt::Debug for BackupManifest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BackupManifest({} files)", self.file_count)
    }
}

/// `escape_json`
fn push_json_string(text: &mut String, value: &str) {
    text.push('"');
    for character in value.chars() {
        match character {
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            control if control < ' ' => {
                _ = write!(text, "\\u{:04x}", u32::from(control));
            }
            other => text.push(other),
        }
    }
    text.push('"');
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        _ = write!(text, "{byte:02x}");
    }
}
