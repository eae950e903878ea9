//! The modules of a model: their paths, as in the checkpoints, and their shapes.

use super::{LayerSpec, ModelSpec};

pub const EMBED_TOKENS: &str = "model.embed_tokens";
pub const LM_HEAD: &str = "lm_head";

/// A linear layer: its `weight` is `[out_features, in_features]`, its `bias` `[out_features]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    pub path: String,
    pub in_features: usize,
    pub out_features: usize,
    pub bias: bool,
}

/// Linear layers of a decoder layer that share their input: one product serves them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Projection {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Projection {
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];
}

impl LayerSpec {
    /// A projection's inputs, and name, outputs and bias of each linear layer.
    fn projection(
        &self,
        hidden: usize,
        projection: Projection,
    ) -> (usize, Vec<(&'static str, usize, bool)>) {
        let Self { attention, mlp, .. } = self;
        let (q, kv) =
            (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
        match projection {
            Projection::Qkv => {
                let names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
                let linear = |(name, outputs)| (name, outputs, attention.qkv_bias);
                (hidden, names.into_iter().zip([q, kv, kv]).map(linear).collect())
            }
            Projection::O => (q, vec![("self_attn.o_proj", hidden, attention.o_bias)]),
            Projection::GateUp => {
                let linear = |name| (name, mlp.inner, mlp.bias);
                (hidden, ["mlp.gate_proj", "mlp.up_proj"].map(linear).into())
            }
            Projection::Down => (mlp.inner, vec![("mlp.down_proj", hidden, mlp.bias)]),
        }
    }
}

impl ModelSpec {
    /// The linear layers of a projection of layer `layer`.
    pub fn projection(&self, layer: usize, projection: Projection) -> Vec<Module> {
        let (in_features, linears) = self.layers[layer].projection(self.hidden, projection);
        let module = |(name, out_features, bias)| {
            let path = format!("model.layers.{layer}.{name}");
            Module { path, in_features, out_features, bias }
        };
        linears.into_iter().map(module).collect()
    }

    /// The linear layers of layer `layer`.
    pub fn layer(&self, layer: usize) -> impl Iterator<Item = Module> {
        Projection::ALL.into_iter().flat_map(move |projection| self.projection(layer, projection))
    }

    pub fn embedding(&self) -> Module {
        self.vocabulary(EMBED_TOKENS)
    }

    /// `lm_head`, also where the embedding takes its place
    pub fn lm_head(&self) -> Module {
        self.vocabulary(LM_HEAD)
    }

    fn vocabulary(&self, path: &str) -> Module {
        let (in_features, out_features) = (self.hidden, self.vocab);
        Module { path: path.into(), in_features, out_features, bias: false }
    }

    /// All linear layers, the embedding, and the head where it is not the embedding.
    pub fn linears(&self) -> impl Iterator<Item = Module> {
        let layers = (0..self.layers.len()).flat_map(|layer| self.layer(layer));
        let head = (!self.is_tied()).then(|| self.lm_head());
        layers.chain([self.embedding()]).chain(head)
    }

    /// Paths and widths of the norms of layer `layer`.
    pub fn layer_norms(&self, layer: usize) -> impl Iterator<Item = (String, usize)> {
        let attention = &self.layers[layer].attention;
        let of_heads = attention.qk_norm.map(|_| ["self_attn.q_norm", "self_attn.k_norm"]);
        let of_heads = of_heads.into_iter().flatten().map(|name| (name, attention.head_dim));
        let of_rows = ["input_layernorm", "post_attention_layernorm"];
        let of_rows = of_rows.into_iter().map(|name| (name, self.hidden));
        let norm = move |(name, width)| (format!("model.layers.{layer}.{name}"), width);
        of_rows.chain(of_heads).map(norm)
    }

    /// Paths and widths of all norms.
    pub fn norms(&self) -> impl Iterator<Item = (String, usize)> {
        let layers = (0..self.layers.len()).flat_map(|layer| self.layer_norms(layer));
        layers.chain([("model.norm".to_owned(), self.hidden)])
    }
}
