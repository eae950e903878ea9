//! What a family's `config.json` has beside Qwen3's fields, with the numbers of a published model.

use anyhow::{Context, Result};
use serde_json::{Value, json};

pub struct Family {
    pub name: &'static str,
    /// Its heads are `hidden_size / num_attention_heads` wide, whatever `head_dim` says.
    pub derives_head_dim: bool,
    fields: fn() -> Value,
}

pub const QWEN3: &str = "qwen3";

const fn family(name: &'static str, fields: fn() -> Value) -> Family {
    Family { name, derives_head_dim: false, fields }
}

const fn deriving(name: &'static str, fields: fn() -> Value) -> Family {
    Family { name, derives_head_dim: true, fields }
}

const FAMILIES: [Family; 17] = [
    family(QWEN3, || json!({})),
    deriving("cohere2", || json!({ "layer_norm_eps": 1e-5, "logit_scale": 0.25 })),
    family("ernie4_5", || json!({})),
    family("exaone4", || json!({ "sliding_window": 4096, "sliding_window_pattern": "LLLG" })),
    family("gemma2", || {
        json!({ "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096 })
    }),
    family("gemma3_text", || {
        json!({ "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
            "sliding_window": 512, "sliding_window_pattern": 6 })
    }),
    family("glm4", || json!({ "partial_rotary_factor": 0.5 })),
    deriving("granite", || {
        json!({ "attention_multiplier": 0.007_812_5, "embedding_multiplier": 12.0,
            "logits_scaling": 8.0, "residual_multiplier": 0.22 })
    }),
    family("hunyuan_v1_dense", || json!({ "use_qk_norm": true })),
    family("llama", || json!({})),
    family("ministral3", || {
        json!({ "rope_parameters": { "rope_type": "yarn", "factor": 16.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "original_max_position_embeddings": 16_384, "mscale": 1.0,
            "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "rope_theta": 1_000_000.0 } })
    }),
    family("mistral", || json!({ "sliding_window": 4096 })),
    family("olmo2", || json!({})),
    family("olmo3", || json!({ "sliding_window": 4096 })),
    deriving("phi3", || {
        json!({ "partial_rotary_factor": 0.75, "sliding_window": 262_144,
            "original_max_position_embeddings": 4096,
            "rope_scaling": { "type": "longrope", "long_factor": vec![2.0; 48], "short_factor": vec![1.0; 48] } })
    }),
    deriving("qwen2", || json!({})),
    family("smollm3", || json!({ "no_rope_layer_interval": 4 })),
];

impl Family {
    pub fn find(name: &str) -> Result<&'static Self> {
        let known = FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ");
        let found = FAMILIES.iter().find(|family| family.name == name);
        found.with_context(|| format!("--family {name} is unknown (these are: {known})"))
    }

    /// Puts its fields over Qwen3's.
    pub fn adapt(&self, config: &mut Value) {
        config["model_type"] = self.name.into();
        for (name, value) in (self.fields)().as_object().into_iter().flatten() {
            config[name] = value.clone();
        }
    }
}
