//! An adapter's file of tensors, and the configuration beside it.

use super::fields::{Fields, short};
use super::targets::Chosen;
use super::{mlx_lm, peft};
use crate::error::{Error, Result};
use crate::files;
use crate::files::safetensors::{TensorFiles, TensorView};
use safetensors::tensor::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub const CONFIG: &str = "adapter_config.json";
const MLX_LM: &str = "adapters.safetensors";
const PEFT: &str = "adapter_model.safetensors";

/// The tensors of one module, by their names in the file.
#[derive(Debug)]
pub struct Pair {
    pub a: String,
    pub b: String,
    /// DoRA
    pub magnitude: Option<String>,
    pub rank: usize,
    pub scale: f32,
}

/// What a format's reader makes of a file.
pub struct Contents {
    /// module path -> its pair
    pub pairs: BTreeMap<String, Pair>,
    /// PEFT's orientation: a `[rank, in]`, b `[out, rank]`; mlx-lm's is `[in, rank]`, `[rank, out]`.
    pub transposed: bool,
    pub rank: usize,
    pub scale: f32,
    /// The modules that mlx-lm's configuration names.
    pub chosen: Option<Chosen>,
    /// What is not followed, for the log.
    pub warnings: Vec<String>,
}

/// A module, its two halves and DoRA's magnitude.
pub type ModuleTensors = (String, [String; 2], Option<String>);

/// Which of a module's tensors a name is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    A,
    B,
    Magnitude,
    /// A copy of the base model's weight.
    Copy,
}

/// What the readers of the formats work on.
pub struct File {
    config_path: PathBuf,
    pub path: PathBuf,
    pub tensors: TensorFiles,
    config: Value,
}

impl File {
    /// `source` is a folder, or a file of tensors with its configuration beside it.
    pub fn open(source: &Path) -> Result<Self> {
        let there = match source.is_file() {
            true => vec![source.to_owned()],
            false => in_folder(source)?,
        };
        let config_path = there[0].with_file_name(CONFIG);
        let wrong = |error| Error::Adapter(error);
        let config: Value = files::json(&config_path, files::FIELDS, wrong)?;
        // Where a folder has both, the configuration decides.
        let peft = config.get("peft_type").is_some();
        let own = |path: &&PathBuf| path.ends_with(if peft { PEFT } else { MLX_LM });
        let path = there.iter().find(own).unwrap_or(&there[0]).clone();
        let tensors = TensorFiles::open_one(&path)?;
        Ok(Self { config_path, path, tensors, config })
    }

    /// The configuration's.
    pub fn fields(&self) -> Result<Fields<'_>> {
        match &self.config {
            Value::Object(map) => Ok(Fields { file: self, map }),
            _other => Err(self.wrong("expected an object".into())),
        }
    }

    /// PEFT names its kind in the configuration; what does not is mlx-lm's.
    pub fn read(&self) -> Result<Contents> {
        let fields = self.fields()?;
        let contents = match fields.map.contains_key("peft_type") {
            true => peft::read(self, &fields)?,
            false => mlx_lm::read(self, &fields)?,
        };
        if contents.pairs.is_empty() {
            return Err(Error::Adapter(format!("`{}` holds no adapter", self.path.display())));
        }
        Ok(contents)
    }

    /// The tensors' names by module and role; `role` finds both in a name. Pairs must be whole, and
    /// have a magnitude exactly where this is DoRA.
    pub fn modules(
        &self,
        dora: bool,
        expected: &str,
        role: impl Fn(&str) -> Option<(&str, Role)>,
    ) -> Result<Vec<ModuleTensors>> {
        let mut modules: BTreeMap<&str, [Option<&str>; 3]> = BTreeMap::new();
        for name in self.tensors.names() {
            let Some((module, role)) = role(name) else {
                let name = short(name);
                return Err(self.corrupt(format!("expected only {expected}, found `{name}`")));
            };
            if role == Role::Copy {
                continue;
            }
            if role == Role::Magnitude && !dora {
                let name = short(name);
                let message = "is of DoRA, which the configuration does not name";
                return Err(self.corrupt(format!("`{name}` {message}")));
            }
            let place = &mut modules.entry(module).or_default()[role as usize];
            if let Some(other) = place.replace(name) {
                let (name, other) = (short(name), short(other));
                return Err(self.corrupt(format!("`{name}` and `{other}` are the same")));
            }
        }
        let whole = |(module, tensors)| self.whole(dora, module, tensors);
        modules.into_iter().map(whole).collect()
    }

    fn whole(
        &self,
        dora: bool,
        module: &str,
        [a, b, magnitude]: [Option<&str>; 3],
    ) -> Result<ModuleTensors> {
        let (Some(a), Some(b)) = (a, b) else {
            let half = a.or(b);
            let there = short(half.or(magnitude).unwrap_or(module));
            let missing = half.map_or("its pair".into(), |half| short(&other_half(half)));
            return Err(self.corrupt(format!("`{there}` without `{missing}`")));
        };
        if dora && magnitude.is_none() {
            let module = short(module);
            return Err(self.corrupt(format!("DoRA without a magnitude for `{module}`")));
        }
        for name in [a, b].into_iter().chain(magnitude) {
            if !is_finite(&self.tensors.require(name)?)? {
                let name = short(name);
                return Err(self.corrupt(format!("`{name}` has numbers that are NaN or infinite")));
            }
        }
        Ok((module.into(), [a.into(), b.into()], magnitude.map(str::to_owned)))
    }

    /// The file of tensors is wrong.
    fn corrupt(&self, problem: String) -> Error {
        Error::Adapter(format!("`{}`: {problem}", self.path.display()))
    }

    /// The configuration is wrong.
    pub fn wrong(&self, problem: String) -> Error {
        Error::Adapter(format!("`{}`: {problem}", self.config_path.display()))
    }

    pub fn unsupported(&self, problem: String) -> Error {
        Error::Unsupported(format!("`{}`: {problem}", self.config_path.display()))
    }
}

/// The files of an adapter's tensors in a folder, at least one.
fn in_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let paths = [MLX_LM, PEFT].map(|name| folder.join(name));
    let there: Vec<PathBuf> = paths.into_iter().filter(|path| files::is_there(path)).collect();
    if !there.is_empty() {
        return Ok(there);
    }
    let place = folder.display();
    let message = match folder.is_dir() {
        true => format!("there is no `{MLX_LM}` (mlx-lm) nor `{PEFT}` (PEFT) in `{place}`"),
        false => format!("there is no `{place}`"),
    };
    Err(Error::NotFound(message + &instead(folder)))
}

/// What a folder without an adapter's tensors has, and what to do with it.
fn instead(folder: &Path) -> String {
    let has = |name: &str| folder.join(name).exists();
    if has("adapter_model.bin") {
        return ": save `adapter_model.bin` with PEFT again, as safetensors \
            (`safe_serialization=True`)"
            .into();
    }
    if has("adapters.npz") {
        return ": `adapters.npz` is of an old mlx-lm, train or convert it with a later one".into();
    }
    if has("config.json") {
        return ": it has a `config.json`, load a model with `load_model`".into();
    }
    String::new()
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

/// Whether all numbers of a tensor are finite, where it is one of floats.
fn is_finite(tensor: &TensorView) -> Result<bool> {
    // The bits of the exponent, which are all set where a number is not finite.
    let exponent: u16 = match tensor.dtype {
        Dtype::F16 => 0x7c00,
        Dtype::BF16 => 0x7f80,
        // The upper half has a float32's exponent.
        Dtype::F32 => 0x7f80,
        _ => return Ok(true),
    };
    let size = if tensor.dtype == Dtype::F32 { 4 } else { 2 };
    let finite = |number: &[u8]| {
        u16::from_le_bytes([number[size - 2], number[size - 1]]) & exponent != exponent
    };
    Ok(tensor.read()?.chunks_exact(size).all(finite))
}
