//! Python's values, as far as templates meet them. Lists, tuples and dicts never change once
//! they are made: the sandbox of transformers refuses the methods that would change them.

use super::ast::{For, Macro, Name};
use super::fault::{Outcome, fail};
use super::json_text;
use super::limits::{DEPTH, Limits};
use super::scope::Scope;
use indexmap::IndexMap;
use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

#[derive(Clone)]
pub enum Value {
    /// What an error says about it.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Text),
    List(Rc<List>),
    Tuple(Rc<List>),
    Dict(Rc<Dict>),
    /// What a dict's `keys()`, `values()` and `items()` are, by name.
    View(&'static str, Rc<List>),
    Range(Range),
    /// What can be read once: what `map` and `select` give.
    Iterator(Rc<Iter>),
    Namespace(Rc<Namespace>),
    Macro(Rc<Closure>),
    Loop(Rc<Loop>),
    Cycler(Rc<Cycler>),
    Joiner(Rc<Joiner>),
    /// One of the names that every template knows.
    Function(&'static str),
    Method(Rc<Method>),
}

/// A string.
#[derive(Clone)]
pub struct Text {
    pub text: Arc<str>,
    /// Whether it is marked as safe HTML.
    pub safe: bool,
}

pub struct List {
    pub items: Vec<Value>,
    depth: u32,
}

pub struct Dict {
    /// By key: the key as it was written, and its value.
    pub entries: IndexMap<Key, (Value, Value)>,
    depth: u32,
}

/// A key by which equal values are the same: `1`, `1.0` and `True`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Key {
    None,
    Int(i128),
    Float(u64),
    Text(Arc<str>),
    Tuple(Vec<Key>),
    Undefined,
}

#[derive(Clone, Copy)]
pub struct Range {
    pub start: i128,
    pub stop: i128,
    pub step: i128,
}

pub struct Iter {
    pub items: RefCell<std::vec::IntoIter<Value>>,
    depth: u32,
}

#[derive(Default)]
pub struct Namespace {
    pub fields: RefCell<IndexMap<Name, Value>>,
}

/// A macro with the names around its definition.
pub struct Closure {
    pub definition: Arc<Macro>,
    pub scope: Rc<Scope>,
}

pub struct Loop {
    pub items: Rc<List>,
    pub index: Cell<usize>,
    /// How many loops called themselves to get here.
    pub level: usize,
    /// What `loop(...)` runs again, and the names around it, where it is marked as recursive.
    pub again: Option<(Arc<For>, Rc<Scope>)>,
    /// What `loop.changed` was last asked.
    pub last: RefCell<Option<Value>>,
}

pub struct Cycler {
    pub items: Rc<List>,
    pub index: Cell<usize>,
}

pub struct Joiner {
    pub separator: Arc<str>,
    pub used: Cell<bool>,
}

pub struct Method {
    pub value: Value,
    pub name: Name,
}

impl Text {
    pub fn safe(text: String) -> Self {
        Self { text: text.into(), safe: true }
    }
}

/// What is safe does not differ from what is not.
impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.text
    }
}

impl From<Arc<str>> for Text {
    fn from(text: Arc<str>) -> Self {
        Self { text, safe: false }
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Arc::<str>::from(text).into()
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Arc::<str>::from(text).into()
    }
}

impl List {
    pub fn new(limits: &Limits, items: Vec<Value>) -> Outcome<Rc<Self>> {
        limits.bytes(32 + items.len() * size_of::<Value>())?;
        let depth = deeper(items.iter())?;
        Ok(Rc::new(Self { items, depth }))
    }
}

impl Dict {
    pub fn new(limits: &Limits, pairs: Vec<(Value, Value)>) -> Outcome<Rc<Self>> {
        limits.bytes(64 + pairs.len() * 4 * size_of::<Value>())?;
        let depth = deeper(pairs.iter().flat_map(|(key, value)| [key, value]))?;
        let mut entries: IndexMap<Key, (Value, Value)> = IndexMap::with_capacity(pairs.len());
        for (key, value) in pairs {
            let hashed = Key::new(limits, &key)?;
            // As in Python, the first key stays where an equal one comes.
            match entries.get_mut(&hashed) {
                Some(entry) => entry.1 = value,
                None => _ = entries.insert(hashed, (key, value)),
            }
        }
        Ok(Rc::new(Self { entries, depth }))
    }

    pub fn get(&self, limits: &Limits, key: &Value) -> Outcome<Option<&Value>> {
        let key = Key::new(limits, key)?;
        Ok(self.entries.get(&key).map(|(_, value)| value))
    }

    pub fn get_text(&self, name: &Arc<str>) -> Option<&Value> {
        self.entries.get(&Key::Text(name.clone())).map(|(_, value)| value)
    }
}

impl Key {
    pub fn new(limits: &Limits, value: &Value) -> Outcome<Self> {
        limits.steps(1)?;
        Ok(match value {
            Value::None => Self::None,
            Value::Bool(value) => Self::Int(i128::from(*value)),
            Value::Int(value) => Self::Int(*value),
            Value::Float(value) => float_key(*value),
            Value::Text(text) => {
                limits.read(text.len())?;
                Self::Text(text.text.clone())
            }
            Value::Tuple(tuple) => {
                limits.bytes(tuple.items.len() * size_of::<Self>())?;
                let keys = tuple.items.iter().map(|item| Self::new(limits, item));
                Self::Tuple(keys.collect::<Outcome<_>>()?)
            }
            Value::Undefined(_) => Self::Undefined,
            other => fail!("a {} cannot be a key", other.type_name()),
        })
    }
}

impl Key {
    /// About how many bytes are read to find it.
    pub fn size(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Tuple(keys) => keys.iter().map(Self::size).sum::<usize>() + keys.len(),
            _number => 1,
        }
    }
}

fn float_key(value: f64) -> Key {
    let whole = value as i128;
    if whole as f64 == value && whole != i128::MAX {
        Key::Int(whole)
    } else {
        Key::Float(value.to_bits())
    }
}

impl Iter {
    pub fn value(limits: &Limits, items: Vec<Value>) -> Outcome<Value> {
        limits.bytes(64 + items.len() * size_of::<Value>())?;
        let depth = deeper(items.iter())?;
        Ok(Value::Iterator(Rc::new(Self { items: RefCell::new(items.into_iter()), depth })))
    }
}

impl Range {
    /// `None` where a number is too large.
    pub fn new(start: Option<i128>, stop: Option<i128>, step: Option<i128>) -> Outcome<Self> {
        let small = |number: Option<i128>| number.filter(|number| number.unsigned_abs() < 1 << 100);
        match (small(start), small(stop), small(step)) {
            (_, _, Some(0)) => fail!("a range's step cannot be 0"),
            (Some(start), Some(stop), Some(step)) => Ok(Self { start, stop, step }),
            _large => fail!("a number is too large"),
        }
    }

    pub fn len(self) -> usize {
        let span = if self.step > 0 { self.stop - self.start } else { self.start - self.stop };
        let steps = (span.max(0) + self.step.abs() - 1) / self.step.abs();
        usize::try_from(steps).unwrap_or(usize::MAX)
    }

    pub fn get(self, index: usize) -> Value {
        Value::Int(self.start + self.step * index as i128)
    }
}

/// The depth of what holds these values.
fn deeper<'a>(values: impl Iterator<Item = &'a Value>) -> Outcome<u32> {
    let depth = values.map(Value::depth).max().unwrap_or(0);
    if depth >= DEPTH {
        fail!("lists or objects lie more than {DEPTH} deep in each other");
    }
    Ok(depth + 1)
}

impl Value {
    pub fn text(text: &str) -> Self {
        Self::Text(text.into())
    }

    pub fn list(limits: &Limits, items: Vec<Self>) -> Outcome<Self> {
        List::new(limits, items).map(Self::List)
    }

    pub fn tuple(limits: &Limits, items: Vec<Self>) -> Outcome<Self> {
        List::new(limits, items).map(Self::Tuple)
    }

    pub fn dict(limits: &Limits, pairs: Vec<(Self, Self)>) -> Outcome<Self> {
        Dict::new(limits, pairs).map(Self::Dict)
    }

    pub fn undefined(message: &str) -> Self {
        Self::Undefined(message.into())
    }

    /// How deep values lie in this one. Namespaces count as flat: they are emptied one by one.
    fn depth(&self) -> u32 {
        match self {
            Self::List(list) | Self::Tuple(list) | Self::View(_, list) => list.depth,
            Self::Dict(dict) => dict.depth,
            Self::Iterator(iterator) => iterator.depth,
            Self::Loop(each) => each.items.depth + 1,
            Self::Cycler(cycler) => cycler.items.depth + 1,
            Self::Method(method) => method.value.depth() + 1,
            _flat => 0,
        }
    }

    /// Python's name of the type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "str",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::View(name, _) => name,
            Self::Range(_) => "range",
            Self::Iterator(_) => "generator",
            Self::Namespace(_) => "Namespace",
            Self::Macro(_) => "Macro",
            Self::Loop(_) => "LoopContext",
            Self::Cycler(_) => "Cycler",
            Self::Joiner(_) => "Joiner",
            Self::Function(_) => "function",
            Self::Method(_) => "builtin_function_or_method",
        }
    }

    /// How an error calls it.
    pub fn object_name(&self) -> String {
        match self {
            Self::None => "None".into(),
            other => format!("{} object", other.type_name()),
        }
    }

    pub fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Text(text) => !text.is_empty(),
            Self::List(list) | Self::Tuple(list) | Self::View(_, list) => !list.items.is_empty(),
            Self::Dict(dict) => !dict.entries.is_empty(),
            Self::Range(range) => range.len() > 0,
            Self::Loop(each) => !each.items.items.is_empty(),
            _object => true,
        }
    }

    /// A whole number; `True` is 1.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(value) => Some(*value),
            Self::Bool(value) => Some(i128::from(*value)),
            _other => None,
        }
    }

    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            other => other.as_int().map(|value| value as f64),
        }
    }

    /// What can be read one by one.
    pub fn items(&self, limits: &Limits) -> Outcome<Rc<List>> {
        let items = match self {
            Self::List(list) | Self::Tuple(list) | Self::View(_, list) => return Ok(list.clone()),
            Self::Undefined(_) => vec![],
            Self::Dict(dict) => dict.entries.values().map(|(key, _)| key.clone()).collect(),
            Self::Range(range) => (0..range.len()).map(|index| range.get(index)).collect(),
            Self::Iterator(iterator) => iterator.items.borrow_mut().by_ref().collect(),
            Self::Text(text) => {
                limits.bytes(text.len() * size_of::<Self>())?;
                let mut buffer = [0; 4];
                text.chars().map(|c| Self::text(c.encode_utf8(&mut buffer))).collect()
            }
            other => fail!("a {} cannot be read one by one", other.type_name()),
        };
        List::new(limits, items)
    }

    pub fn is_iterable(&self) -> bool {
        matches!(
            self,
            Self::Undefined(_)
                | Self::List(_)
                | Self::Tuple(_)
                | Self::View(..)
                | Self::Dict(_)
                | Self::Range(_)
                | Self::Iterator(_)
                | Self::Text(_)
                | Self::Loop(_)
        )
    }

    /// What `length` says.
    pub fn len(&self, limits: &Limits) -> Outcome<usize> {
        Ok(match self {
            Self::Undefined(_) => 0,
            Self::List(list) | Self::Tuple(list) | Self::View(_, list) => list.items.len(),
            Self::Dict(dict) => dict.entries.len(),
            Self::Range(range) => range.len(),
            Self::Loop(each) => each.items.items.len(),
            Self::Text(text) => {
                limits.read(text.len())?;
                text.chars().count()
            }
            other => fail!("a {} has no length", other.type_name()),
        })
    }

    /// Of JSON; its depth is bounded by who parsed it.
    pub fn from_json(limits: &Limits, json: &serde_json::Value) -> Outcome<Self> {
        use serde_json::Value as Json;
        Ok(match json {
            Json::Null => Self::None,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(value), _) => Self::Int(value.into()),
                (None, Some(value)) => Self::Int(value.into()),
                (None, None) => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => {
                limits.bytes(text.len())?;
                Self::text(text)
            }
            Json::Array(items) => {
                let items = items.iter().map(|item| Self::from_json(limits, item));
                Self::list(limits, items.collect::<Outcome<_>>()?)?
            }
            Json::Object(fields) => {
                if let Some(value) = json_text::whole(fields) {
                    return Ok(Self::Int(value));
                }
                let pair = |(name, value): (&String, &Json)| {
                    limits.bytes(name.len())?;
                    Ok((Self::text(name), Self::from_json(limits, value)?))
                };
                Self::dict(limits, fields.iter().map(pair).collect::<Outcome<_>>()?)?
            }
        })
    }
}
