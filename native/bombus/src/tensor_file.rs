//! Safetensors files: one file, or the shards of a checkpoint.
//!
//! The safetensors crate checks the mapped file's header (length, UTF-8, dtypes, offsets without
//! holes or overlaps) before any tensor is read. A name that stands twice, which it lets pass, is
//! found here.
//! Format: <https://huggingface.co/docs/safetensors>.

use crate::error::{Error, Result};
use crate::mapped_file::{Mapped, MappedFile};
use safetensors::tensor::{Dtype, Metadata};
use safetensors::{SafeTensors, View};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// A tensor in a file, before it is read.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    file: &'a Arc<MappedFile>,
    /// Where its bytes lie in the file.
    range: Range<usize>,
}

impl TensorView<'_> {
    /// A copy of its bytes, as many as dtype and shape say. Fails where the file was written to
    /// since it was opened: they would then be of both versions.
    pub fn read(&self) -> Result<Vec<u8>> {
        self.file.read(self.range.clone())
    }

    /// Its bytes where the file is mapped; whoever uses them asks the file's `check`.
    pub fn map(&self) -> Mapped {
        self.file.map(self.range.clone())
    }
}

/// One open file, its header checked.
#[derive(Debug)]
pub struct TensorFile {
    file: Arc<MappedFile>,
    metadata: Metadata,
    data_start: usize,
}

impl TensorFile {
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path, 8)?;
        let (header_len, metadata) =
            SafeTensors::read_metadata(file.bytes()).map_err(|error| corrupt(path, error))?;
        let data_start = 8 + header_len;
        check_names(&file.bytes()[8..data_start]).map_err(|error| corrupt(path, error))?;
        Ok(Self { file: Arc::new(file), metadata, data_start })
    }

    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        let range = self.data_start + start..self.data_start + end;
        Some(TensorView { dtype: info.dtype, shape: &info.shape, file: &self.file, range })
    }
}

fn corrupt(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::Checkpoint(format!("`{}` is no valid safetensors file: {reason}", path.display()))
}

/// Fails on a tensor name that stands twice in the header, which serde lets pass.
fn check_names(header: &[u8]) -> Result<(), serde_json::Error> {
    struct Names;
    impl<'de> Visitor<'de> for Names {
        type Value = ();
        fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
            formatter.write_str("a header object")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            let mut seen = HashSet::new();
            while let Some((name, IgnoredAny)) = map.next_entry::<String, _>()? {
                if let Some(twice) = seen.replace(name) {
                    let message = format!("the name `{twice}` stands twice in the header");
                    return Err(serde::de::Error::custom(message));
                }
            }
            Ok(())
        }
    }
    serde_json::Deserializer::from_slice(header).deserialize_map(Names)
}

pub const INDEX: &str = "model.safetensors.index.json";
pub const SINGLE: &str = "model.safetensors";

/// Whether a file is one of a checkpoint that has neither of these.
pub fn is_shard(name: &str) -> bool {
    name.starts_with("model") && name.ends_with(".safetensors")
}

/// The tensors of a checkpoint: `model.safetensors`, or the shards that
/// `model.safetensors.index.json` names. Where there is an index, it decides.
#[derive(Debug)]
pub struct TensorFiles {
    files: Vec<TensorFile>,
    /// tensor name -> index into `files`
    names: BTreeMap<String, usize>,
}

impl TensorFiles {
    pub fn open(folder: &Path) -> Result<Self> {
        let index = folder.join(INDEX);
        if index.exists() { Self::open_index(folder, &index) } else { Self::open_all(folder) }
    }

    pub fn open_one(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let names = file.names().into_iter().map(|name| (name, 0)).collect();
        Ok(Self { files: vec![file], names })
    }

    fn open_index(folder: &Path, index: &Path) -> Result<Self> {
        let shards = read_index(index)?;
        let (mut files, mut names) = (Vec::new(), BTreeMap::new());
        for (shard, tensors) in shards {
            let file = TensorFile::open(&folder.join(&shard))?;
            for name in tensors {
                if file.metadata.info(&name).is_none() {
                    return Err(Error::Checkpoint(format!(
                        "`{}` says that `{name}` is in `{shard}`, but it is not",
                        index.display()
                    )));
                }
                names.insert(name, files.len());
            }
            files.push(file);
        }
        Ok(Self { files, names })
    }

    /// Without an index: `model.safetensors`, or every `model*.safetensors`, as mlx-lm does.
    fn open_all(folder: &Path) -> Result<Self> {
        let single = folder.join(SINGLE);
        if single.exists() {
            return Self::open_one(&single);
        }
        let (mut files, mut names) = (Vec::new(), BTreeMap::new());
        for path in shards_without_index(folder)? {
            let file = TensorFile::open(&path)?;
            for name in file.names() {
                if names.insert(name.clone(), files.len()).is_some() {
                    return Err(corrupt(&path, format!("`{name}` is in another shard too")));
                }
            }
            files.push(file);
        }
        Ok(Self { files, names })
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.files[*self.names.get(name)?].tensor(name)
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

pub fn shards_without_index(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|error| Error::io(folder, &error))?;
    let mut shards: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| is_shard(&path.file_name().unwrap_or_default().to_string_lossy()))
        .collect();
    shards.sort();
    let Some(first) = shards.first() else {
        let folder = folder.display();
        return Err(Error::NotFound(format!("there is no `model.safetensors` in `{folder}`")));
    };
    if let Some(count) = shard_count(first)
        && count != shards.len()
    {
        return Err(Error::Checkpoint(format!(
            "`{}` has {} of {count} shards",
            folder.display(),
            shards.len()
        )));
    }
    Ok(shards)
}

/// 3 for `model-00001-of-00003.safetensors`.
fn shard_count(path: &Path) -> Option<usize> {
    path.file_stem()?.to_str()?.rsplit_once("-of-")?.1.parse().ok()
}

/// shard file -> the tensors in it, from the index's `weight_map`.
pub fn read_index(path: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| {
        Error::Checkpoint(format!("`{}` is no valid index: {error}", path.display()))
    })?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, shard) in index.weight_map {
        let mut parts = Path::new(&shard).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(Error::Checkpoint(format!(
                "`{}` names the shard `{shard}`, which is outside the folder",
                path.display()
            )));
        }
        shards.entry(shard).or_default().push(name);
    }
    if shards.is_empty() {
        return Err(Error::Checkpoint(format!("`{}` names no tensors", path.display())));
    }
    Ok(shards)
}

/// A type by its name in the format: "BF16".
pub fn dtype(name: &str) -> Result<Dtype> {
    serde_json::from_value(name.into())
        .map_err(|_| Error::Request(format!("the format has no type {name}")))
}

/// A tensor that is to be written.
pub struct NewTensor<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl<'a> NewTensor<'a> {
    /// `dtype`: as in the format, "BF16"
    pub fn new(name: &'a str, dtype: &str, shape: &'a [usize], bytes: &'a [u8]) -> Result<Self> {
        Ok(Self { name, dtype: self::dtype(dtype)?, shape, bytes })
    }
}

impl View for &NewTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes.into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes a file, which is there when it is whole.
pub fn write(
    path: &Path,
    tensors: Vec<NewTensor>,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    for tensor in &tensors {
        let bits = tensor.shape.iter().try_fold(tensor.dtype.bitsize(), |n, s| n.checked_mul(*s));
        if bits != tensor.bytes.len().checked_mul(8) {
            let NewTensor { name, dtype, shape, bytes } = tensor;
            let message = format!("`{name}` is {dtype:?} of shape {shape:?} with");
            return Err(Error::Request(format!("{message} {} bytes", bytes.len())));
        }
    }
    let entries = tensors.iter().map(|tensor| (tensor.name, tensor)).collect();
    write_views(path, entries, metadata)
}

/// The same of tensors that are made while they are written. (The safetensors crate writes a file
/// beside the path, and renames it.)
pub fn write_views<V: View>(
    path: &Path,
    entries: Vec<(&str, V)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::Io(format!("could not write `{}`: {error}", path.display()))
    };
    let names: HashSet<&str> = entries.iter().map(|(name, _)| *name).collect();
    if names.len() < entries.len() || names.contains("__metadata__") {
        return Err(Error::Request("expected different names, none of them `__metadata__`".into()));
    }
    safetensors::serialize_to_file(entries, metadata, path).map_err(|error| failed(&error))?;
    let rights = rights_of_a_new_file(path).map_err(|error| failed(&error))?;
    std::fs::set_permissions(path, rights).map_err(|error| failed(&error))
}

/// The crate's file could be read by nobody else.
fn rights_of_a_new_file(path: &Path) -> std::io::Result<std::fs::Permissions> {
    let mut probe = path.as_os_str().to_owned();
    probe.push(".new");
    let rights = std::fs::File::create(&probe)?.metadata()?.permissions();
    std::fs::remove_file(&probe)?;
    Ok(rights)
}
