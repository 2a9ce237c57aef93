//! `backup_label` and `tablespace_map`: what tells recovery that a data directory is a backup.
//!
//! # Source
//! `build_backup_content` in `src/backend/access/transam/xlogbackup.c` (before 16:
//! `do_pg_backup_start` in `xlog.c`), `read_backup_label` and `read_tablespace_map` in
//! `xlogrecovery.c`; read on 13, 15, 17, 18.

use super::lsn::Lsn;
use super::segment::{SegmentSize, TimelineId};
use crate::error::{Error, Kind, Result};

/// Greatest size of a `backup_label` that is read, bytes; real ones have about 200.
pub const BACKUP_LABEL_BYTES_MAX: usize = 64 << 10;

/// Greatest size of a `tablespace_map` that is read, bytes.
pub const TABLESPACE_MAP_BYTES_MAX: usize = 4 << 20;

/// Where a backup was taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupFrom {
    /// A primary.
    Primary,
    /// A standby: `pg_control` of the backup must be the last file that was copied.
    Standby,
}

/// The contents of a `backup_label`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupLabel {
    /// Where recovery begins: the redo position of the backup's checkpoint.
    pub start_lsn: Lsn,
    /// Start of the backup's checkpoint record.
    pub checkpoint_lsn: Lsn,
    /// Timeline of the backup's start.
    pub timeline: TimelineId,
    /// Where the backup was taken from.
    pub from: BackupFrom,
    /// Start time as the server wrote it, in its `log_timezone`; for people only.
    pub start_time: String,
    /// The label given to `BASE_BACKUP`.
    pub label: String,
}

impl BackupLabel {
    /// The label in the bytes of the file.
    ///
    /// # Errors
    /// `corrupt` when a line that recovery needs is missing or unreadable, `unsupported` for the
    /// label of an incremental backup.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        // The label itself may be in any encoding.
        let text = String::from_utf8_lossy(bytes.get(..BACKUP_LABEL_BYTES_MAX).unwrap_or(bytes));
        // However many carriage returns an editor left at the ends of lines.
        let lines = || text.split('\n').map(|line| line.trim_end_matches('\r'));
        let field =
            |name: &str| lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        if field("INCREMENTAL FROM LSN").is_some() {
            return Err(Error::new(
                Kind::Unsupported,
                "unable to use 'backup_label': it belongs to an incremental backup",
            ));
        }
        let start = field("START WAL LOCATION").ok_or_else(|| missing("START WAL LOCATION"))?;
        let (start_lsn, timeline) =
            decode_start(start).ok_or_else(|| missing("START WAL LOCATION"))?;
        let checkpoint = field("CHECKPOINT LOCATION").map(str::trim_ascii_end);
        let checkpoint_lsn = checkpoint
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| missing("CHECKPOINT LOCATION"))?;
        let from = match field("BACKUP FROM").map(str::trim_ascii_end) {
            Some("standby") => BackupFrom::Standby,
            _ => BackupFrom::Primary,
        };
        Ok(Self {
            start_lsn,
            checkpoint_lsn,
            timeline,
            from,
            start_time: field("START TIME").unwrap_or_default().to_owned(),
            label: field("LABEL").unwrap_or_default().to_owned(),
        })
    }

    /// The file's bytes as PostgreSQL writes them, with the WAL segment file name that follows from
    /// the segment size.
    #[must_use]
    pub fn encode(&self, segment_size: SegmentSize) -> Vec<u8> {
        let number = segment_size.number_of(self.start_lsn);
        let file_name = segment_size.file_name(self.timeline, number);
        let from = match self.from {
            BackupFrom::Primary => "primary",
            BackupFrom::Standby => "standby",
        };
        format!(
            "START WAL LOCATION: {} (file {file_name})\n\
             CHECKPOINT LOCATION: {}\n\
             BACKUP METHOD: streamed\n\
             BACKUP FROM: {from}\n\
             START TIME: {}\n\
             LABEL: {}\n\
             START TIMELINE: {}\n",
            self.start_lsn, self.checkpoint_lsn, self.start_time, self.label, self.timeline
        )
        .into_bytes()
    }
}

/// `X/X (file TTTTTTTTSSSSSSSSSSSSSSSS)`
fn decode_start(text: &str) -> Option<(Lsn, TimelineId)> {
    let (lsn, file) = text.trim_ascii_end().split_once(" (file ")?;
    let timeline = file.strip_suffix(')').filter(|name| name.len() == 24)?.get(..8)?;
    let timeline = TimelineId::new(u32::from_str_radix(timeline, 16).ok()?)?;
    Some((lsn.parse().ok()?, timeline))
}

fn missing(line: &str) -> Error {
    Error::new(Kind::Corrupt, format!("unable to read 'backup_label': no readable line '{line}'"))
}

/// One line of a `tablespace_map`: recovery makes the symbolic link `pg_tblspc/<oid>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablespaceLink {
    /// Oid of the tablespace.
    pub oid: u32,
    /// Where the link points; bytes of the server's file system, no particular encoding.
    pub target: Vec<u8>,
}

/// The links in the bytes of a `tablespace_map` file.
///
/// # Errors
/// `corrupt` for what PostgreSQL refuses.
pub fn decode_tablespace_map(bytes: &[u8]) -> Result<Vec<TablespaceLink>> {
    let refused = |found: &str| {
        Error::new(Kind::Corrupt, format!("unable to read 'tablespace_map': {found}"))
    };
    if bytes.len() > TABLESPACE_MAP_BYTES_MAX {
        return Err(refused("it is longer than any real one"));
    }
    let mut links = Vec::new();
    let mut line = Vec::new();
    let mut escaped = false;
    for &byte in bytes {
        match byte {
            b'\n' | b'\r' if !escaped => {
                if !line.is_empty() {
                    let link = decode_link(&line).ok_or_else(|| refused("a line is no link"))?;
                    links.push(link);
                    line.clear();
                }
            }
            b'\\' if !escaped => escaped = true,
            _ => {
                line.push(byte);
                escaped = false;
            }
        }
    }
    if line.is_empty() && !escaped { Ok(links) } else { Err(refused("the last line has no end")) }
}

/// The bytes of a `tablespace_map` file with these links.
#[must_use]
pub fn encode_tablespace_map(links: &[TablespaceLink]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for link in links {
        bytes.extend_from_slice(format!("{} ", link.oid).as_bytes());
        for &byte in &link.target {
            if matches!(byte, b'\n' | b'\r' | b'\\') {
                bytes.push(b'\\');
            }
            bytes.push(byte);
        }
        bytes.push(b'\n');
    }
    bytes
}

/// An oid, exactly one space, a path that is not empty.
fn decode_link(line: &[u8]) -> Option<TablespaceLink> {
    let space = line.iter().position(|byte| *byte == b' ')?;
    let (oid, target) = line.split_at_checked(space)?;
    let oid: u32 = std::str::from_utf8(oid).ok()?.parse().ok()?;
    let target = target.get(1..).filter(|target| !target.is_empty() && oid != 0)?;
    Some(TablespaceLink { oid, target: target.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: &[u8] = b"START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
        CHECKPOINT LOCATION: 0/2000060\n\
        BACKUP METHOD: streamed\n\
        BACKUP FROM: primary\n\
        START TIME: 2026-11-22 13:00:00 UTC\n\
        LABEL: tidemark\n\
        START TIMELINE: 1\n";

    #[test]
    fn a_label_goes_both_ways() {
        let label = BackupLabel::decode(LABEL).unwrap();
        assert_eq!(label.start_lsn, Lsn(0x200_0028));
        assert_eq!(label.checkpoint_lsn, Lsn(0x200_0060));
        assert_eq!((label.timeline.get(), label.from), (1, BackupFrom::Primary));
        assert_eq!(label.label, "tidemark");
        assert_eq!(label.encode(SegmentSize::DEFAULT), LABEL);
    }

    #[test]
    fn a_label_without_its_positions_is_corrupt() {
        let text = std::str::from_utf8(LABEL).unwrap();
        for damage in [
            text.replace("0/2000028 ", "0_2000028 "),
            text.replace("CHECKPOINT LOCATION", "CHECKPOINT"),
            text.replace("000000010000000000000002", "000000000000000000000002"),
            String::new(),
        ] {
            let error = BackupLabel::decode(damage.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{damage}");
        }
        let incremental = format!("{text}INCREMENTAL FROM LSN: 0/1\n");
        let error = BackupLabel::decode(incremental.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
    }

    #[test]
    fn a_label_in_another_encoding_is_still_read() {
        let mut bytes = LABEL.to_vec();
        let at = bytes.windows(8).position(|window| window == b"tidemark").unwrap();
        bytes[at] = 0xE9;
        assert_eq!(BackupLabel::decode(&bytes).unwrap().start_lsn, Lsn(0x200_0028));
    }

    #[test]
    fn tablespace_maps_go_both_ways_with_any_path() {
        let links = vec![
            TablespaceLink { oid: 16385, target: b"/mnt/fast disk".to_vec() },
            TablespaceLink { oid: 16386, target: b" /odd\n\\name\r\xff".to_vec() },
        ];
        assert_eq!(decode_tablespace_map(&encode_tablespace_map(&links)).unwrap(), links);
        for bad in [&b"16385\n"[..], b"16385 \n", b"x /y\n", b"16385 /y", b"16385 /y\\"] {
            assert_eq!(decode_tablespace_map(bad).unwrap_err().kind(), Kind::Corrupt);
        }
    }
}
