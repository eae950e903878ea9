//! AVX-512: F, BW, DQ, VL and VNNI.

use super::{Kernel, LANES, Simd, avx2};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub struct Avx512;

/// # Safety
/// The machine has AVX2, FMA, F16C, and AVX-512 with F, BW, DQ, VL and VNNI; what the kernel asks of its
/// caller holds.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

/// `lane >> shift` for every shift from 2 on and every lane of a table's vectors.
static ENTRIES: [[i32; LANES << 5]; 4] = entries();

const fn entries() -> [[i32; LANES << 5]; 4] {
    let mut entries = [[0; LANES << 5]; 4];
    let mut place = 0;
    while place < 4 * (LANES << 5) {
        let (shift, lane) = (place / (LANES << 5), place % (LANES << 5));
        entries[shift][lane] = (lane >> (shift + 2)) as i32;
        place += 1;
    }
    entries
}

#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

/// # Safety
/// The machine has AVX-512 (F and DQ).
#[inline(always)]
unsafe fn half_sums(a: __m512) -> __m256 {
    _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))
}

// What each method asks of its caller stands at `Simd`.
impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type Table = __m512;

    const LIMB_BITS: u32 = 8;
    const ACCUMULATORS: usize = 24;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn splat_many(p: *const f32, count: usize) -> __m512 {
        match count {
            1 => _mm512_set1_ps(*p),
            _ => _mm512_castsi512_ps(_mm512_set1_epi64(p.cast::<i64>().read_unaligned())),
        }
    }
    #[inline(always)]
    unsafe fn load_partial(p: *const f32, n: usize) -> __m512 {
        _mm512_maskz_loadu_ps(mask(n), p)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m512) {
        _mm512_storeu_ps(p, x)
    }
    #[inline(always)]
    unsafe fn store_partial(p: *mut f32, x: __m512, n: usize) {
        _mm512_mask_storeu_ps(p, mask(n), x)
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: __m512) {
        _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: __m512) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)))
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        _mm512_abs_ps(a)
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        _mm512_roundscale_ps::<0>(a)
    }
    #[inline(always)]
    unsafe fn power_of_two(n: __m512) -> __m512 {
        _mm512_scalef_ps(_mm512_set1_ps(1.0), n)
    }
    #[inline(always)]
    unsafe fn uninterleaved(x: [__m512; 2]) -> [__m512; 2] {
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
        [_mm512_permutex2var_ps(x[0], even, x[1]), _mm512_permutex2var_ps(x[0], odd, x[1])]
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        _mm512_reduce_add_ps(a)
    }
    #[inline(always)]
    unsafe fn sums(a: [__m512; 4]) -> [f32; 4] {
        let four = avx2::sums(half_sums(a[0]), half_sums(a[1]), half_sums(a[2]), half_sums(a[3]));
        std::mem::transmute(four)
    }
    #[inline(always)]
    unsafe fn sum_pairs(a: __m512) -> __m512 {
        _mm512_add_ps(a, _mm512_permute_ps::<0b10_11_00_01>(a))
    }
    #[inline(always)]
    unsafe fn largest(a: __m512) -> f32 {
        _mm512_reduce_max_ps(a)
    }

    #[inline(always)]
    unsafe fn izero() -> __m512i {
        _mm512_setzero_si512()
    }
    #[inline(always)]
    unsafe fn float(a: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(a)
    }
    #[inline(always)]
    unsafe fn shift(a: __m512i, bits: u32) -> __m512i {
        _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits as i32))
    }
    #[inline(always)]
    unsafe fn iadd(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn bytes_partial(p: *const u8, n: usize) -> __m512i {
        let mask = if n < 64 { (1u64 << n) - 1 } else { u64::MAX };
        _mm512_maskz_loadu_epi8(mask, p.cast())
    }
    #[inline(always)]
    unsafe fn bytes_splat(p: *const u8) -> __m512i {
        _mm512_set1_epi32(p.cast::<i32>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn bytes_store(p: *mut u8, x: __m512i) {
        _mm512_storeu_si512(p.cast(), x)
    }
    #[inline(always)]
    unsafe fn unpack_int4(a: __m512i) -> [__m512i; 2] {
        let low = _mm512_set1_epi8(15);
        [_mm512_and_si512(a, low), _mm512_and_si512(_mm512_srli_epi16::<4>(a), low)]
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512i, codes: __m512i, limbs: __m512i) -> __m512i {
        _mm512_dpbusd_epi32(acc, codes, limbs)
    }

    #[inline(always)]
    unsafe fn table(a: __m512) -> __m512 {
        a
    }
    #[inline(always)]
    unsafe fn expand(table: &__m512, block: usize, shift: u32) -> __m512 {
        let entries = ENTRIES.get_unchecked(shift as usize - 2).as_ptr().add(block * LANES);
        _mm512_permutexvar_ps(_mm512_loadu_si512(entries.cast()), *table)
    }
}
