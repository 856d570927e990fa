//! A split block Bloom filter: one cache line a lookup.
//!
//! Putze, Sanders, Singler, "Cache-, Hash- and Space-Efficient Bloom Filters" (2007), in the form that
//! Apache Parquet specifies, but with the bits taken from the blob id itself, which is uniform
//! already. With 10 bits a key about 1.5 % of absent ids pass.

use crate::id::BlobId;

const BLOCK_BYTES: usize = 32;
const BITS_PER_KEY: usize = 10;

/// The filter of one segment.
pub(super) struct Filter {
    blocks: Vec<u8>,
}

impl Filter {
    /// Bytes of a filter for `keys` keys.
    pub(super) fn size(keys: usize) -> usize {
        (keys * BITS_PER_KEY / 8).div_ceil(BLOCK_BYTES).max(1) * BLOCK_BYTES
    }

    pub(super) fn new(keys: usize) -> Self {
        Self { blocks: vec![0; Self::size(keys)] }
    }

    /// A stored filter; `None` if the length is impossible.
    pub(super) fn from_bytes(blocks: Vec<u8>) -> Option<Self> {
        (!blocks.is_empty() && blocks.len().is_multiple_of(BLOCK_BYTES)).then_some(Self { blocks })
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.blocks
    }

    pub(super) fn insert(&mut self, id: &[u8; 16]) {
        let (at, bits) = self.position(id);
        for (lane, bit) in bits.into_iter().enumerate() {
            let byte = at + lane * 4 + usize::from(bit / 8);
            self.blocks[byte] |= 1 << (bit % 8);
        }
    }

    pub(super) fn may_contain(&self, id: &BlobId) -> bool {
        let (at, bits) = self.position(id.0.first_chunk().expect("32 is more than 16"));
        bits.into_iter().enumerate().all(|(lane, bit)| {
            self.blocks[at + lane * 4 + usize::from(bit / 8)] >> (bit % 8) & 1 == 1
        })
    }

    /// First byte of the key's block, and for each of its eight 32-bit lanes one bit.
    fn position(&self, id: &[u8; 16]) -> (usize, [u8; 8]) {
        let word =
            |at: usize| u64::from_le_bytes(*id[at..].first_chunk().expect("two words of 8 bytes"));
        let blocks = (self.blocks.len() / BLOCK_BYTES) as u128;
        let block = ((u128::from(word(0)) * blocks) >> 64) as usize;
        let mut rest = word(8);
        let bits = std::array::from_fn(|_| {
            let bit = (rest & 31) as u8;
            rest >>= 5;
            bit
        });
        (block * BLOCK_BYTES, bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_pass_and_few_others_do() {
        let id = |n: u32| BlobId(*blake3::hash(&n.to_le_bytes()).as_bytes());
        let mut filter = Filter::new(10_000);
        (0..10_000).for_each(|n| filter.insert(id(n).0.first_chunk().unwrap()));
        assert!((0..10_000).all(|n| filter.may_contain(&id(n))));
        let passed = (10_000..110_000).filter(|n| filter.may_contain(&id(*n))).count();
        assert!(passed < 2500, "{passed} of 100,000");
        let again = Filter::from_bytes(filter.as_bytes().to_vec()).unwrap();
        assert!(again.may_contain(&id(1)));
    }
}
