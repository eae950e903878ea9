//! Linear layers, quantized or dense, and what the adapters add to their rows.

use super::affine::{self, Affine};
use super::dense::{self, Dense};
use super::digits::{Digits, Format};
use super::float::Float;
use super::simd::{Kernel, LANES, Level, Simd};
use super::tensor::{Shared, Tensor};
use super::{Cpu, LinearWeights, LoraRows, lock};
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
        match &self.parts[0] {
            Weights::Affine(affine) => affine.dequantize(id, out),
            Weights::Dense(dense) => out.copy_from_slice(&dense.row(id)),
        }
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
    _share: gauge::Share,
}

impl Lora {
    /// a: `[in, rank]`, b: `[rank, out]`
    pub fn load(a: &TensorView, b: &TensorView, scale: f32) -> Result<Self> {
        let (a_values, up) = (Float::read(a)?, Float::read(b)?);
        let (inputs, rank) = (a.shape[0], a.shape[1]);
        let mut down = vec![0.0; a_values.len()];
        for input in 0..inputs {
            for place in 0..rank {
                down[place * inputs + input] = a_values[input * rank + place];
            }
        }
        let mut share = gauge::Share::of(&gauge::CPU_BYTES);
        share.set((down.len() + up.len()) * size_of::<f32>());
        Ok(Self { down, up, rank, scale, _share: share })
    }

    /// Adds an embedding's share to the row of token `id`.
    pub fn embed(&self, id: usize, row: &mut [f32]) {
        let vocab = self.down.len() / self.rank;
        for (place, up) in self.up.chunks_exact(row.len()).enumerate() {
            let weight = self.scale * self.down[place * vocab + id];
            row.iter_mut().zip(up).for_each(|(x, up)| *x += weight * up);
        }
    }
}

/// What an adapter adds to some rows of output `part`: `inner` times `up`.
pub struct Delta<'a> {
    part: usize,
    rows: Range<usize>,
    /// `scale * x A`: `[rows, rank]`
    inner: Vec<f32>,
    /// `[rank, out]`
    up: &'a [f32],
    rank: usize,
}

impl<'a> Delta<'a> {
    pub fn new(cpu: &Cpu, x: &Tensor, loras: &LoraRows<'a, Cpu>, unembed: bool) -> Self {
        let LoraRows { part, ref rows, lora } = *loras;
        // A tied head goes the embedding's way back.
        let (down, up) = match unembed {
            true => (&lora.up, &lora.down),
            false => (&lora.down, &lora.up),
        };
        let mut inner = vec![0.0; rows.len() * lora.rank];
        let out = Shared(inner.as_mut_ptr());
        cpu.rows(rows.len(), x.width * lora.rank, |range| {
            for row in range {
                let x = x.row(rows.start + row);
                // SAFETY: each row is written by one thread.
                unsafe {
                    let inner = std::slice::from_raw_parts_mut(out.at(row * lora.rank), lora.rank);
                    cpu.level.run(Down { x, down, scale: lora.scale, inner });
                }
            }
        });
        Self { part, rows: rows.clone(), inner, up, rank: lora.rank }
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
        let Delta { rows, inner, up, rank, .. } = self.delta;
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
                S::store_part(y, sum, lanes);
            }
        }
    }
}
