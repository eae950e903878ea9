//! What an NVIDIA card alone has: kernels of our own, and pages of keys and values for them.
//!
//! `step/` makes a token for each of many sequences in one launch, for models in 4 bits, groups of 64
//! and bfloat16. The others make products, attention and what lies between of such models.

mod attention;
pub mod few_rows;
mod kernel;
pub mod launches;
mod layout;
pub mod operations;
mod packed;
mod pages;
mod plan;
mod step;

pub use attention::{PagedAttention, stacked};
pub use layout::{Factors, LayerKind, MOST_ROWS, Shape, TILE_ROWS};
pub use packed::Packed;
pub use pages::{Addresses, Sequence};
pub use step::{LayerArrays, MatrixArrays, ModelArrays, Phase, Row, Step};

use crate::error::Result;
use kernel::{Kernel, Launch, Source};
use mlx_rs::{Array, Dtype, transforms};
use std::collections::HashSet;

use super::arrays;

const PRIMITIVES: &str = include_str!("primitives.cuh");
const BARRIERS: &str = include_str!("barriers.cuh");
const NUMBERS: &str = include_str!("numbers.cuh");

/// A copy in the card's own memory: what comes from a file is in memory that both share, and moves between
/// them page by page.
pub fn on_card(array: &Array) -> Result<Array> {
    let zero = Array::from_f32(0.0).as_dtype(array.dtype())?;
    let copy = array.add(zero)?;
    transforms::eval([&copy])?;
    Ok(copy)
}

/// How many multiprocessors the card has: so many blocks are all there at once.
fn multiprocessors() -> Result<usize> {
    // More blocks than there can be multiprocessors, each long enough for all of those to take some.
    const BLOCKS: i32 = 2048;
    let kernel = Kernel::new(&Source {
        name: c"bombus_multiprocessors",
        inputs: &[c"x"],
        outputs: &[c"own"],
        header: "",
        body: "const long long start = clock64();\n\
               unsigned number;\n\
               asm volatile(\"mov.u32 %0, %%smid;\" : \"=r\"(number));\n\
               while (clock64() - start < 50000) {}\n\
               if (threadIdx.x == 0) own[blockIdx.x] = number + 0 * x[0];",
        contiguous: true,
        shared: 0,
    })?;
    let own = kernel.run(&Launch {
        inputs: &[&arrays::indices(&[0])],
        outputs: &[(&[BLOCKS], Dtype::Uint32)],
        blocks: BLOCKS,
        threads: 1024,
        constants: &[],
    })?;
    transforms::eval(&own)?;
    Ok(arrays::values::<u32>(&own[0])?.into_iter().collect::<HashSet<_>>().len())
}
