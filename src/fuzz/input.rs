//! Choices from the front of an input; all of them have an answer when it is too short.

/// How many different sizes of pieces an input chooses.
const SIZES: usize = 4;

/// An input and what is left of it.
pub(super) struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next byte, 0 behind the end.
    pub(super) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.rest.split_first() else { return 0 };
        self.rest = rest;
        *first
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    /// One of these.
    pub(super) fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        let place = usize::from(self.byte()) % from.len();
        *from.get(place).expect("a choice among nothing")
    }

    /// Sizes of the pieces that something is cut into, over and over: small ones, and up to 12 KiB.
    pub(super) fn sizes(&mut self) -> [usize; SIZES] {
        std::array::from_fn(|_| match usize::from(self.byte()) {
            small @ 0..128 => small + 1,
            large => (large - 127) * 96,
        })
    }

    /// At most so many bytes.
    pub(super) fn take(&mut self, bytes_max: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(bytes_max.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// All that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }
}

/// `bytes` cut into pieces of `sizes`, over and over.
pub(super) fn pieces<'a>(bytes: &'a [u8], sizes: &'a [usize]) -> impl Iterator<Item = &'a [u8]> {
    let mut rest = bytes;
    sizes.iter().cycle().map_while(move |size| {
        let (piece, later) = rest.split_at((*size).max(1).min(rest.len()));
        rest = later;
        (!piece.is_empty()).then_some(piece)
    })
}
