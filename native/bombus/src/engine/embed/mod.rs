//! Embeddings and judgements of texts. A request has any number of texts; those of many requests share
//! a step, and long ones take several.

mod queue;
mod reading;
mod steps;
mod text;

pub use queue::Queue;
pub use reading::Reading;
pub use steps::TextStep;

use super::admission::Permit;
use super::request::{Prompt, check_ids, check_vocabulary};
use super::sink::Sink;
use super::{Command, Engine, Generation, admitted, deadline};
use crate::config::Config;
use crate::error::{Error, Result, catch};
use crate::model::adapter::Adapter;
use crate::tokenizer::{Limit, Tokenizer, workers};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What is to be known of texts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted {
    /// The last hidden states as one vector `[hidden]`, or its first `dimensions`.
    Embedding { pooling: Pooling, normalize: bool, dimensions: Option<usize> },
    /// The probability of one of two tokens as the next, where no other can be: Qwen3-Reranker's
    /// "yes" and "no". Such a text comes with its special tokens.
    Judgement { yes: u32, no: u32 },
}

/// How the hidden states of a text become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pooling {
    /// of its last token
    Last,
    /// of all its tokens
    Mean,
}

impl Wanted {
    pub(super) fn is_judgement(&self) -> bool {
        matches!(self, Wanted::Judgement { .. })
    }

    /// What messages call a text.
    fn noun(&self) -> &'static str {
        if self.is_judgement() { "document" } else { "text" }
    }

    fn check(&self, config: &Config) -> Result<()> {
        let hidden = config.spec.hidden;
        match self {
            Wanted::Judgement { yes, no } => check_vocabulary([yes, no], config),
            Wanted::Embedding { dimensions: Some(cut), .. } if *cut == 0 || *cut > hidden => {
                Err(Error::Request(format!("{cut} dimensions, where the model has {hidden}")))
            }
            Wanted::Embedding { .. } => Ok(()),
        }
    }
}

pub struct EmbedRequest {
    /// at least one
    pub texts: Vec<Prompt>,
    /// Without one, only ids are texts.
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub adapter: Option<Arc<Adapter>>,
    pub wanted: Wanted,
    /// How long all of them together may take.
    pub timeout: Option<Duration>,
}

/// A request whose texts are not tokens yet, or whose adapter is not bound.
pub struct PendingTexts {
    pub ids: Option<Vec<Vec<u32>>>,
    pub wanted: Wanted,
    pub adapter: Option<Arc<Adapter>>,
    pub sink: Sink,
    pub permits: Vec<Permit>,
    /// Set when the request has ended, so that no more texts become tokens.
    pub cancelled: Arc<AtomicBool>,
}

impl Engine {
    /// Embeds or judges texts. The sink gets one end: `Embeddings`, `Scores` or `Failed`.
    pub fn embed(&self, request: EmbedRequest, sink: Sink) -> Result<Generation> {
        let deadline = deadline(Instant::now(), request.timeout);
        let checked = match request.texts.is_empty() {
            true => Err(Error::Request("there is no text".into())),
            false => request.wanted.check(&self.config),
        };
        let (permits, sink) = admitted(checked.and_then(|()| self.permits(None)), sink)?;
        let generation = self.generation();
        let id = generation.id;
        let cancelled = Arc::<AtomicBool>::default();
        let (wanted, adapter) = (request.wanted, request.adapter.clone());
        let own = cancelled.clone();
        let texts = PendingTexts { ids: None, wanted, adapter, sink, permits, cancelled: own };
        self.send(Command::Embed { id, texts: Box::new(texts), deadline })?;
        self.encode_texts(id, request, cancelled);
        Ok(generation)
    }

    /// Makes token ids of texts, and sends them on.
    fn encode_texts(&self, id: u64, request: EmbedRequest, cancelled: Arc<AtomicBool>) {
        let (commands, config, context) =
            (self.commands.clone(), self.config.clone(), self.context);
        let bytes = request.texts.iter().map(Prompt::bytes).sum();
        let job = move || {
            if !cancelled.load(Relaxed) {
                let limit = Limit { tokens: context, cancelled: &cancelled };
                let ids = catch(|| request.ids(&config, &limit));
                // An engine that is gone has ended the request.
                _ = commands.send(Command::EncodedTexts { id, ids });
            }
        };
        let owner = Arc::as_ptr(&self.config) as usize >> 4;
        if let Err(error) = workers::run(owner, bytes, job) {
            _ = self.commands.send(Command::EncodedTexts { id, ids: Err(error) });
        }
    }
}

impl EmbedRequest {
    fn ids(&self, config: &Config, limit: &Limit) -> Result<Vec<Vec<u32>>> {
        let special = !self.wanted.is_judgement();
        let ids = |text: &Prompt| {
            let ids = text.ids(self.tokenizer.as_deref(), special, limit)?;
            check_ids(&ids, config, limit.tokens)?;
            Ok(ids)
        };
        let name = |place| format!("{} {} of {}", self.wanted.noun(), place + 1, self.texts.len());
        let texts = self.texts.iter().enumerate();
        texts.map(|(place, text)| ids(text).map_err(|error| named(&name(place), error))).collect()
    }
}

/// Says which text it is that something is wrong with.
fn named(name: &str, error: Error) -> Error {
    match error {
        Error::Request(message) => Error::Request(format!("{name}: {message}")),
        Error::PromptTooLong(message) => Error::PromptTooLong(format!("{name}: {message}")),
        error => error,
    }
}
