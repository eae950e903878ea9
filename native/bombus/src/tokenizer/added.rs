//! Tokens that are found in a text before it is split into pieces: special ones, and those that
//! were added to a vocabulary.

use aho_corasick::{AhoCorasick, MatchKind};
use fancy_regex::Regex;
use std::ops::Range;
use std::sync::LazyLock;
use tokenizers::AddedToken;

/// Finds some tokens, the leftmost first, of those the longest.
pub struct Added {
    automaton: AhoCorasick,
    tokens: Vec<(u32, AddedToken)>,
}

/// A part of a text.
#[derive(Debug, PartialEq)]
pub enum Found {
    Text(Range<usize>),
    Token(u32),
}

impl Added {
    /// `patterns`: what to look for, with each token
    pub fn new(tokens: Vec<(String, u32, AddedToken)>) -> Result<Self, String> {
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(pattern, ..)| pattern))
            .map_err(|error| error.to_string())?;
        let tokens = tokens.into_iter().map(|(_, id, token)| (id, token)).collect();
        Ok(Self { automaton, tokens })
    }

    /// Whether a token takes the spaces beside it.
    pub fn strips(&self) -> bool {
        self.tokens.iter().any(|(_, token)| token.lstrip || token.rstrip)
    }

    /// The parts of a text in their order, as in the crate.
    pub fn split(&self, text: &str) -> impl Iterator<Item = Found> {
        let mut matches = self.automaton.find_iter(text);
        let (mut end, mut token) = (0, None);
        std::iter::from_fn(move || {
            if let Some(id) = token.take() {
                return Some(Found::Token(id));
            }
            for found in matches.by_ref() {
                let (id, added) = &self.tokens[found.pattern().as_usize()];
                let Some(range) = extent(text, found.range(), added, end) else { continue };
                let before = end..range.start;
                end = range.end;
                if before.start < before.end {
                    token = Some(*id);
                    return Some(Found::Text(before));
                }
                return Some(Found::Token(*id));
            }
            let rest = end..text.len();
            end = text.len();
            (!rest.is_empty()).then_some(Found::Text(rest))
        })
    }
}

/// What a token takes of the text; none where it must be a word and is not.
fn extent(text: &str, at: Range<usize>, token: &AddedToken, end: usize) -> Option<Range<usize>> {
    let (before, behind) = (&text[..at.start], &text[at.end..]);
    if token.single_word && (before.ends_with(is_word) || behind.starts_with(is_word)) {
        return None;
    }
    let start = if token.lstrip { before.trim_end().len().max(end) } else { at.start };
    let stripped = if token.rstrip { behind.trim_start() } else { behind };
    Some(start..text.len() - stripped.len())
}

/// As `\w` in the crate's patterns.
fn is_word(character: char) -> bool {
    static WORD: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\w").ok());
    let mut bytes = [0; 4];
    let text: &str = character.encode_utf8(&mut bytes);
    WORD.as_ref().is_some_and(|word| word.is_match(text).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(content: &str, change: impl Fn(&mut AddedToken)) -> (String, u32, AddedToken) {
        let mut token = AddedToken::from(content, true);
        change(&mut token);
        (content.to_owned(), content.len() as u32, token)
    }

    fn found(tokens: Vec<(String, u32, AddedToken)>, text: &str) -> Vec<String> {
        let added = Added::new(tokens).unwrap();
        let parts = added.split(text).map(|part| match part {
            Found::Text(range) => text[range].to_owned(),
            Found::Token(id) => id.to_string(),
        });
        parts.collect()
    }

    #[test]
    fn tokens_are_found_in_a_text() {
        let plain = || vec![token("<a>", |_| {}), token("<a>b", |_| {})];
        assert_eq!(found(plain(), "x<a><a>b y<a>"), ["x", "3", "4", " y", "3"]);
        assert_eq!(found(plain(), "xy"), ["xy"]);
        let stripping = vec![token("<a>", |token| (token.lstrip, token.rstrip) = (true, true))];
        assert_eq!(found(stripping, "x  <a>\n <a> y"), ["x", "3", "3", "y"]);
        let word = vec![token("is", |token| token.single_word = true)];
        assert_eq!(found(word, "this is is\u{200d}"), ["this ", "2", " is\u{200d}"]);
    }
}
