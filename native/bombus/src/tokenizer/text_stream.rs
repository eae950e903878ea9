//! Tokens to text, one at a time: characters that span tokens wait until they are whole, and
//! text that may become a stop string waits until it cannot.

use super::Tokenizer;
use super::decoder::Decoding;
use super::stops::Stops;
use super::thinking::Thinking;
use std::ops::Range;
use std::sync::Arc;

pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    decoding: Decoding,
    stops: Stops,
    /// Whether stop strings name special tokens, which are not part of the text.
    stops_at_special: bool,
    /// Text that may be the beginning of a stop string.
    held: String,
    /// Special tokens in it.
    hidden: Vec<Range<usize>>,
    thinking: Thinking,
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
        Self {
            decoding: tokenizer.decoding(),
            stops_at_special: stop.iter().any(|stop| tokenizer.names_special_token(stop)),
            tokenizer,
            stops: Stops::new(stop),
            held: String::new(),
            hidden: vec![],
            thinking: Thinking::default(),
        }
    }

    /// The prompt that the text follows.
    pub fn follow(&mut self, prompt: &[u32]) {
        let end = &prompt[prompt.len().saturating_sub(32)..];
        let text = self.tokenizer.decode_with(end, false).unwrap_or_default();
        self.thinking = Thinking::after(&text);
    }

    /// Whether the text so far ends in the middle of the model's thinking.
    pub fn is_thinking(&self) -> bool {
        self.thinking.is_open()
    }

    pub fn push(&mut self, id: u32) -> Text {
        // A model may have more rows than its tokenizer has tokens.
        let Some(token) = self.tokenizer.token(id) else { return self.release("") };
        if self.tokenizer.is_special(&token) {
            self.thinking.push(&token);
            return self.hide(&token);
        }
        let token = self.tokenizer.normalized(id, token);
        let mut text = String::new();
        self.decoding.push(&token, &mut text);
        self.thinking.push(&text);
        self.release(&text)
    }

    /// The text that is still held, at the end of the sequence.
    pub fn finish(&mut self) -> String {
        let mut rest = String::new();
        self.decoding.finish(&mut rest);
        self.thinking.push(&rest);
        let Text { text, stopped } = self.release(&rest);
        if stopped { text } else { text + &self.take(self.held.len()) }
    }

    fn hide(&mut self, token: &str) -> Text {
        if self.stops_at_special {
            let start = self.held.len();
            self.held.push_str(token);
            self.hidden.push(start..self.held.len());
        }
        self.release("")
    }

    fn release(&mut self, new: &str) -> Text {
        self.held.push_str(new);
        if let Some(start) = self.stops.find(&self.held) {
            let text = self.take(start);
            self.held.clear();
            self.hidden.clear();
            return Text { text, stopped: true };
        }
        let keep = self.stops.begun(&self.held);
        Text { text: self.take(self.held.len() - keep), stopped: false }
    }

    /// Takes bytes from the front, without what is hidden in them.
    fn take(&mut self, bytes: usize) -> String {
        let rest = self.held.split_off(bytes);
        let mut text = std::mem::replace(&mut self.held, rest);
        for hidden in self.hidden.iter().rev().filter(|hidden| hidden.start < bytes) {
            text.replace_range(hidden.start..hidden.end.min(bytes), "");
        }
        self.hidden.retain_mut(|hidden| {
            *hidden = hidden.start.saturating_sub(bytes)..hidden.end.saturating_sub(bytes);
            hidden.start < hidden.end
        });
        text
    }
}
