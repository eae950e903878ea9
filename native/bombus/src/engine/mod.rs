//! A loaded model and the thread that it lives on.
//!
//! `Engine` is a handle: it sends commands and returns at once. The thread (`worker`) owns the
//! decoder, the caches and the scheduler. It ends when the handle and all generations are gone.

mod worker;

use crate::adapter::Adapter;
use crate::backend::mlx::{Device, Mlx};
use crate::checkpoint;
use crate::config::Config;
use crate::error::{Error, Result, catch};
use crate::gauge;
use crate::sampler::Sampling;
use crate::scheduler::Limits;
use crate::sequence::FinishReason;
use crate::tokenizer::Tokenizer;
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Weak};
use worker::Worker;

/// What a request begins with.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// A text to be completed.
    Text(String),
    /// A conversation, and options for the chat template.
    Chat {
        messages: Value,
        options: Map<String, Value>,
    },
    Ids(Vec<u32>),
}

pub struct Request {
    pub prompt: Prompt,
    /// Without one, only ids go in and come out.
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub adapter: Option<Arc<Adapter>>,
    pub sampling: Sampling,
    pub max_new_tokens: usize,
    /// Strings that end the text, and are not part of it.
    pub stop: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// New tokens, and the text that became final with them (it may lag behind).
    Chunk { ids: Vec<u32>, text: String },
    /// The one end of a request that was answered.
    Done { reason: FinishReason, prompt_tokens: usize },
    /// The one end of a request that was not.
    Failed(Error),
}

/// Takes a request's events, on the engine's thread; false where nobody listens any more.
pub type Sink = Box<dyn FnMut(Event) -> bool + Send>;
/// Takes the answer to `score`, on the engine's thread.
pub type ScoreSink = Box<dyn FnOnce(Result<Vec<f32>>) + Send>;

enum Command {
    Generate {
        id: u64,
        request: Box<Request>,
        sink: Sink,
        place: Place,
    },
    Cancel {
        id: u64,
    },
    Score {
        ids: Vec<u32>,
        adapter: Option<Arc<Adapter>>,
        sink: ScoreSink,
    },
    /// An adapter is gone: so must be what is bound of it.
    Forget {
        adapter: usize,
    },
}

/// The worker's end of the commands.
struct Inbox {
    receiver: Receiver<Command>,
    commands: Weak<Sender<Command>>,
}

/// A place in the queue, given back when the request runs or ends.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// The engine's thread ends when no handle holds this any more.
type Commands = Arc<Sender<Command>>;

pub struct Engine {
    commands: Commands,
    waiting: Arc<AtomicUsize>,
    next_id: AtomicU64,
    limits: Limits,
    config: Arc<Config>,
}

impl Engine {
    /// Loads a checkpoint on a thread of its own and waits for it.
    pub fn load(folder: &Path, device: Device, limits: Limits) -> Result<Self> {
        let config = Arc::new(Config::open(folder)?);
        let (commands, receiver) = mpsc::channel();
        let commands = Arc::new(commands);
        let (ready, loaded) = mpsc::channel();
        let thread = {
            let (folder, config, limits) = (folder.to_owned(), config.clone(), limits.clone());
            let inbox = Inbox { receiver, commands: Arc::downgrade(&commands) };
            move || serve(&folder, &config, device, limits, &ready, inbox)
        };
        std::thread::Builder::new()
            .name("bombus-engine".into())
            .spawn(thread)
            .map_err(|error| Error::OutOfMemory(format!("no thread for the engine: {error}")))?;
        loaded.recv().map_err(|_| Error::Stopped)??;
        let waiting = Arc::new(AtomicUsize::new(0));
        Ok(Self { commands, waiting, next_id: AtomicU64::new(0), limits, config })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Puts a request into the queue and returns. Fails at once where the queue is full. The
    /// sink gets chunks and exactly one `Done` or `Failed`.
    pub fn generate(&self, request: Request, sink: Sink) -> Result<Generation> {
        request.sampling.check()?;
        let place = self.place()?;
        let id = self.next_id.fetch_add(1, Relaxed);
        self.send(Command::Generate { id, request: Box::new(request), sink, place })?;
        Ok(Generation { id, commands: self.commands.clone() })
    }

    /// ln p of every token but the first, given those before it: `ids.len() - 1` numbers.
    pub fn score(
        &self,
        ids: Vec<u32>,
        adapter: Option<Arc<Adapter>>,
        sink: ScoreSink,
    ) -> Result<()> {
        self.send(Command::Score { ids, adapter, sink })
    }

    fn place(&self) -> Result<Place> {
        let max = self.limits.max_queue;
        let taken = self
            .waiting
            .fetch_update(Relaxed, Relaxed, |waiting| (waiting < max).then_some(waiting + 1));
        taken.map(|_| Place(self.waiting.clone())).map_err(Error::Overloaded)
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|_| Error::Stopped)
    }
}

/// A request in the engine. Dropping it cancels the request.
pub struct Generation {
    id: u64,
    commands: Commands,
}

impl Generation {
    /// Frees the sequence; its sink gets `Done` with `Cancelled`, unless it has ended before.
    pub fn cancel(&self) {
        // An engine that has ended has no sequences left to cancel.
        _ = self.commands.send(Command::Cancel { id: self.id });
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.cancel();
    }
}

fn serve(
    folder: &Path,
    config: &Arc<Config>,
    device: Device,
    limits: Limits,
    ready: &Sender<Result<()>>,
    inbox: Inbox,
) {
    let served = catch(|| Mlx::new(device)).and_then(|backend| {
        backend.clone().scope(|| {
            let decoder = catch(|| checkpoint::load(folder, config, backend))?;
            let _share = gauge::Share::one(&gauge::MODELS);
            // Nobody may wait any more; then there are no commands either.
            _ = ready.send(Ok(()));
            Worker::new(decoder, config.clone(), limits, inbox).run();
            Ok(())
        })
    });
    if let Err(error) = served {
        _ = ready.send(Err(error));
    }
}
