//! From a folder to a decoder: finds every tensor by its module path, checks its shape and hands
//! it to the backend. `source` opens the folder.

mod source;

pub use source::{absent, open};

use crate::backend::{AttentionWeights, Backend, LinearWeights, QuantizedWeights};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::safetensors::{TensorFiles, TensorView};
use crate::model::convert;
use crate::model::decoder::{Decoder, Layer};
use crate::runtime::abandon;
use crate::spec::{HeadWeight, Module, Projection, QkNorm, Quantization};
use safetensors::tensor::Dtype;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

/// Where the checkpoint is dense and there is a `layout`, it is quantized on the way.
pub fn load<B: Backend>(
    folder: &Path,
    config: &Config,
    layout: Option<Quantization>,
    backend: B,
) -> Result<Decoder<B>> {
    let tensors = open(folder)?.1;
    let tensors = convert::for_loading(config, tensors, layout)?;
    let checkpoint = Checkpoint { config, tensors, taken: RefCell::default() };
    let spec = &config.spec;
    let layers: Result<_> =
        (0..spec.layers.len()).map(|index| checkpoint.layer(index, &backend)).collect();
    let decoder = Decoder {
        embed_tokens: backend.linear(&checkpoint.linears(&[spec.embedding()])?)?,
        layers: layers?,
        norm: backend.norm(&checkpoint.norm(NORM, spec.hidden)?, &spec.norm)?,
        lm_head: match spec.head.weight {
            HeadWeight::Tied | HeadWeight::Absent => None,
            _ => Some(backend.linear(&checkpoint.linears(&[spec.lm_head()])?)?),
        },
        spec: spec.clone(),
        backend,
    };
    checkpoint.check_all_taken()?;
    Ok(decoder)
}

/// A linear layer of a checkpoint, by what the headers of its files say.
pub struct FoundLinear {
    pub module: Module,
    /// none where it is dense
    pub layout: Option<Quantization>,
    /// of the scales, or of a dense weight
    pub dtype: Dtype,
}

/// All linear layers. Fails as `load` would, as far as nothing of the weights is needed for it.
pub fn linears(config: &Config, tensors: TensorFiles) -> Result<Vec<FoundLinear>> {
    let checkpoint = Checkpoint { config, tensors, taken: RefCell::default() };
    let spec = &config.spec;
    let mut found = vec![];
    for layer in 0..spec.layers.len() {
        let linears = spec.layer(layer).map(|module| checkpoint.found(module));
        found.extend(linears.collect::<Result<Vec<_>>>()?);
        spec.layer_norms(layer).try_for_each(|norm| checkpoint.norm(&norm.0, norm.1).map(drop))?;
    }
    found.push(checkpoint.found(spec.embedding())?);
    checkpoint.norm(NORM, spec.hidden)?;
    if !spec.is_tied() {
        found.push(checkpoint.found(spec.lm_head())?);
    }
    checkpoint.check_all_taken()?;
    Ok(found)
}

/// Its type is that of all activations.
const NORM: &str = "model.norm";

struct Checkpoint<'a> {
    config: &'a Config,
    tensors: TensorFiles,
    /// The names that a module has asked for.
    taken: RefCell<BTreeSet<String>>,
}

impl Checkpoint<'_> {
    fn layer<B: Backend>(&self, index: usize, backend: &B) -> Result<Layer<B>> {
        abandon::check()?;
        let spec = &self.config.spec;
        let layer = &spec.layers[index];
        let norm = |name: Option<&'static str>| {
            let load = |name: &str| {
                let weight = self.norm(&format!("model.layers.{index}.{name}"), spec.hidden)?;
                backend.norm(&weight, &layer.norms.spec)
            };
            name.map(load).transpose()
        };
        let linear =
            |projection| backend.linear(&self.linears(&spec.projection(index, projection))?);
        Ok(Layer {
            before_attention: norm(layer.norms.before_attention)?,
            qkv_proj: linear(Projection::Qkv)?,
            attention: self.attention(index, backend)?,
            o_proj: linear(Projection::O)?,
            after_attention: norm(layer.norms.after_attention)?,
            before_mlp: norm(layer.norms.before_mlp)?,
            gate_up_proj: linear(Projection::GateUp)?,
            down_proj: linear(Projection::Down)?,
            after_mlp: norm(layer.norms.after_mlp)?,
        })
    }

    fn attention<B: Backend>(&self, index: usize, backend: &B) -> Result<B::Attention> {
        let spec = &self.config.spec.layers[index].attention;
        let norms = match spec.qk_norm {
            Some(QkNorm { heads, names: [q, k], .. }) => {
                let [q_width, k_width] = spec.norm_widths(heads);
                let norm = |name: &str, width| {
                    self.norm(&format!("model.layers.{index}.self_attn.{name}"), width)
                };
                Some([norm(q, q_width)?, norm(k, k_width)?])
            }
            None => None,
        };
        let dtype = self.tensor(&format!("{NORM}.weight"))?.dtype;
        backend.attention_layer(spec, &AttentionWeights { norms, dtype })
    }

    fn found(&self, module: Module) -> Result<FoundLinear> {
        let LinearWeights { weight, quantized, .. } = self.linear(&module)?;
        let (layout, dtype) = match quantized {
            Some(QuantizedWeights { scales, layout, .. }) => (Some(layout), scales.dtype),
            None => (None, weight.dtype),
        };
        Ok(FoundLinear { module, layout, dtype })
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        self.taken.borrow_mut().insert(name.to_owned());
        self.tensors.require(name)
    }

    fn norm(&self, module: &str, width: usize) -> Result<TensorView<'_>> {
        let name = format!("{module}.weight");
        let weight = self.tensor(&name)?;
        check(&name, &weight, &[width])?;
        Ok(weight)
    }

    /// The weights of each output of some modules.
    fn linears(&self, modules: &[Module]) -> Result<Vec<LinearWeights<'_>>> {
        let mut all = vec![];
        for module in modules {
            let whole = self.linear(module)?;
            match &module.outputs[..] {
                [_] => all.push(whole),
                outputs => all.extend(outputs_of(module, outputs, &whole)?),
            }
        }
        Ok(all)
    }

    /// A module is quantized exactly if it has scales.
    fn linear(&self, module: &Module) -> Result<LinearWeights<'_>> {
        let name = format!("{}.weight", module.path);
        let weight = self.tensor(&name)?;
        let quantized = match self.tensors.contains(&format!("{}.scales", module.path)) {
            true => Some(self.quantized(module, &weight)?),
            false => {
                check(&name, &weight, &[module.out_features(), module.in_features])?;
                None
            }
        };
        let bias = module.bias.then(|| self.bias(module)).transpose()?;
        Ok(LinearWeights { weight, quantized, bias, out_features: module.out_features() })
    }

    fn bias(&self, module: &Module) -> Result<TensorView<'_>> {
        let name = format!("{}.bias", module.path);
        let bias = self.tensor(&name)?;
        check(&name, &bias, &[module.out_features()])?;
        Ok(bias)
    }

    fn quantized(&self, module: &Module, weight: &TensorView) -> Result<QuantizedWeights<'_>> {
        let path = &module.path;
        let scales = self.tensor(&format!("{path}.scales"))?;
        let layout = match self.config.overrides.get(path) {
            Some(layout) => layout.ok_or_else(|| {
                let message =
                    format!("`{path}` has scales, but `config.json` says that it has none");
                Error::Checkpoint(message)
            })?,
            // As mlx-lm: what config.json does not list by name, the tensors tell.
            None => layout_of(module, weight, &scales)?,
        };
        let columns = packed_columns(module, layout)?;
        let out_features = module.out_features();
        if weight.dtype != Dtype::U32 || *weight.shape != [out_features, columns] {
            return Err(mismatch(
                &format!("{path}.weight"),
                weight,
                &[out_features, columns],
                &format!("packed U32 ({} bits, group size {})", layout.bits, layout.group_size),
            ));
        }
        let groups = [out_features, module.in_features / layout.group_size];
        let float = |suffix: &str| {
            let name = format!("{path}.{suffix}");
            let tensor = self.tensor(&name)?;
            check(&name, &tensor, &groups)?;
            Ok::<_, Error>(tensor)
        };
        let (scales, biases) = (float("scales")?, float("biases")?);
        if scales.dtype != biases.dtype {
            let message = format!("`{path}`: scales are {:?}, biases", scales.dtype);
            return Err(Error::Checkpoint(format!("{message} {:?}", biases.dtype)));
        }
        Ok(QuantizedWeights { scales, biases, layout })
    }

    /// A tensor that no module takes says that the model is not what its config says.
    fn check_all_taken(&self) -> Result<()> {
        let taken = self.taken.borrow();
        let is_left = |name: &&str| !taken.contains(*name) && !self.config.leaves_out(name);
        let left: Vec<&str> = self.tensors.names().filter(is_left).collect();
        if left.is_empty() {
            return Ok(());
        }
        let shown = left.iter().take(5).map(|name| format!("`{name}`")).collect::<Vec<_>>();
        Err(Error::Checkpoint(format!(
            "`{}` has {} tensors that no module of a {} takes: {}",
            self.tensors.place(),
            left.len(),
            self.config.model_type,
            shown.join(", ")
        )))
    }
}

/// A module that is several layers in one, row by row.
fn outputs_of<'a>(
    module: &Module,
    outputs: &[usize],
    whole: &LinearWeights<'a>,
) -> Result<Vec<LinearWeights<'a>>> {
    let mut end = 0;
    let output = |&out_features: &usize| {
        end += out_features;
        let rows = |tensor: &TensorView<'a>| {
            let rows = tensor.rows(end - out_features..end);
            rows.ok_or_else(|| Error::Checkpoint(format!("`{}` has too few rows", module.path)))
        };
        let quantized = match &whole.quantized {
            Some(QuantizedWeights { scales, biases, layout }) => Some(QuantizedWeights {
                scales: rows(scales)?,
                biases: rows(biases)?,
                layout: *layout,
            }),
            None => None,
        };
        let bias = whole.bias.as_ref().map(rows).transpose()?;
        Ok(LinearWeights { weight: rows(&whole.weight)?, quantized, bias, out_features })
    };
    outputs.iter().map(output).collect()
}

/// bits and group size from the shapes of a weight and its scales
fn layout_of(module: &Module, weight: &TensorView, scales: &TensorView) -> Result<Quantization> {
    let (&[_, columns], &[_, groups]) = (&*weight.shape, &*scales.shape) else {
        return Err(unfitting(module, weight, scales));
    };
    let layout = Quantization {
        group_size: module.in_features.checked_div(groups).unwrap_or(0),
        bits: columns.checked_mul(32).map_or(0, |bits| bits / module.in_features),
    };
    match layout.is_affine() {
        true => Ok(layout),
        false => Err(unfitting(module, weight, scales)),
    }
}

fn unfitting(module: &Module, weight: &TensorView, scales: &TensorView) -> Error {
    Error::Checkpoint(format!(
        "`{}`: scales of shape {:?} do not fit a weight of shape {:?} for {} inputs",
        module.path, scales.shape, weight.shape, module.in_features
    ))
}

/// The u32 columns of a packed row.
fn packed_columns(module: &Module, layout: Quantization) -> Result<usize> {
    let Quantization { bits, group_size } = layout;
    if !module.in_features.is_multiple_of(group_size) {
        return Err(Error::Checkpoint(format!(
            "`{}` has rows of {} weights, which group size {group_size} does not divide",
            module.path, module.in_features
        )));
    }
    Ok(module.in_features * bits / 32)
}

fn check(name: &str, tensor: &TensorView, shape: &[usize]) -> Result<()> {
    let float = matches!(tensor.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
    if float && *tensor.shape == *shape {
        return Ok(());
    }
    Err(mismatch(name, tensor, shape, "BF16, F16 or F32"))
}

fn mismatch(name: &str, tensor: &TensorView, shape: &[usize], dtype: &str) -> Error {
    Error::Checkpoint(format!(
        "`{name}` is {:?} of shape {:?}, expected {dtype} of shape {shape:?}",
        tensor.dtype, tensor.shape
    ))
}
