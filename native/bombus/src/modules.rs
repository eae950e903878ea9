//! The modules of the transformer: their paths, as in the checkpoints, and their shapes.

use crate::config::Config;

/// The linear layers of a decoder layer.
pub const PROJECTIONS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// A linear layer: its `weight` is `[out_features, in_features]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    pub path: String,
    pub in_features: usize,
    pub out_features: usize,
}

/// The linear layers of decoder layer `layer`, in the order of `PROJECTIONS`.
pub fn projections(config: &Config, layer: usize) -> [Module; PROJECTIONS.len()] {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    let shapes = [
        (hidden, q),
        (hidden, kv),
        (hidden, kv),
        (q, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ];
    std::array::from_fn(|index| {
        let (in_features, out_features) = shapes[index];
        let path = format!("model.layers.{layer}.{}", PROJECTIONS[index]);
        Module { path, in_features, out_features }
    })
}

/// `model.embed_tokens` or `lm_head`: `[vocab, hidden]`
pub fn vocabulary(config: &Config, path: &str) -> Module {
    Module { path: path.into(), in_features: config.hidden_size, out_features: config.vocab_size }
}

/// All linear layers, the embedding, and the head where it is not the embedding.
pub fn all_modules(config: &Config) -> impl Iterator<Item = Module> {
    let layers = (0..config.num_hidden_layers).flat_map(|layer| projections(config, layer));
    let head = (!config.tie_word_embeddings).then_some("lm_head");
    let ends = ["model.embed_tokens"].into_iter().chain(head);
    layers.chain(ends.map(|path| vocabulary(config, path)))
}
