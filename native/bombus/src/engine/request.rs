//! What a request asks for, and all that can be wrong with it before it joins the others.

use super::admission::Group;
use crate::config::Config;
use crate::engine::sequence::Task;
use crate::error::{Error, Result};
use crate::grammar::{Constraint, Format};
use crate::model::adapter::Adapter;
use crate::sampler::Sampling;
use crate::tokenizer::{Limit, TextStream, Tokenizer};
use bombus_jinja::parse_json;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

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
    /// No token that ends the text comes before there are so many.
    pub min_new_tokens: usize,
    /// At most this many tokens, prompt and all; the model's context is a limit too.
    pub max_context: Option<usize>,
    /// How long it may take, from its request to its end.
    pub timeout: Option<Duration>,
    /// Strings that end the text, and are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the text, and are not part of it.
    pub stop_ids: Vec<u32>,
    /// What the text must be; it ends with the text of that form. Needs a tokenizer.
    pub format: Option<Format>,
    /// Limits that it shares with other requests, within the model's.
    pub group: Option<Arc<Group>>,
}

impl Prompt {
    /// How long the text is that becomes tokens, before a template makes more of it.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Prompt::Ids(_) => 0,
            Prompt::Text(text) => text.len(),
            Prompt::Chat { messages, options } => messages.len() + options.len(),
        }
    }

    /// `special`: a text with the tokens that the tokenizer puts around it
    pub(super) fn ids(
        &self,
        tokenizer: Option<&Tokenizer>,
        special: bool,
        limit: &Limit,
    ) -> Result<Vec<u32>> {
        let tokenizer = || {
            let missing = "without a tokenizer only :token_ids can be completed";
            tokenizer.ok_or_else(|| Error::Request(missing.into()))
        };
        match self {
            Prompt::Ids(ids) => Ok(ids.clone()),
            Prompt::Text(text) => tokenizer()?.encode_within(text, special, limit),
            Prompt::Chat { messages, options } => {
                let (messages, options) = chat(messages, options)?;
                tokenizer()?.encode_chat(&messages, &options, limit)
            }
        }
    }
}

impl Request {
    pub fn new(prompt: Prompt, max_new_tokens: usize) -> Self {
        Self {
            prompt,
            tokenizer: None,
            adapter: None,
            sampling: Sampling::default(),
            max_new_tokens,
            min_new_tokens: 0,
            max_context: None,
            timeout: None,
            stop: vec![],
            stop_ids: vec![],
            format: None,
            group: None,
        }
    }

    /// What the scheduler is to do. `context`: the model's
    pub(super) fn task(
        &self,
        config: &Config,
        context: usize,
        cancelled: &AtomicBool,
    ) -> Result<Task> {
        let context = self.max_context.map_or(context, |max| max.min(context));
        let limit = Limit { tokens: context, cancelled };
        let ids = self.prompt.ids(self.tokenizer.as_deref(), true, &limit)?;
        check_ids(&ids, config, context)?;
        let biased = self.sampling.logit_bias.iter().map(|(id, _)| id);
        check_vocabulary(biased, config)?;
        let eos_token_ids = self.ends(config)?;
        Ok(Task {
            max_new_tokens: self.max_new_tokens.min(context - ids.len()),
            min_new_tokens: self.min_new_tokens,
            sampling: Arc::new(self.sampling.clone()),
            constraint: self.constraint(&eos_token_ids)?,
            eos_token_ids,
            group: self.group.as_ref().map(|group| group.limits()),
            prompt: ids,
        })
    }

    fn constraint(&self, ends: &[u32]) -> Result<Option<Constraint>> {
        let Some(format) = &self.format else { return Ok(None) };
        let tokenizer = self.tokenizer.as_ref().ok_or_else(|| {
            Error::Request("format: it needs a tokenizer, which says what tokens are".into())
        })?;
        Constraint::new(format, tokenizer, ends).map(Some)
    }

    /// The tokens that end the text: the model's, the tokenizer's, and those of the request. A
    /// stop string that is one special token is that token, which is no text.
    fn ends(&self, config: &Config) -> Result<Vec<u32>> {
        check_vocabulary(&self.stop_ids, config)?;
        let mut ends = config.eos_token_ids.clone();
        if let Some(tokenizer) = &self.tokenizer {
            let special = self.stop.iter().filter_map(|stop| tokenizer.special_token_id(stop));
            let own = special.chain(tokenizer.eos_token_id());
            // The tokenizer may have more tokens than the model.
            ends.extend(own.filter(|id| (*id as usize) < config.spec.vocab));
        }
        ends.extend(&self.stop_ids);
        Ok(ends)
    }

    /// The text that is to follow a prompt.
    pub(super) fn text(&self, prompt: &[u32]) -> Option<TextStream> {
        let mut text = TextStream::new(self.tokenizer.clone()?, self.stop.clone());
        text.follow(prompt);
        Some(text)
    }
}

/// A conversation and the options of its template, both as JSON.
pub fn chat(messages: &str, options: &str) -> Result<(Value, Map<String, Value>)> {
    let messages = parse_json("messages", messages).map_err(Error::Request)?;
    Ok((messages, parse_json("template options", options).map_err(Error::Request)?))
}

pub(super) fn check_ids(ids: &[u32], config: &Config, context: usize) -> Result<()> {
    if ids.is_empty() {
        return Err(Error::Request("the prompt has no tokens".into()));
    }
    check_vocabulary(ids, config)?;
    if ids.len() > context {
        let count = ids.len();
        return Err(Error::PromptTooLong(format!(
            "{count} tokens, where the context is {context}"
        )));
    }
    Ok(())
}

pub(super) fn check_vocabulary<'a>(
    ids: impl IntoIterator<Item = &'a u32>,
    config: &Config,
) -> Result<()> {
    let vocab = config.spec.vocab;
    match ids.into_iter().find(|id| **id as usize >= vocab) {
        None => Ok(()),
        Some(id) => Err(Error::Request(format!(
            "the token id {id} is outside the vocabulary of {vocab} tokens"
        ))),
    }
}
