//! Between bytes, slices and MLX's arrays.

use crate::error::{Error, Result};
use crate::tensor_file::TensorView;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, Dtype};
use safetensors::tensor::Dtype as FileDtype;
use std::ops::Range;

/// Copies a tensor out of its file.
#[allow(unsafe_code)]
pub fn load(view: &TensorView) -> Result<Array> {
    let dtype = match view.dtype {
        FileDtype::U32 => Dtype::Uint32,
        FileDtype::F32 => Dtype::Float32,
        FileDtype::F16 => Dtype::Float16,
        FileDtype::BF16 => Dtype::Bfloat16,
        other => return Err(Error::Unsupported(format!("tensors of {other:?} are not supported"))),
    };
    let shape: Result<Vec<i32>> = view
        .shape
        .iter()
        .map(|&size| i32::try_from(size).map_err(|_| Error::Checkpoint(format!("{size} rows"))))
        .collect();
    let bytes = view.read()?;
    // SAFETY: the safetensors crate has checked that dtype and shape make up these bytes, and
    // MLX copies them before it returns (it reads them as bytes, so they need no alignment).
    let array = unsafe { Array::from_raw_data(bytes.as_ptr().cast(), &shape?, dtype) };
    match array.as_ptr().ctx.is_null() {
        true => Err(Error::OutOfMemory(format!("a tensor of {} bytes", bytes.len()))),
        false => Ok(array),
    }
}

/// `x[range]`, the array itself where that is all of it.
pub fn rows(x: &Array, range: &Range<usize>) -> Result<Array> {
    if range.start == 0 && range.end as i32 == x.dim(0) {
        return Ok(x.clone());
    }
    Ok(x.try_index(range.start as i32..range.end as i32)?)
}

pub fn indices(rows: &[usize]) -> Array {
    let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    Array::from_slice(&rows, &[rows.len() as i32])
}

/// The values of an evaluated array.
pub fn values<T: mlx_rs::ArrayElement + Clone>(array: &Array) -> Result<Vec<T>> {
    array.to_vec_exact().map_err(|error| Error::Backend(error.to_string()))
}
