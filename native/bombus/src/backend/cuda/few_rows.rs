//! Products of a few rows with a quantized matrix on an NVIDIA card, by a kernel of our own
//! (`few_rows.cu`). MLX's own moves a tenth to a fourth of what the memory could at one row, and less
//! per row at two and four.

use super::kernel::{Kernel, Launch, Source};
use super::{NUMBERS, PRIMITIVES};
use crate::error::Result;
use mlx_rs::{Array, Dtype, ops};
use std::sync::OnceLock;

/// Four tiles of eight.
const MOST_ROWS: i32 = 32;
/// How many threads make 16 outputs: `WARPS` of the kernel.
const THREADS: i32 = 4 * 32;
/// Of the inputs, a warp takes so many at once: `STEP`.
const STEP: i32 = 256;

/// Whether the kernel is made for this product of int4 in groups of 64: x: `[rows, in]`, weight: `[out, in / 8]`.
pub fn serves(x: &Array, weight: &Array) -> bool {
    x.dim(0) <= MOST_ROWS && x.dim(1) % STEP == 0 && weight.dim(0) % 16 == 0
}

pub struct FewRows(Kernel);

/// The kernel, once for the process; none where it does not work (a card before Ampere, no CUDA).
pub fn kernel() -> Option<&'static FewRows> {
    static KERNEL: OnceLock<Option<FewRows>> = OnceLock::new();
    let own = || FewRows::new().ok().filter(|kernel| kernel.works().unwrap_or(false));
    KERNEL.get_or_init(own).as_ref()
}

impl FewRows {
    fn new() -> Result<Self> {
        Ok(Self(Kernel::new(&Source {
            name: c"bombus_few_rows",
            inputs: &[c"x", c"w", c"s", c"b"],
            outputs: &[c"y"],
            header: &[PRIMITIVES, NUMBERS].concat(),
            body: include_str!("few_rows.cu"),
            contiguous: true,
            shared: 0,
        })?))
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
    pub fn matmul(
        &self,
        x: &Array,
        weight: &Array,
        scales: &Array,
        biases: &Array,
    ) -> Result<Array> {
        let shape = [x.dim(0), weight.dim(0)];
        let mut outputs = self.0.run(&Launch {
            inputs: &[x, weight, scales, biases],
            outputs: &[(&shape, Dtype::Bfloat16)],
            blocks: shape[1] / 16,
            threads: THREADS,
            // One form for all: each is compiled, and that takes seconds.
            constants: &[(c"TILES", MOST_ROWS / 8)],
        })?;
        Ok(outputs.swap_remove(0))
    }
}
