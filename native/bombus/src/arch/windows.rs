//! Layers that see only the last positions. References: mlx-lm's models; transformers'
//! `Qwen2Config`, `Qwen3Config`.

use crate::error::Result;
use crate::files::Fields;
use crate::spec::LayerSpec;
use serde_json::Value;

/// What `sliding_window` is for Qwen where it is not said.
const QWEN: usize = 4096;

/// Gives layers their window: those that `layer_types` names, or where it is missing `is_windowed`.
pub fn set(
    fields: &Fields,
    layers: &mut [LayerSpec],
    window: Option<usize>,
    is_windowed: impl Fn(usize) -> bool,
) -> Result<()> {
    let named = types(fields, layers.len())?;
    for (index, layer) in layers.iter_mut().enumerate() {
        let own = named.as_ref().map_or_else(|| is_windowed(index), |named| named[index]);
        if own && window.is_none() && named.is_some() {
            return Err(fields.error("sliding_window", "it is missing, and `layer_types` needs it"));
        }
        layer.attention.window = window.filter(|_| own);
    }
    Ok(())
}

/// Which layers `layer_types` gives a window.
fn types(fields: &Fields, layers: usize) -> Result<Option<Vec<bool>>> {
    const FIELD: &str = "layer_types";
    let kinds = match fields.value(FIELD) {
        None => return Ok(None),
        Some(Value::Array(kinds)) if kinds.len() == layers => kinds,
        Some(_) => return Err(fields.error(FIELD, "expected a list with a name for each layer")),
    };
    let windowed = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(fields.unsupported(FIELD, "full_attention and sliding_attention are")),
    };
    kinds.iter().map(windowed).collect::<Result<_>>().map(Some)
}

/// Of Qwen: `use_sliding_window` says whether `sliding_window` counts, from `max_window_layers` on.
/// mlx-lm leaves it aside, so it is refused where it would show.
pub fn refuse_qwen(fields: &Fields, layers: usize, context: usize) -> Result<()> {
    let is_null = fields.map.get("sliding_window").is_some_and(Value::is_null);
    let window = match fields.flag_or("use_sliding_window", false)? && !is_null {
        true => Some(fields.size_or("sliding_window", QWEN)?),
        false => None,
    };
    let hides = window.is_none_or(|window| window < context);
    if let Some(named) = types(fields, layers)? {
        return match hides && named.contains(&true) {
            true => refuse(fields, "layer_types"),
            false => Ok(()),
        };
    }
    match window.is_some() && hides && fields.whole_or("max_window_layers", 28)? < layers {
        true => refuse(fields, "use_sliding_window"),
        false => Ok(()),
    }
}

fn refuse(fields: &Fields, field: &str) -> Result<()> {
    Err(fields.unsupported(field, "full attention in every layer is"))
}
