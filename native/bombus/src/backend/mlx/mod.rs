//! The backend on MLX: Metal, CUDA, or MLX's own CPU device.
//!
//! Every operation only adds to a graph; `submit` starts it, `read` waits for it. MLX binds its
//! streams to threads, so all of a model's work happens in one thread, inside `Mlx::scope`.

mod array;
mod attention;
mod cuda;
mod device;
mod linear;
pub mod quantize;
mod sample;

pub use cuda::Phase;
pub use device::{Device, gpu_available, memory};

use super::{Adapted, AttentionWeights, Backend, LinearWeights};
use super::{LoraRows, LoraWeights, Page, Segment, Token};
use crate::decoder::{Decoder, Part};
use crate::error::{Error, Result};
use crate::sampler::{Draw, Sample};
use crate::spec::AttentionSpec;
use crate::tensor_file::TensorView;
use attention::{Attention, LayerCache};
use cuda::Card;
use linear::{Linear, Lora};
use mlx_rs::ops::indexing::{take_along_axis, take_axis};
use mlx_rs::{Array, Dtype, Stream, fast, ops, transforms};
use sample::Samples;
use std::cell::OnceCell;
use std::ops::Range;
use std::rc::Rc;

#[derive(Clone)]
pub struct Mlx {
    device: Device,
    stream: Stream,
    /// On an NVIDIA card, where its kernels serve the model.
    card: Rc<OnceCell<Card>>,
}

/// What a step took of the card goes back with it, where no samples keep it: it may never be computed.
pub struct Turn(Rc<OnceCell<Card>>);

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(card) = self.0.get()
            && card.turn().is_some()
        {
            card.step().forget_plan();
        }
    }
}

/// Keys and values of one sequence.
pub enum Cache {
    Layers(Vec<LayerCache>),
    Paged(cuda::Sequence),
}

impl From<mlx_rs::error::Exception> for Error {
    fn from(exception: mlx_rs::error::Exception) -> Self {
        let what = exception.what();
        // MLX's allocators say so in words of their own; there is no code to ask for.
        let memory = ["malloc", "allocate", "out of memory", "OutOfMemory"];
        match memory.iter().any(|word| what.contains(word)) {
            true => Error::OutOfMemory(what.into()),
            false => Error::Backend(what.into()),
        }
    }
}

impl Mlx {
    pub fn new(device: Device) -> Result<Self> {
        device::init()?;
        Ok(Self { stream: device.stream()?, device, card: Rc::default() })
    }
}

impl Mlx {
    /// DoRA scales what is before the bias.
    fn apply_dora(
        &self,
        linear: &Linear,
        part: usize,
        x: &Array,
        lora: &Lora,
        y: Array,
    ) -> Result<Array> {
        let bias = linear.bias(part)?;
        let y = match (self.device, &bias) {
            // mlx-lm's DoRA multiplies with dense weights, whose products are added in float32
            // everywhere; those with quantized ones are so on a GPU only.
            (Device::Cpu, _) => linear.product(&x.as_dtype(Dtype::Float32)?)?.swap_remove(part),
            (Device::Gpu, Some(_)) => linear.product(x)?.swap_remove(part),
            (Device::Gpu, None) => y,
        };
        let y = lora.apply(x, y)?;
        match bias {
            Some(bias) => Ok(y.add(bias.as_dtype(y.dtype())?)?),
            None => Ok(y),
        }
    }

    /// How long the phases of the last step took, where the kernel for NVIDIA cards made it.
    pub fn profile(&self) -> Result<Vec<Phase>> {
        self.card.get().map_or(Ok(vec![]), |card| card.step().profile())
    }
}

impl Backend for Mlx {
    type Tensor = Array;
    type Norm = Array;
    type Linear = Linear;
    type Embedding = Linear;
    type Attention = Attention;
    type Lora = Lora;
    type Cache = Cache;
    type Samples = Samples;
    type Turn = Turn;

    const DEFERS: bool = true;

    /// This backend's stream is the thread's default.
    fn scope<T>(&self, work: impl FnOnce() -> T) -> T {
        mlx_rs::with_stream(&self.stream, work)
    }

    fn turn(&self) -> Turn {
        Turn(self.card.clone())
    }

    fn norm(&self, weight: &TensorView) -> Result<Array> {
        array::load(weight)
    }

    fn linear(&self, parts: &[LinearWeights]) -> Result<Linear> {
        Linear::load(parts, self.device)
    }

    fn embedding(&self, weights: &LinearWeights) -> Result<Linear> {
        Linear::load(std::slice::from_ref(weights), self.device)
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
        match self.card.get() {
            Some(card) => Cache::Paged(card.sequence()),
            None => Cache::Layers((0..layers).map(|_| LayerCache::default()).collect()),
        }
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

    fn prepare(decoder: &Decoder<Self>) -> Result<()> {
        let backend = &decoder.backend;
        if backend.device.is_cuda() {
            match Card::new(decoder) {
                Ok(Some(card)) => _ = backend.card.set(card),
                Err(error @ Error::OutOfMemory(_)) => return Err(error),
                // A card that the kernels are not made for.
                Ok(None) | Err(_) => {}
            }
        }
        Ok(())
    }

    fn steps(&self, part: &Part<Self>) -> Result<bool> {
        match self.card.get() {
            Some(card) => card.step().serves(part.adapter),
            None => Ok(false),
        }
    }

    fn step(
        &self,
        tokens: &[Token],
        previous: Option<&Samples>,
        parts: &mut [Part<Self>],
    ) -> Result<Array> {
        let Some(card) = self.card.get() else {
            return Err(Error::Backend("a step without a card".into()));
        };
        card.take_step(tokens, previous.map(|samples| &samples.ids), parts)
    }

    fn stack(&self, x: &Array, y: &Array) -> Result<Array> {
        Ok(ops::concatenate(&[x.as_dtype(Dtype::Float32)?, y.as_dtype(Dtype::Float32)?], 0)?)
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
        linear::apply_loras(embedded, 0, loras, |rows, lora, embedded| {
            lora.embed(&array::rows(&ids, rows)?, embedded)
        })
    }

    fn project(&self, linear: &Linear, x: &Array, loras: &[LoraRows<Self>]) -> Result<Vec<Array>> {
        let outputs = linear.apply(x)?.into_iter().enumerate();
        let add = |(part, y)| {
            linear::apply_loras(y, part, loras, |rows, lora, y| {
                let x = array::rows(x, rows)?;
                match lora.is_dora() {
                    true => self.apply_dora(linear, part, &x, lora, y),
                    false => lora.apply(&x, y),
                }
            })
        };
        outputs.map(add).collect()
    }

    fn rms_norm(&self, x: &Array, norm: &Array, eps: f32) -> Result<Array> {
        Ok(fast::rms_norm(x, Some(norm), eps)?)
    }

    fn attention(
        &self,
        attention: &Attention,
        layer: usize,
        qkv: [Array; 3],
        segments: &[Segment],
        caches: &mut [&mut Cache],
    ) -> Result<Array> {
        let (mut layers, mut sequences) = (vec![], vec![]);
        for cache in caches {
            match cache {
                Cache::Layers(cache) => layers.push(&mut cache[layer]),
                Cache::Paged(sequence) => sequences.push(sequence),
            }
        }
        match self.card.get() {
            Some(card) => card.attend(attention, layer, qkv, segments, &mut sequences),
            None => attention.attend(qkv, segments, &mut layers),
        }
    }

    fn gated(&self, gate: &Array, up: &Array) -> Result<Array> {
        if self.device.is_cuda()
            && let Some(gated) = cuda::operations::gated(gate, up)?
        {
            return Ok(gated);
        }
        let silu = gate.multiply(ops::sigmoid(gate)?)?;
        Ok(silu.multiply(up)?)
    }

    fn add(&self, x: &Array, y: &Array) -> Result<Array> {
        Ok(x.add(y)?)
    }

    fn select(&self, x: &Array, rows: &[usize]) -> Result<Array> {
        if rows.iter().copied().eq(0..x.dim(0) as usize) {
            return Ok(x.clone());
        }
        Ok(take_axis(x, array::indices(rows), 0)?)
    }

    fn unembed(&self, embedding: &Linear, x: &Array, loras: &[LoraRows<Self>]) -> Result<Array> {
        let mut logits = self.project(embedding, x, loras)?;
        logits.pop().ok_or_else(|| Error::Backend("an embedding is one part".into()))
    }

    fn sample(&self, logits: &Array, draws: &[Draw]) -> Result<Samples> {
        let mut samples = sample::sample(logits, draws, self.device)?;
        samples.turn = self.card.get().and_then(Card::turn);
        Ok(samples)
    }

    fn log_probs(&self, logits: &Array, targets: &[u32]) -> Result<Vec<f32>> {
        let logits = logits.as_dtype(Dtype::Float32)?;
        let targets = Array::from_slice(targets, &[targets.len() as i32, 1]);
        let chosen = take_along_axis(&logits, &targets, -1)?;
        let log_probs = chosen.subtract(logits.logsumexp_axis(-1, true)?)?.flatten(None, None)?;
        log_probs.eval()?;
        array::values(&log_probs)
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
    let from_previous = take_axis(previous, array::indices(&rows), 0)?;
    let sampled: Vec<bool> = tokens.iter().map(sampled).collect();
    let sampled = Array::from_slice(&sampled, &[sampled.len() as i32]);
    Ok(ops::select(sampled, from_previous, known)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_selected_in_any_order() {
        let backend = Mlx::new(Device::Cpu).unwrap();
        backend.scope(|| {
            let x = Array::from_slice(&[1f32, 2.0, 3.0], &[3, 1]);
            for rows in [vec![0, 1, 2], vec![2, 0, 1], vec![1]] {
                let selected = backend.select(&x, &rows).unwrap().contiguous().unwrap();
                selected.eval().unwrap();
                let expected: Vec<f32> = rows.iter().map(|row| *row as f32 + 1.0).collect();
                assert_eq!(array::values::<f32>(&selected).unwrap(), expected);
            }
        });
    }
}
