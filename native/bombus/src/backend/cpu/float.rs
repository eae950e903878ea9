//! The floats of a checkpoint: f32, f16 and bf16, as they lie in the file.

use super::simd::{LANES, Simd};
use crate::error::{Error, Result};
use crate::files::safetensors::TensorView;
use safetensors::tensor::Dtype;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Float {
    F32,
    F16,
    Bf16,
}

impl Float {
    pub fn of(dtype: Dtype) -> Result<Self> {
        match dtype {
            Dtype::F32 => Ok(Float::F32),
            Dtype::F16 => Ok(Float::F16),
            Dtype::BF16 => Ok(Float::Bf16),
            other => Err(Error::Unsupported(format!("tensors of {other:?} are not supported"))),
        }
    }

    pub fn bytes(self) -> usize {
        if self == Float::F32 { 4 } else { 2 }
    }

    /// Numbers `place..place + count` from `p` on, at most 16, zeros behind them.
    ///
    /// # Safety
    /// The machine has S's level, and `count` numbers of this type lie at `p`, from number `place` on;
    /// `count` is at most 16.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(self, p: *const u8, place: usize, count: usize) -> S::F {
        let p = p.add(place * self.bytes());
        match (self, count) {
            (Float::F32, LANES) => S::load(p.cast()),
            (Float::F32, _) => S::load_partial(p.cast(), count),
            (Float::F16, LANES) => S::load_f16(p.cast()),
            (Float::Bf16, LANES) => S::load_bf16(p.cast()),
            (Float::F16, _) => S::load_half_partial::<false>(p.cast(), count),
            (Float::Bf16, _) => S::load_half_partial::<true>(p.cast(), count),
        }
    }

    /// A whole tensor.
    pub fn read(view: &TensorView) -> Result<Vec<f32>> {
        Ok(Self::of(view.dtype)?.to_f32(&view.read()?))
    }

    /// All numbers in these bytes.
    pub fn to_f32(self, bytes: &[u8]) -> Vec<f32> {
        let halves = |decode: fn([u8; 2]) -> f32| {
            bytes.chunks_exact(2).map(|two| decode([two[0], two[1]])).collect()
        };
        match self {
            Float::F32 => bytes
                .chunks_exact(4)
                .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
                .collect(),
            Float::F16 => halves(|two| half::f16::from_le_bytes(two).to_f32()),
            Float::Bf16 => halves(|two| half::bf16::from_le_bytes(two).to_f32()),
        }
    }
}
