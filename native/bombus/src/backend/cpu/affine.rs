//! Products with quantized weights: `y[n] = sum over groups of scale * (codes . x) + bias * sum(x)`.
//!
//! Few rows of x: each row of weights is read once and multiplied with all of them, its codes
//! never leaving registers. Many rows: the codes of some rows of weights are unpacked once, and
//! multiplied with as many rows of x as a vector's lanes hold. The weights are read where the
//! file is mapped; nothing is repacked.

use super::codes;
use super::digits::{Digits, Format, Shape, digit_bits};
use super::float::Float;
use super::simd::{BYTES, Kernel, LANES, Simd, prefetch};
use super::tensor::Shared;
use crate::backend::{LinearWeights, QuantizedWeights};
use crate::config::Quantization;
use crate::error::Result;
use crate::mapped_file::Mapped;
use std::cell::RefCell;
use std::ops::Range;

/// How far ahead of its use a row's codes are asked for. Measured: bench/README.md.
const AHEAD: usize = 8192;
/// Up to this many rows of x are multiplied one by one.
const FEW: usize = 2;
/// The bytes of x that one pass over the weights may take: they shall stay in the L2 cache.
const BLOCK: usize = 384 * 1024;

/// `[rows, columns]`, as it lies in the file.
pub struct Affine {
    codes: Mapped,
    scales: Mapped,
    biases: Mapped,
    float: Float,
    layout: Quantization,
    pub rows: usize,
    pub columns: usize,
}

impl Affine {
    pub fn new(weights: &LinearWeights, quantized: &QuantizedWeights) -> Result<Self> {
        let layout = quantized.layout;
        Ok(Self {
            codes: weights.weight.map(),
            scales: quantized.scales.map(),
            biases: quantized.biases.map(),
            float: Float::of(quantized.scales.dtype)?,
            layout,
            rows: weights.out_features,
            columns: quantized.scales.shape[1] * layout.group_size,
        })
    }

    /// How `rows` rows of x must be written for `Product`.
    pub fn format(&self, rows: usize) -> Format {
        let planes = if self.float == Float::F32 { 3 } else { 2 };
        let shape = match (rows, planes) {
            (..=FEW, _) => Shape::Rows,
            (..=4, 2) => Shape::Fours,
            (..=8, 2) => Shape::Pairs,
            _ => Shape::Tile,
        };
        let Quantization { group_size, bits } = self.layout;
        Format { group_size, nibbles: bits == 4, planes, shape }
    }

    pub fn tensors(&self) -> [&Mapped; 3] {
        [&self.codes, &self.scales, &self.biases]
    }

    /// Row n as floats.
    pub fn dequantize(&self, n: usize, out: &mut [f32]) {
        let (groups, float) = (self.groups(), self.float.bytes());
        let mut codes = vec![0; out.len()];
        // SAFETY: n is a row.
        codes::unpack(unsafe { self.row(n) }, self.layout.bits, &mut codes);
        let numbers =
            |of: &Mapped| self.float.to_f32(&of.copy(n * groups * float..(n + 1) * groups * float));
        let (scales, biases) = (numbers(&self.scales), numbers(&self.biases));
        for (place, (out, code)) in out.iter_mut().zip(codes).enumerate() {
            let group = place / self.layout.group_size;
            *out = scales[group] * f32::from(code) + biases[group];
        }
    }

    fn groups(&self) -> usize {
        self.columns / self.layout.group_size
    }

    #[inline(always)]
    unsafe fn row(&self, n: usize) -> &[u8] {
        let bytes = self.columns * self.layout.bits / 8;
        std::slice::from_raw_parts(self.codes.as_ptr().add(n * bytes), bytes)
    }

    /// Scales and biases `group..group + count` of row n.
    #[inline(always)]
    unsafe fn numbers<S: Simd>(&self, n: usize, group: usize, count: usize) -> [S::F; 2] {
        let place = n * self.groups() + group;
        [
            self.float.load::<S>(self.scales.as_ptr(), place, count),
            self.float.load::<S>(self.biases.as_ptr(), place, count),
        ]
    }
}

/// Columns `range` of y, whose rows are `stride` numbers apart.
pub struct Product<'a> {
    pub affine: &'a Affine,
    pub x: &'a Digits,
    pub format: Format,
    pub range: Range<usize>,
    pub y: Shared,
    pub stride: usize,
}

/// Unpacked codes, and the scales and biases of some rows of weights.
type Scratch = (Vec<u8>, Vec<f32>);

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // Taken, not borrowed in a closure: that would be compiled without the extension.
        let mut scratch = SCRATCH.take();
        match (self.format.shape, self.format.planes, S::ACCUMULATORS) {
            (Shape::Rows, 2, _) => self.few::<S, 2>(&mut scratch.0),
            (Shape::Rows, ..) => self.few::<S, 3>(&mut scratch.0),
            (Shape::Fours, _, 24..) => self.many::<S, 1, 24, 2>(&mut scratch),
            (Shape::Fours, _, 6..) => self.many::<S, 1, 6, 2>(&mut scratch),
            (Shape::Fours, ..) => self.many::<S, 1, 4, 2>(&mut scratch),
            (Shape::Pairs, _, 24..) => self.many::<S, 1, 24, 1>(&mut scratch),
            (Shape::Pairs, _, 6..) => self.many::<S, 1, 6, 1>(&mut scratch),
            (Shape::Pairs, ..) => self.many::<S, 1, 4, 1>(&mut scratch),
            (Shape::Tile, 2, 24..) => self.many::<S, 2, 12, 1>(&mut scratch),
            (Shape::Tile, 2, 6..) => self.many::<S, 2, 3, 1>(&mut scratch),
            (Shape::Tile, 2, _) => self.many::<S, 2, 2, 1>(&mut scratch),
            (Shape::Tile, _, 24..) => self.many::<S, 3, 8, 1>(&mut scratch),
            (Shape::Tile, _, 6..) => self.many::<S, 3, 2, 1>(&mut scratch),
            (Shape::Tile, ..) => self.many::<S, 3, 1, 1>(&mut scratch),
        }
        SCRATCH.set(scratch);
    }
}

impl Product<'_> {
    #[inline(always)]
    unsafe fn few<S: Simd, const P: usize>(&self, codes: &mut Vec<u8>) {
        match (self.format.nibbles, self.x.rows) {
            (true, 1) => self.row_by_row::<S, P, 1, true>(codes),
            (true, _) => self.row_by_row::<S, P, FEW, true>(codes),
            (false, 1) => self.row_by_row::<S, P, 1, false>(codes),
            (false, _) => self.row_by_row::<S, P, FEW, false>(codes),
        }
    }

    #[inline(always)]
    unsafe fn row_by_row<S: Simd, const P: usize, const M: usize, const NIBBLES: bool>(
        &self,
        scratch: &mut Vec<u8>,
    ) {
        let affine = self.affine;
        let as_they_are = matches!(affine.layout.bits, 4 | 8);
        scratch.resize(affine.columns, 0);
        for n in self.range.clone() {
            let row = affine.row(n);
            let codes = match as_they_are {
                true => row.as_ptr(),
                false => {
                    codes::unpack(row, affine.layout.bits, scratch);
                    scratch.as_ptr()
                }
            };
            let y = self.dot_row::<S, P, M, NIBBLES>(n, codes);
            for m in 0..M {
                *self.y.at(m * self.stride + n) = y[m];
            }
        }
    }

    /// Row n of the weights with each row of x. `codes` are nibbles or bytes.
    #[inline(always)]
    unsafe fn dot_row<S: Simd, const P: usize, const M: usize, const NIBBLES: bool>(
        &self,
        n: usize,
        codes: *const u8,
    ) -> [f32; M] {
        let affine = self.affine;
        let (groups, in_vector) = (affine.groups(), if NIBBLES { 2 * BYTES } else { BYTES });
        // A table has the scales of 16 groups, which are `step` vectors of codes.
        let step = LANES * self.format.group_size / in_vector;
        let bytes = affine.columns * BYTES / in_vector;
        let whole = bytes / BYTES;
        let row = Row { x: self.x, shift: step.trailing_zeros(), bits: digit_bits::<S>(NIBBLES) };
        let mut acc = [S::splat(0.0); M];
        let mut offset = [S::splat(0.0); M];
        for chunk in 0..groups.div_ceil(LANES) {
            let first = chunk * LANES;
            let [scales, biases] = affine.numbers::<S>(n, first, LANES.min(groups - first));
            let ahead = (n * groups + first) * affine.float.bytes() + AHEAD / 16;
            prefetch(affine.scales.as_ptr().wrapping_add(ahead));
            prefetch(affine.biases.as_ptr().wrapping_add(ahead));
            let mut tables = [S::table(scales); M];
            for m in 0..M {
                let [scale, sum] = self.x.row_numbers(m, first);
                tables[m] = S::table(S::mul(scales, S::load(scale)));
                offset[m] = S::fma(biases, S::load(sum), offset[m]);
            }
            let start = chunk * step;
            let here = step.min(whole.saturating_sub(start));
            for local in 0..here {
                let codes = codes.add((start + local) * BYTES);
                prefetch(codes.wrapping_add(AHEAD));
                let codes = S::bytes(codes);
                row.block::<S, P, M, NIBBLES>(codes, start + local, local, &tables, &mut acc);
            }
            if here < step && bytes % BYTES > 0 && start + here == whole {
                let codes = S::bytes_part(codes.add(whole * BYTES), bytes % BYTES);
                row.block::<S, P, M, NIBBLES>(codes, whole, here, &tables, &mut acc);
            }
        }
        let mut y = [0.0; M];
        for m in 0..M {
            y[m] = S::sum(S::add(acc[m], offset[m]));
        }
        y
    }

    /// Tiles of N rows of weights and 16 lanes of x; a lane has V digits and Q quads at a time.
    #[inline(always)]
    unsafe fn many<S: Simd, const V: usize, const N: usize, const Q: usize>(
        &self,
        (codes, numbers): &mut Scratch,
    ) {
        let columns = self.affine.columns;
        let stride = self.affine.groups().next_multiple_of(LANES);
        codes.resize(N * columns, 0);
        numbers.resize(2 * N * stride, 0.0);
        let tile_rows = self.format.shape.rows();
        let tiles = self.x.rows.div_ceil(tile_rows);
        let block = (BLOCK / (columns * V * LANES / Q)).max(1);
        for first_tile in (0..tiles).step_by(block) {
            for first in self.range.clone().step_by(N) {
                let count = N.min(self.range.end - first);
                self.unpack::<S>(first, count, codes, numbers);
                for tile in first_tile..tiles.min(first_tile + block) {
                    let mut out = [[0.0; LANES]; N];
                    self.tile::<S, V, N, Q>(codes, numbers, tile, &mut out);
                    let rows = tile_rows.min(self.x.rows - tile * tile_rows);
                    self.store(tile * tile_rows, rows, first, &out[..count]);
                }
            }
        }
    }

    /// Columns `first..` of some rows of y, from lanes.
    #[inline(always)]
    unsafe fn store(&self, row: usize, rows: usize, first: usize, out: &[[f32; LANES]]) {
        let lanes = LANES / self.format.shape.rows();
        for place in 0..rows {
            let y = self.y.at((row + place) * self.stride + first);
            for (n, out) in out.iter().enumerate() {
                *y.add(n) = out[place * lanes..][..lanes].iter().sum();
            }
        }
    }

    /// Rows `first..first + count`: `codes` is `[row][column]`, `numbers` `[row][2][group]`.
    #[inline(always)]
    unsafe fn unpack<S: Simd>(
        &self,
        first: usize,
        count: usize,
        codes: &mut [u8],
        numbers: &mut [f32],
    ) {
        let Affine { layout, columns, .. } = *self.affine;
        let groups = self.affine.groups();
        let stride = groups.next_multiple_of(LANES);
        for place in 0..count {
            let row = self.affine.row(first + place);
            for line in (0..row.len()).step_by(BYTES) {
                prefetch(row.as_ptr().wrapping_add(line + AHEAD));
            }
            let codes = &mut codes[place * columns..][..columns];
            match layout.bits {
                4 => codes::unpack_nibbles::<S>(row, layout.group_size, codes.as_mut_ptr()),
                8 => codes.copy_from_slice(row),
                bits => codes::unpack(row, bits, codes),
            }
            let numbers = numbers[2 * place * stride..][..2 * stride].as_mut_ptr();
            for group in (0..groups).step_by(LANES) {
                let count = LANES.min(groups - group);
                let [scales, biases] = self.affine.numbers::<S>(first + place, group, count);
                S::store(numbers.add(group), scales);
                S::store(numbers.add(stride + group), biases);
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const V: usize, const N: usize, const Q: usize>(
        &self,
        codes: &[u8],
        numbers: &[f32],
        tile: usize,
        out: &mut [[f32; LANES]; N],
    ) {
        let (columns, groups) = (self.affine.columns, self.affine.groups());
        let stride = groups.next_multiple_of(LANES);
        let group_size = self.format.group_size;
        let steps = group_size / 4 / Q;
        let bits = digit_bits::<S>(self.format.nibbles);
        for group in 0..groups {
            let mut acc = [[S::izero(); V]; N];
            let digits = self.x.tile(tile, group, steps * V);
            let codes = codes.as_ptr().add(group * group_size);
            for step in 0..steps {
                let mut x = [S::bytes(digits); V];
                for v in 0..V {
                    x[v] = S::bytes(digits.add((step * V + v) * BYTES));
                }
                for n in 0..N {
                    let codes = codes.add(n * columns + 4 * Q * step);
                    let codes = if Q == 2 { S::bytes_splat8(codes) } else { S::bytes_splat(codes) };
                    for v in 0..V {
                        acc[n][v] = S::dot(acc[n][v], codes, x[v]);
                    }
                }
            }
            let [scale, sum] = self.x.tile_numbers(tile, group);
            let (scale, sum) = (S::load(scale), S::load(sum));
            for n in 0..N {
                let product = joined::<S, V>(acc[n], bits);
                let number = numbers.as_ptr().add(2 * n * stride + group);
                let y = out[n].as_mut_ptr();
                let offset = S::fma(S::splat(*number.add(stride)), sum, S::load(y));
                S::store(y, S::fma(product, S::mul(S::splat(*number), scale), offset));
            }
        }
    }
}

/// The sums of V digits' products, in units of the last.
#[inline(always)]
unsafe fn joined<S: Simd, const V: usize>(acc: [S::I; V], bits: u32) -> S::F {
    if V == 1 {
        return S::float(acc[0]);
    }
    let first = S::iadd(S::shift(acc[0], bits), acc[1]);
    if V == 2 {
        return S::float(first);
    }
    S::fma(S::float(first), S::splat((1u32 << bits) as f32), S::float(acc[V - 1]))
}

/// What a row of weights meets.
struct Row<'a> {
    x: &'a Digits,
    shift: u32,
    /// of a digit
    bits: u32,
}

impl Row<'_> {
    /// Vector number `block` of the row, the `local`th of its tables.
    #[inline(always)]
    unsafe fn block<S: Simd, const P: usize, const M: usize, const NIBBLES: bool>(
        &self,
        codes: S::B,
        block: usize,
        local: usize,
        tables: &[S::Table; M],
        acc: &mut [S::F; M],
    ) {
        let nibbles = S::nibbles(codes);
        for m in 0..M {
            let mut dots = [S::izero(); P];
            for p in 0..P {
                // The second digit's products are added to the first's, in its units.
                let before = if p == 1 { S::shift(dots[0], self.bits) } else { S::izero() };
                let digits = self.x.row(m, P).add(p * self.x.plane);
                dots[p] = if NIBBLES {
                    let digits = digits.add(block * 2 * BYTES);
                    let even = S::dot(before, nibbles[0], S::bytes(digits));
                    S::dot(even, nibbles[1], S::bytes(digits.add(BYTES)))
                } else {
                    S::dot(before, codes, S::bytes(digits.add(block * BYTES)))
                };
            }
            let mut product = S::float(dots[1]);
            if P == 3 {
                let base = S::splat((1u32 << self.bits) as f32);
                product = S::fma(product, base, S::float(dots[P - 1]));
            }
            acc[m] = S::fma(product, S::expand(&tables[m], local, self.shift), acc[m]);
        }
    }
}
