//! Numbers drawn from a seed.

use std::ops::RangeInclusive;

/// SplitMix64: small, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The numbers of one round of a seed: independent of those of its neighbours.
    pub fn of_round(seed: u64, round: u32) -> Self {
        let mut base = Self::new(seed);
        let first = base.next();
        Self::new(first ^ (u64::from(round) + 1).wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number within bounds.
    pub fn within(&mut self, bounds: RangeInclusive<u64>) -> u64 {
        bounds.start() + self.next() % (bounds.end() - bounds.start() + 1)
    }

    /// True so often in a hundred.
    pub fn percent(&mut self, chance: u64) -> bool {
        self.within(0..=99) < chance
    }

    /// One of several.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.within(0..=choices.len() as u64 - 1) as usize]
    }

    /// All of them in another order.
    pub fn shuffled<T: Copy>(&mut self, items: &[T]) -> Vec<T> {
        let mut items = items.to_vec();
        for last in (1..items.len()).rev() {
            let other = self.within(0..=last as u64) as usize;
            items.swap(last, other);
        }
        items
    }
}
