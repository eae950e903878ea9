//! The engine's thread: takes commands, plans a step, submits it, and hands out the tokens of the
//! step before while it computes (`steps`).

use super::active::{ActiveRequest, adapter_key};
use super::bindings::{Bindings, Bound};
use super::deadlines::Deadlines;
use super::embed;
use super::monitor::Monitor;
use super::pending::Pending;
use super::prefix_cache::Prefixes;
use super::request::check_ids;
use super::score::Score;
use super::sink::{Event, Usage};
use super::steps::InFlight;
use super::unload::Unloading;
use super::{Command, Fault, Inbox, PendingRequest};
use crate::backend::{Backend, KvCache};
use crate::config::Config;
use crate::engine::scheduler::{Limits, Scheduler};
use crate::engine::sequence::{FinishReason, Sequence, Task};
use crate::error::{Error, Result, catch};
use crate::model::adapter::Adapter;
use crate::model::executor::Executor;
use crate::runtime::exit::{self, BusyGuard};
use crate::runtime::metrics;
use crate::tokenizer::TextStream;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::mpsc::{RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Weak};
use std::time::Instant;

pub struct Worker<E: Executor> {
    pub(super) executor: E,
    config: Arc<Config>,
    /// Tokens that a text may have.
    context: usize,
    pub(super) inbox: Inbox,
    pub(super) prefill_chunk: usize,
    pub(super) scheduler: Scheduler,
    pending: HashMap<u64, Pending>,
    pub(super) active: HashMap<u64, ActiveRequest<E::Backend>>,
    pub(super) scores: VecDeque<Score<E::Backend>>,
    pub(super) texts: embed::Queue<E::Backend>,
    pub(super) text_step: Option<embed::TextStep<E::Backend>>,
    pub(super) deadlines: Deadlines,
    bindings: Bindings<E::Backend>,
    /// Adapters that will say when they go, by their keys.
    known: HashSet<usize>,
    pub(super) prefixes: Prefixes<KvCache<E::Backend>>,
    pub(super) kv_bytes: metrics::Share,
    pub(super) prefix_bytes: metrics::Share,
    /// Steps since then.
    pub(super) uncounted: usize,
    pub(super) monitor: Option<Monitor>,
    pub(super) fault: Option<Fault>,
    unloading: Unloading,
}

impl<E: Executor> Worker<E> {
    pub fn new(
        executor: E,
        config: Arc<Config>,
        context: usize,
        limits: &Limits,
        inbox: Inbox,
    ) -> Self {
        Self {
            executor,
            config,
            context,
            inbox,
            prefill_chunk: limits.prefill_chunk,
            scheduler: Scheduler::new(limits.clone()),
            pending: HashMap::new(),
            active: HashMap::new(),
            scores: VecDeque::new(),
            texts: embed::Queue::new(),
            text_step: None,
            deadlines: Deadlines::default(),
            bindings: Bindings::new(),
            known: HashSet::new(),
            prefixes: Prefixes::new(limits.prefix_cache),
            kv_bytes: metrics::Share::of(&metrics::KV_BYTES),
            prefix_bytes: metrics::Share::of(&metrics::PREFIX_BYTES),
            uncounted: 0,
            monitor: None,
            fault: None,
            unloading: Unloading::default(),
        }
    }

    /// Serves until every handle is gone, or the model is unloaded.
    pub fn run(&mut self) {
        let mut in_flight: Option<InFlight<E::Backend>> = None;
        let mut busy = BusyGuard::enter();
        loop {
            if in_flight.is_none() && self.is_idle() {
                self.executor.decoder().backend.finish();
                drop(busy);
                let command = self.wait();
                busy = BusyGuard::enter();
                match command {
                    Ok(command) => self.handle(command),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            if exit::stopping() {
                self.await_end(in_flight);
                busy.stop();
            }
            if !self.take_commands() {
                return self.await_end(in_flight);
            }
            self.expire();
            let next = self.submit(in_flight.as_ref());
            if let Some(step) = in_flight {
                self.read(step);
            }
            in_flight = next;
            if !E::Backend::ASYNC
                && let Some(step) = in_flight.take()
            {
                self.read(step);
            }
            self.advance_scores();
            self.advance_texts();
            self.advance_bindings();
            if self.unloading.is_asked() && self.has_ended() {
                return self.await_end(in_flight);
            }
        }
    }

    /// Gives all back but what is told last.
    pub fn end(self) -> Unloading {
        let Self { mut unloading, inbox, pending, active, .. } = self;
        drop((pending, active));
        // Who came too late learns why.
        for command in inbox.receiver.try_iter() {
            unloading.refuse(command);
        }
        unloading
    }

    /// A backend may compute on threads of its own, which the process must not leave behind.
    fn await_end(&self, in_flight: Option<InFlight<E::Backend>>) {
        self.executor.decoder().backend.finish();
        drop(in_flight);
    }

    fn is_idle(&self) -> bool {
        let texts = self.texts.is_empty() && self.text_step.is_none();
        self.scheduler.is_idle() && self.scores.is_empty() && texts && self.bindings.is_idle()
    }

    /// Whether every request has ended.
    fn has_ended(&self) -> bool {
        let texts = self.texts.is_empty();
        self.pending.is_empty() && self.active.is_empty() && self.scores.is_empty() && texts
    }

    /// The next command, unless a deadline comes first.
    fn wait(&self) -> Result<Command, RecvTimeoutError> {
        let commands = &self.inbox.receiver;
        match self.deadlines.next() {
            None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(at) => commands.recv_timeout(at.saturating_duration_since(Instant::now())),
        }
    }

    /// Takes what has arrived; false where no handle is left.
    fn take_commands(&mut self) -> bool {
        loop {
            match self.inbox.receiver.try_recv() {
                Ok(command) => self.handle(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Generate(..)
            | Command::Score { .. }
            | Command::Embed { .. }
            | Command::Fit { .. }
                if self.unloading.is_asked() =>
            {
                self.unloading.refuse(command);
            }
            Command::Generate(request, task) => {
                let (id, deadline, encoded) = (request.id, request.deadline, task.is_some());
                self.expect(id, Pending::Generate(request, task), deadline);
                if encoded {
                    self.admit(id);
                }
            }
            Command::Encoded { id, task } => self.encoded(id, task),
            Command::Score { id, scoring, deadline } => {
                self.expect(id, Pending::Score(scoring), deadline);
                self.admit(id);
            }
            Command::Embed { id, texts, deadline } => {
                self.expect(id, Pending::Texts(texts), deadline);
            }
            Command::EncodedTexts { id, ids } => self.encoded_texts(id, ids),
            Command::Fit { id, adapter, sink } => {
                self.expect(id, Pending::Fit(adapter, sink), None);
                self.admit(id);
            }
            Command::Cancel { id } => self.cancel(id),
            Command::Acknowledge { id, chunks } => self.acknowledge(id, chunks),
            Command::Forget { adapter } => {
                self.known.remove(&adapter);
                self.bindings.forget(adapter);
                self.prefixes.forget(adapter);
                self.count();
            }
            Command::CancelWith { adapter } => self.cancel_with(adapter),
            Command::Watch(monitor) => self.monitor = Some(monitor),
            Command::Fail(fault) => self.fault = Some(fault),
            Command::Unload { cancel, done } => self.unload(cancel, done),
        }
    }

    fn unload(&mut self, cancel: bool, done: super::unload::Done) {
        self.unloading.ask(done);
        if cancel {
            self.cancel_those(|_adapter| true);
        }
    }

    fn cancel_with(&mut self, adapter: usize) {
        self.cancel_those(|own| own == adapter);
    }

    /// `chosen`: by the adapter's key
    fn cancel_those(&mut self, chosen: impl Fn(usize) -> bool) {
        let pending = self.pending.iter().map(|(id, it)| (*id, adapter_key(it.adapter())));
        let active = self.active.iter().map(|(id, it)| (*id, it.adapter_key()));
        let scores = self.scores.iter().map(|score| (score.id, score.adapter_key()));
        let texts = self.texts.iter().map(|request| (request.id, request.adapter_key()));
        let all = pending.chain(active).chain(scores).chain(texts);
        let all = all.filter(|(_, adapter)| chosen(*adapter));
        let ids: Vec<u64> = all.map(|(id, _)| id).collect();
        ids.into_iter().for_each(|id| self.cancel(id));
    }

    fn expect(&mut self, id: u64, pending: Pending, deadline: Option<Instant>) {
        let adapter = pending.adapter().cloned();
        self.pending.insert(id, pending);
        if let Some(deadline) = deadline {
            self.deadlines.add(id, deadline);
        }
        if let Some(adapter) = adapter {
            self.know(&adapter);
            // A request may come later than the end of all with its adapter.
            if adapter.is_cancelled() {
                self.cancel(id);
            }
        }
    }

    /// A text has become tokens, or cannot; its request may have ended meanwhile.
    fn encoded(&mut self, id: u64, encoded: Result<(Task, Option<TextStream>)>) {
        let Some(Pending::Generate(request, task)) = self.pending.get_mut(&id) else { return };
        match encoded {
            Ok((encoded, text)) => {
                request.text = text;
                *task = Some(encoded);
                self.admit(id);
            }
            Err(error) => self.finish(id, Err(error)),
        }
    }

    /// The same of a request for what texts give.
    fn encoded_texts(&mut self, id: u64, encoded: Result<Vec<Vec<u32>>>) {
        let Some(Pending::Texts(texts)) = self.pending.get_mut(&id) else { return };
        match encoded {
            Ok(ids) => {
                texts.ids = Some(ids);
                self.admit(id);
            }
            Err(error) => self.finish(id, Err(error)),
        }
    }

    /// Lets a request go on whose tokens are known, once its adapter is bound.
    fn admit(&mut self, id: u64) {
        let Some(pending) = self.pending.get(&id) else { return };
        let adapter = match pending.adapter() {
            None => None,
            Some(adapter) => match self.bindings.get(adapter) {
                Some(bound) => Some(bound),
                None => return self.bindings.add(adapter, id),
            },
        };
        match self.pending.remove(&id) {
            Some(Pending::Generate(request, Some(task))) => {
                let PendingRequest { text, sink, permits, asked, .. } = *request;
                let usage = Usage { prompt_tokens: task.prompt.len(), ..Usage::default() };
                let share = metrics::Share::one(&metrics::SEQUENCES);
                let cache = self.executor.cache();
                let active =
                    ActiveRequest { cache, adapter, text, sink, permits, usage, asked, share };
                self.active.insert(id, active);
                match task.max_new_tokens {
                    0 => self.finish(id, Ok(FinishReason::Length)),
                    _ => self.scheduler.add(Sequence::new(id, task)),
                }
            }
            Some(Pending::Score(scoring)) => {
                match check_ids(&scoring.ids, &self.config, self.context) {
                    Ok(()) => {
                        let cache = self.executor.cache();
                        self.scores.push_back(Score::new(id, scoring, adapter, cache));
                    }
                    Err(error) => {
                        self.deadlines.remove(id);
                        Pending::Score(scoring).fail(error);
                    }
                }
            }
            Some(Pending::Texts(texts)) if texts.ids.is_some() => {
                self.texts.push(embed::Reading::new(id, *texts, adapter));
            }
            Some(Pending::Fit(adapter, sink)) => {
                drop(adapter);
                sink.end(Event::Fits);
            }
            Some(unencoded) => _ = self.pending.insert(id, unencoded),
            None => {}
        }
    }

    /// A layer of the adapter that is bound next.
    fn advance_bindings(&mut self) {
        let bound = self.bindings.advance(self.executor.decoder());
        let Some(Bound { waiting, result }) = bound else { return };
        match result {
            Ok(()) => waiting.into_iter().for_each(|id| self.admit(id)),
            Err(error) => {
                waiting.into_iter().for_each(|id| self.finish(id, Err(error.clone())));
            }
        }
    }

    /// What is bound of an adapter goes with it, and requests end when it is said to end them.
    fn know(&mut self, adapter: &Arc<Adapter>) {
        let key = adapter_key(Some(adapter));
        if !self.known.insert(key) {
            return;
        }
        let send = |commands: Weak<Sender<Command>>, command| {
            if let Some(commands) = commands.upgrade() {
                _ = commands.send(command);
            }
        };
        let commands = self.inbox.commands.clone();
        adapter.on_drop(move || send(commands, Command::Forget { adapter: key }));
        let commands = self.inbox.commands.clone();
        adapter.on_cancel(move || send(commands, Command::CancelWith { adapter: key }));
    }

    fn cancel(&mut self, id: u64) {
        self.finish(id, Ok(FinishReason::Cancelled));
    }

    /// Ends what has taken too long, wherever it is.
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some(id) = self.deadlines.take_due(now) {
            self.finish(id, Err(Error::Timeout));
        }
    }

    /// A reader has taken so many chunks.
    fn acknowledge(&mut self, id: u64, chunks: usize) {
        let Some(active) = self.active.get_mut(&id) else { return };
        match catch(|| Ok((active.sink.acknowledge(chunks), active.sink.is_full()))) {
            Ok((true, false)) => self.scheduler.go_on(id),
            Ok((true, true)) => {}
            Ok((false, _)) => self.cancel(id),
            Err(error) => self.finish(id, Err(error)),
        }
    }

    /// Ends a request, wherever it is, and gives its memory back.
    pub(super) fn finish(&mut self, id: u64, end: Result<FinishReason>) {
        self.deadlines.remove(id);
        if let Some(pending) = self.pending.remove(&id) {
            self.bindings.leave(id);
            match end {
                Ok(_) => pending.cancel(),
                Err(error) => pending.fail(error),
            }
        } else if self.active.contains_key(&id) {
            self.finish_sequence(id, end);
        } else if let Some(place) = self.scores.iter().position(|score| score.id == id) {
            let score = self.scores.remove(place);
            let error = end.err().unwrap_or(Error::Stopped);
            score
                .into_iter()
                .for_each(|score| self.finish_score(score, Event::Failed(error.clone())));
        } else if let Some(request) = self.texts.remove(id) {
            let error = end.err().unwrap_or(Error::Stopped);
            self.finish_texts(request, Event::Failed(error));
        }
    }

    fn finish_sequence(&mut self, id: u64, end: Result<FinishReason>) {
        let sequence = self.scheduler.remove(id);
        let Some(mut active) = self.active.remove(&id) else { return };
        let cache = std::mem::replace(&mut active.cache, self.executor.cache());
        let held = !self.executor.decoder().pages(&cache).is_empty();
        if let Some(sequence) = sequence.filter(|_| end.is_ok()) {
            self.keep(active.adapter_key(), sequence.computed(), &cache);
        }
        drop(cache);
        active.permits.clear();
        active.adapter = None;
        active.share.set(0);
        // Of thousands that are cancelled in the queue, none changes what is held.
        if held {
            self.count();
        }
        // Whoever hears of the end finds everything given back.
        let (sink, event) = match end {
            Ok(reason) => active.end(reason),
            Err(error) => (active.sink, Err(error)),
        };
        sink.end(event.unwrap_or_else(Event::Failed));
    }

    /// Keeps what was computed for others that begin alike.
    pub(super) fn keep(&mut self, adapter: usize, ids: Vec<u32>, cache: &KvCache<E::Backend>) {
        if ids.is_empty() {
            return;
        }
        let kept = catch(|| {
            let cache = self.executor.decoder().fork(cache, ids.len())?;
            let pages = self.executor.decoder().pages(&cache);
            self.prefixes.insert(adapter, ids, cache, pages);
            Ok(())
        });
        // Without what it might have kept, it has ended as well.
        kept.unwrap_or_else(|_| self.prefixes.clear());
    }
}
