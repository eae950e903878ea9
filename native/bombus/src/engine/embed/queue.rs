//! Which texts go into a step.

use super::reading::{Part, Reading, TakenPart};
use crate::backend::{Backend, KvCache};
use crate::error::Result;
use std::collections::VecDeque;

/// The requests, in the order in which they come next.
pub struct Queue<B: Backend> {
    requests: VecDeque<Reading<B>>,
}

impl<B: Backend> Queue<B> {
    pub fn new() -> Self {
        Self { requests: VecDeque::new() }
    }

    pub fn push(&mut self, request: Reading<B>) {
        self.requests.push_back(request);
    }

    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Reading<B>> {
        self.requests.iter()
    }

    /// Of texts that are read in part.
    pub fn caches(&self) -> impl Iterator<Item = &KvCache<B>> {
        self.requests.iter().flat_map(Reading::caches)
    }

    pub fn remove(&mut self, id: u64) -> Option<Reading<B>> {
        let place = self.requests.iter().position(|request| request.id == id)?;
        self.requests.remove(place)
    }

    /// The texts of the next step, at most so many rows: one of each request, and again. Embeddings
    /// and judgements take turns.
    pub fn plan(&mut self, rows: usize, cache: impl Fn() -> KvCache<B>) -> Vec<Part<B>> {
        let mut left = rows;
        let mut parts = vec![];
        let first = self.requests.iter().find(|request| request.has_more());
        let judges = first.is_some_and(|first| first.wanted.is_judgement());
        let alike = |request: &&mut Reading<B>| request.wanted.is_judgement() == judges;
        let mut open: VecDeque<_> = self.requests.iter_mut().filter(alike).collect();
        while left > 0
            && let Some(request) = open.pop_front()
        {
            let Some(part) = request.next_part(left, &cache) else { continue };
            left -= part.tokens.len();
            parts.push(part);
            open.push_back(request);
        }
        self.requests.rotate_left(self.requests.len().min(1));
        // Neighbours with one adapter are multiplied at once.
        parts.sort_by_key(|part| part.request);
        parts
    }

    /// Its rows are submitted: the cache of a text that goes on is kept.
    pub fn submitted(&mut self, part: Part<B>) -> TakenPart {
        let (part, cache) = part.submitted();
        if let Some(cache) = cache
            && let Some(request) = self.find(part.request)
        {
            request.keep(part.text, cache);
        }
        part
    }

    /// numbers: `[outputs, width]`; true where the request is done, false too where it has ended before
    pub fn take(&mut self, part: &TakenPart, numbers: &[f32]) -> Result<bool> {
        self.find(part.request).map_or(Ok(false), |request| request.take(part, numbers))
    }

    fn find(&mut self, id: u64) -> Option<&mut Reading<B>> {
        self.requests.iter_mut().find(|request| request.id == id)
    }
}
