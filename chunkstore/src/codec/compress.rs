//! Compression of blobs with zstd, and the cheap test for data that will not shrink.

use zstd::zstd_safe;

use crate::error::{Error, Result};

/// How hard to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Store everything as it is.
    Off,
    /// A level of zstd: -7 (fast) to 22 (small).
    Zstd(i32),
}

impl Level {
    /// Fastest level accepted.
    pub const MIN: i32 = -7;
    /// Strongest level accepted.
    pub const MAX: i32 = 22;
}

impl Default for Level {
    fn default() -> Self {
        Self::Zstd(3)
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Zstd(level) => level.fmt(f),
        }
    }
}

impl std::str::FromStr for Level {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.parse() {
            _ if text == "off" => Ok(Self::Off),
            Ok(level) if (Self::MIN..=Self::MAX).contains(&level) => Ok(Self::Zstd(level)),
            _ => Err(Error::invalid(format!(
                "compression level '{text}' is neither 'off' nor a number from {} to {}",
                Self::MIN,
                Self::MAX
            ))),
        }
    }
}

/// How a blob is stored. The number is part of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Compression {
    /// As it is.
    None = 0,
    /// One zstd frame without checksum (the seal is one) and without dictionary.
    Zstd = 1,
}

impl Compression {
    /// The one a stored byte names.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::None, Self::Zstd].into_iter().find(|compression| *compression as u8 == byte)
    }
}

/// A compressor with its working memory; one per thread, reused for every blob.
pub struct Compressor {
    level: Level,
    context: zstd_safe::CCtx<'static>,
    output: Vec<u8>,
}

impl Compressor {
    /// A compressor for `level`.
    pub fn new(level: Level) -> Self {
        let mut context = zstd_safe::CCtx::create();
        if let Level::Zstd(level) = level {
            use zstd_safe::CParameter;
            context
                .set_parameter(CParameter::CompressionLevel(level))
                .and_then(|_| context.set_parameter(CParameter::ContentSizeFlag(true)))
                .expect("zstd accepts every level within its documented range");
        }
        Self { level, context, output: Vec::new() }
    }

    /// The stored form of `plain`: `None` if that is `plain` itself.
    pub fn compress(&mut self, plain: &[u8]) -> Option<&[u8]> {
        if self.level == Level::Off || looks_incompressible(plain) {
            return None;
        }
        self.output.clear();
        self.output.reserve(zstd_safe::compress_bound(plain.len()));
        self.context.compress2(&mut self.output, plain).ok()?;
        // A gain below 1/64 is not worth the work of decompressing.
        (self.output.len() < plain.len() - plain.len() / 64).then_some(&self.output)
    }
}

/// A decompressor with its working memory.
pub struct Decompressor {
    context: zstd_safe::DCtx<'static>,
}

impl Default for Decompressor {
    fn default() -> Self {
        Self { context: zstd_safe::DCtx::create() }
    }
}

impl Decompressor {
    /// Replaces the content of `output` by the `plain_len` bytes that `stored` decompresses to.
    ///
    /// `plain_len` is authenticated and within the limits, so memory is bounded by it whatever
    /// `stored` claims. `None` if it does not decompress to exactly that many bytes.
    pub fn decompress(
        &mut self,
        stored: &[u8],
        plain_len: usize,
        output: &mut Vec<u8>,
    ) -> Option<()> {
        output.clear();
        output.reserve_exact(plain_len);
        // Spare capacity beyond `plain_len` must not serve as room for too long an output.
        let written = self.context.decompress(output, stored).ok()?;
        (written == plain_len).then_some(())
    }
}

/// Whether data is so random that compression would be lost work.
///
/// Looks at 16 slices of 256 bytes. Text, code and database pages stay far below the threshold;
/// compressed or encrypted data has all 256 byte values about equally often. When the histogram
/// looks random, the first 64 KiB are not tried either: repetition at a distance within data whose
/// bytes are uniformly distributed is what deduplication is for.
pub fn looks_incompressible(data: &[u8]) -> bool {
    const SLICES: usize = 16;
    const SLICE_BYTES: usize = 256;
    if data.len() < 4 * SLICES * SLICE_BYTES {
        return false;
    }
    let mut counts = [0_u16; 256];
    let stride = (data.len() - SLICE_BYTES) / (SLICES - 1);
    for slice in 0..SLICES {
        for byte in &data[slice * stride..][..SLICE_BYTES] {
            counts[usize::from(*byte)] += 1;
        }
    }
    // Sum of squares: 4096 uniform samples over 256 values have mean 4096 * (1 + 4095 / 256) = 69,616
    // and a standard deviation of about 720; a tenth of text among random bytes exceeds 80,000.
    let squares: u32 = counts.iter().map(|count| u32::from(*count).pow(2)).sum();
    squares < 73_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn random_data_is_told_from_everything_else() {
        assert!(looks_incompressible(&noise(1 << 20)));
        assert!(looks_incompressible(&noise(20_000)));
        let text = b"the quick brown fox jumps over the lazy dog ".repeat(10_000);
        assert!(!looks_incompressible(&text));
        let mut mixed = noise(1 << 20);
        for page in mixed.chunks_mut(8192) {
            page[..2048].fill(b' ');
        }
        assert!(!looks_incompressible(&mixed));
    }

    #[test]
    fn wrong_length_is_refused() {
        let plain = b"abc".repeat(1000);
        let mut compressor = Compressor::new(Level::default());
        let stored = compressor.compress(&plain).unwrap().to_vec();
        let mut output = Vec::new();
        let mut decompressor = Decompressor::default();
        for wrong in [0, 1, plain.len() - 1, plain.len() + 1] {
            assert!(decompressor.decompress(&stored, wrong, &mut output).is_none(), "{wrong}");
        }
        decompressor.decompress(&stored, plain.len(), &mut output).unwrap();
        assert_eq!(output, plain);
    }

    proptest! {
        #[test]
        fn compression_round_trips(words: Vec<u8>, repeat in 1_usize..200, level in -7..=9_i32) {
            let plain = words.repeat(repeat);
            let mut compressor = Compressor::new(Level::Zstd(level));
            if let Some(stored) = compressor.compress(&plain) {
                let mut output = Vec::new();
                Decompressor::default().decompress(stored, plain.len(), &mut output).unwrap();
                prop_assert_eq!(output, plain);
            }
        }
    }
}
