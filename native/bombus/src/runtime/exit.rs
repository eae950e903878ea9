//! The end of the process while an engine works.
//!
//! `exit` runs the destructors of MLX's globals. A thread that computes meanwhile would crash, so
//! the process waits until every engine has come to a stop: for a moment, as a rule.

use crate::runtime::abandon;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Once, OnceLock};
use std::time::{Duration, Instant};

static STOPPING: AtomicBool = AtomicBool::new(false);
static BUSY: AtomicUsize = AtomicUsize::new(0);

/// How many seconds a process waits that exits: longer than a step takes, shorter than a person does.
static PATIENCE: AtomicU64 = AtomicU64::new(5);
const NAP: Duration = Duration::from_millis(1);

/// Held while a thread uses MLX.
pub struct BusyGuard(());

impl BusyGuard {
    /// Does not return where the process is exiting.
    pub fn enter() -> Self {
        BUSY.fetch_add(1, SeqCst);
        let busy = Self(());
        if stopping() {
            busy.stop();
        }
        busy
    }

    /// Stays here until the process is gone.
    pub fn stop(self) -> ! {
        drop(self);
        loop {
            std::thread::park();
        }
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        BUSY.fetch_sub(1, SeqCst);
    }
}

/// A step may be compiled for a card first, for half a minute and more.
#[cfg(feature = "mlx")]
pub fn expect_compilation() {
    PATIENCE.store(60, SeqCst);
}

pub fn stopping() -> bool {
    STOPPING.load(SeqCst)
}

/// To be called once a backend's globals are there: what is registered last runs first, so each
/// backend that has any needs a registration of its own, behind them.
#[allow(unsafe_code)]
pub fn register(backend: &'static Once) {
    // SAFETY: the function does not unwind, and this library stays loaded to the end.
    backend.call_once(|| _ = unsafe { libc::atexit(wait) });
}

extern "C" fn wait() {
    STOPPING.store(true, SeqCst);
    abandon::all();
    // One for all registrations.
    static BEGUN: OnceLock<Instant> = OnceLock::new();
    let begun = BEGUN.get_or_init(Instant::now);
    let patience = Duration::from_secs(PATIENCE.load(SeqCst));
    while BUSY.load(SeqCst) > 0 && begun.elapsed() < patience {
        std::thread::sleep(NAP);
    }
}
