//! A checkpoint's `config.json` and `generation_config.json`, checked field by field.

mod quantization;

pub use quantization::{QuantMethod, Quantization};

use crate::arch;
use crate::error::{Error, Result};
use crate::files::Fields;
use crate::spec::ModelSpec;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// What a checkpoint's configuration says.
#[derive(Clone, Debug)]
pub struct Config {
    pub model_type: String,
    pub spec: ModelSpec,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    pub quantization: Option<Quantization>,
    /// module path -> its own quantization; None: left as it is
    pub overrides: BTreeMap<String, Option<Quantization>>,
    /// another format's quantization, which `quantization_config` names
    pub quant_method: Option<QuantMethod>,
    /// `generation_config.json` as it stands; empty where there is none
    pub generation: Map<String, Value>,
}

impl Config {
    pub fn open(folder: &Path) -> Result<Self> {
        let fields = Fields::open(&folder.join("config.json"))?;
        let generation_path = folder.join("generation_config.json");
        let none = || Fields { path: generation_path.clone(), map: Map::new() };
        let generation = match generation_path.exists().then(|| Fields::open(&generation_path)) {
            Some(Err(error)) if !matches!(error, Error::Config(_)) => return Err(error),
            // As in mlx-lm and transformers: one that is no JSON says nothing.
            Some(generation) => generation.unwrap_or_else(|_| none()),
            None => none(),
        };
        Self::parse(&fields, generation)
    }

    /// Whether a tensor is left out, as in mlx-lm and transformers: a head that is the embedding, and
    /// what some converters write of the rotation.
    pub fn leaves_out(&self, name: &str) -> bool {
        name.ends_with("rotary_emb.inv_freq")
            || (self.spec.is_tied() && name.starts_with("lm_head."))
    }

    fn parse(fields: &Fields, generation: Fields) -> Result<Self> {
        refuse_other_files(fields)?;
        let quantization = fields.quantization()?;
        let config = Self {
            model_type: fields.text("model_type")?,
            spec: arch::spec(fields)?,
            eos_token_ids: eos_token_ids(fields, &generation)?,
            quantization: quantization.default,
            overrides: quantization.overrides,
            quant_method: fields.quant_method()?,
            generation: generation.map,
        };
        Ok(config.with_known_eos())
    }

    /// Without ids that the vocabulary has not: no token is one of them.
    fn with_known_eos(mut self) -> Self {
        let vocab = self.spec.vocab;
        self.eos_token_ids.retain(|id| (*id as usize) < vocab);
        self
    }
}

/// What is no model's configuration, or asks for code.
fn refuse_other_files(fields: &Fields) -> Result<()> {
    if fields.value("model_file").is_some() {
        let message = "`model_file` asks to run code from the checkpoint, which is refused";
        return Err(Error::Unsupported(format!("`{}`: {message}", fields.path.display())));
    }
    if fields.value("model_type").is_none() && fields.map.contains_key("peft_type") {
        let message = "is an adapter's: load it with `Bombus.load_adapter`";
        return Err(Error::Config(format!("`{}` {message}", fields.path.display())));
    }
    Ok(())
}

/// `generation_config.json`'s where it names any, as in mlx-lm and transformers.
fn eos_token_ids(config: &Fields, generation: &Fields) -> Result<Vec<u32>> {
    let ids = generation.token_ids("eos_token_id")?;
    if ids.is_empty() { config.token_ids("eos_token_id") } else { Ok(ids) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn minimal() -> Value {
        json!({
            "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2,
            "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "vocab_size": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "tie_word_embeddings": true, "eos_token_id": [1, 7]
        })
    }

    fn parse(value: Value) -> Result<Config> {
        let Value::Object(map) = value else { unreachable!("an object") };
        let fields = Fields { path: "config.json".into(), map };
        Config::parse(&fields, Fields { path: "generation_config.json".into(), map: Map::new() })
    }

    fn with(field: &str, value: Value) -> Result<Config> {
        let mut config = minimal();
        config[field] = value;
        parse(config)
    }

    fn message(result: Result<Config>) -> String {
        result.expect_err("an error").to_string()
    }

    #[test]
    fn generation_config_decides_on_eos() {
        assert_eq!(parse(minimal()).unwrap().eos_token_ids, [1, 7]);
        let fields = |value: Value| Fields {
            path: "config.json".into(),
            map: value.as_object().cloned().unwrap_or_default(),
        };
        let generation = fields(json!({"eos_token_id": 9}));
        assert_eq!(Config::parse(&fields(minimal()), generation).unwrap().eos_token_ids, [9]);
    }

    #[test]
    fn head_dim_is_read_and_not_computed() {
        let head_dim = |config: Config| config.spec.layers[0].attention.head_dim;
        assert_eq!(head_dim(parse(minimal()).unwrap()), 32);
        assert_eq!(head_dim(with("head_dim", Value::Null).unwrap()), 128);
    }

    #[test]
    fn a_missing_or_wrong_field_is_named() {
        let hidden = message(with("hidden_size", Value::Null));
        assert_eq!(hidden, "`config.json`: `hidden_size`: it is missing");
        let layers = message(with("num_hidden_layers", json!(-1)));
        assert_eq!(
            layers,
            "`config.json`: `num_hidden_layers`: expected a positive integer, got: -1"
        );
        assert!(message(with("vocab_size", json!(1u64 << 40))).contains("vocab_size"));
        assert!(message(with("num_key_value_heads", json!(3))).contains("num_key_value_heads"));
        assert!(message(with("rope_scaling", json!({"type": "su"}))).contains("su"));
        assert!(message(with("model_type", json!("gpt2"))).contains("gpt2"));
        assert!(message(with("model_file", json!("model.py"))).contains("model_file"));
    }

    #[test]
    fn quantization_has_overrides() {
        let quantization = json!({"group_size": 64, "bits": 4, "mode": "affine",
            "model.layers.0.mlp.down_proj": {"bits": 8}, "lm_head": false});
        for field in ["quantization", "quantization_config"] {
            let config = with(field, quantization.clone()).unwrap();
            let of = |module| {
                let own = config.overrides.get(module).copied();
                own.unwrap_or(config.quantization).map(|q| (q.group_size, q.bits))
            };
            assert_eq!(of("model.embed_tokens"), Some((64, 4)));
            assert_eq!(of("model.layers.0.mlp.down_proj"), Some((64, 8)));
            assert_eq!(of("lm_head"), None);
        }
        let bits = with("quantization", json!({"group_size": 64, "bits": 7}));
        assert!(message(bits).contains("bits"));
        let mode = with("quantization", json!({"group_size": 32, "bits": 4, "mode": "mxfp4"}));
        assert!(message(mode).contains("mxfp4"));
    }
}
