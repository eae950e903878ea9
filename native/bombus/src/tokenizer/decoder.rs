//! Tokens to text, one at a time: what a tokenizer's `decoder` does, as steps that keep only what
//! they still need. A whole text and a stream go through the same steps, so they are the same.

use super::definition::patterns::{self, shortened};
use super::pieces;
use fancy_regex::Regex;
use serde_json::Value;
use std::sync::Arc;

/// The steps of a tokenizer, in their order.
pub struct Decoder {
    steps: Vec<Step>,
}

enum Step {
    /// Without a decoder, tokens are words.
    Words,
    Replace {
        regex: Regex,
        content: String,
    },
    /// `<0x..>` is a byte; bytes in a row are characters.
    ByteFallback,
    /// Characters that stand for bytes.
    ByteLevel,
    /// One space less at both ends of every token.
    Strip(Strip),
    /// The same of the whole text.
    StripWhole(Strip),
    Metaspace {
        space: char,
        drops_first: bool,
    },
    WordPiece {
        prefix: String,
        cleanup: bool,
    },
    /// A suffix is the end of a word.
    Suffix(String),
    Ctc {
        pad: String,
        delimiter: String,
        cleanup: bool,
    },
    /// What needs the whole text waits for it.
    Whole(Box<Step>),
}

struct Strip {
    content: char,
    start: usize,
    stop: usize,
}

/// What a step keeps between two tokens.
#[derive(Default)]
struct Kept {
    /// The tokens that it has had, or the characters that it has dropped.
    count: usize,
    bytes: Vec<u8>,
    text: Option<String>,
}

/// One text in the making.
pub struct Decoding {
    decoder: Arc<Decoder>,
    kept: Vec<Kept>,
}

impl Decoder {
    /// The `decoder` of a tokenizer; null is none.
    pub fn new(decoder: &Value) -> Result<Self, String> {
        let mut decoder_steps = Self { steps: vec![] };
        if decoder.is_null() {
            decoder_steps.steps.push(Step::Words);
        }
        decoder_steps.add(decoder, &mut false)?;
        Ok(decoder_steps)
    }

    /// `joined`: whether all tokens have become one
    fn add(&mut self, part: &Value, joined: &mut bool) -> Result<(), String> {
        let step = match part["type"].as_str() {
            None if part.is_null() => return Ok(()),
            Some("Sequence") => {
                let parts = part["decoders"].as_array().ok_or("`decoders`: expected an array")?;
                return parts.iter().try_for_each(|part| self.add(part, joined));
            }
            Some("Fuse") => {
                *joined = true;
                return Ok(());
            }
            Some(kind) => step(kind, part)?,
            None => return Err("a decoder has no `type`".into()),
        };
        self.steps.push(match step {
            Step::Strip(strip) if *joined => Step::StripWhole(strip),
            step if *joined => Step::Whole(Box::new(step)),
            step => {
                *joined = matches!(step, Step::ByteLevel);
                step
            }
        });
        Ok(())
    }

    /// What a token is in a text's bytes; none where that is not for a token alone to say.
    pub fn bytes_of(&self, token: &str) -> Option<Vec<u8>> {
        let (mut text, mut bytes) = (token.to_owned(), None);
        for step in &self.steps {
            let step = if let Step::Whole(step) = step { step } else { step };
            match step {
                Step::Replace { regex, content } => text = replace(regex, &text, content),
                Step::Metaspace { space, .. } => text = text.replace(*space, " "),
                Step::ByteFallback => bytes = bytes.or(byte_token(&text).map(|byte| vec![byte])),
                Step::ByteLevel => bytes = text.chars().map(pieces::byte).collect(),
                // Of a whole text's ends.
                Step::Strip(_) | Step::StripWhole(_) => {}
                Step::Words
                | Step::WordPiece { .. }
                | Step::Suffix(_)
                | Step::Ctc { .. }
                | Step::Whole(_) => return None,
            }
        }
        Some(bytes.unwrap_or_else(|| text.into_bytes()))
    }

    pub fn start(self: &Arc<Self>) -> Decoding {
        let kept = self.steps.iter().map(|_| Kept::default()).collect();
        Decoding { decoder: self.clone(), kept }
    }
}

fn step(kind: &str, part: &Value) -> Result<Step, String> {
    let text = |name: &str| {
        let text = part[name].as_str().map(str::to_owned);
        text.ok_or_else(|| format!("{kind}: `{name}`: expected a string"))
    };
    let flag = |name: &str| part[name].as_bool().unwrap_or(true);
    Ok(match kind {
        "Replace" => Step::Replace { regex: replaced(part)?, content: text("content")? },
        "ByteFallback" => Step::ByteFallback,
        "ByteLevel" => Step::ByteLevel,
        "Strip" => Step::Strip(Strip {
            content: single(&text("content")?)?,
            start: count(part, "start")?,
            stop: count(part, "stop")?,
        }),
        "Metaspace" => Step::Metaspace {
            space: single(&text("replacement")?)?,
            drops_first: part["prepend_scheme"] != "never" && flag("add_prefix_space"),
        },
        "WordPiece" => Step::WordPiece { prefix: text("prefix")?, cleanup: flag("cleanup") },
        "BPEDecoder" => Step::Suffix(text("suffix")?),
        "CTC" => Step::Ctc {
            pad: text("pad_token")?,
            delimiter: text("word_delimiter_token")?,
            cleanup: flag("cleanup"),
        },
        other => return Err(format!("the type `{}` is not known", shortened(other))),
    })
}

fn replaced(part: &Value) -> Result<Regex, String> {
    let pattern = match (&part["pattern"]["String"], &part["pattern"]["Regex"]) {
        (Value::String(text), _) => patterns::literal(text)?,
        (_, Value::String(pattern)) => patterns::compile(pattern)?,
        _ => return Err("Replace: `pattern`: expected a `String` or a `Regex`".into()),
    };
    Ok(pattern.regex)
}

fn single(text: &str) -> Result<char, String> {
    let mut characters = text.chars();
    match (characters.next(), characters.next()) {
        (Some(one), None) => Ok(one),
        _ => Err(format!("expected one character, got {:?}", shortened(text))),
    }
}

fn count(part: &Value, name: &str) -> Result<usize, String> {
    let count = part[name].as_u64().and_then(|count| usize::try_from(count).ok());
    count.ok_or_else(|| format!("Strip: `{name}`: expected a whole number"))
}

impl Decoding {
    /// Adds to `text` what becomes final with a token.
    pub fn push(&mut self, token: &str, text: &mut String) {
        feed(&self.decoder.steps, &mut self.kept, token, text);
    }

    /// Adds what was still kept, at the end of the text.
    pub fn finish(&mut self, text: &mut String) {
        for at in 0..self.decoder.steps.len() {
            let (steps, kept) = (&self.decoder.steps[at..], &mut self.kept[at..]);
            if let ([step, rest @ ..], [own, kept @ ..]) = (steps, kept) {
                flush(step, own, &mut |token| feed(rest, kept, token, text));
            }
        }
    }
}

type Next<'a> = &'a mut dyn FnMut(&str);

fn feed(steps: &[Step], kept: &mut [Kept], token: &str, text: &mut String) {
    match (steps, kept) {
        ([step, rest @ ..], [own, kept @ ..]) => {
            take(step, own, token, &mut |token| feed(rest, kept, token, text));
        }
        _ => text.push_str(token),
    }
}

/// A step takes a token, and gives on what is final.
fn take(step: &Step, own: &mut Kept, token: &str, next: Next) {
    match step {
        Step::Words if own.begins() => next(token),
        Step::Words => next(&format!(" {token}")),
        Step::Replace { regex, content } => next(&replace(regex, token, content)),
        Step::ByteFallback => match byte_token(token) {
            Some(byte) => {
                own.bytes.push(byte);
                characters(&mut own.bytes, false, true, next);
            }
            None => {
                characters(&mut own.bytes, true, true, next);
                next(token);
            }
        },
        Step::ByteLevel => {
            let bytes: Option<Vec<u8>> = token.chars().map(pieces::byte).collect();
            own.bytes.extend(bytes.unwrap_or_else(|| token.as_bytes().to_vec()));
            characters(&mut own.bytes, false, false, next);
        }
        Step::Strip(strip) => next(strip.token(token)),
        Step::StripWhole(strip) => strip.part(own, token, next),
        Step::Metaspace { space, drops_first } => {
            let spaces = if own.begins() && *drops_first { "" } else { " " };
            next(&token.replace(*space, spaces));
        }
        Step::WordPiece { prefix, cleanup } => {
            let word = match token.strip_prefix(prefix.as_str()) {
                _ if own.begins() => token.to_owned(),
                Some(rest) => rest.to_owned(),
                None => format!(" {token}"),
            };
            next(&if *cleanup { clean(&word) } else { word });
        }
        Step::Suffix(suffix) => {
            if let Some(before) = own.text.replace(token.to_owned()) {
                next(&before.replace(suffix.as_str(), " "));
            }
        }
        Step::Ctc { pad, delimiter, cleanup } => {
            if own.text.as_deref() == Some(token) {
                return;
            }
            own.text = Some(token.to_owned());
            let word = token.replace(pad.as_str(), "");
            let word = if *cleanup { clean(&word).replace(delimiter, " ") } else { word };
            if !word.is_empty() {
                next(&word);
            }
        }
        Step::Whole(_) => own.text.get_or_insert_default().push_str(token),
    }
}

fn flush(step: &Step, own: &mut Kept, next: Next) {
    match step {
        Step::ByteFallback => characters(&mut own.bytes, true, true, next),
        Step::ByteLevel => characters(&mut own.bytes, true, false, next),
        Step::Suffix(suffix) => {
            if let Some(last) = own.text.take() {
                next(&last.replace(suffix.as_str(), ""));
            }
        }
        Step::Whole(step) => {
            if let Some(text) = own.text.take() {
                let mut own = Kept::default();
                take(step, &mut own, &text, next);
                flush(step, &mut own, next);
            }
        }
        _ => {}
    }
}

impl Kept {
    /// Whether it is the first token.
    fn begins(&mut self) -> bool {
        self.count += 1;
        self.count == 1
    }
}

impl Strip {
    fn token<'a>(&self, mut token: &'a str) -> &'a str {
        for _ in 0..self.start.min(token.len()) {
            token = token.strip_prefix(self.content).unwrap_or(token);
        }
        for _ in 0..self.stop.min(token.len()) {
            token = token.strip_suffix(self.content).unwrap_or(token);
        }
        token
    }

    /// A part of the whole text. What may be its end waits.
    fn part(&self, own: &mut Kept, part: &str, next: Next) {
        let mut part = part;
        while own.count < self.start
            && let Some(rest) = part.strip_prefix(self.content)
        {
            part = rest;
            own.count += 1;
        }
        if part.is_empty() {
            return;
        }
        own.count = self.start;
        let mut text = own.text.take().unwrap_or_default() + part;
        let run = text.chars().rev().take(self.stop).take_while(|one| *one == self.content);
        let waiting = text.split_off(text.len() - run.map(char::len_utf8).sum::<usize>());
        own.text = Some(waiting);
        if !text.is_empty() {
            next(&text);
        }
    }
}

/// Gives on the characters that bytes are. `each`: whether each byte that is none becomes `�`, as
/// in the crate's `ByteFallback`; else as many as belong together do.
fn characters(bytes: &mut Vec<u8>, ends: bool, each: bool, next: Next) {
    let mut text = String::new();
    loop {
        let (valid, wrong) = match std::str::from_utf8(bytes) {
            Ok(_) => (bytes.len(), None),
            Err(error) => (error.valid_up_to(), Some(error.error_len())),
        };
        text.push_str(&String::from_utf8_lossy(&bytes[..valid]));
        bytes.drain(..valid);
        let wrong = match wrong {
            None => break,
            Some(None) if !ends => break,
            Some(length) => length.unwrap_or(bytes.len()),
        };
        bytes.drain(..wrong);
        text.extend(std::iter::repeat_n('\u{fffd}', if each { wrong } else { 1 }));
    }
    if !text.is_empty() {
        next(&text);
    }
}

/// The byte that a token such as `<0x0A>` spells.
pub fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// A pattern that gives up leaves the rest as it is.
fn replace(regex: &Regex, token: &str, content: &str) -> String {
    let (mut text, mut end) = (String::new(), 0);
    for found in regex.find_iter(token).map_while(Result::ok) {
        text.push_str(&token[end..found.start()]);
        text.push_str(content);
        end = found.end();
    }
    text + &token[end..]
}

/// English as it is written, as BERT's tokenizers clean it up.
fn clean(text: &str) -> String {
    let marks = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" do not", " don't"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    marks.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use tokenizers::Decoder as _;

    fn llama(strip: bool) -> Value {
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let mut steps = vec![replace, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if strip {
            steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": steps})
    }

    fn decoders() -> Vec<Value> {
        let fuse = json!({"type": "Fuse"});
        let strip = |start: usize, stop: usize| json!({"type": "Strip", "content": "a", "start": start, "stop": stop});
        let replace = json!({"type": "Replace", "pattern": {"Regex": "a+|é"}, "content": "bb"});
        vec![
            Value::Null,
            llama(true),
            llama(false),
            replace.clone(),
            strip(1, 0),
            json!({"type": "Sequence", "decoders": [fuse, strip(2, 0)]}),
            json!({"type": "Sequence", "decoders": [fuse, strip(0, 1)]}),
            json!({"type": "Sequence", "decoders": [fuse, replace]}),
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            json!({"type": "BPEDecoder", "suffix": "</w>"}),
            json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": true}),
        ]
    }

    fn decode(decoder: &Value, tokens: &[&str]) -> Vec<String> {
        let mut decoding = Arc::new(Decoder::new(decoder).unwrap()).start();
        let mut parts = vec![];
        for token in tokens {
            let mut part = String::new();
            decoding.push(token, &mut part);
            parts.push(part);
        }
        let mut rest = String::new();
        decoding.finish(&mut rest);
        parts.push(rest);
        parts
    }

    /// As transformers: `tokenizers` 0.23, `decoders.Sequence([...]).decode(tokens)`.
    #[test]
    fn bytes_in_a_row_are_characters() {
        let tokens = ["▁a", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "<0xE6>", "<0xBC>", "<0xA2>"];
        let parts = decode(&llama(true), &tokens);
        assert_eq!(parts, ["a", "", "", "", "🙂", "", "", "漢", ""]);
        assert_eq!(
            decode(&llama(true), &["<0xF0>", "<0x9F>", "x"]),
            ["", "", "\u{fffd}\u{fffd}x", ""]
        );
        assert_eq!(decode(&llama(true), &["<0xF0>", "<0x9F>"]), ["", "", "\u{fffd}\u{fffd}"]);
        assert_eq!(decode(&llama(false), &["▁a", "▁b"]), [" a", " b", ""]);
    }

    /// As mlx-lm: a byte that is no character does not spoil those beside it.
    #[test]
    fn a_wrong_byte_is_alone() {
        let tokens = ["<0xC3>", "<0xA9>", "<0xFF>", "<0xC3>", "<0xA9>"];
        assert_eq!(decode(&llama(true), &tokens).concat(), "é\u{fffd}é");
    }

    #[test]
    fn numbers_and_patterns_of_a_file_are_harmless() {
        let huge =
            json!({"type": "Strip", "content": "a", "start": 1u64 << 60, "stop": 1u64 << 60});
        assert_eq!(decode(&huge, &["aaba", "a"]), ["b", "", ""]);
        for wrong in [
            json!({"type": "Strip", "content": "ab", "start": 0, "stop": 0}),
            json!({"type": "Nothing"}),
            json!({"type": "Replace", "content": ""}),
            json!({}),
        ] {
            assert!(Decoder::new(&wrong).is_err());
        }
    }

    proptest! {
        #[test]
        fn texts_are_as_in_the_crate(
            tokens in prop::collection::vec("▁?[ab]{0,3}|##a|a</w>|é|Ġa|<0x4[0-9]>|\\||Ã", 1..12)
        ) {
            let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
            for decoder in decoders() {
                let owned = tokens.iter().map(|token| token.to_string()).collect::<Vec<_>>();
                let expected = match &decoder {
                    Value::Null => owned.join(" "),
                    decoder => {
                        let theirs: tokenizers::DecoderWrapper =
                            serde_json::from_value(decoder.clone()).unwrap();
                        // It panics where a token is shorter than what is stripped.
                        let Ok(Ok(text)) = std::panic::catch_unwind(|| theirs.decode(owned)) else {
                            continue;
                        };
                        text
                    }
                };
                prop_assert_eq!(decode(&decoder, &tokens).concat(), expected, "{}", decoder);
            }
        }
    }
}
