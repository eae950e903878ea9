//! Text that is marked as safe HTML, by `safe` or `escape`: what is added to it is escaped, as by
//! MarkupSafe 3's `Markup`. Templates of prompts mark texts too.

use super::fault::{Outcome, fail};
use super::format;
use super::given::Given;
use super::limits::Limits;
use super::printing::{self, Writer};
use super::strings;
use super::value::{Text, Value};

/// A text with its HTML escaped.
pub fn escape(limits: &Limits, text: &str) -> Outcome<String> {
    let mut writer = Writer::new(limits);
    for c in text.chars() {
        match c {
            '&' => writer.push("&amp;")?,
            '<' => writer.push("&lt;")?,
            '>' => writer.push("&gt;")?,
            '"' => writer.push("&#34;")?,
            '\'' => writer.push("&#39;")?,
            c => writer.push(c.encode_utf8(&mut [0; 4]))?,
        }
    }
    Ok(writer.text)
}

/// A value as safe text: what is safe already stays.
pub fn escaped(limits: &Limits, value: &Value) -> Outcome<Text> {
    match value {
        Value::Text(text) if text.safe => Ok(text.clone()),
        value => Ok(Text::safe(escape(limits, &printing::str(limits, value)?)?)),
    }
}

/// `left + right`
pub fn add(limits: &Limits, left: &Text, right: &Text) -> Outcome<Value> {
    let mut writer = Writer::new(limits);
    let safe = left.safe || right.safe;
    for part in [left, right] {
        match safe && !part.safe {
            true => writer.push(&escape(limits, part)?)?,
            false => writer.push(part)?,
        }
    }
    Ok(Value::Text(Text { text: writer.text.into(), safe }))
}

/// A method of safe text.
pub fn call(limits: &Limits, text: &Text, name: &str, mut given: Given) -> Outcome<Value> {
    match name {
        "join" => {
            let items = given.one()?.items(limits)?;
            let items = items.items.iter().map(|item| escaped(limits, item).map(Value::Text));
            let items = Value::list(limits, items.collect::<Outcome<_>>()?)?;
            given = Given { positional: vec![items], keywords: vec![] };
        }
        "replace" | "ljust" | "rjust" | "center" => {
            if let Some(added @ Value::Text(_)) = given.positional.get_mut(1) {
                *added = Value::Text(escaped(limits, added)?);
            }
        }
        _other => {}
    }
    let result = match name {
        "format" => format::braces(limits, text, &given, true)?,
        "format_map" => {
            let Value::Dict(dict) = given.one()? else { fail!("`format_map` takes a dict") };
            format::map(limits, text, &dict, true)?
        }
        _other => strings::call(limits, text, name, given)?,
    };
    marked(limits, result)
}

/// Text, or a sequence of texts, as safe.
pub fn marked(limits: &Limits, value: Value) -> Outcome<Value> {
    let all = |items: &[Value]| {
        items.iter().map(|item| marked(limits, item.clone())).collect::<Outcome<Vec<_>>>()
    };
    Ok(match &value {
        Value::Text(text) => Value::Text(Text { safe: true, ..text.clone() }),
        Value::List(list) => Value::list(limits, all(&list.items)?)?,
        Value::Tuple(list) => Value::tuple(limits, all(&list.items)?)?,
        _other => value,
    })
}
