//! Which files are needed, and how they are got: from the cache alone, or from the Hub.

use super::Source;
use super::cache::{self, Repository};
use super::client::{Client, Found, Patience, Reply};
use super::download;
use super::is_commit;
use crate::error::{Error, Result};
use crate::files::safetensors::{self, INDEX, SINGLE};
use crate::files::{MOST_TEMPLATES, TEMPLATES};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};
use ureq::http::Uri;

/// What is wanted of a repository.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Model,
    Tokenizer,
    Adapter,
    /// The model and its tokenizer, or the adapter.
    Any,
}

/// Files by their names in the source's folder.
pub trait Files {
    /// Which of them there are; what is there is in the folder now.
    fn get(&self, names: &[&str]) -> Result<Vec<bool>>;
    /// All names, where they can be had only so.
    fn list(&self) -> Result<Vec<String>>;
    /// The names of chat templates in files of their own, as far as they may not be here.
    fn templates(&self) -> Result<Vec<String>>;
    /// Where they are.
    fn folder(&self) -> PathBuf;
    fn missing(&self, name: &str) -> Error;
}

impl Kind {
    /// The file that tells whether the repository has something of this kind.
    fn first(self) -> &'static str {
        match self {
            Kind::Model | Kind::Any => "config.json",
            Kind::Tokenizer => "tokenizer.json",
            Kind::Adapter => "adapter_config.json",
        }
    }

    /// Gets what is needed, or fails with what is missing.
    pub fn collect(self, files: &dyn Files) -> Result<()> {
        match self {
            Kind::Model => model(files),
            Kind::Tokenizer => tokenizer(files),
            Kind::Adapter => adapter(files),
            Kind::Any if has(files, "config.json")? => {
                model(files)?;
                let has_tokenizer = has(files, "tokenizer.json")? || has(files, "merges.txt")?;
                if has_tokenizer { tokenizer(files) } else { Ok(()) }
            }
            Kind::Any if has(files, "adapter_config.json")? => adapter(files),
            Kind::Any => Err(files.missing("config.json` nor `adapter_config.json")),
        }
    }
}

fn model(files: &dyn Files) -> Result<()> {
    let there = files.get(&["config.json", "generation_config.json", INDEX])?;
    if !there[0] {
        return Err(files.missing("config.json"));
    }
    let index = there[2].then(|| safetensors::read_index(&files.folder().join(INDEX)));
    match &index {
        Some(Ok(shards)) => {
            let shards: Vec<_> = shards.keys().map(String::as_str).collect();
            if shards.len() <= MOST_SHARDS && is_whole(&shards) && all(files, &shards)? {
                return Ok(());
            }
        }
        // One that is wrong, or was left from another checkpoint, is no reason to fail: mlx-lm takes
        // all files.
        Some(Err(_)) => {}
        None if has(files, SINGLE)? => return Ok(()),
        None => {}
    }
    let names = files.list()?;
    let shards: Vec<_> =
        names.iter().map(String::as_str).filter(|name| safetensors::is_shard(name)).collect();
    match shards.len() {
        0 => Err(index.and_then(Result::err).unwrap_or_else(|| files.missing(SINGLE))),
        many if many > MOST_SHARDS => Err(Error::Checkpoint(format!("it has {many} shards"))),
        _ => require(files, &shards),
    }
}

/// A checkpoint of more files is none.
const MOST_SHARDS: usize = 4096;

/// Whether names such as `model-00001-of-00002.safetensors` are as many as they say.
fn is_whole(shards: &[&str]) -> bool {
    let count = |name: &str| -> Option<usize> {
        name.strip_suffix(".safetensors")?.rsplit_once("-of-")?.1.parse().ok()
    };
    shards.iter().all(|name| count(name).is_none_or(|count| count <= shards.len()))
}

fn tokenizer(files: &dyn Files) -> Result<()> {
    // First, so that a tokenizer that is there has all that belongs to it.
    files.get(&[
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "added_tokens.json",
    ])?;
    let templates = files.templates()?;
    files.get(&templates.iter().map(String::as_str).collect::<Vec<_>>())?;
    if has(files, "tokenizer.json")? {
        return Ok(());
    }
    // Older ones are in two files, and the model's configuration says of which class.
    let older = files.get(&["vocab.json", "merges.txt", "config.json"])?;
    if older[0] && older[1] { Ok(()) } else { Err(files.missing("tokenizer.json")) }
}

fn adapter(files: &dyn Files) -> Result<()> {
    require(files, &["adapter_config.json"])?;
    for name in ["adapters.safetensors", "adapter_model.safetensors"] {
        if has(files, name)? {
            return Ok(());
        }
    }
    Err(files.missing("adapters.safetensors` nor `adapter_model.safetensors"))
}

fn has(files: &dyn Files, name: &str) -> Result<bool> {
    Ok(files.get(&[name])?[0])
}

fn all(files: &dyn Files, names: &[&str]) -> Result<bool> {
    Ok(files.get(names)?.into_iter().all(|there| there))
}

fn require(files: &dyn Files, names: &[&str]) -> Result<()> {
    let there = files.get(names)?;
    match names.iter().zip(there).find(|(_, there)| !there) {
        Some((name, _)) => Err(files.missing(name)),
        None => Ok(()),
    }
}

/// What is in the cache of one commit.
pub struct Cached<'a> {
    pub repository: &'a Repository,
    pub source: &'a Source,
    pub commit: &'a str,
    /// Fails where a file is not there, and was never said to be absent: it may have been missed.
    pub sure: bool,
}

impl Files for Cached<'_> {
    fn get(&self, names: &[&str]) -> Result<Vec<bool>> {
        let there = |name: &&str| {
            let path = self.source.path(name);
            match self.repository.has(self.commit, &path) {
                false if self.sure && !self.repository.is_absent(self.commit, &path) => {
                    Err(self.missing(name))
                }
                there => Ok(there),
            }
        };
        names.iter().map(there).collect()
    }

    fn list(&self) -> Result<Vec<String>> {
        // Without an index nobody says which shards are missing but their own names.
        match safetensors::shards_without_index(&self.folder()) {
            Ok(shards) => Ok(shards.iter().filter_map(|path| name(path)).collect()),
            Err(_) => Ok(vec![]),
        }
    }

    // They came before the tokenizer's own file.
    fn templates(&self) -> Result<Vec<String>> {
        Ok(vec![])
    }

    fn folder(&self) -> PathBuf {
        self.source.folder(self.repository.snapshot(self.commit))
    }

    fn missing(&self, name: &str) -> Error {
        Error::NotFound(format!("it has no `{name}`"))
    }
}

/// Whether a name is that of a chat template with a file of its own.
fn is_template(name: &str) -> bool {
    let file = name.strip_prefix(TEMPLATES).and_then(|name| name.strip_prefix('/'));
    let stem = file.and_then(|file| file.strip_suffix(".jinja"));
    stem.is_some_and(|stem| !stem.is_empty() && !stem.contains(['/', '\\', '\0']))
}

fn name(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.to_owned())
}

/// What the Hub has at one commit.
pub struct Remote<'a> {
    client: &'a Client<'a>,
    repository: &'a Repository,
    source: &'a Source,
    commit: String,
    /// What was said already, by paths in the repository.
    known: Mutex<HashMap<String, Reply>>,
    /// Of all files, where they were asked for.
    sizes: OnceLock<HashMap<String, u64>>,
}

/// So many files at once.
const PARALLEL: usize = 4;

impl<'a> Remote<'a> {
    /// Asks what the revision is now.
    pub fn new(
        client: &'a Client,
        repository: &'a Repository,
        source: &'a Source,
        kind: Kind,
        patience: Patience,
    ) -> Result<Self> {
        let mut known = HashMap::new();
        let commit = if is_commit(&source.revision) {
            source.revision.clone()
        } else {
            let path = source.path(kind.first());
            let (commit, reply) = client.head_of_revision(&path, patience)?;
            known.insert(path, reply);
            commit
        };
        let (known, sizes) = (Mutex::new(known), OnceLock::new());
        Ok(Self { client, repository, source, commit, known, sizes })
    }

    pub fn commit(&self) -> &str {
        &self.commit
    }

    pub fn head(&self, name: &str) -> Result<Reply> {
        let path = self.source.path(name);
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&path);
        let reply = match known {
            _ if self.repository.has(&self.commit, &path) => return Ok(Reply::Here),
            Some(reply) => reply,
            None if self.repository.is_absent(&self.commit, &path) => {
                return Ok(Reply::Absent { for_good: true });
            }
            None => self.client.head(&self.commit, &path)?,
        };
        match reply {
            Reply::Absent { for_good: true } => self.repository.set_absent(&self.commit, &path),
            Reply::Found(found) if found.size.is_none() => {
                return Ok(Reply::Found(Found { size: self.listed_size(&path), ..found }));
            }
            _ => {}
        }
        Ok(reply)
    }

    /// The size that the Hub's listing says, where a file's own head says none.
    fn listed_size(&self, path: &str) -> Option<u64> {
        let sizes = self.sizes.get_or_init(|| self.client.sizes(&self.commit).unwrap_or_default());
        sizes.get(path).copied()
    }

    /// Fails where a file of fields is larger than any that is read.
    fn check_size(&self, name: &str, found: &Found) -> Result<()> {
        match found.size {
            Some(size) if size > crate::files::VOCABULARY && !name.ends_with(".safetensors") => {
                Err(Error::BadDownload(format!(
                    "`{name}` of `{}` is announced with {}: such a file may have {}",
                    self.source.id,
                    cache::size(size),
                    cache::size(crate::files::VOCABULARY)
                )))
            }
            _ => Ok(()),
        }
    }

    /// Where a file is, at this commit.
    pub fn url(&self, name: &str) -> Result<Uri> {
        self.client.url(&self.commit, &self.source.path(name))
    }

    fn download(&self, name: &str, found: &Found) -> Result<()> {
        let path = self.source.path(name);
        let url = self.client.url(&self.commit, &path)?;
        download::download(self.client, &url, found, self.repository)?;
        self.repository.link(&self.commit, &path, &found.etag)
    }
}

impl Files for Remote<'_> {
    fn get(&self, names: &[&str]) -> Result<Vec<bool>> {
        let watch = self.client.watch;
        let replies = in_parallel(names, |name| self.head(name), || ())?;
        let there = replies.iter().map(|reply| !matches!(reply, Reply::Absent { .. })).collect();
        let mut wanted: Vec<(&str, Found)> = vec![];
        for (name, reply) in names.iter().zip(replies) {
            if let Reply::Found(found) = reply {
                self.check_size(name, &found)?;
                watch.expect(found.size.unwrap_or(0));
                wanted.push((name, found));
            }
        }
        self.repository.check_room(wanted.iter().map(|(_, found)| found))?;
        in_parallel(&wanted, |(name, found)| self.download(name, found), || watch.stop())?;
        Ok(there)
    }

    fn list(&self) -> Result<Vec<String>> {
        let paths = self.client.list(&self.commit)?;
        let folder = self.source.path("");
        let within = |path: &String| path.strip_prefix(&folder).map(str::to_owned);
        let direct = |name: &String| !name.contains(['/', '\\']);
        Ok(paths.iter().filter_map(within).filter(direct).collect())
    }

    // Only the listing of the repository has their names. It is spared where a tokenizer is here: what
    // has brought it (Bombus, transformers, mlx-lm) has brought them too.
    fn templates(&self) -> Result<Vec<String>> {
        let is_here = |name| self.repository.has(&self.commit, &self.source.path(name));
        if is_here("tokenizer.json") || is_here("merges.txt") {
            return Ok(vec![]);
        }
        let paths = match self.client.list(&self.commit) {
            // A mirror may have no listings. As in transformers, it is then done without.
            Err(Error::NotFound(_) | Error::Unauthorized(_)) => vec![],
            paths => paths?,
        };
        let folder = self.source.path("");
        let within = |path: &String| path.strip_prefix(&folder).map(str::to_owned);
        let names: Vec<String> =
            paths.iter().filter_map(within).filter(|name| is_template(name)).collect();
        match names.len() {
            many if many > MOST_TEMPLATES => {
                Err(Error::Tokenizer(format!("`{TEMPLATES}` has {many} chat templates")))
            }
            _ => Ok(names),
        }
    }

    fn folder(&self) -> PathBuf {
        self.source.folder(self.repository.snapshot(&self.commit))
    }

    fn missing(&self, name: &str) -> Error {
        let Source { id, revision, .. } = self.source;
        Error::NotFound(format!(
            "there is no `{}` in `{id}` (revision `{revision}`)",
            self.source.path(name)
        ))
    }
}

/// The results of all, or the first error; that calls `fail`, so that the others may end early.
pub fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
    fail: impl Fn() + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<R>>> = Mutex::new(items.iter().map(|_| None).collect());
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let serve = || {
        while let Some((index, item)) = {
            let index = next.fetch_add(1, Relaxed);
            items.get(index).map(|item| (index, item))
        } {
            match crate::error::catch(|| work(item)) {
                Ok(result) => {
                    results.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(result);
                }
                Err(error) => {
                    // What fails after it may do so because of it.
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    next.store(items.len(), Relaxed);
                    fail();
                }
            }
        }
    };
    std::thread::scope(|scope| {
        // This thread is one of them: where there are no more, it does all.
        for _ in 1..PARALLEL.min(items.len()) {
            _ = std::thread::Builder::new().name("bombus-hub".into()).spawn_scoped(scope, serve);
        }
        serve();
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(results
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .into_iter()
            .flatten()
            .collect()),
    }
}
