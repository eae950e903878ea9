//! Granite: Llama with four factors. Reference: mlx-lm's `models/granite.py`.

use super::fields::{Uniform, eps, factor, head, head_dim, kv_heads};
use super::rope::rope;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = head_dim(fields, heads)?;
    let bias = fields.flag_or("attention_bias", false)?;
    let rope = rope(fields, head_dim, 10_000.0)?;
    let attention = AttentionSpec {
        scale: factor(fields, "attention_multiplier", None)?,
        qkv_bias: bias,
        o_bias: bias,
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    let uniform = Uniform::new(attention, eps(fields, None)?, head(fields, true)?, 2048);
    let mlp_bias = fields.flag_or("mlp_bias", false)?;
    let mut spec = Uniform { mlp_bias, ..uniform }.spec(fields)?;
    spec.embedding_scale = factor(fields, "embedding_multiplier", None)?;
    spec.head.scale = 1.0 / factor(fields, "logits_scaling", None)?;
    if !spec.head.scale.is_finite() {
        return Err(fields.error("logits_scaling", "it is too small"));
    }
    let residual_scale = factor(fields, "residual_multiplier", None)?;
    spec.layers.iter_mut().for_each(|layer| layer.residual_scale = residual_scale);
    Ok(spec)
}
