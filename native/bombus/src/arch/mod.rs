//! The families of models: each turns `config.json` into a `ModelSpec`, with the defaults that
//! mlx-lm has for it.

mod fields;
mod llama;
mod qwen2;
mod qwen3;
mod rope;
mod windows;

use crate::error::{Error, Result};
use crate::files::Fields;
use crate::spec::ModelSpec;

/// What makes a family's models of their `config.json`.
type Family = fn(&Fields) -> Result<ModelSpec>;

/// `model_type` -> its family
const FAMILIES: [(&str, Family); 4] = [
    ("llama", llama::spec),
    ("mistral", llama::spec),
    ("qwen2", qwen2::spec),
    ("qwen3", qwen3::spec),
];

/// What a `config.json` describes: an error where the family, or something of it, is not known.
pub fn spec(fields: &Fields) -> Result<ModelSpec> {
    let model_type = fields.text("model_type")?;
    let Some((_, family)) = FAMILIES.iter().find(|(name, _)| *name == model_type) else {
        let known = FAMILIES.map(|(name, _)| name).join(", ");
        let path = fields.path.display();
        let message = format!(
            "`{path}`: the model_type `{model_type}` is not supported (these are: {known})"
        );
        return Err(Error::Unsupported(message));
    };
    family(fields)
}
