//! The fields of an `adapter_config.json`, as Python writes them: null where nothing is set, 4.0
//! where a whole number is meant.

use super::file::File;
use crate::error::Result;
use serde_json::{Map, Value};

/// The ranks that there may be.
pub const RANKS: std::ops::RangeInclusive<usize> = 1..=65_536;

/// The characters of a value or a name that a message shows.
const SHOWN: usize = 120;

pub struct Fields<'a> {
    pub file: &'a File,
    pub map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name)
    }

    /// Whether a field has a value that Python takes for true.
    pub fn is_set(&self, name: &str) -> bool {
        match self.get(name) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(set)) => *set,
            Some(Value::Number(number)) => number.as_f64() != Some(0.0),
            Some(Value::String(text)) => !text.is_empty(),
            Some(Value::Array(items)) => !items.is_empty(),
            Some(Value::Object(fields)) => !fields.is_empty(),
        }
    }

    pub fn flag(&self, name: &str) -> Result<bool> {
        match self.get(name) {
            None | Some(Value::Null | Value::Bool(_) | Value::Number(_)) => Ok(self.is_set(name)),
            Some(value) => Err(self.wrong(name, "true or false", value)),
        }
    }

    /// `None` where the field is missing.
    pub fn rank(&self, name: &str) -> Result<Option<usize>> {
        self.get(name).map(|value| self.as_rank(&format!("`{name}`"), value)).transpose()
    }

    /// `None` where the field is missing.
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        self.get(name).map(|value| self.as_number(&format!("`{name}`"), value)).transpose()
    }

    /// `null` is none.
    pub fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(value) => Err(self.wrong(name, "an object", value)),
        }
    }

    /// `what`: the field, and the key in it
    pub fn as_rank(&self, what: &str, value: &Value) -> Result<usize> {
        let whole = value.as_f64().filter(|number| number.fract() == 0.0);
        let rank = whole.map(|number| number as usize).filter(|rank| RANKS.contains(rank));
        rank.ok_or_else(|| {
            let expected = format!("a whole number from {} to {}", RANKS.start(), RANKS.end());
            self.unexpected(what, &expected, value)
        })
    }

    pub fn as_number(&self, what: &str, value: &Value) -> Result<f64> {
        let number = value.as_f64().filter(|number| (*number as f32).is_finite());
        number.ok_or_else(|| self.unexpected(what, "a finite number", value))
    }

    fn wrong(&self, name: &str, expected: &str, value: &Value) -> crate::error::Error {
        self.unexpected(&format!("`{name}`"), expected, value)
    }

    pub fn unexpected(&self, what: &str, expected: &str, value: &Value) -> crate::error::Error {
        let got = shown(value);
        self.file.wrong(format!("expected {what} to be {expected}, got: {got}"))
    }
}

/// A value for a message, shortened.
pub fn shown(value: &Value) -> String {
    short(&value.to_string())
}

/// A text for a message, shortened.
pub fn short(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        None => text.into(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
