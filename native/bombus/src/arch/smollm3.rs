//! SmolLM3: Llama, with layers whose heads are not rotated. Reference: mlx-lm's `models/smollm3.py`.

use super::llama;
use crate::error::Result;
use crate::files::Fields;
use crate::spec::ModelSpec;
use serde_json::Value;

pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    // A window would have its layers in `layer_types`.
    if fields.flag_or("use_sliding_window", false)? && fields.value("layer_types").is_none() {
        return Err(fields.unsupported("use_sliding_window", "false is"));
    }
    let mut spec = llama::spec(fields)?;
    let interval = fields.size_or("no_rope_layer_interval", 4)?;
    let rotated: Vec<bool> = match fields.value("no_rope_layers") {
        None => (1..=spec.layers.len()).map(|layer| !layer.is_multiple_of(interval)).collect(),
        Some(_) => rotated(fields, spec.layers.len())?,
    };
    for (layer, rotated) in spec.layers.iter_mut().zip(rotated) {
        layer.attention.rope = layer.attention.rope.take().filter(|_| rotated);
    }
    Ok(spec)
}

/// 1 for a layer that is rotated, whatever the field is called.
fn rotated(fields: &Fields, layers: usize) -> Result<Vec<bool>> {
    let field = "no_rope_layers";
    let list = fields.value(field).and_then(Value::as_array).filter(|list| list.len() == layers);
    let flag = |value: &Value| match value {
        Value::Bool(flag) => Some(*flag),
        number => number.as_f64().map(|number| number != 0.0),
    };
    let flags = list.and_then(|list| list.iter().map(flag).collect());
    fields.required(field, flags).map_err(|_| {
        fields
            .error(field, "expected a list with 1 for each layer that is rotated, and 0 for others")
    })
}
