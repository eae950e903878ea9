//! Where the time goes with MLX: a prefill, operation by operation, and the steps of the kernel for NVIDIA
//! cards, phase by phase. Beside it what the memory would need at least.

use crate::Options;
use crate::report::median;
use anyhow::Result;
use bombus::backend::mlx::{Device, Mlx};
use bombus::backend::{Backend, Segment, Token};
use bombus::backend::{Batch, BoundAdapter, KvCache};
use bombus::config::Config;
use bombus::model::adapter::Adapter;
use bombus::model::decoder::Decoder;
use bombus::model::executor::{CudaExecutor, Executor};
use bombus::model::weights;
use bombus::sampler::Draw;
use mlx_rs::{Array, transforms};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;

const STEPS: usize = 20;

/// What, its times in seconds, and the least that it must read and write in bytes.
struct Line {
    name: String,
    rounds: Vec<f64>,
    bytes: usize,
}

type Table = Vec<Line>;

/// With an adapter, steps are profiled without and with it.
pub fn profile(
    options: &Options,
    folder: &Path,
    adapter: Option<&Adapter>,
    device: Device,
) -> Result<Value> {
    let backend = Mlx::new(device)?;
    backend.clone().scope(|| {
        let config = Config::open(folder)?;
        let decoder = weights::load(folder, &config, None, backend)?;
        let adapter = adapter.map(|adapter| adapter.bind(&decoder)).transpose()?;
        let executor = CudaExecutor::new(decoder)?;
        let bandwidth = bandwidth()?;
        println!("memory: {:.2} TB/s for a copy, read and written", bandwidth / 1e12);
        let mut all = vec![];
        for &prompt in &options.sizes.prompt {
            let name = format!("prefill {prompt}, one operation after the other");
            all.push(print(&name, prefill(executor.decoder(), prompt)?, bandwidth));
        }
        for &depth in &options.sizes.depth {
            for &batch in &options.sizes.batch {
                let with = adapter.iter().map(Some);
                for adapter in std::iter::once(None).chain(with) {
                    let table = steps(&executor, adapter, batch, depth.max(8))?;
                    if !table.is_empty() {
                        let with = if adapter.is_some() { ", adapter" } else { "" };
                        let name = format!("a step of {batch} behind {depth}{with}");
                        all.push(print(&name, table, bandwidth));
                    }
                }
            }
        }
        Ok(json!({ "bandwidth": bandwidth, "tables": all }))
    })
}

fn print(name: &str, table: Table, bandwidth: f64) -> Value {
    println!("\n{name:36}{:>10}{:>10}{:>8}", "us", "MB", "floor");
    let sum = |value: fn(&Line) -> f64| table.iter().map(value).sum::<f64>();
    let (seconds, bytes) = (sum(|line| median(&line.rounds)), sum(|line| line.bytes as f64));
    let show = |name: &str, seconds: f64, bytes: f64| {
        let share = 100.0 * bytes / bandwidth / seconds;
        println!("{name:36}{:10.1}{:10.1}{share:7.0}%", seconds * 1e6, bytes / 1e6);
    };
    table.iter().for_each(|line| show(&line.name, median(&line.rounds), line.bytes as f64));
    show("all", seconds, bytes);
    let lines = table.iter().map(
        |line| json!({ "name": line.name, "seconds": median(&line.rounds), "bytes": line.bytes }),
    );
    json!({ "name": name, "seconds": seconds, "bytes": bytes, "lines": lines.collect::<Vec<_>>() })
}

/// Bytes a second, read and written, of copying what no cache holds.
fn bandwidth() -> Result<f64> {
    const WORDS: i32 = 1 << 28;
    let source = Array::ones::<f32>(&[WORDS])?;
    transforms::eval([&source])?;
    let mut best = 0.0f64;
    for _ in 0..5 {
        let start = Instant::now();
        transforms::eval([&source.negative()?])?;
        best = best.max(2.0 * 4.0 * f64::from(WORDS) / start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn token(place: usize) -> Token {
    Token::Id(((place * 7919 + 11) % 2000) as u32)
}

/// All layers of a prompt, every operation computed before the next begins.
fn prefill(decoder: &Decoder<Mlx>, rows: usize) -> Result<Table> {
    // The first round compiles.
    (0..4)
        .map(|_| layers(decoder, rows))
        .skip(1)
        .try_fold(vec![], |table, round| join(table, round?))
}

/// The same lines, once more.
fn join(mut table: Table, round: Table) -> Result<Table> {
    if table.is_empty() {
        return Ok(round);
    }
    table.iter_mut().zip(round).for_each(|(line, again)| line.rounds.extend(again.rounds));
    Ok(table)
}

/// Computes an operation; its time and bytes join those of the same in other layers. `weights` are the
/// bytes that it reads beside its inputs.
fn time(
    table: &mut Table,
    name: &str,
    weights: usize,
    inputs: &[&Array],
    operation: impl FnOnce() -> bombus::error::Result<Vec<Array>>,
) -> Result<Vec<Array>> {
    let start = Instant::now();
    let outputs = operation()?;
    transforms::eval(&outputs)?;
    let seconds = start.elapsed().as_secs_f64();
    let numbers = inputs.iter().copied().chain(&outputs).map(Array::nbytes);
    let bytes = weights + numbers.sum::<usize>();
    match table.iter_mut().find(|line| line.name == name) {
        Some(line) => {
            line.rounds[0] += seconds;
            line.bytes += bytes;
        }
        None => table.push(Line { name: name.into(), rounds: vec![seconds], bytes }),
    }
    Ok(outputs)
}

/// As `Decoder::forward`, of a model whose norms stand before attention and MLP.
fn layers(decoder: &Decoder<Mlx>, rows: usize) -> Result<Table> {
    let backend = &decoder.backend;
    let norm = |weight: &Option<Array>, x: &Array| match weight {
        Some(weight) => Ok(vec![backend.normalize(x, weight, &decoder.spec.norm)?]),
        None => Ok(vec![x.clone()]),
    };
    let tokens: Vec<Token> = (0..rows).map(token).collect();
    let segments = [Segment { rows: 0..rows, start: 0 }];
    let mut cache = decoder.cache();
    let mut table = vec![];
    let one = |mut outputs: Vec<Array>| outputs.swap_remove(0);
    let mut hidden = one(time(&mut table, "embedding", 0, &[], || {
        Ok(vec![backend.embed(&decoder.embed_tokens, &tokens, None, &[])?])
    })?);
    for (index, layer) in decoder.layers.iter().enumerate() {
        let x = one(time(&mut table, "norms", 0, &[&hidden], || {
            norm(&layer.before_attention, &hidden)
        })?);
        let qkv = time(&mut table, "qkv", layer.qkv_proj.nbytes(), &[&x], || {
            backend.project(&layer.qkv_proj, &x, &[])
        })?;
        let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]];
        let x = one(time(&mut table, "attention", 0, &[q, k, v], || {
            let qkv = [q.clone(), k.clone(), v.clone()];
            let mut caches = [&mut cache];
            Ok(vec![backend.attention(&layer.attention, index, qkv, &segments, &mut caches)?])
        })?);
        let x = one(time(&mut table, "o", layer.o_proj.nbytes(), &[&x], || {
            backend.project(&layer.o_proj, &x, &[])
        })?);
        hidden = one(time(&mut table, "sums", 0, &[&hidden, &x], || {
            Ok(vec![backend.add(&hidden, &x, decoder.spec.layers[index].residual_scale)?])
        })?);
        let x = one(time(&mut table, "norms", 0, &[&hidden], || norm(&layer.before_mlp, &hidden))?);
        let gate_up = time(&mut table, "gate, up", layer.gate_up_proj.nbytes(), &[&x], || {
            backend.project(&layer.gate_up_proj, &x, &[])
        })?;
        let x = one(time(&mut table, "gated unit", 0, &[&gate_up[0], &gate_up[1]], || {
            let activation = decoder.spec.layers[index].mlp.activation;
            Ok(vec![backend.glu(&gate_up[0], &gate_up[1], activation)?])
        })?);
        let x = one(time(&mut table, "down", layer.down_proj.nbytes(), &[&x], || {
            backend.project(&layer.down_proj, &x, &[])
        })?);
        hidden = one(time(&mut table, "sums", 0, &[&hidden, &x], || {
            Ok(vec![backend.add(&hidden, &x, decoder.spec.layers[index].residual_scale)?])
        })?);
    }
    Ok(table)
}

/// Steps of so many sequences at once behind prompts of so many tokens: what the kernel notes of itself.
fn steps(
    executor: &CudaExecutor,
    adapter: Option<&BoundAdapter<Mlx>>,
    batch: usize,
    depth: usize,
) -> Result<Table> {
    let mut caches = vec![];
    for sequence in 0..batch {
        let mut cache = executor.cache();
        let tokens: Vec<Token> = (0..depth).map(|place| token(place + sequence)).collect();
        forward(executor, adapter, &tokens, &mut [(&mut cache, 0..depth, 0)])?;
        caches.push(cache);
    }
    let mut table: Table = vec![];
    for position in depth..depth + STEPS {
        let tokens: Vec<Token> = (0..batch).map(token).collect();
        let own = caches.iter_mut().enumerate();
        let mut parts: Vec<_> = own.map(|(row, cache)| (cache, row..row + 1, position)).collect();
        forward(executor, adapter, &tokens, &mut parts)?;
        let spec = &executor.decoder().spec;
        let attention = &spec.layers[0].attention;
        // Keys and values of bfloat16.
        let seen = 4 * attention.kv_heads * attention.head_dim * (position + 1);
        let phases = executor.profile()?.into_iter().map(|phase| Line {
            bytes: match phase.name {
                "attention" => batch * seen * spec.layers.len(),
                _ => phase.weights,
            },
            name: phase.name.into(),
            rounds: vec![phase.seconds],
        });
        table = join(table, phases.collect())?;
    }
    Ok(table)
}

type Rows<'a> = (&'a mut KvCache<Mlx>, std::ops::Range<usize>, usize);

/// A step; each part's cache, rows, and the position of the first.
fn forward(
    executor: &CudaExecutor,
    adapter: Option<&BoundAdapter<Mlx>>,
    tokens: &[Token],
    sequences: &mut [Rows],
) -> Result<()> {
    let mut batch = Batch::default();
    for (cache, rows, start) in sequences.iter_mut() {
        batch.push(&tokens[rows.clone()], *start, &[rows.len() - 1], &mut **cache, adapter);
    }
    let draws = vec![Draw::default(); batch.outputs.len()];
    let _guard = executor.guard();
    let logits = executor.forward(&mut batch, None)?;
    let samples = executor.sample(&logits, &draws)?;
    executor.decoder().backend.submit(&samples)?;
    executor.decoder().backend.read(&samples)?;
    Ok(())
}
