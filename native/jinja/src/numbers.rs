//! The filters of numbers.

use super::fault::{Outcome, fail};
use super::given::{Given, int};
use super::limits::Limits;
use super::operators;
use super::value::Value;

pub fn apply(limits: &Limits, name: &str, value: &Value, given: Given) -> Outcome<Value> {
    if let Value::Text(text) = value {
        limits.read(text.len())?;
    }
    match name {
        "abs" => {
            given.none()?;
            match value {
                Value::Float(value) => Ok(Value::Float(value.abs())),
                other => match other.as_int() {
                    Some(value) if value < 0 => operators::negated(other),
                    Some(value) => Ok(Value::Int(value)),
                    None => fail!("bad operand type for abs(): '{}'", other.type_name()),
                },
            }
        }
        "int" => {
            let [default, base] = given.bind(["default", "base"])?;
            let base = int(base.as_ref(), 10)?;
            limits.steps(1)?;
            Ok(whole(value, base)?.map_or(default.unwrap_or(Value::Int(0)), Value::Int))
        }
        "float" => {
            let [default] = given.bind(["default"])?;
            Ok(number(value).map_or(default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "round" => round(value, given),
        _filesizeformat => {
            let [binary] = given.bind(["binary"])?;
            let Some(bytes) = number(value) else { fail!("a size is a number") };
            Ok(Value::Text(file_size(bytes, binary.is_some_and(|it| it.is_true())).into()))
        }
    }
}

fn whole(value: &Value, base: i128) -> Outcome<Option<i128>> {
    if let Some(value) = value.as_int() {
        return Ok(Some(value));
    }
    if let Value::Text(text) = value
        && let Some(value) = parsed(text, base)
    {
        return Ok(Some(value));
    }
    match number(value) {
        Some(value) if value.is_finite() && value.abs() < 1e38 => Ok(Some(value.trunc() as i128)),
        Some(value) if value.is_finite() => fail!("a number is too large: {value}"),
        _none => Ok(None),
    }
}

/// Python's `int(text, base)`
fn parsed(text: &str, base: i128) -> Option<i128> {
    let text = text.trim_matches(super::strings::is_space);
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let begins = |prefix: &str| digits.get(..2).is_some_and(|it| it.eq_ignore_ascii_case(prefix));
    let prefixes = [("0x", 16), ("0o", 8), ("0b", 2)];
    let prefixed = prefixes
        .into_iter()
        .find(|&(prefix, radix)| (base == 0 || base == radix) && begins(prefix));
    let (digits, radix) = match prefixed {
        Some((_, radix)) => (&digits[2..], radix),
        None => (digits, if base == 0 { 10 } else { base }),
    };
    let radix = u32::try_from(radix).ok().filter(|radix| (2..=36).contains(radix))?;
    let well_formed = digits.starts_with(|c: char| c.is_digit(radix))
        && !digits.ends_with('_')
        && !digits.contains("__");
    let value = i128::from_str_radix(&digits.replace('_', ""), radix).ok()?;
    well_formed.then_some(if text.starts_with('-') { -value } else { value })
}

/// Python's `float(value)`
pub fn number(value: &Value) -> Option<f64> {
    let Value::Text(text) = value else { return value.as_float() };
    let text = text.trim_matches(super::strings::is_space);
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text).to_ascii_lowercase();
    if matches!(&unsigned[..], "inf" | "infinity" | "nan") {
        return text.parse().ok();
    }
    let starts_well = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    let well_formed = starts_well && !text.ends_with('_') && !text.contains("__");
    if well_formed { text.replace('_', "").parse().ok() } else { None }
}

fn round(value: &Value, given: Given) -> Outcome<Value> {
    let [precision, method] = given.bind(["precision", "method"])?;
    let precision = int(precision.as_ref(), 0)?.clamp(-400, 400) as i32;
    let Some(number) = value.as_float() else {
        fail!("a {} cannot be rounded", value.type_name());
    };
    match method {
        None => rounded(value, number, precision),
        Some(Value::Text(method)) => match &*method {
            "common" => rounded(value, number, precision),
            "ceil" => Ok(Value::Float(scaled(number, precision, f64::ceil))),
            "floor" => Ok(Value::Float(scaled(number, precision, f64::floor))),
            _other => fail!("method must be common, ceil or floor"),
        },
        Some(_) => fail!("method must be common, ceil or floor"),
    }
}

fn scaled(number: f64, precision: i32, round: fn(f64) -> f64) -> f64 {
    let scale = 10f64.powi(precision);
    round(number * scale) / scale
}

/// To the nearest, halves to the even digit; the float's exact digits decide.
fn rounded(value: &Value, number: f64, precision: i32) -> Outcome<Value> {
    if let Some(whole) = value.as_int() {
        return Ok(Value::Int(if precision < 0 { round_whole(whole, precision) } else { whole }));
    }
    if !number.is_finite() || precision > 300 {
        return Ok(Value::Float(number));
    }
    if let Ok(digits) = usize::try_from(precision) {
        return Ok(Value::Float(format!("{number:.digits$}").parse().unwrap_or(number)));
    }
    let scale = 10f64.powi(-precision);
    Ok(Value::Float((number / scale).round_ties_even() * scale))
}

fn round_whole(whole: i128, precision: i32) -> i128 {
    let Some(scale) = 10i128.checked_pow(precision.unsigned_abs()) else { return 0 };
    let (quotient, rest) = (whole.div_euclid(scale), whole.rem_euclid(scale));
    let up = rest * 2 > scale || (rest * 2 == scale && quotient % 2 != 0);
    (quotient + i128::from(up)).saturating_mul(scale)
}

fn file_size(bytes: f64, binary: bool) -> String {
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    if bytes == 1.0 {
        return "1 Byte".into();
    }
    if bytes < base {
        return format!("{} Bytes", bytes.trunc());
    }
    let prefixes = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    let mut unit = base;
    for (index, prefix) in prefixes.into_iter().enumerate() {
        unit *= base;
        if bytes < unit || index + 1 == prefixes.len() {
            let size = base * bytes / unit;
            let prefix = if binary { prefix.to_uppercase() + "i" } else { prefix.into() };
            return format!("{size:.1} {prefix}B");
        }
    }
    String::new()
}
