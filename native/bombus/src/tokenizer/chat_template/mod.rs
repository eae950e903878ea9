//! Chat templates, given what transformers gives them and rendered as it renders them.

mod conversation;
mod templates;
#[cfg(test)]
mod tests;

pub use templates::ChatTemplates;

use crate::error::{Error, Result};
use bombus_jinja::Template;
use conversation::Conversation;
use serde_json::{Map, Value as Json};
use std::path::Path;

/// One template, read.
pub struct ChatTemplate {
    source: String,
    template: Template,
}

impl ChatTemplate {
    pub fn new(path: &Path, source: String) -> Result<Self> {
        let template = Template::new(&source).map_err(|fault| {
            let path = path.display();
            Error::Tokenizer(format!("`{path}`: the chat template is not valid: {fault}"))
        })?;
        Ok(Self { source, template })
    }

    fn render(
        &self,
        special_tokens: &Map<String, Json>,
        messages: &Json,
        options: &Map<String, Json>,
    ) -> Result<String> {
        let conversation = Conversation::new(&self.source, messages, options)?;
        let text = self.template.render(&[special_tokens, conversation.names()]);
        conversation.finish(text.map_err(|fault| {
            Error::Request(format!("the chat template refuses these messages: {fault}"))
        })?)
    }
}
