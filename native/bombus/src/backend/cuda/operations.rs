//! Operations of a prefill, for bfloat16, and the choice of tokens.

use super::few_rows;
use super::kernel::{Kernel, Launch, Source};
use super::{NUMBERS, PRIMITIVES};
use crate::error::Result;
use crate::spec::Activation;
use mlx_rs::{Array, Dtype};
use std::sync::OnceLock;

const THREADS: i32 = 256;

struct Operations {
    glu: Kernel,
    dense: Kernel,
    greedy: Kernel,
}

/// Once for the process; none where the card is too old for kernels of ours.
fn operations() -> Option<&'static Operations> {
    static OPERATIONS: OnceLock<Option<Operations>> = OnceLock::new();
    let new = || few_rows::kernel().and_then(|_| Operations::new().ok());
    OPERATIONS.get_or_init(new).as_ref()
}

impl Operations {
    fn new() -> Result<Self> {
        let header = [PRIMITIVES, NUMBERS].concat();
        let glu = Kernel::new(&Source {
            name: c"bombus_glu",
            inputs: &[c"gate", c"up"],
            outputs: &[c"y"],
            header: &header,
            body: include_str!("glu.cu"),
            contiguous: false,
            shared: 0,
        })?;
        let dense = Kernel::new(&Source {
            name: c"bombus_dense",
            inputs: &[c"codes", c"scales", c"biases"],
            outputs: &[c"y"],
            header: &header,
            body: include_str!("dense.cu"),
            contiguous: true,
            shared: 0,
        })?;
        let greedy = Kernel::new(&Source {
            name: c"bombus_greedy",
            inputs: &[c"logits"],
            outputs: &[c"ids", c"broken"],
            header: "",
            body: include_str!("greedy.cu"),
            contiguous: true,
            shared: 0,
        })?;
        Ok(Self { glu, dense, greedy })
    }
}

/// `activation(gate) * up`, `[rows, width]`; none where the kernel does not take them.
pub fn glu(gate: &Array, up: &Array, activation: Activation) -> Result<Option<Array>> {
    let fits = |x: &Array| {
        x.dtype() == Dtype::Bfloat16 && x.strides()[1] == 1 && x.strides()[0].is_multiple_of(8)
    };
    let (rows, width) = (gate.dim(0), gate.dim(1));
    if !(fits(gate) && fits(up) && width % 8 == 0) {
        return Ok(None);
    }
    let Some(operations) = operations() else { return Ok(None) };
    let mut outputs = operations.glu.run(&Launch {
        inputs: &[gate, up],
        outputs: &[(&[rows, width], Dtype::Bfloat16)],
        blocks: (rows * (width / 8) + THREADS - 1) / THREADS,
        threads: THREADS,
        constants: &[(c"GELU", i32::from(activation == Activation::Gelu))],
    })?;
    Ok(Some(outputs.swap_remove(0)))
}

/// A weight of 4 bits in groups of 64 in bfloat16, `[out, in]`.
pub fn dense(codes: &Array, scales: &Array, biases: &Array) -> Result<Option<Array>> {
    let Some(operations) = operations() else { return Ok(None) };
    let (rows, words) = (codes.dim(0), codes.dim(1));
    let mut outputs = operations.dense.run(&Launch {
        inputs: &[codes, scales, biases],
        outputs: &[(&[rows, words * 8], Dtype::Bfloat16)],
        blocks: (rows * words + THREADS - 1) / THREADS,
        threads: THREADS,
        constants: &[],
    })?;
    Ok(Some(outputs.swap_remove(0)))
}

/// logits: `[rows, vocab]` in float32 -> the place of the highest of each row, the first of equals, and
/// whether one is NaN; MLX takes a pass for each of these.
pub fn greedy(logits: &Array) -> Result<Option<[Array; 2]>> {
    let Some(operations) = operations() else { return Ok(None) };
    let (rows, vocab) = (logits.dim(0), logits.dim(1));
    let outputs = operations.greedy.run(&Launch {
        inputs: &[logits],
        outputs: &[(&[rows], Dtype::Uint32), (&[rows], Dtype::Bool)],
        blocks: rows,
        threads: 1024,
        constants: &[(c"VOCAB", vocab)],
    })?;
    Ok(outputs.try_into().ok())
}
