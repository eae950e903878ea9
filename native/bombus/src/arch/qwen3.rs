//! Qwen3: norms of the heads of q and k. Reference: mlx-lm's `models/qwen3.py`.

use super::fields::{Uniform, eps};
use super::rope::rope;
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec, NormSpec};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    if fields.flag_or("attention_bias", false)? {
        return Err(fields.unsupported("attention_bias", "false is"));
    }
    let heads = fields.size("num_attention_heads")?;
    // transformers' own default, not hidden_size / num_attention_heads
    let head_dim = fields.size_or("head_dim", 128)?;
    let eps = eps(fields, Some(1e-6))?;
    let attention = AttentionSpec {
        heads,
        kv_heads: fields.size_or("num_key_value_heads", heads)?,
        head_dim,
        rope: rope(fields, head_dim, 1_000_000.0)?,
        qk_norm: Some(NormSpec { eps }),
        qkv_bias: false,
        o_bias: false,
    };
    let spec =
        Uniform { attention, mlp_bias: false, eps, tied: false, context: 32_768 }.spec(fields)?;
    windows::refuse_qwen(fields, spec.layers.len(), spec.context)?;
    Ok(spec)
}
