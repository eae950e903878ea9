//! What belongs to a sequence beside its tokens.

use super::admission::Permit;
use super::sink::{Chunk, Event, Sink, Usage};
use crate::backend::{Backend, BoundAdapter, KvCache};
use crate::engine::sequence::FinishReason;
use crate::error::{Result, catch};
use crate::model::adapter::Adapter;
use crate::runtime::metrics;
use crate::sampler::Sample;
use crate::tokenizer::TextStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

pub struct ActiveRequest<B: Backend> {
    pub cache: KvCache<B>,
    pub adapter: Option<InUse<B>>,
    pub text: Option<TextStream>,
    pub sink: Sink,
    pub permits: Vec<Permit>,
    pub usage: Usage,
    pub asked: Instant,
    pub share: metrics::Share,
}

/// An adapter that a sequence keeps alive, and its pairs.
pub type InUse<B> = (Arc<Adapter>, Rc<BoundAdapter<B>>);

/// Names an adapter as long as it lives; no adapter is 0.
pub fn adapter_key(adapter: Option<&Arc<Adapter>>) -> usize {
    adapter.map_or(0, |adapter| Arc::as_ptr(adapter) as usize)
}

impl<B: Backend> ActiveRequest<B> {
    pub fn adapter_key(&self) -> usize {
        adapter_key(self.adapter.as_ref().map(|(adapter, _)| adapter))
    }

    /// It joins the batch, where `cached` tokens of its prompt are computed already.
    pub fn start(&mut self, cached: usize) {
        // A sequence that starts again keeps its first times.
        if self.usage.queued.is_zero() {
            self.usage.queued = self.asked.elapsed();
            self.usage.cached_tokens = cached;
        }
    }

    pub fn note_token(&mut self) {
        self.usage.first_token.get_or_insert_with(|| self.asked.elapsed());
    }

    /// Emits a token; -> whether anyone hears it, and whether it has completed a stop string.
    pub fn emit(&mut self, sample: Sample) -> Result<(bool, bool)> {
        let text = self.text.as_mut().map(|text| text.push(sample.id));
        let (text, stopped) = text.map_or_else(Default::default, |text| (text.text, text.stopped));
        self.usage.output_tokens += 1;
        let logprobs = sample.logprobs.into_iter().collect();
        Ok((self.sink.chunk(Chunk { ids: vec![sample.id], text, logprobs }), stopped))
    }

    /// Emits the text that was held back, and gives all but the sink back; -> what to end with
    pub fn end(mut self, reason: FinishReason) -> (Sink, Result<Event>) {
        let rest = catch(|| Ok(self.text.as_mut().map(TextStream::finish)));
        let event = rest.map(|rest| {
            if let Some(text) = rest.filter(|text| !text.is_empty()) {
                let chunk = Chunk { text, ..Chunk::default() };
                _ = catch(|| Ok(self.sink.chunk(chunk)));
            }
            self.usage.total = self.asked.elapsed();
            self.usage.thinking = self.text.as_ref().is_some_and(TextStream::is_thinking);
            Event::Done { reason, usage: self.usage }
        });
        (self.sink, event)
    }
}
