//! What goes into a step: rows of several sequences, each with its cache and its adapter.

use super::{Backend, Segment, Token};
use crate::spec::Projection;

/// Keys and values of one sequence.
pub type KvCache<B> = <B as Backend>::Cache;

/// An adapter's LoRA for the linear layers of each projection of a layer.
pub type Loras<B> = [Vec<Option<<B as Backend>::Lora>>; Projection::ALL.len()];

/// An adapter's LoRA, each at its place in the decoder.
pub struct BoundAdapter<B: Backend> {
    pub embed_tokens: Option<B::Lora>,
    pub layers: Vec<Loras<B>>,
    /// also where the embedding is the head
    pub lm_head: Option<B::Lora>,
}

/// One sequence's rows of a step.
pub struct Entry<'a, B: Backend> {
    pub segment: Segment,
    pub cache: &'a mut KvCache<B>,
    pub adapter: Option<&'a BoundAdapter<B>>,
}

/// A step.
pub struct Batch<'a, B: Backend> {
    /// of all rows
    pub tokens: Vec<Token>,
    pub entries: Vec<Entry<'a, B>>,
    /// The rows whose logits are wanted, in ascending order.
    pub outputs: Vec<usize>,
}

impl<B: Backend> Default for Batch<'_, B> {
    fn default() -> Self {
        Self { tokens: vec![], entries: vec![], outputs: vec![] }
    }
}

impl<'a, B: Backend> Batch<'a, B> {
    /// Appends a sequence's rows; `outputs`: those of them, from 0 on, whose logits are wanted.
    pub fn push(
        &mut self,
        tokens: &[Token],
        start: usize,
        outputs: &[usize],
        cache: &'a mut KvCache<B>,
        adapter: Option<&'a BoundAdapter<B>>,
    ) {
        let first = self.tokens.len();
        self.tokens.extend(tokens);
        self.outputs.extend(outputs.iter().map(|output| first + output));
        let segment = Segment { rows: first..self.tokens.len(), start };
        self.entries.push(Entry { segment, cache, adapter });
    }
}
