//! A loaded model and the thread that it lives on.
//!
//! `Engine` is a handle: it sends commands and returns at once. A text becomes token ids on threads
//! for texts; the engine's thread (`worker`) owns the decoder, the caches and the scheduler. It
//! ends when the handle and all generations are gone.

mod active;
mod admission;
mod bindings;
mod deadlines;
mod embed;
mod masks;
mod monitor;
mod pending;
mod prefix_cache;
mod request;
pub mod scheduler;
mod score;
pub mod sequence;
mod sink;
mod steps;
mod unload;
mod worker;

pub use admission::Group;
pub use embed::{EmbedRequest, Pooling, Wanted};
pub use monitor::{Monitor, Step};
pub use request::{Prompt, Request, chat};
pub use sink::{Chunk, Event, Sink, Usage};

use crate::backend::cpu::Cpu;
#[cfg(feature = "mlx")]
use crate::backend::mlx::Mlx;
use crate::backend::{Backend, Device};
use crate::config::Config;
use crate::engine::scheduler::Limits;
use crate::engine::sequence::Task;
use crate::error::{Error, Result, catch, catch_in};
use crate::model::adapter::Adapter;
use crate::model::convert;
use crate::model::decoder::Decoder;
#[cfg(feature = "mlx")]
use crate::model::executor::CudaExecutor;
use crate::model::executor::Executor;
use crate::model::weights;
use crate::runtime::abandon::Abandoned;
use crate::runtime::{exit, metrics, threads};
use crate::spec::Quantization;
use crate::tokenizer::{TextStream, workers};
use admission::{AdmissionLimit, Permit};
use embed::PendingTexts;
use pending::Scoring;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Once, Weak};
use std::time::{Duration, Instant};
use unload::Done;
use worker::Worker;

/// What a test can make of the next step.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Panic,
    Error,
}

enum Command {
    /// Without a task where its text is still to become tokens: then `Encoded` follows.
    Generate(Box<PendingRequest>, Option<Task>),
    Encoded {
        id: u64,
        task: Result<(Task, Option<TextStream>)>,
    },
    Score {
        id: u64,
        scoring: Scoring,
        deadline: Option<Instant>,
    },
    /// `EncodedTexts` follows.
    Embed {
        id: u64,
        texts: Box<PendingTexts>,
        deadline: Option<Instant>,
    },
    EncodedTexts {
        id: u64,
        ids: Result<Vec<Vec<u32>>>,
    },
    /// Whether an adapter fits the model.
    Fit {
        id: u64,
        adapter: Arc<Adapter>,
        sink: Sink,
    },
    Cancel {
        id: u64,
    },
    /// A reader has taken so many chunks.
    Acknowledge {
        id: u64,
        chunks: usize,
    },
    /// An adapter is gone: so must be what is bound of it.
    Forget {
        adapter: usize,
    },
    /// Requests with an adapter are to end.
    CancelWith {
        adapter: usize,
    },
    Watch(Monitor),
    Fail(Fault),
    Unload {
        cancel: bool,
        done: Done,
    },
}

/// A request on its way to the engine's thread.
struct PendingRequest {
    id: u64,
    adapter: Option<Arc<Adapter>>,
    text: Option<TextStream>,
    sink: Sink,
    permits: Vec<Permit>,
    asked: Instant,
    deadline: Option<Instant>,
    /// Set when the request has ended, so that its text is not encoded.
    cancelled: Arc<AtomicBool>,
}

impl PendingRequest {
    /// Whoever hears of the end has the permits back.
    fn fail(self, error: Error) {
        drop(self.permits);
        self.sink.end(Event::Failed(error));
    }
}

impl Command {
    /// A command that no engine takes: the caller learns of it at once.
    fn discard(self) {
        match self {
            Command::Generate(request, _) => request.sink.discard(),
            Command::Score { scoring, .. } => scoring.sink.discard(),
            Command::Embed { texts, .. } => texts.sink.discard(),
            Command::Fit { sink, .. } => sink.discard(),
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

pub struct Engine {
    commands: Commands,
    unloaded: AtomicBool,
    admission: AdmissionLimit,
    batch_size: Arc<AtomicUsize>,
    next_id: AtomicU64,
    config: Arc<Config>,
    context: usize,
    source: (PathBuf, Option<Quantization>),
    fallback: Fallback,
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
        let config = Arc::new(weights::open(folder)?.0);
        let admission = AdmissionLimit::new(&limits);
        let longest = config.spec.context;
        let context = limits.max_context.map_or(longest, |max| max.min(longest));
        let (commands, receiver) = mpsc::channel();
        let commands = Arc::new(commands);
        let batch_size = Arc::<AtomicUsize>::default();
        let (ready, loaded) = mpsc::channel();
        threads::run({
            let (folder, config) = (folder.to_owned(), config.clone());
            let (commands, batch_size) = (Arc::downgrade(&commands), batch_size.clone());
            let inbox = Inbox { receiver, commands, batch_size };
            let (abandoned, limits) = (Abandoned::current(), (limits, context));
            let serve = move || serve((&folder, layout), &config, device, limits, &ready, inbox);
            move || abandoned.scope(serve)
        })?;
        let fallback = loaded.recv().map_err(|_| Error::Stopped)??;
        let source = (folder.to_owned(), layout);
        let next_id = AtomicU64::new(0);
        let unloaded = AtomicBool::new(false);
        Ok(Self {
            commands,
            unloaded,
            admission,
            batch_size,
            next_id,
            config,
            context,
            source,
            fallback,
        })
    }

    /// Writes the checkpoint that was loaded to another folder, quantized where loading did that.
    /// `overwrite`: a model that is there goes
    pub fn save(&self, to: &Path, overwrite: bool) -> Result<()> {
        self.check_loaded()?;
        let (from, layout) = &self.source;
        let (config, tensors) = weights::open(from)?;
        convert::save(from, (&config, &tensors), *layout, to, overwrite)
    }

    /// How the layers are quantized that `config` says nothing of.
    pub fn quantization(&self) -> Option<Quantization> {
        self.config.quantization.or(self.source.1)
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Why steps go layer by layer on a device that has a faster way for other models.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
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
        let cancelled = Arc::<AtomicBool>::default();
        let checked = request.sampling.check().and_then(|()| match known {
            true => request.task(&self.config, self.context, &cancelled).map(Some),
            false => Ok(None),
        });
        let permits = checked.and_then(|task| Ok((task, self.permits(request.group.as_deref())?)));
        let ((task, permits), sink) = admitted(permits, sink)?;
        let generation = self.generation();
        let pending = PendingRequest {
            id: generation.id,
            adapter: request.adapter.clone(),
            text: None,
            sink,
            permits,
            asked,
            deadline: deadline(asked, request.timeout),
            cancelled: cancelled.clone(),
        };
        // The engine knows of it before its text is tokens: it may be cancelled, or take too long.
        if known && request.tokenizer.is_none() {
            self.send(Command::Generate(Box::new(pending), task))?;
        } else {
            self.send(Command::Generate(Box::new(pending), None))?;
            self.encode(generation.id, request, task, cancelled);
        }
        Ok(generation)
    }

    /// Makes token ids of a text, where they are not given, and sends them on.
    fn encode(&self, id: u64, request: Request, task: Option<Task>, cancelled: Arc<AtomicBool>) {
        let (commands, config, context) =
            (self.commands.clone(), self.config.clone(), self.context);
        let bytes = request.prompt.bytes();
        let job = move || {
            if cancelled.load(Relaxed) {
                return;
            }
            let task = catch(|| {
                let made = task.map_or_else(|| request.task(&config, context, &cancelled), Ok)?;
                let text = request.text(&made.prompt);
                Ok((made, text))
            });
            // An engine that is gone has ended the request.
            _ = commands.send(Command::Encoded { id, task });
        };
        let owner = Arc::as_ptr(&self.config) as usize >> 4;
        if let Err(error) = workers::run(owner, bytes, job) {
            _ = self.commands.send(Command::Encoded { id, task: Err(error) });
        }
    }

    /// ln p of every token but the first, given those before it: `ids.len() - 1` numbers. The
    /// sink gets one end: `Scores` or `Failed`.
    pub fn score(
        &self,
        ids: Vec<u32>,
        adapter: Option<Arc<Adapter>>,
        timeout: Option<Duration>,
        sink: Sink,
    ) -> Result<Generation> {
        let deadline = deadline(Instant::now(), timeout);
        let (permits, sink) = admitted(self.permits(None), sink)?;
        let generation = self.generation();
        let id = generation.id;
        let scoring = Scoring { ids, adapter, sink, permits };
        self.send(Command::Score { id, scoring, deadline })?;
        Ok(generation)
    }

    /// Binds an adapter, to see whether it fits the model. The sink gets one end: `Fits` or `Failed`.
    pub fn fit(&self, adapter: Arc<Adapter>, sink: Sink) -> Result<()> {
        let id = self.next_id.fetch_add(1, Relaxed);
        self.send(Command::Fit { id, adapter, sink })
    }

    /// How many requests run together, and how many more wait.
    pub fn requests(&self) -> (usize, usize) {
        let running = self.batch_size.load(Relaxed);
        (running, self.admission.taken().saturating_sub(running))
    }

    /// Frees the model, though its handle is held: requests that run or wait end first, or are
    /// cancelled; new ones are refused. `done` is called when all is given back.
    pub fn unload(&self, cancel: bool, done: impl FnOnce() + Send + 'static) {
        self.unloaded.store(true, Relaxed);
        // An engine that is gone drops the command, which says that it is done.
        _ = self.commands.send(Command::Unload { cancel, done: Done::new(done) });
    }

    /// Fails where the model was unloaded, or is about to be.
    pub fn check_loaded(&self) -> Result<()> {
        match self.unloaded.load(Relaxed) {
            true => Err(Error::Unloaded("model")),
            false => Ok(()),
        }
    }

    /// Why there is no engine.
    fn gone(&self) -> Error {
        self.check_loaded().err().unwrap_or(Error::Stopped)
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|unsent| {
            unsent.0.discard();
            self.gone()
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
        Generation { id, commands: self.commands.clone() }
    }

    fn permits(&self, group: Option<&Group>) -> Result<Vec<Permit>> {
        self.check_loaded()?;
        let own = group.map(Group::permit).transpose()?;
        Ok(own.into_iter().chain([self.admission.permit()?]).collect())
    }
}

fn deadline(asked: Instant, timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| asked.checked_add(timeout))
}

/// What is refused at once does not reach the sink.
fn admitted<T>(permits: Result<T>, sink: Sink) -> Result<(T, Sink)> {
    match permits {
        Ok(permits) => Ok((permits, sink)),
        Err(error) => {
            sink.discard();
            Err(error)
        }
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

    /// Of a request with a window: its reader has taken so many chunks.
    pub fn acknowledge(&self, chunks: usize) {
        _ = self.commands.send(Command::Acknowledge { id: self.id, chunks });
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
    limits: (Limits, usize),
    ready: &Sender<Result<Fallback>>,
    inbox: Inbox,
) {
    let loading = exit::BusyGuard::enter();
    let work = (source, config, limits, ready, inbox);
    let served = match device {
        Device::Cpu(options) => {
            static EXIT: Once = Once::new();
            catch(|| Cpu::new(options)).and_then(|cpu| run_model(cpu, Ok, work, loading, &EXIT))
        }
        #[cfg(feature = "mlx")]
        Device::Mlx(device) => {
            static EXIT: Once = Once::new();
            catch(|| Mlx::new(device)).and_then(|mlx| match device.is_cuda() {
                true => {
                    exit::expect_compilation();
                    run_model(mlx, CudaExecutor::new, work, loading, &EXIT)
                }
                false => run_model(mlx, Ok, work, loading, &EXIT),
            })
        }
    };
    if let Err(error) = served {
        _ = ready.send(Err(error));
    }
}

/// Why steps take the slower way, where that is so.
type Fallback = Option<String>;
type Source<'a> = (&'a Path, Option<Quantization>);
/// Beside the limits, the context.
type Work<'a> = (Source<'a>, &'a Arc<Config>, (Limits, usize), &'a Sender<Result<Fallback>>, Inbox);

fn run_model<B: Backend + Clone, E: Executor<Backend = B>>(
    backend: B,
    executor: impl FnOnce(Decoder<B>) -> Result<E>,
    work: Work,
    loading: exit::BusyGuard,
    at_exit: &'static Once,
) -> Result<()> {
    let ((folder, layout), config, (limits, context), ready, inbox) = work;
    let own = backend.clone();
    let (served, _busy, unloaded) = own.scope(|| {
        let loading_it = format!("loading `{}`", folder.display());
        let executor = catch_in(&loading_it, || {
            weights::load(folder, config, layout, backend).and_then(executor)
        });
        own.finish();
        let executor = executor?;
        let fallback = executor.fallback().map(str::to_owned);
        exit::register(at_exit);
        drop(loading);
        let share = metrics::Share::one(&metrics::MODELS);
        // Nobody may wait any more; then there are no commands either.
        _ = ready.send(Ok(fallback));
        let mut worker = Worker::new(executor, config.clone(), context, &limits, inbox);
        let served = catch(|| {
            worker.run();
            Ok(())
        });
        let busy = exit::BusyGuard::enter();
        let unloaded = worker.end();
        own.finish();
        drop(share);
        Ok::<_, Error>((served, busy, unloaded))
    })?;
    // The process waits for this too.
    drop(own);
    drop(unloaded);
    served
}
