//! Ministral 3: YaRN, and queries that grow with their position. Reference: mlx-lm's
//! `models/ministral3.py`.

use super::fields::{Uniform, eps, head, kv_heads, own_head_dim};
use super::rope::{parameters, rope};
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, ModelSpec, QueryScaling};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = own_head_dim(fields, heads)?;
    let rope = rope(fields, head_dim, 10_000.0)?;
    let attention = AttentionSpec {
        query_scaling: query_scaling(fields)?,
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    let uniform = Uniform::new(attention, eps(fields, None)?, head(fields, true)?, 262_144);
    let mut spec = uniform.spec(fields)?;
    let window = fields.optional_size("sliding_window")?;
    windows::set(fields, &mut spec.layers, window, |_| false)?;
    Ok(spec)
}

fn query_scaling(fields: &Fields) -> Result<Option<QueryScaling>> {
    let Some(rope) = parameters(fields)? else { return Ok(None) };
    let beta = rope.number_or("llama_4_scaling_beta", 0.0)? as f32;
    if !beta.is_finite() {
        return Err(rope.error("llama_4_scaling_beta", "expected a number"));
    }
    let context = rope.size_or("original_max_position_embeddings", 4096)?;
    Ok((beta != 0.0).then_some(QueryScaling { beta, context }))
}
