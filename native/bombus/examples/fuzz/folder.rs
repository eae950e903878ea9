//! The folder that an input's files lie in.

use anyhow::Result;
use std::path::{Path, PathBuf};

/// Emptied for every input.
pub struct Folder {
    folder: tempfile::TempDir,
    files: Vec<PathBuf>,
}

/// A temporary folder in memory, where there is such a place.
pub fn temporary() -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    Ok(if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? })
}

impl Folder {
    /// Within the parent's folder, which goes with the parent where a child is killed.
    pub fn new(within: &Path) -> Result<Self> {
        Ok(Self { folder: tempfile::tempdir_in(within)?, files: vec![] })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn clear(&mut self) {
        for file in self.files.drain(..) {
            _ = std::fs::remove_file(file);
        }
    }

    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path().join(name);
        std::fs::write(&path, bytes)?;
        self.files.push(path);
        Ok(())
    }

    /// A whole file beside the mutated one.
    pub fn link(&mut self, from: &Path) -> Result<()> {
        let path = self.path().join(from.file_name().unwrap_or_default());
        std::os::unix::fs::symlink(from, &path)?;
        self.files.push(path);
        Ok(())
    }

    /// Copies what is there to a folder that stays.
    pub fn keep(&self, name: &str) -> Result<PathBuf> {
        let kept = std::env::temp_dir().join("bombus-fuzz").join(name);
        std::fs::create_dir_all(&kept)?;
        for file in &self.files {
            _ = std::fs::copy(file, kept.join(file.file_name().unwrap_or_default()));
        }
        Ok(kept)
    }
}
