//! Checkpoints of random weights: the time that a step takes does not depend on them.

use crate::Options;
use crate::family::Family;
use anyhow::{Result, bail};
use bombus::config::Config;
use bombus::spec::{HeadWeight, Module};
use safetensors::{Dtype, View};
use std::borrow::Cow;
use std::path::{Path, PathBuf};

const GROUP_SIZE: usize = 64;
const HEAD_DIM: usize = 128;

/// The linear layers, in a file that models of one shape share, so that their weights are the same
/// pages of memory: a copy may be a tenth faster or slower, by where it lies.
const LINEARS: &str = "model-linears.safetensors";
/// Norms and biases.
const OTHERS: &str = "model-others.safetensors";

/// The folder of a checkpoint, made if it is not there. `beside`: the family that it stands beside,
/// whose shape it has
pub fn make(options: &Options, family: &Family, beside: &Family) -> Result<PathBuf> {
    let Options { model, bits, dtype, .. } = options;
    let shape = if beside.derives_head_dim { "-narrow" } else { "" };
    let shape = format!("{model}{shape}-{bits}bit-{dtype}");
    let folder = options.dir.join(format!("{}-{shape}", family.name));
    if folder.join(OTHERS).exists() {
        return Ok(folder);
    }
    std::fs::create_dir_all(&folder)?;
    let mut config = config(options, beside)?;
    family.adapt(&mut config);
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let mut config = Config::open(&folder)?;
    if config.spec.head.weight == HeadWeight::IfThere {
        config.spec.head.weight = HeadWeight::Tied;
    }
    let linears = config.spec.linears().count();
    let shared = options.dir.join(format!("{linears}-linears-{shape}.safetensors"));
    if !shared.exists() {
        write(self::linears(&config, *bits, float(dtype)?), &shared)?;
    }
    if !folder.join(LINEARS).exists() {
        std::fs::hard_link(shared, folder.join(LINEARS))?;
    }
    write(others(&config, float(dtype)?), &folder.join(OTHERS))?;
    Ok(folder)
}

fn write(tensors: Vec<(String, Random)>, path: &Path) -> Result<()> {
    eprintln!("making {}", path.display());
    let part = path.with_extension("part");
    safetensors::serialize_to_file(tensors, None, &part)?;
    Ok(std::fs::rename(part, path)?)
}

/// The folders of so many adapters of rank 8, on all layers, in mlx-lm's format.
pub fn adapters(folder: &Path, count: usize) -> Result<Vec<PathBuf>> {
    const RANK: usize = 8;
    let config = Config::open(folder)?;
    let adapter = |index: usize| {
        let adapter = folder.join(format!("adapter-{index}"));
        std::fs::create_dir_all(&adapter)?;
        let parameters = serde_json::json!({ "rank": RANK, "scale": 20.0, "dropout": 0.0 });
        let settings = serde_json::json!({ "lora_parameters": parameters });
        std::fs::write(adapter.join("adapter_config.json"), settings.to_string())?;
        let layers = 0..config.spec.layers.len();
        let modules = layers.flat_map(|layer| config.spec.layer(layer));
        let tensors = modules.enumerate().flat_map(|(place, module)| {
            let out_features = module.out_features();
            let Module { path, in_features, .. } = module;
            let seed = (index * 1000 + place) as u64;
            let half = |name, shape: [usize; 2]| {
                let kind = Kind::About(1e-3);
                let random = Random { dtype: Dtype::F32, shape: shape.into(), kind, seed };
                (format!("{path}.{name}"), random)
            };
            [half("lora_a", [in_features, RANK]), half("lora_b", [RANK, out_features])]
        });
        let weights = adapter.join("adapters.safetensors");
        safetensors::serialize_to_file(tensors.collect::<Vec<_>>(), None, &weights)?;
        Ok(adapter)
    };
    (0..count).map(adapter).collect()
}

pub fn bytes(folder: &Path) -> Result<u64> {
    let of = |name| -> Result<u64> { Ok(std::fs::metadata(folder.join(name))?.len()) };
    Ok(of(LINEARS)? + of(OTHERS)?)
}

/// What Qwen publishes for these sizes; no token ends a text. Beside a family whose heads are as wide
/// as `hidden_size` makes them, there are fewer heads of the same width.
fn config(options: &Options, beside: &Family) -> Result<serde_json::Value> {
    let (hidden, layers, heads, kv_heads, inner, vocab, tied) = match options.model.as_str() {
        "0.6b" => (1024, 28, 16, 8, 3072, 151_936, true),
        "8b" => (4096, 36, 32, 8, 12_288, 151_936, false),
        "tiny" => (256, 4, 4, 2, 768, 2048, true),
        other => bail!("--model {other} is unknown"),
    };
    let (heads, kv_heads) = match beside.derives_head_dim {
        true => (hidden / HEAD_DIM, (hidden / HEAD_DIM * kv_heads / heads).max(1)),
        false => (heads, kv_heads),
    };
    Ok(serde_json::json!({
        "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": HEAD_DIM,
        "intermediate_size": inner, "vocab_size": vocab, "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 40_960,
        "eos_token_id": [],
        "quantization": { "group_size": GROUP_SIZE, "bits": options.bits },
    }))
}

/// Numbers that are made when they are written.
struct Random {
    dtype: Dtype,
    shape: Vec<usize>,
    kind: Kind,
    seed: u64,
}

#[derive(Clone, Copy)]
enum Kind {
    Codes,
    /// positive, about so large
    About(f32),
    Ones,
}

fn float(name: &str) -> Result<Dtype> {
    Ok(match name {
        "bf16" => Dtype::BF16,
        "f16" => Dtype::F16,
        "f32" => Dtype::F32,
        other => bail!("--dtype {other} is unknown"),
    })
}

fn linears(config: &Config, bits: usize, float: Dtype) -> Vec<(String, Random)> {
    // A standard deviation of 0.02, as at the start of a training.
    let scale = 0.07 / (1 << bits) as f32;
    let linear = |(place, module): (usize, Module)| {
        let out_features = module.out_features();
        let Module { path, in_features, .. } = module;
        let groups = [out_features, in_features / GROUP_SIZE];
        let columns = in_features * bits / 32;
        let tensor = |name, dtype, shape: [usize; 2], kind| {
            let seed = place as u64;
            (format!("{path}.{name}"), Random { dtype, shape: shape.into(), kind, seed })
        };
        [
            tensor("weight", Dtype::U32, [out_features, columns], Kind::Codes),
            tensor("scales", float, groups, Kind::About(scale)),
            tensor("biases", float, groups, Kind::About(-0.035)),
        ]
    };
    config.spec.linears().enumerate().flat_map(linear).collect()
}

fn others(config: &Config, float: Dtype) -> Vec<(String, Random)> {
    let vector = |name: String, width, kind| {
        (name, Random { dtype: float, shape: vec![width], kind, seed: width as u64 })
    };
    let biased = config.spec.linears().filter(|module| module.bias);
    let biases = biased.map(|module| {
        let width = module.out_features();
        vector(format!("{}.bias", module.path), width, Kind::About(0.01))
    });
    let norms = config.spec.norms();
    let norms = norms.map(|(path, width)| vector(format!("{path}.weight"), width, Kind::Ones));
    biases.chain(norms).collect()
}

impl Random {
    fn bytes(&self) -> Vec<u8> {
        let size = self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8;
        let mut state = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            // xorshift64 (Marsaglia, 2003)
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut bytes = Vec::with_capacity(size + 8);
        while bytes.len() < size {
            let number = match self.kind {
                Kind::Codes => {
                    bytes.extend(next().to_le_bytes());
                    continue;
                }
                Kind::About(mean) => mean * (0.75 + 0.5 * (next() >> 40) as f32 / (1 << 24) as f32),
                Kind::Ones => 1.0,
            };
            match self.dtype {
                Dtype::F32 => bytes.extend(number.to_le_bytes()),
                Dtype::F16 => bytes.extend(half::f16::from_f32(number).to_le_bytes()),
                _ => bytes.extend(half::bf16::from_f32(number).to_le_bytes()),
            }
        }
        bytes.truncate(size);
        bytes
    }
}

impl View for Random {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes().into()
    }
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}
