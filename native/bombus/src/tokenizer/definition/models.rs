//! The model of a tokenizer, from its JSON: the vocabulary, and how words are made of it.
//!
//! The crate could read it by itself, through four copies of the whole vocabulary; and some of
//! what a file may say would end the process there.

use super::patterns::shortened;
use serde_json::{Map, Value};
use tokenizers::ModelWrapper;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::models::wordpiece::WordPiece;

/// Bytes of one token: what builds and drops the trie of a Unigram model recurses for each.
const LONGEST_PIECE: usize = 512;
const LONGEST_TOKEN: usize = 4 << 10;

/// Bytes of what is put before or behind every character.
const LONGEST_AFFIX: usize = 64;

/// The time for one word of a WordPiece model grows with the third power of this.
const LONGEST_WORD: u64 = 512;

type Fields = Map<String, Value>;

pub fn build(model: Value) -> Result<ModelWrapper, String> {
    let Value::Object(mut fields) = model else { return Err("expected an object".into()) };
    let kind = match fields.get("type") {
        None => untagged(&fields).to_owned(),
        Some(kind) => kind.as_str().ok_or("`type`: expected a string")?.to_owned(),
    };
    match kind.as_str() {
        "BPE" => bpe(&mut fields).map(ModelWrapper::BPE),
        "Unigram" => unigram(&mut fields).map(ModelWrapper::Unigram),
        "WordPiece" => word_piece(&mut fields).map(ModelWrapper::WordPiece),
        "WordLevel" => word_level(&mut fields).map(ModelWrapper::WordLevel),
        other => Err(format!("the type `{}` is not known", shortened(other))),
    }
}

/// Old files do not name the type.
fn untagged(fields: &Fields) -> &'static str {
    match fields {
        _ if fields.contains_key("merges") => "BPE",
        _ if fields.contains_key("max_input_chars_per_word") => "WordPiece",
        _ if fields.get("vocab").is_some_and(Value::is_array) => "Unigram",
        _ => "WordLevel",
    }
}

fn bpe(fields: &mut Fields) -> Result<BPE, String> {
    let vocab = vocabulary(fields)?;
    let merges = merges(fields.remove("merges"))?;
    let mut builder = BPE::builder().vocab_and_merges(vocab, merges);
    if let Some(dropout) = optional(fields, "dropout", Value::as_f64)? {
        builder = builder.dropout(dropout as f32);
    }
    if let Some(token) = text(fields, "unk_token", LONGEST_TOKEN)? {
        builder = builder.unk_token(token);
    }
    if let Some(prefix) = text(fields, "continuing_subword_prefix", LONGEST_AFFIX)? {
        builder = builder.continuing_subword_prefix(prefix);
    }
    if let Some(suffix) = text(fields, "end_of_word_suffix", LONGEST_AFFIX)? {
        builder = builder.end_of_word_suffix(suffix);
    }
    builder
        .fuse_unk(flag(fields, "fuse_unk")?)
        .byte_fallback(flag(fields, "byte_fallback")?)
        .ignore_merges(flag(fields, "ignore_merges")?)
        .build()
        .map_err(|error| error.to_string())
}

/// `["a b", ...]` or `[["a", "b"], ...]`
fn merges(merges: Option<Value>) -> Result<Vec<(String, String)>, String> {
    let Some(Value::Array(merges)) = merges else {
        return Err("`merges`: expected an array".into());
    };
    let known = |merge: &Value| !merge.as_str().is_some_and(|text| text.starts_with("#version"));
    merges.into_iter().filter(known).map(merge).collect()
}

fn merge(merge: Value) -> Result<(String, String), String> {
    let wrong = |merge: &Value| {
        format!("`merges`: expected two tokens, got {}", shortened(&merge.to_string()))
    };
    match &merge {
        Value::String(text) => match text.split_once(' ') {
            Some((left, right)) if !right.contains(' ') => Ok((left.to_owned(), right.to_owned())),
            _ => Err(wrong(&merge)),
        },
        Value::Array(pair) => match &pair[..] {
            [Value::String(left), Value::String(right)] => Ok((left.clone(), right.clone())),
            _ => Err(wrong(&merge)),
        },
        _ => Err(wrong(&merge)),
    }
}

fn unigram(fields: &mut Fields) -> Result<Unigram, String> {
    let Some(Value::Array(vocab)) = fields.remove("vocab") else {
        return Err("`vocab`: expected an array".into());
    };
    let vocab: Vec<_> = vocab.into_iter().map(piece).collect::<Result<_, _>>()?;
    let unk_id = optional(fields, "unk_id", Value::as_u64)?.map(|id| id as usize);
    let model = Unigram::from(vocab, unk_id, flag(fields, "byte_fallback")?);
    model.map_err(|error| error.to_string())
}

/// `["token", score]`
fn piece(piece: Value) -> Result<(String, f64), String> {
    let (token, score) = match piece.as_array().map(Vec::as_slice) {
        Some([Value::String(token), score]) => (token, score.as_f64()),
        _ => return Err(wrong_piece(&piece)),
    };
    check_length(token, LONGEST_PIECE)?;
    Ok((token.clone(), score.ok_or_else(|| wrong_piece(&piece))?))
}

fn wrong_piece(piece: &Value) -> String {
    format!("`vocab`: expected a token and its score, got {}", shortened(&piece.to_string()))
}

fn word_piece(fields: &mut Fields) -> Result<WordPiece, String> {
    let longest = optional(fields, "max_input_chars_per_word", Value::as_u64)?.unwrap_or(100);
    if longest > LONGEST_WORD {
        return Err(format!("`max_input_chars_per_word`: {longest} is above {LONGEST_WORD}"));
    }
    let mut builder =
        WordPiece::builder().vocab(vocabulary(fields)?).max_input_chars_per_word(longest as usize);
    if let Some(token) = text(fields, "unk_token", LONGEST_TOKEN)? {
        builder = builder.unk_token(token);
    }
    if let Some(prefix) = text(fields, "continuing_subword_prefix", LONGEST_AFFIX)? {
        builder = builder.continuing_subword_prefix(prefix);
    }
    builder.build().map_err(|error| error.to_string())
}

fn word_level(fields: &mut Fields) -> Result<WordLevel, String> {
    let unk_token = text(fields, "unk_token", LONGEST_TOKEN)?.unwrap_or_else(|| "<unk>".into());
    let builder = WordLevel::builder().vocab(vocabulary(fields)?).unk_token(unk_token);
    builder.build().map_err(|error| error.to_string())
}

/// `{"token": id, ...}`
fn vocabulary(fields: &mut Fields) -> Result<Vocab, String> {
    let Some(Value::Object(vocab)) = fields.remove("vocab") else {
        return Err("`vocab`: expected an object of tokens and their ids".into());
    };
    let most = most_ids(vocab.len());
    vocab.into_iter().map(|(token, id)| entry(token, &id, most)).collect()
}

fn entry(token: String, id: &Value, most: u64) -> Result<(String, u32), String> {
    check_length(&token, LONGEST_TOKEN)?;
    match id.as_u64().filter(|id| *id < most) {
        Some(id) => Ok((token, id as u32)),
        None => Err(format!(
            "`vocab`: the token {:?} has the id {}, expected a whole number below {most}",
            shortened(&token),
            shortened(&id.to_string())
        )),
    }
}

/// Vocabularies have holes, but not more holes than tokens.
pub fn most_ids(tokens: usize) -> u64 {
    (tokens as u64).saturating_mul(16).saturating_add(1 << 16).min(u64::from(u32::MAX))
}

fn check_length(token: &str, most: usize) -> Result<(), String> {
    match token.len() {
        length if length > most => Err(format!(
            "`vocab`: the token {:?} has {length} bytes, expected at most {most}",
            shortened(token)
        )),
        _ => Ok(()),
    }
}

fn text(fields: &Fields, name: &str, most: usize) -> Result<Option<String>, String> {
    let text = optional(fields, name, Value::as_str)?;
    match text.filter(|text| text.len() > most) {
        None => Ok(text.map(str::to_owned)),
        Some(text) => Err(format!("`{name}`: {} bytes are above {most}", text.len())),
    }
}

fn flag(fields: &Fields, name: &str) -> Result<bool, String> {
    Ok(optional(fields, name, Value::as_bool)?.unwrap_or(false))
}

/// A field that may be absent or null.
fn optional<'a, T>(
    fields: &'a Fields,
    name: &str,
    read: impl FnOnce(&'a Value) -> Option<T>,
) -> Result<Option<T>, String> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => read(value).map(Some).ok_or_else(|| {
            format!("`{name}`: got {}, which it cannot be", shortened(&value.to_string()))
        }),
    }
}
