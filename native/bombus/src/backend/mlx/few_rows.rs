//! Products of a few rows with a quantized matrix on an NVIDIA card, by a kernel of our own
//! (`few_rows.cu`), which MLX compiles on the card it meets. MLX's own moves a tenth to a fourth
//! of what the memory could at one row, and less per row at two and four.

use crate::config::Quantization;
use crate::error::{Error, Result};
use mlx_rs::{Array, Dtype, Stream, ops};
use mlx_sys::{mlx_fast_cuda_kernel, mlx_vector_array};
use std::ffi::CString;
use std::sync::OnceLock;

/// Four tiles of eight.
const MOST_ROWS: i32 = 32;
/// How many threads make 16 outputs: `WARPS` of the kernel.
const THREADS: i32 = 4 * 32;
/// Of the inputs, a warp takes so many at once: `STEP`.
const STEP: i32 = 256;

/// Whether the kernel is made for this product: x: `[rows, in]`, weight: `[out, in / 8]`.
pub fn serves(x: &Array, weight: &Array, scales: &Array, layout: Quantization) -> bool {
    layout == Quantization { group_size: 64, bits: 4 }
        && [x.dtype(), scales.dtype()] == [Dtype::Bfloat16; 2]
        && x.dim(0) <= MOST_ROWS
        && x.dim(1) % STEP == 0
        && weight.dim(0) % 16 == 0
}

pub struct Kernel(mlx_fast_cuda_kernel);

// SAFETY: it is its source and its names, which nothing changes.
#[allow(unsafe_code)]
unsafe impl Send for Kernel {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Kernel {}

/// The kernel, once for the process; none where it does not work (a card before Ampere, no CUDA).
pub fn kernel() -> Option<&'static Kernel> {
    static KERNEL: OnceLock<Option<Kernel>> = OnceLock::new();
    KERNEL.get_or_init(|| Kernel::new().filter(|kernel| kernel.works().unwrap_or(false))).as_ref()
}

impl Kernel {
    #[allow(unsafe_code)]
    fn new() -> Option<Self> {
        let source = CString::new(include_str!("few_rows.cu")).ok()?;
        let header = CString::new(include_str!("few_rows.cuh")).ok()?;
        let mut inputs = [c"x", c"w", c"s", c"b"].map(|name| name.as_ptr());
        let mut outputs = [c"y".as_ptr()];
        // SAFETY: the names and texts live until the end of this block, and are copied; the lists of
        // names are freed here, the kernel never.
        unsafe {
            let inputs = mlx_sys::mlx_vector_string_new_data(inputs.as_mut_ptr(), inputs.len());
            let outputs = mlx_sys::mlx_vector_string_new_data(outputs.as_mut_ptr(), outputs.len());
            let kernel = mlx_sys::mlx_fast_cuda_kernel_new(
                c"bombus_few_rows".as_ptr(),
                inputs,
                outputs,
                source.as_ptr(),
                header.as_ptr(),
                true,
                0,
            );
            mlx_sys::mlx_vector_string_free(inputs);
            mlx_sys::mlx_vector_string_free(outputs);
            (!kernel.ctx.is_null()).then_some(Self(kernel))
        }
    }

    /// Tries it on a product that MLX computes as well.
    fn works(&self) -> Result<bool> {
        let (group_size, bits) = (64, 4);
        let numbers = |rows: i32| -> Result<Array> {
            let numbers: Vec<f32> = (0..rows * STEP).map(|n| ((n * 7919) % 1009) as f32).collect();
            let numbers = Array::from_slice(&numbers, &[rows, STEP]);
            Ok(numbers.multiply(Array::from_f32(1e-3))?.as_dtype(Dtype::Bfloat16)?)
        };
        let x = numbers(3)?;
        let (weight, scales, biases) = ops::quantize(numbers(16)?, group_size, bits)?;
        let own = self.matmul(&x, &weight, &scales, &biases)?;
        let mlx = ops::quantized_matmul(&x, &weight, &scales, &biases, true, group_size, bits)?;
        // All sums are above 40; bfloat16 has 8 bits.
        Ok(ops::all_close(own, mlx, 0.02, 0.1, None)?)
    }

    /// x: `[rows, in]` -> `[rows, out]`
    #[allow(unsafe_code)]
    pub fn matmul(
        &self,
        x: &Array,
        weight: &Array,
        scales: &Array,
        biases: &Array,
    ) -> Result<Array> {
        let shape = [x.dim(0), weight.dim(0)];
        let stream = Stream::thread_local_or_default();
        let failed = || Error::Backend("MLX did not take the kernel for few rows".into());
        // SAFETY: what is made here is freed here, but for the output, which the array owns. The inputs
        // live until MLX holds them.
        unsafe {
            let config = mlx_sys::mlx_fast_cuda_kernel_config_new();
            let bf16 = mlx_sys::mlx_dtype__MLX_BFLOAT16;
            let mut status = mlx_sys::mlx_fast_cuda_kernel_config_add_output_arg(
                config,
                shape.as_ptr(),
                2,
                bf16,
            );
            status |= mlx_sys::mlx_fast_cuda_kernel_config_set_grid(
                config,
                shape[1] / 16 * THREADS,
                1,
                1,
            );
            status |= mlx_sys::mlx_fast_cuda_kernel_config_set_thread_group(config, THREADS, 1, 1);
            status |= mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_int(
                config,
                c"TILES".as_ptr(),
                (shape[0] + 7) / 8,
            );
            let inputs = [x, weight, scales, biases].map(|array| array.as_ptr());
            let inputs = mlx_sys::mlx_vector_array_new_data(inputs.as_ptr(), inputs.len());
            let mut outputs: mlx_vector_array = mlx_sys::mlx_vector_array_new();
            if status == 0 {
                status = mlx_sys::mlx_fast_cuda_kernel_apply(
                    &mut outputs,
                    self.0,
                    inputs,
                    config,
                    stream.as_ptr(),
                );
            }
            let mut output = mlx_sys::mlx_array_new();
            if status == 0 {
                status = mlx_sys::mlx_vector_array_get(&mut output, outputs, 0);
            }
            mlx_sys::mlx_vector_array_free(outputs);
            mlx_sys::mlx_vector_array_free(inputs);
            mlx_sys::mlx_fast_cuda_kernel_config_free(config);
            let output = Array::from_ptr(output);
            if status == 0 { Ok(output) } else { Err(failed()) }
        }
    }
}
