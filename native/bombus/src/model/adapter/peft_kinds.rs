//! What a PEFT configuration may ask for: all that changes the arithmetic is known here or refused.
//! Reference: PEFT 0.21's `tuners/lora/config.py`.

use super::fields::{Fields, short, shown};
use super::file::File;
use crate::error::Result;
use serde_json::Value;

/// What the adapter's own tensors cannot say, and is not known here.
const REFUSED: [&str; 13] = [
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
    // Of PEFT before 0.3: a part of a fused layer.
    "enable_lora",
];

/// What changes nothing: how the adapter was trained and what with, how a base layer lies in memory.
const WITHOUT_EFFECT: [&str; 24] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    // Of ms-swift: how it was trained.
    "lora_dtype",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    // Checked where they are used.
    "bias",
    "ensure_weight_tying",
    "init_lora_weights",
    "peft_type",
];

/// Fields with a meaning here.
const USED: [&str; 10] = [
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
];

/// What always helps.
const MERGE: &str =
    "merge it into its base model with PEFT (`merge_and_unload`), and load that as a model";

/// An error where the adapter is not LoRA on an unchanged base model.
pub fn check(file: &File, fields: &Fields) -> Result<()> {
    let kind = fields.get("peft_type").and_then(Value::as_str).unwrap_or("null");
    if kind != "LORA" {
        let kind = short(kind);
        let message = format!("the peft_type `{kind}` is not supported, LORA is: {MERGE}");
        return Err(file.unsupported(message));
    }
    check_initialization(file, fields)?;
    if let Some(name) = REFUSED.iter().find(|name| fields.is_set(name)) {
        let value = shown(&fields.map[*name]);
        return Err(file.unsupported(format!("`{name}` of {value} is not supported: {MERGE}")));
    }
    match fields.get("bias") {
        None | Some(Value::Null) => {}
        Some(Value::String(bias)) if bias == "none" => {}
        Some(bias) => {
            let bias = shown(bias);
            return Err(file.unsupported(format!("`bias` of {bias} is not supported: {MERGE}")));
        }
    }
    let unknown = |name: &&String| {
        let known = [&REFUSED[..], &WITHOUT_EFFECT, &USED].concat();
        !known.contains(&name.as_str()) && may_change_arithmetic(name) && fields.is_set(name)
    };
    match fields.map.keys().find(unknown) {
        None => Ok(()),
        Some(name) => {
            let (name, value) = (short(name), shown(&fields.map[name]));
            let message = format!("`{name}` of {value} is not known here: {MERGE}");
            Err(file.unsupported(message))
        }
    }
}

/// A variant of LoRA has a field of one of these names in PEFT.
fn may_change_arithmetic(name: &str) -> bool {
    let parts = ["lora", "dora", "rank", "alpha", "scal"];
    name.starts_with("use_")
        || name.ends_with("_config")
        || parts.iter().any(|part| name.to_lowercase().contains(part))
}

/// Some ways to begin take a part of the base model's weights out: the adapter is then one of
/// another base model.
fn check_initialization(file: &File, fields: &Fields) -> Result<()> {
    let kind = match fields.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => return Ok(()),
        Some(Value::String(kind)) => kind,
        Some(value) => {
            return Err(fields.unexpected("`init_lora_weights`", "true, false or a name", value));
        }
    };
    let name = short(kind);
    let changes = |how: &str| {
        let message = format!(
            "`init_lora_weights` of `{name}` changed the base model's weights, and this adapter \
             fits those alone: {how}{MERGE}"
        );
        Err(file.unsupported(message))
    };
    match kind.to_lowercase().as_str() {
        "gaussian" | "eva" | "orthogonal" | "mica" => Ok(()),
        "loftq" => changes(""),
        kind if ["pissa", "olora", "corda", "lora_ga"].iter().any(|of| kind.starts_with(of)) => {
            changes(
                "convert it to plain LoRA where it was trained (PEFT's `save_pretrained` with \
                 `path_initial_model_for_weight_conversion`), or ",
            )
        }
        _ => Err(file.unsupported(format!("`init_lora_weights` of `{name}` is not known here"))),
    }
}
