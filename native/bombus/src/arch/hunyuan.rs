//! Hunyuan, dense: heads are normed once they are rotated. Reference: mlx-lm's
//! `models/hunyuan_v1_dense.py`.

use super::fields::{Uniform, eps, head, kv_heads, own_head_dim};
use super::rope::{self, positive};
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec, NormSpec, NormedHeads, QkNorm, Rope, Scaling};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = own_head_dim(fields, heads)?;
    let bias = fields.flag_or("attention_bias", false)?;
    let eps = eps(fields, None)?;
    let qk_norm = fields.flag_or("use_qk_norm", true)?.then_some(QkNorm {
        spec: NormSpec::rms(eps),
        heads: NormedHeads::EachRotated,
        names: ["query_layernorm", "key_layernorm"],
    });
    let attention = AttentionSpec {
        qk_norm,
        qkv_bias: bias,
        o_bias: bias,
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope(fields, head_dim)?)
    };
    Uniform::new(attention, eps, head(fields, false)?, 32_768).spec(fields)
}

/// `rope_scaling: {alpha, ...}` makes theta larger once and for all. ("NTK-aware" scaling.)
fn rope(fields: &Fields, dim: usize) -> Result<Rope> {
    let theta = rope::theta(fields, 10_000.0)?;
    let alpha = match rope::parameters(fields)? {
        Some(rope) => positive(&rope, "alpha", Some(1.0))?,
        None => 1.0,
    };
    let theta = (theta * alpha.powf(dim as f64 / (dim as f64 - 2.0))) as f32;
    match theta.is_finite() && theta > 0.0 {
        true => Ok(Rope::new(dim, theta, Scaling::None)),
        false => Err(fields.error("rope_scaling", "`alpha` and head_dim make no finite theta")),
    }
}
