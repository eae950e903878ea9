//! Linear layers, quantized or dense, and LoRA.

use super::{Adapted, Device, LinearWeights, LoraRows, LoraWeights, Mlx, arrays, cuda};
use crate::error::{Error, Result};
use crate::spec::Quantization;
use mlx_rs::ops::indexing::take_axis;
use mlx_rs::{Array, Dtype, ops, transforms};
use std::ops::Range;
use std::rc::Rc;

/// One or several linear layers with the same input. Neighbours whose weights agree in kind are
/// one matrix, so that one kernel serves them.
pub struct Linear {
    blocks: Vec<Block>,
    device: Device,
}

struct Block {
    weight: Weight,
    /// `[out]`, of all layers
    bias: Option<Array>,
    /// Where each layer but the first begins in the output.
    splits: Vec<i32>,
}

/// weight: `[out, in * bits / 32]`, scales, biases: `[out, in / group_size]`
struct Quantized {
    weight: Array,
    scales: Array,
    biases: Array,
    layout: Quantization,
    device: Device,
}

enum Weight {
    Quantized(Quantized),
    /// `[out, in]`
    Dense(Array),
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
    fn weight(&self, index: usize) -> (&Weight, usize) {
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
        let bytes = |block: &Block| match &block.weight {
            Weight::Dense(weight) => weight.nbytes(),
            Weight::Quantized(Quantized { weight, scales, biases, .. }) => {
                weight.nbytes() + scales.nbytes() + biases.nbytes()
            }
        };
        self.blocks.iter().map(bytes).sum()
    }

    /// All layers as one, where that is so and they are quantized.
    pub fn matrix(&self) -> Option<Matrix<'_>> {
        let [Block { weight: Weight::Quantized(quantized), .. }] = &self.blocks[..] else {
            return None;
        };
        let Quantized { weight, scales, biases, layout, .. } = quantized;
        Some(Matrix {
            arrays: [weight, scales, biases],
            outputs: weight.dim(0) as usize,
            inputs: weight.dim(1) as usize * 32 / layout.bits,
            layout: *layout,
        })
    }

    /// The rows `ids` of an embedding, dequantized: `[ids, hidden]`.
    pub fn take(&self, ids: &Array) -> Result<Array> {
        self.blocks[0].weight.take(ids)
    }
}

/// What the kernels for NVIDIA cards are made for.
const INT4_GROUP64: Quantization = Quantization { group_size: 64, bits: 4 };

/// A quantized weight: its codes, scales and biases.
pub struct Matrix<'a> {
    pub arrays: [&'a Array; 3],
    pub outputs: usize,
    pub inputs: usize,
    layout: Quantization,
}

impl Matrix<'_> {
    /// 4 bits in groups of 64, and bfloat16.
    pub fn is_int4_group64(&self) -> bool {
        self.layout == INT4_GROUP64 && self.arrays[1].dtype() == Dtype::Bfloat16
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

impl Weight {
    fn load(layers: &[LinearWeights], device: Device) -> Result<Self> {
        let stack = |arrays: &mut dyn Iterator<Item = Result<Array>>| {
            let stacked = stack(arrays)?;
            if device.is_cuda() { cuda::on_card(&stacked) } else { Ok(stacked) }
        };
        let weight = stack(&mut layers.iter().map(|layer| arrays::load(&layer.weight)))?;
        let quantized: Option<Vec<_>> =
            layers.iter().map(|layer| layer.quantized.as_ref()).collect();
        let Some(quantized) = quantized else { return Ok(Weight::Dense(weight)) };
        let scales = stack(&mut quantized.iter().map(|layer| arrays::load(&layer.scales)))?;
        let biases = stack(&mut quantized.iter().map(|layer| arrays::load(&layer.biases)))?;
        let layout = quantized[0].layout;
        Ok(Weight::Quantized(Quantized { weight, scales, biases, layout, device }))
    }

    fn matmul(&self, x: &Array) -> Result<Array> {
        Ok(match self {
            Weight::Dense(weight) => x.matmul(weight.t())?,
            Weight::Quantized(weight) => weight.matmul(x)?,
        })
    }

    fn take(&self, ids: &Array) -> Result<Array> {
        Ok(match self {
            Weight::Dense(weight) => take_axis(weight, ids, 0)?,
            Weight::Quantized(weight) => {
                let row = |array| take_axis(array, ids, 0);
                weight.dense(row(&weight.weight)?, row(&weight.scales)?, &row(&weight.biases)?)?
            }
        })
    }
}

/// From so many rows on, a card does better with a dense copy of the matrix. Measured on an H200, 4 bits,
/// Qwen3-8B's shapes: at 128 rows 228 us against 260, at 256 rows 438 against 278. Where our own kernel makes
/// that copy, fewer rows take it too: MLX would compile its product for half a minute first.
const MANY_ROWS: i32 = 192;

impl Quantized {
    fn matmul(&self, x: &Array) -> Result<Array> {
        let Self { weight, scales, biases, layout, device } = self;
        if device.is_cuda()
            && let Some(product) = self.cuda_matmul(x)?
        {
            return Ok(product);
        }
        let (group_size, bits) = (layout.group_size as i32, layout.bits as i32);
        Ok(ops::quantized_matmul(x, weight, scales, biases, true, group_size, bits)?)
    }

    /// None where MLX's own product is the better one.
    fn cuda_matmul(&self, x: &Array) -> Result<Option<Array>> {
        let Self { weight, scales, biases, layout, .. } = self;
        let int4_group64 =
            *layout == INT4_GROUP64 && [x, scales].map(Array::dtype) == [Dtype::Bfloat16; 2];
        if int4_group64
            && cuda::few_rows::serves(x, weight)
            && let Some(kernel) = cuda::few_rows::kernel()
        {
            return kernel.matmul(x, weight, scales, biases).map(Some);
        }
        let dense = match int4_group64 {
            true => cuda::operations::dense(weight, scales, biases)?,
            false => None,
        };
        let dense = match dense {
            Some(dense) => dense,
            None if x.dim(0) >= MANY_ROWS || rounds(x) => {
                self.dense(weight.clone(), scales.clone(), biases)?
            }
            None => return Ok(None),
        };
        Ok(Some(x.matmul(dense.t())?))
    }

    fn dense(&self, weight: Array, scales: Array, biases: &Array) -> Result<Array> {
        let (group_size, bits) = (self.layout.group_size as i32, self.layout.bits as i32);
        Ok(ops::dequantize(weight, scales, biases, group_size, bits)?)
    }
}

/// Whether MLX's own product may round float32 to TF32, 10 bits of 23. That for Hopper cards does, where there
/// are no more inputs than a group has; of the others it is not known. Dense ones do not (`device::init`), at the
/// price of a dense copy for every product.
fn rounds(x: &Array) -> bool {
    x.dtype() == Dtype::Float32 && x.dim(0) > 1
}

/// Stacks rows now, so that the layers' memory comes back.
fn stack(layers: impl Iterator<Item = Result<Array>>) -> Result<Array> {
    let layers = layers.collect::<Result<Vec<_>>>()?;
    if let [one] = &layers[..] {
        return Ok(one.clone());
    }
    let stacked = ops::concatenate(&layers, 0)?;
    transforms::eval([&stacked])?;
    Ok(stacked)
}

/// LoRA A and B of one layer: a `[in, rank]`, b `[rank, out]`.
pub struct Lora {
    a: Array,
    b: Array,
    scale: Array,
    /// DoRA: what each output is multiplied with
    factors: Option<Array>,
    /// or the whole of a token's embedding
    by_token: bool,
    /// For the kernel that takes whole steps, where it serves this LoRA.
    pub packed: Option<Rc<cuda::Packed>>,
}

impl Lora {
    pub fn load(weights: &LoraWeights, adapted: Adapted<Mlx>) -> Result<Self> {
        let [mut a, mut b] = [arrays::load(&weights.a)?, arrays::load(&weights.b)?];
        if weights.transposed {
            (a, b) = (a.t(), b.t());
        }
        let embedding = matches!(adapted, Adapted::Embedding(_));
        let by_token = embedding && !weights.transposed;
        let scale = Array::from_f32(weights.scale);
        let mut lora = Self { a, b, scale, factors: None, by_token, packed: None };
        if let Some(magnitude) = &weights.magnitude {
            let magnitude = arrays::load(magnitude)?.as_dtype(Dtype::Float32)?;
            let by_column = embedding && weights.transposed;
            let factors = magnitude.divide(lora.norms(adapted, by_column)?)?;
            transforms::eval([&factors])?;
            lora.factors = Some(factors);
        } else if let Adapted::Projection(linear, _) = adapted
            && linear.device.is_cuda()
        {
            lora.packed = cuda::Packed::new(&lora.a, &lora.b, weights.scale)?;
        }
        Ok(lora)
    }

    /// The norms of the rows of `W + scale * B A` (a row belongs to an output, or to a token), or of
    /// its columns.
    fn norms(&self, adapted: Adapted<Mlx>, by_column: bool) -> Result<Array> {
        // Dequantized, the largest matrices are too large for one go.
        const AT_ONCE: usize = 16 * 1024;
        let (linear, index, [left, right]) = match adapted {
            Adapted::Projection(linear, index) => (linear, index, [&self.b.t(), &self.a.t()]),
            Adapted::TiedHead(embedding) => (embedding, 0, [&self.b.t(), &self.a.t()]),
            Adapted::Embedding(embedding) => (embedding, 0, [&self.a, &self.b]),
        };
        let (weight, first) = linear.weight(index);
        let count = left.dim(0) as usize;
        let mut sums = vec![];
        for start in (0..count).step_by(AT_ONCE) {
            let rows = start..count.min(start + AT_ONCE);
            let ids: Vec<usize> = rows.clone().map(|row| first + row).collect();
            let own = weight.take(&arrays::indices(&ids))?.as_dtype(Dtype::Float32)?;
            let delta = arrays::rows(left, &rows)?.as_dtype(Dtype::Float32)?;
            let delta = delta.matmul(right.as_dtype(Dtype::Float32)?)?.multiply(&self.scale)?;
            let axis = if by_column { 0 } else { 1 };
            let sum = own.add(delta)?.square()?.sum_axis(axis, false)?;
            transforms::eval([&sum])?;
            sums.push(sum);
        }
        let sums = match by_column {
            true => ops::stack(&sums, 0)?.sum_axis(0, false)?,
            false => ops::concatenate(&sums, 0)?,
        };
        Ok(sums.sqrt()?)
    }

    /// x: `[rows, in]`; what `y` becomes
    pub fn apply(&self, x: &Array, y: Array) -> Result<Array> {
        let y = self.add(y, x.matmul(&self.a)?.matmul(&self.b)?, self.factors.clone())?;
        Ok(y.as_dtype(x.dtype())?)
    }

    pub fn is_dora(&self) -> bool {
        self.factors.is_some()
    }

    /// ids: `[rows]`; what their embeddings become
    pub fn embed(&self, ids: &Array, embedded: Array) -> Result<Array> {
        let own = |factors| Ok::<_, Error>(take_axis(factors, ids, 0)?.reshape(&[-1, 1])?);
        let factors = match &self.factors {
            Some(factors) if self.by_token => Some(own(factors)?),
            factors => factors.clone(),
        };
        self.add(embedded, take_axis(&self.a, ids, 0)?.matmul(&self.b)?, factors)
    }

    fn add(&self, y: Array, delta: Array, factors: Option<Array>) -> Result<Array> {
        // A bf16 adapter stays bf16, as in Python, where the scale is a weak scalar.
        let delta = delta.multiply(self.scale.as_dtype(delta.dtype())?)?;
        Ok(match factors {
            None => y.add(delta.as_dtype(y.dtype())?)?,
            // Rounded once.
            Some(factors) => {
                let sum = y.as_dtype(Dtype::Float32)?.add(delta)?;
                sum.multiply(factors)?.as_dtype(y.dtype())?
            }
        })
    }
}

/// `y`, with what the adapters of layer `index` make of their rows: `apply` says what.
pub fn apply_loras(
    y: Array,
    index: usize,
    loras: &[LoraRows<Mlx>],
    apply: impl Fn(&Range<usize>, &Lora, Array) -> Result<Array>,
) -> Result<Array> {
    let mut blocks = vec![];
    let mut done = 0;
    for LoraRows { rows, lora, .. } in loras.iter().filter(|lora| lora.index == index) {
        if done < rows.start {
            blocks.push(arrays::rows(&y, &(done..rows.start))?);
        }
        blocks.push(apply(rows, lora, arrays::rows(&y, rows)?)?);
        done = rows.end;
    }
    let all = y.dim(0) as usize;
    match blocks.len() {
        0 => return Ok(y),
        _ if done < all => blocks.push(arrays::rows(&y, &(done..all))?),
        1 => return Ok(blocks.remove(0)),
        _ => {}
    }
    Ok(ops::concatenate(&blocks, 0)?)
}
