//! The codes of a quantized row: `bits` each, packed from the low bits on.
//! Format: MLX's `quantize` (mlx/ops.cpp): a row is one stream of bits.

use super::simd::{BYTES, Simd};

/// Writes a row's codes as bytes, in their order; `codes.len()` is a multiple of 32.
#[inline(always)]
pub fn unpack(packed: &[u8], bits: usize, codes: &mut [u8]) {
    let mask = (1u64 << bits) - 1;
    // Eight codes are `bits` bytes.
    for (eight, packed) in codes.chunks_exact_mut(8).zip(packed.chunks_exact(bits)) {
        let mut word = [0; 8];
        word[..bits].copy_from_slice(packed);
        let word = u64::from_le_bytes(word);
        for (place, code) in eight.iter_mut().enumerate() {
            *code = (word >> (place * bits) & mask) as u8;
        }
    }
}

/// Codes of 4 bits as bytes: of each 128, those at even places, then the others, 64 behind them.
///
/// # Safety
/// The machine has S's level; `codes` has two bytes for each of `packed`, up to whole vectors.
#[inline(always)]
pub unsafe fn unpack_int4<S: Simd>(packed: &[u8], codes: &mut [u8]) {
    debug_assert!(packed.len().next_multiple_of(BYTES) * 2 <= codes.len());
    let (lines, rest) = packed.as_chunks::<BYTES>();
    let mut codes = codes.as_mut_ptr();
    for line in lines {
        spread::<S>(S::bytes(line.as_ptr()), codes);
        codes = codes.add(2 * BYTES);
    }
    if !rest.is_empty() {
        spread::<S>(S::bytes_partial(rest.as_ptr(), rest.len()), codes);
    }
}

/// # Safety
/// The machine has S's level, and two vectors may be written at `codes`.
#[inline(always)]
unsafe fn spread<S: Simd>(line: S::B, codes: *mut u8) {
    let [even, odd] = S::unpack_int4(line);
    S::bytes_store(codes, even);
    S::bytes_store(codes.add(BYTES), odd);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_width_is_unpacked(
            bits in prop::sample::select(vec![2usize, 3, 4, 5, 6, 8]),
            random in prop::collection::vec(any::<u8>(), 64),
        ) {
            let codes: Vec<u8> = random.iter().map(|code| (*code as u32 % (1 << bits)) as u8).collect();
            let mut packed = vec![0u8; 64 * bits / 8];
            for (place, &code) in codes.iter().enumerate() {
                for bit in 0..bits {
                    let at = place * bits + bit;
                    packed[at / 8] |= (code >> bit & 1) << (at % 8);
                }
            }
            let mut unpacked = vec![0; 64];
            unpack(&packed, bits, &mut unpacked);
            prop_assert_eq!(unpacked, codes);
        }
    }
}
