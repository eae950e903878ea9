//! What is in use in the whole process.

use crate::answer::result_term;
use bombus::error::Result;
use bombus::runtime::metrics::{self, ADAPTERS, KV_BYTES, MODELS, PREFIX_BYTES, SEQUENCES};
use rustler::{Env, NifMap, Term};
use std::sync::atomic::Ordering::Relaxed;

#[derive(NifMap)]
struct MemoryInfo {
    active: usize,
    cached: usize,
    peak: usize,
    kv: usize,
    models: usize,
    adapters: usize,
    sequences: usize,
}

#[rustler::nif]
fn memory_info(env: Env) -> Term {
    let info = memory().map(|[active, cached, peak]| MemoryInfo {
        active,
        cached,
        peak,
        kv: KV_BYTES.load(Relaxed),
        models: MODELS.load(Relaxed),
        adapters: ADAPTERS.load(Relaxed),
        sequences: SEQUENCES.load(Relaxed),
    });
    result_term(env, &info)
}

/// Bytes: active, cached, peak. Those of MLX, if it is built in, and of the CPU backend together;
/// what a prefix cache holds is cached, and not active.
fn memory() -> Result<[usize; 3]> {
    let prefixes = PREFIX_BYTES.load(Relaxed);
    let [active, peak] = metrics::cpu_bytes();
    #[cfg(feature = "mlx")]
    let mlx = bombus::backend::mlx::memory()?;
    #[cfg(not(feature = "mlx"))]
    let mlx = [0; 3];
    Ok([(active + mlx[0]).saturating_sub(prefixes), prefixes + mlx[1], peak + mlx[2]])
}
