//! Tokenizers: loading, text to token ids and back.

use crate::answer::{Address, answer_later, result_term};
use crate::generation::PromptTerm;
use crate::held::Held;
use bombus::engine::{Prompt, chat};
use bombus::error::{Error, Result};
use bombus::tokenizer::{Limit, Tokenizer};
use rustler::{Binary, Encoder, Env, LocalPid, Monitor, NifMap, Resource, ResourceArc, Term};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

pub struct TokenizerHandle(pub Held<Tokenizer>);

#[rustler::resource_impl]
impl Resource for TokenizerHandle {}

/// Work on a text, which ends with its caller.
struct TextWork(Arc<AtomicBool>);

#[rustler::resource_impl]
impl Resource for TextWork {
    const IMPLEMENTS_DOWN: bool = true;

    fn down<'a>(&'a self, _env: Env<'a>, _pid: LocalPid, _monitor: Monitor) {
        self.0.store(true, Relaxed);
    }
}

/// What Elixir shows of a tokenizer.
#[derive(NifMap)]
struct TokenizerSpec {
    vocab_size: usize,
    chat_template: bool,
    template_options: Vec<String>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

/// Answers `{reference, {:ok, {handle, spec}} | {:error, {reason, message}}}`.
#[rustler::nif]
fn load_tokenizer<'a>(env: Env<'a>, path: String, reference: Term<'a>) -> Term<'a> {
    answer_later(env, reference, move || {
        let tokenizer = Tokenizer::open(&PathBuf::from(path))?;
        let spec = TokenizerSpec {
            vocab_size: tokenizer.vocab_size(),
            chat_template: tokenizer.has_chat_template(),
            template_options: tokenizer.template_options(),
            bos_token: tokenizer.bos_token().map(str::to_owned),
            eos_token: tokenizer.eos_token(),
        };
        Ok((ResourceArc::new(TokenizerHandle(Held::new("tokenizer", tokenizer))), spec))
    })
}

/// Answers `{reference, {:ok, :ok}}`. Requests that run keep it until they end; later ones are refused.
#[rustler::nif]
fn unload_tokenizer<'a>(
    env: Env<'a>,
    handle: ResourceArc<TokenizerHandle>,
    reference: Term<'a>,
) -> Term<'a> {
    // A large one takes a while to drop.
    let tokenizer = handle.0.take();
    answer_later(env, reference, move || {
        drop(tokenizer);
        Ok(rustler::types::atom::ok())
    })
}

/// Answers `{reference, {:ok, ids} | {:error, {reason, message}}}`. `special`: with the tokens that
/// the tokenizer puts around a text
#[rustler::nif]
fn encode<'a>(
    env: Env<'a>,
    tokenizer: ResourceArc<TokenizerHandle>,
    prompt: PromptTerm,
    special: bool,
    reference: Term<'a>,
) -> Term<'a> {
    let prompt = prompt.into();
    work(env, &tokenizer, bytes(&prompt), reference, move |tokenizer, cancelled| {
        ids(tokenizer, &prompt, special, cancelled)
    })
}

/// The same, but answers with the number of tokens.
#[rustler::nif]
fn count_tokens<'a>(
    env: Env<'a>,
    tokenizer: ResourceArc<TokenizerHandle>,
    prompt: PromptTerm,
    reference: Term<'a>,
) -> Term<'a> {
    let prompt = prompt.into();
    work(env, &tokenizer, bytes(&prompt), reference, move |tokenizer, cancelled| {
        Ok(ids(tokenizer, &prompt, true, cancelled)?.len())
    })
}

/// Answers `{reference, {:ok, text} | {:error, {reason, message}}}`: a conversation as text
#[rustler::nif]
fn apply_chat_template<'a>(
    env: Env<'a>,
    tokenizer: ResourceArc<TokenizerHandle>,
    messages: String,
    options: String,
    reference: Term<'a>,
) -> Term<'a> {
    work(env, &tokenizer, messages.len(), reference, move |tokenizer, _cancelled| {
        let (messages, options) = chat(&messages, &options)?;
        tokenizer.render(&messages, &options)
    })
}

/// Answers `{reference, {:ok, text} | {:error, {reason, message}}}`. `ids`: each in four bytes;
/// `skip`: without special tokens
#[rustler::nif]
fn decode<'a>(
    env: Env<'a>,
    tokenizer: ResourceArc<TokenizerHandle>,
    ids: Binary<'a>,
    skip: bool,
    reference: Term<'a>,
) -> Term<'a> {
    let ids: Vec<u32> =
        ids.as_slice().as_chunks().0.iter().map(|bytes| u32::from_ne_bytes(*bytes)).collect();
    work(env, &tokenizer, ids.len(), reference, move |tokenizer, _cancelled| {
        tokenizer.decode_with(&ids, skip)
    })
}

/// Works on a text of `bytes` on a thread for texts, and sends the answer to the caller.
fn work<'a, T: Encoder>(
    env: Env<'a>,
    tokenizer: &ResourceArc<TokenizerHandle>,
    bytes: usize,
    reference: Term<'a>,
    work: impl FnOnce(&Tokenizer, &AtomicBool) -> Result<T> + Send + 'static,
) -> Term<'a> {
    let started = tokenizer.0.get().and_then(|tokenizer| {
        let handle = ResourceArc::new(TextWork(Arc::default()));
        let cancelled = handle.0.clone();
        env.monitor(&handle, &env.pid());
        let owner = Arc::as_ptr(&tokenizer) as usize >> 4;
        let address = Address::caller(env, reference);
        address.answer_for_text(owner, bytes, move || match cancelled.load(Relaxed) {
            true => Err(Error::Stopped),
            false => work(&tokenizer, &cancelled),
        })?;
        Ok(handle)
    });
    result_term(env, &started)
}

fn bytes(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Chat { messages, .. } => messages.len(),
        Prompt::Ids(_) => 0,
    }
}

fn ids(
    tokenizer: &Tokenizer,
    prompt: &Prompt,
    special: bool,
    cancelled: &AtomicBool,
) -> Result<Vec<u32>> {
    let limit = Limit { tokens: usize::MAX, cancelled };
    match prompt {
        Prompt::Text(text) => tokenizer.encode_within(text, special, &limit),
        Prompt::Ids(ids) => Ok(ids.clone()),
        Prompt::Chat { messages, options } => {
            let (messages, options) = chat(messages, options)?;
            tokenizer.encode_chat(&messages, &options, &limit)
        }
    }
}
