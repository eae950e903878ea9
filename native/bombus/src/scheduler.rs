//! Which rows go into the next step: plain bookkeeping, no tensors.
//!
//! First come, first served. A step holds one row of every running sequence that decodes, and
//! prompts in chunks of at most `prefill_chunk` rows in all, so that a long prompt does not
//! stall the others.

use crate::sequence::{Chunk, Sequence};
use std::collections::VecDeque;

#[derive(Clone, Debug)]
pub struct Limits {
    /// Sequences that run together.
    pub max_batch_size: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Prompt tokens in a step.
    pub prefill_chunk: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_batch_size: 32, max_queue: 1024, prefill_chunk: 512 }
    }
}

pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
}

impl Scheduler {
    pub fn new(limits: Limits) -> Self {
        Self { limits, waiting: VecDeque::new(), running: vec![] }
    }

    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// The next step; empty where there is nothing to do, or all must wait for samples.
    pub fn step(&mut self) -> Vec<Chunk> {
        let free = self.limits.max_batch_size - self.running.len();
        let admitted = free.min(self.waiting.len());
        self.running.extend(self.waiting.drain(..admitted));
        let mut budget = self.limits.prefill_chunk;
        let mut chunks: Vec<Chunk> = vec![];
        for sequence in &mut self.running {
            let prefills = sequence.prefills();
            let Some(chunk) = sequence.next_chunk(budget, chunks.len()) else { continue };
            budget -= if prefills { chunk.tokens.len() } else { 0 };
            chunks.push(chunk);
        }
        chunks
    }

    /// A running sequence; none where it has been removed meanwhile.
    pub fn running(&mut self, id: u64) -> Option<&mut Sequence> {
        self.running.iter_mut().find(|sequence| sequence.id == id)
    }

    pub fn remove(&mut self, id: u64) {
        self.running.retain(|sequence| sequence.id != id);
        self.waiting.retain(|sequence| sequence.id != id);
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Token;
    use crate::sampler::Sampling;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// Runs all sequences with one step always in flight; every token that a sequence feeds must
    /// be the right one, at the right position. -> the steps it took
    fn run(mut scheduler: Scheduler, prompts: &[(usize, usize, bool)]) -> usize {
        for (id, &(prompt, new, penalized)) in prompts.iter().enumerate() {
            let penalty = if penalized { 1.5 } else { 1.0 };
            let sampling = Sampling { repetition_penalty: penalty, ..Sampling::default() };
            let prompt = (0..prompt).map(|position| token(id as u64, position)).collect();
            scheduler.add(Sequence::new(id as u64, prompt, new, sampling));
        }
        let mut fed: HashMap<u64, usize> = HashMap::new();
        let mut previous: Vec<u32> = vec![];
        let mut in_flight: Vec<(u64, u32, bool)> = vec![];
        let mut steps = 0;
        while !scheduler.is_idle() {
            let chunks = scheduler.step();
            assert!(!(chunks.is_empty() && in_flight.is_empty()), "stalled");
            assert!(chunks.len() <= scheduler.limits.max_batch_size);
            let mut samples = vec![];
            let mut prefilled = 0;
            for chunk in &chunks {
                let position = fed.entry(chunk.id).or_default();
                assert_eq!(*position, chunk.start);
                for (offset, fed) in chunk.tokens.iter().enumerate() {
                    let id = match *fed {
                        Token::Id(id) => id,
                        Token::Sampled(row) => previous[row],
                    };
                    assert_eq!(id, token(chunk.id, chunk.start + offset));
                }
                *position += chunk.tokens.len();
                let (prompt, ..) = prompts[chunk.id as usize];
                prefilled += if chunk.start < prompt { chunk.tokens.len() } else { 0 };
                samples.push((chunk.id, token(chunk.id, *position), chunk.draw.is_some()));
            }
            assert!(prefilled <= scheduler.limits.prefill_chunk);
            for (id, token, is_token) in std::mem::take(&mut in_flight) {
                if is_token && scheduler.running(id).is_some_and(|sequence| sequence.accept(token))
                {
                    scheduler.remove(id);
                }
            }
            previous = samples.iter().map(|sample| sample.1).collect();
            in_flight = samples;
            steps += 1;
        }
        for (id, &(prompt, new, _)) in prompts.iter().enumerate() {
            assert_eq!(fed[&(id as u64)], prompt + new - 1);
        }
        steps
    }

    /// Every position of every sequence has a token of its own.
    fn token(id: u64, position: usize) -> u32 {
        id as u32 * 10_000 + position as u32
    }

    #[test]
    fn sequences_join_and_leave_between_steps() {
        let limits = Limits { max_batch_size: 2, prefill_chunk: 8, ..Limits::default() };
        // The third waits for the second to leave, which happens long before the first is done.
        let steps = run(Scheduler::new(limits), &[(4, 20, false), (4, 3, false), (4, 10, false)]);
        assert!(steps <= 22, "{steps}");
    }

    #[test]
    fn a_long_prompt_goes_in_chunks_beside_running_sequences() {
        let mut scheduler = Scheduler::new(Limits { prefill_chunk: 4, ..Limits::default() });
        let sequence = |id, prompt| Sequence::new(id, vec![7; prompt], 5, Sampling::default());
        scheduler.add(sequence(0, 2));
        let sizes = |chunks: Vec<Chunk>| -> Vec<_> {
            chunks.iter().map(|chunk| (chunk.id, chunk.tokens.len())).collect()
        };
        assert_eq!(sizes(scheduler.step()), [(0, 2)]);
        scheduler.add(sequence(1, 10));
        assert_eq!(sizes(scheduler.step()), [(0, 1), (1, 4)]);
        assert_eq!(sizes(scheduler.step()), [(0, 1), (1, 4)]);
        assert_eq!(sizes(scheduler.step()), [(0, 1), (1, 2)]);
    }

    proptest! {
        #[test]
        fn every_sequence_ends_whatever_the_limits(
            prompts in prop::collection::vec((1usize..40, 1usize..12, any::<bool>()), 1..20),
            max_batch_size in 1usize..6,
            prefill_chunk in 1usize..16,
        ) {
            let limits = Limits { max_batch_size, prefill_chunk, ..Limits::default() };
            run(Scheduler::new(limits), &prompts);
        }
    }
}
