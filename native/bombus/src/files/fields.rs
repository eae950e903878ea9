//! A JSON file's fields, read with errors that name file and field.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

pub struct Fields {
    pub path: PathBuf,
    pub map: Map<String, Value>,
    /// The names that somebody has asked for.
    read: RefCell<BTreeSet<String>>,
}

impl Fields {
    pub fn new(path: &Path, map: Map<String, Value>) -> Self {
        Self { path: path.to_owned(), map, read: RefCell::default() }
    }

    pub fn open(path: &Path) -> Result<Self> {
        let map = super::json(path, super::FIELDS, Error::Config)?;
        Ok(Self::new(path, map))
    }

    pub fn error(&self, field: &str, problem: impl std::fmt::Display) -> Error {
        let got = |value: &Value| format!(", got: {}", short(&value.to_string()));
        let value = self.value(field).map(got).unwrap_or_default();
        Error::Config(format!("`{}`: `{field}`: {problem}{value}", self.path.display()))
    }

    /// A value that is not served; `supported`: "silu is"
    pub fn unsupported(&self, field: &str, supported: &str) -> Error {
        let value = self.value(field).map(Value::to_string).unwrap_or_default();
        let (path, value) = (self.path.display(), short(&value));
        let message = format!("`{path}`: `{field}` of {value} is not supported, {supported}");
        Error::Unsupported(message)
    }

    /// A null is as good as nothing.
    pub fn value(&self, field: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(field.to_owned());
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Whether anybody has asked for a field.
    pub fn was_read(&self, field: &str) -> bool {
        self.read.borrow().contains(field)
    }

    pub fn required<T>(&self, field: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(field, "it is missing"))
    }

    pub fn text(&self, field: &str) -> Result<String> {
        let value = self.required(field, self.value(field))?;
        value.as_str().map(str::to_owned).ok_or_else(|| self.error(field, "expected a string"))
    }

    pub fn size(&self, field: &str) -> Result<usize> {
        let size = self.optional_size(field)?;
        self.required(field, size)
    }

    pub fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        Ok(self.optional_size(field)?.unwrap_or(default))
    }

    /// MLX's shapes are of i32, so nothing larger can be a size.
    pub fn optional_size(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.value(field) else { return Ok(None) };
        let size = value.as_u64().filter(|size| (1..=i32::MAX as u64).contains(size));
        let size =
            size.ok_or_else(|| self.error(field, "expected a whole number in 1..2147483647"))?;
        Ok(Some(size as usize))
    }

    pub fn whole_or(&self, field: &str, default: usize) -> Result<usize> {
        let Some(value) = self.value(field) else { return Ok(default) };
        let whole = value.as_u64().ok_or_else(|| self.error(field, "expected a whole number"))?;
        Ok(usize::try_from(whole).unwrap_or(usize::MAX))
    }

    pub fn number_or(&self, field: &str, default: f64) -> Result<f64> {
        let Some(value) = self.value(field) else { return Ok(default) };
        value.as_f64().ok_or_else(|| self.error(field, "expected a number"))
    }

    pub fn flag_or(&self, field: &str, default: bool) -> Result<bool> {
        let Some(value) = self.value(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.error(field, "expected true or false"))
    }

    pub fn object(&self, field: &str) -> Result<Option<Self>> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self::new(&self.path.join(field), map.clone()))),
            Some(_) => Err(self.error(field, "expected an object")),
        }
    }

    /// An id, a list of them, or nothing: numbers, of which some may be no token's.
    pub fn token_ids(&self, field: &str) -> Result<Vec<f64>> {
        let ids: Option<Vec<f64>> = match self.value(field) {
            None => return Ok(vec![]),
            Some(Value::Array(ids)) => ids.iter().map(Value::as_f64).collect(),
            Some(id) => id.as_f64().map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.error(field, "expected a token id or a list of them"))
    }
}

/// Whether a value says anything: not null, false, what is empty, or one of the `neutral` numbers.
pub fn says(value: &Value, neutral: &[f64]) -> bool {
    match value {
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(set) => *set,
        Value::Number(number) => !number.as_f64().is_some_and(|it| neutral.contains(&it)),
        Value::String(text) => !text.is_empty(),
        Value::Null => false,
    }
}

/// The characters of a value that a message shows.
const SHOWN: usize = 120;

/// A text for a message, shortened.
pub fn short(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        None => text.into(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
