//! Sixteen lanes at a time, on whatever the processor has.
//!
//! A kernel is written once, over `Simd`. `Level::run` compiles it for AVX-512 (with VNNI), for
//! AVX2 (with FMA and F16C) and for no extension at all, and runs the best that is there. All of
//! a kernel must be `#[inline(always)]`: only what is inlined gets the extension's instructions.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use portable::Portable;

/// The lanes of a vector of f32.
pub const LANES: usize = 16;
/// The bytes of a vector: four for each lane.
pub const BYTES: usize = 64;

/// Instructions that this machine may have, in ascending order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Portable,
    Avx2,
    Avx512,
}

/// Work that is compiled for every level.
pub trait Kernel {
    type Output;
    /// # Safety
    /// Only to be called by `Level::run`. Implementations are `#[inline(always)]`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

impl Level {
    /// The best of this machine.
    pub fn detect() -> Self {
        Self::all().pop().unwrap_or(Level::Portable)
    }

    /// All of this machine.
    pub fn all() -> Vec<Self> {
        let levels = [Level::Portable, Level::Avx2, Level::Avx512];
        levels.into_iter().filter(|level| level.is_there()).collect()
    }

    #[cfg(target_arch = "x86_64")]
    fn is_there(self) -> bool {
        let avx2 = || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        };
        match self {
            Level::Portable => true,
            Level::Avx2 => avx2(),
            Level::Avx512 => {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_there(self) -> bool {
        self == Level::Portable
    }

    /// # Safety
    /// The machine must have this level (as those of `detect` and `all`), and what the kernel
    /// asks of its caller must hold.
    #[inline]
    pub unsafe fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the caller's.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => avx512::run(kernel),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2::run(kernel),
                _ => kernel.run::<Portable>(),
            }
        }
    }
}

/// The vectors of one level. Pointers need no alignment. All of it is unsafe for the same reason:
/// the machine must have the instructions, and pointers must hold what is read or written.
pub trait Simd: Copy + 'static {
    /// 16 f32
    type F: Copy;
    /// 16 i32
    type I: Copy;
    /// 64 bytes
    type B: Copy;
    /// 16 f32 to be picked from
    type Table: Copy;

    /// The bits of a limb that `dot` may be given beside codes of 8 bits.
    const LIMB_BITS: u32;
    /// How many accumulators of 16 i32 stay in registers.
    const ACCUMULATORS: usize;

    /// # Safety
    /// The machine has the instructions.
    unsafe fn splat(x: f32) -> Self::F;
    /// # Safety
    /// The machine has the instructions, and 16 numbers lie at `p`.
    unsafe fn load(p: *const f32) -> Self::F;
    /// One or two numbers, again and again.
    ///
    /// # Safety
    /// The machine has the instructions, `count` is 1 or 2, and as many numbers lie at `p`.
    unsafe fn splat_many(p: *const f32, count: usize) -> Self::F;
    /// The first `n` lanes, zeros behind them.
    ///
    /// # Safety
    /// The machine has the instructions, `n` is at most 16, and as many numbers lie at `p`.
    unsafe fn load_partial(p: *const f32, n: usize) -> Self::F;
    /// # Safety
    /// The machine has the instructions, and 16 numbers lie at `p`.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// # Safety
    /// The machine has the instructions, and 16 numbers lie at `p`.
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    /// # Safety
    /// The machine has the instructions, and 16 numbers may be written at `p`.
    unsafe fn store(p: *mut f32, x: Self::F);
    /// # Safety
    /// The machine has the instructions, `n` is at most 16, and as many numbers may be written at `p`.
    unsafe fn store_partial(p: *mut f32, x: Self::F, n: usize);
    /// # Safety
    /// The machine has the instructions, and 16 numbers may be written at `p`.
    unsafe fn store_f16(p: *mut u16, x: Self::F);
    /// Rounds to the nearest whole number, which must be in -128..=127.
    ///
    /// # Safety
    /// The machine has the instructions, and 16 bytes may be written at `p`.
    unsafe fn store_i8(p: *mut i8, x: Self::F);
    /// # Safety
    /// The machine has the instructions.
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// # Safety
    /// The machine has the instructions.
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    /// # Safety
    /// The machine has the instructions.
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// # Safety
    /// The machine has the instructions.
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `b` where one is NaN; so with `min`.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// # Safety
    /// The machine has the instructions.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// # Safety
    /// The machine has the instructions.
    unsafe fn abs(a: Self::F) -> Self::F;
    /// To the nearest whole number, ties to even.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `2^n` for whole `n` in -126..=127
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn power_of_two(n: Self::F) -> Self::F;
    /// Of 32 numbers those at even places, and the others.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn uninterleaved(x: [Self::F; 2]) -> [Self::F; 2];
    /// # Safety
    /// The machine has the instructions.
    unsafe fn sum(a: Self::F) -> f32;
    /// The sums of four vectors.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn sums(a: [Self::F; 4]) -> [f32; 4];
    /// Every two lanes' sum, in both.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn sum_pairs(a: Self::F) -> Self::F;
    /// # Safety
    /// The machine has the instructions.
    unsafe fn largest(a: Self::F) -> f32;

    /// # Safety
    /// The machine has the instructions.
    unsafe fn izero() -> Self::I;
    /// # Safety
    /// The machine has the instructions.
    unsafe fn float(a: Self::I) -> Self::F;
    /// `a << bits`
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn shift(a: Self::I, bits: u32) -> Self::I;
    /// # Safety
    /// The machine has the instructions.
    unsafe fn iadd(a: Self::I, b: Self::I) -> Self::I;
    /// # Safety
    /// The machine has the instructions, and 64 bytes lie at `p`.
    unsafe fn bytes(p: *const u8) -> Self::B;
    /// The first `n` bytes, zeros behind them.
    ///
    /// # Safety
    /// The machine has the instructions, `n` is at most 64, and as many bytes lie at `p`.
    unsafe fn bytes_partial(p: *const u8, n: usize) -> Self::B;
    /// Four bytes, sixteen times.
    ///
    /// # Safety
    /// The machine has the instructions, and 4 bytes lie at `p`.
    unsafe fn bytes_splat(p: *const u8) -> Self::B;
    /// # Safety
    /// The machine has the instructions, and 64 bytes may be written at `p`.
    unsafe fn bytes_store(p: *mut u8, x: Self::B);
    /// The low and the high four bits of every byte.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn unpack_int4(a: Self::B) -> [Self::B; 2];
    /// Adds to each lane the products of its four codes (unsigned) and limbs (signed).
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn dot(acc: Self::I, codes: Self::B, limbs: Self::B) -> Self::I;

    /// # Safety
    /// The machine has the instructions.
    unsafe fn table(a: Self::F) -> Self::Table;
    /// Lane i of vector number `block` gets entry `(16 * block + i) >> shift`; shift is 2 to 5.
    ///
    /// # Safety
    /// The machine has the instructions, and `block` is below `1 << shift`.
    unsafe fn expand(table: &Self::Table, block: usize, shift: u32) -> Self::F;

    /// `n` lanes of bf16 or f16, zeros behind them.
    ///
    /// # Safety
    /// The machine has the instructions, `n` is at most 16, and as many numbers lie at `p`.
    #[inline(always)]
    unsafe fn load_half_partial<const BF16: bool>(p: *const u16, n: usize) -> Self::F {
        let mut padded = [0u16; LANES];
        copy_bytes(p.cast(), padded.as_mut_ptr().cast(), n * size_of::<u16>());
        match BF16 {
            true => Self::load_bf16(padded.as_ptr()),
            false => Self::load_f16(padded.as_ptr()),
        }
    }

    /// `e^x` for x <= 88, to 2 units in the last place, and at least `e^-87.3`. NaN
    /// stays NaN: of two operands that cannot be compared, `max` is the second.
    ///
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    unsafe fn exp(x: Self::F) -> Self::F {
        // e^x = 2^n e^r with |r| <= ln 2 / 2; the polynomial is Cephes's expf.
        let x = Self::max(Self::splat(-87.3), x);
        let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
        let r = Self::fma(n, Self::splat(-0.693_359_4), x);
        let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
        let mut p = Self::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
            p = Self::fma(p, r, Self::splat(c));
        }
        Self::mul(p, Self::power_of_two(n))
    }
}

/// What lies in a file is aligned to nothing: it is copied as bytes.
///
/// # Safety
/// `count` bytes lie at `from`, and may be written at `to`; the two do not overlap.
#[inline(always)]
unsafe fn copy_bytes(from: *const u8, to: *mut u8, count: usize) {
    std::ptr::copy_nonoverlapping(from, to, count);
}

/// Asks for the cache line at `p`, which need not exist.
#[inline(always)]
pub fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
