//! `rope_scaling`, since transformers 5 `rope_parameters`, as mlx-lm's `initialize_rope` reads it.

use crate::error::Result;
use crate::files::Fields;
use crate::spec::{Rope, Scaling};
use serde_json::Value;

/// What may stand there: another field would change the frequencies.
const KNOWN: [&str; 19] = [
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "finetuned",
    "high_freq_factor",
    "llama_4_scaling_beta",
    "long_factor",
    "low_freq_factor",
    "mrope_section",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
];

/// The rotation of a head of which `dim` numbers are rotated; `theta` is the family's own.
pub fn rope(fields: &Fields, dim: usize, theta: f64) -> Result<Rope> {
    let interleaved = fields.flag_or("rope_traditional", false)?;
    let theta = self::theta(fields, theta)?;
    let scaling = match parameters(fields)? {
        Some(rope) => scaling(&rope, fields)?,
        None => Scaling::None,
    };
    check_factors(fields, dim, &scaling)?;
    Ok(Rope { dim, theta: theta as f32, interleaved, scaling })
}

/// Where the rotation is described, beside `rope_theta`.
pub fn parameters(fields: &Fields) -> Result<Option<Fields>> {
    match fields.object("rope_scaling")? {
        None => fields.object("rope_parameters"),
        some => Ok(some),
    }
}

pub fn theta(fields: &Fields, default: f64) -> Result<f64> {
    match parameters(fields)?.filter(|rope| rope.value("rope_theta").is_some()) {
        Some(rope) => positive(&rope, "rope_theta", None),
        None => positive(fields, "rope_theta", Some(default)),
    }
}

/// The numbers of a head that are rotated, by `partial_rotary_factor`.
pub fn part(fields: &Fields, head_dim: usize, default: f64) -> Result<usize> {
    const FIELD: &str = "partial_rotary_factor";
    let own = parameters(fields)?.filter(|rope| rope.value(FIELD).is_some());
    let factor = positive(own.as_ref().unwrap_or(fields), FIELD, Some(default))?;
    let dim = (head_dim as f64 * factor) as usize;
    match dim >= 2 && dim <= head_dim && dim.is_multiple_of(2) {
        true => Ok(dim),
        false => Err(fields.error(FIELD, "expected an even part of head_dim, at most all")),
    }
}

/// `fields`: for what stands beside the rotation's own
pub fn scaling(rope: &Fields, fields: &Fields) -> Result<Scaling> {
    let name = if rope.value("type").is_some() { "type" } else { "rope_type" };
    let kind = rope.value(name).and_then(Value::as_str).unwrap_or("default");
    if kind != "default" {
        refuse_unknown(rope, kind)?;
    }
    let number = |field: &str, default: f64| positive(rope, field, Some(default));
    let factor = || positive(rope, "factor", None);
    let original = |default| rope.size_or("original_max_position_embeddings", default);
    Ok(match kind {
        // Of images; all three of a text's positions are the same.
        "default" | "mrope" => Scaling::None,
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
            truncate: rope.flag_or("truncate", true)?,
            attention_factor: attention_factor(rope)?,
        },
        "longrope" | "su" => long(rope, fields)?,
        _ => {
            let known = "default, linear, dynamic, llama3, yarn and longrope are";
            return Err(rope.unsupported(name, known));
        }
    })
}

/// As in mlx-lm, the factors for long texts serve all.
fn long(rope: &Fields, fields: &Fields) -> Result<Scaling> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    let own = if rope.value(ORIGINAL).is_some() { rope } else { fields };
    let (original, context) =
        (own.size_or(ORIGINAL, 4096)?, fields.size_or("max_position_embeddings", 131_072)?);
    let list = rope.value("long_factor").and_then(Value::as_array);
    let factor = |value: &Value| value.as_f64().filter(|it| *it > 0.0 && it.is_finite());
    let factors = list.and_then(|list| list.iter().map(factor).collect());
    let factors =
        factors.ok_or_else(|| rope.error("long_factor", "expected a list of numbers above 0"))?;
    let longer = context as f64 / original as f64;
    let amplitude =
        if longer <= 1.0 { 1.0 } else { (1.0 + longer.ln() / (original as f64).ln()).sqrt() };
    let amplitude = attention_factor(rope)?.unwrap_or(amplitude);
    match amplitude.is_finite() {
        true => Ok(Scaling::Long { factors, amplitude }),
        false => Err(own.error(ORIGINAL, "expected more than 1")),
    }
}

/// As in transformers; mlx-lm does not read it.
fn attention_factor(rope: &Fields) -> Result<Option<f64>> {
    const FIELD: &str = "attention_factor";
    rope.value(FIELD).map(|_| positive(rope, FIELD, None)).transpose()
}

fn check_factors(fields: &Fields, dim: usize, scaling: &Scaling) -> Result<()> {
    match scaling {
        Scaling::Long { factors, .. } if factors.len() != dim / 2 => {
            let problem =
                format!("`long_factor`: expected {} factors, got: {}", dim / 2, factors.len());
            Err(fields.error("rope_scaling", problem))
        }
        _ => Ok(()),
    }
}

fn refuse_unknown(rope: &Fields, kind: &str) -> Result<()> {
    let is_known = |name: &str| match name {
        // What it would change it does there alone.
        "attention_factor" => matches!(kind, "longrope" | "su" | "yarn"),
        name => KNOWN.contains(&name),
    };
    let unknown = rope.map.keys().find(|name| !is_known(name));
    match unknown.filter(|name| rope.value(name).is_some()) {
        Some(name) => Err(rope.unsupported(name, "the fields that mlx-lm reads are")),
        None => Ok(()),
    }
}

/// A number above 0; with a default where it is missing.
pub fn positive(fields: &Fields, field: &str, default: Option<f64>) -> Result<f64> {
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
