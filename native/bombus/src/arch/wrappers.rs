//! Models that hold a language model beside others, of images above all: what is loaded is the
//! language model, as `text_config` describes it. References: mlx-lm's `models/gemma3.py`,
//! `models/mistral3.py`.

use crate::error::Result;
use crate::files::Fields;
use serde_json::{Value, json};

pub const NAMES: [&str; 2] = ["gemma3", "mistral3"];

/// None where it is no wrapper.
pub fn language_model(fields: &Fields, model_type: &str) -> Result<Option<Fields>> {
    let text = fields.object("text_config")?;
    if text.is_none() && NAMES.contains(&model_type) {
        return Err(fields.error("text_config", "it is missing, and describes the language model"));
    }
    let Some(mut text) = text else { return Ok(None) };
    let defaults = match model_type {
        "gemma3" => json!({
            "model_type": "gemma3_text",
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        }),
        "mistral3" => json!({ "model_type": "mistral", "tie_word_embeddings": false }),
        _ => json!({}),
    };
    // The outer vocabulary counts where there is one, as in the reference.
    let outer = ["vocab_size", "eos_token_id"].into_iter();
    let outer = outer.filter_map(|name| Some((name.to_owned(), fields.value(name)?.clone())));
    text.map.extend(outer);
    for (name, value) in defaults.as_object().into_iter().flatten() {
        let own = text.map.entry(name.clone()).or_insert(Value::Null);
        if own.is_null() {
            *own = value.clone();
        }
    }
    Ok(Some(text))
}
