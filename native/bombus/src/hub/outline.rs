//! A model's files without its weights: what its configuration says, and the headers of its tensors.

use super::client::{Client, Found, Patience, Reply};
use super::files::{Files, Kind, Remote, in_parallel};
use crate::error::{Error, Result};
use crate::files;
use crate::files::safetensors::{INDEX, TensorFile};
use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

const CONFIGURATION: [&str; 3] = ["config.json", "generation_config.json", INDEX];
/// What tells of the tokenizer, and what is only to be there.
const TOKENIZER: [&str; 4] = [
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
];
const VOCABULARY: [&str; 3] = ["tokenizer.json", "vocab.json", "merges.txt"];

/// Most headers are in the first bytes that are asked for.
const FIRST: u64 = 512 << 10;

/// Fills a folder with what `remote` has of a model.
pub fn fill(client: &Client, remote: &Remote, folder: &Path) -> Result<()> {
    let outline = Outline { client, remote, folder };
    Kind::Model.collect(&outline)?;
    outline.get(&TOKENIZER)?;
    outline.get(&VOCABULARY)?;
    Ok(())
}

/// A folder with links to all that is in another.
pub fn link_all(from: &Path, folder: &Path) -> Result<()> {
    let entries = std::fs::read_dir(from).map_err(|error| Error::io(from, &error))?;
    for entry in entries.take(10_000) {
        let path = entry.map_err(|error| Error::io(from, &error))?.path();
        link(&path, &folder.join(path.file_name().unwrap_or_default()))?;
    }
    Ok(())
}

fn link(from: &Path, to: &Path) -> Result<()> {
    match symlink(from, to) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(files::write_error(to, &error))
        }
        _ => Ok(()),
    }
}

struct Outline<'a> {
    client: &'a Client<'a>,
    remote: &'a Remote<'a>,
    folder: &'a Path,
}

impl Outline<'_> {
    /// Whether a file is there; what is not in the cache becomes a file of its size, with its header.
    fn header(&self, name: &str) -> Result<bool> {
        let found = match self.remote.head(name)? {
            Reply::Absent { .. } => return Ok(false),
            Reply::Here => {
                link(&self.remote.folder().join(name), &self.folder.join(name))?;
                return Ok(true);
            }
            Reply::Found(found) => found,
        };
        let header = match VOCABULARY.contains(&name) {
            true => vec![],
            false => self.read_header(name, &found)?,
        };
        let path = self.folder.join(name);
        let failed = |error| files::write_error(&path, &error);
        let mut file = File::create(&path).map_err(failed)?;
        file.write_all(&header).map_err(failed)?;
        let length = found.size.unwrap_or(0).max(header.len() as u64);
        file.set_len(length).map_err(failed)?;
        Ok(true)
    }

    /// The length, and the header of that length.
    fn read_header(&self, name: &str, found: &Found) -> Result<Vec<u8>> {
        let size = found.size.unwrap_or(u64::MAX);
        let first = self.read_first(name, FIRST.min(size))?;
        let length = first.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
        // A wrong one is found when the file is opened.
        let end = length.min(TensorFile::LONGEST_HEADER as u64).saturating_add(8).min(size);
        match end <= first.len() as u64 {
            true => Ok(first[..end as usize].to_vec()),
            false => self.read_first(name, end),
        }
    }

    fn read_first(&self, name: &str, count: u64) -> Result<Vec<u8>> {
        let url = self.remote.url(name)?;
        self.client.patiently(Patience::Long, || {
            let response = self.client.get_first(url.clone(), count)?;
            let mut bytes = vec![];
            let read = self.client.body(response).take(count).read_to_end(&mut bytes);
            read.map_err(|error| self.client.unreachable(&url, error.into()))?;
            Ok(bytes)
        })
    }

    /// Small files come as a whole, through the cache.
    fn whole(&self, names: &[&str]) -> Result<Vec<bool>> {
        let there = self.remote.get(names)?;
        for (name, _) in names.iter().zip(&there).filter(|(_, there)| **there) {
            link(&self.remote.folder().join(name), &self.folder.join(name))?;
        }
        Ok(there)
    }
}

impl Files for Outline<'_> {
    fn get(&self, names: &[&str]) -> Result<Vec<bool>> {
        let is_small = |name: &&str| CONFIGURATION.contains(name) || TOKENIZER.contains(name);
        let (small, large): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| is_small(name));
        let headers = in_parallel(&large, |name| self.header(name), || self.client.watch.stop())?;
        let there = self.whole(&small)?;
        let all = large.into_iter().zip(headers).chain(small.into_iter().zip(there));
        let all: HashMap<&str, bool> = all.collect();
        Ok(names.iter().map(|name| all.get(name).copied().unwrap_or(false)).collect())
    }

    fn list(&self) -> Result<Vec<String>> {
        self.remote.list()
    }

    fn templates(&self) -> Result<Vec<String>> {
        self.remote.templates()
    }

    fn folder(&self) -> PathBuf {
        self.folder.to_owned()
    }

    fn missing(&self, name: &str) -> Error {
        self.remote.missing(name)
    }
}
