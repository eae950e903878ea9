//! Grammars over the shipped model's tokenizer: what they let through, and what they refuse.

use super::*;
use std::path::Path;

fn tokenizer() -> Arc<Tokenizer> {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../../priv/models/demo");
    Arc::new(Tokenizer::open(Path::new(demo)).unwrap())
}

/// Whether the tokens of a text, one after another, may come, and the text may end behind them.
fn takes(tokenizer: &Arc<Tokenizer>, format: &Format, text: &str) -> bool {
    const END: u32 = 0;
    let constraint = Constraint::new(format, tokenizer, &[END]).unwrap();
    for id in tokenizer.encode_plain(text).unwrap() {
        if constraint.is_done() || !constraint.allowed(&[]).unwrap().has(id) {
            return false;
        }
        constraint.take(id).unwrap();
    }
    constraint.is_done() || constraint.allowed(&[]).unwrap().has(END)
}

#[test]
fn a_text_is_taken_as_its_format_says() {
    let tokenizer = tokenizer();
    let schema = Format::JsonSchema(
        r#"{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"], "additionalProperties": false}"#
            .into(),
    );
    let regex = Format::Regex("[a-c]+(🙂|漢)?".into());
    let lark = Format::Lark("start: \"yes\" | \"no\" \" \" NUMBER\nNUMBER: /[0-9]+/".into());
    for (format, text, expected) in [
        (&Format::Json, r#"{"a": [1, 2.5, "x"]}"#, true),
        (&Format::Json, "[1]", false),
        (&Format::Json, "{\"a\": }", false),
        (&schema, r#"{"name": "Ada", "age": 36}"#, true),
        (&schema, r#"{"name": "Zoë 🙂", "age": 36}"#, true),
        (&schema, r#"{"name": "Ada"}"#, false),
        (&schema, r#"{"name": "Ada", "age": "36"}"#, false),
        (&regex, "abc", true),
        (&regex, "ab🙂", true),
        (&regex, "b漢", true),
        (&regex, "abd", false),
        (&regex, "", false),
        (&lark, "yes", true),
        (&lark, "no 12", true),
        (&lark, "no ", false),
    ] {
        assert_eq!(takes(&tokenizer, format, text), expected, "{format:?} {text}");
    }
}

#[test]
fn what_must_follow_is_told() {
    let tokenizer = tokenizer();
    let constraint =
        Constraint::new(&Format::Regex("[ab]hello there".into()), &tokenizer, &[0]).unwrap();
    let first = tokenizer.encode_plain("a").unwrap();
    constraint.take(first[0]).unwrap();
    let forced = constraint.forced();
    let text = tokenizer.decode(&forced).unwrap();
    assert!("hello there".starts_with(text.trim_start()) && text.len() > 3, "{text}");
}

#[test]
fn an_end_that_is_withheld_comes_where_nothing_else_may() {
    let tokenizer = tokenizer();
    let constraint = Constraint::new(&Format::Regex("a*".into()), &tokenizer, &[0]).unwrap();
    assert!(constraint.allowed(&[]).unwrap().has(0));
    assert!(!constraint.allowed(&[0]).unwrap().has(0));
    let whole = Constraint::new(&Format::Regex("a?".into()), &tokenizer, &[0]).unwrap();
    whole.take(tokenizer.encode_plain("a").unwrap()[0]).unwrap();
    assert!(whole.is_done() && whole.allowed(&[0]).unwrap().has(0));
}

#[test]
fn what_is_no_format_is_refused_with_its_place() {
    let tokenizer = tokenizer();
    let schema = |text: &str| Format::JsonSchema(text.into());
    for (format, word) in [
        (schema("{"), "format"),
        (schema(r#"{"type": "objekt"}"#), "objekt"),
        (schema(r#"{"type": "object", "patternProperties": {"(": {}}}"#), "format"),
        (schema(r#"{"unevaluatedItems": false}"#), "unevaluatedItems"),
        (schema(r##"{"$ref": "#/$defs/missing"}"##), "missing"),
        (schema("false"), "format"),
        (Format::Regex("(".into()), "format"),
        (Format::Lark("start: other".into()), "other"),
        (Format::Lark(String::new()), "format"),
        (Format::Regex("a".repeat(LONGEST + 1)), "bytes"),
    ] {
        let error = Constraint::new(&format, &tokenizer, &[0]).err().map(|error| error.to_string());
        let error = error.unwrap_or_default();
        assert!(error.contains(word), "{word}: {error}");
    }
}
