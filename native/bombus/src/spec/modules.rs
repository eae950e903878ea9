//! The modules of a model: their paths, as in the checkpoints, and their shapes.

use super::{HeadWeight, LayerSpec, ModelSpec};

pub const EMBED_TOKENS: &str = "model.embed_tokens";
pub const LM_HEAD: &str = "lm_head";

/// A linear layer: its `weight` is `[out_features, in_features]`, its `bias` `[out_features]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    pub path: String,
    pub in_features: usize,
    /// The rows of each output: more than one where several layers are one matrix in the file.
    pub outputs: Vec<usize>,
    pub bias: bool,
}

impl Module {
    pub fn out_features(&self) -> usize {
        self.outputs.iter().sum()
    }
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

/// Name, outputs and bias of a linear layer.
type Linear = (&'static str, Vec<usize>, bool);

impl LayerSpec {
    /// A projection's inputs, and its linear layers.
    fn projection(&self, hidden: usize, projection: Projection) -> (usize, Vec<Linear>) {
        let Self { attention, mlp, .. } = self;
        let width = |heads: usize| heads * attention.head_dim;
        let (q, kv) = (width(attention.heads), width(attention.kv_heads));
        let apart = |names: &[&'static str], outputs: &[usize], bias| {
            let linears = names.iter().zip(outputs);
            linears.map(|(name, outputs)| (*name, vec![*outputs], bias)).collect()
        };
        match projection {
            Projection::Qkv if attention.fused => {
                (hidden, vec![("self_attn.qkv_proj", vec![q, kv, kv], attention.qkv_bias)])
            }
            Projection::Qkv => {
                let names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
                (hidden, apart(&names, &[q, kv, kv], attention.qkv_bias))
            }
            Projection::O => (q, apart(&["self_attn.o_proj"], &[hidden], attention.o_bias)),
            Projection::GateUp if mlp.fused => {
                (hidden, vec![("mlp.gate_up_proj", vec![mlp.inner; 2], mlp.bias)])
            }
            Projection::GateUp => {
                (hidden, apart(&["mlp.gate_proj", "mlp.up_proj"], &[mlp.inner; 2], mlp.bias))
            }
            Projection::Down => (mlp.inner, apart(&["mlp.down_proj"], &[hidden], mlp.bias)),
        }
    }
}

impl ModelSpec {
    /// The linear layers of a projection of layer `layer`.
    pub fn projection(&self, layer: usize, projection: Projection) -> Vec<Module> {
        let (in_features, linears) = self.layers[layer].projection(self.hidden, projection);
        let module = |(name, outputs, bias)| {
            let path = format!("model.layers.{layer}.{name}");
            Module { path, in_features, outputs, bias }
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
        let (in_features, outputs) = (self.hidden, vec![self.vocab]);
        Module { path: path.into(), in_features, outputs, bias: false }
    }

    /// All linear layers, the embedding, and the head where it is one of its own.
    pub fn linears(&self) -> impl Iterator<Item = Module> {
        let layers = (0..self.layers.len()).flat_map(|layer| self.layer(layer));
        let has_head = !matches!(self.head.weight, HeadWeight::Tied | HeadWeight::Absent);
        let head = has_head.then(|| self.lm_head());
        layers.chain([self.embedding()]).chain(head)
    }

    /// Paths and widths of the norms of layer `layer`.
    pub fn layer_norms(&self, layer: usize) -> impl Iterator<Item = (String, usize)> {
        let LayerSpec { attention, norms, .. } = &self.layers[layer];
        let of_heads = attention
            .qk_norm
            .map(|norm| norm.names.into_iter().zip(attention.norm_widths(norm.heads)));
        let of_heads = of_heads.into_iter().flatten();
        let of_heads = of_heads.map(|(name, width)| (format!("self_attn.{name}"), width));
        let of_rows = norms.names().map(|name| (name.to_owned(), self.hidden));
        let norm = move |(name, width)| (format!("model.layers.{layer}.{name}"), width);
        of_rows.chain(of_heads).map(norm)
    }

    /// Paths and widths of all norms.
    pub fn norms(&self) -> impl Iterator<Item = (String, usize)> {
        let layers = (0..self.layers.len()).flat_map(|layer| self.layer_norms(layer));
        layers.chain([("model.norm".to_owned(), self.hidden)])
    }
}
