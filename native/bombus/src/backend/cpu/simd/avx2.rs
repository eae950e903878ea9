//! AVX2 with FMA and F16C: a vector is two halves.

use super::{Kernel, LANES, Simd, copy_bytes};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub struct Avx2;

/// # Safety
/// The machine has AVX2, FMA and F16C, and what the kernel asks of its caller holds.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

type F = [__m256; 2];

macro_rules! halves {
    ($name:ident, $intrinsic:ident) => {
        #[inline(always)]
        unsafe fn $name(a: F, b: F) -> F {
            [$intrinsic(a[0], b[0]), $intrinsic(a[1], b[1])]
        }
    };
}

// No closures here: they would be compiled without the extension.

/// # Safety
/// The machine has F16C, and 8 numbers lie at `p`.
#[inline(always)]
unsafe fn f16_half(p: *const u16) -> __m256 {
    _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
}

/// # Safety
/// The machine has AVX2, and 8 numbers lie at `p`.
#[inline(always)]
unsafe fn bf16_half(p: *const u16) -> __m256 {
    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
}

/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn power_half(n: __m256) -> __m256 {
    let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
}

/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn sum_pairs(a: __m256) -> __m256 {
    _mm256_add_ps(a, _mm256_permute_ps::<0b10_11_00_01>(a))
}

/// The sum of each.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
pub unsafe fn sums(a: __m256, b: __m256, c: __m256, d: __m256) -> __m128 {
    let four = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps::<1>(four))
}

/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn uninterleaved(x: F) -> F {
    let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(x[0], x[1]));
    let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(x[0], x[1]));
    [
        _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(even)),
        _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(odd)),
    ]
}

/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn dot_half(acc: __m256i, codes: __m256i, limbs: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(codes, limbs);
    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// # Safety
/// The machine has AVX2, and the entries are in the table.
#[inline(always)]
unsafe fn expand_half(table: &[f32; LANES], first: usize, shift: u32) -> __m256 {
    let low = _mm_broadcast_ss(table.get_unchecked(first >> shift));
    let high = _mm_broadcast_ss(table.get_unchecked((first + 4) >> shift));
    _mm256_set_m128(high, low)
}

// What each method asks of its caller stands at `Simd`.
impl Simd for Avx2 {
    type F = F;
    type I = [__m256i; 2];
    type B = [__m256i; 2];
    type Table = [f32; LANES];

    // vpmaddubsw adds two products in 16 bits: 2 * 255 * 64 fits.
    const LIMB_BITS: u32 = 7;
    const ACCUMULATORS: usize = 6;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [_mm256_set1_ps(x); 2]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }
    #[inline(always)]
    unsafe fn splat_many(p: *const f32, count: usize) -> F {
        match count {
            1 => Self::splat(*p),
            _ => [_mm256_castsi256_ps(_mm256_set1_epi64x(p.cast::<i64>().read_unaligned())); 2],
        }
    }
    #[inline(always)]
    unsafe fn load_partial(p: *const f32, n: usize) -> F {
        let mut padded = [0.0; LANES];
        copy_bytes(p.cast(), padded.as_mut_ptr().cast(), n * size_of::<f32>());
        Self::load(padded.as_ptr())
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        [f16_half(p), f16_half(p.add(8))]
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> F {
        [bf16_half(p), bf16_half(p.add(8))]
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: F) {
        _mm256_storeu_ps(p, x[0]);
        _mm256_storeu_ps(p.add(8), x[1]);
    }
    #[inline(always)]
    unsafe fn store_partial(p: *mut f32, x: F, n: usize) {
        let mut padded = [0.0; LANES];
        Self::store(padded.as_mut_ptr(), x);
        std::ptr::copy_nonoverlapping(padded.as_ptr(), p, n);
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: F) {
        _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]));
        _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]));
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: F) {
        let words = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
        let low = _mm256_castsi256_si128(words);
        _mm_storeu_si128(p.cast(), _mm_packs_epi16(low, _mm256_extracti128_si256::<1>(words)));
    }
    halves!(add, _mm256_add_ps);
    halves!(sub, _mm256_sub_ps);
    halves!(mul, _mm256_mul_ps);
    halves!(div, _mm256_div_ps);
    halves!(max, _mm256_max_ps);
    halves!(min, _mm256_min_ps);
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }
    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        let sign = _mm256_set1_ps(-0.0);
        [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        [_mm256_round_ps::<0>(a[0]), _mm256_round_ps::<0>(a[1])]
    }
    #[inline(always)]
    unsafe fn power_of_two(n: F) -> F {
        [power_half(n[0]), power_half(n[1])]
    }
    #[inline(always)]
    unsafe fn uninterleaved(x: [F; 2]) -> [F; 2] {
        let [[e0, o0], [e1, o1]] = [uninterleaved(x[0]), uninterleaved(x[1])];
        [[e0, e1], [o0, o1]]
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        let both = _mm256_add_ps(a[0], a[1]);
        let four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
    #[inline(always)]
    unsafe fn sums(a: [F; 4]) -> [f32; 4] {
        let [a, b, c, d] = a;
        let four = sums(
            _mm256_add_ps(a[0], a[1]),
            _mm256_add_ps(b[0], b[1]),
            _mm256_add_ps(c[0], c[1]),
            _mm256_add_ps(d[0], d[1]),
        );
        std::mem::transmute(four)
    }
    #[inline(always)]
    unsafe fn sum_pairs(a: F) -> F {
        [sum_pairs(a[0]), sum_pairs(a[1])]
    }
    #[inline(always)]
    unsafe fn largest(a: F) -> f32 {
        let both = _mm256_max_ps(a[0], a[1]);
        let four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }

    #[inline(always)]
    unsafe fn izero() -> [__m256i; 2] {
        [_mm256_setzero_si256(); 2]
    }
    #[inline(always)]
    unsafe fn float(a: [__m256i; 2]) -> F {
        [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])]
    }
    #[inline(always)]
    unsafe fn shift(a: [__m256i; 2], bits: u32) -> [__m256i; 2] {
        let bits = _mm_cvtsi32_si128(bits as i32);
        [_mm256_sll_epi32(a[0], bits), _mm256_sll_epi32(a[1], bits)]
    }
    #[inline(always)]
    unsafe fn iadd(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> [__m256i; 2] {
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())]
    }
    #[inline(always)]
    unsafe fn bytes_partial(p: *const u8, n: usize) -> [__m256i; 2] {
        let mut padded = [0u8; 64];
        std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), n);
        Self::bytes(padded.as_ptr())
    }
    #[inline(always)]
    unsafe fn bytes_splat(p: *const u8) -> [__m256i; 2] {
        [_mm256_set1_epi32(p.cast::<i32>().read_unaligned()); 2]
    }
    #[inline(always)]
    unsafe fn bytes_store(p: *mut u8, x: [__m256i; 2]) {
        _mm256_storeu_si256(p.cast(), x[0]);
        _mm256_storeu_si256(p.add(32).cast(), x[1]);
    }
    #[inline(always)]
    unsafe fn unpack_int4(a: [__m256i; 2]) -> [[__m256i; 2]; 2] {
        let low = _mm256_set1_epi8(15);
        let shifted = [_mm256_srli_epi16::<4>(a[0]), _mm256_srli_epi16::<4>(a[1])];
        [
            [_mm256_and_si256(a[0], low), _mm256_and_si256(a[1], low)],
            [_mm256_and_si256(shifted[0], low), _mm256_and_si256(shifted[1], low)],
        ]
    }
    #[inline(always)]
    unsafe fn dot(acc: [__m256i; 2], codes: [__m256i; 2], limbs: [__m256i; 2]) -> [__m256i; 2] {
        [dot_half(acc[0], codes[0], limbs[0]), dot_half(acc[1], codes[1], limbs[1])]
    }

    #[inline(always)]
    unsafe fn table(a: F) -> [f32; LANES] {
        let mut table = [0.0; LANES];
        Self::store(table.as_mut_ptr(), a);
        table
    }
    #[inline(always)]
    unsafe fn expand(table: &[f32; LANES], block: usize, shift: u32) -> F {
        let first = block * LANES;
        if shift >= 3 {
            let low = _mm256_broadcast_ss(table.get_unchecked(first >> shift));
            return [low, _mm256_broadcast_ss(table.get_unchecked((first + 8) >> shift))];
        }
        [expand_half(table, first, shift), expand_half(table, first + 8, shift)]
    }
}
