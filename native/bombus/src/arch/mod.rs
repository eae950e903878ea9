//! The families of models: each turns `config.json` into a `ModelSpec`, with the defaults that
//! mlx-lm has for it.

mod cohere2;
mod ernie4_5;
mod exaone4;
mod fields;
mod gemma;
mod glm4;
mod granite;
mod hunyuan;
mod llama;
mod ministral3;
mod olmo;
mod phi3;
mod qwen2;
mod qwen3;
mod rope;
mod smollm3;
mod unknown;
mod windows;
mod wrappers;

use crate::error::{Error, Result};
use crate::files::Fields;
use crate::spec::ModelSpec;

/// What makes a family's models of their `config.json`.
type Family = fn(&Fields) -> Result<ModelSpec>;

/// `model_type` -> its family
const FAMILIES: [(&str, Family); 17] = [
    ("cohere2", cohere2::spec),
    ("ernie4_5", ernie4_5::spec),
    ("exaone4", exaone4::spec),
    ("gemma2", gemma::gemma2),
    ("gemma3_text", gemma::gemma3),
    ("glm4", glm4::spec),
    ("granite", granite::spec),
    ("hunyuan_v1_dense", hunyuan::spec),
    ("llama", llama::spec),
    ("ministral3", ministral3::spec),
    ("mistral", llama::spec),
    ("olmo2", olmo::olmo2),
    ("olmo3", olmo::olmo3),
    ("phi3", phi3::spec),
    ("qwen2", qwen2::spec),
    ("qwen3", qwen3::spec),
    ("smollm3", smollm3::spec),
];

/// Every `model_type` that is loaded, in alphabetical order.
pub fn families() -> Vec<&'static str> {
    let own = FAMILIES.iter().map(|(name, _)| *name);
    let mut names: Vec<_> = own.chain(wrappers::NAMES).collect();
    names.sort_unstable();
    names
}

/// What a `config.json` describes: an error where the family, or something of it, is not known.
pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let inner = language_model(fields)?;
    let mut spec = family(inner.as_ref().unwrap_or(fields))?;
    spec.names.wrapped = inner.is_some();
    Ok(spec)
}

/// The configuration of the language model within another.
pub fn language_model(fields: &Fields) -> Result<Option<Fields>> {
    let model_type = fields.text("model_type")?;
    match FAMILIES.iter().any(|(name, _)| *name == model_type) {
        true => Ok(None),
        false => wrappers::language_model(fields, &model_type),
    }
}

fn family(fields: &Fields) -> Result<ModelSpec> {
    let model_type = fields.text("model_type")?;
    let Some((_, family)) = FAMILIES.iter().find(|(name, _)| *name == model_type) else {
        let (path, known) = (fields.path.display(), families().join(", "));
        let message = format!(
            "`{path}`: the model_type `{model_type}` is not supported (these are: {known})"
        );
        return Err(Error::Unsupported(message));
    };
    let spec = family(fields)?;
    unknown::refuse(fields)?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, Value, json};
    use std::path::Path;

    fn fields(more: &Value) -> Fields {
        let base = json!({
            "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "vocab_size": 256,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
        });
        let own = [base, more.clone()].into_iter().flat_map(|part| part.as_object().cloned());
        Fields::new(Path::new("config.json"), own.flatten().collect::<Map<_, _>>())
    }

    fn windows(config: &Value) -> Vec<Option<usize>> {
        spec(&fields(config)).unwrap().layers.iter().map(|layer| layer.attention.window).collect()
    }

    #[test]
    fn windows_are_where_the_family_has_them() {
        let kinds =
            json!(["full_attention", "sliding_attention", "full_attention", "full_attention"]);
        let (w, full) = (Some(8), None);
        for (config, expected) in [
            (json!({"model_type": "mistral"}), [full; 4]),
            (json!({"model_type": "mistral", "sliding_window": 8}), [w; 4]),
            (
                json!({"model_type": "mistral", "sliding_window": 8, "layer_types": kinds}),
                [full, w, full, full],
            ),
            (json!({"model_type": "llama", "sliding_window": 8}), [full; 4]),
            (
                json!({"model_type": "llama", "sliding_window": 8, "layer_types": kinds}),
                [full, w, full, full],
            ),
            (json!({"model_type": "olmo3", "sliding_window": 8}), [w, w, w, full]),
            (json!({"model_type": "gemma2", "sliding_window": 8}), [w, full, w, full]),
            (
                json!({"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2}),
                [w, full, w, full],
            ),
            (json!({"model_type": "gemma3_text", "sliding_window": 8}), [w; 4]),
            (
                json!({"model_type": "exaone4", "sliding_window": 8, "sliding_window_pattern": "LG"}),
                [w, full, w, full],
            ),
            (
                json!({"model_type": "exaone4", "sliding_window": 8, "sliding_window_pattern": 4}),
                [w, w, w, full],
            ),
            (
                json!({"model_type": "exaone4", "sliding_window": null, "sliding_window_pattern": null}),
                [full; 4],
            ),
            (json!({"model_type": "cohere2", "sliding_window": 8}), [w, w, w, full]),
        ] {
            assert_eq!(windows(&config), expected, "{config}");
        }
    }

    /// Each with a value of the kind that others have.
    #[test]
    fn what_a_family_does_not_read_is_refused_by_name() {
        for (config, field) in [
            (
                json!({"model_type": "llama", "attn_logit_softcapping": 50.0}),
                "attn_logit_softcapping",
            ),
            (json!({"model_type": "llama", "hidden_act": "gelu"}), "hidden_act"),
            (json!({"model_type": "llama", "rope_scaling": {"type": "proportional"}}), "type"),
            (
                json!({"model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 1}),
                "use_sliding_window",
            ),
            (
                json!({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}),
                "final_logit_softcapping",
            ),
            (
                json!({"model_type": "gemma3_text", "use_bidirectional_attention": true}),
                "use_bidirectional_attention",
            ),
            (json!({"model_type": "gemma2", "hidden_activation": "silu"}), "hidden_activation"),
            (json!({"model_type": "gemma2", "attention_bias": true}), "attention_bias"),
            (json!({"model_type": "cohere2", "use_qk_norm": true}), "use_qk_norm"),
            (json!({"model_type": "cohere2", "layer_norm_bias": true}), "layer_norm_bias"),
            (
                json!({"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 2.0}}),
                "rope_scaling",
            ),
            (json!({"model_type": "smollm3", "use_sliding_window": true}), "use_sliding_window"),
            (json!({"model_type": "olmo2", "clip_qkv": 8.0}), "clip_qkv"),
            (json!({"model_type": "ernie4_5", "num_experts": 4}), "num_experts"),
            (
                json!({"model_type": "llama", "layer_types": vec!["linear_attention"; 4]}),
                "layer_types",
            ),
        ] {
            let error = spec(&fields(&config)).expect_err(&config.to_string());
            let message = error.to_string();
            assert!(message.contains(&format!("`{field}`")), "{config}: {message}");
            assert_eq!(error.reason(), "unsupported", "{config}: {message}");
        }
    }

    #[test]
    fn what_a_family_needs_is_asked_for_by_name() {
        let long = |factors: usize| json!({"type": "longrope", "long_factor": vec![1.0; factors], "short_factor": []});
        for (config, word) in [
            (json!({"model_type": "granite"}), "attention_multiplier"),
            (json!({"model_type": "phi3", "rope_scaling": long(5)}), "expected 8 factors, got: 5"),
            (json!({"model_type": "phi3", "partial_rotary_factor": 1.5}), "partial_rotary_factor"),
            (json!({"model_type": "olmo3"}), "sliding_window"),
            (
                json!({"model_type": "exaone4", "sliding_window": 8, "sliding_window_pattern": "LX"}),
                "sliding_window_pattern",
            ),
            (json!({"model_type": "smollm3", "no_rope_layers": [1]}), "no_rope_layers"),
            (
                json!({"model_type": "gemma2", "query_pre_attn_scalar": -1.0}),
                "query_pre_attn_scalar",
            ),
            (json!({"model_type": "other", "text_config": {"model_type": "gpt2"}}), "gpt2"),
        ] {
            let message = spec(&fields(&config)).expect_err(&config.to_string()).to_string();
            assert!(message.contains(word), "{config}: {message}");
        }
    }
}
