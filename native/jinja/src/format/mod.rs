//! Python's `'%s' % x` and `'{}'.format(x)`.

mod braces;
mod percent;

pub use braces::{braces, map};
pub use percent::percent;

use super::fault::{Outcome, fail};
use super::printing::{self, Writer};
use super::value::Value;
use std::iter::Peekable;
use std::str::Chars;

/// How one value is laid out.
#[derive(Default)]
struct Spec {
    fill: Option<char>,
    /// `<`, `>`, `^` or `=`
    align: Option<char>,
    /// `+`, `-` or a space
    sign: Option<char>,
    alternate: bool,
    grouping: Option<char>,
    width: usize,
    precision: Option<usize>,
    kind: Option<char>,
}

/// Numbers have no more digits than this behind their point.
const PRECISION: usize = 1_000;

fn digits(chars: &mut Peekable<Chars>) -> Option<usize> {
    let mut number = None;
    while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
        chars.next();
        number = Some(number.unwrap_or(0usize).saturating_mul(10).saturating_add(digit as usize));
    }
    number
}

fn character(value: &Value) -> Outcome<String> {
    let code = value.as_int().and_then(|code| u32::try_from(code).ok());
    match code.and_then(char::from_u32) {
        Some(c) => Ok(c.to_string()),
        None => fail!("a character's number is expected, got a {}", value.type_name()),
    }
}

fn ascii(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() { result.push(c) } else { printing::push_escape(&mut result, c) }
    }
    result
}

/// A string: cut to its precision, padded to its width.
fn laid_out(writer: &mut Writer, text: &str, spec: &Spec) -> Outcome<()> {
    let cut: String;
    let text = match spec.precision {
        Some(most) => {
            cut = text.chars().take(most).collect();
            &cut
        }
        None => text,
    };
    padded(writer, ("", text), spec, '<')
}

/// `sign` stays in front of the zeros of `=`.
fn padded(
    writer: &mut Writer,
    (sign, text): (&str, &str),
    spec: &Spec,
    align: char,
) -> Outcome<()> {
    let missing = spec.width.saturating_sub(sign.len() + text.chars().count());
    let fill = spec.fill.unwrap_or(' ').to_string();
    let align = spec.align.unwrap_or(align);
    let before = match align {
        '<' => 0,
        '^' => missing / 2,
        _right => missing,
    };
    if align == '=' {
        writer.push(sign)?;
        writer.repeat(&fill, before)?;
    } else {
        writer.repeat(&fill, before)?;
        writer.push(sign)?;
    }
    writer.push(text)?;
    writer.repeat(&fill, missing - before)
}

fn number(writer: &mut Writer, value: &Value, spec: &Spec) -> Outcome<()> {
    let is_int_kind = matches!(spec.kind, None | Some('d' | 'x' | 'X' | 'o' | 'b' | 'c' | 'n'));
    let (negative, digits) = match (value.as_int(), value.as_float()) {
        (Some(whole), _) if is_int_kind => (whole < 0, int_digits(whole, spec)?),
        (_, Some(float)) => {
            (float.is_sign_negative() && !float.is_nan(), float_digits(float, spec)?)
        }
        _other => fail!("expected a number, got a {}", value.type_name()),
    };
    let sign = match spec.sign {
        _ if negative => "-",
        Some('+') => "+",
        Some(' ') => " ",
        _none => "",
    };
    let (digits, prefix) = match (spec.kind, spec.alternate) {
        (Some(kind @ ('x' | 'X' | 'o' | 'b')), true) => (digits, format!("{sign}0{kind}")),
        _plain => (digits, sign.to_owned()),
    };
    let digits = match spec.grouping {
        Some(mark) => grouped(&digits, mark),
        None => digits,
    };
    padded(writer, (&prefix, &digits), spec, '>')
}

fn int_digits(whole: i128, spec: &Spec) -> Outcome<String> {
    let magnitude = whole.unsigned_abs();
    Ok(match spec.kind {
        Some('x') => format!("{magnitude:x}"),
        Some('X') => format!("{magnitude:X}"),
        Some('o') => format!("{magnitude:o}"),
        Some('b') => format!("{magnitude:b}"),
        Some('c') => return character(&Value::Int(whole)),
        _decimal => magnitude.to_string(),
    })
}

fn float_digits(value: f64, spec: &Spec) -> Outcome<String> {
    let magnitude = value.abs();
    let precision = spec.precision.unwrap_or(6);
    if precision > PRECISION {
        fail!("a number has more than {PRECISION} digits");
    }
    let text = match spec.kind {
        _ if !value.is_finite() => printing::float(magnitude),
        Some('f' | 'F') => format!("{magnitude:.precision$}"),
        Some('e' | 'E') => exponent(magnitude, precision),
        Some('%') => format!("{:.precision$}%", magnitude * 100.0),
        Some('g' | 'G' | 'n') => general(magnitude, precision.max(1), spec.alternate, false),
        None => match spec.precision {
            None => printing::float(magnitude),
            Some(precision) => general(magnitude, precision.max(1), spec.alternate, true),
        },
        Some(other) => fail!("Unknown format code '{other}' for a number"),
    };
    Ok(if matches!(spec.kind, Some('E' | 'F' | 'G')) { text.to_uppercase() } else { text })
}

fn exponent(value: f64, precision: usize) -> String {
    let text = format!("{value:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// As many digits as the precision, without zeros at the end. `point`: at least one behind a point
fn general(value: f64, precision: usize, keep_zeros: bool, point: bool) -> String {
    let scientific = exponent(value, precision - 1);
    let (digits, power) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let power: i32 = power.parse().unwrap_or(0);
    let most = precision as i32 - i32::from(point);
    if value != 0.0 && !(-4..most.max(1)).contains(&power) {
        return format!(
            "{}e{}",
            without_zeros(digits, keep_zeros),
            &scientific[digits.len() + 1..]
        );
    }
    let decimals = usize::try_from(precision as i32 - 1 - power).unwrap_or(0);
    let text = format!("{value:.decimals$}");
    let text = without_zeros(&text, keep_zeros);
    if point && !text.contains('.') { format!("{text}.0") } else { text.to_owned() }
}

fn without_zeros(text: &str, keep: bool) -> &str {
    if keep || !text.contains('.') {
        return text;
    }
    text.trim_end_matches('0').trim_end_matches('.')
}

/// A mark between every three digits of the whole part.
fn grouped(text: &str, mark: char) -> String {
    let end = text.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(text.len());
    let (whole, rest) = text.split_at(end);
    let mut result = String::with_capacity(text.len() * 2);
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            result.push(mark);
        }
        result.push(digit);
    }
    result + rest
}
