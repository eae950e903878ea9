//! Tokenizers.

use crate::answer::{Address, result_term};
use bombus::tokenizer::Tokenizer;
use rustler::{Env, Resource, ResourceArc, Term};
use std::path::PathBuf;
use std::sync::Arc;

pub struct TokenizerHandle(pub Arc<Tokenizer>);

#[rustler::resource_impl]
impl Resource for TokenizerHandle {}

/// Answers `{reference, {:ok, {handle, vocab_size, chat_template?}} | {:error, {reason, message}}}`.
#[rustler::nif]
fn load_tokenizer<'a>(env: Env<'a>, path: String, reference: Term<'a>) -> Term<'a> {
    let started = Address::caller(env, reference).answer_later(move || {
        let tokenizer = Tokenizer::open(&PathBuf::from(path))?;
        let (vocab_size, chat) = (tokenizer.vocab_size(), tokenizer.has_chat_template());
        Ok((ResourceArc::new(TokenizerHandle(Arc::new(tokenizer))), vocab_size, chat))
    });
    result_term(env, &started.map(|()| rustler::types::atom::ok()))
}
