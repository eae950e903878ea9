//! Products with weights that are not quantized, in f32.

use super::float::Float;
use super::simd::{Kernel, LANES, Simd};
use super::tensor::{Target, Tensor};
use crate::backend::LinearWeights;
use crate::error::Result;
use crate::files::mapped::Mapped;

/// `[rows, columns]`, as it lies in the file.
pub struct Dense {
    pub weight: Mapped,
    pub float: Float,
    pub rows: usize,
    pub columns: usize,
}

impl Dense {
    pub fn new(weights: &LinearWeights) -> Result<Self> {
        let (weight, float) = (weights.weight.map(), Float::of(weights.weight.dtype)?);
        Ok(Self { weight, float, rows: weights.out_features, columns: weights.weight.shape[1] })
    }

    pub fn row(&self, n: usize) -> Vec<f32> {
        let bytes = self.columns * self.float.bytes();
        self.float.to_f32(&self.weight.copy(n * bytes..(n + 1) * bytes))
    }
}

pub struct Product<'a> {
    pub dense: &'a Dense,
    pub x: &'a Tensor,
    pub target: Target,
}

/// Rows of weights, and of x, that are multiplied together.
const TILE: usize = 4;

impl Kernel for Product<'_> {
    type Output = ();

    /// # Safety
    /// `x` has the columns of the weights; the target's columns are rows of the weights, and no other thread's.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for first in self.target.range.clone().step_by(TILE) {
            let count = TILE.min(self.target.range.end - first);
            for row in (0..self.x.rows).step_by(TILE) {
                match self.x.rows - row {
                    1 => self.tile::<S, 1>(first, count, row),
                    2 => self.tile::<S, 2>(first, count, row),
                    3 => self.tile::<S, 3>(first, count, row),
                    _ => self.tile::<S, TILE>(first, count, row),
                }
            }
        }
    }
}

impl Product<'_> {
    /// # Safety
    /// As `run`; rows `row..row + M` of x and `first..first + count` of the weights are there.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize>(&self, first: usize, count: usize, row: usize) {
        let columns = self.dense.columns;
        let mut acc = [[S::splat(0.0); M]; TILE];
        for place in (0..columns).step_by(LANES) {
            let lanes = LANES.min(columns - place);
            let mut x = [S::splat(0.0); M];
            for m in 0..M {
                let p = self.x.row(row + m).as_ptr();
                x[m] = Float::F32.load::<S>(p.cast(), place, lanes);
            }
            for n in 0..TILE {
                // The last tile takes its last row several times.
                let n_in_file = first + n.min(count - 1);
                let at = n_in_file * columns + place;
                let weight = self.dense.float.load::<S>(self.dense.weight.as_ptr(), at, lanes);
                for m in 0..M {
                    acc[n][m] = S::fma(weight, x[m], acc[n][m]);
                }
            }
        }
        for n in 0..count {
            for m in 0..M {
                *self.target.at(row + m, first + n) = S::sum(acc[n][m]);
            }
        }
    }
}
