//! Mutations of `tokenizer.json`: whatever a file says, opening and using it ends in an answer or
//! in an error. BOMBUS_MUTATIONS=150000 runs as many, with a seed of its own each.

#![allow(clippy::unwrap_used)]

use bombus::error::{Error, catch};
use bombus::tokenizer::{Limit, TextStream, Tokenizer};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

const TEXTS: [&str; 3] =
    ["Write a post: 12 bees 🐝", "<|im_start|>a  b\n漢", "aaaaaaaaaaaaaaaaaaaaaaaa!"];

/// A generator of its own, so that a seed is the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end.max(1)
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}

/// The tokenizer that ships, with fewer tokens, so that the parts around them are met more often.
fn small() -> Value {
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../priv/models/demo/tokenizer.json");
    let mut fields: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let vocab = fields["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|token, id| id.as_u64().is_some_and(|id| id < 300) || token.len() < 2);
    let known: Vec<String> = vocab.keys().cloned().collect();
    let knows = |text: &str| known.iter().any(|token| token == text);
    let merges = fields["model"]["merges"].as_array_mut().unwrap();
    merges.retain(|merge| {
        let pair =
            merge.as_str().map(|text| text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let pair = pair.unwrap_or_else(|| {
            merge.as_array().unwrap().iter().map(|one| one.as_str().unwrap().to_owned()).collect()
        });
        pair.iter().all(|one| knows(one)) && knows(&pair.concat())
    });
    fields
}

/// Parts of every kind, in place of those that a file has.
fn parts() -> Vec<Value> {
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"});
    let regex = json!({"type": "Replace", "pattern": {"Regex": "\\s*"}, "content": " . "});
    let split = |pattern: &str, behavior: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": true});
    vec![
        json!({"type": "NFKC"}),
        json!({"type": "Prepend", "prepend": "▁"}),
        json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAAEAAABhAA=="}),
        json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}),
        json!({"type": "Sequence", "normalizers": [replace, regex]}),
        json!({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 3}]}),
        json!({"type": "Sequence", "pretokenizers": [split("\\s+(?!\\S)|\\s+", "Removed"), {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}, {"type": "Digits", "individual_digits": true}]}),
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true}),
        json!({"type": "FixedLength", "length": 3}),
        json!({"type": "Punctuation", "behavior": "Isolated"}),
        json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        json!({"type": "BPEDecoder", "suffix": "</w>"}),
        json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": true}),
        json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {"a": {"id": "a", "ids": [67], "tokens": ["a"]}}}),
        json!({"type": "BertProcessing", "sep": ["a", 67], "cls": ["b", 68]}),
        json!({"type": "Unigram", "unk_id": 0, "byte_fallback": true, "vocab": [["<unk>", 0.0], ["a", -1.5], ["▁b", -2.0]]}),
        json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {"a": 0, "##a": 1, "b": 2}}),
        json!({"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "b": 1}}),
    ]
}

fn odd(random: &mut Random) -> Value {
    let numbers = [
        0u64,
        1,
        2,
        3,
        255,
        256,
        1 << 16,
        300_000_000,
        u64::from(u32::MAX),
        1 << 32,
        1 << 62,
        u64::MAX,
    ];
    let texts = [
        "",
        "a",
        "▁",
        "\u{0}",
        "é🐝",
        "<0xFF>",
        "(((((",
        "(?:a*)*",
        "\\p{L}{1000}{1000}",
        "(?=a)*",
        "##",
        "Sequence",
        "Regex",
    ];
    match random.below(8) {
        0 => Value::Null,
        1 => random.pick(&[true, false]).into(),
        2 => random.pick(&numbers).into(),
        3 => random.pick(&[-1i64, i64::MIN]).into(),
        4 => random.pick(&[0.5, -1e300, 1e300]).into(),
        5 => random.pick(&texts).into(),
        6 => random.pick(&["x".repeat(70), "ab".repeat(3000)]).into(),
        _ => random.pick(&[json!([]), json!({}), json!([[[[]]]])]),
    }
}

/// Changes something at a place that is found by going down at random.
fn mutate(value: &mut Value, random: &mut Random, depth: usize) {
    let children = match value {
        Value::Array(all) => all.len(),
        Value::Object(all) => all.len(),
        _ => 0,
    };
    if children == 0 || random.below(4 + depth) == 0 {
        return change(value, random);
    }
    let at = random.below(children);
    let child = match value {
        Value::Array(all) => all.get_mut(at),
        Value::Object(all) => all.values_mut().nth(at),
        _ => None,
    };
    mutate(child.unwrap(), random, depth + 1);
}

fn change(value: &mut Value, random: &mut Random) {
    match (random.below(6), &mut *value) {
        (0, Value::Array(all)) if !all.is_empty() => {
            let one = random.pick(all);
            all.extend(std::iter::repeat_n(one, random.below(70)));
        }
        (1, Value::Array(all)) => all.truncate(random.below(all.len())),
        (0, Value::Object(all)) => {
            if let Some(name) = all.keys().nth(random.below(all.len())).cloned() {
                all.remove(&name);
            }
        }
        (1, Value::Object(_) | Value::Null) => *value = random.pick(&parts()),
        (2, value) => {
            let list = random.pick(&["normalizers", "pretokenizers", "decoders", "processors"]);
            for _ in 0..random.below(12) {
                *value = json!({"type": "Sequence", list: [value.clone()]});
            }
        }
        (_, value) => *value = odd(random),
    }
}

/// Opens a file and uses it as a request does; says which errors there were.
fn attempt(bytes: &[u8], folder: &std::path::Path) -> Result<(), Error> {
    std::fs::write(folder.join("tokenizer.json"), bytes).unwrap();
    let tokenizer = Arc::new(catch(|| Tokenizer::open(folder))?);
    let cancelled = AtomicBool::new(false);
    let limit = Limit { tokens: 1000, cancelled: &cancelled };
    for text in TEXTS {
        let ids = catch(|| tokenizer.encode_within(text, true, &limit))?;
        let text = catch(|| tokenizer.decode(&ids))?;
        let mut stream = TextStream::new(tokenizer.clone(), vec!["ab".into()]);
        let streamed: String = ids.iter().map(|id| stream.push(*id).text).collect();
        assert!(text.starts_with(streamed.as_str()), "{text:?} {streamed:?}");
        stream.finish();
    }
    Ok(())
}

#[test]
fn mutated_files_end_in_answers_or_errors() {
    let count = std::env::var("BOMBUS_MUTATIONS").ok().and_then(|count| count.parse().ok());
    let (small, folder) = (small(), tempfile::tempdir().unwrap());
    let (mut opened, mut refused) = (0, 0);
    for seed in 0..count.unwrap_or(600) {
        let mut random = Random(seed + 1);
        let mut fields = small.clone();
        for name in ["normalizer", "pre_tokenizer", "decoder", "post_processor", "model"] {
            if random.below(6) == 0 {
                fields[name] = random.pick(&parts());
            }
        }
        for _ in 0..=random.below(3) {
            mutate(&mut fields, &mut random, 0);
        }
        let mut bytes = fields.to_string().into_bytes();
        if random.below(8) == 0 {
            let at = random.below(bytes.len());
            bytes[at] = random.below(256) as u8;
        }
        match attempt(&bytes, folder.path()) {
            Ok(()) => opened += 1,
            Err(Error::Panic(panic)) => panic!("seed {seed}: {panic}"),
            Err(_) => refused += 1,
        }
    }
    println!("{opened} opened, {refused} refused");
    assert!(opened > 0 && refused > 0);
}
