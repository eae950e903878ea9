//! Jinja2's filters, and `tojson` as transformers has it.

use super::checks;
use super::eval::Renderer;
use super::fault::{Outcome, fail};
use super::format;
use super::given::{Given, int, required, text};
use super::json::{self, Layout};
use super::limits::Limits;
use super::lists;
use super::markup;
use super::member;
use super::methods;
use super::numbers;
use super::pretty;
use super::printing::{self, Writer};
use super::strings;
use super::value::{Iter, Text, Value};

pub const NAMES: [&str; 54] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

pub fn apply(renderer: &mut Renderer, name: &str, value: &Value, given: Given) -> Outcome<Value> {
    match name {
        // As in Jinja2, nothing is looked at where there is nothing: `none` has no items either.
        "map" | "select" | "reject" | "selectattr" | "rejectattr" if !value.is_true() => {
            Iter::value(&renderer.limits, vec![])
        }
        "map" => map(renderer, value, given),
        "select" | "reject" => select(renderer, value, None, name == "select", given),
        "selectattr" | "rejectattr" => {
            let mut given = given;
            if given.positional.is_empty() {
                fail!("`{name}` takes the name of an attribute");
            }
            let attribute = given.positional.remove(0);
            select(renderer, value, Some(&attribute), name == "selectattr", given)
        }
        _other => plain(&renderer.limits, name, value, given),
    }
}

/// Those that call no other filter or test.
fn plain(limits: &Limits, name: &str, value: &Value, given: Given) -> Outcome<Value> {
    match name {
        "default" | "d" => {
            let [default, falsy] = given.bind(["default_value", "boolean"])?;
            let falsy = falsy.is_some_and(|falsy| falsy.is_true());
            let replaced = matches!(value, Value::Undefined(_)) || (falsy && !value.is_true());
            let default = || default.unwrap_or_else(|| Value::text(""));
            Ok(if replaced { default() } else { value.clone() })
        }
        "length" | "count" => {
            given.none()?;
            Ok(Value::Int(value.len(limits)? as i128))
        }
        "tojson" => to_json(limits, value, given),
        "string" => {
            given.none()?;
            match value {
                Value::Text(_) => Ok(value.clone()),
                other => Ok(Value::Text(printing::str(limits, other)?.into())),
            }
        }
        "safe" => {
            given.none()?;
            Ok(Value::Text(Text::safe(printing::str(limits, value)?)))
        }
        "escape" | "e" => {
            given.none()?;
            markup::escaped(limits, value).map(Value::Text)
        }
        "lower" | "upper" | "capitalize" | "trim" | "center" | "indent" | "truncate" | "format"
            if is_safe(value) =>
        {
            of_safe_text(limits, name, value, given)
        }
        "items" => {
            given.none()?;
            match value {
                Value::Undefined(_) => Iter::value(limits, vec![]),
                Value::Dict(dict) => {
                    let items = methods::items(limits, dict)?.items(limits)?;
                    Iter::value(limits, items.items.clone())
                }
                other => fail!("`items` takes a dict, got a {}", other.type_name()),
            }
        }
        "attr" => {
            let name = given.one()?;
            // An attribute of the Python object: never an item.
            match member::attribute(limits, value, &text(&name)?.into())? {
                found @ (Value::Method(_) | Value::Undefined(_)) => Ok(found),
                _item if matches!(value, Value::Dict(_)) => {
                    Ok(Value::undefined("a dict's items are no attributes"))
                }
                found => Ok(found),
            }
        }
        "pprint" => {
            given.none()?;
            Ok(Value::Text(pretty::pformat(limits, value)?.into()))
        }
        "abs" | "int" | "float" | "round" | "filesizeformat" => {
            numbers::apply(limits, name, value, given)
        }
        "batch" | "dictsort" | "first" | "groupby" | "join" | "last" | "list" | "max" | "min"
        | "reverse" | "slice" | "sort" | "sum" | "unique" => {
            lists::apply(limits, name, value, given)
        }
        "random" | "urlize" | "wordwrap" | "xmlattr" => {
            fail!("the filter `{name}` is not supported: a prompt has no use for it")
        }
        _text => of_text(limits, name, value, given),
    }
}

fn of_text(limits: &Limits, name: &str, value: &Value, given: Given) -> Outcome<Value> {
    let source = printing::str(limits, value)?;
    match name {
        "lower" | "upper" | "capitalize" => strings::call(limits, &source, name, given),
        "trim" => {
            let [chars] = given.bind(["chars"])?;
            let given = Given { positional: chars.into_iter().collect(), keywords: vec![] };
            strings::call(limits, &source, "strip", given)
        }
        "title" => {
            given.none()?;
            made(limits, title(&source))
        }
        "center" => {
            let [width] = given.bind(["width"])?;
            strings::pad(limits, &source, "center", int(width.as_ref(), 80)?, " ")
        }
        "replace" => {
            let [old, new, count] = given.bind(["old", "new", "count"])?;
            let old = printing::str(limits, &required(old, "old")?)?;
            let new = printing::str(limits, &required(new, "new")?)?;
            let count = int(count.as_ref(), -1)?;
            Ok(Value::Text(strings::replace(limits, &source, &old, &new, count)?.into()))
        }
        "format" => printf(limits, &source.into(), given),
        "indent" => indent(limits, &source, given),
        "truncate" => truncate(limits, &source.into(), given),
        "wordcount" => {
            given.none()?;
            let is_word = |c: char| c.is_alphanumeric() || c == '_';
            let words = source.split(|c| !is_word(c)).filter(|word| !word.is_empty());
            Ok(Value::Int(words.count() as i128))
        }
        "forceescape" => {
            given.none()?;
            Ok(Value::Text(Text::safe(markup::escape(limits, &source)?)))
        }
        "striptags" => {
            given.none()?;
            made(limits, without_tags(&source))
        }
        "urlencode" => {
            given.none()?;
            url_encode(limits, value)
        }
        _unknown => fail!("there is no filter named '{name}'"),
    }
}

fn is_safe(value: &Value) -> bool {
    matches!(value, Value::Text(text) if text.safe)
}

/// The filters whose result is safe where the text is; what they add is escaped.
fn of_safe_text(limits: &Limits, name: &str, value: &Value, given: Given) -> Outcome<Value> {
    if name == "format" {
        let Value::Text(source) = value else { fail!("`format` takes a string") };
        return printf(limits, source, given);
    }
    let result = match value {
        Value::Text(source) if name == "truncate" => truncate(limits, source, given)?,
        _other => of_text(limits, name, value, given)?,
    };
    markup::marked(limits, result)
}

fn made(limits: &Limits, text: String) -> Outcome<Value> {
    limits.bytes(text.len())?;
    Ok(Value::Text(text.into()))
}

/// By the name of a filter, or by an attribute.
fn map(renderer: &mut Renderer, value: &Value, mut given: Given) -> Outcome<Value> {
    let items = value.items(&renderer.limits)?;
    let mut mapped = Vec::with_capacity(items.items.len().min(1 << 16));
    if given.positional.is_empty() {
        let [attribute, default] = given.bind(["attribute", "default"])?;
        let attribute = required(attribute, "attribute")?;
        for item in &items.items {
            mapped.push(by_path(&renderer.limits, item, &attribute, default.as_ref())?);
        }
    } else {
        let name = given.positional.remove(0);
        let name = text(&name)?;
        for item in &items.items {
            renderer.limits.steps(1 + given.count())?;
            mapped.push(renderer.filter(name, item, given.clone())?);
        }
    }
    Iter::value(&renderer.limits, mapped)
}

fn select(
    renderer: &mut Renderer,
    value: &Value,
    attribute: Option<&Value>,
    wanted: bool,
    mut given: Given,
) -> Outcome<Value> {
    let items = value.items(&renderer.limits)?;
    let test = if given.positional.is_empty() { None } else { Some(given.positional.remove(0)) };
    let mut selected = vec![];
    for item in &items.items {
        renderer.limits.steps(1 + given.count())?;
        let tested = match attribute {
            Some(attribute) => by_path(&renderer.limits, item, attribute, None)?,
            None => item.clone(),
        };
        let passes = match &test {
            None => tested.is_true(),
            Some(name) => checks::check(renderer, text(name)?, &tested, given.clone())?,
        };
        if passes == wanted {
            selected.push(item.clone());
        }
    }
    Iter::value(&renderer.limits, selected)
}

/// `a.b.0`: names and indices, one behind the other.
pub fn by_path(
    limits: &Limits,
    value: &Value,
    path: &Value,
    default: Option<&Value>,
) -> Outcome<Value> {
    let default = default.filter(|default| !matches!(default, Value::None));
    let Value::Text(path) = path else {
        return match path {
            Value::None => Ok(value.clone()),
            index => member::item(limits, value, index),
        };
    };
    limits.read(path.len())?;
    let mut value = value.clone();
    for part in path.split('.') {
        limits.steps(1)?;
        let is_index = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let key = match part.parse() {
            Ok(index) if is_index => Value::Int(index),
            _name => Value::text(part),
        };
        value = member::item(limits, &value, &key)?;
        if let (Value::Undefined(_), Some(default)) = (&value, default) {
            value = default.clone();
        }
    }
    Ok(value)
}

/// Strings are compared without their case, unless asked otherwise.
pub fn folded(limits: &Limits, value: Value, case_sensitive: bool) -> Outcome<Value> {
    match value {
        Value::Text(text) if !case_sensitive => made(limits, text.to_lowercase()),
        other => Ok(other),
    }
}

fn to_json(limits: &Limits, value: &Value, given: Given) -> Outcome<Value> {
    let [ascii, indent, separators, sort] =
        given.bind(["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Text(indent)) => Some(indent.to_string()),
        Some(width) => {
            let mut writer = Writer::new(limits);
            let width = int(Some(&width), 0)?.max(0);
            writer.repeat(" ", usize::try_from(width).unwrap_or(usize::MAX))?;
            Some(writer.text)
        }
    };
    let layout = Layout {
        ensure_ascii: is_true(ascii),
        separators: json_separators(limits, separators, indent.is_some())?,
        indent,
        sort_keys: is_true(sort),
    };
    Ok(Value::Text(json::dumps(limits, value, &layout)?.into()))
}

fn json_separators(
    limits: &Limits,
    separators: Option<Value>,
    indented: bool,
) -> Outcome<(String, String)> {
    let Some(separators) = separators.filter(|separators| !matches!(separators, Value::None))
    else {
        return Ok((if indented { "," } else { ", " }.into(), ": ".into()));
    };
    match &separators.items(limits)?.items[..] {
        [item, key] => Ok((text(item)?.to_owned(), text(key)?.to_owned())),
        _other => fail!("`separators` are two strings"),
    }
}

/// Jinja2's own: a word also begins behind `-`, brackets and `<`.
fn title(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut begins = true;
    for c in source.chars() {
        if strings::is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<') {
            begins = true;
            result.push(c);
        } else if std::mem::take(&mut begins) {
            result.extend(c.to_uppercase());
        } else {
            result.extend(c.to_lowercase());
        }
    }
    result
}

fn printf(limits: &Limits, source: &Text, given: Given) -> Outcome<Value> {
    let Given { positional, keywords } = given;
    if !positional.is_empty() && !keywords.is_empty() {
        fail!("`format` takes either positional or keyword arguments");
    }
    let values = if keywords.is_empty() {
        Value::tuple(limits, positional)?
    } else {
        let pairs = keywords.into_iter().map(|(name, value)| (Value::Text(name.into()), value));
        Value::dict(limits, pairs.collect())?
    };
    format::percent(limits, source, &values).map(Value::Text)
}

fn indent(limits: &Limits, source: &str, given: Given) -> Outcome<Value> {
    let [width, first, blank] = given.bind(["width", "first", "blank"])?;
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let indention = match width {
        Some(Value::Text(indention)) => indention.to_string(),
        width => {
            let mut writer = Writer::new(limits);
            let width = int(width.as_ref(), 4)?.max(0);
            writer.repeat(" ", usize::try_from(width).unwrap_or(usize::MAX))?;
            writer.text
        }
    };
    let (first, blank) = (is_true(first), is_true(blank));
    let ended = format!("{source}\n");
    let mut writer = Writer::new(limits);
    for (index, line) in strings::lines(&ended, false).into_iter().enumerate() {
        if index > 0 {
            writer.push("\n")?;
        }
        if if index == 0 { first } else { blank || !line.is_empty() } {
            writer.push(&indention)?;
        }
        writer.push(line)?;
    }
    Ok(Value::Text(writer.text.into()))
}

fn truncate(limits: &Limits, source: &Text, given: Given) -> Outcome<Value> {
    let [length, kill, end, leeway] = given.bind(["length", "killwords", "end", "leeway"])?;
    let end = end.unwrap_or_else(|| Value::text("..."));
    let Value::Text(end) = end else { fail!("expected a string, got a {}", end.type_name()) };
    let (length, leeway) = (int(length.as_ref(), 255)?, int(leeway.as_ref(), 5)?);
    let Ok(kept) = usize::try_from(length - end.chars().count() as i128) else {
        fail!("`truncate` to less than its end");
    };
    if leeway < 0 {
        fail!("expected leeway >= 0, got {leeway}");
    }
    if source.chars().count() as i128 <= length.saturating_add(leeway) {
        return made(limits, source.to_string());
    }
    let mut result: String = source.chars().take(kept).collect();
    if !kill.is_some_and(|kill| kill.is_true())
        && let Some((words, _)) = result.rsplit_once(' ')
    {
        result = words.to_owned();
    }
    markup::add(limits, &Text { text: result.into(), safe: source.safe }, &end)
}

/// Tags and comments go, and white space becomes single spaces.
fn without_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((text, tag)) = rest.split_once("<") {
        result.push_str(text);
        let end = if let Some(comment) = tag.strip_prefix("!--") {
            comment.find("-->").map(|at| at + "!---->".len())
        } else {
            tag.find('>').map(|at| at + 1)
        };
        let Some(end) = end else {
            result.push('<');
            rest = tag;
            break;
        };
        rest = &tag[end..];
    }
    result.push_str(rest);
    let words: Vec<&str> =
        result.split(strings::is_space).filter(|word| !word.is_empty()).collect();
    let unescaped = words.join(" ");
    let entities =
        [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#34;", "\""), ("&#39;", "'")];
    let plain = entities.into_iter().fold(unescaped, |text, (entity, c)| text.replace(entity, c));
    plain.replace("&amp;", "&")
}

fn url_encode(limits: &Limits, value: &Value) -> Outcome<Value> {
    let mut writer = Writer::new(limits);
    if let Value::Dict(dict) = value {
        for (index, (key, value)) in dict.entries.values().enumerate() {
            if index > 0 {
                writer.push("&")?;
            }
            quote(&mut writer, &printing::str(limits, key)?, true)?;
            writer.push("=")?;
            quote(&mut writer, &printing::str(limits, value)?, true)?;
        }
    } else {
        quote(&mut writer, &printing::str(limits, value)?, false)?;
    }
    Ok(Value::Text(writer.text.into()))
}

fn quote(writer: &mut Writer, text: &str, query: bool) -> Outcome<()> {
    for byte in text.bytes() {
        match byte {
            b'/' if !query => writer.push("/")?,
            b' ' if query => writer.push("+")?,
            b'_' | b'.' | b'-' | b'~' => writer.push(&char::from(byte).to_string())?,
            byte if byte.is_ascii_alphanumeric() => writer.push(&char::from(byte).to_string())?,
            byte => writer.push(&format!("%{byte:02X}"))?,
        }
    }
    Ok(())
}
