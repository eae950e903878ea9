//! Where the events of a request go.

use crate::error::{Error, catch};
use crate::sampler::Logprobs;
use crate::sequence::FinishReason;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A new token (none at the end of the text, where some of it was held back), with the text
    /// that became final with it (it may lag behind), and what was asked about the token.
    Chunk { id: Option<u32>, text: String, logprobs: Option<Logprobs> },
    /// The end of a request for text.
    Done { reason: FinishReason, usage: Usage },
    /// The end of a request for scores: ln p of every token but the first.
    Scores(Vec<f32>),
    /// The end of a question whether an adapter fits: it does.
    Fits,
    /// The end of a request that was not answered.
    Failed(Error),
}

/// What a request has used.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Those of them whose keys and values were there already.
    pub cached_tokens: usize,
    /// Those that were handed out.
    pub output_tokens: usize,
    /// From the request to its first step.
    pub queued: Duration,
    /// From the request to its first token.
    pub first_token: Option<Duration>,
    pub total: Duration,
}

/// Takes events on the engine's thread; false where nobody hears them any more.
type Listener = Box<dyn FnMut(Event) -> bool + Send>;

/// Every request has exactly one end: a sink that is dropped without one says so.
pub struct Sink(Option<Listener>);

impl Sink {
    pub fn new(listener: impl FnMut(Event) -> bool + Send + 'static) -> Self {
        Self(Some(Box::new(listener)))
    }

    pub(super) fn chunk(&mut self, chunk: Event) -> bool {
        self.0.as_mut().is_some_and(|listener| listener(chunk))
    }

    /// For a request that is refused at once, by an answer of another kind.
    pub(super) fn discard(mut self) {
        self.0 = None;
    }

    pub(super) fn end(mut self, event: Event) {
        self.tell(event);
    }

    /// A fault of whoever listens is not the engine's.
    fn tell(&mut self, event: Event) {
        if let Some(mut listener) = self.0.take() {
            _ = catch(|| Ok(listener(event)));
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.tell(Event::Failed(Error::Stopped));
    }
}
