//! Text to token ids and back: a tokenizer's files, with the chat template beside them.

mod added;
mod bound;
mod chat_template;
mod config;
mod decoder;
mod definition;
mod encode;
mod pieces;
mod stops;
mod text_stream;
mod thinking;
pub mod workers;

pub use encode::Limit;
pub use text_stream::{Text, TextStream};

use crate::error::{Error, Result, catch};
use crate::files;
use chat_template::ChatTemplates;
use config::Config;
use decoder::{Decoder, Decoding};
use definition::Definition;
use encode::Encoder;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Bytes that a decoded text may have.
const LONGEST_TEXT: usize = 64 << 20;

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    encoder: Encoder,
    decoder: Arc<Decoder>,
    decoder_growth: f64,
    chat_template: Option<ChatTemplates>,
    bos_token: Option<String>,
    eos_token_id: Option<u32>,
    vocab_size: usize,
    special_tokens: Vec<String>,
    /// Added tokens that a text has in another form, once it is normalized.
    normalized: HashMap<u32, String>,
}

/// Whether there is a tokenizer in a folder, and whether it has a chat template, by the files that
/// are there.
pub fn is_there(folder: &Path) -> (bool, Result<bool>) {
    let has = |name: &str| files::is_there(&folder.join(name));
    let tokenizer = has("tokenizer.json") || has("vocab.json") && has("merges.txt");
    let template = Config::open(folder).and_then(|config| config.chat_template(folder));
    (tokenizer, template.map(|template| template.is_some()))
}

impl Tokenizer {
    pub fn open(folder: &Path) -> Result<Self> {
        let config = Config::open(folder)?;
        let mut definition = Definition::open(folder, &config.fields)?;
        let more = config.added_tokens(&definition.added_tokens)?;
        let inner = definition.tokenizer(more)?;
        let vocabulary = inner.get_vocab(true);
        if vocabulary.is_empty() {
            return Err(definition.invalid("it has no tokens"));
        }
        let decoder = Decoder::new(&definition.decoder)
            .map_err(|error| definition.invalid(&format!("`decoder`: {error}")))?;
        let encoder = catch(|| Encoder::new(&definition, &inner, &vocabulary));
        let eos_token_id = config.token("eos_token").and_then(|token| inner.token_to_id(&token));
        let mut encoder = encoder.map_err(|error| match error {
            Error::Panic(panic) => definition.invalid(&panic),
            error => error,
        })?;
        let id = |token: Option<String>| inner.token_to_id(&token?);
        let [before, behind] = config.around().map(id);
        encoder.put_around(before, behind);
        Ok(Self {
            encoder,
            decoder: Arc::new(decoder),
            decoder_growth: definition.decoder_growth,
            eos_token_id,
            chat_template: config.chat_template(folder)?,
            bos_token: config.token("bos_token"),
            vocab_size: vocabulary.len(),
            special_tokens: special_tokens(&inner),
            normalized: encode::normalized_tokens(&inner)
                .map_err(|error| definition.invalid(&error))?,
            inner,
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

    pub fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_deref()
    }

    pub fn eos_token(&self) -> Option<String> {
        self.token(self.eos_token_id?)
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// A text to be completed, with the special tokens that the tokenizer puts around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_within(text, true, &Limit { tokens: usize::MAX, cancelled: &NEVER })
    }

    /// `special`: whether with those tokens
    pub fn encode_within(&self, text: &str, special: bool, limit: &Limit) -> Result<Vec<u32>> {
        // As mlx-lm: a text that begins with the bos token gets no second one.
        let begins = self.bos_token.as_ref().is_some_and(|bos| text.starts_with(bos.as_str()));
        self.encoder.encode(&self.inner, text, special && !begins, limit)
    }

    /// A conversation: an array of `{"role", "content"}` objects, and what the template takes.
    pub fn encode_chat(
        &self,
        messages: &Value,
        options: &Map<String, Value>,
        limit: &Limit,
    ) -> Result<Vec<u32>> {
        // The template writes the special tokens itself.
        self.encoder.encode(&self.inner, &self.render(messages, options)?, false, limit)
    }

    /// The text of a conversation.
    pub fn render(&self, messages: &Value, options: &Map<String, Value>) -> Result<String> {
        let template = self.chat_template.as_ref().ok_or_else(|| {
            Error::Request("the tokenizer has no chat template: give :text, not :messages".into())
        })?;
        template.render(messages, options)
    }

    /// Text without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decode_with(ids, true)
    }

    /// `skip`: without special tokens. Ids without a token have no text.
    pub fn decode_with(&self, ids: &[u32], skip: bool) -> Result<String> {
        let (mut text, mut bytes) = (String::new(), 0);
        let mut decoding = self.decoding();
        let tokens = ids.iter().filter_map(|id| Some((*id, self.token(*id)?)));
        for (id, token) in tokens.filter(|(_, token)| !(skip && self.is_special(token))) {
            let token = self.normalized(id, token);
            bytes += token.len();
            if bytes as f64 * self.decoder_growth > LONGEST_TEXT as f64 {
                return Err(Error::Request("the text of these tokens is too long".into()));
            }
            decoding.push(&token, &mut text);
        }
        decoding.finish(&mut text);
        Ok(text)
    }

    /// A text as it stands, without special tokens around it.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_within(text, false, &Limit { tokens: usize::MAX, cancelled: &NEVER })
    }

    /// The bytes of every token by its id, those of a special one behind 0xff, which no text has. None
    /// where a token's bytes depend on its neighbours.
    pub fn token_bytes(&self) -> Option<Vec<Vec<u8>>> {
        let last = self.inner.get_vocab(true).into_values().max()?;
        let bytes = |id: u32| match self.token(id) {
            Some(token) if self.is_special(&token) => Some([b"\xff", token.as_bytes()].concat()),
            Some(token) => self.decoder.bytes_of(&token),
            None => Some(vec![]),
        };
        (0..=last).map(bytes).collect()
    }

    fn decoding(&self) -> Decoding {
        self.decoder.start()
    }

    fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// What the decoder takes for a token: as in `tokenizers` 0.23, what the normalizer made of it.
    fn normalized(&self, id: u32, token: String) -> String {
        self.normalized.get(&id).cloned().unwrap_or(token)
    }

    fn is_special(&self, token: &str) -> bool {
        self.inner.get_added_vocabulary().is_special_token(token)
    }

    /// The id of a text that is one special token.
    pub fn special_token_id(&self, text: &str) -> Option<u32> {
        self.is_special(text).then(|| self.inner.token_to_id(text))?
    }

    /// Whether a special token is written in a text.
    fn names_special_token(&self, text: &str) -> bool {
        self.special_tokens.iter().any(|token| text.contains(token.as_str()))
    }
}

static NEVER: AtomicBool = AtomicBool::new(false);

fn special_tokens(tokenizer: &tokenizers::Tokenizer) -> Vec<String> {
    let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder().values();
    added.filter(|token| token.special).map(|token| token.content.clone()).collect()
}
