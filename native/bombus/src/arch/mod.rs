//! The families of models: each turns `config.json` into a `ModelSpec`, with the defaults that
//! mlx-lm has for it.

mod cohere2;
mod ernie4_5;
mod exaone4;
mod fields;
mod gemma;
mod glm4;
mod granite;
mod hunyuan;
mod llama;
mod ministral3;
mod olmo;
mod phi3;
mod qwen2;
mod qwen3;
mod rope;
mod smollm3;
mod unknown;
mod windows;
mod wrappers;

use crate::error::{Error, Result};
use crate::files::Fields;
use crate::spec::ModelSpec;

/// What makes a family's models of their `config.json`.
type Family = fn(&Fields) -> Result<ModelSpec>;

/// `model_type` -> its family
const FAMILIES: [(&str, Family); 17] = [
    ("cohere2", cohere2::spec),
    ("ernie4_5", ernie4_5::spec),
    ("exaone4", exaone4::spec),
    ("gemma2", gemma::gemma2),
    ("gemma3_text", gemma::gemma3),
    ("glm4", glm4::spec),
    ("granite", granite::spec),
    ("hunyuan_v1_dense", hunyuan::spec),
    ("llama", llama::spec),
    ("ministral3", ministral3::spec),
    ("mistral", llama::spec),
    ("olmo2", olmo::olmo2),
    ("olmo3", olmo::olmo3),
    ("phi3", phi3::spec),
    ("qwen2", qwen2::spec),
    ("qwen3", qwen3::spec),
    ("smollm3", smollm3::spec),
];

/// Every `model_type` that is loaded, in alphabetical order.
pub fn families() -> Vec<&'static str> {
    let own = FAMILIES.iter().map(|(name, _)| *name);
    let mut names: Vec<_> = own.chain(wrappers::NAMES).collect();
    names.sort_unstable();
    names
}

/// What a `config.json` describes: an error where the family, or something of it, is not known.
pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let inner = language_model(fields)?;
    let mut spec = family(inner.as_ref().unwrap_or(fields))?;
    spec.names.wrapped = inner.is_some();
    Ok(spec)
}

/// The configuration of the language model within another.
pub fn language_model(fields: &Fields) -> Result<Option<Fields>> {
    let model_type = fields.text("model_type")?;
    match FAMILIES.iter().any(|(name, _)| *name == model_type) {
        true => Ok(None),
        false => wrappers::language_model(fields, &model_type),
    }
}

fn family(fields: &Fields) -> Result<ModelSpec> {
    let model_type = fields.text("model_type")?;
    let Some((_, family)) = FAMILIES.iter().find(|(name, _)| *name == model_type) else {
        let (path, known) = (fields.path.display(), families().join(", "));
        let message = format!(
            "`{path}`: the model_type `{model_type}` is not supported (these are: {known})"
        );
        return Err(Error::Unsupported(message));
    };
    let spec = family(fields)?;
    unknown::refuse(fields)?;
    Ok(spec)
}
