//! What `value.name` and `value[key]` are, in Jinja2's sandbox.

use super::ast::Name;
use super::fault::{Outcome, fail};
use super::limits::Limits;
use super::operators;
use super::printing::{quoted, repr};
use super::strings;
use super::value::{Loop, Method, Value};
use std::rc::Rc;
use std::sync::Arc;

const DICT_METHODS: [&str; 5] = ["copy", "get", "items", "keys", "values"];
/// What would change a value is refused.
const DICT_CHANGES: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
const LIST_METHODS: [&str; 3] = ["copy", "count", "index"];
const LIST_CHANGES: [&str; 8] =
    ["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];

pub fn attribute(limits: &Limits, value: &Value, name: &Name) -> Outcome<Value> {
    limits.read(name.len())?;
    if let Value::Undefined(message) = value {
        fail!("{message}");
    }
    if let Some(found) = own_attribute(limits, value, name)? {
        return Ok(found);
    }
    let found = operators::item(limits, value, &Value::Text(name.clone().into()))?;
    found.map_or_else(|| missing(limits, value, name), Ok)
}

pub fn item(limits: &Limits, value: &Value, key: &Value) -> Outcome<Value> {
    if let Some(found) = operators::item(limits, value, key)? {
        return Ok(found);
    }
    if let Value::Text(name) = key {
        limits.read(name.len())?;
        let found = own_attribute(limits, value, &name.text)?;
        return found.map_or_else(|| missing(limits, value, name), Ok);
    }
    let key = repr(limits, key)?;
    undefined(limits, format!("{} has no element {key}", value.object_name()))
}

fn missing(limits: &Limits, value: &Value, name: &str) -> Outcome<Value> {
    let shown: String = name.chars().take(100).collect();
    let object = quoted(&value.object_name());
    undefined(limits, format!("{object} has no attribute {}", quoted(&shown)))
}

pub fn undefined(limits: &Limits, message: String) -> Outcome<Value> {
    limits.bytes(message.len())?;
    Ok(Value::Undefined(message.into()))
}

/// What the value's Python class has, before its items are looked at.
fn own_attribute(limits: &Limits, value: &Value, name: &Name) -> Outcome<Option<Value>> {
    let name_str = &**name;
    let changes: &[&str] = match value {
        Value::Dict(_) => &DICT_CHANGES,
        Value::List(_) => &LIST_CHANGES,
        _unchangeable => &[],
    };
    if name.starts_with("__") || changes.contains(&name_str) {
        let kind = value.type_name();
        let message = format!("access to attribute '{name}' of '{kind}' object is unsafe.");
        return undefined(limits, message).map(Some);
    }
    let is_method = match value {
        Value::Text(_) => strings::METHODS.contains(&name_str),
        Value::Dict(_) => DICT_METHODS.contains(&name_str),
        Value::List(_) => LIST_METHODS.contains(&name_str),
        Value::Tuple(_) | Value::Range(_) => matches!(name_str, "count" | "index"),
        Value::Float(_) => name_str == "is_integer",
        Value::Loop(_) => matches!(name_str, "cycle" | "changed"),
        Value::Cycler(_) => matches!(name_str, "next" | "reset"),
        Value::Function(function) => *function == "dict" && name_str == "fromkeys",
        _none => false,
    };
    if is_method {
        limits.bytes(size_of::<Method>())?;
        let method = Method { value: value.clone(), name: name.clone() };
        return Ok(Some(Value::Method(Rc::new(method))));
    }
    field(limits, value, name_str)
}

fn field(limits: &Limits, value: &Value, name: &str) -> Outcome<Option<Value>> {
    Ok(match value {
        Value::Namespace(namespace) => namespace.fields.borrow().get(name).cloned(),
        Value::Loop(each) => loop_field(each, name),
        Value::Cycler(cycler) if name == "current" => {
            cycler.items.items.get(cycler.index.get()).cloned()
        }
        // What `groupby` gives: a tuple whose parts have names.
        Value::Tuple(tuple) if tuple.items.len() == 2 => match name {
            "grouper" => Some(tuple.items[0].clone()),
            "list" => Some(tuple.items[1].clone()),
            _other => None,
        },
        Value::Macro(closure) => match name {
            "name" => Some(Value::Text(closure.definition.name.clone().into())),
            "arguments" => {
                let names = closure.definition.parameters.iter();
                let names = names.map(|name| Value::Text(Arc::clone(name).into())).collect();
                Some(Value::tuple(limits, names)?)
            }
            _other => None,
        },
        Value::Range(range) => match name {
            "start" => Some(Value::Int(range.start)),
            "stop" => Some(Value::Int(range.stop)),
            "step" => Some(Value::Int(range.step)),
            _other => None,
        },
        _other => None,
    })
}

fn loop_field(each: &Loop, name: &str) -> Option<Value> {
    let (items, index) = (&each.items.items, each.index.get());
    let number = |number: usize| Some(Value::Int(number as i128));
    match name {
        "index0" => number(index),
        "index" => number(index + 1),
        "length" => number(items.len()),
        "revindex0" => number(items.len() - index - 1),
        "revindex" => number(items.len() - index),
        "first" => Some(Value::Bool(index == 0)),
        "last" => Some(Value::Bool(index + 1 == items.len())),
        "depth0" => number(each.level),
        "depth" => number(each.level + 1),
        "previtem" if index > 0 => Some(items[index - 1].clone()),
        "previtem" => Some(Value::undefined("there is no previous item")),
        "nextitem" => {
            let next = items.get(index + 1).cloned();
            Some(next.unwrap_or_else(|| Value::undefined("there is no next item")))
        }
        _other => None,
    }
}
