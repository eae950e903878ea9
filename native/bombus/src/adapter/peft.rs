//! PEFT's format: `base_model.model.<module>.lora_A.weight` is `[rank, in]`, `....lora_B.weight`
//! `[out, rank]`, of an embedding `lora_embedding_A`, `lora_embedding_B`; DoRA adds
//! `....lora_magnitude_vector`. The scale is `lora_alpha / r`, with rsLoRA `lora_alpha / sqrt(r)`.
//! Which modules have a pair is read off the tensors, and not off `target_modules`, whether that is
//! a list or a regular expression: PEFT itself saves more than those where a head is tied.
//! Reference: PEFT's `tuners/lora/{config,layer,dora}.py` and `utils/other.py`.

use super::{Contents, EMBED_TOKENS, File, LM_HEAD, Pair, Role};
use crate::error::Result;
use fancy_regex::Regex;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

#[derive(serde::Deserialize)]
struct LoraConfig {
    r: usize,
    lora_alpha: f32,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
}

/// What changes the arithmetic, and is not known here; `bias` must be "none".
const REFUSED: [&str; 9] = [
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
];

pub fn read(file: &File, config: Value) -> Result<Contents> {
    refuse(file, &config)?;
    let config: LoraConfig =
        serde_json::from_value(config).map_err(|error| file.wrong(error.to_string()))?;
    if config.r == 0 {
        return Err(file.wrong("expected `r` to be above 0".into()));
    }
    let ranks = Patterns::new(file, "rank_pattern", config.rank_pattern.as_ref())?;
    let alphas = Patterns::new(file, "alpha_pattern", config.alpha_pattern.as_ref())?;
    let expected = "PEFT's LoRA tensors (`base_model.model.<module>.lora_A.weight`, `lora_B`)";
    let mut pairs = BTreeMap::new();
    for (module, [a, b], magnitude) in file.modules(config.use_dora, expected, role)? {
        let rank = ranks.find(&module).map_or(config.r, |rank| rank as usize);
        let alpha = alphas.find(&module).map_or(config.lora_alpha, |alpha| alpha as f32);
        let scale = scale(alpha, rank, config.use_rslora);
        pairs.insert(module, Pair { a, b, magnitude, rank, scale });
    }
    Ok(Contents {
        pairs,
        transposed: true,
        rank: config.r,
        scale: scale(config.lora_alpha, config.r, config.use_rslora),
    })
}

fn scale(alpha: f32, rank: usize, rslora: bool) -> f32 {
    let rank = rank as f32;
    alpha / if rslora { rank.sqrt() } else { rank }
}

fn refuse(file: &File, config: &Value) -> Result<()> {
    let kind = config["peft_type"].as_str().unwrap_or("null");
    if kind != "LORA" {
        return Err(file.unsupported(format!("the peft_type `{kind}` is not supported: LORA is")));
    }
    let refused = |name: &&&str| match &config[**name] {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(items) => !items.is_empty(),
        _ => true,
    };
    if let Some(name) = REFUSED.iter().find(refused) {
        return Err(file.unsupported(format!("`{name}` is not supported: {}", config[*name])));
    }
    match config["bias"].as_str() {
        None | Some("none") => Ok(()),
        Some(bias) => Err(file.unsupported(format!("`bias` of \"{bias}\" is not supported"))),
    }
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

/// Regular expressions for the ends of modules' names, each with a number: the first that
/// matches is a module's.
struct Patterns(Vec<(Regex, f64)>);

impl Patterns {
    fn new(file: &File, field: &str, patterns: Option<&Map<String, Value>>) -> Result<Self> {
        let one = |(pattern, number): (&String, &Value)| {
            let number = number.as_f64().filter(|number| *number > 0.0).ok_or_else(|| {
                file.wrong(format!("`{field}` has {number} for `{pattern}`, no number above 0"))
            })?;
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"))
                .map_err(|error| file.wrong(format!("`{field}` has `{pattern}`: {error}")))?;
            Ok((regex, number))
        };
        Ok(Self(patterns.into_iter().flatten().map(one).collect::<Result<_>>()?))
    }

    /// A pattern that gives up (it may backtrack) matches nothing.
    fn find(&self, module: &str) -> Option<f64> {
        let matches = |(pattern, _): &&(Regex, f64)| pattern.is_match(module).unwrap_or(false);
        self.0.iter().find(matches).map(|(_, number)| *number)
    }
}
