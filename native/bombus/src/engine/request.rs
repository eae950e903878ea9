//! What a request asks for, and all that can be wrong with it before it joins the others.

use crate::adapter::Adapter;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::sampler::Sampling;
use crate::tokenizer::Tokenizer;
use std::sync::Arc;

/// What a request begins with.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// A text to be completed.
    Text(String),
    /// A conversation, and options for the chat template, both as JSON.
    Chat {
        messages: String,
        options: String,
    },
    Ids(Vec<u32>),
}

pub struct Request {
    pub prompt: Prompt,
    /// Without one, only ids go in and come out.
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub adapter: Option<Arc<Adapter>>,
    pub sampling: Sampling,
    pub max_new_tokens: usize,
    /// At most this many tokens, prompt and all; the model's context is a limit too.
    pub max_context: Option<usize>,
    /// Strings that end the text, and are not part of it.
    pub stop: Vec<String>,
}

impl Request {
    /// The prompt's ids, and how many may follow.
    pub(super) fn encode(&self, config: &Config) -> Result<(Vec<u32>, usize)> {
        let ids = match &self.prompt {
            Prompt::Ids(ids) => ids.clone(),
            Prompt::Text(text) => self.tokenizer()?.encode(text)?,
            Prompt::Chat { messages, options } => {
                let wrong = |error: serde_json::Error| Error::Request(format!("messages: {error}"));
                let messages = serde_json::from_str(messages).map_err(wrong)?;
                let options = serde_json::from_str(options).map_err(wrong)?;
                self.tokenizer()?.encode_chat(&messages, &options)?
            }
        };
        let context = config.max_position_embeddings;
        let context = self.max_context.map_or(context, |max| max.min(context));
        check_ids(&ids, config, context)?;
        let left = context - ids.len();
        Ok((ids, self.max_new_tokens.min(left)))
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_deref().ok_or_else(|| {
            Error::Request("without a tokenizer only :token_ids can be completed".into())
        })
    }
}

pub(super) fn check_ids(ids: &[u32], config: &Config, context: usize) -> Result<()> {
    let vocab = config.vocab_size;
    if ids.is_empty() {
        return Err(Error::Request("the prompt has no tokens".into()));
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::Request(format!(
            "the token id {id} is outside the vocabulary of {vocab} tokens"
        )));
    }
    if ids.len() > context {
        let count = ids.len();
        return Err(Error::PromptTooLong(format!(
            "{count} tokens, where the context is {context}"
        )));
    }
    Ok(())
}
