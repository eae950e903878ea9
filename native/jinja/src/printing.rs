//! Values as text: Python's `str` and `repr`.

use super::fault::Outcome;
use super::limits::Limits;
use super::value::{Dict, List, Value};
use std::fmt::Write;
use unicode_general_category::{GeneralCategory, get_general_category};

/// Text that is counted while it grows.
pub struct Writer<'a> {
    pub limits: &'a Limits,
    pub text: String,
}

impl<'a> Writer<'a> {
    pub fn new(limits: &'a Limits) -> Self {
        Self { limits, text: String::new() }
    }

    pub fn push(&mut self, text: &str) -> Outcome<()> {
        self.limits.bytes(text.len())?;
        self.text.push_str(text);
        Ok(())
    }

    pub fn repeat(&mut self, text: &str, times: usize) -> Outcome<()> {
        self.limits.bytes(text.len().saturating_mul(times))?;
        (0..times).for_each(|_| self.text.push_str(text));
        Ok(())
    }

    pub fn str(&mut self, value: &Value) -> Outcome<()> {
        match value {
            Value::Text(text) => self.push(text),
            Value::Undefined(_) => Ok(()),
            other => self.repr(other),
        }
    }

    pub fn repr(&mut self, value: &Value) -> Outcome<()> {
        let limits = self.limits;
        let _level = limits.enter()?;
        match value {
            Value::Undefined(_) => self.push("Undefined"),
            Value::None => self.push("None"),
            Value::Bool(true) => self.push("True"),
            Value::Bool(false) => self.push("False"),
            Value::Int(value) => self.push(&value.to_string()),
            Value::Float(value) => self.push(&float(*value)),
            Value::Text(text) if text.safe => self.push(&format!("Markup({})", quoted(text))),
            Value::Text(text) => self.push(&quoted(text)),
            Value::List(list) => self.list("[", list, "]"),
            Value::Tuple(list) if list.items.len() == 1 => self.list("(", list, ",)"),
            Value::Tuple(list) => self.list("(", list, ")"),
            Value::Dict(dict) => self.dict(dict),
            Value::View(name, list) => {
                self.push(name)?;
                self.list("([", list, "])")
            }
            Value::Range(range) if range.step == 1 => {
                self.push(&format!("range({}, {})", range.start, range.stop))
            }
            Value::Range(range) => {
                self.push(&format!("range({}, {}, {})", range.start, range.stop, range.step))
            }
            Value::Namespace(namespace) => {
                self.push("<Namespace {")?;
                let fields = namespace.fields.borrow();
                self.separated(fields.iter(), |writer, (name, value)| {
                    writer.push(&quoted(name))?;
                    writer.push(": ")?;
                    writer.repr(value)
                })?;
                self.push("}>")
            }
            Value::Macro(closure) => {
                self.push(&format!("<Macro {}>", quoted(&closure.definition.name)))
            }
            Value::Loop(each) => self.push(&format!(
                "<LoopContext {}/{}>",
                each.index.get() + 1,
                each.items.items.len()
            )),
            other => self.push(&format!("<{}>", other.type_name())),
        }
    }

    fn list(&mut self, open: &str, list: &List, close: &str) -> Outcome<()> {
        self.push(open)?;
        self.separated(list.items.iter(), |writer, item| writer.repr(item))?;
        self.push(close)
    }

    fn dict(&mut self, dict: &Dict) -> Outcome<()> {
        self.push("{")?;
        self.separated(dict.entries.values(), |writer, (key, value)| {
            writer.repr(key)?;
            writer.push(": ")?;
            writer.repr(value)
        })?;
        self.push("}")
    }

    fn separated<T>(
        &mut self,
        items: impl Iterator<Item = T>,
        mut write: impl FnMut(&mut Self, T) -> Outcome<()>,
    ) -> Outcome<()> {
        for (index, item) in items.enumerate() {
            if index > 0 {
                self.push(", ")?;
            }
            write(self, item)?;
        }
        Ok(())
    }
}

pub fn str(limits: &Limits, value: &Value) -> Outcome<String> {
    let mut writer = Writer::new(limits);
    writer.str(value)?;
    Ok(writer.text)
}

pub fn repr(limits: &Limits, value: &Value) -> Outcome<String> {
    let mut writer = Writer::new(limits);
    writer.repr(value)?;
    Ok(writer.text)
}

/// The shortest digits that are the same number, as Python lays them out.
pub fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{value}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// A string as Python writes it in its source.
pub fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut result = String::with_capacity(text.len() + 2);
    result.push(quote);
    for c in text.chars() {
        match c {
            '\\' => result.push_str("\\\\"),
            '\n' => result.push_str("\\n"),
            '\r' => result.push_str("\\r"),
            '\t' => result.push_str("\\t"),
            c if c == quote => result.extend(['\\', c]),
            ' '..='~' => result.push(c),
            c if is_printable(c) => result.push(c),
            c => push_escape(&mut result, c),
        }
    }
    result.push(quote);
    result
}

pub fn push_escape(result: &mut String, c: char) {
    // Writing to a string cannot fail.
    _ = match c as u32 {
        code @ ..=0xff => write!(result, "\\x{code:02x}"),
        code @ ..=0xffff => write!(result, "\\u{code:04x}"),
        code => write!(result, "\\U{code:08x}"),
    };
}

pub fn is_printable(c: char) -> bool {
    use GeneralCategory::{
        Control, Format, LineSeparator, ParagraphSeparator, PrivateUse, SpaceSeparator, Surrogate,
        Unassigned,
    };
    c == ' '
        || !matches!(
            get_general_category(c),
            Control
                | Format
                | LineSeparator
                | ParagraphSeparator
                | PrivateUse
                | SpaceSeparator
                | Surrogate
                | Unassigned
        )
}
