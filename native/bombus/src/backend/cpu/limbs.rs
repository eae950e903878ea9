//! Activations as limbs: whole numbers of 8 bits, for exact products with quantized weights.
//!
//! For each group of weights that share a scale, x is written with signed limbs of 8 bits:
//! `x = scale * (256 * l0 + l1)`, where the largest |x| of the group makes l0 the largest limb.
//! Two limbs are more exact than bf16 (an error of 2^-16 of the group's largest, where bf16 has
//! 2^-9 of x), three are f32 (2^-24). Where the instructions take limbs of 7 bits beside large
//! codes, those are four. A dot product of codes and limbs is exact, and `sum` is of the limbs
//! themselves, so that an error of x meets the weight, and not the code, which is further from
//! zero.

use super::pool::Pool;
use super::simd::{BYTES, Kernel, LANES, Level, Simd};
use super::tensor::Tensor;
use std::ops::Range;

/// How the limbs of some rows lie, so that they meet the codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Format {
    pub group_size: usize,
    /// Codes of 4 bits, two in a byte: the limbs at even places are met first, then the others.
    pub int4: bool,
    pub limbs: usize,
    pub shape: Shape,
}

/// What the lanes of a vector are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// Quads of one limb of one row. `[row][limb][k]`
    Rows,
    /// One quad of both limbs of 8 rows. `[tile][group][quad][row][limb][4]`
    Eights,
    /// One quad of one limb of 16 rows. `[tile][group][quad][limb][row][4]`
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
    fn vectors(self, limbs: usize) -> usize {
        if self == Shape::Sixteens { limbs } else { 1 }
    }
}

/// The bits of a limb beside codes of this kind.
#[inline(always)]
pub fn limb_bits<S: Simd>(int4: bool) -> u32 {
    if int4 { 8 } else { S::LIMB_BITS }
}

/// The limbs of x: `[rows, width]`.
#[derive(Default)]
pub struct Limbs {
    pub rows: usize,
    pub groups: usize,
    /// The bytes from one limb of a row to the next, in the shape of rows.
    pub limb_stride: usize,
    data: Vec<Line>,
    /// Rows: what the last limb is worth, `[row][group]`; else what the lane's is, `[tile][group][lane]`
    scales: Vec<f32>,
    /// The sum of each group of x, as the limbs have it. Rows: `[row][group]`, else
    /// `[tile][groups][row][group]` with as many groups at once as a row has lanes.
    sums: Vec<f32>,
    /// Rows: the groups of a row in `scales`, with room for a whole vector at the last.
    stride: usize,
}

/// 64 limbs, which one load takes without crossing a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [i8; BYTES]);

impl Limbs {
    pub fn fill(&mut self, level: Level, pool: &Pool, x: &Tensor, format: Format) {
        let Format { group_size, limbs, shape, .. } = format;
        self.rows = x.rows;
        self.groups = x.width / group_size;
        self.limb_stride = x.width.next_multiple_of(2 * BYTES);
        self.stride = self.groups.next_multiple_of(LANES);
        let tiles = x.rows.div_ceil(shape.rows());
        let (data, scales, sums) = match shape {
            Shape::Rows => {
                (x.rows * limbs * self.limb_stride, x.rows * self.stride, x.rows * self.stride)
            }
            _ => (
                tiles * shape.rows() * limbs * x.width,
                tiles * self.groups * LANES,
                tiles * self.groups.div_ceil(shape.lanes()) * LANES,
            ),
        };
        self.data.resize(data / BYTES, Line([0; BYTES]));
        // The places behind the last group must be zero in whatever the vectors read.
        if shape == Shape::Rows {
            self.data.fill(Line([0; BYTES]));
        }
        for (numbers, count) in [(&mut self.scales, scales), (&mut self.sums, sums)] {
            numbers.clear();
            numbers.resize(count, 0.0);
        }
        let out = Out {
            data: self.data.as_mut_ptr().cast(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
        };
        let (groups, limb_stride, stride) = (self.groups, self.limb_stride, self.stride);
        pool.rows(x.rows, x.width, |rows| {
            let kernel = Fill { x, rows, format, groups, limb_stride, stride, out };
            // SAFETY: `out` has room for all rows, and each is written by one thread.
            unsafe { level.run(kernel) }
        });
    }

    /// The limbs of `row`, limb after limb (rows).
    ///
    /// # Safety
    /// `row` is one of these, written as rows with so many limbs.
    #[inline(always)]
    pub unsafe fn row(&self, row: usize, limbs: usize) -> *const u8 {
        self.data.as_ptr().cast::<u8>().add(row * limbs * self.limb_stride)
    }

    /// Scales and sums of a row, from a group on (rows).
    ///
    /// # Safety
    /// `row` is one of these, written as rows, and has the group.
    #[inline(always)]
    pub unsafe fn row_numbers(&self, row: usize, group: usize) -> [*const f32; 2] {
        let place = row * self.stride + group;
        [self.scales.as_ptr().add(place), self.sums.as_ptr().add(place)]
    }

    /// The limbs of a group in a tile, which are `vectors` vectors.
    ///
    /// # Safety
    /// They were written as tiles; `tile` has the group, whose vectors are as many.
    #[inline(always)]
    pub unsafe fn tile(&self, tile: usize, group: usize, vectors: usize) -> *const u8 {
        self.data.as_ptr().add((tile * self.groups + group) * vectors).cast()
    }

    /// The scales of a group in a tile.
    ///
    /// # Safety
    /// They were written as tiles; `tile` has the group.
    #[inline(always)]
    pub unsafe fn tile_scales(&self, tile: usize, group: usize) -> *const f32 {
        self.scales.as_ptr().add((tile * self.groups + group) * LANES)
    }

    /// The sums of the groups from `group` on, which are as many as a row has lanes.
    ///
    /// # Safety
    /// They were written as tiles of so many lanes a row; `tile` has the group.
    #[inline(always)]
    pub unsafe fn tile_sums(&self, tile: usize, group: usize, lanes: usize) -> *const f32 {
        let place = tile * self.groups.div_ceil(lanes) + group / lanes;
        self.sums.as_ptr().add(place * LANES)
    }
}

#[derive(Clone, Copy)]
struct Out {
    data: *mut i8,
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
    limb_stride: usize,
    stride: usize,
    out: Out,
}

/// The limbs of one group, limb after limb.
type Group = [[i8; 128]; 4];

impl Kernel for Fill<'_> {
    type Output = ();

    /// # Safety
    /// `out` has room for all rows in this format, and these are no other thread's.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Format { group_size, int4, limbs, shape } = self.format;
        let bits = limb_bits::<S>(int4);
        let mut group = [[0; 128]; 4];
        // In a row, one vector of codes holds 128 of 4 bits.
        let odd = match (int4, shape) {
            (true, Shape::Rows) => Some(BYTES),
            (true, _) => Some(group_size / 2),
            (false, _) => None,
        };
        for row in self.rows.clone() {
            let x = self.x.row(row).as_ptr();
            for index in 0..self.groups {
                let x = x.add(index * group_size);
                let numbers = write_group::<S>(x, group_size, limbs, bits, odd, &mut group);
                match shape {
                    Shape::Rows => self.place_in_row(row, index, &group, numbers),
                    _ => self.place_in_tile(row, index, &group, numbers, bits),
                }
            }
        }
    }
}

impl Fill<'_> {
    /// # Safety
    /// As `run`; `row` and `index` are a row and a group, and the format is of rows.
    #[inline(always)]
    unsafe fn place_in_row(&self, row: usize, index: usize, group: &Group, numbers: [f32; 2]) {
        let Format { group_size, int4, limbs, .. } = self.format;
        let number = row * self.stride + index;
        *self.out.scales.add(number) = numbers[0];
        *self.out.sums.add(number) = numbers[1];
        let first = index * group_size;
        for (limb, data) in group.iter().enumerate().take(limbs) {
            let out = self.out.data.add((row * limbs + limb) * self.limb_stride);
            let data = data.as_ptr();
            if !int4 {
                std::ptr::copy_nonoverlapping(data, out.add(first), group_size);
                continue;
            }
            let even = out.add(first / 128 * 128 + first % 128 / 2);
            std::ptr::copy_nonoverlapping(data, even, group_size / 2);
            std::ptr::copy_nonoverlapping(data.add(BYTES), even.add(BYTES), group_size / 2);
        }
    }

    /// # Safety
    /// As `run`; `row` and `index` are a row and a group, and the format is of tiles.
    #[inline(always)]
    unsafe fn place_in_tile(
        &self,
        row: usize,
        index: usize,
        group: &Group,
        [scale, sum]: [f32; 2],
        bits: u32,
    ) {
        let Format { group_size, limbs, shape, .. } = self.format;
        let vectors = shape.vectors(limbs);
        let (tile, first) = (row / shape.rows(), row % shape.rows() * shape.lanes());
        let place = tile * self.groups + index;
        let data = self.out.data.add(place * (group_size / 4) * vectors * BYTES);
        let scales = self.out.scales.add(place * LANES);
        for (limb, group) in group.iter().enumerate().take(limbs) {
            // The limbs are lanes or vectors.
            let (vector, lane) = match vectors {
                1 => (0, first + limb),
                _ => (limb, first),
            };
            for quad in 0..group_size / 4 {
                let to = data.add((quad * vectors + vector) * BYTES + lane * 4);
                std::ptr::copy_nonoverlapping(group.as_ptr().add(4 * quad), to, 4);
            }
            let below = if vectors == 1 { limbs - 1 - limb } else { 0 };
            *scales.add(lane) = scale * (1u32 << (bits * below as u32)) as f32;
        }
        let lanes = shape.lanes();
        let place = tile * self.groups.div_ceil(lanes) + index / lanes;
        *self.out.sums.add(place * LANES + first + index % lanes) = sum;
    }
}

/// The limbs of one group; those at odd places from `odd` on, where it is given.
/// -> what the last limb is worth, and the sum of the limbs' x
///
/// # Safety
/// The machine has S's level; `x` has `group_size` numbers, a multiple of 32 up to 128.
#[inline(always)]
unsafe fn write_group<S: Simd>(
    x: *const f32,
    group_size: usize,
    limbs: usize,
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
    // What is left for the next limb shall be at most its largest, which is one below its least.
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
            for limb in 0..limbs {
                let leaning = if limb + 1 < limbs { S::add(rest, lean) } else { rest };
                let value = S::min(S::splat(largest), S::round(leaning));
                S::store_i8(group[limb].as_mut_ptr().add(places[half]), value);
                sums[limb] = S::add(sums[limb], value);
                rest = S::mul(S::sub(rest, value), S::splat(base));
            }
        }
    }
    let (mut sum, mut worth) = (0.0, 1.0);
    for limb in 0..limbs {
        sum = sum * base + S::sum(sums[limb]);
        worth *= if limb > 0 { base } else { 1.0 };
    }
    // NaN must stay NaN.
    let scale = peak / largest / worth + S::sum(check);
    [scale, scale * sum]
}
