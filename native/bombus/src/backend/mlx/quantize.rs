//! Quantization of matrices in memory, by MLX's own operations.
//!
//! mlx-rs knows the affine mode only: here mlx-c is called itself, on the thread's stream.

use super::{Device, Mlx, arrays};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::quant::{Array, Mode, Quantized, Scheme};
use crate::runtime::threads::on_thread;
use mlx_rs::Stream;
use mlx_sys::{mlx_array, mlx_optional_dtype, mlx_optional_int, mlx_vector_array};
use std::ffi::CStr;

type MlxArray = mlx_rs::Array;

pub fn quantize(device: Device, w: &Array, scheme: Scheme) -> Result<Quantized> {
    let w = w.clone();
    run(device, move |stream| {
        let [weight, scales, biases] = quantize_mlx(&from(&w)?, scheme, stream)?;
        let biases = biases.map(|biases| to(&biases)).transpose()?;
        let missing = || Error::Backend("MLX gave no scales".into());
        Ok(Quantized {
            weight: to(&weight.ok_or_else(missing)?)?,
            scales: to(&scales.ok_or_else(missing)?)?,
            biases,
        })
    })
}

pub fn dequantize(device: Device, matrix: &Quantized, scheme: Scheme) -> Result<Array> {
    let matrix = matrix.clone();
    run(device, move |stream| to(&dequantize_mlx(&Matrix::new(&matrix)?, scheme, stream)?))
}

pub fn matmul(
    device: Device,
    x: &Array,
    matrix: &Quantized,
    transpose: bool,
    scheme: Scheme,
) -> Result<Array> {
    let (x, matrix) = (x.clone(), matrix.clone());
    run(device, move |stream| {
        to(&matmul_mlx(&from(&x)?, &Matrix::new(&matrix)?, transpose, scheme, stream)?)
    })
}

/// On a thread that MLX's stream of the device belongs to.
fn run<T: Send + 'static>(
    device: Device,
    work: impl FnOnce(&Stream) -> Result<T> + Send + 'static,
) -> Result<T> {
    on_thread(move || {
        let mlx = Mlx::new(device)?;
        let result = mlx.scope(|| work(&mlx.stream));
        mlx.finish();
        result
    })
}

fn from(array: &Array) -> Result<MlxArray> {
    arrays::from_bytes(array.dtype, &array.shape, &array.bytes)
}

fn to(array: &MlxArray) -> Result<Array> {
    let (dtype, bytes) = arrays::to_bytes(array)?;
    let shape = array.shape().iter().map(|axis| *axis as usize).collect();
    Array::new(dtype, shape, bytes)
}

struct Matrix {
    weight: MlxArray,
    scales: MlxArray,
    biases: Option<MlxArray>,
}

impl Matrix {
    fn new(matrix: &Quantized) -> Result<Self> {
        let Quantized { weight, scales, biases } = matrix;
        let biases = biases.as_ref().map(from).transpose()?;
        Ok(Self { weight: from(weight)?, scales: from(scales)?, biases })
    }
}

fn name(mode: Mode) -> &'static CStr {
    match mode {
        Mode::Affine => c"affine",
        Mode::Mxfp4 => c"mxfp4",
        Mode::Mxfp8 => c"mxfp8",
        Mode::Nvfp4 => c"nvfp4",
    }
}

fn some(number: usize) -> mlx_optional_int {
    mlx_optional_int { value: number as i32, has_value: true }
}

/// What mlx-c answers; its message went to the handler of mlx-rs, which keeps it to itself.
fn checked(status: i32, scheme: Scheme) -> Result<()> {
    match status {
        0 => Ok(()),
        _ => Err(Error::Backend(format!("MLX refused to work on {scheme:?}"))),
    }
}

/// An array in mlx-c's sense that holds nothing, freed when it goes.
#[allow(unsafe_code)]
fn nothing() -> MlxArray {
    // SAFETY: a new array is owned by whoever asked for it.
    unsafe { MlxArray::from_ptr(mlx_sys::mlx_array_new()) }
}

/// Calls an operation that writes one array.
#[allow(unsafe_code)]
fn one(scheme: Scheme, operation: impl FnOnce(*mut mlx_array) -> i32) -> Result<MlxArray> {
    // SAFETY: as in `nothing`; the operation puts another array in its place.
    let mut result = unsafe { mlx_sys::mlx_array_new() };
    let status = operation(&mut result);
    // SAFETY: it is still this function's.
    let result = unsafe { MlxArray::from_ptr(result) };
    checked(status, scheme)?;
    Ok(result)
}

#[allow(unsafe_code)]
fn quantize_mlx(w: &MlxArray, scheme: Scheme, stream: &Stream) -> Result<[Option<MlxArray>; 3]> {
    let global_scale = nothing();
    // SAFETY: all arguments live until the end of this function, and what is made here is freed here.
    unsafe {
        let mut results: mlx_vector_array = mlx_sys::mlx_vector_array_new();
        let status = mlx_sys::mlx_quantize(
            &mut results,
            w.as_ptr(),
            some(scheme.layout.group_size),
            some(scheme.layout.bits),
            name(scheme.mode).as_ptr(),
            global_scale.as_ptr(),
            stream.as_ptr(),
        );
        let count = if status == 0 { mlx_sys::mlx_vector_array_size(results) } else { 0 };
        let result = |place: usize| {
            (place < count).then(|| {
                let mut array = mlx_sys::mlx_array_new();
                mlx_sys::mlx_vector_array_get(&mut array, results, place);
                MlxArray::from_ptr(array)
            })
        };
        let arrays = [result(0), result(1), result(2)];
        mlx_sys::mlx_vector_array_free(results);
        checked(status, scheme)?;
        Ok(arrays)
    }
}

#[allow(unsafe_code)]
fn dequantize_mlx(matrix: &Matrix, scheme: Scheme, stream: &Stream) -> Result<MlxArray> {
    let nothing = nothing();
    let none = mlx_optional_dtype { value: mlx_sys::mlx_dtype__MLX_FLOAT32, has_value: false };
    // SAFETY: all arguments live until the end of this function.
    one(scheme, |result| unsafe {
        mlx_sys::mlx_dequantize(
            result,
            matrix.weight.as_ptr(),
            matrix.scales.as_ptr(),
            matrix.biases.as_ref().unwrap_or(&nothing).as_ptr(),
            some(scheme.layout.group_size),
            some(scheme.layout.bits),
            name(scheme.mode).as_ptr(),
            nothing.as_ptr(),
            none,
            stream.as_ptr(),
        )
    })
}

#[allow(unsafe_code)]
fn matmul_mlx(
    x: &MlxArray,
    matrix: &Matrix,
    transpose: bool,
    scheme: Scheme,
    stream: &Stream,
) -> Result<MlxArray> {
    let nothing = nothing();
    // SAFETY: as above.
    one(scheme, |result| unsafe {
        mlx_sys::mlx_quantized_matmul(
            result,
            x.as_ptr(),
            matrix.weight.as_ptr(),
            matrix.scales.as_ptr(),
            matrix.biases.as_ref().unwrap_or(&nothing).as_ptr(),
            transpose,
            some(scheme.layout.group_size),
            some(scheme.layout.bits),
            name(scheme.mode).as_ptr(),
            stream.as_ptr(),
        )
    })
}
