//! The least number of tokens that a text can have, without making any: what cannot fit is refused
//! before it costs anything.

use std::collections::HashMap;

/// Parts of a token that a byte stands for are counted in these.
const WHOLE: u64 = 1 << 20;

/// For each byte, the share of a token that it is at least: one in the longest token that has it.
pub struct Bound {
    shares: [u64; 256],
    /// of the longest token of all
    least: u64,
    /// Whether texts beyond ASCII may become shorter first, by composing characters.
    composes: bool,
}

/// How the tokens of a vocabulary spell bytes.
pub enum Spelling {
    /// Each byte is a character.
    Characters,
    /// Text as it is, a character for spaces, and `<0x..>` for bytes without a token.
    Fallback,
}

impl Bound {
    /// None where a byte may vanish, or vanish into an unknown token. `added`: tokens that are
    /// found in texts as they are written
    pub fn new<'a>(
        vocabulary: &HashMap<String, u32>,
        added: impl Iterator<Item = &'a str>,
        spelling: Spelling,
        composes: bool,
    ) -> Option<Self> {
        let mut longest = [0; 256];
        let mut alone = [false; 256];
        for token in vocabulary.keys() {
            let bytes = match spelling {
                Spelling::Characters => of_characters(token),
                Spelling::Fallback => of_fallback(token),
            };
            if let [byte] = bytes[..] {
                alone[usize::from(byte)] = true;
            }
            note(&mut longest, &bytes, token);
        }
        for token in added {
            note(&mut longest, token.as_bytes(), "");
        }
        let all = alone.iter().all(|alone| *alone);
        let shares = longest.map(|length| WHOLE / length.max(1) as u64);
        let least = shares.iter().copied().min().unwrap_or(0);
        all.then_some(Self { shares, least, composes })
    }

    pub fn tokens(&self, text: &str) -> usize {
        let shares = match self.composes && !text.is_ascii() {
            // Composing makes three bytes one at most.
            true => text.len() as u64 * self.least / 3,
            false => text.bytes().map(|byte| self.shares[usize::from(byte)]).sum(),
        };
        (shares / WHOLE) as usize
    }
}

fn note(longest: &mut [usize; 256], bytes: &[u8], token: &str) {
    let space = token.contains('▁').then_some(b' ');
    for byte in bytes.iter().copied().chain(space) {
        let longest = &mut longest[usize::from(byte)];
        *longest = bytes.len().max(*longest);
    }
}

/// A token with other characters stands for itself.
fn of_characters(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(super::pieces::byte).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

fn of_fallback(token: &str) -> Vec<u8> {
    match super::decoder::byte_token(token) {
        Some(byte) => vec![byte],
        None => token.as_bytes().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_has_no_fewer_tokens() {
        let mut words: Vec<String> =
            (0..=255).map(|byte| super::super::pieces::character(byte).to_string()).collect();
        words.extend(["ab", "abab", "ĠĠĠĠĠĠĠĠ"].map(str::to_owned));
        let vocabulary = words.iter().enumerate().map(|(id, word)| (word.clone(), id as u32));
        let vocabulary: HashMap<String, u32> = vocabulary.collect();
        let bound = |composes| {
            let added = ["<|end|>"].into_iter();
            Bound::new(&vocabulary, added, Spelling::Characters, composes).unwrap()
        };
        assert_eq!(bound(true).tokens("123"), 3);
        assert_eq!(bound(true).tokens("abababab1"), 3);
        assert_eq!(bound(true).tokens(&" ".repeat(80)), 10);
        assert_eq!(bound(true).tokens("<|end|>"), 0);
        assert_eq!(bound(false).tokens("ééé"), 6);
        assert_eq!(bound(true).tokens(&"é".repeat(120)), 10);
        let lacks = vocabulary.iter().filter(|(word, _)| *word != "7");
        let lacks = lacks.map(|(word, id)| (word.clone(), *id)).collect();
        assert!(Bound::new(&lacks, [].into_iter(), Spelling::Characters, false).is_none());
    }
}
