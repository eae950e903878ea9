//! Small files of a repository, read whole: configurations, tokenizers, templates. And new files.
//!
//! They come from outside. Only a regular file is read (a FIFO would hold its reader for ever, a
//! device has no end), and only up to a size, so that no file decides how much memory is taken.

mod content;
mod fields;
mod json;
pub mod mapped;
mod new_file;
pub mod safetensors;

use crate::error::{Error, Result};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs::{File, FileType, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

pub use content::{HEAD, mistaken_tensors, other_formats};
pub use fields::{Fields, says, short};
pub use json::{json, parse};
pub use new_file::{NewFile, write_error};

/// Bytes that a `config.json`, an index, or another file of fields may have.
pub const FIELDS: u64 = 64 << 20;

/// Bytes that a `tokenizer.json` or a file of its vocabulary may have.
pub const VOCABULARY: u64 = 256 << 20;

/// Bytes that a chat template may have.
pub const TEMPLATE: u64 = 4 << 20;

/// The folder of chat templates that have names, in files `<name>.jinja`, as in transformers.
pub const TEMPLATES: &str = "additional_chat_templates";

/// So many templates are read, or downloaded.
pub const MOST_TEMPLATES: usize = 100;

/// The bytes of a regular file that has at most `most`, and is not plainly something else.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let unread = |what| Error::Io(format!("could not read {what}"));
    read_or(path, most, unread)
}

/// The same; `wrong`: the error for what is something else
pub fn read_or(path: &Path, most: u64, wrong: impl FnOnce(String) -> Error) -> Result<Vec<u8>> {
    let bytes = read_bytes(path, most)?;
    match content::mistaken(&bytes) {
        Some(what) => Err(wrong(format!("`{}`: {what}", path.display()))),
        None => Ok(bytes),
    }
}

fn read_bytes(path: &Path, most: u64) -> Result<Vec<u8>> {
    let file = open(path)?;
    let size = file.metadata().map_err(|error| Error::io(path, &error))?.len();
    if size > most {
        return Err(too_large(path, most));
    }
    let mut bytes = vec![];
    let read = file.take(most + 1).read_to_end(&mut bytes);
    read.map_err(|error| Error::io(path, &error))?;
    // It may have grown since.
    if bytes.len() as u64 > most { Err(too_large(path, most)) } else { Ok(bytes) }
}

/// The text of a regular file that has at most `most` bytes, in UTF-8.
pub fn read_text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(read(path, most)?)
        .map_err(|_| Error::Io(format!("`{}` is not UTF-8", path.display())))
}

/// Whether anything has this path, be it a link that leads nowhere. Such a one is no file that is
/// absent: opening it says what it is.
pub fn is_there(path: &Path) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    match std::fs::symlink_metadata(path) {
        Ok(_) => true,
        Err(error) => !matches!(error.kind(), NotFound | NotADirectory),
    }
}

/// Why a path that is there cannot be opened.
fn unopened(path: &Path, error: &std::io::Error) -> Error {
    let Ok(target) = std::fs::read_link(path) else { return Error::io(path, error) };
    let end = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::NOTDIR) => "which is not there",
        Some(Errno::LOOP) => "which leads back to it",
        _other => return Error::io(path, error),
    };
    let (path, target) = (path.display(), target.display());
    Error::Io(format!("could not read `{path}`: it is a link to `{target}`, {end}"))
}

/// A regular file, open for reading.
pub fn open(path: &Path) -> Result<File> {
    // Without NONBLOCK, opening a FIFO waits for its writer.
    let flags = OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = file.map_err(|error| unopened(path, &error))?;
    let kind = file.metadata().map_err(|error| Error::io(path, &error))?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    let kind = self::kind(kind);
    Err(Error::Io(format!("could not read `{}`: expected a file, it is {kind}", path.display())))
}

/// What it is, in words.
pub fn kind(kind: FileType) -> &'static str {
    match kind {
        kind if kind.is_file() => "a file",
        kind if kind.is_dir() => "a folder",
        kind if kind.is_fifo() => "a FIFO",
        kind if kind.is_socket() => "a socket",
        _ => "a device",
    }
}

fn too_large(path: &Path, most: u64) -> Error {
    let path = path.display();
    Error::Io(format!("`{path}` is too large: such a file may have {} MiB", most >> 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn message(path: &Path) -> String {
        read(path, 1 << 20).expect_err("an error").to_string()
    }

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("small"), "text").unwrap();
        symlink("small", path("link")).unwrap();
        assert_eq!(read(&path("link"), 4).unwrap(), b"text");
        assert!(read(&path("link"), 3).unwrap_err().to_string().contains("too large"));

        symlink("/dev/zero", path("device")).unwrap();
        assert!(message(&path("device")).contains("it is a device"));
        assert!(message(folder.path()).contains("it is a folder"));
        let fifo = std::process::Command::new("mkfifo").arg(path("fifo")).status();
        assert!(fifo.unwrap().success());
        assert!(message(&path("fifo")).contains("it is a FIFO"));
        File::create(path("sparse")).unwrap().set_len(16 << 30).unwrap();
        assert!(message(&path("sparse")).contains("may have 1 MiB"));
        assert_eq!(read(&path("nothing"), 1).unwrap_err().reason(), "not_found");
    }

    #[test]
    fn links_that_lead_nowhere_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for (name, target) in [("broken", "nothing"), ("ring", "ring"), ("within", "ring/x")] {
            symlink(target, path(name)).unwrap();
            assert!(is_there(&path(name)));
            assert!(message(&path(name)).contains(&format!("a link to `{target}`")));
            assert_eq!(read(&path(name), 1).unwrap_err().reason(), "io");
        }
        assert!(!is_there(&path("nothing")) && !is_there(&path("nothing/x")));
    }
}
