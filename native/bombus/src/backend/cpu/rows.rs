//! Operations on rows of activations: norms, the gated unit of the MLP, sums, softcaps.

use super::float::Float;
use super::simd::{Kernel, LANES, Simd};
use crate::error::Result;
use crate::files::safetensors::TensorView;
use crate::spec::{Activation, NormSpec};

/// The weight of a norm, as f32, and what the checkpoint has it in.
pub struct Norm {
    pub weight: Vec<f32>,
    pub float: Float,
}

impl Norm {
    pub fn load(weight: &TensorView, spec: &NormSpec) -> Result<Self> {
        let mut numbers = Float::read(weight)?;
        if spec.plus_one {
            numbers.iter_mut().for_each(|number| *number += 1.0);
        }
        Ok(Self { weight: numbers, float: Float::of(weight.dtype)? })
    }
}

/// `y = (x - shift) / sqrt(mean((x - shift)^2) + eps) * weight`, where the shift is the mean of x or
/// none.
pub struct Normalize<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub spec: NormSpec,
    pub y: &'a mut [f32],
}

impl Kernel for Normalize<'_> {
    type Output = ();

    /// # Safety
    /// `x`, `weight` and `y` have one width.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let NormSpec { eps, centered, .. } = self.spec;
        let shift = if centered { mean::<S>(self.x) } else { 0.0 };
        let factor = S::splat(match centered {
            true => 1.0 / (variance::<S>(self.x, shift) + eps).sqrt(),
            false => norm_factor::<S>(self.x, eps),
        });
        let shift = S::splat(shift);
        for place in (0..self.x.len()).step_by(LANES) {
            let lanes = LANES.min(self.x.len() - place);
            let x = S::sub(load_partial::<S>(self.x, place, lanes), shift);
            let weight = load_partial::<S>(self.weight, place, lanes);
            let y = S::mul(S::mul(x, factor), weight);
            S::store_partial(self.y.as_mut_ptr().add(place), y, lanes);
        }
    }
}

/// # Safety
/// The machine has S's level.
#[inline(always)]
unsafe fn mean<S: Simd>(x: &[f32]) -> f32 {
    let mut sum = S::splat(0.0);
    for place in (0..x.len()).step_by(LANES) {
        sum = S::add(sum, load_partial::<S>(x, place, LANES.min(x.len() - place)));
    }
    S::sum(sum) / x.len() as f32
}

/// # Safety
/// The machine has S's level.
#[inline(always)]
unsafe fn variance<S: Simd>(x: &[f32], mean: f32) -> f32 {
    let mut squares = S::splat(0.0);
    let whole = x.len() / LANES * LANES;
    for place in (0..whole).step_by(LANES) {
        let x = S::sub(load_partial::<S>(x, place, LANES), S::splat(mean));
        squares = S::fma(x, x, squares);
    }
    // Lanes behind the end would count as zeros less the mean.
    let rest: f32 = x[whole..].iter().map(|x| (x - mean) * (x - mean)).sum();
    (S::sum(squares) + rest) / x.len() as f32
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

/// `activation(gate) * up`
pub struct Glu<'a> {
    pub gate: &'a [f32],
    pub up: &'a [f32],
    pub activation: Activation,
    pub out: &'a mut [f32],
}

impl Kernel for Glu<'_> {
    type Output = ();

    /// # Safety
    /// `gate`, `up` and `out` have one width.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.activation {
            Activation::Silu => self.rows::<S, false>(),
            Activation::Gelu => self.rows::<S, true>(),
        }
    }
}

impl Glu<'_> {
    /// Both are `x / (1 + e^-u)`: of SiLU u is x.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn rows<S: Simd, const GELU: bool>(self) {
        let one = S::splat(1.0);
        for place in (0..self.up.len()).step_by(LANES) {
            let lanes = LANES.min(self.up.len() - place);
            let gate = load_partial::<S>(self.gate, place, lanes);
            let u = if GELU { gelu_exponent::<S>(gate) } else { gate };
            // e^-u is held below infinity; x / e^88 is as good as 0.
            let exponent = S::min(S::splat(88.0), S::sub(S::splat(0.0), u));
            let activated = S::div(gate, S::add(one, S::exp(exponent)));
            let y = S::mul(activated, load_partial::<S>(self.up, place, lanes));
            S::store_partial(self.out.as_mut_ptr().add(place), y, lanes);
        }
    }
}

/// `2 sqrt(2 / pi) (x + 0.044715 x^3)`
///
/// # Safety
/// The machine has S's level.
#[inline(always)]
unsafe fn gelu_exponent<S: Simd>(x: S::F) -> S::F {
    const FACTOR: f32 = 1.595_769;
    let cubic = S::mul(S::splat(0.044715 * FACTOR), S::mul(x, x));
    S::mul(x, S::add(S::splat(FACTOR), cubic))
}

/// `cap * tanh(x / cap)`, which is `cap * (1 - 2 / (1 + e^(2 x / cap)))`, in place.
pub struct Softcap<'a> {
    pub x: &'a mut [f32],
    pub cap: f32,
}

impl Kernel for Softcap<'_> {
    type Output = ();

    /// # Safety
    /// The machine has S's level.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (one, two) = (S::splat(1.0), S::splat(2.0));
        let (cap, factor) = (S::splat(self.cap), S::splat(2.0 / self.cap));
        for place in (0..self.x.len()).step_by(LANES) {
            let lanes = LANES.min(self.x.len() - place);
            let x = load_partial::<S>(self.x, place, lanes);
            let exponent = S::min(S::splat(88.0), S::mul(x, factor));
            let tanh = S::sub(one, S::div(two, S::add(one, S::exp(exponent))));
            S::store_partial(self.x.as_mut_ptr().add(place), S::mul(cap, tanh), lanes);
        }
    }
}

/// `x + scale * y`
pub struct Sum<'a> {
    pub x: &'a [f32],
    pub y: &'a [f32],
    pub scale: f32,
    pub out: &'a mut [f32],
}

impl Kernel for Sum<'_> {
    type Output = ();

    /// # Safety
    /// `x`, `y` and `out` have one width.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let scale = S::splat(self.scale);
        for place in (0..self.x.len()).step_by(LANES) {
            let lanes = LANES.min(self.x.len() - place);
            let x = load_partial::<S>(self.x, place, lanes);
            let y = load_partial::<S>(self.y, place, lanes);
            S::store_partial(self.out.as_mut_ptr().add(place), S::fma(scale, y, x), lanes);
        }
    }
}
