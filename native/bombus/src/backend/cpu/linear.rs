//! Linear layers: products with their weights, biases, and what adapters add.

use super::float::Float;
use super::limbs::{Format, Limbs};
use super::lora::{Delta, Expand, number};
use super::rows::load_partial;
use super::simd::{Kernel, LANES, Simd};
use super::tensor::{SendPtr, Target, Tensor};
use super::weights::Weights;
use super::{Adapted, Cpu, LinearWeights, lock};
use crate::error::Result;
use crate::files::mapped::{Mapped, MappedFile};
use crate::runtime::metrics;
use std::sync::Arc;

/// One or several layers with the same input: one pass over the threads serves them all.
pub struct Linear {
    layers: Vec<Weights>,
    /// of each layer
    biases: Vec<Option<Vec<f32>>>,
    /// The numbers of a row of x; of an embedding, those of a token.
    pub width: usize,
    _gauge: metrics::Share,
}

impl Linear {
    pub fn load(layers: &[LinearWeights]) -> Result<Self> {
        let bias = |layer: &LinearWeights| layer.bias.as_ref().map(Float::read).transpose();
        let biases = layers.iter().map(bias).collect::<Result<Vec<_>>>()?;
        let layers = layers.iter().map(Weights::load).collect::<Result<Vec<_>>>()?;
        let mut gauge = metrics::Share::of(&metrics::CPU_BYTES);
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
                    unsafe { cpu.level.run(Expand { delta, target: target.clone() }) };
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
pub const GRAIN: usize = 24;

impl<'a> Adapted<'a, Cpu> {
    pub fn weights(&self) -> &'a Weights {
        match self {
            Adapted::Projection(linear, index) => &linear.layers[*index],
            Adapted::Embedding(embedding) | Adapted::TiedHead(embedding) => &embedding.layers[0],
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
