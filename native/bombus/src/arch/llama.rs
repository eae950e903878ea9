//! Llama 2 and 3, Mistral, and what has their form (SmolLM2, TinyLlama, Yi, ...). Reference: mlx-lm's
//! `models/llama.py`; for Mistral's window transformers' `MistralConfig`.

use super::fields::{Uniform, eps, head, kv_heads, own_head_dim};
use super::rope::rope;
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = own_head_dim(fields, heads)?;
    let bias = fields.flag_or("attention_bias", false)?;
    let rope = rope(fields, head_dim, 10_000.0)?;
    let attention = AttentionSpec {
        qkv_bias: bias,
        o_bias: bias,
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    let uniform = Uniform::new(attention, eps(fields, None)?, head(fields, true)?, 2048);
    let mlp_bias = fields.flag_or("mlp_bias", false)?;
    let mut spec = Uniform { mlp_bias, ..uniform }.spec(fields)?;
    let window = fields.optional_size("sliding_window")?;
    // Of Mistral all layers have the window where nothing else is said.
    let all = fields.text("model_type")? == "mistral";
    windows::set(fields, &mut spec.layers, window, |_| all)?;
    Ok(spec)
}
