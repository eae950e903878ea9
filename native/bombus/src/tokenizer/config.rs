//! What stands beside `tokenizer.json`: special tokens by name, tokens that only these files have,
//! and the chat template. What wins over what is as in transformers.

use super::chat_template::ChatTemplates;
use super::definition::{added_token, default_token};
use crate::error::{Error, Result};
use crate::files;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use tokenizers::AddedToken;

/// Tokens that have a name everywhere, in the order in which they are added.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The fields of `tokenizer_config.json`, with what older files say where it does not.
pub struct Config {
    path: PathBuf,
    pub fields: Map<String, Value>,
    /// `added_tokens.json`: tokens and their ids
    added: Map<String, Value>,
    /// Where tokens that no file names come from.
    defaults: Option<PathBuf>,
}

impl Config {
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer_config.json");
        let mut fields = object(&path)?;
        let mut map = object(&folder.join("special_tokens_map.json"))?;
        let mut added = object(&folder.join("added_tokens.json"))?;
        // A config that lists its tokens says what is true of them.
        let complete = fields.get("added_tokens_decoder").is_some_and(Value::is_object);
        if complete {
            added.clear();
            map.retain(|name, _| fields.get(name).is_none_or(Value::is_null));
        }
        fields.extend(map);
        let defaults =
            (!files::is_there(&folder.join("tokenizer.json"))).then(|| folder.to_owned());
        Ok(Self { path, fields, added, defaults })
    }

    /// A special token: a string, or an object with its content.
    pub fn token(&self, name: &str) -> Option<String> {
        let named = self.fields.get(name).and_then(content).map(str::to_owned);
        let folder = self.defaults.as_ref();
        named.or_else(|| default_token(folder?, &self.fields, name))
    }

    /// The names that templates know, with their tokens.
    pub fn special_tokens(&self) -> Map<String, Value> {
        let named = self.names().into_iter();
        let mut tokens: Map<String, Value> =
            named.filter_map(|name| Some((name.clone(), self.token(&name)?.into()))).collect();
        for (name, token) in self.named_extras() {
            tokens.extend(content(token).map(|content| (name.clone(), content.into())));
        }
        tokens
    }

    /// Every `*_token`, the usual ones first.
    fn names(&self) -> Vec<String> {
        let own = self.fields.keys().map(String::as_str);
        let others = own.filter(|name| name.ends_with("_token") && !NAMES.contains(name));
        NAMES.into_iter().chain(others).map(str::to_owned).collect()
    }

    /// `extra_special_tokens`, where it is an object of names and tokens.
    fn named_extras(&self) -> impl Iterator<Item = (&String, &Value)> {
        let of = |name: &str| self.fields.get(name).and_then(Value::as_object);
        let extras = [of("extra_special_tokens"), of("model_specific_special_tokens")];
        extras.into_iter().flatten().flatten()
    }

    /// Tokens that are to be added to those of `tokenizer.json`.
    pub fn added_tokens(&self, known: &[AddedToken]) -> Result<Vec<AddedToken>> {
        let wrong = |error: String| Error::Tokenizer(format!("`{}`: {error}", self.path.display()));
        let special = self.special_contents();
        let mut tokens = self.listed(&special).map_err(wrong)?;
        tokens.retain(|token| !known.contains(token));
        let mut seen: HashSet<String> =
            known.iter().chain(&tokens).map(|token| token.content.clone()).collect();
        for token in self.named_tokens().map_err(wrong)? {
            if seen.insert(token.content.clone()) {
                tokens.push(token);
            }
        }
        let named: HashSet<String> =
            self.names().iter().filter_map(|name| self.token(name)).collect();
        for token in &mut tokens {
            token.special |= named.contains(&token.content);
        }
        Ok(tokens)
    }

    /// `added_tokens_decoder`, else `added_tokens.json`, by their ids.
    fn listed(&self, special: &HashSet<String>) -> Result<Vec<AddedToken>, String> {
        let mut tokens = vec![];
        let decoder = self.fields.get("added_tokens_decoder").and_then(Value::as_object);
        for (id, token) in decoder.into_iter().flatten() {
            let wrong = || format!("`added_tokens_decoder`: the id `{id}` is no number");
            let id: u32 = id.parse().map_err(|_| wrong())?;
            tokens.push((id, added_token(token, "`added_tokens_decoder`")?));
        }
        for (token, id) in &self.added {
            let wrong = || format!("`added_tokens.json`: the id {id} of {token:?}");
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong)?;
            let special = special.contains(token);
            let token = json!({"content": token, "special": special, "normalized": !special});
            tokens.push((id, added_token(&token, "`added_tokens.json`")?));
        }
        tokens.sort_by_key(|(id, _)| *id);
        Ok(tokens.into_iter().map(|(_, token)| token).collect())
    }

    /// What has a name is a special token, and so are extra ones without.
    fn named_tokens(&self) -> Result<Vec<AddedToken>, String> {
        let mut tokens = vec![];
        for name in self.names() {
            let written = self.fields.get(&name).filter(|value| value.is_object()).cloned();
            let named = written.or_else(|| self.token(&name).map(Value::from));
            tokens.extend(named.map(|token| special(&token, &name)).transpose()?.flatten());
        }
        for (name, token) in self.named_extras() {
            tokens.extend(special(token, name)?);
        }
        for token in self.extras() {
            tokens.extend(special(token, "extra_special_tokens")?);
        }
        Ok(tokens)
    }

    /// Special tokens without names.
    fn extras(&self) -> impl Iterator<Item = &Value> {
        let of = |name: &str| {
            self.fields.get(name).and_then(Value::as_array).filter(|list| !list.is_empty())
        };
        let extras = of("extra_special_tokens").or_else(|| of("additional_special_tokens"));
        extras.into_iter().flatten()
    }

    fn special_contents(&self) -> HashSet<String> {
        let named = self.names().into_iter().filter_map(|name| self.token(&name));
        named.chain(self.extras().filter_map(content).map(str::to_owned)).collect()
    }

    /// The tokens before and behind a text that `add_bos_token` and `add_eos_token` ask for. As in
    /// transformers, they do so only where no `tokenizer.json` says it.
    pub fn around(&self) -> [Option<String>; 2] {
        let asked =
            |flag: &str| self.defaults.is_some() && self.fields.get(flag) == Some(&true.into());
        [("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")]
            .map(|(flag, name)| self.token(name).filter(|_| asked(flag)))
    }

    pub fn chat_template(&self, folder: &Path) -> Result<Option<ChatTemplates>> {
        let field = self.fields.get("chat_template");
        ChatTemplates::open(folder, (&self.path, field), self.special_tokens())
    }
}

/// A file of fields; empty where there is none.
fn object(path: &Path) -> Result<Map<String, Value>> {
    if !files::is_there(path) {
        return Ok(Map::new());
    }
    files::json(path, files::FIELDS, Error::Tokenizer)
}

fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// None for a value that is no token, such as a flag whose name ends like one.
fn special(token: &Value, name: &str) -> Result<Option<AddedToken>, String> {
    let Some(text) = content(token) else { return Ok(None) };
    let mut fields = token.as_object().cloned().unwrap_or_default();
    fields.insert("content".into(), text.into());
    // What is absent depends on this: special tokens are not normalized.
    fields.insert("special".into(), true.into());
    let mut token = added_token(&Value::Object(fields), &format!("`{name}`"))?;
    token.special = true;
    Ok(Some(token))
}
