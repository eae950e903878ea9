//! LoRA and DoRA adapters, in mlx-lm's format or PEFT's.
//!
//! `y = W x + scale * B A x` for every module that has a pair; DoRA multiplies each output with its
//! magnitude over the norm of the adapted weight's row. An adapter is read without a model, and
//! bound to one when it is first used with it.

mod mlx_lm;
mod peft;

use crate::backend::{Adapted, Backend, LoraWeights};
use crate::config::Config;
use crate::decoder::{BoundAdapter, Decoder, Layer, Loras};
use crate::error::{Error, Result};
use crate::gauge;
use crate::modules::{Module, PROJECTIONS, projections, vocabulary};
use crate::tensor_file::TensorFiles;
use safetensors::tensor::Dtype;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const EMBED_TOKENS: &str = "model.embed_tokens";
const LM_HEAD: &str = "lm_head";

pub struct Adapter {
    path: PathBuf,
    tensors: TensorFiles,
    /// module path -> its pair
    pairs: BTreeMap<String, Pair>,
    /// PEFT's orientation: a `[rank, in]`, b `[out, rank]`; mlx-lm's is `[in, rank]`, `[rank, out]`.
    transposed: bool,
    /// What most modules have.
    pub rank: usize,
    pub scale: f32,
    /// What is to be done when the adapter goes.
    hooks: Mutex<Vec<Hook>>,
    share: gauge::Share,
}

/// The tensors of one module, by their names in the file.
#[derive(Debug)]
struct Pair {
    a: String,
    b: String,
    /// DoRA
    magnitude: Option<String>,
    rank: usize,
    scale: f32,
}

/// What a format's reader makes of a file.
struct Contents {
    pairs: BTreeMap<String, Pair>,
    transposed: bool,
    rank: usize,
    scale: f32,
}

type Hook = Box<dyn FnOnce() + Send>;

impl Adapter {
    /// `path` is a folder, or a file of tensors with its `adapter_config.json` beside it. `scale`
    /// takes the place of what that says, for every module.
    pub fn open(path: &Path, scale: Option<f32>) -> Result<Self> {
        let path = weights_path(path)?;
        let config_path = path.with_file_name("adapter_config.json");
        let config =
            std::fs::read(&config_path).map_err(|error| Error::io(&config_path, &error))?;
        let tensors = TensorFiles::open_one(&path)?;
        let file = File { config_path: &config_path, path: &path, tensors: &tensors };
        let mut contents = file.read(&config)?;
        if let Some(scale) = scale {
            contents.scale = scale;
            contents.pairs.values_mut().for_each(|pair| pair.scale = scale);
        }
        let scales = contents.pairs.values().map(|pair| pair.scale);
        if let Some(scale) = scales.chain([contents.scale]).find(|scale| !scale.is_finite()) {
            return Err(
                file.wrong(format!("expected the scale to be a finite number, got: {scale}"))
            );
        }
        Ok(Self {
            pairs: contents.pairs,
            transposed: contents.transposed,
            rank: contents.rank,
            scale: contents.scale,
            path,
            tensors,
            hooks: Mutex::default(),
            share: gauge::Share::one(&gauge::ADAPTERS),
        })
    }

    /// Runs `hook` when the adapter is dropped: what was bound of it can go too.
    pub fn on_drop(&self, hook: impl FnOnce() + Send + 'static) {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(hook));
    }

    pub fn bind<B: Backend>(
        &self,
        config: &Config,
        decoder: &Decoder<B>,
    ) -> Result<BoundAdapter<B>> {
        self.check(config)?;
        let layers = decoder.layers.iter().enumerate();
        let layers = layers.map(|(index, layer)| self.bind_layer(config, layer, index, decoder));
        self.bind_vocabulary(decoder, layers.collect::<Result<_>>()?)
    }

    /// The pairs of one layer.
    pub fn bind_layer<B: Backend>(
        &self,
        config: &Config,
        layer: &Layer<B>,
        index: usize,
        decoder: &Decoder<B>,
    ) -> Result<Loras<B>> {
        let mut loras = [const { None }; PROJECTIONS.len()];
        for (place, module) in projections(config, index).iter().enumerate() {
            let (linear, part) = layer.projection(place);
            loras[place] =
                self.lora(&module.path, Adapted::Projection(linear, part), &decoder.backend)?;
        }
        Ok(loras)
    }

    /// The pairs of embedding and head, behind those of all layers.
    pub fn bind_vocabulary<B: Backend>(
        &self,
        decoder: &Decoder<B>,
        layers: Vec<Loras<B>>,
    ) -> Result<BoundAdapter<B>> {
        let backend = &decoder.backend;
        let lora = |path: &str, adapted: Adapted<B>| self.lora(path, adapted, backend);
        let embed_tokens = lora(EMBED_TOKENS, Adapted::Embedding(&decoder.embed_tokens))?;
        let lm_head = match (&decoder.lm_head, self.pairs.get(EMBED_TOKENS)) {
            (Some(lm_head), _) => lora(LM_HEAD, Adapted::Projection(lm_head, 0))?,
            (None, Some(pair)) if !self.transposed => {
                // mlx-lm's embedding is the head the other way round, its pair too. (PEFT adapts
                // them one by one, a tied head as `lm_head`.)
                let LoraWeights { a, b, transposed, scale, magnitude } = self.weights(pair)?;
                let turned = LoraWeights { a: b, b: a, transposed: !transposed, scale, magnitude };
                Some(backend.lora(&turned, Adapted::TiedHead(&decoder.embed_tokens))?)
            }
            (None, _) => lora(LM_HEAD, Adapted::TiedHead(&decoder.embed_tokens))?,
        };
        Ok(BoundAdapter { embed_tokens, layers, lm_head })
    }

    fn lora<B: Backend>(
        &self,
        path: &str,
        adapted: Adapted<B>,
        backend: &B,
    ) -> Result<Option<B::Lora>> {
        let weights = self.pairs.get(path).map(|pair| self.weights(pair)).transpose()?;
        weights.map(|weights| backend.lora(&weights, adapted)).transpose()
    }

    /// Every tensor must find its module, with the right shape; the error lists all that do not.
    pub fn check(&self, config: &Config) -> Result<()> {
        let layers = 0..config.num_hidden_layers;
        let mut modules: Vec<Module> =
            layers.flat_map(|layer| projections(config, layer)).collect();
        modules.push(turned(vocabulary(config, EMBED_TOKENS)));
        // mlx-lm has no head of its own where it is tied; PEFT adapts it all the same.
        if !config.tie_word_embeddings || self.transposed {
            modules.push(vocabulary(config, LM_HEAD));
        }
        let modules: BTreeMap<&str, &Module> =
            modules.iter().map(|module| (module.path.as_str(), module)).collect();
        let mut problems = vec![];
        for (path, pair) in &self.pairs {
            match modules.get(path.as_str()) {
                Some(module) => self.check_pair(module, pair, &mut problems),
                None => problems.push(format!("the model has no linear layer `{path}`")),
            }
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Adapter(format!(
                "`{}` does not fit this model: {}",
                self.path.display(),
                problems.join("; ")
            ))),
        }
    }

    fn check_pair(&self, module: &Module, pair: &Pair, problems: &mut Vec<String>) {
        let (inputs, outputs, rank) = (module.in_features, module.out_features, pair.rank);
        let [a, b] = match self.transposed {
            false => [[inputs, rank], [rank, outputs]],
            true => [[rank, inputs], [outputs, rank]],
        };
        // Of mlx-lm's embedding, every token has its own.
        let by_token = module.path == EMBED_TOKENS && !self.transposed;
        let magnitudes = if by_token { inputs } else { outputs };
        let magnitude = pair.magnitude.iter().map(|name| (name, std::slice::from_ref(&magnitudes)));
        for (name, shape) in [(&pair.a, &a[..]), (&pair.b, &b[..])].into_iter().chain(magnitude) {
            let Some(tensor) = self.tensors.get(name) else { continue };
            let float = matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
            if !float || tensor.shape != shape {
                problems.push(format!(
                    "`{name}` is {:?} of shape {:?}, expected a float of {shape:?}",
                    tensor.dtype, tensor.shape
                ));
            }
        }
    }

    fn weights(&self, pair: &Pair) -> Result<LoraWeights<'_>> {
        let magnitude = pair.magnitude.as_ref();
        Ok(LoraWeights {
            a: self.tensors.require(&pair.a)?,
            b: self.tensors.require(&pair.b)?,
            transposed: self.transposed,
            scale: pair.scale,
            magnitude: magnitude.map(|name| self.tensors.require(name)).transpose()?,
        })
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        // Whoever hears of the end finds it counted.
        self.share.set(0);
        let hooks = self.hooks.get_mut().unwrap_or_else(PoisonError::into_inner);
        hooks.drain(..).for_each(|hook| hook());
    }
}

/// An embedding's pair goes from token to hidden, where a head's goes from hidden to token.
fn turned(module: Module) -> Module {
    let Module { path, in_features, out_features } = module;
    Module { path, in_features: out_features, out_features: in_features }
}

/// The file of tensors that a source means.
fn weights_path(path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        return Ok(path.to_owned());
    }
    let names = ["adapters.safetensors", "adapter_model.safetensors"];
    let there = names.map(|name| path.join(name)).into_iter().find(|path| path.exists());
    there.ok_or_else(|| {
        let message = "there is no `adapters.safetensors` (mlx-lm) nor";
        let peft = "`adapter_model.safetensors` (PEFT)";
        Error::NotFound(format!("{message} {peft} in `{}`", path.display()))
    })
}

/// What the readers of the formats work on.
struct File<'a> {
    config_path: &'a Path,
    path: &'a Path,
    tensors: &'a TensorFiles,
}

/// A module, its two halves and DoRA's magnitude.
type ModuleTensors = (String, [String; 2], Option<String>);

/// Which of a module's tensors a name is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    A,
    B,
    Magnitude,
    /// A copy of the base model's weight.
    Copy,
}

/// The name of the other half of a pair, in either format.
fn other_half(name: &str) -> String {
    let halves = [("_a", "_b"), ("_b", "_a"), ("_A", "_B"), ("_B", "_A")];
    let (module, role) = name.rsplit_once(".lora").unwrap_or((name, ""));
    let half = halves.iter().find(|(half, _)| role.contains(half));
    half.map_or(name.into(), |(half, other)| {
        format!("{module}.lora{}", role.replacen(half, other, 1))
    })
}

impl File<'_> {
    /// PEFT names its kind in the configuration; what does not is mlx-lm's.
    fn read(&self, config: &[u8]) -> Result<Contents> {
        let config: serde_json::Value =
            serde_json::from_slice(config).map_err(|error| self.wrong(error.to_string()))?;
        let contents = match config.get("peft_type") {
            Some(_) => peft::read(self, config)?,
            None => mlx_lm::read(self, config)?,
        };
        if contents.pairs.is_empty() {
            return Err(Error::Adapter(format!("`{}` holds no adapter", self.path.display())));
        }
        Ok(contents)
    }

    /// The tensors' names by module and role; `role` finds both in a name. Pairs must be whole, and
    /// have a magnitude exactly where this is DoRA.
    fn modules(
        &self,
        dora: bool,
        expected: &str,
        role: impl Fn(&str) -> Option<(&str, Role)>,
    ) -> Result<Vec<ModuleTensors>> {
        let mut modules: BTreeMap<&str, [Option<&str>; 3]> = BTreeMap::new();
        for name in self.tensors.names() {
            let Some((module, role)) = role(name) else {
                return Err(self.corrupt(format!("expected only {expected}, found `{name}`")));
            };
            if role == Role::Copy {
                continue;
            }
            if role == Role::Magnitude && !dora {
                let message = "is of DoRA, which the configuration does not name";
                return Err(self.corrupt(format!("`{name}` {message}")));
            }
            let place = &mut modules.entry(module).or_default()[role as usize];
            if let Some(other) = place.replace(name) {
                return Err(self.corrupt(format!("`{name}` and `{other}` are the same")));
            }
        }
        let whole = |(module, [a, b, magnitude]): (&str, [Option<&str>; 3])| {
            let half = |half: Option<&str>, other: Option<&str>| {
                half.map(str::to_owned).ok_or_else(|| {
                    let (there, missing) = (other.or(magnitude), other.map(other_half));
                    let missing = missing.unwrap_or_else(|| "its pair".into());
                    self.corrupt(format!("`{}` without `{missing}`", there.unwrap_or(module)))
                })
            };
            let pair = [half(a, b)?, half(b, a)?];
            if dora && magnitude.is_none() {
                return Err(self.corrupt(format!("DoRA without a magnitude for `{module}`")));
            }
            Ok((module.to_owned(), pair, magnitude.map(str::to_owned)))
        };
        modules.into_iter().map(whole).collect()
    }

    /// The file of tensors is wrong.
    fn corrupt(&self, problem: String) -> Error {
        Error::Adapter(format!("`{}`: {problem}", self.path.display()))
    }

    /// The configuration is wrong.
    fn wrong(&self, problem: String) -> Error {
        Error::Adapter(format!("`{}`: {problem}", self.config_path.display()))
    }

    fn unsupported(&self, problem: String) -> Error {
        Error::Unsupported(format!("`{}`: {problem}", self.config_path.display()))
    }
}
