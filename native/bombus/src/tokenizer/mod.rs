//! Text to token ids and back: `tokenizer.json`, with the chat template beside it.

mod chat_template;
mod text_stream;

pub use text_stream::TextStream;

use crate::error::{Error, Result};
use chat_template::ChatTemplates;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    chat_template: Option<ChatTemplates>,
    bos_token: Option<String>,
    eos_token_id: Option<u32>,
}

impl Tokenizer {
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|error| Error::io(&path, &error))?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| {
            Error::Tokenizer(format!("`{}` is no valid tokenizer: {error}", path.display()))
        })?;
        let config = Config::open(folder)?;
        let eos_token_id = config.token("eos_token").and_then(|token| inner.token_to_id(&token));
        Ok(Self {
            inner,
            eos_token_id,
            chat_template: config.chat_template(folder)?,
            bos_token: config.token("bos_token"),
        })
    }

    pub fn has_chat_template(&self) -> bool {
        self.chat_template.is_some()
    }

    /// The names that the chat templates take from outside, beside the messages.
    pub fn template_options(&self) -> Vec<String> {
        self.chat_template.as_ref().map(ChatTemplates::options).unwrap_or_default()
    }

    /// As in mlx-lm, this token ends a text too, whatever `config.json` says.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_id
    }

    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// A text to be completed, with the special tokens that the tokenizer puts around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        // As mlx-lm: a text that begins with the bos token gets no second one.
        let begins = self.bos_token.as_ref().is_some_and(|bos| text.starts_with(bos.as_str()));
        self.encode_with(text, !begins)
    }

    /// A conversation: an array of `{"role", "content"}` objects, and what the template takes.
    pub fn encode_chat(&self, messages: &Value, options: &Map<String, Value>) -> Result<Vec<u32>> {
        let template = self.chat_template.as_ref().ok_or_else(|| {
            Error::Request("the tokenizer has no chat template: give :text, not :messages".into())
        })?;
        // The template writes the special tokens itself.
        self.encode_with(&template.render(messages, options)?, false)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, special);
        let encoding = encoding.map_err(|error| Error::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| Error::Tokenizer(error.to_string()))
    }
}

/// `tokenizer_config.json`; empty where there is none.
struct Config {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Config {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer_config.json");
        if !path.exists() {
            return Ok(Self { path, fields: Map::new() });
        }
        let text = std::fs::read(&path).map_err(|error| Error::io(&path, &error))?;
        let fields = serde_json::from_slice(&text)
            .map_err(|error| Error::Tokenizer(format!("`{}`: {error}", path.display())))?;
        Ok(Self { path, fields })
    }

    /// A special token: a string, or an object with its content.
    fn token(&self, name: &str) -> Option<String> {
        let value = self.fields.get(name)?;
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    }

    fn chat_template(&self, folder: &Path) -> Result<Option<ChatTemplates>> {
        let field = self.fields.get("chat_template");
        ChatTemplates::open(folder, (&self.path, field), self.special_tokens())
    }

    fn special_tokens(&self) -> Map<String, Value> {
        let names = ["bos_token", "eos_token", "unk_token", "pad_token"];
        let token = |name: &str| Some((name.to_owned(), self.token(name)?.into()));
        names.into_iter().filter_map(token).collect()
    }
}
