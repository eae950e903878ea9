//! Layers that see only the last positions: not computed here, so refused where that would show.
//! Reference: transformers' `Qwen2Config`, `Qwen3Config`.

use crate::error::Result;
use crate::files::Fields;
use serde_json::Value;

/// What `sliding_window` is for Qwen where it is not said.
const QWEN: usize = 4096;

/// Of Qwen: `use_sliding_window` says whether `sliding_window` counts, from `max_window_layers` on.
pub fn refuse_qwen(fields: &Fields, layers: usize, context: usize) -> Result<()> {
    let is_null = fields.map.get("sliding_window").is_some_and(Value::is_null);
    let window = match fields.flag_or("use_sliding_window", false)? && !is_null {
        true => Some(fields.size_or("sliding_window", QWEN)?),
        false => None,
    };
    let hides = window.is_some_and(|window| window < context);
    if fields.value("layer_types").is_some() {
        return refuse_types(fields, layers, window.is_some() && !hides);
    }
    match hides && fields.whole_or("max_window_layers", 28)? < layers {
        true => refuse(fields, "use_sliding_window"),
        false => Ok(()),
    }
}

/// `whole`: the window holds the whole context, and hides nothing
pub fn refuse_types(fields: &Fields, layers: usize, whole: bool) -> Result<()> {
    let full = |kind: &Value| kind == "full_attention" || (kind == "sliding_attention" && whole);
    match fields.value("layer_types") {
        None => Ok(()),
        Some(Value::Array(kinds)) if kinds.len() == layers => match kinds.iter().all(full) {
            true => Ok(()),
            false => refuse(fields, "layer_types"),
        },
        Some(_) => Err(fields.error("layer_types", "expected a list with a name for each layer")),
    }
}

fn refuse(fields: &Fields, field: &str) -> Result<()> {
    Err(fields.unsupported(field, "full attention in every layer is"))
}
