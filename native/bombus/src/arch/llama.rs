//! Llama 2 and 3, Mistral, and what has their form (SmolLM2, TinyLlama, Yi, ...). Reference: mlx-lm's
//! `models/llama.py`.

use super::fields::{Uniform, eps, head_dim};
use super::rope::rope;
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = match fields.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None => head_dim(fields, heads)?,
    };
    let bias = fields.flag_or("attention_bias", false)?;
    let attention = AttentionSpec {
        heads,
        kv_heads: fields.size_or("num_key_value_heads", heads)?,
        head_dim,
        rope: rope(fields, head_dim, 10_000.0)?,
        qk_norm: None,
        qkv_bias: bias,
        o_bias: bias,
    };
    let (mlp_bias, eps) = (fields.flag_or("mlp_bias", false)?, eps(fields, None)?);
    let mut spec = Uniform { attention, mlp_bias, eps, tied: true, context: 2048 }.spec(fields)?;
    let window = fields.optional_size("sliding_window")?;
    let whole = window.is_some_and(|window| window >= spec.context);
    windows::refuse_types(fields, spec.layers.len(), whole)?;
    // Of Mistral all layers have the window, within which attention is full.
    if fields.text("model_type")? == "mistral" && fields.value("layer_types").is_none() {
        spec.context = window.map_or(spec.context, |window| spec.context.min(window));
    }
    Ok(spec)
}
