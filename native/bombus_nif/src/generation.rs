//! Requests: their options, their events as messages, their end with their caller.

use crate::adapter::AdapterHandle;
use crate::answer::{Address, error_term, result_term};
use crate::group::GroupHandle;
use crate::model::ModelHandle;
use crate::tokenizer::TokenizerHandle;
use bombus::engine::sequence::FinishReason;
use bombus::engine::{Chunk, Event, Generation, Prompt, Request, Sink, Usage};
use bombus::error::Result;
use bombus::grammar::Format;
use bombus::sampler::{Logprobs, Sampling};
use rustler::{
    Encoder, Env, LocalPid, Monitor, NewBinary, NifMap, NifTaggedEnum, NifUntaggedEnum, Resource,
    ResourceArc, Term,
};
use std::sync::{Arc, Weak};
use std::time::Duration;

pub struct GenerationHandle(Arc<Generation>);

#[rustler::resource_impl]
impl Resource for GenerationHandle {
    const IMPLEMENTS_DOWN: bool = true;

    /// The caller is dead: the sequence leaves the batch.
    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, _monitor: Monitor) {
        self.0.cancel();
    }
}

/// Cancels a request without keeping it: its end is that of the other handle.
pub struct Canceller(Weak<Generation>);

#[rustler::resource_impl]
impl Resource for Canceller {}

#[derive(NifUntaggedEnum)]
enum Cancellable {
    Generation(ResourceArc<GenerationHandle>),
    Canceller(ResourceArc<Canceller>),
}

mod atoms {
    rustler::atoms! {
        ok, chunk, done, scores, embeddings, error, stop, length, cancelled, model, tokenizer, adapter
    }
}

#[derive(NifTaggedEnum)]
pub enum PromptTerm {
    Text(String),
    /// Messages and template options, both as JSON.
    Chat(String, String),
    Ids(Vec<u32>),
}

/// What a text must be.
#[derive(NifTaggedEnum)]
enum FormatTerm {
    Json,
    /// as JSON
    JsonSchema(String),
    Regex(String),
    Grammar(String),
}

#[derive(NifMap)]
struct RequestOptions {
    max_new_tokens: usize,
    min_new_tokens: usize,
    max_context: Option<usize>,
    temperature: f64,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    repetition_penalty: f64,
    presence_penalty: f64,
    frequency_penalty: f64,
    logit_bias: Vec<(u32, f64)>,
    logprobs: Option<usize>,
    seed: u64,
    stop: Vec<String>,
    stop_ids: Vec<u32>,
    format: Option<FormatTerm>,
    /// milliseconds
    timeout: Option<u64>,
    /// How many chunks may be unread: `acknowledge` says which are. Without one, any number.
    window: Option<usize>,
}

/// What a request has used; times in nanoseconds.
#[derive(NifMap)]
struct UsageTerm {
    prompt_tokens: usize,
    cached_tokens: usize,
    output_tokens: usize,
    thinking: bool,
    queued: u64,
    first_token: Option<u64>,
    total: u64,
}

/// `{:ok, handle}` at once, then messages `{reference, event}`: `{:chunk, ids, text, logprobs}`, with one id
/// as a rule, several where the reader lags behind, none in text that was held back to the end; and one of
/// `{:done, finish_reason, usage}` and `{:error, {reason, message}}` at the end.
#[rustler::nif]
// A NIF's arguments are a call's.
#[allow(clippy::too_many_arguments)]
fn generate<'a>(
    env: Env<'a>,
    model: ResourceArc<ModelHandle>,
    tokenizer: Option<ResourceArc<TokenizerHandle>>,
    adapter: Option<ResourceArc<AdapterHandle>>,
    group: Option<ResourceArc<GroupHandle>>,
    prompt: PromptTerm,
    options: RequestOptions,
    reference: Term<'a>,
) -> Term<'a> {
    let request = options.request(prompt.into(), tokenizer, adapter, group.as_ref());
    let started = request.and_then(|request| {
        let mut events = events(env, reference);
        let member = group.as_ref().map(|handle| handle.member());
        // It is a member until its end is told.
        let sink = Sink::new(move |event| {
            _ = &member;
            events(event)
        });
        model.0.generate(request, sink.with_window(options.window))
    });
    monitored(env, started)
}

/// `{:ok, handle}` at once, then one message `{reference, event}`: `{:scores, log_probs}` or
/// `{:error, {reason, message}}`. `timeout`: milliseconds
#[rustler::nif]
fn score<'a>(
    env: Env<'a>,
    model: ResourceArc<ModelHandle>,
    ids: Vec<u32>,
    adapter: Option<ResourceArc<AdapterHandle>>,
    timeout: Option<u64>,
    reference: Term<'a>,
) -> Term<'a> {
    let adapter = adapter.map(|handle| handle.0.get()).transpose();
    let started = adapter.and_then(|adapter| {
        let timeout = timeout.map(Duration::from_millis);
        model.0.score(ids, adapter, timeout, Sink::new(events(env, reference)))
    });
    monitored(env, started)
}

/// Sends events to the caller; false where that is dead.
pub fn events(env: Env, reference: Term) -> impl FnMut(Event) -> bool + Send + 'static {
    let address = Address::caller(env, reference);
    move |event| address.send(|env| term(env, &event))
}

/// A handle of the request, which ends with its caller.
pub fn monitored(env: Env, started: Result<Generation>) -> Term {
    let handle = started.map(|generation| {
        let handle = ResourceArc::new(GenerationHandle(Arc::new(generation)));
        env.monitor(&handle, &env.pid());
        handle
    });
    result_term(env, &handle)
}

#[rustler::nif]
fn canceller(handle: ResourceArc<GenerationHandle>) -> ResourceArc<Canceller> {
    ResourceArc::new(Canceller(Arc::downgrade(&handle.0)))
}

#[rustler::nif]
fn cancel(request: Cancellable) -> rustler::Atom {
    match request {
        Cancellable::Generation(handle) => handle.0.cancel(),
        Cancellable::Canceller(handle) => {
            if let Some(generation) = handle.0.upgrade() {
                generation.cancel();
            }
        }
    }
    atoms::ok()
}

/// `{:ok, :ok}` at once, then one message: `{reference, :ok}` or `{reference, {:error, {reason, message}}}`.
#[rustler::nif]
fn check_adapter<'a>(
    env: Env<'a>,
    model: ResourceArc<ModelHandle>,
    adapter: ResourceArc<AdapterHandle>,
    reference: Term<'a>,
) -> Term<'a> {
    let sink = Sink::new(events(env, reference));
    let started = adapter.0.get().and_then(|adapter| model.0.fit(adapter, sink));
    result_term(env, &started.map(|()| atoms::ok()))
}

/// `{:ok, :ok}`, or the error of what was unloaded.
#[rustler::nif]
fn check_loaded(
    env: Env,
    model: ResourceArc<ModelHandle>,
    tokenizer: Option<ResourceArc<TokenizerHandle>>,
    adapter: Option<ResourceArc<AdapterHandle>>,
) -> Term {
    let loaded = model.0.check_loaded();
    let loaded = loaded.and_then(|()| tokenizer.map_or(Ok(()), |held| held.0.get().map(drop)));
    let loaded = loaded.and_then(|()| adapter.map_or(Ok(()), |held| held.0.get().map(drop)));
    result_term(env, &loaded.map(|()| atoms::ok()))
}

/// What a reference is a handle of: `:model`, `:tokenizer`, `:adapter`, or `nil`.
#[rustler::nif]
fn kind(reference: Term) -> Option<rustler::Atom> {
    let is_model = reference.decode::<ResourceArc<ModelHandle>>().is_ok();
    let is_tokenizer = || reference.decode::<ResourceArc<TokenizerHandle>>().is_ok();
    let is_adapter = || reference.decode::<ResourceArc<AdapterHandle>>().is_ok();
    match is_model {
        true => Some(atoms::model()),
        false if is_tokenizer() => Some(atoms::tokenizer()),
        false => is_adapter().then(atoms::adapter),
    }
}

/// The reader of a request with a window has taken so many chunks.
#[rustler::nif]
fn acknowledge(handle: ResourceArc<GenerationHandle>, chunks: usize) -> rustler::Atom {
    handle.0.acknowledge(chunks);
    rustler::types::atom::ok()
}

fn term<'a>(env: Env<'a>, event: &Event) -> Term<'a> {
    match event {
        Event::Chunk(Chunk { ids, text, logprobs }) => {
            let logprobs: Vec<_> = logprobs.iter().map(logprobs_term).collect();
            (atoms::chunk(), ids, text, logprobs).encode(env)
        }
        // The engine answers with finite numbers only: another would be no term.
        Event::Scores(log_probs) => (atoms::scores(), log_probs).encode(env),
        Event::Embeddings(vectors) => {
            let vectors: Vec<Term> = vectors.iter().map(|vector| binary(env, vector)).collect();
            (atoms::embeddings(), vectors).encode(env)
        }
        Event::Fits => atoms::ok().encode(env),
        Event::Failed(error) => (atoms::error(), error_term(env, error)).encode(env),
        Event::Done { reason, usage } => {
            let reason = match reason {
                FinishReason::Stop => atoms::stop(),
                FinishReason::Length => atoms::length(),
                FinishReason::Cancelled => atoms::cancelled(),
            };
            (atoms::done(), reason, usage_term(usage)).encode(env)
        }
    }
}

/// Numbers in little endian.
fn binary<'a>(env: Env<'a>, numbers: &[f32]) -> Term<'a> {
    let mut binary = NewBinary::new(env, size_of_val(numbers));
    let places = binary.as_mut_slice().as_chunks_mut().0.iter_mut();
    places.zip(numbers).for_each(|(place, number)| *place = number.to_le_bytes());
    Term::from(binary)
}

/// `{log_prob, [{id, log_prob}]}`
fn logprobs_term(logprobs: &Logprobs) -> (f64, Vec<(u32, f64)>) {
    // Infinity would be no term; the lowest number says the same.
    let finite = |number: f32| f64::from(number.clamp(f32::MIN, f32::MAX));
    (finite(logprobs.chosen), logprobs.top.iter().map(|&(id, lp)| (id, finite(lp))).collect())
}

fn usage_term(usage: &Usage) -> UsageTerm {
    let nanoseconds = |time: Duration| time.as_nanos() as u64;
    UsageTerm {
        prompt_tokens: usage.prompt_tokens,
        cached_tokens: usage.cached_tokens,
        output_tokens: usage.output_tokens,
        thinking: usage.thinking,
        queued: nanoseconds(usage.queued),
        first_token: usage.first_token.map(nanoseconds),
        total: nanoseconds(usage.total),
    }
}

impl From<PromptTerm> for Prompt {
    fn from(prompt: PromptTerm) -> Self {
        match prompt {
            PromptTerm::Text(text) => Prompt::Text(text),
            PromptTerm::Ids(ids) => Prompt::Ids(ids),
            PromptTerm::Chat(messages, options) => Prompt::Chat { messages, options },
        }
    }
}

impl From<&FormatTerm> for Format {
    fn from(format: &FormatTerm) -> Self {
        match format {
            FormatTerm::Json => Format::Json,
            FormatTerm::JsonSchema(schema) => Format::JsonSchema(schema.clone()),
            FormatTerm::Regex(regex) => Format::Regex(regex.clone()),
            FormatTerm::Grammar(grammar) => Format::Lark(grammar.clone()),
        }
    }
}

impl RequestOptions {
    fn request(
        &self,
        prompt: Prompt,
        tokenizer: Option<ResourceArc<TokenizerHandle>>,
        adapter: Option<ResourceArc<AdapterHandle>>,
        group: Option<&ResourceArc<GroupHandle>>,
    ) -> Result<Request> {
        Ok(Request {
            prompt,
            tokenizer: tokenizer.map(|handle| handle.0.get()).transpose()?,
            adapter: adapter.map(|handle| handle.0.get()).transpose()?,
            sampling: self.sampling(),
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            max_context: self.max_context,
            timeout: self.timeout.map(Duration::from_millis),
            group: group.map(|handle| handle.group.clone()),
            stop: self.stop.clone(),
            stop_ids: self.stop_ids.clone(),
            format: self.format.as_ref().map(Format::from),
        })
    }

    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature as f32,
            top_k: self.top_k,
            top_p: self.top_p as f32,
            min_p: self.min_p as f32,
            repetition_penalty: self.repetition_penalty as f32,
            presence_penalty: self.presence_penalty as f32,
            frequency_penalty: self.frequency_penalty as f32,
            logit_bias: self.logit_bias.iter().map(|&(id, bias)| (id, bias as f32)).collect(),
            logprobs: self.logprobs,
            seed: self.seed,
        }
    }
}
