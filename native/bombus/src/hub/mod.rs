//! Models, tokenizers and adapters from the Hugging Face Hub, in the cache that Python's
//! huggingface_hub uses: what one has downloaded, the other finds.
//!
//! `client` asks the Hub (at an `address`), `cache` is the folders on disk, `download` brings one
//! file (at a `pace`), `files` says which ones are needed, `outline` does without weights, `watch` is what the caller hears and says
//! meanwhile, `removal` takes a repository out of the cache.
//!
//! Of the hf-hub crate only the names of the cache's folders are used. Its version 1 is 232 crates,
//! and neither resumes, nor checks what it has, nor waits as it is told; 0.5 sends the token to
//! whatever host a file is on.

mod address;
mod cache;
mod client;
mod download;
mod files;
mod outline;
mod pace;
mod removal;
mod watch;

pub use client::Token;
pub use files::Kind;
pub use removal::remove;
pub use watch::{Event, Watch};

use crate::error::{Error, Result};
use crate::files as on_disk;
use cache::Repository;
use client::{Client, Patience};
use files::{Cached, Files, Remote};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the Hub is, and what is known of it here.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `https://huggingface.co`, or a mirror
    pub endpoint: String,
    /// `~/.cache/huggingface/hub`
    pub cache: PathBuf,
    pub token: Option<Token>,
    /// Only what is in the cache.
    pub offline: bool,
    /// Before the second attempt of a request; twice as long before each one after it.
    pub pause: Duration,
    /// Over so long a body must not be too slow.
    pub pace: Duration,
    /// Bytes of a file whose size nobody says.
    pub most: u64,
}

#[derive(Clone, Debug)]
pub struct Source {
    /// `owner/name`
    pub id: String,
    /// A branch, a tag, or a commit's hash.
    pub revision: String,
    /// The folder within the repository.
    pub subdir: Option<String>,
}

/// The folder with the files of this kind, downloaded where that is needed.
///
/// Where all of them are in the cache, a Hub that cannot be reached is a warning.
pub fn fetch(settings: &Settings, source: &Source, kind: Kind, watch: &Watch) -> Result<PathBuf> {
    let repository = Repository::new(&settings.cache, &source.id);
    if is_commit(&source.revision) && !settings.offline {
        let known =
            Cached { repository: &repository, source, commit: &source.revision, sure: true };
        if kind.collect(&known).is_ok() {
            repository.check_links(&known.folder())?;
            return Ok(known.folder());
        }
    }
    let cached = cached(settings, source, kind);
    if settings.offline {
        return cached.map_err(|missing| not_cached(source, &missing));
    }
    let patience = if cached.is_ok() { Patience::Short } else { Patience::Long };
    let updated = update(settings, source, kind, watch, &repository, patience);
    match (updated, cached) {
        (Err(error), Ok(folder)) if is_unreachable(&error) => {
            watch.warn(format!("{error}. Using what is in the cache: {}", folder.display()));
            Ok(folder)
        }
        (updated, _) => updated,
    }
}

/// A new folder with a model's small files; of its tensors there are the headers alone, in files that
/// have their size and no more (they are sparse). The caller removes it.
pub fn outline(settings: &Settings, source: &Source, watch: &Watch) -> Result<PathBuf> {
    let temporary = std::env::temp_dir();
    let folder = tempfile::tempdir().map_err(|error| on_disk::write_error(&temporary, &error))?;
    let cached = cached(settings, source, Kind::Model);
    match (settings.offline, cached) {
        (true, Err(missing)) => return Err(not_cached(source, &missing)),
        (true, Ok(cached)) => outline::link_all(&cached, folder.path())?,
        (false, cached) => {
            let patience = if cached.is_ok() { Patience::Short } else { Patience::Long };
            let made = outline_of_hub(settings, source, watch, patience, folder.path());
            match (made, cached) {
                (Err(error), Ok(cached)) if is_unreachable(&error) => {
                    watch
                        .warn(format!("{error}. Using what is in the cache: {}", cached.display()));
                    outline::link_all(&cached, folder.path())?;
                }
                (made, _) => made?,
            }
        }
    }
    watch.finish();
    Ok(folder.keep())
}

fn outline_of_hub(
    settings: &Settings,
    source: &Source,
    watch: &Watch,
    patience: Patience,
    folder: &Path,
) -> Result<()> {
    let repository = Repository::new(&settings.cache, &source.id);
    let client = Client::new(settings, source, watch)?;
    let remote = Remote::new(&client, &repository, source, Kind::Model, patience)?;
    outline::fill(&client, &remote, folder)
}

fn is_unreachable(error: &Error) -> bool {
    matches!(error, Error::NoNetwork(_) | Error::Server(_) | Error::RateLimited(_))
}

/// The folder, where all files of this kind are in it; else the error names what is missing.
pub fn cached(settings: &Settings, source: &Source, kind: Kind) -> Result<PathBuf> {
    let repository = Repository::new(&settings.cache, &source.id);
    let commit = repository.commit(&source.revision);
    let commit = commit.ok_or_else(|| Error::NotFound("nothing of it".into()))?;
    let cached = Cached { repository: &repository, source, commit: &commit, sure: false };
    kind.collect(&cached)?;
    repository.check_links(&cached.folder())?;
    Ok(cached.folder())
}

/// `patience`: with the question what the revision is now; what is new is worth more.
fn update(
    settings: &Settings,
    source: &Source,
    kind: Kind,
    watch: &Watch,
    repository: &Repository,
    patience: Patience,
) -> Result<PathBuf> {
    let client = Client::new(settings, source, watch)?;
    let remote = Remote::new(&client, repository, source, kind, patience)?;
    kind.collect(&remote)?;
    repository.check_links(&remote.folder())?;
    // All is there: a cache that cannot be written to is no reason to fail.
    _ = repository.set_commit(&source.revision, remote.commit());
    watch.finish();
    Ok(remote.folder())
}

fn not_cached(source: &Source, missing: &Error) -> Error {
    let Source { id, revision, .. } = source;
    Error::Offline(format!(
        "`{id}` (revision `{revision}`) is not in the cache: {missing}. Bombus is told to stay offline \
         (offline: true, or HF_HUB_OFFLINE)"
    ))
}

/// git's name of a commit, which never means another one.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Source {
    fn folder(&self, snapshot: PathBuf) -> PathBuf {
        self.subdir.iter().fold(snapshot, |folder, subdir| folder.join(subdir))
    }

    /// The path of a file within the repository.
    fn path(&self, name: &str) -> String {
        self.subdir.as_ref().map_or(name.to_owned(), |subdir| format!("{subdir}/{name}"))
    }
}
