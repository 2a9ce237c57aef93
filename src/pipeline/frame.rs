//! The frame: one plain block, compressed, sealed, and openable alone.
//!
//! # Shape
//! Little endian:
//! ```text
//! offset size
//!      0    4  sealed_len   bytes after this header: payload and tag
//!      4    4  plain_len    bytes of the plain block, 1 to 4 MiB
//!      8    4  index        of this frame in its object; also the nonce
//!     12    1  codec        0 stored, 1 zstd
//!     13    1  flags        bit 0: last frame of the object (of the extent, for WAL)
//!     14    2  zero
//!     16    …  payload, encrypted
//!            16  tag        over the header (as additional data) and the payload
//! ```
//! A frame is made in the buffer it is uploaded from: the header's room is left free, the codec
//! appends the payload behind it, the tag's room follows, and sealing happens in place.
//!
//! # Invariants
//! - Nothing of a payload is parsed before its tag was checked.
//! - A payload is never longer than the block it came from, so `sealed_len` has a maximum.
//! - An index is used once per object, and so is the nonce.

use std::ops::Range;

use bytes::Bytes;

use super::cipher::{ObjectKey, TAG_BYTES};
use super::codec::{Codec, Compressor, Decompressor, compressed_bytes_max};
use crate::error::{Context, Error, Kind, Result};

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 16;
/// Bytes a frame adds to its payload.
pub const FRAME_OVERHEAD_BYTES: usize = FRAME_HEADER_BYTES + TAG_BYTES;
/// Plain bytes of a block as we write it: small enough to be fetched and opened alone, large enough
/// that compression loses less than 1 % against 8 MiB.
pub const BLOCK_BYTES: usize = 1 << 20;
/// Most plain bytes of a frame that is read: room to choose larger blocks without a new format.
pub const FRAME_PLAIN_BYTES_MAX: usize = 4 << 20;
/// Most bytes of a whole frame.
pub const FRAME_BYTES_MAX: usize = FRAME_PLAIN_BYTES_MAX + FRAME_OVERHEAD_BYTES;

const FLAG_LAST: u8 = 1;

/// Whether a frame ends its object, so that a cut-off object is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// More frames follow.
    No,
    /// This is the last.
    Yes,
}

/// A frame's header, its lengths checked against the maxima.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of the whole frame: header, payload and tag.
    pub frame_bytes: usize,
    /// Bytes of the plain block.
    pub plain_len: usize,
    /// Place of the frame in its object.
    pub index: u32,
    /// How the payload is written.
    pub codec: Codec,
    /// Whether the frame is the last.
    pub last: Last,
}

impl FrameHeader {
    /// Reads the header at the front of `bytes`, which may end anywhere after it.
    ///
    /// # Errors
    /// `corrupt` when it is cut off or says what cannot be.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let header: &[u8; FRAME_HEADER_BYTES] = bytes
            .first_chunk()
            .ok_or_else(|| corrupt(format!("{} bytes are left of its header", bytes.len())))?;
        let [s0, s1, s2, s3, p0, p1, p2, p3, i0, i1, i2, i3, codec, flags, z0, z1] = *header;
        let sealed_len = u32::from_le_bytes([s0, s1, s2, s3]) as usize;
        let plain_len = u32::from_le_bytes([p0, p1, p2, p3]) as usize;
        if !(1..=FRAME_PLAIN_BYTES_MAX).contains(&plain_len) {
            return Err(corrupt(format!("its plain length is {plain_len}")));
        }
        if !(TAG_BYTES + 1..=plain_len + TAG_BYTES).contains(&sealed_len) {
            return Err(corrupt(format!("its sealed length is {sealed_len} of {plain_len} plain")));
        }
        let codec = Codec::from_byte(codec)
            .ok_or_else(|| corrupt(format!("its codec is {codec}, known are 0 and 1")))?;
        if codec == Codec::Stored && sealed_len != plain_len + TAG_BYTES {
            return Err(corrupt(format!("{sealed_len} sealed bytes store {plain_len}")));
        }
        if flags & !FLAG_LAST != 0 || (z0, z1) != (0, 0) {
            return Err(corrupt("bits are set that must be zero".to_owned()));
        }
        Ok(Self {
            frame_bytes: FRAME_HEADER_BYTES + sealed_len,
            plain_len,
            index: u32::from_le_bytes([i0, i1, i2, i3]),
            codec,
            last: if flags & FLAG_LAST == 0 { Last::No } else { Last::Yes },
        })
    }
}

fn corrupt(found: String) -> Error {
    Error::new(Kind::Corrupt, format!("the frame is damaged: {found}"))
}

/// Room that [`append_compressed`] may need behind `plain_len` plain bytes.
#[must_use]
pub fn frame_room_bytes(plain_len: usize) -> usize {
    compressed_bytes_max(plain_len) + FRAME_OVERHEAD_BYTES
}

/// Appends a frame of the `plain` slices to `out`, compressed but not yet sealed, and returns its
/// place there.
///
/// # Errors
/// `bug` when the block is empty or larger than a frame may be, or when the codec refuses.
pub fn append_compressed(
    compressor: &mut Compressor,
    plain: &[Bytes],
    out: &mut Vec<u8>,
) -> Result<Range<usize>> {
    let plain_len: usize = plain.iter().map(Bytes::len).sum();
    let length = u32::try_from(plain_len)
        .ok()
        .filter(|_| (1..=FRAME_PLAIN_BYTES_MAX).contains(&plain_len))
        .ok_or_else(|| Error::new(Kind::Bug, format!("a frame of {plain_len} plain bytes")))?;
    let start = out.len();
    out.reserve(frame_room_bytes(plain_len));
    out.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
    let codec = compressor.append(plain, out)?;
    out.extend_from_slice(&[0; TAG_BYTES]);
    let sealed_len = u32::try_from(out.len() - start - FRAME_HEADER_BYTES)
        .map_err(|_too_long| Error::new(Kind::Bug, "a frame longer than its maximum"))?;
    let mut header = [0; FRAME_HEADER_BYTES];
    for (to, from) in header.iter_mut().zip(
        sealed_len.to_le_bytes().into_iter().chain(length.to_le_bytes()).chain([0; 4]).chain([
            codec.to_byte(),
            0,
            0,
            0,
        ]),
    ) {
        *to = from;
    }
    let end = out.len();
    if let Some(place) = out.get_mut(start..start + FRAME_HEADER_BYTES) {
        place.copy_from_slice(&header);
    }
    Ok(start..end)
}

/// Seals in place a frame made by [`append_compressed`], giving it its index and saying whether it is
/// the last. `frame` is the whole of it.
///
/// # Errors
/// `bug` when `frame` is not such a frame.
pub fn seal(key: &ObjectKey, frame: &mut [u8], index: u32, last: Last) -> Result<()> {
    let whole = frame.len();
    let not_ours = || Error::new(Kind::Bug, "unable to seal: not a frame of ours");
    let (header, sealed) =
        frame.split_first_chunk_mut::<FRAME_HEADER_BYTES>().ok_or_else(not_ours)?;
    let [_, _, _, _, _, _, _, _, i0, i1, i2, i3, _, flags, _, _] = header;
    [*i0, *i1, *i2, *i3] = index.to_le_bytes();
    *flags = if last == Last::Yes { FLAG_LAST } else { 0 };
    if FrameHeader::decode(header)?.frame_bytes != whole {
        return Err(not_ours());
    }
    let (payload, tag) = sealed.split_last_chunk_mut::<TAG_BYTES>().ok_or_else(not_ours)?;
    *tag = key.seal(index, header, payload)?;
    Ok(())
}

/// What the reader of a frame knows about it before it looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Its index in the object.
    pub index: u32,
    /// Whether it is the last.
    pub last: Last,
}

/// Opens the frame that is the whole of `frame`, decrypting in place and decompressing into
/// `scratch`; returns the plain block, which lies in one of the two.
///
/// # Errors
/// `corrupt` when it is not the expected frame, is not authentic, or does not decompress. The message
/// says what of the frame; the caller adds which object and where.
pub fn open<'a>(
    key: &ObjectKey,
    decompressor: &mut Decompressor,
    frame: &'a mut [u8],
    expected: Expected,
    scratch: &'a mut Vec<u8>,
) -> Result<&'a [u8]> {
    let header = FrameHeader::decode(frame)?;
    let whole = frame.len();
    if header.frame_bytes != whole {
        let said = header.frame_bytes;
        return Err(corrupt(format!("{whole} bytes where its header says {said}")));
    }
    if header.index != expected.index {
        let (found, wanted) = (header.index, expected.index);
        return Err(corrupt(format!("frame {found} is where frame {wanted} should be")));
    }
    if header.last != expected.last {
        return Err(corrupt(match header.last {
            Last::Yes => "it is marked as the last but more should follow".to_owned(),
            Last::No => "it is not marked as the last but nothing follows".to_owned(),
        }));
    }
    let (head, sealed) = frame
        .split_first_chunk_mut::<FRAME_HEADER_BYTES>()
        .ok_or_else(|| corrupt("its header is cut off".to_owned()))?;
    let payload = key.open(header.index, head, sealed).ok_or_else(|| {
        let index = header.index;
        corrupt(format!("frame {index} is not authentic (damaged, or not of this object or key)"))
    })?;
    match header.codec {
        Codec::Stored => Ok(payload),
        Codec::Zstd => {
            decompressor
                .decompress(payload, header.plain_len, scratch)
                .context(|| format!("frame {}", header.index))?;
            Ok(scratch)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::cipher::{Cipher, DataKey};
    use super::super::codec::Level;
    use super::*;

    fn key(cipher: Cipher) -> ObjectKey {
        ObjectKey::derive(cipher, &DataKey::new([9; 32]), &[5; 16], &[b"test"]).unwrap()
    }

    fn sealed(cipher: Cipher, plain: &[Bytes], index: u32, last: Last) -> Vec<u8> {
        let mut compressor = Compressor::new(Level::default()).unwrap();
        let mut out = Vec::new();
        let range = append_compressed(&mut compressor, plain, &mut out).unwrap();
        assert_eq!(range, 0..out.len());
        seal(&key(cipher), &mut out, index, last).unwrap();
        out
    }

    fn opened(cipher: Cipher, frame: &[u8], index: u32, last: Last) -> Result<Vec<u8>> {
        let mut frame = frame.to_vec();
        let mut scratch = Vec::new();
        let mut decompressor = Decompressor::new().unwrap();
        let expected = Expected { index, last };
        open(&key(cipher), &mut decompressor, &mut frame, expected, &mut scratch)
            .map(<[u8]>::to_vec)
    }

    #[test]
    fn swapped_cut_and_wrongly_ended_frames_are_refused() {
        for cipher in [Cipher::None, Cipher::Aes256Gcm] {
            let plain = [Bytes::from(vec![1; 10_000])];
            let frame = sealed(cipher, &plain, 3, Last::No);
            assert!(opened(cipher, &frame, 3, Last::No).is_ok());
            assert!(opened(cipher, &frame, 4, Last::No).is_err());
            assert!(opened(cipher, &frame, 3, Last::Yes).is_err());
            let mut relabelled = frame.clone();
            relabelled[8] = 4;
            assert!(opened(cipher, &relabelled, 4, Last::No).is_err());
            let mut ended = frame.clone();
            ended[13] = 1;
            assert!(opened(cipher, &ended, 3, Last::Yes).is_err());
            for cut in 0..frame.len() {
                let error = opened(cipher, &frame[..cut], 3, Last::No).unwrap_err();
                assert_eq!(error.kind(), Kind::Corrupt);
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        for cipher in [Cipher::None, Cipher::Aes256Gcm] {
            let frame =
                sealed(cipher, &[Bytes::from_static(b"abcabcabcabcabcabcabc")], 0, Last::Yes);
            for bit in 0..frame.len() * 8 {
                let mut bad = frame.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                let error = opened(cipher, &bad, 0, Last::Yes).unwrap_err();
                assert_eq!(error.kind(), Kind::Corrupt, "bit {bit}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_block_in_any_slices_comes_back(
            plain in proptest::collection::vec(any::<u8>(), 1..5_000),
            chunk in 1_usize..6_000,
            index: u32,
        ) {
            let slices: Vec<Bytes> = plain.chunks(chunk).map(Bytes::copy_from_slice).collect();
            for cipher in [Cipher::None, Cipher::Aes256Gcm] {
                let frame = sealed(cipher, &slices, index, Last::No);
                prop_assert_eq!(&opened(cipher, &frame, index, Last::No).unwrap(), &plain);
            }
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(opened(Cipher::Aes256Gcm, &bytes, 0, Last::No).is_err());
        }
    }
}
