//! Checkpoints made of others: a dense one quantized, AWQ's and GPTQ's codes in MLX's order, one
//! without what no module takes. For loading (through a file that nobody else sees), or to be kept
//! (`save`).
//!
//! As `mlx_lm.convert` does it, every linear layer and the embedding are quantized whose rows are
//! whole groups. A part of one tensor is in memory at a time.

mod packed;
mod save;

pub use save::save;

use crate::backend::cpu::{default_threads, quantize};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files;
use crate::files::safetensors::{Entry, TensorFiles, TensorView, TensorWriter};
use crate::quant::{Array, Quantized};
use crate::runtime::abandon;
use crate::spec::Quantization;
use packed::Packed;
use safetensors::tensor::Dtype;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::Path;

/// Whether its weights are packed as AWQ or GPTQ do it.
pub fn is_packed(tensors: &TensorFiles) -> bool {
    tensors.names().any(|name| name.ends_with(".qweight"))
}

/// Whether a checkpoint is there to be quantized.
fn is_dense(config: &Config, tensors: &TensorFiles) -> bool {
    config.quantization.is_none() && !tensors.names().any(|name| name.ends_with(".scales"))
}

/// The tensors as a model is loaded from them: quantized where there is a `layout` and they are
/// dense.
pub fn for_loading(
    config: &Config,
    tensors: TensorFiles,
    layout: Option<Quantization>,
) -> Result<TensorFiles> {
    let Some(steps) = steps(config, &tensors, layout)? else { return Ok(tensors) };
    let temporary = std::env::temp_dir();
    let failed = |error| files::write_error(&temporary, &error);
    let folder = tempfile::tempdir().map_err(failed)?;
    let path = folder.path().join("model.safetensors");
    let file = File::create_new(&path).map_err(failed)?;
    write(&steps, &tensors, &file, &path, &str::to_owned).map_err(|error| match error {
        Error::DiskFull(problem) => Error::DiskFull(format!(
            "{problem}: the converted model needs room in `{}` while it is loaded (the environment \
             variable TMPDIR names another folder); `save_model` keeps it",
            temporary.display()
        )),
        other => other,
    })?;
    // The file is mapped, and goes with the map.
    TensorFiles::open_one(&path)
}

/// Fails where `for_loading` would before it writes.
pub fn check(config: &Config, tensors: &TensorFiles) -> Result<()> {
    steps(config, tensors, None).map(drop)
}

/// What makes each tensor of the new file; none where the tensors are taken as they are.
fn steps(
    config: &Config,
    tensors: &TensorFiles,
    layout: Option<Quantization>,
) -> Result<Option<Vec<Step>>> {
    if is_packed(tensors) {
        return packed::steps(config, tensors).map(Some);
    }
    match layout.filter(|_| is_dense(config, tensors)) {
        Some(layout) => Ok(Some(quantizing(config, tensors, layout))),
        None => Ok(None),
    }
}

fn quantizing(config: &Config, tensors: &TensorFiles, layout: Quantization) -> Vec<Step> {
    let fits = |columns: usize| columns.is_multiple_of(layout.group_size);
    let modules: BTreeMap<String, [usize; 2]> = config
        .spec
        .linears()
        .filter(|module| fits(module.in_features))
        .map(|module| {
            let shape = [module.out_features(), module.in_features];
            (module.path, shape)
        })
        .collect();
    let step = |(name, view): (&str, TensorView)| {
        let module = name.strip_suffix(".weight");
        let shape = module.and_then(|module| modules.get(module));
        match (module, shape) {
            (Some(module), Some(shape)) if *view.shape == shape[..] && is_float(view.dtype) => {
                Step::Quantize { module: module.into(), shape: *shape, dtype: view.dtype, layout }
            }
            _ => Step::copy(name, &view, view.dtype),
        }
    };
    kept(config, tensors).map(step).collect()
}

/// The tensors that a module takes, or that nobody knows.
fn kept<'a>(
    config: &'a Config,
    tensors: &'a TensorFiles,
) -> impl Iterator<Item = (&'a str, TensorView<'a>)> {
    let names = tensors.names().filter(|name| !config.leaves_out(name));
    names.filter_map(|name| Some((name, tensors.get(name)?)))
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
}

/// What makes one tensor, or the three of a quantized matrix.
enum Step {
    /// As it is, or in another float.
    Copy {
        entry: Entry,
        from: Dtype,
    },
    Quantize {
        module: String,
        shape: [usize; 2],
        dtype: Dtype,
        layout: Quantization,
    },
    Unpack(Packed),
}

/// So many bytes of a tensor are in memory at a time.
const PIECE: usize = 32 << 20;

impl Step {
    fn copy(name: &str, view: &TensorView, dtype: Dtype) -> Self {
        let (name, shape) = (name.to_owned(), view.shape.to_vec());
        Self::Copy { entry: Entry { name, dtype, shape }, from: view.dtype }
    }

    fn entries(&self) -> Vec<Entry> {
        match self {
            Self::Copy { entry, .. } => vec![entry.clone()],
            Self::Quantize { module, shape: [rows, columns], dtype, layout } => {
                let packed = columns / layout.group_size * (layout.group_size * layout.bits / 32);
                affine_entries(module, *rows, packed, columns / layout.group_size, *dtype)
            }
            Self::Unpack(packed) => packed.entries(),
        }
    }

    fn write(&self, tensors: &TensorFiles, writer: &mut TensorWriter) -> Result<()> {
        match self {
            Self::Copy { entry, from } => copy(entry, *from, tensors, writer),
            Self::Quantize { module, shape, dtype, layout } => {
                quantize_rows(module, *shape, *dtype, *layout, tensors, writer)
            }
            Self::Unpack(packed) => packed.write(tensors, writer),
        }
    }
}

/// A matrix in MLX's affine format.
fn affine_entries(
    module: &str,
    rows: usize,
    packed: usize,
    groups: usize,
    dtype: Dtype,
) -> Vec<Entry> {
    let entry = |suffix: &str, dtype, columns| {
        let name = format!("{module}.{suffix}");
        Entry { name, dtype, shape: vec![rows, columns] }
    };
    vec![
        entry("weight", Dtype::U32, packed),
        entry("scales", dtype, groups),
        entry("biases", dtype, groups),
    ]
}

fn copy(
    entry: &Entry,
    from: Dtype,
    tensors: &TensorFiles,
    writer: &mut TensorWriter,
) -> Result<()> {
    let mapped = tensors.require(&entry.name)?.map();
    let written = mapped.bytes().chunks(PIECE).try_for_each(|bytes| match from == entry.dtype {
        true => writer.write(&entry.name, bytes),
        false => writer.write(&entry.name, &cast(bytes, from, entry.dtype)?),
    });
    // Where the source has changed, that is why it could not be written.
    mapped.file.check().and(written)
}

/// Floats in another type, each rounded to the nearest.
fn cast(bytes: &[u8], from: Dtype, to: Dtype) -> Result<Vec<u8>> {
    let count = bytes.len() * 8 / from.bitsize();
    let array = Array::new(from, vec![count], bytes.to_vec())?;
    quantize::bytes(to, &quantize::numbers(&array)?)
}

fn quantize_rows(
    module: &str,
    [_, columns]: [usize; 2],
    dtype: Dtype,
    layout: Quantization,
    tensors: &TensorFiles,
    writer: &mut TensorWriter,
) -> Result<()> {
    let mapped = tensors.require(&format!("{module}.weight"))?.map();
    let width = columns * dtype.bitsize() / 8;
    for bytes in mapped.bytes().chunks((PIECE / width).max(1) * width) {
        let rows = bytes.len() / width;
        let dense = Array::new(dtype, vec![rows, columns], bytes.to_vec())?;
        let Quantized { weight, scales, biases } =
            quantize::quantize(&dense, rows, columns, layout, default_threads())?;
        writer.write(&format!("{module}.weight"), &weight.bytes)?;
        writer.write(&format!("{module}.scales"), &scales.bytes)?;
        if let Some(biases) = biases {
            writer.write(&format!("{module}.biases"), &biases.bytes)?;
        }
    }
    mapped.file.check()
}

/// `path`: for messages; `renamed`: what the file calls a tensor
fn write(
    steps: &[Step],
    tensors: &TensorFiles,
    file: &File,
    path: &Path,
    renamed: &dyn Fn(&str) -> String,
) -> Result<()> {
    let entries = steps.iter().flat_map(Step::entries).collect();
    let metadata = HashMap::from([("format".to_owned(), "mlx".to_owned())]);
    let mut writer = TensorWriter::new(file, path, entries, Some(metadata), renamed)?;
    for step in steps {
        abandon::check()?;
        step.write(tensors, &mut writer)?;
    }
    writer.finish()
}
