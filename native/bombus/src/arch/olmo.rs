//! OLMo 2 and 3: norms behind attention and MLP, and of all heads of q and of k together; OLMo 3 has
//! windows in three of four layers. References: mlx-lm's `models/olmo2.py`, `models/olmo3.py`.

use super::fields::{Uniform, eps, head, kv_heads, own_head_dim};
use super::rope::rope;
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{
    AttentionSpec, BlockNorms, HeadWeight, ModelSpec, NormSpec, NormedHeads, QkNorm, Scaling,
};

pub fn olmo2(fields: &Fields) -> Result<ModelSpec> {
    let mlp_bias = fields.flag_or("mlp_bias", false)?;
    Uniform { mlp_bias, ..uniform(fields, head(fields, true)?)? }.spec(fields)
}

pub fn olmo3(fields: &Fields) -> Result<ModelSpec> {
    let mut spec = uniform(fields, head(fields, false)?)?.spec(fields)?;
    let window = fields.size("sliding_window")?;
    windows::set(fields, &mut spec.layers, Some(window), |layer| (layer + 1) % 4 != 0)?;
    // What scales the rotation is for the layers that see everything.
    let windowed = spec.layers.iter_mut().filter(|layer| layer.attention.window.is_some());
    for rope in windowed.filter_map(|layer| layer.attention.rope.as_mut()) {
        rope.scaling = Scaling::None;
    }
    Ok(spec)
}

fn uniform(fields: &Fields, head: HeadWeight) -> Result<Uniform> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = own_head_dim(fields, heads)?;
    let bias = fields.flag_or("attention_bias", false)?;
    let norm = NormSpec::rms(eps(fields, None)?);
    let rope = rope(fields, head_dim, 500_000.0)?;
    let attention = AttentionSpec {
        qk_norm: Some(QkNorm { heads: NormedHeads::All, ..QkNorm::each(norm) }),
        qkv_bias: bias,
        o_bias: bias,
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    let norms = BlockNorms::after(norm);
    Ok(Uniform { norms, ..Uniform::new(attention, norm.eps, head, 4096) })
}
