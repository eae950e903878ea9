//! The codes of a quantized row: `bits` each, packed from the low bits on.
//! Format: MLX's `quantize` (mlx/ops.cpp): a row is one stream of bits.

use super::simd::Simd;

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

/// Codes of 4 bits as bytes: for each group those at even places, then the others.
#[inline(always)]
pub fn unpack_nibbles<S: Simd>(packed: &[u8], group_size: usize, codes: &mut [u8]) {
    let half = group_size / 2;
    for (group, packed) in codes.chunks_exact_mut(group_size).zip(packed.chunks_exact(half)) {
        let (even, odd) = group.split_at_mut(half);
        for ((even, odd), packed) in even.iter_mut().zip(odd).zip(packed) {
            *even = packed & 15;
            *odd = packed >> 4;
        }
    }
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
