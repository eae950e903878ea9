//! A model as a value: what `config.json` says of its arithmetic, the same for every family.
//!
//! The decoder, the loader, conversions and adapters read nothing else of a model. Module paths
//! are the checkpoint's: `model.layers.0.self_attn.q_proj`.

mod modules;
mod quantization;
mod rope;

pub use modules::{EMBED_TOKENS, LM_HEAD, Module, Projection};
pub use quantization::Quantization;
pub use rope::{Rope, Scaling};

/// A decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    pub hidden: usize,
    pub vocab: usize,
    pub layers: Vec<LayerSpec>,
    /// of the last norm, before the head
    pub norm: NormSpec,
    pub head: HeadSpec,
    /// The positions that it was made for.
    pub context: usize,
}

/// `h += attention(norm(h)); h += mlp(norm(h))`
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    pub attention: AttentionSpec,
    pub mlp: MlpSpec,
    /// of both norms
    pub norm: NormSpec,
}

/// A norm by the root mean square of a row. Source: Zhang and Sennrich, "Root Mean Square Layer
/// Normalization" (2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    pub eps: f32,
}

#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    pub heads: usize,
    /// Keys and values; each is for `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// even
    pub head_dim: usize,
    pub rope: Rope,
    /// of every head of q and k
    pub qk_norm: Option<NormSpec>,
    pub qkv_bias: bool,
    pub o_bias: bool,
}

/// `down(silu(gate(x)) * up(x))`
#[derive(Clone, Debug, PartialEq)]
pub struct MlpSpec {
    pub inner: usize,
    /// of all three
    pub bias: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HeadSpec {
    /// the embedding, the other way round
    Tied,
    /// `lm_head`
    Linear,
}

impl ModelSpec {
    pub fn is_tied(&self) -> bool {
        self.head == HeadSpec::Tied
    }
}

impl AttentionSpec {
    /// What scores are multiplied by.
    pub fn scale(&self) -> f32 {
        (self.head_dim as f32).powf(-0.5)
    }

    /// The query heads that share the keys and values of one head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}
