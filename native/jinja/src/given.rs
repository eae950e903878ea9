//! The arguments of a call.

use super::ast::Name;
use super::fault::{Outcome, fail};
use super::value::Value;

#[derive(Clone, Default)]
pub struct Given {
    pub positional: Vec<Value>,
    pub keywords: Vec<(Name, Value)>,
}

impl Given {
    pub fn count(&self) -> usize {
        self.positional.len() + self.keywords.len()
    }

    /// The values of these parameters. A name that begins with `/` takes no keyword, as in
    /// Python's own signatures.
    pub fn bind<const N: usize>(mut self, names: [&str; N]) -> Outcome<[Option<Value>; N]> {
        if self.positional.len() > N {
            fail!("expected at most {N} arguments, got {}", self.positional.len());
        }
        let mut values = [const { None }; N];
        for (place, value) in values.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.keywords.drain(..) {
            match names.iter().position(|known| **known == *name) {
                Some(at) if values[at].is_none() => values[at] = Some(value),
                Some(_) => fail!("the argument `{name}` is given twice"),
                None => fail!("unexpected argument `{name}`"),
            }
        }
        Ok(values)
    }

    pub fn none(self) -> Outcome<()> {
        self.bind([]).map(|[]| ())
    }

    pub fn one(self) -> Outcome<Value> {
        let [value] = self.bind(["/"])?;
        required(value, "argument")
    }
}

pub fn required(value: Option<Value>, name: &str) -> Outcome<Value> {
    match value {
        Some(value) => Ok(value),
        None => fail!("the argument `{name}` is missing"),
    }
}

/// A whole number, or the default; `None` is one where the default may stand for it.
pub fn int(value: Option<&Value>, default: i128) -> Outcome<i128> {
    match value {
        None | Some(Value::None) => Ok(default),
        Some(other) => match other.as_int() {
            Some(value) => Ok(value),
            None => fail!("expected a whole number, got a {}", other.type_name()),
        },
    }
}

pub fn text(value: &Value) -> Outcome<&str> {
    match value {
        Value::Text(text) => Ok(text),
        Value::Undefined(message) => fail!("{message}"),
        other => fail!("expected a string, got a {}", other.type_name()),
    }
}
