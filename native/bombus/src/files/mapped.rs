//! Files in memory, and what happens when one of them changes.
//!
//! A page of a mapped file that has shrunk (or cannot be read) is a SIGBUS, which would end the
//! process, and with it the BEAM. Here it ends as zeros in that place and as `check`'s error: a
//! handler puts anonymous pages there, and gives every other SIGBUS to whoever had it before.

use crate::error::{Error, Result};
use crate::files;
use memmap2::Mmap;
use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::SystemTime;

/// A file, mapped for reading. It is not kept open: the map keeps its bytes.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    stamp: Stamp,
    guarded: Guarded,
    map: Mmap,
}

/// What tells a file from others, and one that was written to from one that was not.
#[derive(Debug, PartialEq)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn new(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }

    fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

/// A piece of a mapped file, which lives as long as this.
#[derive(Clone, Debug)]
pub struct Mapped {
    pub file: Arc<MappedFile>,
    range: Range<usize>,
}

impl MappedFile {
    /// Fails on a file of less than `least` bytes.
    pub fn open(path: &Path, least: u64) -> Result<Self> {
        let file = files::open(path)?;
        let stamp = Stamp::new(&file.metadata().map_err(|error| Error::io(path, &error))?);
        if stamp.length < least {
            let problem = match stamp.length {
                0 => "is empty: the download or the copy has not ended",
                _ => "is too short to hold a header",
            };
            return Err(Error::Checkpoint(format!("`{}` {problem}", path.display())));
        }
        let map = map(&file).map_err(|error| Error::io(path, &error))?;
        let guarded = Guarded::new(&map)?;
        Ok(Self { path: path.to_owned(), stamp, guarded, map })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// A copy of the bytes in `range`.
    pub fn read(&self, range: Range<usize>) -> Result<Vec<u8>> {
        let bytes = self.map[range].to_vec();
        self.check()?;
        Ok(bytes)
    }

    /// The bytes in `range`, where they are mapped.
    pub fn map(self: &Arc<Self>, range: Range<usize>) -> Mapped {
        assert!(range.start <= range.end && range.end <= self.map.len(), "outside of the file");
        Mapped { file: self.clone(), range }
    }

    /// Fails where the file was written to since it was opened: what was read of it meanwhile may
    /// be of both versions.
    pub fn check(&self) -> Result<()> {
        // A file that has lost its name to another can still be read, and hardly be written to.
        let now = std::fs::metadata(&self.path).map(|metadata| Stamp::new(&metadata));
        let same = now.map_or(true, |now| !now.is_same_file(&self.stamp) || now == self.stamp);
        if self.guarded.is_whole() && same {
            return Ok(());
        }
        Err(Error::Io(format!("`{}` changed while it was in use", self.path.display())))
    }
}

impl Mapped {
    pub fn len(&self) -> usize {
        self.range.len()
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    pub fn bytes(&self) -> &[u8] {
        &self.file.map[self.range.clone()]
    }

    pub fn as_ptr(&self) -> *const u8 {
        self.bytes().as_ptr()
    }

    /// A part of it.
    pub fn copy(&self, range: Range<usize>) -> Vec<u8> {
        self.bytes()[range].to_vec()
    }
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only. Should somebody else write to the file, then the bytes change
    // under their readers, who take any byte for what it is and ask `check` before they answer.
    unsafe { Mmap::map(file) }
}

/// So many files can be mapped at once.
const SLOTS: usize = 4096;

/// Where files are mapped. The signal handler reads it, so it is made of atomics.
struct Slot {
    /// 0: free
    start: AtomicUsize,
    end: AtomicUsize,
    broken: AtomicBool,
}

static GUARDED: [Slot; SLOTS] = [const {
    Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), broken: AtomicBool::new(false) }
}; SLOTS];

/// A file's place in `GUARDED`.
#[derive(Debug)]
struct Guarded(usize);

impl Guarded {
    fn new(map: &Mmap) -> Result<Self> {
        handler::install();
        let start = map.as_ptr() as usize;
        for (place, slot) in GUARDED.iter().enumerate() {
            if slot.start.compare_exchange(0, start, SeqCst, SeqCst).is_ok() {
                slot.broken.store(false, SeqCst);
                slot.end.store(start + map.len(), SeqCst);
                return Ok(Self(place));
            }
        }
        Err(Error::OutOfMemory(format!("more than {SLOTS} files in use")))
    }

    fn is_whole(&self) -> bool {
        !GUARDED[self.0].broken.load(SeqCst)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        GUARDED[self.0].end.store(0, SeqCst);
        GUARDED[self.0].start.store(0, SeqCst);
    }
}

#[allow(unsafe_code)]
mod handler {
    use super::GUARDED;
    use libc::{c_int, c_void, sigaction, siginfo_t};
    use std::mem::MaybeUninit;
    use std::sync::atomic::Ordering::SeqCst;
    use std::sync::{Once, OnceLock};

    struct Before(sigaction);
    // SAFETY: it is a function's address and flags, which nobody writes to.
    unsafe impl Sync for Before {}
    // SAFETY: as above.
    unsafe impl Send for Before {}

    static BEFORE: OnceLock<Before> = OnceLock::new();

    pub fn install() {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            // SAFETY: `handle` does only what a signal handler may: atomics and a system call. It
            // is there only once it can tell who was there before.
            unsafe {
                let mut before = MaybeUninit::<sigaction>::zeroed();
                libc::sigaction(libc::SIGBUS, std::ptr::null(), before.as_mut_ptr());
                _ = BEFORE.set(Before(before.assume_init()));
                let mut own = MaybeUninit::<sigaction>::zeroed().assume_init();
                own.sa_sigaction = handle as *const () as usize;
                own.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigaction(libc::SIGBUS, &own, std::ptr::null_mut());
            }
        });
    }

    unsafe extern "C" fn handle(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        // SAFETY: the system hands over a valid `info`.
        let address = unsafe { (*info).si_addr() } as usize;
        for slot in &GUARDED {
            let (start, end) = (slot.start.load(SeqCst), slot.end.load(SeqCst));
            // The slot may have been given away between the two.
            let same = slot.start.load(SeqCst) == start;
            if start != 0 && same && (start..end).contains(&address) {
                slot.broken.store(true, SeqCst);
                if replace(address, end) {
                    return;
                }
            }
        }
        pass_on(signal, info, context);
    }

    /// Zeros from the page of `address` to the end of its map.
    fn replace(address: usize, end: usize) -> bool {
        // SAFETY: these pages are of a map of ours, which is replaced, not extended.
        unsafe {
            let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
            let first = address / page * page;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_FIXED;
            let place = first as *mut c_void;
            let made = libc::mmap(place, end - first, libc::PROT_READ, flags, -1, 0);
            made != libc::MAP_FAILED
        }
    }

    fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        let before = BEFORE.get().map(|before| before.0);
        let handler = before.map_or(libc::SIG_DFL, |before| before.sa_sigaction);
        // SAFETY: the handler is what `sigaction` gave, called as its flags say.
        unsafe {
            if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
                // The instruction comes again, and ends the process as it would have.
                libc::signal(signal, libc::SIG_DFL);
            } else if before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0) {
                type Full = unsafe extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
                std::mem::transmute::<usize, Full>(handler)(signal, info, context);
            } else {
                type Short = unsafe extern "C" fn(c_int);
                std::mem::transmute::<usize, Short>(handler)(signal);
            }
        }
    }
}
