//! Counts of what is alive in the process, for `memory_info`.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

pub static MODELS: AtomicUsize = AtomicUsize::new(0);
pub static ADAPTERS: AtomicUsize = AtomicUsize::new(0);
pub static SEQUENCES: AtomicUsize = AtomicUsize::new(0);
/// Keys and values of running sequences, without what prefix caches hold.
pub static KV_BYTES: AtomicUsize = AtomicUsize::new(0);
/// What prefix caches hold.
pub static PREFIX_BYTES: AtomicUsize = AtomicUsize::new(0);
/// What the CPU backend holds: weights, adapters, caches.
pub static CPU_BYTES: AtomicUsize = AtomicUsize::new(0);

static CPU_PEAK: AtomicUsize = AtomicUsize::new(0);

/// What the CPU backend holds, and has held at most.
pub fn cpu_bytes() -> [usize; 2] {
    [CPU_BYTES.load(Relaxed), CPU_PEAK.load(Relaxed)]
}

/// A share in a gauge, given back when it is dropped.
#[derive(Debug)]
pub struct Share {
    gauge: &'static AtomicUsize,
    amount: usize,
}

impl Share {
    pub fn one(gauge: &'static AtomicUsize) -> Self {
        let mut share = Self { gauge, amount: 0 };
        share.set(1);
        share
    }

    pub fn of(gauge: &'static AtomicUsize) -> Self {
        Self { gauge, amount: 0 }
    }

    pub fn amount(&self) -> usize {
        self.amount
    }

    pub fn set(&mut self, amount: usize) {
        let total = self.gauge.fetch_add(amount, Relaxed) + amount;
        let before = std::mem::replace(&mut self.amount, amount);
        self.gauge.fetch_sub(before, Relaxed);
        if std::ptr::eq(self.gauge, &CPU_BYTES) {
            CPU_PEAK.fetch_max(total - before, Relaxed);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}
