//! Between bytes, slices and MLX's arrays.

use crate::error::{Error, Result};
use crate::files::safetensors::TensorView;
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::{Array, Dtype, Stream};
use safetensors::tensor::Dtype as FileDtype;
use std::ops::Range;

impl From<mlx_rs::error::Exception> for Error {
    fn from(exception: mlx_rs::error::Exception) -> Self {
        let what = exception.what();
        // MLX's allocators say so in words of their own; there is no code to ask for.
        let memory = ["malloc", "allocate", "out of memory", "OutOfMemory"];
        match memory.iter().any(|word| what.contains(word)) {
            true => Error::OutOfMemory(what.into()),
            false => Error::Backend(what.into()),
        }
    }
}

/// Copies a tensor out of its file.
pub fn load(view: &TensorView) -> Result<Array> {
    from_bytes(view.dtype, &view.shape, &view.read()?)
}

#[allow(unsafe_code)]
pub fn from_bytes(dtype: FileDtype, shape: &[usize], bytes: &[u8]) -> Result<Array> {
    let dtype = match dtype {
        FileDtype::U8 => Dtype::Uint8,
        FileDtype::U32 => Dtype::Uint32,
        FileDtype::F32 => Dtype::Float32,
        FileDtype::F16 => Dtype::Float16,
        FileDtype::BF16 => Dtype::Bfloat16,
        other => return Err(Error::Unsupported(format!("tensors of {other:?} are not supported"))),
    };
    let shape: Result<Vec<i32>> = shape
        .iter()
        .map(|&size| i32::try_from(size).map_err(|_| Error::Checkpoint(format!("{size} rows"))))
        .collect();
    // SAFETY: whoever made the bytes has checked that dtype and shape make them up, and
    // MLX copies them before it returns (it reads them as bytes, so they need no alignment).
    let array = unsafe { Array::from_raw_data(bytes.as_ptr().cast(), &shape?, dtype) };
    match array.as_ptr().ctx.is_null() {
        true => Err(Error::OutOfMemory(format!("a tensor of {} bytes", bytes.len()))),
        false => Ok(array),
    }
}

/// Computes an array; -> its type and its numbers
pub fn to_bytes(array: &Array) -> Result<(FileDtype, Vec<u8>)> {
    let array = array.contiguous()?;
    array.eval()?;
    Ok(match array.dtype() {
        Dtype::Uint8 => (FileDtype::U8, values::<u8>(&array)?),
        Dtype::Uint32 => (FileDtype::U32, bytes_of(&array, |number: u32| number.to_le_bytes())?),
        Dtype::Float32 => (FileDtype::F32, bytes_of(&array, |number: f32| number.to_le_bytes())?),
        Dtype::Float16 => {
            (FileDtype::F16, bytes_of(&array, |number: half::f16| number.to_le_bytes())?)
        }
        Dtype::Bfloat16 => {
            (FileDtype::BF16, bytes_of(&array, |number: half::bf16| number.to_le_bytes())?)
        }
        other => return Err(Error::Unsupported(format!("arrays of {other:?} are not supported"))),
    })
}

fn bytes_of<T: mlx_rs::ArrayElement + Clone, const N: usize>(
    array: &Array,
    bytes: fn(T) -> [u8; N],
) -> Result<Vec<u8>> {
    Ok(values::<T>(array)?.into_iter().flat_map(bytes).collect())
}

/// `x[range]`, the array itself where that is all of it.
pub fn rows(x: &Array, range: &Range<usize>) -> Result<Array> {
    if range.start == 0 && range.end as i32 == x.dim(0) {
        return Ok(x.clone());
    }
    index(x, range.start as i32..range.end as i32)
}

/// `x[place]` in the scope's stream: `try_index` of mlx-rs goes to this thread's default one, whatever the scope,
/// and the two then wait for each other.
pub fn index<I>(x: &Array, place: I) -> Result<Array>
where
    Array: TryIndexOp<I>,
{
    Ok(x.try_index_device(place, Stream::thread_local_or_default())?)
}

/// `x[place] = values`, as `index`.
pub fn set<I>(x: &mut Array, place: I, values: Array) -> Result<()>
where
    Array: TryIndexMutOp<I, Array>,
{
    Ok(x.try_index_mut_device(place, values, Stream::thread_local_or_default())?)
}

pub fn indices(rows: &[usize]) -> Array {
    let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    Array::from_slice(&rows, &[rows.len() as i32])
}

/// The values of an evaluated array.
pub fn values<T: mlx_rs::ArrayElement + Clone>(array: &Array) -> Result<Vec<T>> {
    array.to_vec_exact().map_err(|error| Error::Backend(error.to_string()))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Runs `work` on MLX's CPU device.
    pub fn on_cpu(work: impl FnOnce()) {
        // The first operation that can fail sets MLX's error handler.
        mlx_rs::memory::active_memory().unwrap();
        mlx_rs::with_stream(&Stream::new_with_device(&mlx_rs::Device::cpu()), work);
    }
}
