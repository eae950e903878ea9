//! mlx-lm's format: `<module>.lora_a` is `[in, rank]`, `<module>.lora_b` `[rank, out]`, and the
//! scale is used as it stands; DoRA adds `<module>.m`. Reference: mlx-lm's `tuner/{lora,dora}.py`.

use super::{Contents, File, ModuleTensors, Pair, Role};
use crate::error::Result;
use serde_json::Value;

#[derive(serde::Deserialize)]
struct AdapterConfig {
    fine_tune_type: Option<String>,
    lora_parameters: Option<LoraParameters>,
}

#[derive(serde::Deserialize)]
struct LoraParameters {
    rank: usize,
    scale: f32,
}

pub fn read(file: &File, config: Value) -> Result<Contents> {
    let config: AdapterConfig =
        serde_json::from_value(config).map_err(|error| file.wrong(error.to_string()))?;
    let dora = match config.fine_tune_type.as_deref().unwrap_or("lora") {
        "lora" => false,
        "dora" => true,
        "full" => {
            let message = "fine_tune_type `full` is a whole model and no adapter: fuse and load it";
            return Err(file.unsupported(message.into()));
        }
        kind => {
            let message =
                format!("the fine_tune_type `{kind}` is not supported: lora and dora are");
            return Err(file.unsupported(message));
        }
    };
    let LoraParameters { rank, scale } =
        config.lora_parameters.ok_or_else(|| file.wrong("`lora_parameters` is missing".into()))?;
    if rank == 0 {
        return Err(file.wrong("expected `rank` to be above 0".into()));
    }
    let expected = match dora {
        false => "`<module>.lora_a` and `<module>.lora_b`",
        true => "`<module>.lora_a`, `<module>.lora_b` and `<module>.m`",
    };
    let modules = file.modules(dora, expected, |name| {
        let (module, role) = name.rsplit_once('.')?;
        let role = match role {
            "lora_a" => Role::A,
            "lora_b" => Role::B,
            "m" => Role::Magnitude,
            _ => return None,
        };
        Some((module, role))
    })?;
    let pair = |(module, [a, b], magnitude): ModuleTensors| {
        (module, Pair { a, b, magnitude, rank, scale })
    };
    let pairs = modules.into_iter().map(pair).collect();
    Ok(Contents { pairs, transposed: false, rank, scale })
}
