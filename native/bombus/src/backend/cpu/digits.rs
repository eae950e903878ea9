//! Activations as whole numbers, for exact products with quantized weights.
//!
//! For each group of weights that share a scale, x is written with signed digits of 8 bits:
//! `x = scale * (d0 + d1 / base + d2 / base^2)`, where the largest |x| of the group makes d0 the
//! largest digit. One digit is "int8 activations", two are more exact than bf16 (an error of
//! 2^-16 of the group's largest, where bf16 has 2^-9 of x), three are f32 (2^-24). A dot product
//! of codes and digits is exact, and `sum` is of the digits themselves, so that an error of x
//! meets the weight and not the code, which is further from zero.

use super::pool::Pool;
use super::simd::{BYTES, Kernel, LANES, Level, Simd};
use super::tensor::Tensor;
use std::ops::Range;

/// In which order the digits of a row lie, so that they meet the codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Format {
    pub group_size: usize,
    /// Codes of 4 bits, two in a byte: the digits at even places are met first, then the others.
    pub nibbles: bool,
    pub planes: usize,
    /// Sixteen rows side by side (many rows), or one after another (few).
    pub tiled: bool,
}

/// The digits of x: `[rows, width]`.
#[derive(Default)]
pub struct Digits {
    pub rows: usize,
    pub groups: usize,
    /// The bytes from one digit's plane to the next (not tiled).
    pub plane: usize,
    /// tiled: `[tile][group][quad of k][digit][row of tile][4]`, else `[row][digit][k]`
    digits: Vec<i8>,
    /// tiled: `[tile][group][row of tile]`, else `[row][group]`
    scales: Vec<f32>,
    /// The sum of each group of x, as the digits have it.
    sums: Vec<f32>,
    /// The groups of a row in `scales`, with room for a whole vector at the last.
    stride: usize,
}

/// The largest digit beside codes of this kind; a digit is worth twice as many of the next.
#[inline(always)]
pub fn largest_digit<S: Simd>(nibbles: bool) -> u8 {
    if nibbles { 127 } else { S::DIGIT }
}

impl Digits {
    pub fn fill(&mut self, level: Level, pool: &Pool, x: &Tensor, format: Format) {
        let Format { group_size, planes, tiled, .. } = format;
        self.rows = x.rows;
        self.groups = x.width / group_size;
        self.plane = x.width.next_multiple_of(2 * BYTES);
        self.stride = self.groups.next_multiple_of(LANES);
        let (digits, numbers) = match tiled {
            true => {
                let rows = x.rows.next_multiple_of(LANES);
                (rows * x.width * planes, rows * self.groups)
            }
            false => (x.rows * planes * self.plane, x.rows * self.stride),
        };
        self.digits.resize(digits, 0);
        if !tiled {
            // The places behind the last group must be zero in whatever the vectors read.
            self.digits.fill(0);
            self.scales.clear();
            self.sums.clear();
        }
        self.scales.resize(numbers, 0.0);
        self.sums.resize(numbers, 0.0);
        let out = Out {
            digits: self.digits.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
        };
        let (groups, plane, stride) = (self.groups, self.plane, self.stride);
        let work = |rows: Range<usize>| {
            let kernel = Fill { x, rows, format, groups, plane, stride, out };
            // SAFETY: `out` has room for all rows, and each is written by one thread.
            unsafe { level.run(kernel) }
        };
        match x.rows * x.width > SERIAL {
            true => pool.split(x.rows, 1, work),
            false => work(0..x.rows),
        }
    }

    /// The digits of `row`, plane after plane (not tiled).
    #[inline(always)]
    pub unsafe fn row(&self, row: usize, planes: usize) -> *const u8 {
        self.digits.as_ptr().add(row * planes * self.plane).cast()
    }

    /// Scales and sums of a row, from a group on (not tiled).
    #[inline(always)]
    pub unsafe fn row_numbers(&self, row: usize, group: usize) -> [*const f32; 2] {
        let place = row * self.stride + group;
        unsafe { [self.scales.as_ptr().add(place), self.sums.as_ptr().add(place)] }
    }

    /// The digits of a group in a tile: `[quad][digit][row of tile][4]`.
    #[inline(always)]
    pub unsafe fn tile(
        &self,
        tile: usize,
        group: usize,
        group_size: usize,
        planes: usize,
    ) -> *const u8 {
        let place = (tile * self.groups + group) * group_size * planes * LANES;
        self.digits.as_ptr().add(place).cast()
    }

    /// Scales and sums of a group in a tile.
    #[inline(always)]
    pub unsafe fn tile_numbers(&self, tile: usize, group: usize) -> [*const f32; 2] {
        let place = (tile * self.groups + group) * LANES;
        unsafe { [self.scales.as_ptr().add(place), self.sums.as_ptr().add(place)] }
    }
}

/// Fewer numbers than this are done before a second thread has begun.
pub const SERIAL: usize = 16 * 1024;

#[derive(Clone, Copy)]
struct Out {
    digits: *mut i8,
    scales: *mut f32,
    sums: *mut f32,
}

// SAFETY: every row is written by one thread.
unsafe impl Sync for Out {}
// SAFETY: as above.
unsafe impl Send for Out {}

struct Fill<'a> {
    x: &'a Tensor,
    rows: Range<usize>,
    format: Format,
    groups: usize,
    plane: usize,
    stride: usize,
    out: Out,
}

/// The digits of one group, plane after plane.
type Group = [[i8; 128]; 3];

impl Kernel for Fill<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Format { group_size, nibbles, planes, tiled } = self.format;
        let mut group = [[0; 128]; 3];
        for row in self.rows.clone() {
            let x = self.x.row(row).as_ptr();
            for index in 0..self.groups {
                let x = x.add(index * group_size);
                let largest = largest_digit::<S>(nibbles);
                let [scale, sum] = digits::<S>(x, group_size, planes, largest, &mut group);
                let number = match tiled {
                    true => (row / LANES * self.groups + index) * LANES + row % LANES,
                    false => row * self.stride + index,
                };
                *self.out.scales.add(number) = scale;
                *self.out.sums.add(number) = sum;
                match tiled {
                    true => self.place_in_tile(row, index, &group),
                    false => self.place_in_row(row, index, &group),
                }
            }
        }
    }
}

impl Fill<'_> {
    #[inline(always)]
    unsafe fn place_in_row(&self, row: usize, index: usize, group: &Group) {
        let Format { group_size, nibbles, planes, .. } = self.format;
        let first = index * group_size;
        for (plane, digits) in group.iter().enumerate().take(planes) {
            let out = self.out.digits.add((row * planes + plane) * self.plane);
            if !nibbles {
                std::ptr::copy_nonoverlapping(digits.as_ptr(), out.add(first), group_size);
                continue;
            }
            // A vector of codes holds 128: 64 at even places, then 64 at odd ones.
            let block = first / 128 * 128;
            let even = out.add(block + first % 128 / 2);
            for pair in 0..group_size / 2 {
                *even.add(pair) = digits[2 * pair];
                *even.add(64 + pair) = digits[2 * pair + 1];
            }
        }
    }

    #[inline(always)]
    unsafe fn place_in_tile(&self, row: usize, index: usize, group: &Group) {
        let Format { group_size, nibbles, planes, .. } = self.format;
        let tile = (row / LANES * self.groups + index) * group_size * planes * LANES;
        for (plane, digits) in group.iter().enumerate().take(planes) {
            let mut ordered = [0; 128];
            for place in 0..group_size {
                let even_first = place / 2 + place % 2 * group_size / 2;
                ordered[if nibbles { even_first } else { place }] = digits[place];
            }
            for quad in 0..group_size / 4 {
                let to = tile + (quad * planes + plane) * BYTES + row % LANES * 4;
                let four = ordered.as_ptr().add(4 * quad);
                std::ptr::copy_nonoverlapping(four, self.out.digits.add(to), 4);
            }
        }
    }
}

/// -> the scale, and the sum of the digits' x
#[inline(always)]
unsafe fn digits<S: Simd>(
    x: *const f32,
    group_size: usize,
    planes: usize,
    largest: u8,
    group: &mut Group,
) -> [f32; 2] {
    unsafe {
        let zero = S::splat(0.0);
        let (mut peak, mut check) = (zero, zero);
        for place in (0..group_size).step_by(LANES) {
            let x = S::load(x.add(place));
            peak = S::max(peak, S::abs(x));
            check = S::fma(x, zero, check);
        }
        let (peak, base) = (S::largest(peak), 2.0 * f32::from(largest));
        let factor = if peak > f32::MIN_POSITIVE * 1e6 { f32::from(largest) / peak } else { 0.0 };
        let mut sums = [zero; 3];
        for place in (0..group_size).step_by(LANES) {
            let mut rest = S::mul(S::load(x.add(place)), S::splat(factor));
            for plane in 0..planes {
                let digit = S::round(rest);
                S::store_i8(group[plane].as_mut_ptr().add(place), digit);
                sums[plane] = S::add(sums[plane], digit);
                rest = S::mul(S::sub(rest, digit), S::splat(base));
            }
        }
        let mut sum = 0.0;
        for plane in (0..planes).rev() {
            sum = sum / base + S::sum(sums[plane]);
        }
        // What is no number must not become one.
        let scale = peak / f32::from(largest) + S::sum(check);
        [scale, scale * sum]
    }
}
