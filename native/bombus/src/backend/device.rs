//! What a model can run on.

use super::cpu;
#[cfg(feature = "mlx")]
use super::mlx;

/// What a model runs on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Device {
    Cpu(cpu::Options),
    #[cfg(feature = "mlx")]
    Mlx(mlx::Device),
}

impl Device {
    /// The prompt tokens of a step that make prefill about as fast as it gets: what is more only
    /// holds up those who generate.
    pub fn prefill_chunk(&self) -> usize {
        match self {
            // Measured: bench/README.md
            Device::Cpu(_) => 64,
            #[cfg(feature = "mlx")]
            Device::Mlx(device) if device.is_cuda() => 2048,
            #[cfg(feature = "mlx")]
            Device::Mlx(_) => 512,
        }
    }
}
