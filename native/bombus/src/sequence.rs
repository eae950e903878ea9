//! One request on its way through the engine: its tokens and what is computed of them.

use crate::backend::Token;
use crate::sampler::{Draw, Sampling};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A token or a string that ends the text.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
    Cancelled,
}

#[derive(Debug)]
pub struct Sequence {
    pub id: u64,
    pub prompt: Vec<u32>,
    /// The tokens sampled and read so far.
    pub generated: Vec<u32>,
    pub max_new_tokens: usize,
    sampling: Sampling,
    /// How many positions are computed or submitted.
    submitted: usize,
    /// How many samples are submitted and not read.
    in_flight: usize,
    /// Where the last of them stands among its step's samples.
    row: usize,
}

/// The next rows of a sequence.
#[derive(Debug)]
pub struct Chunk {
    pub id: u64,
    /// The position of the first token.
    pub start: usize,
    pub tokens: Vec<Token>,
    /// What the next token is drawn with; none while the prompt is not at its end.
    pub draw: Option<Draw>,
}

impl Sequence {
    /// `max_new_tokens` must be above 0 and leave the prompt within the context.
    pub fn new(id: u64, prompt: Vec<u32>, max_new_tokens: usize, sampling: Sampling) -> Self {
        Self {
            id,
            prompt,
            generated: vec![],
            max_new_tokens,
            sampling,
            submitted: 0,
            in_flight: 0,
            row: 0,
        }
    }

    /// Whether its next rows are of the prompt.
    pub fn prefills(&self) -> bool {
        self.submitted < self.prompt.len()
    }

    /// The next rows, at most `budget` of them from the prompt; their sample will be number `row`
    /// of the step. None where the sequence must wait or has nothing left to do.
    pub fn next_chunk(&mut self, budget: usize, row: usize) -> Option<Chunk> {
        let start = self.submitted;
        let left = self.prompt.len().saturating_sub(start);
        let tokens: Vec<Token> = match left {
            0 => vec![self.next_token()?],
            _ if budget == 0 => return None,
            _ => self.prompt[start..][..left.min(budget)].iter().map(|&id| Token::Id(id)).collect(),
        };
        self.submitted += tokens.len();
        let draw = (tokens.len() >= left).then(|| self.draw(row));
        Some(Chunk { id: self.id, start, tokens, draw })
    }

    fn next_token(&self) -> Option<Token> {
        let exhausted = self.generated.len() + self.in_flight >= self.max_new_tokens;
        let must_know = self.sampling.penalizes() && self.in_flight > 0;
        match self.in_flight {
            _ if exhausted || must_know => None,
            0 => self.generated.last().map(|&id| Token::Id(id)),
            _ => Some(Token::Sampled(self.row)),
        }
    }

    fn draw(&mut self, row: usize) -> Draw {
        let place = self.generated.len() + self.in_flight;
        self.in_flight += 1;
        self.row = row;
        self.sampling.draw(place, self.prompt.iter().chain(&self.generated).copied())
    }

    /// Takes a sampled token that has been read; true where it is the last one allowed.
    pub fn accept(&mut self, token: u32) -> bool {
        self.in_flight -= 1;
        self.generated.push(token);
        self.generated.len() >= self.max_new_tokens
    }
}
