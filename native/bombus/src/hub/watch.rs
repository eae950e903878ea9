//! What the one who waits for a download hears, and its wish to stop.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// So many bytes of those that are known to be needed are here, and so many came through the
    /// network.
    Progress {
        bytes: u64,
        total: u64,
        received: u64,
    },
    /// Something did not work, and is tried again after so long.
    Waiting {
        reason: String,
        pause: Duration,
    },
    Warning(String),
}

pub struct Watch {
    listener: Mutex<Listener>,
    stopped: AtomicBool,
    bytes: AtomicU64,
    total: AtomicU64,
    received: AtomicU64,
}

struct Listener {
    tell: Box<dyn FnMut(Event) + Send>,
    /// When progress was last told.
    told: Instant,
}

/// How often progress is told.
const INTERVAL: Duration = Duration::from_millis(100);

/// How soon a wait notices that it should end.
const NAP: Duration = Duration::from_millis(20);

impl Watch {
    pub fn new(tell: impl FnMut(Event) + Send + 'static) -> Self {
        let listener = Listener { tell: Box::new(tell), told: Instant::now() };
        Self {
            listener: Mutex::new(listener),
            stopped: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            total: AtomicU64::new(0),
            received: AtomicU64::new(0),
        }
    }

    fn listener(&self) -> MutexGuard<'_, Listener> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is under way ends soon, with an error.
    pub fn stop(&self) {
        self.stopped.store(true, Relaxed);
    }

    pub fn check(&self) -> Result<()> {
        match self.stopped.load(Relaxed) {
            true => Err(Error::Io("the download was cancelled".into())),
            false => Ok(()),
        }
    }

    pub fn sleep(&self, pause: Duration) -> Result<()> {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            self.check()?;
            std::thread::sleep(NAP.min(pause));
        }
        self.check()
    }

    pub fn warn(&self, message: String) {
        (self.listener().tell)(Event::Warning(message));
    }

    pub fn waiting(&self, reason: String, pause: Duration) {
        (self.listener().tell)(Event::Waiting { reason, pause });
    }

    /// So many more bytes are needed.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Relaxed);
    }

    /// The last word on progress, where there was any.
    pub fn finish(&self) {
        if self.total.load(Relaxed) > 0 {
            (self.listener().tell)(self.progress());
        }
    }

    fn progress(&self) -> Event {
        let (bytes, total) = (self.bytes.load(Relaxed), self.total.load(Relaxed));
        Event::Progress { bytes, total: total.max(bytes), received: self.received.load(Relaxed) }
    }

    fn tell_progress_now_and_then(&self) {
        let mut listener = self.listener();
        if listener.told.elapsed() >= INTERVAL {
            listener.told = Instant::now();
            (listener.tell)(self.progress());
        }
    }
}

/// The bytes of one file.
pub struct Counted<'a> {
    watch: &'a Watch,
    bytes: u64,
}

impl<'a> Counted<'a> {
    pub fn new(watch: &'a Watch) -> Self {
        Self { watch, bytes: 0 }
    }

    /// So many came.
    pub fn receive(&mut self, bytes: u64) {
        self.watch.received.fetch_add(bytes, Relaxed);
        self.set(self.bytes + bytes);
    }

    /// So many are here: more than before, or fewer where it starts again.
    pub fn set(&mut self, bytes: u64) {
        // Wraps around where it is less, and so does the sum.
        self.watch.bytes.fetch_add(bytes.wrapping_sub(self.bytes), Relaxed);
        self.bytes = bytes;
        self.watch.tell_progress_now_and_then();
    }
}
