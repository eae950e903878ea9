//! Qwen2 and Qwen2.5: biases of q, k and v. Reference: mlx-lm's `models/qwen2.py`.

use super::fields::{Uniform, eps, head_dim};
use super::rope::rope;
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = head_dim(fields, heads)?;
    let attention = AttentionSpec {
        heads,
        kv_heads: fields.size_or("num_key_value_heads", heads)?,
        head_dim,
        rope: rope(fields, head_dim, 1_000_000.0)?,
        qk_norm: None,
        qkv_bias: true,
        o_bias: false,
    };
    let eps = eps(fields, None)?;
    let spec =
        Uniform { attention, mlp_bias: false, eps, tied: true, context: 32_768 }.spec(fields)?;
    windows::refuse_qwen(fields, spec.layers.len(), spec.context)?;
    Ok(spec)
}
