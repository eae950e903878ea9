//! Requests: their options, their events as messages, their end with their caller.

use crate::adapter::AdapterHandle;
use crate::answer::{Address, error_term, result_term};
use crate::model::ModelHandle;
use crate::tokenizer::TokenizerHandle;
use bombus::engine::{Event, Generation, Prompt, Request, Sink};
use bombus::error::Result;
use bombus::sampler::Sampling;
use bombus::sequence::FinishReason;
use rustler::{
    Encoder, Env, LocalPid, Monitor, NifMap, NifTaggedEnum, Resource, ResourceArc, Term,
};

pub struct GenerationHandle(Generation);

#[rustler::resource_impl]
impl Resource for GenerationHandle {
    const IMPLEMENTS_DOWN: bool = true;

    /// The caller is dead: the sequence leaves the batch.
    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, _monitor: Monitor) {
        self.0.cancel();
    }
}

mod atoms {
    rustler::atoms! { chunk, done, scores, error, stop, length, cancelled }
}

#[derive(NifTaggedEnum)]
enum PromptTerm {
    Text(String),
    /// Messages and template options, both as JSON.
    Chat(String, String),
    Ids(Vec<u32>),
}

#[derive(NifMap)]
struct RequestOptions {
    max_new_tokens: usize,
    max_context: Option<usize>,
    temperature: f64,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    repetition_penalty: f64,
    seed: u64,
    stop: Vec<String>,
}

/// `{:ok, handle}` at once, then messages `{reference, event}`: `{:chunk, ids, text}`, and one of
/// `{:done, finish_reason, prompt_tokens}` and `{:error, {reason, message}}` at the end.
#[rustler::nif]
fn generate<'a>(
    env: Env<'a>,
    model: ResourceArc<ModelHandle>,
    tokenizer: Option<ResourceArc<TokenizerHandle>>,
    adapter: Option<ResourceArc<AdapterHandle>>,
    prompt: PromptTerm,
    options: RequestOptions,
    reference: Term<'a>,
) -> Term<'a> {
    let request = Request {
        prompt: prompt.into(),
        tokenizer: tokenizer.map(|handle| handle.0.clone()),
        adapter: adapter.map(|handle| handle.0.clone()),
        sampling: options.sampling(),
        max_new_tokens: options.max_new_tokens,
        max_context: options.max_context,
        stop: options.stop,
    };
    let started = model.0.generate(request, sink(env, reference));
    monitored(env, started)
}

/// `{:ok, handle}` at once, then one message `{reference, event}`: `{:scores, log_probs}` or
/// `{:error, {reason, message}}`.
#[rustler::nif]
fn score<'a>(
    env: Env<'a>,
    model: ResourceArc<ModelHandle>,
    ids: Vec<u32>,
    adapter: Option<ResourceArc<AdapterHandle>>,
    reference: Term<'a>,
) -> Term<'a> {
    let adapter = adapter.map(|handle| handle.0.clone());
    let started = model.0.score(ids, adapter, sink(env, reference));
    monitored(env, started)
}

fn sink(env: Env, reference: Term) -> Sink {
    let address = Address::caller(env, reference);
    Sink::new(move |event| address.send(|env| term(env, &event)))
}

/// A handle of the request, which ends with its caller.
fn monitored(env: Env, started: Result<Generation>) -> Term {
    let handle = started.map(|generation| {
        let handle = ResourceArc::new(GenerationHandle(generation));
        env.monitor(&handle, &env.pid());
        handle
    });
    result_term(env, &handle)
}

#[rustler::nif]
fn cancel(handle: ResourceArc<GenerationHandle>) -> rustler::Atom {
    handle.0.cancel();
    rustler::types::atom::ok()
}

fn term<'a>(env: Env<'a>, event: &Event) -> Term<'a> {
    match event {
        Event::Chunk { ids, text } => (atoms::chunk(), ids, text).encode(env),
        // The engine answers with finite numbers only: another would be no term.
        Event::Scores(log_probs) => (atoms::scores(), log_probs).encode(env),
        Event::Failed(error) => (atoms::error(), error_term(env, error)).encode(env),
        Event::Done { reason, prompt_tokens } => {
            let reason = match reason {
                FinishReason::Stop => atoms::stop(),
                FinishReason::Length => atoms::length(),
                FinishReason::Cancelled => atoms::cancelled(),
            };
            (atoms::done(), reason, prompt_tokens).encode(env)
        }
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

impl RequestOptions {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature as f32,
            top_k: self.top_k,
            top_p: self.top_p as f32,
            min_p: self.min_p as f32,
            repetition_penalty: self.repetition_penalty as f32,
            seed: self.seed,
        }
    }
}
