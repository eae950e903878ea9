//! No extension: arrays, which the compiler vectorizes for the target's baseline (NEON on
//! aarch64).

use super::{BYTES, LANES, Simd, copy_bytes};

#[derive(Clone, Copy)]
pub struct Portable;

type F = [f32; LANES];

#[inline(always)]
fn zip(a: F, b: F, op: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|lane| op(a[lane], b[lane]))
}

#[inline(always)]
fn reduce(a: F, op: impl Fn(f32, f32) -> f32) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|lane| op(a[lane], a[lane + 8]));
    let four: [f32; 4] = std::array::from_fn(|lane| op(eight[lane], eight[lane + 4]));
    op(op(four[0], four[2]), op(four[1], four[3]))
}

#[inline(always)]
fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let rest = u32::from(half & 0x7fff);
    // The exponent's bias is put right by a product, which takes care of subnormals too.
    let finite = f32::from_bits(rest << 13) * f32::from_bits((254 - 15) << 23);
    let infinite = if rest >= 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(sign | finite.to_bits() | infinite)
}

// What each method asks of its caller stands at `Simd`.
impl Simd for Portable {
    type F = F;
    type I = [i32; LANES];
    type B = [u8; BYTES];
    type Table = F;

    const LIMB_BITS: u32 = 8;
    const ACCUMULATORS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        p.cast::<F>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn splat_many(p: *const f32, count: usize) -> F {
        std::array::from_fn(|lane| *p.add(lane % count))
    }
    #[inline(always)]
    unsafe fn load_partial(p: *const f32, n: usize) -> F {
        let mut padded = [0.0; LANES];
        copy_bytes(p.cast(), padded.as_mut_ptr().cast(), n * size_of::<f32>());
        padded
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        p.cast::<[u16; LANES]>().read_unaligned().map(f16_to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> F {
        let halves = { p.cast::<[u16; LANES]>().read_unaligned() };
        halves.map(|half| f32::from_bits(u32::from(half) << 16))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: F) {
        p.cast::<F>().write_unaligned(x)
    }
    #[inline(always)]
    unsafe fn store_partial(p: *mut f32, x: F, n: usize) {
        std::ptr::copy_nonoverlapping(x.as_ptr(), p, n)
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, x: F) {
        let halves = x.map(|x| half::f16::from_f32(x).to_bits());
        p.cast::<[u16; LANES]>().write_unaligned(halves)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: F) {
        p.cast::<[i8; LANES]>().write_unaligned(Self::round(x).map(|x| x as i8))
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        // Where the target has no such instruction, `mul_add` is a slow function.
        std::array::from_fn(|lane| match cfg!(target_arch = "aarch64") {
            true => a[lane].mul_add(b[lane], c[lane]),
            false => a[lane] * b[lane] + c[lane],
        })
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        a.map(f32::abs)
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        // Below 2^22 the last bit of the sum is a whole number's; others are not rounded here.
        const MAGIC: f32 = 12_582_912.0;
        a.map(|a| (a + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn power_of_two(n: F) -> F {
        n.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn uninterleaved(x: [F; 2]) -> [F; 2] {
        let all = x.as_flattened();
        [0, 1].map(|odd| std::array::from_fn(|place| all[2 * place + odd]))
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        reduce(a, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sums(a: [F; 4]) -> [f32; 4] {
        a.map(|a| reduce(a, |a, b| a + b))
    }
    #[inline(always)]
    unsafe fn sum_pairs(a: F) -> F {
        std::array::from_fn(|lane| a[lane] + a[lane ^ 1])
    }
    #[inline(always)]
    unsafe fn largest(a: F) -> f32 {
        reduce(a, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn izero() -> [i32; LANES] {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn float(a: [i32; LANES]) -> F {
        a.map(|a| a as f32)
    }
    #[inline(always)]
    unsafe fn shift(a: [i32; LANES], bits: u32) -> [i32; LANES] {
        a.map(|a| a << bits)
    }
    #[inline(always)]
    unsafe fn iadd(a: [i32; LANES], b: [i32; LANES]) -> [i32; LANES] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> [u8; BYTES] {
        p.cast::<[u8; BYTES]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn bytes_partial(p: *const u8, n: usize) -> [u8; BYTES] {
        let mut padded = [0; BYTES];
        std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), n);
        padded
    }
    #[inline(always)]
    unsafe fn bytes_splat(p: *const u8) -> [u8; BYTES] {
        let four = { p.cast::<[u8; 4]>().read_unaligned() };
        std::array::from_fn(|place| four[place % 4])
    }
    #[inline(always)]
    unsafe fn bytes_store(p: *mut u8, x: [u8; BYTES]) {
        p.cast::<[u8; BYTES]>().write_unaligned(x)
    }
    #[inline(always)]
    unsafe fn unpack_int4(a: [u8; BYTES]) -> [[u8; BYTES]; 2] {
        [a.map(|a| a & 15), a.map(|a| a >> 4)]
    }
    #[inline(always)]
    unsafe fn dot(acc: [i32; LANES], codes: [u8; BYTES], limbs: [u8; BYTES]) -> [i32; LANES] {
        let product = |place| i32::from(codes[place]) * i32::from(limbs[place] as i8);
        std::array::from_fn(|lane| {
            let first = 4 * lane;
            acc[lane]
                + (product(first) + product(first + 1))
                + (product(first + 2) + product(first + 3))
        })
    }

    #[inline(always)]
    unsafe fn table(a: F) -> F {
        a
    }
    #[inline(always)]
    unsafe fn expand(table: &F, block: usize, shift: u32) -> F {
        std::array::from_fn(|lane| table[((block * LANES + lane) >> shift) % LANES])
    }
}
