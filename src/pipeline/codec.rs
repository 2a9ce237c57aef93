//! Compression: the one file that names zstd.
//!
//! # Shape
//! Plain blocks come as slices of whatever buffers they arrived in; compressed bytes are appended to
//! the caller's buffer, which is never moved while it has room ([`compressed_bytes_max`]).

use std::io::Cursor;

use bytes::Bytes;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx};

use crate::error::{Error, Kind, Result};

/// A zstd level, from -7 (fast) to 19.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(i32);

impl Level {
    /// The fastest level.
    pub const MIN: i32 = -7;
    /// The strongest level: those above need far more memory for less than a percent.
    pub const MAX: i32 = 19;

    /// This level, or `None` outside [`Level::MIN`] to [`Level::MAX`].
    #[must_use]
    pub fn new(level: i32) -> Option<Self> {
        (Self::MIN..=Self::MAX).contains(&level).then_some(Self(level))
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> i32 {
        self.0
    }
}

impl Default for Level {
    /// Level 1: measured on database pages and WAL, with what [`parameters`] changes of it, it reaches
    /// level 3's ratio at about twice the speed; level 6 costs six times as much for 7 %.
    fn default() -> Self {
        Self(1)
    }
}

/// What the encoder is set to at `level`.
///
/// Level 1, the default, is not as zstd has it. It looks for matches of 7 bytes, and what repeats in pages and
/// WAL is often shorter, above all in the headers of tuples and index entries; with 5 bytes the pages of pgbench
/// take 23 % less room, those of an application 5 %, and WAL 1 %. With a table of 32 KiB instead of 64 this takes 1
/// to 4 % more CPU time on pages and 0 to 5 % less on WAL. (Program text takes 4 % more room and 6 % more time.)
pub fn parameters(level: Level) -> impl Iterator<Item = CParameter> {
    let own: &[CParameter] = match level.0 {
        1 => &[CParameter::MinMatch(5), CParameter::HashLog(13)],
        _ => &[],
    };
    let everywhere = [CParameter::CompressionLevel(level.0), CParameter::ContentSizeFlag(true)];
    everywhere.into_iter().chain(own.iter().copied())
}

/// How the payload of a frame is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As it is: what does not shrink.
    Stored,
    /// One zstd frame.
    Zstd,
}

impl Codec {
    pub(super) fn to_byte(self) -> u8 {
        match self {
            Codec::Stored => 0,
            Codec::Zstd => 1,
        }
    }

    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Codec::Stored),
            1 => Some(Codec::Zstd),
            _ => None,
        }
    }
}

/// Room that compressing `plain_len` bytes may need, before the result is found to be larger than
/// its input and replaced by it.
#[must_use]
pub fn compressed_bytes_max(plain_len: usize) -> usize {
    zstd_safe::compress_bound(plain_len)
}

/// A compression context; costs about 1.5 MiB at level 1 and 1 MiB blocks, 19 MiB at level 19.
pub struct Compressor {
    context: CCtx<'static>,
    level: Level,
    /// The slices of a block, put together.
    gathered: Vec<u8>,
}

impl Compressor {
    /// A context for `level`.
    ///
    /// # Errors
    /// `unavailable` when there is no memory for it.
    pub fn new(level: Level) -> Result<Self> {
        let mut context = CCtx::try_create().ok_or_else(no_memory)?;
        for parameter in parameters(level) {
            context.set_parameter(parameter).map_err(|code| failed("set the level of", code))?;
        }
        Ok(Self { context, level, gathered: Vec::new() })
    }

    /// The level.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }

    /// Bytes this context holds now.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.context.sizeof() + self.gathered.capacity()
    }

    /// Appends the `plain` slices, one after the other, to `out`: compressed, or as they are when
    /// that is not smaller.
    ///
    /// # Errors
    /// `bug` when the codec refuses, which only a broken build makes it do.
    pub fn append(&mut self, plain: &[Bytes], out: &mut Vec<u8>) -> Result<Codec> {
        let start = out.len();
        let plain_len: usize = plain.iter().map(Bytes::len).sum();
        out.reserve(compressed_bytes_max(plain_len));
        self.compress(plain, out).map_err(|code| failed("compress", code))?;
        if out.len() - start < plain_len {
            return Ok(Codec::Zstd);
        }
        out.truncate(start);
        for slice in plain {
            out.extend_from_slice(slice);
        }
        Ok(Codec::Stored)
    }

    /// In one piece, not slice by slice: zstd copies what it is given in pieces as well, into a ring
    /// whose ends it then has to match across, and that takes a tenth to a quarter longer.
    fn compress(&mut self, plain: &[Bytes], out: &mut Vec<u8>) -> zstd_safe::SafeResult {
        let whole: &[u8] = match plain {
            [only] => only,
            slices => {
                self.gathered.clear();
                self.gathered.reserve(slices.iter().map(Bytes::len).sum());
                slices.iter().for_each(|slice| self.gathered.extend_from_slice(slice));
                &self.gathered
            }
        };
        let end = out.len() as u64;
        let mut behind = Cursor::new(out);
        behind.set_position(end);
        self.context.compress2(&mut behind, whole)
    }
}

/// A decompression context of about 160 KiB.
pub struct Decompressor {
    context: DCtx<'static>,
}

impl Decompressor {
    /// A context.
    ///
    /// # Errors
    /// `unavailable` when there is no memory for it.
    pub fn new() -> Result<Self> {
        Ok(Self { context: DCtx::try_create().ok_or_else(no_memory)? })
    }

    /// Replaces `out` by the plain bytes of `payload`, which must be exactly `plain_len`.
    ///
    /// # Errors
    /// `corrupt` when they are not, or when `payload` is not a zstd frame.
    pub fn decompress(
        &mut self,
        payload: &[u8],
        plain_len: usize,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        out.clear();
        out.reserve(plain_len);
        self.context.decompress(out, payload).map_err(|code| {
            let name = zstd_safe::get_error_name(code);
            Error::new(Kind::Corrupt, format!("unable to decompress: {name}"))
        })?;
        if out.len() == plain_len {
            return Ok(());
        }
        let found = out.len();
        Err(Error::new(
            Kind::Corrupt,
            format!("decompressed to {found} bytes where {plain_len} were expected"),
        ))
    }
}

fn no_memory() -> Error {
    Error::new(Kind::Unavailable, "unable to allocate a compression context")
}

fn failed(verb: &str, code: zstd_safe::ErrorCode) -> Error {
    let name = zstd_safe::get_error_name(code);
    Error::new(Kind::Bug, format!("unable to {verb} a block: {name}"))
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Compressor(level {})", self.level.0)
    }
}

impl std::fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decompressor")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_and_chunking_round_trips() {
        let plain: Vec<u8> = (0..200_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for level in [Level::MIN, -1, 1, 3, Level::MAX] {
            let mut compressor = Compressor::new(Level::new(level).unwrap()).unwrap();
            for chunk in [1_000, 65_536, plain.len()] {
                let slices: Vec<Bytes> = plain.chunks(chunk).map(Bytes::copy_from_slice).collect();
                let mut out = b"head".to_vec();
                assert_eq!(compressor.append(&slices, &mut out).unwrap(), Codec::Zstd);
                let mut back = Vec::new();
                let mut decompressor = Decompressor::new().unwrap();
                decompressor.decompress(&out[4..], plain.len(), &mut back).unwrap();
                assert!(back == plain && out.starts_with(b"head"), "level {level} chunk {chunk}");
            }
        }
    }

    /// Rows as a table has them: what repeats from row to row is shorter than 7 bytes.
    #[test]
    fn the_default_level_finds_what_is_alike_in_rows() {
        let rows = (0..20_000_u32).flat_map(|row| {
            let value = row.wrapping_mul(2_654_435_761).to_le_bytes();
            let [low, high, ..] = row.to_le_bytes();
            let header = [0, 0, 0, low, high, 3, 0, 2, 9, 24];
            [&value[..3], &header[..], &value[..]].concat()
        });
        let rows = Bytes::from(rows.collect::<Vec<u8>>());
        let (mut out, mut plain) =
            (Vec::new(), Vec::with_capacity(compressed_bytes_max(rows.len())));
        Compressor::new(Level::default())
            .unwrap()
            .append(std::slice::from_ref(&rows), &mut out)
            .unwrap();
        CCtx::create().compress(&mut plain, &rows, Level::default().0).unwrap();
        assert!(out.len() * 10 < plain.len() * 9, "{} of {}", out.len(), plain.len());
    }

    #[test]
    fn what_does_not_shrink_is_stored() {
        let mut compressor = Compressor::new(Level::default()).unwrap();
        let mut out = Vec::new();
        let codec = compressor.append(&[Bytes::from_static(b"ab")], &mut out).unwrap();
        assert_eq!((codec, out.as_slice()), (Codec::Stored, b"ab".as_slice()));
    }

    #[test]
    fn a_wrong_length_or_damaged_payload_is_corrupt() {
        let mut compressor = Compressor::new(Level::default()).unwrap();
        let mut out = Vec::new();
        compressor.append(&[Bytes::from(vec![7; 5_000])], &mut out).unwrap();
        let mut decompressor = Decompressor::new().unwrap();
        let mut back = Vec::new();
        for (payload, plain_len) in [(out.as_slice(), 4_999), (&out, 5_001), (&out[1..], 5_000)] {
            let error = decompressor.decompress(payload, plain_len, &mut back).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt);
        }
    }
}
