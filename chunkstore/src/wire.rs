//! Primitive encodings: little-endian integers, LEB128 varints, zigzag, length-prefixed bytes.
//!
//! [`Decoder`] never reads past its input, never allocates more than its input could justify, and
//! accepts each value in exactly one form.

/// Why bytes could not be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DecodeError(pub &'static str);

/// Result of decoding.
pub type DecodeResult<T> = Result<T, DecodeError>;

/// Appends a varint.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a signed number as a zigzag varint.
pub fn put_signed(out: &mut Vec<u8>, value: i64) {
    put_varint(out, ((value << 1) ^ (value >> 63)) as u64);
}

/// Appends bytes behind their length.
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Reads from the front of a slice.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// A decoder of all of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> DecodeResult<&'a [u8]> {
        let (head, rest) =
            self.rest.split_at_checked(len).ok_or(DecodeError("it ends too early"))?;
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> DecodeResult<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(DecodeError("it ends too early"))?;
        self.rest = rest;
        Ok(*head)
    }

    /// One byte.
    pub fn u8(&mut self) -> DecodeResult<u8> {
        Ok(self.array::<1>()?[0])
    }

    /// A little-endian `u16`.
    pub fn u16(&mut self) -> DecodeResult<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// A little-endian `u32`.
    pub fn u32(&mut self) -> DecodeResult<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// A little-endian `u64`.
    pub fn u64(&mut self) -> DecodeResult<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A varint, in its shortest form.
    pub fn varint(&mut self) -> DecodeResult<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                return Err(DecodeError("a number is too large"));
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(DecodeError("a number is not in its shortest form"));
                }
                return Ok(value);
            }
        }
        Err(DecodeError("a number is too large"))
    }

    /// A varint that fits 32 bits.
    pub fn varint_u32(&mut self) -> DecodeResult<u32> {
        u32::try_from(self.varint()?).map_err(|_| DecodeError("a number is too large"))
    }

    /// A zigzag varint.
    pub fn signed(&mut self) -> DecodeResult<i64> {
        let raw = self.varint()?;
        Ok((raw >> 1) as i64 ^ -((raw & 1) as i64))
    }

    /// A count of things that take at least `bytes_each` bytes each: checked against what is left.
    pub fn count(&mut self, bytes_each: usize) -> DecodeResult<usize> {
        let count = self.varint()?;
        match usize::try_from(count) {
            Ok(count) if count <= self.rest.len() / bytes_each.max(1) => Ok(count),
            _ => Err(DecodeError("a count exceeds the data")),
        }
    }

    /// Length-prefixed bytes.
    pub fn bytes(&mut self) -> DecodeResult<&'a [u8]> {
        let len = self.count(1)?;
        self.take(len)
    }

    /// Fails unless everything was read.
    pub fn finish(self) -> DecodeResult<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError("bytes are left over")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_round_trip(values: Vec<u64>, signed: Vec<i64>, bytes: Vec<u8>) {
            let mut out = Vec::new();
            values.iter().for_each(|value| put_varint(&mut out, *value));
            signed.iter().for_each(|value| put_signed(&mut out, *value));
            put_bytes(&mut out, &bytes);
            let mut decoder = Decoder::new(&out);
            for value in values {
                prop_assert_eq!(decoder.varint().unwrap(), value);
            }
            for value in signed {
                prop_assert_eq!(decoder.signed().unwrap(), value);
            }
            prop_assert_eq!(decoder.bytes().unwrap(), &bytes[..]);
            decoder.finish().unwrap();
        }
    }

    #[test]
    fn malformed_numbers_are_refused() {
        for wrong in [&[0x80_u8][..], &[0x80, 0x00], &[0xff; 10], &[0xff; 11]] {
            assert!(Decoder::new(wrong).varint().is_err(), "{wrong:x?}");
        }
        assert!(Decoder::new(&[5, 1, 2]).bytes().is_err());
    }
}
