//! A checkpoint's `config.json` and `generation_config.json`, checked field by field.

mod generation;
mod quantization;

pub use quantization::QuantMethod;

use crate::arch;
use crate::error::{Error, Result};
use crate::files::{self, Fields};
use crate::spec::{ModelSpec, Quantization};
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
    /// What is not followed, for the log.
    pub warnings: Vec<String>,
}

impl Config {
    pub fn open(folder: &Path) -> Result<Self> {
        let fields = Fields::open(&folder.join("config.json"))?;
        let generation_path = folder.join("generation_config.json");
        let none = || Fields::new(&generation_path, Map::new());
        let generation =
            match files::is_there(&generation_path).then(|| Fields::open(&generation_path)) {
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
        let spec = arch::spec(fields)?;
        let mut warnings = vec![];
        // Of a language model within another, also where only the inner configuration says it.
        let inner = arch::language_model(fields)?;
        let eos_token_ids = eos_token_ids(
            inner.as_ref().unwrap_or(fields),
            &generation,
            spec.vocab,
            &mut warnings,
        )?;
        warnings.extend(generation::warning(&generation));
        let own =
            |(path, layout): (String, _)| (spec.names.own_path(&path).unwrap_or(path), layout);
        let overrides = quantization.overrides.into_iter().map(own).collect();
        let config = Self {
            model_type: fields.text("model_type")?,
            spec,
            eos_token_ids,
            quantization: quantization.default,
            overrides,
            quant_method: fields.quant_method()?,
            generation: generation.map,
            warnings,
        };
        Ok(config)
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

/// `generation_config.json`'s where it names any, as in mlx-lm and transformers. What is no token's
/// ends no text, of which there is a warning.
fn eos_token_ids(
    config: &Fields,
    generation: &Fields,
    vocab_size: usize,
    warnings: &mut Vec<String>,
) -> Result<Vec<u32>> {
    const FIELD: &str = "eos_token_id";
    let is_id = |id: &f64| id.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(id);
    let (mut named, mut path) = (generation.token_ids(FIELD)?, &generation.path);
    if !named.iter().any(is_id) {
        (named, path) = (config.token_ids(FIELD)?, &config.path);
    }
    let is_known = |id: &f64| is_id(id) && *id < vocab_size as f64;
    let unknown: Vec<String> =
        named.iter().filter(|id| !is_known(id)).take(4).map(f64::to_string).collect();
    if !unknown.is_empty() {
        let (path, ids) = (path.display(), unknown.join(", "));
        warnings.push(format!(
            "`{path}`: `{FIELD}`: no token of the vocabulary of {vocab_size} is {ids}: it ends no text"
        ));
    }
    Ok(named.into_iter().filter(is_known).map(|id| id as u32).collect())
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
        let fields = Fields::new(Path::new("config.json"), map);
        Config::parse(&fields, Fields::new(Path::new("generation_config.json"), Map::new()))
    }

    fn with(field: &str, value: Value) -> Result<Config> {
        let mut config = minimal();
        config[field] = value;
        parse(config)
    }

    #[test]
    fn what_changes_the_arithmetic_is_refused() {
        let kinds = |kind: &str| json!([kind, "full_attention"]);
        for (field, value, word) in [
            ("hidden_act", json!("gelu"), "unsupported"),
            ("attention_bias", json!(true), "unsupported"),
            ("layer_types", kinds("sliding_attention"), "unsupported"),
            ("layer_types", kinds("linear_attention"), "unsupported"),
            ("layer_types", json!(["full_attention"]), "bad_config"),
            ("attn_logit_softcapping", json!(50.0), "unsupported"),
            ("final_logit_softcapping", json!(30.0), "unsupported"),
            ("partial_rotary_factor", json!(0.5), "unsupported"),
            ("residual_multiplier", json!(0.2), "unsupported"),
            ("no_rope_layers", json!([1, 0]), "unsupported"),
            ("num_experts", json!(8), "unsupported"),
            ("rms_norm_eps", json!("NaN"), "bad_config"),
            ("rms_norm_eps", json!(f64::MAX), "bad_config"),
            ("rms_norm_eps", json!(-1e-6), "bad_config"),
            ("rope_theta", json!(0), "bad_config"),
            ("rope_theta", json!(1e-300), "bad_config"),
            ("rope_theta", json!("NaN"), "bad_config"),
        ] {
            let error = with(field, value).expect_err(field);
            assert_eq!(error.reason(), word, "{error}");
            assert!(error.to_string().contains(field), "{error}");
        }
        let theta = with("rope_parameters", json!({"rope_theta": f64::MAX}));
        assert!(message(theta).contains("`rope_theta`"));
        for (field, value) in [
            ("hidden_act", json!("swish")),
            ("attention_bias", json!(false)),
            ("partial_rotary_factor", json!(1.0)),
            ("attn_logit_softcapping", Value::Null),
            ("num_experts", json!(0)),
            ("layer_types", kinds("full_attention")),
            ("sliding_window", json!(16)),
        ] {
            assert!(with(field, value).is_ok(), "{field}");
        }
    }

    /// Values from transformers' `Qwen3Config`.
    #[test]
    fn a_window_that_hides_something_is_refused() {
        for (change, taken) in [
            (json!({}), false),
            (json!({"sliding_window": 16}), false),
            (json!({"sliding_window": null}), true),
            (json!({"sliding_window": 40_000}), true),
            (json!({"max_window_layers": 2}), true),
            (json!({"max_window_layers": 0, "use_sliding_window": false}), true),
            (json!({"layer_types": ["full_attention", "full_attention"]}), true),
        ] {
            let mut config = minimal();
            config["use_sliding_window"] = true.into();
            config["max_window_layers"] = 1.into();
            for (name, value) in change.as_object().unwrap() {
                config[name] = value.clone();
            }
            assert_eq!(parse(config).is_ok(), taken, "{change}");
        }
    }

    #[test]
    fn what_is_not_followed_is_said() {
        let fields = |path: &str, value: Value| {
            Fields::new(Path::new(path), value.as_object().cloned().unwrap_or_default())
        };
        let generation = json!({"num_beams": 1, "typical_p": 1.0, "suppress_tokens": [1],
            "forced_eos_token_id": 3, "bad_words_ids": [], "do_sample": true, "eos_token_id": [7, 256]});
        let generation = fields("generation_config.json", generation);
        let config = Config::parse(&fields("config.json", minimal()), generation).unwrap();
        assert_eq!(config.eos_token_ids, [7]);
        let [eos, followed] = &config.warnings[..] else { panic!("{:?}", config.warnings) };
        assert!(eos.contains("generation_config.json") && eos.contains("256 is 256"), "{eos}");
        assert!(
            followed.ends_with("`forced_eos_token_id` (3), `suppress_tokens` ([1])"),
            "{followed}"
        );
        assert!(parse(minimal()).unwrap().warnings.is_empty());
        assert!(with("eos_token_id", json!([1, -1, 0.5])).unwrap().warnings[0].contains("-1, 0.5"));
    }

    fn message(result: Result<Config>) -> String {
        result.expect_err("an error").to_string()
    }

    #[test]
    fn generation_config_decides_on_eos() {
        assert_eq!(parse(minimal()).unwrap().eos_token_ids, [1, 7]);
        let fields = |value: Value| {
            let map = value.as_object().cloned().unwrap_or_default();
            Fields::new(Path::new("config.json"), map)
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
            "`config.json`: `num_hidden_layers`: expected a whole number in 1..2147483647, got: -1"
        );
        assert!(message(with("vocab_size", json!(1u64 << 40))).contains("vocab_size"));
        assert!(message(with("num_key_value_heads", json!(3))).contains("num_key_value_heads"));
        assert!(message(with("rope_scaling", json!({"type": "other"}))).contains("other"));
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
