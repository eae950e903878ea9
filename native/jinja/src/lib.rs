//! Jinja2 templates that come from strangers, rendered as Python renders them, within bounds.
//!
//! A chat template is a program that comes with a model from the Hub, and nobody has read it. It is
//! written for Jinja2 3.1 as transformers sets it up (sandboxed, blocks trimmed, loop controls,
//! `{% generation %}`, `tojson`, `strftime_now`), and it expects Python's values: `None`, integers
//! that do not wrap, strings with Python's methods.
//!
//! What a rendering may take is bounded: the source's length and depth, the steps, the depth of
//! values and calls, the bytes of all texts, the stack (`limits`). This is why the crate exists. In
//! minijinja 3.1, with fuel, a list that holds itself twice, forty times over, is compared or printed
//! for ever; a namespace that holds itself, lists within lists, and 60,000 signs before a number each
//! end the process with a stack overflow. No hook of its environment reaches these places.
//!
//! A source goes through `lexer` and `parser` to a tree (`ast`), which `eval` walks; `value` and
//! what uses it is Python. Nothing here knows of chats or files.

mod ast;
mod checks;
mod compare;
mod eval;
mod fault;
mod filters;
mod format;
mod functions;
mod given;
mod json;
mod json_text;
mod lexer;
mod limits;
mod lists;
mod markup;
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
mod time;
mod value;

pub use fault::Fault;
pub use json_text::parse as parse_json;
pub use strings::{is_space, strip_end};

use ast::{Body, Name};
use fault::Outcome;
use limits::{Limits, on_stack};
use serde_json::{Map, Value as Json};
use value::Value;

/// Bytes that a template may have. Those of real models have up to 60 kB.
pub const SOURCE: usize = 1 << 20;

/// A template, read.
pub struct Template {
    body: Body,
    names: Vec<String>,
}

impl Template {
    /// Fails where the source is no template, is longer than [`SOURCE`] or nests too deep.
    pub fn new(source: &str) -> Result<Self, Fault> {
        if source.len() > SOURCE {
            return Err(Fault::new(format!("it is larger than {} MiB", SOURCE >> 20)));
        }
        let body = on_stack(|| parser::parse(source))?;
        let unknown = |name: &Name| !functions::NAMES.contains(&&**name);
        let names = names::undeclared(&body).into_iter().filter(unknown);
        let names = names.map(|name| name.to_string()).collect();
        Ok(Self { body, names })
    }

    /// The names that it takes from outside, in their order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The text where these names have these values; of a name that comes twice, the last counts.
    /// Its steps and bytes are bounded by a constant and the size of the values.
    pub fn render(&self, names: &[&Map<String, Json>]) -> Result<String, Fault> {
        self.render_within(names, || Limits::new(names.iter().map(|names| size_of(names)).sum()))
    }

    /// The same, for values that are small: it gives up sooner.
    pub fn render_short(&self, names: &[&Map<String, Json>]) -> Result<String, Fault> {
        self.render_within(names, Limits::short)
    }

    fn render_within(
        &self,
        names: &[&Map<String, Json>],
        limits: impl FnOnce() -> Limits + Send,
    ) -> Result<String, Fault> {
        on_stack(|| {
            let limits = limits();
            let value = |(name, json): (&String, &Json)| {
                Ok((Name::from(&name[..]), Value::from_json(&limits, json)?))
            };
            let names = names.iter().copied().flatten().map(value).collect::<Outcome<_>>()?;
            eval::render(&self.body, limits, names)
        })
    }
}

/// About how many bytes a value has.
fn size(json: &Json) -> usize {
    match json {
        Json::String(text) => text.len() + 2,
        Json::Array(items) => 2 + items.iter().map(size).sum::<usize>(),
        Json::Object(fields) => 2 + size_of(fields),
        _scalar => 8,
    }
}

fn size_of(fields: &Map<String, Json>) -> usize {
    fields.iter().map(|(name, value)| name.len() + 3 + size(value)).sum()
}
