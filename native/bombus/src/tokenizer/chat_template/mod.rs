//! Chat templates, rendered as transformers renders them.
//!
//! A template is a program that comes with a model from the Hub, so all that it may take is
//! bounded: its source, its depth, its steps, its text (`limits`). An engine for templates whose
//! authors are trusted cannot do that from outside: in minijinja a list that holds a list twice,
//! forty times over, is compared, printed or hashed for ever, and lists in lists end in a stack
//! overflow. It also has Rust's values where transformers' templates expect Python's. So this
//! is an interpreter of its own: `lexer` and `parser` follow Jinja2's, `value` and what uses it
//! Python. Text goes through `lexer`, `parser`, and `eval`; nothing else knows about files.

mod ast;
mod checks;
mod compare;
mod conversation;
mod eval;
mod fault;
mod filters;
mod format;
mod functions;
mod given;
mod json;
mod lexer;
mod limits;
mod lists;
mod member;
mod methods;
mod names;
mod numbers;
mod operators;
mod parser;
mod pretty;
mod printing;
mod scope;
mod strings;
mod templates;
#[cfg(test)]
mod tests;
mod time;
mod value;

pub use templates::ChatTemplates;

use crate::error::{Error, Result};
use ast::{Body, Name};
use conversation::Conversation;
use fault::{Fault, Outcome};
use limits::{Limits, on_stack};
use serde_json::{Map, Value as Json};
use std::path::Path;
use value::Value;

/// Bytes that a template may have. Those of real models have up to 60 kB.
const SOURCE: usize = 1 << 20;

/// One template, read.
pub struct ChatTemplate {
    source: String,
    body: Body,
    /// The names that it takes from outside.
    names: Vec<Name>,
}

impl ChatTemplate {
    pub fn new(path: &Path, source: String) -> Result<Self> {
        let path = path.display();
        let wrong =
            |text| Error::Tokenizer(format!("`{path}`: the chat template is not valid: {text}"));
        if source.len() > SOURCE {
            return Err(wrong(format!("it is larger than {} MiB", SOURCE >> 20)));
        }
        let parsed =
            on_stack(|| parser::parse(&source)).map_err(|error| wrong(error.to_string()))?;
        let body = parsed.map_err(|fault| wrong(fault.to_string()))?;
        let known = |name: &Name| functions::NAMES.contains(&&**name);
        let names = names::undeclared(&body).into_iter().filter(|name| !known(name)).collect();
        Ok(Self { source, body, names })
    }

    fn render(
        &self,
        special_tokens: &Map<String, Json>,
        messages: &Json,
        options: &Map<String, Json>,
    ) -> Result<String> {
        let conversation = Conversation::new(&self.source, messages, options)?;
        let rendered = on_stack(|| self.rendered(special_tokens, &conversation));
        let rendered = rendered.map_err(|error| Error::Tokenizer(error.to_string()))?;
        let text = rendered.map_err(|fault: Fault| {
            Error::Request(format!("the chat template refuses these messages: {fault}"))
        })?;
        conversation.finish(text)
    }

    fn rendered(
        &self,
        special_tokens: &Map<String, Json>,
        conversation: &Conversation,
    ) -> Outcome<String> {
        let limits = Limits::new(conversation.size());
        let mut names = vec![];
        for (name, json) in special_tokens.iter().chain(conversation.names()) {
            names.push((Name::from(&name[..]), Value::from_json(&limits, json)?));
        }
        eval::render(&self.body, limits, names)
    }
}
