//! JSON as Python writes it: `json.dump` puts `NaN` and `Infinity` where a float has no number.

use super::read_or;
use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use std::borrow::Cow;
use std::path::Path;

/// A file of JSON. `wrong`: the error for one that is not valid
pub fn json<T: DeserializeOwned>(
    path: &Path,
    most: u64,
    wrong: impl Fn(String) -> Error,
) -> Result<T> {
    let bytes = read_or(path, most, &wrong)?;
    if bytes.trim_ascii().is_empty() {
        let path = path.display();
        return Err(wrong(format!("`{path}` is empty: the download or the copy has not ended")));
    }
    parse(&bytes).map_err(|error| wrong(format!("`{}` is no valid JSON: {error}", path.display())))
}

/// Values nested more than 128 deep are refused.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    // Some editors put a mark of the byte order in front.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    serde_json::from_slice(&as_json(bytes))
}

/// JSON has no infinity: the largest float64 takes its place. Nor has it NaN, which is left as a text:
/// who expects a number there refuses it.
const CONSTANTS: [(&[u8], &[u8]); 3] = [
    (b"-Infinity", b"-1.7976931348623157e308"),
    (b"Infinity", b"1.7976931348623157e308"),
    (b"NaN", b"\"NaN\""),
];

fn as_json(bytes: &[u8]) -> Cow<'_, [u8]> {
    let has = |word: &[u8]| bytes.windows(word.len()).any(|window| window == word);
    if !has(b"NaN") && !has(b"Infinity") {
        return Cow::Borrowed(bytes);
    }
    let mut json = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(&first) = rest.first() {
        let constant = CONSTANTS.iter().find(|(constant, _)| rest.starts_with(constant));
        let (taken, written) = match constant {
            Some(&(constant, number)) => (constant.len(), number),
            None if first == b'"' => (string(rest), &rest[..string(rest)]),
            None => (1, &rest[..1]),
        };
        json.extend_from_slice(written);
        rest = &rest[taken..];
    }
    Cow::Owned(json)
}

/// The length of the string that `bytes` begin with, its quotes included.
fn string(bytes: &[u8]) -> usize {
    let mut escaped = true;
    let end = bytes.iter().position(|&byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.map_or(bytes.len(), |end| end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn python_s_constants_are_numbers() {
        let text = br#"{"a": [NaN, Infinity, -Infinity], "NaN \" Infinity": "\\", "b": NaN}"#;
        let max = f64::MAX;
        let expected = json!({"a": ["NaN", max, -max], "NaN \" Infinity": "\\", "b": "NaN"});
        assert_eq!(parse::<Value>(text).unwrap(), expected);
        assert_eq!(parse::<Value>(b"\xef\xbb\xbf[1]").unwrap(), json!([1]));
        assert!(parse::<Value>(b"\"NaN").is_err());
        assert!(parse::<Value>("[".repeat(100_000).as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn strings_keep_their_words(words in prop::collection::vec("(NaN|Infinity|[\"\\\\a ]){0,5}", 0..5)) {
            let value = json!([f64::MAX, words]);
            let text = value.to_string().replace("1.7976931348623157e308", "Infinity") + " ";
            // A word of a string that had the number is the number's text there.
            prop_assert_eq!(parse::<Value>(text.as_bytes()).unwrap(), value);
        }

        #[test]
        fn nothing_panics(bytes in prop::collection::vec(prop::sample::select(b"NaInfinty\"\\-{}[],:1 ".to_vec()), 0..60)) {
            _ = parse::<Value>(&bytes);
        }
    }
}
