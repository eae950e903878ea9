//! Tokenizers of the families' kinds, against transformers: ids, text, and text token by token.
//! scripts/make_tokenizer_fixtures.py writes what transformers makes of them.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::tokenizer::{Limit, TextStream, Tokenizer};
use common::repository;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

static NEVER: AtomicBool = AtomicBool::new(false);

fn limit() -> Limit<'static> {
    Limit { tokens: usize::MAX, cancelled: &NEVER }
}

fn fixtures() -> Value {
    let path = repository().join("test/fixtures/tokenizers.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn open(models: &Value, kind: &Value) -> Arc<Tokenizer> {
    let mut definition = kind["definition"].clone();
    definition["model"] = models[kind["model"].as_str().unwrap()].clone();
    let changes = kind["changes"].as_object().unwrap().clone();
    definition["model"].as_object_mut().unwrap().extend(changes);
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, value: &Value| {
        std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    };
    write("tokenizer.json", &definition);
    write("tokenizer_config.json", &json!({"bos_token": "<s>", "eos_token": "</s>"}));
    Arc::new(Tokenizer::open(folder.path()).unwrap())
}

fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> String {
    let mut stream = TextStream::new(tokenizer.clone(), vec![]);
    let pieces: String = ids.iter().map(|id| stream.push(*id).text).collect();
    pieces + &stream.finish()
}

/// What differs, in words.
fn compare(tokenizer: &Arc<Tokenizer>, text: &str, case: &Value) -> Result<(), String> {
    let ids: Vec<u32> = serde_json::from_value(case[0].clone()).unwrap();
    let plain = &ids[1..];
    let decoded = case[1].as_str().unwrap_or(text);
    let visible = case[2].as_str().unwrap_or(decoded);
    let got = tokenizer.encode_within(text, false, &limit()).unwrap();
    if got != plain {
        return Err(format!("{text:?}: ids {got:?}, expected {plain:?}"));
    }
    // As in mlx-lm, not in transformers, a text with bos gets no second one.
    let whole = if text.starts_with("<s>") { plain } else { &ids[..] };
    if tokenizer.encode(text).unwrap() != whole {
        return Err(format!("{text:?}: with special tokens"));
    }
    for (what, got, expected) in [
        ("decoded", tokenizer.decode_with(plain, false).unwrap(), decoded),
        ("without special tokens", tokenizer.decode(plain).unwrap(), visible),
        ("streamed", streamed(tokenizer, plain), visible),
    ] {
        if got != expected {
            return Err(format!("{text:?}: {what} {got:?}, expected {expected:?}"));
        }
    }
    Ok(())
}

#[test]
fn kinds_are_as_in_transformers() {
    let fixtures = fixtures();
    let mut wrong = vec![];
    for (name, kind) in fixtures["tokenizers"].as_object().unwrap() {
        let tokenizer = open(&fixtures["models"], kind);
        let texts = fixtures["texts"].as_array().unwrap();
        let cases = kind["cases"].as_array().unwrap();
        assert_eq!(texts.len(), cases.len());
        for (text, case) in texts.iter().zip(cases).filter(|(_, case)| !case.is_null()) {
            if let Err(error) = compare(&tokenizer, text.as_str().unwrap(), case) {
                wrong.push(format!("{name}: {error}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
