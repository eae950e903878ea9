//! A loaded model and the thread that it lives on.
//!
//! `Engine` is a handle: it sends commands and returns at once. The thread (`worker`) owns the
//! decoder, the caches and the scheduler. It ends when the handle and all generations are gone.

mod exit;
mod request;
mod score;
mod sink;
mod threads;
mod worker;

pub use request::{Prompt, Request};
pub use sink::{Event, Sink};

use crate::adapter::Adapter;
use crate::backend::Backend;
use crate::backend::cpu::{self, Cpu};
#[cfg(feature = "mlx")]
use crate::backend::mlx::{self, Mlx};
use crate::checkpoint;
use crate::config::Config;
use crate::error::{Error, Result, catch};
use crate::gauge;
use crate::scheduler::Limits;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Once, Weak};
use worker::Worker;

/// What a model runs on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Device {
    Cpu(cpu::Options),
    #[cfg(feature = "mlx")]
    Mlx(mlx::Device),
}

enum Command {
    Generate {
        id: u64,
        request: Box<Request>,
        sink: Sink,
        place: Place,
    },
    Score {
        id: u64,
        ids: Vec<u32>,
        adapter: Option<Arc<Adapter>>,
        sink: Sink,
        place: Place,
    },
    Cancel {
        id: u64,
    },
    /// An adapter is gone: so must be what is bound of it.
    Forget {
        adapter: usize,
    },
}

impl Command {
    /// A command that no engine takes: the caller learns of it at once.
    fn discard(self) {
        match self {
            Command::Generate { sink, .. } | Command::Score { sink, .. } => sink.discard(),
            Command::Cancel { .. } | Command::Forget { .. } => {}
        }
    }
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
        threads::run({
            let (folder, config, limits) = (folder.to_owned(), config.clone(), limits.clone());
            let inbox = Inbox { receiver, commands: Arc::downgrade(&commands) };
            move || serve(&folder, &config, device, limits, &ready, inbox)
        })?;
        loaded.recv().map_err(|_| Error::Stopped)??;
        let waiting = Arc::new(AtomicUsize::new(0));
        Ok(Self { commands, waiting, next_id: AtomicU64::new(0), limits, config })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Puts a request into the queue and returns; fails at once where the queue is full. The
    /// sink gets chunks and one end: `Done` or `Failed`.
    pub fn generate(&self, request: Request, sink: Sink) -> Result<Generation> {
        let request = Box::new(request);
        let checked = request.sampling.check();
        self.start(checked, sink, |id, sink, place| Command::Generate { id, request, sink, place })
    }

    /// ln p of every token but the first, given those before it: `ids.len() - 1` numbers. The
    /// sink gets one end: `Scores` or `Failed`.
    pub fn score(
        &self,
        ids: Vec<u32>,
        adapter: Option<Arc<Adapter>>,
        sink: Sink,
    ) -> Result<Generation> {
        self.start(Ok(()), sink, |id, sink, place| Command::Score { id, ids, adapter, sink, place })
    }

    /// What is refused here does not reach the sink.
    fn start(
        &self,
        checked: Result<()>,
        sink: Sink,
        command: impl FnOnce(u64, Sink, Place) -> Command,
    ) -> Result<Generation> {
        let place = match checked.and_then(|()| self.place()) {
            Ok(place) => place,
            Err(error) => {
                sink.discard();
                return Err(error);
            }
        };
        let id = self.next_id.fetch_add(1, Relaxed);
        self.commands.send(command(id, sink, place)).map_err(|unsent| {
            unsent.0.discard();
            Error::Stopped
        })?;
        Ok(Generation { id, commands: self.commands.clone() })
    }

    fn place(&self) -> Result<Place> {
        let max = self.limits.max_queue;
        let taken = self
            .waiting
            .fetch_update(Relaxed, Relaxed, |waiting| (waiting < max).then_some(waiting + 1));
        taken.map(|_| Place(self.waiting.clone())).map_err(Error::Overloaded)
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

/// The engine's life on its thread.
fn serve(
    folder: &Path,
    config: &Arc<Config>,
    device: Device,
    limits: Limits,
    ready: &Sender<Result<()>>,
    inbox: Inbox,
) {
    let loading = exit::Busy::enter();
    let work = (folder, config, limits, ready, inbox);
    let served = match device {
        Device::Cpu(options) => {
            static EXIT: Once = Once::new();
            catch(|| Cpu::new(options)).and_then(|cpu| live(cpu, work, loading, &EXIT))
        }
        #[cfg(feature = "mlx")]
        Device::Mlx(device) => {
            static EXIT: Once = Once::new();
            catch(|| Mlx::new(device)).and_then(|mlx| live(mlx, work, loading, &EXIT))
        }
    };
    if let Err(error) = served {
        _ = ready.send(Err(error));
    }
}

type Work<'a> = (&'a Path, &'a Arc<Config>, Limits, &'a Sender<Result<()>>, Inbox);

fn live<B: Backend + Clone>(
    backend: B,
    work: Work,
    loading: exit::Busy,
    at_exit: &'static Once,
) -> Result<()> {
    let (folder, config, limits, ready, inbox) = work;
    backend.clone().scope(|| {
        let decoder = catch(|| checkpoint::load(folder, config, backend))?;
        exit::register(at_exit);
        drop(loading);
        let _share = gauge::Share::one(&gauge::MODELS);
        // Nobody may wait any more; then there are no commands either.
        _ = ready.send(Ok(()));
        let mut worker = Worker::new(decoder, config.clone(), limits, inbox);
        let served = catch(|| {
            worker.run();
            Ok(())
        });
        let _busy = exit::Busy::enter();
        drop(worker);
        served
    })
}
