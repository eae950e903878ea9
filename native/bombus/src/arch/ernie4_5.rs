//! ERNIE 4.5, dense: neighbours of a head are rotated together. Reference: mlx-lm's
//! `models/ernie4_5.py`.

use super::fields::{Uniform, eps, head, kv_heads, own_head_dim};
use super::rope::rope;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec, Rope};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = own_head_dim(fields, heads)?;
    let bias = fields.flag_or("use_bias", false)?;
    let rope = Rope { interleaved: true, ..rope(fields, head_dim, 500_000.0)? };
    let attention = AttentionSpec {
        qkv_bias: bias,
        o_bias: bias,
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    let uniform = Uniform::new(attention, eps(fields, None)?, head(fields, true)?, 131_072);
    Uniform { mlp_bias: bias, ..uniform }.spec(fields)
}
