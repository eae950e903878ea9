//! Where the events of a request go.

use crate::error::{Error, catch};
use crate::sequence::FinishReason;

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// New tokens, and the text that became final with them (it may lag behind).
    Chunk { ids: Vec<u32>, text: String },
    /// The end of a request for text.
    Done { reason: FinishReason, prompt_tokens: usize },
    /// The end of a request for scores: ln p of every token but the first.
    Scores(Vec<f32>),
    /// The end of a request that was not answered.
    Failed(Error),
}

/// Takes events on the engine's thread; false where nobody hears them any more.
type Listener = Box<dyn FnMut(Event) -> bool + Send>;

/// Every request has exactly one end: a sink that is dropped without one says so.
pub struct Sink(Option<Listener>);

impl Sink {
    pub fn new(listener: impl FnMut(Event) -> bool + Send + 'static) -> Self {
        Self(Some(Box::new(listener)))
    }

    pub(super) fn chunk(&mut self, ids: Vec<u32>, text: String) -> bool {
        self.0.as_mut().is_some_and(|listener| listener(Event::Chunk { ids, text }))
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
