//! Matrices in memory, and what their codes are.
//!
//! A row's groups of `group_size` numbers each have a scale and a bias: `w = scale * code + bias`,
//! the codes of `bits` packed into u32 from the low bits on. Format: `mlx.core.quantize`.

use crate::error::{Error, Result};
use crate::spec::Quantization;
use safetensors::tensor::Dtype;

/// A tensor in memory, its last axis first.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Array {
    pub fn new(dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>) -> Result<Self> {
        let bits = shape.iter().try_fold(dtype.bitsize(), |bits, axis| bits.checked_mul(*axis));
        match bits == bytes.len().checked_mul(8) {
            true => Ok(Self { dtype, shape, bytes }),
            false => {
                let message = format!("{} bytes for {dtype:?} of shape {shape:?}", bytes.len());
                Err(Error::Request(message))
            }
        }
    }

    /// Its shape, with another last axis.
    pub fn shape_with_last(&self, last: usize) -> Vec<usize> {
        let others = &self.shape[..self.shape.len().saturating_sub(1)];
        others.iter().copied().chain([last]).collect()
    }

    /// The last axis, and how many rows of it there are.
    pub fn matrix(&self) -> (usize, usize) {
        let columns = self.shape.last().copied().unwrap_or(0);
        // Without numbers, the axes may have any size.
        let rows = self.shape.iter().rev().skip(1).fold(1usize, |n, axis| n.saturating_mul(*axis));
        (rows, columns)
    }
}

/// A quantized matrix `[rows, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantized {
    /// u32 `[rows, columns * bits / 32]`
    pub weight: Array,
    /// `[rows, columns / group_size]`; u8 where the codes are floats
    pub scales: Array,
    /// of the scales' shape and type; none where the codes are floats
    pub biases: Option<Array>,
}

/// What the codes are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// whole numbers, with a scale and a bias for a group
    Affine,
    /// 4-bit floats in groups of 32, with an 8-bit power of two
    Mxfp4,
    /// 8-bit floats in groups of 32, with an 8-bit power of two
    Mxfp8,
    /// 4-bit floats in groups of 16, with an 8-bit float
    Nvfp4,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scheme {
    pub mode: Mode,
    pub layout: Quantization,
}

impl Scheme {
    pub fn affine(layout: Quantization) -> Self {
        Self { mode: Mode::Affine, layout }
    }

    pub fn check(self) -> Result<()> {
        let Quantization { group_size, bits } = self.layout;
        let (known, expected) = match self.mode {
            Mode::Affine => {
                (self.layout.is_affine(), "bits of 2 to 6 or 8, and groups of 32, 64 or 128")
            }
            Mode::Mxfp4 => ((group_size, bits) == (32, 4), "4 bits and groups of 32"),
            Mode::Mxfp8 => ((group_size, bits) == (32, 8), "8 bits and groups of 32"),
            Mode::Nvfp4 => ((group_size, bits) == (16, 4), "4 bits and groups of 16"),
        };
        match known {
            true => Ok(()),
            false => Err(Error::Request(format!("expected {expected}, got: {:?}", self.layout))),
        }
    }

    /// The CPU backend's own.
    pub fn affine_layout(self) -> Result<Quantization> {
        match self.mode {
            Mode::Affine => Ok(self.layout),
            mode => {
                let message = format!("{mode:?} is MLX's: use `device: :gpu` or `{{:mlx, :cpu}}`");
                Err(Error::Unsupported(message))
            }
        }
    }
}

/// Rows and columns of what is quantized.
pub fn unpacked(matrix: &Quantized, layout: Quantization) -> (usize, usize) {
    let (rows, groups) = matrix.scales.matrix();
    (rows, groups * layout.group_size)
}
