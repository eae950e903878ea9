//! Products with quantized weights: `y[n] = sum over groups of scale * (codes . x) + bias * sum(x)`.
//!
//! Few rows of x: each row of weights is read once and multiplied with all of them, its codes
//! never leaving registers. Many rows: the codes of some rows of weights are unpacked once, and
//! multiplied with as many rows of x as a vector's lanes hold. The weights are read where the
//! file is mapped; nothing is repacked.

use super::codes;
use super::float::Float;
use super::limbs::{Format, Limbs, Shape, limb_bits};
use super::simd::{BYTES, Kernel, LANES, Level, Simd, prefetch};
use super::tensor::Target;
use crate::backend::{LinearWeights, QuantizedWeights};
use crate::error::Result;
use crate::files::mapped::Mapped;
use crate::spec::Quantization;
use std::cell::RefCell;
use std::ops::Range;

/// How far ahead of its use a row's codes are asked for: where a prototype streamed fastest.
const AHEAD: usize = 8192;
/// Up to this many rows of x are multiplied one by one.
const FEW: usize = 6;
/// The bytes of x that one pass over the weights may take: they shall stay in the L2 cache.
const BLOCK: usize = 384 * 1024;

/// `[rows, columns]`, as it lies in the file.
pub struct Affine {
    codes: Mapped,
    scales: Mapped,
    biases: Mapped,
    pub float: Float,
    layout: Quantization,
    pub rows: usize,
    pub columns: usize,
    /// of a row
    groups: usize,
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
            groups: quantized.scales.shape[1],
        })
    }

    /// How `rows` rows of x must be written for `Product`.
    pub fn format(&self, rows: usize, level: Level) -> Format {
        // 16 bits beside halves, 24 beside f32; or 21 and 28, where limbs have 7 bits.
        let short = level == Level::Avx2 && self.layout.bits != 4;
        let limbs = 2 + usize::from(self.float == Float::F32) + usize::from(short);
        let shape = match (rows, limbs) {
            (..=FEW, _) => Shape::Rows,
            (..=8, 2) => Shape::Eights,
            _ => Shape::Sixteens,
        };
        let Quantization { group_size, bits } = self.layout;
        Format { group_size, int4: bits == 4, limbs, shape }
    }

    pub fn tensors(&self) -> [&Mapped; 3] {
        [&self.codes, &self.scales, &self.biases]
    }

    /// Row n as floats.
    pub fn dequantize(&self, n: usize, out: &mut [f32]) {
        let (groups, float) = (self.groups, self.float.bytes());
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

    fn row_bytes(&self) -> usize {
        self.columns * self.layout.bits / 8
    }

    /// # Safety
    /// `n` is a row of the weights.
    #[inline(always)]
    unsafe fn row(&self, n: usize) -> &[u8] {
        let bytes = self.row_bytes();
        std::slice::from_raw_parts(self.codes.as_ptr().add(n * bytes), bytes)
    }

    /// Scales and biases `group..group + count` of row n.
    ///
    /// # Safety
    /// The machine has S's level; `n` is a row, and has the groups `group..group + count`, at most 16.
    #[inline(always)]
    unsafe fn numbers<S: Simd>(&self, n: usize, group: usize, count: usize) -> [S::F; 2] {
        let place = n * self.groups + group;
        [
            self.float.load::<S>(self.scales.as_ptr(), place, count),
            self.float.load::<S>(self.biases.as_ptr(), place, count),
        ]
    }
}

pub struct Product<'a> {
    pub affine: &'a Affine,
    pub x: &'a Limbs,
    pub format: Format,
    pub target: Target,
}

/// Some columns of N rows of weights that stay in the L1 cache, unpacked; 32 of them are the
/// smallest group.
const CHUNK: usize = 1024;
/// The most rows of weights in a tile.
const WIDEST: usize = 12;

/// A tile of y: a row of weights, and 16 lanes.
type Out = [[f32; LANES]; WIDEST];

/// Unpacked codes, the scales and biases of some rows of weights, and what comes out.
type Scratch = (Vec<u8>, Vec<f32>, Vec<Out>);

/// `body` with n = 0, 1, ... below `count`, which the compiler need not decide to unroll: what it
/// does not unroll it keeps in memory.
macro_rules! unrolled {
    ($n:ident < $count:expr, $body:block) => {
        unrolled!(@ $n, $count, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $n:ident, $count:expr, $body:block, $($i:literal)*) => {
        $(if $i < $count {
            let $n = $i;
            $body
        })*
    };
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Kernel for Product<'_> {
    type Output = ();

    /// # Safety
    /// `x` has the columns of the weights, as `format` for so many rows says; the target's columns are
    /// rows of the weights, and no other thread's.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // Taken, not borrowed in a closure: that would be compiled without the extension.
        let mut scratch = SCRATCH.take();
        match (self.format.shape, self.format.limbs, S::ACCUMULATORS) {
            (Shape::Rows, 2, _) => self.few::<S, 2>(&mut scratch.0),
            (Shape::Rows, 3, _) => self.few::<S, 3>(&mut scratch.0),
            (Shape::Rows, ..) if S::LIMB_BITS < 8 => self.few::<S, 4>(&mut scratch.0),
            (Shape::Eights, _, 24..) => self.many::<S, 1, 12>(&mut scratch),
            (Shape::Eights, _, 6..) => self.many::<S, 1, 6>(&mut scratch),
            (Shape::Eights, ..) => self.many::<S, 1, 4>(&mut scratch),
            (Shape::Sixteens, 2, 24..) => self.many::<S, 2, 12>(&mut scratch),
            (Shape::Sixteens, 2, 6..) => self.many::<S, 2, 3>(&mut scratch),
            (Shape::Sixteens, 2, _) => self.many::<S, 2, 2>(&mut scratch),
            (Shape::Sixteens, 3, 24..) => self.many::<S, 3, 8>(&mut scratch),
            (Shape::Sixteens, 3, 6..) => self.many::<S, 3, 2>(&mut scratch),
            (Shape::Sixteens, 3, _) => self.many::<S, 3, 1>(&mut scratch),
            (Shape::Sixteens, ..) if S::LIMB_BITS < 8 => self.many::<S, 4, 1>(&mut scratch),
            (_, limbs, _) => unreachable!("{limbs} limbs"),
        }
        SCRATCH.set(scratch);
    }
}

impl Product<'_> {
    /// # Safety
    /// As `run`; `x` has P limbs a number and at most `FEW` rows.
    #[inline(always)]
    unsafe fn few<S: Simd, const P: usize>(&self, codes: &mut Vec<u8>) {
        macro_rules! rows {
            ($($m:literal)*) => {
                match (self.format.int4, self.x.rows) {
                    $((true, $m) => self.row_by_row::<S, P, $m, true>(codes),
                    (false, $m) => self.row_by_row::<S, P, $m, false>(codes),)*
                    (_, rows) => unreachable!("{rows} rows are more than few"),
                }
            };
        }
        rows!(1 2 3 4 5 6)
    }

    /// # Safety
    /// As `run`; `x` has P limbs a number and M rows, and `INT4` says how codes lie.
    #[inline(always)]
    unsafe fn row_by_row<S: Simd, const P: usize, const M: usize, const INT4: bool>(
        &self,
        scratch: &mut Vec<u8>,
    ) {
        let affine = self.affine;
        let as_they_are = matches!(affine.layout.bits, 4 | 8);
        scratch.resize(affine.columns, 0);
        // The sums over lanes, four at once.
        let mut lanes = [[S::splat(0.0); 4]; M];
        for first in self.target.range.clone().step_by(4) {
            let count = 4.min(self.target.range.end - first);
            for place in 0..count {
                let row = affine.row(first + place);
                let codes = match as_they_are {
                    true => row.as_ptr(),
                    false => {
                        codes::unpack(row, affine.layout.bits, scratch);
                        scratch.as_ptr()
                    }
                };
                let y = self.dot_row::<S, P, M, INT4>(first + place, codes);
                for m in 0..M {
                    lanes[m][place] = y[m];
                }
            }
            for m in 0..M {
                let y = self.target.at(m, first);
                std::ptr::copy_nonoverlapping(S::sums(lanes[m]).as_ptr(), y, count);
            }
        }
    }

    /// Row n of the weights with M rows of x, their sums still in lanes. `codes` are of 4 bits, or
    /// bytes.
    ///
    /// # Safety
    /// As `row_by_row`; `n` is a row, and `codes` are all its codes.
    #[inline(always)]
    unsafe fn dot_row<S: Simd, const P: usize, const M: usize, const INT4: bool>(
        &self,
        n: usize,
        codes: *const u8,
    ) -> [S::F; M] {
        let affine = self.affine;
        let (groups, in_vector) = (affine.groups, if INT4 { 2 * BYTES } else { BYTES });
        // A table has the scales of 16 groups, which are `step` vectors of codes.
        let step = LANES * self.format.group_size / in_vector;
        let bytes = affine.columns * BYTES / in_vector;
        let whole = bytes / BYTES;
        let row = Row { x: self.x, shift: step.trailing_zeros(), bits: limb_bits::<S>(INT4) };
        let mut acc = [S::splat(0.0); M];
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
                acc[m] = S::fma(biases, S::load(sum), acc[m]);
            }
            let start = chunk * step;
            let here = step.min(whole.saturating_sub(start));
            for local in 0..here {
                let codes = codes.add((start + local) * BYTES);
                prefetch(codes.wrapping_add(AHEAD));
                let codes = S::bytes(codes);
                row.block::<S, P, M, INT4>(codes, start + local, local, &tables, &mut acc);
            }
            if here < step && !bytes.is_multiple_of(BYTES) && start + here == whole {
                let codes = S::bytes_partial(codes.add(whole * BYTES), bytes % BYTES);
                row.block::<S, P, M, INT4>(codes, whole, here, &tables, &mut acc);
            }
        }
        acc
    }

    /// Tiles of N rows of weights and 16 lanes of x, with V limbs in each.
    ///
    /// # Safety
    /// As `run`; a tile's vectors hold V limbs, and N is at most `WIDEST`.
    #[inline(always)]
    unsafe fn many<S: Simd, const V: usize, const N: usize>(
        &self,
        (codes, numbers, out): &mut Scratch,
    ) {
        let (columns, rows) = (self.affine.columns, self.format.shape.rows());
        codes.resize(N * CHUNK, 0);
        numbers.resize(2 * N * CHUNK / 32, 0.0);
        let tiles = self.x.rows.div_ceil(rows);
        let block = (BLOCK / (columns * V * LANES)).clamp(1, tiles);
        out.resize(block, [[0.0; LANES]; WIDEST]);
        for first_tile in (0..tiles).step_by(block) {
            let tiles = first_tile..tiles.min(first_tile + block);
            for first in self.target.range.clone().step_by(N) {
                let count = N.min(self.target.range.end - first);
                out.fill([[0.0; LANES]; WIDEST]);
                for chunk in (0..columns).step_by(CHUNK) {
                    let chunk = chunk..columns.min(chunk + CHUNK);
                    self.unpack::<S>(first, count, chunk.clone(), codes, numbers);
                    let mut ahead = self.ahead::<N>(first, chunk.end);
                    for (tile, out) in tiles.clone().zip(out.iter_mut()) {
                        self.tile::<S, V, N>(codes, numbers, tile, chunk.clone(), &mut ahead, out);
                    }
                }
                for (tile, out) in tiles.clone().zip(out.iter_mut()) {
                    self.store::<S>(tile * rows, first, &mut out[..count]);
                }
            }
        }
    }

    /// What comes after the codes of N rows up to column `end`.
    ///
    /// # Safety
    /// `first` is a row and `end` at most its columns; what it points to is only prefetched.
    #[inline(always)]
    unsafe fn ahead<const N: usize>(&self, first: usize, end: usize) -> Ahead {
        let (row_bytes, bits) = (self.affine.row_bytes(), self.affine.layout.bits);
        let (place, columns) = match end < self.affine.columns {
            true => (first * row_bytes + end * bits / 8, self.affine.columns - end),
            false => ((first + N) * row_bytes, self.affine.columns),
        };
        let lines = (columns.min(CHUNK) * bits / 8).div_ceil(BYTES);
        let next = self.affine.codes.as_ptr().wrapping_add(place);
        Ahead { next, line: 0, lines, row_bytes, left: N * lines }
    }

    /// Columns `first..` of a tile's rows of y, from lanes.
    ///
    /// # Safety
    /// The machine has S's level; `row` and columns `first..` are within the target.
    #[inline(always)]
    unsafe fn store<S: Simd>(&self, row: usize, first: usize, out: &mut [[f32; LANES]]) {
        let (rows, lanes) = (self.format.shape.rows(), self.format.shape.lanes());
        if lanes == 2 {
            for out in out.iter_mut() {
                S::store(out.as_mut_ptr(), S::sum_pairs(S::load(out.as_ptr())));
            }
        }
        for place in 0..rows.min(self.x.rows - row) {
            let y = self.target.at(row + place, first);
            for (n, out) in out.iter().enumerate() {
                *y.add(n) = out[place * lanes];
            }
        }
    }

    /// Some columns of rows `first..first + count`: `codes` is `[row][CHUNK]`, `numbers`
    /// `[row][2][CHUNK / 32]`.
    ///
    /// # Safety
    /// As `many`; the rows and columns are there, and `codes` and `numbers` have room for them.
    #[inline(always)]
    unsafe fn unpack<S: Simd>(
        &self,
        first: usize,
        count: usize,
        chunk: Range<usize>,
        codes: &mut [u8],
        numbers: &mut [f32],
    ) {
        let Quantization { bits, group_size } = self.affine.layout;
        let (group, groups) = (chunk.start / group_size, chunk.len() / group_size);
        for place in 0..count {
            let row = &self.affine.row(first + place)[chunk.start * bits / 8..chunk.end * bits / 8];
            let codes = &mut codes[place * CHUNK..][..CHUNK];
            let exactly = &mut codes[..chunk.len()];
            match bits {
                4 => codes::unpack_int4::<S>(row, codes),
                8 => exactly.copy_from_slice(row),
                bits => codes::unpack(row, bits, exactly),
            }
            let numbers = numbers[2 * place * CHUNK / 32..][..2 * CHUNK / 32].as_mut_ptr();
            for next in (0..groups).step_by(LANES) {
                let count = LANES.min(groups - next);
                let both = self.affine.numbers::<S>(first + place, group + next, count);
                S::store(numbers.add(next), both[0]);
                S::store(numbers.add(CHUNK / 32 + next), both[1]);
            }
        }
    }

    /// Adds the products of some columns to `out`, and asks for the codes at `ahead` meanwhile.
    ///
    /// # Safety
    /// As `many`; `codes` and `numbers` are what `unpack` made of this chunk, and `tile` is one of x.
    #[inline(always)]
    unsafe fn tile<S: Simd, const V: usize, const N: usize>(
        &self,
        codes: &[u8],
        numbers: &[f32],
        tile: usize,
        chunk: Range<usize>,
        ahead: &mut Ahead,
        out: &mut Out,
    ) {
        let Quantization { bits, group_size } = self.affine.layout;
        let asks = (N * group_size * bits / 8).div_ceil(BYTES);
        let (steps, lanes) = (group_size / 8, self.format.shape.lanes());
        let limb_bits = limb_bits::<S>(self.format.int4);
        let (first, groups) = (chunk.start / group_size, chunk.len() / group_size);
        let (scales, biases) = (numbers.as_ptr(), numbers.as_ptr().add(CHUNK / 32));
        let mut y = [S::splat(0.0); N];
        for n in 0..N {
            y[n] = S::load(out[n].as_ptr());
        }
        for group in (0..groups).step_by(lanes) {
            let sums = S::load(self.x.tile_sums(tile, first + group, lanes));
            unrolled!(n < N, {
                let biases = S::splat_many(biases.add(2 * n * CHUNK / 32 + group), lanes);
                y[n] = S::fma(biases, sums, y[n]);
            });
        }
        for group in 0..groups {
            let mut acc = [[S::izero(); V]; N];
            let mut limbs = self.x.tile(tile, first + group, 2 * steps * V);
            for half in 0..2 {
                let codes = codes.as_ptr().add(self.place(group * group_size, half));
                for step in 0..steps {
                    let mut x = [S::bytes(limbs); V];
                    for v in 0..V {
                        x[v] = S::bytes(limbs.add(v * BYTES));
                    }
                    limbs = limbs.add(V * BYTES);
                    unrolled!(n < N, {
                        let codes = codes.add(n * CHUNK + 4 * step);
                        let codes = S::bytes_splat(codes);
                        for v in 0..V {
                            acc[n][v] = S::dot(acc[n][v], codes, x[v]);
                        }
                    });
                }
            }
            let scale = S::load(self.x.tile_scales(tile, first + group));
            ahead.ask(asks);
            unrolled!(n < N, {
                let product = joined::<S, V>(acc[n], limb_bits);
                let number = S::splat(*scales.add(2 * n * CHUNK / 32 + group));
                y[n] = S::fma(product, S::mul(number, scale), y[n]);
            });
        }
        for n in 0..N {
            S::store(out[n].as_mut_ptr(), y[n]);
        }
    }

    /// Where the unpacked codes of half a group are, which begins at `column`.
    #[inline(always)]
    fn place(&self, column: usize, half: usize) -> usize {
        match self.format.int4 {
            true => column / 128 * 128 + column % 128 / 2 + half * BYTES,
            false => column + half * self.format.group_size / 2,
        }
    }
}

/// Codes that are needed next, which are asked for in the order of their addresses: so the
/// processor's own prefetching goes along.
struct Ahead {
    next: *const u8,
    /// of the row
    line: usize,
    /// of a row
    lines: usize,
    row_bytes: usize,
    left: usize,
}

impl Ahead {
    #[inline(always)]
    fn ask(&mut self, lines: usize) {
        for _ in 0..lines.min(self.left) {
            prefetch(self.next.wrapping_add(self.line * BYTES));
            self.line += 1;
            if self.line == self.lines {
                self.line = 0;
                self.next = self.next.wrapping_add(self.row_bytes);
            }
            self.left -= 1;
        }
    }
}

/// The sums of V limbs' products, in units of the last.
///
/// # Safety
/// The machine has S's level.
#[inline(always)]
unsafe fn joined<S: Simd, const V: usize>(acc: [S::I; V], bits: u32) -> S::F {
    match V {
        1 => S::float(acc[0]),
        2 => S::float(S::iadd(S::shift(acc[0], bits), acc[V - 1])),
        // More than two would not fit into 32 bits.
        _ => {
            let first = S::float(S::iadd(S::shift(acc[0], bits), acc[1]));
            let rest = match V {
                3 => acc[V - 1],
                _ => S::iadd(S::shift(acc[2], bits), acc[V - 1]),
            };
            S::fma(first, S::splat((1u32 << (bits * (V as u32 - 2))) as f32), S::float(rest))
        }
    }
}

/// What a row of weights meets.
struct Row<'a> {
    x: &'a Limbs,
    shift: u32,
    /// of a limb
    bits: u32,
}

impl Row<'_> {
    /// Vector number `block` of the row, the `local`th of its tables.
    ///
    /// # Safety
    /// As `dot_row`; `block` is a vector of the row, the `local`th of its tables.
    #[inline(always)]
    unsafe fn block<S: Simd, const P: usize, const M: usize, const INT4: bool>(
        &self,
        codes: S::B,
        block: usize,
        local: usize,
        tables: &[S::Table; M],
        acc: &mut [S::F; M],
    ) {
        let int4 = S::unpack_int4(codes);
        for m in 0..M {
            let mut dots = [S::izero(); P];
            for p in 0..P {
                // The second limb's products are added to the first's, in its units; so with the
                // fourth and the third.
                let before = if p % 2 == 1 { S::shift(dots[p - 1], self.bits) } else { S::izero() };
                let limbs = self.x.row(m, P).add(p * self.x.limb_stride);
                dots[p] = if INT4 {
                    let limbs = limbs.add(block * 2 * BYTES);
                    let even = S::dot(before, int4[0], S::bytes(limbs));
                    S::dot(even, int4[1], S::bytes(limbs.add(BYTES)))
                } else {
                    S::dot(before, codes, S::bytes(limbs.add(block * BYTES)))
                };
            }
            let mut product = S::float(dots[1]);
            if P > 2 {
                let base = S::splat((1u32 << (self.bits * (P as u32 - 2))) as f32);
                product = S::fma(product, base, S::float(dots[P - 1]));
            }
            acc[m] = S::fma(product, S::expand(&tables[m], local, self.shift), acc[m]);
        }
    }
}
