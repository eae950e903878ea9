//! A model's checkpoint, written to another folder: all or nothing.

use super::{Step, is_dense, is_packed, kept, steps, write};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::safetensors::{INDEX, SINGLE, TensorFiles, is_shard, read_index};
use crate::files::{self, NewFile, TEMPLATES, kind, write_error};
use crate::spec::Quantization;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Writes the checkpoint of `from`, whose `config` and `tensors` these are, to `to`: quantized where
/// there is a layout and it is dense, without tensors that no module takes, and with all files
/// beside it that are no weights. `overwrite`: files of another model that are in `to` go
pub fn save(
    from: &Path,
    (config, tensors): (&Config, &TensorFiles),
    layout: Option<Quantization>,
    to: &Path,
    overwrite: bool,
) -> Result<()> {
    let target = Target::prepare(from, to, overwrite)?;
    let layout = layout.filter(|_| is_dense(config, tensors));
    let quantization = match layout {
        None if is_packed(tensors) => config.quantization,
        layout => layout,
    };
    match steps(config, tensors, layout)?.or_else(|| without_left_out(config, tensors)) {
        Some(steps) => {
            let file = target.create(SINGLE)?;
            // As the model's other files know them, whatever we call them.
            let renamed = |name: &str| tensors.name_in_files(name);
            write(&steps, tensors, file.file(), &to.join(SINGLE), &renamed)?;
            file.finish()?;
        }
        None => copy_tensors(from, tensors, &target)?,
    }
    write_config(from, config, quantization, &target)?;
    copy_others(from, &target)?;
    target.finish()
}

/// All tensors but those that are left out; none where that is all of them.
fn without_left_out(config: &Config, tensors: &TensorFiles) -> Option<Vec<Step>> {
    let step = |(name, view): (&str, _)| Step::copy(name, &view, view.dtype);
    let all = tensors.names().all(|name| !config.leaves_out(name));
    (!all).then(|| kept(config, tensors).map(step).collect())
}

fn copy_tensors(from: &Path, tensors: &TensorFiles, target: &Target) -> Result<()> {
    let mut names = BTreeSet::new();
    for path in tensors.paths() {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        target.copy(path, &name)?;
        names.insert(name);
    }
    // An index that is left from before would be believed by others.
    match read_index(&from.join(INDEX)) {
        Ok(index) if index.keys().eq(&names) => target.copy(&from.join(INDEX), INDEX),
        _ => Ok(()),
    }
}

fn write_config(
    from: &Path,
    config: &Config,
    quantization: Option<Quantization>,
    target: &Target,
) -> Result<()> {
    let (from, name) = (from.join("config.json"), "config.json");
    let left_from_before = config.quantization.is_none();
    let mut fields: Map<String, Value> = files::json(&from, files::FIELDS, Error::Config)?;
    // mlx-lm writes both, and reads the first.
    let names = ["quantization", "quantization_config"];
    let has_any = names.iter().any(|name| fields.contains_key(*name));
    match quantization {
        Some(Quantization { group_size, bits }) => {
            let quantization = json!({"group_size": group_size, "bits": bits, "mode": "affine"});
            for name in names {
                fields.insert(name.into(), quantization.clone());
            }
        }
        None if left_from_before && has_any => {
            fields.retain(|name, _| !names.contains(&name.as_str()));
        }
        None => return target.copy(&from, name),
    }
    let mut file = target.create(name)?;
    file.write(format!("{:#}\n", Value::Object(fields)).as_bytes())?;
    file.finish()
}

/// Tokenizer, templates, model card: all that is no weights.
fn copy_others(from: &Path, target: &Target) -> Result<()> {
    for name in others(from)? {
        target.copy(&from.join(&name), &name)?;
    }
    let templates = from.join(TEMPLATES);
    if !templates.is_dir() {
        return Ok(());
    }
    target.create_folder(TEMPLATES)?;
    for name in names(&templates)? {
        let path = templates.join(&name);
        if path.is_file() {
            target.copy(&path, &format!("{TEMPLATES}/{name}"))?;
        }
    }
    Ok(())
}

fn others(from: &Path) -> Result<BTreeSet<String>> {
    let is_other =
        |name: &String| name != "config.json" && !is_weights(name) && from.join(name).is_file();
    Ok(names(from)?.into_iter().filter(is_other).collect())
}

fn is_weights(name: &str) -> bool {
    const ENDS: [&str; 14] = [
        ".safetensors",
        ".index.json",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".pkl",
        ".gguf",
        ".npz",
        ".h5",
        ".msgpack",
        ".onnx",
        ".incomplete",
        ".part",
    ];
    let name = name.to_ascii_lowercase();
    ENDS.iter().any(|end| name.ends_with(end))
}

/// A folder that is filled beside its files' places, which they take when all is there.
struct Target {
    to: PathBuf,
    /// Within `to` where that is there, which may be on a disk of its own; else beside it.
    staging: TempDir,
    is_new: bool,
    overwrite: bool,
    parents: Parents,
}

impl Target {
    fn prepare(from: &Path, to: &Path, overwrite: bool) -> Result<Self> {
        let there = folder_at(to)?;
        if let (Some(there), Ok(source)) = (&there, fs::metadata(from))
            && (there.dev(), there.ino()) == (source.dev(), source.ino())
        {
            let message = "is where the model was loaded from: save it to another folder";
            return Err(Error::Io(format!("`{}` {message}", to.display())));
        }
        if there.is_some() && !overwrite {
            check_free(from, to)?;
        }
        let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let is_new = there.is_none();
        let parents = if is_new { Parents::create(parent, to)? } else { Parents::default() };
        let staging = tempfile::Builder::new()
            .prefix(".bombus-")
            .suffix(".part")
            .permissions(Permissions::from_mode(0o777))
            .tempdir_in(if is_new { parent } else { to })
            .map_err(|error| write_error(to, &error))?;
        Ok(Self { to: to.to_owned(), staging, is_new, overwrite, parents })
    }

    fn create(&self, name: &str) -> Result<NewFile> {
        NewFile::create_as(&self.staging.path().join(name), &self.to.join(name))
    }

    fn create_folder(&self, name: &str) -> Result<()> {
        let made = fs::create_dir(self.staging.path().join(name));
        made.map_err(|error| write_error(&self.to.join(name), &error))
    }

    fn copy(&self, from: &Path, name: &str) -> Result<()> {
        let mut file = self.create(name)?;
        file.copy(from)?;
        file.finish()
    }

    fn finish(mut self) -> Result<()> {
        let failed = |error: std::io::Error| write_error(&self.to, &error);
        match self.is_new {
            true => fs::rename(self.staging.path(), &self.to).map_err(failed)?,
            false => self.put_files()?,
        }
        self.staging.disable_cleanup(self.is_new);
        self.parents.keep();
        Ok(())
    }

    /// Each file in the place of one that was there; what was the other model's goes.
    fn put_files(&self) -> Result<()> {
        let staged = names(self.staging.path())?;
        let is_folder = |name: &&String| *name != TEMPLATES && self.to.join(name).is_dir();
        if let Some(name) = staged.iter().find(is_folder) {
            let path = self.to.join(name);
            let message = format!("could not write `{}`: it is a folder", path.display());
            return Err(Error::Io(message));
        }
        if staged.contains(TEMPLATES) || self.overwrite {
            self.remove(TEMPLATES)?;
        }
        for name in &staged {
            let path = self.to.join(name);
            let put = fs::rename(self.staging.path().join(name), &path);
            put.map_err(|error| write_error(&path, &error))?;
        }
        let there = if self.overwrite { names(&self.to)? } else { BTreeSet::new() };
        let left = there.iter().filter(|name| is_of_model(name) && !staged.contains(*name));
        left.into_iter().try_for_each(|name| self.remove(name))
    }

    /// Removes a file of the model that was there, or its folder of templates.
    fn remove(&self, name: &str) -> Result<()> {
        let path = self.to.join(name);
        let removed = match fs::symlink_metadata(&path) {
            Ok(there) if there.is_dir() && name == TEMPLATES => fs::remove_dir_all(&path),
            Ok(there) if !there.is_dir() => fs::remove_file(&path),
            _ => Ok(()),
        };
        removed.map_err(|error| write_error(&path, &error))
    }
}

fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(folder).map_err(|error| Error::io(folder, &error))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

/// The folder at `to`, if there is one. Fails where something else is there, or above it.
fn folder_at(to: &Path) -> Result<Option<fs::Metadata>> {
    let wrong = |what| Err(Error::Io(format!("could not write `{}`: {what}", to.display())));
    for place in to.ancestors().filter(|place| !place.as_os_str().is_empty()) {
        let shown = place.display();
        match fs::metadata(place) {
            Ok(there) if there.is_dir() => return Ok((place == to).then_some(there)),
            Ok(there) => {
                let kind = kind(there.file_type());
                return wrong(format!("expected a folder, `{shown}` is {kind}"));
            }
            Err(error) => match (fs::read_link(place), error.kind()) {
                (_, ErrorKind::NotFound | ErrorKind::NotADirectory) if !place.is_symlink() => {}
                (Ok(end), ErrorKind::NotFound) => {
                    let end = end.display();
                    return wrong(format!("`{shown}` is a link to `{end}`, which is not there"));
                }
                _ => return Err(write_error(to, &error)),
            },
        }
    }
    Ok(None)
}

/// Fails where a model is in the folder, or files that would be taken for the new one's or replaced.
fn check_free(from: &Path, to: &Path) -> Result<()> {
    let there = names(to)?;
    let shown = to.display();
    if let Some(name) = there.iter().find(|name| *name == "config.json" || is_shard(name)) {
        return Err(Error::AlreadyThere(format!(
            "there is a model in `{shown}` (`{name}`): give `overwrite: true` to put another in its place"
        )));
    }
    let own = others(from)?;
    let is_taken = |name: &&String| is_of_model(name) || *name == TEMPLATES || own.contains(*name);
    let taken: Vec<String> =
        there.iter().filter(is_taken).map(|name| format!("`{name}`")).collect();
    let more = match taken.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    match taken.is_empty() {
        true => Ok(()),
        false => Err(Error::AlreadyThere(format!(
            "files in `{shown}` would be mixed with the model's, or replaced: {}{more}; give \
             `overwrite: true` to put the model's in their place, or another folder",
            taken[..taken.len().min(SHOWN)].join(", ")
        ))),
    }
}

/// So many files are named.
const SHOWN: usize = 5;

/// Files that would be taken for the new model's.
fn is_of_model(name: &str) -> bool {
    const NAMES: [&str; 20] = [
        "config.json",
        "generation_config.json",
        INDEX,
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "vocab.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tekken.json",
        "preprocessor_config.json",
        "processor_config.json",
        "quantize_config.json",
        "quant_config.json",
    ];
    is_shard(name) || NAMES.contains(&name)
}

/// The folders above that had to be made, which go again where nothing comes of it.
#[derive(Default)]
struct Parents(Vec<PathBuf>);

impl Parents {
    /// `to`: what they are made for
    fn create(folder: &Path, to: &Path) -> Result<Self> {
        let missing = folder.ancestors().filter(|folder| !folder.as_os_str().is_empty());
        let mut missing: Vec<_> = missing.take_while(|folder| !folder.exists()).collect();
        missing.reverse();
        let mut made = Self::default();
        for folder in missing {
            fs::create_dir(folder).map_err(|error| write_error(to, &error))?;
            made.0.push(folder.to_owned());
        }
        Ok(made)
    }

    fn keep(&mut self) {
        self.0.clear();
    }
}

impl Drop for Parents {
    fn drop(&mut self) {
        for folder in self.0.iter().rev() {
            _ = fs::remove_dir(folder);
        }
    }
}
