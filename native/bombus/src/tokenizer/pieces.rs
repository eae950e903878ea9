//! The pre-tokenizers that nearly all language models use, over plain strings: splits by a
//! pattern, digits, and bytes as characters.
//!
//! The crate's own keep for every byte where it stood in the original text, some 360 bytes in all;
//! and where a search gives up, they silently take the rest as one piece. Here a text goes through
//! one piece at a time, a search that gives up is an error, and the caller may stop.

use super::definition::patterns::{self, Pattern};
use crate::error::{Error, Result};
use fancy_regex::Regex;
use serde_json::Value;
use std::ops::Range;
use std::sync::LazyLock;
use tokenizers::SplitDelimiterBehavior as Behavior;

/// What is done to every piece, one after another.
#[derive(Default)]
pub struct Pieces {
    steps: Vec<Step>,
}

enum Step {
    Split {
        regex: Regex,
        behavior: Behavior,
        invert: bool,
    },
    Digits {
        individual: bool,
    },
    /// Each byte becomes a character, as in GPT-2.
    Bytes {
        prefix: bool,
        split: bool,
    },
    /// Each space becomes a character, as in SentencePiece, and one stands in front.
    Spaces {
        space: char,
        prepend: Prepend,
        split: bool,
    },
}

#[derive(Clone, Copy, PartialEq)]
enum Prepend {
    Always,
    First,
    Never,
}

/// Takes a piece that is ready for the model, and whether the whole text begins with it.
type Take<'a> = &'a mut dyn FnMut(&str, bool) -> Result<()>;

/// GPT-2's own pattern.
static GPT2: LazyLock<Result<Pattern, String>> = LazyLock::new(|| {
    patterns::compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
});

impl Pieces {
    /// The steps of a `pre_tokenizer`; none where it has one that only the crate knows.
    pub fn new(pre_tokenizer: &Value) -> Result<Option<Self>, String> {
        let mut pieces = Self::default();
        Ok(pieces.add(pre_tokenizer)?.then_some(pieces))
    }

    fn add(&mut self, part: &Value) -> Result<bool, String> {
        let flag = |name: &str| part[name].as_bool();
        match part["type"].as_str() {
            None if part.is_null() => {}
            Some("Sequence") => {
                for part in part["pretokenizers"].as_array().into_iter().flatten() {
                    if !self.add(part)? {
                        return Ok(false);
                    }
                }
            }
            Some("Split") => match split(part)? {
                Some(split) => self.steps.push(split),
                None => return Ok(false),
            },
            Some("Digits") => {
                let individual = flag("individual_digits").unwrap_or(false);
                self.steps.push(Step::Digits { individual });
            }
            Some("ByteLevel") => {
                let prefix = flag("add_prefix_space").unwrap_or(true);
                let split = flag("use_regex").unwrap_or(true);
                self.steps.push(Step::Bytes { prefix, split });
            }
            Some("Metaspace") => match spaces(part) {
                Some(spaces) => self.steps.push(spaces),
                None => return Ok(false),
            },
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether the model sees bytes as characters, and each step before leaves the text as it is.
    pub fn ends_in_bytes(&self) -> bool {
        let bytes = |step: &Step| matches!(step, Step::Bytes { .. });
        self.steps.iter().filter(|step| bytes(step)).count() == 1
            && self.steps.last().is_some_and(bytes)
    }

    /// Whether the model sees the text itself, but for the sign of a space.
    pub fn keeps_text(&self) -> bool {
        !self.steps.iter().any(|step| match step {
            Step::Spaces { space, .. } => *space != '▁',
            step => matches!(step, Step::Bytes { .. }),
        })
    }

    /// Whether no step drops a part of the text.
    pub fn keep_everything(&self) -> bool {
        let removes = |step: &Step| matches!(step, Step::Split { behavior: Behavior::Removed, .. });
        !self.steps.iter().any(removes)
    }

    /// `first`: whether the whole text begins with this one
    pub fn each(
        &self,
        text: &str,
        first: bool,
        take: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        run(&self.steps, text, first, &mut |piece, _first| take(piece))
    }
}

fn spaces(part: &Value) -> Option<Step> {
    let mut replacement = part["replacement"].as_str()?.chars();
    let (space, None) = (replacement.next()?, replacement.next()) else { return None };
    let prepend = match part["prepend_scheme"].as_str() {
        _ if part["add_prefix_space"] == false => Prepend::Never,
        None | Some("always") => Prepend::Always,
        Some("first") => Prepend::First,
        Some("never") => Prepend::Never,
        Some(_) => return None,
    };
    Some(Step::Spaces { space, prepend, split: part["split"].as_bool().unwrap_or(true) })
}

fn split(part: &Value) -> Result<Option<Step>, String> {
    let pattern = match (&part["pattern"]["Regex"], &part["pattern"]["String"]) {
        (Value::String(pattern), _) => patterns::compile(pattern)?,
        (_, Value::String(text)) => patterns::literal(text)?,
        _ => return Ok(None),
    };
    let behavior = match part["behavior"].as_str() {
        Some("Removed") => Behavior::Removed,
        Some("Isolated") => Behavior::Isolated,
        Some("MergedWithPrevious") => Behavior::MergedWithPrevious,
        Some("MergedWithNext") => Behavior::MergedWithNext,
        Some("Contiguous") => Behavior::Contiguous,
        _ => return Ok(None),
    };
    let invert = part["invert"].as_bool().unwrap_or(false);
    Ok(Some(Step::Split { regex: pattern.regex, behavior, invert }))
}

fn run(steps: &[Step], text: &str, first: bool, take: Take) -> Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    let Some((step, rest)) = steps.split_first() else { return take(text, first) };
    let next: Take = &mut |piece, begins| run(rest, piece, first && begins, take);
    match step {
        Step::Split { regex, behavior, invert } => {
            let each = matches(regex, text).map(|part| part.map(|(at, is)| (at, is != *invert)));
            divide(text, each, *behavior, next)
        }
        Step::Digits { individual } => {
            let behavior = if *individual { Behavior::Isolated } else { Behavior::Contiguous };
            divide(text, runs(text, char::is_numeric), behavior, next)
        }
        Step::Bytes { prefix, split } => bytes(text, *prefix, *split, next),
        Step::Spaces { space, prepend, split } => {
            let mut text = text.replace(' ', space.encode_utf8(&mut [0; 4]));
            let wanted = *prepend == Prepend::Always || (*prepend == Prepend::First && first);
            if wanted && !text.starts_with(*space) {
                text.insert(0, *space);
            }
            if !split {
                return next(&text, true);
            }
            let each = runs(&text, |character| character == *space);
            divide(&text, each, Behavior::MergedWithNext, next)
        }
    }
}

type Part = Result<(Range<usize>, bool)>;

/// The parts of a text in their order, and whether they match.
fn matches<'a>(regex: &'a Regex, text: &'a str) -> impl Iterator<Item = Part> + 'a {
    let mut found = regex.find_iter(text);
    let mut end = 0;
    let mut waiting: Option<Range<usize>> = None;
    std::iter::from_fn(move || {
        if let Some(range) = waiting.take() {
            return Some(Ok((range, true)));
        }
        match found.next() {
            Some(Err(error)) => Some(Err(gave_up(&error))),
            Some(Ok(one)) if one.start() > end => {
                let gap = end..one.start();
                end = one.end();
                waiting = Some(one.range());
                Some(Ok((gap, false)))
            }
            Some(Ok(one)) => {
                end = one.end();
                Some(Ok((one.range(), true)))
            }
            None if end < text.len() => {
                let gap = end..text.len();
                end = text.len();
                Some(Ok((gap, false)))
            }
            None => None,
        }
    })
}

fn gave_up(error: &fancy_regex::Error) -> Error {
    Error::Request(format!("the tokenizer's pattern does not cope with this text: {error}"))
}

/// Each character that `is_match`, and what lies between them.
fn runs(text: &str, is_match: impl Fn(char) -> bool) -> impl Iterator<Item = Part> {
    let mut rest = text.char_indices().peekable();
    std::iter::from_fn(move || {
        let (start, first) = rest.next()?;
        let mut end = start + first.len_utf8();
        let found = is_match(first);
        while !found && let Some((at, next)) = rest.next_if(|(_, next)| !is_match(*next)) {
            end = at + next.len_utf8();
        }
        Some(Ok((start..end, found)))
    })
}

/// What becomes of the parts that match, as in the crate.
fn divide(
    text: &str,
    parts: impl Iterator<Item = Part>,
    behavior: Behavior,
    take: Take,
) -> Result<()> {
    match behavior {
        Behavior::Isolated => {
            for part in parts {
                give(text, part?.0, take)?;
            }
        }
        Behavior::Removed => {
            for part in parts {
                let (range, is_match) = part?;
                if !is_match {
                    give(text, range, take)?;
                }
            }
        }
        Behavior::MergedWithNext => {
            let mut parts = parts.collect::<Result<Vec<_>>>()?;
            parts.reverse();
            let mut merged = merge(parts.into_iter().map(Ok), behavior)?;
            merged.reverse();
            merged.into_iter().try_for_each(|range| give(text, range, take))?;
        }
        Behavior::MergedWithPrevious | Behavior::Contiguous => {
            let merged = merge(parts, behavior)?;
            merged.into_iter().try_for_each(|range| give(text, range, take))?;
        }
    }
    Ok(())
}

fn give(text: &str, range: Range<usize>, take: Take) -> Result<()> {
    let begins = range.start == 0;
    take(&text[range], begins)
}

fn merge(parts: impl Iterator<Item = Part>, behavior: Behavior) -> Result<Vec<Range<usize>>> {
    let mut merged: Vec<Range<usize>> = vec![];
    let mut previous = false;
    for part in parts {
        let (range, is_match) = part?;
        let joins = match behavior {
            Behavior::Contiguous => is_match == previous,
            _ => is_match && !previous,
        };
        match merged.last_mut().filter(|_| joins) {
            Some(last) => *last = last.start.min(range.start)..last.end.max(range.end),
            None => merged.push(range),
        }
        previous = is_match;
    }
    Ok(merged)
}

fn bytes(text: &str, prefix: bool, split: bool, take: Take) -> Result<()> {
    let spaced = (prefix && !text.starts_with(' ')).then(|| format!(" {text}"));
    let text = spaced.as_deref().unwrap_or(text);
    let mut characters = String::new();
    let mut take = |piece: &str, first: bool| {
        characters.clear();
        characters.extend(piece.bytes().map(character));
        take(&characters, first)
    };
    if !split {
        return take(text, true);
    }
    let pattern = GPT2.as_ref().map_err(|error| Error::Tokenizer(error.clone()))?;
    divide(text, matches(&pattern.regex, text), Behavior::Isolated, &mut take)
}

/// The character that stands for a byte: itself where it can be seen, else one from U+0100 on.
pub fn character(byte: u8) -> char {
    let hidden = match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => return char::from(byte),
        0..=b' ' => u32::from(byte),
        0x7F..=0xA0 => u32::from(byte) - 0x7F + 33,
        0xAD => 67,
    };
    char::from_u32(0x100 + hidden).unwrap_or('\u{fffd}')
}

/// The byte that a character stands for.
pub fn byte(character: char) -> Option<u8> {
    let code = character as u32;
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x100 - 33 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    #[test]
    fn bytes_and_characters_are_the_same() {
        let mut seen = std::collections::HashSet::new();
        for value in 0..=255 {
            assert_eq!(byte(character(value)), Some(value));
            assert!(seen.insert(character(value)));
        }
        assert_eq!((character(b' '), character(0xAD), byte('\u{144}')), ('Ġ', '\u{143}', None));
    }

    fn splits() -> Vec<Value> {
        let behaviors =
            ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"];
        let patterns = [r"\p{N}", r"\s+(?!\S)|\s+", r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}", "b?"];
        let mut all = vec![json!({"type": "Digits", "individual_digits": false})];
        for (behavior, pattern, invert) in behaviors.iter().flat_map(|behavior| {
            patterns
                .iter()
                .flat_map(move |pattern| [(behavior, pattern, false), (behavior, pattern, true)])
        }) {
            all.push(json!({"type": "Split", "pattern": {"Regex": pattern},
                "behavior": behavior, "invert": invert}));
        }
        all
    }

    fn parts() -> Vec<Value> {
        let bytes = |prefix: bool, split: bool| {
            json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true,
                "use_regex": split})
        };
        let mut all = splits();
        for (prefix, split) in [(false, false), (true, false), (false, true), (true, true)] {
            let digits = json!({"type": "Digits", "individual_digits": true});
            all.push(bytes(prefix, split));
            let parts = [digits, bytes(prefix, split)];
            all.push(json!({"type": "Sequence", "pretokenizers": parts}));
        }
        for (scheme, split) in
            [("always", true), ("first", true), ("first", false), ("never", true)]
        {
            let spaces = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme,
                "split": split});
            let digits = json!({"type": "Digits", "individual_digits": true});
            all.push(spaces.clone());
            all.push(json!({"type": "Sequence", "pretokenizers": [digits, spaces]}));
        }
        let literal = json!({"type": "Split", "pattern": {"String": "a."},
            "behavior": "MergedWithPrevious", "invert": false});
        all.push(json!({"type": "Sequence", "pretokenizers": [literal, bytes(false, true)]}));
        all
    }

    type Theirs = tokenizers::PreTokenizerWrapper;

    /// Each part, ours and the crate's.
    static PARTS: LazyLock<Vec<(Value, Pieces, Theirs)>> = LazyLock::new(|| {
        let both = |part: Value| {
            let ours = Pieces::new(&part).unwrap().unwrap();
            let theirs = serde_json::from_value(part.clone()).unwrap();
            (part, ours, theirs)
        };
        parts().into_iter().map(both).collect()
    });

    proptest! {
        #[test]
        fn pieces_are_as_in_the_crate(text in "[ab1２.\n é漢 ]{0,24}|\\PC{0,16}") {
            for (part, ours, theirs) in PARTS.iter() {
                let mut expected = PreTokenizedString::from(text.as_str());
                theirs.pre_tokenize(&mut expected).unwrap();
                let expected: Vec<String> = expected
                    .get_splits(OffsetReferential::Original, OffsetType::None)
                    .into_iter()
                    .map(|(piece, ..)| piece.to_owned())
                    .filter(|piece| !piece.is_empty())
                    .collect();
                let mut pieces = vec![];
                ours.each(&text, true, &mut |piece| {
                    pieces.push(piece.to_owned());
                    Ok(())
                }).unwrap();
                prop_assert_eq!(&pieces, &expected, "{}", part);
            }
        }
    }
}
