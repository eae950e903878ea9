//! Python's arithmetic, and what `[...]` takes out of a value.

use super::ast::Binary;
use super::fault::{Outcome, fail};
use super::format;
use super::limits::Limits;
use super::markup;
use super::printing::Writer;
use super::value::{Dict, Range, Text, Value};

pub fn binary(limits: &Limits, operator: Binary, left: &Value, right: &Value) -> Outcome<Value> {
    if let (Value::Undefined(message), _) | (_, Value::Undefined(message)) = (left, right)
        && !matches!((operator, left), (Binary::Remainder, Value::Text(_)))
    {
        fail!("{message}");
    }
    match (operator, left, right) {
        (Binary::Remainder, Value::Text(template), _) => {
            format::percent(limits, template, right).map(Value::Text)
        }
        (Binary::Add, Value::Text(left), Value::Text(right)) => markup::add(limits, left, right),
        (Binary::Add, Value::List(left), Value::List(right)) => {
            limits.bytes((left.items.len() + right.items.len()) * size_of::<Value>())?;
            Value::list(limits, [&left.items[..], &right.items[..]].concat())
        }
        (Binary::Add, Value::Tuple(left), Value::Tuple(right)) => {
            limits.bytes((left.items.len() + right.items.len()) * size_of::<Value>())?;
            Value::tuple(limits, [&left.items[..], &right.items[..]].concat())
        }
        (Binary::Multiply, Value::Text(_) | Value::List(_) | Value::Tuple(_), _)
            if right.as_int().is_some() =>
        {
            repeat(limits, left, right.as_int().unwrap_or(0))
        }
        (Binary::Multiply, _, Value::Text(_) | Value::List(_) | Value::Tuple(_))
            if left.as_int().is_some() =>
        {
            repeat(limits, right, left.as_int().unwrap_or(0))
        }
        _numbers => numbers(operator, left, right),
    }
}

fn repeat(limits: &Limits, value: &Value, times: i128) -> Outcome<Value> {
    let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
    let (Value::List(list) | Value::Tuple(list)) = value else {
        let mut writer = Writer::new(limits);
        let mut safe = false;
        if let Value::Text(text) = value {
            writer.repeat(text, if text.is_empty() { 0 } else { times })?;
            safe = text.safe;
        }
        return Ok(Value::Text(Text { text: writer.text.into(), safe }));
    };
    limits.bytes(list.items.len().saturating_mul(times).saturating_mul(size_of::<Value>()))?;
    let times = if list.items.is_empty() { 0 } else { times };
    let items = std::iter::repeat_n(&list.items, times).flatten().cloned().collect();
    if matches!(value, Value::List(_)) {
        Value::list(limits, items)
    } else {
        Value::tuple(limits, items)
    }
}

fn numbers(operator: Binary, left: &Value, right: &Value) -> Outcome<Value> {
    match (left.as_int(), right.as_int(), left.as_float(), right.as_float()) {
        (Some(left), Some(right), ..) => ints(operator, left, right),
        (_, _, Some(left), Some(right)) => floats(operator, left, right).map(Value::Float),
        _others => fail!(
            "unsupported operand types for {}: '{}' and '{}'",
            sign(operator),
            left.type_name(),
            right.type_name()
        ),
    }
}

fn sign(operator: Binary) -> &'static str {
    match operator {
        Binary::Add => "+",
        Binary::Subtract => "-",
        Binary::Multiply => "*",
        Binary::Divide => "/",
        Binary::FloorDivide => "//",
        Binary::Remainder => "%",
        Binary::Power => "**",
    }
}

fn ints(operator: Binary, left: i128, right: i128) -> Outcome<Value> {
    if right == 0 && matches!(operator, Binary::Divide | Binary::FloorDivide | Binary::Remainder) {
        fail!("division by zero");
    }
    let value = match operator {
        Binary::Add => left.checked_add(right),
        Binary::Subtract => left.checked_sub(right),
        Binary::Multiply => left.checked_mul(right),
        Binary::Divide => return Ok(Value::Float(left as f64 / right as f64)),
        Binary::FloorDivide => floor_divide(left, right),
        Binary::Remainder => {
            floor_divide(left, right).and_then(|whole| left.checked_sub(whole.checked_mul(right)?))
        }
        Binary::Power if right < 0 => {
            return floats(operator, left as f64, right as f64).map(Value::Float);
        }
        Binary::Power => power(left, right),
    };
    match value {
        Some(value) => Ok(Value::Int(value)),
        None => fail!("a number is too large"),
    }
}

/// Rounded down, as in Python.
fn floor_divide(left: i128, right: i128) -> Option<i128> {
    let whole = left.checked_div(right)?;
    let inexact = left.checked_rem(right)? != 0;
    Some(if inexact && ((left < 0) != (right < 0)) { whole - 1 } else { whole })
}

fn power(base: i128, exponent: i128) -> Option<i128> {
    match base {
        0 | 1 => Some(if exponent == 0 { 1 } else { base }),
        -1 => Some(if exponent % 2 == 0 { 1 } else { -1 }),
        _other => base.checked_pow(u32::try_from(exponent).ok()?),
    }
}

fn floats(operator: Binary, left: f64, right: f64) -> Outcome<f64> {
    if right == 0.0 && matches!(operator, Binary::Divide | Binary::FloorDivide | Binary::Remainder)
    {
        fail!("division by zero");
    }
    Ok(match operator {
        Binary::Add => left + right,
        Binary::Subtract => left - right,
        Binary::Multiply => left * right,
        Binary::Divide => left / right,
        Binary::FloorDivide => floor_parts(left, right).0,
        Binary::Remainder => floor_parts(left, right).1,
        Binary::Power if left == 0.0 && right < 0.0 => fail!("division by zero"),
        Binary::Power if left < 0.0 && right.fract() != 0.0 => fail!("a number is complex"),
        Binary::Power => left.powf(right),
    })
}

/// The quotient rounded down, and the remainder, as in CPython's `float_divmod`.
fn floor_parts(left: f64, right: f64) -> (f64, f64) {
    let mut remainder = left % right;
    let mut quotient = (left - remainder) / right;
    if remainder == 0.0 {
        remainder = 0f64.copysign(right);
    } else if (right < 0.0) != (remainder < 0.0) {
        remainder += right;
        quotient -= 1.0;
    }
    if quotient == 0.0 {
        return (0f64.copysign(left / right), remainder);
    }
    let floor = quotient.floor();
    (if quotient - floor > 0.5 { floor + 1.0 } else { floor }, remainder)
}

pub fn negated(value: &Value) -> Outcome<Value> {
    match value {
        Value::Float(value) => Ok(Value::Float(-value)),
        other => match other.as_int().and_then(i128::checked_neg) {
            Some(value) => Ok(Value::Int(value)),
            None => not_a_number(other, "-"),
        },
    }
}

pub fn positive(value: &Value) -> Outcome<Value> {
    match value {
        Value::Float(value) => Ok(Value::Float(*value)),
        other => match other.as_int() {
            Some(value) => Ok(Value::Int(value)),
            None => not_a_number(other, "+"),
        },
    }
}

fn not_a_number(value: &Value, sign: &str) -> Outcome<Value> {
    match value {
        Value::Undefined(message) => fail!("{message}"),
        other => fail!("bad operand type for unary {sign}: '{}'", other.type_name()),
    }
}

/// What `value[key]` is, where there is something.
pub fn item(limits: &Limits, value: &Value, key: &Value) -> Outcome<Option<Value>> {
    Ok(match (value, key.as_int()) {
        (Value::Dict(dict), _) => lookup(limits, dict, key),
        (Value::List(list) | Value::Tuple(list), Some(index)) => {
            place(index, list.items.len()).map(|index| list.items[index].clone())
        }
        (Value::Text(text), Some(index)) => match character(limits, text, index)? {
            Some(found) if text.safe => Some(markup::marked(limits, found)?),
            found => found,
        },
        (Value::Range(range), Some(index)) => {
            place(index, range.len()).map(|index| range.get(index))
        }
        (Value::Undefined(message), _) => fail!("{message}"),
        _others => None,
    })
}

/// A key that cannot be one is not there.
fn lookup(limits: &Limits, dict: &Dict, key: &Value) -> Option<Value> {
    dict.get(limits, key).ok().flatten().cloned()
}

fn character(limits: &Limits, text: &str, index: i128) -> Outcome<Option<Value>> {
    limits.read(text.len())?;
    let length = if index < 0 { text.chars().count() } else { usize::MAX };
    let Some(index) = place(index, length) else { return Ok(None) };
    Ok(text.chars().nth(index).map(|c| Value::text(c.encode_utf8(&mut [0; 4]))))
}

/// An index from the start, or from the end where it is negative.
fn place(index: i128, length: usize) -> Option<usize> {
    let index = if index < 0 { index.checked_add(length as i128)? } else { index };
    usize::try_from(index).ok().filter(|&index| index < length)
}

/// `value[start:stop:step]`
pub fn slice(limits: &Limits, value: &Value, bounds: [Option<i128>; 3]) -> Outcome<Value> {
    match value {
        Value::List(list) => {
            let places = places(limits, bounds, list.items.len())?;
            Value::list(limits, places.map(|at| list.items[at].clone()).collect())
        }
        Value::Tuple(list) => {
            let places = places(limits, bounds, list.items.len())?;
            Value::tuple(limits, places.map(|at| list.items[at].clone()).collect())
        }
        Value::Text(text) if text.safe => markup::marked(limits, slice_text(limits, text, bounds)?),
        Value::Text(text) => slice_text(limits, text, bounds),
        Value::Range(range) => slice_range(*range, bounds),
        Value::Undefined(message) => fail!("{message}"),
        other => fail!("a {} has no slices", other.type_name()),
    }
}

fn slice_text(limits: &Limits, text: &str, bounds: [Option<i128>; 3]) -> Outcome<Value> {
    limits.bytes(text.len())?;
    if text.is_ascii() {
        let places = places(limits, bounds, text.len())?;
        let bytes: Vec<u8> = places.map(|at| text.as_bytes()[at]).collect();
        return Ok(Value::text(&String::from_utf8_lossy(&bytes)));
    }
    limits.bytes(4 * text.len())?;
    let chars: Vec<char> = text.chars().collect();
    let places = places(limits, bounds, chars.len())?;
    Ok(Value::Text(places.map(|at| chars[at]).collect::<String>().into()))
}

fn slice_range(range: Range, bounds: [Option<i128>; 3]) -> Outcome<Value> {
    let (start, stop, step) = indices(bounds, range.len())?;
    let at = |index: i128| range.step.checked_mul(index)?.checked_add(range.start);
    Range::new(at(start), at(stop), range.step.checked_mul(step)).map(Value::Range)
}

fn places(
    limits: &Limits,
    bounds: [Option<i128>; 3],
    length: usize,
) -> Outcome<impl Iterator<Item = usize> + use<>> {
    let (start, stop, step) = indices(bounds, length)?;
    let range = Range::new(Some(start), Some(stop), Some(step))?;
    limits.steps(range.len())?;
    Ok((0..range.len()).map(move |at| usize::try_from(start + step * at as i128).unwrap_or(0)))
}

/// As Python's `slice.indices`.
fn indices(bounds: [Option<i128>; 3], length: usize) -> Outcome<(i128, i128, i128)> {
    // Further than the length is all the same, and cannot overflow.
    let most = length as i128 + 1;
    let step = bounds[2].unwrap_or(1).clamp(-most, most);
    if step == 0 {
        fail!("slice step cannot be zero");
    }
    let (lower, upper) = if step > 0 { (0, most - 1) } else { (-1, most - 2) };
    let bound = |bound: Option<i128>, default| match bound {
        None => default,
        Some(at) => (if at < 0 { at.saturating_add(most - 1) } else { at }).clamp(lower, upper),
    };
    let (first, last) = if step > 0 { (lower, upper) } else { (upper, lower) };
    Ok((bound(bounds[0], first), bound(bounds[1], last), step))
}
