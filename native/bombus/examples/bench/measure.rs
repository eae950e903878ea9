//! The engine's own figures, through its own queue: tokens a second.

use crate::{Options, machine};
use anyhow::{Context, Result, bail};
use bombus::backend::Device;
use bombus::engine::scheduler::Limits;
use bombus::engine::{Engine, Event, Generation, Prompt, Request, Sink};
use bombus::model::adapter::Adapter;
use bombus::runtime::metrics;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

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
    let sizes = &options.sizes;
    let before = machine::resident();
    let start = Instant::now();
    // The same prompts come again and again.
    let mut limits = Limits { max_batch_size: 256, prefix_cache: 0, ..Limits::default() };
    limits.prefill_chunk = options.prefill_chunk.unwrap_or_else(|| device.prefill_chunk());
    let engine = Engine::load(folder, device, limits)?;
    let seconds = start.elapsed().as_secs_f64();
    // The first pass touches every page of the file.
    decode(&engine, 8, &[None], sizes.tokens.min(8))?;
    let mut figures = vec![];
    let mut kv = 0;
    for &prompt in &sizes.prompt {
        note(&mut figures, format!("prefill {prompt}"), prefill(&engine, prompt)?);
    }
    for &depth in &sizes.depth {
        let (rate, bytes) = decode(&engine, depth.max(8), &[None], sizes.tokens)?;
        note(&mut figures, format!("decode at {depth}"), rate);
        kv = kv.max(bytes);
    }
    for &batch in &sizes.batch {
        let (rate, bytes) = decode(&engine, 8, &vec![None; batch], sizes.tokens)?;
        note(&mut figures, format!("{batch} sequences"), rate);
        kv = kv.max(bytes);
    }
    if !adapters.is_empty() {
        let sequences = if options.device == "gpu" { 32 } else { 16 };
        adapted(&mut figures, &engine, adapters, sequences, sizes.tokens)?;
    }
    let resident = machine::resident().zip(before).map(|(after, before)| after - before);
    Ok((figures, Load { seconds, resident, kv }))
}

/// What adapters cost, with the same without them measured right before.
fn adapted(
    figures: &mut Figures,
    engine: &Engine,
    folders: &[PathBuf],
    sequences: usize,
    tokens: usize,
) -> Result<()> {
    let load = |path: &PathBuf| Ok(Arc::new(Adapter::open(path, None)?));
    let adapters = folders.iter().map(load).collect::<Result<Vec<_>>>()?;
    let one = || Some(adapters[0].clone());
    let mixed = |place: usize| Some(adapters[place % adapters.len()].clone());
    // The first use binds them.
    decode(engine, 8, &(0..adapters.len()).map(mixed).collect::<Vec<_>>(), 8)?;
    let mixed: Vec<_> = (0..sequences).map(mixed).collect();
    let batches = [
        ("1 sequence, no adapter".into(), vec![None]),
        ("1 sequence, adapter".into(), vec![one()]),
        (format!("{sequences} sequences, no adapter"), vec![None; sequences]),
        (format!("{sequences} sequences, 1 adapter"), vec![one(); sequences]),
        (format!("{sequences} sequences, {} adapters", adapters.len()), mixed),
    ];
    for (name, batch) in batches {
        note(figures, name, decode(engine, 8, &batch, tokens)?.0);
    }
    Ok(())
}

/// From the request to the first token, whose logits alone are computed.
fn prefill(engine: &Engine, prompt: usize) -> Result<f64> {
    let start = Instant::now();
    let (_generation, events) = generate(engine, prompt, 1, 0, None)?;
    token(&events)?;
    Ok(prompt as f64 / start.elapsed().as_secs_f64())
}

/// Tokens a second of all sequences together, from the moment when each has its first; and the
/// bytes of their caches.
fn decode(
    engine: &Engine,
    depth: usize,
    batch: &[Option<Arc<Adapter>>],
    tokens: usize,
) -> Result<(f64, u64)> {
    let running: Vec<_> = batch
        .iter()
        .enumerate()
        .map(|(seed, adapter)| generate(engine, depth, tokens + 1, seed, adapter.clone()))
        .collect::<Result<_>>()?;
    let first: Vec<Instant> =
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

type Running = (Generation, Receiver<(Event, Instant)>);

fn generate(
    engine: &Engine,
    prompt: usize,
    tokens: usize,
    seed: usize,
    adapter: Option<Arc<Adapter>>,
) -> Result<Running> {
    let (sender, events) = channel();
    let sink = Sink::new(move |event| sender.send((event, Instant::now())).is_ok());
    let ids = (0..prompt).map(|place| ((place * 7919 + seed * 104_729 + 11) % 2000) as u32);
    let mut request = Request::new(Prompt::Ids(ids.collect()), tokens);
    request.adapter = adapter;
    Ok((engine.generate(request, sink)?, events))
}

/// When the next token came.
fn token(events: &Receiver<(Event, Instant)>) -> Result<Instant> {
    match events.recv()? {
        (Event::Chunk { .. }, at) => Ok(at),
        (other, _) => bail!("the sequence ended early: {other:?}"),
    }
}
