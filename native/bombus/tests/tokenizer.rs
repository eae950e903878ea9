//! Tokenizers from files: what they take of each file, what they refuse, and what a text costs.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::error::{Error, Result};
use bombus::tokenizer::{Limit, TextStream, Tokenizer};
use common::repository;
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock};
use tempfile::TempDir;

fn demo() -> Value {
    let path = repository().join("priv/models/demo/tokenizer.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A folder with these files, each with its JSON.
fn folder(files: &[(&str, Value)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in files {
        std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    }
    folder
}

fn open(files: &[(&str, Value)]) -> Result<Tokenizer> {
    Tokenizer::open(folder(files).path())
}

fn changed(change: impl FnOnce(&mut Value)) -> Value {
    let mut fields = demo();
    change(&mut fields);
    fields
}

/// What opening a changed `tokenizer.json` says.
fn refused(change: impl FnOnce(&mut Value)) -> String {
    match open(&[("tokenizer.json", changed(change))]) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("it was not refused"),
    }
}

/// A tokenizer that falls back to bytes, as Llama's.
fn fallback() -> Value {
    let mut vocab: Map<String, Value> =
        (0..256).map(|byte| (format!("<0x{byte:02X}>"), byte.into())).collect();
    for (place, token) in ["▁", "a", "b", "ab", "▁a", "</s>"].iter().enumerate() {
        vocab.insert((*token).into(), (256 + place).into());
    }
    let sign = json!({"String": " "});
    json!({
        "version": "1.0",
        "added_tokens": [{"id": 261, "content": "</s>", "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": sign, "content": "▁"},
        ]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", "▁ a"], "byte_fallback": true},
    })
}

static FALLBACK: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(open(&[("tokenizer.json", fallback())]).unwrap()));
static DEMO: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::open(&repository().join("priv/models/demo")).unwrap()));

fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> Vec<String> {
    let mut stream = TextStream::new(tokenizer.clone(), vec![]);
    let mut parts: Vec<_> = ids.iter().map(|id| stream.push(*id).text).collect();
    parts.push(stream.finish());
    parts
}

#[test]
fn truncation_and_padding_are_reset() {
    let fields = changed(|fields| {
        fields["truncation"] = json!({"direction": "Right", "max_length": 8,
            "strategy": "LongestFirst", "stride": 0});
        fields["padding"] = json!({"strategy": {"Fixed": 300_000_000u64}, "direction": "Right",
            "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"});
    });
    let text = "Write a post about coffee, and then another";
    let tokenizer = open(&[("tokenizer.json", fields)]).unwrap();
    assert_eq!(tokenizer.encode(text).unwrap(), DEMO.encode(text).unwrap());
}

/// Ids as transformers gives them for such folders.
#[test]
fn tokens_come_from_all_files() {
    let token = |content: &str| json!({"content": content, "special": true});
    let decoder = json!({"1280": token("<|stop|>"), "1281": token("<|more|>")});
    let config = json!({"eos_token": "<|stop|>", "added_tokens_decoder": decoder,
        "image_token": "<|image|>", "extra_special_tokens": {"audio_token": "<|audio|>"}});
    let tokenizer = open(&[("tokenizer.json", demo()), ("tokenizer_config.json", config)]).unwrap();
    let ids = tokenizer.encode("a<|stop|>b<|more|><|image|><|audio|>").unwrap();
    assert_eq!(ids, [67, 1280, 68, 1281, 1282, 1283]);
    assert_eq!(tokenizer.eos_token_id(), Some(1280));
    assert_eq!(tokenizer.decode(&ids).unwrap(), "ab");
    assert_eq!(tokenizer.special_token_id("<|more|>"), Some(1281));

    // Older folders have them in files of their own.
    let files = [
        ("tokenizer.json", demo()),
        ("tokenizer_config.json", json!({"eos_token": "<|endoftext|>"})),
        (
            "special_tokens_map.json",
            json!({"eos_token": {"content": "<|im_start|>"},
            "additional_special_tokens": ["<|extra|>"]}),
        ),
        ("added_tokens.json", json!({"<|plain|>": 1281, "<|extra|>": 1280})),
    ];
    let tokenizer = open(&files).unwrap();
    assert_eq!(tokenizer.eos_token_id(), Some(1));
    assert_eq!(tokenizer.encode("<|extra|><|plain|>").unwrap(), [1280, 1281]);
    assert_eq!(tokenizer.decode(&[1280, 1281]).unwrap(), "<|plain|>");
}

#[test]
fn vocabularies_and_merges_alone_are_a_tokenizer() {
    let model = demo()["model"].clone();
    let merges = model["merges"].as_array().unwrap().iter().map(|merge| match merge {
        Value::String(text) => text.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    });
    let merges = "#version: 0.2\n".to_owned() + &merges.collect::<Vec<_>>().join("\n");
    let text = "Grüße 🐝, it's 2026:  naïve\n\n café  ";
    let files = |class: Value| {
        let config = json!({"tokenizer_class": class});
        let files = [("vocab.json", model["vocab"].clone()), ("tokenizer_config.json", config)];
        let folder = folder(&files);
        std::fs::write(folder.path().join("merges.txt"), &merges).unwrap();
        folder
    };
    let qwen = Tokenizer::open(files("Qwen2TokenizerFast".into()).path()).unwrap();
    assert_eq!(qwen.encode(text).unwrap(), DEMO.encode(text).unwrap());
    assert_eq!(
        (qwen.decode(&qwen.encode(text).unwrap()).unwrap().as_str(), qwen.eos_token_id()),
        (text, Some(0))
    );
    let gpt2 = Tokenizer::open(files("GPT2Tokenizer".into()).path()).unwrap();
    assert_eq!(gpt2.encode("12 34").unwrap().len(), 5);

    let other = files("CodeGenTokenizer".into());
    let error = Tokenizer::open(other.path()).err().unwrap().to_string();
    assert!(error.contains("CodeGenTokenizer") && error.contains("save_pretrained"), "{error}");
    let model = files(Value::Null);
    std::fs::write(model.path().join("config.json"), r#"{"model_type": "qwen3"}"#).unwrap();
    assert!(Tokenizer::open(model.path()).is_ok());
    std::fs::remove_file(model.path().join("merges.txt")).unwrap();
    let error = Tokenizer::open(model.path()).err().unwrap().to_string();
    assert!(error.contains("vocab.json alone is not enough"), "{error}");
}

/// Ids from transformers 5.24, `AutoTokenizer.from_pretrained(folder)` of such files; as in mlx-lm, a
/// text that begins with bos gets neither.
#[test]
fn bos_and_eos_are_put_around_where_the_config_asks() {
    let ids = |config: Value, definition: Option<Value>| {
        let folder = folder(&[
            ("vocab.json", json!({"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4})),
            ("tokenizer_config.json", config),
        ]);
        std::fs::write(folder.path().join("merges.txt"), "#version: 0.2\na b\n").unwrap();
        if let Some(definition) = definition {
            let path = folder.path().join("tokenizer.json");
            std::fs::write(path, definition.to_string()).unwrap();
        }
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        ["ab", "<s>ab", ""].map(|text| tokenizer.encode(text).unwrap())
    };
    let config = |more: Value| {
        let mut config = json!({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>",
            "eos_token": "</s>", "unk_token": null});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let around = config(json!({"add_bos_token": true, "add_eos_token": true}));
    assert_eq!(ids(around.clone(), None), [vec![3, 2, 4], vec![3, 2], vec![3, 4]]);
    let bos = config(json!({"add_bos_token": true}));
    assert_eq!(ids(bos, None), [vec![3, 2], vec![3, 2], vec![3]]);
    let neither = config(json!({"add_bos_token": false, "add_eos_token": null}));
    assert_eq!(ids(neither, None), [vec![2], vec![3, 2], vec![]]);
    // Where there is a `tokenizer.json`, its `post_processor` decides.
    let whole = json!({"version": "1.0", "model": {"type": "BPE", "merges": ["a b"],
        "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4}}});
    assert_eq!(ids(around, Some(whole)), [vec![2], vec![3, 2], vec![]]);
}

#[test]
fn files_that_would_take_memory_or_time_are_refused() {
    let charsmap = "//////8fAAAA";
    let deep = |name: &str, list: &str| {
        let leaf = json!({"type": "Sequence", list: []});
        let nested = (0..40).fold(leaf, |part, _| json!({"type": "Sequence", list: [part]}));
        let name = name.to_owned();
        move |fields: &mut Value| fields[name] = nested
    };
    let doubling = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    let growing = json!({"type": "Sequence", "normalizers": vec![doubling.clone(); 40]});
    let shrinking = json!({"type": "Sequence", "decoders": vec![doubling; 40]});
    let split = |pattern: &str| {
        json!({"type": "Split", "pattern": {"Regex": pattern},
        "behavior": "Isolated", "invert": false})
    };
    let template = json!({"type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": vec![json!({"Sequence": {"id": "A", "type_id": 0}}); 20]});
    let pieces = |token: String| json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], [token, 0.0]]});
    let cases: [(&str, String); 13] = [
        (
            "a trie of 4294967295 bytes",
            refused(|fields| {
                fields["normalizer"] =
                    json!({"type": "Precompiled", "precompiled_charsmap": charsmap})
            }),
        ),
        ("nested", refused(deep("normalizer", "normalizers"))),
        ("nested", refused(deep("pre_tokenizer", "pretokenizers"))),
        ("nested", refused(deep("decoder", "decoders"))),
        ("nested", refused(deep("post_processor", "processors"))),
        ("times longer", refused(|fields| fields["normalizer"] = growing)),
        ("times longer", refused(|fields| fields["decoder"] = shrinking)),
        (
            "too much memory",
            refused(|fields| fields["pre_tokenizer"] = split(r"(?:(?:(?=a)\p{L}){999}){999}")),
        ),
        (
            "`length`",
            refused(|fields| fields["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0})),
        ),
        ("the sequence A once", refused(|fields| fields["post_processor"] = template)),
        ("expected at most 512", refused(|fields| fields["model"] = pieces("x".repeat(100_000)))),
        (
            "expected a whole number below",
            refused(|fields| {
                fields["model"]["vocab"]["a"] = u32::MAX.into();
            }),
        ),
        (
            "is above 512",
            refused(|fields| {
                fields["model"] = json!({"type": "WordPiece",
            "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "",
            "max_input_chars_per_word": 1_000_000})
            }),
        ),
    ];
    for (expected, error) in cases {
        assert!(
            error.contains(expected) && error.contains("tokenizer.json"),
            "{expected}: {error}"
        );
    }
    let error = refused(|fields| fields["added_tokens"][0]["content"] = "x".repeat(5000).into());
    assert!(error.contains("a token of 5000 bytes"), "{error}");
    let error = refused(|fields| {
        fields["normalizer"] = json!({"pattern": {"String": "a"}, "content": "a".repeat(5000)});
    });
    assert!(error.contains("`normalizer`: it has no `type`"), "{error}");
    let error = refused(|fields| {
        let token = |id: usize| json!({"id": id, "content": format!("{id}{}", "x".repeat(4000))});
        fields["added_tokens"] = (0..3000).map(token).collect();
    });
    assert!(error.contains("too long together"), "{error}");
    // The crate panics where a merge is shorter than the prefix.
    let error = refused(|fields| {
        fields["model"]["continuing_subword_prefix"] = "longer than any".into();
    });
    assert!(error.contains("`model`: start byte index"), "{error}");
}

#[test]
fn a_pattern_that_backtracks_ends() {
    let split = json!({"type": "Split", "pattern": {"Regex": r"(?:\p{L}+)+(?=!)"},
        "behavior": "Isolated", "invert": false});
    let tokenizer =
        open(&[("tokenizer.json", changed(|fields| fields["pre_tokenizer"] = split))]).unwrap();
    let error = tokenizer.encode(&"a".repeat(5000)).unwrap_err();
    assert!(error.to_string().contains("does not cope"), "{error}");
    assert!(tokenizer.encode("aaa!").is_ok());
}

fn within(tokenizer: &Tokenizer, text: &str, tokens: usize) -> Result<usize> {
    let cancelled = AtomicBool::new(false);
    Ok(tokenizer.encode_within(text, true, &Limit { tokens, cancelled: &cancelled })?.len())
}

#[test]
fn what_cannot_fit_is_refused_early() {
    let digits = "7".repeat(20 << 20);
    for tokenizer in [&DEMO, &FALLBACK] {
        let error = within(tokenizer, &digits, 1000).unwrap_err();
        assert!(matches!(error, Error::PromptTooLong(_)), "{error}");
        assert_eq!(within(tokenizer, &"7".repeat(100), 1000).unwrap(), {
            tokenizer.encode(&"7".repeat(100)).unwrap().len()
        });
    }
    let cancelled = AtomicBool::new(true);
    let limit = Limit { tokens: 1 << 30, cancelled: &cancelled };
    assert_eq!(DEMO.encode_within(&digits, true, &limit).unwrap_err(), Error::Stopped);
}

#[test]
fn a_stop_string_may_name_special_tokens() {
    let stream = |stop: &[&str], ids: &[u32]| {
        let stop = stop.iter().map(|stop| stop.to_string()).collect();
        let mut stream = TextStream::new(DEMO.clone(), stop);
        let mut text = String::new();
        for id in ids {
            let more = stream.push(*id);
            text += &more.text;
            if more.stopped {
                return (text, true);
            }
        }
        (text + &stream.finish(), false)
    };
    let ids = DEMO.encode("ab<|im_end|>\ncd").unwrap();
    assert_eq!(stream(&["<|im_end|>\n"], &ids), ("ab".into(), true));
    assert_eq!(stream(&["b<|im_end|>"], &ids), ("a".into(), true));
    assert_eq!(stream(&["<|im_end|>x"], &ids), ("ab\ncd".into(), false));
    assert_eq!(stream(&["<|im_start|>", "c"], &ids), ("ab\n".into(), true));
    assert_eq!(DEMO.special_token_id("<|im_end|>"), Some(2));
    assert_eq!(DEMO.special_token_id("a"), None);
}

#[test]
fn many_stop_strings_cost_no_more_than_one() {
    let stop = (0..1000).map(|number| format!("stop {number}")).collect();
    let mut stream = TextStream::new(DEMO.clone(), stop);
    let ids = DEMO.encode(&"a stop or two ".repeat(2000)).unwrap();
    let text: String = ids.iter().map(|id| stream.push(*id).text).collect();
    assert_eq!(text + &stream.finish(), "a stop or two ".repeat(2000));
}

#[test]
fn rows_without_a_token_have_no_text() {
    assert_eq!(DEMO.decode(&[67, 5000, u32::MAX, 68]).unwrap(), "ab");
    assert_eq!(streamed(&DEMO, &[67, 5000, 68]), ["a", "", "b", ""]);
}

fn reference(path: &Path) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_file(path).unwrap()
}

static DEMO_REFERENCE: LazyLock<tokenizers::Tokenizer> =
    LazyLock::new(|| reference(&repository().join("priv/models/demo/tokenizer.json")));
static FALLBACK_REFERENCE: LazyLock<tokenizers::Tokenizer> = LazyLock::new(|| {
    let mut fields = fallback();
    for name in ["single_word", "lstrip", "rstrip", "normalized"] {
        fields["added_tokens"][0][name] = false.into();
    }
    let folder = folder(&[("tokenizer.json", fields)]);
    reference(&folder.path().join("tokenizer.json"))
});

proptest! {
    #[test]
    fn ids_are_the_crate_s(text in "(\\PC|\\s|<\\|im_end\\|>|</s>|ab| a){0,40}") {
        let pairs = [(&*DEMO, &*DEMO_REFERENCE), (&*FALLBACK, &*FALLBACK_REFERENCE)];
        for (ours, theirs) in pairs {
            let expected = theirs.encode(text.as_str(), true).unwrap();
            prop_assert_eq!(ours.encode(&text).unwrap(), expected.get_ids());
        }
    }

    #[test]
    fn a_stream_is_the_whole_text(ids in prop::collection::vec(0..1285u32, 0..60)) {
        prop_assert_eq!(streamed(&DEMO, &ids).concat(), DEMO.decode(&ids).unwrap());
        let expected = DEMO_REFERENCE.decode(&ids, true).unwrap();
        prop_assert_eq!(DEMO.decode(&ids).unwrap(), expected);
    }

    #[test]
    fn bytes_in_a_row_stream_as_the_whole_text(ids in prop::collection::vec(0..262u32, 0..60)) {
        prop_assert_eq!(streamed(&FALLBACK, &ids).concat(), FALLBACK.decode(&ids).unwrap());
    }

    #[test]
    fn characters_in_bytes_come_at_once(text in "[🙂漢é🇩🇪👩‍👧ab ]{0,20}") {
        let ids = FALLBACK.encode(&text).unwrap();
        let expected = FALLBACK_REFERENCE.decode(&ids, true).unwrap();
        let parts = streamed(&FALLBACK, &ids);
        prop_assert_eq!(parts.concat(), expected);
        prop_assert!(parts.last().unwrap().is_empty(), "nothing is held to the end");
        let spoilt = parts.concat().contains('\u{fffd}');
        prop_assert!(!spoilt);
    }
}
