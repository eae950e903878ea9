//! The filter `pprint`: Python's `pprint.pformat`, 80 columns wide.

use super::compare;
use super::fault::Outcome;
use super::limits::Limits;
use super::printing::{self, Writer, quoted};
use super::strings;
use super::value::{Dict, Value};

const WIDTH: usize = 80;

pub fn pformat(limits: &Limits, value: &Value) -> Outcome<String> {
    let mut pretty = Pretty { writer: Writer::new(limits), level: 0 };
    pretty.value(value, 0, 0)?;
    Ok(pretty.writer.text)
}

struct Pretty<'a> {
    writer: Writer<'a>,
    level: usize,
}

impl Pretty<'_> {
    /// `indent`: the column it begins in; `allowance`: how many characters follow in its last line
    fn value(&mut self, value: &Value, indent: usize, allowance: usize) -> Outcome<()> {
        let limits = self.writer.limits;
        let _level = limits.enter()?;
        let value = &sorted(limits, value)?;
        let line = printing::repr(limits, value)?;
        if line.chars().count() <= WIDTH.saturating_sub(indent + allowance) {
            return self.writer.push(&line);
        }
        self.level += 1;
        let written = match value {
            Value::Dict(dict) => self.dict(dict, indent, allowance + 1),
            Value::List(list) => self.items(("[", "]"), &list.items, indent, allowance + 1),
            Value::Tuple(list) if list.items.len() == 1 => {
                self.items(("(", ",)"), &list.items, indent, allowance + 2)
            }
            Value::Tuple(list) => self.items(("(", ")"), &list.items, indent, allowance + 1),
            Value::Text(text) if !text.is_empty() => self.text(text, indent, allowance),
            _other => self.writer.push(&line),
        };
        self.level -= 1;
        written
    }

    fn next_line(&mut self, index: usize, indent: usize) -> Outcome<()> {
        if index == 0 {
            return Ok(());
        }
        self.writer.push(",\n")?;
        self.writer.repeat(" ", indent)
    }

    fn items(
        &mut self,
        (open, close): (&str, &str),
        items: &[Value],
        indent: usize,
        allowance: usize,
    ) -> Outcome<()> {
        self.writer.push(open)?;
        for (index, item) in items.iter().enumerate() {
            self.next_line(index, indent + 1)?;
            let last = index + 1 == items.len();
            self.value(item, indent + 1, if last { allowance } else { 1 })?;
        }
        self.writer.push(close)
    }

    fn dict(&mut self, dict: &Dict, indent: usize, allowance: usize) -> Outcome<()> {
        self.writer.push("{")?;
        for (index, (key, value)) in dict.entries.values().enumerate() {
            self.next_line(index, indent + 1)?;
            let key = printing::repr(self.writer.limits, key)?;
            self.writer.push(&key)?;
            self.writer.push(": ")?;
            let last = index + 1 == dict.entries.len();
            let column = indent + 1 + key.chars().count() + 2;
            self.value(value, column, if last { allowance } else { 1 })?;
        }
        self.writer.push("}")
    }

    /// A long string, as several one below the other.
    fn text(&mut self, text: &str, indent: usize, allowance: usize) -> Outcome<()> {
        let outermost = self.level == 1;
        let (indent, allowance) =
            if outermost { (indent + 1, allowance + 1) } else { (indent, allowance) };
        let chunks = chunks(text, WIDTH.saturating_sub(indent), allowance);
        if let [only] = &chunks[..] {
            return self.writer.push(only);
        }
        self.writer.push(if outermost { "(" } else { "" })?;
        for (index, chunk) in chunks.iter().enumerate() {
            if index > 0 {
                self.writer.push("\n")?;
                self.writer.repeat(" ", indent)?;
            }
            self.writer.push(chunk)?;
        }
        self.writer.push(if outermost { ")" } else { "" })
    }
}

/// Dicts are printed in the order of their keys.
fn sorted(limits: &Limits, value: &Value) -> Outcome<Value> {
    match value {
        Value::Dict(dict) => {
            let keys: Vec<_> = dict.entries.values().map(|(key, _)| key.clone()).collect();
            // Keys without an order stay as they are.
            let places = compare::sorted(limits, &keys, false)
                .unwrap_or_else(|_fault| (0..keys.len()).collect());
            let pair = |place: usize| {
                let (key, value) = &dict.entries[place];
                Ok((key.clone(), sorted(limits, value)?))
            };
            Value::dict(limits, places.into_iter().map(pair).collect::<Outcome<_>>()?)
        }
        Value::List(list) => Value::list(limits, sorted_items(limits, &list.items)?),
        Value::Tuple(list) => Value::tuple(limits, sorted_items(limits, &list.items)?),
        other => Ok(other.clone()),
    }
}

fn sorted_items(limits: &Limits, items: &[Value]) -> Outcome<Vec<Value>> {
    items.iter().map(|item| sorted(limits, item)).collect()
}

fn chunks(text: &str, width: usize, allowance: usize) -> Vec<String> {
    let lines = strings::lines(text, true);
    let mut chunks = vec![];
    for (number, line) in lines.iter().enumerate() {
        let last_line = number + 1 == lines.len();
        let most = if last_line { width.saturating_sub(allowance) } else { width };
        let whole = quoted(line);
        if whole.chars().count() <= most {
            chunks.push(whole);
            continue;
        }
        let parts = words(line);
        let mut current = String::new();
        for (index, part) in parts.iter().enumerate() {
            let last = last_line && index + 1 == parts.len();
            let most = if last { width.saturating_sub(allowance) } else { width };
            let candidate = format!("{current}{part}");
            if quoted(&candidate).chars().count() <= most {
                current = candidate;
                continue;
            }
            if !current.is_empty() {
                chunks.push(quoted(&current));
            }
            current = (*part).to_owned();
        }
        if !current.is_empty() {
            chunks.push(quoted(&current));
        }
    }
    chunks
}

/// Words, each with the white space behind it.
fn words(line: &str) -> Vec<&str> {
    let (mut parts, mut rest) = (vec![], line);
    while !rest.is_empty() {
        let word = rest.find(strings::is_space).unwrap_or(rest.len());
        let spaces = rest[word..].find(|c| !strings::is_space(c));
        let (part, after) = rest.split_at(spaces.map_or(rest.len(), |length| word + length));
        parts.push(part);
        rest = after;
    }
    parts
}
