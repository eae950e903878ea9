//! Folders without `tokenizer.json`: `vocab.json` and `merges.txt` are a byte-level BPE, whose
//! other parts the classes of transformers have in their code.

use crate::error::{Error, Result};
use crate::files;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN3_5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// -> the path of the vocabulary, and what would stand in `tokenizer.json`
pub fn open(folder: &Path, config: &Map<String, Value>) -> Result<(PathBuf, Value)> {
    let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    if !files::is_there(&vocab) || !files::is_there(&merges) {
        return Err(missing(folder));
    }
    let class = class(folder, config);
    let around = around(&class, config).ok_or_else(|| unknown(folder, &class))?;
    let model = model(&vocab, &merges)?;
    let mut fields = around;
    fields["model"] = model;
    fields["decoder"] = json!({"type": "ByteLevel"});
    fields["decoder"]["add_prefix_space"] = true.into();
    fields["decoder"]["trim_offsets"] = true.into();
    Ok((vocab, fields))
}

/// The tokenizer's class, else the model's: the families that use Qwen2's.
fn class(folder: &Path, config: &Map<String, Value>) -> String {
    let named = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    let named = named.strip_suffix("Fast").unwrap_or(named);
    if !matches!(named, "" | "PreTrainedTokenizer" | "TokenizersBackend") {
        return named.to_owned();
    }
    let path = folder.join("config.json");
    let model: Option<Value> = files::json(&path, files::FIELDS, Error::Config).ok();
    match model.as_ref().and_then(|model| model["model_type"].as_str()) {
        Some("qwen2" | "qwen2_moe" | "qwen3" | "qwen3_moe") => "Qwen2Tokenizer".into(),
        Some("gpt2") => "GPT2Tokenizer".into(),
        Some(other) => format!("{named} of {other}"),
        None => named.to_owned(),
    }
}

/// What stands around the model, where the class is known.
fn around(class: &str, config: &Map<String, Value>) -> Option<Value> {
    let prefix = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
    let bytes = |use_regex: bool| {
        json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true,
            "use_regex": use_regex})
    };
    let split = |pattern: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": pattern},
            "behavior": "Isolated", "invert": false});
        json!({"normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes(false)]}})
    };
    match class {
        "Qwen2Tokenizer" => Some(split(QWEN2)),
        "Qwen3_5Tokenizer" => Some(split(QWEN3_5)),
        "GPT2Tokenizer" => Some(json!({"pre_tokenizer": bytes(true)})),
        _ => None,
    }
}

fn model(vocab: &Path, merges: &Path) -> Result<Value> {
    let vocab: Value = files::json(vocab, files::VOCABULARY, Error::Tokenizer)?;
    let text = files::read_text(merges, files::VOCABULARY)?;
    let merges: Vec<&str> = text.lines().collect();
    Ok(json!({"type": "BPE", "vocab": vocab, "merges": merges}))
}

/// A special token that the class has where no file names one.
pub fn default_token(folder: &Path, config: &Map<String, Value>, name: &str) -> Option<String> {
    let of_class = match name {
        "eos_token" | "unk_token" => true,
        "pad_token" => class(folder, config) != "GPT2Tokenizer",
        "bos_token" => class(folder, config) == "GPT2Tokenizer",
        _ => false,
    };
    of_class.then(|| "<|endoftext|>".into())
}

fn missing(folder: &Path) -> Error {
    let has = |name: &str| folder.join(name).exists();
    let path = folder.display();
    let others = ["tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "merges.txt"];
    let found = others.into_iter().find(|name| has(name));
    let found = found.or_else(|| tiktoken(folder).then_some("a `.tiktoken` file"));
    match found {
        None => Error::NotFound(format!("there is no `tokenizer.json` in `{path}`")),
        Some(found) => Error::NotFound(format!(
            "there is no `tokenizer.json` in `{path}`, and {found} alone is not enough. {}",
            how_to(folder)
        )),
    }
}

fn tiktoken(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().take(1000).flatten();
    let mut names = entries.map(|entry| entry.file_name());
    names.any(|name| Path::new(&name).extension().is_some_and(|end| end == "tiktoken"))
}

fn unknown(folder: &Path, class: &str) -> Error {
    let class = if class.trim().is_empty() { "it has no `tokenizer_class`" } else { class };
    let path = folder.display();
    Error::Unsupported(format!(
        "`{path}` has `vocab.json` and `merges.txt`, and how to use them is known for \
         Qwen2Tokenizer and GPT2Tokenizer only (here: {class}). {}",
        how_to(folder)
    ))
}

fn how_to(folder: &Path) -> String {
    let path = folder.display();
    format!(
        "Make a tokenizer.json with Python: from transformers import AutoTokenizer; \
         AutoTokenizer.from_pretrained({path:?}).save_pretrained({path:?})",
        path = path.to_string()
    )
}
