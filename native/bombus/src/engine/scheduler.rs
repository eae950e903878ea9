//! Which rows go into the next step: plain bookkeeping, no tensors.
//!
//! First come, first served, within a group where there is one. A step holds one row of every running sequence that decodes, and
//! prompts in chunks of at most `prefill_chunk` rows in all, so that a long prompt does not
//! stall the others. A sequence whose reader lags behind is paused: it leaves its place to others.

use crate::engine::sequence::{Chunk, Sequence};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

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
    waiting: Waiting,
    running: Vec<Sequence>,
    /// Those whose readers lag behind; whoever has waited longest stands first.
    paused: Vec<Sequence>,
}

impl Scheduler {
    pub fn new(limits: Limits) -> Self {
        Self { limits, waiting: Waiting::default(), running: vec![], paused: vec![] }
    }

    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Lets those who wait run, the first come first, as far as there is room; -> who they are.
    pub fn admit(&mut self) -> Vec<u64> {
        let mut admitted = vec![];
        let mut members: HashMap<Option<u64>, usize> = HashMap::new();
        for sequence in &self.running {
            *members.entry(sequence.task.group_id()).or_default() += 1;
        }
        while self.running.len() < self.limits.max_batch_size {
            // Whose group is full lets others pass.
            let has_room = |sequence: &Sequence| {
                let taken = members.get(&sequence.task.group_id()).copied().unwrap_or(0);
                sequence.task.group.as_ref().is_none_or(|group| taken < group.max_batch_size)
            };
            let Some(sequence) = self.waiting.pop_front(has_room) else { break };
            *members.entry(sequence.task.group_id()).or_default() += 1;
            admitted.push(sequence.id);
            self.running.push(sequence);
        }
        admitted
    }

    /// The next step; empty where there is nothing to do, or all must wait for samples.
    pub fn step(&mut self) -> Vec<Chunk> {
        let mut budget = self.limits.prefill_chunk;
        let mut groups: HashMap<u64, usize> = HashMap::new();
        let mut chunks: Vec<Chunk> = vec![];
        for sequence in &mut self.running {
            let prefills = sequence.prefills();
            let group = sequence.task.group.as_ref();
            let own = group.map(|group| groups.entry(group.id).or_insert(group.prefill_chunk));
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

    /// A sequence leaves the batch until it goes on, and lets others run. It keeps its cache.
    pub fn pause(&mut self, id: u64) {
        if let Some(place) = place(&self.running, id) {
            self.paused.push(self.running.remove(place));
        }
    }

    /// A paused sequence goes on, before all others that wait.
    pub fn go_on(&mut self, id: u64) {
        if let Some(place) = place(&self.paused, id) {
            self.waiting.push_front(self.paused.remove(place));
        }
    }

    /// A sequence that is to give up its cache, since more are paused than may run: that which has
    /// been paused longest. It begins again when it goes on.
    pub fn next_to_give_up(&mut self) -> Option<u64> {
        let holders = self.paused.iter().filter(|sequence| sequence.has_begun()).count();
        match holders > self.limits.max_batch_size {
            true => self.longest_paused(),
            false => None,
        }
    }

    /// The sequence that has been paused longest of those that hold a cache.
    pub fn longest_paused(&self) -> Option<u64> {
        let mut holders = self.paused.iter().filter(|sequence| sequence.can_give_up_cache());
        holders.next().map(|sequence| sequence.id)
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn paused(&self) -> usize {
        self.paused.len()
    }

    /// Those in the batch.
    pub fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// A sequence, none where it has been removed meanwhile.
    pub fn get(&mut self, id: u64) -> Option<&mut Sequence> {
        let mut all = self.running.iter_mut().chain(&mut self.paused);
        all.find(|sequence| sequence.id == id).or_else(|| self.waiting.get(id))
    }

    pub fn remove(&mut self, id: u64) -> Option<Sequence> {
        if let Some(sequence) = self.waiting.remove(id) {
            return Some(sequence);
        }
        let holders = [&mut self.running, &mut self.paused];
        holders.into_iter().find_map(|all| Some(all.remove(place(all, id)?)))
    }

    /// Whether nothing can be done before something is told to it.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.len() == 0
    }
}

fn place(sequences: &[Sequence], id: u64) -> Option<usize> {
    sequences.iter().position(|sequence| sequence.id == id)
}

/// Those who wait for a place in the batch, in their order; each is found by its id.
#[derive(Default)]
struct Waiting {
    /// Those of a group (of none) by their turn.
    groups: HashMap<Option<u64>, BTreeMap<i64, Sequence>>,
    turns: HashMap<u64, (Option<u64>, i64)>,
    /// The turns that were given out, from the first to behind the last.
    given: Range<i64>,
}

impl Waiting {
    fn len(&self) -> usize {
        self.turns.len()
    }

    fn push_back(&mut self, sequence: Sequence) {
        let turn = self.given.end;
        self.given.end += 1;
        self.insert(sequence, turn);
    }

    fn push_front(&mut self, sequence: Sequence) {
        self.given.start -= 1;
        self.insert(sequence, self.given.start);
    }

    fn insert(&mut self, sequence: Sequence, turn: i64) {
        let group = sequence.task.group_id();
        self.turns.insert(sequence.id, (group, turn));
        self.groups.entry(group).or_default().insert(turn, sequence);
    }

    fn get(&mut self, id: u64) -> Option<&mut Sequence> {
        let (group, turn) = self.turns.get(&id)?;
        self.groups.get_mut(group)?.get_mut(turn)
    }

    /// The first whose group has room.
    fn pop_front(&mut self, has_room: impl Fn(&Sequence) -> bool) -> Option<Sequence> {
        let firsts = self.groups.values().filter_map(BTreeMap::first_key_value);
        let open = firsts.filter(|(_, sequence)| has_room(sequence));
        let id = open.min_by_key(|(turn, _)| **turn).map(|(_, sequence)| sequence.id)?;
        self.remove(id)
    }

    fn remove(&mut self, id: u64) -> Option<Sequence> {
        let (group, turn) = self.turns.remove(&id)?;
        let turns = self.groups.get_mut(&group)?;
        let sequence = turns.remove(&turn);
        if turns.is_empty() {
            self.groups.remove(&group);
        }
        sequence
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Token;
    use crate::engine::sequence::{GroupLimits, Task};
    use crate::sampler::Sampling;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// A prompt, new tokens, penalties or none, positions that a cache has, one of two groups.
    type Case = (usize, usize, bool, usize, Option<bool>);

    fn task(id: u64, &(prompt, new, penalized, _, group): &Case) -> Task {
        let penalty = if penalized { 1.5 } else { 1.0 };
        let sampling = Sampling { repetition_penalty: penalty, ..Sampling::default() };
        Task {
            constraint: None,
            prompt: (0..prompt).map(|position| token(id, position)).collect(),
            max_new_tokens: new,
            min_new_tokens: 0,
            eos_token_ids: vec![],
            sampling: sampling.into(),
            group: group.map(limits_of),
        }
    }

    fn limits_of(one: bool) -> GroupLimits {
        match one {
            true => GroupLimits { id: 1, max_batch_size: 1, prefill_chunk: 3 },
            false => GroupLimits { id: 2, max_batch_size: 2, prefill_chunk: 5 },
        }
    }

    /// Pauses one that runs, lets one go on that is paused, or neither.
    fn disturb(scheduler: &mut Scheduler, number: usize) {
        let pick = |all: &[Sequence]| Some(all.get(number / 3 % all.len().max(1))?.id);
        match number % 3 {
            0 => pick(&scheduler.running).into_iter().for_each(|id| scheduler.pause(id)),
            1 => pick(&scheduler.paused).into_iter().for_each(|id| scheduler.go_on(id)),
            _ => {}
        }
        while let Some(id) = scheduler.next_to_give_up() {
            scheduler.get(id).unwrap().give_up_cache();
        }
        let holders = scheduler.paused.iter().filter(|paused| paused.can_give_up_cache());
        assert!(holders.count() <= scheduler.limits.max_batch_size);
    }

    /// Runs all sequences with one step always in flight; every token that a sequence feeds must
    /// be the right one, at the right position. Between steps `disturb` is called with these
    /// numbers. -> the steps it took
    fn run(mut scheduler: Scheduler, cases: &[Case], disturbances: &[usize]) -> usize {
        for (id, case) in cases.iter().enumerate() {
            scheduler.add(Sequence::new(id as u64, task(id as u64, case)));
        }
        let mut fed: HashMap<u64, usize> = HashMap::new();
        let mut previous: Vec<u32> = vec![];
        let mut in_flight: Vec<(u64, u32, bool)> = vec![];
        let mut order = vec![];
        let mut steps = 0;
        while !scheduler.is_idle() || scheduler.paused() > 0 {
            match disturbances.get(steps) {
                Some(number) => disturb(&mut scheduler, *number),
                None => (0..cases.len() as u64).for_each(|id| scheduler.go_on(id)),
            }
            for id in scheduler.admit() {
                let cached = cases[id as usize].3;
                let sequence = scheduler.get(id).unwrap();
                if !sequence.has_begun() {
                    let known = sequence.tokens().len();
                    sequence.begin_at(cached);
                    if fed.insert(id, cached.min(known - 1)).is_none() {
                        order.push(id);
                    }
                }
            }
            let chunks = scheduler.step();
            let stalled = chunks.is_empty() && in_flight.is_empty() && !scheduler.is_idle();
            assert!(!stalled, "stalled");
            assert!(chunks.len() <= scheduler.limits.max_batch_size);
            let mut samples = vec![];
            let mut prefilled = 0;
            let mut groups: HashMap<bool, [usize; 2]> = HashMap::new();
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
                let (prompt, _, _, _, group) = cases[chunk.id as usize];
                let rows = if chunk.start < prompt { chunk.tokens.len() } else { 0 };
                prefilled += rows;
                if let Some(group) = group {
                    let used = groups.entry(group).or_default();
                    *used = [used[0] + 1, used[1] + rows];
                }
                samples.push((chunk.id, token(chunk.id, *position), chunk.draw.is_some()));
            }
            assert!(prefilled <= scheduler.limits.prefill_chunk);
            for (group, [running, prefilled]) in groups {
                let group = limits_of(group);
                assert!(running <= group.max_batch_size && prefilled <= group.prefill_chunk);
            }
            for (id, token, is_token) in std::mem::take(&mut in_flight) {
                if is_token && scheduler.get(id).is_some_and(|sequence| sequence.accept(token)) {
                    let sequence = scheduler.remove(id).unwrap();
                    let computed = sequence.computed();
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
        // First come, first served, among those with the same group.
        for group in [None, Some(true), Some(false)] {
            let same = order.iter().filter(|id| cases[**id as usize].4 == group);
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
        let steps = run(Scheduler::new(limits), &[case(20), case(3), case(10)], &[]);
        assert!(steps <= 22, "{steps}");
    }

    #[test]
    fn a_paused_sequence_leaves_its_place_and_comes_first_when_it_goes_on() {
        let limits = Limits { max_batch_size: 1, ..Limits::default() };
        let mut scheduler = Scheduler::new(limits);
        let case = (2, 9, false, 0, None);
        (0..4).for_each(|id| scheduler.add(Sequence::new(id, task(id, &case))));
        assert_eq!(scheduler.admit(), [0]);
        scheduler.pause(0);
        assert_eq!(scheduler.admit(), [1]);
        scheduler.go_on(0);
        assert!(scheduler.admit().is_empty());
        scheduler.remove(1);
        assert_eq!(scheduler.admit(), [0]);
        assert_eq!((scheduler.waiting(), scheduler.paused()), (2, 0));
        // Whoever waits or is paused is found, and leaves, as well.
        scheduler.pause(0);
        assert!([0, 2, 3].iter().all(|id| scheduler.remove(*id).is_some_and(|it| it.id == *id)));
        assert!(scheduler.is_idle() && scheduler.remove(3).is_none());
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
            disturbances in prop::collection::vec(0usize..300, 0..60),
        ) {
            let limits = Limits { max_batch_size, prefill_chunk, ..Limits::default() };
            run(Scheduler::new(limits), &cases, &disturbances);
        }
    }
}
