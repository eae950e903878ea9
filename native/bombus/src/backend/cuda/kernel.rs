//! Kernels in CUDA C++, which MLX compiles for the card that it meets.

use crate::error::{Error, Result};
use mlx_rs::{Array, Dtype, Stream};
use mlx_sys::{mlx_fast_cuda_kernel, mlx_vector_array, mlx_vector_string};
use std::ffi::{CStr, CString};

/// The body of a kernel, what stands before it, and its parameters' names.
pub struct Source<'a> {
    pub name: &'a CStr,
    pub inputs: &'a [&'a CStr],
    pub outputs: &'a [&'a CStr],
    pub header: &'a str,
    pub body: &'a str,
    /// Whether inputs are copied first where their rows do not follow each other.
    pub contiguous: bool,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

pub struct Launch<'a> {
    pub inputs: &'a [&'a Array],
    pub outputs: &'a [(&'a [i32], Dtype)],
    pub blocks: i32,
    pub threads: i32,
    /// Names that the body finds as `constexpr int`: it is compiled for each set of values.
    pub constants: &'a [(&'a CStr, i32)],
}

pub struct Kernel(mlx_fast_cuda_kernel);

// SAFETY: it is its source and its names, which nothing changes.
#[allow(unsafe_code)]
unsafe impl Send for Kernel {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Kernel {}

impl Kernel {
    #[allow(unsafe_code)]
    pub fn new(source: &Source) -> Result<Self> {
        let text = |text: &str| {
            CString::new(text).map_err(|_| Error::Backend("a kernel with a zero byte".into()))
        };
        let (header, body) = (text(source.header)?, text(source.body)?);
        // SAFETY: the names and texts live until the end of this block, and are copied; the lists of
        // names are freed here.
        let kernel = unsafe {
            let names = |names: &[&CStr]| -> mlx_vector_string {
                let mut pointers: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
                mlx_sys::mlx_vector_string_new_data(pointers.as_mut_ptr(), pointers.len())
            };
            let (inputs, outputs) = (names(source.inputs), names(source.outputs));
            let kernel = mlx_sys::mlx_fast_cuda_kernel_new(
                source.name.as_ptr(),
                inputs,
                outputs,
                body.as_ptr(),
                header.as_ptr(),
                source.contiguous,
                source.shared as i32,
            );
            mlx_sys::mlx_vector_string_free(inputs);
            mlx_sys::mlx_vector_string_free(outputs);
            kernel
        };
        match kernel.ctx.is_null() {
            true => Err(Error::Backend("MLX did not take a kernel".into())),
            false => Ok(Self(kernel)),
        }
    }

    #[allow(unsafe_code)]
    pub fn run(&self, launch: &Launch) -> Result<Vec<Array>> {
        let stream = Stream::thread_local_or_default();
        // SAFETY: what is made here is freed here, but for the outputs, which their arrays own. The
        // inputs live until MLX holds them.
        unsafe {
            let config = mlx_sys::mlx_fast_cuda_kernel_config_new();
            let mut status = 0;
            for (shape, dtype) in launch.outputs {
                status |= mlx_sys::mlx_fast_cuda_kernel_config_add_output_arg(
                    config,
                    shape.as_ptr(),
                    shape.len(),
                    *dtype as mlx_sys::mlx_dtype,
                );
            }
            let (blocks, threads) = (launch.blocks, launch.threads);
            status |= mlx_sys::mlx_fast_cuda_kernel_config_set_grid(config, blocks * threads, 1, 1);
            status |= mlx_sys::mlx_fast_cuda_kernel_config_set_thread_group(config, threads, 1, 1);
            for (name, value) in launch.constants {
                status |= mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_int(
                    config,
                    name.as_ptr(),
                    *value,
                );
            }
            let inputs: Vec<_> = launch.inputs.iter().map(|array| array.as_ptr()).collect();
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
            let mut arrays = vec![];
            for index in 0..launch.outputs.len() {
                let mut output = mlx_sys::mlx_array_new();
                if status == 0 {
                    status = mlx_sys::mlx_vector_array_get(&mut output, outputs, index);
                }
                arrays.push(Array::from_ptr(output));
            }
            mlx_sys::mlx_vector_array_free(outputs);
            mlx_sys::mlx_vector_array_free(inputs);
            mlx_sys::mlx_fast_cuda_kernel_config_free(config);
            match status {
                0 => Ok(arrays),
                _ => Err(Error::Backend("MLX did not run a kernel".into())),
            }
        }
    }
}

impl Drop for Kernel {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: it is made once, and freed here.
        unsafe { mlx_sys::mlx_fast_cuda_kernel_free(self.0) }
    }
}
