//! `rope_scaling`, since transformers 5 `rope_parameters`, as mlx-lm's `initialize_rope` reads it.

use crate::error::Result;
use crate::files::Fields;
use crate::spec::{Rope, Scaling};
use serde_json::Value;

/// What may stand there: another field would change the frequencies.
const KNOWN: [&str; 12] = [
    "beta_fast",
    "beta_slow",
    "factor",
    "finetuned",
    "high_freq_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_type",
    "type",
];

/// The rotation of a head of `dim` numbers; `theta` is the family's own.
pub fn rope(fields: &Fields, dim: usize, theta: f64) -> Result<Rope> {
    if fields.flag_or("rope_traditional", false)? {
        return Err(fields.unsupported("rope_traditional", "false is"));
    }
    let own = match fields.object("rope_scaling")? {
        None => fields.object("rope_parameters")?,
        some => some,
    };
    let theta = match own.as_ref().filter(|rope| rope.value("rope_theta").is_some()) {
        Some(rope) => positive(rope, "rope_theta", None)?,
        None => positive(fields, "rope_theta", Some(theta))?,
    };
    let scaling = own.map_or(Ok(Scaling::None), |rope| scaling(&rope, fields))?;
    Ok(Rope { dim, theta: theta as f32, scaling })
}

fn scaling(rope: &Fields, fields: &Fields) -> Result<Scaling> {
    let name = if rope.value("type").is_some() { "type" } else { "rope_type" };
    let kind = rope.value(name).and_then(Value::as_str).unwrap_or("default");
    if kind != "default" {
        refuse_unknown(rope)?;
    }
    let number = |field: &str, default: f64| positive(rope, field, Some(default));
    let factor = || positive(rope, "factor", None);
    let original = |default| rope.size_or("original_max_position_embeddings", default);
    Ok(match kind {
        "default" => Scaling::None,
        "linear" => Scaling::Linear { factor: factor()? },
        "dynamic" => {
            Scaling::Dynamic { factor: factor()?, context: fields.size("max_position_embeddings")? }
        }
        "llama3" => Scaling::Llama3 {
            factor: factor()?,
            low_freq_factor: number("low_freq_factor", 1.0)?,
            high_freq_factor: number("high_freq_factor", 4.0)?,
            context: original(8192)?,
        },
        "yarn" => Scaling::Yarn {
            factor: factor()?,
            context: original(4096)?,
            beta_fast: number("beta_fast", 32.0)?,
            beta_slow: number("beta_slow", 1.0)?,
            mscale: rope.number_or("mscale", 1.0)?,
            mscale_all_dim: rope.number_or("mscale_all_dim", 0.0)?,
        },
        _ => return Err(rope.unsupported(name, "default, linear, dynamic, llama3 and yarn are")),
    })
}

fn refuse_unknown(rope: &Fields) -> Result<()> {
    let unknown = rope.map.keys().find(|name| !KNOWN.contains(&name.as_str()));
    match unknown.filter(|name| rope.value(name).is_some()) {
        Some(name) => Err(rope.unsupported(name, "the fields that mlx-lm reads are")),
        None => Ok(()),
    }
}

/// A number above 0; with a default where it is missing.
fn positive(fields: &Fields, field: &str, default: Option<f64>) -> Result<f64> {
    let number = match default {
        Some(default) => fields.number_or(field, default)?,
        None => {
            fields.required(field, fields.value(field))?;
            fields.number_or(field, 0.0)?
        }
    };
    // As it is used, in float32.
    match number as f32 > 0.0 && (number as f32).is_finite() {
        true => Ok(number),
        false => Err(fields.error(field, "expected a number above 0")),
    }
}
