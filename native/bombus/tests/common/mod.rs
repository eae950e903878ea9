//! The fixtures, and an engine that a test can wait for.
#![allow(dead_code)]

use bombus::backend::Device;
use bombus::backend::cpu::{Level, Options};
use bombus::engine::scheduler::Limits;
use bombus::engine::sequence::FinishReason;
use bombus::engine::{
    EmbedRequest, Engine, Event, Generation, Pooling, Prompt, Request, Sink, Usage, Wanted,
};
use bombus::error::{Error, Result};
use bombus::files::safetensors::{NewTensor, TensorFile, write};
use bombus::model::adapter::Adapter;
use bombus::sampler::Logprobs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub fn repository() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

pub fn parity(case: &str) -> PathBuf {
    repository().join("test/fixtures/parity").join(case)
}

/// Where the tests of the engine run: the CPU backend, and MLX's CPU device where it is built in;
/// on a machine with a GPU, BOMBUS_TEST_DEVICE=gpu is that instead.
pub fn devices() -> Vec<Device> {
    #[cfg(feature = "mlx")]
    {
        use bombus::backend::mlx;
        if std::env::var("BOMBUS_TEST_DEVICE").as_deref() == Ok("gpu") {
            return vec![Device::Mlx(mlx::Device::Gpu)];
        }
        vec![Device::Cpu(Options::default()), Device::Mlx(mlx::Device::Cpu)]
    }
    #[cfg(not(feature = "mlx"))]
    vec![Device::Cpu(Options::default())]
}

/// Those, and every instruction set that the CPU backend can use here.
pub fn all_devices() -> Vec<Device> {
    let mut devices = devices();
    if devices.contains(&Device::Cpu(Options::default())) {
        devices.retain(|device| !matches!(device, Device::Cpu(_)));
        let options = |level| Options { level, ..Options::default() };
        devices.extend(Level::all().into_iter().map(|level| Device::Cpu(options(level))));
    }
    devices
}

/// A model that goes on to the end of its context of 512 tokens.
pub const ENDLESS: &str = "f32-untied";

/// For tests that read the process's gauges.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn on_every_device(test: impl Fn(Device)) {
    let _alone = alone();
    devices().into_iter().for_each(test);
}

pub fn load_with(device: Device, limits: Limits) -> Engine {
    Engine::load(&parity(ENDLESS), device, limits).unwrap()
}

pub fn load_on(device: Device, case: &str) -> Engine {
    Engine::load(&parity(case), device, Limits::default()).unwrap()
}

pub fn adapter(case: &str, name: &str) -> Arc<Adapter> {
    Arc::new(Adapter::open(&parity(case).join("adapters").join(name), None).unwrap())
}

pub fn ids_request(ids: &[u32], max_new_tokens: usize) -> Request {
    Request::new(Prompt::Ids(ids.to_vec()), max_new_tokens)
}

pub struct Running {
    pub generation: Generation,
    pub events: Receiver<Event>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub ids: Vec<u32>,
    pub text: String,
    pub reason: FinishReason,
}

pub fn start(engine: &Engine, request: Request) -> Result<Running> {
    let (sender, events) = channel();
    let sink = Sink::new(move |event| sender.send(event).is_ok());
    Ok(Running { generation: engine.generate(request, sink)?, events })
}

impl Running {
    pub fn wait(self) -> Result<Answer> {
        Ok(self.wait_for_all()?.0)
    }

    pub fn wait_for_all(self) -> Result<(Answer, Usage, Vec<Logprobs>)> {
        let (mut ids, mut text, mut all) = (vec![], String::new(), vec![]);
        for event in self.events.iter() {
            match event {
                Event::Chunk(chunk) => {
                    ids.extend(chunk.ids);
                    text.push_str(&chunk.text);
                    all.extend(chunk.logprobs);
                }
                Event::Failed(error) => return Err(error),
                Event::Done { reason, usage } => {
                    return Ok((Answer { ids, text, reason }, usage, all));
                }
                other => panic!("{other:?} of a request for text"),
            }
        }
        Err(Error::Stopped)
    }
}

pub fn generate(engine: &Engine, request: Request) -> Result<Answer> {
    start(engine, request)?.wait()
}

pub fn start_score(engine: &Engine, ids: &[u32], adapter: Option<Arc<Adapter>>) -> Result<Running> {
    let (sender, events) = channel();
    let sink = Sink::new(move |event| sender.send(event).is_ok());
    Ok(Running { generation: engine.score(ids.to_vec(), adapter, None, sink)?, events })
}

pub fn score(engine: &Engine, ids: &[u32], adapter: Option<Arc<Adapter>>) -> Result<Vec<f32>> {
    match start_score(engine, ids, adapter)?.events.recv() {
        Ok(Event::Scores(scores)) => Ok(scores),
        Ok(Event::Failed(error)) => Err(error),
        other => panic!("{other:?} for a score"),
    }
}

pub const LAST: Wanted =
    Wanted::Embedding { pooling: Pooling::Last, normalize: false, dimensions: None };
pub const MEAN: Wanted =
    Wanted::Embedding { pooling: Pooling::Mean, normalize: false, dimensions: None };

pub fn texts_request(texts: &[Vec<u32>], wanted: Wanted) -> EmbedRequest {
    let texts = texts.iter().cloned().map(Prompt::Ids).collect();
    EmbedRequest { texts, tokenizer: None, adapter: None, wanted, timeout: None }
}

pub fn start_embed(engine: &Engine, request: EmbedRequest) -> Result<Running> {
    let (sender, events) = channel();
    let sink = Sink::new(move |event| sender.send(event).is_ok());
    Ok(Running { generation: engine.embed(request, sink)?, events })
}

/// A vector for each text; of judgements one number each.
pub fn vectors(running: &Running) -> Result<Vec<Vec<f32>>> {
    match running.events.recv() {
        Ok(Event::Embeddings(vectors)) => Ok(vectors),
        Ok(Event::Scores(scores)) => Ok(scores.into_iter().map(|score| vec![score]).collect()),
        Ok(Event::Failed(error)) => Err(error),
        other => panic!("{other:?} for texts"),
    }
}

pub fn embed(engine: &Engine, texts: &[Vec<u32>], wanted: Wanted) -> Result<Vec<Vec<f32>>> {
    vectors(&start_embed(engine, texts_request(texts, wanted))?)
}

/// A case's checkpoint with other names of its tensors (`None` leaves one out), and more of them.
pub fn renamed(case: &str, to: &Path, name: impl Fn(&str) -> Option<String>, more: &[&str]) {
    let file = TensorFile::open(&parity(case).join("model.safetensors")).unwrap();
    let names = file.names();
    let read = |own: &String| {
        let view = file.tensor(own).unwrap();
        Some((name(own)?, view.dtype.to_string(), view.shape.to_vec(), view.read().unwrap()))
    };
    let mut tensors: Vec<_> = names.iter().filter_map(read).collect();
    let other = |name: &&str| ((*name).to_owned(), "F32".to_owned(), vec![2], vec![0; 8]);
    tensors.extend(more.iter().map(other));
    let tensors = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| NewTensor::new(name, dtype, shape, bytes).unwrap());
    write(&to.join("model.safetensors"), tensors.collect(), None).unwrap();
}
