//! Jinja2's tests: `x is defined`.

use super::ast::Binary;
use super::compare;
use super::eval::Renderer;
use super::fault::{Outcome, fail};
use super::filters;
use super::given::{Given, required};
use super::operators;
use super::printing;
use super::strings;
use super::value::Value;
use std::cmp::Ordering;

pub fn check(renderer: &mut Renderer, name: &str, value: &Value, given: Given) -> Outcome<bool> {
    let limits = &renderer.limits;
    if let Some(answer) = of_type(value, name) {
        given.none()?;
        return Ok(answer);
    }
    if matches!(name, "odd" | "even") {
        given.none()?;
        let rest = operators::binary(limits, Binary::Remainder, value, &Value::Int(2))?;
        return compare::equal(limits, &rest, &Value::Int(i128::from(name == "odd")));
    }
    if matches!(name, "lower" | "upper") {
        let text = printing::str(limits, value)?;
        let method = if name == "lower" { "islower" } else { "isupper" };
        return Ok(strings::call(limits, &text, method, given)?.is_true());
    }
    match name {
        "filter" => return Ok(is_text(value, |name| filters::NAMES.contains(&name))),
        "test" => return Ok(is_text(value, |name| NAMES.contains(&name))),
        _other => {}
    }
    let [other] = given.bind(["/"])?;
    let other = required(other, "other")?;
    match name {
        "divisibleby" => {
            let rest = operators::binary(limits, Binary::Remainder, value, &other)?;
            compare::equal(limits, &rest, &Value::Int(0))
        }
        "in" => compare::contains(limits, &other, value),
        "sameas" => Ok(compare::same(value, &other)),
        "==" | "eq" | "equalto" => compare::equal(limits, value, &other),
        "!=" | "ne" => Ok(!compare::equal(limits, value, &other)?),
        "<" | "lt" | "lessthan" => is_order(renderer, value, &other, Ordering::is_lt),
        "<=" | "le" => is_order(renderer, value, &other, Ordering::is_le),
        ">" | "gt" | "greaterthan" => is_order(renderer, value, &other, Ordering::is_gt),
        ">=" | "ge" => is_order(renderer, value, &other, Ordering::is_ge),
        _unknown => fail!("there is no test named '{name}'"),
    }
}

fn is_order(
    renderer: &Renderer,
    left: &Value,
    right: &Value,
    is: fn(Ordering) -> bool,
) -> Outcome<bool> {
    Ok(compare::order(&renderer.limits, left, right)?.is_some_and(is))
}

fn is_text(value: &Value, is: impl Fn(&str) -> bool) -> bool {
    matches!(value, Value::Text(text) if is(text))
}

fn of_type(value: &Value, name: &str) -> Option<bool> {
    Some(match name {
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "string" => matches!(value, Value::Text(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => matches!(
            value,
            Value::Undefined(_)
                | Value::Text(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Dict(_)
                | Value::Range(_)
        ),
        "iterable" => value.is_iterable(),
        "callable" => matches!(
            value,
            Value::Undefined(_)
                | Value::Function(_)
                | Value::Method(_)
                | Value::Macro(_)
                | Value::Loop(_)
                | Value::Joiner(_)
        ),
        "escaped" => matches!(value, Value::Text(text) if text.safe),
        _other => return None,
    })
}

const NAMES: [&str; 39] = [
    "!=",
    "<",
    "<=",
    "==",
    ">",
    ">=",
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];
