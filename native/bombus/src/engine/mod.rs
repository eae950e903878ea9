//! A loaded model and the thread that it lives on.
//!
//! `Engine` is a handle: it sends commands and returns at once. A text becomes token ids on a thread
//! of its own; the engine's thread (`worker`) owns the decoder, the caches and the scheduler. It
//! ends when the handle and all generations are gone.

mod exit;
mod live;
mod monitor;
mod prefix;
mod queue;
mod request;
mod score;
mod sink;
mod threads;
mod worker;

pub use monitor::{Monitor, Step};
pub use queue::Group;
pub use request::{Prompt, Request};
pub use sink::{Event, Sink, Usage};
pub use threads::on_thread;

use crate::adapter::Adapter;
use crate::backend::Backend;
use crate::backend::cpu::{self, Cpu};
#[cfg(feature = "mlx")]
use crate::backend::mlx::{self, Mlx};
use crate::checkpoint;
use crate::config::{Config, Quantization};
use crate::convert;
use crate::error::{Error, Result, catch};
use crate::gauge;
use crate::scheduler::Limits;
use crate::sequence::Task;
use crate::tokenizer::TextStream;
use queue::{Place, Queue};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Once, Weak};
use std::time::Instant;
use worker::Worker;

/// What a model runs on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Device {
    Cpu(cpu::Options),
    #[cfg(feature = "mlx")]
    Mlx(mlx::Device),
}

impl Device {
    /// The prompt tokens of a step that make prefill about as fast as it gets: what is more only
    /// holds up those who generate.
    pub fn prefill_chunk(&self) -> usize {
        match self {
            // Measured: bench/README.md
            Device::Cpu(_) => 64,
            #[cfg(feature = "mlx")]
            Device::Mlx(device) if device.is_cuda() => 2048,
            #[cfg(feature = "mlx")]
            Device::Mlx(_) => 512,
        }
    }
}

/// What a test can make of the next step.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Panic,
    Error,
}

enum Command {
    Generate(Box<Order>, Task),
    Score {
        id: u64,
        ids: Vec<u32>,
        adapter: Option<Arc<Adapter>>,
        sink: Sink,
        places: Vec<Place>,
    },
    /// Whether an adapter fits the model.
    Fit {
        adapter: Arc<Adapter>,
        sink: Sink,
    },
    Cancel {
        id: u64,
    },
    /// An adapter is gone: so must be what is bound of it.
    Forget {
        adapter: usize,
    },
    Watch(Monitor),
    Fail(Fault),
}

/// A request on its way to the engine's thread.
struct Order {
    id: u64,
    adapter: Option<Arc<Adapter>>,
    text: Option<TextStream>,
    sink: Sink,
    places: Vec<Place>,
    asked: Instant,
    cancelled: Arc<AtomicBool>,
}

impl Order {
    /// Whoever hears of the end has the places back.
    fn fail(self, error: Error) {
        drop(self.places);
        self.sink.end(Event::Failed(error));
    }
}

impl Command {
    /// A command that no engine takes: the caller learns of it at once.
    fn discard(self) {
        match self {
            Command::Generate(order, _) => order.sink.discard(),
            Command::Score { sink, .. } | Command::Fit { sink, .. } => sink.discard(),
            _ => {}
        }
    }
}

/// The worker's end of the commands.
struct Inbox {
    receiver: Receiver<Command>,
    commands: Weak<Sender<Command>>,
    /// How many sequences run together, for those who ask.
    batch_size: Arc<AtomicUsize>,
}

/// The engine's thread ends when no handle holds this any more.
type Commands = Arc<Sender<Command>>;

type Job = Box<dyn FnOnce() + Send>;

pub struct Engine {
    commands: Commands,
    encoder: Sender<Job>,
    queue: Queue,
    batch_size: Arc<AtomicUsize>,
    next_id: AtomicU64,
    config: Arc<Config>,
    context: usize,
    source: (PathBuf, Option<Quantization>),
}

impl Engine {
    /// Loads a checkpoint on a thread of its own and waits for it.
    pub fn load(folder: &Path, device: Device, limits: Limits) -> Result<Self> {
        Self::load_quantized(folder, None, device, limits)
    }

    /// The same; a dense checkpoint is quantized on the way where there is a `layout`.
    pub fn load_quantized(
        folder: &Path,
        layout: Option<Quantization>,
        device: Device,
        limits: Limits,
    ) -> Result<Self> {
        if limits.max_batch_size == 0 || limits.prefill_chunk == 0 {
            return Err(Error::Request("expected a max_batch_size and a prefill_chunk".into()));
        }
        let config = Arc::new(Config::open(folder)?);
        let queue = Queue::new(&limits);
        let longest = config.max_position_embeddings;
        let context = limits.max_context.map_or(longest, |max| max.min(longest));
        let encoder = encoder()?;
        let (commands, receiver) = mpsc::channel();
        let commands = Arc::new(commands);
        let batch_size = Arc::<AtomicUsize>::default();
        let (ready, loaded) = mpsc::channel();
        threads::run({
            let (folder, config) = (folder.to_owned(), config.clone());
            let (commands, batch_size) = (Arc::downgrade(&commands), batch_size.clone());
            let inbox = Inbox { receiver, commands, batch_size };
            move || serve((&folder, layout), &config, device, limits, &ready, inbox)
        })?;
        loaded.recv().map_err(|_| Error::Stopped)??;
        let source = (folder.to_owned(), layout);
        let next_id = AtomicU64::new(0);
        Ok(Self { commands, encoder, queue, batch_size, next_id, config, context, source })
    }

    /// Writes the checkpoint that was loaded to another folder, quantized where loading did that.
    pub fn save(&self, to: &Path) -> Result<()> {
        let (from, layout) = &self.source;
        convert::save(from, &self.config, *layout, to)
    }

    /// How the layers are quantized that `config` says nothing of.
    pub fn quantization(&self) -> Option<Quantization> {
        self.config.quantization.or(self.source.1)
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What a sequence may have of tokens, prompt and all.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Puts a request into the queue and returns; fails at once where the queue is full, or where
    /// what is wrong shows without a tokenizer. Else the sink gets chunks and one end: `Done` or
    /// `Failed`, on another thread than the caller's.
    pub fn generate(&self, request: Request, sink: Sink) -> Result<Generation> {
        let asked = Instant::now();
        let known = matches!(request.prompt, Prompt::Ids(_));
        let checked = request.sampling.check().and_then(|()| match known {
            true => request.task(&self.config, self.context).map(Some),
            false => Ok(None),
        });
        let places = checked.and_then(|task| Ok((task, self.places(request.group.as_deref())?)));
        let ((task, places), sink) = admitted(places, sink)?;
        let generation = self.generation();
        let order = Order {
            id: generation.id,
            adapter: request.adapter.clone(),
            text: request.tokenizer.clone().map(|it| TextStream::new(it, request.stop.clone())),
            sink,
            places,
            asked,
            cancelled: generation.cancelled.clone(),
        };
        match task {
            Some(task) => self.send(Command::Generate(Box::new(order), task))?,
            None => self.encode(request, order)?,
        }
        Ok(generation)
    }

    /// Makes token ids of a text, and sends it on; its sink hears of what goes wrong.
    fn encode(&self, request: Request, order: Order) -> Result<()> {
        let (commands, config, context) =
            (self.commands.clone(), self.config.clone(), self.context);
        let job = move || match catch(|| request.task(&config, context)) {
            // An engine that is gone drops the order, whose sink then says so.
            Ok(task) => _ = commands.send(Command::Generate(Box::new(order), task)),
            Err(error) => order.fail(error),
        };
        self.encoder.send(Box::new(job)).map_err(|_| Error::Stopped)
    }

    /// ln p of every token but the first, given those before it: `ids.len() - 1` numbers. The
    /// sink gets one end: `Scores` or `Failed`.
    pub fn score(
        &self,
        ids: Vec<u32>,
        adapter: Option<Arc<Adapter>>,
        sink: Sink,
    ) -> Result<Generation> {
        let (places, sink) = admitted(self.places(None), sink)?;
        let generation = self.generation();
        let id = generation.id;
        self.send(Command::Score { id, ids, adapter, sink, places })?;
        Ok(generation)
    }

    /// Binds an adapter, to see whether it fits the model. The sink gets one end: `Fits` or `Failed`.
    pub fn fit(&self, adapter: Arc<Adapter>, sink: Sink) -> Result<()> {
        self.send(Command::Fit { adapter, sink })
    }

    /// How many requests run together, and how many more wait.
    pub fn requests(&self) -> (usize, usize) {
        let running = self.batch_size.load(Relaxed);
        (running, self.queue.taken().saturating_sub(running))
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|unsent| {
            unsent.0.discard();
            Error::Stopped
        })
    }

    /// After every step, `monitor` hears of it.
    pub fn watch(&self, monitor: Monitor) {
        _ = self.commands.send(Command::Watch(monitor));
    }

    /// For tests: the next step fails.
    #[doc(hidden)]
    pub fn fail_next_step(&self, fault: Fault) {
        _ = self.commands.send(Command::Fail(fault));
    }

    fn generation(&self) -> Generation {
        let id = self.next_id.fetch_add(1, Relaxed);
        Generation { id, commands: self.commands.clone(), cancelled: Arc::default() }
    }

    fn places(&self, group: Option<&Group>) -> Result<Vec<Place>> {
        let own = group.map(Group::place).transpose()?;
        Ok(own.into_iter().chain([self.queue.place()?]).collect())
    }
}

/// What is refused at once does not reach the sink.
fn admitted<T>(places: Result<T>, sink: Sink) -> Result<(T, Sink)> {
    match places {
        Ok(places) => Ok((places, sink)),
        Err(error) => {
            sink.discard();
            Err(error)
        }
    }
}

/// A thread for what would hold up a step: a long text takes milliseconds to become token ids. It
/// ends with the engine's handle.
fn encoder() -> Result<Sender<Job>> {
    let (jobs, todo) = mpsc::channel::<Job>();
    let work = move || todo.into_iter().for_each(|job| job());
    let thread = std::thread::Builder::new().name("bombus-encode".into()).spawn(work);
    thread.map_err(|error| Error::OutOfMemory(format!("no thread for texts: {error}")))?;
    Ok(jobs)
}

/// A request in the engine. Dropping it cancels the request.
pub struct Generation {
    id: u64,
    commands: Commands,
    /// For the case that it has not reached the engine's thread yet.
    cancelled: Arc<AtomicBool>,
}

impl Generation {
    /// Frees the sequence; its sink gets `Done` with `Cancelled`, unless it has ended before.
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
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
    source: Source,
    config: &Arc<Config>,
    device: Device,
    limits: Limits,
    ready: &Sender<Result<()>>,
    inbox: Inbox,
) {
    let loading = exit::Busy::enter();
    let work = (source, config, limits, ready, inbox);
    let served = match device {
        Device::Cpu(options) => {
            static EXIT: Once = Once::new();
            catch(|| Cpu::new(options)).and_then(|cpu| live(cpu, work, loading, &EXIT))
        }
        #[cfg(feature = "mlx")]
        Device::Mlx(device) => {
            static EXIT: Once = Once::new();
            if device.is_cuda() {
                exit::expect_compilation();
            }
            catch(|| Mlx::new(device)).and_then(|mlx| live(mlx, work, loading, &EXIT))
        }
    };
    if let Err(error) = served {
        _ = ready.send(Err(error));
    }
}

type Source<'a> = (&'a Path, Option<Quantization>);
type Work<'a> = (Source<'a>, &'a Arc<Config>, Limits, &'a Sender<Result<()>>, Inbox);

fn live<B: Backend + Clone>(
    backend: B,
    work: Work,
    loading: exit::Busy,
    at_exit: &'static Once,
) -> Result<()> {
    let ((folder, layout), config, limits, ready, inbox) = work;
    let own = backend.clone();
    let (served, _busy) = own.scope(|| {
        let decoder = catch(|| checkpoint::load(folder, config, layout, backend));
        own.finish();
        let decoder = decoder?;
        exit::register(at_exit);
        drop(loading);
        let _share = gauge::Share::one(&gauge::MODELS);
        // Nobody may wait any more; then there are no commands either.
        _ = ready.send(Ok(()));
        let mut worker = Worker::new(decoder, config.clone(), &limits, inbox);
        let served = catch(|| {
            worker.run();
            Ok(())
        });
        let busy = exit::Busy::enter();
        drop(worker);
        own.finish();
        Ok::<_, Error>((served, busy))
    })?;
    // The process waits for this too.
    drop(own);
    served
}
