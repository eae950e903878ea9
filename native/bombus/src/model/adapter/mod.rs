//! LoRA and DoRA adapters, in mlx-lm's format or PEFT's.
//!
//! `y = W x + scale * B A x` for every module that has a pair; DoRA multiplies each output with its
//! magnitude over the norm of the adapted weight's row. An adapter is read without a model, and
//! bound to one when it is first used with it.

mod fields;
mod file;
mod mlx_lm;
mod patterns;
mod peft;
mod peft_kinds;
mod targets;

use crate::backend::{Adapted, Backend, BoundAdapter, LoraWeights, Loras};
use crate::error::{Error, Result};
use crate::files::safetensors::TensorFiles;
use crate::model::decoder::Decoder;
use crate::runtime::metrics;
use crate::spec::{EMBED_TOKENS, LM_HEAD, ModelSpec, Module, Projection};
use fields::short;
use file::{File, Pair};
use safetensors::tensor::Dtype;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use targets::Chosen;

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
    chosen: Option<Chosen>,
    /// What of its files is not followed, for the log.
    pub warnings: Vec<String>,
    /// What is to be done when the adapter goes.
    hooks: Mutex<Vec<Hook>>,
    /// What is to be done when requests with it are cancelled; `None` once they are.
    cancel_hooks: Mutex<Option<Vec<Hook>>>,
    share: metrics::Share,
}

type Hook = Box<dyn FnOnce() + Send>;

impl Adapter {
    /// `path` is a folder, or a file of tensors with its `adapter_config.json` beside it. `scale`
    /// takes the place of what that says, for every module.
    pub fn open(path: &Path, scale: Option<f32>) -> Result<Self> {
        let file = File::open(path)?;
        let mut contents = file.read()?;
        if let Some(scale) = scale {
            contents.scale = scale;
            contents.pairs.values_mut().for_each(|pair| pair.scale = scale);
        }
        let scales = contents.pairs.values().map(|pair| pair.scale);
        if let Some(scale) = scales.chain([contents.scale]).find(|scale| !scale.is_finite()) {
            let message = format!("expected the scale to be a finite number, got: {scale}");
            return Err(file.wrong(message));
        }
        let File { path, tensors, .. } = file;
        Ok(Self {
            pairs: contents.pairs,
            transposed: contents.transposed,
            rank: contents.rank,
            scale: contents.scale,
            chosen: contents.chosen,
            warnings: contents.warnings,
            path,
            tensors,
            hooks: Mutex::default(),
            cancel_hooks: Mutex::new(Some(vec![])),
            share: metrics::Share::one(&metrics::ADAPTERS),
        })
    }

    /// Whether it is in PEFT's format; else in mlx-lm's.
    pub fn is_peft(&self) -> bool {
        self.transposed
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `hook` when the adapter is dropped: what was bound of it can go too.
    pub fn on_drop(&self, hook: impl FnOnce() + Send + 'static) {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(hook));
    }

    /// Runs `hook` when requests with the adapter are to be cancelled, at once where they are.
    pub fn on_cancel(&self, hook: impl FnOnce() + Send + 'static) {
        match &mut *self.cancel_hooks.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(hooks) => hooks.push(Box::new(hook)),
            None => hook(),
        }
    }

    /// Requests with it end, also those that come later.
    pub fn cancel(&self) {
        let hooks = self.cancel_hooks.lock().unwrap_or_else(PoisonError::into_inner).take();
        hooks.into_iter().flatten().for_each(|hook| hook());
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancel_hooks.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    pub fn bind<B: Backend>(&self, decoder: &Decoder<B>) -> Result<BoundAdapter<B>> {
        self.check(&decoder.spec)?;
        let layers = (0..decoder.layers.len()).map(|index| self.bind_layer(index, decoder));
        self.bind_vocabulary(decoder, layers.collect::<Result<_>>()?)
    }

    /// The pairs of one layer.
    pub fn bind_layer<B: Backend>(&self, index: usize, decoder: &Decoder<B>) -> Result<Loras<B>> {
        let mut loras = [const { vec![] }; Projection::ALL.len()];
        for projection in Projection::ALL {
            let linear = decoder.layers[index].projection(projection);
            for module in decoder.spec.projection(index, projection) {
                let mut end = 0;
                for count in &module.outputs {
                    end += count;
                    let adapted = Adapted::Projection(linear, loras[projection as usize].len());
                    let outputs = (module.outputs.len() > 1).then_some(end - count..end);
                    let own =
                        self.lora(&decoder.spec, &module.path, outputs, adapted, &decoder.backend)?;
                    loras[projection as usize].push(own);
                }
            }
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
        let lora = |path: &str, adapted: Adapted<B>| {
            self.lora(&decoder.spec, path, None, adapted, backend)
        };
        let embed_tokens = lora(EMBED_TOKENS, Adapted::Embedding(&decoder.embed_tokens))?;
        let lm_head = match (&decoder.lm_head, self.pair(&decoder.spec, EMBED_TOKENS)) {
            (Some(lm_head), _) => lora(LM_HEAD, Adapted::Projection(lm_head, 0))?,
            (None, Some(pair)) if !self.transposed => {
                // mlx-lm's embedding is the head the other way round, its pair too. (PEFT adapts
                // them one by one, a tied head as `lm_head`.)
                let weights = self.weights(pair)?;
                let transposed = !weights.transposed;
                let turned = LoraWeights { a: weights.b, b: weights.a, transposed, ..weights };
                Some(backend.lora(&turned, Adapted::TiedHead(&decoder.embed_tokens))?)
            }
            (None, _) => lora(LM_HEAD, Adapted::TiedHead(&decoder.embed_tokens))?,
        };
        Ok(BoundAdapter { embed_tokens, layers, lm_head })
    }

    /// `outputs`: those of the module that are meant, where they are not all
    fn lora<B: Backend>(
        &self,
        spec: &ModelSpec,
        path: &str,
        outputs: Option<Range<usize>>,
        adapted: Adapted<B>,
        backend: &B,
    ) -> Result<Option<B::Lora>> {
        let Some(pair) = self.pair(spec, path) else { return Ok(None) };
        let weights = LoraWeights { outputs, ..self.weights(pair)? };
        backend.lora(&weights, adapted).map(Some)
    }

    /// The pair of a module, by whatever name its file has for it.
    fn pair(&self, spec: &ModelSpec, path: &str) -> Option<&Pair> {
        let other = || spec.names.others(path).find_map(|name| self.pairs.get(&name));
        self.pairs.get(path).or_else(other)
    }

    /// Every tensor must find its module, with the right shape; the error lists the first that do not.
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        let mut modules: Vec<Module> =
            (0..spec.layers.len()).flat_map(|layer| spec.layer(layer)).collect();
        modules.push(turned(spec.embedding()));
        // mlx-lm has no head of its own where it is tied; PEFT adapts it all the same.
        if !spec.is_tied() || self.transposed {
            modules.push(spec.lm_head());
        }
        let modules: BTreeMap<&str, &Module> =
            modules.iter().map(|module| (module.path.as_str(), module)).collect();
        let mut problems = vec![];
        for (path, pair) in &self.pairs {
            let own = spec.names.own_path(path).unwrap_or_else(|| path.clone());
            let is_chosen = |chosen: &Chosen| {
                [path, &own].iter().any(|path| chosen.names(path, spec.layers.len()))
            };
            if !self.chosen.as_ref().is_none_or(is_chosen) {
                let path = short(path);
                let fields = "`num_layers` and `keys` of its `adapter_config.json`";
                problems.push(format!("{fields} do not name `{path}`"));
                continue;
            }
            match modules.get(own.as_str()) {
                Some(module) => self.check_pair(module, pair, &mut problems),
                None => {
                    let path = short(path);
                    problems.push(format!("the model has no linear layer `{path}`"));
                }
            }
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Adapter(format!(
                "`{}` does not fit this model: {}",
                self.path.display(),
                listed(&problems)
            ))),
        }
    }

    fn check_pair(&self, module: &Module, pair: &Pair, problems: &mut Vec<String>) {
        let (inputs, outputs, rank) = (module.in_features, module.out_features(), pair.rank);
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
            if !float || *tensor.shape != *shape {
                let (name, found) = (short(name), short(&format!("{:?}", tensor.shape)));
                problems.push(format!(
                    "`{name}` is {:?} of shape {found}, expected a float of {shape:?}",
                    tensor.dtype
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
            outputs: None,
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
    let in_features = module.out_features();
    Module { in_features, outputs: vec![module.in_features], ..module }
}

/// The problems that an error lists.
const LISTED: usize = 4;

/// The first of them, and how many more there are.
fn listed(problems: &[String]) -> String {
    let first = problems[..problems.len().min(LISTED)].join("; ");
    match problems.len().saturating_sub(LISTED) {
        0 => first,
        more => format!("{first}; and {more} more"),
    }
}
