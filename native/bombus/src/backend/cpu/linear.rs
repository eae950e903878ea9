//! Linear layers, quantized or dense, and what the adapters add to their rows.

use super::affine::{self, Affine};
use super::dense::{self, Dense};
use super::float::Float;
use super::limbs::{Format, Limbs};
use super::rows::load_partial;
use super::simd::{Kernel, LANES, Level, Simd};
use super::tensor::{SendPtr, Target, Tensor};
use super::{Adapted, Cpu, LinearWeights, LoraRows, LoraWeights, lock};
use crate::error::Result;
use crate::gauge;
use crate::mapped_file::{Mapped, MappedFile};
use crate::tensor_file::TensorView;
use std::sync::{Arc, Mutex};

pub enum Weights {
    Affine(Affine),
    Dense(Dense),
}

/// One or several layers with the same input: one pass over the threads serves them all.
pub struct Linear {
    layers: Vec<Weights>,
    /// of each layer
    biases: Vec<Option<Vec<f32>>>,
    /// The numbers of a row of x; of an embedding, those of a token.
    pub width: usize,
    _gauge: gauge::Share,
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

    /// Of the scales, or of the weights themselves.
    fn float(&self) -> Float {
        match self {
            Weights::Affine(affine) => affine.float,
            Weights::Dense(dense) => dense.float,
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
    pub fn load(layers: &[LinearWeights]) -> Result<Self> {
        let bias = |layer: &LinearWeights| layer.bias.as_ref().map(Float::read).transpose();
        let biases = layers.iter().map(bias).collect::<Result<Vec<_>>>()?;
        let layers = layers.iter().map(Weights::load).collect::<Result<Vec<_>>>()?;
        let mut gauge = gauge::Share::of(&gauge::CPU_BYTES);
        gauge.set(layers.iter().flat_map(Weights::tensors).map(Mapped::len).sum());
        Ok(Self { width: layers[0].in_features(), layers, biases, _gauge: gauge })
    }

    /// Where the weights are.
    pub fn files(&self) -> impl Iterator<Item = &Arc<MappedFile>> {
        self.layers.iter().flat_map(Weights::tensors).map(|tensor| &tensor.file)
    }

    /// The numbers of a row of y; of an embedding, its tokens.
    pub fn out_features(&self) -> usize {
        self.layers.iter().map(Weights::out_features).sum()
    }

    /// Row `id` of an embedding.
    pub fn row(&self, id: usize, out: &mut [f32]) {
        self.layers[0].row(id, out);
    }

    /// x: `[rows, in]` -> one `[rows, out]` for each layer, and what the adapters add
    pub fn apply(&self, cpu: &Cpu, x: &Tensor, deltas: &[Delta]) -> Vec<Tensor> {
        let mut limbs = lock(&cpu.limbs);
        let formats = self.write_limbs(cpu, x, &mut limbs);
        let mut outputs: Vec<Tensor> = self
            .layers
            .iter()
            .map(|layer| cpu.spare.tensor(x.rows, layer.out_features()))
            .collect();
        let targets: Vec<(SendPtr, usize)> = outputs
            .iter_mut()
            .map(|output| (SendPtr(output.data_mut().as_mut_ptr()), output.stride))
            .collect();
        let total = self.layers.iter().map(Weights::out_features).sum();
        cpu.pool.split(total, GRAIN, |range| {
            let mut start = 0;
            for (index, weights) in self.layers.iter().enumerate() {
                let end = start + weights.out_features();
                let own = range.start.max(start)..range.end.min(end);
                if own.is_empty() {
                    start = end;
                    continue;
                }
                let own = own.start - start..own.end - start;
                let format = formats[index].map(|place| (&limbs[place].1, limbs[place].0));
                let (y, stride) = targets[index];
                let target = Target { y, range: own, stride };
                // SAFETY: the columns of this range are this thread's alone.
                unsafe { weights.product(cpu, x, format, target.clone()) };
                for delta in deltas.iter().filter(|delta| delta.index == index) {
                    // SAFETY: as above.
                    unsafe { cpu.level.run(Add { delta, target: target.clone() }) };
                }
                if let Some(bias) = &self.biases[index] {
                    // SAFETY: as above. DoRA scales what is before the bias.
                    unsafe {
                        cpu.level.run(AddBias { bias, rows: x.rows, target: target.clone() })
                    };
                }
                start = end;
            }
        });
        outputs
    }

    /// The limbs of x in every format that a layer asks for; -> which is whose
    fn write_limbs(
        &self,
        cpu: &Cpu,
        x: &Tensor,
        limbs: &mut Vec<(Format, Limbs)>,
    ) -> Vec<Option<usize>> {
        let mut used = 0;
        let mut places = vec![];
        for layer in &self.layers {
            let place = layer.format(x.rows, cpu.level).map(|format| {
                if let Some(place) = limbs[..used].iter().position(|(other, _)| *other == format) {
                    return place;
                }
                if used == limbs.len() {
                    limbs.push((format, Limbs::default()));
                }
                limbs[used].0 = format;
                limbs[used].1.fill(cpu.level, &cpu.pool, x, format);
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

impl Weights {
    /// # Safety
    /// No other thread reads or writes the target's columns meanwhile; `x` and `limbs` have the layer's
    /// width, and `limbs` are in the `format` that the weights ask for.
    unsafe fn product(
        &self,
        cpu: &Cpu,
        x: &Tensor,
        limbs: Option<(&Limbs, Format)>,
        target: Target,
    ) {
        match (self, limbs) {
            (Weights::Affine(affine), Some((x, format))) => {
                let product = affine::Product { affine, x, format, target };
                // SAFETY: the caller's.
                unsafe { cpu.level.run(product) };
            }
            (Weights::Dense(dense), _) => {
                let product = dense::Product { dense, x, target };
                // SAFETY: the caller's.
                unsafe { cpu.level.run(product) };
            }
            (Weights::Affine(_), None) => unreachable!("quantized weights without limbs"),
        }
    }
}

/// LoRA A and B of one layer, both halves `[rank, features]`.
pub struct Lora {
    /// Of the numbers in both halves: f16 beside 16-bit weights, since they are read for every
    /// token. Each half's largest is then about 1, so that f16 rounds to 2^-11 of a number, or
    /// 2^-25 of the largest.
    float: Float,
    /// a, transposed: `[rank, in]`
    down: Vec<u8>,
    /// b: `[rank, out]`
    up: Vec<u8>,
    rank: usize,
    /// also what the halves were divided by
    scale: f32,
    /// DoRA: magnitude / norm
    factors: Option<Factors>,
    gauge: gauge::Share,
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
        let LoraWeights { a, b, transposed, scale, magnitude } = weights;
        let (down, up, rank) = match transposed {
            true => (Float::read(a)?, transpose(b)?, a.shape[0]),
            false => (transpose(a)?, Float::read(b)?, b.shape[0]),
        };
        let float = match adapted.weights().float() {
            Float::F32 => Float::F32,
            _ => Float::F16,
        };
        let ((down, down_unit), (up, up_unit)) = (packed(float, &down), packed(float, &up));
        // In f64: the units of very large and very small halves make up for each other.
        let scale = (f64::from(*scale) * f64::from(down_unit) * f64::from(up_unit)) as f32;
        let gauge = gauge::Share::of(&gauge::CPU_BYTES);
        let mut lora = Self { float, down, up, rank, scale, factors: None, gauge };
        let mut bytes = lora.down.len() + lora.up.len();
        if let Some(magnitude) = magnitude {
            let rows = lora.adapted_rows(&adapted);
            let by_token = matches!(adapted, Adapted::Embedding(_)) && !transposed;
            let by_column = matches!(adapted, Adapted::Embedding(_)) && *transposed;
            let norms = if by_column { rows.column_norms(cpu) } else { rows.norms(cpu) };
            let magnitudes = Float::read(magnitude)?;
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
            Adapted::Embedding(_) => (&self.down, &self.up),
            _ => (&self.up, &self.down),
        };
        let weights = adapted.weights();
        let mut left = self.float.to_f32(left);
        left.iter_mut().for_each(|left| *left *= self.scale);
        AdaptedRows { weights, left, right: self.float.to_f32(right), rank: self.rank }
    }

    /// Adds an embedding's LoRA to the row of token `id`.
    pub fn embed(&self, id: usize, row: &mut [f32]) {
        let bytes = self.float.bytes();
        let (down, up) = (self.down.len() / self.rank, self.up.len() / self.rank);
        for (down, up) in self.down.chunks_exact(down).zip(self.up.chunks_exact(up)) {
            let weight = self.scale * self.float.to_f32(&down[id * bytes..][..bytes])[0];
            let up = self.float.to_f32(up);
            row.iter_mut().zip(up).for_each(|(x, up)| *x += weight * up);
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

impl<'a> Adapted<'a, Cpu> {
    fn weights(&self) -> &'a Weights {
        match self {
            Adapted::Projection(linear, index) => &linear.layers[*index],
            Adapted::Embedding(embedding) | Adapted::TiedHead(embedding) => &embedding.layers[0],
        }
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

/// What an adapter adds to some rows of number `index` of fused layers: `inner` times `up`.
pub struct Delta<'a> {
    index: usize,
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
                    cpu.level.run(Down { x: x.row(row), lora, inner });
                }
            }
        });
        deltas
    }
}

struct Down<'a> {
    x: &'a [f32],
    lora: &'a Lora,
    inner: &'a mut [f32],
}

impl Kernel for Down<'_> {
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

impl Down<'_> {
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
                    let a = number::<S, F16>(self.lora.down.as_ptr(), row * width + place, lanes);
                    acc[r] = S::fma(x, a, acc[r]);
                }
            }
            for (inner, acc) in inner.iter_mut().zip(acc) {
                *inner = self.lora.scale * S::sum(acc);
            }
        }
    }
}

/// # Safety
/// As `Float::load`, with f16 or f32.
#[inline(always)]
unsafe fn number<S: Simd, const F16: bool>(p: *const u8, place: usize, lanes: usize) -> S::F {
    if F16 { Float::F16.load::<S>(p, place, lanes) } else { Float::F32.load::<S>(p, place, lanes) }
}

struct Add<'a> {
    delta: &'a Delta<'a>,
    target: Target,
}

impl Kernel for Add<'_> {
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

impl Add<'_> {
    /// # Safety
    /// As `run`; `F16` says how A and B lie.
    #[inline(always)]
    unsafe fn all<S: Simd, const F16: bool>(self) {
        let Delta { rows, inner, lora, .. } = self.delta;
        let Lora { float, up, rank, factors, .. } = lora;
        let out_features = up.len() / float.bytes() / rank;
        for place in self.target.range.clone().step_by(LANES) {
            let lanes = LANES.min(self.target.range.end - place);
            for (&row, inner) in rows.iter().zip(inner.chunks_exact(*rank)) {
                let y = self.target.at(row, place);
                let mut sum = number::<S, false>(y.cast(), 0, lanes);
                for (r, &weight) in inner.iter().enumerate() {
                    let up = number::<S, F16>(up.as_ptr(), r * out_features + place, lanes);
                    sum = S::fma(S::splat(weight), up, sum);
                }
                if let Some(Factors::Outputs(factors)) = factors {
                    sum = S::mul(sum, number::<S, false>(factors.as_ptr().cast(), place, lanes));
                }
                S::store_partial(y, sum, lanes);
            }
        }
    }
}

/// Adds a bias to the target's columns of all rows.
struct AddBias<'a> {
    bias: &'a [f32],
    rows: usize,
    target: Target,
}

impl Kernel for AddBias<'_> {
    type Output = ();

    /// # Safety
    /// The target has `rows` rows, is within the bias's width, and no other thread's.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for place in self.target.range.clone().step_by(LANES) {
            let lanes = LANES.min(self.target.range.end - place);
            let bias = load_partial::<S>(self.bias, place, lanes);
            for row in 0..self.rows {
                let y = self.target.at(row, place);
                let sum = S::add(number::<S, false>(y.cast(), 0, lanes), bias);
                S::store_partial(y, sum, lanes);
            }
        }
    }
}
