//! Products with quantized weights: `y[n] = sum over groups of scale * (codes . x) + bias * sum(x)`.
//!
//! Few rows of x: each row of weights is read once and multiplied with all of them, its codes
//! never leaving registers. Many rows: the codes of some rows of weights are unpacked once, and
//! multiplied with sixteen rows of x at a time, one in each lane. The weights are read where the
//! file is mapped; nothing is repacked.

use super::codes;
use super::digits::{Digits, Format, largest_digit};
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
pub const FEW: usize = 3;
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

    /// How `rows` rows of x must be written for `product`.
    pub fn format(&self, rows: usize) -> Format {
        Format {
            group_size: self.layout.group_size,
            nibbles: self.layout.bits == 4,
            planes: if self.float == Float::F32 { 3 } else { 2 },
            tiled: rows > FEW,
        }
    }

    pub fn tensors(&self) -> [&Mapped; 3] {
        [&self.codes, &self.scales, &self.biases]
    }

    fn groups(&self) -> usize {
        self.columns / self.layout.group_size
    }

    /// The bytes of a row of codes.
    fn row_bytes(&self) -> usize {
        self.columns * self.layout.bits / 8
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

    #[inline(always)]
    unsafe fn row(&self, n: usize) -> &[u8] {
        let bytes = self.row_bytes();
        std::slice::from_raw_parts(self.codes.as_ptr().add(n * bytes), bytes)
    }

    /// Scales and biases `group..group + count` of row n.
    #[inline(always)]
    unsafe fn numbers<S: Simd>(&self, n: usize, group: usize, count: usize) -> [S::F; 2] {
        let place = n * self.groups() + group;
        unsafe {
            [
                self.float.load::<S>(self.scales.as_ptr(), place, count),
                self.float.load::<S>(self.biases.as_ptr(), place, count),
            ]
        }
    }
}

/// Columns `range` of y: `[x.rows, stride]`.
pub struct Product<'a> {
    pub affine: &'a Affine,
    pub x: &'a Digits,
    pub format: Format,
    pub range: Range<usize>,
    pub y: Shared,
    pub stride: usize,
}

thread_local! {
    /// Unpacked codes and numbers of some rows of weights.
    static SCRATCH: RefCell<(Vec<u8>, Vec<f32>)> = RefCell::default();
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        SCRATCH.with_borrow_mut(|(codes, numbers)| {
            match (self.format.tiled, self.format.planes, S::ACCUMULATORS) {
                (false, 2, _) => self.few::<S, 2>(codes),
                (false, _, _) => self.few::<S, 3>(codes),
                (true, 2, 24..) => self.many::<S, 2, 12>(codes, numbers),
                (true, 2, 6..) => self.many::<S, 2, 3>(codes, numbers),
                (true, 2, _) => self.many::<S, 2, 2>(codes, numbers),
                (true, _, 24..) => self.many::<S, 3, 8>(codes, numbers),
                (true, _, 6..) => self.many::<S, 3, 2>(codes, numbers),
                (true, _, _) => self.many::<S, 3, 1>(codes, numbers),
            }
        });
    }
}

impl Product<'_> {
    #[inline(always)]
    unsafe fn few<S: Simd, const P: usize>(&self, codes: &mut Vec<u8>) {
        match (self.format.nibbles, self.x.rows) {
            (true, 1) => self.row_by_row::<S, P, 1, true>(codes),
            (true, 2) => self.row_by_row::<S, P, 2, true>(codes),
            (true, _) => self.row_by_row::<S, P, 3, true>(codes),
            (false, 1) => self.row_by_row::<S, P, 1, false>(codes),
            (false, 2) => self.row_by_row::<S, P, 2, false>(codes),
            (false, _) => self.row_by_row::<S, P, 3, false>(codes),
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
            let y = match as_they_are {
                true => self.dot_row::<S, P, M, NIBBLES>(n, row.as_ptr()),
                false => {
                    codes::unpack(row, affine.layout.bits, scratch);
                    self.dot_row::<S, P, M, NIBBLES>(n, scratch.as_ptr())
                }
            };
            for (m, y) in y.into_iter().enumerate() {
                *self.y.at(m * self.stride + n) = y;
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
        let group_size = self.format.group_size;
        let (groups, in_vector) = (affine.groups(), if NIBBLES { 2 * BYTES } else { BYTES });
        let step = LANES * group_size / in_vector;
        let bytes = affine.columns * BYTES / in_vector;
        let whole = bytes / BYTES;
        let row = Row::<M, P> {
            digits: std::array::from_fn(|m| unsafe { self.x.row(m, P) }),
            plane: self.x.plane,
            shift: step.trailing_zeros(),
            base: 1.0 / (2.0 * f32::from(largest_digit::<S>(NIBBLES))),
        };
        unsafe {
            let mut acc = [S::splat(0.0); M];
            let mut offset = [S::splat(0.0); M];
            for chunk in 0..groups.div_ceil(LANES) {
                let first = chunk * LANES;
                let [scales, biases] = affine.numbers::<S>(n, first, LANES.min(groups - first));
                let float = affine.float.bytes();
                let ahead = (n * groups + first) * float + AHEAD / 16;
                prefetch(affine.scales.as_ptr().wrapping_add(ahead));
                prefetch(affine.biases.as_ptr().wrapping_add(ahead));
                let mut tables = [S::table(scales); M];
                for m in 0..M {
                    let [scale, sum] = self.x.row_numbers(m, first);
                    tables[m] = S::table(S::mul(scales, S::load(scale)));
                    offset[m] = S::fma(biases, S::load(sum), offset[m]);
                }
                let end = (chunk + 1) * step;
                for block in chunk * step..end.min(whole) {
                    let codes = codes.add(block * BYTES);
                    prefetch(codes.wrapping_add(AHEAD));
                    let codes = S::bytes(codes);
                    row.block::<S, NIBBLES>(codes, block, block % step, &tables, &mut acc);
                }
                if end > whole && whole * BYTES < bytes && whole >= chunk * step {
                    let codes = S::bytes_part(codes.add(whole * BYTES), bytes % BYTES);
                    row.block::<S, NIBBLES>(codes, whole, whole % step, &tables, &mut acc);
                }
            }
            let mut y = [0.0; M];
            for m in 0..M {
                y[m] = S::sum(S::add(acc[m], offset[m]));
            }
            y
        }
    }

    /// Tiles of N rows of weights and 16 rows of x.
    #[inline(always)]
    unsafe fn many<S: Simd, const P: usize, const N: usize>(
        &self,
        codes: &mut Vec<u8>,
        numbers: &mut Vec<f32>,
    ) {
        let (columns, groups) = (self.affine.columns, self.affine.groups());
        codes.resize(N * columns, 0);
        numbers.resize(2 * N * groups, 0.0);
        let tiles = self.x.rows.div_ceil(LANES);
        let block = (BLOCK / (columns * P * LANES)).max(1);
        for first_tile in (0..tiles).step_by(block) {
            for first in self.range.clone().step_by(N) {
                let count = N.min(self.range.end - first);
                self.unpack::<S>(first, count, codes, numbers);
                for tile in first_tile..tiles.min(first_tile + block) {
                    let mut out = [[0.0; LANES]; N];
                    self.tile::<S, P, N>(codes, numbers, tile, &mut out);
                    let rows = LANES.min(self.x.rows - tile * LANES);
                    for lane in 0..rows {
                        let y = (tile * LANES + lane) * self.stride + first;
                        for (n, out) in out.iter().enumerate().take(count) {
                            *self.y.at(y + n) = out[lane];
                        }
                    }
                }
            }
        }
    }

    /// Rows `first..first + count`: `codes` is `[row][column]`, `numbers` `[row][group][2]`.
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
        for (place, codes) in codes.chunks_exact_mut(columns).enumerate().take(count) {
            let row = self.affine.row(first + place);
            for line in (0..row.len()).step_by(BYTES) {
                prefetch(row.as_ptr().wrapping_add(line + AHEAD));
            }
            match layout.bits {
                4 => codes::unpack_nibbles::<S>(row, layout.group_size, codes),
                8 => codes.copy_from_slice(row),
                bits => codes::unpack(row, bits, codes),
            }
            let numbers = &mut numbers[2 * place * groups..][..2 * groups];
            for group in (0..groups).step_by(LANES) {
                let count = LANES.min(groups - group);
                let both = self.affine.numbers::<S>(first + place, group, count);
                let mut pair = [[0.0; LANES]; 2];
                S::store(pair[0].as_mut_ptr(), both[0]);
                S::store(pair[1].as_mut_ptr(), both[1]);
                for lane in 0..count {
                    numbers[2 * (group + lane)] = pair[0][lane];
                    numbers[2 * (group + lane) + 1] = pair[1][lane];
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const P: usize, const N: usize>(
        &self,
        codes: &[u8],
        numbers: &[f32],
        tile: usize,
        out: &mut [[f32; LANES]; N],
    ) {
        let (columns, groups) = (self.affine.columns, self.affine.groups());
        let group_size = self.format.group_size;
        let base = 1.0 / (2.0 * f32::from(largest_digit::<S>(self.format.nibbles)));
        unsafe {
            let base = S::splat(base);
            for group in 0..groups {
                let mut acc = [[S::izero(); P]; N];
                let digits = self.x.tile(tile, group, group_size, P);
                let codes = codes.as_ptr().add(group * group_size);
                for quad in 0..group_size / 4 {
                    let mut x = [S::bytes(digits); P];
                    for p in 0..P {
                        x[p] = S::bytes(digits.add((quad * P + p) * BYTES));
                    }
                    for n in 0..N {
                        let four = S::bytes_splat(codes.add(n * columns + 4 * quad));
                        for p in 0..P {
                            acc[n][p] = S::dot(acc[n][p], four, x[p]);
                        }
                    }
                }
                let [scale, sum] = self.x.tile_numbers(tile, group);
                let (scale, sum) = (S::load(scale), S::load(sum));
                for n in 0..N {
                    let mut product = S::float(acc[n][P - 1]);
                    for p in (0..P - 1).rev() {
                        product = S::fma(product, base, S::float(acc[n][p]));
                    }
                    let number = numbers.as_ptr().add(2 * (n * groups + group));
                    let y = out[n].as_mut_ptr();
                    let offset = S::fma(S::splat(*number.add(1)), sum, S::load(y));
                    S::store(y, S::fma(product, S::mul(S::splat(*number), scale), offset));
                }
            }
        }
    }
}

/// What a row of weights meets.
struct Row<const M: usize, const P: usize> {
    digits: [*const u8; M],
    plane: usize,
    shift: u32,
    /// What a digit is worth in units of the one before.
    base: f32,
}

impl<const M: usize, const P: usize> Row<M, P> {
    /// Vector number `block` of the row, the `local`th of its tables.
    #[inline(always)]
    unsafe fn block<S: Simd, const NIBBLES: bool>(
        &self,
        codes: S::B,
        block: usize,
        local: usize,
        tables: &[S::Table; M],
        acc: &mut [S::F; M],
    ) {
        unsafe {
            let nibbles = S::nibbles(codes);
            for m in 0..M {
                let mut product = S::splat(0.0);
                for p in (0..P).rev() {
                    let digits = self.digits[m].add(p * self.plane);
                    let dot = if NIBBLES {
                        let digits = digits.add(block * 2 * BYTES);
                        let even = S::dot(S::izero(), nibbles[0], S::bytes(digits));
                        S::dot(even, nibbles[1], S::bytes(digits.add(BYTES)))
                    } else {
                        S::dot(S::izero(), codes, S::bytes(digits.add(block * BYTES)))
                    };
                    product = match p == P - 1 {
                        true => S::float(dot),
                        false => S::fma(product, S::splat(self.base), S::float(dot)),
                    };
                }
                let scale = S::expand(&tables[m], local, self.shift);
                acc[m] = S::fma(product, scale, acc[m]);
            }
        }
    }
}
