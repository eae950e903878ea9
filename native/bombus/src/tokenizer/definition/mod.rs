//! A tokenizer from its files: `tokenizer.json`, or `vocab.json` and `merges.txt`.
//!
//! Files come from outside, and the crate trusts them: a number in them may decide how much
//! memory is taken, a nesting how deep it recurses. All that is checked first; what still panics
//! in the crate becomes an error that names the field.

mod bpe_files;
mod components;
mod models;
pub mod patterns;

use crate::error::{Error, Result, catch};
use crate::files;
pub use bpe_files::default_token;
use patterns::shortened;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, ModelWrapper};

/// Tokens beside the model's, and the bytes of one.
const MOST_ADDED: usize = 1 << 20;
const LONGEST_ADDED: usize = 4096;

/// Bytes of all that are looked for in a text, once they are normalized.
const MOST_ADDED_BYTES: f64 = (8 << 20) as f64;

/// What `tokenizer.json` says, checked.
pub struct Definition {
    pub path: PathBuf,
    pub model: ModelWrapper,
    pub added_tokens: Vec<AddedToken>,
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub post_processor: Value,
    pub decoder: Value,
    /// How many times longer a text can become before it is tokens, and the text of tokens.
    pub text_growth: f64,
    pub decoder_growth: f64,
    normalizer_growth: f64,
}

impl Definition {
    /// `config`: the fields of `tokenizer_config.json`
    pub fn open(folder: &Path, config: &Map<String, Value>) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !files::is_there(&path) {
            let (path, fields) = bpe_files::open(folder, config)?;
            return Self::new(path, fields);
        }
        let fields = files::json(&path, files::VOCABULARY, Error::Tokenizer)?;
        Self::new(path, fields)
    }

    /// `truncation` and `padding` are of whoever saved the file: neither belongs to a prompt.
    fn new(path: PathBuf, fields: Value) -> Result<Self> {
        let wrong = |error: String| invalid(&path, &error);
        let Value::Object(mut fields) = fields else {
            return Err(wrong("expected an object".into()));
        };
        match fields.get("version").and_then(Value::as_str) {
            None | Some("1.0") => {}
            Some(other) => return Err(wrong(format!("the version `{}`", shortened(other)))),
        }
        let mut take = |name: &str| fields.remove(name).unwrap_or_default();
        let normalizer = take("normalizer");
        let pre_tokenizer = take("pre_tokenizer");
        let post_processor = take("post_processor");
        let decoder = take("decoder");
        let normalizer_growth = components::normalizer(&normalizer).map_err(wrong)?;
        let split_growth = components::pre_tokenizer(&pre_tokenizer).map_err(wrong)?;
        let decoder_growth = components::decoder(&decoder).map_err(wrong)?;
        components::post_processor(&post_processor).map_err(wrong)?;
        let added_tokens = added_tokens(take("added_tokens")).map_err(wrong)?;
        let model = take("model");
        let model = guarded("model", || models::build(model));
        Ok(Self {
            model: model.map_err(wrong)?,
            added_tokens,
            normalizer,
            pre_tokenizer,
            post_processor,
            decoder,
            text_growth: normalizer_growth * split_growth,
            decoder_growth,
            normalizer_growth,
            path,
        })
    }

    /// The crate's tokenizer.
    pub fn tokenizer(&mut self, more: Vec<AddedToken>) -> Result<tokenizers::Tokenizer> {
        let empty = ModelWrapper::from(tokenizers::models::bpe::BPE::default());
        let model = std::mem::replace(&mut self.model, empty);
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        self.check_added(&more)?;
        tokenizer.with_normalizer(self.part::<tokenizers::NormalizerWrapper>("normalizer")?);
        let pre_tokenizer = self.part::<tokenizers::PreTokenizerWrapper>("pre_tokenizer")?;
        tokenizer.with_pre_tokenizer(pre_tokenizer);
        let post_processor = self.part::<tokenizers::PostProcessorWrapper>("post_processor")?;
        tokenizer.with_post_processor(post_processor);
        let added = guarded("added_tokens", || {
            tokenizer.add_tokens(&self.added_tokens);
            tokenizer.add_tokens(&more);
            Ok(())
        });
        added.map_err(|error| self.invalid(&error))?;
        Ok(tokenizer)
    }

    fn check_added(&self, more: &[AddedToken]) -> Result<()> {
        let bytes = |token: &AddedToken| match token.normalized {
            true => token.content.len() as f64 * self.normalizer_growth,
            false => token.content.len() as f64,
        };
        let bytes: f64 = self.added_tokens.iter().chain(more).map(bytes).sum();
        match bytes > MOST_ADDED_BYTES {
            true => Err(self.invalid("`added_tokens`: they are too long together")),
            false => Ok(()),
        }
    }

    /// A part of the crate's; null is none.
    fn part<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let value = match name {
            "normalizer" => &self.normalizer,
            "pre_tokenizer" => &self.pre_tokenizer,
            _ => &self.post_processor,
        };
        let part = guarded(name, || match value {
            Value::Null => Ok(None),
            value => T::deserialize(value).map(Some).map_err(|error| error.to_string()),
        });
        part.map_err(|error| self.invalid(&error))
    }

    /// The types of the normalizers, in their order.
    pub fn normalizers(&self) -> Vec<&str> {
        self.normalizer_parts().filter_map(|part| part["type"].as_str()).collect()
    }

    fn normalizer_parts(&self) -> impl Iterator<Item = &Value> {
        let parts = match self.normalizer.get("normalizers").and_then(Value::as_array) {
            Some(parts) => &parts[..],
            None if self.normalizer.is_null() => &[],
            None => std::slice::from_ref(&self.normalizer),
        };
        parts.iter()
    }

    /// Whether a text may become shorter: a replacement is not that of a space by its sign.
    pub fn shortens(&self) -> bool {
        let sign = |part: &Value| part["pattern"]["String"] == " " && part["content"] == "▁";
        self.normalizer_parts().any(|part| part["type"] == "Replace" && !sign(part))
    }

    /// Whether a pattern of the pre-tokenizer may take more than linear time.
    pub fn backtracks(&self) -> bool {
        fn any(value: &Value) -> bool {
            let pattern = value["pattern"]["Regex"].as_str();
            let parts = value["pretokenizers"].as_array();
            pattern.is_some_and(|text| patterns::compile(text).is_ok_and(|one| one.backtracks))
                || parts.into_iter().flatten().any(any)
        }
        any(&self.pre_tokenizer)
    }

    pub fn invalid(&self, error: &str) -> Error {
        invalid(&self.path, error)
    }
}

pub fn invalid(path: &Path, error: &str) -> Error {
    Error::Tokenizer(format!("`{}` is no valid tokenizer: {error}", path.display()))
}

/// Reads a field; a panic of the crate is an error too.
fn guarded<T>(field: &str, work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let done = catch(|| work().map_err(Error::Tokenizer));
    done.map_err(|error| match error {
        Error::Tokenizer(error) | Error::Panic(error) => format!("`{field}`: {error}"),
        error => error.to_string(),
    })
}

/// `[{"id", "content", "special", ...}, ...]`. As with the reference, their order decides their
/// ids where the model does not know them.
fn added_tokens(tokens: Value) -> Result<Vec<AddedToken>, String> {
    let tokens = match tokens {
        Value::Null => vec![],
        Value::Array(tokens) => tokens,
        _ => return Err("`added_tokens`: expected an array".into()),
    };
    if tokens.len() > MOST_ADDED {
        return Err(format!("`added_tokens`: there are {}", tokens.len()));
    }
    tokens.iter().map(|token| added_token(token, "`added_tokens`")).collect()
}

/// A token as files write it; what is absent is as in the reference.
pub fn added_token(token: &Value, at: &str) -> Result<AddedToken, String> {
    let wrong = |what: &str| format!("{at}: {what} in {}", shortened(&token.to_string()));
    let content = token["content"].as_str().ok_or_else(|| wrong("no `content`"))?;
    if content.len() > LONGEST_ADDED {
        return Err(format!("{at}: a token of {} bytes", content.len()));
    }
    let flag = |name: &str| match &token[name] {
        Value::Null => Ok(None),
        Value::Bool(flag) => Ok(Some(*flag)),
        _ => Err(wrong(&format!("`{name}` is no boolean"))),
    };
    let special = flag("special")?.unwrap_or(false);
    Ok(AddedToken {
        content: content.to_owned(),
        single_word: flag("single_word")?.unwrap_or(false),
        lstrip: flag("lstrip")?.unwrap_or(false),
        rstrip: flag("rstrip")?.unwrap_or(false),
        normalized: flag("normalized")?.unwrap_or(!special),
        special,
    })
}
