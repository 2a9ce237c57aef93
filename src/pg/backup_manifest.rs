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

#[cfg(test)]
mod tests {
    use super::super::lsn::Lsn;
    use super::*;

    fn manifest(version: u32) -> String {
        let version = Version::from_server_version_num(version).unwrap();
        let mut manifest = BackupManifest::new(version, SystemId(42));
        let modified = Timestamp::from_second(1_700_000_000).unwrap();
        let mut text = Vec::new();
        for (path, crc32c) in [
            (&b"PG_VERSION"[..], Some(0x0403_0201)),
            (b"odd \"\\\n\x01 \xc3\xa9", None),
            (b"latin \xe9", Some(0)),
        ] {
            manifest.file(&ManifestFile { path, size_bytes: 3, modified, crc32c });
            text.extend(manifest.take());
        }
        let range = |start, end| LsnRange::new(Lsn(start), Lsn(end)).unwrap();
        let first = (TimelineId::new(2).unwrap(), range(0x300_0000, 0x1_0000_00A0));
        text.extend(manifest.finish(&[first, (TimelineId::FIRST, range(0x200_0028, 0x300_0000))]));
        String::from_utf8(text).unwrap()
    }

    const FILES: &str = "\
\"Files\": [
{ \"Path\": \"PG_VERSION\", \"Size\": 3, \"Last-Modified\": \"2023-11-14 22:13:20 GMT\", \
\"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"01020304\" },
{ \"Path\": \"odd \\\"\\\\\\n\\u0001 \u{e9}\", \"Size\": 3, \
\"Last-Modified\": \"2023-11-14 22:13:20 GMT\" },
{ \"Encoded-Path\": \"6c6174696e20e9\", \"Size\": 3, \
\"Last-Modified\": \"2023-11-14 22:13:20 GMT\", \"Checksum-Algorithm\": \"CRC32C\", \
\"Checksum\": \"00000000\" }
],
\"WAL-Ranges\": [
{ \"Timeline\": 2, \"Start-LSN\": \"0/3000000\", \"End-LSN\": \"1/A0\" },
{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/3000000\" }
],
";

    #[test]
    fn the_text_is_postgres_own() {
        for (version, head) in [
            (160_000, "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n".to_owned()),
            (
                170_000,
                "{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 42,\n".into(),
            ),
        ] {
            let text = manifest(version);
            let body = head + FILES;
            let rest = text.strip_prefix(&body).unwrap_or_else(|| panic!("{text}\n{body}"));
            let checksum = digest::digest(&digest::SHA256, body.as_bytes());
            let mut expected = "\"Manifest-Checksum\": \"".to_owned();
            push_hex(&mut expected, checksum.as_ref());
            assert_eq!(rest, expected + "\"}\n");
        }
    }
}
