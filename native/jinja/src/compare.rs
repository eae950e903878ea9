//! Python's `==`, `<` and `in`.

use super::fault::{Outcome, fail};
use super::limits::Limits;
use super::value::{List, Value};
use std::cmp::Ordering;
use std::rc::Rc;

pub fn equal(limits: &Limits, left: &Value, right: &Value) -> Outcome<bool> {
    let _level = limits.enter()?;
    Ok(match (left, right) {
        (Value::Text(left), Value::Text(right)) => {
            limits.read(left.len().min(right.len()))?;
            left == right
        }
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::List(left), Value::List(right)) | (Value::Tuple(left), Value::Tuple(right)) => {
            equal_lists(limits, left, right)?
        }
        (Value::Dict(left), Value::Dict(right)) => {
            if left.entries.len() != right.entries.len() {
                return Ok(false);
            }
            for (key, (_, value)) in &left.entries {
                limits.read(key.size())?;
                match right.entries.get(key) {
                    Some((_, other)) if equal(limits, value, other)? => {}
                    _different => return Ok(false),
                }
            }
            true
        }
        (Value::Range(left), Value::Range(right)) => {
            left.len() == right.len()
                && (0..left.len().min(2)).all(|at| left.get(at).as_int() == right.get(at).as_int())
        }
        _others => numbers(left, right).map_or_else(|| same(left, right), Ordering::is_eq),
    })
}

fn equal_lists(limits: &Limits, left: &Rc<List>, right: &Rc<List>) -> Outcome<bool> {
    if Rc::ptr_eq(left, right) {
        return Ok(true);
    }
    if left.items.len() != right.items.len() {
        return Ok(false);
    }
    for (left, right) in left.items.iter().zip(&right.items) {
        if !equal(limits, left, right)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Python's `is`, for what is not copied.
pub fn same(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::None, Value::None) => true,
        (Value::Bool(left), Value::Bool(right)) => left == right,
        (Value::Int(left), Value::Int(right)) => left == right,
        (Value::Text(left), Value::Text(right)) => left == right,
        (Value::List(left), Value::List(right)) | (Value::Tuple(left), Value::Tuple(right)) => {
            Rc::ptr_eq(left, right)
        }
        (Value::View(_, left), Value::View(_, right)) => Rc::ptr_eq(left, right),
        (Value::Dict(left), Value::Dict(right)) => Rc::ptr_eq(left, right),
        (Value::Namespace(left), Value::Namespace(right)) => Rc::ptr_eq(left, right),
        (Value::Macro(left), Value::Macro(right)) => Rc::ptr_eq(left, right),
        (Value::Loop(left), Value::Loop(right)) => Rc::ptr_eq(left, right),
        (Value::Iterator(left), Value::Iterator(right)) => Rc::ptr_eq(left, right),
        (Value::Cycler(left), Value::Cycler(right)) => Rc::ptr_eq(left, right),
        (Value::Joiner(left), Value::Joiner(right)) => Rc::ptr_eq(left, right),
        (Value::Function(left), Value::Function(right)) => left == right,
        _different => false,
    }
}

/// The order of two numbers; `None` where one is none, or NaN.
fn numbers(left: &Value, right: &Value) -> Option<Ordering> {
    match (left.as_int(), right.as_int()) {
        (Some(left), Some(right)) => Some(left.cmp(&right)),
        _float => left.as_float()?.partial_cmp(&right.as_float()?),
    }
}

fn are_numbers(left: &Value, right: &Value) -> bool {
    left.as_float().is_some() && right.as_float().is_some()
}

/// `None` where neither is smaller, nor are they equal: NaN.
pub fn order(limits: &Limits, left: &Value, right: &Value) -> Outcome<Option<Ordering>> {
    let _level = limits.enter()?;
    match (left, right) {
        (Value::Text(left), Value::Text(right)) => {
            limits.read(left.len().min(right.len()))?;
            Ok(Some(left.cmp(right)))
        }
        (Value::List(left), Value::List(right)) | (Value::Tuple(left), Value::Tuple(right)) => {
            for (left, right) in left.items.iter().zip(&right.items) {
                if !equal(limits, left, right)? {
                    return order(limits, left, right);
                }
            }
            Ok(Some(left.items.len().cmp(&right.items.len())))
        }
        _numbers if are_numbers(left, right) => Ok(numbers(left, right)),
        (Value::Undefined(message), _) | (_, Value::Undefined(message)) => fail!("{message}"),
        _others => fail!("a {} and a {} have no order", left.type_name(), right.type_name()),
    }
}

pub fn contains(limits: &Limits, container: &Value, value: &Value) -> Outcome<bool> {
    match container {
        Value::Text(text) => match value {
            Value::Text(part) => {
                limits.read(text.len() + part.len())?;
                Ok(text.contains(&**part))
            }
            Value::Undefined(_) => fail!("'in <string>' requires a string, not Undefined"),
            other => fail!("'in <string>' requires a string, not {}", other.type_name()),
        },
        Value::Dict(dict) => Ok(dict.get(limits, value)?.is_some()),
        Value::Namespace(_) => fail!("a Namespace cannot be searched"),
        other => {
            for item in &other.items(limits)?.items {
                if equal(limits, item, value)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
    }
}

/// Where each item goes, in the order of these keys; equal ones stay as they were. The standard
/// library's sort may panic on keys without an order, and cannot stop.
pub fn sorted(limits: &Limits, keys: &[Value], reverse: bool) -> Outcome<Vec<usize>> {
    let mut places: Vec<usize> = (0..keys.len()).collect();
    let mut width = 1;
    while width < places.len() {
        let mut merged = Vec::with_capacity(places.len());
        for run in places.chunks(width * 2) {
            let (left, right) = run.split_at(width.min(run.len()));
            merge(limits, keys, (left, right), reverse, &mut merged)?;
        }
        places = merged;
        width *= 2;
    }
    Ok(places)
}

fn merge(
    limits: &Limits,
    keys: &[Value],
    (mut left, mut right): (&[usize], &[usize]),
    reverse: bool,
    merged: &mut Vec<usize>,
) -> Outcome<()> {
    while let ([first, left_rest @ ..], [second, right_rest @ ..]) = (left, right) {
        let (first_key, second_key) = (&keys[*first], &keys[*second]);
        let (small, large) =
            if reverse { (first_key, second_key) } else { (second_key, first_key) };
        if order(limits, small, large)? == Some(Ordering::Less) {
            merged.push(*second);
            right = right_rest;
        } else {
            merged.push(*first);
            left = left_rest;
        }
    }
    merged.extend(left.iter().chain(right));
    Ok(())
}
