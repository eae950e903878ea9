//! A repository's way out of the cache.

use super::cache::{Repository, open_lock};
use crate::error::{Error, Result};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Removes all of a repository, and returns how many bytes that has freed. What is mapped from its
/// files stays readable. Fails where a download of it is running.
pub fn remove(cache: &Path, id: &str) -> Result<u64> {
    let repository = Repository::new(cache, id);
    let folder = &repository.folder;
    let metadata = fs::symlink_metadata(folder);
    match metadata.map(|there| there.file_type()) {
        Ok(kind) if kind.is_dir() => {}
        Ok(_) => {
            let path = folder.display();
            return Err(Error::Io(format!("`{path}` is no folder but a link: remove it by hand")));
        }
        Err(_) => {
            let cache = cache.display();
            return Err(Error::NotFound(format!("`{id}` is not in the cache `{cache}`")));
        }
    }
    // Held until all is gone.
    let _locks = lock_all(&repository, id)?;
    let removed =
        |error: io::Error| Error::Io(format!("could not remove `{}`: {error}", folder.display()));
    // In one step it is gone for everybody, and not half of it.
    let gone = tempfile::Builder::new().prefix(".removed-").tempdir_in(cache).map_err(removed)?;
    let gone_folder = gone.path().join("repository");
    fs::rename(folder, &gone_folder).map_err(removed)?;
    let bytes = size(&gone_folder);
    gone.close().map_err(removed)?;
    // A lock's file that stays does no harm.
    _ = fs::remove_dir_all(&repository.locks);
    Ok(bytes)
}

/// The locks of all downloads of a repository.
fn lock_all(repository: &Repository, id: &str) -> Result<Vec<fs::File>> {
    let Ok(entries) = fs::read_dir(&repository.locks) else { return Ok(vec![]) };
    let files = entries.flatten().filter_map(|entry| open_lock(&entry.path()).ok());
    files
        .map(|file| match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) => {
                Err(Error::Busy(format!("a download of `{id}` is running")))
            }
            // Some file systems have no locks.
            _ => Ok(file),
        })
        .collect()
}

/// The bytes of the files in a folder that nothing else holds; no link is followed.
fn size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(there) if there.is_dir() => size(&entry.path()),
        Ok(there) if there.is_file() && there.nlink() == 1 => there.len(),
        _ => 0,
    });
    sizes.sum()
}
