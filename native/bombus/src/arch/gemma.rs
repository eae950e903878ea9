//! Gemma 2 and 3: four norms a layer with weights of `1 + w`, GELU, embeddings times the square root
//! of their width. Gemma 2 caps scores and logits; Gemma 3 norms heads, and has windows with a
//! rotation of their own. References: mlx-lm's `models/gemma2.py`, `models/gemma3_text.py`; for the
//! window of Gemma 2 transformers' `Gemma2Config`.

use super::fields::{Uniform, eps, factor, kv_heads};
use super::rope::{self, positive, rope};
use super::windows;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::{
    Activation, AttentionSpec, BlockNorms, HeadWeight, ModelSpec, NormSpec, QkNorm, Rope, Scaling,
};

pub fn gemma2(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = fields.size("head_dim")?;
    let norm = NormSpec { plus_one: true, ..NormSpec::rms(eps(fields, None)?) };
    let rope = rope(fields, head_dim, 10_000.0)?;
    let attention = AttentionSpec {
        scale: positive(fields, "query_pre_attn_scalar", Some(144.0))?.powf(-0.5) as f32,
        softcap: Some(factor(fields, "attn_logit_softcapping", Some(50.0))?),
        ..AttentionSpec::plain(heads, kv_heads(fields, heads)?, head_dim, rope)
    };
    refuse_biases(fields)?;
    let mut spec = uniform(attention, norm, HeadWeight::Tied).spec(fields)?;
    spec.embedding_scale = (spec.hidden as f32).sqrt();
    spec.head.softcap = Some(factor(fields, "final_logit_softcapping", Some(30.0))?);
    let window = fields.optional_size("sliding_window")?;
    windows::set(fields, &mut spec.layers, window, |layer| layer % 2 == 0)?;
    Ok(spec)
}

pub fn gemma3(fields: &Fields) -> Result<ModelSpec> {
    let heads = fields.size_or("num_attention_heads", 4)?;
    let head_dim = fields.size_or("head_dim", 256)?;
    let norm = NormSpec { plus_one: true, ..NormSpec::rms(eps(fields, Some(1e-6))?) };
    let ropes = Ropes::read(fields, head_dim)?;
    let attention = AttentionSpec {
        scale: positive(fields, "query_pre_attn_scalar", Some(256.0))?.powf(-0.5) as f32,
        qk_norm: Some(QkNorm::each(norm)),
        ..AttentionSpec::plain(
            heads,
            fields.size_or("num_key_value_heads", 1)?,
            head_dim,
            ropes.full,
        )
    };
    refuse_biases(fields)?;
    for softcap in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if fields.value(softcap).is_some() {
            return Err(fields.unsupported(softcap, "null is"));
        }
    }
    let mut spec = uniform(attention, norm, HeadWeight::IfThere).spec(fields)?;
    // Rounded as in the reference, whatever the checkpoint's type.
    spec.embedding_scale = half::bf16::from_f32((spec.hidden as f32).sqrt()).to_f32();
    let window = fields.size_or("sliding_window", 512)?;
    let pattern = fields.optional_size("_sliding_window_pattern")?.unwrap_or(6);
    let pattern = fields.size_or("sliding_window_pattern", pattern)?;
    windows::set(fields, &mut spec.layers, Some(window), |layer| (layer + 1) % pattern != 0)?;
    for layer in spec.layers.iter_mut().filter(|layer| layer.attention.window.is_some()) {
        layer.attention.rope = Some(ropes.local.clone());
    }
    Ok(spec)
}

fn uniform(attention: AttentionSpec, norm: NormSpec, head: HeadWeight) -> Uniform {
    let norms = BlockNorms {
        spec: norm,
        before_attention: Some("input_layernorm"),
        after_attention: Some("post_attention_layernorm"),
        before_mlp: Some("pre_feedforward_layernorm"),
        after_mlp: Some("post_feedforward_layernorm"),
    };
    let uniform = Uniform::new(attention, norm.eps, head, 8192);
    Uniform { activation: Activation::Gelu, norms, ..uniform }
}

fn refuse_biases(fields: &Fields) -> Result<()> {
    match fields.flag_or("attention_bias", false)? {
        true => Err(fields.unsupported("attention_bias", "false is")),
        false => Ok(()),
    }
}

/// Gemma 3's two rotations: of layers that see everything, and of those with a window.
struct Ropes {
    full: Rope,
    local: Rope,
}

impl Ropes {
    fn read(fields: &Fields, dim: usize) -> Result<Self> {
        let local = |theta: f64| Rope::new(dim, theta as f32, Scaling::None);
        let theta = positive(fields, "rope_local_base_freq", Some(10_000.0))?;
        // Since transformers 5 each kind of layer has parameters of its own.
        let by_kind = match fields.object("rope_parameters")? {
            Some(kinds) => {
                let (full, own) =
                    (kinds.object("full_attention")?, kinds.object("sliding_attention")?);
                full.map(|full| (full, own))
            }
            None => None,
        };
        let Some((full, own)) = by_kind else {
            return Ok(Self { full: rope(fields, dim, 1_000_000.0)?, local: local(theta) });
        };
        let theta = match own {
            Some(own) => positive(&own, "rope_theta", Some(theta))?,
            None => theta,
        };
        let full_theta = positive(&full, "rope_theta", Some(1_000_000.0))?;
        let scaling = rope::scaling(&full, fields)?;
        Ok(Self { full: Rope::new(dim, full_theta as f32, scaling), local: local(theta) })
    }
}
