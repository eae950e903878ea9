//! Operations on rows of activations: norms, the gate of the MLP, sums.

use super::float::Float;
use super::simd::{Kernel, LANES, Simd};

/// The weight of a norm, as f32, and what the checkpoint has it in.
pub struct Norm {
    pub weight: Vec<f32>,
    pub float: Float,
}

/// `y = x / sqrt(mean(x^2) + eps) * weight`
pub struct RmsNorm<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub eps: f32,
    pub y: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    /// # Safety
    /// `x`, `weight` and `y` have one width.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let factor = norm_factor::<S>(self.x, self.eps);
        for place in (0..self.x.len()).step_by(LANES) {
            let lanes = LANES.min(self.x.len() - place);
            let x = load_partial::<S>(self.x, place, lanes);
            let weight = load_partial::<S>(self.weight, place, lanes);
            let y = S::mul(S::mul(x, S::splat(factor)), weight);
            S::store_partial(self.y.as_mut_ptr().add(place), y, lanes);
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`
///
/// # Safety
/// The machine has S's level.
#[inline(always)]
pub unsafe fn norm_factor<S: Simd>(x: &[f32], eps: f32) -> f32 {
    let mut squares = S::splat(0.0);
    for place in (0..x.len()).step_by(LANES) {
        let x = load_partial::<S>(x, place, LANES.min(x.len() - place));
        squares = S::fma(x, x, squares);
    }
    1.0 / (S::sum(squares) / x.len() as f32 + eps).sqrt()
}

/// Lanes `place..place + count` of x, zeros behind them.
///
/// # Safety
/// The machine has S's level; x has lanes `place..place + count`, at most 16.
#[inline(always)]
pub unsafe fn load_partial<S: Simd>(x: &[f32], place: usize, count: usize) -> S::F {
    Float::F32.load::<S>(x.as_ptr().cast(), place, count)
}

/// `silu(gate) * up`, where `silu(x) = x / (1 + e^-x)`
pub struct SwiGlu<'a> {
    pub gate: &'a [f32],
    pub up: &'a [f32],
    pub out: &'a mut [f32],
}

impl Kernel for SwiGlu<'_> {
    type Output = ();

    /// # Safety
    /// `gate`, `up` and `out` have one width.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let one = S::splat(1.0);
        for place in (0..self.up.len()).step_by(LANES) {
            let lanes = LANES.min(self.up.len() - place);
            let gate = load_partial::<S>(self.gate, place, lanes);
            // e^-x is held below infinity; x / e^88 is as good as 0.
            let exponent = S::min(S::splat(88.0), S::sub(S::splat(0.0), gate));
            let silu = S::div(gate, S::add(one, S::exp(exponent)));
            let y = S::mul(silu, load_partial::<S>(self.up, place, lanes));
            S::store_partial(self.out.as_mut_ptr().add(place), y, lanes);
        }
    }
}

/// `x + y`
pub struct Sum<'a> {
    pub x: &'a [f32],
    pub y: &'a [f32],
    pub out: &'a mut [f32],
}

impl Kernel for Sum<'_> {
    type Output = ();

    /// # Safety
    /// `x`, `y` and `out` have one width.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for place in (0..self.x.len()).step_by(LANES) {
            let lanes = LANES.min(self.x.len() - place);
            let sum = S::add(
                load_partial::<S>(self.x, place, lanes),
                load_partial::<S>(self.y, place, lanes),
            );
            S::store_partial(self.out.as_mut_ptr().add(place), sum, lanes);
        }
    }
}
