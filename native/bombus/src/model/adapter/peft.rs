//! PEFT's format: `base_model.model.<module>.lora_A.weight` is `[rank, in]`, `....lora_B.weight`
//! `[out, rank]`, of an embedding `lora_embedding_A`, `lora_embedding_B`; DoRA adds
//! `....lora_magnitude_vector`. The scale is `lora_alpha / r`, with rsLoRA `lora_alpha / sqrt(r)`.
//! Reference: PEFT's `tuners/lora/{config,layer,dora}.py` and `utils/other.py`.

use super::fields::{Fields, short};
use super::file::{Contents, File, ModuleTensors, Pair, Role};
use super::{EMBED_TOKENS, LM_HEAD, listed, patterns, peft_kinds, targets};
use crate::error::Result;
use std::collections::BTreeMap;

/// What PEFT takes where a field is missing.
const RANK: usize = 8;
const ALPHA: f64 = 8.0;

pub fn read(file: &File, fields: &Fields) -> Result<Contents> {
    peft_kinds::check(file, fields)?;
    let rank = fields.rank("r")?.unwrap_or(RANK);
    let alpha = fields.number("lora_alpha")?.unwrap_or(ALPHA);
    let (rslora, dora) = (fields.flag("use_rslora")?, fields.flag("use_dora")?);
    let expected = "PEFT's LoRA tensors (`base_model.model.<module>.lora_A.weight`, `lora_B`)";
    let mut modules = file.modules(dora, expected, role)?;
    let warnings = leave_out(fields, &mut modules)?;
    let names: Vec<&str> = modules.iter().map(|(name, ..)| name.as_str()).collect();
    if fields.flag("ensure_weight_tying")? && tied_by_hand(&names) {
        let message = "`ensure_weight_tying` is not supported for an adapted `model.embed_tokens` \
            without an adapted `lm_head`";
        return Err(file.unsupported(message.into()));
    }
    let as_rank = |what: &str, value: &_| fields.as_rank(what, value);
    let ranks = patterns::numbers(fields, "rank_pattern", &names, as_rank)?;
    let as_alpha = |what: &str, value: &_| fields.as_number(what, value);
    let alphas = patterns::numbers(fields, "alpha_pattern", &names, as_alpha)?;
    let mut pairs = BTreeMap::new();
    for (module, [a, b], magnitude) in &modules {
        let rank = *ranks.get(module.as_str()).unwrap_or(&rank);
        let alpha = *alphas.get(module.as_str()).unwrap_or(&alpha);
        let (a, b, magnitude) = (a.clone(), b.clone(), magnitude.clone());
        let scale = scale(alpha, rank, rslora);
        pairs.insert(module.clone(), Pair { a, b, magnitude, rank, scale });
    }
    let scale = scale(alpha, rank, rslora);
    Ok(Contents { pairs, transposed: true, rank, scale, chosen: None, warnings })
}

/// As PEFT: modules that the configuration does not name stay as they are; -> a warning
fn leave_out(fields: &Fields, modules: &mut Vec<ModuleTensors>) -> Result<Vec<String>> {
    let names: Vec<&str> = modules.iter().map(|(name, ..)| name.as_str()).collect();
    let left_out = targets::left_out(fields, &names)?;
    if left_out.is_empty() {
        return Ok(vec![]);
    }
    if left_out.len() == names.len() {
        let message = "`target_modules` names none of the modules that the adapter has";
        return Err(fields.file.wrong(message.into()));
    }
    let ignored = names.iter().filter(|name| left_out.contains(*name));
    let ignored: Vec<String> = ignored.map(|name| format!("`{}`", short(name))).collect();
    let path = fields.file.path.display();
    let warning = format!(
        "`{path}`: as in PEFT, tensors of modules that `adapter_config.json` does not name are left \
         out: {}",
        listed(&ignored)
    );
    let kept: Vec<bool> = names.iter().map(|name| !left_out.contains(name)).collect();
    let mut kept = kept.into_iter();
    modules.retain(|_module| kept.next().unwrap_or(true));
    Ok(vec![warning])
}

fn scale(alpha: f64, rank: usize, rslora: bool) -> f32 {
    let rank = rank as f64;
    (alpha / if rslora { rank.sqrt() } else { rank }) as f32
}

/// Whether PEFT would adapt the head with what the file has for the embedding alone.
fn tied_by_hand(modules: &[&str]) -> bool {
    modules.contains(&EMBED_TOKENS) && !modules.contains(&LM_HEAD)
}

/// A tensor's module and role.
fn role(name: &str) -> Option<(&str, Role)> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let name = name.strip_suffix(".weight").unwrap_or(name);
    // Some versions name the adapter.
    let name = name.strip_suffix(".default").unwrap_or(name);
    let (module, role) = name.rsplit_once('.')?;
    let role = match role {
        "lora_A" | "lora_embedding_A" => Role::A,
        "lora_B" | "lora_embedding_B" => Role::B,
        "lora_magnitude_vector" => Role::Magnitude,
        // Saved along with an adapted embedding or head, in case that tokens were added.
        "base_layer" if matches!(module, EMBED_TOKENS | LM_HEAD) => Role::Copy,
        _ => return None,
    };
    Some((module, role))
}
