//! A model's folder: its configuration and its tensors, held against each other before anything is
//! allocated by a number of the one that the other does not have.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::files;
use crate::files::safetensors::TensorFiles;
use crate::model::convert::is_packed;
use crate::spec::{HeadWeight, LM_HEAD, Module, Quantization};
use safetensors::tensor::Dtype;
use std::collections::BTreeSet;
use std::path::Path;

/// The configuration, whose quantization is that of the tensors.
pub fn open(folder: &Path) -> Result<(Config, TensorFiles)> {
    let path = folder.join("config.json");
    if !files::is_there(&path) {
        let there = files::other_formats(folder).map(|there| format!("; {there}"));
        let folder = folder.display();
        let there = there.unwrap_or_default();
        return Err(Error::NotFound(format!("there is no `config.json` in `{folder}`{there}")));
    }
    let mut config = Config::open(folder)?;
    let names = config.spec.names;
    let own = |name: &str| names.own(name);
    let is_whole = |tensors: &TensorFiles, _| missing(&config, tensors).is_none();
    let tensors = TensorFiles::choose(folder, own, is_whole)?;
    config.spec.head.weight = head(&config, &tensors);
    config.warnings.extend(left_out(&tensors));
    refuse_other_formats(&path, &config, &tensors)?;
    if let Some(name) = missing(&config, &tensors) {
        return Err(absent_error(&path, &config, &tensors, &name));
    }
    if is_packed(&tensors) {
        config.quantization = Some(packed_layout(&config));
    } else if !tensors.names().any(|name| name.ends_with(".scales")) {
        // What stands in the configuration is left from before.
        config.quantization = None;
        config.overrides.clear();
    }
    Ok((config, tensors))
}

/// The tensors that are not there, where a model is not whole: at most so many of them.
pub fn absent(folder: &Path, config: &Config, most: usize) -> Result<Vec<String>> {
    let names = config.spec.names;
    let tensors = TensorFiles::choose(folder, |name: &str| names.own(name), |_, _| true)?;
    Ok(all_missing(config, &tensors).take(most).collect())
}

/// What the files have of a head.
fn head(config: &Config, tensors: &TensorFiles) -> HeadWeight {
    let is_there = tensors.names().any(|name| name.starts_with("lm_head."));
    match config.spec.head.weight {
        HeadWeight::IfThere if is_there => HeadWeight::Linear,
        HeadWeight::IfThere => HeadWeight::Tied,
        // As published for embeddings: transformers' `AutoModel`, which has no head, saved it.
        HeadWeight::Linear if !is_there && is_bare(tensors) => HeadWeight::Absent,
        known => known,
    }
}

/// Whether names in the files do without `model.`.
fn is_bare(tensors: &TensorFiles) -> bool {
    !tensors.name_in_files("model.norm.weight").starts_with("model.")
}

/// What a wrapper has beside its language model, by the first of its names.
fn left_out(tensors: &TensorFiles) -> Option<String> {
    let first = |name: &String| name.split('.').take(2).collect::<Vec<_>>().join(".");
    let parts: BTreeSet<String> = tensors.left_out().map(first).collect();
    let (count, place) = (tensors.left_out().count(), tensors.place());
    let shown = parts.into_iter().take(4).map(|name| format!("`{name}`")).collect::<Vec<_>>();
    (count > 0).then(|| {
        let shown = shown.join(", ");
        format!("`{place}`: what is not of the language model is left, {count} tensors: {shown}")
    })
}

fn packed_layout(config: &Config) -> Quantization {
    let group_size = config.quant_method.as_ref().and_then(|method| method.group_size);
    // As mlx-lm: what is not said is AWQ's default.
    Quantization { bits: 4, group_size: group_size.unwrap_or(128) }
}

/// The first tensor that is not there. As many layers are looked at as the files have.
fn missing(config: &Config, tensors: &TensorFiles) -> Option<String> {
    all_missing(config, tensors).next()
}

fn all_missing<'a>(
    config: &'a Config,
    tensors: &'a TensorFiles,
) -> impl Iterator<Item = String> + 'a {
    let weight = |path: &str| {
        let packed = tensors.contains(&format!("{path}.qweight"));
        Some(format!("{path}.weight")).filter(|name| !packed && !tensors.contains(name))
    };
    let of = move |module: Module| {
        let bias = module.bias.then(|| format!("{}.bias", module.path));
        let bias = bias.filter(|name| !tensors.contains(name));
        weight(&module.path).into_iter().chain(bias)
    };
    let spec = &config.spec;
    // Its head need not be there.
    let has_head = head(config, tensors) == HeadWeight::Linear;
    let is_needed = move |module: &Module| module.path != LM_HEAD || has_head;
    let norms = spec.norms().filter_map(move |(path, _)| weight(&path));
    spec.linears().filter(is_needed).flat_map(of).chain(norms)
}

fn absent_error(path: &Path, config: &Config, tensors: &TensorFiles, name: &str) -> Error {
    let layers = tensors.names().filter_map(layer_of).max().map_or(0, |last| last + 1);
    let wanted = config.spec.layers.len();
    let hint = match layer_of(name) {
        Some(_) if layers < wanted => {
            format!("; `{}` says that there are {wanted} layers, here are {layers}", path.display())
        }
        _ => String::new(),
    };
    let place = tensors.place();
    Error::Checkpoint(format!("the tensor `{name}` is missing from `{place}`{hint}"))
}

/// 3 for `model.layers.3.mlp.up_proj.weight`
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

/// Weights that are neither dense nor MLX's, by whatever method.
fn refuse_other_formats(path: &Path, config: &Config, tensors: &TensorFiles) -> Result<()> {
    let method = config.quant_method.as_ref().map(|method| method.name.as_str());
    let found = tensors.names().find_map(|name| {
        let dtype = tensors.get(name)?.dtype;
        kind_of(name, dtype).map(|kind| (name, kind))
    });
    // As mlx-lm: scales that no configuration of MLX's speaks of are the method's.
    let scales = || tensors.names().find(|name| name.ends_with(".scales"));
    let found = found.or_else(|| Some((method.and_then(|_| scales())?, Kind::Other)));
    let place = tensors.place();
    let (name, kind) = match found {
        None => return Ok(()),
        Some((_, Kind::Packed)) if matches!(method, Some("awq" | "gptq")) => return Ok(()),
        Some((name, Kind::Packed)) if method.is_none() => {
            return Err(Error::Unsupported(format!(
                "`{place}`: `{name}` is AWQ's or GPTQ's, and `{}` has no `quantization_config` that \
                 says which and how: take it from the model's repository",
                path.display()
            )));
        }
        Some(found) => found,
    };
    let kind = method.map_or_else(
        || format!("`{place}`: `{name}` is of {}, which is not supported", kind.name()),
        |method| format!("`{}`: the quant_method `{method}` is not supported", path.display()),
    );
    Err(Error::Unsupported(format!(
        "{kind}: load the dense model, with `quantization: :int4` where it is to be small, or a version \
         in MLX's format (`mlx_lm.convert --hf-path <the dense model> -q` makes one); dense, in MLX's, \
         and AWQ's and GPTQ's 4 bits can be loaded"
    )))
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// AWQ or GPTQ
    Packed,
    Fp8,
    BitsAndBytes,
    Other,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Packed => "AWQ or GPTQ",
            Kind::Fp8 => "a model in fp8",
            Kind::BitsAndBytes => "bitsandbytes",
            Kind::Other => "another format's quantization",
        }
    }
}

/// What tensor names of other formats end in.
const OTHER_NAMES: [&str; 20] = [
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_scales",
    ".weight_global_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".weight._data",
    ".weight._scale",
    ".weight_blocks",
    ".q_weight",
    ".q_scale",
    ".q_perm",
    ".W_q",
    ".codes",
    ".codebooks",
    ".indices",
    ".centroids.weight",
    ".Qidxs",
    ".trellis",
];

fn kind_of(name: &str, dtype: Dtype) -> Option<Kind> {
    let has = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    let fp8 = matches!(
        dtype,
        Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ | Dtype::F8_E8M0
    );
    if has(&[".qweight", ".qzeros", ".g_idx"]) {
        Some(Kind::Packed)
    } else if fp8 || has(&[".weight_scale_inv"]) {
        Some(Kind::Fp8)
    } else if has(&[".absmax", ".quant_map", ".SCB", ".nested_absmax"])
        || name.contains(".quant_state.")
    {
        Some(Kind::BitsAndBytes)
    } else if has(&OTHER_NAMES)
        || (has(&[".weight", ".scales"]) && matches!(dtype, Dtype::I8 | Dtype::U8))
    {
        Some(Kind::Other)
    } else {
        None
    }
}
