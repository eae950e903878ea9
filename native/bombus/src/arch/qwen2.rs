//! Qwen2 and Qwen2.5: biases of q, k and v. Reference: mlx-lm's `models/qwen2.py`.

use super::fields::{Uniform, eps, head, head_dim, kv_heads};
use super::rope::rope;
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = head_dim(fields, heads)?;
    let rope = rope(fields, head_dim, 1_000_000.0)?;
    let attention = AttentionSpec {
        qkv_bias: true,
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    let uniform = Uniform::new(attention, eps(fields, None)?, head(fields, true)?, 32_768);
    let spec = uniform.spec(fields)?;
    windows::refuse_qwen(fields, spec.layers.len(), spec.context)?;
    Ok(spec)
}
