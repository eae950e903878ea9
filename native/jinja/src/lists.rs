//! The filters of lists.

use super::ast::Binary;
use super::compare;
use super::fault::{Outcome, fail};
use super::filters::{by_path, folded};
use super::given::{Given, int, required};
use super::limits::Limits;
use super::operators;
use super::printing::{self, Writer};
use super::value::{Iter, Key, Text, Value};
use std::cmp::Ordering;
use std::collections::HashSet;

pub fn apply(limits: &Limits, name: &str, value: &Value, given: Given) -> Outcome<Value> {
    match name {
        "list" => {
            given.none()?;
            Value::list(limits, value.items(limits)?.items.clone())
        }
        "first" => {
            given.none()?;
            let first = match value {
                Value::Iterator(iterator) => iterator.items.borrow_mut().next(),
                other => other.items(limits)?.items.first().cloned(),
            };
            Ok(first.unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
        }
        "last" => {
            given.none()?;
            if matches!(value, Value::Iterator(_)) {
                fail!("'generator' object is not reversible");
            }
            let last = value.items(limits)?.items.last().cloned();
            Ok(last.unwrap_or_else(|| Value::undefined("No last item, sequence was empty.")))
        }
        "reverse" => {
            given.none()?;
            reverse(limits, value)
        }
        "join" => join(limits, value, given),
        "sort" => sort(limits, value, given),
        "dictsort" => dict_sort(limits, value, given),
        "unique" => unique(limits, value, given),
        "min" | "max" => extreme(limits, value, name == "min", given),
        "sum" => sum(limits, value, given),
        "groupby" => group_by(limits, value, given),
        "batch" => batch(limits, value, given),
        _slice => slice(limits, value, given),
    }
}

fn reverse(limits: &Limits, value: &Value) -> Outcome<Value> {
    if let Value::Text(text) = value {
        limits.bytes(text.len())?;
        let reversed = text.chars().rev().collect::<String>();
        return Ok(Value::Text(Text { text: reversed.into(), safe: text.safe }));
    }
    let mut items = value.items(limits)?.items.clone();
    items.reverse();
    match value {
        Value::Iterator(_) => Value::list(limits, items),
        _sequence => Iter::value(limits, items),
    }
}

fn join(limits: &Limits, value: &Value, given: Given) -> Outcome<Value> {
    let [separator, attribute] = given.bind(["d", "attribute"])?;
    let separator = separator.map_or(Ok(String::new()), |it| printing::str(limits, &it))?;
    let attribute = attribute.unwrap_or(Value::None);
    let mut writer = Writer::new(limits);
    for (index, item) in value.items(limits)?.items.iter().enumerate() {
        if index > 0 {
            writer.push(&separator)?;
        }
        writer.str(&by_path(limits, item, &attribute, None)?)?;
    }
    Ok(Value::Text(writer.text.into()))
}

fn is_true(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.is_true())
}

/// What items are sorted and grouped by.
fn keys(
    limits: &Limits,
    items: &[Value],
    attribute: &Value,
    default: Option<&Value>,
    case_sensitive: bool,
) -> Outcome<Vec<Value>> {
    let key = |item| folded(limits, by_path(limits, item, attribute, default)?, case_sensitive);
    items.iter().map(key).collect()
}

fn sort(limits: &Limits, value: &Value, given: Given) -> Outcome<Value> {
    let [reverse, case, attribute] = given.bind(["reverse", "case_sensitive", "attribute"])?;
    let items = value.items(limits)?;
    let (reverse, case) = (is_true(reverse), is_true(case));
    let mut columns = vec![];
    match attribute.unwrap_or(Value::None) {
        Value::Text(attributes) => {
            for attribute in attributes.split(',') {
                let attribute = Value::text(attribute);
                columns.push(keys(limits, &items.items, &attribute, None, case)?);
            }
        }
        other => columns.push(keys(limits, &items.items, &other, None, case)?),
    }
    let row = |at: usize| {
        let row = columns.iter().map(|column| column[at].clone()).collect();
        Value::list(limits, row)
    };
    let rows = (0..items.items.len()).map(row).collect::<Outcome<Vec<_>>>()?;
    let places = compare::sorted(limits, &rows, reverse)?;
    Value::list(limits, places.into_iter().map(|at| items.items[at].clone()).collect())
}

fn dict_sort(limits: &Limits, value: &Value, given: Given) -> Outcome<Value> {
    let [case, by, reverse] = given.bind(["case_sensitive", "by", "reverse"])?;
    let column = match by {
        None => 0,
        Some(Value::Text(by)) if &*by == "key" => 0,
        Some(Value::Text(by)) if &*by == "value" => 1,
        Some(_) => fail!("You can only sort by either \"key\" or \"value\""),
    };
    let Value::Dict(dict) = value else { fail!("`dictsort` takes a dict") };
    let items = super::methods::items(limits, dict)?.items(limits)?;
    let keys = keys(limits, &items.items, &Value::Int(column), None, is_true(case))?;
    let places = compare::sorted(limits, &keys, is_true(reverse))?;
    Value::list(limits, places.into_iter().map(|at| items.items[at].clone()).collect())
}

fn unique(limits: &Limits, value: &Value, given: Given) -> Outcome<Value> {
    let [case, attribute] = given.bind(["case_sensitive", "attribute"])?;
    let items = value.items(limits)?;
    let attribute = attribute.unwrap_or(Value::None);
    let keys = keys(limits, &items.items, &attribute, None, is_true(case))?;
    let (mut seen, mut found) = (HashSet::new(), vec![]);
    for (item, key) in items.items.iter().zip(&keys) {
        if seen.insert(Key::new(limits, key)?) {
            found.push(item.clone());
        }
    }
    Iter::value(limits, found)
}

fn extreme(limits: &Limits, value: &Value, smallest: bool, given: Given) -> Outcome<Value> {
    let [case, attribute] = given.bind(["case_sensitive", "attribute"])?;
    let items = value.items(limits)?;
    let attribute = attribute.unwrap_or(Value::None);
    let keys = keys(limits, &items.items, &attribute, None, is_true(case))?;
    let mut best = 0;
    for at in 1..keys.len() {
        let order = compare::order(limits, &keys[at], &keys[best])?;
        if order == Some(if smallest { Ordering::Less } else { Ordering::Greater }) {
            best = at;
        }
    }
    let empty = || Value::undefined("No aggregated item, sequence was empty.");
    Ok(items.items.get(best).cloned().unwrap_or_else(empty))
}

fn sum(limits: &Limits, value: &Value, given: Given) -> Outcome<Value> {
    let [attribute, start] = given.bind(["attribute", "start"])?;
    let attribute = attribute.unwrap_or(Value::None);
    let mut total = start.unwrap_or(Value::Int(0));
    if matches!(total, Value::Text(_)) {
        fail!("sum() can't sum strings");
    }
    for item in &value.items(limits)?.items {
        let item = by_path(limits, item, &attribute, None)?;
        total = operators::binary(limits, Binary::Add, &total, &item)?;
    }
    Ok(total)
}

fn group_by(limits: &Limits, value: &Value, given: Given) -> Outcome<Value> {
    let [attribute, default, case] = given.bind(["attribute", "default", "case_sensitive"])?;
    let attribute = required(attribute, "attribute")?;
    let items = &value.items(limits)?.items;
    let default = default.as_ref();
    let keys = keys(limits, items, &attribute, default, is_true(case))?;
    let mut groups: Vec<(usize, Vec<Value>)> = vec![];
    for at in compare::sorted(limits, &keys, false)? {
        match groups.last_mut() {
            Some((first, group)) if compare::equal(limits, &keys[*first], &keys[at])? => {
                group.push(items[at].clone());
            }
            _another => groups.push((at, vec![items[at].clone()])),
        }
    }
    let group = |(first, group): (usize, Vec<Value>)| {
        let key = by_path(limits, &items[first], &attribute, default)?;
        let group = Value::list(limits, group)?;
        Value::tuple(limits, vec![key, group])
    };
    Value::list(limits, groups.into_iter().map(group).collect::<Outcome<_>>()?)
}

fn count(value: Option<Value>, name: &str) -> Outcome<usize> {
    let count = int(Some(&required(value, name)?), 0)?;
    match usize::try_from(count) {
        Ok(count) if count > 0 => Ok(count),
        _wrong => fail!("`{name}` is above 0, got {count}"),
    }
}

fn batch(limits: &Limits, value: &Value, given: Given) -> Outcome<Value> {
    let [size, fill] = given.bind(["linecount", "fill_with"])?;
    let size = count(size, "linecount")?;
    let mut batches = vec![];
    for chunk in value.items(limits)?.items.chunks(size) {
        let mut items = chunk.to_vec();
        if let Some(fill) = fill.as_ref().filter(|fill| !matches!(fill, Value::None)) {
            limits.bytes((size - items.len()).saturating_mul(size_of::<Value>()))?;
            items.resize(size, fill.clone());
        }
        batches.push(Value::list(limits, items)?);
    }
    Iter::value(limits, batches)
}

fn slice(limits: &Limits, value: &Value, given: Given) -> Outcome<Value> {
    let [slices, fill] = given.bind(["slices", "fill_with"])?;
    let slices = count(slices, "slices")?;
    limits.bytes(slices.saturating_mul(64))?;
    let items = value.items(limits)?;
    let (each, more) = (items.items.len() / slices, items.items.len() % slices);
    let (mut result, mut start) = (vec![], 0);
    for number in 0..slices {
        let length = each + usize::from(number < more);
        let mut part = items.items[start..start + length].to_vec();
        start += length;
        if let Some(fill) = fill.as_ref().filter(|fill| !matches!(fill, Value::None))
            && number >= more
        {
            part.push(fill.clone());
        }
        result.push(Value::list(limits, part)?);
    }
    Iter::value(limits, result)
}
