//! Splits a tar archive, arriving in pieces of any size, into its members without copying them.
//!
//! Pieces of bytes go in with [`Splitter::push`], members come out of [`Splitter::next`]: a header,
//! the content as slices of what was pushed, an end. Only headers that straddle two pieces are
//! copied (512 bytes), and the values of long-name extensions (bounded).
//!
//! # Shape
//! A member is a 512-byte header, its content, and zero bytes up to the next multiple of 512. Two
//! zero blocks end the archive; PostgreSQL 13 and 14 leave them out of `BASE_BACKUP`, so the end of the
//! bytes on a member's edge is an end too, unless an [`ArchiveEnd`] is asked for.
//!
//! # Source
//! POSIX.1-1988 ustar as `tarCreateHeader` in PostgreSQL's `src/port/tar.c` writes it (13 to 18):
//! numbers are octal, or base-256 big-endian with the top bit set when they do not fit; a directory
//! and a link end in a slash. Long names are never sent by PostgreSQL and are tolerated in GNU's
//! ('L', 'K') and pax' ('x', 'g') form.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

use crate::error::{Error, Kind, Result};

/// Size of a header and unit of padding.
const BLOCK_BYTES: usize = 512;
/// Greatest value of a long-name extension: PostgreSQL's paths are below `MAXPGPATH` (1024).
const EXTENSION_BYTES_MAX: u64 = 64 * 1024;
/// Greatest size of a member: PostgreSQL's files are segments of at most 64 TiB even when built
/// with the greatest segment size; this guards the arithmetic.
const MEMBER_BYTES_MAX: u64 = 1 << 50;

/// How an archive ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ArchiveEnd {
    /// Where its bytes end, with zero blocks or without (PostgreSQL 13 and 14).
    #[default]
    Bare,
    /// With zero blocks, without which it is cut short (`perform_base_backup` of 15 to 18: "Properly
    /// terminate the tarfile").
    Marked,
}

/// What a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberKind {
    /// A file with content.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to this target.
    Symlink(Vec<u8>),
}

/// A member's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Path as written, without a trailing slash and without a leading `./`; names in a data directory
    /// need not be UTF-8.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: MemberKind,
    /// Permission bits.
    pub mode: u32,
    /// Size of the content, 0 unless it is a file.
    pub size_bytes: u64,
    /// Seconds since the Unix epoch.
    pub mtime_seconds: u64,
}

/// What comes next in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarEvent {
    /// A member begins.
    Begin(Member),
    /// Content of the current member, never empty.
    Data(Bytes),
    /// The current member is complete.
    End,
}

#[derive(Debug)]
enum State {
    Header,
    Content {
        left: u64,
        padding: u64,
    },
    Extension {
        kind: u8,
        value: BytesMut,
        left: u64,
        padding: u64,
    },
    Padding {
        left: u64,
    },
    /// A zero block was seen: nothing but zero bytes may follow.
    Ended,
}

/// Names carried over from extension headers to the member they belong to.
#[derive(Debug, Default)]
struct Overrides {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size_bytes: Option<u64>,
}

/// A tar archive in pieces; see the module.
#[derive(Debug)]
pub struct Splitter {
    pieces: VecDeque<Bytes>,
    header: BytesMut,
    state: State,
    overrides: Overrides,
    position: u64,
}

impl Default for Splitter {
    fn default() -> Self {
        Self::new()
    }
}

impl Splitter {
    /// At the start of an archive.
    #[must_use]
    pub fn new() -> Self {
        Self {
            pieces: VecDeque::new(),
            header: BytesMut::with_capacity(BLOCK_BYTES),
            state: State::Header,
            overrides: Overrides::default(),
            position: 0,
        }
    }

    /// Adds the bytes that follow.
    pub fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.pieces.push_back(piece);
        }
    }

    /// The next event, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// `corrupt` for bytes that are no tar archive, `unsupported` for members that are neither
    /// file, directory nor symbolic link.
    #[allow(clippy::should_implement_trait, reason = "an iterator would have to end at `None`")]
    pub fn next(&mut self) -> Result<Option<TarEvent>> {
        loop {
            match &mut self.state {
                State::Header => {
                    if !self.fill_header() {
                        return Ok(None);
                    }
                    let header = self.header.split().freeze();
                    self.header.reserve(BLOCK_BYTES);
                    if let Some(event) = self.begin(&header)? {
                        return Ok(Some(event));
                    }
                }
                State::Content { left: 0, padding } => {
                    self.state = State::Padding { left: *padding };
                    return Ok(Some(TarEvent::End));
                }
                State::Content { left, .. } => {
                    let Some(data) = take(&mut self.pieces, *left) else { return Ok(None) };
                    *left -= data.len() as u64;
                    self.position += data.len() as u64;
                    return Ok(Some(TarEvent::Data(data)));
                }
                State::Extension { left: 0, kind, value, padding } => {
                    let (kind, value, padding) = (*kind, std::mem::take(value), *padding);
                    self.state = State::Padding { left: padding };
                    self.extend(kind, &value)?;
                }
                State::Extension { left, value, .. } => {
                    let Some(data) = take(&mut self.pieces, *left) else { return Ok(None) };
                    *left -= data.len() as u64;
                    self.position += data.len() as u64;
                    value.extend_from_slice(&data);
                }
                State::Padding { left: 0 } => self.state = State::Header,
                State::Padding { left } => {
                    let Some(data) = take(&mut self.pieces, *left) else { return Ok(None) };
                    *left -= data.len() as u64;
                    self.position += data.len() as u64;
                }
                State::Ended => {
                    let Some(data) = take(&mut self.pieces, u64::MAX) else { return Ok(None) };
                    if data.iter().any(|byte| *byte != 0) {
                        return Err(self.damaged("bytes after the end of the archive"));
                    }
                    self.position += data.len() as u64;
                }
            }
        }
    }

    /// Checks that the archive may end here.
    ///
    /// # Errors
    /// `corrupt` inside a member, and before the end mark of an archive that has one.
    pub fn finish(self, end: ArchiveEnd) -> Result<()> {
        let on_edge = match self.state {
            State::Header => self.header.is_empty(),
            State::Ended => true,
            State::Padding { left } => left == 0,
            State::Content { .. } | State::Extension { .. } => false,
        };
        if !on_edge || !self.pieces.is_empty() {
            return Err(self.damaged("the archive ends inside a member"));
        }
        if end == ArchiveEnd::Marked && !matches!(self.state, State::Ended) {
            return Err(self.damaged("the archive ends without its end mark"));
        }
        Ok(())
    }

    /// Collects a header; whether it is complete.
    fn fill_header(&mut self) -> bool {
        while self.header.len() < BLOCK_BYTES {
            let wanted = (BLOCK_BYTES - self.header.len()) as u64;
            let Some(data) = take(&mut self.pieces, wanted) else { return false };
            self.position += data.len() as u64;
            self.header.extend_from_slice(&data);
        }
        true
    }

    fn begin(&mut self, header: &[u8]) -> Result<Option<TarEvent>> {
        if header.iter().all(|byte| *byte == 0) {
            self.state = State::Ended;
            return Ok(None);
        }
        if number(field(header, 148, 8)) != Some(checksum(header)) {
            return Err(self.damaged("the checksum of a header does not match"));
        }
        let size = number(field(header, 124, 12)).filter(|size| *size <= MEMBER_BYTES_MAX);
        let size = size.ok_or_else(|| self.damaged("the size of a member cannot be read"))?;
        let kind = header.get(156).copied().unwrap_or(0);
        if matches!(kind, b'L' | b'K' | b'x' | b'g') {
            if size > EXTENSION_BYTES_MAX {
                return Err(self.damaged("an extension header is too long"));
            }
            let value = BytesMut::new();
            self.state = State::Extension { kind, value, left: size, padding: padding_of(size) };
            return Ok(None);
        }
        self.begin_member(header, kind, size).map(Some)
    }

    fn begin_member(&mut self, header: &[u8], kind: u8, size: u64) -> Result<TarEvent> {
        let overrides = std::mem::take(&mut self.overrides);
        let path = overrides.path.unwrap_or_else(|| header_path(header));
        let directory_by_name = path.ends_with(b"/");
        let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
        let path = path.get(..end).unwrap_or_default();
        let path = path.strip_prefix(b"./").unwrap_or(path).to_vec();
        let kind = match kind {
            b'0' | 0 if !directory_by_name => MemberKind::File,
            b'0' | 0 | b'5' => MemberKind::Directory,
            b'2' => MemberKind::Symlink(
                overrides.link.unwrap_or_else(|| text(field(header, 157, 100)).to_vec()),
            ),
            other => {
                let (path, kind) = (path.escape_ascii(), other.escape_ascii());
                let message = format!(
                    "unable to take a member of the base backup: '{path}' has the tar type '{kind}'"
                );
                return Err(Error::new(Kind::Unsupported, message));
            }
        };
        let size_bytes = match kind {
            MemberKind::File => overrides.size_bytes.unwrap_or(size),
            MemberKind::Directory | MemberKind::Symlink(_) => 0,
        };
        let mode = number(field(header, 100, 8)).and_then(|mode| u32::try_from(mode).ok());
        let mode = mode.ok_or_else(|| self.damaged("the mode of a member cannot be read"))?;
        let mtime_seconds = number(field(header, 136, 12))
            .ok_or_else(|| self.damaged("the time of a member cannot be read"))?;
        self.state = State::Content { left: size_bytes, padding: padding_of(size_bytes) };
        let mode = mode & 0o7777;
        Ok(TarEvent::Begin(Member { path, kind, mode, size_bytes, mtime_seconds }))
    }

    /// Takes over the value of an extension header.
    fn extend(&mut self, kind: u8, value: &[u8]) -> Result<()> {
        match kind {
            b'L' => self.overrides.path = Some(text(value).to_vec()),
            b'K' => self.overrides.link = Some(text(value).to_vec()),
            b'x' => {
                for (key, value) in
                    pax_records(value).ok_or_else(|| self.damaged("a pax header cannot be read"))?
                {
                    match key {
                        b"path" => self.overrides.path = Some(text(value).to_vec()),
                        b"linkpath" => self.overrides.link = Some(text(value).to_vec()),
                        b"size" => {
                            let size = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                            let size = size.filter(|size| *size <= MEMBER_BYTES_MAX);
                            let size =
                                size.ok_or_else(|| self.damaged("a pax size cannot be read"))?;
                            self.overrides.size_bytes = Some(size);
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn damaged(&self, found: &str) -> Error {
        let at = self.position;
        let message = format!("unable to read the base backup's archive: {found}, at byte {at}");
        Error::new(Kind::Corrupt, message)
    }
}

/// Up to `wanted` bytes from the front, or `None` when there are none.
fn take(pieces: &mut VecDeque<Bytes>, wanted: u64) -> Option<Bytes> {
    let first = pieces.front_mut()?;
    let len = usize::try_from(wanted).unwrap_or(usize::MAX).min(first.len());
    let taken = first.split_to(len);
    if !first.has_remaining() {
        pieces.pop_front();
    }
    Some(taken)
}

/// Bytes from the end of a content of `size_bytes` to the next block.
fn padding_of(size_bytes: u64) -> u64 {
    size_bytes.next_multiple_of(BLOCK_BYTES as u64) - size_bytes
}

fn field(header: &[u8], offset: usize, len: usize) -> &[u8] {
    header.get(offset..offset + len).unwrap_or_default()
}

/// A text field, which ends at its first zero byte or fills it.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The path in a header; ustar keeps the front of a long one apart.
fn header_path(header: &[u8]) -> Vec<u8> {
    let name = text(field(header, 0, 100));
    let ustar = field(header, 257, 5) == b"ustar";
    match text(field(header, 345, 155)) {
        prefix if ustar && !prefix.is_empty() => [prefix, b"/", name].concat(),
        _ => name.to_vec(),
    }
}

/// `read_tar_number`: octal with leading spaces, or base-256 when the top bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if let Some((first, rest)) = field.split_first()
        && *first == 0x80
    {
        let (high, low) = rest.split_at_checked(rest.len().checked_sub(8)?)?;
        let fits = high.iter().all(|byte| *byte == 0);
        return fits.then(|| low.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)));
    }
    let text = field.trim_ascii_start();
    let digits = text.iter().take_while(|byte| (b'0'..=b'7').contains(byte)).count();
    let (digits, rest) = text.split_at(digits);
    if !rest.first().is_none_or(|byte| matches!(byte, 0 | b' ')) {
        return None;
    }
    digits
        .iter()
        .try_fold(0_u64, |value, digit| value.checked_mul(8)?.checked_add(u64::from(digit - b'0')))
}

/// Sum of a header's bytes with the checksum field taken as spaces (`tarChecksum`).
fn checksum(header: &[u8]) -> u64 {
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    let own: u64 = field(header, 148, 8).iter().map(|byte| u64::from(*byte)).sum();
    sum - own + 8 * u64::from(b' ')
}

/// The `length key=value\n` records of a pax header.
fn pax_records(mut bytes: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let space = bytes.iter().position(|byte| *byte == b' ')?;
        let len: usize = std::str::from_utf8(bytes.get(..space)?).ok()?.parse().ok()?;
        let (record, rest) = bytes.split_at_checked(len)?;
        let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        records.push((record.get(..equals)?, record.get(equals + 1..)?));
        bytes = rest;
    }
    Some(records)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes a header as PostgreSQL's `tarCreateHeader` does.
    fn header(path: &str, kind: u8, size: u64) -> Vec<u8> {
        let mut block = vec![0_u8; BLOCK_BYTES];
        block[..path.len()].copy_from_slice(path.as_bytes());
        block[100..107].copy_from_slice(b"0000600");
        block[108..115].copy_from_slice(b"0000000");
        if size < 1 << 33 {
            block[124..136].copy_from_slice(format!("{size:011o} ").as_bytes());
        } else {
            block[124] = 0x80;
            block[128..136].copy_from_slice(&size.to_be_bytes());
        }
        block[136..148].copy_from_slice(b"14000000000 ");
        block[156] = kind;
        block[257..263].copy_from_slice(b"ustar\0");
        block[263..265].copy_from_slice(b"00");
        let sum = checksum(&block);
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }

    /// A file of an archive.
    pub(in super::super) fn member(path: &str, content: &[u8]) -> Vec<u8> {
        let mut bytes = header(path, b'0', content.len() as u64);
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        bytes
    }

    fn read(archive: &[u8], piece: usize) -> Result<Vec<(Member, Vec<u8>)>> {
        let mut splitter = Splitter::new();
        let mut members: Vec<(Member, Vec<u8>)> = Vec::new();
        let mut open = false;
        for piece in archive.chunks(piece) {
            splitter.push(Bytes::copy_from_slice(piece));
            while let Some(event) = splitter.next()? {
                match event {
                    TarEvent::Begin(member) => {
                        assert!(!open);
                        open = true;
                        members.push((member, Vec::new()));
                    }
                    TarEvent::Data(data) => {
                        assert!(open && !data.is_empty());
                        members.last_mut().unwrap().1.extend_from_slice(&data);
                    }
                    TarEvent::End => {
                        assert!(open);
                        open = false;
                    }
                }
            }
        }
        splitter.finish(ArchiveEnd::Bare)?;
        assert!(!open);
        Ok(members)
    }

    #[test]
    fn an_archive_that_has_an_end_mark_is_cut_short_without_it() {
        let archive = member("file", &[1; 700]);
        for (end_blocks, end, accepted) in [
            (0, ArchiveEnd::Bare, true),
            (2, ArchiveEnd::Bare, true),
            (0, ArchiveEnd::Marked, false),
            (2, ArchiveEnd::Marked, true),
        ] {
            let mut archive = archive.clone();
            archive.resize(archive.len() + end_blocks * BLOCK_BYTES, 0);
            let mut splitter = Splitter::new();
            splitter.push(archive.into());
            while splitter.next().unwrap().is_some() {}
            let finished = splitter.finish(end);
            assert_eq!(finished.is_ok(), accepted, "{end_blocks} {end:?}: {finished:?}");
        }
    }

    #[test]
    fn files_directories_and_links_come_out_as_postgres_wrote_them() {
        let mut archive = member("backup_label", b"START WAL LOCATION");
        archive.extend(header("base/", b'5', 0));
        archive.extend(header("./global/", b'5', 0));
        let mut link = header("pg_tblspc/16384/", b'2', 0);
        link[157..163].copy_from_slice(b"/mnt/x");
        let sum = checksum(&link);
        link[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend(link);
        archive.extend(member("empty", b""));
        for end_blocks in 0..3 {
            let mut archive = archive.clone();
            archive.resize(archive.len() + end_blocks * BLOCK_BYTES, 0);
            let members = read(&archive, 100).unwrap();
            let paths: Vec<String> =
                members.iter().map(|(m, _)| m.path.escape_ascii().to_string()).collect();
            assert_eq!(paths, ["backup_label", "base", "global", "pg_tblspc/16384", "empty"]);
            assert_eq!(members[0].1, b"START WAL LOCATION");
            assert_eq!(members[0].0.mode, 0o600);
            assert_eq!(members[0].0.mtime_seconds, 0o14000000000);
            assert_eq!(members[1].0.kind, MemberKind::Directory);
            assert_eq!(members[3].0.kind, MemberKind::Symlink(b"/mnt/x".to_vec()));
        }
    }

    #[test]
    fn a_size_too_long_for_octal_is_read_in_base_256() {
        let mut splitter = Splitter::new();
        splitter.push(header("big", b'0', 1 << 40).into());
        let Some(TarEvent::Begin(member)) = splitter.next().unwrap() else { panic!("no member") };
        assert_eq!(member.size_bytes, 1 << 40);
    }

    #[test]
    fn long_names_of_gnu_and_pax_are_understood() {
        let long = format!("base/{}", "x".repeat(150));
        let mut gnu = header("././@LongLink", b'L', long.len() as u64 + 1);
        gnu.extend_from_slice(long.as_bytes());
        gnu.resize(2 * BLOCK_BYTES, 0);
        gnu.extend(member("base/short", b"1"));
        assert_eq!(read(&gnu, 7).unwrap()[0].0.path, long.as_bytes());

        let record = format!(" path={long}\n");
        let len = record.len() + 3;
        let mut pax = member("pax", format!("{len}{record}").as_bytes());
        pax[156] = b'x';
        let sum = checksum(&pax[..BLOCK_BYTES]);
        pax[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        pax.extend(member("base/short", b"2"));
        assert_eq!(read(&pax, 1000).unwrap()[0].0.path, long.as_bytes());
    }

    #[test]
    fn damage_is_an_error_that_says_where() {
        let mut flipped = member("file", b"x");
        flipped[3] ^= 1;
        assert_eq!(read(&flipped, 512).unwrap_err().kind(), Kind::Corrupt);
        let cut = &member("file", &[1; 700])[..1000];
        let error = read(cut, 512).unwrap_err();
        assert!(error.message().contains("ends inside a member, at byte 1000"), "{error}");
        let mut trailing = vec![0; 1024];
        trailing.extend(b"x");
        assert_eq!(read(&trailing, 512).unwrap_err().kind(), Kind::Corrupt);
        let device = header("dev", b'3', 0);
        assert_eq!(read(&device, 512).unwrap_err().kind(), Kind::Unsupported);
        let endless = header("l", b'L', 1 << 30);
        assert_eq!(read(&endless, 512).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn content_is_handed_on_without_a_copy() {
        let archive = Bytes::from(member("file", &[7; 512]));
        let mut splitter = Splitter::new();
        splitter.push(archive.clone());
        splitter.next().unwrap();
        let Some(TarEvent::Data(data)) = splitter.next().unwrap() else { panic!("no data") };
        assert_eq!(data.as_ptr(), archive[512..].as_ptr());
    }

    proptest! {
        #[test]
        fn members_do_not_depend_on_how_the_archive_is_cut(
            contents in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 0..6),
            piece in 1..3000_usize,
        ) {
            let mut archive = Vec::new();
            for (index, content) in contents.iter().enumerate() {
                archive.extend(member(&format!("file-{index}"), content));
            }
            let members = read(&archive, piece).unwrap();
            prop_assert_eq!(members.len(), contents.len());
            for ((member, found), content) in members.iter().zip(&contents) {
                prop_assert_eq!(found, content);
                prop_assert_eq!(member.size_bytes, content.len() as u64);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            let _ = read(&bytes, 333);
        }
    }
}
