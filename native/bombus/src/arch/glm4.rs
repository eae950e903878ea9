//! GLM-4 (0414): four norms a layer, half of each head rotated, gate and up in one matrix.
//! Reference: mlx-lm's `models/glm4.py`.

use super::fields::{Uniform, eps, head, kv_heads, own_head_dim};
use super::rope::{part, rope};
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, BlockNorms, ModelSpec, NormSpec, Rope};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = own_head_dim(fields, heads)?;
    let interleaved = fields.flag_or("rope_traditional", true)?;
    let rope = rope(fields, part(fields, head_dim, 0.5)?, 10_000.0)?;
    let attention = AttentionSpec {
        qkv_bias: fields.flag_or("attention_bias", false)?,
        ..AttentionSpec::plain(
            heads,
            kv_heads(fields, heads)?,
            head_dim,
            Rope { interleaved, ..rope },
        )
    };
    let eps = eps(fields, None)?;
    let norms = BlockNorms {
        spec: NormSpec::rms(eps),
        before_attention: Some("input_layernorm"),
        after_attention: Some("post_self_attn_layernorm"),
        before_mlp: Some("post_attention_layernorm"),
        after_mlp: Some("post_mlp_layernorm"),
    };
    let uniform = Uniform::new(attention, eps, head(fields, false)?, 32_768);
    Uniform { mlp_fused: true, norms, ..uniform }.spec(fields)
}
