//! The methods of Python's strings.

use super::fault::{Outcome, fail};
use super::format;
use super::given::{Given, int, required, text};
use super::limits::Limits;
use super::printing::{Writer, is_printable};
use super::value::Value;
use unicode_general_category::{GeneralCategory, get_general_category};

/// All of them but those for bytes and tables: `encode`, `maketrans`, `translate`.
pub const METHODS: [&str; 44] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];

/// What `str.isspace` says, character by character.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

pub fn strip_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

pub fn call(limits: &Limits, value: &str, name: &str, given: Given) -> Outcome<Value> {
    limits.read(value.len())?;
    if let Some(answer) = predicate(value, name) {
        return given.none().map(|()| Value::Bool(answer));
    }
    if let Some(result) = changed_case(value, name) {
        given.none()?;
        return made(limits, result);
    }
    match name {
        "strip" | "lstrip" | "rstrip" => strip(limits, value, name, given),
        "split" | "rsplit" => split(limits, value, name == "rsplit", given),
        "splitlines" => {
            let [keep] = given.bind(["keepends"])?;
            let keep = keep.is_some_and(|keep| keep.is_true());
            texts(limits, lines(value, keep))
        }
        "partition" | "rpartition" => partition(limits, value, name, given),
        "removeprefix" => {
            let prefix = given.one()?;
            made(limits, value.strip_prefix(text(&prefix)?).unwrap_or(value).to_owned())
        }
        "removesuffix" => {
            let suffix = given.one()?;
            made(limits, value.strip_suffix(text(&suffix)?).unwrap_or(value).to_owned())
        }
        "startswith" | "endswith" => affix(limits, value, name == "startswith", given),
        "find" | "rfind" | "index" | "rindex" => find(limits, value, name, given),
        "count" => count(limits, value, given),
        "replace" => {
            let [old, new, times] = given.bind(["/", "/", "count"])?;
            let (old, new) = (required(old, "old")?, required(new, "new")?);
            let times = int(times.as_ref(), -1)?;
            let result = replace(limits, value, text(&old)?, text(&new)?, times)?;
            Ok(Value::Text(result.into()))
        }
        "join" => {
            let items = given.one()?.items(limits)?;
            let mut writer = Writer::new(limits);
            for (index, item) in items.items.iter().enumerate() {
                if index > 0 {
                    writer.push(value)?;
                }
                writer.push(text(item)?)?;
            }
            Ok(Value::Text(writer.text.into()))
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = given.bind(["/", "/"])?;
            let fill = fill.unwrap_or_else(|| Value::text(" "));
            let width = int(Some(&required(width, "width")?), 0)?;
            pad(limits, value, name, width, text(&fill)?)
        }
        "zfill" => {
            let width = int(Some(&given.one()?), 0)?;
            zero_fill(limits, value, width)
        }
        "expandtabs" => {
            let [size] = given.bind(["tabsize"])?;
            expand_tabs(limits, value, int(size.as_ref(), 8)?)
        }
        "format" => format::braces(limits, value, &given, false),
        "format_map" => {
            let Value::Dict(dict) = given.one()? else { fail!("`format_map` takes a dict") };
            format::map(limits, value, &dict, false)
        }
        _unknown => fail!("'str object' has no method '{name}'"),
    }
}

fn made(limits: &Limits, text: String) -> Outcome<Value> {
    limits.bytes(text.len())?;
    Ok(Value::Text(text.into()))
}

fn texts<'a>(limits: &Limits, parts: impl IntoIterator<Item = &'a str>) -> Outcome<Value> {
    let mut items = vec![];
    for part in parts {
        limits.bytes(part.len() + size_of::<Value>())?;
        items.push(Value::text(part));
    }
    Value::list(limits, items)
}

fn all(value: &str, is: impl Fn(char) -> bool) -> bool {
    !value.is_empty() && value.chars().all(is)
}

fn is_letter(c: char) -> bool {
    use GeneralCategory::{
        LowercaseLetter, ModifierLetter, OtherLetter, TitlecaseLetter, UppercaseLetter,
    };
    c.is_ascii_alphabetic()
        || (!c.is_ascii()
            && matches!(
                get_general_category(c),
                LowercaseLetter | ModifierLetter | OtherLetter | TitlecaseLetter | UppercaseLetter
            ))
}

fn is_decimal(c: char) -> bool {
    c.is_ascii_digit() || get_general_category(c) == GeneralCategory::DecimalNumber
}

/// Digits that are no decimal numbers: superscripts, subscripts and circled ones.
fn is_digit(c: char) -> bool {
    is_decimal(c)
        || matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '①'..='⑨' | '⑴'..='⑼' | '⒈'..='⒐')
        || matches!(c, '⓪' | '⓵'..='⓽' | '⓿' | '❶'..='❾' | '➀'..='➈' | '➊'..='➒')
}

fn is_titlecase(c: char) -> bool {
    get_general_category(c) == GeneralCategory::TitlecaseLetter
}

fn predicate(value: &str, name: &str) -> Option<bool> {
    let cased = |c: char| c.is_lowercase() || c.is_uppercase() || is_titlecase(c);
    Some(match name {
        "isspace" => all(value, is_space),
        "isalpha" => all(value, is_letter),
        "isdecimal" => all(value, is_decimal),
        "isdigit" => all(value, is_digit),
        "isnumeric" => all(value, char::is_numeric),
        "isalnum" => all(value, |c| is_letter(c) || c.is_numeric()),
        "isascii" => value.is_ascii(),
        "isprintable" => value.chars().all(is_printable),
        "islower" => {
            value.chars().any(cased) && !value.chars().any(|c| c.is_uppercase() || is_titlecase(c))
        }
        "isupper" => {
            value.chars().any(cased) && !value.chars().any(|c| c.is_lowercase() || is_titlecase(c))
        }
        "istitle" => is_title(value),
        "isidentifier" => {
            all(value, |c| c == '_' || is_letter(c) || is_decimal(c))
                && !value.starts_with(is_decimal)
        }
        _other => return None,
    })
}

fn is_title(value: &str) -> bool {
    let (mut inside, mut found) = (false, false);
    for c in value.chars() {
        let (upper, lower) = (c.is_uppercase() || is_titlecase(c), c.is_lowercase());
        if (upper && inside) || (lower && !inside) {
            return false;
        }
        inside = upper || lower;
        found |= inside;
    }
    found
}

fn changed_case(value: &str, name: &str) -> Option<String> {
    Some(match name {
        "upper" => value.to_uppercase(),
        "lower" => value.to_lowercase(),
        "casefold" => value.replace('ß', "ss").to_lowercase().replace('ς', "σ"),
        "capitalize" => capitalized(value),
        "title" => title(value),
        "swapcase" => value.chars().flat_map(swapped).collect(),
        _other => return None,
    })
}

fn swapped(c: char) -> Vec<char> {
    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
}

pub fn capitalized(value: &str) -> String {
    let mut chars = value.chars();
    let Some(first) = chars.next() else { return String::new() };
    let rest = value.to_lowercase();
    let lowered: usize = first.to_lowercase().map(char::len_utf8).sum();
    first_upper(first) + rest.get(lowered..).unwrap_or_default()
}

/// Letters with a title case of their own are rare: one of them for each group of digraphs.
fn first_upper(c: char) -> String {
    match c {
        'ǆ' | 'Ǆ' | 'ǅ' => "ǅ".into(),
        'ǉ' | 'Ǉ' | 'ǈ' => "ǈ".into(),
        'ǌ' | 'Ǌ' | 'ǋ' => "ǋ".into(),
        'ǳ' | 'Ǳ' | 'ǲ' => "ǲ".into(),
        'ß' => "Ss".into(),
        other => other.to_uppercase().collect(),
    }
}

fn title(value: &str) -> String {
    let mut result = String::with_capacity(value.len());
    let mut inside = false;
    for c in value.chars() {
        if inside {
            result.extend(c.to_lowercase());
        } else {
            result.push_str(&first_upper(c));
        }
        inside = c.is_lowercase() || c.is_uppercase() || is_titlecase(c);
    }
    result
}

fn strip(limits: &Limits, value: &str, name: &str, given: Given) -> Outcome<Value> {
    let [chars] = given.bind(["/"])?;
    let chars = chars.filter(|chars| !matches!(chars, Value::None));
    let chars = chars.as_ref().map(text).transpose()?;
    limits.bytes(chars.map_or(0, |chars| chars.len() * size_of::<Value>()))?;
    made(limits, stripped(value, name, chars).to_owned())
}

pub fn stripped<'a>(value: &'a str, name: &str, chars: Option<&str>) -> &'a str {
    let set: Option<std::collections::HashSet<char>> = chars.map(|chars| chars.chars().collect());
    let is = |c: char| set.as_ref().map_or_else(|| is_space(c), |set| set.contains(&c));
    let value = if name == "rstrip" { value } else { value.trim_start_matches(is) };
    if name == "lstrip" { value } else { value.trim_end_matches(is) }
}

fn split(limits: &Limits, value: &str, from_end: bool, given: Given) -> Outcome<Value> {
    let [separator, most] = given.bind(["sep", "maxsplit"])?;
    let most = usize::try_from(int(most.as_ref(), -1)?).unwrap_or(usize::MAX - 1);
    match separator.filter(|separator| !matches!(separator, Value::None)) {
        None if from_end => texts(limits, words_from_end(value, most)),
        None => texts(limits, words(value, most)),
        Some(separator) => {
            let separator = text(&separator)?;
            limits.read(separator.len())?;
            if separator.is_empty() {
                fail!("empty separator");
            }
            if !from_end {
                return texts(limits, value.splitn(most.saturating_add(1), separator));
            }
            let mut parts: Vec<_> = value.rsplitn(most.saturating_add(1), separator).collect();
            parts.reverse();
            texts(limits, parts)
        }
    }
}

/// Words between white space; the last one is all the rest, as it is.
fn words(value: &str, most: usize) -> Vec<&str> {
    let (mut parts, mut rest) = (vec![], value.trim_start_matches(is_space));
    while !rest.is_empty() {
        let end = if parts.len() < most { rest.find(is_space) } else { None };
        let (part, after) = rest.split_at(end.unwrap_or(rest.len()));
        parts.push(part);
        rest = after.trim_start_matches(is_space);
    }
    parts
}

fn words_from_end(value: &str, most: usize) -> Vec<&str> {
    let (mut parts, mut rest) = (vec![], strip_end(value));
    while !rest.is_empty() {
        let space = if parts.len() < most { rest.rfind(is_space) } else { None };
        let start = space.and_then(|space| Some(space + rest[space..].chars().next()?.len_utf8()));
        let (before, part) = rest.split_at(start.unwrap_or(0));
        parts.push(part);
        rest = strip_end(before);
    }
    parts.reverse();
    parts
}

/// All that Python takes for a line's end.
pub fn lines(value: &str, keep: bool) -> Vec<&str> {
    let (mut parts, mut rest) = (vec![], value);
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    while let Some((end, c)) = rest.char_indices().find(|&(_, c)| is_end(c)) {
        let length = if rest[end..].starts_with("\r\n") { 2 } else { c.len_utf8() };
        parts.push(&rest[..if keep { end + length } else { end }]);
        rest = &rest[end + length..];
    }
    if !rest.is_empty() {
        parts.push(rest);
    }
    parts
}

fn partition(limits: &Limits, value: &str, name: &str, given: Given) -> Outcome<Value> {
    let separator = given.one()?;
    let separator = text(&separator)?;
    limits.read(separator.len())?;
    if separator.is_empty() {
        fail!("empty separator");
    }
    let parts = if name == "partition" {
        value.split_once(separator).map_or([value, "", ""], |(a, b)| [a, separator, b])
    } else {
        value.rsplit_once(separator).map_or(["", "", value], |(a, b)| [a, separator, b])
    };
    limits.bytes(value.len())?;
    Value::tuple(limits, parts.into_iter().map(Value::text).collect())
}

/// The part between two character positions that may count from the end, and where it begins;
/// `None` where it begins behind the end.
fn part<'a>(
    value: &'a str,
    start: Option<&Value>,
    end: Option<&Value>,
) -> Outcome<Option<(&'a str, usize)>> {
    let length = value.chars().count() as i128;
    let place = |at: i128| if at < 0 { at.saturating_add(length).max(0) } else { at };
    let (start, end) = (place(int(start, 0)?), place(int(end, length)?).min(length));
    if start > end {
        return Ok(None);
    }
    let byte = |at: i128| {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        value.char_indices().nth(at).map_or(value.len(), |(byte, _)| byte)
    };
    Ok(Some((&value[byte(start)..byte(end)], usize::try_from(start).unwrap_or(0))))
}

fn affix(limits: &Limits, value: &str, prefix: bool, given: Given) -> Outcome<Value> {
    let [affix, start, end] = given.bind(["/", "/", "/"])?;
    let affix = required(affix, "affix")?;
    let Some((value, _)) = part(value, start.as_ref(), end.as_ref())? else {
        return Ok(Value::Bool(false));
    };
    let is = |affix: &str| if prefix { value.starts_with(affix) } else { value.ends_with(affix) };
    if let Value::Text(affix) = &affix {
        limits.read(affix.len())?;
    }
    let Value::Tuple(options) = &affix else { return Ok(Value::Bool(is(text(&affix)?))) };
    for option in &options.items {
        let option = text(option)?;
        limits.read(option.len())?;
        if is(option) {
            return Ok(Value::Bool(true));
        }
    }
    Ok(Value::Bool(false))
}

fn find(limits: &Limits, value: &str, name: &str, given: Given) -> Outcome<Value> {
    let [wanted, start, end] = given.bind(["/", "/", "/"])?;
    let wanted = required(wanted, "sub")?;
    let wanted = text(&wanted)?;
    limits.read(wanted.len())?;
    let found = part(value, start.as_ref(), end.as_ref())?.and_then(|(part, start)| {
        let byte = if name.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) };
        byte.map(|byte| part[..byte].chars().count() + start)
    });
    match found {
        Some(at) => Ok(Value::Int(at as i128)),
        None if name.ends_with("index") => fail!("substring not found"),
        None => Ok(Value::Int(-1)),
    }
}

fn count(limits: &Limits, value: &str, given: Given) -> Outcome<Value> {
    let [wanted, start, end] = given.bind(["/", "/", "/"])?;
    let wanted = required(wanted, "sub")?;
    let wanted = text(&wanted)?;
    limits.read(wanted.len())?;
    let part = part(value, start.as_ref(), end.as_ref())?;
    Ok(Value::Int(part.map_or(0, |(part, _)| part.matches(wanted).count()) as i128))
}

/// At most so many times; all of them where the number is negative.
pub fn replace(limits: &Limits, value: &str, old: &str, new: &str, times: i128) -> Outcome<String> {
    limits.read(old.len())?;
    let most = usize::try_from(times).unwrap_or(usize::MAX);
    let mut writer = Writer::new(limits);
    let mut last = 0;
    for (at, found) in value.match_indices(old).take(most) {
        writer.push(&value[last..at])?;
        writer.push(new)?;
        last = at + found.len();
    }
    writer.push(&value[last..])?;
    Ok(writer.text)
}

pub fn pad(limits: &Limits, value: &str, name: &str, width: i128, fill: &str) -> Outcome<Value> {
    if fill.chars().nth(1).is_some() || fill.is_empty() {
        fail!("the fill character must be exactly one character long");
    }
    let length = value.chars().count();
    let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
    let missing = width.saturating_sub(length);
    let left = match name {
        "ljust" => 0,
        "rjust" => missing,
        // CPython's own rounding.
        _center => missing / 2 + (missing & width & 1),
    };
    let mut writer = Writer::new(limits);
    writer.repeat(fill, left)?;
    writer.push(value)?;
    writer.repeat(fill, missing - left)?;
    Ok(Value::Text(writer.text.into()))
}

fn zero_fill(limits: &Limits, value: &str, width: i128) -> Outcome<Value> {
    let digits = value.strip_prefix(['+', '-']).unwrap_or(value);
    let sign = &value[..value.len() - digits.len()];
    let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
    let mut writer = Writer::new(limits);
    writer.push(sign)?;
    writer.repeat("0", width.saturating_sub(value.chars().count()))?;
    writer.push(digits)?;
    Ok(Value::Text(writer.text.into()))
}

fn expand_tabs(limits: &Limits, value: &str, size: i128) -> Outcome<Value> {
    let size = usize::try_from(size.max(0)).unwrap_or(usize::MAX);
    let mut writer = Writer::new(limits);
    let mut column = 0usize;
    for c in value.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                writer.repeat(" ", spaces)?;
                column = column.saturating_add(spaces);
            }
            '\t' => {}
            '\n' | '\r' => {
                writer.push(c.encode_utf8(&mut [0; 4]))?;
                column = 0;
            }
            c => {
                writer.push(c.encode_utf8(&mut [0; 4]))?;
                column += 1;
            }
        }
    }
    Ok(Value::Text(writer.text.into()))
}
