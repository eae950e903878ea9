//! The engine's thread: takes commands, plans a step, submits it, and hands out the tokens of the
//! step before while it computes.

use super::exit::{self, Busy};
use super::live::{InUse, Live, adapter_key};
use super::monitor::{Monitor, Step};
use super::prefix::Prefixes;
use super::request::check_ids;
use super::score::Score;
use super::sink::{Event, Usage};
use super::{Command, Fault, Inbox, Order};
use crate::adapter::Adapter;
use crate::backend::{Backend, Segment, Token};
use crate::config::Config;
use crate::decoder::{BoundAdapter, Decoder, KvCache, Part};
use crate::error::{Error, Result, catch};
use crate::gauge;
use crate::sampler::Sample;
use crate::scheduler::{Limits, Scheduler};
use crate::sequence::{Chunk, FinishReason, Sequence, Task};
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::TryRecvError;
use std::time::Instant;

/// The rows of a score that go into a step: each has logits of its own, half a megabyte with a
/// vocabulary of 150,000.
const SCORED_ROWS: usize = 64;

pub struct Worker<B: Backend> {
    decoder: Decoder<B>,
    config: Arc<Config>,
    inbox: Inbox,
    prefill_chunk: usize,
    scheduler: Scheduler,
    live: HashMap<u64, Live<B>>,
    scores: VecDeque<Score<B>>,
    /// The adapters bound to this model, by their keys.
    adapters: HashMap<usize, Rc<BoundAdapter<B>>>,
    prefixes: Prefixes<KvCache<B>>,
    kv_bytes: gauge::Share,
    prefix_bytes: gauge::Share,
    monitor: Option<Monitor>,
    fault: Option<Fault>,
}

/// A step that has been submitted and not read. Every chunk in it has a sample, so that a fault
/// in any of them shows; only some are tokens.
struct InFlight<B: Backend> {
    samples: B::Samples,
    /// Whose the samples are, and whether they are tokens.
    chunks: Vec<(u64, bool)>,
    rows: usize,
    begun: Instant,
}

impl<B: Backend> Worker<B> {
    pub fn new(decoder: Decoder<B>, config: Arc<Config>, limits: &Limits, inbox: Inbox) -> Self {
        Self {
            decoder,
            config,
            inbox,
            prefill_chunk: limits.prefill_chunk,
            scheduler: Scheduler::new(limits.clone()),
            live: HashMap::new(),
            scores: VecDeque::new(),
            adapters: HashMap::new(),
            prefixes: Prefixes::new(limits.prefix_cache),
            kv_bytes: gauge::Share::of(&gauge::KV_BYTES),
            prefix_bytes: gauge::Share::of(&gauge::PREFIX_BYTES),
            monitor: None,
            fault: None,
        }
    }

    /// Serves until every handle is gone.
    pub fn run(&mut self) {
        let mut in_flight: Option<InFlight<B>> = None;
        let mut busy = Busy::enter();
        loop {
            if in_flight.is_none() && self.is_idle() {
                self.decoder.backend.finish();
                drop(busy);
                let command = self.inbox.receiver.recv();
                busy = Busy::enter();
                match command {
                    Ok(command) => self.obey(command),
                    Err(_) => return,
                }
            }
            if exit::stopping() {
                self.await_end(in_flight);
                busy.stop();
            }
            if !self.take_commands() {
                return self.await_end(in_flight);
            }
            let next = self.submit(in_flight.as_ref());
            if let Some(step) = in_flight {
                self.read(step);
            }
            in_flight = next;
            if !B::DEFERS
                && let Some(step) = in_flight.take()
            {
                self.read(step);
            }
            self.advance_scores();
        }
    }

    /// A backend may compute on threads of its own, which the process must not leave behind.
    fn await_end(&self, in_flight: Option<InFlight<B>>) {
        self.decoder.backend.finish();
        drop(in_flight);
    }

    fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.scores.is_empty()
    }

    /// Takes what has arrived; false where no handle is left.
    fn take_commands(&mut self) -> bool {
        loop {
            match self.inbox.receiver.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Generate(order, task) => self.admit(*order, task),
            Command::Score { id, ids, adapter, sink, places } => {
                let bound = catch(|| {
                    check_ids(&ids, &self.config, self.config.max_position_embeddings)?;
                    self.bind(adapter.as_ref())
                });
                let adapter = match bound {
                    Ok(adapter) => adapter,
                    Err(error) => return sink.end(Event::Failed(error)),
                };
                let (cache, log_probs) = (self.decoder.kv_cache(), vec![]);
                let share = gauge::Share::one(&gauge::SEQUENCES);
                let score = Score { id, ids, adapter, cache, log_probs, sink, share, places };
                self.scores.push_back(score);
            }
            Command::Fit { adapter, sink } => {
                let fits = catch(|| self.bind(Some(&adapter)));
                sink.end(fits.map_or_else(Event::Failed, |_| Event::Fits));
            }
            Command::Cancel { id } => {
                self.finish(id, Ok(FinishReason::Cancelled));
                self.scores.retain(|score| score.id != id);
                self.count();
            }
            Command::Forget { adapter } => {
                self.adapters.remove(&adapter);
                self.prefixes.forget(adapter);
                self.count();
            }
            Command::Watch(monitor) => self.monitor = Some(monitor),
            Command::Fail(fault) => self.fault = Some(fault),
        }
    }

    fn admit(&mut self, order: Order, task: Task) {
        let adapter = match catch(|| self.bind(order.adapter.as_ref())) {
            Ok(adapter) => adapter,
            Err(error) => return order.fail(error),
        };
        let Order { id, text, sink, places, asked, cancelled, .. } = order;
        let usage = Usage { prompt_tokens: task.prompt.len(), ..Usage::default() };
        let share = gauge::Share::one(&gauge::SEQUENCES);
        let cache = self.decoder.kv_cache();
        let live = Live { cache, adapter, text, sink, places, usage, asked, share };
        self.live.insert(id, live);
        if cancelled.load(Relaxed) {
            // The command itself may have come first.
            self.finish(id, Ok(FinishReason::Cancelled));
        } else if task.max_new_tokens == 0 {
            self.finish(id, Ok(FinishReason::Length));
        } else {
            self.scheduler.add(Sequence::new(id, task));
        }
    }

    fn bind(&mut self, adapter: Option<&Arc<Adapter>>) -> Result<Option<InUse<B>>> {
        let Some(adapter) = adapter else { return Ok(None) };
        let key = adapter_key(Some(adapter));
        if let Some(bound) = self.adapters.get(&key) {
            return Ok(Some((adapter.clone(), bound.clone())));
        }
        let bound = Rc::new(adapter.bind(&self.config, &self.decoder)?);
        let commands = self.inbox.commands.clone();
        adapter.on_drop(move || {
            if let Some(commands) = commands.upgrade() {
                _ = commands.send(Command::Forget { adapter: key });
            }
        });
        self.adapters.insert(key, bound.clone());
        Ok(Some((adapter.clone(), bound)))
    }

    /// A sequence joins the batch, with what others have left of its beginning.
    fn start(&mut self, id: u64) -> Result<()> {
        let Some(sequence) = self.scheduler.running(id) else { return Ok(()) };
        let Some(live) = self.live.get_mut(&id) else { return Ok(()) };
        let prompt = &sequence.task.prompt;
        let mut cached = 0;
        if let Some((cache, common)) = self.prefixes.find(live.adapter_key(), prompt) {
            // The last token's logits are needed.
            cached = common.min(prompt.len() - 1);
            live.cache = self.decoder.fork(cache, cached)?;
        }
        self.decoder.reserve(&mut live.cache, cached..prompt.len())?;
        sequence.begin_at(cached);
        live.start(cached);
        Ok(())
    }

    /// Ends a sequence, and gives its memory back.
    fn finish(&mut self, id: u64, end: Result<FinishReason>) {
        let sequence = self.scheduler.remove(id);
        let Some(mut live) = self.live.remove(&id) else { return };
        let cache = std::mem::replace(&mut live.cache, self.decoder.kv_cache());
        if let Some(sequence) = sequence.filter(|_| end.is_ok()) {
            let kept = catch(|| self.keep(live.adapter_key(), sequence.into_computed(), &cache));
            // Without what it might have kept, it has ended as well.
            kept.unwrap_or_else(|_| self.prefixes.clear());
        }
        drop(cache);
        live.places.clear();
        live.adapter = None;
        live.share.set(0);
        self.count();
        // Whoever hears of the end finds everything given back.
        let (sink, event) = match end {
            Ok(reason) => live.end(reason),
            Err(error) => (live.sink, Err(error)),
        };
        sink.end(event.unwrap_or_else(Event::Failed));
    }

    fn keep(&mut self, adapter: usize, ids: Vec<u32>, cache: &KvCache<B>) -> Result<()> {
        if !ids.is_empty() {
            let cache = self.decoder.fork(cache, ids.len())?;
            let pages = self.decoder.pages(&cache);
            self.prefixes.insert(adapter, ids, cache, pages);
        }
        Ok(())
    }

    /// What was computed beside a fault may be of it.
    fn fail(&mut self, ids: impl Iterator<Item = u64>, error: &Error) {
        self.prefixes.clear();
        ids.for_each(|id| self.finish(id, Err(error.clone())));
    }

    fn submit(&mut self, previous: Option<&InFlight<B>>) -> Option<InFlight<B>> {
        for id in self.scheduler.admit() {
            if let Err(error) = catch(|| self.start(id)) {
                self.finish(id, Err(error));
            }
        }
        self.inbox.batch_size.store(self.scheduler.batch_size(), Relaxed);
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

    fn submit_step(
        &mut self,
        chunks: &[Chunk],
        previous: Option<&InFlight<B>>,
    ) -> Result<InFlight<B>> {
        let begun = Instant::now();
        let tokens: Vec<Token> = chunks.iter().flat_map(|chunk| chunk.tokens.clone()).collect();
        let (mut parts, mut outputs, mut end) = (vec![], vec![], 0);
        for (chunk, live) in chunks.iter().zip(lives(&mut self.live, chunks)) {
            let rows = end..end + chunk.tokens.len();
            end = rows.end;
            outputs.push(end - 1);
            let adapter = live.adapter.as_ref().map(|(_, bound)| bound.as_ref());
            let segment = Segment { rows, start: chunk.start };
            parts.push(Part { segment, cache: &mut live.cache, adapter });
        }
        let previous = previous.map(|step| &step.samples);
        let _turn = self.decoder.backend.turn();
        let logits = self.decoder.forward(&tokens, previous, &mut parts, &outputs)?;
        match self.fault.take() {
            Some(Fault::Panic) => panic!("a test asked for it"),
            Some(Fault::Error) => return Err(Error::Backend("a test asked for it".into())),
            None => {}
        }
        let draws: Vec<_> =
            chunks.iter().map(|chunk| chunk.draw.clone().unwrap_or_default()).collect();
        let samples = self.decoder.backend.sample(&logits, &draws)?;
        self.decoder.backend.submit(&samples)?;
        let chunks = chunks.iter().map(|chunk| (chunk.id, chunk.draw.is_some())).collect();
        Ok(InFlight { samples, chunks, rows: tokens.len(), begun })
    }

    fn read(&mut self, step: InFlight<B>) {
        let ids = step.chunks.iter().map(|(id, _)| *id);
        match catch(|| self.decoder.backend.read(&step.samples)) {
            Err(error) => self.fail(ids, &error),
            Ok(samples) => {
                for (&(id, is_token), sample) in step.chunks.iter().zip(samples) {
                    let handed = match sample {
                        Some(sample) if is_token => catch(|| self.hand_out(id, sample)),
                        Some(_) => Ok(()),
                        None => Err(Error::Backend("the logits are not finite numbers".into())),
                    };
                    handed.unwrap_or_else(|error| self.finish(id, Err(error)));
                }
            }
        }
        self.count();
        self.report(&step);
    }

    fn report(&mut self, step: &InFlight<B>) {
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
    fn hand_out(&mut self, id: u64, sample: Sample) -> Result<()> {
        let Some(sequence) = self.scheduler.running(id) else { return Ok(()) };
        let Some(live) = self.live.get_mut(&id) else { return Ok(()) };
        live.note_token();
        if sequence.task.eos_token_ids.contains(&sample.id) {
            self.finish(id, Ok(FinishReason::Stop));
            return Ok(());
        }
        let exhausted = sequence.accept(sample.id);
        let (heard, stopped) = live.tell(sample)?;
        match (heard, stopped, exhausted) {
            (false, ..) => self.finish(id, Ok(FinishReason::Cancelled)),
            (_, true, _) => self.finish(id, Ok(FinishReason::Stop)),
            (_, _, true) => self.finish(id, Ok(FinishReason::Length)),
            _ => {}
        }
        Ok(())
    }

    /// One chunk of the score that waits longest.
    fn advance_scores(&mut self) {
        let Some(score) = self.scores.front_mut() else { return };
        let rows = self.prefill_chunk.min(SCORED_ROWS);
        let end = match catch(|| score.advance(&self.decoder, rows)) {
            Ok(false) => return self.count(),
            Ok(true) => Event::Scores(std::mem::take(&mut score.log_probs)),
            Err(error) => Event::Failed(error),
        };
        if let Some(Score { sink, cache, adapter, share, places, .. }) = self.scores.pop_front() {
            drop((cache, adapter, share, places));
            self.count();
            sink.end(end);
        }
    }

    fn count(&mut self) {
        self.inbox.batch_size.store(self.scheduler.batch_size(), Relaxed);
        let sequences = self.live.values().map(|live| &live.cache);
        let caches = sequences.chain(self.scores.iter().map(|score| &score.cache));
        let pages = caches.flat_map(|cache| self.decoder.pages(cache));
        let mut seen = HashSet::new();
        let own = pages.filter(|page| !self.prefixes.holds(page) && seen.insert(page.id));
        self.kv_bytes.set(own.map(|page| page.bytes).sum());
        self.prefix_bytes.set(self.prefixes.bytes());
    }
}

/// What belongs to the sequences of these chunks, in their order.
fn lives<'a, B: Backend>(
    live: &'a mut HashMap<u64, Live<B>>,
    chunks: &[Chunk],
) -> Vec<&'a mut Live<B>> {
    let place: HashMap<u64, usize> =
        chunks.iter().enumerate().map(|(place, chunk)| (chunk.id, place)).collect();
    let mut lives: Vec<_> =
        live.iter_mut().filter_map(|(id, live)| Some((*place.get(id)?, live))).collect();
    lives.sort_by_key(|(place, _)| *place);
    lives.into_iter().map(|(_, live)| live).collect()
}
