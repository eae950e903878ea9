//! What the parts around a tokenizer's model may do, checked before the crate sees them: how deep
//! they are nested, how much longer they make a text, what their patterns cost.

use super::patterns::{self, shortened};
use base64::Engine as _;
use serde_json::Value;

/// Parts of one kind, and how deep they may be nested; published files have up to nine in two.
const MOST_PARTS: usize = 64;
const DEEPEST: usize = 8;

/// How many times longer the parts of one kind may make a text. A decoder works on the engine's
/// thread, a token at a time.
const MOST_GROWTH: f64 = 1024.0;
const MOST_DECODER_GROWTH: f64 = 64.0;

/// Bytes of a text that is put before every text.
const LONGEST_PREFIX: usize = 256;

/// Tokens that are put around a text.
const MOST_AROUND: usize = 64;

/// A part with its field of `type`, and where it stands: `pre_tokenizer.pretokenizers[0]`.
struct Part<'a> {
    at: String,
    kind: &'a str,
    fields: &'a Value,
}

/// How many times longer a text can become; at least 1.
pub fn normalizer(value: &Value) -> Result<f64, String> {
    let parts = parts("normalizer", "normalizers", value)?;
    grown(&parts, MOST_GROWTH, normalizer_growth)
}

pub fn pre_tokenizer(value: &Value) -> Result<f64, String> {
    let parts = parts("pre_tokenizer", "pretokenizers", value)?;
    grown(&parts, MOST_GROWTH, pre_tokenizer_growth)
}

pub fn decoder(value: &Value) -> Result<f64, String> {
    let parts = parts("decoder", "decoders", value)?;
    grown(&parts, MOST_DECODER_GROWTH, decoder_growth)
}

pub fn post_processor(value: &Value) -> Result<(), String> {
    let parts = parts("post_processor", "processors", value)?;
    let mut around = 0;
    // The crate takes what has the fields of a template, whatever its type says.
    for part in parts.iter().filter(|part| part.fields.get("single").is_some()) {
        around += template(part.fields).map_err(|error| format!("`{}.{error}", part.at))?;
    }
    match around > MOST_AROUND {
        true => Err(format!("`post_processor`: it puts {around} tokens around a text")),
        false => Ok(()),
    }
}

/// A part, or those of a sequence, in their order.
fn parts<'a>(name: &str, list: &str, value: &'a Value) -> Result<Vec<Part<'a>>, String> {
    let mut parts = vec![];
    if !value.is_null() {
        collect(&mut parts, name.to_owned(), list, value, 0)?;
    }
    Ok(parts)
}

fn collect<'a>(
    parts: &mut Vec<Part<'a>>,
    at: String,
    list: &str,
    value: &'a Value,
    depth: usize,
) -> Result<(), String> {
    let kind = value["type"].as_str().unwrap_or_default();
    if kind != "Sequence" && value.get(list).is_none() {
        parts.push(Part { at, kind, fields: value });
        return Ok(());
    }
    if depth == DEEPEST {
        return Err(format!("`{at}`: sequences are nested more than {DEEPEST} deep"));
    }
    for (place, part) in value[list].as_array().into_iter().flatten().enumerate() {
        if parts.len() == MOST_PARTS {
            return Err(format!("`{at}`: it has more than {MOST_PARTS} parts"));
        }
        collect(parts, format!("{at}.{list}[{place}]"), list, part, depth + 1)?;
    }
    Ok(())
}

fn grown(parts: &[Part], most: f64, of: fn(&Part) -> Result<f64, String>) -> Result<f64, String> {
    let mut growth = 1.0;
    for part in parts {
        let wrong = |error: String| format!("`{}`: {error}", part.at);
        if part.kind.is_empty() {
            return Err(wrong("it has no `type`".into()));
        }
        growth *= of(part).map_err(wrong)?;
        if growth > most {
            return Err(wrong(format!("texts could become {growth:.0} times longer")));
        }
    }
    Ok(growth)
}

/// The factors of Unicode's forms are those of its annex 15.
fn normalizer_growth(part: &Part) -> Result<f64, String> {
    Ok(match part.kind {
        "Replace" => replaced(part.fields)?,
        "Prepend" => prefix(part.fields)?,
        "Precompiled" => precompiled(part.fields)?,
        "BertNormalizer" => 12.0,
        "NFC" | "Lowercase" => 3.0,
        "NFD" => 4.0,
        "NFKC" | "NFKD" => 11.0,
        "ByteLevel" => 2.0,
        _ => 1.0,
    })
}

fn pre_tokenizer_growth(part: &Part) -> Result<f64, String> {
    let prefixed = part.fields["add_prefix_space"] == true;
    match part.kind {
        "Split" => split(part.fields).map(|()| 1.0),
        "FixedLength" if part.fields["length"] == 0 => Err("`length`: it is 0".into()),
        "ByteLevel" if prefixed => Ok(4.0),
        "ByteLevel" => Ok(2.0),
        "Metaspace" => Ok(8.0),
        _ => Ok(1.0),
    }
}

fn decoder_growth(part: &Part) -> Result<f64, String> {
    let empty = |name: &str| part.fields[name] == "";
    Ok(match part.kind {
        "Replace" => replaced(part.fields)?,
        "ByteLevel" => 3.0,
        "BPEDecoder" if empty("suffix") => 2.0,
        "CTC" if empty("word_delimiter_token") => 2.0,
        "WordPiece" => 2.0,
        _ => 1.0,
    })
}

/// Every match of a pattern becomes another text; a pattern may match where nothing is.
fn replaced(fields: &Value) -> Result<f64, String> {
    let content = fields["content"].as_str().unwrap_or_default().len() as f64;
    let found = match (&fields["pattern"]["String"], &fields["pattern"]["Regex"]) {
        (Value::String(text), _) => text.len() as f64,
        (_, Value::String(pattern)) => {
            if patterns::compile(pattern)?.backtracks {
                return Err("patterns that look around are not supported here".into());
            }
            0.0
        }
        _ => 0.0,
    };
    Ok(if found > 0.0 { (content / found).max(1.0) } else { 1.0 + content })
}

fn split(fields: &Value) -> Result<(), String> {
    match fields["pattern"]["Regex"].as_str() {
        Some(pattern) => patterns::compile(pattern).map(drop),
        None => Ok(()),
    }
}

fn prefix(fields: &Value) -> Result<f64, String> {
    match fields["prepend"].as_str().map_or(0, str::len) {
        length if length > LONGEST_PREFIX => Err(format!("`prepend` has {length} bytes")),
        _ => Ok(1.0),
    }
}

/// SentencePiece's table: the length of a trie, the trie, and the texts that it points to.
fn precompiled(fields: &Value) -> Result<f64, String> {
    let name = "`precompiled_charsmap`";
    let text = fields["precompiled_charsmap"].as_str();
    let text = text.ok_or_else(|| format!("{name}: expected a string"))?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text);
    let bytes = bytes.map_err(|error| format!("{name}: {error}"))?;
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return Err(format!("{name}: it ends in its first number"));
    };
    let length = u32::from_le_bytes(*length) as usize;
    let Some(texts) = rest.get(length..) else {
        return Err(format!("{name}: a trie of {length} bytes, where {} follow", rest.len()));
    };
    let longest = texts.split(|byte| *byte == 0).map(<[u8]>::len).max();
    Ok(longest.unwrap_or(0).max(1) as f64)
}

/// How many tokens a template puts around a text.
fn template(fields: &Value) -> Result<usize, String> {
    let pieces = fields["single"].as_array().map(Vec::as_slice).unwrap_or_default();
    if pieces.len() > MOST_AROUND {
        return Err(format!("single`: it has {} pieces", pieces.len()));
    }
    let sequences = pieces.iter().filter_map(|piece| piece["Sequence"]["id"].as_str());
    if sequences.collect::<Vec<_>>() != ["A"] {
        return Err("single`: expected the sequence A once, and no other".into());
    }
    let tokens = pieces.iter().filter_map(|piece| piece["SpecialToken"]["id"].as_str());
    tokens.map(|token| ids_of(fields, token)).sum()
}

fn ids_of(fields: &Value, token: &str) -> Result<usize, String> {
    let ids = fields["special_tokens"][token]["ids"].as_array().map(Vec::len);
    ids.ok_or_else(|| format!("special_tokens`: it lacks the token `{}`", shortened(token)))
}
