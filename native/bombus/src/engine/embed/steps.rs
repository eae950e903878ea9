//! Steps of texts, on the engine's thread: the next is submitted before the last is read, where the
//! backend can do that.

use super::Wanted;
use super::reading::{Part, Reading, TakenPart};
use crate::backend::{Backend, Batch};
use crate::engine::sink::Event;
use crate::engine::worker::Worker;
use crate::error::{Error, Result, catch};
use crate::model::executor::Executor;

/// A step that has been submitted and not read.
pub struct TextStep<B: Backend> {
    parts: Vec<TakenPart>,
    output: Output<B>,
}

enum Output<B: Backend> {
    /// `[outputs, hidden]`
    Hidden(B::Tensor),
    /// `[outputs]`
    Probabilities(Vec<f32>),
}

impl<E: Executor> Worker<E> {
    pub(in crate::engine) fn advance_texts(&mut self) {
        let next = self.submit_texts();
        if let Some(step) = std::mem::replace(&mut self.text_step, next) {
            self.read_texts(step);
        }
        if !E::Backend::ASYNC
            && let Some(step) = self.text_step.take()
        {
            self.read_texts(step);
        }
    }

    fn submit_texts(&mut self) -> Option<TextStep<E::Backend>> {
        let mut parts = self.texts.plan(self.prefill_chunk, || self.executor.cache());
        parts.retain_mut(|part| match catch(|| self.make_room_for_text(part)) {
            Ok(()) => true,
            Err(error) => {
                self.finish(part.request, Err(error));
                false
            }
        });
        if parts.is_empty() {
            return None;
        }
        let output = catch(|| self.read_rows(&mut parts));
        // A text that is submitted to its end needs no cache any more.
        let parts = parts.into_iter().map(|part| self.texts.submitted(part)).collect();
        match output {
            Ok(output) => Some(TextStep { parts, output }),
            Err(error) => {
                self.fail_texts(parts, &error);
                None
            }
        }
    }

    fn make_room_for_text(&mut self, part: &mut Part<E::Backend>) -> Result<()> {
        self.with_memory(|worker| {
            worker.executor.decoder().reserve(&mut part.cache, part.positions.clone())
        })
    }

    /// All of one kind.
    fn read_rows(&mut self, parts: &mut [Part<E::Backend>]) -> Result<Output<E::Backend>> {
        let mut batch = Batch::default();
        let wanted = parts[0].wanted;
        for part in parts {
            let outputs: Vec<usize> = part.outputs().collect();
            let adapter = part.adapter.as_ref().map(|(_, bound)| bound.as_ref());
            batch.push(&part.tokens, part.positions.start, &outputs, &mut part.cache, adapter);
        }
        self.fail_if_asked()?;
        let decoder = self.executor.decoder();
        let _guard = self.executor.guard();
        match wanted {
            Wanted::Embedding { .. } => {
                let hidden = decoder.hidden(&mut batch)?;
                Ok(Output::Hidden(decoder.backend.start(hidden)?))
            }
            Wanted::Judgement { yes, no } => {
                let logits = decoder.forward(&mut batch, None)?;
                let log_probs = |id: u32| {
                    let targets = vec![id; batch.outputs.len()];
                    decoder.backend.log_probs(&logits, &targets)
                };
                let pairs = log_probs(yes)?.into_iter().zip(log_probs(no)?);
                // The softmax of two logits.
                let probability = |(yes, no): (f32, f32)| 1.0 / (1.0 + (no - yes).exp());
                Ok(Output::Probabilities(pairs.map(probability).collect()))
            }
        }
    }

    fn read_texts(&mut self, step: TextStep<E::Backend>) {
        let TextStep { parts, output } = step;
        let numbers = match output {
            Output::Hidden(hidden) => catch(|| self.executor.decoder().backend.values(&hidden)),
            Output::Probabilities(numbers) => Ok(numbers),
        };
        let numbers = match numbers {
            Ok(numbers) => numbers,
            Err(error) => return self.fail_texts(parts, &error),
        };
        let outputs: usize = parts.iter().map(|part| part.outputs).sum();
        let width = numbers.len() / outputs.max(1);
        let mut first = 0;
        for part in parts {
            let own = &numbers[first * width..][..part.outputs * width];
            first += part.outputs;
            match self.texts.take(&part, own) {
                Ok(false) => {}
                Ok(true) => self.answer_texts(part.request),
                Err(error) => self.finish(part.request, Err(error)),
            }
        }
        self.count_now_and_then();
    }

    fn fail_texts(&mut self, parts: Vec<TakenPart>, error: &Error) {
        parts.into_iter().for_each(|part| self.finish(part.request, Err(error.clone())));
    }

    /// Whoever hears of the end finds everything given back.
    pub(in crate::engine) fn finish_texts(&mut self, request: Reading<E::Backend>, end: Event) {
        self.deadlines.remove(request.id);
        let sink = request.end();
        self.count();
        sink.end(end);
    }

    fn answer_texts(&mut self, id: u64) {
        if let Some(mut request) = self.texts.remove(id) {
            let answer = request.answer();
            self.finish_texts(request, answer);
        }
    }
}
