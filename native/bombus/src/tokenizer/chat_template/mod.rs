//! Chat templates, given what transformers gives them and rendered as it renders them.

mod content;
mod conversation;
mod templates;
#[cfg(test)]
mod tests;

pub use templates::ChatTemplates;

use crate::error::{Error, Result};
use bombus_jinja::Template;
use content::Contents;
use conversation::Conversation;
use serde_json::{Map, Value as Json};
use std::path::Path;

/// One template, read.
pub struct ChatTemplate {
    source: String,
    template: Template,
    contents: Contents,
}

impl ChatTemplate {
    pub fn new(path: &Path, source: String) -> Result<Self> {
        let template = Template::new(&source).map_err(|fault| {
            let path = path.display();
            Error::Tokenizer(format!("`{path}`: the chat template is not valid: {fault}"))
        })?;
        Ok(Self { source, template, contents: Contents::default() })
    }

    fn render(
        &self,
        special_tokens: &Map<String, Json>,
        messages: &Json,
        options: &Map<String, Json>,
    ) -> Result<String> {
        let messages = self.contents.shape(messages, &|short| self.show(special_tokens, short));
        let conversation = Conversation::new(&self.source, messages, options)?;
        let text = self.template.render(&[special_tokens, conversation.names()]);
        conversation.finish(text.map_err(|fault| {
            Error::Request(format!("the chat template refuses these messages: {fault}"))
        })?)
    }

    /// A short conversation; `None` where the template refuses it.
    fn show(&self, special_tokens: &Map<String, Json>, messages: Vec<Json>) -> Option<String> {
        let conversation = Conversation::new(&self.source, messages, &Map::new()).ok()?;
        self.template.render_short(&[special_tokens, conversation.names()]).ok()
    }
}
