//! Tokens to text, one at a time: characters that span tokens wait until they are whole, and
//! text that may become a stop string waits until it cannot.

use super::Tokenizer;
use crate::error::Result;
use std::sync::Arc;

pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    stop: Vec<String>,
    /// The tokens that are decoded together: decoding one alone would lose the space before a
    /// word and break characters.
    window: Vec<u32>,
    /// How many of them were there when the text last ended in a whole character.
    whole: usize,
    /// How many bytes of the window's text have been handed out.
    read: usize,
    /// Text that may be the beginning of a stop string.
    held: String,
}

/// What a token adds to the text.
#[derive(Debug, PartialEq)]
pub struct Text {
    pub text: String,
    /// Whether a stop string was found; the text ends before it.
    pub stopped: bool,
}

impl TextStream {
    pub fn new(tokenizer: Arc<Tokenizer>, stop: Vec<String>) -> Self {
        Self { tokenizer, stop, window: vec![], whole: 0, read: 0, held: String::new() }
    }

    /// The token that ends a text, as the tokenizer says.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.tokenizer.eos_token_id()
    }

    pub fn push(&mut self, token: u32) -> Result<Text> {
        self.window.push(token);
        let text = self.decode()?;
        Ok(self.release(text))
    }

    /// The text that is still held, at the end of the sequence.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.window)?;
        let rest = text.get(self.read..).unwrap_or_default().to_owned();
        let Text { text, stopped } = self.release(rest);
        let held = std::mem::take(&mut self.held);
        Ok(if stopped { text } else { text + &held })
    }

    /// The new text of the window. A replacement character at its end may be the first bytes of a
    /// character whose rest follows, and waits.
    fn decode(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.window)?;
        let sure = sure(&text);
        let new = sure.get(self.read..).unwrap_or_default().to_owned();
        self.read = self.read.max(sure.len());
        if sure.len() == text.len() {
            self.window.drain(..self.whole);
            self.whole = self.window.len();
            self.read = self.tokenizer.decode(&self.window)?.len();
        }
        Ok(new)
    }

    fn release(&mut self, new: String) -> Text {
        self.held.push_str(&new);
        let found = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(start) = found {
            self.held.truncate(start);
            return Text { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.stop.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - keep);
        Text { text: std::mem::replace(&mut self.held, held), stopped: false }
    }
}

/// The text without the replacement characters that may still become one character: there are at
/// most three, one for each byte where a tokenizer falls back to bytes.
fn sure(text: &str) -> &str {
    let strip = |text, _| str::strip_suffix(text, '\u{fffd}').unwrap_or(text);
    (0..3).fold(text, strip)
}

/// The length of the longest end of `text` that begins `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = text.char_indices().map(|(start, _)| &text[start..]);
    ends.filter(|end| stop.starts_with(end)).map(str::len).max().unwrap_or(0)
}
