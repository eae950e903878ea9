//! EXAONE 4: norms behind attention and MLP, windows in three of four layers, and in those without a
//! window no rotation. Reference: mlx-lm's `models/exaone4.py`.

use super::fields::{Uniform, eps, head, kv_heads, own_head_dim};
use super::rope::rope;
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, BlockNorms, ModelSpec, NormSpec, QkNorm};
use serde_json::Value;

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = own_head_dim(fields, heads)?;
    let norm = NormSpec::rms(eps(fields, None)?);
    let rope = rope(fields, head_dim, 1_000_000.0)?;
    let attention = AttentionSpec {
        qk_norm: Some(QkNorm::each(norm)),
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    let uniform = Uniform::new(attention, norm.eps, head(fields, false)?, 2048);
    let mut spec = Uniform { norms: BlockNorms::after(norm), ..uniform }.spec(fields)?;
    let Some(pattern) = pattern(fields)? else {
        return Ok(spec);
    };
    let window = fields.size("sliding_window")?;
    windows::set(fields, &mut spec.layers, Some(window), |layer| pattern[layer % pattern.len()])?;
    for layer in spec.layers.iter_mut().filter(|layer| layer.attention.window.is_none()) {
        layer.attention.rope = None;
    }
    Ok(spec)
}

/// "LLLG", or 4, which says the same: which layers have the window, over and over.
fn pattern(fields: &Fields) -> Result<Option<Vec<bool>>> {
    let field = "sliding_window_pattern";
    let problem = || fields.error(field, "expected a text of L and G, or a number");
    match fields.value(field) {
        None => Ok(None),
        Some(Value::String(kinds)) if kinds.is_empty() => Ok(None),
        Some(Value::String(kinds)) => {
            let kind = |kind| match kind {
                'L' => Ok(true),
                'G' => Ok(false),
                _ => Err(problem()),
            };
            kinds.chars().map(kind).collect::<Result<_>>().map(Some)
        }
        Some(Value::Number(_)) => {
            let count = fields.size(field)?.min(4096);
            Ok(Some((1..=count).map(|layer| layer < count).collect()))
        }
        Some(_) => Err(problem()),
    }
}
