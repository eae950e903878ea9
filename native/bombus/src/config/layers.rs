//! What the layers of transformers' Qwen3 may be, and is not computed here.
//! Reference: transformers' `Qwen3Config`. mlx-lm looks at none of these fields.

use super::Config;
use super::fields::{Fields, short};
use crate::error::{Error, Result};
use serde_json::Value;

impl Config {
    pub fn check_layers(&self, fields: &Fields) -> Result<()> {
        let unsupported = |field: &str, supported: &str| {
            let (path, value) = (fields.path.display(), fields.value(field));
            let value = short(&value.map(Value::to_string).unwrap_or_default());
            let message = format!("`{path}`: `{field}` of {value} is not supported, {supported}");
            Err(Error::Unsupported(message))
        };
        if fields.value("hidden_act").is_some_and(|act| act != "silu" && act != "swish") {
            return unsupported("hidden_act", "silu is");
        }
        if fields.flag_or("attention_bias", false)? {
            return unsupported("attention_bias", "false is");
        }
        let full = "full attention in every layer is";
        let slides = fields.flag_or("use_sliding_window", false)?;
        let window = self.window(fields, slides)?;
        // A window that holds the whole context hides nothing.
        let hides = |window: usize| window < self.max_position_embeddings;
        match fields.value("layer_types") {
            None if window.is_some_and(hides) => {
                let first = fields.whole_or("max_window_layers", 28)?;
                match first < self.num_hidden_layers {
                    true => unsupported("use_sliding_window", full),
                    false => Ok(()),
                }
            }
            None => Ok(()),
            Some(Value::Array(kinds)) if kinds.len() == self.num_hidden_layers => {
                let whole = window.is_some_and(|window| !hides(window));
                let is_full = |kind: &Value| {
                    kind == "full_attention" || (kind == "sliding_attention" && whole)
                };
                if kinds.iter().all(is_full) { Ok(()) } else { unsupported("layer_types", full) }
            }
            Some(_) => {
                Err(fields.error("layer_types", "expected a list with a name for each layer"))
            }
        }
    }

    /// How many tokens a sliding layer sees; `None` where none slides.
    fn window(&self, fields: &Fields, slides: bool) -> Result<Option<usize>> {
        const DEFAULT: usize = 4096;
        let is_null = fields.map.get("sliding_window").is_some_and(Value::is_null);
        if !slides || is_null {
            return Ok(None);
        }
        fields.size_or("sliding_window", DEFAULT).map(Some)
    }
}
