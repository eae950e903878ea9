//! Tokenizers.

use crate::answer::{Address, result_term};
use crate::held::Held;
use bombus::tokenizer::Tokenizer;
use rustler::{Env, Resource, ResourceArc, Term};
use std::path::PathBuf;

pub struct TokenizerHandle(pub Held<Tokenizer>);

#[rustler::resource_impl]
impl Resource for TokenizerHandle {}

/// Answers `{reference, {:ok, {handle, vocab_size, chat_template?}} | {:error, {reason, message}}}`.
#[rustler::nif]
fn load_tokenizer<'a>(env: Env<'a>, path: String, reference: Term<'a>) -> Term<'a> {
    let started = Address::caller(env, reference).answer_later(move || {
        let tokenizer = Tokenizer::open(&PathBuf::from(path))?;
        let (vocab_size, chat) = (tokenizer.vocab_size(), tokenizer.has_chat_template());
        Ok((ResourceArc::new(TokenizerHandle(Held::new("tokenizer", tokenizer))), vocab_size, chat))
    });
    result_term(env, &started.map(|()| rustler::types::atom::ok()))
}

/// Requests that run keep it until they end; later ones are refused.
#[rustler::nif]
fn unload_tokenizer(handle: ResourceArc<TokenizerHandle>) -> rustler::Atom {
    drop(handle.0.take());
    rustler::types::atom::ok()
}
