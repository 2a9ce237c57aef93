//! Whether a file was written whole: every byte once, and the CRC of all of it as PostgreSQL's manifest
//! and ours have it.
//!
//! In: pieces of a file in any order, each with its CRC-32C; runs of zeros that are never written. Out: the
//! CRC of the whole, or what is missing.

use std::collections::BTreeMap;

use crate::error::{Error, Kind, Result};
use crate::pg::crc::{crc32c, crc32c_combine};

/// Pieces of one file that were written; neighbours are joined, so that a file written in order takes
/// the room of one piece.
#[derive(Debug, Default)]
pub(crate) struct Cover {
    /// By offset: length and CRC.
    pieces: BTreeMap<u64, (u64, u32)>,
}

impl Cover {
    /// Adds the piece of `bytes` at `offset`.
    ///
    /// # Errors
    /// `corrupt` when a byte of it was there before.
    pub(crate) fn add(&mut self, offset: u64, bytes: u64, crc: u32) -> Result<()> {
        let (mut start, mut length, mut whole) = (offset, bytes, crc);
        let end = offset.saturating_add(bytes);
        let before = self.pieces.range(..end).next_back().map(|(at, piece)| (*at, *piece));
        if let Some((at, (piece_bytes, piece_crc))) = before {
            let piece_end = at.saturating_add(piece_bytes);
            if piece_end > offset {
                let message = format!("{bytes} bytes at {offset} are in the backup twice");
                return Err(Error::new(Kind::Corrupt, message));
            }
            if piece_end == offset {
                self.pieces.remove(&at);
                (start, length) = (at, piece_bytes + length);
                whole = crc32c_combine(piece_crc, whole, bytes);
            }
        }
        if let Some((piece_bytes, piece_crc)) = self.pieces.remove(&end) {
            length += piece_bytes;
            whole = crc32c_combine(whole, piece_crc, piece_bytes);
        }
        self.pieces.insert(start, (length, whole));
        Ok(())
    }

    /// Adds a run of zeros.
    ///
    /// # Errors
    /// As [`Cover::add`].
    pub(crate) fn add_zeros(&mut self, offset: u64, bytes: u64) -> Result<()> {
        self.add(offset, bytes, crc32c_of_zeros(bytes))
    }

    /// Whether the pieces are all of a file of `size_bytes`.
    pub(crate) fn is_whole(&self, size_bytes: u64) -> bool {
        match self.pieces.first_key_value() {
            None => size_bytes == 0,
            Some((start, (length, _))) => *start == 0 && *length == size_bytes,
        }
    }

    /// Checks that the pieces are all of a file of `size_bytes` with the CRC `expected`.
    ///
    /// # Errors
    /// `corrupt` naming the first missing byte, or both CRCs.
    pub(crate) fn check(&self, size_bytes: u64, expected: u32) -> Result<()> {
        if !self.is_whole(size_bytes) {
            let first = self.pieces.first_key_value().filter(|(start, _)| **start == 0);
            let missing = first.map_or(0, |(_, (length, _))| *length);
            let message = format!(
                "its {size_bytes} bytes are not all in the backup: first missing is {missing}"
            );
            return Err(Error::new(Kind::Corrupt, message));
        }
        let found = self.pieces.first_key_value().map_or_else(|| crc32c(b""), |(_, piece)| piece.1);
        if found != expected {
            let message =
                format!("the CRC-32C of its content is {found:08x}, expected {expected:08x}");
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(())
    }
}

/// CRC-32C of so many zero bytes, by doubling.
fn crc32c_of_zeros(bytes: u64) -> u32 {
    let (mut whole, mut done) = (crc32c(b""), 0_u64);
    let (mut power, mut power_bytes) = (crc32c(&[0]), 1_u64);
    let mut rest = bytes;
    while rest > 0 {
        if rest & 1 == 1 {
            whole = if done == 0 { power } else { crc32c_combine(whole, power, power_bytes) };
            done += power_bytes;
        }
        rest >>= 1;
        if rest > 0 {
            power = crc32c_combine(power, power, power_bytes);
            power_bytes *= 2;
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_have_the_crc_of_zeros() {
        for bytes in [0_usize, 1, 2, 3, 7, 8192, 100_000] {
            assert_eq!(crc32c_of_zeros(bytes as u64), crc32c(&vec![0; bytes]), "{bytes}");
        }
    }

    #[test]
    fn a_file_without_bytes_is_whole() {
        Cover::default().check(0, crc32c(b"")).unwrap();
        assert!(Cover::default().check(1, 0).unwrap_err().message().contains("missing is 0"));
    }

    #[test]
    fn a_piece_that_comes_twice_is_refused() {
        let mut cover = Cover::default();
        cover.add(10, 10, 0).unwrap();
        for (offset, bytes) in [(10, 10), (19, 5), (5, 6), (5, 20), (12, 1)] {
            assert_eq!(cover.add(offset, bytes, 0).unwrap_err().kind(), Kind::Corrupt, "{offset}");
        }
        cover.add(0, 10, 0).unwrap();
        assert!(cover.is_whole(20));
    }

    proptest::proptest! {
        #[test]
        fn pieces_in_any_order_have_the_crc_of_the_whole(
            content in proptest::collection::vec(0_u8..3, 1..300),
            cuts in proptest::collection::vec(0_usize..300, 0..12),
            order in proptest::collection::vec(0_u32..1000, 14),
        ) {
            let mut edges: Vec<usize> = cuts.into_iter().filter(|cut| *cut < content.len()).collect();
            edges.extend([0, content.len()]);
            edges.sort_unstable();
            edges.dedup();
            let mut pieces: Vec<(usize, usize)> = edges.windows(2).map(|pair| (pair[0], pair[1])).collect();
            pieces.sort_by_key(|(start, _)| order[start % order.len()]);
            let mut cover = Cover::default();
            for (index, (start, end)) in pieces.iter().enumerate() {
                proptest::prop_assert!(!cover.is_whole(content.len() as u64), "{}", index);
                let bytes = &content[*start..*end];
                if bytes.iter().all(|byte| *byte == 0) {
                    cover.add_zeros(*start as u64, bytes.len() as u64).unwrap();
                } else {
                    cover.add(*start as u64, bytes.len() as u64, crc32c(bytes)).unwrap();
                }
            }
            cover.check(content.len() as u64, crc32c(&content)).unwrap();
            let error = cover.check(content.len() as u64, !crc32c(&content)).unwrap_err();
            proptest::prop_assert_eq!(error.kind(), Kind::Corrupt);
        }
    }
}
