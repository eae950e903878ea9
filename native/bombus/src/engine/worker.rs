//! The engine's thread: takes commands, plans a step, submits it, and hands out the tokens of the
//! step before while it computes.

use super::{Command, Event, Inbox, Place, Prompt, Request, ScoreSink, Sink};
use crate::adapter::{Adapter, BoundAdapter};
use crate::backend::{Backend, Segment, Token};
use crate::config::Config;
use crate::decoder::{Decoder, KvCache, Part};
use crate::error::{Error, Result, catch};
use crate::gauge;
use crate::scheduler::{Limits, Scheduler};
use crate::sequence::{Chunk, FinishReason, Sequence};
use crate::tokenizer::TextStream;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::TryRecvError;

pub struct Worker<B: Backend> {
    decoder: Decoder<B>,
    config: Arc<Config>,
    inbox: Inbox,
    prefill_chunk: usize,
    scheduler: Scheduler,
    live: HashMap<u64, Live<B>>,
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
type InUse<B> = (Arc<Adapter>, Rc<BoundAdapter<B>>);

/// A step that has been submitted and not read: the samples, and whose they are.
struct InFlight<B: Backend> {
    samples: B::Samples,
    ids: Vec<u64>,
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
            adapters: HashMap::new(),
            kv_bytes: gauge::Share::of(&gauge::KV_BYTES),
        }
    }

    /// Serves until every handle is gone.
    pub fn run(mut self) {
        let mut in_flight = None;
        while self.take_commands(in_flight.is_none()) {
            let next = self.submit(in_flight.as_ref());
            if let Some(step) = in_flight {
                self.read(step);
            }
            in_flight = next;
            self.count();
        }
    }

    /// Takes what has arrived, and waits where there is nothing else to do; false at the end.
    fn take_commands(&mut self, idle: bool) -> bool {
        if idle && self.scheduler.is_idle() {
            match self.inbox.receiver.recv() {
                Ok(command) => self.obey(command),
                Err(_) => return false,
            }
        }
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
            Command::Generate { id, request, sink, place } => self.admit(id, *request, sink, place),
            Command::Cancel { id } => self.finish(id, Ok(FinishReason::Cancelled)),
            Command::Score { ids, adapter, sink } => self.score(ids, adapter, sink),
            Command::Forget { adapter } => _ = self.adapters.remove(&adapter),
        }
    }

    fn admit(&mut self, id: u64, request: Request, mut sink: Sink, place: Place) {
        match catch(|| self.prepare(&request)) {
            Err(error) => tell(&mut sink, Event::Failed(error)),
            Ok((prompt, adapter)) => {
                let (prompt_tokens, context) = (prompt.len(), self.config.max_position_embeddings);
                let max_new_tokens = request.max_new_tokens.min(context - prompt_tokens);
                let text =
                    request.tokenizer.map(|tokenizer| TextStream::new(tokenizer, request.stop));
                let cache = self.decoder.kv_cache();
                let share = gauge::Share::one(&gauge::SEQUENCES);
                let place = Some(place);
                let live = Live { cache, adapter, text, prompt_tokens, sink, place, share };
                self.live.insert(id, live);
                match max_new_tokens {
                    0 => self.finish(id, Ok(FinishReason::Length)),
                    _ => self.scheduler.add(Sequence::new(
                        id,
                        prompt,
                        max_new_tokens,
                        request.sampling,
                    )),
                }
            }
        }
    }

    /// All that can be wrong with a request, found before it joins the others.
    fn prepare(&mut self, request: &Request) -> Result<(Vec<u32>, Option<InUse<B>>)> {
        let prompt = encode(request)?;
        self.check_ids(&prompt)?;
        let context = self.config.max_position_embeddings;
        if prompt.len() > context {
            return Err(Error::PromptTooLong(format!(
                "the prompt has {} tokens, the model's context {context}",
                prompt.len()
            )));
        }
        let bound = request.adapter.as_ref().map(|adapter| self.bind(adapter)).transpose()?;
        Ok((prompt, request.adapter.clone().zip(bound)))
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab = self.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            _ if ids.is_empty() => Err(Error::Request("the prompt has no tokens".into())),
            Some(id) => Err(Error::Request(format!(
                "the token id {id} is outside the vocabulary of {vocab} tokens"
            ))),
            None => Ok(()),
        }
    }

    fn bind(&mut self, adapter: &Arc<Adapter>) -> Result<Rc<BoundAdapter<B>>> {
        let key = Arc::as_ptr(adapter) as usize;
        if let Some(bound) = self.adapters.get(&key) {
            return Ok(bound.clone());
        }
        let bound = Rc::new(adapter.bind(&self.config, &self.decoder.backend)?);
        let commands = self.inbox.commands.clone();
        adapter.on_drop(move || {
            let commands = commands.upgrade();
            _ = commands.map(|commands| commands.send(Command::Forget { adapter: key }));
        });
        self.adapters.insert(key, bound.clone());
        Ok(bound)
    }

    /// Ends a sequence, and gives its memory back.
    fn finish(&mut self, id: u64, end: Result<FinishReason>) {
        self.scheduler.remove(id);
        let Some(mut live) = self.live.remove(&id) else { return };
        let end = end.and_then(|reason| {
            let rest = catch(|| live.text.as_mut().map(TextStream::finish).transpose())?;
            if let Some(text) = rest.filter(|text| !text.is_empty()) {
                tell(&mut live.sink, Event::Chunk { ids: vec![], text });
            }
            Ok(Event::Done { reason, prompt_tokens: live.prompt_tokens })
        });
        let Live { mut sink, cache, adapter, place, share, .. } = live;
        // Whoever hears of the end finds everything given back.
        drop((cache, adapter, place, share));
        self.count();
        tell(&mut sink, end.unwrap_or_else(Event::Failed));
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
            Ok(in_flight) => in_flight,
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
    ) -> Result<Option<InFlight<B>>> {
        let tokens: Vec<Token> = chunks.iter().flat_map(|chunk| chunk.tokens.clone()).collect();
        let mut lives = lives(&mut self.live, chunks);
        let (mut parts, mut outputs, mut end) = (vec![], vec![], 0);
        for (chunk, live) in chunks.iter().zip(&mut lives) {
            let rows = end..end + chunk.tokens.len();
            end = rows.end;
            outputs.extend(chunk.draw.is_some().then_some(end - 1));
            let adapter = live.adapter.as_ref().map(|(_, bound)| bound.as_ref());
            let segment = Segment { rows, start: chunk.start };
            parts.push(Part { segment, cache: &mut live.cache, adapter });
        }
        let previous = previous.map(|step| &step.samples);
        let logits = self.decoder.forward(&tokens, previous, &mut parts, &outputs)?;
        let draws: Vec<_> = chunks.iter().filter_map(|chunk| chunk.draw.clone()).collect();
        let backend = &self.decoder.backend;
        let samples = logits.map(|logits| backend.sample(&logits, &draws)).transpose()?;
        // What is sampled needs its own cache; a prompt's chunk that samples nothing must be named.
        let caches: Vec<_> = chunks
            .iter()
            .zip(&parts)
            .filter(|(chunk, _)| chunk.draw.is_none())
            .flat_map(|(_, part)| part.cache.iter())
            .collect();
        backend.submit(samples.as_ref(), &caches)?;
        let ids =
            chunks.iter().filter(|chunk| chunk.draw.is_some()).map(|chunk| chunk.id).collect();
        Ok(samples.map(|samples| InFlight { samples, ids }))
    }

    fn read(&mut self, step: InFlight<B>) {
        match catch(|| self.decoder.backend.read(&step.samples)) {
            Ok(tokens) => {
                for (&id, token) in step.ids.iter().zip(tokens) {
                    if let Err(error) = catch(|| self.hand_out(id, token)) {
                        self.finish(id, Err(error));
                    }
                }
            }
            Err(error) => step.ids.iter().for_each(|&id| self.finish(id, Err(error.clone()))),
        }
    }

    /// A sampled token: to its sequence, if that is still there, and to whoever asked for it.
    fn hand_out(&mut self, id: u64, token: u32) -> Result<()> {
        let Some(sequence) = self.scheduler.running(id) else { return Ok(()) };
        let Some(live) = self.live.get_mut(&id) else { return Ok(()) };
        let ends = self.config.eos_token_ids.contains(&token);
        let (mut stopped, mut heard, mut exhausted) = (ends, true, false);
        if !ends {
            exhausted = sequence.accept(token);
            let text = live.text.as_mut().map(|text| text.push(token)).transpose()?;
            let (text, found) =
                text.map_or_else(Default::default, |text| (text.text, text.stopped));
            stopped = found;
            heard = (live.sink)(Event::Chunk { ids: vec![token], text });
        }
        match (heard, stopped, exhausted) {
            (false, ..) => self.finish(id, Ok(FinishReason::Cancelled)),
            (_, true, _) => self.finish(id, Ok(FinishReason::Stop)),
            (_, _, true) => self.finish(id, Ok(FinishReason::Length)),
            _ => {}
        }
        Ok(())
    }

    fn score(&mut self, ids: Vec<u32>, adapter: Option<Arc<Adapter>>, sink: ScoreSink) {
        let answer = catch(|| self.log_probs(&ids, adapter));
        _ = catch(|| {
            sink(answer);
            Ok(())
        });
    }

    /// Chunk by chunk, because the logits of a long text do not fit into memory at once.
    fn log_probs(&mut self, ids: &[u32], adapter: Option<Arc<Adapter>>) -> Result<Vec<f32>> {
        self.check_ids(ids)?;
        let context = self.config.max_position_embeddings;
        if ids.len() > context {
            let message = format!("{} tokens do not fit the model's context {context}", ids.len());
            return Err(Error::PromptTooLong(message));
        }
        let bound = adapter.as_ref().map(|adapter| self.bind(adapter)).transpose()?;
        let mut cache = self.decoder.kv_cache();
        let mut log_probs = vec![];
        let given = &ids[..ids.len() - 1];
        for (index, chunk) in given.chunks(self.prefill_chunk).enumerate() {
            let start = index * self.prefill_chunk;
            let tokens: Vec<Token> = chunk.iter().map(|&id| Token::Id(id)).collect();
            let rows: Vec<usize> = (0..chunk.len()).collect();
            let segment = Segment { rows: 0..chunk.len(), start };
            let part = Part { segment, cache: &mut cache, adapter: bound.as_deref() };
            let logits = self.decoder.forward(&tokens, None, &mut [part], &rows)?;
            let targets = &ids[start + 1..][..chunk.len()];
            if let Some(logits) = logits {
                log_probs.extend(self.decoder.backend.log_probs(&logits, targets)?);
            }
        }
        Ok(log_probs)
    }

    fn count(&mut self) {
        let caches = self.live.values().flat_map(|live| &live.cache);
        let bytes = caches.map(|cache| self.decoder.backend.cache_bytes(cache)).sum();
        self.kv_bytes.set(bytes);
    }
}

impl<B: Backend> Drop for Worker<B> {
    /// Every request gets an end, also where the engine ends first.
    fn drop(&mut self) {
        for (_, mut live) in self.live.drain() {
            tell(&mut live.sink, Event::Failed(Error::Stopped));
        }
    }
}

/// What nobody may hear: whoever listens can be gone, and a fault of theirs is not the engine's.
fn tell(sink: &mut Sink, event: Event) {
    _ = catch(|| Ok(sink(event)));
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

fn encode(request: &Request) -> Result<Vec<u32>> {
    let tokenizer = || {
        request.tokenizer.as_ref().ok_or_else(|| {
            Error::Request("without a tokenizer only :token_ids can be completed".into())
        })
    };
    match &request.prompt {
        Prompt::Ids(ids) => Ok(ids.clone()),
        Prompt::Text(text) => tokenizer()?.encode(text),
        Prompt::Chat { messages, options } => tokenizer()?.encode_chat(messages, options),
    }
}
