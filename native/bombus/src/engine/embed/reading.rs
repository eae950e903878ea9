//! A request whose texts are read, and the rows of them that go into a step.

use super::text::Text;
use super::{PendingTexts, Pooling, Wanted};
use crate::backend::{Backend, KvCache, Token};
use crate::engine::active::{InUse, adapter_key};
use crate::engine::admission::Permit;
use crate::engine::sink::{Event, Sink};
use crate::error::{Error, Result};
use crate::runtime::metrics;
use std::ops::Range;

/// A request whose texts are read.
pub struct Reading<B: Backend> {
    pub id: u64,
    pub wanted: Wanted,
    adapter: Option<InUse<B>>,
    texts: Vec<Text<B>>,
    /// The first text whose rows are not all submitted.
    next: usize,
    /// How many texts have their answer.
    done: usize,
    sink: Sink,
    share: metrics::Share,
    permits: Vec<Permit>,
}

/// The rows of one text in a step.
pub struct Part<B: Backend> {
    pub request: u64,
    text: usize,
    pub wanted: Wanted,
    pub positions: Range<usize>,
    pub tokens: Vec<Token>,
    is_last: bool,
    pub cache: KvCache<B>,
    pub adapter: Option<InUse<B>>,
}

/// A part whose rows are submitted.
pub struct TakenPart {
    pub request: u64,
    pub text: usize,
    end: usize,
    pub outputs: usize,
}

impl<B: Backend> Reading<B> {
    pub fn new(id: u64, pending: PendingTexts, adapter: Option<InUse<B>>) -> Self {
        let PendingTexts { ids, wanted, sink, permits, .. } = pending;
        let texts = ids.unwrap_or_default().into_iter().map(Text::new).collect();
        let share = metrics::Share::one(&metrics::SEQUENCES);
        Self { id, wanted, adapter, texts, next: 0, done: 0, sink, share, permits }
    }

    pub fn adapter_key(&self) -> usize {
        adapter_key(self.adapter.as_ref().map(|(adapter, _)| adapter))
    }

    pub fn has_more(&self) -> bool {
        self.next < self.texts.len()
    }

    /// The next rows of its next text.
    pub fn next_part(&mut self, rows: usize, cache: impl Fn() -> KvCache<B>) -> Option<Part<B>> {
        let place = self.next;
        let text = self.texts.get_mut(place)?;
        let positions = text.next_positions(rows);
        let is_last = text.is_submitted();
        self.next += usize::from(is_last);
        Some(Part {
            request: self.id,
            text: place,
            wanted: self.wanted,
            tokens: text.ids[positions.clone()].iter().map(|&id| Token::Id(id)).collect(),
            positions,
            is_last,
            cache: text.cache.take().unwrap_or_else(cache),
            adapter: self.adapter.clone(),
        })
    }

    /// numbers: `[outputs, width]` of the part; true where all texts have their answers
    pub fn take(&mut self, part: &TakenPart, numbers: &[f32]) -> Result<bool> {
        if numbers.iter().any(|number| !number.is_finite()) {
            let name = format!("{} {}", self.wanted.noun(), part.text + 1);
            return Err(Error::Backend(format!("what {name} gives is not finite numbers")));
        }
        let width = numbers.len() / part.outputs.max(1);
        let is_done = self.texts[part.text].take(&self.wanted, numbers, width, part.end);
        self.done += usize::from(is_done);
        Ok(self.done == self.texts.len())
    }

    /// What its texts have given.
    pub fn answer(&mut self) -> Event {
        let vectors = self.texts.iter_mut().map(|text| std::mem::take(&mut text.vector));
        match self.wanted {
            Wanted::Embedding { .. } => Event::Embeddings(vectors.collect()),
            Wanted::Judgement { .. } => Event::Scores(vectors.flatten().collect()),
        }
    }

    /// A text that is not at its end keeps its cache.
    pub fn keep(&mut self, text: usize, cache: KvCache<B>) {
        self.texts[text].cache = Some(cache);
    }

    /// Those of texts that are read in part.
    pub fn caches(&self) -> impl Iterator<Item = &KvCache<B>> {
        self.texts.iter().filter_map(|text| text.cache.as_ref())
    }

    /// Gives all back; -> who is to hear of it
    pub fn end(self) -> Sink {
        let Self { sink, adapter, texts, share, permits, .. } = self;
        drop((adapter, texts, share, permits));
        sink
    }
}

impl<B: Backend> Part<B> {
    /// The rows, from 0 on, that something is wanted of. The last always is, so that a fault shows.
    pub fn outputs(&self) -> Range<usize> {
        let rows = self.tokens.len();
        match self.wanted {
            Wanted::Embedding { pooling: Pooling::Mean, .. } => 0..rows,
            _ => rows - 1..rows,
        }
    }

    /// Its rows are submitted; with it the cache of a text that goes on.
    pub fn submitted(self) -> (TakenPart, Option<KvCache<B>>) {
        let outputs = self.outputs().len();
        let Part { request, text, positions, is_last, cache, .. } = self;
        let taken = TakenPart { request, text, end: positions.end, outputs };
        (taken, (!is_last).then_some(cache))
    }
}
