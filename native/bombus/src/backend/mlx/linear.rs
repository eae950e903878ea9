//! Linear layers that share an input.

use super::matrix::{Matrix, Weight, stack};
use super::{Device, LinearWeights, arrays, cuda};
use crate::error::Result;
use mlx_rs::Array;

/// One or several linear layers with the same input. Neighbours whose weights agree in kind are
/// one matrix, so that one kernel serves them.
pub struct Linear {
    blocks: Vec<Block>,
    pub device: Device,
}

struct Block {
    weight: Weight,
    /// `[out]`, of all layers
    bias: Option<Array>,
    /// Where each layer but the first begins in the output.
    splits: Vec<i32>,
}

impl Linear {
    pub fn load(layers: &[LinearWeights], device: Device) -> Result<Self> {
        let mut blocks = vec![];
        for block in layers.chunk_by(can_fuse) {
            let mut end = 0;
            let ends = block.iter().map(|layer| {
                end += layer.out_features as i32;
                end
            });
            let mut splits: Vec<i32> = ends.collect();
            splits.pop();
            let (weight, bias) = (Weight::load(block, device)?, bias(block, device)?);
            blocks.push(Block { weight, bias, splits });
        }
        Ok(Self { blocks, device })
    }

    /// x: `[rows, in]` -> one `[rows, out]` for each layer
    pub fn apply(&self, x: &Array) -> Result<Vec<Array>> {
        self.outputs(x, |block, y| match &block.bias {
            Some(bias) => Ok(y.add(bias)?),
            None => Ok(y),
        })
    }

    /// The same without biases.
    pub fn product(&self, x: &Array) -> Result<Vec<Array>> {
        self.outputs(x, |_, y| Ok(y))
    }

    fn outputs(
        &self,
        x: &Array,
        finish: impl Fn(&Block, Array) -> Result<Array>,
    ) -> Result<Vec<Array>> {
        let mut outputs = vec![];
        for block in &self.blocks {
            let y = finish(block, block.weight.matmul(x)?)?;
            match block.splits[..] {
                [] => outputs.push(y),
                ref splits => outputs.extend(y.split_at_indices(splits, -1)?),
            }
        }
        Ok(outputs)
    }

    /// A layer's bias, `[out]`.
    pub fn bias(&self, index: usize) -> Result<Option<Array>> {
        let (block, place, _) = self.block(index);
        let Some(bias) = &block.bias else { return Ok(None) };
        match block.splits[..] {
            [] => Ok(Some(bias.clone())),
            ref splits => Ok(Some(bias.split_at_indices(splits, -1)?.swap_remove(place))),
        }
    }

    /// The bias of all layers, where they are one matrix.
    pub fn bias_of_all(&self) -> Option<&Array> {
        match &self.blocks[..] {
            [block] => block.bias.as_ref(),
            _ => None,
        }
    }

    /// The matrix that a layer is in, and the first of its rows there.
    pub fn weight(&self, index: usize) -> (&Weight, usize) {
        let (block, _, first) = self.block(index);
        (&block.weight, first)
    }

    /// The block that a layer is in, its place and its first row there.
    fn block(&self, index: usize) -> (&Block, usize, usize) {
        let mut before = 0;
        for block in &self.blocks {
            if index <= before + block.splits.len() {
                let place = index - before;
                let first = place.checked_sub(1).map_or(0, |split| block.splits[split]);
                return (block, place, first as usize);
            }
            before += block.splits.len() + 1;
        }
        unreachable!("layer {index} of {before}")
    }

    /// The bytes of its weights.
    pub fn nbytes(&self) -> usize {
        self.blocks.iter().map(|block| block.weight.nbytes()).sum()
    }

    /// All layers as one, where that is so and they are quantized.
    pub fn matrix(&self) -> Option<Matrix<'_>> {
        match &self.blocks[..] {
            [block] => block.weight.matrix(),
            _ => None,
        }
    }

    /// The rows `ids` of an embedding, dequantized: `[ids, hidden]`.
    pub fn take(&self, ids: &Array) -> Result<Array> {
        self.blocks[0].weight.take(ids)
    }
}

/// Whether two layers may be one matrix.
fn can_fuse(one: &LinearWeights, other: &LinearWeights) -> bool {
    match (&one.quantized, &other.quantized) {
        _ if one.bias.is_some() != other.bias.is_some() => false,
        (Some(one), Some(other)) => {
            one.layout == other.layout && one.scales.dtype == other.scales.dtype
        }
        (None, None) => one.weight.dtype == other.weight.dtype,
        _ => false,
    }
}

/// The biases of layers that are one matrix.
fn bias(layers: &[LinearWeights], device: Device) -> Result<Option<Array>> {
    let biases: Option<Vec<_>> = layers.iter().map(|layer| layer.bias.as_ref()).collect();
    let Some(biases) = biases else { return Ok(None) };
    let stacked = stack(&mut biases.into_iter().map(arrays::load))?;
    Ok(Some(if device.is_cuda() { cuda::on_card(&stacked)? } else { stacked }))
}
