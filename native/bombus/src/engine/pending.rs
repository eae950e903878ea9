//! Requests that have reached the engine and cannot run yet: their text is not tokens yet, or their
//! adapter is not bound.

use super::PendingRequest;
use super::admission::Permit;
use super::embed::PendingTexts;
use super::sink::{Event, Sink, Usage};
use crate::engine::sequence::{FinishReason, Task};
use crate::error::Error;
use crate::model::adapter::Adapter;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

pub enum Pending {
    /// Without a task until its text is tokens.
    Generate(Box<PendingRequest>, Option<Task>),
    Score(Scoring),
    /// Without ids until its texts are tokens.
    Texts(Box<PendingTexts>),
    /// Whether an adapter can be bound.
    Fit(Arc<Adapter>, Sink),
}

/// What is to be scored.
pub struct Scoring {
    pub ids: Vec<u32>,
    pub adapter: Option<Arc<Adapter>>,
    pub sink: Sink,
    pub permits: Vec<Permit>,
}

impl Pending {
    pub fn adapter(&self) -> Option<&Arc<Adapter>> {
        match self {
            Pending::Generate(request, _) => request.adapter.as_ref(),
            Pending::Score(scoring) => scoring.adapter.as_ref(),
            Pending::Texts(texts) => texts.adapter.as_ref(),
            Pending::Fit(adapter, _) => Some(adapter),
        }
    }

    /// Whoever hears of the end has the permits back, and the adapter.
    pub fn fail(self, error: Error) {
        self.end(Event::Failed(error));
    }

    pub fn cancel(self) {
        let prompt_tokens = match &self {
            Pending::Generate(_, task) => task.as_ref().map_or(0, |task| task.prompt.len()),
            _ => return self.fail(Error::Stopped),
        };
        let usage = Usage { prompt_tokens, ..Usage::default() };
        self.end(Event::Done { reason: FinishReason::Cancelled, usage });
    }

    fn end(self, event: Event) {
        let (sink, permits, adapter) = match self {
            Pending::Generate(request, _) => {
                // A text that is not tokens yet need not become any.
                request.cancelled.store(true, Relaxed);
                (request.sink, request.permits, request.adapter)
            }
            Pending::Score(Scoring { sink, permits, adapter, .. }) => (sink, permits, adapter),
            Pending::Texts(texts) => {
                texts.cancelled.store(true, Relaxed);
                (texts.sink, texts.permits, texts.adapter)
            }
            Pending::Fit(adapter, sink) => (sink, vec![], Some(adapter)),
        };
        drop((permits, adapter));
        sink.end(event);
    }
}
