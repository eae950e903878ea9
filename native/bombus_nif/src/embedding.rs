//! Requests for what texts give: embeddings, and judgements.

use crate::adapter::AdapterHandle;
use crate::generation::{events, monitored};
use crate::model::ModelHandle;
use crate::tokenizer::TokenizerHandle;
use bombus::engine::{EmbedRequest, Pooling, Prompt, Sink, Wanted};
use rustler::{Env, NifTaggedEnum, NifUnitEnum, ResourceArc, Term};
use std::time::Duration;

#[derive(NifUnitEnum)]
enum PoolingTerm {
    Last,
    Mean,
}

#[derive(NifTaggedEnum)]
enum WantedTerm {
    /// pooling, normalize, dimensions
    Embedding(PoolingTerm, bool, Option<usize>),
    /// the ids of "yes" and "no"
    Judgement(u32, u32),
}

impl From<WantedTerm> for Wanted {
    fn from(wanted: WantedTerm) -> Self {
        match wanted {
            WantedTerm::Embedding(pooling, normalize, dimensions) => {
                let pooling = match pooling {
                    PoolingTerm::Last => Pooling::Last,
                    PoolingTerm::Mean => Pooling::Mean,
                };
                Wanted::Embedding { pooling, normalize, dimensions }
            }
            WantedTerm::Judgement(yes, no) => Wanted::Judgement { yes, no },
        }
    }
}

/// `{:ok, handle}` at once, then one message `{reference, event}`: `{:embeddings, [binary]}`, each of
/// numbers `{:f, 32}`, `{:scores, [probability]}` or `{:error, {reason, message}}`. `timeout`:
/// milliseconds
#[rustler::nif]
// A NIF's arguments are a call's.
#[allow(clippy::too_many_arguments)]
fn embed<'a>(
    env: Env<'a>,
    model: ResourceArc<ModelHandle>,
    tokenizer: ResourceArc<TokenizerHandle>,
    adapter: Option<ResourceArc<AdapterHandle>>,
    texts: Vec<String>,
    wanted: WantedTerm,
    timeout: Option<u64>,
    reference: Term<'a>,
) -> Term<'a> {
    let adapter = adapter.map(|handle| handle.0.get()).transpose();
    let started = adapter.and_then(|adapter| {
        let request = EmbedRequest {
            texts: texts.into_iter().map(Prompt::Text).collect(),
            tokenizer: Some(tokenizer.0.get()?),
            adapter,
            wanted: wanted.into(),
            timeout: timeout.map(Duration::from_millis),
        };
        model.0.embed(request, Sink::new(events(env, reference)))
    });
    monitored(env, started)
}
