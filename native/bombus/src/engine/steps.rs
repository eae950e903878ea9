//! A step of the engine's thread: room for it, its rows, its tokens.

use super::Fault;
use super::active::ActiveRequest;
use super::masks;
use super::monitor::Step;
use super::score::Score;
use super::sink::Event;
use super::worker::Worker;
use crate::backend::{Backend, Batch, KvCache};
use crate::engine::sequence::{Chunk, FinishReason, Sequence};
use crate::error::{Error, Result, catch};
use crate::grammar::Constraint;
use crate::model::executor::Executor;
use crate::sampler::Sample;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

/// The rows of a score that go into a step: each has logits of its own, half a megabyte with a
/// vocabulary of 150,000.
const SCORED_ROWS: usize = 64;

/// Every so many steps is counted what they hold, and whenever a sequence begins or ends: of many
/// long texts that takes milliseconds.
const COUNTED: usize = 8;

/// A step that has been submitted and not read. Every chunk in it has a sample, so that a fault
/// in any of them shows; only some are tokens.
pub struct InFlight<B: Backend> {
    samples: B::Samples,
    /// Whose the samples are, and whether they are tokens.
    chunks: Vec<(u64, bool)>,
    /// Those whose grammar failed.
    failed: Vec<(u64, Error)>,
    rows: usize,
    begun: Instant,
}

impl<E: Executor> Worker<E> {
    pub(super) fn submit(
        &mut self,
        previous: Option<&InFlight<E::Backend>>,
    ) -> Option<InFlight<E::Backend>> {
        for id in self.scheduler.admit() {
            if let Err(error) = catch(|| self.start(id)) {
                self.finish(id, Err(error));
            }
        }
        self.make_room();
        self.inbox.batch_size.store(self.scheduler.running().len(), Relaxed);
        let chunks = self.scheduler.step();
        if chunks.is_empty() {
            return None;
        }
        match catch(|| self.submit_step(&chunks, previous)) {
            Ok(in_flight) => Some(in_flight),
            Err(error) => {
                self.fail(chunks.iter().map(|chunk| chunk.id), &error);
                None
            }
        }
    }

    /// A sequence joins the batch, with what others have left of its beginning. One that goes on has
    /// its cache already, if it did not give it up.
    fn start(&mut self, id: u64) -> Result<()> {
        let Some(sequence) = self.scheduler.get(id) else { return Ok(()) };
        if sequence.has_begun() {
            return Ok(());
        }
        let Some(active) = self.active.get_mut(&id) else { return Ok(()) };
        let tokens = sequence.tokens();
        let mut cached = 0;
        let decoder = self.executor.decoder();
        // The last token's logits are needed.
        let usable = |cache: &KvCache<E::Backend>, common: usize| {
            decoder.resumable(cache, common.min(tokens.len() - 1))
        };
        if let Some((cache, common)) = self.prefixes.find(active.adapter_key(), &tokens, usable) {
            cached = common;
            active.cache = decoder.fork(cache, cached)?;
        }
        sequence.begin_at(cached);
        active.start(cached);
        self.uncounted = COUNTED;
        self.reserve(id, cached..tokens.len())
    }

    /// Room for the next token of all that run. Whom there is no memory for ends, and not the step.
    fn make_room(&mut self) {
        let next = |sequence: &Sequence| Some((sequence.id, sequence.next_position()?));
        let wanted: Vec<(u64, usize)> = self.scheduler.running().iter().filter_map(next).collect();
        for (id, position) in wanted {
            if let Err(error) = catch(|| self.reserve(id, position..position + 1)) {
                self.finish(id, Err(error));
            }
        }
    }

    fn reserve(&mut self, id: u64, positions: Range<usize>) -> Result<()> {
        self.with_memory(|worker| {
            let Some(active) = worker.active.get_mut(&id) else { return Ok(()) };
            worker.executor.decoder().reserve(&mut active.cache, positions.clone())
        })
    }

    pub(super) fn with_memory(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        loop {
            match work(self) {
                Err(Error::OutOfMemory(_)) if self.give_memory_back() => {}
                done => return done,
            }
        }
    }

    /// What can be computed again goes first: false where there is nothing of that kind.
    fn give_memory_back(&mut self) -> bool {
        if self.prefixes.bytes() > 0 {
            self.prefixes.clear();
            return true;
        }
        let paused = self.scheduler.longest_paused();
        paused.is_some_and(|id| self.give_up_cache(id).is_some())
    }

    /// -> what was in it
    fn give_up_cache(&mut self, id: u64) -> Option<(usize, Vec<u32>, KvCache<E::Backend>)> {
        let (sequence, active) = (self.scheduler.get(id)?, self.active.get_mut(&id)?);
        let computed = sequence.computed();
        sequence.give_up_cache();
        let cache = std::mem::replace(&mut active.cache, self.executor.cache());
        Some((active.adapter_key(), computed, cache))
    }

    /// Its reader lags behind: others run meanwhile.
    fn pause(&mut self, id: u64) {
        self.scheduler.pause(id);
        while let Some(id) = self.scheduler.next_to_give_up() {
            let Some((adapter, computed, cache)) = self.give_up_cache(id) else { return };
            self.keep(adapter, computed, &cache);
        }
    }

    fn submit_step(
        &mut self,
        chunks: &[Chunk],
        previous: Option<&InFlight<E::Backend>>,
    ) -> Result<InFlight<E::Backend>> {
        let begun = Instant::now();
        let mut batch = Batch::default();
        for (chunk, active) in chunks.iter().zip(requests_of(&mut self.active, chunks)) {
            let adapter = active.adapter.as_ref().map(|(_, bound)| bound.as_ref());
            let last = [chunk.tokens.len() - 1];
            batch.push(&chunk.tokens, chunk.start, &last, &mut active.cache, adapter);
        }
        let rows = batch.tokens.len();
        let previous = previous.map(|step| &step.samples);
        let _guard = self.executor.guard();
        let mut draws: Vec<_> =
            chunks.iter().map(|chunk| chunk.draw.clone().unwrap_or_default()).collect();
        let constrained = masks::rows(chunks);
        let forward = || self.executor.forward(&mut batch, previous);
        let (logits, masks) = masks::beside(forward, &constrained);
        let logits = logits?;
        let failed = masks::put(masks, &mut draws);
        self.fail_if_asked()?;
        let samples = self.executor.sample(&logits, &draws)?;
        self.executor.decoder().backend.submit(&samples)?;
        let chunks = chunks.iter().map(|chunk| (chunk.id, chunk.draw.is_some())).collect();
        Ok(InFlight { samples, chunks, failed, rows, begun })
    }

    pub(super) fn fail_if_asked(&mut self) -> Result<()> {
        match self.fault.take() {
            Some(Fault::Panic) => panic!("a test asked for it"),
            Some(Fault::Error) => Err(Error::Backend("a test asked for it".into())),
            None => Ok(()),
        }
    }

    pub(super) fn read(&mut self, step: InFlight<E::Backend>) {
        let ids = step.chunks.iter().map(|(id, _)| *id);
        match catch(|| self.executor.decoder().backend.read(&step.samples)) {
            Err(error) => self.fail(ids, &error),
            Ok(samples) => {
                for (&(id, is_token), sample) in step.chunks.iter().zip(samples) {
                    let failed = step.failed.iter().find(|(failed, _)| *failed == id);
                    let handed = match sample {
                        _ if failed.is_some() => failed.map_or(Ok(()), |(_, e)| Err(e.clone())),
                        Some(sample) if is_token => catch(|| self.deliver(id, sample)),
                        Some(_) => Ok(()),
                        None => Err(Error::Backend("the logits are not finite numbers".into())),
                    };
                    handed.unwrap_or_else(|error| self.finish(id, Err(error)));
                }
            }
        }
        self.count_now_and_then();
        self.report(&step);
    }

    pub(super) fn count_now_and_then(&mut self) {
        self.uncounted += 1;
        if self.uncounted >= COUNTED {
            self.count();
        }
    }

    /// What was computed beside a fault may be of it.
    fn fail(&mut self, ids: impl Iterator<Item = u64>, error: &Error) {
        self.prefixes.clear();
        ids.for_each(|id| self.finish(id, Err(error.clone())));
    }

    fn report(&mut self, step: &InFlight<E::Backend>) {
        let Some(monitor) = &mut self.monitor else { return };
        let step = Step {
            sequences: step.chunks.len(),
            rows: step.rows,
            waiting: self.scheduler.waiting(),
            kv_bytes: self.kv_bytes.amount(),
            prefix_bytes: self.prefixes.bytes(),
            duration: step.begun.elapsed(),
        };
        if !catch(|| Ok(monitor(step))).unwrap_or(false) {
            self.monitor = None;
        }
    }

    /// A sampled token: to its sequence, if that is still there, and to whoever asked for it.
    fn deliver(&mut self, id: u64, sample: Sample) -> Result<()> {
        let Some(sequence) = self.scheduler.get(id) else { return Ok(()) };
        let Some(active) = self.active.get_mut(&id) else { return Ok(()) };
        active.note_token();
        if sequence.task.eos_token_ids.contains(&sample.id) {
            self.finish(id, Ok(FinishReason::Stop));
            return Ok(());
        }
        let token = sample.id;
        let exhausted = sequence.accept(token);
        let (heard, stopped) = active.emit(sample)?;
        let end = ended(heard, stopped, exhausted);
        let end = match (end, sequence.task.constraint.clone()) {
            (None, Some(constraint)) => follow(sequence, active, &constraint, token)?,
            (end, _) => end,
        };
        match end {
            Some(reason) => self.finish(id, Ok(reason)),
            None if active.sink.is_full() => self.pause(id),
            None => {}
        }
        Ok(())
    }

    /// One chunk of the score that waits longest.
    pub(super) fn advance_scores(&mut self) {
        let rows = self.prefill_chunk.min(SCORED_ROWS);
        let room = catch(|| self.make_room_for_score(rows));
        let Some(score) = self.scores.front_mut() else { return };
        let end = match room.and_then(|()| catch(|| score.advance(&self.executor, rows))) {
            Ok(false) => return self.count(),
            Ok(true) => Event::Scores(std::mem::take(&mut score.log_probs)),
            Err(error) => Event::Failed(error),
        };
        let score = self.scores.pop_front();
        score.into_iter().for_each(|score| self.finish_score(score, end.clone()));
    }

    fn make_room_for_score(&mut self, rows: usize) -> Result<()> {
        self.with_memory(|worker| match worker.scores.front_mut() {
            Some(score) => {
                let positions = score.next_positions(rows);
                worker.executor.decoder().reserve(&mut score.cache, positions)
            }
            None => Ok(()),
        })
    }

    /// Whoever hears of the end finds everything given back.
    pub(super) fn finish_score(&mut self, score: Score<E::Backend>, end: Event) {
        let Score { id, sink, cache, adapter, share, permits, .. } = score;
        self.deadlines.remove(id);
        drop((cache, adapter, share, permits));
        self.count();
        sink.end(end);
    }

    pub(super) fn count(&mut self) {
        self.uncounted = 0;
        self.inbox.batch_size.store(self.scheduler.running().len(), Relaxed);
        let sequences = self.active.values().map(|active| &active.cache);
        let caches = sequences.chain(self.scores.iter().map(|score| &score.cache));
        let caches = caches.chain(self.texts.caches());
        let pages = caches.flat_map(|cache| self.executor.decoder().pages(cache));
        let mut seen = HashSet::new();
        let own = pages.filter(|page| !self.prefixes.holds(page) && seen.insert(page.id));
        self.kv_bytes.set(own.map(|page| page.bytes).sum());
        self.prefix_bytes.set(self.prefixes.bytes());
    }
}

/// Whether a text ends with the token that was emitted.
fn ended(heard: bool, stopped: bool, exhausted: bool) -> Option<FinishReason> {
    match (heard, stopped, exhausted) {
        (false, ..) => Some(FinishReason::Cancelled),
        (_, true, _) => Some(FinishReason::Stop),
        (_, _, true) => Some(FinishReason::Length),
        _ => None,
    }
}

/// Takes a token into the grammar, and what must follow into the text; -> whether it ends so.
fn follow<B: Backend>(
    sequence: &mut Sequence,
    active: &mut ActiveRequest<B>,
    constraint: &Constraint,
    token: u32,
) -> Result<Option<FinishReason>> {
    constraint.take(token)?;
    // What is forced has no logits of its own.
    let forced = match sequence.task.sampling.logprobs {
        None => constraint.forced(),
        Some(_) => vec![],
    };
    for id in forced {
        constraint.take(id)?;
        let exhausted = sequence.force(id);
        let (heard, stopped) = active.emit(Sample { id, logprobs: None })?;
        if let Some(reason) = ended(heard, stopped, exhausted) {
            return Ok(Some(reason));
        }
    }
    Ok(constraint.is_done().then_some(FinishReason::Stop))
}

/// What belongs to the sequences of these chunks, in their order.
fn requests_of<'a, B: Backend>(
    active: &'a mut HashMap<u64, ActiveRequest<B>>,
    chunks: &[Chunk],
) -> Vec<&'a mut ActiveRequest<B>> {
    let place: HashMap<u64, usize> =
        chunks.iter().enumerate().map(|(place, chunk)| (chunk.id, place)).collect();
    let mut found: Vec<_> =
        active.iter_mut().filter_map(|(id, active)| Some((*place.get(id)?, active))).collect();
    found.sort_by_key(|(place, _)| *place);
    found.into_iter().map(|(_, active)| active).collect()
}
