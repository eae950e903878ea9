//! Linear layers, quantized or dense, and the adapters' pairs.

use super::{LinearWeights, LoraRows, Mlx, array};
use crate::config::Quantization;
use crate::error::Result;
use mlx_rs::ops::indexing::take_axis;
use mlx_rs::{Array, ops, transforms};
use std::ops::Range;

/// One or several linear layers with the same input. Neighbours whose weights agree in kind are
/// one matrix, so that one kernel serves them.
pub struct Linear {
    blocks: Vec<Block>,
}

struct Block {
    weight: Weight,
    /// Where each layer but the first begins in the output.
    splits: Vec<i32>,
}

enum Weight {
    /// weight: `[out, in * bits / 32]`, scales, biases: `[out, in / group_size]`
    Quantized { weight: Array, scales: Array, biases: Array, layout: Quantization },
    /// `[out, in]`
    Dense(Array),
}

impl Linear {
    pub fn load(parts: &[LinearWeights]) -> Result<Self> {
        let mut blocks = vec![];
        for block in parts.chunk_by(fusible) {
            let mut end = 0;
            let ends = block.iter().map(|part| {
                end += part.out_features as i32;
                end
            });
            let mut splits: Vec<i32> = ends.collect();
            splits.pop();
            blocks.push(Block { weight: Weight::load(block)?, splits });
        }
        Ok(Self { blocks })
    }

    /// x: `[rows, in]` -> one `[rows, out]` for each layer
    pub fn apply(&self, x: &Array) -> Result<Vec<Array>> {
        let mut outputs = vec![];
        for block in &self.blocks {
            let y = block.weight.matmul(x)?;
            match block.splits[..] {
                [] => outputs.push(y),
                ref splits => outputs.extend(y.split_at_indices(splits, -1)?),
            }
        }
        Ok(outputs)
    }

    /// The rows `ids` of an embedding, dequantized: `[ids, hidden]`.
    pub fn take(&self, ids: &Array) -> Result<Array> {
        self.blocks[0].weight.take(ids)
    }
}

/// Whether two layers may be one matrix.
fn fusible(one: &LinearWeights, other: &LinearWeights) -> bool {
    match (&one.quantized, &other.quantized) {
        (Some(one), Some(other)) => {
            one.layout == other.layout && one.scales.dtype == other.scales.dtype
        }
        (None, None) => one.weight.dtype == other.weight.dtype,
        _ => false,
    }
}

impl Weight {
    fn load(parts: &[LinearWeights]) -> Result<Self> {
        let weight = stack(parts.iter().map(|part| array::load(&part.weight)))?;
        let quantized: Option<Vec<_>> = parts.iter().map(|part| part.quantized.as_ref()).collect();
        let Some(quantized) = quantized else { return Ok(Weight::Dense(weight)) };
        let scales = stack(quantized.iter().map(|part| array::load(&part.scales)))?;
        let biases = stack(quantized.iter().map(|part| array::load(&part.biases)))?;
        Ok(Weight::Quantized { weight, scales, biases, layout: quantized[0].layout })
    }

    fn matmul(&self, x: &Array) -> Result<Array> {
        Ok(match self {
            Weight::Dense(weight) => x.matmul(weight.t())?,
            Weight::Quantized { weight, scales, biases, layout } => {
                let (group_size, bits) = (layout.group_size as i32, layout.bits as i32);
                ops::quantized_matmul(x, weight, scales, biases, true, group_size, bits)?
            }
        })
    }

    fn take(&self, ids: &Array) -> Result<Array> {
        Ok(match self {
            Weight::Dense(weight) => take_axis(weight, ids, 0)?,
            Weight::Quantized { weight, scales, biases, layout } => {
                let row = |array| take_axis(array, ids, 0);
                let (group_size, bits) = (layout.group_size as i32, layout.bits as i32);
                ops::dequantize(row(weight)?, row(scales)?, &row(biases)?, group_size, bits)?
            }
        })
    }
}

/// Stacks rows now, so that the parts' memory comes back.
fn stack(parts: impl Iterator<Item = Result<Array>>) -> Result<Array> {
    let parts = parts.collect::<Result<Vec<_>>>()?;
    if let [one] = &parts[..] {
        return Ok(one.clone());
    }
    let stacked = ops::concatenate(&parts, 0)?;
    transforms::eval([&stacked])?;
    Ok(stacked)
}

/// One adapter's pair for one layer: a `[in, rank]`, b `[rank, out]`.
pub struct Lora {
    pub a: Array,
    pub b: Array,
    pub scale: Array,
}

impl Lora {
    pub fn apply(&self, x: &Array) -> Result<Array> {
        self.scaled(x.matmul(&self.a)?.matmul(&self.b)?)
    }

    /// ids: `[rows]` -> `[rows, hidden]`
    pub fn embed(&self, ids: &Array) -> Result<Array> {
        self.scaled(take_axis(&self.a, ids, 0)?.matmul(&self.b)?)
    }

    /// x: `[rows, hidden]` -> `[rows, vocab]`
    pub fn unembed(&self, x: &Array) -> Result<Array> {
        self.scaled(x.matmul(self.b.t())?.matmul(self.a.t())?)
    }

    fn scaled(&self, delta: Array) -> Result<Array> {
        // A bf16 adapter stays bf16, as in Python, where the scale is a weak scalar.
        Ok(delta.multiply(self.scale.as_dtype(delta.dtype())?)?)
    }
}

/// `y`, with what the adapters of output `part` add to their rows; `delta` computes it.
pub fn add_loras(
    y: Array,
    part: usize,
    loras: &[LoraRows<Mlx>],
    delta: impl Fn(&Range<usize>, &Lora) -> Result<Array>,
) -> Result<Array> {
    let mut pieces = vec![];
    let mut done = 0;
    for LoraRows { rows, lora, .. } in loras.iter().filter(|lora| lora.part == part) {
        if done < rows.start {
            pieces.push(array::rows(&y, &(done..rows.start))?);
        }
        let delta = delta(rows, lora)?.as_dtype(y.dtype())?;
        pieces.push(array::rows(&y, rows)?.add(delta)?);
        done = rows.end;
    }
    let all = y.dim(0) as usize;
    match pieces.len() {
        0 => return Ok(y),
        _ if done < all => pieces.push(array::rows(&y, &(done..all))?),
        1 => return Ok(pieces.remove(0)),
        _ => {}
    }
    Ok(ops::concatenate(&pieces, 0)?)
}
