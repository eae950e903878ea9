//! Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another, heads rotated in part.
//! References: mlx-lm's `models/phi3.py`; for the window transformers' `Phi3Config`.

use super::fields::{Uniform, eps, head, head_dim, kv_heads};
use super::rope::{part, rope};
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec, Scaling};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = head_dim(fields, heads)?;
    let rope = rope(fields, part(fields, head_dim, 1.0)?, 10_000.0)?;
    if !matches!(rope.scaling, Scaling::None | Scaling::Linear { .. } | Scaling::Long { .. }) {
        return Err(fields.unsupported("rope_scaling", "linear and longrope are"));
    }
    let attention = AttentionSpec {
        fused: true,
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    let uniform = Uniform::new(attention, eps(fields, None)?, head(fields, false)?, 131_072);
    let mut spec = Uniform { mlp_fused: true, ..uniform }.spec(fields)?;
    let window = fields.optional_size("sliding_window")?;
    windows::set(fields, &mut spec.layers, window, |_| true)?;
    Ok(spec)
}
