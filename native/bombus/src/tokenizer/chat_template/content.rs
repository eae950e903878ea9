//! Whether a template takes a message's content as a text, as a list of typed parts, or as either.
//!
//! Templates of vision-language models read `part.text` of each part and write nothing for a text;
//! most others do the opposite. Nothing in a template says which, so small conversations are
//! rendered, as llama.cpp and vLLM do.

use serde_json::{Value as Json, json};
use std::sync::OnceLock;

/// The text of those conversations. No filter for upper or lower case changes digits.
const NEEDLE: &str = "4815162342";

/// The contents that a template shows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Content {
    Text,
    Parts,
    Either,
}

/// Messages of any other role are shown as a user's.
const ROLES: [&str; 5] = ["user", "system", "developer", "assistant", "tool"];

/// What is found out of a template, by role.
#[derive(Default)]
pub struct Contents([OnceLock<Content>; ROLES.len()]);

/// Renders messages; `None` where the template refuses them.
pub type Render<'a> = &'a dyn Fn(Vec<Json>) -> Option<String>;

impl Contents {
    /// The messages, each content in a form that the template shows.
    pub fn shape(&self, messages: &Json, render: Render) -> Vec<Json> {
        let shape = |message: &Json| {
            let mut message = message.clone();
            let role = message.get("role").and_then(Json::as_str).unwrap_or_default().to_owned();
            if let Some(content) = message.get_mut("content").filter(|it| is_text(it)) {
                shape_content(content, self.of(&role, render));
            }
            message
        };
        messages.as_array().into_iter().flatten().map(shape).collect()
    }

    fn of(&self, role: &str, render: Render) -> Content {
        let place = ROLES.iter().position(|known| *known == role).unwrap_or(0);
        *self.0[place].get_or_init(|| self.find(ROLES[place], render))
    }

    fn find(&self, role: &str, render: Render) -> Content {
        if role == "user" {
            return probe(|it| render(vec![message(role, it)])).unwrap_or(Content::Text);
        }
        let user = self.of("user", render);
        let mut text = "1".into();
        shape_content(&mut text, user);
        let user_message = || message("user", text.clone());
        let found = probe(|it| {
            render(match role {
                "assistant" => vec![user_message(), message(role, it)],
                "tool" => vec![user_message(), call(), message(role, it)],
                _system => vec![message(role, it), user_message()],
            })
        });
        found.unwrap_or(if user == Content::Parts { user } else { Content::Text })
    }
}

/// A text, or a list of parts that are texts.
fn is_text(content: &Json) -> bool {
    match content {
        Json::String(_) => true,
        Json::Array(parts) => parts.iter().all(|part| part_text(part).is_some()),
        _other => false,
    }
}

fn part_text(part: &Json) -> Option<&str> {
    let is_text = part.get("type").is_some_and(|kind| kind == "text");
    part.get("text").filter(|_| is_text)?.as_str()
}

fn shape_content(content: &mut Json, form: Content) {
    match (&*content, form) {
        (Json::String(text), Content::Parts) => *content = parts(text),
        (Json::Array(parts), Content::Text) => {
            *content = parts.iter().filter_map(part_text).collect::<String>().into();
        }
        _as_it_is => {}
    }
}

fn parts(text: &str) -> Json {
    json!([{"type": "text", "text": text}])
}

fn message(role: &str, content: Json) -> Json {
    json!({"role": role, "content": content})
}

/// What a tool's message follows.
fn call() -> Json {
    let call =
        json!({"id": "call12345", "type": "function", "function": {"name": "f", "arguments": {}}});
    json!({"role": "assistant", "content": "", "tool_calls": [call]})
}

/// `render`: the conversation with this content in it; `None` where it shows neither
fn probe(render: impl Fn(Json) -> Option<String>) -> Option<Content> {
    let shows = |content: Json| {
        render(content).is_some_and(|text| text.contains(NEEDLE) && !writes_the_list(&text))
    };
    match (shows(NEEDLE.into()), shows(parts(NEEDLE))) {
        (true, true) => Some(Content::Either),
        (false, true) => Some(Content::Parts),
        (true, false) => Some(Content::Text),
        (false, false) => None,
    }
}

/// Whether the list itself is in the text, as Python or JSON writes it.
fn writes_the_list(text: &str) -> bool {
    let before = text.split(NEEDLE).next().unwrap_or_default();
    let name = before.trim_end_matches(['\'', '"', '\\', ':', ' ']);
    before.ends_with(['\'', '"']) && name.len() < before.len() && name.ends_with("text")
}
