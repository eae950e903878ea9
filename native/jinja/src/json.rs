//! The filter `tojson` of transformers: Python's `json.dumps`.

use super::compare;
use super::fault::{Outcome, fail};
use super::limits::Limits;
use super::printing::{self, Writer};
use super::value::{Dict, Value};
use std::fmt::Write;

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`
pub struct Layout {
    pub ensure_ascii: bool,
    pub indent: Option<String>,
    /// Between items, and behind a key.
    pub separators: (String, String),
    pub sort_keys: bool,
}

pub fn dumps(limits: &Limits, value: &Value, layout: &Layout) -> Outcome<String> {
    let mut json = Json { writer: Writer::new(limits), layout, level: 0 };
    json.value(value)?;
    Ok(json.writer.text)
}

struct Json<'a> {
    writer: Writer<'a>,
    layout: &'a Layout,
    level: usize,
}

impl Json<'_> {
    fn value(&mut self, value: &Value) -> Outcome<()> {
        let limits = self.writer.limits;
        let _level = limits.enter()?;
        match value {
            Value::Text(text) => self.text(text),
            Value::Dict(dict) => self.dict(dict),
            Value::List(list) | Value::Tuple(list) => {
                self.items("[", &list.items, "]", |json, item| json.value(item))
            }
            other => match scalar(other) {
                Some(text) => self.writer.push(&text),
                None => fail!("Object of type {} is not JSON serializable", other.type_name()),
            },
        }
    }

    fn dict(&mut self, dict: &Dict) -> Outcome<()> {
        let mut pairs: Vec<_> = dict.entries.values().collect();
        if self.layout.sort_keys {
            let keys: Vec<_> = pairs.iter().map(|(key, _)| key.clone()).collect();
            let places = compare::sorted(self.writer.limits, &keys, false)?;
            pairs = places.into_iter().map(|place| pairs[place]).collect();
        }
        self.items("{", &pairs, "}", |json, (key, value)| {
            match key {
                Value::Text(text) => json.text(text)?,
                other => match scalar(other) {
                    Some(text) => json.text(&text)?,
                    None => fail!("a key of JSON cannot be a {}", other.type_name()),
                },
            }
            let layout = json.layout;
            json.writer.push(&layout.separators.1)?;
            json.value(value)
        })
    }

    fn items<T>(
        &mut self,
        open: &str,
        items: &[T],
        close: &str,
        mut write: impl FnMut(&mut Self, &T) -> Outcome<()>,
    ) -> Outcome<()> {
        let layout = self.layout;
        self.writer.push(open)?;
        if items.is_empty() {
            return self.writer.push(close);
        }
        self.level += 1;
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.writer.push(&layout.separators.0)?;
            }
            self.line()?;
            write(self, item)?;
        }
        self.level -= 1;
        self.line()?;
        self.writer.push(close)
    }

    fn line(&mut self) -> Outcome<()> {
        let Some(indent) = &self.layout.indent else { return Ok(()) };
        self.writer.push("\n")?;
        self.writer.repeat(indent, self.level)
    }

    fn text(&mut self, text: &str) -> Outcome<()> {
        let escaped = escaped(text, self.layout.ensure_ascii);
        self.writer.push(&escaped)
    }
}

fn scalar(value: &Value) -> Option<String> {
    Some(match value {
        Value::None => "null".into(),
        Value::Bool(true) => "true".into(),
        Value::Bool(false) => "false".into(),
        Value::Int(value) => value.to_string(),
        Value::Float(value) if value.is_nan() => "NaN".into(),
        Value::Float(value) if value.is_infinite() => {
            if *value > 0.0 {
                "Infinity".into()
            } else {
                "-Infinity".into()
            }
        }
        Value::Float(value) => printing::float(*value),
        _other => return None,
    })
}

fn escaped(text: &str, ascii: bool) -> String {
    let mut result = String::with_capacity(text.len() + 2);
    result.push('"');
    for c in text.chars() {
        match c {
            '"' => result.push_str("\\\""),
            '\\' => result.push_str("\\\\"),
            '\n' => result.push_str("\\n"),
            '\r' => result.push_str("\\r"),
            '\t' => result.push_str("\\t"),
            '\u{8}' => result.push_str("\\b"),
            '\u{c}' => result.push_str("\\f"),
            c if c < ' ' || (ascii && c > '~') => push_units(&mut result, c),
            c => result.push(c),
        }
    }
    result.push('"');
    result
}

fn push_units(result: &mut String, c: char) {
    for unit in c.encode_utf16(&mut [0; 2]) {
        // Writing to a string cannot fail.
        _ = write!(result, "\\u{unit:04x}");
    }
}
