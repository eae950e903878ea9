//! Scoring: the log-probabilities of a given text, a chunk at a time between the steps of others.

use super::active::{InUse, adapter_key};
use super::admission::Permit;
use super::pending::Scoring;
use super::sink::Sink;
use crate::backend::{Backend, Batch, KvCache, Token};
use crate::error::{Error, Result};
use crate::model::executor::Executor;
use crate::runtime::metrics;
use std::ops::Range;

pub struct Score<B: Backend> {
    pub id: u64,
    pub ids: Vec<u32>,
    pub adapter: Option<InUse<B>>,
    pub cache: KvCache<B>,
    pub log_probs: Vec<f32>,
    pub sink: Sink,
    pub share: metrics::Share,
    pub permits: Vec<Permit>,
}

impl<B: Backend> Score<B> {
    pub fn new(id: u64, scoring: Scoring, adapter: Option<InUse<B>>, cache: KvCache<B>) -> Self {
        let Scoring { ids, sink, permits, .. } = scoring;
        let share = metrics::Share::one(&metrics::SEQUENCES);
        Self { id, ids, adapter, cache, log_probs: vec![], sink, share, permits }
    }

    pub fn adapter_key(&self) -> usize {
        adapter_key(self.adapter.as_ref().map(|(adapter, _)| adapter))
    }

    /// The positions of the next `rows` tokens, as far as there are so many.
    pub fn next_positions(&self, rows: usize) -> Range<usize> {
        let start = self.log_probs.len();
        start..(start + rows).min(self.ids.len().saturating_sub(1)).max(start)
    }

    /// Scores the next `rows` tokens, since the logits of a long text do not fit into memory at
    /// once; true where they were the last.
    pub fn advance(&mut self, executor: &impl Executor<Backend = B>, rows: usize) -> Result<bool> {
        let start = self.log_probs.len();
        let given = &self.ids[start..self.ids.len() - 1];
        let given = &given[..given.len().min(rows)];
        if given.is_empty() {
            return Ok(true);
        }
        let tokens: Vec<Token> = given.iter().map(|&id| Token::Id(id)).collect();
        let outputs: Vec<usize> = (0..given.len()).collect();
        let adapter = self.adapter.as_ref().map(|(_, bound)| bound.as_ref());
        let mut batch = Batch::default();
        batch.push(&tokens, start, &outputs, &mut self.cache, adapter);
        let _guard = executor.guard();
        let logits = executor.forward(&mut batch, None)?;
        let targets = &self.ids[start + 1..][..given.len()];
        let log_probs = executor.decoder().backend.log_probs(&logits, targets)?;
        if let Some(place) = log_probs.iter().position(|log_prob| !log_prob.is_finite()) {
            return Err(Error::Backend(format!(
                "the log-probability of token {} is not a finite number",
                start + place + 1
            )));
        }
        self.log_probs.extend(log_probs);
        Ok(self.log_probs.len() + 1 == self.ids.len())
    }
}
