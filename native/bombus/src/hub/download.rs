//! One file, from the Hub to its blob: once for all who want it, from where it was interrupted, and
//! checked before it has its name.

use super::cache::{self, Repository};
use super::client::{Again, Client, Found, Patience, Trouble};
use super::watch::{Counted, Watch};
use crate::error::{Error, Result};
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use ureq::http::{StatusCode, Uri};

const BUFFER: usize = 256 * 1024;
/// An attempt that brought less is as good as none: else a server that ends each of them after a
/// byte would hold the download for ever.
const PROGRESS: u64 = 64 * 1024;

pub fn download(client: &Client, url: &Uri, found: &Found, repository: &Repository) -> Result<()> {
    let blob = repository.blob(&found.etag);
    let path = cache::incomplete(&blob);
    let mut counted = Counted::new(client.watch);
    cache::make_folder_of(&blob)?;
    if !is_whole(&blob, found) {
        let others_bytes = || counted.set(length(&path));
        let _lock = repository.lock(&found.etag, client.watch, others_bytes)?;
        // Whoever had the lock may have brought it.
        if !is_whole(&blob, found) {
            repository.check_place(&path)?;
            bring(client, url, found, &path, &mut counted).inspect_err(|_| tidy(&path, found))?;
            fs::rename(&path, &blob).map_err(|error| cache::failed(&blob, &error))?;
        }
    }
    counted.set(length(&blob));
    Ok(())
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// A link is none, wherever it leads to: a download takes its place.
fn is_whole(blob: &Path, found: &Found) -> bool {
    let here = fs::symlink_metadata(blob).ok().filter(fs::Metadata::is_file);
    here.is_some_and(|here| found.size.is_none_or(|size| size == here.len()))
}

/// Removes what no later download can go on with.
fn tidy(path: &Path, found: &Found) {
    if found.size.is_none() || length(path) == 0 {
        _ = fs::remove_file(path);
    }
}

/// Removes what is no file of its own: a link would be written through, a FIFO waited for. A device
/// holds nothing that could be lost.
fn make_way(path: &Path) {
    let is_file = fs::symlink_metadata(path).is_ok_and(|there| there.is_file());
    let is_device = fs::metadata(path).is_ok_and(|there| there.file_type().is_char_device());
    if !is_file && !is_device {
        _ = fs::remove_file(path);
    }
}

fn bring(
    client: &Client,
    url: &Uri,
    found: &Found,
    path: &Path,
    counted: &mut Counted,
) -> Result<()> {
    let mut partial = Partial::open(path, found, client)?;
    // What was there may be wrong, or a byte was lost on the way: once more, from the start.
    let mut second = false;
    client.patiently(Patience::Long, || {
        partial.fetch(client, url, counted)?;
        match partial.check(url) {
            Err(error) if !second && !partial.is_endless() => {
                second = true;
                partial.clear()?;
                Err(Trouble { error, again: Again::Soon, progress: false })
            }
            checked => {
                if checked.is_err() {
                    partial.clear()?;
                }
                Ok(checked?)
            }
        }
    })?;
    // Its name says that it is whole: so it must be, also after a power cut.
    partial.file.sync_data().map_err(|error| cache::failed(path, &error))
}

/// A file that is not whole yet.
struct Partial<'a> {
    path: PathBuf,
    file: File,
    length: u64,
    /// The most that it ever was: only what is beyond is progress.
    furthest: u64,
    /// As announced, by the file's head or with its first byte.
    size: Option<u64>,
    /// Where it is not announced, the bytes that it may have.
    most: u64,
    etag: &'a str,
    digests: Digests,
    watch: &'a Watch,
}

impl<'a> Partial<'a> {
    /// Goes on with what is there.
    fn open(path: &Path, found: &'a Found, client: &Client<'a>) -> Result<Self> {
        make_way(path);
        let file = File::options().create(true).append(true).read(true).open(path);
        let file = file.map_err(|error| cache::failed(path, &error))?;
        let (etag, size) = (found.etag.as_str(), found.size);
        let digests = Digests::new(etag, size);
        let (path, watch, most) = (path.to_owned(), client.watch, client.settings.most);
        let mut partial =
            Self { path, file, length: 0, furthest: 0, size, most, etag, digests, watch };
        // Where nobody says how long it should be, it may be too long.
        match size.is_none_or(|size| length(&partial.path) > size) {
            true => partial.clear()?,
            false => partial.read_again()?,
        }
        Ok(partial)
    }

    fn failed(&self, error: &std::io::Error) -> Error {
        cache::failed(&self.path, error)
    }

    fn read_again(&mut self) -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        self.file.seek(SeekFrom::Start(0)).map_err(|error| self.failed(&error))?;
        self.digests = Digests::new(self.etag, self.size);
        self.length = 0;
        let mut there = (&self.file).take(length(&self.path));
        loop {
            self.watch.check()?;
            let read = there.read(&mut buffer).map_err(|error| self.failed(&error))?;
            if read == 0 {
                return Ok(());
            }
            self.digests.update(&buffer[..read]);
            self.length += read as u64;
        }
    }

    fn clear(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(|error| self.failed(&error))?;
        self.length = 0;
        self.digests = Digests::new(self.etag, self.size);
        Ok(())
    }

    /// What is missing of it.
    fn fetch(&mut self, client: &Client, url: &Uri, counted: &mut Counted) -> Result<(), Trouble> {
        counted.set(self.length);
        if self.size == Some(self.length) && self.length > 0 {
            return Ok(());
        }
        let response = client.get(url.clone(), self.length)?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            // There is no more of it: the check says whether that is right.
            return Ok(());
        }
        if self.length > 0 && !continues(&response, self.length) {
            self.clear()?;
            counted.set(0);
            // All of it will do; another part of it will not.
            if response.status() != StatusCode::OK {
                let file = url.path();
                let error = Error::BadDownload(format!("`{file}` did not go on where it ended"));
                return Err(Trouble { error, again: Again::Soon, progress: false });
            }
        }
        if self.size.is_none() {
            // git's name of the file begins with its size.
            self.size = announced(&response);
            self.read_again()?;
        }
        let received = self.receive(client, url, client.body(response), counted);
        let progress = self.length >= self.furthest + PROGRESS;
        self.furthest = self.furthest.max(self.length);
        received.map_err(|trouble| match trouble.again {
            Again::Slow => trouble,
            _ => Trouble { progress, ..trouble },
        })
    }

    fn receive(
        &mut self,
        client: &Client,
        url: &Uri,
        mut body: impl Read,
        counted: &mut Counted,
    ) -> Result<(), Trouble> {
        let mut buffer = vec![0; BUFFER];
        // Too much is as wrong as too little: the check says so.
        while self.length <= self.size.unwrap_or(self.most) {
            client.watch.check()?;
            match body.read(&mut buffer) {
                Ok(0) if self.size.is_some_and(|size| self.length < size) => {
                    let cut = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                    return Err(client.unreachable(url, cut.into()));
                }
                Ok(0) => break,
                Ok(read) => {
                    self.append(&buffer[..read])?;
                    counted.receive(read as u64);
                }
                Err(error) => return Err(client.unreachable(url, error.into())),
            }
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| self.failed(&error))?;
        self.digests.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Whether more came than a file may have whose size nobody says.
    fn is_endless(&self) -> bool {
        self.size.is_none() && self.length > self.most
    }

    fn check(&mut self, url: &Uri) -> Result<()> {
        let file = url.path();
        if self.is_endless() {
            return Err(Error::BadDownload(format!(
                "`{file}` came without a size, and does not end after {}",
                cache::size(self.most)
            )));
        }
        if self.size.is_none() && !self.digests.is_empty() {
            // git's name of it begins with its size.
            self.size = Some(self.length);
            self.read_again()?;
        }
        match self.size {
            Some(size) if size != self.length => Err(Error::BadDownload(format!(
                "`{file}` came with {} bytes, {size} were announced",
                self.length
            ))),
            None => Err(Error::BadDownload(format!(
                "`{file}` came without a size and without a hash: nobody can say whether it is whole"
            ))),
            _ if !self.digests.agree(self.etag) => Err(Error::BadDownload(format!(
                "`{file}` came with other bytes than announced: its hash is not {}",
                self.etag
            ))),
            _ => Ok(()),
        }
    }
}

/// The size of the whole file, as an answer with all of it or with its rest says.
fn announced(response: &ureq::http::Response<ureq::Body>) -> Option<u64> {
    let value = |name| response.headers().get(name)?.to_str().ok();
    match response.status() {
        StatusCode::PARTIAL_CONTENT => value("content-range")?.rsplit_once('/')?.1.parse().ok(),
        _ => value("content-length")?.parse().ok(),
    }
}

/// Whether an answer begins where it was asked to.
fn continues(response: &ureq::http::Response<ureq::Body>, from: u64) -> bool {
    let range = response.headers().get("content-range").and_then(|range| range.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| range.trim().starts_with(&format!("bytes {from}-")))
}

/// What the bytes may hash to. 64 digits are the file's SHA-256; 40 are git's name of it, which is the
/// SHA-1 with its size in front, or the file's SHA-1 itself, as mirrors give it. Other tags
/// say nothing about the bytes.
struct Digests(Vec<Context>);

impl Digests {
    fn new(etag: &str, size: Option<u64>) -> Self {
        let digits = etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        Self(match etag.len() {
            64 if digits => vec![Context::new(&SHA256)],
            40 if digits => {
                let sha1 = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                let git = size.map(|size| {
                    let mut git = sha1.clone();
                    git.update(format!("blob {size}\0").as_bytes());
                    git
                });
                std::iter::once(sha1).chain(git).collect()
            }
            _ => vec![],
        })
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn update(&mut self, bytes: &[u8]) {
        self.0.iter_mut().for_each(|digest| digest.update(bytes));
    }

    fn agree(&self, etag: &str) -> bool {
        let hex = |digest: &Context| -> String {
            let digest = digest.clone().finish();
            digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
        };
        self.is_empty() || self.0.iter().any(|digest| hex(digest).eq_ignore_ascii_case(etag))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agree(etag: &str, bytes: &[u8]) -> bool {
        let mut digests = Digests::new(etag, Some(bytes.len() as u64));
        digests.update(bytes);
        digests.agree(etag)
    }

    #[test]
    fn hashes_are_those_of_git_and_sha256sum() {
        // printf 'hello\n' | sha256sum; | git hash-object --stdin; | sha1sum
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let tags = [
            sha256,
            "ce013625030ba8dba906f756967f9e9ca394464a",
            "f572d396fae9206628714fb2ce00f72e94f2258f",
        ];
        for tag in tags {
            assert!(agree(tag, b"hello\n"), "{tag}");
            assert!(!agree(tag, b"hallo\n"), "{tag}");
        }
        assert!(agree("no-hash", b"anything"));
    }
}
