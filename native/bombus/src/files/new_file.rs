//! A file on its way: it lies beside its path under a name of its own, and gets its name when it
//! is whole. A link in its place is replaced, and never written through.

use super::kind;
use crate::error::{Error, Result};
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::{Builder, NamedTempFile};

pub struct NewFile {
    path: PathBuf,
    /// what it is called in messages
    shown: PathBuf,
    file: NamedTempFile,
}

impl NewFile {
    pub fn create(path: &Path) -> Result<Self> {
        Self::create_as(path, path)
    }

    /// One that will be moved to the path `shown`.
    pub fn create_as(path: &Path, shown: &Path) -> Result<Self> {
        // A device or a FIFO would be replaced too.
        if let Ok(there) = std::fs::symlink_metadata(path)
            && !there.is_file()
            && !there.is_symlink()
        {
            let (path, kind) = (shown.display(), kind(there.file_type()));
            let message = format!("could not write `{path}`: expected a file, it is {kind}");
            return Err(Error::Io(message));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let file = Builder::new()
            .prefix(".bombus-")
            .suffix(".part")
            // As any other new file, within the process's umask.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder.unwrap_or(Path::new(".")))
            .map_err(|error| write_error(shown, &error))?;
        Ok(Self { path: path.to_owned(), shown: shown.to_owned(), file })
    }

    pub fn file(&self) -> &File {
        self.file.as_file()
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| write_error(&self.shown, &error))
    }

    /// All of `from`; what goes wrong there has that path.
    pub fn copy(&mut self, from: &Path) -> Result<()> {
        let mut source = super::open(from)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match source.read(&mut buffer).map_err(|error| Error::io(from, &error))? {
                0 => return Ok(()),
                read => self.write(&buffer[..read])?,
            }
        }
    }

    /// Gives the file its name, once the disk has all of it.
    pub fn finish(self) -> Result<()> {
        let Self { path, shown, file } = self;
        file.as_file().sync_all().map_err(|error| write_error(&shown, &error))?;
        file.persist(&path).map(drop).map_err(|error| write_error(&shown, &error.error))
    }
}

/// What went wrong with a file that was written.
pub fn write_error(path: &Path, error: &io::Error) -> Error {
    // The temporary file's own name would tell nobody anything.
    let reason = match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code).to_string(),
        None => error.to_string(),
    };
    let message = format!("could not write `{}`: {reason}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Error::DiskFull(message)
        }
        _ => Error::Io(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn put(path: &Path, bytes: &[u8]) -> Result<()> {
        let mut file = NewFile::create(path)?;
        file.write(bytes)?;
        file.finish()
    }

    #[test]
    fn links_are_replaced_and_others_files_are_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["soft", "hard", "file.new", "file.part"] {
            std::fs::write(path(name), "kept").unwrap();
        }
        symlink("soft", path("link")).unwrap();
        std::fs::hard_link(path("hard"), path("twin")).unwrap();
        for name in ["file", "link", "twin"] {
            put(&path(name), b"new").unwrap();
            assert_eq!(std::fs::read(path(name)).unwrap(), b"new");
            assert!(!path(name).is_symlink());
        }
        for name in ["soft", "hard", "file.new", "file.part"] {
            assert_eq!(std::fs::read(path(name)).unwrap(), b"kept");
        }
        let plain = File::create(path("plain")).unwrap().metadata().unwrap().permissions();
        assert_eq!(std::fs::metadata(path("file")).unwrap().permissions(), plain);
    }

    #[test]
    fn what_does_not_end_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = NewFile::create(&folder.path().join("file")).unwrap();
        file.write(b"half").unwrap();
        drop(file);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(put(folder.path(), b"").unwrap_err().to_string().contains("it is a folder"));
        assert!(put(Path::new("/dev/null"), b"").unwrap_err().to_string().contains("a device"));
        let nowhere = folder.path().join("nowhere/file");
        assert_eq!(put(&nowhere, b"").unwrap_err().reason(), "io");
    }
}
