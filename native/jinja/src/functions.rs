//! The functions that every template knows: those of Jinja2, and those that transformers adds.

use super::eval::Renderer;
use super::fault::{Outcome, fail};
use super::given::{Given, int, required, text};
use super::printing;
use super::time;
use super::value::{Cycler, Joiner, Namespace, Range, Value};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

pub const NAMES: [&str; 7] =
    ["cycler", "dict", "joiner", "namespace", "raise_exception", "range", "strftime_now"];

/// Jinja2's sandbox refuses longer ranges.
const LONGEST_RANGE: usize = 100_000;

pub fn call(renderer: &mut Renderer, name: &str, given: Given) -> Outcome<Value> {
    match name {
        "range" => range(given),
        "dict" => {
            let pairs = pairs(renderer, given)?;
            Value::dict(&renderer.limits, pairs)
        }
        "namespace" => namespace(renderer, given),
        "cycler" => {
            let items = Value::list(&renderer.limits, given.positional)?;
            let items = items.items(&renderer.limits)?;
            if items.items.is_empty() {
                fail!("at least one item has to be provided");
            }
            Ok(Value::Cycler(Rc::new(Cycler { items, index: Cell::new(0) })))
        }
        "joiner" => {
            let [separator] = given.bind(["sep"])?;
            let separator = separator.unwrap_or_else(|| Value::text(", "));
            let separator = printing::str(&renderer.limits, &separator)?.into();
            Ok(Value::Joiner(Rc::new(Joiner { separator, used: Cell::new(false) })))
        }
        "raise_exception" => {
            let [message] = given.bind(["message"])?;
            fail!("{}", printing::str(&renderer.limits, &required(message, "message")?)?)
        }
        _strftime_now => {
            let [format] = given.bind(["format"])?;
            let format = required(format, "format")?;
            let formatted = time::now(&renderer.limits, text(&format)?)?;
            Ok(Value::Text(formatted.into()))
        }
    }
}

fn range(given: Given) -> Outcome<Value> {
    let [first, second, step] = given.bind(["/", "/", "/"])?;
    let first = int(Some(&required(first, "stop")?), 0)?;
    let (start, stop) = match second {
        None => (0, first),
        Some(stop) => (first, int(Some(&stop), 0)?),
    };
    let range = Range::new(Some(start), Some(stop), Some(int(step.as_ref(), 1)?))?;
    if range.len() > LONGEST_RANGE {
        fail!("a range is longer than {LONGEST_RANGE}");
    }
    Ok(Value::Range(range))
}

/// A dict, or a list of pairs, and keywords.
fn pairs(renderer: &Renderer, given: Given) -> Outcome<Vec<(Value, Value)>> {
    let limits = &renderer.limits;
    let Given { positional, keywords } = given;
    let [source] = Given { positional, keywords: vec![] }.bind(["/"])?;
    let mut pairs = vec![];
    match source {
        None => {}
        Some(Value::Dict(dict)) => {
            limits.bytes(dict.entries.len() * 2 * size_of::<Value>())?;
            pairs.extend(dict.entries.values().cloned());
        }
        Some(other) => {
            for pair in &other.items(limits)?.items {
                match &pair.items(limits)?.items[..] {
                    [key, value] => pairs.push((key.clone(), value.clone())),
                    _other => fail!("a dict is made of pairs"),
                }
            }
        }
    }
    pairs.extend(keywords.into_iter().map(|(name, value)| (Value::Text(name.into()), value)));
    Ok(pairs)
}

fn namespace(renderer: &mut Renderer, given: Given) -> Outcome<Value> {
    renderer.limits.bytes(256)?;
    let pairs = pairs(renderer, given)?;
    let mut fields = indexmap::IndexMap::new();
    for (name, value) in pairs {
        let Value::Text(name) = name else { fail!("a namespace's fields have names") };
        check_field(&name)?;
        fields.insert(name.text, value);
    }
    let namespace = Rc::new(Namespace { fields: RefCell::new(fields) });
    renderer.keep_namespace(&namespace);
    Ok(Value::Namespace(namespace))
}

pub fn check_field(name: &str) -> Outcome<()> {
    if name.starts_with('_') {
        fail!("a namespace's field cannot begin with an underscore: `{name}`");
    }
    Ok(())
}
