//! Mutations of JSON that know its values.

use super::random::Random;
use serde_json::{Map, Value, json};

/// Numbers that somebody's arithmetic may not expect, as they stand in a file.
pub const NUMBERS: &[&str] = &[
    "0",
    "-0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "63",
    "127",
    "255",
    "256",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "0.5",
    "-0.0",
    "1e308",
    "1e-320",
    "1e999",
    "NaN",
];

/// Texts that somebody's code may not expect.
fn texts(random: &mut Random) -> String {
    let texts = [
        "", " ", "\0", "\u{fffd}", "é", "🙂", "..", "/", "../../x", "null", "true", "-1", "(", "[",
        "\\", "(a+)+", ".*",
    ];
    let text = *random.pick(&texts);
    text.repeat(if random.one_in(20) { 1 + random.size(20_000) } else { 1 })
}

/// A value in place of another. `other`: one of the same file
fn value(random: &mut Random, other: &Value) -> Value {
    match random.below(12) {
        0 => Value::Null,
        1 => random.one_in(2).into(),
        2..=5 => {
            // A value cannot hold NaN or 1e999: a marked text takes their place until it is written.
            let number = *random.pick(NUMBERS);
            serde_json::from_str(number).unwrap_or_else(|_| format!("\u{1}{number}\u{1}").into())
        }
        6 => texts(random).into(),
        7 => json!([]),
        8 => json!({}),
        9 => {
            let mut nested = other.clone();
            for _ in 0..random.size(100) {
                nested = if random.one_in(2) { json!([nested]) } else { json!({"a": nested}) };
            }
            nested
        }
        10 => {
            let most = if random.one_in(50) { 2000 } else { 20 };
            vec![other.clone(); random.size(most)].into()
        }
        _ => other.clone(),
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// Value number `place`, in the order in which they stand.
fn at<'a>(value: &'a mut Value, place: &mut usize) -> Option<&'a mut Value> {
    if *place == 0 {
        return Some(value);
    }
    *place -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| at(item, place)),
        Value::Object(fields) => fields.values_mut().find_map(|field| at(field, place)),
        _ => None,
    }
}

fn any(random: &mut Random, document: &mut Value, total: usize) -> Value {
    let mut place = random.below(total);
    at(document, &mut place).cloned().unwrap_or_default()
}

fn change_object(random: &mut Random, fields: &mut Map<String, Value>, other: Value) {
    let keys: Vec<String> = fields.keys().cloned().collect();
    let Some(key) = (!keys.is_empty()).then(|| random.pick(&keys).clone()) else {
        fields.insert(texts(random), other);
        return;
    };
    match random.below(4) {
        0 => _ = fields.remove(&key),
        1 => {
            let moved = fields.remove(&key).unwrap_or_default();
            fields.insert(texts(random), moved);
        }
        2 => _ = fields.insert(texts(random), other),
        _ => {
            let to = random.pick(&keys).clone();
            let moved = fields[&key].clone();
            fields.insert(to, moved);
        }
    }
}

fn change_array(random: &mut Random, items: &mut Vec<Value>, other: Value) {
    let place = random.below(items.len());
    match random.below(3) {
        0 if !items.is_empty() => _ = items.remove(place),
        1 => items.insert(place, other),
        _ => items.reverse(),
    }
}

/// Some changes to a document. `parts`: values of other documents that may take a place in it
pub fn mutate(random: &mut Random, document: &mut Value, parts: &[Value]) {
    for _ in 0..1 + random.size(4) {
        let total = count(document);
        let other = match parts {
            [] => any(random, document, total),
            _ if random.one_in(3) => any(random, document, total),
            _ => random.pick(parts).clone(),
        };
        let mut place = random.below(total);
        let Some(found) = at(document, &mut place) else { continue };
        match found {
            Value::Object(fields) if random.one_in(2) => change_object(random, fields, other),
            Value::Array(items) if random.one_in(2) => change_array(random, items, other),
            found => *found = value(random, &other),
        }
    }
}

/// As a file: with the numbers that JSON does not have.
pub fn written(document: &Value) -> Vec<u8> {
    let text = document.to_string().replace("\"\\u0001", "").replace("\\u0001\"", "");
    text.into_bytes()
}
