//! One request on its way through the engine: its tokens and what is computed of them.

use crate::backend::Token;
use crate::sampler::{Draw, Sampling};
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A token or a string that ends the text.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
    Cancelled,
}

/// What is asked of a sequence.
#[derive(Clone, Debug)]
pub struct Task {
    pub prompt: Vec<u32>,
    /// above 0, and within the context behind the prompt
    pub max_new_tokens: usize,
    pub min_new_tokens: usize,
    /// The tokens that end a text: withheld until there are `min_new_tokens`.
    pub eos_token_ids: Vec<u32>,
    pub sampling: Arc<Sampling>,
    /// Limits that it shares with some others, beside those of all.
    pub share: Option<Share>,
}

/// The share of some sequences, those with the same id, in the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    pub id: u64,
    /// Sequences that run together.
    pub max_batch_size: usize,
    /// Prompt tokens in a step.
    pub prefill_chunk: usize,
}

#[derive(Debug)]
pub struct Sequence {
    pub id: u64,
    pub task: Task,
    /// The tokens sampled and read so far.
    pub generated: Vec<u32>,
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
    pub fn new(id: u64, task: Task) -> Self {
        Self { id, task, generated: vec![], submitted: 0, in_flight: 0, row: 0 }
    }

    /// Its first `positions`, fewer than the prompt's, are computed already.
    pub fn begin_at(&mut self, positions: usize) {
        self.submitted = positions.min(self.task.prompt.len() - 1);
    }

    /// Whether its next rows are of the prompt.
    pub fn prefills(&self) -> bool {
        self.submitted < self.task.prompt.len()
    }

    /// The tokens at the positions that are computed or submitted, as far as they are known.
    pub fn into_computed(self) -> Vec<u32> {
        let mut ids = self.task.prompt;
        ids.extend(self.generated);
        ids.truncate(self.submitted);
        ids
    }

    /// The next rows, at most `budget` of them from the prompt; their sample will be number `row`
    /// of the step. None where the sequence must wait or has nothing left to do.
    pub fn next_chunk(&mut self, budget: usize, row: usize) -> Option<Chunk> {
        let start = self.submitted;
        let left = self.task.prompt.len().saturating_sub(start);
        let rows = left.min(budget);
        let tokens: Vec<Token> = match left {
            0 => vec![self.next_token()?],
            _ if budget == 0 => return None,
            _ => self.task.prompt[start..][..rows].iter().map(|&id| Token::Id(id)).collect(),
        };
        self.submitted += tokens.len();
        let draw = (tokens.len() >= left).then(|| self.draw(row));
        Some(Chunk { id: self.id, start, tokens, draw })
    }

    fn next_token(&self) -> Option<Token> {
        let exhausted = self.generated.len() + self.in_flight >= self.task.max_new_tokens;
        let must_know = self.task.sampling.penalizes() && self.in_flight > 0;
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
        let Task { prompt, sampling, eos_token_ids, min_new_tokens, .. } = &self.task;
        let withheld = if place < *min_new_tokens { &eos_token_ids[..] } else { &[] };
        Draw::new(sampling, place, prompt, &self.generated, withheld)
    }

    /// Takes a sampled token that has been read; true where it is the last one allowed.
    pub fn accept(&mut self, token: u32) -> bool {
        self.in_flight -= 1;
        self.generated.push(token);
        self.generated.len() >= self.task.max_new_tokens
    }
}
