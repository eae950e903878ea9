//! A model as a value: what `config.json` says of its arithmetic, the same for every family.
//!
//! The decoder, the loader, conversions and adapters read nothing else of a model. Module paths
//! are the checkpoint's: `model.layers.0.self_attn.q_proj`.

mod attention;
mod modules;
mod names;
mod quantization;
mod rope;

pub use attention::{AttentionSpec, NormedHeads, QkNorm, QueryScaling};
pub use modules::{EMBED_TOKENS, LM_HEAD, Module, Projection};
pub use names::Names;
pub use quantization::Quantization;
pub use rope::{Rope, Scaling};

/// A decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    pub hidden: usize,
    pub vocab: usize,
    /// Embeddings are multiplied by it.
    pub embedding_scale: f32,
    pub layers: Vec<LayerSpec>,
    /// of the last norm, before the head
    pub norm: NormSpec,
    pub head: HeadSpec,
    /// The positions that it was made for.
    pub context: usize,
    /// What its tensors are called in the files.
    pub names: Names,
}

/// `h += after(attention(before(h))); h += after(mlp(before(h)))`, where some norms are absent.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    pub attention: AttentionSpec,
    pub mlp: MlpSpec,
    pub norms: BlockNorms,
    /// What attention and MLP add to the residual stream is multiplied by it.
    pub residual_scale: f32,
    /// The MLP reads what attention reads: `h += attention(before(h)) + mlp(before(h))`.
    pub parallel: bool,
}

/// The norms of whole rows in a layer, by their names; those that a family has not are absent.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockNorms {
    /// of all of them
    pub spec: NormSpec,
    pub before_attention: Option<&'static str>,
    pub after_attention: Option<&'static str>,
    pub before_mlp: Option<&'static str>,
    pub after_mlp: Option<&'static str>,
}

/// A norm by the root mean square of a row. Sources: Zhang and Sennrich, "Root Mean Square Layer
/// Normalization" (2019); Ba et al., "Layer Normalization" (2016).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    pub eps: f32,
    /// The weight is one more than the file says.
    pub plus_one: bool,
    /// The mean is subtracted first: LayerNorm, without a bias.
    pub centered: bool,
}

/// `down(activation(gate(x)) * up(x))`
#[derive(Clone, Debug, PartialEq)]
pub struct MlpSpec {
    pub inner: usize,
    pub activation: Activation,
    /// of all three
    pub bias: bool,
    /// gate and up are one matrix in the file, `gate_up_proj`
    pub fused: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x / (1 + e^-x)`
    Silu,
    /// GELU by tanh: `x / (1 + e^-2u)`, `u = sqrt(2 / pi) (x + 0.044715 x^3)`. Source: Hendrycks and
    /// Gimpel, "Gaussian Error Linear Units" (2016).
    Gelu,
}

/// `softcap * tanh(scale * x W' / softcap)`
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadSpec {
    pub weight: HeadWeight,
    /// Logits are multiplied by it.
    pub scale: f32,
    pub softcap: Option<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HeadWeight {
    /// the embedding, the other way round
    Tied,
    /// `lm_head`
    Linear,
    /// `lm_head` where the file has one, else the embedding; a loaded model has one of the others
    IfThere,
    /// none: such a model has hidden states only
    Absent,
}

impl ModelSpec {
    pub fn is_tied(&self) -> bool {
        self.head.weight == HeadWeight::Tied
    }
}

impl NormSpec {
    pub fn rms(eps: f32) -> Self {
        Self { eps, plus_one: false, centered: false }
    }
}

impl BlockNorms {
    /// One before attention and one before the MLP, as most families have them.
    pub fn before(spec: NormSpec) -> Self {
        Self {
            spec,
            before_attention: Some("input_layernorm"),
            after_attention: None,
            before_mlp: Some("post_attention_layernorm"),
            after_mlp: None,
        }
    }

    /// One behind each, and none before.
    pub fn after(spec: NormSpec) -> Self {
        Self {
            spec,
            before_attention: None,
            after_attention: Some("post_attention_layernorm"),
            before_mlp: None,
            after_mlp: Some("post_feedforward_layernorm"),
        }
    }

    /// The names of those that are there.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        [self.before_attention, self.after_attention, self.before_mlp, self.after_mlp]
            .into_iter()
            .flatten()
    }
}

impl HeadSpec {
    pub fn plain(weight: HeadWeight) -> Self {
        Self { weight, scale: 1.0, softcap: None }
    }
}
