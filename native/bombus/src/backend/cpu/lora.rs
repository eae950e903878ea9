//! LoRA: what adapters add to rows of a linear layer or an embedding.

use super::float::Float;
use super::linear::GRAIN;
use super::simd::{Kernel, LANES, Simd};
use super::tensor::{SendPtr, Target, Tensor};
use super::weights::Weights;
use super::{Adapted, Cpu, LoraRows, LoraWeights, lock};
use crate::error::Result;
use crate::files::safetensors::TensorView;
use crate::runtime::metrics;
use std::sync::Mutex;

/// LoRA A and B of one layer, both halves `[rank, features]`.
pub struct Lora {
    /// Of the numbers in both halves: f16 beside 16-bit weights, since they are read for every
    /// token. Each half's largest is then about 1, so that f16 rounds to 2^-11 of a number, or
    /// 2^-25 of the largest.
    float: Float,
    /// transposed: `[rank, in]`
    a: Vec<u8>,
    /// `[rank, out]`
    b: Vec<u8>,
    rank: usize,
    /// also what the halves were divided by
    scale: f32,
    /// DoRA: magnitude / norm
    factors: Option<Factors>,
    gauge: metrics::Share,
}

/// What DoRA multiplies.
enum Factors {
    /// each number of a row of y
    Outputs(Vec<f32>),
    /// a token's whole embedding
    Tokens(Vec<f32>),
}

impl Lora {
    pub fn load(cpu: &Cpu, weights: &LoraWeights, adapted: Adapted<Cpu>) -> Result<Self> {
        let LoraWeights { a, b, transposed, outputs, scale, magnitude } = weights;
        let (a, mut b, rank) = match transposed {
            true => (Float::read(a)?, transpose(b)?, a.shape[0]),
            false => (transpose(a)?, Float::read(b)?, b.shape[0]),
        };
        if let Some(outputs) = outputs {
            let all = b.len() / rank.max(1);
            b = b.chunks_exact(all).flat_map(|row| row[outputs.clone()].to_vec()).collect();
        }
        let float = match adapted.weights().float() {
            Float::F32 => Float::F32,
            _ => Float::F16,
        };
        let ((a, a_unit), (b, b_unit)) = (packed(float, &a), packed(float, &b));
        // In f64: the units of very large and very small halves make up for each other.
        let scale = (f64::from(*scale) * f64::from(a_unit) * f64::from(b_unit)) as f32;
        let gauge = metrics::Share::of(&metrics::CPU_BYTES);
        let mut lora = Self { float, a, b, rank, scale, factors: None, gauge };
        let mut bytes = lora.a.len() + lora.b.len();
        if let Some(magnitude) = magnitude {
            let rows = lora.adapted_rows(&adapted);
            let by_token = matches!(adapted, Adapted::Embedding(_)) && !transposed;
            let by_column = matches!(adapted, Adapted::Embedding(_)) && *transposed;
            let norms = if by_column { rows.column_norms(cpu) } else { rows.norms(cpu) };
            let mut magnitudes = Float::read(magnitude)?;
            if let Some(outputs) = outputs {
                magnitudes = magnitudes[outputs.clone()].to_vec();
            }
            let factors: Vec<f32> =
                magnitudes.iter().zip(norms).map(|(magnitude, norm)| magnitude / norm).collect();
            bytes += factors.len() * size_of::<f32>();
            lora.factors =
                Some(if by_token { Factors::Tokens(factors) } else { Factors::Outputs(factors) });
        }
        lora.gauge.set(bytes);
        Ok(lora)
    }

    fn adapted_rows<'a>(&self, adapted: &Adapted<'a, Cpu>) -> AdaptedRows<'a> {
        let (left, right) = match adapted {
            Adapted::Embedding(_) => (&self.a, &self.b),
            _ => (&self.b, &self.a),
        };
        let weights = adapted.weights();
        let mut left = self.float.to_f32(left);
        left.iter_mut().for_each(|left| *left *= self.scale);
        AdaptedRows { weights, left, right: self.float.to_f32(right), rank: self.rank }
    }

    /// Adds an embedding's LoRA to the row of token `id`.
    pub fn embed(&self, id: usize, row: &mut [f32]) {
        let bytes = self.float.bytes();
        let (a, b) = (self.a.len() / self.rank, self.b.len() / self.rank);
        for (a, b) in self.a.chunks_exact(a).zip(self.b.chunks_exact(b)) {
            let weight = self.scale * self.float.to_f32(&a[id * bytes..][..bytes])[0];
            let b = self.float.to_f32(b);
            row.iter_mut().zip(b).for_each(|(x, b)| *x += weight * b);
        }
        match &self.factors {
            None => {}
            Some(Factors::Tokens(factors)) => row.iter_mut().for_each(|x| *x *= factors[id]),
            Some(Factors::Outputs(factors)) => {
                row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
            }
        }
    }
}

/// The rows of `W + scale * B A`, for DoRA's norms: one for each output, or for each token of an
/// embedding.
struct AdaptedRows<'a> {
    weights: &'a Weights,
    /// `[rank, rows]`, the scale in it
    left: Vec<f32>,
    /// `[rank, width]`
    right: Vec<f32>,
    rank: usize,
}

impl AdaptedRows<'_> {
    fn count(&self) -> usize {
        self.left.len() / self.rank
    }

    fn width(&self) -> usize {
        self.right.len() / self.rank
    }

    fn row(&self, n: usize, row: &mut [f32]) {
        self.weights.row(n, row);
        let halves =
            self.left.chunks_exact(self.count()).zip(self.right.chunks_exact(self.width()));
        for (left, right) in halves {
            row.iter_mut().zip(right).for_each(|(x, right)| *x += left[n] * right);
        }
    }

    fn norms(&self, cpu: &Cpu) -> Vec<f32> {
        let mut norms = vec![0.0; self.count()];
        let out = SendPtr(norms.as_mut_ptr());
        cpu.pool.split(self.count(), GRAIN, |rows| {
            let mut row = vec![0.0; self.width()];
            for n in rows {
                self.row(n, &mut row);
                let squares: f32 = row.iter().map(|x| x * x).sum();
                // SAFETY: each row is one thread's.
                unsafe { *out.at(n) = squares.sqrt() };
            }
        });
        norms
    }

    /// Over all rows.
    fn column_norms(&self, cpu: &Cpu) -> Vec<f32> {
        let sums = Mutex::new(vec![0.0f64; self.width()]);
        cpu.pool.split(self.count(), GRAIN, |rows| {
            let mut row = vec![0.0; self.width()];
            let mut own = vec![0.0f64; self.width()];
            for n in rows {
                self.row(n, &mut row);
                own.iter_mut().zip(&row).for_each(|(sum, x)| *sum += f64::from(x * x));
            }
            lock(&sums).iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
        });
        lock(&sums).iter().map(|sum| sum.sqrt() as f32).collect()
    }
}

/// The numbers' bytes, and what they were divided by: a power of two.
fn packed(float: Float, numbers: &[f32]) -> (Vec<u8>, f32) {
    if float == Float::F32 {
        return (numbers.iter().flat_map(|number| number.to_le_bytes()).collect(), 1.0);
    }
    let largest = numbers.iter().fold(0.0f32, |largest, number| largest.max(number.abs()));
    let unit = if largest > 0.0 { largest.log2().ceil().min(127.0).exp2() } else { 1.0 };
    let half = |number: &f32| half::f16::from_f32(number / unit).to_le_bytes();
    (numbers.iter().flat_map(half).collect(), unit)
}

/// `[rows, columns]` as `[columns, rows]`
fn transpose(matrix: &TensorView) -> Result<Vec<f32>> {
    let (values, rows, columns) = (Float::read(matrix)?, matrix.shape[0], matrix.shape[1]);
    let mut transposed = vec![0.0; values.len()];
    for row in 0..rows {
        for column in 0..columns {
            transposed[column * rows + row] = values[row * columns + column];
        }
    }
    Ok(transposed)
}

/// What an adapter adds to some rows of number `index` of fused layers: `inner` times B.
pub struct Delta<'a> {
    pub index: usize,
    rows: Vec<usize>,
    /// `scale * x A`: `[rows, rank]`
    inner: Vec<f32>,
    lora: &'a Lora,
}

impl<'a> Delta<'a> {
    /// One for each LoRA, with all its rows: so it is read once.
    pub fn all(cpu: &Cpu, x: &Tensor, loras: &[LoraRows<'a, Cpu>]) -> Vec<Self> {
        let mut deltas: Vec<Self> = vec![];
        for &LoraRows { index, ref rows, lora } in loras {
            let same = |delta: &&mut Self| delta.index == index && std::ptr::eq(delta.lora, lora);
            match deltas.iter_mut().find(same) {
                Some(delta) => delta.rows.extend(rows.clone()),
                None => {
                    deltas.push(Self { index, rows: rows.clone().collect(), inner: vec![], lora })
                }
            }
        }
        let mut jobs = vec![];
        for delta in &mut deltas {
            delta.inner.resize(delta.rows.len() * delta.lora.rank, 0.0);
            let out = SendPtr(delta.inner.as_mut_ptr());
            jobs.extend(
                delta.rows.iter().enumerate().map(|(place, &row)| (delta.lora, out, place, row)),
            );
        }
        let rank = loras.iter().map(|lora| lora.lora.rank).max().unwrap_or(0);
        cpu.pool.rows(jobs.len(), x.width * rank, |range| {
            for &(lora, out, place, row) in &jobs[range] {
                // SAFETY: each row is written by one thread.
                unsafe {
                    let inner =
                        std::slice::from_raw_parts_mut(out.at(place * lora.rank), lora.rank);
                    cpu.level.run(Shrink { x: x.row(row), lora, inner });
                }
            }
        });
        deltas
    }
}

struct Shrink<'a> {
    x: &'a [f32],
    lora: &'a Lora,
    inner: &'a mut [f32],
}

impl Kernel for Shrink<'_> {
    type Output = ();

    /// # Safety
    /// `x` has the width of A, `inner` one number for each of the rank.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.lora.float {
            Float::F32 => self.all::<S, false>(),
            _ => self.all::<S, true>(),
        }
    }
}

/// The ranks whose sums stay in registers.
const RANKS: usize = 8;

impl Shrink<'_> {
    /// # Safety
    /// As `run`; `F16` says how A and B lie.
    #[inline(always)]
    unsafe fn all<S: Simd, const F16: bool>(self) {
        let width = self.x.len();
        for (block, inner) in self.inner.chunks_mut(RANKS).enumerate() {
            let mut acc = [S::splat(0.0); RANKS];
            for place in (0..width).step_by(LANES) {
                let lanes = LANES.min(width - place);
                let x = number::<S, false>(self.x.as_ptr().cast(), place, lanes);
                for r in 0..RANKS {
                    // The last block may have fewer: then its last one again.
                    let row = block * RANKS + r.min(inner.len() - 1);
                    let a = number::<S, F16>(self.lora.a.as_ptr(), row * width + place, lanes);
                    acc[r] = S::fma(x, a, acc[r]);
                }
            }
            for (inner, acc) in inner.iter_mut().zip(acc) {
                *inner = self.lora.scale * S::sum(acc);
            }
        }
    }
}

pub struct Expand<'a> {
    pub delta: &'a Delta<'a>,
    pub target: Target,
}

impl Kernel for Expand<'_> {
    type Output = ();

    /// # Safety
    /// The delta's rows are rows of the target, which is within B's width and no other thread's.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.delta.lora.float {
            Float::F32 => self.all::<S, false>(),
            _ => self.all::<S, true>(),
        }
    }
}

impl Expand<'_> {
    /// # Safety
    /// As `run`; `F16` says how A and B lie.
    #[inline(always)]
    unsafe fn all<S: Simd, const F16: bool>(self) {
        let Delta { rows, inner, lora, .. } = self.delta;
        let Lora { float, b, rank, factors, .. } = lora;
        let out_features = b.len() / float.bytes() / rank;
        for place in self.target.range.clone().step_by(LANES) {
            let lanes = LANES.min(self.target.range.end - place);
            for (&row, inner) in rows.iter().zip(inner.chunks_exact(*rank)) {
                let y = self.target.at(row, place);
                let mut sum = number::<S, false>(y.cast(), 0, lanes);
                for (r, &weight) in inner.iter().enumerate() {
                    let b = number::<S, F16>(b.as_ptr(), r * out_features + place, lanes);
                    sum = S::fma(S::splat(weight), b, sum);
                }
                if let Some(Factors::Outputs(factors)) = factors {
                    sum = S::mul(sum, number::<S, false>(factors.as_ptr().cast(), place, lanes));
                }
                S::store_partial(y, sum, lanes);
            }
        }
    }
}

/// # Safety
/// As `Float::load`, with f16 or f32.
#[inline(always)]
pub unsafe fn number<S: Simd, const F16: bool>(p: *const u8, place: usize, lanes: usize) -> S::F {
    if F16 { Float::F16.load::<S>(p, place, lanes) } else { Float::F32.load::<S>(p, place, lanes) }
}
