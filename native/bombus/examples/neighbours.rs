//! What a request costs those beside it: the gaps between two tokens of a neighbour.
//!
//!     cargo run --release -p bombus --example neighbours
//!
//! The model is a small one of random size and no sense, with a vocabulary as large as Qwen3's.

use anyhow::Result;
use bombus::backend::Device;
use bombus::config::Config;
use bombus::engine::scheduler::Limits;
use bombus::engine::{Engine, Event, Generation, Prompt, Request, Sink};
use bombus::files::safetensors::{NewTensor, write};
use bombus::model::adapter::Adapter;
use bombus::sampler::Sampling;
use bombus::spec::Module;
use bombus::tokenizer::Tokenizer;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

const VOCAB: usize = 151_936;
const GROUP_SIZE: usize = 64;
/// Tokens of a neighbour whose gaps are measured, behind those that it has alone.
const TOKENS: usize = 60;
const ALONE: usize = 10;

/// What is asked beside the neighbour.
type Requests = Box<dyn Fn() -> Vec<Request>>;

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    checkpoint(folder.path())?;
    let engine = Engine::load(folder.path(), Device::Cpu(Default::default()), limits())?;
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../priv/models/demo");
    let tokenizer = Arc::new(Tokenizer::open(&demo)?);
    println!("{:48} {:>10} {:>10}", "beside", "median ms", "worst ms");
    let cases: Vec<(&str, Requests)> = vec![
        ("nobody", Box::new(Vec::new)),
        ("an ordinary request", Box::new(|| vec![ids(&[5; 8])])),
        ("a bias on the whole vocabulary", Box::new(|| vec![biased()])),
        ("penalties behind 20,000 tokens", Box::new(|| vec![penalized()])),
        ("the 100 most probable of each token", Box::new(|| vec![with_logprobs()])),
        ("100,000 stop strings", {
            let tokenizer = tokenizer.clone();
            Box::new(move || vec![stopped(&tokenizer)])
        }),
        (
            "1,000 requests that are cancelled",
            Box::new(|| (0..1000).map(|_| ids(&[5; 8])).collect()),
        ),
    ];
    for (name, others) in cases {
        measure(&engine, name, others())?;
    }
    adapter(folder.path())?;
    let adapter = Arc::new(Adapter::open(&folder.path().join("adapter"), None)?);
    let mut request = ids(&[5; 8]);
    request.adapter = Some(adapter);
    measure(&engine, "an adapter of rank 512 that is bound", vec![request])
}

fn limits() -> Limits {
    Limits { prefill_chunk: 64, max_queue: 10_000, prefix_cache: 0, ..Limits::default() }
}

fn ids(ids: &[u32]) -> Request {
    Request::new(Prompt::Ids(ids.to_vec()), 10_000)
}

fn sampled(sampling: Sampling) -> Request {
    let mut request = ids(&[5; 8]);
    request.sampling = sampling;
    request
}

fn biased() -> Request {
    let logit_bias = (0..VOCAB as u32).map(|id| (id, id as f32 * 1e-6)).collect();
    sampled(Sampling { logit_bias, ..Sampling::default() })
}

fn penalized() -> Request {
    let prompt: Vec<u32> = (0..20_000).collect();
    let mut request = ids(&prompt);
    request.sampling =
        Sampling { repetition_penalty: 1.1, frequency_penalty: 0.1, ..Sampling::default() };
    request
}

fn with_logprobs() -> Request {
    sampled(Sampling { logprobs: Some(100), ..Sampling::default() })
}

fn stopped(tokenizer: &Arc<Tokenizer>) -> Request {
    let mut request = sampled(Sampling { logit_bias: vec![(77, 1e6)], ..Sampling::default() });
    request.tokenizer = Some(tokenizer.clone());
    request.stop = (0..100_000).map(|number| format!("never {number}")).collect();
    request
}

/// Waits until the others have a token each, or as many of them as run; all but the prompt counts.
fn measure(engine: &Engine, name: &str, others: Vec<Request>) -> Result<()> {
    let (sender, tokens) = channel();
    let sink = Sink::new(move |event| {
        !matches!(event, Event::Chunk { .. }) || sender.send(Instant::now()).is_ok()
    });
    let neighbour = engine.generate(ids(&[3; 4]), sink)?;
    for _ in 0..ALONE {
        tokens.recv()?;
    }
    let mut begun = vec![];
    let crowd = others.len() > 1;
    let others: Vec<Generation> = others
        .into_iter()
        .map(|request| {
            let (sender, first) = channel();
            begun.push(first);
            let sink = Sink::new(move |event| {
                _ = matches!(event, Event::Chunk { .. }) && sender.send(()).is_err();
                true
            });
            engine.generate(request, sink)
        })
        .collect::<Result<_, _>>()?;
    let waits = !name.contains("adapter") && !crowd;
    for first in begun.iter().filter(|_| waits) {
        first.recv()?;
    }
    while waits && tokens.try_recv().is_ok() {}
    if crowd {
        others.iter().for_each(Generation::cancel);
    }
    let mut last = tokens.recv()?;
    let mut gaps = vec![];
    for _ in 0..TOKENS {
        let next = tokens.recv()?;
        gaps.push((next - last).as_secs_f64() * 1e3);
        last = next;
    }
    drop((others, neighbour));
    gaps.sort_by(f64::total_cmp);
    println!("{name:48} {:10.2} {:10.2}", gaps[TOKENS / 2], gaps[TOKENS - 1]);
    Ok(())
}

fn checkpoint(folder: &Path) -> Result<()> {
    let config = serde_json::json!({
        "model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "intermediate_size": 768, "vocab_size": VOCAB, "tie_word_embeddings": true,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 40_960,
        "eos_token_id": [], "quantization": { "group_size": GROUP_SIZE, "bits": 4 },
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let config = Config::open(folder)?;
    let mut tensors: Vec<(String, &str, Vec<usize>, Vec<u8>)> = vec![];
    let half = |number: f32, count: usize| half::f16::from_f32(number).to_le_bytes().repeat(count);
    for module in config.spec.linears() {
        let out_features = module.out_features();
        let Module { path, in_features, .. } = module;
        let columns = in_features / 8;
        let groups = out_features * in_features / GROUP_SIZE;
        let shape = vec![out_features, in_features / GROUP_SIZE];
        let codes = (0..out_features * columns * 4).map(|place| (place * 37 % 251) as u8);
        tensors.push((
            format!("{path}.weight"),
            "U32",
            vec![out_features, columns],
            codes.collect(),
        ));
        tensors.push((format!("{path}.scales"), "F16", shape.clone(), half(0.004, groups)));
        tensors.push((format!("{path}.biases"), "F16", shape, half(-0.03, groups)));
    }
    let mut norm = |name: String, width| tensors.push((name, "F16", vec![width], half(1.0, width)));
    config.spec.norms().for_each(|(path, width)| norm(format!("{path}.weight"), width));
    save(&folder.join("model.safetensors"), &tensors)
}

/// On all layers.
fn adapter(folder: &Path) -> Result<()> {
    const RANK: usize = 512;
    let config = Config::open(folder)?;
    let adapter = folder.join("adapter");
    std::fs::create_dir_all(&adapter)?;
    let parameters = serde_json::json!({ "rank": RANK, "scale": 1.0, "dropout": 0.0 });
    let settings = serde_json::json!({ "lora_parameters": parameters });
    std::fs::write(adapter.join("adapter_config.json"), settings.to_string())?;
    let mut tensors = vec![];
    for module in (0..config.spec.layers.len()).flat_map(|layer| config.spec.layer(layer)) {
        let out_features = module.out_features();
        let Module { path, in_features, .. } = module;
        for (name, shape) in [("lora_a", [in_features, RANK]), ("lora_b", [RANK, out_features])] {
            let bytes = 1e-3f32.to_le_bytes().repeat(shape[0] * shape[1]);
            tensors.push((format!("{path}.{name}"), "F32", shape.to_vec(), bytes));
        }
    }
    save(&adapter.join("adapters.safetensors"), &tensors)
}

fn save(path: &Path, tensors: &[(String, &str, Vec<usize>, Vec<u8>)]) -> Result<()> {
    let new =
        tensors.iter().map(|(name, dtype, shape, bytes)| NewTensor::new(name, dtype, shape, bytes));
    Ok(write(path, new.collect::<Result<Vec<_>, _>>()?, None)?)
}
