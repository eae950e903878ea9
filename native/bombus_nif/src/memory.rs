//! What is in use in the whole process.

use crate::answer::result_term;
use bombus::backend::mlx;
use bombus::gauge::{ADAPTERS, KV_BYTES, MODELS, SEQUENCES};
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
    let info = mlx::memory().map(|[active, cached, peak]| MemoryInfo {
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
