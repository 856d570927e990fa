//! Cut points: where a stream of bytes is divided into chunks.
//!
//! Pure functions of the bytes: no reader, no buffer. [`Chunker::cut`] is given what lies ahead and
//! says where the first chunk ends, so that cuts do not depend on how the data was buffered.
//!
//! The content-defined chunker is FastCDC (Xia et al., "The Design of Fast Content-Defined Chunking
//! for Data Deduplication Based Storage Systems", IEEE TPDS 2020) with normalisation level 2 and a gear
//! table drawn from the repository's secret. The secret table hides cut points from casual
//! comparison; it is no proof against an adversary who sees chunk lengths (Truong et al., "Breaking
//! and Fixing Content-Defined Chunking", CCS 2025), which is why lengths are sealed within packs.

use fastcdc::v2020::{Normalization, cut_gear, select_masks};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::limits::{CHUNK_BYTES_AVG, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN};

/// Which cut points a repository uses; fixed when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ChunkerConfig {
    /// FastCDC with these sizes in bytes.
    Fastcdc {
        /// No chunk but the last of a file is shorter.
        min: usize,
        /// About the mean; a power of two.
        avg: usize,
        /// No chunk is longer.
        max: usize,
    },
    /// Chunks of one size, aligned to the start of the file.
    Fixed {
        /// Bytes of each chunk but the last.
        size: usize,
    },
}

impl Default for ChunkerConfig {
    fn default() -> Self {
        Self::Fastcdc { min: CHUNK_BYTES_MIN, avg: CHUNK_BYTES_AVG, max: CHUNK_BYTES_MAX }
    }
}

/// Finds cut points.
pub struct Chunker {
    config: ChunkerConfig,
    mask_short: u64,
    mask_long: u64,
    gear: Box<[u64; 256]>,
    gear_shifted: Box<[u64; 256]>,
}

impl Chunker {
    /// A chunker whose gear table follows from `secret`.
    ///
    /// # Errors
    /// When the sizes are not in ascending order, odd, or beyond the format's limits.
    pub fn new(config: ChunkerConfig, secret: &[u8; 32]) -> Result<Self> {
        let (min, avg, max) = match config {
            ChunkerConfig::Fastcdc { min, avg, max } => (min, avg, max),
            ChunkerConfig::Fixed { size } => (size, 1 << 20, size),
        };
        let fits = min >= 4096 && max <= CHUNK_BYTES_MAX && min % 2 == 0 && max % 2 == 0;
        let ordered = match config {
            ChunkerConfig::Fastcdc { .. } => min < avg && avg < max && avg.is_power_of_two(),
            ChunkerConfig::Fixed { .. } => true,
        };
        if !fits || !ordered {
            return Err(Error::invalid(format!(
                "chunk sizes {min}/{avg}/{max} are not allowed: they are even, ascend, lie within \
                 4096 and {CHUNK_BYTES_MAX}, and the average is a power of two"
            )));
        }
        let (mask_short, mask_long) = select_masks(avg, Normalization::Level2);
        let mut bytes = [0; 2048];
        blake3::Hasher::new_keyed(secret).update(b"gear").finalize_xof().fill(&mut bytes);
        let mut gear = Box::new([0; 256]);
        for (value, word) in gear.iter_mut().zip(bytes.chunks_exact(8)) {
            *value = u64::from_le_bytes(word.try_into().expect("chunks of 8 bytes"));
        }
        let gear_shifted = Box::new(gear.map(|value| value << 1));
        Ok(Self { config, mask_short, mask_long, gear, gear_shifted })
    }

    /// Bytes that must lie ahead for [`cut`](Self::cut) to be final, unless the file ends.
    pub fn lookahead(&self) -> usize {
        match self.config {
            ChunkerConfig::Fastcdc { max, .. } => max,
            ChunkerConfig::Fixed { size } => size,
        }
    }

    /// Length of the first chunk of `ahead`, which is either at least [`lookahead`](Self::lookahead) long
    /// or all that is left of the file. Zero only for an empty slice.
    pub fn cut(&self, ahead: &[u8]) -> usize {
        match self.config {
            ChunkerConfig::Fastcdc { min, avg, max } => {
                let (_, len) = cut_gear(
                    ahead,
                    min,
                    avg,
                    max,
                    self.mask_short,
                    self.mask_long,
                    self.mask_short << 1,
                    self.mask_long << 1,
                    &self.gear[..],
                    &self.gear_shifted[..],
                );
                len
            }
            ChunkerConfig::Fixed { size } => ahead.len().min(size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: ChunkerConfig = ChunkerConfig::Fastcdc { min: 4096, avg: 16_384, max: 32_768 };

    fn noise(seed: u8, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        bytes
    }

    fn cuts(chunker: &Chunker, data: &[u8]) -> Vec<usize> {
        let mut at = 0;
        let mut cuts = Vec::new();
        while at < data.len() {
            at += chunker.cut(&data[at..]);
            cuts.push(at);
        }
        cuts
    }

    #[test]
    fn cuts_do_not_depend_on_what_lies_beyond_the_lookahead() {
        let chunker = Chunker::new(SMALL, &[3; 32]).unwrap();
        let data = noise(1, 1 << 20);
        let mut at = 0;
        for cut in cuts(&chunker, &data) {
            let window = &data[at..data.len().min(at + chunker.lookahead())];
            at += chunker.cut(window);
            assert_eq!(at, cut);
        }
    }

    #[test]
    fn sizes_stay_within_bounds_and_near_the_average() {
        let chunker = Chunker::new(SMALL, &[3; 32]).unwrap();
        let data = noise(2, 8 << 20);
        let cuts = cuts(&chunker, &data);
        for pair in cuts.windows(2) {
            assert!(pair[1] - pair[0] <= 32_768);
        }
        for pair in cuts[..cuts.len() - 1].windows(2) {
            assert!(pair[1] - pair[0] >= 4096);
        }
        let mean = data.len() / cuts.len();
        assert!((12_000..22_000).contains(&mean), "mean {mean}");
    }

    #[test]
    fn an_insertion_moves_only_the_cuts_around_it() {
        let chunker = Chunker::new(SMALL, &[3; 32]).unwrap();
        let data = noise(4, 4 << 20);
        let mut edited = data.clone();
        edited.splice(1_000_000..1_000_000, *b"seven b");
        let before = cuts(&chunker, &data);
        let after: Vec<_> = cuts(&chunker, &edited)
            .iter()
            .filter(|cut| **cut > 1_100_000)
            .map(|cut| cut - 7)
            .collect();
        let unmoved = after.iter().filter(|cut| before.contains(cut)).count();
        assert!(unmoved * 10 > after.len() * 9, "{unmoved} of {}", after.len());
    }

    #[test]
    fn another_secret_cuts_elsewhere() {
        let data = noise(5, 1 << 20);
        let one = cuts(&Chunker::new(SMALL, &[1; 32]).unwrap(), &data);
        let two = cuts(&Chunker::new(SMALL, &[2; 32]).unwrap(), &data);
        assert_ne!(one, two);
    }

    #[test]
    fn unusable_sizes_are_refused() {
        for (min, avg, max) in [
            (0, 4096, 8192),
            (8192, 4096, 65536),
            (4097, 8192, 16384),
            (4096, 9000, 65536),
            (4096, 8192, 1 << 30),
        ] {
            assert!(Chunker::new(ChunkerConfig::Fastcdc { min, avg, max }, &[0; 32]).is_err());
        }
    }

    #[test]
    fn fixed_chunks_are_aligned() {
        let chunker = Chunker::new(ChunkerConfig::Fixed { size: 8192 }, &[0; 32]).unwrap();
        assert_eq!(cuts(&chunker, &noise(6, 20_000)), [8192, 16_384, 20_000]);
    }
}
