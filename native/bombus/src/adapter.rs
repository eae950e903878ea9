//! LoRA adapters in mlx-lm's format: `adapters.safetensors` beside `adapter_config.json`.
//!
//! `<module>.lora_a` is `[in, rank]`, `<module>.lora_b` `[rank, out]`, and the scale is used as it
//! stands: `y = W x + scale * (x A) B`. Reference: mlx-lm's `tuner/lora.py`. An adapter is read
//! without a model, and bound to one when it is first used with it.

use crate::backend::Backend;
use crate::config::Config;
use crate::decoder::BoundAdapter;
use crate::error::{Error, Result};
use crate::gauge;
use crate::modules::{Module, PROJECTIONS, projections, vocabulary};
use crate::tensor_file::{TensorFiles, TensorView};
use safetensors::tensor::Dtype;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

pub struct Adapter {
    path: PathBuf,
    tensors: TensorFiles,
    /// The module paths that have a pair.
    modules: Vec<String>,
    pub rank: usize,
    pub scale: f32,
    /// What is to be done when the adapter goes.
    hooks: Mutex<Vec<Hook>>,
    _share: gauge::Share,
}

type Hook = Box<dyn FnOnce() + Send>;

#[derive(serde::Deserialize)]
struct AdapterConfig {
    fine_tune_type: Option<String>,
    lora_parameters: Option<LoraParameters>,
}

#[derive(serde::Deserialize)]
struct LoraParameters {
    rank: usize,
    scale: f32,
}

impl Adapter {
    /// `scale` takes the place of the one in `adapter_config.json`.
    pub fn open(folder: &Path, scale: Option<f32>) -> Result<Self> {
        let config_path = folder.join("adapter_config.json");
        let weights_path = folder.join("adapters.safetensors");
        check_format(folder, &weights_path)?;
        let parameters = read_config(&config_path)?;
        let scale = scale.unwrap_or(parameters.scale);
        if !scale.is_finite() {
            return Err(Error::Adapter(format!(
                "`{}`: expected `scale` to be a finite number, got: {scale}",
                config_path.display()
            )));
        }
        let tensors = TensorFiles::open_one(&weights_path)?;
        let modules = pairs(&weights_path, &tensors)?;
        Ok(Self {
            path: weights_path,
            tensors,
            modules,
            rank: parameters.rank,
            scale,
            hooks: Mutex::default(),
            _share: gauge::Share::one(&gauge::ADAPTERS),
        })
    }

    /// Runs `hook` when the adapter is dropped: what was bound of it can go too.
    pub fn on_drop(&self, hook: impl FnOnce() + Send + 'static) {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(hook));
    }

    /// Every pair must find its module, with the right shape; the error lists all that do not.
    pub fn bind<B: Backend>(&self, config: &Config, backend: &B) -> Result<BoundAdapter<B>> {
        let mut left: BTreeSet<&str> = self.modules.iter().map(String::as_str).collect();
        let mut problems = vec![];
        let mut bind = |module: Module| -> Result<Option<B::Lora>> {
            if !left.remove(module.path.as_str()) {
                return Ok(None);
            }
            let (a, b) = (self.half(&module.path, "lora_a")?, self.half(&module.path, "lora_b")?);
            let before = problems.len();
            let (inputs, outputs) = (module.in_features, module.out_features);
            self.check(&module.path, "lora_a", &a, [inputs, self.rank], &mut problems);
            self.check(&module.path, "lora_b", &b, [self.rank, outputs], &mut problems);
            if problems.len() > before {
                return Ok(None);
            }
            backend.lora(&a, &b, self.scale).map(Some)
        };
        // As mlx-lm: an embedding's pair goes from token to hidden, a head's from hidden to token.
        let mut embedding = vocabulary(config, "model.embed_tokens");
        std::mem::swap(&mut embedding.in_features, &mut embedding.out_features);
        let embed_tokens = bind(embedding)?;
        let mut layers = vec![];
        for index in 0..config.num_hidden_layers {
            let mut layer = [const { None }; PROJECTIONS.len()];
            for (place, module) in layer.iter_mut().zip(projections(config, index)) {
                *place = bind(module)?;
            }
            layers.push(layer);
        }
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => bind(vocabulary(config, "lm_head"))?,
        };
        problems.extend(left.iter().map(|path| format!("the model has no linear layer `{path}`")));
        match problems.is_empty() {
            true => Ok(BoundAdapter { embed_tokens, layers, lm_head }),
            false => Err(Error::Adapter(format!(
                "`{}` does not fit this model: {}",
                self.path.display(),
                problems.join("; ")
            ))),
        }
    }

    fn half(&self, module: &str, half: &str) -> Result<TensorView<'_>> {
        self.tensors.require(&format!("{module}.{half}"))
    }

    fn check(
        &self,
        module: &str,
        half: &str,
        tensor: &TensorView,
        shape: [usize; 2],
        problems: &mut Vec<String>,
    ) {
        let float = matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
        if !float || tensor.shape != shape {
            let (dtype, found) = (tensor.dtype, tensor.shape);
            problems.push(format!(
                "`{module}.{half}` is {dtype:?} of shape {found:?}, expected a float of {shape:?}"
            ));
        }
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        let hooks = self.hooks.get_mut().unwrap_or_else(PoisonError::into_inner);
        hooks.drain(..).for_each(|hook| hook());
    }
}

fn check_format(folder: &Path, weights: &Path) -> Result<()> {
    if weights.exists() {
        return Ok(());
    }
    let folder_name = folder.display();
    if folder.join("adapter_model.safetensors").exists() {
        let message = "is an adapter in PEFT's format, which is not supported yet";
        return Err(Error::Unsupported(format!("`{folder_name}` {message}")));
    }
    Err(Error::NotFound(format!("there is no `adapters.safetensors` in `{folder_name}`")))
}

fn read_config(path: &Path) -> Result<LoraParameters> {
    let text = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
    let wrong = |problem: String| Error::Adapter(format!("`{}`: {problem}", path.display()));
    let config: AdapterConfig =
        serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let kind = config.fine_tune_type.as_deref().unwrap_or("lora");
    if kind != "lora" {
        let message = format!("the fine_tune_type `{kind}` is not supported (only lora is)");
        return Err(Error::Unsupported(format!("`{}`: {message}", path.display())));
    }
    let parameters =
        config.lora_parameters.ok_or_else(|| wrong("`lora_parameters` is missing".into()))?;
    if parameters.rank == 0 {
        return Err(wrong("expected `rank` to be above 0".into()));
    }
    Ok(parameters)
}

/// The modules that have both halves of a pair; an error where anything else is in the file.
fn pairs(path: &Path, tensors: &TensorFiles) -> Result<Vec<String>> {
    let mut modules = vec![];
    for name in tensors.names() {
        let Some((module, half)) = name.rsplit_once('.') else {
            return Err(unknown(path, name));
        };
        let other = match half {
            "lora_a" => "lora_b",
            "lora_b" => "lora_a",
            _ => return Err(unknown(path, name)),
        };
        if !tensors.contains(&format!("{module}.{other}")) {
            let path = path.display();
            return Err(Error::Adapter(format!(
                "`{path}` has `{name}` without `{module}.{other}`"
            )));
        }
        if half == "lora_a" {
            modules.push(module.to_owned());
        }
    }
    match modules.is_empty() {
        true => Err(Error::Adapter(format!("`{}` holds no adapter", path.display()))),
        false => Ok(modules),
    }
}

fn unknown(path: &Path, name: &str) -> Error {
    let message = "expected only `<module>.lora_a` and `<module>.lora_b`, found";
    Error::Adapter(format!("`{}`: {message} `{name}`", path.display()))
}
