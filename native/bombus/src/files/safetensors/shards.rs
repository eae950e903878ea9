//! The tensors of a checkpoint, in as many files as it has.
//!
//! mlx-lm reads every `model*.safetensors` and no index; transformers reads `model.safetensors`,
//! else what the index names. Here the first of these sets is taken that is whole, so that an index
//! left from before does no harm.

use super::{TensorFile, TensorView};
use crate::error::{Error, Result};
use crate::files;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

pub const INDEX: &str = "model.safetensors.index.json";
pub const SINGLE: &str = "model.safetensors";

/// Whether a file is one of a checkpoint that has neither of these.
pub fn is_shard(name: &str) -> bool {
    name.starts_with("model") && name.ends_with(".safetensors")
}

/// As the files have it.
fn same(name: &str) -> Option<String> {
    Some(name.to_owned())
}

#[derive(Debug)]
pub struct TensorFiles {
    files: Vec<TensorFile>,
    /// tensor name -> index into `files`, and the name there
    names: BTreeMap<String, (usize, String)>,
    /// Names in the files of what is not asked for.
    left_out: Vec<String>,
}

impl TensorFiles {
    /// The tensors of a folder, where no file is known to be missing.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::choose(folder, same, |_, known_missing| !known_missing)
    }

    /// The first set of files that is `whole`; it is told whether one is known to be missing. Where
    /// none is, the error says what is missing, or all files come. `own`: what a name in the files is
    /// called here; `None` leaves the tensor out
    pub fn choose(
        folder: &Path,
        own: impl Fn(&str) -> Option<String>,
        whole: impl Fn(&Self, bool) -> bool,
    ) -> Result<Self> {
        let sets = Sets::find(folder)?;
        for set in [&sets.single, &sets.indexed] {
            if set.is_empty() {
                continue;
            }
            let files = Self::open_all(set, &own)?;
            if whole(&files, false) {
                return Ok(files);
            }
        }
        let files = Self::open_all(&sets.all, &own)?;
        let problem = sets.missing(folder, &files);
        match problem {
            Some(problem) if !whole(&files, true) => Err(problem),
            _ => Ok(files),
        }
    }

    pub fn open_one(path: &Path) -> Result<Self> {
        Self::open_all(&[path.to_owned()], &same)
    }

    /// Where a name stands in several files, the last has it.
    fn open_all(paths: &[PathBuf], own: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let (mut files, mut names, mut left_out) = (Vec::new(), BTreeMap::new(), Vec::new());
        for path in paths {
            let file = TensorFile::open(path)?;
            for name in file.names() {
                match own(&name) {
                    Some(own) => _ = names.insert(own, (files.len(), name)),
                    None => left_out.push(name),
                }
            }
            files.push(file);
        }
        Ok(Self { files, names, left_out })
    }

    /// What the files call a tensor, or would call another of the same module.
    pub fn name_in_files(&self, name: &str) -> String {
        let known = |name: &str| self.names.get(name).map(|(_, theirs)| theirs.clone());
        let of_module = || {
            let (module, kind) = name.rsplit_once('.')?;
            let theirs = known(&format!("{module}.weight"))?;
            Some(format!("{}.{kind}", theirs.strip_suffix(".weight")?))
        };
        known(name).or_else(of_module).unwrap_or_else(|| name.to_owned())
    }

    /// Names in the files of what is not asked for.
    pub fn left_out(&self) -> impl Iterator<Item = &String> {
        self.left_out.iter()
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (file, name) = self.names.get(name)?;
        self.files[*file].tensor(name)
    }

    pub fn require(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).ok_or_else(|| {
            Error::Checkpoint(format!("the tensor `{name}` is missing from `{}`", self.place()))
        })
    }

    /// What the headers say beside the tensors, of all files together.
    pub fn metadata(&self) -> Option<HashMap<String, String>> {
        let all = self.files.iter().filter_map(|file| file.metadata.metadata().as_ref());
        all.cloned().reduce(|mut all, more| {
            all.extend(more);
            all
        })
    }

    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.file.path())
    }

    /// Where the tensors are, for messages.
    pub fn place(&self) -> String {
        match &self.files[..] {
            [one] => one.file.path().display().to_string(),
            [first, ..] => {
                first.file.path().parent().unwrap_or(Path::new("")).display().to_string()
            }
            [] => "no file".into(),
        }
    }
}

/// The files that the index names and that are not there.
pub fn absent_shards(folder: &Path) -> Vec<String> {
    let index = read_index(&folder.join(INDEX)).unwrap_or_default();
    index.into_keys().filter(|shard| !folder.join(shard).exists()).collect()
}

/// The sets of files that may be a folder's checkpoint.
struct Sets {
    /// `model.safetensors`
    single: Vec<PathBuf>,
    /// Those that the index names, where all of them are there.
    indexed: Vec<PathBuf>,
    all: Vec<PathBuf>,
    /// What the index says, where there is one.
    index: Option<Result<Index>>,
}

/// shard file -> the tensors in it
type Index = BTreeMap<String, Vec<String>>;

impl Sets {
    fn find(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        let index = files::is_there(&index).then(|| read_index(&index));
        let all = all_shards(folder)?;
        if all.is_empty() {
            return Err(nothing(folder, index));
        }
        let single = folder.join(SINGLE);
        let named = index.as_ref().and_then(|index| index.as_ref().ok());
        let indexed: Vec<PathBuf> =
            named.into_iter().flatten().map(|(shard, _)| folder.join(shard)).collect();
        let whole = indexed.iter().all(|path| path.exists());
        Ok(Self {
            single: if single.exists() { vec![single] } else { vec![] },
            indexed: if whole { indexed } else { vec![] },
            all,
            index,
        })
    }

    /// What files are known to be missing where `files` are all.
    fn missing(self, folder: &Path, files: &TensorFiles) -> Option<Error> {
        match self.index {
            Some(Err(error)) => Some(error),
            Some(Ok(index)) => absent_shard(folder, &index, files),
            None => counted(folder, &self.all).err(),
        }
    }
}

fn absent_shard(folder: &Path, index: &Index, files: &TensorFiles) -> Option<Error> {
    let absent = |(shard, tensors): &(&String, &Vec<String>)| {
        !folder.join(shard).exists() && tensors.iter().any(|name| !files.contains(name))
    };
    let (shard, _) = index.iter().find(absent)?;
    Some(Error::NotFound(format!(
        "there is no `{shard}` in `{}`, which `{INDEX}` names: the download may have broken off",
        folder.display()
    )))
}

/// No file of tensors is there.
fn nothing(folder: &Path, index: Option<Result<Index>>) -> Error {
    let folder_shown = folder.display();
    if let Some(Ok(index)) = index
        && let Some(shard) = index.keys().next()
    {
        return Error::NotFound(format!(
            "there is no `{shard}` in `{folder_shown}`, which `{INDEX}` names, nor any other \
             `model*.safetensors`: the download may have broken off"
        ));
    }
    let there = files::other_formats(folder).map(|there| format!("; {there}")).unwrap_or_default();
    Error::NotFound(format!("there is no `{SINGLE}` in `{folder_shown}`{there}"))
}

/// Every `model*.safetensors`.
fn all_shards(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|error| Error::io(folder, &error))?;
    let mut shards: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| is_shard(&path.file_name().unwrap_or_default().to_string_lossy()))
        .collect();
    shards.sort();
    Ok(shards)
}

/// Every `model*.safetensors`, where their names do not tell of others.
pub fn shards_without_index(folder: &Path) -> Result<Vec<PathBuf>> {
    let shards = all_shards(folder)?;
    match shards.is_empty() {
        true => Err(nothing(folder, None)),
        false => counted(folder, &shards).map(|()| shards),
    }
}

/// Fails where a file says that there are more: `model-00001-of-00003.safetensors`.
fn counted(folder: &Path, shards: &[PathBuf]) -> Result<()> {
    let count = shards.iter().find_map(|path| shard_count(path));
    match count {
        Some(count) if count != shards.len() => Err(Error::Checkpoint(format!(
            "`{}` has {} of {count} shards",
            folder.display(),
            shards.len()
        ))),
        _ => Ok(()),
    }
}

/// 3 for `model-00001-of-00003.safetensors`.
fn shard_count(path: &Path) -> Option<usize> {
    path.file_stem()?.to_str()?.rsplit_once("-of-")?.1.parse().ok()
}

/// shard file -> the tensors in it, from the index's `weight_map`.
pub fn read_index(path: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    #[derive(serde::Deserialize)]
    struct Contents {
        weight_map: BTreeMap<String, String>,
    }
    let wrong = |problem| Error::Checkpoint(format!("the index {problem}"));
    let index: Contents = files::json(path, files::FIELDS, wrong)?;
    let outside: BTreeSet<&String> =
        index.weight_map.values().filter(|shard| !is_name(shard)).collect();
    if let Some(shard) = outside.first() {
        return Err(Error::Checkpoint(format!(
            "`{}` names the shard `{shard}`, which is outside the folder",
            path.display()
        )));
    }
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, shard) in index.weight_map {
        shards.entry(shard).or_default().push(name);
    }
    match shards.is_empty() {
        true => Err(Error::Checkpoint(format!("`{}` names no tensors", path.display()))),
        false => Ok(shards),
    }
}

/// Whether it is a name of one part, so that it stays in its folder.
fn is_name(shard: &str) -> bool {
    let mut parts = Path::new(shard).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}
