//! Packs: what a footer says about files and frames, and how that is written.
//!
//! # Shape
//! ```text
//! header            64 bytes
//! frames            each whole, in any order of their indexes
//! footer frames     the footer's bytes cut into blocks of 1 MiB; the last is flagged
//! trailer           24 bytes: offset of the first footer frame u64, bytes of all footer frames u32,
//!                   index of the first footer frame u32, "TIDEFOOT"
//! ```
//! The footer, little endian, text as `u16` length and bytes:
//! ```text
//! u32 sources, each: backup id (text), pack number u32        those after source 0, this pack itself
//! u32 entries, each: kind u8 (0 file, 1 directory, 2 symbolic link), flags u8 (bit 0: the file ends
//!                    in this pack), mode u32, mtime i64 (seconds since 1970), path (text);
//!                    of a file: size u64, CRC-32C of all of it u32 (0 when it ends elsewhere);
//!                    of a link: target (text)
//! u32 frames,  each: source u32, offset u64, frame bytes u32, plain bytes u32, index u32,
//!                    first 16 bytes of the BLAKE3 hash of the plain block,
//!                    u32 spans, each: entry u32, offset in the file u64, bytes u32
//! u32 zero runs, each: entry u32, offset in the file u64, bytes u64
//! ```
//! The spans of a frame follow one another in its plain block and fill it. Every byte of a file lies
//! in one span or one zero run of one pack of its backup.

use std::fmt;

use super::header::array;
use super::names::{BackupId, PackName};
use crate::error::{Error, Kind, Result};
use crate::pipeline::frame::{FRAME_BYTES_MAX, FRAME_OVERHEAD_BYTES, FRAME_PLAIN_BYTES_MAX};

/// Bytes of the trailer.
pub const TRAILER_BYTES: usize = 24;
/// Last bytes of every pack.
pub const TRAILER_MAGIC: [u8; 8] = *b"TIDEFOOT";
/// Most plain bytes of a footer that is read.
pub const FOOTER_BYTES_MAX: usize = 64 << 20;
/// A pack is closed when it has so many entries, frames or zero runs, so that its footer fits in a few
/// megabytes whatever the database looks like.
pub const PACK_RECORDS_MAX: usize = 16_384;
/// Longest path, PostgreSQL's `MAXPGPATH` four times over.
pub const PATH_BYTES_MAX: usize = 4096;

/// A path below the data directory: `/` between segments, none of them empty, `.` or `..`. Bytes, for
/// a data directory may hold names that are not UTF-8.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FilePath(Box<[u8]>);

impl FilePath {
    /// Checks a path.
    ///
    /// # Errors
    /// `corrupt` when it is empty, too long, absolute, holds a NUL, or climbs.
    pub fn new(path: impl AsRef<[u8]>) -> Result<Self> {
        let path = path.as_ref();
        let bad_segment =
            |segment: &[u8]| segment.is_empty() || segment == b"." || segment == b"..";
        if path.len() > PATH_BYTES_MAX
            || path.contains(&0)
            || path.split(|&b| b == b'/').any(bad_segment)
        {
            let shown = String::from_utf8_lossy(path.get(..200).unwrap_or(path));
            let message = format!("unable to use '{shown}' as a path below the data directory");
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(Self(path.into()))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The path as text, when it is.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }
}

impl fmt::Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{self}'")
    }
}

/// A file, directory or link of which this pack holds something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it is below the data directory; below `pg_tblspc/<oid>/` for a tablespace.
    pub path: FilePath,
    /// Permission bits.
    pub mode: u32,
    /// Time of last change, seconds since 1970.
    pub mtime: i64,
    /// What it is.
    pub kind: EntryKind,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File {
        /// Size of the whole file.
        size_bytes: u64,
        /// CRC-32C of the whole file, in the pack where it ends; `None` in the others.
        crc32c: Option<u32>,
    },
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink {
        /// What it points to, as stored in it.
        target: Vec<u8>,
    },
}

/// Where a frame is and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameRecord {
    /// Which pack holds it: 0 this one, `n` the `n`-th (from 1) of [`PackFooter::sources`].
    pub source: u32,
    /// Its first byte in that pack.
    pub offset: u64,
    /// Bytes of the whole frame.
    pub frame_bytes: u32,
    /// Bytes of its plain block.
    pub plain_bytes: u32,
    /// Its index in that pack.
    pub index: u32,
    /// First 16 bytes of the BLAKE3 hash of the plain block.
    pub hash: [u8; 16],
    /// What the plain block is made of, in order.
    pub spans: Vec<Span>,
}

impl FrameRecord {
    /// First byte after the frame in its pack.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.frame_bytes))
    }
}

/// A piece of a file inside a plain block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index in [`PackFooter::entries`].
    pub entry: u32,
    /// Where in the file it belongs.
    pub file_offset: u64,
    /// Its length.
    pub bytes: u32,
}

/// A piece of a file that is all zero and stored nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroRun {
    /// Index in [`PackFooter::entries`].
    pub entry: u32,
    /// Where in the file it is.
    pub file_offset: u64,
    /// Its length.
    pub bytes: u64,
}

/// All that a pack says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackFooter {
    /// Packs of earlier backups whose frames are listed too.
    pub sources: Vec<PackName>,
    /// Files, directories and links.
    pub entries: Vec<Entry>,
    /// Frames, in the order of their offsets by those who write.
    pub frames: Vec<FrameRecord>,
    /// Pieces of files that are zero.
    pub zero_runs: Vec<ZeroRun>,
}

/// Where the footer of a pack is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FooterPlace {
    /// First byte of the first footer frame.
    pub offset: u64,
    /// Bytes of all footer frames.
    pub bytes: u32,
    /// Index of the first footer frame.
    pub index: u32,
}

impl FooterPlace {
    /// The trailer that says this.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(TRAILER_BYTES);
        bytes.extend_from_slice(&self.offset.to_le_bytes());
        bytes.extend_from_slice(&self.bytes.to_le_bytes());
        bytes.extend_from_slice(&self.index.to_le_bytes());
        bytes.extend_from_slice(&TRAILER_MAGIC);
        bytes
    }

    /// Reads the trailer of a pack of `pack_bytes`.
    ///
    /// # Errors
    /// `corrupt` when it is none, or points outside the pack.
    pub fn decode(trailer: &[u8], pack_bytes: u64) -> Result<Self> {
        let corrupt = |what: &str| Error::new(Kind::Corrupt, format!("its trailer {what}"));
        let parts = || {
            let (offset, bytes, index): ([u8; 8], [u8; 4], [u8; 4]) =
                (array(trailer, 0)?, array(trailer, 8)?, array(trailer, 12)?);
            let magic: [u8; 8] = array(trailer, 16)?;
            (trailer.len() == TRAILER_BYTES && magic == TRAILER_MAGIC).then(|| Self {
                offset: u64::from_le_bytes(offset),
                bytes: u32::from_le_bytes(bytes),
                index: u32::from_le_bytes(index),
            })
        };
        let place = parts().ok_or_else(|| {
            corrupt("is missing").hint("The pack was cut off, or is not a pack of Tidemark.")
        })?;
        place.check(pack_bytes)?;
        Ok(place)
    }

    /// Checks that the footer lies between the header and the trailer and is not too long to read.
    pub(super) fn check(&self, pack_bytes: u64) -> Result<()> {
        let end = self.offset.checked_add(u64::from(self.bytes));
        let whole = end.and_then(|end| end.checked_add(TRAILER_BYTES as u64)) == Some(pack_bytes);
        let long = self.bytes as usize > FOOTER_BYTES_MAX + FOOTER_BYTES_MAX / 64;
        if whole && !long && self.offset >= super::header::HEADER_BYTES as u64 {
            return Ok(());
        }
        let Self { offset, bytes, .. } = self;
        let message =
            format!("its trailer says {bytes} bytes of footer at byte {offset} of {pack_bytes}");
        Err(Error::new(Kind::Corrupt, message))
    }
}

const KIND_FILE: u8 = 0;
const KIND_DIRECTORY: u8 = 1;
const KIND_SYMLINK: u8 = 2;
const FLAG_ENDS: u8 = 1;

impl PackFooter {
    /// The footer's bytes.
    ///
    /// # Errors
    /// `bug` when a text or a list is longer than its length can say.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut out = Writer(Vec::new());
        out.count(self.sources.len())?;
        for source in &self.sources {
            out.text(source.backup.to_string().as_bytes())?;
            out.u32(source.number);
        }
        out.count(self.entries.len())?;
        for entry in &self.entries {
            out.entry(entry)?;
        }
        out.count(self.frames.len())?;
        for frame in &self.frames {
            out.u32(frame.source);
            out.u64(frame.offset);
            out.u32(frame.frame_bytes);
            out.u32(frame.plain_bytes);
            out.u32(frame.index);
            out.0.extend_from_slice(&frame.hash);
            out.count(frame.spans.len())?;
            for span in &frame.spans {
                out.u32(span.entry);
                out.u64(span.file_offset);
                out.u32(span.bytes);
            }
        }
        out.count(self.zero_runs.len())?;
        for run in &self.zero_runs {
            out.u32(run.entry);
            out.u64(run.file_offset);
            out.u64(run.bytes);
        }
        Ok(out.0)
    }

    /// Reads a footer, checking that all it says fits together.
    ///
    /// # Errors
    /// `corrupt` naming the byte of the footer where it does not.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut input = Reader { bytes, offset: 0 };
        let sources = input.list(6, |input| {
            let text = input.text()?;
            let backup: Option<BackupId> =
                std::str::from_utf8(text).ok().and_then(|t| t.parse().ok());
            let backup = backup.ok_or_else(|| input.corrupt("a source is not a backup id"))?;
            Ok(PackName { backup, number: input.u32()? })
        })?;
        let entries = input.list(16, Reader::entry)?;
        let frames = input.list(44, |input| input.frame(&entries, sources.len()))?;
        let zero_runs = input.list(20, |input| {
            let run =
                ZeroRun { entry: input.u32()?, file_offset: input.u64()?, bytes: input.u64()? };
            input.check_piece(&entries, run.entry, run.file_offset, run.bytes)?;
            Ok(run)
        })?;
        if input.offset != bytes.len() {
            return Err(input.corrupt("bytes follow its end"));
        }
        Ok(Self { sources, entries, frames, zero_runs })
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn u32(&mut self, number: u32) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn u64(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn count(&mut self, count: usize) -> Result<()> {
        let count = u32::try_from(count)
            .map_err(|_too_long| Error::new(Kind::Bug, format!("a footer with {count} records")))?;
        self.u32(count);
        Ok(())
    }

    fn text(&mut self, text: &[u8]) -> Result<()> {
        let length = u16::try_from(text.len()).map_err(|_too_long| {
            Error::new(Kind::Bug, format!("a text of {} bytes", text.len()))
        })?;
        self.0.extend_from_slice(&length.to_le_bytes());
        self.0.extend_from_slice(text);
        Ok(())
    }

    fn entry(&mut self, entry: &Entry) -> Result<()> {
        let (kind, flags) = match &entry.kind {
            EntryKind::File { crc32c: Some(_), .. } => (KIND_FILE, FLAG_ENDS),
            EntryKind::File { crc32c: None, .. } => (KIND_FILE, 0),
            EntryKind::Directory => (KIND_DIRECTORY, 0),
            EntryKind::Symlink { .. } => (KIND_SYMLINK, 0),
        };
        self.0.extend_from_slice(&[kind, flags]);
        self.u32(entry.mode);
        self.0.extend_from_slice(&entry.mtime.to_le_bytes());
        self.text(entry.path.as_bytes())?;
        match &entry.kind {
            EntryKind::File { size_bytes, crc32c } => {
                self.u64(*size_bytes);
                self.u32(crc32c.unwrap_or(0));
                Ok(())
            }
            EntryKind::Directory => Ok(()),
            EntryKind::Symlink { target } => self.text(target),
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    fn corrupt(&self, what: impl fmt::Display) -> Error {
        let offset = self.offset;
        Error::new(Kind::Corrupt, format!("the footer is damaged before its byte {offset}: {what}"))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = array(self.bytes, self.offset).ok_or_else(|| self.corrupt("it is cut off"))?;
        self.offset += N;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<&'a [u8]> {
        let length = usize::from(u16::from_le_bytes(self.take()?));
        let text = self.offset.checked_add(length).and_then(|end| self.bytes.get(self.offset..end));
        let text = text.ok_or_else(|| self.corrupt("it is cut off"))?;
        self.offset += length;
        Ok(text)
    }

    /// A count and so many items, of which each takes at least `item_bytes_min`: so a count is
    /// checked against what can follow before anything is allocated for it.
    fn list<T>(
        &mut self,
        item_bytes_min: usize,
        mut item: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let count = self.u32()? as usize;
        let left = self.bytes.len() - self.offset;
        if count > left / item_bytes_min {
            return Err(self.corrupt(format_args!("{count} records cannot fit in {left} bytes")));
        }
        (0..count).map(|_| item(self)).collect()
    }

    fn entry(&mut self) -> Result<Entry> {
        let [kind, flags] = self.take()?;
        let mode = self.u32()?;
        let mtime = i64::from_le_bytes(self.take()?);
        let path = FilePath::new(self.text()?)?;
        let kind = match (kind, flags) {
            (KIND_FILE, 0 | FLAG_ENDS) => {
                let (size_bytes, crc) = (self.u64()?, self.u32()?);
                if flags != FLAG_ENDS && crc != 0 {
                    return Err(self.corrupt("a file that ends elsewhere has a CRC here"));
                }
                EntryKind::File { size_bytes, crc32c: (flags == FLAG_ENDS).then_some(crc) }
            }
            (KIND_DIRECTORY, 0) => EntryKind::Directory,
            (KIND_SYMLINK, 0) => EntryKind::Symlink { target: self.text()?.to_vec() },
            _ => return Err(self.corrupt(format_args!("kind {kind} with flags {flags}"))),
        };
        if mode > 0o7777 {
            return Err(self.corrupt(format_args!("mode {mode:o}")));
        }
        Ok(Entry { path, mode, mtime, kind })
    }

    fn frame(&mut self, entries: &[Entry], source_count: usize) -> Result<FrameRecord> {
        let mut frame = FrameRecord {
            source: self.u32()?,
            offset: self.u64()?,
            frame_bytes: self.u32()?,
            plain_bytes: self.u32()?,
            index: self.u32()?,
            hash: self.take()?,
            spans: Vec::new(),
        };
        let (whole, plain) = (frame.frame_bytes as usize, frame.plain_bytes as usize);
        if !(FRAME_OVERHEAD_BYTES + 1..=FRAME_BYTES_MAX).contains(&whole)
            || !(1..=FRAME_PLAIN_BYTES_MAX).contains(&plain)
            || frame.source as usize > source_count
            || frame.offset < super::header::HEADER_BYTES as u64
            || frame.offset.checked_add(whole as u64).is_none()
        {
            return Err(self.corrupt(format_args!(
                "frame {} of {whole} bytes ({plain} plain) at byte {} of source {}",
                frame.index, frame.offset, frame.source
            )));
        }
        frame.spans = self.list(16, |input| {
            let span = Span { entry: input.u32()?, file_offset: input.u64()?, bytes: input.u32()? };
            input.check_piece(entries, span.entry, span.file_offset, u64::from(span.bytes))?;
            Ok(span)
        })?;
        let sum: u64 = frame.spans.iter().map(|span| u64::from(span.bytes)).sum();
        if sum != plain as u64 {
            return Err(self.corrupt(format_args!("{sum} bytes of files in a block of {plain}")));
        }
        Ok(frame)
    }

    /// Checks that a piece of a file is one of a file and inside it.
    fn check_piece(&self, entries: &[Entry], entry: u32, offset: u64, bytes: u64) -> Result<()> {
        let size = match entries.get(entry as usize).map(|entry| &entry.kind) {
            Some(EntryKind::File { size_bytes, .. }) => *size_bytes,
            Some(_) => return Err(self.corrupt(format_args!("entry {entry} is not a file"))),
            None => return Err(self.corrupt(format_args!("there is no entry {entry}"))),
        };
        if bytes > 0 && offset.checked_add(bytes).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(self.corrupt(format_args!("{bytes} bytes at {offset} of a file of {size}")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pg::{Lsn, TimelineId};

    fn footer() -> PackFooter {
        let time = "2026-11-22T10:00:00Z".parse().unwrap();
        let backup = BackupId::new(time, TimelineId::FIRST, Lsn(0x28));
        let entry = |path: &str, kind| Entry {
            path: FilePath::new(path).unwrap(),
            mode: 0o600,
            mtime: -1,
            kind,
        };
        PackFooter {
            sources: vec![PackName { backup, number: 3 }],
            entries: vec![
                entry("base/1/2", EntryKind::File { size_bytes: 9, crc32c: Some(7) }),
                entry("base", EntryKind::Directory),
                entry("pg_tblspc/5", EntryKind::Symlink { target: b"/mnt".to_vec() }),
                entry("base/1/3", EntryKind::File { size_bytes: 5, crc32c: None }),
            ],
            frames: vec![FrameRecord {
                source: 1,
                offset: 64,
                frame_bytes: 40,
                plain_bytes: 10,
                index: 4,
                hash: [6; 16],
                spans: vec![
                    Span { entry: 0, file_offset: 0, bytes: 8 },
                    Span { entry: 3, file_offset: 3, bytes: 2 },
                ],
            }],
            zero_runs: vec![ZeroRun { entry: 0, file_offset: 8, bytes: 1 }],
        }
    }

    #[test]
    fn a_footer_comes_back_and_every_cut_is_noticed() {
        let bytes = footer().encode().unwrap();
        assert_eq!(PackFooter::decode(&bytes).unwrap(), footer());
        for cut in 0..bytes.len() {
            assert_eq!(PackFooter::decode(&bytes[..cut]).unwrap_err().kind(), Kind::Corrupt);
        }
        let mut longer = bytes;
        longer.push(0);
        assert_eq!(PackFooter::decode(&longer).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn what_does_not_fit_together_is_corrupt() {
        type Change = fn(&mut PackFooter);
        let changes: [Change; 8] = [
            |f| f.frames[0].spans[0].entry = 9,
            |f| f.frames[0].spans[0].entry = 1,
            |f| f.frames[0].spans[0].file_offset = 2,
            |f| f.frames[0].plain_bytes = 11,
            |f| f.frames[0].source = 2,
            |f| f.frames[0].offset = u64::MAX,
            |f| f.zero_runs[0].bytes = 0,
            |f| f.zero_runs[0].file_offset = u64::MAX,
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut footer = footer();
            change(&mut footer);
            let error = PackFooter::decode(&footer.encode().unwrap()).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "change {index}");
        }
    }

    #[test]
    fn only_where_a_file_ends_has_it_a_crc() {
        let mut ended = footer();
        ended.entries.truncate(1);
        (ended.frames, ended.zero_runs, ended.sources) = (Vec::new(), Vec::new(), Vec::new());
        let mut bytes = ended.encode().unwrap();
        // Behind the count of sources, the count of entries and the kind.
        let flags = 9;
        assert_eq!(bytes[flags], FLAG_ENDS);
        bytes[flags] = 0;
        assert_eq!(PackFooter::decode(&bytes).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn paths_stay_below_the_data_directory() {
        for bad in ["", "/etc", "a/../b", "..", "a//b", "a/", "./a", "a\0b", &"x".repeat(5000)] {
            assert_eq!(FilePath::new(bad).unwrap_err().kind(), Kind::Corrupt, "{bad}");
        }
        assert_eq!(FilePath::new(b"a/\xff".as_slice()).unwrap().as_str(), None);
        assert_eq!(FilePath::new("base/1/2.3_fsm").unwrap().as_str(), Some("base/1/2.3_fsm"));
    }

    #[test]
    fn a_trailer_points_into_its_pack() {
        let place = FooterPlace { offset: 100, bytes: 50, index: 3 };
        let trailer = place.encode();
        assert_eq!(FooterPlace::decode(&trailer, 174).unwrap(), place);
        for bytes in [0, 150, 173, 175, u64::MAX] {
            assert_eq!(FooterPlace::decode(&trailer, bytes).unwrap_err().kind(), Kind::Corrupt);
        }
        assert!(FooterPlace::decode(&trailer[1..], 174).is_err());
    }

    proptest! {
        #[test]
        fn changed_footers_never_panic(at in 0_usize..200, byte: u8) {
            let mut bytes = footer().encode().unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            drop(PackFooter::decode(&bytes));
        }
    }
}
