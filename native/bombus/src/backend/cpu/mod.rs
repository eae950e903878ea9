//! The backend for plain CPUs, in Rust: kernels of our own on the mapped checkpoint.
//!
//! Every operation is done when it returns. Activations are f32 throughout; where they meet
//! quantized weights they are written as limbs of 8 bits, more exact than bf16 (`limbs`), so that
//! the same row comes out alike in a prefill, alone and in a batch but for the order of sums.

// The kernels are unsafe from end to end: what they ask of a caller stands at `simd::Kernel` and
// `simd::Simd`, and every call from safe code says why it holds.
#![allow(unsafe_code, unsafe_op_in_unsafe_fn)]
// They walk several arrays of registers by one index.
#![allow(clippy::needless_range_loop)]

mod affine;
mod attention;
mod codes;
mod dense;
mod float;
mod limbs;
mod linear;
mod lora;
mod pool;
pub mod quantize;
mod rows;
mod sample;
mod simd;
mod tensor;
#[cfg(test)]
mod tests;
mod weights;

pub use pool::default_threads;
pub use simd::Level;

use super::ticket_lock::TicketGuard;
use super::{Adapted, AttentionWeights, Backend, LinearWeights};
use super::{LoraRows, LoraWeights, Page, Segment, Token};
use crate::error::{Error, Result};
use crate::files::mapped::MappedFile;
use crate::files::safetensors::TensorView;
use crate::sampler::{Draw, Sample};
use crate::spec::{Activation, AttentionSpec, NormSpec};
use attention::{Attention, Cache, Rotations};
use limbs::{Format, Limbs};
use linear::Linear;
use lora::{Delta, Lora};
use pool::Pool;
use rows::{Glu, Norm, Normalize, Softcap, Sum};
use sample::Samples;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tensor::{SendPtr, Spare, Tensor};

/// How to use the CPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// at least 1
    pub threads: usize,
    /// One of `Level::all`: another is refused.
    pub level: Level,
}

impl Default for Options {
    /// All physical cores, and the best instructions that are there.
    fn default() -> Self {
        Self { threads: default_threads(), level: Level::detect() }
    }
}

#[derive(Clone)]
pub struct Cpu {
    pool: Pool,
    level: Level,
    spare: Spare,
    limbs: Arc<Mutex<Vec<(Format, Limbs)>>>,
    rotations: Arc<Mutex<Rotations>>,
    /// Where the weights are: an answer counts only if none of these has changed.
    files: Arc<Mutex<Vec<Arc<MappedFile>>>>,
}

/// What is inside is whole at every moment, even where a panic has let go of it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cpu {
    pub fn new(options: Options) -> Result<Self> {
        let Options { threads, level } = options;
        if threads == 0 || !Level::all().contains(&level) {
            return Err(Error::Unsupported(format!("this machine has no {options:?}")));
        }
        let pool = Pool::new(threads)
            .map_err(|error| Error::OutOfMemory(format!("no thread for the kernels: {error}")))?;
        Ok(Self {
            pool,
            level,
            spare: Spare::default(),
            limbs: Arc::default(),
            rotations: Arc::default(),
            files: Arc::default(),
        })
    }

    fn load(&self, fused: &[LinearWeights]) -> Result<Linear> {
        let linear = Linear::load(fused)?;
        let mut files = lock(&self.files);
        for file in linear.files() {
            if !files.iter().any(|known| Arc::ptr_eq(known, file)) {
                files.push(file.clone());
            }
        }
        Ok(linear)
    }

    /// Fails where the weights are no longer what was loaded.
    fn check(&self) -> Result<()> {
        lock(&self.files).iter().try_for_each(|file| file.check())
    }

    /// `[rows, width]` from what `work` writes into each row.
    fn map(&self, rows: usize, width: usize, work: impl Fn(usize, &mut [f32]) + Sync) -> Tensor {
        let mut out = self.spare.tensor(rows, width);
        let (target, stride) = (SendPtr(out.data_mut().as_mut_ptr()), out.stride);
        self.pool.rows(rows, width, |range| {
            for row in range {
                // SAFETY: each row is written by one thread.
                let out = unsafe { std::slice::from_raw_parts_mut(target.at(row * stride), width) };
                work(row, out);
            }
        });
        out
    }
}

impl Cpu {
    /// Each row, changed where it is.
    fn change(&self, mut x: Tensor, work: impl Fn(&mut [f32]) + Sync) -> Tensor {
        let (rows, width, stride) = (x.rows, x.width, x.stride);
        let target = SendPtr(x.data_mut().as_mut_ptr());
        self.pool.rows(rows, width, |range| {
            for row in range {
                // SAFETY: each row is changed by one thread.
                work(unsafe { std::slice::from_raw_parts_mut(target.at(row * stride), width) });
            }
        });
        x
    }
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Norm = Norm;
    type Linear = Linear;
    type Attention = Attention;
    type Lora = Lora;
    type Cache = Vec<Cache>;
    type Samples = Samples;
    type Guard = TicketGuard;

    const ASYNC: bool = false;

    fn guard(&self) -> TicketGuard {
        self.pool.guard()
    }

    fn norm(&self, weight: &TensorView, spec: &NormSpec) -> Result<Norm> {
        Norm::load(weight, spec)
    }

    fn linear(&self, fused: &[LinearWeights]) -> Result<Linear> {
        self.load(fused)
    }

    fn attention_layer(
        &self,
        spec: &AttentionSpec,
        weights: &AttentionWeights,
    ) -> Result<Attention> {
        Attention::load(spec, weights)
    }

    fn lora(&self, weights: &LoraWeights, adapted: Adapted<Self>) -> Result<Lora> {
        Lora::load(self, weights, adapted)
    }

    fn cache(&self, layers: usize) -> Vec<Cache> {
        (0..layers).map(|_| Cache::default()).collect()
    }

    fn fork(&self, cache: &Vec<Cache>, positions: usize) -> Result<Vec<Cache>> {
        Ok(cache.iter().map(|layer| layer.fork(positions)).collect())
    }

    fn kept_from(&self, cache: &Vec<Cache>, layer: usize) -> usize {
        cache[layer].kept_from()
    }

    fn pages(&self, cache: &Vec<Cache>) -> Vec<Page> {
        cache.iter().flat_map(Cache::pages).collect()
    }

    fn reserve(
        &self,
        attention: &Attention,
        layer: usize,
        cache: &mut Vec<Cache>,
        positions: Range<usize>,
    ) -> Result<()> {
        attention.reserve(&mut cache[layer], positions)
    }

    fn embed(
        &self,
        embedding: &Linear,
        tokens: &[Token],
        previous: Option<&Samples>,
        loras: &[LoraRows<Self>],
    ) -> Result<Tensor> {
        let id = |token: &Token| match *token {
            Token::Id(id) => Some(id),
            Token::Sampled(row) => previous.and_then(|samples| samples.id(row)),
        };
        let ids =
            tokens.iter().map(id).collect::<Option<Vec<u32>>>().ok_or_else(|| {
                Error::Backend("a token was not sampled by the step before".into())
            })?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= embedding.out_features()) {
            return Err(Error::Backend(format!("the token id {id} has no row in the embedding")));
        }
        Ok(self.map(tokens.len(), embedding.width, |row, out| {
            let id = ids[row] as usize;
            embedding.row(id, out);
            for LoraRows { lora, .. } in loras.iter().filter(|lora| lora.rows.contains(&row)) {
                lora.embed(id, out);
            }
        }))
    }

    fn project(
        &self,
        linear: &Linear,
        x: &Tensor,
        loras: &[LoraRows<Self>],
    ) -> Result<Vec<Tensor>> {
        Ok(linear.apply(self, x, &Delta::all(self, x, loras)))
    }

    fn normalize(&self, x: &Tensor, norm: &Norm, spec: &NormSpec) -> Result<Tensor> {
        Ok(self.map(x.rows, x.width, |row, y| {
            let kernel = Normalize { x: x.row(row), weight: &norm.weight, spec: *spec, y };
            // SAFETY: x, y and the weight are of one width.
            unsafe { self.level.run(kernel) };
        }))
    }

    fn attention(
        &self,
        attention: &Attention,
        layer: usize,
        qkv: [Tensor; 3],
        segments: &[Segment],
        caches: &mut [&mut Vec<Cache>],
    ) -> Result<Tensor> {
        let mut caches: Vec<_> = caches.iter_mut().map(|cache| &mut cache[layer]).collect();
        attention::attend(self, attention, qkv, segments, &mut caches)
    }

    fn glu(&self, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
        Ok(self.map(gate.rows, gate.width, |row, out| {
            let kernel = Glu { gate: gate.row(row), up: up.row(row), activation, out };
            // SAFETY: all three are of one width.
            unsafe { self.level.run(kernel) };
        }))
    }

    fn add(&self, x: &Tensor, y: &Tensor, scale: f32) -> Result<Tensor> {
        Ok(self.map(x.rows, x.width, |row, out| {
            // SAFETY: all three are of one width.
            unsafe { self.level.run(Sum { x: x.row(row), y: y.row(row), scale, out }) };
        }))
    }

    fn scale(&self, x: Tensor, scale: f32) -> Result<Tensor> {
        Ok(self.change(x, |x| x.iter_mut().for_each(|x| *x *= scale)))
    }

    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor> {
        // SAFETY: the level is this machine's.
        Ok(self.change(x, |x| unsafe { self.level.run(Softcap { x, cap }) }))
    }

    fn gather_rows(&self, x: &Tensor, rows: &[usize]) -> Result<Tensor> {
        Ok(self.map(rows.len(), x.width, |row, out| out.copy_from_slice(x.row(rows[row]))))
    }

    fn sample(&self, logits: &Tensor, draws: &[Draw]) -> Result<Samples> {
        self.check()?;
        Ok(sample::sample(self, logits, draws))
    }

    fn log_probs(&self, logits: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
        self.check()?;
        Ok(sample::log_probs(self, logits, targets))
    }

    fn start(&self, x: Tensor) -> Result<Tensor> {
        Ok(x)
    }

    fn values(&self, x: &Tensor) -> Result<Vec<f32>> {
        self.check()?;
        Ok((0..x.rows).flat_map(|row| x.row(row)).copied().collect())
    }

    fn submit(&self, _samples: &Samples) -> Result<()> {
        Ok(())
    }

    fn read(&self, samples: &Samples) -> Result<Vec<Option<Sample>>> {
        Ok(samples.read())
    }
}
