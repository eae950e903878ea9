//! AWQ's and GPTQ's matrices of 4 bits in MLX's affine format, with the same numbers.
//!
//! AWQ (`gemm`) keeps `qweight [in, out / 8]`, eight outputs in a word in the order of `AWQ`; GPTQ
//! keeps `qweight [in / 8, out]`, eight inputs in a word from the low bits on, and zero points that
//! are one less. Both have `scales [groups, out]` and `qzeros [groups, out / 8]`, and mean
//! `(code - zero) * scale`: MLX's bias is `-zero * scale`. Reference: mlx-lm's `utils.py`
//! (`_transform_awq_weights`), which takes what is named gptq in AWQ's order too, and refuses
//! `g_idx`; for GPTQ's own order gptqmodel's `convert_gptq_v1_to_v2` and `dequantize_weight`.

use super::{Step, affine_entries, cast, is_float, kept};
use crate::backend::cpu::{default_threads, quantize};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::safetensors::{Entry, TensorFiles, TensorView, TensorWriter};
use crate::quant::Array;
use crate::spec::Module;
use crate::spec::Quantization;
use safetensors::tensor::Dtype;
use std::collections::BTreeMap;

/// A word's place (in 4 bits from the low ones on) of each of its eight outputs.
const AWQ: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
const GPTQ: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Awq,
    /// `one_less`: as the zero points are written
    Gptq {
        one_less: bool,
    },
}

/// A matrix that is to be unpacked.
pub struct Packed {
    module: Module,
    order: Order,
    groups: usize,
    /// of the scales, in the file and in the model
    scales: Dtype,
    dtype: Dtype,
}

pub fn steps(config: &Config, tensors: &TensorFiles) -> Result<Vec<Step>> {
    let bits = config.quant_method.as_ref().and_then(|method| method.bits).unwrap_or(4);
    if bits != 4 {
        return Err(Error::Unsupported(format!(
            "`{}`: `quantization_config` has {bits} bits, and AWQ and GPTQ can be loaded with 4: load \
             the dense model with `quantization: :int{bits}`",
            tensors.place()
        )));
    }
    let modules: BTreeMap<String, Module> =
        config.spec.linears().map(|module| (module.path.clone(), module)).collect();
    let is_packed = |module: &str| tensors.contains(&format!("{module}.qweight"));
    // As in mlx-lm, all floats get the type of the scales.
    let dtype = tensors.names().filter(|name| name.ends_with(".qweight")).last();
    let dtype = dtype.and_then(|name| scales_of(tensors, name.strip_suffix(".qweight")?));
    let mut steps = vec![];
    for (name, view) in kept(config, tensors) {
        let (module, kind) = name.rsplit_once('.').unwrap_or((name, ""));
        match (kind, modules.get(module)) {
            ("qweight", Some(known)) => {
                steps.push(Step::Unpack(Packed::new(known, &view, config, tensors, dtype)?));
            }
            ("qzeros" | "scales", _) => {}
            ("weight" | "g_idx", Some(_)) if is_packed(module) => {}
            // AutoGPTQ writes zeros as the biases of layers that have none.
            ("bias", Some(known)) if !known.bias && is_zero(&view)? => {}
            _ => {
                let to = dtype.filter(|_| is_float(view.dtype)).unwrap_or(view.dtype);
                steps.push(Step::copy(name, &view, to));
            }
        }
    }
    Ok(steps)
}

fn is_zero(tensor: &TensorView) -> Result<bool> {
    Ok(tensor.read()?.iter().all(|byte| *byte == 0))
}

fn scales_of(tensors: &TensorFiles, module: &str) -> Option<Dtype> {
    Some(tensors.get(&format!("{module}.scales"))?.dtype)
}

impl Packed {
    fn new(
        module: &Module,
        weight: &TensorView,
        config: &Config,
        tensors: &TensorFiles,
        dtype: Option<Dtype>,
    ) -> Result<Self> {
        let path = &module.path;
        let scales = tensors.require(&format!("{path}.scales"))?;
        let (inputs, outputs) = (module.in_features, module.out_features());
        let order = order(module, weight, config).ok_or_else(|| {
            let shape = &weight.shape;
            Error::Unsupported(format!(
                "`{path}.qweight` is {:?} of shape {shape:?}, which is neither AWQ's (gemm) nor GPTQ's \
                 for {inputs} inputs and {outputs} outputs in 4 bits: load the dense model with \
                 `quantization: :int4`",
                weight.dtype
            ))
        })?;
        let &[groups, _] = &*scales.shape else { return Err(unfitting(path, "scales", &scales)) };
        let group_size = inputs.checked_div(groups).unwrap_or(0);
        let layout = Quantization { group_size, bits: 4 };
        let whole = group_size * groups == inputs && layout.is_affine();
        if !whole {
            return Err(Error::Unsupported(format!(
                "`{path}` has {groups} groups for {inputs} inputs: groups of 32, 64 and 128 can be loaded"
            )));
        }
        if !is_float(scales.dtype) || *scales.shape != [groups, outputs] {
            return Err(unfitting(path, "scales", &scales));
        }
        if let Some(zeros) = tensors.get(&format!("{path}.qzeros"))
            && (!is_word(zeros.dtype) || *zeros.shape != [groups, outputs / 8])
        {
            return Err(unfitting(path, "qzeros", &zeros));
        }
        check_groups(module, order, group_size, tensors)?;
        let dtype = dtype.unwrap_or(scales.dtype);
        Ok(Self { module: module.clone(), order, groups, scales: scales.dtype, dtype })
    }

    pub fn entries(&self) -> Vec<Entry> {
        let Module { path, in_features, .. } = &self.module;
        affine_entries(path, self.module.out_features(), in_features / 8, self.groups, self.dtype)
    }

    pub fn write(&self, tensors: &TensorFiles, writer: &mut TensorWriter) -> Result<()> {
        let path = &self.module.path;
        let weight = words(&tensors.require(&format!("{path}.qweight"))?)?;
        let codes = match self.order {
            Order::Awq => regroup(&weight, self.module.in_features, default_threads()),
            Order::Gptq { .. } => transposed(&weight, self.module.out_features()),
        };
        let bytes: Vec<u8> = codes.iter().flat_map(|word| word.to_le_bytes()).collect();
        writer.write(&format!("{path}.weight"), &bytes)?;
        let scales = tensors.require(&format!("{path}.scales"))?;
        let scales = Array::new(scales.dtype, scales.shape.to_vec(), scales.read()?)?;
        let scales = transposed(&quantize::numbers(&scales)?, self.module.out_features());
        let biases = self.biases(&scales, tensors)?;
        writer.write(&format!("{path}.scales"), &self.floats(&scales)?)?;
        writer.write(&format!("{path}.biases"), &self.floats(&biases)?)
    }

    /// Rounded to the scales' type in the file, then to the model's.
    fn floats(&self, numbers: &[f32]) -> Result<Vec<u8>> {
        let bytes = quantize::bytes(self.scales, numbers)?;
        if self.scales == self.dtype { Ok(bytes) } else { cast(&bytes, self.scales, self.dtype) }
    }

    /// scales, and the result: `[out, groups]`
    fn biases(&self, scales: &[f32], tensors: &TensorFiles) -> Result<Vec<f32>> {
        let Some(zeros) = tensors.get(&format!("{}.qzeros", self.module.path)) else {
            // Symmetric: the zero point is in the middle.
            return Ok(scales.iter().map(|scale| -8.0 * scale).collect());
        };
        let (order, more) = match self.order {
            Order::Awq => (AWQ, 0),
            Order::Gptq { one_less } => (GPTQ, u32::from(one_less)),
        };
        let zero = |word: u32, place: u32| (((word >> (4 * place)) + more) & 15) as f32;
        let words = words(&zeros)?;
        let zeros: Vec<f32> =
            words.iter().flat_map(|word| order.map(|place| zero(*word, place))).collect();
        let zeros = transposed(&zeros, self.module.out_features());
        Ok(zeros.iter().zip(scales).map(|(zero, scale)| -zero * scale).collect())
    }
}

/// Whose order a weight's shape is. (mlx-lm takes AWQ's under the name of GPTQ, too.)
fn order(module: &Module, weight: &TensorView, config: &Config) -> Option<Order> {
    let (inputs, outputs) = (module.in_features, module.out_features());
    let method = config.quant_method.as_ref();
    let is_gptq = method.is_some_and(|method| method.name == "gptq");
    let &[rows, columns] = &*weight.shape else { return None };
    if !is_word(weight.dtype) || !inputs.is_multiple_of(8) || !outputs.is_multiple_of(8) {
        return None;
    }
    match [rows, columns] {
        shape if shape == [inputs, outputs / 8] => Some(Order::Awq),
        shape if is_gptq && shape == [inputs / 8, outputs] => {
            Some(Order::Gptq { one_less: !method.is_some_and(|method| method.is_v2) })
        }
        _ => None,
    }
}

fn is_word(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::I32 | Dtype::U32)
}

/// GPTQ's `g_idx` names each input's group: MLX's are of neighbours.
fn check_groups(
    module: &Module,
    order: Order,
    group_size: usize,
    tensors: &TensorFiles,
) -> Result<()> {
    let path = &module.path;
    let Some(groups) = tensors.get(&format!("{path}.g_idx")) else { return Ok(()) };
    let numbers = if is_word(groups.dtype) { words(&groups)? } else { vec![] };
    let mut pairs = numbers.iter().enumerate();
    let in_order = pairs.all(|(input, group)| *group as usize == input / group_size);
    if in_order && numbers.len() == module.in_features && order != Order::Awq {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "`{path}.g_idx`: groups that are not of consecutive inputs (`desc_act`, activation order) are \
         not supported: take a version without them, or load the dense model with \
         `quantization: :int4`"
    )))
}

fn unfitting(path: &str, suffix: &str, tensor: &TensorView) -> Error {
    let (dtype, shape) = (tensor.dtype, &tensor.shape);
    Error::Checkpoint(format!(
        "`{path}.{suffix}` is {dtype:?} of shape {shape:?}, which does not fit `{path}.qweight`"
    ))
}

fn words(view: &TensorView) -> Result<Vec<u32>> {
    let bytes = view.read()?;
    let words = bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
    Ok(words.map(u32::from_le_bytes).collect())
}

/// `[rows, columns]` -> `[columns, rows]`
fn transposed<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    let rows = values.len() / columns;
    let at = |place: usize| values[place % rows * columns + place / rows];
    (0..values.len()).map(at).collect()
}

/// AWQ's words `[inputs, outputs / 8]`, of eight outputs, as words `[outputs, inputs / 8]` of eight
/// inputs.
fn regroup(words: &[u32], inputs: usize, threads: usize) -> Vec<u32> {
    let columns = words.len() / inputs;
    let mut out = vec![0; words.len()];
    let work = columns.div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        for (part, out) in out.chunks_mut(work * inputs).enumerate() {
            scope.spawn(move || {
                for (column, out) in out.chunks_exact_mut(inputs).enumerate() {
                    let word = |input: usize| words[input * columns + part * work + column];
                    eight_outputs(word, out);
                }
            });
        }
    });
    out
}

/// out: `[8, inputs / 8]`
fn eight_outputs(word: impl Fn(usize) -> u32, out: &mut [u32]) {
    let width = out.len() / 8;
    for place in 0..width {
        for input in 0..8 {
            let word = word(8 * place + input);
            for (output, shift) in AWQ.iter().enumerate() {
                out[output * width + place] |= (word >> (4 * shift) & 15) << (4 * input);
            }
        }
    }
}
