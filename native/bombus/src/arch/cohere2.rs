//! Command R7B and A (Cohere 2): LayerNorm, attention and MLP side by side, windows in three of four
//! layers, and in the others no rotation. Reference: mlx-lm's `models/cohere2.py`.

use super::fields::{Uniform, eps_of, factor, head_dim, kv_heads};
use super::rope::rope;
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{AttentionSpec, BlockNorms, HeadWeight, ModelSpec, NormSpec, Rope};

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    if fields.flag_or("layer_norm_bias", false)? {
        return Err(fields.unsupported("layer_norm_bias", "false is"));
    }
    if fields.flag_or("use_qk_norm", false)? {
        return Err(fields.unsupported("use_qk_norm", "false is"));
    }
    let heads = fields.size_or("num_attention_heads", 32)?;
    let head_dim = match fields.optional_size("head_dim")? {
        Some(own) if own != head_dim(fields, heads)? => {
            return Err(fields.error("head_dim", "expected hidden_size / num_attention_heads"));
        }
        Some(own) => own,
        None => head_dim(fields, heads)?,
    };
    let bias = fields.flag_or("attention_bias", false)?;
    let rope = Rope { interleaved: true, ..rope(fields, head_dim, 50_000.0)? };
    let attention = AttentionSpec {
        qkv_bias: bias,
        o_bias: bias,
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    let eps = eps_of(fields, "layer_norm_eps", Some(1e-5))?;
    let norm = NormSpec { centered: true, ..NormSpec::rms(eps) };
    let norms = BlockNorms { before_mlp: None, ..BlockNorms::before(norm) };
    let uniform = Uniform::new(attention, eps, HeadWeight::Tied, 8192);
    let mut spec = Uniform { norms, ..uniform }.spec(fields)?;
    spec.head.scale = factor(fields, "logit_scale", Some(0.0625))?;
    let window = fields.size_or("sliding_window", 4096)?;
    let pattern = fields.size_or("sliding_window_pattern", 4)?;
    windows::set(fields, &mut spec.layers, Some(window), |layer| (layer + 1) % pattern != 0)?;
    for layer in &mut spec.layers {
        layer.parallel = true;
        let is_windowed = layer.attention.window.is_some();
        layer.attention.rope = layer.attention.rope.take().filter(|_| is_windowed);
    }
    Ok(spec)
}
