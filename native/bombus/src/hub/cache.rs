//! The folders of a repository in the cache, as huggingface_hub keeps them
//! (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>):
//!
//! ```text
//! models--owner--name/
//!   refs/main                        the commit that a branch or tag was last
//!   snapshots/<commit>/config.json   a link to
//!   blobs/<etag>                     the file; <etag>.incomplete while it comes
//!   .no_exist/<commit>/<file>        the commit has no such file
//! .locks/models--owner--name/<etag>.lock
//! ```

use super::client::{Found, is_name};
use super::is_commit;
use super::watch::Watch;
use crate::error::{Error, Result};
use crate::files;
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use rustix::fs::OFlags;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub struct Repository {
    folders: CacheRepo,
    pub folder: PathBuf,
    pub locks: PathBuf,
}

/// Bytes of a file that holds a commit's name.
const REFERENCE: u64 = 1024;

/// How often a lock that another process holds is tried again.
const NAP: Duration = Duration::from_millis(100);
/// A wait that is longer is told.
const SILENCE: Duration = Duration::from_secs(10);

impl Repository {
    pub fn new(cache: &Path, id: &str) -> Self {
        let repo = Repo::new(id.to_owned(), RepoType::Model);
        let name = repo.folder_name();
        Self {
            folder: cache.join(&name),
            locks: cache.join(".locks").join(&name),
            folders: Cache::new(cache.to_owned()).repo(repo),
        }
    }

    /// The commit that the revision is, or was when it was last asked for.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let path = self.folder.join("refs").join(revision);
        let commit = self.is_inside(&path).then(|| files::read_text(&path, REFERENCE).ok())??;
        Some(commit.trim().to_owned()).filter(|commit| is_name(commit))
    }

    pub fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        self.make_place(&path)?;
        // Nobody reads half of it.
        put(&path, |new| fs::write(new, commit))
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folders.pointer_path(commit)
    }

    /// A file of a snapshot: a link to its blob.
    pub fn pointer(&self, commit: &str, path: &str) -> PathBuf {
        self.snapshot(commit).join(path)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Whether a snapshot has a file, whose bytes are in the repository's folder too.
    pub fn has(&self, commit: &str, path: &str) -> bool {
        self.is_inside(&self.pointer(commit, path))
    }

    /// Whether something is there, and no link leads out of the repository's folder. The folder
    /// itself, or the whole cache, may be a link to another disk.
    fn is_inside(&self, path: &Path) -> bool {
        let folder = fs::canonicalize(&self.folder);
        fs::canonicalize(path).is_ok_and(|path| folder.is_ok_and(|folder| path.starts_with(folder)))
    }

    /// Fails where a folder of a snapshot has a link out of the repository's folder: loading would
    /// follow it.
    pub fn check_links(&self, snapshot: &Path) -> Result<()> {
        let entries = fs::read_dir(snapshot).map_err(|error| Error::io(snapshot, &error))?;
        for entry in entries.flatten() {
            let path = entry.path();
            if path.exists() && !self.is_inside(&path) {
                return Err(leads_out(&path));
            }
            // A folder of its own, so this ends.
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.check_links(&path)?;
            }
        }
        Ok(())
    }

    /// Fails where a link leads what is written at `path` out of the repository's folder.
    pub fn check_place(&self, path: &Path) -> Result<()> {
        fs::create_dir_all(&self.folder).map_err(|error| failed(&self.folder, &error))?;
        match path.ancestors().skip(1).find(|folder| folder.exists()) {
            Some(folder) if !self.is_inside(folder) => Err(leads_out(folder)),
            _ => Ok(()),
        }
    }

    fn make_place(&self, path: &Path) -> Result<()> {
        self.check_place(path)?;
        make_folder_of(path)
    }

    pub fn is_absent(&self, commit: &str, path: &str) -> bool {
        self.no_exist(commit, path).exists()
    }

    /// Spares a question next time; no matter if it cannot be noted.
    pub fn set_absent(&self, commit: &str, path: &str) {
        let note = self.no_exist(commit, path);
        if !note.exists() && self.make_place(&note).is_ok() {
            _ = File::create_new(&note);
        }
    }

    fn no_exist(&self, commit: &str, path: &str) -> PathBuf {
        self.folder.join(".no_exist").join(commit).join(path)
    }

    /// Puts a blob into a snapshot.
    pub fn link(&self, commit: &str, path: &str, etag: &str) -> Result<()> {
        let pointer = self.pointer(commit, path);
        self.make_place(&pointer)?;
        // From snapshots/<commit>/<folders of the path>.
        let up = "../".repeat(2 + path.matches('/').count());
        let target = format!("{up}blobs/{etag}");
        // Some file systems have no links.
        put(&pointer, |new| {
            symlink(&target, new).or_else(|_| fs::copy(self.blob(etag), new).map(drop))
        })
    }

    /// Waits for whoever is downloading the same file, here or in another process: with flock, as
    /// Python's filelock does. `nap` is called meanwhile. The lock ends with the file.
    pub fn lock(&self, etag: &str, watch: &Watch, mut nap: impl FnMut()) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_folder_of(&path)?;
        if self.locks.is_symlink() {
            return Err(leads_out(&self.locks));
        }
        let mut told_at = Some(Instant::now() + SILENCE);
        loop {
            let file = open_lock(&path).map_err(|error| failed(&path, &error))?;
            match file.try_lock() {
                // filelock removes its file when it lets go: a lock on that would be one's own.
                Ok(()) if is_at(&file, &path) => return Ok(file),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    nap();
                    watch.sleep(NAP)?;
                    if told_at.take_if(|at| *at <= Instant::now()).is_some() {
                        watch.warn(format!("waiting for another download of `{etag}`"));
                    }
                }
                // Some file systems have no locks. Two may then get into each other's way: the check
                // of what they bring finds it.
                Err(TryLockError::Error(_)) => return Ok(file),
            }
        }
    }

    /// Fails where the disk has no room for what is missing of these files.
    pub fn check_room<'a>(&self, files: impl Iterator<Item = &'a Found>) -> Result<()> {
        let missing = files.map(|file| self.missing_bytes(file)).fold(0, u64::saturating_add);
        let blobs = self.folder.join("blobs");
        if missing == 0 {
            return Ok(());
        }
        self.check_place(&blobs.join("one"))?;
        fs::create_dir_all(&blobs).map_err(|error| failed(&blobs, &error))?;
        let Ok(disk) = rustix::fs::statvfs(&blobs) else { return Ok(()) };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        match free < missing {
            true => Err(Error::DiskFull(format!(
                "`{}` needs room for {}, and has {}",
                blobs.display(),
                size(missing),
                size(free)
            ))),
            false => Ok(()),
        }
    }

    fn missing_bytes(&self, file: &Found) -> u64 {
        let blob = self.blob(&file.etag);
        let length = |path: &Path| fs::symlink_metadata(path).map_or(0, |metadata| metadata.len());
        let here = if blob.exists() { length(&blob) } else { length(&incomplete(&blob)) };
        file.size.unwrap_or(0).saturating_sub(here)
    }
}

/// A lock's file, made where there is none; never what a link leads to, nor a FIFO that waits.
pub fn open_lock(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let own = OpenOptions::new().create(true).append(true).custom_flags(flags).open(path);
    // Another user's can be locked, too.
    own.or_else(|_| OpenOptions::new().read(true).custom_flags(flags).open(path))
}

fn leads_out(path: &Path) -> Error {
    Error::Io(format!(
        "`{}` is, or is behind, a link out of the repository's folder in the cache: remove it, and it is \
         downloaded again",
        path.display()
    ))
}

/// Where a blob is while it comes. It stays after an interruption, for the next one to go on.
pub fn incomplete(blob: &Path) -> PathBuf {
    let mut path = blob.as_os_str().to_owned();
    path.push(".incomplete");
    path.into()
}

/// Makes something beside `path`, and gives it that name in one step.
fn put(path: &Path, make: impl FnMut(&Path) -> io::Result<()>) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    let made =
        tempfile::Builder::new().make_in(folder, make).map_err(|error| failed(path, &error))?;
    made.into_temp_path().persist(path).map_err(|error| failed(path, &error.error))
}

fn is_at(file: &File, path: &Path) -> bool {
    let same = |there: fs::Metadata| {
        file.metadata().is_ok_and(|here| (here.dev(), here.ino()) == (there.dev(), there.ino()))
    };
    fs::metadata(path).is_ok_and(same)
}

pub fn make_folder_of(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(|error| failed(folder, &error))
}

/// What went wrong with a file of the cache.
pub fn failed(path: &Path, error: &io::Error) -> Error {
    let message = format!("could not write `{}`: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull(message),
        _ => Error::Io(message),
    }
}

/// "4.3 GB"
pub fn size(bytes: u64) -> String {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    let bytes = bytes as f64;
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", bytes / unit),
        None => format!("{bytes} bytes"),
    }
}
