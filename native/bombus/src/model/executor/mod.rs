//! What runs the steps of one loaded model: its layers one after another (`Decoder`), or a way of a
//! device's own through all of them (`cuda`).

#[cfg(feature = "mlx")]
mod adapter_tables;
#[cfg(feature = "mlx")]
mod cuda;
#[cfg(feature = "mlx")]
mod program;

#[cfg(feature = "mlx")]
pub use cuda::CudaExecutor;
#[cfg(feature = "mlx")]
pub use program::{OTHER_WEIGHTS, Program};

use crate::backend::{Backend, Batch, KvCache};
use crate::error::Result;
use crate::model::decoder::Decoder;
use crate::sampler::Draw;

pub trait Executor {
    type Backend: Backend;
    /// Held while a step's operations are called.
    type Guard;

    fn decoder(&self) -> &Decoder<Self::Backend>;

    /// Waits until this model may use what it shares with others.
    fn guard(&self) -> Self::Guard;

    /// An empty cache.
    fn cache(&self) -> KvCache<Self::Backend>;

    /// The logits `[outputs, vocab]` of the rows that the batch names. `previous`: the samples of
    /// the step before, which tokens may stand for
    fn forward(
        &self,
        batch: &mut Batch<Self::Backend>,
        previous: Option<&<Self::Backend as Backend>::Samples>,
    ) -> Result<<Self::Backend as Backend>::Tensor>;

    /// One token for each row of logits.
    fn sample(
        &self,
        logits: &<Self::Backend as Backend>::Tensor,
        draws: &[Draw],
    ) -> Result<<Self::Backend as Backend>::Samples>;

    /// Why steps take the slower way, where the device has a faster one.
    fn fallback(&self) -> Option<&str> {
        None
    }
}

impl<B: Backend> Executor for Decoder<B> {
    type Backend = B;
    type Guard = B::Guard;

    fn decoder(&self) -> &Decoder<B> {
        self
    }

    fn guard(&self) -> B::Guard {
        self.backend.guard()
    }

    fn cache(&self) -> KvCache<B> {
        self.backend.cache(self.layers.len())
    }

    fn forward(&self, batch: &mut Batch<B>, previous: Option<&B::Samples>) -> Result<B::Tensor> {
        self.forward(batch, previous)
    }

    fn sample(&self, logits: &B::Tensor, draws: &[Draw]) -> Result<B::Samples> {
        self.backend.sample(logits, draws)
    }
}
