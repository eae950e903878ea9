//! Which rows go into the next step: plain bookkeeping, no tensors.
//!
//! First come, first served, within a share where there is one. A step holds one row of every running sequence that decodes, and
//! prompts in chunks of at most `prefill_chunk` rows in all, so that a long prompt does not
//! stall the others.

use crate::sequence::{Chunk, Sequence};
use std::collections::{HashMap, VecDeque};

#[derive(Clone, Debug)]
pub struct Limits {
    /// Sequences that run together.
    pub max_batch_size: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Prompt tokens in a step.
    pub prefill_chunk: usize,
    /// Tokens of a sequence, prompt and all; none: what the model was made for
    pub max_context: Option<usize>,
    /// Bytes for the keys and values of finished sequences.
    pub prefix_cache: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_batch_size: 32,
            max_queue: 1024,
            prefill_chunk: 512,
            max_context: None,
            prefix_cache: 1 << 30,
        }
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

    /// Lets those who wait run, the first come first, as far as there is room; -> who they are.
    pub fn admit(&mut self) -> Vec<u64> {
        let mut admitted = vec![];
        let mut place = 0;
        while self.running.len() < self.limits.max_batch_size && place < self.waiting.len() {
            // Whose share is full lets others pass.
            if !self.has_room(&self.waiting[place]) {
                place += 1;
            } else if let Some(sequence) = self.waiting.remove(place) {
                admitted.push(sequence.id);
                self.running.push(sequence);
            }
        }
        admitted
    }

    fn has_room(&self, sequence: &Sequence) -> bool {
        let Some(share) = &sequence.task.share else { return true };
        let same = |other: &&Sequence| other.task.share.as_ref().is_some_and(|o| o.id == share.id);
        self.running.iter().filter(same).count() < share.max_batch_size
    }

    /// The next step; empty where there is nothing to do, or all must wait for samples.
    pub fn step(&mut self) -> Vec<Chunk> {
        let mut budget = self.limits.prefill_chunk;
        let mut shares: HashMap<u64, usize> = HashMap::new();
        let mut chunks: Vec<Chunk> = vec![];
        for sequence in &mut self.running {
            let prefills = sequence.prefills();
            let share = sequence.task.share.as_ref();
            let own = share.map(|share| shares.entry(share.id).or_insert(share.prefill_chunk));
            let most = own.as_ref().map_or(budget, |own| budget.min(**own));
            let Some(chunk) = sequence.next_chunk(most, chunks.len()) else { continue };
            if prefills {
                budget -= chunk.tokens.len();
                _ = own.map(|own| *own -= chunk.tokens.len());
            }
            chunks.push(chunk);
        }
        chunks
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// How many sequences run together.
    pub fn batch_size(&self) -> usize {
        self.running.len()
    }

    /// A running sequence; none where it has been removed meanwhile.
    pub fn running(&mut self, id: u64) -> Option<&mut Sequence> {
        self.running.iter_mut().find(|sequence| sequence.id == id)
    }

    pub fn remove(&mut self, id: u64) -> Option<Sequence> {
        if let Some(place) = self.running.iter().position(|sequence| sequence.id == id) {
            return Some(self.running.remove(place));
        }
        let place = self.waiting.iter().position(|sequence| sequence.id == id)?;
        self.waiting.remove(place)
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
    use crate::sequence::{Share, Task};
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// A prompt, new tokens, penalties or none, positions that a cache has, one of two shares.
    type Case = (usize, usize, bool, usize, Option<bool>);

    fn task(id: u64, &(prompt, new, penalized, _, share): &Case) -> Task {
        let penalty = if penalized { 1.5 } else { 1.0 };
        let sampling = Sampling { repetition_penalty: penalty, ..Sampling::default() };
        Task {
            prompt: (0..prompt).map(|position| token(id, position)).collect(),
            max_new_tokens: new,
            min_new_tokens: 0,
            eos_token_ids: vec![],
            sampling: sampling.into(),
            share: share.map(share_of),
        }
    }

    fn share_of(one: bool) -> Share {
        match one {
            true => Share { id: 1, max_batch_size: 1, prefill_chunk: 3 },
            false => Share { id: 2, max_batch_size: 2, prefill_chunk: 5 },
        }
    }

    /// Runs all sequences with one step always in flight; every token that a sequence feeds must
    /// be the right one, at the right position. -> the steps it took
    fn run(mut scheduler: Scheduler, cases: &[Case]) -> usize {
        for (id, case) in cases.iter().enumerate() {
            scheduler.add(Sequence::new(id as u64, task(id as u64, case)));
        }
        let mut fed: HashMap<u64, usize> = HashMap::new();
        let mut previous: Vec<u32> = vec![];
        let mut in_flight: Vec<(u64, u32, bool)> = vec![];
        let mut order = vec![];
        let mut steps = 0;
        while !scheduler.is_idle() {
            for id in scheduler.admit() {
                let (prompt, _, _, cached, _) = cases[id as usize];
                scheduler.running(id).unwrap().begin_at(cached);
                fed.insert(id, cached.min(prompt - 1));
                order.push(id);
            }
            let chunks = scheduler.step();
            assert!(!(chunks.is_empty() && in_flight.is_empty()), "stalled");
            assert!(chunks.len() <= scheduler.limits.max_batch_size);
            let mut samples = vec![];
            let mut prefilled = 0;
            let mut shares: HashMap<bool, [usize; 2]> = HashMap::new();
            for chunk in &chunks {
                let position = fed.get_mut(&chunk.id).unwrap();
                assert_eq!(*position, chunk.start);
                for (offset, fed) in chunk.tokens.iter().enumerate() {
                    let id = match *fed {
                        Token::Id(id) => id,
                        Token::Sampled(row) => previous[row],
                    };
                    assert_eq!(id, token(chunk.id, chunk.start + offset));
                }
                *position += chunk.tokens.len();
                let (prompt, _, _, _, share) = cases[chunk.id as usize];
                let rows = if chunk.start < prompt { chunk.tokens.len() } else { 0 };
                prefilled += rows;
                if let Some(share) = share {
                    let used = shares.entry(share).or_default();
                    *used = [used[0] + 1, used[1] + rows];
                }
                samples.push((chunk.id, token(chunk.id, *position), chunk.draw.is_some()));
            }
            assert!(prefilled <= scheduler.limits.prefill_chunk);
            for (share, [running, prefilled]) in shares {
                let share = share_of(share);
                assert!(running <= share.max_batch_size && prefilled <= share.prefill_chunk);
            }
            for (id, token, is_token) in std::mem::take(&mut in_flight) {
                if is_token && scheduler.running(id).is_some_and(|sequence| sequence.accept(token))
                {
                    let sequence = scheduler.remove(id).unwrap();
                    let computed = sequence.into_computed();
                    let right = (0..computed.len()).map(|position| self::token(id, position));
                    assert!(computed.iter().copied().eq(right));
                }
            }
            previous = samples.iter().map(|sample| sample.1).collect();
            in_flight = samples;
            steps += 1;
        }
        for (id, &(prompt, new, ..)) in cases.iter().enumerate() {
            assert_eq!(fed[&(id as u64)], prompt + new - 1);
        }
        // First come, first served, among those with the same share.
        for share in [None, Some(true), Some(false)] {
            let same = order.iter().filter(|id| cases[**id as usize].4 == share);
            assert!(same.is_sorted());
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
        let case = |new| (4, new, false, 0, None);
        let steps = run(Scheduler::new(limits), &[case(20), case(3), case(10)]);
        assert!(steps <= 22, "{steps}");
    }

    #[test]
    fn a_long_prompt_goes_in_chunks_beside_running_sequences() {
        let mut scheduler = Scheduler::new(Limits { prefill_chunk: 4, ..Limits::default() });
        let sequence = |id, prompt| Sequence::new(id, task(id, &(prompt, 5, false, 0, None)));
        scheduler.add(sequence(0, 2));
        let sizes = |chunks: Vec<Chunk>| -> Vec<_> {
            chunks.iter().map(|chunk| (chunk.id, chunk.tokens.len())).collect()
        };
        assert_eq!(scheduler.admit(), [0]);
        assert_eq!(sizes(scheduler.step()), [(0, 2)]);
        scheduler.add(sequence(1, 10));
        assert_eq!(scheduler.admit(), [1]);
        assert_eq!(sizes(scheduler.step()), [(0, 1), (1, 4)]);
        assert_eq!(sizes(scheduler.step()), [(0, 1), (1, 4)]);
        assert_eq!(sizes(scheduler.step()), [(0, 1), (1, 2)]);
    }

    proptest! {
        #[test]
        fn every_sequence_ends_whatever_the_limits(
            cases in prop::collection::vec(
                (1usize..40, 1usize..12, any::<bool>(), 0usize..50, any::<Option<bool>>()),
                1..20,
            ),
            max_batch_size in 1usize..6,
            prefill_chunk in 1usize..16,
        ) {
            let limits = Limits { max_batch_size, prefill_chunk, ..Limits::default() };
            run(Scheduler::new(limits), &cases);
        }
    }
}
