//! What a model is, by its folder: its configuration and the headers of its files are read, and
//! nothing of its weights.

use crate::arch;
use crate::backend::Device;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::safetensors::{TensorFiles, absent_shards};
use crate::files::{self, Fields};
use crate::model::convert;
use crate::model::weights::{self, FoundLinear};
use crate::spec::{EMBED_TOKENS, LM_HEAD, ModelSpec, Module, Quantization};
use crate::tokenizer;
use safetensors::tensor::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

pub struct Info {
    pub config: Config,
    /// The `model_type` of the language model where another model holds it.
    pub language_model: Option<String>,
    /// The linear layers by what they are for.
    pub parts: Vec<Part>,
    /// The numbers of all linear layers and norms.
    pub parameters: u64,
    /// Bytes of the files of tensors.
    pub disk: u64,
    /// Bytes of the weights in memory.
    pub weights: u64,
    pub kv: KvBytes,
    pub steps: Steps,
    pub tokenizer: bool,
    /// Whether there is a chat template; an error where there is one that is not valid.
    pub chat_template: Result<bool>,
    /// Files that an index names, and tensors that the configuration asks for, the first of them.
    pub missing_files: Vec<String>,
    pub missing_tensors: Vec<String>,
    /// Why the model would not be loaded.
    pub problem: Option<Error>,
}

/// Linear layers that do the same.
pub struct Part {
    pub role: Role,
    pub parameters: u64,
    /// The parameters of each layout; none is dense.
    pub layouts: Vec<(Option<Quantization>, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Embedding,
    Attention,
    Mlp,
    Head,
}

/// Bytes of keys and values.
pub struct KvBytes {
    /// of a position, before any window is full
    pub position: u64,
    /// of a sequence as long as the context, where layers with a window keep that alone
    pub context: u64,
}

/// How a device computes the steps.
#[derive(Clone, Debug, PartialEq)]
pub enum Steps {
    /// by kernels of this crate, layer by layer
    Own,
    /// by MLX, layer by layer
    Mlx,
    /// single tokens by one kernel for all layers
    Fused,
    /// by MLX, layer by layer, since that kernel does not serve the model
    LayerByLayer(String),
}

/// So many names of what is missing.
const SHOWN: usize = 8;

/// Fails where `config.json` is not there, or is of nothing that can be loaded.
pub fn info(folder: &Path, device: Device) -> Result<Info> {
    let (config, tensors) = open(folder)?;
    let disk = tensors.as_ref().map_or(0, |tensors| bytes_of(tensors.paths()));
    let found = tensors.and_then(|tensors| found(&config, tensors));
    let fields = Fields::open(&folder.join("config.json"))?;
    let (linears, fault) = match found {
        Ok(linears) => (linears, None),
        Err(error) => (announced(&config, float(&fields)), Some(error)),
    };
    let (missing_files, missing_tensors) = match fault {
        Some(_) => missing(folder, &config),
        None => (vec![], vec![]),
    };
    let (tokenizer, chat_template) = tokenizer::is_there(folder);
    let spec = &config.spec;
    let norms: u64 = spec.norms().map(|(_, width)| width as u64).sum();
    let is_float32 = linears.iter().any(|linear| linear.dtype == Dtype::F32);
    let number = if is_float32 { 4 } else { 2 };
    let inner = arch::language_model(&fields)?;
    Ok(Info {
        language_model: inner.map(|inner| inner.text("model_type")).transpose()?,
        parameters: norms + linears.iter().map(|linear| parameters(&linear.module)).sum::<u64>(),
        weights: norms * number + linears.iter().map(bytes).sum::<u64>(),
        kv: KvBytes::new(spec, number),
        steps: Steps::new(device, spec, &linears),
        parts: parts(&linears),
        disk,
        tokenizer,
        chat_template,
        missing_files,
        missing_tensors,
        problem: fault.or(no_device(device)),
        config,
    })
}

/// The configuration, and the tensors or why there are none.
fn open(folder: &Path) -> Result<(Config, Result<TensorFiles>)> {
    match weights::open(folder) {
        Ok((config, tensors)) => Ok((config, Ok(tensors))),
        Err(error) if files::is_there(&folder.join("config.json")) => {
            Ok((Config::open(folder)?, Err(error)))
        }
        Err(error) => Err(error),
    }
}

fn missing(folder: &Path, config: &Config) -> (Vec<String>, Vec<String>) {
    let mut shards = absent_shards(folder);
    shards.truncate(SHOWN);
    (shards, weights::absent(folder, config, SHOWN).unwrap_or_default())
}

/// The linear layers, as the files have them.
fn found(config: &Config, tensors: TensorFiles) -> Result<Vec<FoundLinear>> {
    if !convert::is_packed(&tensors) {
        return weights::linears(config, tensors);
    }
    convert::check(config, &tensors)?;
    let is_packed = |module: &Module| tensors.contains(&format!("{}.qweight", module.path));
    let linear = |module: Module| {
        let layout = config.quantization.filter(|_| is_packed(&module));
        FoundLinear { module, layout, dtype: Dtype::F16 }
    };
    Ok(config.spec.linears().map(linear).collect())
}

/// The same, as the configuration alone says.
fn announced(config: &Config, dtype: Dtype) -> Vec<FoundLinear> {
    let linear = |module: Module| {
        let own = config.overrides.get(&module.path).copied();
        let layout = own.unwrap_or(config.quantization);
        let layout = layout.filter(|it| module.in_features.is_multiple_of(it.group_size));
        FoundLinear { module, layout, dtype }
    };
    config.spec.linears().map(linear).collect()
}

/// `torch_dtype`, since transformers 5 `dtype`
fn float(fields: &Fields) -> Dtype {
    let name = fields.value("torch_dtype").or_else(|| fields.value("dtype"));
    match name.and_then(|name| name.as_str()) {
        Some("float32") => Dtype::F32,
        Some("float16") => Dtype::F16,
        _ => Dtype::BF16,
    }
}

/// Some files may be one, by links.
fn bytes_of<'a>(paths: impl Iterator<Item = &'a Path>) -> u64 {
    let paths: BTreeSet<PathBuf> = paths.filter_map(|path| path.canonicalize().ok()).collect();
    paths.iter().filter_map(|path| Some(path.metadata().ok()?.len())).sum()
}

fn parameters(module: &Module) -> u64 {
    let bias = if module.bias { module.out_features() } else { 0 };
    module.out_features() as u64 * module.in_features as u64 + bias as u64
}

/// In memory: codes with a scale and a bias for each group, or dense numbers.
fn bytes(linear: &FoundLinear) -> u64 {
    let FoundLinear { module, layout, dtype } = linear;
    let number = dtype.bitsize() as u64 / 8;
    let weights = module.out_features() as u64 * module.in_features as u64;
    let bias = if module.bias { module.out_features() as u64 * number } else { 0 };
    bias + match layout {
        Some(Quantization { bits, group_size }) => {
            weights * *bits as u64 / 8 + weights / *group_size as u64 * 2 * number
        }
        None => weights * number,
    }
}

fn role(module: &Module) -> Role {
    match module.path.as_str() {
        EMBED_TOKENS => Role::Embedding,
        LM_HEAD => Role::Head,
        path if path.contains(".mlp.") => Role::Mlp,
        _ => Role::Attention,
    }
}

fn parts(linears: &[FoundLinear]) -> Vec<Part> {
    let mut roles: BTreeMap<Role, Part> = BTreeMap::new();
    for FoundLinear { module, layout, .. } in linears {
        let role = role(module);
        let new = || Part { role, parameters: 0, layouts: vec![] };
        let part = roles.entry(role).or_insert_with(new);
        let count = parameters(module);
        part.parameters += count;
        match part.layouts.iter_mut().find(|(known, _)| known == layout) {
            Some((_, known)) => *known += count,
            None => part.layouts.push((*layout, count)),
        }
    }
    roles.into_values().collect()
}

impl KvBytes {
    /// `number`: the bytes of one number of a key
    fn new(spec: &ModelSpec, number: u64) -> Self {
        let (mut position, mut context) = (0, 0);
        for layer in &spec.layers {
            let attention = &layer.attention;
            let bytes = 2 * attention.kv_heads as u64 * attention.head_dim as u64 * number;
            let kept = attention.window.map_or(spec.context, |window| window.min(spec.context));
            position += bytes;
            context += bytes.saturating_mul(kept as u64);
        }
        Self { position, context }
    }
}

impl Steps {
    #[cfg(feature = "mlx")]
    fn new(device: Device, spec: &ModelSpec, linears: &[FoundLinear]) -> Self {
        use crate::model::executor::{OTHER_WEIGHTS, Program};
        const INT4: Option<Quantization> = Some(Quantization { bits: 4, group_size: 64 });
        let is_int4 = |it: &FoundLinear| it.layout == INT4 && it.dtype == Dtype::BF16;
        match device {
            Device::Cpu(_) => Self::Own,
            Device::Mlx(device) if device.is_cuda() => match Program::compile(spec) {
                Err(reason) => Self::LayerByLayer(reason),
                Ok(_) if !linears.iter().all(is_int4) => Self::LayerByLayer(OTHER_WEIGHTS.into()),
                Ok(_) => Self::Fused,
            },
            Device::Mlx(_) => Self::Mlx,
        }
    }

    #[cfg(not(feature = "mlx"))]
    fn new(_device: Device, _spec: &ModelSpec, _linears: &[FoundLinear]) -> Self {
        Self::Own
    }
}

/// Why a model cannot be on a device at all.
#[cfg(feature = "mlx")]
fn no_device(device: Device) -> Option<Error> {
    use crate::backend::mlx;
    match device {
        Device::Mlx(mlx::Device::Gpu) if !mlx::gpu_available() => mlx::Device::Gpu.stream().err(),
        _ => None,
    }
}

#[cfg(not(feature = "mlx"))]
fn no_device(_device: Device) -> Option<Error> {
    None
}
