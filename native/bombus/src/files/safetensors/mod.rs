//! Safetensors files: one file (here), the files of a checkpoint (`shards`), and new ones (`write`).
//!
//! The safetensors crate checks the mapped file's header (length, UTF-8, dtypes, offsets without
//! holes or overlaps) before any tensor is read. A name that stands twice, which it lets pass, is
//! found here.
//! Format: <https://huggingface.co/docs/safetensors>.

mod shards;
mod write;

pub use shards::{
    INDEX, SINGLE, TensorFiles, absent_shards, is_shard, read_index, shards_without_index,
};
pub use write::{Entry, NewTensor, TensorWriter, write};

use crate::error::{Error, Result};
use crate::files;
use crate::files::mapped::{Mapped, MappedFile};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A tensor in a file, before it is read.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    pub shape: Cow<'a, [usize]>,
    file: &'a Arc<MappedFile>,
    /// Where its bytes lie in the file.
    range: Range<usize>,
}

impl TensorView<'_> {
    /// Some of its rows, as a tensor: `None` where it has no such rows.
    pub fn rows(&self, rows: Range<usize>) -> Option<Self> {
        let (&count, others) = self.shape.split_first()?;
        if rows.end > count || rows.start > rows.end {
            return None;
        }
        let row = self.range.len().checked_div(count)?;
        let start = self.range.start + rows.start * row;
        let range = start..start + rows.len() * row;
        let shape = [&[rows.len()], others].concat();
        Some(Self { dtype: self.dtype, shape: shape.into(), file: self.file, range })
    }

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
    /// The format's bound.
    pub const LONGEST_HEADER: usize = 100_000_000;

    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path, 8)?;
        let read = SafeTensors::read_metadata(file.bytes());
        let (header_len, metadata) = read.map_err(|error| unreadable(path, file.bytes(), error))?;
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
        let shape = Cow::Borrowed(&info.shape[..]);
        Some(TensorView { dtype: info.dtype, shape, file: &self.file, range })
    }
}

/// What stands in the place of a file of tensors, or what is wrong with one.
fn unreadable(path: &Path, bytes: &[u8], error: SafeTensorError) -> Error {
    let path_shown = path.display();
    match (files::mistaken_tensors(&bytes[..bytes.len().min(4 * files::HEAD + 1)]), &error) {
        (Some(what), _) => Error::Checkpoint(format!("`{path_shown}`: {what}")),
        (None, SafeTensorError::MetadataIncompleteBuffer) => corrupt(
            path,
            format!(
                "{error}: its size is not what its header says, the download may have broken off"
            ),
        ),
        (None, _) => corrupt(path, error),
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

/// A type by its name in the format: "BF16".
pub fn dtype(name: &str) -> Result<Dtype> {
    serde_json::from_value(name.into())
        .map_err(|_| Error::Request(format!("the format has no type {name}")))
}
