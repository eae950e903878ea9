//! The engine's thread: takes commands, plans a step, submits it, and hands out the tokens of the
//! step before while it computes.

use super::exit::{self, Busy};
use super::request::{Request, check_ids};
use super::score::Score;
use super::sink::{Event, Sink};
use super::{Command, Inbox, Place};
use crate::adapter::Adapter;
use crate::backend::{Backend, Segment, Token};
use crate::config::Config;
use crate::decoder::{BoundAdapter, Decoder, KvCache, Part};
use crate::error::{Error, Result, catch};
use crate::gauge;
use crate::scheduler::{Limits, Scheduler};
use crate::sequence::{Chunk, FinishReason, Sequence};
use crate::tokenizer::TextStream;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::TryRecvError;

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
    /// The adapters bound to this model, by the address of what they are bound from.
    adapters: HashMap<usize, Rc<BoundAdapter<B>>>,
    kv_bytes: gauge::Share,
}

/// What belongs to a sequence beside its tokens.
struct Live<B: Backend> {
    cache: KvCache<B>,
    adapter: Option<InUse<B>>,
    text: Option<TextStream>,
    prompt_tokens: usize,
    sink: Sink,
    place: Option<Place>,
    share: gauge::Share,
}

/// An adapter that a sequence keeps alive, and its pairs.
pub type InUse<B> = (Arc<Adapter>, Rc<BoundAdapter<B>>);

/// A step that has been submitted and not read. Every chunk in it has a sample, so that a fault
/// in any of them shows; only some are tokens.
struct InFlight<B: Backend> {
    samples: B::Samples,
    /// Whose the samples are, and whether they are tokens.
    chunks: Vec<(u64, bool)>,
}

impl<B: Backend> Worker<B> {
    pub fn new(decoder: Decoder<B>, config: Arc<Config>, limits: Limits, inbox: Inbox) -> Self {
        Self {
            decoder,
            config,
            inbox,
            prefill_chunk: limits.prefill_chunk,
            scheduler: Scheduler::new(limits),
            live: HashMap::new(),
            scores: VecDeque::new(),
            adapters: HashMap::new(),
            kv_bytes: gauge::Share::of(&gauge::KV_BYTES),
        }
    }

    /// Serves until every handle is gone.
    pub fn run(&mut self) {
        let mut in_flight: Option<InFlight<B>> = None;
        let mut busy = None;
        loop {
            if in_flight.is_none() && self.is_idle() {
                busy = None;
                match self.inbox.receiver.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => return,
                }
            }
            busy.get_or_insert_with(Busy::enter);
            if exit::stopping() {
                _ = in_flight.take().map(|step| self.decoder.backend.read(&step.samples));
                if let Some(busy) = busy.take() {
                    busy.stop();
                }
            }
            if !self.take_commands() {
                return;
            }
            if !B::DEFERS
                && let Some(step) = in_flight.take()
            {
                self.read(step);
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
            self.count();
        }
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
            Command::Generate { id, request, sink, place } => {
                self.admit(id, *request, sink, place);
            }
            Command::Score { id, ids, adapter, sink, place } => {
                self.admit_score(id, ids, adapter, sink, place);
            }
            Command::Cancel { id } => self.cancel(id),
            Command::Forget { adapter } => _ = self.adapters.remove(&adapter),
        }
    }

    fn admit(&mut self, id: u64, request: Request, sink: Sink, place: Place) {
        let prepared = catch(|| {
            let (prompt, max_new_tokens) = request.encode(&self.config)?;
            Ok((prompt, max_new_tokens, self.bind(request.adapter.as_ref())?))
        });
        let (prompt, max_new_tokens, adapter) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return sink.end(Event::Failed(error)),
        };
        let live = Live {
            cache: self.decoder.kv_cache(),
            adapter,
            text: request.tokenizer.map(|tokenizer| TextStream::new(tokenizer, request.stop)),
            prompt_tokens: prompt.len(),
            sink,
            place: Some(place),
            share: gauge::Share::one(&gauge::SEQUENCES),
        };
        self.live.insert(id, live);
        match max_new_tokens {
            0 => self.finish(id, Ok(FinishReason::Length)),
            _ => {
                self.scheduler.add(Sequence::new(id, prompt, max_new_tokens, request.sampling));
            }
        }
    }

    fn admit_score(
        &mut self,
        id: u64,
        ids: Vec<u32>,
        adapter: Option<Arc<Adapter>>,
        sink: Sink,
        place: Place,
    ) {
        let adapter = catch(|| {
            check_ids(&ids, &self.config, self.config.max_position_embeddings)?;
            self.bind(adapter.as_ref())
        });
        let adapter = match adapter {
            Ok(adapter) => adapter,
            Err(error) => return sink.end(Event::Failed(error)),
        };
        let (cache, share) = (self.decoder.kv_cache(), gauge::Share::one(&gauge::SEQUENCES));
        let log_probs = vec![];
        self.scores.push_back(Score { id, ids, adapter, cache, log_probs, sink, share, place });
    }

    fn bind(&mut self, adapter: Option<&Arc<Adapter>>) -> Result<Option<InUse<B>>> {
        let Some(adapter) = adapter else { return Ok(None) };
        let key = Arc::as_ptr(adapter) as usize;
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

    fn cancel(&mut self, id: u64) {
        self.finish(id, Ok(FinishReason::Cancelled));
        self.scores.retain(|score| score.id != id);
    }

    /// Ends a sequence, and gives its memory back.
    fn finish(&mut self, id: u64, end: Result<FinishReason>) {
        self.scheduler.remove(id);
        let Some(mut live) = self.live.remove(&id) else { return };
        let end = end.and_then(|reason| {
            let rest = catch(|| live.text.as_mut().map(TextStream::finish).transpose())?;
            if let Some(text) = rest.filter(|text| !text.is_empty()) {
                _ = catch(|| Ok(live.sink.chunk(vec![], text)));
            }
            Ok(Event::Done { reason, prompt_tokens: live.prompt_tokens })
        });
        let Live { sink, cache, adapter, place, share, .. } = live;
        // Whoever hears of the end finds everything given back.
        drop((cache, adapter, place, share));
        self.count();
        sink.end(end.unwrap_or_else(Event::Failed));
    }

    fn submit(&mut self, previous: Option<&InFlight<B>>) -> Option<InFlight<B>> {
        let chunks = self.scheduler.step();
        if chunks.is_empty() {
            return None;
        }
        for chunk in &chunks {
            self.live.get_mut(&chunk.id).map(|live| live.place.take());
        }
        match catch(|| self.submit_step(&chunks, previous)) {
            Ok(in_flight) => Some(in_flight),
            Err(error) => {
                chunks.iter().for_each(|chunk| self.finish(chunk.id, Err(error.clone())));
                None
            }
        }
    }

    fn submit_step(
        &mut self,
        chunks: &[Chunk],
        previous: Option<&InFlight<B>>,
    ) -> Result<InFlight<B>> {
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
        let draws: Vec<_> =
            chunks.iter().map(|chunk| chunk.draw.clone().unwrap_or_default()).collect();
        let samples = self.decoder.backend.sample(&logits, &draws)?;
        self.decoder.backend.submit(&samples)?;
        let chunks = chunks.iter().map(|chunk| (chunk.id, chunk.draw.is_some())).collect();
        Ok(InFlight { samples, chunks })
    }

    fn read(&mut self, step: InFlight<B>) {
        match catch(|| self.decoder.backend.read(&step.samples)) {
            Err(error) => {
                step.chunks.iter().for_each(|&(id, _)| self.finish(id, Err(error.clone())));
            }
            Ok(samples) => {
                for (&(id, is_token), sample) in step.chunks.iter().zip(samples) {
                    let handed = match sample {
                        Some(token) if is_token => catch(|| self.hand_out(id, token)),
                        Some(_) => Ok(()),
                        None => Err(Error::Backend("the logits are not finite numbers".into())),
                    };
                    handed.unwrap_or_else(|error| self.finish(id, Err(error)));
                }
            }
        }
    }

    /// A sampled token: to its sequence, if that is still there, and to whoever asked for it.
    fn hand_out(&mut self, id: u64, token: u32) -> Result<()> {
        let Some(sequence) = self.scheduler.running(id) else { return Ok(()) };
        let Some(live) = self.live.get_mut(&id) else { return Ok(()) };
        let tokenizers = live.text.as_ref().and_then(TextStream::eos_token_id);
        if self.config.eos_token_ids.contains(&token) || tokenizers == Some(token) {
            self.finish(id, Ok(FinishReason::Stop));
            return Ok(());
        }
        let exhausted = sequence.accept(token);
        let text = live.text.as_mut().map(|text| text.push(token)).transpose()?;
        let (text, stopped) = text.map_or_else(Default::default, |text| (text.text, text.stopped));
        let heard = live.sink.chunk(vec![token], text);
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
            Ok(false) => return,
            Ok(true) => Event::Scores(std::mem::take(&mut score.log_probs)),
            Err(error) => Event::Failed(error),
        };
        if let Some(Score { sink, cache, adapter, share, place, .. }) = self.scores.pop_front() {
            drop((cache, adapter, share, place));
            self.count();
            sink.end(end);
        }
    }

    fn count(&mut self) {
        let sequences = self.live.values().map(|live| &live.cache);
        let caches = sequences.chain(self.scores.iter().map(|score| &score.cache)).flatten();
        self.kv_bytes.set(caches.map(|cache| self.decoder.backend.cache_bytes(cache)).sum());
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
