//! Where the events of a request go, and how far its reader may lag behind.

use crate::engine::sequence::FinishReason;
use crate::error::{Error, catch};
use crate::sampler::Logprobs;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// New tokens and their text.
    Chunk(Chunk),
    /// The end of a request for text.
    Done { reason: FinishReason, usage: Usage },
    /// The end of a request for scores: ln p of every token but the first, or of one for judgements:
    /// the probability of each text.
    Scores(Vec<f32>),
    /// The end of a request for embeddings: a vector of each text.
    Embeddings(Vec<Vec<f32>>),
    /// The end of a question whether an adapter fits: it does.
    Fits,
    /// The end of a request that was not answered.
    Failed(Error),
}

/// A new token (none at the end of the text, where some of it was held back), with the text that
/// became final with it (it may lag behind), and what was asked about the token. Of a reader that
/// lags behind its window, several as one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    pub ids: Vec<u32>,
    pub text: String,
    /// one for each token, where they were asked for
    pub logprobs: Vec<Logprobs>,
}

impl Chunk {
    fn is_empty(&self) -> bool {
        self.ids.is_empty() && self.text.is_empty() && self.logprobs.is_empty()
    }

    fn join(&mut self, next: Chunk) {
        self.ids.extend(next.ids);
        self.text.push_str(&next.text);
        self.logprobs.extend(next.logprobs);
    }
}

/// What a request has used.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    pub prompt_tokens: usize,
    /// Those of them whose keys and values were there already.
    pub cached_tokens: usize,
    /// Those that were handed out.
    pub output_tokens: usize,
    /// Whether the text ended in the middle of the model's thinking.
    pub thinking: bool,
    /// From the request to its first step.
    pub queued: Duration,
    /// From the request to its first token.
    pub first_token: Option<Duration>,
    pub total: Duration,
}

/// Takes events on the engine's thread; false where nobody hears them any more.
type Listener = Box<dyn FnMut(Event) -> bool + Send>;

/// Every request has exactly one end: a sink that is dropped without one says so.
pub struct Sink {
    listener: Option<Listener>,
    window: Option<Window>,
}

/// The chunks that the reader has not acknowledged, and those held back until it does.
struct Window {
    size: usize,
    unread: usize,
    held: Chunk,
}

impl Sink {
    pub fn new(listener: impl FnMut(Event) -> bool + Send + 'static) -> Self {
        Self { listener: Some(Box::new(listener)), window: None }
    }

    /// With a window, so many chunks may be unread; beyond it they are joined, and with as many
    /// tokens joined the sink is full: its sequence waits.
    pub fn with_window(mut self, size: Option<usize>) -> Self {
        self.window =
            size.map(|size| Window { size: size.max(1), unread: 0, held: Chunk::default() });
        self
    }

    /// Tells of a chunk, at once or later; false where nobody hears it.
    pub(super) fn chunk(&mut self, chunk: Chunk) -> bool {
        match &mut self.window {
            None => self.send(chunk),
            Some(window) => {
                window.held.join(chunk);
                self.release()
            }
        }
    }

    /// The reader has taken so many chunks; false where nobody hears the next.
    pub(super) fn acknowledge(&mut self, chunks: usize) -> bool {
        if let Some(window) = &mut self.window {
            window.unread = window.unread.saturating_sub(chunks);
        }
        self.release()
    }

    /// Whether its sequence must wait for the reader.
    pub(super) fn is_full(&self) -> bool {
        self.window.as_ref().is_some_and(|window| window.held.ids.len() >= window.size)
    }

    /// Sends what is held, where there is room for it.
    fn release(&mut self) -> bool {
        let Some(window) = &mut self.window else { return true };
        if window.held.is_empty() || window.unread >= window.size {
            return true;
        }
        window.unread += 1;
        let held = std::mem::take(&mut window.held);
        self.send(held)
    }

    fn send(&mut self, chunk: Chunk) -> bool {
        self.listener.as_mut().is_some_and(|listener| listener(Event::Chunk(chunk)))
    }

    /// For a request that is refused at once, by an answer of another kind.
    pub(super) fn discard(mut self) {
        self.listener = None;
    }

    pub(super) fn end(mut self, event: Event) {
        self.emit(event);
    }

    /// What is held comes before the end. A fault of whoever listens is not the engine's.
    fn emit(&mut self, event: Event) {
        let Some(mut listener) = self.listener.take() else { return };
        let held = self.window.take().map(|window| window.held).filter(|held| !held.is_empty());
        let events = held.map(Event::Chunk).into_iter().chain([event]);
        events.for_each(|event| _ = catch(|| Ok(listener(event))));
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.emit(Event::Failed(Error::Stopped));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::mpsc::channel;

    fn chunk(id: u32) -> Chunk {
        let logprobs = Logprobs { chosen: id as f32, top: vec![] };
        Chunk { ids: vec![id], text: format!("{id} "), logprobs: vec![logprobs] }
    }

    proptest! {
        /// A reader that acknowledges as it likes gets all tokens in order, and never more chunks
        /// than its window has room for.
        #[test]
        fn nothing_is_lost_and_no_window_overflows(
            size in 1usize..6,
            steps in prop::collection::vec(prop::option::of(0usize..4), 1..80),
        ) {
            let (sender, events) = channel();
            let mut sink = Sink::new(move |event| sender.send(event).is_ok()).with_window(Some(size));
            let (mut sent, mut unread) = (0, 0);
            let mut got = Chunk::default();
            let mut take = |unread: &mut usize| {
                for event in events.try_iter() {
                    let Event::Chunk(chunk) = event else { panic!("no chunk") };
                    *unread += 1;
                    got.join(chunk);
                }
            };
            for step in steps {
                match step {
                    // A sequence whose sink is full has at most one more token on its way.
                    None if sink.is_full() => {}
                    None => {
                        assert!(sink.chunk(chunk(sent)));
                        sent += 1;
                    }
                    Some(chunks) => {
                        assert!(sink.acknowledge(chunks));
                        unread -= chunks.min(unread);
                    }
                }
                take(&mut unread);
                assert!(unread <= size);
                assert!(unread == size || !sink.is_full());
            }
            sink.end(Event::Scores(vec![]));
            let mut rest: Vec<Event> = events.iter().collect();
            assert_eq!(rest.pop(), Some(Event::Scores(vec![])));
            for event in rest {
                let Event::Chunk(chunk) = event else { panic!("no chunk") };
                got.join(chunk);
            }
            let mut all = Chunk::default();
            (0..sent).for_each(|id| all.join(chunk(id)));
            prop_assert_eq!(got, all);
        }
    }

    #[test]
    fn without_a_window_every_chunk_comes_at_once() {
        let (sender, events) = channel();
        let mut sink = Sink::new(move |event| sender.send(event).is_ok());
        (0..100).for_each(|id| assert!(sink.chunk(chunk(id))));
        assert!(!sink.is_full() && events.try_iter().count() == 100);
        drop(sink);
        assert_eq!(events.iter().collect::<Vec<_>>(), [Event::Failed(Error::Stopped)]);
    }
}
