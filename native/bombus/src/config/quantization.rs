//! How a checkpoint is quantized, as `config.json` says it.

use crate::error::{Error, Result};
use crate::files::Fields;
use crate::spec::Quantization;
use serde_json::Value;
use std::collections::BTreeMap;

/// The quantization of another format.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantMethod {
    /// `quant_method`: "awq", "gptq", "fp8", ...
    pub name: String,
    pub bits: Option<usize>,
    pub group_size: Option<usize>,
    /// GPTQ: groups are not of consecutive inputs
    pub desc_act: bool,
    /// GPTQ: zero points are written as they are, and not one less
    pub is_v2: bool,
}

/// What MLX's quantization is by default, and for modules by name.
pub struct Quantizations {
    pub default: Option<Quantization>,
    pub overrides: BTreeMap<String, Option<Quantization>>,
}

impl Fields {
    /// `quantization_config: {quant_method, ...}`, where MLX's own `quantization` does not decide.
    pub fn quant_method(&self) -> Result<Option<QuantMethod>> {
        let own = self.object("quantization")?;
        let other = self.object("quantization_config")?;
        let Some(fields) = other.filter(|fields| own.is_none() && fields.is_foreign()) else {
            return Ok(None);
        };
        let name = match fields.value("quant_method") {
            Some(_) => fields.text("quant_method")?.to_lowercase(),
            None => "bitsandbytes".into(),
        };
        let size = |field: &str| fields.value(field).and_then(Value::as_u64).map(|n| n as usize);
        let is = |field: &str| fields.value(field) == Some(&Value::Bool(true));
        let is_v2 = fields.value("checkpoint_format").is_some_and(|format| format == "gptq_v2");
        let desc_act = is("desc_act");
        let (bits, group_size) = (size("bits"), size("group_size"));
        Ok(Some(QuantMethod { name, bits, group_size, desc_act, is_v2 }))
    }

    /// MLX's own names no method. (Old versions of transformers did not name bitsandbytes.)
    fn is_foreign(&self) -> bool {
        let names = ["quant_method", "load_in_4bit", "load_in_8bit"];
        names.iter().any(|name| self.value(name).is_some())
    }

    /// `quantization: {group_size, bits, mode?, "<module path>": {...} | false}`, also under
    /// the name `quantization_config`.
    pub fn quantization(&self) -> Result<Quantizations> {
        let none = Quantizations { default: None, overrides: BTreeMap::new() };
        let fields = match self.object("quantization")? {
            None => self.object("quantization_config")?.filter(|fields| !fields.is_foreign()),
            some => some,
        };
        let Some(fields) = fields.filter(|fields| !fields.map.is_empty()) else { return Ok(none) };
        let default = fields.one_quantization(None)?;
        let mut overrides = BTreeMap::new();
        for (module, value) in &fields.map {
            match value {
                Value::Object(_) => {
                    let own = fields.object(module)?.map(|own| own.one_quantization(Some(default)));
                    overrides.insert(module.clone(), own.transpose()?);
                }
                Value::Bool(false) => _ = overrides.insert(module.clone(), None),
                Value::Bool(true) => _ = overrides.insert(module.clone(), Some(default)),
                _ => {}
            }
        }
        Ok(Quantizations { default: Some(default), overrides })
    }

    fn one_quantization(&self, default: Option<Quantization>) -> Result<Quantization> {
        if let Some(mode) = self.value("mode")
            && mode != "affine"
        {
            let path = self.path.display();
            let message = format!("`{path}`: the quantization mode {mode} is not supported");
            return Err(Error::Unsupported(message));
        }
        let optional = |field: &str| match default {
            Some(_) => self.optional_size(field),
            None => self.size(field).map(Some),
        };
        let group_size = optional("group_size")?.or(default.map(|q| q.group_size)).unwrap_or(64);
        let bits = optional("bits")?.or(default.map(|q| q.bits)).unwrap_or(4);
        let quantization = Quantization { group_size, bits };
        if !quantization.is_affine() {
            let field = if matches!(group_size, 32 | 64 | 128) { "bits" } else { "group_size" };
            return Err(self.error(field, "expected bits 2 to 6 or 8, group_size 32, 64 or 128"));
        }
        Ok(quantization)
    }
}
