//! The backend on MLX: Metal, CUDA, or MLX's own CPU device.
//!
//! Every operation only adds to a graph; `submit` starts it, `read` waits for it. MLX binds its
//! streams to threads, so all of a model's work happens in one thread, inside `Mlx::scope`.

mod attention;
mod device;
mod linear;
mod lora;
mod matrix;
pub mod quantize;
mod sample;

pub use device::{Device, gpu_available, memory, synchronize};
pub use linear::Linear;
pub use lora::Lora;
pub use sample::Samples;

use super::{Adapted, AttentionWeights, Backend, LinearWeights};
use super::{LoraRows, LoraWeights, Page, Segment, Token, arrays, cuda};
use crate::error::{Error, Result};
use crate::files::safetensors::TensorView;
use crate::sampler::{Draw, Sample};
use crate::spec::{Activation, AttentionSpec, NormSpec};
use attention::{Attention, LayerCache};
use mlx_rs::ops::indexing::{take_along_axis, take_axis};
use mlx_rs::{Array, Dtype, Stream, fast, ops, transforms};
use std::ops::Range;

#[derive(Clone)]
pub struct Mlx {
    device: Device,
    stream: Stream,
}

/// Keys and values of one sequence.
pub enum Cache {
    Layers(Vec<LayerCache>),
    Paged(cuda::Sequence),
}

impl Mlx {
    pub fn new(device: Device) -> Result<Self> {
        device::init()?;
        Ok(Self { stream: device.stream()?, device })
    }
}

impl Mlx {
    /// DoRA scales what is before the bias.
    fn apply_dora(
        &self,
        linear: &Linear,
        index: usize,
        x: &Array,
        lora: &Lora,
        y: Array,
    ) -> Result<Array> {
        let bias = linear.bias(index)?;
        let y = match (self.device, &bias) {
            // mlx-lm's DoRA multiplies with dense weights, whose products are added in float32
            // everywhere; those with quantized ones are so on a GPU only.
            (Device::Cpu, _) => linear.product(&x.as_dtype(Dtype::Float32)?)?.swap_remove(index),
            (Device::Gpu, Some(_)) => linear.product(x)?.swap_remove(index),
            (Device::Gpu, None) => y,
        };
        let y = lora.apply(x, y)?;
        match bias {
            Some(bias) => Ok(y.add(bias.as_dtype(y.dtype())?)?),
            None => Ok(y),
        }
    }
}

impl Backend for Mlx {
    type Tensor = Array;
    type Norm = Array;
    type Linear = Linear;
    type Attention = Attention;
    type Lora = Lora;
    type Cache = Cache;
    type Samples = Samples;
    type Guard = ();

    const ASYNC: bool = true;

    /// This backend's stream is the thread's default.
    fn scope<T>(&self, work: impl FnOnce() -> T) -> T {
        mlx_rs::with_stream(&self.stream, work)
    }

    fn guard(&self) {}

    fn norm(&self, weight: &TensorView, spec: &NormSpec) -> Result<Array> {
        load_norm(weight, spec)
    }

    fn linear(&self, fused: &[LinearWeights]) -> Result<Linear> {
        Linear::load(fused, self.device)
    }

    fn attention_layer(
        &self,
        spec: &AttentionSpec,
        weights: &AttentionWeights,
    ) -> Result<Attention> {
        Attention::load(spec, weights)
    }

    fn lora(&self, weights: &LoraWeights, adapted: Adapted<Self>) -> Result<Lora> {
        Lora::load(weights, adapted)
    }

    fn cache(&self, layers: usize) -> Cache {
        Cache::Layers((0..layers).map(|_| LayerCache::default()).collect())
    }

    fn fork(&self, cache: &Cache, positions: usize) -> Result<Cache> {
        Ok(match cache {
            Cache::Layers(layers) => {
                let layers = layers.iter().map(|layer| layer.fork(positions));
                Cache::Layers(layers.collect::<Result<_>>()?)
            }
            Cache::Paged(sequence) => Cache::Paged(sequence.fork(positions)),
        })
    }

    fn kept_from(&self, cache: &Cache, layer: usize) -> usize {
        match cache {
            Cache::Layers(layers) => layers[layer].kept_from(),
            Cache::Paged(sequence) => sequence.kept_from(),
        }
    }

    fn pages(&self, cache: &Cache) -> Vec<Page> {
        match cache {
            Cache::Layers(layers) => layers.iter().map(LayerCache::page).collect(),
            Cache::Paged(sequence) => sequence.pages(),
        }
    }

    /// MLX says so itself when it has no memory.
    fn reserve(
        &self,
        _: &Attention,
        _: usize,
        cache: &mut Cache,
        positions: Range<usize>,
    ) -> Result<()> {
        match cache {
            Cache::Layers(_) => Ok(()),
            Cache::Paged(sequence) => sequence.reserve(positions),
        }
    }

    fn embed(
        &self,
        embedding: &Linear,
        tokens: &[Token],
        previous: Option<&Samples>,
        loras: &[LoraRows<Self>],
    ) -> Result<Array> {
        let ids = token_ids(tokens, previous.map(|samples| &samples.ids))?;
        let embedded = embedding.take(&ids)?;
        lora::apply_loras(embedded, 0, loras, |rows, lora, embedded| {
            lora.embed(&arrays::rows(&ids, rows)?, embedded)
        })
    }

    fn project(&self, linear: &Linear, x: &Array, loras: &[LoraRows<Self>]) -> Result<Vec<Array>> {
        let outputs = linear.apply(x)?.into_iter().enumerate();
        let add = |(index, y)| {
            lora::apply_loras(y, index, loras, |rows, lora, y| {
                let x = arrays::rows(x, rows)?;
                match lora.is_dora() {
                    true => self.apply_dora(linear, index, &x, lora, y),
                    false => lora.apply(&x, y),
                }
            })
        };
        outputs.map(add).collect()
    }

    fn normalize(&self, x: &Array, norm: &Array, spec: &NormSpec) -> Result<Array> {
        normed(x, norm, spec)
    }

    fn attention(
        &self,
        attention: &Attention,
        layer: usize,
        qkv: [Array; 3],
        segments: &[Segment],
        caches: &mut [&mut Cache],
    ) -> Result<Array> {
        // All caches of a model are of one kind.
        let paged = caches.iter().any(|cache| matches!(cache, Cache::Paged(_)));
        let qkv = if paged { qkv } else { attention.heads(qkv)? };
        let mut outputs = vec![];
        for (segment, cache) in segments.iter().zip(caches) {
            outputs.push(match cache {
                Cache::Layers(layers) => attention.attend(&qkv, segment, &mut layers[layer])?,
                Cache::Paged(sequence) => {
                    let kernels = sequence.attention.clone();
                    kernels.attend(layer, &qkv, attention.norms.as_ref(), segment, sequence)?
                }
            });
        }
        cuda::stacked(&outputs)
    }

    fn glu(&self, gate: &Array, up: &Array, activation: Activation) -> Result<Array> {
        if self.device.is_cuda()
            && let Some(gated) = cuda::operations::glu(gate, up, activation)?
        {
            return Ok(gated);
        }
        let activated = match activation {
            Activation::Silu => gate.multiply(ops::sigmoid(gate)?)?,
            Activation::Gelu => gelu(gate)?,
        };
        Ok(activated.multiply(up)?)
    }

    fn add(&self, x: &Array, y: &Array, scale: f32) -> Result<Array> {
        match scale {
            1.0 => Ok(x.add(y)?),
            scale => Ok(x.add(scaled(y, scale)?)?),
        }
    }

    fn scale(&self, x: Array, scale: f32) -> Result<Array> {
        scaled(&x, scale)
    }

    fn softcap(&self, x: Array, cap: f32) -> Result<Array> {
        scaled(&ops::tanh(&scaled(&x, 1.0 / cap)?)?, cap)
    }

    fn gather_rows(&self, x: &Array, rows: &[usize]) -> Result<Array> {
        if rows.iter().copied().eq(0..x.dim(0) as usize) {
            return Ok(x.clone());
        }
        Ok(take_axis(x, arrays::indices(rows), 0)?)
    }

    fn sample(&self, logits: &Array, draws: &[Draw]) -> Result<Samples> {
        sample::sample(logits, draws, self.device)
    }

    fn log_probs(&self, logits: &Array, targets: &[u32]) -> Result<Vec<f32>> {
        let logits = logits.as_dtype(Dtype::Float32)?;
        let targets = Array::from_slice(targets, &[targets.len() as i32, 1]);
        let chosen = take_along_axis(&logits, &targets, -1)?;
        let log_probs = chosen.subtract(logits.logsumexp_axis(-1, true)?)?.flatten(None, None)?;
        log_probs.eval()?;
        arrays::values(&log_probs)
    }

    fn start(&self, x: Array) -> Result<Array> {
        let x = x.as_dtype(Dtype::Float32)?.contiguous()?;
        transforms::async_eval([&x])?;
        Ok(x)
    }

    fn values(&self, x: &Array) -> Result<Vec<f32>> {
        x.eval()?;
        arrays::values(x)
    }

    fn submit(&self, samples: &Samples) -> Result<()> {
        Ok(transforms::async_eval(samples.arrays())?)
    }

    fn finish(&self) {
        // A stream that has failed has nothing going on.
        _ = device::synchronize(&self.stream);
    }

    fn read(&self, samples: &Samples) -> Result<Vec<Option<Sample>>> {
        samples.read()
    }
}

fn load_norm(weight: &TensorView, spec: &NormSpec) -> Result<Array> {
    let weight = arrays::load(weight)?;
    match spec.plus_one {
        true => Ok(weight.add(Array::from_f32(1.0).as_dtype(weight.dtype())?)?),
        false => Ok(weight),
    }
}

fn normed(x: &Array, norm: &Array, spec: &NormSpec) -> Result<Array> {
    match spec.centered {
        true => Ok(fast::layer_norm(x, Some(norm), None, spec.eps)?),
        false => Ok(fast::rms_norm(x, Some(norm), spec.eps)?),
    }
}

/// In x's type, as Python multiplies by a number.
fn scaled(x: &Array, scale: f32) -> Result<Array> {
    Ok(x.multiply(Array::from_f32(scale).as_dtype(x.dtype())?)?)
}

/// As mlx-lm's `gelu_approx`, operation by operation.
fn gelu(x: &Array) -> Result<Array> {
    let one = Array::from_f32(1.0).as_dtype(x.dtype())?;
    let cubic = scaled(&x.multiply(x)?.multiply(x)?, 0.044_715)?;
    let tanh = ops::tanh(&scaled(&x.add(cubic)?, (2.0 / std::f32::consts::PI).sqrt())?)?;
    Ok(scaled(x, 0.5)?.multiply(one.add(tanh)?)?)
}

/// The ids of a step, `[rows]`: those known from here, those sampled from the previous step.
fn token_ids(tokens: &[Token], previous: Option<&Array>) -> Result<Array> {
    let known: Vec<u32> = tokens
        .iter()
        .map(|token| match token {
            Token::Id(id) => *id,
            Token::Sampled(_) => 0,
        })
        .collect();
    let known = Array::from_slice(&known, &[known.len() as i32]);
    let sampled = |token: &Token| matches!(token, Token::Sampled(_));
    if !tokens.iter().any(sampled) {
        return Ok(known);
    }
    let rows: Vec<usize> = tokens
        .iter()
        .map(|token| match token {
            Token::Id(_) => 0,
            Token::Sampled(row) => *row,
        })
        .collect();
    let there = previous.map_or(0, |samples| samples.dim(0) as usize);
    let Some(previous) = previous.filter(|_| rows.iter().all(|row| *row < there)) else {
        return Err(Error::Backend("a token was not sampled by the step before".into()));
    };
    let from_previous = take_axis(previous, arrays::indices(&rows), 0)?;
    let sampled: Vec<bool> = tokens.iter().map(sampled).collect();
    let sampled = Array::from_slice(&sampled, &[sampled.len() as i32]);
    Ok(ops::select(sampled, from_previous, known)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_gathered_in_any_order() {
        let backend = Mlx::new(Device::Cpu).unwrap();
        backend.scope(|| {
            let x = Array::from_slice(&[1f32, 2.0, 3.0], &[3, 1]);
            for rows in [vec![0, 1, 2], vec![2, 0, 1], vec![1]] {
                let gathered = backend.gather_rows(&x, &rows).unwrap().contiguous().unwrap();
                gathered.eval().unwrap();
                let expected: Vec<f32> = rows.iter().map(|row| *row as f32 + 1.0).collect();
                assert_eq!(arrays::values::<f32>(&gathered).unwrap(), expected);
            }
        });
    }
}
