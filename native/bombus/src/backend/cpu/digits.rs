//! Activations as whole numbers, for exact products with quantized weights.
//!
//! For each group of weights that share a scale, x is written with signed digits of 8 bits:
//! `x = scale * (256 * d0 + d1)`, where the largest |x| of the group makes d0 the largest digit.
//! Two digits are more exact than bf16 (an error of 2^-16 of the group's largest, where bf16 has
//! 2^-9 of x), three are f32 (2^-24). Where the instructions take digits of 7 bits beside large
//! codes, those are four. A dot product of codes and digits is exact, and `sum` is of the digits
//! themselves, so that an error of x meets the weight, and not the code, which is further from
//! zero.

use super::pool::Pool;
use super::simd::{BYTES, Kernel, LANES, Level, Simd};
use super::tensor::Tensor;
use std::ops::Range;

/// How the digits of some rows lie, so that they meet the codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Format {
    pub group_size: usize,
    /// Codes of 4 bits, two in a byte: the digits at even places are met first, then the others.
    pub nibbles: bool,
    pub planes: usize,
    pub shape: Shape,
}

/// What the lanes of a vector are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// Quads of one digit of one row. `[row][digit][k]`
    Rows,
    /// One quad of both digits of 8 rows. `[tile][group][quad][row][digit][4]`
    Eights,
    /// One quad of one digit of 16 rows. `[tile][group][quad][digit][row][4]`
    Sixteens,
}

impl Shape {
    /// The rows of a tile.
    pub fn rows(self) -> usize {
        match self {
            Shape::Rows => 1,
            Shape::Eights => 8,
            Shape::Sixteens => 16,
        }
    }

    /// The lanes of a row in a tile's vector.
    pub fn lanes(self) -> usize {
        LANES / self.rows()
    }

    /// A tile's vectors for the same quad.
    fn vectors(self, planes: usize) -> usize {
        if self == Shape::Sixteens { planes } else { 1 }
    }
}

/// The bits of a digit beside codes of this kind.
#[inline(always)]
pub fn digit_bits<S: Simd>(nibbles: bool) -> u32 {
    if nibbles { 8 } else { S::DIGIT_BITS }
}

/// The digits of x: `[rows, width]`.
#[derive(Default)]
pub struct Digits {
    pub rows: usize,
    pub groups: usize,
    /// The bytes from one digit's plane to the next, in the shape of rows.
    pub plane: usize,
    digits: Vec<Line>,
    /// Rows: what the last digit is worth, `[row][group]`; else what the lane's is, `[tile][group][lane]`
    scales: Vec<f32>,
    /// The sum of each group of x, as the digits have it. Rows: `[row][group]`, else
    /// `[tile][groups][row][group]` with as many groups at once as a row has lanes.
    sums: Vec<f32>,
    /// Rows: the groups of a row in `scales`, with room for a whole vector at the last.
    stride: usize,
}

/// 64 digits, which one load takes without crossing a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [i8; BYTES]);

impl Digits {
    pub fn fill(&mut self, level: Level, pool: &Pool, x: &Tensor, format: Format) {
        let Format { group_size, planes, shape, .. } = format;
        self.rows = x.rows;
        self.groups = x.width / group_size;
        self.plane = x.width.next_multiple_of(2 * BYTES);
        self.stride = self.groups.next_multiple_of(LANES);
        let tiles = x.rows.div_ceil(shape.rows());
        let (digits, scales, sums) = match shape {
            Shape::Rows => {
                (x.rows * planes * self.plane, x.rows * self.stride, x.rows * self.stride)
            }
            _ => (
                tiles * shape.rows() * planes * x.width,
                tiles * self.groups * LANES,
                tiles * self.groups.div_ceil(shape.lanes()) * LANES,
            ),
        };
        self.digits.resize(digits / BYTES, Line([0; BYTES]));
        // The places behind the last group must be zero in whatever the vectors read.
        if shape == Shape::Rows {
            self.digits.fill(Line([0; BYTES]));
        }
        for (numbers, count) in [(&mut self.scales, scales), (&mut self.sums, sums)] {
            numbers.clear();
            numbers.resize(count, 0.0);
        }
        let out = Out {
            digits: self.digits.as_mut_ptr().cast(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
        };
        let (groups, plane, stride) = (self.groups, self.plane, self.stride);
        pool.rows(x.rows, x.width, |rows| {
            let kernel = Fill { x, rows, format, groups, plane, stride, out };
            // SAFETY: `out` has room for all rows, and each is written by one thread.
            unsafe { level.run(kernel) }
        });
    }

    /// The digits of `row`, plane after plane (rows).
    #[inline(always)]
    pub unsafe fn row(&self, row: usize, planes: usize) -> *const u8 {
        self.digits.as_ptr().cast::<u8>().add(row * planes * self.plane)
    }

    /// Scales and sums of a row, from a group on (rows).
    #[inline(always)]
    pub unsafe fn row_numbers(&self, row: usize, group: usize) -> [*const f32; 2] {
        let place = row * self.stride + group;
        [self.scales.as_ptr().add(place), self.sums.as_ptr().add(place)]
    }

    /// The digits of a group in a tile, which are `vectors` vectors.
    #[inline(always)]
    pub unsafe fn tile(&self, tile: usize, group: usize, vectors: usize) -> *const u8 {
        self.digits.as_ptr().add((tile * self.groups + group) * vectors).cast()
    }

    /// The scales of a group in a tile.
    #[inline(always)]
    pub unsafe fn tile_scales(&self, tile: usize, group: usize) -> *const f32 {
        self.scales.as_ptr().add((tile * self.groups + group) * LANES)
    }

    /// The sums of the groups from `group` on, which are as many as a row has lanes.
    #[inline(always)]
    pub unsafe fn tile_sums(&self, tile: usize, group: usize, lanes: usize) -> *const f32 {
        let place = tile * self.groups.div_ceil(lanes) + group / lanes;
        self.sums.as_ptr().add(place * LANES)
    }
}

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
type Group = [[i8; 128]; 4];

impl Kernel for Fill<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Format { group_size, nibbles, planes, shape } = self.format;
        let bits = digit_bits::<S>(nibbles);
        let mut group = [[0; 128]; 4];
        // In a row, one vector of codes holds 128 of 4 bits.
        let odd = match (nibbles, shape) {
            (true, Shape::Rows) => Some(BYTES),
            (true, _) => Some(group_size / 2),
            (false, _) => None,
        };
        for row in self.rows.clone() {
            let x = self.x.row(row).as_ptr();
            for index in 0..self.groups {
                let x = x.add(index * group_size);
                let numbers = digits::<S>(x, group_size, planes, bits, odd, &mut group);
                match shape {
                    Shape::Rows => self.place_in_row(row, index, &group, numbers),
                    _ => self.place_in_tile(row, index, &group, numbers, bits),
                }
            }
        }
    }
}

impl Fill<'_> {
    #[inline(always)]
    unsafe fn place_in_row(&self, row: usize, index: usize, group: &Group, numbers: [f32; 2]) {
        let Format { group_size, nibbles, planes, .. } = self.format;
        let number = row * self.stride + index;
        *self.out.scales.add(number) = numbers[0];
        *self.out.sums.add(number) = numbers[1];
        let first = index * group_size;
        for (plane, digits) in group.iter().enumerate().take(planes) {
            let out = self.out.digits.add((row * planes + plane) * self.plane);
            let digits = digits.as_ptr();
            if !nibbles {
                std::ptr::copy_nonoverlapping(digits, out.add(first), group_size);
                continue;
            }
            let even = out.add(first / 128 * 128 + first % 128 / 2);
            std::ptr::copy_nonoverlapping(digits, even, group_size / 2);
            std::ptr::copy_nonoverlapping(digits.add(BYTES), even.add(BYTES), group_size / 2);
        }
    }

    #[inline(always)]
    unsafe fn place_in_tile(
        &self,
        row: usize,
        index: usize,
        group: &Group,
        [scale, sum]: [f32; 2],
        bits: u32,
    ) {
        let Format { group_size, planes, shape, .. } = self.format;
        let vectors = shape.vectors(planes);
        let (tile, first) = (row / shape.rows(), row % shape.rows() * shape.lanes());
        let place = tile * self.groups + index;
        let digits = self.out.digits.add(place * (group_size / 4) * vectors * BYTES);
        let scales = self.out.scales.add(place * LANES);
        for (plane, group) in group.iter().enumerate().take(planes) {
            // The digits are lanes or vectors.
            let (vector, lane) = match vectors {
                1 => (0, first + plane),
                _ => (plane, first),
            };
            for quad in 0..group_size / 4 {
                let to = digits.add((quad * vectors + vector) * BYTES + lane * 4);
                std::ptr::copy_nonoverlapping(group.as_ptr().add(4 * quad), to, 4);
            }
            let below = if vectors == 1 { planes - 1 - plane } else { 0 };
            *scales.add(lane) = scale * (1u32 << (bits * below as u32)) as f32;
        }
        let lanes = shape.lanes();
        let place = tile * self.groups.div_ceil(lanes) + index / lanes;
        *self.out.sums.add(place * LANES + first + index % lanes) = sum;
    }
}

/// The digits of one group; those at odd places from `odd` on, where it is given.
/// -> what the last digit is worth, and the sum of the digits' x
#[inline(always)]
unsafe fn digits<S: Simd>(
    x: *const f32,
    group_size: usize,
    planes: usize,
    bits: u32,
    odd: Option<usize>,
    group: &mut Group,
) -> [f32; 2] {
    let zero = S::splat(0.0);
    let (mut peak, mut check) = (zero, zero);
    for place in (0..group_size).step_by(LANES) {
        let x = S::load(x.add(place));
        peak = S::max(peak, S::abs(x));
        check = S::fma(x, zero, check);
    }
    let base = (1u32 << bits) as f32;
    let largest = base / 2.0 - 1.0;
    let peak = S::largest(peak);
    let factor = if peak > f32::MIN_POSITIVE * 1e6 { largest / peak } else { 0.0 };
    // What is left for the next digit shall be at most its largest, which is one below its least.
    let lean = S::splat(0.5 / base);
    let mut sums = [zero; 4];
    for place in (0..group_size).step_by(2 * LANES) {
        let both = [S::load(x.add(place)), S::load(x.add(place + LANES))];
        let (both, places) = match odd {
            Some(odd) => (S::uninterleaved(both), [place / 2, odd + place / 2]),
            None => (both, [place, place + LANES]),
        };
        for half in 0..2 {
            let mut rest = S::mul(both[half], S::splat(factor));
            for plane in 0..planes {
                let leaning = if plane + 1 < planes { S::add(rest, lean) } else { rest };
                let digit = S::min(S::splat(largest), S::round(leaning));
                S::store_i8(group[plane].as_mut_ptr().add(places[half]), digit);
                sums[plane] = S::add(sums[plane], digit);
                rest = S::mul(S::sub(rest, digit), S::splat(base));
            }
        }
    }
    let (mut sum, mut worth) = (0.0, 1.0);
    for plane in 0..planes {
        sum = sum * base + S::sum(sums[plane]);
        worth *= if plane > 0 { base } else { 1.0 };
    }
    // What is no number must not become one.
    let scale = peak / largest / worth + S::sum(check);
    [scale, scale * sum]
}
