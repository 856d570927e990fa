//! Data of four kinds that compress and deduplicate like what people save, made from a seed.

/// Makes so many bytes from a seed.
pub type Make = fn(u64, usize) -> Vec<u8>;

/// Kinds of data, with the names they have in results.
pub const KINDS: [(&str, Make); 4] =
    [("text", text), ("source", source), ("database", database), ("random", random)];

/// A small, fast generator of numbers (SplitMix64); its quality is of no concern.
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(end)) >> 64) as u64
    }

    /// A number below `end`; small ones come far more often, as ranks of words do.
    pub fn skewed(&mut self, end: u64) -> u64 {
        let bits = u64::from(end.ilog2()) + 1;
        let bits = self.below(bits) + 1;
        self.below(1 << bits) % end
    }
}

/// Incompressible bytes.
pub fn random(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fill_random(seed, &mut bytes);
    bytes
}

/// Fills `bytes` with incompressible ones.
pub fn fill_random(seed: u64, bytes: &mut [u8]) {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(bytes);
}

/// Words of a language that never was: 16,384 of them, three to ten letters each.
fn vocabulary() -> Vec<Vec<u8>> {
    const LETTERS: &[u8] = b"eeeeetttaaaooiinnsshhrrddlcumwfgypbvk";
    let mut numbers = Numbers::new(1);
    let mut word = || {
        let len = 3 + numbers.below(8);
        (0..len).map(|_| LETTERS[numbers.below(LETTERS.len() as u64) as usize]).collect()
    };
    (0..16 << 10).map(|_| word()).collect()
}

/// Prose: zstd level 3 makes about a third of it.
pub fn text(seed: u64, len: usize) -> Vec<u8> {
    let words = vocabulary();
    let mut numbers = Numbers::new(seed);
    let mut out = Vec::with_capacity(len + 16);
    let mut column = 0;
    while out.len() < len {
        let word = &words[numbers.skewed(words.len() as u64) as usize];
        out.extend_from_slice(word);
        column += word.len() + 1;
        match numbers.below(16) {
            0 => out.extend_from_slice(b". "),
            1 => out.extend_from_slice(b", "),
            _ if column > 80 => {
                out.push(b'\n');
                column = 0;
            }
            _ => out.push(b' '),
        }
    }
    out.truncate(len);
    out
}

/// Program text: indented lines of few forms over a vocabulary.
pub fn source(seed: u64, len: usize) -> Vec<u8> {
    const FORMS: [&str; 12] = [
        "let # = #.#(#);",
        "if # == # {",
        "}",
        "return Err(#::new(#, #));",
        "/// # # # # #.",
        "pub fn #(&self, #: #) -> Result<#> {",
        "#.#(#, #)?;",
        "for # in #.iter() {",
        "match # {",
        "Some(#) => #,",
        "use #::#::{#, #};",
        "",
    ];
    let words = vocabulary();
    let mut numbers = Numbers::new(seed);
    let mut out = Vec::with_capacity(len + 128);
    let mut depth = 0_usize;
    while out.len() < len {
        let form = FORMS[numbers.below(FORMS.len() as u64) as usize];
        if form.starts_with('}') {
            depth = depth.saturating_sub(1);
        }
        out.extend(std::iter::repeat_n(b' ', 4 * depth));
        for byte in form.bytes() {
            if byte == b'#' {
                out.extend_from_slice(&words[numbers.skewed(1 << 12) as usize]);
            } else {
                out.push(byte);
            }
        }
        if form.ends_with('{') {
            depth = (depth + 1) % 6;
        }
        out.push(b'\n');
    }
    out.truncate(len);
    out
}

/// Pages of a database: 8 KiB with a header, line pointers, and rows of numbers and padded text.
pub fn database(seed: u64, len: usize) -> Vec<u8> {
    const PAGE: usize = 8192;
    const ROW: usize = 112;
    const ROWS: usize = 70;
    let mut numbers = Numbers::new(seed);
    let mut out = vec![0; len.next_multiple_of(PAGE)];
    for (number, page) in out.chunks_exact_mut(PAGE).enumerate() {
        // Where the log stood when the page was written: what makes every page differ.
        page[..8].copy_from_slice(&numbers.draw().to_le_bytes());
        page[8..10].copy_from_slice(&(numbers.draw() as u16).to_le_bytes());
        for row in 0..ROWS {
            let at = PAGE - (row + 1) * ROW;
            page[24 + row * 4..][..2].copy_from_slice(&(at as u16).to_le_bytes());
            page[26 + row * 4] = ROW as u8;
            let row_number = (number * ROWS + row) as u64;
            let fields = &mut page[at..at + ROW];
            fields[..4].copy_from_slice(&7_u32.to_le_bytes());
            fields[20..28].copy_from_slice(&row_number.to_le_bytes());
            fields[28..32].copy_from_slice(&(numbers.below(1 << 17) as u32).to_le_bytes());
            fields[32..36].copy_from_slice(&(numbers.skewed(1 << 20) as u32).to_le_bytes());
            fields[36..].fill(b' ');
        }
    }
    out.truncate(len);
    out
}

/// A stream of any length, of which every 4 KiB differ from all others, made at the speed of memory.
#[derive(Debug)]
pub struct Stream {
    base: Vec<u8>,
}

impl Stream {
    const STAMP_EVERY: usize = 4096;
    const BASE: usize = 8 << 20;

    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        let base = random(seed, Self::BASE);
        Self { base }
    }

    /// Fills `out` with the bytes from `offset` on, a multiple of 4 KiB as is the length.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        for (at, piece) in
            (offset..).step_by(Self::STAMP_EVERY).zip(out.chunks_mut(Self::STAMP_EVERY))
        {
            let from = (at % Self::BASE as u64) as usize;
            piece.copy_from_slice(&self.base[from..from + piece.len()]);
            // Mixed, so that neither the stamps nor what follows from them repeat.
            let stamp = Numbers::new(at).draw() ^ at.rotate_left(32);
            piece[..8].copy_from_slice(&stamp.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kinds_compress_as_their_names_say() {
        let ratio = |kind: Make| {
            let plain = kind(7, 1 << 20);
            let mut compressor = chunkstore::codec::compress::Compressor::new(Default::default());
            let stored = compressor.compress(&plain).map_or(plain.len(), <[u8]>::len);
            plain.len() as f64 / stored as f64
        };
        assert!((1.8..3.5).contains(&ratio(text)), "{}", ratio(text));
        assert!((2.5..6.0).contains(&ratio(source)), "{}", ratio(source));
        assert!((6.0..30.0).contains(&ratio(database)), "{}", ratio(database));
        assert!(ratio(random) == 1.0);
    }

    #[test]
    fn a_stream_is_the_same_however_it_is_read_and_never_repeats() {
        let stream = Stream::new(1);
        let mut whole = vec![0; 64 << 10];
        stream.read(0, &mut whole);
        let mut part = vec![0; 8 << 10];
        stream.read(16 << 10, &mut part);
        assert_eq!(part, whole[16 << 10..24 << 10]);
        stream.read(Stream::BASE as u64 * 3, &mut part);
        assert_ne!(part, whole[..8 << 10]);
    }
}
