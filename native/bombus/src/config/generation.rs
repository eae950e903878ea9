//! `generation_config.json`: what of it would change a text, and is not followed here.
//! Reference: transformers' `GenerationConfig`.

use crate::files::{Fields, says, short};
use serde_json::Value;

/// Fields that change what is generated, each with the values that change nothing beside null.
const FIELDS: [(&str, &[f64]); 27] = [
    ("assistant_early_exit", &[]),
    ("bad_words_ids", &[]),
    ("begin_suppress_tokens", &[]),
    ("constraints", &[]),
    ("diversity_penalty", &[0.0]),
    ("dola_layers", &[]),
    ("encoder_no_repeat_ngram_size", &[0.0]),
    ("encoder_repetition_penalty", &[1.0]),
    ("epsilon_cutoff", &[0.0]),
    ("eta_cutoff", &[0.0]),
    ("exponential_decay_length_penalty", &[]),
    ("force_words_ids", &[]),
    ("forced_bos_token_id", &[]),
    ("forced_decoder_ids", &[]),
    ("forced_eos_token_id", &[]),
    ("guidance_scale", &[1.0]),
    ("min_length", &[0.0]),
    ("min_new_tokens", &[0.0]),
    ("no_repeat_ngram_size", &[0.0]),
    ("num_beams", &[1.0]),
    ("penalty_alpha", &[0.0]),
    ("sequence_bias", &[]),
    ("stop_strings", &[]),
    ("suppress_tokens", &[]),
    ("top_h", &[]),
    ("typical_p", &[1.0]),
    ("watermarking_config", &[]),
];

/// A warning where there are such fields.
pub fn warning(generation: &Fields) -> Option<String> {
    let counts = |(name, neutral): &&(&str, &[f64])| {
        generation.value(name).is_some_and(|value| says(value, neutral))
    };
    let shown = |(name, _): &(&str, &[f64])| {
        let value = generation.value(name).map(Value::to_string).unwrap_or_default();
        format!("`{name}` ({})", short(&value))
    };
    let fields: Vec<String> = FIELDS.iter().filter(counts).map(shown).collect();
    let path = generation.path.display();
    let fields = (!fields.is_empty()).then(|| fields.join(", "))?;
    Some(format!("`{path}`: these fields are not followed, so texts may differ: {fields}"))
}
