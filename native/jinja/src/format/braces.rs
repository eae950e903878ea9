//! `'{}'.format(x)`

use super::super::fault::{Outcome, fail};
use super::super::given::Given;
use super::super::limits::Limits;
use super::super::markup;
use super::super::member;
use super::super::printing::{self, Writer};
use super::super::value::{Dict, Value};
use super::{Spec, ascii, digits, laid_out, number};

/// `template.format(...)`
pub fn braces(limits: &Limits, template: &str, given: &Given, escapes: bool) -> Outcome<Value> {
    let named = |name: &str| {
        let mut keywords = given.keywords.iter();
        keywords.find(|(known, _)| **known == *name).map(|(_, value)| value.clone())
    };
    let source = Source { positional: &given.positional, named: &named, escapes };
    filled(limits, template, &source)
}

pub fn map(limits: &Limits, template: &str, dict: &Dict, escapes: bool) -> Outcome<Value> {
    let named = |name: &str| dict.get_text(&name.into()).cloned();
    filled(limits, template, &Source { positional: &[], named: &named, escapes })
}

struct Source<'a> {
    positional: &'a [Value],
    named: &'a dyn Fn(&str) -> Option<Value>,
    /// Whether each field is escaped, but for safe text.
    escapes: bool,
}

fn filled(limits: &Limits, template: &str, source: &Source) -> Outcome<Value> {
    limits.steps(template.len())?;
    let mut writer = Writer::new(limits);
    fill(&mut writer, template, source, &mut 0, 3)?;
    Ok(Value::Text(writer.text.into()))
}

/// `next`: the number of the next field without one; `nesting`: fields may stand in fields' specs
fn fill(
    writer: &mut Writer,
    template: &str,
    source: &Source,
    next: &mut usize,
    nesting: usize,
) -> Outcome<()> {
    if nesting == 0 {
        fail!("Max string recursion exceeded");
    }
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        writer.push(&rest[..at])?;
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            writer.push(brace)?;
            rest = after;
        } else if brace == "}" {
            fail!("Single '}}' encountered in format string");
        } else {
            let Some(end) = field_end(rest) else { fail!("expected '}}' before end of string") };
            field(writer, &rest[..end], source, next, nesting)?;
            rest = &rest[end + 1..];
        }
    }
    writer.push(rest)
}

fn field_end(text: &str) -> Option<usize> {
    let mut open = 0;
    text.char_indices().find_map(|(at, c)| {
        match c {
            '{' => open += 1,
            '}' if open == 0 => return Some(at),
            '}' => open -= 1,
            _other => {}
        }
        None
    })
}

fn field(
    writer: &mut Writer,
    field: &str,
    source: &Source,
    next: &mut usize,
    nesting: usize,
) -> Outcome<()> {
    let limits = writer.limits;
    let name_end = name_end(field);
    let (name, rest) = field.split_at(name_end);
    let (conversion, spec) = match rest.strip_prefix('!') {
        Some(rest) => {
            let (conversion, spec) = rest.split_once(':').unwrap_or((rest, ""));
            (Some(conversion), spec)
        }
        None => (None, rest.strip_prefix(':').unwrap_or("")),
    };
    let mut value = field_value(limits, name, source, next)?;
    let mut inner = Writer::new(limits);
    fill(&mut inner, spec, source, next, nesting - 1)?;
    value = match conversion {
        None => value,
        Some("s") => Value::Text(printing::str(limits, &value)?.into()),
        Some("r") => Value::Text(printing::repr(limits, &value)?.into()),
        Some("a") => Value::Text(ascii(&printing::repr(limits, &value)?).into()),
        Some(other) => fail!("Unknown conversion specifier {other}"),
    };
    match &value {
        Value::Text(text) if source.escapes && text.safe => {
            if !inner.text.is_empty() {
                fail!("Unsupported format specification for Markup.");
            }
            writer.push(text)
        }
        value if source.escapes => {
            let mut field = Writer::new(limits);
            formatted(&mut field, value, &inner.text)?;
            writer.push(&markup::escape(limits, &field.text)?)
        }
        value => formatted(writer, value, &inner.text),
    }
}

/// A name ends at `!` or `:`, but not in brackets.
fn name_end(field: &str) -> usize {
    let mut inside = false;
    let found = field.char_indices().find(|&(_, c)| {
        inside = (inside || c == '[') && c != ']';
        !inside && matches!(c, '!' | ':')
    });
    found.map_or(field.len(), |(at, _)| at)
}

/// `0`, `name`, `0.attribute`, `name[key]`
fn field_value(limits: &Limits, name: &str, source: &Source, next: &mut usize) -> Outcome<Value> {
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut path) = name.split_at(end);
    let mut value = first_value(first, source, next)?;
    while !path.is_empty() {
        limits.steps(1)?;
        if let Some(rest) = path.strip_prefix('.') {
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            value = member::attribute(limits, &value, &rest[..end].into())?;
            path = &rest[end..];
        } else {
            let inner = path.strip_prefix('[').and_then(|rest| rest.split_once(']'));
            let Some((key, rest)) = inner else { fail!("Missing ']' in format string") };
            let key = key.parse().map_or_else(|_error| Value::text(key), Value::Int);
            value = member::item(limits, &value, &key)?;
            path = rest;
        }
    }
    Ok(value)
}

fn first_value(name: &str, source: &Source, next: &mut usize) -> Outcome<Value> {
    let index = if name.is_empty() {
        *next += 1;
        Some(*next - 1)
    } else {
        name.parse().ok()
    };
    let value = match index {
        Some(index) => source.positional.get::<usize>(index).cloned(),
        None => (source.named)(name),
    };
    match value {
        Some(value) => Ok(value),
        None => fail!("a format string wants the argument `{name}`, which is not given"),
    }
}

/// Python's `format(value, spec)`
fn formatted(writer: &mut Writer, value: &Value, spec: &str) -> Outcome<()> {
    if spec.is_empty() {
        return writer.str(value);
    }
    let spec = parsed(spec)?;
    match value {
        Value::Text(text) => {
            if !matches!(spec.kind, None | Some('s')) || spec.align == Some('=') {
                fail!("a format for numbers is given a string");
            }
            laid_out(writer, text, &spec)
        }
        Value::Bool(_) if matches!(spec.kind, None | Some('s')) => {
            let text = printing::str(writer.limits, value)?;
            laid_out(writer, &text, &Spec { align: spec.align.or(Some('>')), ..spec })
        }
        Value::Int(_) | Value::Float(_) | Value::Bool(_) => number(writer, value, &spec),
        other => fail!("unsupported format string passed to {}.__format__", other.type_name()),
    }
}

fn parsed(spec: &str) -> Outcome<Spec> {
    let mut result = Spec::default();
    let mut chars = spec.chars().peekable();
    let is_align = |c: Option<char>| c.filter(|c| matches!(c, '<' | '>' | '^' | '='));
    if let Some(align) = is_align(spec.chars().nth(1)) {
        result.fill = chars.next();
        result.align = Some(align);
        chars.next();
    } else if let Some(align) = is_align(chars.peek().copied()) {
        result.align = Some(align);
        chars.next();
    }
    result.sign = chars.next_if(|c| matches!(c, '+' | '-' | ' '));
    result.alternate = chars.next_if_eq(&'#').is_some();
    if chars.next_if_eq(&'0').is_some() && result.align.is_none() {
        (result.fill, result.align) = (Some('0'), Some('='));
    }
    result.width = digits(&mut chars).unwrap_or(0);
    result.grouping = chars.next_if(|c| matches!(c, ',' | '_'));
    if chars.next_if_eq(&'.').is_some() {
        result.precision = digits(&mut chars);
        if result.precision.is_none() {
            fail!("Format specifier missing precision");
        }
    }
    result.kind = chars.next();
    if chars.next().is_some() {
        fail!("Invalid format specifier '{spec}'");
    }
    Ok(result)
}
