//! JSON text as templates take it: with whole numbers that no 64 bits hold, and a bounded depth.
//!
//! `serde_json` makes floats of such numbers, where Python prints all their digits. An object with a
//! name of its own takes the place of each, until it becomes a value.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};
use std::borrow::Cow;

/// How deep lists and objects may lie in each other; `serde_json` takes a few more.
pub const DEPTH: usize = 120;

/// The only name in an object that is a whole number.
const WHOLE: &str = "$bombus_jinja::whole";

/// The characters of a number that an error shows.
const SHOWN: usize = 40;

/// The value of a text. `what` it is, for errors
pub fn parse<T: DeserializeOwned>(what: &str, text: &str) -> Result<T, String> {
    let text = Reader { text, at: 0, place: Place::default() }.read();
    let text = text.map_err(|error| format!("{what}{error}"))?;
    serde_json::from_str(&text).map_err(|error| format!("{what}: {error}"))
}

/// The number that an object stands for.
pub fn whole(fields: &Map<String, Json>) -> Option<i128> {
    let digits = fields.get(WHOLE).filter(|_| fields.len() == 1)?;
    digits.as_str()?.parse().ok()
}

/// Where in the outermost list or object, for errors.
#[derive(Default)]
struct Place<'a> {
    depth: usize,
    index: usize,
    name: Option<&'a str>,
}

impl Place<'_> {
    fn shown(&self) -> String {
        match self.name {
            Some(name) => format!(": `{}`", name.chars().take(SHOWN).collect::<String>()),
            None => format!(": number {}", self.index + 1),
        }
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    place: Place<'a>,
}

impl<'a> Reader<'a> {
    /// The text with an object for each number that is too large.
    fn read(mut self) -> Result<Cow<'a, str>, String> {
        let (text, mut written, mut copied) = (self.text, String::new(), 0);
        while let Some(&byte) = text.as_bytes().get(self.at) {
            let start = self.at;
            match byte {
                b'"' => self.string(),
                b'-' | b'0'..=b'9' => {
                    if let Some(number) = self.number()? {
                        written.push_str(&text[copied..start]);
                        written.push_str(&number);
                        copied = self.at;
                    }
                }
                byte => self.punctuation(byte)?,
            }
        }
        if copied == 0 {
            return Ok(text.into());
        }
        Ok((written + &text[copied..]).into())
    }

    fn punctuation(&mut self, byte: u8) -> Result<(), String> {
        self.at += 1;
        match byte {
            b'[' | b'{' => self.place.depth += 1,
            b']' | b'}' => self.place.depth = self.place.depth.saturating_sub(1),
            b',' if self.place.depth == 1 => self.place.index += 1,
            _other => {}
        }
        if self.place.depth > DEPTH {
            let place = self.place.shown();
            return Err(format!(
                "{place}: lists and objects lie more than {DEPTH} deep in each other"
            ));
        }
        Ok(())
    }

    fn string(&mut self) {
        let bytes = self.text.as_bytes();
        let start = self.at + 1;
        self.at = start;
        while let Some(&byte) = bytes.get(self.at) {
            match byte {
                b'"' => break,
                b'\\' => self.at += 2,
                _other => self.at += 1,
            }
        }
        if self.place.depth == 1 {
            self.place.name = self.text.get(start..self.at);
        }
        self.at += 1;
    }

    /// What is written in place of a number.
    fn number(&mut self) -> Result<Option<String>, String> {
        let rest = &self.text[self.at..];
        let is_part = |c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.' | 'e' | 'E');
        let number = &rest[..rest.find(|c| !is_part(c)).unwrap_or(rest.len())];
        self.at += number.len();
        // Python's integers have no -0.
        if number == "-0" {
            return Ok(Some("0".into()));
        }
        let digits = number.strip_prefix('-').unwrap_or(number);
        let is_whole = digits.bytes().all(|byte| byte.is_ascii_digit()) && !digits.starts_with('0');
        if !is_whole || digits.is_empty() || number.parse::<i64>().is_ok() {
            return Ok(None);
        }
        match number.parse::<i128>() {
            Ok(whole) => Ok(Some(format!("{{\"{WHOLE}\":\"{whole}\"}}"))),
            Err(_) => {
                let (place, count) = (self.place.shown(), digits.len());
                let shown = &number[..number.len().min(SHOWN)];
                Err(format!("{place}: the whole number `{shown}` of {count} digits is too large"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Cow<'_, str>, String> {
        Reader { text, at: 0, place: Place::default() }.read()
    }

    #[test]
    fn numbers_that_64_bits_hold_stay() {
        let text = r#"[1, -9223372036854775808, 1e99, 0.5, -0.0, "18446744073709551616", "\"12345678901234567890"]"#;
        assert_eq!(read(text).unwrap(), text);
        assert_eq!(read("[-0, 0]").unwrap(), "[0, 0]");
        let large: Json = parse("x", "[18446744073709551616, -99999999999999999999]").unwrap();
        let numbers: Vec<_> =
            large.as_array().unwrap().iter().map(|it| whole(it.as_object().unwrap())).collect();
        assert_eq!(numbers, [Some(1 << 64), Some(-99_999_999_999_999_999_999)]);
    }

    #[test]
    fn what_is_too_large_or_too_deep_is_named() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        let deep = |depth: usize| format!(r#"{{"a": [1], "tools": {}}}"#, nested(depth));
        assert!(parse::<Json>("template options", &deep(DEPTH - 1)).is_ok());
        let error = parse::<Json>("template options", &deep(DEPTH)).unwrap_err();
        assert_eq!(
            error,
            "template options: `tools`: lists and objects lie more than 120 deep in each other"
        );
        let error =
            parse::<Json>("messages", &format!("[{{}}, {}]", nested(1_000_000))).unwrap_err();
        assert!(error.starts_with("messages: number 2: lists"), "{error}");
        let error = parse::<Json>("messages", &format!("[{}]", "9".repeat(5_000))).unwrap_err();
        assert!(error.contains("of 5000 digits is too large") && error.len() < 200, "{error}");
        assert!(parse::<Json>("messages", r#"["\"#).is_err());
    }
}
