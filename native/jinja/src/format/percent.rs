//! `'%s' % x`

use super::super::fault::{Outcome, fail};
use super::super::limits::Limits;
use super::super::markup;
use super::super::operators;
use super::super::printing::{self, Writer};
use super::super::value::{Text, Value};
use super::{Spec, ascii, character, digits, laid_out, number};
use std::iter::Peekable;
use std::str::Chars;

/// `template % values`
pub fn percent(limits: &Limits, template: &Text, values: &Value) -> Outcome<Text> {
    limits.steps(template.len())?;
    let mut writer = Writer::new(limits);
    let mut values = Values { values, next: 0, mapped: false, escapes: template.safe };
    let mut chars = template.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '%' {
            conversion(&mut writer, &mut chars, &mut values)?;
        } else {
            writer.push(c.encode_utf8(&mut [0; 4]))?;
        }
    }
    values.finish()?;
    Ok(Text { text: writer.text.into(), safe: template.safe })
}

struct Values<'a> {
    values: &'a Value,
    next: usize,
    /// Whether a value was asked for by name.
    mapped: bool,
    /// Whether they are escaped.
    escapes: bool,
}

impl Values<'_> {
    fn take(&mut self) -> Outcome<Value> {
        let value = match self.values {
            Value::Tuple(tuple) => tuple.items.get(self.next).cloned(),
            only if self.next == 0 => Some(only.clone()),
            _only => None,
        };
        self.next += 1;
        match value {
            Some(value) => Ok(value),
            None => fail!("not enough arguments for format string"),
        }
    }

    fn finish(&self) -> Outcome<()> {
        let count = match self.values {
            Value::Tuple(tuple) => tuple.items.len(),
            Value::Dict(_) | Value::List(_) => 0,
            _only => usize::from(!self.mapped),
        };
        if self.next < count {
            fail!("not all arguments converted during string formatting");
        }
        Ok(())
    }
}

/// What follows a `%`.
fn conversion(
    writer: &mut Writer,
    chars: &mut Peekable<Chars>,
    values: &mut Values,
) -> Outcome<()> {
    let mapped = if chars.next_if_eq(&'(').is_some() { Some(key(chars)?) } else { None };
    let mut spec = Spec::default();
    let mut left = false;
    while let Some(flag) = chars.next_if(|c| matches!(c, '#' | '0' | '-' | ' ' | '+')) {
        match flag {
            '#' => spec.alternate = true,
            '0' => spec.fill = Some('0'),
            '-' => left = true,
            '+' => spec.sign = Some('+'),
            _space => spec.sign = spec.sign.or(Some(' ')),
        }
    }
    spec.width = width(chars, values, &mut left)?;
    if chars.next_if_eq(&'.').is_some() {
        spec.precision = Some(width(chars, values, &mut false)?);
    }
    while chars.next_if(|c| matches!(c, 'h' | 'l' | 'L')).is_some() {}
    let Some(kind) = chars.next() else { fail!("incomplete format") };
    if kind == '%' {
        return writer.push("%");
    }
    let value = match mapped {
        None => values.take()?,
        Some(key) => {
            values.mapped = true;
            match operators::item(writer.limits, values.values, &Value::text(&key))? {
                Some(value) => value,
                None => fail!("the format's key {} is missing", printing::quoted(&key)),
            }
        }
    };
    spec.align = Some(if left { '<' } else { '>' });
    if left
        || !matches!(kind, 'd' | 'i' | 'u' | 'x' | 'X' | 'o' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G')
    {
        spec.fill = None;
    } else if spec.fill == Some('0') {
        spec.align = Some('=');
    }
    converted(writer, &value, kind, spec, values.escapes)
}

fn key(chars: &mut Peekable<Chars>) -> Outcome<String> {
    let (mut key, mut open) = (String::new(), 1);
    for c in chars.by_ref() {
        open += match c {
            '(' => 1,
            ')' => -1,
            _other => 0,
        };
        if open == 0 {
            return Ok(key);
        }
        key.push(c);
    }
    fail!("incomplete format key")
}

/// A number, or `*` for one of the values.
fn width(chars: &mut Peekable<Chars>, values: &mut Values, left: &mut bool) -> Outcome<usize> {
    if chars.next_if_eq(&'*').is_some() {
        let Some(width) = values.take()?.as_int() else { fail!("* wants int") };
        *left |= width < 0;
        return Ok(usize::try_from(width.unsigned_abs()).unwrap_or(usize::MAX));
    }
    Ok(digits(chars).unwrap_or(0))
}

fn converted(
    writer: &mut Writer,
    value: &Value,
    kind: char,
    mut spec: Spec,
    escapes: bool,
) -> Outcome<()> {
    let limits = writer.limits;
    match kind {
        's' => {
            let text = match escapes {
                true => markup::escaped(limits, value)?,
                false => printing::str(limits, value)?.into(),
            };
            laid_out(writer, &text, &spec)
        }
        'r' | 'a' => {
            let mut text = printing::repr(limits, value)?;
            if escapes {
                text = markup::escape(limits, &text)?;
            }
            if kind == 'a' {
                text = ascii(&text);
            }
            laid_out(writer, &text, &spec)
        }
        'c' => {
            let text = match value {
                Value::Text(text) if text.chars().count() == 1 => text.to_string(),
                other => character(other)?,
            };
            spec.precision = None;
            laid_out(writer, &text, &spec)
        }
        'd' | 'i' | 'u' => {
            spec.kind = Some('d');
            let Some(whole) = truncated(value) else {
                fail!("%{kind} format: a real number is required, not {}", value.type_name())
            };
            padded_digits(&mut spec, |spec| number(writer, &Value::Int(whole), spec))
        }
        'x' | 'X' | 'o' => {
            spec.kind = Some(kind);
            if value.as_int().is_none() {
                fail!("%{kind} format: an integer is required, not {}", value.type_name());
            }
            padded_digits(&mut spec, |spec| number(writer, value, spec))
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            spec.kind = Some(kind);
            let Some(float) = value.as_float() else {
                fail!("must be real number, not {}", value.type_name())
            };
            number(writer, &Value::Float(float), &spec)
        }
        other => fail!("unsupported format character '{other}'"),
    }
}

/// The precision of a whole number is its least number of digits.
fn padded_digits(spec: &mut Spec, write: impl FnOnce(&Spec) -> Outcome<()>) -> Outcome<()> {
    if spec.precision.take().is_some_and(|precision| precision > 1) {
        fail!("a precision of whole numbers is not supported");
    }
    write(spec)
}

fn truncated(value: &Value) -> Option<i128> {
    match value {
        Value::Float(value) if value.is_finite() && value.abs() < 1e38 => {
            Some(value.trunc() as i128)
        }
        other => other.as_int(),
    }
}
