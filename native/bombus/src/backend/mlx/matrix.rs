//! The weights of linear layers, quantized or dense, and products with them.

use super::{Device, LinearWeights, arrays, cuda};
use crate::error::Result;
use crate::spec::Quantization;
use mlx_rs::ops::indexing::take_axis;
use mlx_rs::{Array, Dtype, ops, transforms};

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

pub enum Weight {
    Quantized(Quantized),
    /// `[out, in]`
    Dense(Array),
}

impl Weight {
    pub fn nbytes(&self) -> usize {
        match self {
            Weight::Dense(weight) => weight.nbytes(),
            Weight::Quantized(Quantized { weight, scales, biases, .. }) => {
                weight.nbytes() + scales.nbytes() + biases.nbytes()
            }
        }
    }

    /// None where it is dense.
    pub fn matrix(&self) -> Option<Matrix<'_>> {
        let Weight::Quantized(Quantized { weight, scales, biases, layout, .. }) = self else {
            return None;
        };
        Some(Matrix {
            arrays: [weight, scales, biases],
            outputs: weight.dim(0) as usize,
            inputs: weight.dim(1) as usize * 32 / layout.bits,
            layout: *layout,
        })
    }

    pub fn load(layers: &[LinearWeights], device: Device) -> Result<Self> {
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

    pub fn matmul(&self, x: &Array) -> Result<Array> {
        Ok(match self {
            Weight::Dense(weight) => x.matmul(weight.t())?,
            Weight::Quantized(weight) => weight.matmul(x)?,
        })
    }

    pub fn take(&self, ids: &Array) -> Result<Array> {
        Ok(match self {
            Weight::Dense(weight) => take_axis(weight, ids, 0)?,
            Weight::Quantized(weight) => {
                let row = |array| take_axis(array, ids, 0);
                weight.dense(row(&weight.weight)?, row(&weight.scales)?, &row(&weight.biases)?)?
            }
        })
    }
}

/// weight: `[out, in * bits / 32]`, scales, biases: `[out, in / group_size]`
pub struct Quantized {
    weight: Array,
    scales: Array,
    biases: Array,
    layout: Quantization,
    device: Device,
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
pub fn stack(layers: impl Iterator<Item = Result<Array>>) -> Result<Array> {
    let layers = layers.collect::<Result<Vec<_>>>()?;
    if let [one] = &layers[..] {
        return Ok(one.clone());
    }
    let stacked = ops::concatenate(&layers, 0)?;
    transforms::eval([&stacked])?;
    Ok(stacked)
}
