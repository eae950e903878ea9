//! Fields that change the arithmetic: a family that does not read one of them would compute another
//! model in silence.

use crate::error::Result;
use crate::files::{Fields, says};
use serde_json::Value;

/// Each with the numbers that change nothing, beside null, false and what is empty.
const ARITHMETIC: [(&str, &[f64]); 46] = [
    ("alibi", &[]),
    ("attention_bias", &[]),
    ("attention_multiplier", &[]),
    ("attention_out_bias", &[]),
    ("attn_logit_softcapping", &[]),
    ("attn_temperature_tuning", &[0.0]),
    ("clip_qkv", &[]),
    ("dim_model_base", &[]),
    ("embedding_multiplier", &[1.0]),
    ("ffn_hidden_size", &[]),
    ("final_logit_softcapping", &[]),
    ("full_attention_interval", &[]),
    ("hidden_size_per_layer_input", &[0.0]),
    ("is_decoder_only", &[1.0]),
    ("kv_lora_rank", &[0.0]),
    ("layer_norm_bias", &[]),
    ("linear_num_key_heads", &[0.0]),
    ("logit_scale", &[1.0]),
    ("logits_scaling", &[1.0]),
    ("mlp_bias", &[]),
    ("moe_intermediate_size", &[0.0]),
    ("mup_base_width", &[]),
    ("no_rope_layers", &[]),
    ("num_experts", &[0.0]),
    ("num_kv_shared_layers", &[0.0]),
    ("num_local_experts", &[0.0]),
    ("parallel_attn", &[]),
    ("partial_rotary_factor", &[1.0]),
    ("qk_layernorm", &[]),
    ("query_pre_attn_scalar", &[]),
    ("residual_multiplier", &[1.0]),
    ("rope_interleaved", &[]),
    ("rope_interleave", &[]),
    ("rope_traditional", &[]),
    ("rotary_percent", &[1.0]),
    ("scale_depth", &[]),
    ("scale_emb", &[1.0]),
    ("scale_embedding", &[]),
    ("use_bias", &[]),
    ("use_bidirectional_attention", &[]),
    ("use_dynamic_ntk", &[]),
    ("use_logn_attn", &[]),
    ("use_parallel_residual", &[]),
    ("use_post_norm", &[]),
    ("use_qk_norm", &[]),
    ("use_sliding_window", &[]),
];

/// Fails where one of them says something, and nobody has asked for it.
pub fn refuse(fields: &Fields) -> Result<()> {
    let says = |(name, neutral): &&(&str, &[f64])| {
        let counts = |value: &Value| value.is_string() || says(value, neutral);
        !fields.was_read(name) && fields.map.get(*name).is_some_and(counts)
    };
    match ARITHMETIC.iter().find(says) {
        Some((name, _)) => {
            Err(fields.unsupported(name, "nothing but its absence is, for this model_type"))
        }
        None => Ok(()),
    }
}
