//! Qwen3: norms of the heads of q and k. Reference: mlx-lm's `models/qwen3.py`.

use super::fields::{Uniform, eps, head, kv_heads};
use super::rope::rope;
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec, NormSpec, QkNorm};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    if fields.flag_or("attention_bias", false)? {
        return Err(fields.unsupported("attention_bias", "false is"));
    }
    let heads = fields.size("num_attention_heads")?;
    // transformers' own default, not hidden_size / num_attention_heads
    let head_dim = fields.size_or("head_dim", 128)?;
    let eps = eps(fields, Some(1e-6))?;
    let rope = rope(fields, head_dim, 1_000_000.0)?;
    let attention = AttentionSpec {
        qk_norm: Some(QkNorm::each(NormSpec::rms(eps))),
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    let spec = Uniform::new(attention, eps, head(fields, false)?, 32_768).spec(fields)?;
    windows::refuse_qwen(fields, spec.layers.len(), spec.context)?;
    Ok(spec)
}
