//! The weights of one linear layer, quantized or dense.

use super::affine::{self, Affine};
use super::dense::{self, Dense};
use super::float::Float;
use super::limbs::{Format, Limbs};
use super::simd::Level;
use super::tensor::{Target, Tensor};
use super::{Cpu, LinearWeights};
use crate::error::Result;
use crate::files::mapped::Mapped;

pub enum Weights {
    Affine(Affine),
    Dense(Dense),
}

impl Weights {
    pub fn load(weights: &LinearWeights) -> Result<Self> {
        let Some(quantized) = &weights.quantized else {
            return Ok(Weights::Dense(Dense::new(weights)?));
        };
        Ok(Weights::Affine(Affine::new(weights, quantized)?))
    }

    /// The numbers of a row of y.
    pub fn out_features(&self) -> usize {
        match self {
            Weights::Affine(affine) => affine.rows,
            Weights::Dense(dense) => dense.rows,
        }
    }

    pub fn in_features(&self) -> usize {
        match self {
            Weights::Affine(affine) => affine.columns,
            Weights::Dense(dense) => dense.columns,
        }
    }

    /// Of the scales, or of the weights themselves.
    pub fn float(&self) -> Float {
        match self {
            Weights::Affine(affine) => affine.float,
            Weights::Dense(dense) => dense.float,
        }
    }

    pub fn row(&self, n: usize, out: &mut [f32]) {
        match self {
            Weights::Affine(affine) => affine.dequantize(n, out),
            Weights::Dense(dense) => out.copy_from_slice(&dense.row(n)),
        }
    }

    pub fn tensors(&self) -> Vec<&Mapped> {
        match self {
            Weights::Affine(affine) => affine.tensors().into(),
            Weights::Dense(dense) => vec![&dense.weight],
        }
    }

    pub fn format(&self, rows: usize, level: Level) -> Option<Format> {
        match self {
            Weights::Affine(affine) => Some(affine.format(rows, level)),
            Weights::Dense(_) => None,
        }
    }

    /// # Safety
    /// No other thread reads or writes the target's columns meanwhile; `x` and `limbs` have the layer's
    /// width, and `limbs` are in the `format` that the weights ask for.
    pub unsafe fn product(
        &self,
        cpu: &Cpu,
        x: &Tensor,
        limbs: Option<(&Limbs, Format)>,
        target: Target,
    ) {
        match (self, limbs) {
            (Weights::Affine(affine), Some((x, format))) => {
                let product = affine::Product { affine, x, format, target };
                // SAFETY: the caller's.
                unsafe { cpu.level.run(product) };
            }
            (Weights::Dense(dense), _) => {
                let product = dense::Product { dense, x, target };
                // SAFETY: the caller's.
                unsafe { cpu.level.run(product) };
            }
            (Weights::Affine(_), None) => unreachable!("quantized weights without limbs"),
        }
    }
}
