//! Quantization of matrices in memory, by MLX's own operations.

use super::{Device, Mlx, array};
use crate::backend::Backend;
use crate::config::Quantization;
use crate::engine::on_thread;
use crate::error::Result;
use crate::quantization::{Array, Quantized};
use mlx_rs::ops;

type MlxArray = mlx_rs::Array;

pub fn quantize(device: Device, w: &Array, layout: Quantization) -> Result<Quantized> {
    let w = w.clone();
    run(device, move || {
        let (bits, group_size) = (layout.bits as i32, layout.group_size as i32);
        let (weight, scales, biases) = ops::quantize(from(&w)?, group_size, bits)?;
        Ok(Quantized { weight: to(&weight)?, scales: to(&scales)?, biases: to(&biases)? })
    })
}

pub fn dequantize(device: Device, matrix: &Quantized, layout: Quantization) -> Result<Array> {
    let matrix = matrix.clone();
    run(device, move || {
        let (bits, group_size) = (layout.bits as i32, layout.group_size as i32);
        let Quantized { weight, scales, biases } = &matrix;
        let biases = from(biases)?;
        to(&ops::dequantize(from(weight)?, from(scales)?, &biases, group_size, bits)?)
    })
}

pub fn matmul(
    device: Device,
    x: &Array,
    matrix: &Quantized,
    transpose: bool,
    layout: Quantization,
) -> Result<Array> {
    let (x, matrix) = (x.clone(), matrix.clone());
    run(device, move || {
        let (bits, group_size) = (layout.bits as i32, layout.group_size as i32);
        let Quantized { weight, scales, biases } = &matrix;
        let [x, weight, scales, biases] = [from(&x)?, from(weight)?, from(scales)?, from(biases)?];
        to(&ops::quantized_matmul(x, weight, scales, &biases, transpose, group_size, bits)?)
    })
}

/// On a thread that MLX's stream of the device belongs to.
fn run<T: Send + 'static>(
    device: Device,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    on_thread(move || Mlx::new(device)?.scope(work))
}

fn from(array: &Array) -> Result<MlxArray> {
    array::from_bytes(array.dtype, &array.shape, &array.bytes)
}

fn to(array: &MlxArray) -> Result<Array> {
    let (dtype, bytes) = array::to_bytes(array)?;
    let shape = array.shape().iter().map(|axis| *axis as usize).collect();
    Array::new(dtype, shape, bytes)
}
