//! What a template is given: messages and options, as transformers' `apply_chat_template` hands
//! them over.

use crate::error::{Error, Result};
use bombus_jinja::{is_space, strip_end};
use serde_json::{Map, Value as Json};

/// What marks the end of a message that is to be continued, as in transformers.
const END: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Names of a message's reasoning. The first is the one that most templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

pub struct Conversation {
    names: Map<String, Json>,
    /// The text that is to be continued.
    continued: Option<String>,
}

impl Conversation {
    pub fn new(template: &str, messages: Vec<Json>, options: &Map<String, Json>) -> Result<Self> {
        let mut names = Map::new();
        names.insert("tools".into(), Json::Null);
        names.insert("documents".into(), Json::Null);
        names.extend(options.clone());
        names.remove("chat_template");
        let field = continued_field(&mut names)?;
        let mut messages: Vec<Json> = messages.into_iter().map(message).collect();
        let continued = match (field, messages.last_mut()) {
            (Some(field), Some(last)) => Some(mark(template, last, &field)?),
            _not_asked => None,
        };
        let begins_answer = names.get("add_generation_prompt").cloned();
        let begins_answer = begins_answer.unwrap_or_else(|| continued.is_none().into());
        names.insert("messages".into(), messages.into());
        names.insert("add_generation_prompt".into(), begins_answer);
        Ok(Self { names, continued })
    }

    pub fn names(&self) -> &Map<String, Json> {
        &self.names
    }

    /// Cuts the text behind the message that is to be continued.
    pub fn finish(&self, text: String) -> Result<String> {
        let Some(continued) = &self.continued else { return Ok(text) };
        let end =
            text.rfind(END.trim_end()).filter(|_| text.contains(continued.trim_matches(is_space)));
        let Some(end) = end else {
            return Err(Error::Request(
                "the chat template changes the last message, so it cannot be continued: leave \
                 `continue_final_message` out"
                    .into(),
            ));
        };
        let kept = &text[..end];
        // A template that trims the message takes the mark's last space away, and the message's.
        Ok(if text[end..].starts_with(END) { kept } else { strip_end(kept) }.to_owned())
    }
}

/// `continue_final_message: true`, or the name of the field to continue.
fn continued_field(names: &mut Map<String, Json>) -> Result<Option<String>> {
    let field = match names.remove("continue_final_message") {
        None | Some(Json::Null | Json::Bool(false)) => return Ok(None),
        Some(Json::Bool(true)) => "content".to_owned(),
        Some(Json::String(field)) => field,
        Some(other) => {
            let expected = "expected `continue_final_message` to be true, false or a field's name";
            return Err(Error::Request(format!("{expected}, got: {other}")));
        }
    };
    if names.get("add_generation_prompt").is_some_and(|begin| begin != &Json::Bool(false)) {
        let text = "`continue_final_message` continues the last message, and \
                    `add_generation_prompt` begins another: give one of them";
        return Err(Error::Request(text.into()));
    }
    Ok(Some(field))
}

/// As transformers: fields that are null are left out, and a message's reasoning is there under
/// both names that templates read.
fn message(message: Json) -> Json {
    let Json::Object(mut fields) = message else { return message };
    fields.retain(|_, value| !value.is_null());
    if let Some(reasoning) = REASONING.iter().find_map(|name| fields.get(*name)).cloned() {
        let mut all = Map::new();
        all.insert("thinking".into(), reasoning.clone());
        all.extend(fields);
        all.insert("reasoning_content".into(), reasoning);
        fields = all;
    }
    fields.into()
}

/// Marks the end of a field; -> its text
fn mark(template: &str, message: &mut Json, field: &str) -> Result<String> {
    let wrong = |text: String| Err(Error::Request(text));
    let Some(text) = message.get_mut(field).and_then(last_text).cloned() else {
        return wrong(format!("the last message has no text `{field}` to continue"));
    };
    let mut fields = vec![field];
    if REASONING.contains(&field) {
        fields = REASONING.into_iter().filter(|name| message[*name] == message[field]).collect();
    }
    if !fields.iter().any(|field| template.contains(field)) {
        return wrong(format!("the chat template knows no `{field}`, so it cannot be continued"));
    }
    for field in fields {
        if let Some(text) = message.get_mut(field).and_then(last_text) {
            text.push_str(END);
        }
    }
    Ok(text)
}

/// A text, or that of the last part that has one.
fn last_text(content: &mut Json) -> Option<&mut String> {
    match content {
        Json::String(text) => Some(text),
        Json::Array(parts) => {
            let texts = parts.iter_mut().rev().filter_map(|part| part.get_mut("text"));
            texts
                .filter_map(|text| if let Json::String(text) = text { Some(text) } else { None })
                .next()
        }
        _other => None,
    }
}
