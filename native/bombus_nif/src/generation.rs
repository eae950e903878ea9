//! Requests: their options, their events as messages, their end with their caller.

use crate::adapter::AdapterHandle;
use crate::answer::{Address, error_term, result_term};
use crate::model::ModelHandle;
use crate::tokenizer::TokenizerHandle;
use bombus::engine::{Event, Generation, Prompt, Request};
use bombus::error::{Error, Result};
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
    rustler::atoms! { chunk, done, error, stop, length, cancelled }
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
    let address = Address::caller(env, reference);
    let started = prompt.decode().and_then(|prompt| {
        let request = Request {
            prompt,
            tokenizer: tokenizer.map(|handle| handle.0.clone()),
            adapter: adapter.map(|handle| handle.0.clone()),
            sampling: options.sampling(),
            max_new_tokens: options.max_new_tokens,
            stop: options.stop,
        };
        model.0.generate(request, Box::new(move |event| address.send(|env| term(env, &event))))
    });
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

impl PromptTerm {
    fn decode(self) -> Result<Prompt> {
        let wrong = |error: serde_json::Error| Error::Request(format!("messages: {error}"));
        Ok(match self {
            PromptTerm::Text(text) => Prompt::Text(text),
            PromptTerm::Ids(ids) => Prompt::Ids(ids),
            PromptTerm::Chat(messages, options) => Prompt::Chat {
                messages: serde_json::from_str(&messages).map_err(wrong)?,
                options: serde_json::from_str(&options).map_err(wrong)?,
            },
        })
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
