//! A dense checkpoint, quantized: for loading, or to be kept.
//!
//! As `mlx_lm.convert` does it, every linear layer and the embedding are quantized whose rows are
//! whole groups. One of them is in memory at a time: the file is written tensor by tensor.

use crate::backend::cpu::{default_threads, quantize};
use crate::config::{Config, Quantization};
use crate::error::{Error, Result};
use crate::modules::{projections, vocabulary};
use crate::quantization::{Array, Quantized};
use crate::tensor_file::{TensorFiles, TensorView, write_views};
use safetensors::View;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// Whether a checkpoint is there to be quantized.
pub fn is_dense(config: &Config, tensors: &TensorFiles) -> bool {
    config.quantization.is_none() && !tensors.names().any(|name| name.ends_with(".scales"))
}

/// The checkpoint's tensors, quantized, from a file that nobody else sees.
pub fn quantized(
    config: &Config,
    tensors: &TensorFiles,
    layout: Quantization,
) -> Result<TensorFiles> {
    let folder = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), &error))?;
    let path = folder.path().join("model.safetensors");
    write_quantized(config, tensors, layout, &path)?;
    // The file is mapped, and goes with the map.
    TensorFiles::open_one(&path)
}

/// Writes the checkpoint of `from` to `to`, quantized where there is a layout: all that is no tensor
/// is copied.
pub fn save(from: &Path, config: &Config, layout: Option<Quantization>, to: &Path) -> Result<()> {
    let tensors = TensorFiles::open(from)?;
    let failed = |error| Error::Io(format!("could not make `{}`: {error}", to.display()));
    std::fs::create_dir_all(to).map_err(failed)?;
    if from.canonicalize().ok() == to.canonicalize().ok() {
        let message = "is where the model was loaded from: save it to another folder";
        return Err(Error::Io(format!("`{}` {message}", to.display())));
    }
    let layout = layout.filter(|_| is_dense(config, &tensors));
    let entries = std::fs::read_dir(from).map_err(|error| Error::io(from, &error))?;
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let tensors = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
        if layout.is_some() && (tensors || name == "config.json") {
            continue;
        }
        std::fs::copy(&path, to.join(&name)).map_err(|error| Error::io(&path, &error))?;
    }
    if let Some(layout) = layout {
        write_quantized(config, &tensors, layout, &to.join("model.safetensors"))?;
        write_config(from, layout, to)?;
    }
    Ok(())
}

fn write_config(from: &Path, layout: Quantization, to: &Path) -> Result<()> {
    let (from, to) = (from.join("config.json"), to.join("config.json"));
    let text = std::fs::read(&from).map_err(|error| Error::io(&from, &error))?;
    let mut config: Value = serde_json::from_slice(&text)
        .map_err(|error| Error::Config(format!("`{}`: {error}", from.display())))?;
    let quantization =
        json!({"group_size": layout.group_size, "bits": layout.bits, "mode": "affine"});
    // mlx-lm writes both, and reads the first.
    for name in ["quantization", "quantization_config"] {
        config[name] = quantization.clone();
    }
    let text = format!("{config:#}\n");
    std::fs::write(&to, text).map_err(|error| Error::io(&to, &error))
}

fn write_quantized(
    config: &Config,
    tensors: &TensorFiles,
    layout: Quantization,
    path: &Path,
) -> Result<()> {
    let conversion =
        Conversion { tensors, layout, kept: RefCell::default(), fault: RefCell::default() };
    let quantizable = quantizable(config, layout);
    let mut parts = vec![];
    for name in tensors.names() {
        let view = tensors.require(name)?;
        let module = name.strip_suffix(".weight").filter(|module| quantizable.contains(*module));
        let Some(module) = module.filter(|_| view.shape.len() == 2) else {
            parts.push(Part::whole(&conversion, name, &view));
            continue;
        };
        let (rows, columns) = (view.shape[0], view.shape[1]);
        let packed = vec![rows, columns * layout.bits / 32];
        let groups = vec![rows, columns / layout.group_size];
        for (which, suffix, dtype, shape) in [
            (Which::Weight, "weight", Dtype::U32, packed),
            (Which::Scales, "scales", view.dtype, groups.clone()),
            (Which::Biases, "biases", view.dtype, groups),
        ] {
            let name = format!("{module}.{suffix}");
            let source = format!("{module}.weight");
            parts.push(Part { conversion: &conversion, name, source, which, dtype, shape });
        }
    }
    let metadata = HashMap::from([("format".to_owned(), "mlx".to_owned())]);
    let entries: Vec<_> = parts.iter().map(|part| (part.name.as_str(), part)).collect();
    let written = write_views(path, entries, Some(metadata));
    match conversion.fault.take() {
        Some(error) => Err(error),
        None => written,
    }
}

/// The modules whose rows are whole groups.
fn quantizable(config: &Config, layout: Quantization) -> BTreeSet<String> {
    let layers = (0..config.num_hidden_layers).flat_map(|layer| projections(config, layer));
    let vocabulary = ["model.embed_tokens", "lm_head"].map(|path| vocabulary(config, path));
    let fits = |columns: usize| columns.is_multiple_of(layout.group_size);
    let all = layers.chain(vocabulary).filter(|module| fits(module.in_features));
    all.map(|module| module.path).collect()
}

struct Conversion<'a> {
    tensors: &'a TensorFiles,
    layout: Quantization,
    /// Scales and biases that were made with a part written before.
    kept: RefCell<HashMap<(String, Which), Vec<u8>>>,
    /// The writer cannot take one.
    fault: RefCell<Option<Error>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Which {
    Whole,
    Weight,
    Scales,
    Biases,
}

/// A tensor of the new file; its bytes are made when they are written.
struct Part<'a> {
    conversion: &'a Conversion<'a>,
    name: String,
    /// what it is made of
    source: String,
    which: Which,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl<'a> Part<'a> {
    fn whole(conversion: &'a Conversion<'a>, name: &str, view: &TensorView) -> Self {
        let (name, shape) = (name.to_owned(), view.shape.to_vec());
        Self {
            conversion,
            source: name.clone(),
            name,
            which: Which::Whole,
            dtype: view.dtype,
            shape,
        }
    }

    fn bytes(&self) -> Result<Vec<u8>> {
        let Conversion { tensors, layout, kept, .. } = self.conversion;
        if let Some(bytes) = kept.borrow_mut().remove(&(self.source.clone(), self.which)) {
            return Ok(bytes);
        }
        let view = tensors.require(&self.source)?;
        if self.which == Which::Whole {
            return view.read();
        }
        let (rows, columns) = (view.shape[0], view.shape[1]);
        let dense = Array::new(view.dtype, view.shape.to_vec(), view.read()?)?;
        let Quantized { weight, scales, biases } =
            quantize::quantize(&dense, rows, columns, *layout, default_threads())?;
        let mut kept = kept.borrow_mut();
        for (which, array) in [(Which::Scales, Some(scales)), (Which::Biases, biases)] {
            let bytes = array.map(|array| array.bytes).unwrap_or_default();
            kept.insert((self.source.clone(), which), bytes);
        }
        match self.which {
            Which::Weight => Ok(weight.bytes),
            which => Ok(kept.remove(&(self.source.clone(), which)).unwrap_or_default()),
        }
    }
}

impl View for &Part<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = self.bytes().unwrap_or_else(|error| {
            self.conversion.fault.borrow_mut().get_or_insert(error);
            vec![0; self.data_len()]
        });
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}
