//! The methods of values other than strings.

use super::compare;
use super::fault::{Outcome, fail};
use super::given::{Given, required};
use super::limits::Limits;
use super::markup;
use super::strings;
use super::value::{Dict, Method, Value};
use std::rc::Rc;

pub fn call(limits: &Limits, method: &Method, given: Given) -> Outcome<Value> {
    let name = &*method.name;
    match &method.value {
        Value::Text(text) if text.safe => markup::call(limits, text, name, given),
        Value::Text(text) => strings::call(limits, text, name, given),
        Value::Dict(dict) => of_dict(limits, dict, name, given),
        Value::List(list) if name == "copy" => {
            given.none()?;
            Ok(Value::List(list.clone()))
        }
        Value::List(_) | Value::Tuple(_) | Value::Range(_) => {
            of_list(limits, &method.value, name, given)
        }
        Value::Float(value) => {
            given.none()?;
            Ok(Value::Bool(value.is_finite() && value.fract() == 0.0))
        }
        Value::Loop(each) => cycle(&given, each.index.get()),
        Value::Cycler(cycler) => {
            given.none()?;
            let index = cycler.index.get();
            let next = if name == "next" { (index + 1) % cycler.items.items.len() } else { 0 };
            cycler.index.set(next);
            Ok(if name == "next" { cycler.items.items[index].clone() } else { Value::None })
        }
        Value::Function(_) => from_keys(limits, given),
        other => fail!("a {} has no method '{name}'", other.type_name()),
    }
}

fn of_dict(limits: &Limits, dict: &Rc<Dict>, name: &str, given: Given) -> Outcome<Value> {
    if name == "get" {
        let [key, default] = given.bind(["/", "/"])?;
        let found = dict.get(limits, &required(key, "key")?)?;
        return Ok(found.cloned().or(default).unwrap_or(Value::None));
    }
    given.none()?;
    match name {
        "copy" => Ok(Value::Dict(dict.clone())),
        "keys" => view(limits, "dict_keys", dict, |key, _value| Ok(key)),
        "values" => view(limits, "dict_values", dict, |_key, value| Ok(value)),
        _items => items(limits, dict),
    }
}

pub fn items(limits: &Limits, dict: &Dict) -> Outcome<Value> {
    view(limits, "dict_items", dict, |key, value| Value::tuple(limits, vec![key, value]))
}

fn view(
    limits: &Limits,
    name: &'static str,
    dict: &Dict,
    item: impl Fn(Value, Value) -> Outcome<Value>,
) -> Outcome<Value> {
    limits.steps(dict.entries.len())?;
    let items = dict.entries.values().map(|(key, value)| item(key.clone(), value.clone()));
    let Value::List(list) = Value::list(limits, items.collect::<Outcome<_>>()?)? else {
        fail!("a view is made of a list");
    };
    Ok(Value::View(name, list))
}

fn of_list(limits: &Limits, list: &Value, name: &str, given: Given) -> Outcome<Value> {
    let [wanted, start, end] = given.bind(["/", "/", "/"])?;
    let wanted = required(wanted, "value")?;
    let items = &list.items(limits)?.items;
    if name == "count" {
        let mut count = 0;
        for item in items {
            count += i128::from(compare::equal(limits, item, &wanted)?);
        }
        return Ok(Value::Int(count));
    }
    let place = |at: Option<Value>, default: usize| match at.and_then(|at| at.as_int()) {
        None => default,
        Some(at) if at < 0 => usize::try_from(at + items.len() as i128).unwrap_or(0),
        Some(at) => usize::try_from(at).unwrap_or(usize::MAX),
    };
    let (start, end) = (place(start, 0), place(end, items.len()));
    for (index, item) in items.iter().enumerate().take(end).skip(start) {
        if compare::equal(limits, item, &wanted)? {
            return Ok(Value::Int(index as i128));
        }
    }
    fail!("the value is not in the {}", list.type_name())
}

fn cycle(given: &Given, index: usize) -> Outcome<Value> {
    match given.positional.len() {
        0 => fail!("no items for cycling given"),
        count => Ok(given.positional[index % count].clone()),
    }
}

fn from_keys(limits: &Limits, given: Given) -> Outcome<Value> {
    let [keys, value] = given.bind(["/", "/"])?;
    let value = value.unwrap_or(Value::None);
    let keys = required(keys, "keys")?.items(limits)?;
    Value::dict(limits, keys.items.iter().map(|key| (key.clone(), value.clone())).collect())
}
