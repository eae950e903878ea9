//! The modules that a configuration names. A file may hold tensors of others: PEFT leaves those out,
//! mlx-lm refuses the file.
//! Reference: PEFT's `tuners/tuners_utils.py`, `check_target_module_exists`; mlx-lm's
//! `tuner/utils.py`, `linear_to_lora_layers` and `load_adapters`.

use super::fields::Fields;
use super::patterns::Whole;
use super::{EMBED_TOKENS, LM_HEAD};
use crate::error::Result;
use serde_json::Value;
use std::collections::HashSet;

/// PEFT's name for the linear layers but the head.
const ALL_LINEAR: &str = "all-linear";

/// How many names a list may have.
const MOST: usize = 65_536;

/// What `target_modules` or `exclude_modules` names.
enum Names<'a> {
    /// by the ends of their paths
    Listed(HashSet<&'a str>),
    Linear,
    Matching(Whole),
}

/// Those of some modules that a PEFT configuration does not name.
pub fn left_out<'a>(fields: &Fields, modules: &[&'a str]) -> Result<HashSet<&'a str>> {
    // PEFT takes a list by the model's family then; which one it was made for is not known here.
    let Some(targets) = names(fields, "target_modules")? else { return Ok(HashSet::new()) };
    let layers = Layers::read(fields, &targets)?;
    let excluded = names(fields, "exclude_modules")?;
    let mut named = HashSet::new();
    for module in modules {
        let within = layers.as_ref().is_none_or(|layers| layers.has(module));
        let is_excluded = match &excluded {
            None => false,
            Some(excluded) => excluded.has(fields, "exclude_modules", module)?,
        };
        if within && !is_excluded && targets.has(fields, "target_modules", module)? {
            named.insert(*module);
        }
    }
    // The other end of a tied embedding is adapted with it.
    let ends = [EMBED_TOKENS, LM_HEAD];
    if fields.flag("ensure_weight_tying")? && ends.iter().any(|end| named.contains(end)) {
        named.extend(ends);
    }
    Ok(modules.iter().copied().filter(|module| !named.contains(module)).collect())
}

fn names<'a>(fields: &Fields<'a>, field: &str) -> Result<Option<Names<'a>>> {
    match fields.get(field) {
        Some(Value::String(name)) if name.eq_ignore_ascii_case(ALL_LINEAR) => {
            Ok(Some(Names::Linear))
        }
        Some(Value::String(pattern)) if !pattern.is_empty() => {
            Ok(Some(Names::Matching(Whole::read(fields, field, pattern)?)))
        }
        _list => {
            let list = list(fields, field)?.filter(|list| !list.is_empty());
            Ok(list.map(|list| Names::Listed(list.into_iter().collect())))
        }
    }
}

/// A list of names; null is none.
pub fn list<'a>(fields: &Fields<'a>, field: &str) -> Result<Option<Vec<&'a str>>> {
    let value = match fields.get(field) {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value,
    };
    let names = value.as_array().filter(|names| names.len() <= MOST);
    let names = names.and_then(|names| names.iter().map(Value::as_str).collect());
    let wrong = || fields.unexpected(&format!("`{field}`"), "a list of modules' names", value);
    names.ok_or_else(wrong).map(Some)
}

impl Names<'_> {
    fn has(&self, fields: &Fields, field: &str, module: &str) -> Result<bool> {
        match self {
            Names::Listed(names) => Ok(ends(module).any(|end| names.contains(end))),
            Names::Linear => Ok(!matches!(module, EMBED_TOKENS | LM_HEAD)),
            Names::Matching(pattern) => pattern.matches(fields, field, module),
        }
    }
}

/// A path, and what of it stands behind each dot.
fn ends(path: &str) -> impl Iterator<Item = &str> {
    let behind = path.match_indices('.').map(|(dot, _)| &path[dot + 1..]);
    std::iter::once(path).chain(behind)
}

/// `layers_to_transform`, with the names that `layers_pattern` gives to lists of layers.
struct Layers<'a> {
    indices: Vec<f64>,
    lists: Vec<&'a str>,
}

impl<'a> Layers<'a> {
    fn read(fields: &Fields<'a>, targets: &Names) -> Result<Option<Self>> {
        let (indices, lists) = ("layers_to_transform", "layers_pattern");
        let is_number = |name: &str| fields.get(name).is_some_and(Value::is_number);
        if !fields.is_set(indices) && !is_number(indices) {
            return match fields.is_set(lists) {
                true => Err(fields.file.wrong(format!("`{lists}` without `{indices}`"))),
                false => Ok(None),
            };
        }
        if !matches!(targets, Names::Listed(_)) {
            let message = format!("`{indices}` needs a list of names as `target_modules`");
            return Err(fields.file.wrong(message));
        }
        let value = &fields.map[indices];
        let numbers = match value {
            Value::Array(numbers) => numbers.iter().map(Value::as_f64).collect(),
            number => number.as_f64().map(|number| vec![number]),
        };
        let wrong = || fields.unexpected(&format!("`{indices}`"), "numbers of layers", value);
        let lists = match fields.get(lists) {
            Some(Value::String(name)) if !name.is_empty() => vec![name.as_str()],
            Some(Value::String(_)) => vec![],
            _list => list(fields, lists)?.unwrap_or_default(),
        };
        Ok(Some(Self { indices: numbers.ok_or_else(wrong)?, lists }))
    }

    /// Where the first number in a path, behind a list's name, is one of the layers'.
    fn has(&self, module: &str) -> bool {
        let parts: Vec<&str> = module.split('.').collect();
        let index = parts.windows(2).enumerate().find_map(|(place, pair)| {
            let is_list = self.lists.is_empty() || self.lists.contains(&pair[0]);
            // As in PEFT, something stands before the list's name and behind the number.
            let inside = place > 0 && place + 2 < parts.len();
            pair[1].parse::<u32>().ok().filter(|_| is_list && inside)
        });
        index.is_some_and(|index| self.indices.contains(&f64::from(index)))
    }
}

/// What mlx-lm's `num_layers` and `keys` name.
pub struct Chosen {
    /// The last layers; `None` is all.
    layers: Option<usize>,
    /// Paths within a layer, or within the model; `None` is every linear layer of a layer.
    keys: Option<Vec<String>>,
}

impl Chosen {
    pub fn read(fields: &Fields, parameters: &Fields) -> Result<Self> {
        let field = "num_layers";
        let layers = match fields.get(field) {
            None | Some(Value::Null) => None,
            Some(value) => {
                let whole = value.as_f64().filter(|number| number.fract() == 0.0);
                let wrong = || fields.unexpected(&format!("`{field}`"), "a whole number", value);
                Some(whole.ok_or_else(wrong)?).filter(|layers| *layers > 0.0)
            }
        };
        let keys = list(parameters, "keys")?;
        let keys = keys.map(|keys| keys.into_iter().map(str::to_owned).collect());
        Ok(Self { layers: layers.map(|layers| layers as usize), keys })
    }

    /// `layers`: how many the model has
    pub fn names(&self, module: &str, layers: usize) -> bool {
        let has =
            |path: &str| self.keys.as_ref().is_some_and(|keys| keys.iter().any(|k| k == path));
        if has(module) {
            return true;
        }
        let within = module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let Some((index, path)) = within else { return false };
        let first = layers.saturating_sub(self.layers.unwrap_or(layers));
        index.parse().is_ok_and(|index: usize| index >= first) && (self.keys.is_none() || has(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::file::File;
    use serde_json::json;

    const MODULES: [&str; 6] = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.10.mlp.up_proj",
        "model.embed_tokens",
        "lm_head",
    ];

    /// An adapter of no tensors.
    fn file(config: &Value) -> File {
        let folder = tempfile::tempdir().unwrap();
        let put =
            |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        put("adapter_config.json", config.to_string().as_bytes());
        put("adapters.safetensors", b"\x02\0\0\0\0\0\0\0{}");
        File::open(folder.path()).unwrap()
    }

    fn named(config: Value) -> Result<Vec<usize>> {
        let file = file(&config);
        let left_out = left_out(&file.fields()?, &MODULES)?;
        Ok((0..MODULES.len()).filter(|at| !left_out.contains(MODULES[*at])).collect())
    }

    /// What PEFT's `check_target_module_exists` says of each.
    #[test]
    fn modules_are_named_as_in_peft() {
        let targets = ["q_proj", "down_proj", "up_proj", "lm_head"];
        for (config, expected) in [
            (json!({}), &[0, 1, 2, 3, 4, 5][..]),
            (json!({"target_modules": ["q_proj"]}), &[0, 1]),
            (json!({"target_modules": ["proj"]}), &[]),
            (json!({"target_modules": ["1.self_attn.q_proj", "lm_head"]}), &[1, 5]),
            (json!({"target_modules": ["model.layers.0.self_attn.q_proj"]}), &[0]),
            (json!({"target_modules": r".*\.[01]\..*_proj"}), &[0, 1, 2]),
            (json!({"target_modules": "q_proj"}), &[]),
            (json!({"target_modules": r".*(?<!up)_proj|lm_head"}), &[0, 1, 2, 5]),
            (json!({"target_modules": "all-linear"}), &[0, 1, 2, 3]),
            (
                json!({"target_modules": "all-linear", "exclude_modules": ["0.self_attn.q_proj"]}),
                &[1, 2, 3],
            ),
            (json!({"target_modules": targets, "exclude_modules": r"model\..*_proj"}), &[5]),
            (json!({"target_modules": targets, "layers_to_transform": 1}), &[1, 2]),
            (json!({"target_modules": targets, "layers_to_transform": 0}), &[0]),
            (json!({"target_modules": targets, "layers_to_transform": []}), &[0, 1, 2, 3, 5]),
            (
                json!({"target_modules": targets, "layers_to_transform": [0, 10], "layers_pattern": "layers"}),
                &[0, 3],
            ),
            (
                json!({"target_modules": targets, "layers_to_transform": [0], "layers_pattern": ["h", "blocks"]}),
                &[],
            ),
            (json!({"target_modules": ["embed_tokens"]}), &[4]),
            (json!({"target_modules": ["embed_tokens"], "ensure_weight_tying": true}), &[4, 5]),
        ] {
            assert_eq!(named(config.clone()).unwrap(), expected, "{config}");
        }
    }

    #[test]
    fn what_peft_refuses_is_refused() {
        for (config, word) in [
            (json!({"target_modules": 1}), "`target_modules`"),
            (json!({"target_modules": [1]}), "`target_modules`"),
            (json!({"target_modules": "("}), "`target_modules`"),
            (json!({"target_modules": ["a"], "exclude_modules": {}}), "`exclude_modules`"),
            (json!({"target_modules": "a", "layers_to_transform": [1]}), "`layers_to_transform`"),
            (json!({"target_modules": ["a"], "layers_to_transform": "x"}), "`layers_to_transform`"),
            (json!({"target_modules": ["a"], "layers_pattern": "x"}), "`layers_pattern`"),
        ] {
            let error = named(config.clone()).expect_err("an error").to_string();
            assert!(error.contains(word), "{config}: {error}");
        }
    }

    /// What has a pair after mlx-lm's `linear_to_lora_layers`, of a model of 11 layers.
    #[test]
    fn modules_are_chosen_as_in_mlx_lm() {
        let keys = json!(["self_attn.q_proj", "lm_head", "model.layers.1.mlp.down_proj"]);
        for (num_layers, keys, expected) in [
            (json!(-1), json!(null), &[0, 1, 2, 3][..]),
            (json!(0), json!(null), &[0, 1, 2, 3]),
            (json!(10.0), json!(null), &[1, 2, 3]),
            (json!(1), keys.clone(), &[2, 5]),
            (json!(99), keys, &[0, 1, 2, 5]),
            (json!(null), json!([]), &[]),
        ] {
            let file = file(&json!({"num_layers": num_layers, "keys": keys}));
            let fields = file.fields().unwrap();
            let chosen = Chosen::read(&fields, &fields).unwrap();
            let named: Vec<usize> =
                (0..MODULES.len()).filter(|at| chosen.names(MODULES[*at], 11)).collect();
            assert_eq!(named, expected, "{num_layers} {keys}");
        }
    }
}
