//! mlx-lm's format: `<module>.lora_a` is `[in, rank]`, `<module>.lora_b` `[rank, out]`, and the
//! scale is used as it stands; DoRA adds `<module>.m`. Reference: mlx-lm's `tuner/{lora,dora}.py`,
//! and `load_adapters` of `tuner/utils.py`.
//!
//! `num_layers` and `keys` say which modules have a pair. The other fields say how it was trained.

use super::fields::{Fields, shown};
use super::file::{Contents, File, ModuleTensors, Pair, Role};
use super::targets::Chosen;
use crate::error::Result;
use serde_json::Value;

pub fn read(file: &File, fields: &Fields) -> Result<Contents> {
    let dora = is_dora(file, fields)?;
    let Some(map) = fields.object("lora_parameters")? else {
        let neither = "`lora_parameters` (mlx-lm) is missing, and so is `peft_type` (PEFT)";
        return Err(file.wrong(neither.into()));
    };
    let parameters = Fields { file, map };
    let missing = |name: &str| {
        let peft = match map.contains_key("alpha") && name == "scale" {
            true => ": `alpha` does not take its place, divide it by the rank",
            false => "",
        };
        file.wrong(format!("`{name}` is missing in `lora_parameters`{peft}"))
    };
    let rank = parameters.rank("rank")?.ok_or_else(|| missing("rank"))?;
    let scale = parameters.number("scale")?.ok_or_else(|| missing("scale"))? as f32;
    let expected = match dora {
        false => "`<module>.lora_a` and `<module>.lora_b`",
        true => "`<module>.lora_a`, `<module>.lora_b` and `<module>.m`",
    };
    let pair = |(module, [a, b], magnitude): ModuleTensors| {
        (module, Pair { a, b, magnitude, rank, scale })
    };
    let pairs = file.modules(dora, expected, role)?.into_iter().map(pair).collect();
    let chosen = Some(Chosen::read(fields, &parameters)?);
    Ok(Contents { pairs, transposed: false, rank, scale, chosen, warnings: vec![] })
}

/// A tensor's module and role.
fn role(name: &str) -> Option<(&str, Role)> {
    let (module, role) = name.rsplit_once('.')?;
    let role = match role {
        "lora_a" => Role::A,
        "lora_b" => Role::B,
        "m" => Role::Magnitude,
        _ => return None,
    };
    Some((module, role))
}

fn is_dora(file: &File, fields: &Fields) -> Result<bool> {
    match fields.get("fine_tune_type") {
        // Before it there was a flag.
        None => fields.flag("use_dora"),
        Some(Value::Null) => Ok(false),
        Some(Value::String(kind)) => match kind.as_str() {
            "lora" => Ok(false),
            "dora" => Ok(true),
            "full" => {
                let full = "fine_tune_type `full` is a whole model and no adapter: fuse it with \
                    `mlx_lm.fuse`, and load the result as a model";
                Err(file.unsupported(full.into()))
            }
            kind => {
                let kind = super::fields::short(kind);
                let message =
                    format!("the fine_tune_type `{kind}` is not supported: lora and dora are");
                Err(file.unsupported(message))
            }
        },
        Some(kind) => {
            let kind = shown(kind);
            let message = format!("expected `fine_tune_type` to be lora or dora, got: {kind}");
            Err(file.wrong(message))
        }
    }
}
