//! The engine's own figures, through its own queue: tokens a second.

use crate::Options;
use crate::machine::{self, Clock};
use anyhow::{Context, Result, bail};
use bombus::backend::Device;
use bombus::engine::scheduler::Limits;
use bombus::engine::{
    EmbedRequest, Engine, Event, Generation, Pooling, Prompt, Request, Sink, Wanted,
};
use bombus::model::adapter::Adapter;
use bombus::runtime::metrics;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// What is asked for.
pub struct Sizes {
    pub prompt: Vec<usize>,
    pub depth: Vec<usize>,
    pub batch: Vec<usize>,
    pub tokens: usize,
}

/// What is measured: a name, and tokens a second.
pub type Figures = Vec<(String, f64)>;

/// Shows a figure at once: the whole table may take minutes.
fn note(figures: &mut Figures, name: String, rate: f64) {
    eprintln!("{name:28}{rate:12.1}");
    figures.push((name, rate));
}

/// How a checkpoint was loaded.
#[derive(Clone, Copy)]
pub struct Load {
    pub seconds: f64,
    /// Bytes in memory at the end of all measurements, without those before the load.
    pub resident: Option<u64>,
    /// The KV caches' share in them, at most.
    pub kv: u64,
}

pub fn run(
    folder: &Path,
    adapters: &[PathBuf],
    device: Device,
    options: &Options,
) -> Result<(Figures, Load)> {
    let before = machine::resident();
    let start = Instant::now();
    let model = Model::load(folder, device, options)?;
    let seconds = start.elapsed().as_secs_f64();
    model.touch()?;
    let mut figures = vec![];
    let mut kv = 0;
    for figure in options.sizes.figures() {
        let (rate, bytes) = model.measure(figure)?;
        note(&mut figures, figure.name(), rate);
        kv = kv.max(bytes);
    }
    if !adapters.is_empty() {
        let sequences = if options.device == "gpu" { 32 } else { 16 };
        model.adapted(&mut figures, adapters, sequences)?;
    }
    let resident = machine::resident().zip(before).map(|(after, before)| after - before);
    Ok((figures, Load { seconds, resident, kv }))
}

/// Each figure of all models in turn, so that what others do meanwhile is in each of them; in every
/// second round the last model comes first.
pub fn in_turn(folders: &[PathBuf], device: Device, options: &Options) -> Result<Vec<Figures>> {
    let load = |folder: &PathBuf| Model::load(folder, device, options);
    let models = folders.iter().map(load).collect::<Result<Vec<_>>>()?;
    models.iter().try_for_each(Model::touch)?;
    let mut figures = vec![vec![]; models.len()];
    for round in 0..options.repeat {
        let mut order: Vec<usize> = (0..models.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for figure in options.sizes.figures() {
            for &place in &order {
                note(&mut figures[place], figure.name(), models[place].measure(figure)?.0);
            }
        }
    }
    Ok(figures)
}

#[derive(Clone, Copy)]
enum Figure {
    Prefill(usize),
    /// So many texts of so many tokens.
    Embed(usize, usize),
    Decode(usize),
    Sequences(usize),
}

impl Sizes {
    fn figures(&self) -> impl Iterator<Item = Figure> {
        let prefill = self.prompt.iter().flat_map(|&prompt| {
            [Figure::Prefill(prompt), Figure::Embed(1, prompt), Figure::Embed(8, prompt)]
        });
        let decode = self.depth.iter().map(|depth| Figure::Decode(*depth));
        prefill.chain(decode).chain(self.batch.iter().map(|batch| Figure::Sequences(*batch)))
    }
}

impl Figure {
    fn name(self) -> String {
        match self {
            Figure::Prefill(prompt) => format!("prefill {prompt}"),
            Figure::Embed(texts, tokens) => format!("embed {texts} x {tokens}"),
            Figure::Decode(depth) => format!("decode at {depth}"),
            Figure::Sequences(batch) => format!("{batch} sequences"),
        }
    }
}

/// A model that is measured.
struct Model {
    engine: Engine,
    clock: Clock,
    /// generated for each figure
    tokens: usize,
}

impl Model {
    fn load(folder: &Path, device: Device, options: &Options) -> Result<Self> {
        // The same prompts come again and again.
        let mut limits = Limits { max_batch_size: 256, prefix_cache: 0, ..Limits::default() };
        limits.prefill_chunk = options.prefill_chunk.unwrap_or_else(|| device.prefill_chunk());
        let engine = Engine::load(folder, device, limits)?;
        Ok(Self { engine, clock: options.clock, tokens: options.sizes.tokens })
    }

    /// The first pass touches every page of the file.
    fn touch(&self) -> Result<()> {
        self.decode(8, &[None], self.tokens.min(8)).map(drop)
    }

    /// Tokens a second, and the bytes of the caches.
    fn measure(&self, figure: Figure) -> Result<(f64, u64)> {
        match figure {
            Figure::Prefill(prompt) => Ok((self.prefill(prompt)?, 0)),
            Figure::Embed(texts, tokens) => Ok((self.embed(texts, tokens)?, 0)),
            Figure::Decode(depth) => self.decode(depth.max(8), &[None], self.tokens),
            Figure::Sequences(batch) => self.decode(8, &vec![None; batch], self.tokens),
        }
    }

    /// What adapters cost, with the same without them measured right before.
    fn adapted(&self, figures: &mut Figures, folders: &[PathBuf], sequences: usize) -> Result<()> {
        let load = |path: &PathBuf| Ok(Arc::new(Adapter::open(path, None)?));
        let adapters = folders.iter().map(load).collect::<Result<Vec<_>>>()?;
        let one = || Some(adapters[0].clone());
        let mixed = |place: usize| Some(adapters[place % adapters.len()].clone());
        // The first use binds them.
        self.decode(8, &(0..adapters.len()).map(mixed).collect::<Vec<_>>(), 8)?;
        let mixed: Vec<_> = (0..sequences).map(mixed).collect();
        let batches = [
            ("1 sequence, no adapter".into(), vec![None]),
            ("1 sequence, adapter".into(), vec![one()]),
            (format!("{sequences} sequences, no adapter"), vec![None; sequences]),
            (format!("{sequences} sequences, 1 adapter"), vec![one(); sequences]),
            (format!("{sequences} sequences, {} adapters", adapters.len()), mixed),
        ];
        for (name, batch) in batches {
            note(figures, name, self.decode(8, &batch, self.tokens)?.0);
        }
        Ok(())
    }

    /// From the request to the first token, whose logits alone are computed.
    fn prefill(&self, prompt: usize) -> Result<f64> {
        let start = self.clock.now();
        let (_generation, events) = self.generate(prompt, 1, 0, None)?;
        let end = token(&events)?;
        Ok(prompt as f64 / (end - start).as_secs_f64())
    }

    /// From the request to the embeddings of all texts.
    fn embed(&self, texts: usize, tokens: usize) -> Result<f64> {
        let (sender, events) = channel();
        let clock = self.clock;
        let start = clock.now();
        let request = EmbedRequest {
            texts: (0..texts).map(|seed| Prompt::Ids(ids(tokens, seed))).collect(),
            tokenizer: None,
            adapter: None,
            wanted: Wanted::Embedding { pooling: Pooling::Last, normalize: true, dimensions: None },
            timeout: None,
        };
        let sink = Sink::new(move |event| sender.send((event, clock.now())).is_ok());
        let _generation = self.engine.embed(request, sink)?;
        match events.recv()? {
            (Event::Embeddings(_), end) => {
                Ok((texts * tokens) as f64 / (end - start).as_secs_f64())
            }
            (other, _) => bail!("there are no embeddings: {other:?}"),
        }
    }

    /// Tokens a second of all sequences together, from the moment when each has its first; and the
    /// bytes of their caches.
    fn decode(
        &self,
        depth: usize,
        batch: &[Option<Arc<Adapter>>],
        tokens: usize,
    ) -> Result<(f64, u64)> {
        let running: Vec<_> = batch
            .iter()
            .enumerate()
            .map(|(seed, adapter)| self.generate(depth, tokens + 1, seed, adapter.clone()))
            .collect::<Result<_>>()?;
        let first: Vec<Duration> =
            running.iter().map(|(_, events)| token(events)).collect::<Result<_>>()?;
        let start = first.into_iter().max().context("no sequences")?;
        let mut end = start;
        // Tokens that came before the last sequence had its first do not count.
        let mut counted = 0;
        let mut kv = 0;
        for (_, events) in &running {
            for _ in 0..tokens {
                let at = token(events)?;
                counted += usize::from(at > start);
                end = end.max(at);
            }
            kv = kv.max(metrics::KV_BYTES.load(Relaxed) as u64);
        }
        Ok((counted as f64 / (end - start).as_secs_f64(), kv))
    }

    fn generate(
        &self,
        prompt: usize,
        tokens: usize,
        seed: usize,
        adapter: Option<Arc<Adapter>>,
    ) -> Result<Running> {
        let (sender, events) = channel();
        let clock = self.clock;
        let sink = Sink::new(move |event| sender.send((event, clock.now())).is_ok());
        let mut request = Request::new(Prompt::Ids(ids(prompt, seed)), tokens);
        request.adapter = adapter;
        Ok((self.engine.generate(request, sink)?, events))
    }
}

/// A text of so many tokens.
fn ids(tokens: usize, seed: usize) -> Vec<u32> {
    (0..tokens).map(|place| ((place * 7919 + seed * 104_729 + 11) % 2000) as u32).collect()
}

type Running = (Generation, Receiver<(Event, Duration)>);

/// When the next token came.
fn token(events: &Receiver<(Event, Duration)>) -> Result<Duration> {
    match events.recv()? {
        (Event::Chunk { .. }, at) => Ok(at),
        (other, _) => bail!("the sequence ended early: {other:?}"),
    }
}
