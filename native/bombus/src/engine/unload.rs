//! The end of a model whose handle is still held.

use super::Command;
use super::pending::Pending;
use super::sink::Event;
use crate::error::Error;

/// Is called when the model is gone, whatever became of the request for it.
pub struct Done(Option<Box<dyn FnOnce() + Send>>);

impl Done {
    pub fn new(done: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(done)))
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done();
        }
    }
}

/// Who waits for the end. Nobody, where it was not asked for.
#[derive(Default)]
pub struct Unloading(Vec<Done>);

impl Unloading {
    pub fn ask(&mut self, done: Done) {
        self.0.push(done);
    }

    pub fn is_asked(&self) -> bool {
        !self.0.is_empty()
    }

    /// Answers a command that is not obeyed any more.
    pub fn refuse(&mut self, command: Command) {
        let error = match self.is_asked() {
            true => Error::Unloaded("model"),
            false => Error::Stopped,
        };
        match command {
            Command::Generate(request, _) => request.fail(error),
            Command::Score { scoring, .. } => Pending::Score(scoring).fail(error),
            Command::Embed { texts, .. } => Pending::Texts(texts).fail(error),
            Command::Fit { sink, .. } => sink.end(Event::Failed(error)),
            Command::Unload { done, .. } => self.ask(done),
            _ => {}
        }
    }
}
