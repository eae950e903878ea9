//! Linear layers, quantized or dense, and what the adapters add to their rows.

use super::affine::{self, Affine};
use super::dense::{self, Dense};
use super::digits::{Digits, Format};
use super::float::Float;
use super::simd::{Kernel, LANES, Level, Simd};
use super::tensor::{Shared, Tensor};
use super::{Adapted, Cpu, LinearWeights, LoraRows, LoraWeights, lock};
use crate::error::Result;
use crate::gauge;
use crate::mapped_file::{Mapped, MappedFile};
use crate::tensor_file::TensorView;
use std::ops::Range;
use std::sync::Arc;

pub enum Weights {
    Affine(Affine),
    Dense(Dense),
}

/// One or several layers with the same input: one pass over the threads serves them all.
pub struct Linear {
    parts: Vec<Weights>,
    /// The numbers of a row of x; of an embedding, those of a token.
    pub width: usize,
    _share: gauge::Share,
}

impl Weights {
    fn load(weights: &LinearWeights) -> Result<Self> {
        let Some(quantized) = &weights.quantized else {
            return Ok(Weights::Dense(Dense::new(weights)?));
        };
        Ok(Weights::Affine(Affine::new(weights, quantized)?))
    }

    /// The numbers of a row of y.
    fn out_features(&self) -> usize {
        match self {
            Weights::Affine(affine) => affine.rows,
            Weights::Dense(dense) => dense.rows,
        }
    }

    fn in_features(&self) -> usize {
        match self {
            Weights::Affine(affine) => affine.columns,
            Weights::Dense(dense) => dense.columns,
        }
    }

    fn row(&self, n: usize, out: &mut [f32]) {
        match self {
            Weights::Affine(affine) => affine.dequantize(n, out),
            Weights::Dense(dense) => out.copy_from_slice(&dense.row(n)),
        }
    }

    fn tensors(&self) -> Vec<&Mapped> {
        match self {
            Weights::Affine(affine) => affine.tensors().into(),
            Weights::Dense(dense) => vec![&dense.weight],
        }
    }

    fn format(&self, rows: usize, level: Level) -> Option<Format> {
        match self {
            Weights::Affine(affine) => Some(affine.format(rows, level)),
            Weights::Dense(_) => None,
        }
    }
}

impl Linear {
    pub fn load(parts: &[LinearWeights]) -> Result<Self> {
        let parts = parts.iter().map(Weights::load).collect::<Result<Vec<_>>>()?;
        let mut share = gauge::Share::of(&gauge::CPU_BYTES);
        share.set(parts.iter().flat_map(Weights::tensors).map(Mapped::len).sum());
        Ok(Self { width: parts[0].in_features(), parts, _share: share })
    }

    /// Where the weights are.
    pub fn files(&self) -> impl Iterator<Item = &Arc<MappedFile>> {
        self.parts.iter().flat_map(Weights::tensors).map(|tensor| &tensor.file)
    }

    /// Row `id` of an embedding.
    pub fn row(&self, id: usize, out: &mut [f32]) {
        self.parts[0].row(id, out);
    }

    /// x: `[rows, in]` -> one `[rows, out]` for each layer, with the adapters' shares
    pub fn apply(&self, cpu: &Cpu, x: &Tensor, deltas: &[Delta]) -> Vec<Tensor> {
        let mut digits = lock(&cpu.digits);
        let formats = self.write_digits(cpu, x, &mut digits);
        let mut outputs: Vec<Tensor> =
            self.parts.iter().map(|part| cpu.spare.tensor(x.rows, part.out_features())).collect();
        let targets: Vec<(Shared, usize)> = outputs
            .iter_mut()
            .map(|output| (Shared(output.data_mut().as_mut_ptr()), output.stride))
            .collect();
        let total = self.parts.iter().map(Weights::out_features).sum();
        cpu.pool.split(total, GRAIN, |range| {
            let mut start = 0;
            for (part, weights) in self.parts.iter().enumerate() {
                let end = start + weights.out_features();
                let own = range.start.max(start)..range.end.min(end);
                if own.is_empty() {
                    start = end;
                    continue;
                }
                let own = own.start - start..own.end - start;
                let format = formats[part].map(|place| (&digits[place].1, digits[place].0));
                let (y, stride) = targets[part];
                let target = Target { y, range: own, stride };
                // SAFETY: the columns of this range are this thread's alone.
                unsafe { weights.product(cpu, x, format, target.clone()) };
                for delta in deltas.iter().filter(|delta| delta.part == part) {
                    // SAFETY: as above.
                    unsafe { cpu.level.run(Add { delta, target: target.clone() }) };
                }
                start = end;
            }
        });
        outputs
    }

    /// The digits of x in every format that a layer asks for; -> which is whose
    fn write_digits(
        &self,
        cpu: &Cpu,
        x: &Tensor,
        digits: &mut Vec<(Format, Digits)>,
    ) -> Vec<Option<usize>> {
        let mut used = 0;
        let mut places = vec![];
        for part in &self.parts {
            let place = part.format(x.rows, cpu.level).map(|format| {
                if let Some(place) = digits[..used].iter().position(|(other, _)| *other == format) {
                    return place;
                }
                if used == digits.len() {
                    digits.push((format, Digits::default()));
                }
                digits[used].0 = format;
                digits[used].1.fill(cpu.level, &cpu.pool, x, format);
                used += 1;
                used - 1
            });
            places.push(place);
        }
        places
    }
}

/// Threads get multiples of so many columns, whole tiles in every kernel.
const GRAIN: usize = 24;

/// Columns of an output, whose rows are `stride` numbers apart.
#[derive(Clone)]
struct Target {
    y: Shared,
    range: Range<usize>,
    stride: usize,
}

impl Weights {
    unsafe fn product(
        &self,
        cpu: &Cpu,
        x: &Tensor,
        digits: Option<(&Digits, Format)>,
        target: Target,
    ) {
        let Target { y, range, stride } = target;
        match (self, digits) {
            (Weights::Affine(affine), Some((x, format))) => {
                let product = affine::Product { affine, x, format, range, y, stride };
                // SAFETY: the caller's.
                unsafe { cpu.level.run(product) };
            }
            (Weights::Dense(dense), _) => {
                let product = dense::Product { dense, x, range, y, stride };
                // SAFETY: the caller's.
                unsafe { cpu.level.run(product) };
            }
            (Weights::Affine(_), None) => unreachable!("quantized weights without digits"),
        }
    }
}

/// One adapter's pair for one layer, both halves `[rank, features]`.
pub struct Lora {
    /// a, transposed: `[rank, in]`
    down: Vec<f32>,
    /// b: `[rank, out]`
    up: Vec<f32>,
    rank: usize,
    scale: f32,
    /// DoRA: what each output, or each token of an embedding, is multiplied with.
    factors: Option<Vec<f32>>,
    share: gauge::Share,
}

impl Lora {
    pub fn load(cpu: &Cpu, weights: &LoraWeights, adapted: Adapted<Cpu>) -> Result<Self> {
        let LoraWeights { a, b, transposed, scale, magnitude } = weights;
        let (down, up, rank) = match transposed {
            true => (Float::read(a)?, turned(b)?, a.shape[0]),
            false => (turned(a)?, Float::read(b)?, b.shape[0]),
        };
        let share = gauge::Share::of(&gauge::CPU_BYTES);
        let mut lora = Self { down, up, rank, scale: *scale, factors: None, share };
        if let Some(magnitude) = magnitude {
            let mut factors = lora.row_norms(cpu, adapted);
            let magnitudes = Float::read(magnitude)?;
            factors.iter_mut().zip(magnitudes).for_each(|(norm, own)| *norm = own / *norm);
            lora.factors = Some(factors);
        }
        let numbers = lora.down.len() + lora.up.len() + lora.factors.as_ref().map_or(0, Vec::len);
        lora.share.set(numbers * size_of::<f32>());
        Ok(lora)
    }

    /// The norms of the rows of `W + scale * B A`: a row belongs to an output, or to a token.
    fn row_norms(&self, cpu: &Cpu, adapted: Adapted<Cpu>) -> Vec<f32> {
        let (linear, part, left, right) = match adapted {
            Adapted::Projection(linear, part) => (linear, part, &self.up, &self.down),
            Adapted::TiedHead(embedding) => (embedding, 0, &self.up, &self.down),
            Adapted::Embedding(embedding) => (embedding, 0, &self.down, &self.up),
        };
        let (count, width) = (left.len() / self.rank, right.len() / self.rank);
        let mut norms = vec![0.0; count];
        let out = Shared(norms.as_mut_ptr());
        cpu.pool.split(count, GRAIN, |rows| {
            let mut row = vec![0.0; width];
            for n in rows {
                linear.parts[part].row(n, &mut row);
                self.add_row(left, right, n, &mut row);
                let squares: f32 = row.iter().map(|x| x * x).sum();
                // SAFETY: each row is one thread's.
                unsafe { *out.at(n) = squares.sqrt() };
            }
        });
        norms
    }

    /// Adds row n of the product of two halves: left `[rank, rows]`, right `[rank, width]`.
    fn add_row(&self, left: &[f32], right: &[f32], n: usize, row: &mut [f32]) {
        let rows = left.len() / self.rank;
        for (place, right) in right.chunks_exact(row.len()).enumerate() {
            let weight = self.scale * left[place * rows + n];
            row.iter_mut().zip(right).for_each(|(x, right)| *x += weight * right);
        }
    }

    /// Adds an embedding's share to the row of token `id`.
    pub fn embed(&self, id: usize, row: &mut [f32]) {
        self.add_row(&self.down, &self.up, id, row);
        if let Some(factors) = &self.factors {
            row.iter_mut().for_each(|x| *x *= factors[id]);
        }
    }
}

/// `[rows, columns]` as `[columns, rows]`
fn turned(matrix: &TensorView) -> Result<Vec<f32>> {
    let (values, rows, columns) = (Float::read(matrix)?, matrix.shape[0], matrix.shape[1]);
    let mut turned = vec![0.0; values.len()];
    for row in 0..rows {
        for column in 0..columns {
            turned[column * rows + row] = values[row * columns + column];
        }
    }
    Ok(turned)
}

/// What an adapter adds to some rows of output `part`: `inner` times `up`.
pub struct Delta<'a> {
    part: usize,
    rows: Range<usize>,
    /// `scale * x A`: `[rows, rank]`
    inner: Vec<f32>,
    lora: &'a Lora,
}

impl<'a> Delta<'a> {
    pub fn new(cpu: &Cpu, x: &Tensor, loras: &LoraRows<'a, Cpu>) -> Self {
        let LoraRows { part, ref rows, lora } = *loras;
        let mut inner = vec![0.0; rows.len() * lora.rank];
        let out = Shared(inner.as_mut_ptr());
        cpu.rows(rows.len(), x.width * lora.rank, |range| {
            for row in range {
                let x = x.row(rows.start + row);
                // SAFETY: each row is written by one thread.
                unsafe {
                    let inner = std::slice::from_raw_parts_mut(out.at(row * lora.rank), lora.rank);
                    cpu.level.run(Down { x, down: &lora.down, scale: lora.scale, inner });
                }
            }
        });
        Self { part, rows: rows.clone(), inner, lora }
    }
}

struct Down<'a> {
    x: &'a [f32],
    down: &'a [f32],
    scale: f32,
    inner: &'a mut [f32],
}

impl Kernel for Down<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.x.len();
        for (row, inner) in self.down.chunks_exact(width).zip(self.inner) {
            let mut acc = S::splat(0.0);
            for place in (0..width).step_by(LANES) {
                let lanes = LANES.min(width - place);
                let x = Float::F32.load::<S>(self.x.as_ptr().cast(), place, lanes);
                let a = Float::F32.load::<S>(row.as_ptr().cast(), place, lanes);
                acc = S::fma(x, a, acc);
            }
            *inner = self.scale * S::sum(acc);
        }
    }
}

struct Add<'a> {
    delta: &'a Delta<'a>,
    target: Target,
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Target { y, range, stride } = self.target;
        let Delta { rows, inner, lora, .. } = self.delta;
        let Lora { up, rank, factors, .. } = lora;
        let out_features = up.len() / rank;
        for (row, inner) in rows.clone().zip(inner.chunks_exact(*rank)) {
            for place in range.clone().step_by(LANES) {
                let lanes = LANES.min(range.end - place);
                let y = y.at(row * stride + place);
                let mut sum = Float::F32.load::<S>(y.cast(), 0, lanes);
                for (r, &weight) in inner.iter().enumerate() {
                    let up = up.as_ptr().add(r * out_features).cast();
                    let up = Float::F32.load::<S>(up, place, lanes);
                    sum = S::fma(S::splat(weight), up, sum);
                }
                if let Some(factors) = factors {
                    let factors = factors.as_ptr().cast();
                    sum = S::mul(sum, Float::F32.load::<S>(factors, place, lanes));
                }
                S::store_part(y, sum, lanes);
            }
        }
    }
}
