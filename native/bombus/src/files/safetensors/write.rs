//! New safetensors files: first all names and shapes, then the tensors' bytes, in any order.

use super::{TensorFile, dtype};
use crate::error::{Error, Result};
use crate::files::{NewFile, write_error};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What a file will say of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Entry {
    /// Its bytes; none where they cannot be counted, or are no whole ones.
    fn size(&self) -> Option<usize> {
        let bits = self.shape.iter().try_fold(self.dtype.bitsize(), |n, axis| n.checked_mul(*axis));
        bits.filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8)
    }
}

/// A file whose header is written, and which gets its tensors.
pub struct TensorWriter<'a> {
    file: &'a File,
    path: &'a Path,
    /// tensor name -> where its next byte goes, and where it ends
    places: HashMap<String, (u64, u64)>,
    /// What the file calls a tensor.
    renamed: &'a dyn Fn(&str) -> String,
}

impl<'a> TensorWriter<'a> {
    /// `path`: for messages; `renamed`: what the file calls a tensor
    pub fn new(
        file: &'a File,
        path: &'a Path,
        mut entries: Vec<Entry>,
        metadata: Option<HashMap<String, String>>,
        renamed: &'a dyn Fn(&str) -> String,
    ) -> Result<Self> {
        entries.iter_mut().for_each(|entry| entry.name = renamed(&entry.name));
        let names: HashSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        if names.len() < entries.len() || names.contains("__metadata__") {
            let message = "expected different names, none of them `__metadata__`";
            return Err(Error::Request(message.into()));
        }
        // As the safetensors crate does it: each at a multiple of its type's size.
        entries.sort_by(|one, other| {
            other.dtype.cmp(&one.dtype).then_with(|| one.name.cmp(&other.name))
        });
        let (infos, total) = infos(entries)?;
        let header = header(infos.clone(), metadata)?;
        let start = header.len() as u64;
        if start.checked_add(total as u64).is_none_or(|end| end > i64::MAX as u64) {
            return Err(Error::Request("the tensors are too large for a file".into()));
        }
        let place = |(name, info): (String, TensorInfo)| {
            let (first, end) = info.data_offsets;
            (name, (start + first as u64, start + end as u64))
        };
        let places = infos.into_iter().map(place).collect();
        let writer = Self { file, path, places, renamed };
        file.write_all_at(&header, 0).map_err(|error| write_error(path, &error))?;
        Ok(writer)
    }

    /// Appends to what was written of a tensor.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let end = bytes.len() as u64;
        let place =
            self.places.get_mut(&(self.renamed)(name)).filter(|(next, last)| end <= last - *next);
        let Some((next, _)) = place else {
            return Err(Error::Checkpoint(format!("`{name}` has more bytes than its shape says")));
        };
        let written = self.file.write_all_at(bytes, *next);
        written.map_err(|error| write_error(self.path, &error))?;
        *next += end;
        Ok(())
    }

    /// Fails where bytes are missing.
    pub fn finish(self) -> Result<()> {
        match self.places.iter().find(|(_, (next, last))| next < last) {
            None => Ok(()),
            Some((name, _)) => {
                Err(Error::Checkpoint(format!("`{name}` has fewer bytes than its shape says")))
            }
        }
    }
}

/// One tensor behind another; and where the last ends.
fn infos(entries: Vec<Entry>) -> Result<(Vec<(String, TensorInfo)>, usize)> {
    let mut end = 0usize;
    let mut infos = Vec::with_capacity(entries.len());
    for entry in entries {
        let next = entry.size().and_then(|size| end.checked_add(size)).ok_or_else(|| {
            let Entry { name, dtype, shape } = &entry;
            Error::Request(format!("`{name}`: {dtype:?} of shape {shape:?} has no whole bytes"))
        })?;
        let Entry { name, dtype, shape } = entry;
        infos.push((name, TensorInfo { dtype, shape, data_offsets: (end, next) }));
        end = next;
    }
    Ok((infos, end))
}

/// The header with its length in front, filled up to a multiple of 8 bytes.
fn header(
    infos: Vec<(String, TensorInfo)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<Vec<u8>> {
    let wrong = |error: &dyn std::fmt::Display| Error::Request(format!("no header: {error}"));
    let metadata = Metadata::new(metadata, infos).map_err(|error| wrong(&error))?;
    let mut text = serde_json::to_vec(&metadata).map_err(|error| wrong(&error))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let length = (text.len() as u64).to_le_bytes();
    if text.len() > TensorFile::LONGEST_HEADER {
        return Err(Error::Request("the header is too long: fewer or shorter names".into()));
    }
    Ok([&length[..], &text].concat())
}

/// A tensor that is to be written.
pub struct NewTensor<'a> {
    entry: Entry,
    bytes: &'a [u8],
}

impl<'a> NewTensor<'a> {
    /// `dtype`: as in the format, "BF16"
    pub fn new(name: &str, dtype: &str, shape: &[usize], bytes: &'a [u8]) -> Result<Self> {
        let (name, dtype, shape) = (name.to_owned(), self::dtype(dtype)?, shape.to_vec());
        Ok(Self { entry: Entry { name, dtype, shape }, bytes })
    }
}

/// Writes a file, which is there when it is whole.
pub fn write(
    path: &Path,
    tensors: Vec<NewTensor>,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    for NewTensor { entry, bytes } in &tensors {
        if entry.size() != Some(bytes.len()) {
            let Entry { name, dtype, shape } = entry;
            let message = format!("`{name}` is {dtype:?} of shape {shape:?} with");
            return Err(Error::Request(format!("{message} {} bytes", bytes.len())));
        }
    }
    let file = NewFile::create(path)?;
    let entries = tensors.iter().map(|tensor| tensor.entry.clone()).collect();
    let mut writer = TensorWriter::new(file.file(), path, entries, metadata, &str::to_owned)?;
    for NewTensor { entry, bytes } in &tensors {
        writer.write(&entry.name, bytes)?;
    }
    writer.finish()?;
    file.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(name: &str, dtype: Dtype, shape: &[usize]) -> Entry {
        Entry { name: name.into(), dtype, shape: shape.to_vec() }
    }

    fn writer(entries: Vec<Entry>) -> Result<()> {
        let file = tempfile::tempfile().unwrap();
        TensorWriter::new(&file, Path::new("file"), entries, None, &str::to_owned).map(drop)
    }

    #[test]
    fn shapes_that_no_file_can_have_are_refused() {
        let huge = 1 << 40;
        assert!(writer(vec![entry("a", Dtype::F32, &[huge, huge])]).is_err());
        assert!(
            writer(vec![entry("a", Dtype::U8, &[1 << 62]), entry("b", Dtype::U8, &[1 << 62])])
                .is_err()
        );
        assert!(writer(vec![entry("a", Dtype::F4, &[3])]).is_err());
        assert!(writer(vec![entry("a", Dtype::U8, &[1]), entry("a", Dtype::U8, &[1])]).is_err());
        assert!(writer(vec![entry("__metadata__", Dtype::U8, &[1])]).is_err());
    }

    #[test]
    fn a_tensor_has_the_bytes_that_its_shape_says() {
        let file = tempfile::tempfile().unwrap();
        let entries = vec![entry("a", Dtype::U8, &[4])];
        let mut writer =
            TensorWriter::new(&file, Path::new("file"), entries, None, &str::to_owned).unwrap();
        assert!(writer.write("b", &[1]).is_err());
        writer.write("a", &[1, 2]).unwrap();
        assert!(writer.write("a", &[3, 4, 5]).is_err());
        assert!(writer.finish().is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_in_pieces_is_read(
            tensors in prop::collection::btree_map("[a-z]{1,4}", prop::collection::vec(any::<u8>(), 0..40), 0..6),
            piece in 1usize..9,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("file");
            let file = File::create(&path).unwrap();
            let entries = tensors.iter().map(|(name, bytes)| entry(name, Dtype::U8, &[bytes.len()]));
            let mut writer = TensorWriter::new(&file, &path, entries.collect(), None, &str::to_owned).unwrap();
            for (name, bytes) in &tensors {
                bytes.chunks(piece).for_each(|bytes| writer.write(name, bytes).unwrap());
            }
            writer.finish().unwrap();
            let read = TensorFile::open(&path).unwrap();
            prop_assert_eq!(read.names().len(), tensors.len());
            for (name, bytes) in &tensors {
                prop_assert_eq!(&read.tensor(name).unwrap().read().unwrap(), bytes);
            }
        }
    }
}
