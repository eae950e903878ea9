//! What a decoder-only transformer needs of the hardware, at the height at which a good kernel
//! can be written. `Decoder` is written once over this trait.
//!
//! Tokens are rows: an activation is `[rows, width]`, the rows of all scheduled sequences one
//! after another, without padding. Weights are immutable; caches and adapters are arguments.

#[cfg(feature = "mlx")]
pub mod arrays;
mod batch;
pub mod cpu;
#[cfg(feature = "mlx")]
pub mod cuda;
mod device;
#[cfg(feature = "mlx")]
pub mod mlx;
#[cfg(test)]
mod sample_tests;
mod ticket_lock;

pub use batch::{Batch, BoundAdapter, Entry, KvCache, Loras};
pub use device::Device;

use crate::error::Result;
use crate::files::safetensors::TensorView;
use crate::sampler::{Draw, Sample};
use crate::spec::{Activation, AttentionSpec, NormSpec, Quantization};
use safetensors::tensor::Dtype;
use std::ops::Range;

/// The tensors of one linear layer (or of the embedding), as they lie in the checkpoint.
/// `weight` is `[out, in]`, or its packed codes where `quantized` has the rest.
pub struct LinearWeights<'a> {
    pub weight: TensorView<'a>,
    pub quantized: Option<QuantizedWeights<'a>>,
    /// `[out]`
    pub bias: Option<TensorView<'a>>,
    pub out_features: usize,
}

/// `scales` and `biases` are `[out, in / group_size]`.
pub struct QuantizedWeights<'a> {
    pub scales: TensorView<'a>,
    pub biases: TensorView<'a>,
    pub layout: Quantization,
}

/// LoRA A and B of one linear layer, as it lies in the file: `y = W x + scale * B A x`, and
/// with a magnitude (DoRA) `y * magnitude / norm`, where the norm is that of the row of
/// `W + scale * B A`. Reference: mlx-lm's `tuner/{lora,dora}.py`,
/// PEFT's `tuners/lora/dora.py`.
pub struct LoraWeights<'a> {
    /// `[in, rank]`, transposed `[rank, in]`; of an embedding `in` is the vocabulary
    pub a: TensorView<'a>,
    /// `[rank, out]`, transposed `[out, rank]`
    pub b: TensorView<'a>,
    pub transposed: bool,
    /// Those of B's outputs that are this layer's, where several are one matrix in the file.
    pub outputs: Option<Range<usize>>,
    pub scale: f32,
    /// `[out]`, where a norm is that of a row; of an embedding in mlx-lm's format `[vocab]`, in
    /// PEFT's (transposed) `[hidden]`, where a norm is that of a column
    pub magnitude: Option<TensorView<'a>>,
}

/// What a LoRA is for: DoRA needs its weights.
pub enum Adapted<'a, B: Backend + ?Sized> {
    /// one of the layers that share an input
    Projection(&'a B::Linear, usize),
    Embedding(&'a B::Linear),
    /// the embedding as the head
    TiedHead(&'a B::Linear),
}

/// What an attention layer has besides its linear layers.
pub struct AttentionWeights<'a> {
    /// of q and of k, as wide as `AttentionSpec::norm_widths` says
    pub norms: Option<[TensorView<'a>; 2]>,
    /// The type of the model's activations, which decides on that of keys and values.
    pub dtype: Dtype,
}

/// The rows of a step that belong to one sequence, and the position of the first of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    pub rows: Range<usize>,
    pub start: usize,
}

/// A block of a cache's memory: the same id is the same memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Page {
    pub id: usize,
    pub bytes: usize,
}

/// The token of a row: known, or still on the device as a row of the previous step's samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Token {
    Id(u32),
    Sampled(usize),
}

/// An adapter's LoRA for some rows, of number `index` of fused linear layers (0 for embeddings).
pub struct LoraRows<'a, B: Backend + ?Sized> {
    pub index: usize,
    pub rows: Range<usize>,
    pub lora: &'a B::Lora,
}

pub trait Backend {
    /// An activation, `[rows, width]`.
    type Tensor;
    /// The weight of a norm, `[width]`.
    type Norm;
    /// One or several linear layers that share their input (q, k and v; gate and up), or the embedding,
    /// whose product is a tied head's.
    type Linear;
    /// An attention layer: its norms, its rotation, the form of its keys and values.
    type Attention;
    /// LoRA A and B of one linear layer or embedding.
    type Lora;
    /// Keys and values of one sequence.
    type Cache;
    /// Token ids that may not have been computed yet, `[rows]`.
    type Samples;
    /// Held while the operations of a step are called.
    type Guard;

    /// Whether samples are promises: then the next step is submitted before they are read.
    const ASYNC: bool;

    /// Runs a thread's whole work: for what a backend binds to its thread.
    fn scope<T>(&self, work: impl FnOnce() -> T) -> T {
        work()
    }

    /// Waits until this model may use what it shares with others.
    fn guard(&self) -> Self::Guard;

    fn norm(&self, weight: &TensorView, spec: &NormSpec) -> Result<Self::Norm>;
    fn linear(&self, fused: &[LinearWeights]) -> Result<Self::Linear>;
    fn attention_layer(
        &self,
        spec: &AttentionSpec,
        weights: &AttentionWeights,
    ) -> Result<Self::Attention>;
    fn lora(&self, weights: &LoraWeights, adapted: Adapted<Self>) -> Result<Self::Lora>;
    fn cache(&self, layers: usize) -> Self::Cache;
    /// A cache that begins as this one, up to so many positions: what is the same is shared.
    fn fork(&self, cache: &Self::Cache, positions: usize) -> Result<Self::Cache>;
    /// The first position that a layer's cache still has: those before a window go.
    fn kept_from(&self, cache: &Self::Cache, layer: usize) -> usize;
    /// The memory of a cache, in blocks that forks may share.
    fn pages(&self, cache: &Self::Cache) -> Vec<Page>;
    /// Makes room for these positions in a layer: an error where there is no memory for them.
    fn reserve(
        &self,
        attention: &Self::Attention,
        layer: usize,
        cache: &mut Self::Cache,
        positions: Range<usize>,
    ) -> Result<()>;

    /// -> `[rows, hidden]`
    fn embed(
        &self,
        embedding: &Self::Linear,
        tokens: &[Token],
        previous: Option<&Self::Samples>,
        loras: &[LoraRows<Self>],
    ) -> Result<Self::Tensor>;

    /// One output for each layer that `linear` is made of: `x W' + bias`, and what the adapters add.
    fn project(
        &self,
        linear: &Self::Linear,
        x: &Self::Tensor,
        loras: &[LoraRows<Self>],
    ) -> Result<Vec<Self::Tensor>>;

    fn normalize(
        &self,
        x: &Self::Tensor,
        norm: &Self::Norm,
        spec: &NormSpec,
    ) -> Result<Self::Tensor>;

    /// Norms and rotates the heads of q and k as the layer's spec says, appends k and v to the segments'
    /// caches and attends: q `[rows, heads * head_dim]` -> the same shape. `caches` go with `segments`.
    fn attention(
        &self,
        attention: &Self::Attention,
        layer: usize,
        qkv: [Self::Tensor; 3],
        segments: &[Segment],
        caches: &mut [&mut Self::Cache],
    ) -> Result<Self::Tensor>;

    /// `activation(gate) * up`
    fn glu(
        &self,
        gate: &Self::Tensor,
        up: &Self::Tensor,
        activation: Activation,
    ) -> Result<Self::Tensor>;
    /// `x + scale * y`
    fn add(&self, x: &Self::Tensor, y: &Self::Tensor, scale: f32) -> Result<Self::Tensor>;
    /// `scale * x`
    fn scale(&self, x: Self::Tensor, scale: f32) -> Result<Self::Tensor>;
    /// `cap * tanh(x / cap)`
    fn softcap(&self, x: Self::Tensor, cap: f32) -> Result<Self::Tensor>;
    /// Some rows of x, in any order.
    fn gather_rows(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor>;

    /// One token for each row of logits.
    fn sample(&self, logits: &Self::Tensor, draws: &[Draw]) -> Result<Self::Samples>;
    /// ln p of one target for each row of logits; waits for them.
    fn log_probs(&self, logits: &Self::Tensor, targets: &[u32]) -> Result<Vec<f32>>;

    /// x in float32, whose computation begins; `values` waits for it.
    fn start(&self, x: Self::Tensor) -> Result<Self::Tensor>;
    /// The numbers of what `start` has made, row by row.
    fn values(&self, x: &Self::Tensor) -> Result<Vec<f32>>;

    /// Starts the work that `samples` stands for, without waiting for it.
    fn submit(&self, samples: &Self::Samples) -> Result<()>;
    /// Waits until nothing that was submitted goes on, on threads of the backend's own either: the process
    /// may end now.
    fn finish(&self) {}
    /// Waits for the samples; none where a row's logits hold NaN.
    fn read(&self, samples: &Self::Samples) -> Result<Vec<Option<Sample>>>;
}
